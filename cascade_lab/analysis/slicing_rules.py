"""The rules of slices: one for each part of a column, and those on the paths of a decision tree."""

from __future__ import annotations

import itertools
import keyword
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import pandas as pd

from cascade_lab.analysis.text_features import TEXT_COLUMNS, column_kind
from cascade_lab.exceptions import RunError, did_you_mean

if TYPE_CHECKING:
    from sklearn.tree import DecisionTreeClassifier

Rule = str | Callable[[pd.DataFrame], Any]
"""A pandas query over a table, or a function that takes the table and returns one bool per row."""


def column_slices(table: pd.DataFrame, column: str, min_size: int) -> Iterator[tuple[str, np.ndarray]]:
    """Yield the rule and the mask of each slice of a column. Slices of all rows, or of too few, are left out."""
    values, name = _values(table, column), _query_name(column)
    kind = column_kind(values)
    if kind is None:
        raise RunError(f"column '{column}' is neither text, number nor bool; give a rule for it")
    masks: list[tuple[str, Any]] = []
    if kind == "number":
        edges = _edges(values, 4)
        masks = [
            *[(f"{name} <= {edge!r}", values <= edge) for edge in edges[:1]],
            *[(f"{a!r} < {name} <= {b!r}", values.gt(a) & values.le(b)) for a, b in itertools.pairwise(edges)],
            *[(f"{name} > {edge!r}", values > edge) for edge in edges[-1:]],
        ]
    elif kind == "bool":
        masks = [(name, values), (f"not {name}", ~values)]
    else:
        masks = [(f"{name} == {value!r}", values == value) for value in _common_values(values, min_size)]
    if kind != "bool":
        masks.append((f"{name}.isna()", values.isna()))
    for rule, mask in masks:
        if min_size <= mask.sum() < len(table):
            yield rule, mask.to_numpy(dtype=bool)


class Condition(NamedTuple):
    """A condition at a node of the tree, on one column; `holds` has one bool per row."""

    column: str
    kind: str
    value: Any
    holds: np.ndarray
    has_missing: bool


def column_conditions(table: pd.DataFrame, column: str, min_size: int) -> Iterator[Condition]:
    """Yield the conditions on a column that a node of the tree can have."""
    values = _values(table, column)
    kind = column_kind(values)
    has_missing = bool(values.isna().any())
    if has_missing:
        yield Condition(column, "missing", None, values.isna().to_numpy(dtype=bool), has_missing)
    if kind == "number":
        for edge in _edges(values, 16):
            yield Condition(column, "at most", edge, (values <= edge).to_numpy(dtype=bool), has_missing)
    elif kind == "bool":
        yield Condition(column, "bool", None, values.to_numpy(dtype=bool), has_missing)
    elif kind == "text":
        for value in _common_values(values, min_size):
            yield Condition(column, "equal", value, (values == value).to_numpy(dtype=bool), has_missing)


def tree_paths(tree: DecisionTreeClassifier) -> Iterator[list[tuple[int, bool]]]:
    """Yield the path to every node but the root: the index of each condition, and whether it must hold."""
    nodes = tree.tree_
    stack: list[tuple[int, list[tuple[int, bool]]]] = [(0, [])]
    while stack:
        node, path = stack.pop()
        if path:
            yield path
        if nodes.children_left[node] >= 0:
            condition = int(nodes.feature[node])
            stack.append((int(nodes.children_left[node]), [*path, (condition, False)]))
            stack.append((int(nodes.children_right[node]), [*path, (condition, True)]))


def path_rule(path: list[tuple[Condition, bool]]) -> str:
    """Return the conditions of a path as a query, without conditions that follow from the others."""
    has_value = {condition.column for condition, expected in path if condition.kind == "equal" and expected}
    tightest: dict[tuple[str, bool], Any] = {}
    for condition, expected in path:
        if condition.kind == "at most":
            key, tighter = (condition.column, expected), min if expected else max
            tightest[key] = tighter(tightest.get(key, condition.value), condition.value)
    parts = []
    for condition, expected in path:
        name, value = _query_name(condition.column), condition.value
        if condition.kind == "at most":
            if value != tightest[condition.column, expected]:
                continue
            # For a missing number, both `x <= 5` and `x > 5` are false.
            above = f"not {name} <= {value!r}" if condition.has_missing else f"{name} > {value!r}"
            parts.append(f"{name} <= {value!r}" if expected else above)
        elif condition.kind == "equal" and (expected or condition.column not in has_value):
            parts.append(f"{name} {'==' if expected else '!='} {value!r}")
        elif condition.kind in ("bool", "missing"):
            part = name if condition.kind == "bool" else f"{name}.isna()"
            if condition.kind == "bool" or condition.column not in has_value:
                parts.append(part if expected else f"not {part}")
    return " and ".join(parts)


def apply_rule(table: pd.DataFrame, name: str, rule: Rule) -> np.ndarray:
    """Return the rows for which a rule of the user holds: bool, shape (n,)."""
    try:
        result = table.eval(rule, engine="python") if isinstance(rule, str) else rule(table)
        mask = np.asarray(pd.Series(result).fillna(False))
    except Exception as error:  # a user's rule may raise anything
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise RunError(f"rule '{name}' cannot be applied ({reason}); use the columns of features(run)") from error
    if mask.shape != (len(table),) or mask.dtype != bool:
        raise RunError(f"rule '{name}' must give True or False for each of {len(table)} texts; write a comparison")
    return mask


def sliceable_columns(table: pd.DataFrame) -> list[str]:
    """Return the columns of text, numbers or bools, without those of the texts themselves."""
    return [column for column in table if column not in TEXT_COLUMNS and column_kind(table[column])]


def _values(table: pd.DataFrame, column: str) -> pd.Series:
    if column not in table:
        known = [name for name in table if column.startswith("has_") or not name.startswith("has_")]
        raise RunError(f"no column '{column}'{did_you_mean(column, known)}")
    return table[column]


def _edges(values: pd.Series, n: int) -> list[Any]:
    """Return edges that divide a column of numbers into at most `n` parts of similar size: values that occur in it."""
    finite = values[np.isfinite(values.astype(float))].to_numpy()
    if not len(finite):
        return []
    edges = np.quantile(finite, np.arange(1, n) / n, method="inverted_cdf")
    return [edge.item() for edge in np.unique(edges) if edge < finite.max()]


def _common_values(values: pd.Series, min_size: int) -> list[str]:
    counts = values.value_counts()
    return sorted(counts[counts >= min_size].index)


def _query_name(column: str) -> str:
    """Return the name of a column in a query."""
    is_plain = column.isidentifier() and not keyword.iskeyword(column)
    return column if is_plain else f"`{column}`"

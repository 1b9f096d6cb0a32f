"""Slice a run into groups of texts, and find the groups with more errors than the rest.

A slice is a rule over the table that `text_features.features` returns. The rule is a pandas query:
`features(run).query(rule)` gives the texts of the slice. `error_slices` and `find_error_slices` take a plain table;
`slices` and `find_slices` take a run.
"""

from __future__ import annotations

import itertools
import keyword
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import pandas as pd
from scipy.stats import beta, fisher_exact
from sklearn.tree import DecisionTreeClassifier

from cascade_lab.analysis.metrics import stage_decisions
from cascade_lab.analysis.outcomes import IN_SCOPE, OUTCOMES, outcomes
from cascade_lab.analysis.paired import holm
from cascade_lab.analysis.sentences import Summary
from cascade_lab.analysis.text_features import MIN_SIZE, TEXT_COLUMNS, column_kind, features
from cascade_lab.exceptions import RunError, did_you_mean

if TYPE_CHECKING:
    from cascade_lab.run import Run

Rule = str | Callable[[pd.DataFrame], Any]
"""A pandas query over a table, or a function that takes the table and returns one bool per row."""


def slices(
    run: Run,
    by: Sequence[str] | str | None = None,
    *,
    rules: Mapping[str, Rule] | Sequence[str] = (),
    of: str = "error",
    min_size: int = MIN_SIZE,
    level: float = 0.95,
) -> pd.DataFrame:
    """Return the error rate of each slice of a run; the slices that differ most clearly from the rest come first.

    Parameters
    ----------
    run : Run
        Unlabelled texts are left out.
    by, rules, min_size, level
        As for `error_slices`; the table is `features(run)`.
    of : str
        What counts as an error. `"error"`: the cascade's answer is wrong. An outcome such as `"false reject"`: among
        the texts that can have it (those in scope, or those out of scope). The name of a stage: its own errors, among
        the texts that reached it and have a target there.

    Returns
    -------
    DataFrame
        As `error_slices` returns it.

    Raises
    ------
    RunError
        A column, outcome or stage is unknown, a rule cannot be applied, or there are no labels.
    """
    run = run.labelled
    rows, is_error = _errors(run, of)
    table = features(run).iloc[rows].reset_index(drop=True)
    return error_slices(table, is_error, by, rules=rules, min_size=min_size, level=level)


def error_slices(
    table: pd.DataFrame,
    is_error: Any,
    by: Sequence[str] | str | None = None,
    *,
    rules: Mapping[str, Rule] | Sequence[str] = (),
    min_size: int = MIN_SIZE,
    level: float = 0.95,
) -> pd.DataFrame:
    """Return the error rate of each slice of a table; the slices that differ most clearly from the rest come first.

    Parameters
    ----------
    table : DataFrame
        One row per text.
    is_error : array-like of bool, shape (n,)
    by : str or sequence of str, optional
        Columns. A number is divided at its quartiles; of other columns, each value is a slice. By default all columns
        but `example_id`, `text`, `text_b` and `has_<word>`; none if there are `rules`.
    rules : mapping of str to rule, or sequence of str, optional
        Your own slices: pandas queries (`"n_words > 20 and topic == 'money'"`), or names with a query or a function
        that takes the table and returns one bool per row. They are reported at any size.
    min_size : int
        Smaller slices of `by` are left out.
    level : float
        The level of the intervals.

    Returns
    -------
    DataFrame
        `slice` (the column, or the name of a rule), `rule`, `n_examples`, `n_errors`, `error_rate`, `lift` (the error
        rate divided by that of all rows), `low` and `high` (the interval of the error rate; Clopper and Pearson 1934),
        `p_value` (Fisher's exact test of the slice against the rest, two-sided) and `p_holm`, corrected for the number
        of rows (Holm 1979): if no slice differs from the rest, the probability that any `p_holm` is below α is at
        most α.

    Raises
    ------
    RunError
        A column is unknown, or a rule cannot be applied.

    Examples
    --------
    >>> table = pd.DataFrame({"topic": ["pay", "pay", "play", "play"]})
    >>> error_slices(table, [True, True, False, False], min_size=1)[["rule", "n_errors", "error_rate"]]
                  rule  n_errors  error_rate
    0   topic == 'pay'         2         1.0
    1  topic == 'play'         0         0.0
    """
    is_error = np.asarray(is_error, dtype=bool)
    if by is None:
        # A column of another kind (dates, say) cannot be sliced.
        by = [] if rules else [c for c in _sliceable(table) if not c.startswith("has_")]
    groups = [
        _Slice(column, rule, mask)
        for column in ([by] if isinstance(by, str) else by)
        for rule, mask in _slices_of_column(table, column, min_size)
    ]
    named = rules if isinstance(rules, Mapping) else {rule: rule for rule in rules}
    groups += [
        _Slice(name, rule if isinstance(rule, str) else name, _apply(table, name, rule)) for name, rule in named.items()
    ]
    return _error_table(groups, is_error, level)


def find_slices(
    run: Run,
    *,
    of: str = "error",
    columns: Sequence[str] | None = None,
    max_depth: int = 3,
    min_size: int = MIN_SIZE,
    seed: int = 0,
    level: float = 0.95,
) -> pd.DataFrame:
    """Search a run for slices with more errors than the rest: see `find_error_slices`.

    Parameters
    ----------
    run, of
        As for `slices`.
    columns, max_depth, min_size, seed, level
        As for `find_error_slices`; the table is `features(run)`.

    Raises
    ------
    RunError
        A column, outcome or stage is unknown, or there are no labels.
    """
    run = run.labelled
    rows, is_error = _errors(run, of)
    table = features(run).iloc[rows].reset_index(drop=True)
    return find_error_slices(
        table, is_error, columns=columns, max_depth=max_depth, min_size=min_size, seed=seed, level=level
    )


def find_error_slices(
    table: pd.DataFrame,
    is_error: Any,
    *,
    columns: Sequence[str] | None = None,
    max_depth: int = 3,
    min_size: int = MIN_SIZE,
    seed: int = 0,
    level: float = 0.95,
) -> pd.DataFrame:
    """Search a table for slices with more errors than the rest, with a shallow decision tree.

    The tree is grown on a random half of the rows, and its slices are measured on the other half. So the search does
    not make the error rates look too high. (Very similar texts may still be in both halves.)

    Parameters
    ----------
    table : DataFrame
        One row per text.
    is_error : array-like of bool, shape (n,)
    columns : sequence of str, optional
        The columns to search; by default all but `example_id`, `text` and `text_b`.
    max_depth : int
        The most conditions in a rule.
    min_size : int
        The fewest rows of a slice, in the half on which the tree is grown.
    seed : int
        Decides the halves; the same seed gives the same slices.
    level : float
        The level of the intervals.

    Returns
    -------
    DataFrame
        The columns of `error_slices` without `slice`, measured on the held-out half. One row for each node of the tree
        whose error rate, in the half on which it was grown, is above that of the whole half. `p_holm` is corrected for
        the number of these rows.

    Raises
    ------
    RunError
        A column is unknown.
    """
    is_error = np.asarray(is_error, dtype=bool)
    conditions = [
        condition
        for column in (_sliceable(table) if columns is None else columns)
        for condition in _conditions(table, column, min_size)
    ]
    grown_on = np.random.default_rng(seed).permutation(len(table)) < len(table) // 2
    groups = []
    if conditions and is_error[grown_on].any() and not is_error[grown_on].all():
        holds = np.column_stack([condition.holds for condition in conditions])
        tree = DecisionTreeClassifier(
            criterion="log_loss", max_depth=max_depth, min_samples_leaf=min_size, random_state=seed
        ).fit(holds[grown_on], is_error[grown_on])
        for path in _paths(tree):
            mask = np.logical_and.reduce([holds[:, i] == expected for i, expected in path])
            if is_error[mask & grown_on].mean() > is_error[grown_on].mean():
                rule = _rule([(conditions[i], expected) for i, expected in path])
                groups.append(_Slice("", rule, mask[~grown_on]))
    return _error_table(groups, is_error[~grown_on], level).drop(columns="slice")


def slice_summary(table: pd.DataFrame, *, alpha: float = 0.05) -> Summary:
    """Return plain sentences about the worst slice of `slices` or `find_slices`, for people.

    Parameters
    ----------
    table : DataFrame
        What `slices` or `find_slices` returns.
    alpha : float
        A slice is named if its `p_holm` is below this.

    Returns
    -------
    Summary
        One sentence. The rule in it may contain text of users.
    """
    worse = table[(table["lift"] > 1) & (table["p_holm"] < alpha)]
    if worse.empty:
        return Summary(["No slice has clearly more errors than the rest."])
    worst = worse.iloc[0]
    sentence = (
        f"Where {worst['rule']}, {worst['error_rate']:.0%} of the texts are wrong: {worst['lift']:.1f} times the error "
        "rate of all texts."
    )
    return Summary([sentence])


class _Slice(NamedTuple):
    """A slice: its name, its rule, and the rows that are in it."""

    name: str
    rule: str
    mask: np.ndarray


def _errors(run: Run, of: str) -> tuple[np.ndarray, np.ndarray]:
    """Return the rows of the examples that `of` applies to, and whether each of them is an error."""
    spec, predictions = run.spec, run.predictions
    if of == "error":
        return np.arange(len(predictions)), (predictions["label"] != predictions["predicted"]).to_numpy()
    if of in OUTCOMES:
        in_scope = predictions["label"].isin(spec.in_scope_labels).to_numpy()
        rows = np.flatnonzero(in_scope == (of in IN_SCOPE))
        return rows, (outcomes(spec, predictions["label"], predictions["predicted"]) == of)[rows]
    names = [stage.name for stage in spec.stages]
    if of not in names:
        raise RunError(f"{run.name}: no error is named '{of}'{did_you_mean(of, ['error', *OUTCOMES, *names])}")
    decisions = stage_decisions(run, of)
    return decisions.rows, decisions.y_true != decisions.y_pred


def _error_table(groups: list[_Slice], is_error: np.ndarray, level: float) -> pd.DataFrame:
    n, n_errors = len(is_error), int(is_error.sum())
    table = pd.DataFrame([(group.name, group.rule) for group in groups], columns=["slice", "rule"])
    table["n_examples"] = size = np.array([group.mask.sum() for group in groups], dtype=int)
    table["n_errors"] = errors = np.array([is_error[group.mask].sum() for group in groups], dtype=int)
    table["error_rate"] = rate = np.divide(errors, size, out=np.full(len(size), np.nan), where=size > 0)
    table["lift"] = rate / (n_errors / n) if n_errors else np.nan
    tail = (1 - level) / 2
    table["low"] = np.where(errors > 0, beta.ppf(tail, errors, size - errors + 1), rate)
    table["high"] = np.where(errors < size, beta.ppf(1 - tail, errors + 1, size - errors), rate)
    table["p_value"] = [
        float(fisher_exact([[k, m - k], [n_errors - k, (n - m) - (n_errors - k)]]).pvalue)
        for k, m in zip(errors.tolist(), size.tolist(), strict=True)
    ]
    table["p_holm"] = holm(table["p_value"].to_numpy(dtype=float))
    return table.sort_values(["p_holm", "p_value", "lift"], ascending=[True, True, False], ignore_index=True)


def _slices_of_column(table: pd.DataFrame, column: str, min_size: int) -> Iterator[tuple[str, np.ndarray]]:
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


class _Condition(NamedTuple):
    """A condition at a node of the tree, on one column; `holds` has one bool per row."""

    column: str
    kind: str
    value: Any
    holds: np.ndarray
    has_missing: bool


def _conditions(table: pd.DataFrame, column: str, min_size: int) -> Iterator[_Condition]:
    values = _values(table, column)
    kind = column_kind(values)
    has_missing = bool(values.isna().any())
    if has_missing:
        yield _Condition(column, "missing", None, values.isna().to_numpy(dtype=bool), has_missing)
    if kind == "number":
        for edge in _edges(values, 16):
            yield _Condition(column, "at most", edge, (values <= edge).to_numpy(dtype=bool), has_missing)
    elif kind == "bool":
        yield _Condition(column, "bool", None, values.to_numpy(dtype=bool), has_missing)
    elif kind == "text":
        for value in _common_values(values, min_size):
            yield _Condition(column, "equal", value, (values == value).to_numpy(dtype=bool), has_missing)


def _paths(tree: DecisionTreeClassifier) -> Iterator[list[tuple[int, bool]]]:
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


def _rule(path: list[tuple[_Condition, bool]]) -> str:
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


def _apply(table: pd.DataFrame, name: str, rule: Rule) -> np.ndarray:
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


def _sliceable(table: pd.DataFrame) -> list[str]:
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

"""Slice a run into groups of texts, and find the groups with more errors than the rest.

A slice is a rule over the table that `text_features.features` returns. The rule is a pandas query:
`features(run).query(rule)` gives the texts of the slice. `error_slices` and `find_error_slices` take a plain table;
`slices` and `find_slices` take a run. A column or a slice that only repeats the label, the split or the prediction is
left out, by the measure of `proxies.py`, unless it is asked for by name.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import pandas as pd
from scipy.stats import beta, fisher_exact
from sklearn.tree import DecisionTreeClassifier

from cascade_lab.analysis.metrics import stage_decisions
from cascade_lab.analysis.outcomes import IN_SCOPE, OUTCOMES, outcomes
from cascade_lab.analysis.paired import holm
from cascade_lab.analysis.proxies import proxy_columns, proxy_masks
from cascade_lab.analysis.sentences import Summary
from cascade_lab.analysis.slicing_rules import (
    Rule,
    apply_rule,
    column_conditions,
    column_slices,
    path_rule,
    sliceable_columns,
    tree_paths,
)
from cascade_lab.analysis.text_features import MIN_SIZE, column_kind, features
from cascade_lab.exceptions import RunError, did_you_mean
from cascade_lab.text import shorten

if TYPE_CHECKING:
    from cascade_lab.run import Run

LEFT_OUT = "left_out"
"""The key of a table's `attrs` that has the columns and rules that were left out, each with what it repeats."""
_MAX_NAMED = 5


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
    return error_slices(table, is_error, by, rules=rules, known=_known(run, rows), min_size=min_size, level=level)


def error_slices(
    table: pd.DataFrame,
    is_error: Any,
    by: Sequence[str] | str | None = None,
    *,
    rules: Mapping[str, Rule] | Sequence[str] = (),
    known: Mapping[str, Any] | None = None,
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
        but `example_id`, `text`, `text_b`, `label` and `has_<word>`, without what `known` determines; none if there are
        `rules`.
    rules : mapping of str to rule, or sequence of str, optional
        Your own slices: pandas queries (`"n_tokens > 20 and topic == 'money'"`), or names with a query or a function
        that takes the table and returns one bool per row. They are reported at any size.
    known : mapping of str to array-like, shape (n,), optional
        What no slice may repeat, if `by` is not given: a name, such as "the label", to its value in each row. By
        default the table's columns `label`, `predicted` and `split`. See `proxy_columns` and `proxy_masks`.
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
        most α. `attrs["left_out"]` has each column and rule that was left out, with the name in `known`.

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
    left_out: dict[str, str] = {}
    known = _known_columns(table) if known is None else known
    if by is None:
        columns = [] if rules else [c for c in sliceable_columns(table) if not c.startswith("has_") and c != "label"]
        left_out = _repeating_columns(table, columns, known)
    else:
        columns, known = [by] if isinstance(by, str) else list(by), {}
    groups = [
        _Slice(column, rule, mask)
        for column in columns
        if column not in left_out
        for rule, mask in column_slices(table, column, min_size)
    ]
    groups, repeating = _without_proxies(groups, known)
    left_out |= repeating
    named = rules if isinstance(rules, Mapping) else {rule: rule for rule in rules}
    groups += [
        _Slice(name, rule if isinstance(rule, str) else name, apply_rule(table, name, rule))
        for name, rule in named.items()
    ]
    result = _error_table(groups, is_error, level)
    result.attrs[LEFT_OUT] = left_out
    return result


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
        table,
        is_error,
        columns=columns,
        known=_known(run, rows),
        max_depth=max_depth,
        min_size=min_size,
        seed=seed,
        level=level,
    )


def find_error_slices(
    table: pd.DataFrame,
    is_error: Any,
    *,
    columns: Sequence[str] | None = None,
    known: Mapping[str, Any] | None = None,
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
        The columns to search; by default all but `example_id`, `text`, `text_b` and `label`, without what `known`
        determines.
    known : mapping of str to array-like, shape (n,), optional
        As for `error_slices`; used if `columns` is not given.
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
        the number of these rows. `attrs["left_out"]` as in `error_slices`.

    Raises
    ------
    RunError
        A column is unknown.
    """
    is_error = np.asarray(is_error, dtype=bool)
    left_out: dict[str, str] = {}
    known = _known_columns(table) if known is None else known
    if columns is None:
        columns = [column for column in sliceable_columns(table) if column != "label"]
        left_out = _repeating_columns(table, columns, known)
    else:
        known = {}
    conditions = [
        condition
        for column in columns
        if column not in left_out
        for condition in column_conditions(table, column, min_size)
    ]
    repeats = proxy_masks(np.column_stack([c.holds for c in conditions]), known) if conditions else []
    left_out |= {path_rule([(c, True)]): name for c, name in zip(conditions, repeats, strict=True) if name}
    conditions = [condition for condition, name in zip(conditions, repeats, strict=True) if not name]
    grown_on = np.random.default_rng(seed).permutation(len(table)) < len(table) // 2
    groups = []
    if conditions and is_error[grown_on].any() and not is_error[grown_on].all():
        holds = np.column_stack([condition.holds for condition in conditions])
        tree = DecisionTreeClassifier(
            criterion="log_loss", max_depth=max_depth, min_samples_leaf=min_size, random_state=seed
        ).fit(holds[grown_on], is_error[grown_on])
        for path in tree_paths(tree):
            mask = np.logical_and.reduce([holds[:, i] == expected for i, expected in path])
            if is_error[mask & grown_on].mean() > is_error[grown_on].mean():
                groups.append(_Slice("", path_rule([(conditions[i], expected) for i, expected in path]), mask))
    groups, repeating = _without_proxies(groups, known)  # conditions that together repeat a label
    held_out = [group._replace(mask=group.mask[~grown_on]) for group in groups]
    result = _error_table(held_out, is_error[~grown_on], level).drop(columns="slice")
    result.attrs[LEFT_OUT] = left_out | repeating
    return result


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
        One sentence, and another where columns or slices were left out. The rules may contain text of users.
    """
    left_out = _left_out_sentences(table.attrs.get(LEFT_OUT, {}))
    worse = table[(table["lift"] > 1) & (table["p_holm"] < alpha)]
    if worse.empty:
        return Summary(["No slice has clearly more errors than the rest.", *left_out])
    worst = worse.iloc[0]
    sentence = (
        f"Where {worst['rule']}, {worst['error_rate']:.0%} of the texts are wrong: {worst['lift']:.1f} times the error "
        "rate of all texts."
    )
    return Summary([sentence, *left_out])


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


def _known(run: Run, rows: np.ndarray) -> dict[str, Any]:
    """Return what no slice may repeat: the label, the split and the prediction of each text, in several forms."""
    predictions = run.predictions.iloc[rows]
    known = {"the label": predictions["label"], "the prediction": predictions["predicted"]}
    known["whether the label is in scope"] = predictions["label"].isin(run.spec.in_scope_labels)
    known["whether the text is rejected"] = predictions["predicted"].isin(run.spec.reject_labels)
    known["the stage that decides"] = predictions["decided_by"]
    if "split" in run.examples:
        known["the split"] = run.examples["split"].iloc[rows]
    return known


def _known_columns(table: pd.DataFrame) -> dict[str, Any]:
    names = {"label": "the label", "predicted": "the prediction", "split": "the split"}
    return {name: table[column] for column, name in names.items() if column in table}


def _repeating_columns(table: pd.DataFrame, columns: Sequence[str], known: Mapping[str, Any]) -> dict[str, str]:
    """Return the columns that repeat something known; bools are left to `_without_proxies`: each has one slice."""
    return proxy_columns(table, [name for name in columns if column_kind(table[name]) != "bool"], known)


def _without_proxies(groups: list[_Slice], known: Mapping[str, Any]) -> tuple[list[_Slice], dict[str, str]]:
    """Return the slices that repeat nothing known, and the rule of each other one with what it repeats."""
    if not groups or not known:
        return groups, {}
    repeats = proxy_masks(np.column_stack([group.mask for group in groups]), known)
    left_out = {group.rule.removeprefix("not "): name for group, name in zip(groups, repeats, strict=True) if name}
    return [group for group, name in zip(groups, repeats, strict=True) if not name], left_out


def _left_out_sentences(left_out: Mapping[str, str]) -> list[str]:
    """Return a sentence that names what was left out, for people; none where nothing was."""
    if not left_out:
        return []
    names = [f"{shorten(rule, 60)} (repeats {name})" for rule, name in left_out.items()]
    more = f", and {len(names) - _MAX_NAMED:,} more" if len(names) > _MAX_NAMED else ""
    return [f"Left out of the slices, because they tell nothing new: {', '.join(names[:_MAX_NAMED])}{more}."]

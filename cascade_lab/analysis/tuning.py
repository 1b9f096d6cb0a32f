"""How far chosen thresholds can be trusted: resampled, cross-validated, held out, guaranteed; and written down."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
from scipy.stats import binom, binomtest
from sklearn.model_selection import RepeatedStratifiedKFold
from tqdm.auto import tqdm

from cascade_lab.analysis.bootstrap import Interval, interval, resample_counts
from cascade_lab.analysis.goals import FRACTIONS, Goal, figure_of
from cascade_lab.analysis.latency import predicted_latency
from cascade_lab.analysis.outcomes import OUTCOMES, outcome_counts
from cascade_lab.analysis.quadrants import Points, count, counts_at, places, points
from cascade_lab.analysis.thresholds import Choice, choose, choose_among, held_at_least
from cascade_lab.errors import GoalError, InfeasibleError, RunError
from cascade_lab.run import Run

_COARSE = 160


class Certainty(NamedTuple):
    """What becomes of a choice on resampled texts.

    Attributes
    ----------
    thresholds : DataFrame
        A resample a row, a stage a column; without the resamples on which the goal is infeasible.
    figures : dict of str to Interval
        What the choice made on each resample does on that resample.
    infeasible : float
        The fraction of resamples on which no thresholds satisfy the goal.
    """

    thresholds: pd.DataFrame
    figures: dict[str, Interval]
    infeasible: float


def certainty(
    run: Run,
    goal: Goal,
    stages: Sequence[str] | None = None,
    *,
    n_resamples: int = 500,
    level: float = 0.95,
    seed: int = 0,
    progress: bool = False,
) -> Certainty:
    """Choose again on resampled texts (bootstrap; Efron 1979), out of 160 thresholds a stage.

    Half of them are spread evenly over the texts in scope and half over the others.

    Raises
    ------
    InfeasibleError
        No thresholds satisfy the goal on the texts themselves.
    """
    found, floor = points(run, stages), held_at_least(run, goal)
    chosen = choose_among(found, goal, floor=floor, where=f"{run.directory}")
    drawn = resample_counts(len(run.examples), n_resamples=n_resamples, seed=seed)
    rows, figures = [], []
    for weights in tqdm(drawn, "resamples", disable=not progress, leave=False):
        try:
            again = choose_among(found, goal, floor=floor, weights=weights, max_lines=_COARSE)
        except InfeasibleError:
            continue
        rows.append(again.thresholds)
        figures.append(again.figures)
    table = pd.DataFrame(figures, columns=list(goal.figures))
    return Certainty(
        pd.DataFrame(rows, columns=list(found.stages)),
        {name: interval(value, table[name].to_numpy(), level=level) for name, value in chosen.figures.items()},
        1 - len(rows) / n_resamples,
    )


def optimism(
    run: Run,
    goal: Goal,
    stages: Sequence[str] | None = None,
    *,
    n_repeats: int = 10,
    n_folds: int = 5,
    seed: int = 0,
    progress: bool = False,
) -> pd.DataFrame:
    """Return how much better figures look on the texts that thresholds are chosen on than on others.

    By repeated cross-validation, stratified by whether a text is in scope: thresholds are chosen on all folds but one,
    and their figures there are set against those on the fold left out.

    Returns
    -------
    DataFrame
        A figure a row: `tuned` and `held_out`, means over folds, `optimism`, the first less the second, and
        `standard_error` of that (corrected for folds that share texts; Nadeau and Bengio 2003). The attribute
        `infeasible` of `attrs` is the fraction of folds on which nothing could be chosen.
    """
    found, floor = points(run, stages), held_at_least(run, goal)
    rows = []
    divided = list(folds(found, n_repeats, n_folds, seed))
    for train, test in tqdm(divided, "folds", disable=not progress, leave=False):
        try:
            chosen = choose_among(found, goal, floor=floor, weights=train)
        except InfeasibleError:
            continue
        counts = _counts_at(found, chosen.thresholds, test)
        held_out = {name: float(figure_of(name, counts, goal)) for name in goal.figures}
        rows.append({(name, kind): f[name] for kind, f in (("t", chosen.figures), ("h", held_out)) for name in f})
    table = pd.DataFrame(rows, columns=pd.MultiIndex.from_product([goal.figures, ["t", "h"]]))
    result = {}
    for name in goal.figures:
        tuned, left_out = table[name, "t"], table[name, "h"]
        difference = (tuned - left_out).to_numpy()
        error = corrected_error(difference, n_folds)
        result[name] = [tuned.mean(), left_out.mean(), np.nanmean(difference) if rows else np.nan, error]
    columns = ["tuned", "held_out", "optimism", "standard_error"]
    result = pd.DataFrame.from_dict(result, orient="index", columns=columns).rename_axis("figure")
    result.attrs["infeasible"] = 1 - len(rows) / len(divided)
    return result


def held_out(tuned: Run, other: Run, thresholds: Mapping[str, float], goal: Goal) -> pd.DataFrame:
    """Return what thresholds chosen on `tuned` do on `other`.

    Returns
    -------
    DataFrame
        A figure a row: `tuned`, on the texts they were chosen on, `held_out`, on the others, and that one's 95%
        interval (bootstrap), `low` and `high`.

    Raises
    ------
    GoalError
        Both runs are of one set of texts.
    """
    check_apart(tuned, other)
    before, after = figures_at(tuned, thresholds, goal), figures_at(other, thresholds, goal)
    rows = {name: [before[name].value, *after[name]] for name in goal.figures}
    columns = ["tuned", "held_out", "low", "high"]
    return pd.DataFrame.from_dict(rows, orient="index", columns=columns).rename_axis("figure")


def other_worlds(
    run: Run, goal: Goal, prevalences: Sequence[float], stages: Sequence[str] | None = None
) -> pd.DataFrame:
    """Choose again for worlds in which another fraction of the texts is out of scope, by reweighting these texts.

    Returns
    -------
    DataFrame
        A prevalence a row: the thresholds, a stage a column, and the goal's figures in that world; NaN where no
        thresholds satisfy the goal.
    """
    found, rows = points(run, stages), {}
    for prevalence in prevalences:
        there = replace(goal, prevalence=prevalence)
        try:
            chosen = choose_among(found, there, floor=held_at_least(run, there))
            rows[prevalence] = {**chosen.thresholds, **chosen.figures}
        except InfeasibleError:
            rows[prevalence] = {}
    columns = [*found.stages, *goal.figures]
    return pd.DataFrame.from_dict(rows, orient="index", columns=None).reindex(columns=columns).rename_axis("prevalence")


def check_apart(tuned: Run, other: Run) -> None:
    """Raise GoalError if most texts of `other` are texts of `tuned`: no figure on them would be honest."""
    ours, theirs = ({*zip(run.examples["text"], run.examples["text_b"], strict=True)} for run in (tuned, other))
    if len(ours & theirs) > len(theirs) / 2:
        raise GoalError(
            f"{other.directory} has the texts of {tuned.directory}, and thresholds look better on the texts they were "
            "chosen on than they are; report on a run of another set"
        )


def figures_at(
    run: Run,
    thresholds: Mapping[str, float],
    goal: Goal,
    *,
    level: float = 0.95,
    n_resamples: int = 1000,
    seed: int = 0,
) -> dict[str, Interval]:
    """Return every figure of the goal at some thresholds, with its bootstrap interval over texts."""
    counts = outcome_counts(run.spec, run.replay(thresholds)).to_numpy()
    return intervals_of(counts, goal, level=level, n_resamples=n_resamples, seed=seed)


def intervals_of(
    counts: np.ndarray, goal: Goal, *, level: float = 0.95, n_resamples: int = 1000, seed: int = 0
) -> dict[str, Interval]:
    """Return every figure of the goal, with its bootstrap interval over texts, from their outcomes: shape (6,)."""
    drawn = np.random.default_rng(seed).multinomial(counts.sum(), counts / counts.sum(), n_resamples)
    return {
        name: interval(float(figure_of(name, counts, goal)), figure_of(name, drawn, goal), level=level)
        for name in goal.figures
    }


def controlled(
    run: Run,
    goal: Goal,
    figure: str,
    at_least: float,
    *,
    delta: float = 0.1,
    stages: Sequence[str] | None = None,
) -> Choice:
    """Return thresholds whose `figure` is at least so much, with probability 1 - `delta` over the draw of the texts.

    Learn then test (Angelopoulos et al. 2021): every pair of a grid that is fixed beforehand, 481 log-odds by 10
    probabilities, is tested with the exact binomial test; along the log-odds in order, from the safe end until the
    first failure, with the error shared among the 10. Of the pairs that pass, the one that serves `goal` best.

    Parameters
    ----------
    run : Run
    goal : Goal
        Its own constraints hold on these texts, with no guarantee.
    figure : {"in_scope_accuracy", "reject_recall"}
        What is guaranteed.
    at_least : float
        1 - α.
    delta : float
        How often the guarantee may fail, over draws of the tuning set.
    stages : sequence of str, optional

    Raises
    ------
    InfeasibleError
        No pair passes the test together with the goal's constraints.
    """
    if figure not in ("in_scope_accuracy", "reject_recall"):
        raise GoalError(f"'{figure}' cannot be guaranteed; in_scope_accuracy and reject_recall can")
    found = points(run, stages)
    log_odds = np.linspace(-12, 12, 481)
    first = np.concatenate([[0.0], 1 / (1 + np.exp(-log_odds)), [1.0]])
    second = np.arange(10) / 10 if len(found.stages) == 2 else np.zeros(1)
    counts = counts_at(found, first, second)
    hits, of = (counts[..., np.isin(OUTCOMES, names)].sum(axis=-1) for names in FRACTIONS[figure])
    p_value = binom.cdf(of - hits, of, 1 - at_least)
    from_safe = p_value[::-1] if figure == "reject_recall" else p_value
    passed = np.logical_and.accumulate(from_safe <= delta / len(second), axis=0)
    passed = passed[::-1] if figure == "reject_recall" else passed
    passed &= of > 0
    value = goal.sign * figure_of(goal.figure, counts, goal)
    for name, least in goal.at_least.items():
        passed &= figure_of(name, counts, goal) >= least
    for name, most in goal.at_most.items():
        if name.endswith("_ms"):
            raise GoalError("a latency bound does not go with a guarantee; bound it in the choice without one")
        passed &= figure_of(name, counts, goal) <= most
    value = np.where(passed & ~np.isnan(value), value, -np.inf)
    if value.max() == -np.inf:
        raise InfeasibleError(
            f"{run.directory}: no thresholds have {figure} of at least {at_least:g} with probability {1 - delta:g} and "
            f"satisfy: {goal}; ask for less, or tune on more texts"
        )
    i, j = np.unravel_index(int(value.argmax()), value.shape)
    chosen = dict(zip(found.stages, (float(first[i]), float(second[j])), strict=False))
    return Choice(chosen, counts[i, j], {name: float(figure_of(name, counts[i, j], goal)) for name in goal.figures})


def gate_worth(tuned: Run, other: Run, goal: Goal) -> pd.DataFrame:
    """Return what the gates are worth: the cascade against its last stage alone, each tuned for `goal`.

    Both are tuned on one run and compared on another; the last stage alone rejects by its `min_probability`.

    Returns
    -------
    DataFrame
        Rows `cascade` and `last stage alone`: `thresholds`, the goal's figures and their intervals (`<figure>_low`,
        `<figure>_high`), `mean_ms` a text as the other run's times predict it, and `p_value`, the exact McNemar
        test's for their answers being equally often right.

    Raises
    ------
    GoalError
        Both runs are of one set of texts.
    RunError
        The last stage cannot reject.
    """
    check_apart(tuned, other)
    last, gates = tuned.spec.last, {stage.name: 0.0 for stage in tuned.spec.stages if stage.is_gate}
    if not gates or not last.reject_labels:
        raise RunError(f"{tuned.directory}: takes a gate, and a reject_label of the last stage, to compare them")
    chosen = {
        "cascade": choose(tuned, goal).thresholds,
        "last stage alone": {**gates, **choose(tuned, goal, [last.name], thresholds=gates).thresholds},
    }
    rows, right = [], []
    for name, thresholds in chosen.items():
        answers = other.replay(thresholds)
        right.append((answers["label"] == answers["predicted"]).to_numpy())
        row: dict[str, Any] = {"": name, "thresholds": thresholds}
        for figure, found in figures_at(other, thresholds, goal).items():
            row |= {figure: found.value, f"{figure}_low": found.low, f"{figure}_high": found.high}
        all_beyond, none_beyond = (float(predicted_latency(other, reach)["mean_ms"][0]) for reach in (1.0, 0.0))
        reach = float((answers["decided_by"] != other.spec.stages[0].name).mean())
        ms = float(predicted_latency(other, reach)["mean_ms"][0])
        rows.append({**row, "mean_ms": ms if name == "cascade" else all_beyond - none_beyond})
    wins, losses = int((right[0] & ~right[1]).sum()), int((right[1] & ~right[0]).sum())
    table = pd.DataFrame(rows).set_index("")
    table["p_value"] = binomtest(wins, wins + losses).pvalue if wins + losses else 1.0
    return table


def write_tuned(
    run: Run,
    choice: Choice,
    goal: Goal | str,
    output: str | Path,
    *,
    min_probabilities: Mapping[str, float] | None = None,
    more: Mapping[str, Any] | None = None,
) -> None:
    """Write the run's cascade at the chosen thresholds as a `cascade.toml`, with their provenance in `[tuned_on]`.

    Paths in it are relative to `output`'s folder. `goal` may be said in words; `more` goes into `[tuned_on]` too.
    """
    spec = run.spec.with_thresholds(choice.thresholds)
    if min_probabilities:
        last = replace(spec.last, min_probabilities=dict(min_probabilities))
        spec = replace(spec, stages=(*spec.stages[:-1], last))
    tuned_on = {
        "run_id": run.manifest["run_id"],
        "evalset": {key: value for key, value in run.manifest["evalset"].items() if value is not None},
        "goal": str(goal),
        **({"costs": dict(goal.costs)} if isinstance(goal, Goal) and goal.costs else {}),
        **({"prevalence": goal.prevalence} if isinstance(goal, Goal) and goal.prevalence else {}),
        "figures": {name: value for name, value in choice.figures.items() if not np.isnan(value)},
        **(more or {}),
    }
    replace(spec, tuned_on=tuned_on).write(output)


def _counts_at(found: Points, thresholds: Mapping[str, float], weights: np.ndarray | None = None) -> np.ndarray:
    first, second = places(found, thresholds)
    return count(found, np.array([first]), np.array([second]), weights=weights).all[0, 0]


def folds(found: Points, n_repeats: int, n_folds: int, seed: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Give the weights, 0 or 1, of the texts in each training part and in the fold left out: shapes (n,)."""
    n = len(found.in_scope)
    divide = RepeatedStratifiedKFold(n_splits=n_folds, n_repeats=n_repeats, random_state=seed)
    for train, test in divide.split(np.zeros(n), found.in_scope):
        yield np.bincount(train, minlength=n), np.bincount(test, minlength=n)


def corrected_error(differences: np.ndarray, n_folds: int) -> float:
    """Return the standard error of a mean over folds that share texts (Nadeau and Bengio 2003); NaN under two."""
    n = int((~np.isnan(differences)).sum())
    return float(np.sqrt((1 / n + 1 / (n_folds - 1)) * np.nanvar(differences, ddof=1))) if n > 1 else np.nan

"""Compares chosen thresholds with the run's own: what the choice gains, and whether cross-validation shows it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import pandas as pd

from cascade_lab.analysis.outcomes import IN_SCOPE, has_outcome
from cascade_lab.text import exact
from cascade_lab.thresholds.grid import ThresholdGrid
from cascade_lab.thresholds.guarantee import Guarantee, bounds_of, keeps_guarantee
from cascade_lab.thresholds.objective import LATENCIES, Goal
from cascade_lab.thresholds.resampling import ThresholdBootstrap
from cascade_lab.thresholds.search import min_held_fraction

if TYPE_CHECKING:
    from cascade_lab.run import Run

THIS_SET, CROSS_VALIDATION, TEST = "this set", "cross-validation", "test run"
FEW_TEXTS = 50
"""With fewer different texts of a kind, a fraction of them is known to 14 percentage points at best."""
MAX_SHARE_DIFFERENCE = 0.25
"""Of two fractions of texts out of scope: the relative difference above which a warning is given."""


class Verdict(NamedTuple):
    """Whether chosen thresholds are better than the run's own, and why, as a sentence."""

    improves: bool
    sentence: str


def compare_with_own(
    goal: Goal,
    own: np.ndarray,
    chosen: np.ndarray,
    bootstrap: ThresholdBootstrap,
    cross_validation: pd.DataFrame,
    on_test: pd.DataFrame | None = None,
) -> pd.DataFrame:
    """Return every metric with a run's own thresholds and with the chosen ones, and the difference.

    Parameters
    ----------
    goal : Goal
    own, chosen : ndarray of int, shape (n,)
        The outcome of each text with the run's own thresholds, and with the chosen ones.
    bootstrap : ThresholdBootstrap
        With `differences`.
    cross_validation : DataFrame
        Of `cross_validate`, with `own`.
    on_test : DataFrame, optional
        Of `analysis.paired.outcome_differences`, on the texts of a test run.

    Returns
    -------
    DataFrame
        Rows (texts, metric); texts are "this set", "cross-validation" and "test run". Columns `own`, `chosen`,
        `difference` (chosen - own), `low` and `high`. On this set the chosen ones look too good, and no interval is
        given. The interval of the cross-validated difference is that of the difference on new texts, which allows for
        the choice (see `bootstrap_thresholds`). On the test run it is a paired interval.
    """
    counts = {key: goal.count(codes) for key, codes in (("own", own), ("chosen", chosen))}
    here = pd.DataFrame(
        {key: [float(goal.value(name, n)) for name in goal.metrics] for key, n in counts.items()},
        index=list(goal.metrics),
    )
    there = pd.DataFrame({"own": cross_validation["own"], "chosen": cross_validation["held_out"]})
    tables = {THIS_SET: here, CROSS_VALIDATION: there.loc[list(goal.metrics)]}
    for table in tables.values():
        table["difference"] = table["chosen"] - table["own"]
    ends = {name: [found.low, found.high] for name, found in bootstrap.differences.items()}
    tables[THIS_SET][["low", "high"]] = np.nan
    tables[CROSS_VALIDATION][["low", "high"]] = [ends[name] for name in goal.metrics]
    if on_test is not None:
        tables[TEST] = on_test.rename(columns={"a": "own", "b": "chosen"})
    return pd.concat(tables, names=["texts", "metric"])


def judge(
    run: Run,
    goal: Goal,
    grid: ThresholdGrid,
    own: np.ndarray,
    chosen: np.ndarray,
    comparison: pd.DataFrame,
    guarantee: Guarantee | None = None,
) -> Verdict:
    """Return whether chosen thresholds are to replace the run's own.

    They are where the run's own break a bound, or do not pass the tests of the guarantee; and where the interval of the
    difference on new texts (see `compare_with_own`) shows that the goal's metric is better.

    Parameters
    ----------
    run, goal, grid, guarantee
        As `tune` has them.
    own, chosen : ndarray of int, shape (n,)
        The outcome of each text with the run's own thresholds, and with the chosen ones.
    comparison : DataFrame
        Of `compare_with_own`.
    """
    name = goal.metric
    keep = "Keep " + ", ".join(f"{stage} {exact(run.spec.thresholds[stage])}" for stage in grid.stages)
    broken = _broken_bounds(run, goal, grid, own, guarantee)
    if broken:
        return Verdict(True, f"With the run's own thresholds, {'; '.join(broken)}.")
    if np.array_equal(own, chosen):
        return Verdict(False, f"{keep}: the best thresholds give the same outcome of every text.")
    row = comparison.loc[CROSS_VALIDATION, name]
    if np.isnan(comparison.loc[(THIS_SET, name), "own"]):
        return Verdict(True, f"With the run's own thresholds, {name} is undefined.")
    if row[["difference", "low"]].isna().any():
        return Verdict(False, f"{keep}: there are too few texts to show a gain in {name}.")
    low, high = row["low"], row["high"]
    found = f"{row['difference']:+.4f}, 95% interval for new texts {low:+.4f} to {high:+.4f}"
    if (low if goal.sign > 0 else -high) > 0:
        return Verdict(True, f"In cross-validation, the chosen thresholds improve {name} ({found}).")
    return Verdict(False, f"{keep}: cross-validation shows no gain in {name} ({found}).")


def _broken_bounds(
    run: Run, goal: Goal, grid: ThresholdGrid, own: np.ndarray, guarantee: Guarantee | None
) -> list[str]:
    """Return what the run's own thresholds break on its texts: a bound, a bound on a latency, a guarantee."""
    counts = goal.count(own)
    values = {bound: float(goal.value(bound.metric, counts)) for bound in bounds_of(goal.at_least, goal.at_most)}
    broken = [
        f"{bound.metric} is {value:.4f}, not {str(bound).removeprefix(bound.metric).strip()}"
        for bound, value in values.items()
        if not bound.holds(value)
    ]
    if any(metric in LATENCIES for metric in goal.at_most):
        is_held = (run.predictions["decided_by"] == run.spec.stages[0].name).to_numpy()
        if _weighted_fraction(goal, own, is_held) < min_held_fraction(run, goal):
            broken.append("a bound on the latency is broken")
    if guarantee is not None and not broken and not keeps_guarantee(grid, own, guarantee):
        broken.append(f"the tests of the guarantee do not pass ({guarantee})")
    return broken


def _weighted_fraction(goal: Goal, outcomes: np.ndarray, of: np.ndarray) -> float:
    """Return the fraction of texts that are `of`, at the goal's prevalence."""
    in_scope = has_outcome(outcomes, IN_SCOPE)
    if goal.prevalence is None or in_scope.all() or not in_scope.any():
        return float(of.mean())
    return float((1 - goal.prevalence) * of[in_scope].mean() + goal.prevalence * of[~in_scope].mean())


def share_sentences(
    n_different: Mapping[str, int], share: float, *, test_share: float | None = None, prevalence: float | None = None
) -> list[str]:
    """Return warnings about the texts of a kind: that they are few, or another fraction than elsewhere.

    Parameters
    ----------
    n_different : mapping of str to int
        "in scope" and "out of scope", to the number of different texts of that kind.
    share : float
        The fraction of the tuning texts that are out of scope.
    test_share, prevalence : float, optional
        The same fraction of the test texts, and in the goal.

    Examples
    --------
    >>> share_sentences({"in scope": 900, "out of scope": 25}, 0.027)
    ['Only 25 different texts are out of scope: a fraction of them is known to about 20 percentage points.']
    """
    result = []
    for kind, n in n_different.items():
        if 0 < n < FEW_TEXTS:
            points = min(98 / np.sqrt(n), 50)
            are = "texts are" if n > 1 else "text is"
            result.append(
                f"Only {n} different {are} {kind}: a fraction of them is known to about {points:.0f} percentage points."
            )
    if prevalence is not None and _differ(share, prevalence):
        result.append(
            f"{share:.1%} of the tuning texts are out of scope, and the goal is for {prevalence:.1%} (prevalence): the "
            "texts are weighted, so the rarer kind decides how certain a metric is."
        )
    if prevalence is None and test_share is not None and _differ(share, test_share):
        result.append(
            f"{share:.1%} of the tuning texts are out of scope, and {test_share:.1%} of the test texts: accuracy, "
            f"coverage, risk and reject precision depend on it. Prevalence {test_share:.2g} (--prevalence) allows for "
            "it."
        )
    return result


def _differ(a: float, b: float) -> bool:
    return abs(a - b) > MAX_SHARE_DIFFERENCE * max(min(a, b), 0.05)

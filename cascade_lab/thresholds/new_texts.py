"""Intervals of metrics on new texts, from thresholds that are chosen again on resamples of the tuning texts."""

from __future__ import annotations

import numpy as np
from scipy.stats import norm

from cascade_lab.analysis.bootstrap import Interval, wilson
from cascade_lab.analysis.costs import cost_bounds
from cascade_lab.analysis.outcomes import FRACTIONS, OUTCOMES, has_outcome, number_of
from cascade_lab.thresholds.grid import ThresholdGrid
from cascade_lab.thresholds.guarantee import effective_size
from cascade_lab.thresholds.objective import Goal

MIN_TEXTS = 10
"""With fewer different texts no interval of a metric is given."""
MAX_UNDEFINED = 0.05
"""If no thresholds satisfy the goal, or a metric is undefined, on more of the resamples, it has no interval."""


def difference_on_new_texts(
    name: str,
    goal: Goal,
    grid: ThresholdGrid,
    outcomes: np.ndarray,
    own: np.ndarray,
    on_resample: np.ndarray,
    on_texts: np.ndarray,
    own_on_resample: np.ndarray,
    *,
    n_resamples: int,
    level: float,
) -> Interval:
    """Return a metric of the chosen cascade minus that of another, on its own texts, with the interval on new texts.

    What the difference is on a resample, minus what the same choice gives on all texts, is the error of the difference:
    its mean is subtracted, and its variance gives the interval. As in the interval of Bonett and Price (2012), one more
    text differs in each direction, so that the interval is not empty where no text differs.
    """
    lowest, highest = cost_range(goal) if name == "mean_cost" else (0.0, 1.0)

    def difference(chosen: np.ndarray, other: np.ndarray) -> np.ndarray:
        return goal.value(name, chosen) - goal.value(name, other)

    here, there = goal.count(outcomes), goal.count(own)
    value = float(difference(here, there))
    errors = difference(on_resample, own_on_resample) - difference(on_texts, there)
    defined = ~np.isnan(errors)
    n = effective_size(grid.groups[has_outcome(outcomes, FRACTIONS.get(name, ((), OUTCOMES))[1])])
    if np.isnan(value) or n < MIN_TEXTS or defined.sum() < (1 - MAX_UNDEFINED) * n_resamples:
        return Interval(value, np.nan, np.nan)
    width = highest - lowest
    middle = value - float(errors[defined].mean())
    half = float(norm.ppf((1 + level) / 2)) * float(np.sqrt(errors[defined].var() + 2 * (width / (n + 2)) ** 2))
    return Interval(value, max(middle - half, -width), min(middle + half, width))


def cost_range(goal: Goal) -> tuple[float, float]:
    """Return the lowest and the highest cost of a text."""
    lowest, highest = cost_bounds(goal.used_costs)
    return min(lowest, 0.0), max(highest, 0.0)


def interval_on_new_texts(
    name: str,
    goal: Goal,
    grid: ThresholdGrid,
    outcomes: np.ndarray,
    on_resample: np.ndarray,
    on_texts: np.ndarray,
    *,
    n_resamples: int,
    level: float,
) -> Interval:
    """Return a metric of the chosen cascade on its own texts, with the interval of its value on new texts.

    `on_resample` and `on_texts`, shape (n_feasible, 6 or 8), are the outcomes of the cascade that was chosen on a
    resample: of the resample's texts, and of all texts. There is no row for a resample that allows no choice.
    """
    value = float(goal.value(name, goal.count(outcomes)))
    lowest, highest = cost_range(goal) if name == "mean_cost" else (0.0, 1.0)
    kinds = FRACTIONS.get(name, ((), OUTCOMES))[1]
    counted = has_outcome(outcomes, kinds)
    n = effective_size(grid.groups[counted])
    share = n / max(counted.sum(), 1)

    def scaled(counts: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return the metric between 0 and 1, and its angle, whose variance is 1 / 4n for a fraction (Anscombe 1948)."""
        n_counted = share * number_of(counts, kinds)
        fraction = (goal.value(name, counts) - lowest) / (highest - lowest)
        return fraction, np.arcsin(np.sqrt((fraction * n_counted + 3 / 8) / (n_counted + 3 / 4)))

    (there, angle_there), (here, angle_here) = scaled(on_resample), scaled(on_texts)
    differences, angles = there - here, angle_there - angle_here
    defined = ~np.isnan(differences)
    if np.isnan(value) or n < MIN_TEXTS or defined.sum() < (1 - MAX_UNDEFINED) * n_resamples:
        return Interval(value, np.nan, np.nan)
    middle = float(np.clip((value - lowest) / (highest - lowest) - differences[defined].mean(), 0, 1))
    variance = float(angles[defined].var())
    n = min(n, 1 / (4 * variance)) if variance > 0 else n
    low, high = (lowest + (highest - lowest) * end for end in wilson(middle * n, n, level=level)[1:])
    return Interval(value, min(low, value), max(high, value))

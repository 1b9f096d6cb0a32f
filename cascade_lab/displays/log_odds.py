"""Gives displays of thresholds an axis in log-odds, a legend below it, and the bounds to draw."""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.ticker import FixedLocator, FuncFormatter, NullFormatter, NullLocator

from cascade_lab.thresholds import Goal

_TICKS = (1e-6, 1e-5, 1e-4, 0.001, 0.01, 0.1, 0.5, 0.9, 0.99, 0.999, 0.9999, 0.99999, 0.999999)


def axis_limits(values: pd.Series | np.ndarray, *points: float | None) -> tuple[float, float]:
    """Return the ends of an axis: between them are all but a thousandth of the thresholds, and the points."""
    inner = np.sort(np.asarray(values))[:-1]  # the highest is 1, where no text is above
    inner = inner if len(inner) else np.array([0.5])
    low, high = np.quantile(inner, [0.001, 0.999])
    inside = [value for value in points if value is not None and 0 < value < 1]
    low, high = min([low, *inside]), max([high, *inside])
    margin = 0.05 * (log_odds(high) - log_odds(low)) + 0.2
    return float(probability(log_odds(low) - margin)), float(probability(log_odds(high) + margin))


def set_log_odds_scale(ax: Axes, name: str, low: float, high: float) -> None:
    """Scale the axis `name` ("x" or "y") in log-odds, with probabilities as tick labels."""
    getattr(ax, f"set_{name}scale")("logit")
    getattr(ax, f"set_{name}lim")(low, high)
    axis = getattr(ax, f"{name}axis")
    axis.set_major_locator(FixedLocator([tick for tick in _TICKS if low <= tick <= high]))
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:.6f}".rstrip("0").rstrip(".")))
    axis.set_minor_locator(NullLocator())
    axis.set_minor_formatter(NullFormatter())


def log_odds(p: np.ndarray | float) -> np.ndarray:
    """Return the log-odds of probabilities; 0 and 1 count as 1e-7 away from them.

    >>> log_odds(np.array([0.5, 0.9])).round(4).tolist()
    [0.0, 2.1972]
    """
    p = np.clip(p, 1e-7, 1 - 1e-7)
    return np.asarray(np.log(p) - np.log1p(-p))


def probability(x: np.ndarray | float) -> np.ndarray:
    """Return the probabilities that have some log-odds.

    >>> probability(np.array([0.0, 2.1972])).round(4).tolist()
    [0.5, 0.9]
    """
    return np.asarray(1 / (1 + np.exp(-np.asarray(x))))


def metric_bounds(goal: Goal) -> list[tuple[str, float]]:
    """Return the goal's bounds, without those on latencies."""
    bounds = [*goal.at_least.items(), *goal.at_most.items()]
    return [(name, bound) for name, bound in bounds if not name.endswith("_ms")]


def draw_legend_below(ax: Axes, handles: list[Any], y: float) -> None:
    """Write the legend below the axes."""
    ax.legend(
        handles=handles,
        fontsize=8,
        frameon=False,
        ncols=3,
        loc="upper left",
        bbox_to_anchor=(-0.02, y),
        borderaxespad=0.0,
    )

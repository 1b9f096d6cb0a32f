"""What thresholds are to achieve: figures as fractions of outcomes, and what counts of outcomes leave possible."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np

from cascade_lab.analysis.outcomes import (
    FALSE_ACCEPT,
    FALSE_REJECT,
    OUTCOMES,
    RIGHT,
    RIGHT_REJECT,
    WRONG_CLASS,
    WRONG_REJECT,
)
from cascade_lab.errors import GoalError, did_you_mean

IN_SCOPE = (RIGHT, FALSE_REJECT, WRONG_CLASS)
OUT_OF_SCOPE = (RIGHT_REJECT, FALSE_ACCEPT, WRONG_REJECT)
ANSWERED = (RIGHT, WRONG_CLASS, FALSE_ACCEPT)

# A figure is the fraction that the first outcomes are of the second, which contain them.
FRACTIONS: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "accuracy": ((RIGHT, RIGHT_REJECT), OUTCOMES),
    "in_scope_accuracy": ((RIGHT,), IN_SCOPE),
    "reject_recall": ((RIGHT_REJECT,), OUT_OF_SCOPE),
    "reject_precision": ((RIGHT_REJECT,), (RIGHT_REJECT, FALSE_REJECT, WRONG_REJECT)),
    "coverage": (ANSWERED, OUTCOMES),
    "risk": ((WRONG_CLASS, FALSE_ACCEPT), ANSWERED),
}
FIGURES = (*FRACTIONS, "mean_cost")
LATENCIES = ("mean_ms", "p50_ms", "p95_ms", "p99_ms")


@dataclass(frozen=True)
class Goal:
    """What thresholds are to achieve.

    Attributes
    ----------
    maximize, minimize : str, optional
        One figure, of `FIGURES`.
    at_least, at_most : mapping of str to float
        Bounds on figures. `at_most` also takes the predicted latency of a text: `mean_ms`, `p50_ms`, `p95_ms`,
        `p99_ms`.
    costs : mapping of str to float
        What each outcome costs, for `mean_cost`; one that is not named costs nothing.
    prevalence : float, optional
        The fraction of texts out of scope in the world that the figures are meant for; by default, the eval set's.

    Raises
    ------
    GoalError
        An unknown figure or outcome, no figure or two to serve, a prevalence that is no fraction.
    """

    maximize: str | None = None
    minimize: str | None = None
    at_least: Mapping[str, float] = field(default_factory=dict)
    at_most: Mapping[str, float] = field(default_factory=dict)
    costs: Mapping[str, float] = field(default_factory=dict)
    prevalence: float | None = None

    def __post_init__(self) -> None:
        if (self.maximize is None) == (self.minimize is None):
            raise GoalError("a goal has one figure to maximize or to minimize; give one of the two")
        for name in (self.figure, *self.at_least, *self.at_most):
            if name not in FIGURES and not (name in LATENCIES and name in self.at_most):
                raise GoalError(f"no figure is named '{name}'{did_you_mean(name, list(FIGURES))}")
        for name in self.costs:
            if name not in OUTCOMES:
                raise GoalError(f"no outcome is named '{name}'{did_you_mean(name, list(OUTCOMES))}")
        if "mean_cost" in (self.figure, *self.at_least, *self.at_most) and not any(self.costs.values()):
            raise GoalError("mean_cost needs the cost of an outcome; name one, such as 'false accept'")
        if self.prevalence is not None and not 0 < self.prevalence < 1:
            raise GoalError(f"prevalence is {self.prevalence!r}; it must lie between 0 and 1")

    @property
    def figure(self) -> str:
        """What is maximized or minimized."""
        return self.maximize or self.minimize or ""

    @property
    def sign(self) -> int:
        """+1 where it is maximized, -1 where it is minimized."""
        return 1 if self.maximize else -1

    @property
    def figures(self) -> tuple[str, ...]:
        """The names of all figures that are defined under this goal."""
        return FIGURES if self.costs else tuple(FRACTIONS)

    def __str__(self) -> str:
        said = [f"maximize {self.maximize}" if self.maximize else f"minimize {self.minimize}"]
        said += [f"{name} at least {value:g}" for name, value in self.at_least.items()]
        said += [f"{name} at most {value:g}" for name, value in self.at_most.items()]
        said += [f"{name} costs {value:g}" for name, value in self.costs.items()]
        said += [] if self.prevalence is None else [f"{self.prevalence:g} out of scope"]
        return ", ".join(said)


def among(names: tuple[str, ...]) -> np.ndarray:
    """Return which of `OUTCOMES` are named: bool, shape (6,)."""
    return np.isin(OUTCOMES, names)


class Totals(NamedTuple):
    """How many texts are in scope and out of it, which no threshold changes: arrays of shape (...), or numbers."""

    in_scope: np.ndarray
    out_of_scope: np.ndarray
    prevalence: float | None = None

    @classmethod
    def of(cls, counts: np.ndarray, goal: Goal | None = None) -> Totals:
        """Take them from counts of outcomes, shape (..., 6)."""
        return cls(counts @ among(IN_SCOPE), counts @ among(OUT_OF_SCOPE), goal.prevalence if goal else None)

    @property
    def n(self) -> np.ndarray:
        return self.in_scope + self.out_of_scope

    @property
    def weights(self) -> tuple[np.ndarray | int, np.ndarray | int]:
        """What a text in scope and one out of it weigh, for the latter to be `prevalence` of all."""
        if self.prevalence is None:
            return 1, 1
        in_scope, out_of_scope = (np.where(n > 0, n, np.nan) for n in (self.in_scope, self.out_of_scope))
        return (1 - self.prevalence) * self.n / in_scope, self.prevalence * self.n / out_of_scope

    def weigh(self, counts: np.ndarray) -> np.ndarray:
        """Return counts of outcomes, shape (..., 6), as the world of that prevalence has them."""
        if self.prevalence is None:
            return counts
        in_scope, out_of_scope = (np.asarray(w)[..., None] for w in self.weights)
        return counts * np.where(among(IN_SCOPE), in_scope, out_of_scope)


def figure_of(name: str, counts: np.ndarray, goal: Goal | None = None) -> np.ndarray:
    """Return a figure from the numbers of texts of each outcome.

    Parameters
    ----------
    name : str
        Of `FIGURES`.
    counts : ndarray, shape (..., 6)
        In `OUTCOMES`' order.
    goal : Goal, optional
        For its costs and its prevalence.

    Returns
    -------
    ndarray, shape (...)
        NaN where it is undefined.
    """
    return extreme(name, counts, counts, +1, Totals.of(counts, goal), goal.costs if goal else {})


def extreme(
    name: str, low: np.ndarray, high: np.ndarray, sign: int, totals: Totals, costs: Mapping[str, float]
) -> np.ndarray:
    """Return the highest (`sign` +1) or the lowest (-1) that a figure can be with counts from `low` to `high`.

    Where `low` equals `high` that is the figure itself, as interval arithmetic has it. Shapes as in `figure_of`.
    """
    toward, away = (totals.weigh(counts) for counts in ((high, low) if sign > 0 else (low, high)))
    if name == "mean_cost":
        cost = np.array([costs.get(outcome, 0.0) for outcome in OUTCOMES])
        return (toward @ np.maximum(cost, 0) + away @ np.minimum(cost, 0)) / totals.n
    part, whole = FRACTIONS[name]
    hits, misses = toward @ among(part), away @ (among(whole) & ~among(part))
    w_in, w_out = totals.weights
    sizes = {OUTCOMES: totals.n, IN_SCOPE: w_in * totals.in_scope, OUT_OF_SCOPE: w_out * totals.out_of_scope}
    with np.errstate(invalid="ignore", divide="ignore"):
        if whole not in sizes:
            return hits / (hits + misses)
        # A whole that no threshold changes bounds the figure twice; the tighter one holds.
        tighter = np.minimum if sign > 0 else np.maximum
        return tighter(hits, sizes[whole] - misses) / np.float64(sizes[whole])

"""What thresholds are to achieve: one metric to maximize or minimize, and bounds on others."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np

from cascade_lab.analysis.outcomes import FRACTIONS, METRICS, OUTCOMES, metric_from_counts
from cascade_lab.exceptions import GoalError, did_you_mean

LATENCIES = ("mean_ms", "p50_ms", "p95_ms", "p99_ms")


@dataclass(frozen=True)
class Goal:
    """What thresholds are to achieve: one metric to optimize, and bounds on others.

    Attributes
    ----------
    maximize, minimize : str, optional
        One metric, of `METRICS`.
    at_least, at_most : mapping of str to float
        Bounds on metrics. `at_most` also takes the predicted latency of a text in milliseconds: `mean_ms`, `p50_ms`,
        `p95_ms`, `p99_ms`.
    costs : mapping of str to float
        What each outcome costs, for `mean_cost`; an outcome that is not named costs nothing.
    prevalence : float, optional
        The fraction of texts out of scope to compute metrics for; by default the eval set's own.

    Raises
    ------
    GoalError
        An unknown metric or outcome, no metric or two to optimize, or a prevalence outside (0, 1).
    """

    maximize: str | None = None
    minimize: str | None = None
    at_least: Mapping[str, float] = field(default_factory=dict)
    at_most: Mapping[str, float] = field(default_factory=dict)
    costs: Mapping[str, float] = field(default_factory=dict)
    prevalence: float | None = None

    def __post_init__(self) -> None:
        if (self.maximize is None) == (self.minimize is None):
            raise GoalError("a goal has one metric to maximize or to minimize; give one of the two")
        for name in (self.metric, *self.at_least, *self.at_most):
            if name not in METRICS and not (name in LATENCIES and name in self.at_most):
                raise GoalError(f"no metric is named '{name}'{did_you_mean(name, list(METRICS))}")
        for name in self.costs:
            if name not in OUTCOMES:
                raise GoalError(f"no outcome is named '{name}'{did_you_mean(name, list(OUTCOMES))}")
        if "mean_cost" in (self.metric, *self.at_least, *self.at_most) and not any(self.costs.values()):
            raise GoalError("mean_cost needs the cost of an outcome; name one, such as 'false accept'")
        if self.prevalence is not None and not 0 < self.prevalence < 1:
            raise GoalError(f"prevalence is {self.prevalence!r}; it must lie between 0 and 1")

    @property
    def metric(self) -> str:
        """The metric that is maximized or minimized."""
        return self.maximize or self.minimize or ""

    @property
    def sign(self) -> int:
        """+1 if the metric is maximized, -1 if it is minimized."""
        return 1 if self.maximize else -1

    @property
    def metrics(self) -> tuple[str, ...]:
        """The names of all metrics that are defined under this goal."""
        return METRICS if self.costs else tuple(FRACTIONS)

    def __str__(self) -> str:
        parts = [f"maximize {self.maximize}" if self.maximize else f"minimize {self.minimize}"]
        parts += [f"{name} at least {value:g}" for name, value in self.at_least.items()]
        parts += [f"{name} at most {value:g}" for name, value in self.at_most.items()]
        parts += [f"{name} costs {value:g}" for name, value in self.costs.items()]
        parts += [] if self.prevalence is None else [f"{self.prevalence:g} out of scope"]
        return ", ".join(parts)

    def value(self, name: str, counts: np.ndarray) -> np.ndarray:
        """Return a metric from counts of outcomes, shape (..., 6), at this goal's costs and prevalence."""
        return metric_from_counts(name, counts, costs=self.costs, prevalence=self.prevalence)

"""What thresholds are to achieve: one metric to maximize or minimize, and bounds on others."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np
import pandas as pd

from cascade_lab.analysis.costs import CostMatrix, Costs, count_codes, prices
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
    cost_matrix : DataFrame or CostMatrix, optional
        What each predicted label (columns) costs for each true label (index), for `mean_cost`, in place of `costs`. It
        has every label that the cascade can answer. The column of a reject label has the costs of rejecting.

    Raises
    ------
    GoalError
        An unknown metric or outcome, no metric or two to optimize, both kinds of costs, a cost matrix that is not
        usable, or a prevalence outside (0, 1).
    """

    maximize: str | None = None
    minimize: str | None = None
    at_least: Mapping[str, float] = field(default_factory=dict)
    at_most: Mapping[str, float] = field(default_factory=dict)
    costs: Mapping[str, float] = field(default_factory=dict)
    prevalence: float | None = None
    cost_matrix: pd.DataFrame | CostMatrix | None = None

    def __post_init__(self) -> None:
        if (self.maximize is None) == (self.minimize is None):
            raise GoalError(
                "a goal maximizes or minimizes one metric; give one of the two, such as --maximize accuracy"
            )
        for name in (self.metric, *self.at_least, *self.at_most):
            if name not in METRICS and not (name in LATENCIES and name in self.at_most):
                raise GoalError(f"no metric is named '{name}'{did_you_mean(name, list(METRICS))}")
        for name in self.costs:
            if name not in OUTCOMES:
                raise GoalError(f"no outcome is named '{name}'{did_you_mean(name, list(OUTCOMES))}")
        if isinstance(self.cost_matrix, pd.DataFrame):
            object.__setattr__(self, "cost_matrix", CostMatrix.from_frame(self.cost_matrix))
        if self.cost_matrix is not None and self.costs:
            raise GoalError(
                "a goal has costs of outcomes or a cost matrix; leave out costs (--cost) or cost_matrix (--cost-matrix)"
            )
        uses_cost = "mean_cost" in (self.metric, *self.at_least, *self.at_most)
        if uses_cost and self.cost_matrix is None and not any(self.costs.values()):
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
        return METRICS if self.costs or self.cost_matrix is not None else tuple(FRACTIONS)

    @cached_property
    def used_costs(self) -> Costs:
        """The cost matrix, or the costs of outcomes where there is none."""
        return self.cost_matrix if isinstance(self.cost_matrix, CostMatrix) else self.costs

    def __str__(self) -> str:
        parts = [f"maximize {self.maximize}" if self.maximize else f"minimize {self.minimize}"]
        parts += [f"{name} at least {value:g}" for name, value in self.at_least.items()]
        parts += [f"{name} at most {value:g}" for name, value in self.at_most.items()]
        parts += [f"{name} costs {value:g}" for name, value in self.costs.items()]
        parts += [f"costs of {len(self.used_costs.labels)} labels"] if isinstance(self.used_costs, CostMatrix) else []
        parts += [] if self.prevalence is None else [f"{self.prevalence:g} out of scope"]
        return ", ".join(parts)

    def value(self, name: str, counts: np.ndarray) -> np.ndarray:
        """Return a metric from counts (see `count`), shape (..., 6) or (..., 8), at this goal's prevalence."""
        return metric_from_counts(name, counts, costs=prices(self.used_costs), prevalence=self.prevalence)

    def count(self, codes: np.ndarray, weights: np.ndarray | None = None) -> np.ndarray:
        """Count texts by outcome, with the sums of their costs where there is a matrix: see `costs.count_codes`.

        `codes` were made with this goal's costs (`costs.text_codes`).
        """
        return count_codes(codes, weights, self.used_costs)

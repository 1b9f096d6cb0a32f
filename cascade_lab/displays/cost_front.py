"""Draws what accuracy costs: the Pareto front of accuracy and predicted time over the thresholds of deferral stages."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pandas as pd
from matplotlib.axes import Axes
from matplotlib.ticker import PercentFormatter

from cascade_lab.displays.drawing import Display, Style, hide_spines
from cascade_lab.run import Run
from cascade_lab.thresholds import cost_front

if TYPE_CHECKING:
    from typing_extensions import Self


class CostFrontDisplay(Display):
    """Accuracy over predicted milliseconds per text: one point per threshold that no other one beats in both.

    Parameters
    ----------
    front : DataFrame
        What `thresholds.cost_front` returns.
    title : str

    Attributes
    ----------
    front, title
        As given.
    ax_, figure_ : Axes, Figure
        After `plot`.
    """

    def __init__(self, front: pd.DataFrame, *, title: str = ""):
        self.front = front
        self.title = title

    @classmethod
    def from_run(cls, run: Run, **options: Any) -> Self:
        """Compute from a run, with `thresholds.cost_front` and its options.

        Raises
        ------
        RunError, GoalError
            As `cost_front`.
        """
        title = f"{run.spec.name}: accuracy against time, {len(run.labelled.examples):,} texts"
        return cls(cost_front(run, **options), title=title)

    def frame(self) -> pd.DataFrame:
        """Return one row per point of the front."""
        return self.front

    def plot(self, ax: Axes | None = None, **kwargs: Any) -> Self:
        """Draw the front as steps with its interval, the run's own thresholds, and the test run where there is one.

        Parameters
        ----------
        ax : Axes, optional
        **kwargs
            Go to `Axes.step`, which draws the front.
        """
        ax = self._axes(ax, (7.2, 4.6))
        front, own = self.front, self.front.attrs["own"]
        style: Style = {"color": "#123c69", "linewidth": 1.7, "where": "post", "label": "best accuracy within the time"}
        ax.fill_between(
            front["mean_ms"], front["accuracy_low"], front["accuracy_high"], step="post", color="#123c69", alpha=0.13
        )
        ax.step(front["mean_ms"], front["accuracy"], **(style | kwargs))
        if "test_accuracy" in front:
            test: Style = {"color": "#c4622d", "markersize": 3.5, "label": "the same thresholds on the test run"}
            ax.plot(front["test_mean_ms"], front["test_accuracy"], "o", **test)
        ax.plot(own["mean_ms"], own["accuracy"], "s", color="black", markersize=7, label="thresholds of the run")
        ax.yaxis.set_major_formatter(PercentFormatter(1, decimals=1))
        ax.set(xlabel="predicted milliseconds per text (amortised)", ylabel="accuracy of the cascade")
        self._set_title(self.title, max_length=80)
        hide_spines(ax)
        ax.grid(axis="y", color="0.9", linewidth=0.6)
        ax.set_axisbelow(True)
        ax.legend(frameon=False, fontsize=9, loc="lower right")
        return self

"""Draws risk–coverage curves, and the point on them where the cascade's thresholds are."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.ticker import PercentFormatter

from cascade_lab.analysis.bootstrap import Interval
from cascade_lab.analysis.coverage import (
    CONFIDENCES,
    Confidence,
    coverage_metrics,
    operating_point,
    risk_coverage,
    risk_coverage_areas,
    risk_coverage_curve,
)
from cascade_lab.displays.drawing import Display, Style, hide_spines, plain_text
from cascade_lab.run import Run

if TYPE_CHECKING:
    from typing_extensions import Self


class RiskCoverageDisplay(Display):
    """The error rate among the most confident texts (risk), against the fraction of all texts that they are (coverage).

    Parameters
    ----------
    curves : mapping of str to DataFrame
        By the name of the confidence, what `risk_coverage` returns.
    metrics : DataFrame
        What `coverage_metrics` returns.
    operating_point : mapping of str to Interval, optional
        `coverage` and `risk` at the cascade's own thresholds.
    title : str

    Attributes
    ----------
    curves, metrics, operating_point, title
        As given.
    ax_, figure_ : Axes, Figure
        After `plot`.
    """

    def __init__(
        self,
        curves: Mapping[str, pd.DataFrame],
        metrics: pd.DataFrame,
        operating_point: Mapping[str, Interval] | None = None,
        *,
        title: str = "",
    ):
        self.curves, self.metrics = dict(curves), metrics
        self.operating_point = dict(operating_point or {})
        self.title = title

    @classmethod
    def from_run(cls, run: Run, *, confidences: Sequence[Confidence] | None = None) -> Self:
        """Compute the curves of some confidences, by default of all that the cascade has.

        Raises
        ------
        RunError
            The run has no shadow scores, or no confidence has that name.
        """
        has_gate = any(stage.is_gate for stage in run.spec.stages)
        names = tuple(confidences or (CONFIDENCES if has_gate else ("last",)))
        return cls(
            {name: risk_coverage(run, name) for name in names},
            coverage_metrics(run, names),
            operating_point(run),
            title=f"{run.spec.name}: risk against coverage",
        )

    @classmethod
    def from_predictions(
        cls, correct: Any, confidence: Any, *, name: str = "confidence", title: str = "risk against coverage"
    ) -> Self:
        """Compute the curve of plain arrays.

        Parameters
        ----------
        correct : array-like of bool, shape (n,)
            Whether each prediction is correct.
        confidence : array-like of float, shape (n,)
            Higher where the prediction is more certain; any scale.
        name : str
            The confidence's name in the legend.
        title : str
        """
        metrics = pd.concat({name: risk_coverage_areas(correct, confidence)}, names=["confidence"]).reset_index()
        return cls({name: risk_coverage_curve(correct, confidence)}, metrics, title=title)

    def frame(self) -> pd.DataFrame:
        """Return the points of all curves, with the name of each curve in `confidence`."""
        return pd.concat(self.curves, names=["confidence"]).reset_index("confidence").reset_index(drop=True)

    def plot(self, ax: Axes | None = None, **kwargs: Any) -> Self:
        """Draw each curve with its 95% band, and the cascade's own thresholds as a point with its intervals.

        The risk among a curve's first 20 texts varies strongly; it does not set the scale.

        Parameters
        ----------
        ax : Axes, optional
        **kwargs
            Go to `Axes.plot`, which draws the curves.
        """
        ax = self._axes(ax, (6.8, 5.6))
        for (name, curve), (color, line) in zip(self.curves.items(), self._styles(), strict=True):
            areas = self.metrics[self.metrics["confidence"] == name].set_index("metric")["value"]
            label = f"{_LEGEND.get(name, plain_text(name, 40))}: AURC {areas['aurc']:.3f}, AUGRC {areas['augrc']:.3f}"
            style: Style = {"color": color, "linestyle": line, "linewidth": 1.7, "label": label}
            ax.plot(curve["coverage"], curve["value"], **(style | kwargs))
            ax.fill_between(curve["coverage"], curve["low"], curve["high"], color=color, alpha=0.15, linewidth=0)
        highest = [0.01, *(curve.loc[curve["n_examples"] > 20, "value"].max() for curve in self.curves.values())]
        if self.operating_point:
            self._draw_operating_point(ax)
            highest.append(self.operating_point["risk"].high)
        top = np.nanmax(highest)
        ax.set(xlim=(0, 1), ylim=(0, min(1.08 * top, 1)))
        ax.xaxis.set_major_formatter(PercentFormatter(1, decimals=0))
        ax.yaxis.set_major_formatter(PercentFormatter(1, decimals=0 if top > 0.05 else 1))
        ax.set(xlabel="coverage: texts that are answered", ylabel="risk: wrong answers among them")
        self._set_title(self.title, max_length=60)
        hide_spines(ax)
        # Below the axes, where no curve is.
        ax.legend(loc="upper left", bbox_to_anchor=(-0.02, -0.13), fontsize=9, frameon=False)
        return self

    def _draw_operating_point(self, ax: Axes) -> None:
        coverage, risk = self.operating_point["coverage"], self.operating_point["risk"]
        ax.errorbar(
            [coverage.value],
            [risk.value],
            yerr=[[max(risk.value - risk.low, 0)], [max(risk.high - risk.value, 0)]],
            xerr=[[max(coverage.value - coverage.low, 0)], [max(coverage.high - coverage.value, 0)]],
            color="black",
            marker="D",
            markersize=6,
            markerfacecolor="white",
            linestyle="none",
            label=f"thresholds of the run: risk {risk.value:.1%} at coverage {coverage.value:.1%}",
            zorder=5,
        )

    def _styles(self) -> list[tuple[str, str]]:
        return [_STYLES.get(name, _STYLES["product"]) for name in self.curves]


_STYLES = {"product": ("#123c69", "-"), "last": ("#c4622d", "--"), "gate": ("#5f9e8f", ":")}
_LEGEND = {"product": "p(gate) · p(class)", "last": "p(class)", "gate": "p(gate)"}

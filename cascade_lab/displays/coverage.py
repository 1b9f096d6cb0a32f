"""Risk–coverage curves, and where on them the cascade stands."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.ticker import PercentFormatter

from cascade_lab.analysis.bootstrap import Interval
from cascade_lab.analysis.coverage import CONFIDENCES, Confidence, coverage_figures, operating_point, risk_coverage
from cascade_lab.displays.words import words
from cascade_lab.run import Run


class RiskCoverageDisplay:
    """The risk among the texts of most confidence, against the fraction of all that they are.

    Parameters
    ----------
    curves : mapping of str to DataFrame
        By confidence, as `risk_coverage` returns them.
    figures : DataFrame
        As `coverage_figures` returns it.
    operating_point : mapping of str to Interval
        The cascade's own `coverage` and `risk`.
    title : str

    Attributes
    ----------
    curves, figures, operating_point, title
        As given.
    ax_, figure_ : Axes, Figure
        After `plot`.
    """

    def __init__(
        self,
        curves: Mapping[str, pd.DataFrame],
        figures: pd.DataFrame,
        operating_point: Mapping[str, Interval],
        *,
        title: str = "",
    ):
        self.curves, self.figures, self.operating_point = dict(curves), figures, dict(operating_point)
        self.title = title

    @classmethod
    def from_run(cls, run: Run, *, confidences: Sequence[Confidence] | None = None) -> RiskCoverageDisplay:
        """Compute the curves of some confidences, by default of all that the cascade has.

        Raises
        ------
        RunError
            The run has no shadow scores, or no confidence has that name.
        """
        names = tuple(confidences or (CONFIDENCES if len(run.spec.stages) > 1 else ("last",)))
        return cls(
            {name: risk_coverage(run, name) for name in names},
            coverage_figures(run, names),
            operating_point(run),
            title=f"{run.spec.name}: risk against coverage",
        )

    def plot(self, ax: Axes | None = None) -> RiskCoverageDisplay:
        """Draw each curve with its 95% band, and the cascade's own thresholds as a point with its intervals.

        The heights of a curve's first 20 texts, which jump, do not set the scale.
        """
        if ax is None:
            _, ax = plt.subplots(figsize=(6.8, 5.6), layout="constrained")
        self.ax_, self.figure_ = ax, ax.get_figure(root=True)
        for name, curve in self.curves.items():
            color, style = _STYLES[name]
            areas = self.figures[self.figures["confidence"] == name].set_index("figure")["value"]
            label = f"{_WORDS[name]}: AURC {areas['aurc']:.3f}, AUGRC {areas['augrc']:.3f}"
            ax.plot(curve["coverage"], curve["value"], color=color, linestyle=style, linewidth=1.7, label=label)
            ax.fill_between(curve["coverage"], curve["low"], curve["high"], color=color, alpha=0.15, linewidth=0)
        coverage, risk = self.operating_point["coverage"], self.operating_point["risk"]
        label = f"its own thresholds: risk {risk.value:.1%} at coverage {coverage.value:.1%}"
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
            label=label,
            zorder=5,
        )
        heights = [curve.loc[curve["n_examples"] > 20, "value"].max() for curve in self.curves.values()]
        top = np.nanmax([risk.high, 0.01, *heights])
        ax.set(xlim=(0, 1), ylim=(0, min(1.08 * top, 1)))
        ax.xaxis.set_major_formatter(PercentFormatter(1, decimals=0))
        ax.yaxis.set_major_formatter(PercentFormatter(1, decimals=0 if top > 0.05 else 1))
        ax.set(xlabel="coverage: texts answered", ylabel="risk: errors among them")
        ax.set_title(words(self.title), fontsize=11, loc="left")
        ax.spines[["top", "right"]].set_visible(False)
        # Below the axes, where no curve can run through it.
        ax.legend(loc="upper left", bbox_to_anchor=(-0.02, -0.13), fontsize=9, frameon=False)
        return self


_STYLES = {"product": ("#123c69", "-"), "last": ("#c4622d", "--"), "gate": ("#5f9e8f", ":")}
_WORDS = {"product": "p(gate) · p(class)", "last": "p(class)", "gate": "p(gate)"}

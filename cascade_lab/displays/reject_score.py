"""Draws how well rejectors tell out-of-scope texts: recall against in-scope accuracy, and confidences by truth."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.ticker import PercentFormatter

from cascade_lab.analysis.outcomes import FALSE_ACCEPT, RIGHT
from cascade_lab.displays.drawing import OUTCOME_STYLES, Display, Style, hide_spines, plain_text
from cascade_lab.run import Run
from cascade_lab.thresholds import compare_rejectors
from cascade_lab.thresholds.rejector_comparison import NOW, RejectorComparison

if TYPE_CHECKING:
    from typing_extensions import Self


class RejectScoreDisplay(Display):
    """Out-of-scope recall against in-scope accuracy, one curve per rule: each point is a threshold on its confidence.

    Parameters
    ----------
    comparison : RejectorComparison
        What `thresholds.compare_rejectors` returns.
    rules : sequence of str, optional
        The rules to draw; by default the proposed one, the rule of now, and the single scores `max_probability` and
        `energy`.
    title : str

    Attributes
    ----------
    comparison, rules, title
        As given.
    ax_, figure_ : Axes, Figure
        After `plot` or `plot_histogram`.
    """

    def __init__(self, comparison: RejectorComparison, rules: Sequence[str] | None = None, *, title: str = ""):
        self.comparison, self.title = comparison, title
        default = (comparison.proposed, NOW, "max_probability", "energy")
        self.rules = tuple(rules or dict.fromkeys(rule for rule in default if rule in comparison.confidence))

    @classmethod
    def from_run(cls, run: Run, *, rules: Sequence[str] | None = None, **options: Any) -> Self:
        """Compare rejectors on a run; the options are those of `compare_rejectors`.

        Raises
        ------
        InfeasibleError, RunError
            As `compare_rejectors`.
        """
        return cls(compare_rejectors(run, **options), rules, title=f"{run.spec.name}: rules that reject")

    def frame(self) -> pd.DataFrame:
        """Return the points of the curves: `rule`, `in_scope_accuracy` and `reject_recall`, one row per threshold."""
        correct, in_scope = self.comparison.correct, self.comparison.in_scope
        parts = []
        for rule in self.rules:
            confidence = self.comparison.confidence[rule].to_numpy()
            order = np.argsort(-confidence, kind="stable")
            ends = np.flatnonzero(np.append(np.diff(confidence[order]) < 0, True))
            accuracy = (correct & in_scope)[order].cumsum()[ends] / in_scope.sum()
            recall = 1 - (~in_scope)[order].cumsum()[ends] / (~in_scope).sum()
            parts.append(pd.DataFrame({"rule": rule, "in_scope_accuracy": accuracy, "reject_recall": recall}))
        return pd.concat(parts, ignore_index=True)

    def plot(self, ax: Axes | None = None, **kwargs: Any) -> Self:
        """Draw the curves near the highest accuracies, and a line at the in-scope accuracy that was asked for.

        Parameters
        ----------
        ax : Axes, optional
        **kwargs
            Go to `Axes.plot`, which draws the curves.
        """
        ax = self._axes(ax, (6.8, 5.2))
        table, points = self.comparison.table, self.frame()
        for number, rule in enumerate(self.rules):
            own = points[points["rule"] == rule]
            color, line = _STYLES[number % len(_STYLES)]
            label = f"{plain_text(rule, 40)}: {table.loc[rule, 'recall']:.1%}, AUROC {table.loc[rule, 'auroc']:.3f}"
            style: Style = {"color": color, "linestyle": line, "linewidth": 1.7, "label": label}
            ax.plot(own["in_scope_accuracy"], own["reject_recall"], **(style | kwargs))
        highest = float(points["in_scope_accuracy"].max())
        ax.axvline(self.comparison.at_least, color="#888888", linewidth=1, linestyle=":")
        ax.set(xlim=(max(0.0, min(self.comparison.at_least, highest) - 0.15), highest + 0.003), ylim=(0, 1))
        for axis in (ax.xaxis, ax.yaxis):
            axis.set_major_formatter(PercentFormatter(1, decimals=0))
        ax.set(xlabel="in-scope accuracy", ylabel="out-of-scope recall")
        self._set_title(self.title, f"in the legend: recall at an in-scope accuracy of {self.comparison.at_least:.4g}")
        hide_spines(ax)
        ax.legend(loc="upper left", bbox_to_anchor=(-0.02, -0.13), fontsize=9, frameon=False)
        return self

    def plot_histogram(self, ax: Axes | None = None, *, rule: str | None = None, **kwargs: Any) -> Self:
        """Draw the confidences under one rule, by default the proposed one: texts in scope and out of scope.

        Parameters
        ----------
        ax : Axes, optional
        rule : str, optional
        **kwargs
            Go to `Axes.hist`.
        """
        ax = self._axes(ax, (6.8, 3.6))
        rule = rule or self.comparison.proposed
        confidence, in_scope = self.comparison.confidence[rule].to_numpy(), self.comparison.in_scope
        for kind, label, style in (
            (in_scope, "in scope", OUTCOME_STYLES[RIGHT]),
            (~in_scope, "out of scope", OUTCOME_STYLES[FALSE_ACCEPT]),
        ):
            texts: Style = {"bins": 40, "range": (0, max(1.0, confidence.max())), "color": style.color, "alpha": 0.75}
            weights = np.full(int(kind.sum()), 1 / max(int(kind.sum()), 1))
            ax.hist(confidence[kind], weights=weights, **(texts | {"label": f"{label}: {kind.sum():,} texts"} | kwargs))
        ax.yaxis.set_major_formatter(PercentFormatter(1, decimals=0))
        ax.set(xlabel="confidence", ylabel="texts of that kind")
        self._set_title(f"{self.title}: {rule}" if self.title else rule)
        hide_spines(ax)
        ax.legend(fontsize=9, frameon=False)
        return self


_STYLES = [("#123c69", "-"), ("#c4622d", "--"), ("#5f9e8f", ":"), ("#5d4390", "-."), ("#8a8f98", "-")]

"""Draw studies: schemes as points, in-scope accuracy against reject recall; and rules against the known ratio."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pandas as pd
from matplotlib import colormaps
from matplotlib.axes import Axes

from cascade_lab.analysis.open_set import OPEN_SET_METRICS
from cascade_lab.analysis.study_results import HeldOutResults, StudyResults
from cascade_lab.displays.drawing import Display, hide_spines, plain_text
from cascade_lab.exceptions import RunError, did_you_mean

if TYPE_CHECKING:
    from typing_extensions import Self

_MARKERS = "osv^DPX"


class StudyDisplay(Display):
    """In-scope accuracy and reject recall of every scheme and seed, on the test split.

    Parameters
    ----------
    rows : DataFrame
        As `StudyResults.rows` returns them.
    min_in_scope, best_in_paper : float, optional
        Draw a line at these fractions.
    title : str

    Attributes
    ----------
    rows, min_in_scope, best_in_paper, title
        As given.
    ax_, figure_ : Axes, Figure
        After `plot`.
    """

    def __init__(
        self,
        rows: pd.DataFrame,
        *,
        min_in_scope: float | None = None,
        best_in_paper: float | None = None,
        title: str = "",
    ):
        self.rows, self.title = rows, title
        self.min_in_scope, self.best_in_paper = min_in_scope, best_in_paper

    @classmethod
    def from_results(
        cls, results: StudyResults, *, min_in_scope: float | None = None, best_in_paper: float | None = None
    ) -> Self:
        """Take the rows of a study."""
        title = "Test split; open circles are the paper's results"
        return cls(results.rows, min_in_scope=min_in_scope, best_in_paper=best_in_paper, title=title)

    def frame(self) -> pd.DataFrame:
        """Return one row per point: `scheme`, `seed`, and both metrics on test and in the paper."""
        splits = ("test", "paper")
        return self.rows[
            ["scheme", "seed", *(f"{s}.{m}" for s in splits for m in ("in_scope_accuracy", "reject_recall"))]
        ]

    def plot(self, ax: Axes | None = None, **kwargs: Any) -> Self:
        """Draw a filled marker per seed, an open circle for the paper's result, and a line at each bound.

        Parameters
        ----------
        ax : Axes, optional
        **kwargs
            Go to `Axes.scatter`, which draws the filled markers.
        """
        ax = self._axes(ax, (10, 5))
        by_scheme = self.rows.groupby("scheme", observed=True)
        for number, (scheme, part) in enumerate(by_scheme):
            color = colormaps["viridis"](number / max(1, len(by_scheme) - 1))
            points = 100 * part[["test.in_scope_accuracy", "test.reject_recall"]].to_numpy(float)
            style = {"color": color, "zorder": 3, "marker": _MARKERS[number % len(_MARKERS)], **kwargs}
            ax.scatter(*points.T, label=plain_text(str(scheme)), **style)
            paper = 100 * part[["paper.in_scope_accuracy", "paper.reject_recall"]].to_numpy(float)[0]
            ax.scatter(*paper, facecolors="none", edgecolors=color, marker="o")
        if self.best_in_paper is not None:
            ax.axhline(100 * self.best_in_paper, color="0.6", linewidth=0.8)
        if self.min_in_scope is not None:
            ax.axvline(100 * self.min_in_scope, color="0.6", linewidth=0.8)
        ax.set(xlabel="in-scope accuracy, %", ylabel="reject recall, %")
        self._set_title(self.title)
        ax.legend(fontsize=8, loc="center left", bbox_to_anchor=(1, 0.5))
        hide_spines(ax, "top", "right")
        return self


class HeldOutDisplay(Display):
    """A metric of every rule against the fraction of the labels that are known, on the test split.

    Parameters
    ----------
    metrics : DataFrame
        As `HeldOutResults.metrics` returns them.
    metric : str
        A key of `OPEN_SET_METRICS`, such as `harmonic_mean` (of known F1 and open F1) or `auroc`.
    title : str

    Attributes
    ----------
    metrics : DataFrame
        The rows of `metric`.
    metric, title
        As given.
    ax_, figure_ : Axes, Figure
        After `plot`.
    """

    def __init__(self, metrics: pd.DataFrame, *, metric: str = "harmonic_mean", title: str = ""):
        if metric not in OPEN_SET_METRICS:
            raise RunError(f"no metric is named '{metric}'{did_you_mean(metric, OPEN_SET_METRICS)}")
        self.metrics = metrics[metrics["metric"] == metric].reset_index(drop=True)
        self.metric, self.title = metric, title

    @classmethod
    def from_results(cls, results: HeldOutResults, *, metric: str = "harmonic_mean") -> Self:
        """Take the metrics of a study with held-out labels."""
        return cls(
            results.metrics(), metric=metric, title="Test split; the bars go from the lowest to the highest seed"
        )

    def frame(self) -> pd.DataFrame:
        """Return one row per point: `known_ratio`, `rule`, `n_seeds`, `mean`, `low` and `high`."""
        return self.metrics.drop(columns="metric")

    def plot(self, ax: Axes | None = None, **kwargs: Any) -> Self:
        """Draw a line per rule through the means, with a bar for the range of the seeds.

        Parameters
        ----------
        ax : Axes, optional
        **kwargs
            Go to `Axes.errorbar`.
        """
        ax = self._axes(ax, (7, 4.5))
        by_rule = self.metrics.groupby("rule", sort=False)
        for number, (rule, part) in enumerate(by_rule):
            mean, low, high = (100 * part[name].to_numpy(float) for name in ("mean", "low", "high"))
            color = colormaps["viridis"](number / max(1, len(by_rule)))
            style = {"color": color, "marker": _MARKERS[number % len(_MARKERS)], "capsize": 3, **kwargs}
            ax.errorbar(
                100 * part["known_ratio"], mean, yerr=[mean - low, high - mean], label=plain_text(str(rule)), **style
            )
        ax.set(xlabel="labels that are known, %", ylabel=f"{OPEN_SET_METRICS[self.metric]}, %")
        self._set_title(self.title)
        ax.legend(fontsize=8)
        hide_spines(ax, "top", "right")
        return self

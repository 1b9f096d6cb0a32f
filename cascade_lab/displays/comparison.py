"""Draws how runs differ: several from the first one, and two in their metrics, labels and stages."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.ticker import FuncFormatter, MaxNLocator

from cascade_lab.analysis.comparison import ALPHA, CHANGES, LOSS, WIN, Comparison, compare
from cascade_lab.analysis.comparison_notes import correction
from cascade_lab.analysis.many_runs import FIRST, HIGHER, LOWER, NO_TEST, NOT_DECIDED, Comparisons, compare_many
from cascade_lab.displays.drawing import Display, Style, hide_spines, metric_label, plain_text
from cascade_lab.run import Run
from cascade_lab.text import shorten

if TYPE_CHECKING:
    from typing_extensions import Self

_DARK, _LIGHT = "#1f4e79", "#f0a860"  # blue and sand: different in a grey print too
_GAIN: Style = {"color": _DARK, "linewidth": 0}
_LOSS: Style = {"color": _LIGHT, "hatch": "///", "edgecolor": "0.3", "linewidth": 0}
_POINTS: dict[str, Style] = {
    HIGHER: {"marker": "o", "color": _DARK, "markerfacecolor": _DARK},
    LOWER: {"marker": "s", "color": "#b8621b", "markerfacecolor": _LIGHT},
    NOT_DECIDED: {"marker": "o", "color": "0.45", "markerfacecolor": "white"},
    NO_TEST: {"marker": "|", "color": "0.45", "markeredgewidth": 2.2},
    FIRST: {"marker": "D", "color": "black"},
}


class LeaderboardDisplay(Display):
    """How much each run differs from the first one in a metric, the run with the highest value at the top.

    Parameters
    ----------
    comparisons : Comparisons
    metric : str
        One of those in `Comparison.metrics`.

    Attributes
    ----------
    comparisons : Comparisons
    metric : str
    title : str
    ax_, figure_ : Axes, Figure
        After `plot`.
    """

    def __init__(self, comparisons: Comparisons, *, metric: str = "accuracy"):
        self.comparisons, self.metric = comparisons, metric
        self._board = comparisons.leaderboard(metric)
        first = shorten(comparisons.names[0], 40)
        self.title = f"{_named(metric)} against that of {first}, on {comparisons.n_examples:,} texts"

    @classmethod
    def from_runs(cls, runs: Sequence[Run], *, metric: str = "accuracy", **options: Any) -> Self:
        """Compute from runs, with `cascade_lab.analysis.many_runs.compare_many` and its options."""
        return cls(compare_many(runs, **options), metric=metric)

    def frame(self) -> pd.DataFrame:
        """Return one row per run: the metric, the difference and its interval, p-values, and what they decide."""
        return self._board

    def plot(self, ax: Axes | None = None, **kwargs: Any) -> Self:
        """Draw the difference of each run to the first one as a point on its interval.

        The point is filled if McNemar's exact test decides that there is a difference: p < 0.05 after Holm's correction
        for the number of runs. It is blue for a higher value, orange and square for a lower one.

        Parameters
        ----------
        ax : Axes, optional
        **kwargs
            Go to `Axes.plot`, which draws the points.
        """
        board, n = self._board, len(self.comparisons.comparisons)
        ax = self._axes(ax, (7.5, 1.6 + 0.36 * len(board)))
        ax.axvline(0, color="0.4", linewidth=0.8, zorder=0)
        for row, (decision, *differences) in enumerate(board[["decision", "difference", "low", "high"]].to_numpy()):
            difference, low, high = (100 * value for value in differences)
            style = _POINTS[decision]
            ax.plot([low, high], [row, row], color=style["color"], linewidth=2.2, solid_capstyle="butt")
            x = 0 if decision == FIRST else difference
            ax.plot(x, row, **(style | {"markersize": 7, "linestyle": "none"} | kwargs))
        values = ["–" if np.isnan(value) else f"{100 * value:.1f}%" for value in board[self.metric]]
        _label_rows(ax, [plain_text(name, 40) for name in board.index], values)
        ax.set_ylim(len(board) - 0.5, -0.5)
        if (board["decision"] == NO_TEST).any():
            meaning = "there is no test of this metric"
        else:
            meaning = f"filled: p < {ALPHA:g} in McNemar's test{correction(n).replace(' after', chr(10) + 'after')}"
        intervals = f"paired {self.comparisons.level:.0%} intervals"
        ax.set_xlabel(f"difference to ◆ in percentage points, {intervals}\n{meaning}")
        self._set_title(self.title, max_length=110)
        return self


class ComparisonDisplay(Display):
    """What changes from run A to run B, in three pictures: `plot`, `plot_labels` and `plot_decomposition`.

    Parameters
    ----------
    comparison : Comparison

    Attributes
    ----------
    comparison : Comparison
    title : str
    ax_, figure_ : Axes, Figure
        After one of the plots.
    """

    def __init__(self, comparison: Comparison):
        self.comparison = comparison
        a, b = (shorten(Path(run["name"]).name, 40) for run in comparison.runs)
        self.title = f"A: {a}, B: {b}, on {len(comparison.pairs):,} texts"

    @classmethod
    def from_runs(cls, run_a: Run, run_b: Run, **options: Any) -> Self:
        """Compute from two runs, with `cascade_lab.analysis.comparison.compare` and its options."""
        return cls(compare(run_a, run_b, **options))

    def frame(self) -> pd.DataFrame:
        """Return one row per metric: the values of A and B, the difference and its interval, and the p-value."""
        return self.comparison.metrics

    def plot(self, ax: Axes | None = None, **kwargs: Any) -> Self:
        """Draw the difference of each metric as a point on its interval.

        The point is filled if McNemar's exact test decides that there is a difference (p < 0.05; if more runs were
        compared with A, after Holm's correction for their number), and empty if it does not. A metric that has no such
        test is a bar.

        Parameters
        ----------
        ax : Axes, optional
        **kwargs
            Go to `Axes.plot`, which draws the points.
        """
        metrics = self.comparison.metrics
        ax = self._axes(ax, (7.5, 1.5 + 0.42 * len(metrics)))
        drawn = 100 * metrics[["difference", "low", "high"]].to_numpy()
        for row, ((difference, low, high), p_value) in enumerate(zip(drawn, metrics["p_holm"], strict=True)):
            ax.plot([low, high], [row, row], color=_DARK, linewidth=2.2, solid_capstyle="butt")
            style: Style = {"marker": "o", "color": _DARK, "markerfacecolor": _DARK if p_value < ALPHA else "white"}
            if np.isnan(p_value):
                style |= {"marker": "|", "markeredgewidth": 2.2}
            ax.plot(difference, row, **(style | {"markersize": 7} | kwargs))
        ax.axvline(0, color="0.4", linewidth=0.8, zorder=0)
        names = [_named(name) for name in metrics.index]
        # The values of A and B are written at the right, where another picture would have its own axis.
        _label_rows(ax, names, [_change(a, b) for a, b in metrics[["a", "b"]].to_numpy()])
        ax.set_ylim(len(metrics) - 0.5, -0.5)
        ax.set_xlabel(
            f"B − A in percentage points, with {self.comparison.level:.0%} intervals\n"
            f"● p < {ALPHA:g} in McNemar's test{correction(self.comparison.n_compared)}, which decides"
            + ("   " if self.comparison.n_compared == 1 else "\n")
            + f"○ p ≥ {ALPHA:g}   | no test"
        )
        self._set_title(self.title, max_length=110)
        return self

    def plot_labels(self, ax: Axes | None = None, *, n_labels: int = 20, **kwargs: Any) -> Self:
        """Draw the texts that only B, and that only A, gets right, for the true labels with the largest differences.

        A star marks a label whose difference is significant (p < 0.05) after Holm's correction for all labels.

        Parameters
        ----------
        ax : Axes, optional
        n_labels : int
            The most labels to draw.
        **kwargs
            Go to `Axes.barh`, which draws the bars.
        """
        changed = self.comparison.changed_labels()
        net, total = (changed["wins"] - changed["losses"]).abs(), changed["wins"] + changed["losses"]
        shown = changed.iloc[np.lexsort((changed.index, -total, -net))][:n_labels]
        shown = shown.loc[(shown["wins"] - shown["losses"]).sort_values(ascending=False, kind="stable").index]
        ax = self._axes(ax, (7.5, 1.4 + 0.27 * max(len(shown), 2)))
        title = f"{len(changed)} of {len(self.comparison.labels)} true labels changed"
        if len(shown) < len(changed):
            title += f"; the {len(shown)} with the largest differences"
        ax.set_title(title, fontsize=11, loc="left", pad=6 if shown.empty else 24)
        if shown.empty:
            ax.set_axis_off()
            return self
        rows = np.arange(len(shown))
        for column, sign, style, label in (
            ("wins", 1, _GAIN, CHANGES[WIN]),
            ("losses", -1, _LOSS, CHANGES[LOSS]),
        ):
            bars = ax.barh(rows, sign * shown[column], **(style | {"label": label} | kwargs))
            ax.bar_label(bars, [f"{value:,}" if value else "" for value in shown[column]], padding=3, fontsize=8)
        stars = np.where(shown["p_holm"] < ALPHA, " *", "")
        names = [plain_text(str(name), 40) + star for name, star in zip(shown.index, stars, strict=True)]
        ax.set_yticks(rows, names, fontsize=9)
        ax.axvline(0, color="0.2", linewidth=0.8)
        ax.margins(x=0.1)
        ax.set_ylim(len(shown) - 0.4, -0.6)
        ax.xaxis.set_major_locator(MaxNLocator("auto", integer=True))
        ax.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{abs(value):,.0f}"))
        ax.set_xlabel("texts" + (" (*: p < 0.05 after Holm's correction)" if (stars == " *").any() else ""))
        ax.legend(fontsize=8, frameon=False, loc="lower left", bbox_to_anchor=(0, 1), borderaxespad=0.2, ncols=2)
        hide_spines(ax, "top", "right", "left")
        return self

    def plot_decomposition(self, ax: Axes | None = None, **kwargs: Any) -> Self:
        """Draw the steps from A's accuracy to B's: B's earlier stages, B's last stage, and their interaction.

        Parameters
        ----------
        ax : Axes, optional
        **kwargs
            Go to `Axes.barh`, which draws the steps.
        """
        decomposition = self.comparison.decomposition
        ax = self._axes(ax, (7.5, 2.9))
        if decomposition is None:
            self._set_title("the stages of A and B cannot be exchanged")
            ax.set_axis_off()
            return self
        self._set_title("which stage the difference in accuracy comes from")
        a, b = 100 * decomposition.accuracies["AA"], 100 * decomposition.accuracies["BB"]
        x = a
        for row, effect in enumerate(decomposition.effects.values(), 1):
            value, low, high = (100 * part for part in effect)
            ax.plot([x, x], [row - 1, row + 0.3], color="0.6", linewidth=0.8, zorder=0)
            ax.barh(row, value, left=x, height=0.5, **((_GAIN if value >= 0 else _LOSS) | kwargs))
            ax.plot([x + low, x + high], [row + 0.36, row + 0.36], color="black", linewidth=1.2)
            x += value
        ax.plot([x, x], [3, 4], color="0.6", linewidth=0.8, zorder=0)
        ax.plot([a, b], [0, 4], "D", color="black", markersize=7, linestyle="none")
        values = [
            f"{a:.2f}%",
            *(f"{100 * effect.value:+.2f}" for effect in decomposition.effects.values()),
            f"{b:.2f}%",
        ]
        _label_rows(ax, ["A", "B's earlier stages", "B's last stage", "interaction", "B"], values)
        ax.set_ylim(4.5, -0.5)
        ax.use_sticky_edges = False
        ax.margins(x=0.08)
        ax.set_xlabel(f"accuracy in percent (lines: {self.comparison.level:.0%} intervals of the change)")
        return self


def _named(metric: str) -> str:
    return f"{metric_label(metric)} (lower is better)" if metric == "risk" else metric_label(metric)


def _label_rows(ax: Axes, left: list[str], right: list[str]) -> None:
    """Name each row at the left, and write its values at the right."""
    ax.set_yticks(range(len(left)), left)
    other = ax.secondary_yaxis("right")
    other.set_yticks(range(len(right)), right)
    for axis in (ax, other):
        hide_spines(axis, "top", "left", "right")


def _change(a: float, b: float) -> str:
    return " → ".join("–" if np.isnan(value) else f"{100 * value:.1f}%" for value in (a, b))

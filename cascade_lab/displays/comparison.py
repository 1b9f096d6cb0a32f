"""Two runs side by side: differences with their intervals, classes won and lost, and whose doing it is."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes
from matplotlib.ticker import FuncFormatter, MaxNLocator

from cascade_lab.analysis.comparison import Comparison, compare
from cascade_lab.displays.words import words
from cascade_lab.run import Run

DARK, LIGHT = "#1f4e79", "#f0a860"  # blue and sand: apart in grey too
GAIN: dict[str, Any] = {"color": DARK}
LOSS: dict[str, Any] = {"color": LIGHT, "hatch": "///", "edgecolor": "0.3"}


class ComparisonDisplay:
    """What changes from run A to run B, in three pictures.

    Parameters
    ----------
    comparison : Comparison

    Attributes
    ----------
    comparison : Comparison
    ax_, figure_ : Axes, Figure
        After one of the plots.
    """

    def __init__(self, comparison: Comparison):
        self.comparison = comparison

    @classmethod
    def from_runs(cls, run_a: Run, run_b: Run, **options: Any) -> ComparisonDisplay:
        """Compute from two runs, with `compare` and its options."""
        return cls(compare(run_a, run_b, **options))

    def plot(self, ax: Axes | None = None) -> ComparisonDisplay:
        """Draw every figure's difference as a point on its interval; filled where that lies on one side of zero."""
        figures = self.comparison.figures
        ax = self._axes(ax, (7.5, 1.3 + 0.42 * len(figures)))
        for row, (difference, low, high) in enumerate(100 * figures[["difference", "low", "high"]].to_numpy()):
            told = low > 0 or high < 0
            ax.plot([low, high], [row, row], color=DARK, linewidth=2.2, solid_capstyle="butt")
            ax.plot(difference, row, "o", color=DARK, markerfacecolor=DARK if told else "white", markersize=7)
        ax.axvline(0, color="0.4", linewidth=0.8, zorder=0)
        names = [name.replace("_", " ").replace("f1", "F1") for name in figures.index]
        names = [f"{name} (less is better)" if name == "risk" else name for name in names]
        ax.set_yticks(range(len(figures)), names)
        # The figures themselves stand at the right, where another picture would have its own axis.
        right = ax.secondary_yaxis("right")
        right.set_yticks(range(len(figures)), [_from_to(a, b) for a, b in figures[["a", "b"]].to_numpy()])
        for axis in (ax, right):
            axis.tick_params(axis="y", length=0)
            axis.spines[["top", "left", "right"]].set_visible(False)
        ax.set_ylim(len(figures) - 0.5, -0.5)
        ax.set_xlabel("B - A, in points of a hundred, and the 95% interval")
        a, b = (words(Path(run["directory"]).name, 40) for run in self.comparison.runs)
        ax.set_title(f"A: {a}, B: {b}, on {len(self.comparison.pairs):,} texts", fontsize=11, loc="left")
        return self

    def plot_classes(self, ax: Axes | None = None, *, n_labels: int = 20) -> ComparisonDisplay:
        """Draw texts won and lost for the gold labels with the largest differences.

        A star marks a label whose difference holds after correction for looking at all of them (Holm, 0.05).
        """
        classes = self.comparison.classes
        changed = classes[classes["wins"] + classes["losses"] > 0]
        net, moved = (changed["wins"] - changed["losses"]).abs(), changed["wins"] + changed["losses"]
        shown = changed.iloc[np.lexsort((changed.index, -moved, -net))][:n_labels]
        shown = shown.loc[(shown["wins"] - shown["losses"]).sort_values(ascending=False, kind="stable").index]
        ax = self._axes(ax, (7.5, 1.4 + 0.27 * max(len(shown), 2)))
        title = f"{len(changed)} of {len(classes)} gold labels changed"
        if len(shown) < len(changed):
            title += f": the {len(shown)} with the largest differences"
        ax.set_title(title, fontsize=11, loc="left", pad=6 if shown.empty else 24)
        if shown.empty:
            ax.set_axis_off()
            return self
        rows = np.arange(len(shown))
        for kind, side, style in (("wins", 1, GAIN), ("losses", -1, LOSS)):
            label = "B right, A wrong" if side > 0 else "A right, B wrong"
            bars = ax.barh(rows, side * shown[kind], linewidth=0, label=label, **style)
            ax.bar_label(bars, [f"{value:,}" if value else "" for value in shown[kind]], padding=3, fontsize=8)
        stars = np.where(shown["p_holm"] < 0.05, " *", "")
        labels = [words(str(name), 40) + star for name, star in zip(shown.index, stars, strict=True)]
        ax.set_yticks(rows, labels, fontsize=9)
        ax.axvline(0, color="0.2", linewidth=0.8)
        ax.margins(x=0.1)
        ax.set_ylim(len(shown) - 0.4, -0.6)
        ax.xaxis.set_major_locator(MaxNLocator("auto", integer=True))
        ax.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{abs(value):,.0f}"))
        ax.set_xlabel("texts" + (" (*: p < 0.05 after Holm's correction)" if (stars == " *").any() else ""))
        ax.legend(fontsize=8, frameon=False, loc="lower left", bbox_to_anchor=(0, 1), borderaxespad=0.2, ncols=2)
        ax.spines[["top", "right", "left"]].set_visible(False)
        ax.tick_params(axis="y", length=0)
        return self

    def plot_decomposition(self, ax: Axes | None = None) -> ComparisonDisplay:
        """Draw the way from A's accuracy to B's: the gates', the last stages', and what both do together."""
        split = self.comparison.decomposition
        ax = self._axes(ax, (7.5, 2.9))
        ax.set_title("whose doing the difference in accuracy is", fontsize=11, loc="left")
        if split is None:
            ax.set_title("gates and last stages of A and B cannot be swapped", fontsize=11, loc="left")
            ax.set_axis_off()
            return self
        a, b = 100 * split.accuracies["AA"], 100 * split.accuracies["BB"]
        at, names = a, ["A", "B's gate", "B's classifier", "interaction", "B"]
        for row, effect in enumerate(split.effects.values(), 1):
            value, low, high = (100 * part for part in effect)
            ax.plot([at, at], [row - 1, row + 0.3], color="0.6", linewidth=0.8, zorder=0)
            ax.barh(row, value, left=at, height=0.5, linewidth=0, **(GAIN if value >= 0 else LOSS))
            ax.plot([at + low, at + high], [row + 0.36, row + 0.36], color="black", linewidth=1.2)
            at += value
        ax.plot([at, at], [3, 4], color="0.6", linewidth=0.8, zorder=0)
        ax.plot([a, b], [0, 4], "D", color="black", markersize=7, linestyle="none")
        said = [f"{a:.2f}%", *(f"{100 * effect.value:+.2f}" for effect in split.effects.values()), f"{b:.2f}%"]
        ax.set_yticks(range(5), names)
        right = ax.secondary_yaxis("right")
        right.set_yticks(range(5), said)
        for axis in (ax, right):
            axis.tick_params(axis="y", length=0)
            axis.spines[["top", "left", "right"]].set_visible(False)
        ax.set_ylim(4.5, -0.5)
        ax.use_sticky_edges = False
        ax.margins(x=0.08)
        ax.set_xlabel("accuracy, % (lines: 95% intervals of the change)")
        return self

    def _axes(self, ax: Axes | None, size: tuple[float, float]) -> Axes:
        if ax is None:
            _, ax = plt.subplots(figsize=size, layout="constrained")
        self.ax_, self.figure_ = ax, ax.get_figure(root=True)
        return ax


def _from_to(a: float, b: float) -> str:
    return " → ".join("–" if np.isnan(value) else f"{100 * value:.1f}%" for value in (a, b))

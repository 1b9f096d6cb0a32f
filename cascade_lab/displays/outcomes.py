"""Where a cascade's texts end and whose fault its errors are: the flow, the oracle ladder, the ghost matrix."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.patches import Rectangle

from cascade_lab.analysis.bootstrap import N_RESAMPLES
from cascade_lab.analysis.errors import DOOMED, GOES_ON, RECOVERABLE, flow, ghost_matrix, oracle_ladder
from cascade_lab.analysis.outcomes import FALSE_ACCEPT, RIGHT, RIGHT_REJECT, WRONG_CLASS, WRONG_REJECT
from cascade_lab.displays.confusion import CascadeConfusionDisplay
from cascade_lab.displays.words import words
from cascade_lab.run import Run

# What is right is pale and plain, what is wrong is darker and hatched: they part in grey too.
_LOOKS = {
    GOES_ON: ("#e4e4e4", None),
    RIGHT: ("#8ec9b4", None),
    RIGHT_REJECT: ("#c0e0d4", None),
    RECOVERABLE: ("#e08a3c", "////"),
    DOOMED: ("#a8521a", "xxxx"),
    FALSE_ACCEPT: ("#b0304f", "\\\\\\\\"),
    WRONG_CLASS: ("#5d4390", "...."),
    WRONG_REJECT: ("#55595f", "----"),
}

# The flow is laid out in inches, so that labels of a known size cannot meet.
_LINE, _BAR, _STREAM, _GAP = 0.22, 0.14, 3.4, 0.12
_LETTER = 0.082  # the mean width of one in bold type of 9 points
_NAME = 30  # characters of a stage's name
_THIN = 0.03  # a ribbon that a hatch would hide


class OutcomeFlowDisplay:
    """A flow picture: from all texts, through each stage, to every outcome.

    Attributes
    ----------
    flow : DataFrame
        As `analysis.errors.flow` returns it.
    stages : list of str
    title : str
    ax_, figure_ : Axes, Figure
        After `plot`.
    """

    def __init__(self, flow: pd.DataFrame, stages: list[str], *, title: str = ""):
        self.flow = flow
        self.stages = list(stages)
        self.title = title

    @classmethod
    def from_run(cls, run: Run, *, thresholds: Mapping[str, float] | None = None) -> OutcomeFlowDisplay:
        """Compute from a run, at its own thresholds or, as `Run.replay` does, at others; raises as `blame` does."""
        names = [stage.name for stage in run.spec.stages]
        title = f"{run.spec.name}: what becomes of {len(run.examples):,} texts"
        return cls(flow(run, thresholds=thresholds), names, title=title)

    def plot(self, ax: Axes | None = None) -> OutcomeFlowDisplay:
        """Draw a bar a stage, as high as the texts that reach it, and every way out as a ribbon to its label.

        The figure grows with the stages and outcomes where `ax` is not given.
        """
        ends, headings, height = self._slots()
        n = self.flow.loc[self.flow["stage"] == self.stages[0], "n_examples"].sum()
        bars = []
        for place, name in enumerate(self.stages):
            beyond = ends[ends["place"] >= place]
            # No slot is lower than what flows into it, so that this keeps a bar above what ended before it.
            middle = np.average(beyond["middle"], weights=beyond["n_examples"]) if len(beyond) else height
            bars.append((name, middle, int(beyond["n_examples"].sum())))
        bars.insert(0, ("all texts", bars[0][1], n))
        names = [f"{words(name, _NAME)}\n{count:,} ({_percent(count / n)})" for name, _, count in bars]
        widths = [_LETTER * max(map(len, name.split("\n"))) for name in names]
        between = [(one + other) / 2 for one, other in zip(widths, [*widths[1:], 0], strict=True)]
        across = np.cumsum([0.0, *(max(1.45, width + 0.2) for width in between)])
        labels = [_end_label(row) for row in ends.itertuples()]
        left = -widths[0] / 2
        right = across[-1] + _BAR + 0.1 + _LETTER * max(map(len, [*labels, *map(_heading, self.stages)]))
        top = max(height, *(middle + _STREAM * count / n / 2 + 0.45 for _, middle, count in bars))
        if ax is None:
            _, ax = plt.subplots(figsize=(right - left + 0.2, top + 0.5), layout="constrained")
        self.ax_, self.figure_ = ax, ax.get_figure(root=True)
        ax.set(xlim=(left, right), ylim=(0, top))
        ax.set_axis_off()
        ax.set_title(words(self.title, 75), fontsize=11, loc="left")

        for x, (_, middle, count), name in zip(across[:-1], bars, names, strict=True):
            size = _STREAM * count / n
            _bar(ax, x, middle, size, "0.25")
            ax.text(x + _BAR / 2, middle + size / 2 + 0.06, name, ha="center", va="bottom", fontsize=9)
        _ribbon(ax, across[[0, 1, 1]], (bars[0][1], bars[1][1]), _STREAM, GOES_ON)
        for place, (_, middle, count) in enumerate(bars[1:]):
            # An end comes to its height before the next stage, and goes straight from there.
            here, after, end = across[place + 1], across[place + 2], across[-1]
            leaving = [(r.middle, r.n_examples, r.outcome, end) for r in ends[ends["place"] == place].itertuples()]
            if place + 1 < len(self.stages):
                leaving.insert(0, (*bars[place + 2][1:], GOES_ON, after))
            upper = middle + _STREAM * count / n / 2
            for goal, n_leaving, outcome, to in leaving:
                size = _STREAM * n_leaving / n
                _ribbon(ax, (here, after, to), (upper - size / 2, goal), size, outcome)
                upper -= size
        x = across[-1] + _BAR + 0.08
        for row, label in zip(ends.itertuples(), labels, strict=True):
            color, hatch = _LOOKS[row.outcome]
            _bar(ax, across[-1], row.middle, _STREAM * row.n_examples / n, color)
            ax.text(x, row.middle, label, va="center", fontsize=9, weight="bold" if hatch else "normal")
        for place, y in headings.items():
            ax.text(x, y, _heading(self.stages[place]), va="center", fontsize=9, color="0.35", style="italic")
        return self

    def _slots(self) -> tuple[pd.DataFrame, dict[int, float], float]:
        """Return the ends with the middle of the slot of each, the heights of the stages' headings, and the whole."""
        ends = self.flow[self.flow["outcome"] != GOES_ON].copy()
        ends["place"] = ends["stage"].map(self.stages.index)
        ends = ends.sort_values("place", ascending=False, kind="stable")
        sizes = np.maximum(_STREAM * ends["n_examples"] / ends["n_examples"].sum(), _LINE)
        depth, headings, middles = 0.0, {}, []
        for place, size in zip(ends["place"], sizes, strict=True):
            if place not in headings:
                depth += (_GAP if headings else 0) + _LINE
                headings[place] = depth - _LINE / 2
            middles.append(depth + size / 2)
            depth += size
        ends["middle"] = depth - np.array(middles)
        return ends, {place: depth - at for place, at in headings.items()}, depth


def _bar(ax: Axes, x: float, middle: float, size: float, color: str) -> None:
    ax.add_patch(Rectangle((x, middle - size / 2), _BAR, size, facecolor=color, edgecolor=color, linewidth=1))


def _ribbon(ax: Axes, xs: Sequence[float], ys: tuple[float, float], size: float, outcome: str) -> None:
    """Draw a band from the bar at `xs[0]`, at height `ys[0]`, to `ys[1]` at `xs[1]`, and straight on to `xs[2]`."""
    t = np.linspace(0, 1, 60)
    x = np.append(xs[0] + _BAR + t * (xs[1] - xs[0] - _BAR), xs[2])
    y = np.append(ys[0] + (3 * t**2 - 2 * t**3) * (ys[1] - ys[0]), ys[1])
    color, hatch = _LOOKS[outcome]
    if size < _THIN:
        ax.plot(x, y, color=color, linewidth=max(1, 72 * size) if size else 0)
    else:
        ax.fill_between(x, y - size / 2, y + size / 2, facecolor=color, edgecolor="white", hatch=hatch, linewidth=0)


class OracleLadderDisplay:
    """What a perfect stage would be worth: the accuracy of each cascade of the ladder, from the real one up.

    Attributes
    ----------
    ladder : DataFrame
        As `analysis.errors.oracle_ladder` returns it.
    title : str
    ax_, figure_ : Axes, Figure
        After `plot`.
    """

    def __init__(self, ladder: pd.DataFrame, *, title: str = ""):
        self.ladder = ladder
        self.title = title

    @classmethod
    def from_run(
        cls,
        run: Run,
        *,
        thresholds: Mapping[str, float] | None = None,
        level: float = 0.95,
        n_resamples: int = N_RESAMPLES,
        seed: int = 0,
    ) -> OracleLadderDisplay:
        """Compute from a run, with `oracle_ladder`."""
        ladder = oracle_ladder(run, thresholds=thresholds, level=level, n_resamples=n_resamples, seed=seed)
        return cls(ladder, title=f"{run.spec.name}: perfection's worth, {level:.0%} intervals")

    def plot(self, ax: Axes | None = None) -> OracleLadderDisplay:
        """Draw a rung a cascade: a dot at its accuracy with the interval, and the points gained as a bar."""
        n = len(self.ladder)
        if ax is None:
            _, ax = plt.subplots(figsize=(8.2, 1.2 + 0.42 * n), layout="constrained")
        self.ax_, self.figure_ = ax, ax.get_figure(root=True)
        real = self.ladder["accuracy"].iloc[0]
        for y, row in enumerate(self.ladder.itertuples()):
            ax.barh(y, row.accuracy - real, left=real, height=0.5, color="#8ec9b4")
            ax.plot([row.accuracy_low, row.accuracy_high], [y, y], color="black", linewidth=1.2)
            ax.plot(row.accuracy, y, "o", color="black", markersize=5)
            said = f"{row.accuracy:.4f}"
            if y:
                said += f"   +{row.points:.2f} points ({row.points_low:.2f} to {row.points_high:.2f})"
            ax.text(1.02, y, said, transform=ax.get_yaxis_transform(), va="center", fontsize=9)
        ax.axvline(real, color="0.4", linewidth=0.8, linestyle="--")
        low = np.nanmin([self.ladder["accuracy_low"].min(), real])
        ax.set_xlim(low - 0.05 * (1 - low) - 1e-3, 1 + 0.02 * (1 - low) + 1e-3)
        ax.set_yticks(range(n), [words(name, _NAME) for name in self.ladder.index])
        ax.set_ylim(n - 0.5, -0.5)
        ax.set_xlabel("accuracy of the cascade")
        ax.set_title(words(self.title), fontsize=11, loc="left")
        ax.spines[["top", "right", "left"]].set_visible(False)
        ax.tick_params(axis="y", length=0)
        return self


class GhostMatrixDisplay(CascadeConfusionDisplay):
    """What the rejected texts would have become had they gone on: gold labels in rows, would-be answers in columns."""

    @classmethod
    def from_run(
        cls, run: Run, *, stage: str | None = None, thresholds: Mapping[str, float] | None = None
    ) -> GhostMatrixDisplay:
        """Compute from a run, with `ghost_matrix`: for the texts of gate `stage` or, without it, of every gate."""
        ghost = ghost_matrix(run, stage, thresholds=thresholds).ghost
        title = f"had {ghost.to_numpy().sum():,} rejected {'texts' if stage is None else f'by {stage}'} gone on"
        return cls(ghost.to_numpy(), list(ghost.columns), title=title)


def _end_label(row: tuple) -> str:
    """Say how many texts an end has, and whose fault they are where it is not the fault of the stage itself."""
    by = f", fault of {words(row.fault, _NAME)}" if isinstance(row.fault, str) and row.fault != row.stage else ""
    return f"{row.outcome}{by}: {row.n_examples:,} ({_percent(row.fraction)})"


def _heading(stage: str) -> str:
    return f"ends at {words(stage, _NAME)}"


def _percent(fraction: float) -> str:
    return "<0.1%" if 0 < fraction < 0.0005 else f"{fraction:.1%}"

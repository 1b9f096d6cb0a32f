"""Draws where the texts of a cascade end, and which stage is at fault for its errors."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.patches import Rectangle

from cascade_lab.analysis.errors import GOES_ON, counterfactual_matrix, flow, oracle_ladder
from cascade_lab.analysis.outcomes import RIGHT
from cascade_lab.displays.confusion import MatrixDisplay
from cascade_lab.displays.drawing import OUTCOME_STYLES, Display, Style, hide_spines, percent, plain_text
from cascade_lab.run import Run
from cascade_lab.text import shorten

if TYPE_CHECKING:
    from typing_extensions import Self

# The flow is laid out in inches, so that labels of a known size do not overlap.
_LINE, _BAR, _STREAM, _GAP = 0.22, 0.14, 3.4, 0.12
_CHARACTER = 0.082  # the mean width of a character in bold text of 9 points
_TITLE_CHARACTER = 0.1  # and in the title, of 11 points
_MAX_NAME = 30  # characters of a stage's name
_THIN = 0.03  # a ribbon thinner than this would be hidden by its hatch


class OutcomeFlowDisplay(Display):
    """A flow picture: from all texts, through each stage, to every outcome.

    Parameters
    ----------
    flow : DataFrame
        What `flow` returns.
    stages : sequence of str
    title : str

    Attributes
    ----------
    flow, stages, title
        As given.
    ax_, figure_ : Axes, Figure
        After `plot`.
    """

    def __init__(self, flow: pd.DataFrame, stages: Sequence[str], *, title: str = ""):
        self.flow = flow
        self.stages = list(stages)
        self.title = title

    @classmethod
    def from_run(cls, run: Run, *, thresholds: Mapping[str, float] | None = None) -> Self:
        """Compute from a run, with `flow`, which also lists what is raised.

        Parameters
        ----------
        run : Run
        thresholds : mapping of str to float, optional
            As for `Run.replay`; by default the run's own.
        """
        table = flow(run, thresholds=thresholds)
        names = [stage.name for stage in run.spec.stages]
        n = table.loc[table["stage"] == names[0], "n_examples"].sum()
        return cls(table, names, title=f"{shorten(run.spec.name, 40)}: what happens to {n:,} texts")

    def frame(self) -> pd.DataFrame:
        """Return one row for each way in which texts leave a stage."""
        return self.flow

    def plot(self, ax: Axes | None = None, **kwargs: Any) -> Self:
        """Draw one bar per stage, as high as the number of texts that reach it, and one ribbon per outcome.

        A new figure is as large as the stages and outcomes need.

        Parameters
        ----------
        ax : Axes, optional
        **kwargs
            Go to `Axes.fill_between`, which draws the ribbons.
        """
        ends, headings, height = self._slots()
        n = self.flow.loc[self.flow["stage"] == self.stages[0], "n_examples"].sum()
        bars = []
        for k, name in enumerate(self.stages):
            later = ends[ends["stage_index"] >= k]
            # No slot is lower than what flows into it, so this keeps a bar above the texts that ended before it.
            middle = np.average(later["middle"], weights=later["n_examples"]) if len(later) else height
            bars.append((name, middle, int(later["n_examples"].sum())))
        bars.insert(0, ("all texts", bars[0][1], n))
        names = [f"{plain_text(name, _MAX_NAME)}\n{count:,} ({percent(count / n)})" for name, _, count in bars]
        widths = [_CHARACTER * max(map(len, name.split("\n"))) for name in names]
        between = [(width + following) / 2 for width, following in zip(widths, [*widths[1:], 0], strict=True)]
        xs = np.cumsum([0.0, *(max(1.45, width + 0.2) for width in between)])
        labels = [_end_label(row) for row in ends.itertuples()]
        left = -widths[0] / 2
        right = xs[-1] + _BAR + 0.1 + _CHARACTER * max(map(len, [*labels, *map(_heading, self.stages)]))
        top = max(height, *(middle + _STREAM * count / n / 2 + 0.45 for _, middle, count in bars))
        ax = self._axes(ax, (right - left + 0.2, top + 0.5))
        ax.set(xlim=(left, right), ylim=(0, top))
        ax.set_axis_off()
        self._set_title(self.title, max_length=int((right - left) / _TITLE_CHARACTER))

        for x, (_, middle, count), name in zip(xs[:-1], bars, names, strict=True):
            size = _STREAM * count / n
            _draw_bar(ax, x, middle, size, "0.25")
            ax.text(x + _BAR / 2, middle + size / 2 + 0.06, name, ha="center", va="bottom", fontsize=9)
        _draw_ribbon(ax, xs[[0, 1, 1]], (bars[0][1], bars[1][1]), _STREAM, GOES_ON, kwargs)
        for k, (_, middle, count) in enumerate(bars[1:]):
            # A ribbon that ends reaches its height before the next stage, and is straight from there.
            here, following, end = xs[k + 1], xs[k + 2], xs[-1]
            leaving = [(r.middle, r.n_examples, r.outcome, end) for r in ends[ends["stage_index"] == k].itertuples()]
            if k + 1 < len(self.stages):
                leaving.insert(0, (*bars[k + 2][1:], GOES_ON, following))
            upper = middle + _STREAM * count / n / 2
            for target, n_leaving, outcome, to in leaving:
                size = _STREAM * n_leaving / n
                _draw_ribbon(ax, (here, following, to), (upper - size / 2, target), size, outcome, kwargs)
                upper -= size
        x = xs[-1] + _BAR + 0.08
        for row, label in zip(ends.itertuples(), labels, strict=True):
            color, hatch = OUTCOME_STYLES[row.outcome]
            _draw_bar(ax, xs[-1], row.middle, _STREAM * row.n_examples / n, color)
            ax.text(x, row.middle, label, va="center", fontsize=9, weight="bold" if hatch else "normal")
        for k, y in headings.items():
            ax.text(x, y, _heading(self.stages[k]), va="center", fontsize=9, color="0.35", style="italic")
        return self

    def _slots(self) -> tuple[pd.DataFrame, dict[int, float], float]:
        """Return the outcomes with the middle of each slot, the heights of the headings, and the total height."""
        ends = self.flow[self.flow["outcome"] != GOES_ON].copy()
        ends["stage_index"] = ends["stage"].map(self.stages.index)
        ends = ends.sort_values("stage_index", ascending=False, kind="stable")
        sizes = np.maximum(_STREAM * ends["n_examples"] / ends["n_examples"].sum(), _LINE)
        headings: dict[int, float] = {}
        depth, middles = 0.0, []
        for stage_index, size in zip(ends["stage_index"], sizes, strict=True):
            if stage_index not in headings:
                depth += (_GAP if headings else 0) + _LINE
                headings[stage_index] = depth - _LINE / 2
            middles.append(depth + size / 2)
            depth += size
        ends["middle"] = depth - np.array(middles)
        return ends, {stage_index: depth - y for stage_index, y in headings.items()}, depth


def _draw_bar(ax: Axes, x: float, middle: float, size: float, color: str) -> None:
    ax.add_patch(Rectangle((x, middle - size / 2), _BAR, size, facecolor=color, edgecolor=color, linewidth=1))


def _draw_ribbon(
    ax: Axes,
    xs: Sequence[float] | np.ndarray,
    ys: tuple[float, float],
    size: float,
    outcome: str,
    kwargs: Style,
) -> None:
    """Draw a band from the bar at `xs[0]`, at height `ys[0]`, to `ys[1]` at `xs[1]`, and straight on to `xs[2]`."""
    t = np.linspace(0, 1, 60)
    x = np.append(xs[0] + _BAR + t * (xs[1] - xs[0] - _BAR), xs[2])
    y = np.append(ys[0] + (3 * t**2 - 2 * t**3) * (ys[1] - ys[0]), ys[1])
    color, hatch = OUTCOME_STYLES[outcome]
    if size < _THIN:
        ax.plot(x, y, color=color, linewidth=max(1, 72 * size) if size else 0)
    else:
        style: Style = {"facecolor": color, "edgecolor": "white", "hatch": hatch, "linewidth": 0}
        ax.fill_between(x, y - size / 2, y + size / 2, **(style | kwargs))


def _end_label(row: Any) -> str:
    """Say how many texts have an outcome, and which stage is at fault if it is not the stage where they end."""
    other = isinstance(row.fault, str) and row.fault != row.stage
    fault = f", fault of {plain_text(row.fault, _MAX_NAME)}" if other else ""
    return f"{row.outcome}{fault}: {row.n_examples:,} ({percent(row.fraction)})"


def _heading(stage: str) -> str:
    return f"ends at {plain_text(stage, _MAX_NAME)}"


class OracleLadderDisplay(Display):
    """The accuracy that the cascade would have if one stage, or all stages, made no errors.

    Parameters
    ----------
    ladder : DataFrame
        What `oracle_ladder` returns.
    title : str

    Attributes
    ----------
    ladder, title
        As given.
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
    ) -> Self:
        """Compute from a run, with `oracle_ladder` and its parameters."""
        ladder = oracle_ladder(run, thresholds=thresholds, level=level)
        name = shorten(run.spec.name, 40)
        return cls(ladder, title=f"{name}: accuracy if a stage were perfect, {level:.0%} intervals")

    def frame(self) -> pd.DataFrame:
        """Return one row per cascade of the ladder."""
        return self.ladder

    def plot(self, ax: Axes | None = None, **kwargs: Any) -> Self:
        """Draw one row per cascade: a dot at its accuracy with the interval, and a bar for the points that it gains.

        Parameters
        ----------
        ax : Axes, optional
        **kwargs
            Go to `Axes.barh`, which draws the bars.
        """
        n = len(self.ladder)
        ax = self._axes(ax, (8.2, 1.2 + 0.42 * n))
        real = self.ladder["accuracy"].iloc[0]
        style: Style = {"left": real, "height": 0.5, "color": OUTCOME_STYLES[RIGHT].color} | kwargs
        for y, row in enumerate(self.ladder.itertuples()):
            ax.barh(y, row.accuracy - real, **style)
            ax.plot([row.accuracy_low, row.accuracy_high], [y, y], color="black", linewidth=1.2)
            ax.plot(row.accuracy, y, "o", color="black", markersize=5)
            values = f"{row.accuracy:.4f}"
            if y:
                values += f"   +{row.points:.2f} points ({row.points_low:.2f} to {row.points_high:.2f})"
            ax.text(1.02, y, values, transform=ax.get_yaxis_transform(), va="center", fontsize=9)
        ax.axvline(real, color="0.4", linewidth=0.8, linestyle="--")
        low = np.nanmin([self.ladder["accuracy_low"].min(), real])
        ax.set_xlim(low - 0.05 * (1 - low) - 1e-3, 1 + 0.02 * (1 - low) + 1e-3)
        ax.set_yticks(range(n), [plain_text(name, _MAX_NAME) for name in self.ladder.index])
        ax.set_ylim(n - 0.5, -0.5)
        ax.set_xlabel("accuracy of the cascade")
        self._set_title(self.title, max_length=65)
        hide_spines(ax, "top", "right", "left")
        return self


class CounterfactualMatrixDisplay(MatrixDisplay):
    """The labels that the rejected texts would have got if the gates had let them pass."""

    @classmethod
    def from_run(cls, run: Run, *, stage: str | None = None, thresholds: Mapping[str, float] | None = None) -> Self:
        """Compute from a run, with `counterfactual_matrix`, which also lists what is raised.

        Parameters
        ----------
        run : Run
        stage : str, optional
            The gate whose rejected texts are counted; by default every gate's.
        thresholds : mapping of str to float, optional
            As for `Run.replay`; by default the run's own.
        """
        matrix = counterfactual_matrix(run, stage=stage, thresholds=thresholds).counterfactual
        by = "gates" if stage is None else shorten(stage, 20)
        return cls(
            matrix.to_numpy(),
            list(matrix.columns),
            title=f"{matrix.to_numpy().sum():,} texts rejected by {by}:\nlabels if they had passed",
        )

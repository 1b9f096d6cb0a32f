"""Draws how long texts take: at each stage of a run, and in a latency study by batch size, length and threshold."""

from __future__ import annotations

from itertools import cycle
from typing import TYPE_CHECKING, Any

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.patches import Rectangle
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter, PercentFormatter

from cascade_lab.analysis.latency import PERCENTILES, StageLatency, stage_latencies
from cascade_lab.analysis.serving_latency import (
    WHOLE,
    LatencyStudy,
    by_length,
    checked_cost,
    predicted_cost,
    serving_metrics,
)
from cascade_lab.displays.drawing import Display, Style, hide_spines, plain_text, text_color
from cascade_lab.exceptions import CascadeLabError
from cascade_lab.run import Run

if TYPE_CHECKING:
    from typing_extensions import Self


_AMORTISED = "amortised milliseconds per text"


class StageLatencyDisplay(Display):
    """The distribution of the amortised time per text at each stage, with p50, p95 and p99, and the stage's share.

    The amortised time is the time of a batch divided by its texts. The share is of the times of all batches added up,
    which is more than the time that passed where several threads score batches at the same time.

    Parameters
    ----------
    stages : dict of str to StageLatency
        What `stage_latencies` returns.
    title : str

    Attributes
    ----------
    stages, title
        As given.
    ax_, figure_ : Axes, Figure
        After `plot`.
    """

    def __init__(self, stages: dict[str, StageLatency], *, title: str = ""):
        self.stages = stages
        self.title = title

    @classmethod
    def from_run(cls, run: Run) -> Self:
        """Compute from a run, with `stage_latencies`."""
        size = run.manifest.get("batch_size")
        batches = "" if size is None else f", at most {size} texts per batch"
        return cls(stage_latencies(run), title=f"{run.spec.name}: amortised time per text{batches}")

    def frame(self) -> pd.DataFrame:
        """Return one row per stage: `n_texts`, `seconds`, `share`, and `p50_ms`, `p95_ms`, `p99_ms` per text."""
        rows = {
            name: [len(s.text_ms), *(s.percentiles_ms[p] for p in PERCENTILES), s.seconds, s.share]
            for name, s in self.stages.items()
        }
        columns = ["n_texts", *(f"p{p}_ms" for p in PERCENTILES), "seconds", "share"]
        return pd.DataFrame.from_dict(rows, orient="index", columns=columns).rename_axis("stage")

    def plot(self, ax: Axes | None = None, **kwargs: Any) -> Self:
        """Draw one histogram per stage, and above them a bar of the stages' shares of the time.

        The axis ends a quarter beyond the largest p99. It says how many texts took longer.

        Parameters
        ----------
        ax : Axes, optional
        **kwargs
            Go to `Axes.bar`, which draws the histograms.
        """
        names = list(self.stages)
        ax = self._axes(ax, (7.5, 1.6 + 0.85 * len(names)))
        colors = plt.get_cmap("Greys")(np.linspace(0.8, 0.35, len(names)))  # no colour of an outcome
        limit = 1.25 * max(stage.percentiles_ms[99] for stage in self.stages.values() if len(stage.text_ms))
        n_beyond = sum(int((stage.text_ms > limit).sum()) for stage in self.stages.values())
        for row, (stage, color) in enumerate(zip(self.stages.values(), colors, strict=True)):
            _draw_stage(ax, row, stage, limit, {"color": color, "linewidth": 0} | kwargs)
        seconds = sum(stage.seconds for stage in self.stages.values())
        _draw_shares(ax, -1, self.stages, colors)
        labels = [f"share of {seconds:.1f} s,\nall batches", *(plain_text(name, 30) for name in names)]
        ax.set_yticks(range(-1, len(names)), labels)
        ax.set_ylim(len(names) - 0.45, -1.4)
        ax.set_xlim(0, limit)
        ax.set_xlabel(_AMORTISED + (f" ({n_beyond:,} texts took longer)" if n_beyond else ""))
        self._set_title(self.title)
        hide_spines(ax, "top", "right", "left")
        return self


def _draw_stage(ax: Axes, row: int, stage: StageLatency, limit: float, style: Style) -> None:
    """Draw a histogram that stands on the stage's line, its percentiles as ticks, and their values below the line."""
    if not len(stage.text_ms):
        ax.text(0, row, " no text reached it", va="center")
        return
    counts, edges = np.histogram(stage.text_ms, bins=80, range=(0, limit))
    heights = 0.6 * counts / max(counts.max(), 1)
    line = row + 0.22
    ax.bar(edges[:-1], -heights, np.diff(edges), bottom=line, align="edge", **style)
    ax.axhline(line, color="0.7", linewidth=0.6)
    for value in stage.percentiles_ms.values():
        ax.plot([value, value], [line - 0.62, line], color="black", linewidth=1)
    values = "    ".join(f"p{p} {value:.2f}" for p, value in stage.percentiles_ms.items())
    ax.text(limit, line + 0.04, values, ha="right", va="top", fontsize=8)


def _draw_shares(ax: Axes, row: int, stages: dict[str, StageLatency], colors: np.ndarray) -> None:
    """Draw a bar over the whole width, divided by the stages' shares of the time."""
    transform = ax.get_yaxis_transform()  # x from 0 to 1 over the axes' width, y in rows
    left = 0.0
    for (name, stage), color in zip(stages.items(), colors, strict=True):
        ax.add_patch(Rectangle((left, row - 0.22), stage.share, 0.44, color=color, linewidth=0, transform=transform))
        if stage.share > 0.1:
            middle = left + stage.share / 2
            text = f"{plain_text(name, 30)} {stage.share:.0%}"
            style: Style = {"ha": "center", "va": "center", "fontsize": 9, "transform": transform}
            ax.text(middle, row, text, color=text_color(color), **style)
        left += stage.share


class BatchLatencyDisplay(Display):
    """How long a caller waits for a whole batch: p50, p95 and p99 by batch size, with intervals.

    A point without an interval is of too few batches for one.

    Parameters
    ----------
    metrics : DataFrame
        What `serving_metrics` returns.
    stage : str
        The stage to draw, or "end to end".
    title : str

    Attributes
    ----------
    metrics, stage, title
        As given.
    ax_, figure_ : Axes, Figure
        After `plot`.
    """

    def __init__(self, metrics: pd.DataFrame, *, stage: str = WHOLE, title: str = ""):
        self.metrics = metrics
        self.stage = stage
        self.title = title

    @classmethod
    def from_study(cls, study: LatencyStudy, *, stage: str = WHOLE) -> Self:
        """Compute from a latency study, with `serving_metrics`: for one stage, or by default for the whole cascade.

        Raises
        ------
        SpecError
            The cascade has no such stage.
        """
        if stage != WHOLE:
            study.spec.stage(stage)
        return cls(
            serving_metrics(study.own), stage=stage, title=f"{study.spec.name}, {stage}: waiting time by batch size"
        )

    def frame(self) -> pd.DataFrame:
        """Return the stage's percentiles, by `batch_size` and `metric`: `value`, `low`, `high`, `n_batches`."""
        metrics = self.metrics.xs(self.stage, level="stage")
        drawn = metrics.index.get_level_values("metric").isin([f"batch_p{p}_ms" for p in PERCENTILES])
        return metrics[drawn]

    def plot(self, ax: Axes | None = None, **kwargs: Any) -> Self:
        """Draw one point with its interval for each percentile and batch size.

        Parameters
        ----------
        ax : Axes, optional
        **kwargs
            Go to `Axes.errorbar`, which draws the points.
        """
        ax = self._axes(ax, (7.5, 4.2))
        percentiles = self.frame()
        sizes = percentiles.index.get_level_values("batch_size").unique()
        for k, (p, color, marker) in enumerate(zip(PERCENTILES, _colors(3), "os^", strict=True)):
            points = percentiles.xs(f"batch_p{p}_ms", level="metric").reindex(sizes)
            x = np.arange(len(sizes)) + 0.12 * (k - 1)  # side by side, so that no interval hides another
            _draw_points(ax, x, points, {"color": color, "marker": marker, "label": f"p{p}"} | kwargs)
        ax.set_xticks(range(len(sizes)), [f"{size}" for size in sizes])
        ax.set_xlim(-0.5, len(sizes) - 0.5)
        ax.set_xlabel("texts per batch")
        self._set_title(self.title)
        _finish(ax, "milliseconds for the whole batch")
        return self


class LengthLatencyDisplay(Display):
    """The amortised time per text at one stage by the length of its batch: the median, and the middle half around it.

    Parameters
    ----------
    lengths : DataFrame
        The rows of one stage of what `by_length` returns.
    title : str

    Attributes
    ----------
    lengths, title
        As given.
    ax_, figure_ : Axes, Figure
        After `plot`.
    """

    def __init__(self, lengths: pd.DataFrame, *, title: str = ""):
        self.lengths = lengths
        self.title = title

    @classmethod
    def from_study(cls, study: LatencyStudy, *, stage: str) -> Self:
        """Compute from a latency study, with `by_length`.

        Raises
        ------
        SpecError
            The cascade has no such stage.
        """
        study.spec.stage(stage)
        lengths = by_length(study.own)
        return cls(
            lengths[lengths["stage"] == stage], title=f"{study.spec.name}, {stage}: amortised time per text by length"
        )

    def frame(self) -> pd.DataFrame:
        """Return one row per batch size and group of lengths."""
        return self.lengths

    def plot(self, ax: Axes | None = None, **kwargs: Any) -> Self:
        """Draw one line with its band for each batch size.

        Parameters
        ----------
        ax : Axes, optional
        **kwargs
            Go to `Axes.plot`, which draws the lines.
        """
        ax = self._axes(ax, (7.5, 4.2))
        groups = list(self.lengths.groupby("batch_size"))
        for (size, group), color, marker in zip(groups, _colors(len(groups)), _markers(len(groups)), strict=True):
            x = group["sequence_length"]
            ax.fill_between(x, group["text_p25_ms"], group["text_p75_ms"], color=color, alpha=0.2, linewidth=0)
            style: Style = {"color": color, "marker": marker, "markersize": 4, "label": f"batches of {size}"}
            ax.plot(x, group["text_p50_ms"], **(style | kwargs))
        ax.xaxis.set_major_locator(MaxNLocator(integer=True))
        ax.set_xlabel("tokens of the longest text in the batch")
        self._set_title(self.title)
        _finish(ax, _AMORTISED)
        return self


class PredictedCostDisplay(Display):
    """The predicted amortised time per text at every threshold of the first gate, and the measured one at some.

    Parameters
    ----------
    predicted : DataFrame
        What `predicted_cost` returns.
    checks : DataFrame
        What `checked_cost` returns.
    threshold : float
        The cascade's own threshold.
    gate : str
        The name of the gate.
    title : str

    Attributes
    ----------
    predicted, checks, threshold, gate, title
        As given.
    ax_, figure_ : Axes, Figure
        After `plot`.
    """

    def __init__(self, predicted: pd.DataFrame, checks: pd.DataFrame, *, threshold: float, gate: str, title: str = ""):
        self.predicted = predicted
        self.checks = checks
        self.threshold = threshold
        self.gate = gate
        self.title = title

    @classmethod
    def from_study(cls, study: LatencyStudy) -> Self:
        """Compute from a latency study, with `predicted_cost` and `checked_cost`.

        Raises
        ------
        CascadeLabError
            The cascade has no gate.
        """
        gate = study.spec.stages[0]
        if gate.threshold is None:
            raise CascadeLabError(
                f"{study.spec.name}: has no gate, so there is no threshold to predict for; use a study of a cascade"
            )
        probabilities = study.texts[f"{gate.name}_probability"]
        thresholds = np.unique(np.quantile(probabilities, np.linspace(0, 1, 60), method="inverted_cdf"))
        return cls(
            predicted_cost(study, np.union1d(thresholds, gate.threshold)),
            checked_cost(study),
            threshold=gate.threshold,
            gate=gate.name,
            title=f"{study.spec.name}: predicted cost (lines) and measured cost (points)",
        )

    def frame(self) -> pd.DataFrame:
        """Return lines and points: `source` (predicted or measured), `threshold`, `batch_size`, `reach`, `text_ms`, and
        for measured points the interval, `low_ms` and `high_ms`."""
        names = {"measured_ms": "text_ms", "measured_low_ms": "low_ms", "measured_high_ms": "high_ms"}
        parts = {
            "predicted": self.predicted.reindex(columns=_COST_COLUMNS),
            "measured": self.checks.rename(columns=names).reindex(columns=_COST_COLUMNS),
        }
        filled = {name: part.astype({"low_ms": float, "high_ms": float}) for name, part in parts.items()}
        return pd.concat(filled, names=["source"]).reset_index("source").reset_index(drop=True)

    def plot(self, ax: Axes | None = None, **kwargs: Any) -> Self:
        """Draw one line per batch size over the fraction of texts that pass the gate; thresholds are along the top.

        Parameters
        ----------
        ax : Axes, optional
        **kwargs
            Go to `Axes.plot`, which draws the predicted lines.
        """
        ax = self._axes(ax, (7.5, 4.6))
        groups = list(self.predicted.groupby("batch_size"))
        for (size, group), color, marker in zip(groups, _colors(len(groups)), _markers(len(groups)), strict=True):
            ax.plot(group["reach"], group["text_ms"], **({"color": color, "linewidth": 1.2} | kwargs))
            measured = self.checks[self.checks["batch_size"] == size]
            points = measured[["measured_ms", "measured_low_ms", "measured_high_ms"]].set_axis(
                ["value", "low", "high"], axis=1
            )
            style: Style = {"color": color, "marker": marker, "label": f"batches of {size}"}
            _draw_points(ax, measured["reach"], points, style)
        ax.set_xlim(-0.02, 1.02)
        ax.xaxis.set_major_formatter(PercentFormatter(1))
        gate = plain_text(self.gate, 40)
        ax.set_xlabel(f"texts that go on to the stage after {gate}")
        reach = self.predicted.loc[self.predicted["threshold"] == self.threshold, "reach"].mean()
        ax.axvline(reach, color="0.6", linewidth=0.8, linestyle=":", label="threshold of the cascade")
        checked = self.checks.groupby("threshold")["reach"].mean()
        top = ax.secondary_xaxis("top")
        top.set_xticks(checked, [f"{threshold:.6g}" for threshold in checked.index], fontsize=8)
        top.set_xlabel(f"threshold of {gate}", fontsize=9)
        top.spines["top"].set_visible(False)
        self._set_title(self.title)
        _finish(ax, _AMORTISED)
        return self


_COST_COLUMNS = ["threshold", "batch_size", "reach", "text_ms", "low_ms", "high_ms"]


def _colors(n: int) -> np.ndarray:
    return np.asarray(plt.get_cmap("viridis")(np.linspace(0.05, 0.8, n)))


def _markers(n: int) -> list[str]:
    return [marker for marker, _ in zip(cycle("os^DvP*X"), range(n), strict=False)]


def _draw_points(ax: Axes, x: Any, points: pd.DataFrame, style: Style) -> None:
    """Draw values with their intervals."""
    intervals = np.nan_to_num([points["value"] - points["low"], points["high"] - points["value"]])
    common: Style = {"linestyle": "none", "markersize": 5, "capsize": 2}
    ax.errorbar(x, points["value"], yerr=intervals, **(common | style))


def _finish(ax: Axes, label: str) -> None:
    """Set the axis of milliseconds: from 0, or on a log scale if the values differ by more than a factor of 5."""
    low, high = ax.dataLim.intervaly
    if low > 0 and high > 5 * low:
        ax.set_yscale("log")
        ax.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        ax.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        ax.yaxis.set_minor_formatter(NullFormatter())
    else:
        ax.set_ylim(0, 1.06 * high)
    ax.set_ylabel(label)
    hide_spines(ax)
    ax.grid(axis="y", color="0.9", linewidth=0.6)
    ax.set_axisbelow(True)
    ax.legend(frameon=False, loc="upper left", bbox_to_anchor=(1, 1))  # beside the axes, where it hides nothing

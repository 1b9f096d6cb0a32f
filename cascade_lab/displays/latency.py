"""How long texts take: at each stage of a run; and served live, by batch size, by length, and by threshold."""

from __future__ import annotations

from itertools import cycle
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.patches import Rectangle
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter, PercentFormatter

from cascade_lab.analysis.latency import PERCENTILES, StageLatency, stage_latencies
from cascade_lab.analysis.live_latency import (
    WHOLE,
    LatencyStudy,
    by_length,
    checked_cost,
    live_figures,
    predicted_cost,
)
from cascade_lab.displays.words import words
from cascade_lab.errors import CascadeLabError
from cascade_lab.run import Run


class StageLatencyDisplay:
    """The distribution of time a text at each stage, with p50, p95 and p99, above each stage's share.

    Attributes
    ----------
    stages : dict of str to StageLatency
    title : str
    ax_, figure_ : Axes, Figure
        After `plot`.
    """

    def __init__(self, stages: dict[str, StageLatency], *, title: str = ""):
        self.stages = stages
        self.title = title

    @classmethod
    def from_run(cls, run: Run) -> StageLatencyDisplay:
        """Compute from a run, with `stage_latencies`."""
        size = run.manifest["batch_size"]
        bound = "" if size is None else f", at most {size} texts a batch"
        return cls(stage_latencies(run), title=f"{run.spec.name}: time a text{bound}")

    def plot(self, ax: Axes | None = None) -> StageLatencyDisplay:
        """Draw a row a stage, and above them one bar of their shares.

        The few texts beyond the widest p99 by a quarter are not drawn; the axis says how many.
        """
        names = list(self.stages)
        if ax is None:
            _, ax = plt.subplots(figsize=(7.5, 1.6 + 0.85 * len(names)), layout="constrained")
        self.ax_, self.figure_ = ax, ax.get_figure(root=True)
        colors = plt.get_cmap("viridis")(np.linspace(0.15, 0.75, len(names)))
        limit = 1.25 * max(stage.percentiles_ms[99] for stage in self.stages.values() if len(stage.text_ms))
        beyond = sum(int((stage.text_ms > limit).sum()) for stage in self.stages.values())
        for row, (stage, color) in enumerate(zip(self.stages.values(), colors, strict=True)):
            _draw_stage(ax, row, stage, color, limit)
        seconds = sum(stage.seconds for stage in self.stages.values())
        _draw_shares(ax, -1, self.stages, colors)
        ax.set_yticks(range(-1, len(names)), [f"share of {seconds:.1f} s", *names])
        ax.set_ylim(len(names) - 0.45, -1.4)
        ax.set_xlim(0, limit)
        ax.set_xlabel("milliseconds a text" + (f" ({beyond} texts took longer)" if beyond else ""))
        ax.set_title(words(self.title, 100), fontsize=11, loc="left")
        ax.spines[["top", "right", "left"]].set_visible(False)
        ax.tick_params(axis="y", length=0)
        return self


def _draw_stage(ax: Axes, row: int, stage: StageLatency, color: np.ndarray, limit: float) -> None:
    """Draw a histogram that stands on the stage's line, its percentiles as ticks, and their values below."""
    if not len(stage.text_ms):
        ax.text(0, row, " nothing reached it", va="center")
        return
    counts, edges = np.histogram(stage.text_ms, bins=80, range=(0, limit))
    heights = 0.6 * counts / max(counts.max(), 1)
    line = row + 0.22
    ax.bar(edges[:-1], -heights, np.diff(edges), bottom=line, align="edge", color=color, linewidth=0)
    ax.axhline(line, color="0.7", linewidth=0.6)
    for value in stage.percentiles_ms.values():
        ax.plot([value, value], [line - 0.62, line], color="black", linewidth=1)
    said = "    ".join(f"p{p} {value:.2f}" for p, value in stage.percentiles_ms.items())
    ax.text(limit, line + 0.04, said, ha="right", va="top", fontsize=8)


def _draw_shares(ax: Axes, row: int, stages: dict[str, StageLatency], colors: np.ndarray) -> None:
    across = ax.get_yaxis_transform()  # x from 0 to 1 over the axes' width, y in rows
    left = 0.0
    for (name, stage), color in zip(stages.items(), colors, strict=True):
        ax.add_patch(Rectangle((left, row - 0.22), stage.share, 0.44, color=color, linewidth=0, transform=across))
        # White reads on the dark colours, black on the light ones.
        ink = "white" if np.dot(color[:3], (0.299, 0.587, 0.114)) < 0.5 else "black"
        if stage.share > 0.1:
            middle = left + stage.share / 2
            text = f"{name} {stage.share:.0%}"
            ax.text(middle, row, text, ha="center", va="center", color=ink, fontsize=9, transform=across)
        left += stage.share


class BatchLatencyDisplay:
    """What a caller waits for a whole batch: p50, p95 and p99 by batch size, with intervals.

    Attributes
    ----------
    figures : DataFrame
        Of `live_figures`.
    stage : str
        The stage that is drawn, or "end to end".
    ax_, figure_ : Axes, Figure
        After `plot`.
    """

    def __init__(self, figures: pd.DataFrame, *, stage: str = WHOLE, title: str = ""):
        self.figures = figures
        self.stage = stage
        self.title = title

    @classmethod
    def from_study(cls, study: LatencyStudy, *, stage: str = WHOLE) -> BatchLatencyDisplay:
        """Compute from a latency study, with `live_figures`; `stage` names one, by default it is the whole cascade."""
        if stage != WHOLE:
            study.spec.stage(stage)
        return cls(live_figures(study.own), stage=stage, title=f"{study.spec.name}, {stage}: what a caller waits")

    def plot(self, ax: Axes | None = None) -> BatchLatencyDisplay:
        """Draw a point with its interval for each percentile above each batch size."""
        if ax is None:
            _, ax = plt.subplots(figsize=(7.5, 4.2), layout="constrained")
        self.ax_, self.figure_ = ax, ax.get_figure(root=True)
        own = self.figures.xs(self.stage, level="stage")
        sizes = own.index.get_level_values("batch_size").unique()
        for place, (p, color, marker) in enumerate(zip(PERCENTILES, _colors(3), "os^", strict=True)):
            found = own.xs(f"batch_p{p}_ms", level="figure").reindex(sizes)
            at = np.arange(len(sizes)) + 0.12 * (place - 1)  # side by side, so that no interval hides another
            _points(ax, at, found, color=color, marker=marker, label=f"p{p}")
        ax.set_xticks(range(len(sizes)), [f"{size}" for size in sizes])
        ax.set_xlim(-0.5, len(sizes) - 0.5)
        ax.set_xlabel("texts that come in at a time")
        _finish(ax, self.title, "milliseconds for the whole batch")
        return self


class LengthLatencyDisplay:
    """The time a text at one stage by the length of its batch: the median, and the middle half around it.

    Attributes
    ----------
    lengths : DataFrame
        Of `by_length`, of one stage.
    ax_, figure_ : Axes, Figure
        After `plot`.
    """

    def __init__(self, lengths: pd.DataFrame, *, title: str = ""):
        self.lengths = lengths
        self.title = title

    @classmethod
    def from_study(cls, study: LatencyStudy, *, stage: str) -> LengthLatencyDisplay:
        """Compute from a latency study, with `by_length`."""
        study.spec.stage(stage)
        lengths = by_length(study.own)
        return cls(lengths[lengths["stage"] == stage], title=f"{study.spec.name}, {stage}: time a text by length")

    def plot(self, ax: Axes | None = None) -> LengthLatencyDisplay:
        """Draw a line with its band for each batch size."""
        if ax is None:
            _, ax = plt.subplots(figsize=(7.5, 4.2), layout="constrained")
        self.ax_, self.figure_ = ax, ax.get_figure(root=True)
        groups = list(self.lengths.groupby("batch_size"))
        for (size, own), color, marker in zip(groups, _colors(len(groups)), _markers(len(groups)), strict=True):
            x = own["sequence_length"]
            ax.fill_between(x, own["text_p25_ms"], own["text_p75_ms"], color=color, alpha=0.2, linewidth=0)
            ax.plot(x, own["text_p50_ms"], color=color, marker=marker, markersize=4, label=f"batches of {size}")
        ax.xaxis.set_major_locator(MaxNLocator(integer=True))
        ax.set_xlabel("tokens of the longest text in the batch")
        _finish(ax, self.title, "milliseconds a text")
        return self


class PredictedCostDisplay:
    """What a text would cost at every threshold of the first gate, with what was measured at some of them.

    Attributes
    ----------
    predicted : DataFrame
        Of `predicted_cost`.
    checks : DataFrame
        Of `checked_cost`.
    threshold : float
        The cascade's own.
    gate : str
        The name of the gate.
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
    def from_study(cls, study: LatencyStudy) -> PredictedCostDisplay:
        """Compute from a latency study, with `predicted_cost` and `checked_cost`.

        Raises
        ------
        CascadeLabError
            The cascade has no gate.
        """
        gate = study.spec.stages[0]
        if not gate.is_gate:
            raise CascadeLabError(f"{study.spec.name}: has no gate, so no threshold to predict for; study a cascade")
        probabilities = study.texts[f"{gate.name}_probability"]
        thresholds = np.unique(np.quantile(probabilities, np.linspace(0, 1, 60), method="inverted_cdf"))
        return cls(
            predicted_cost(study, np.union1d(thresholds, gate.threshold)),
            checked_cost(study),
            threshold=gate.threshold,
            gate=gate.name,
            title=f"{study.spec.name}: predicted cost (lines) and measured (points)",
        )

    def plot(self, ax: Axes | None = None) -> PredictedCostDisplay:
        """Draw a line for each batch size over the fraction that goes on, and name thresholds along the top."""
        if ax is None:
            _, ax = plt.subplots(figsize=(7.5, 4.6), layout="constrained")
        self.ax_, self.figure_ = ax, ax.get_figure(root=True)
        groups = list(self.predicted.groupby("batch_size"))
        for (size, own), color, marker in zip(groups, _colors(len(groups)), _markers(len(groups)), strict=True):
            ax.plot(own["reach"], own["text_ms"], color=color, linewidth=1.2)
            measured = self.checks[self.checks["batch_size"] == size]
            found = measured.rename(
                columns={"measured_ms": "value", "measured_low_ms": "low", "measured_high_ms": "high"}
            )
            _points(ax, measured["reach"], found, color=color, marker=marker, label=f"batches of {size}")
        ax.set_xlim(-0.02, 1.02)
        ax.xaxis.set_major_formatter(PercentFormatter(1))
        ax.set_xlabel(f"texts that go on beyond {self.gate}")
        own = self.predicted.loc[self.predicted["threshold"] == self.threshold, "reach"].mean()
        ax.axvline(own, color="0.6", linewidth=0.8, linestyle=":", label="as it is")
        reach = self.checks.groupby("threshold")["reach"].mean()
        top = ax.secondary_xaxis("top")
        top.set_xticks(reach, [f"{threshold:.6g}" for threshold in reach.index], fontsize=8)
        top.set_xlabel(f"threshold of {self.gate}", fontsize=9)
        top.spines["top"].set_visible(False)
        _finish(ax, self.title, "milliseconds a text")
        return self


def _colors(n: int) -> np.ndarray:
    return plt.get_cmap("viridis")(np.linspace(0.05, 0.8, n))


def _markers(n: int) -> list[str]:
    return [marker for marker, _ in zip(cycle("os^DvP*X"), range(n), strict=False)]


def _points(ax: Axes, x: Any, found: pd.DataFrame, **how: Any) -> None:
    """Draw values with their intervals."""
    around = [found["value"] - found["low"], found["high"] - found["value"]]
    ax.errorbar(x, found["value"], yerr=np.nan_to_num(around), linestyle="none", markersize=5, capsize=2, **how)


def _finish(ax: Axes, title: str, label: str) -> None:
    """Set the axis of milliseconds: from 0, or on a log scale where they differ by more than a factor of 5."""
    low, high = ax.dataLim.intervaly
    if low > 0 and high > 5 * low:
        ax.set_yscale("log")
        ax.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        ax.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        ax.yaxis.set_minor_formatter(NullFormatter())
    else:
        ax.set_ylim(0, 1.06 * high)
    ax.set_ylabel(label)
    ax.set_title(words(title, 100), fontsize=11, loc="left")
    ax.spines[["top", "right"]].set_visible(False)
    ax.grid(axis="y", color="0.9", linewidth=0.6)
    ax.set_axisbelow(True)
    ax.legend(frameon=False, loc="upper left", bbox_to_anchor=(1, 1))  # beside, where it hides nothing

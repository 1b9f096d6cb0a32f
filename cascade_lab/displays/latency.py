"""How long a text takes at each stage, and what each stage's share of the whole is."""

from __future__ import annotations

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes
from matplotlib.patches import Rectangle

from cascade_lab.analysis.latency import StageLatency, stage_latencies
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
        return cls(stage_latencies(run), title=f"{run.spec.name}: time a text, batches of {size}")

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
        ax.set_title(self.title.replace("$", r"\$"), fontsize=11, loc="left")
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

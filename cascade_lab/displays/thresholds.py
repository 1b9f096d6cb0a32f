"""Draws metrics over the threshold of one stage."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.patches import Patch

from cascade_lab.analysis.outcomes import OUTCOMES
from cascade_lab.displays.drawing import Display, Style, hide_spines, metric_label, plain_text
from cascade_lab.displays.log_odds import (
    axis_limits,
    draw_legend_below,
    log_odds,
    metric_bounds,
    probability,
    set_log_odds_scale,
)
from cascade_lab.run import Run
from cascade_lab.text import exact
from cascade_lab.thresholds import (
    Choice,
    Goal,
    ThresholdBootstrap,
    ThresholdGrid,
    bootstrap_thresholds,
    choose,
    sweep,
    swept_stages,
)

if TYPE_CHECKING:
    from typing_extensions import Self

    from cascade_lab.thresholds import Tuning

N_RESAMPLES = 500
SHOWN = ("in_scope_accuracy", "reject_recall", "accuracy", "coverage")

_STYLES = (("#08306b", "-", 2.0), ("#d95f02", "-", 1.4), ("#1b9e77", "--", 1.6), ("0.45", ":", 1.8), ("0.2", "-.", 1.2))


class ThresholdDisplay(Display):
    """Metrics over the threshold of one stage, with the chosen threshold and its spread over resampled texts.

    Parameters
    ----------
    table : DataFrame
        What `sweep` returns.
    stage : str
    metrics : sequence of str
        The columns of `table` to draw, at most five.
    bounds : mapping of str to float, optional
        The goal's bounds on metrics.
    run_threshold : float, optional
        The run's own threshold.
    chosen : float, optional
        The threshold that is best for the goal.
    resampled : ndarray, shape (n_resamples,), optional
        The threshold chosen on each resample of the texts.
    goal : Goal, optional
        For the title.
    title : str

    Attributes
    ----------
    table, stage, metrics, bounds, run_threshold, chosen, resampled, goal, title
        As given.
    ax_, figure_ : Axes, Figure
        After `plot`.
    """

    def __init__(
        self,
        table: pd.DataFrame,
        stage: str,
        *,
        metrics: Sequence[str] = SHOWN,
        bounds: Mapping[str, float] | None = None,
        run_threshold: float | None = None,
        chosen: float | None = None,
        resampled: np.ndarray | None = None,
        goal: Goal | None = None,
        title: str = "",
    ):
        self.table, self.stage, self.metrics = table, stage, tuple(metrics)
        self.bounds, self.run_threshold, self.chosen = dict(bounds or {}), run_threshold, chosen
        self.resampled, self.goal, self.title = resampled, goal, title

    @classmethod
    def from_run(
        cls,
        run: Run,
        *,
        stage: str | None = None,
        goal: Goal | None = None,
        metrics: Sequence[str] | None = None,
        n_resamples: int = N_RESAMPLES,
    ) -> Self:
        """Compute the metrics at every threshold of a stage.

        Parameters
        ----------
        run : Run
        stage : str, optional
            By default the first stage that can reject.
        goal : Goal, optional
            Choose the thresholds of all stages that can reject, again on each of `n_resamples` resamples of the texts;
            the other stages are at their chosen thresholds in the picture. Without a goal they are at the run's own.
        metrics : sequence of str, optional
            What to draw, at most five columns of `sweep`; by default the goal's metric and bounds first.
        n_resamples : int

        Raises
        ------
        InfeasibleError
            No thresholds satisfy the goal.
        RunError
            The stage cannot reject, or the run lacks shadow scores that are needed.
        """
        stages = swept_stages(run.spec)
        stage = stage or (*stages, run.spec.last.name)[0]  # `sweep` refuses a last stage that cannot reject
        if goal is None:
            table = sweep(run, stage)
            own, title = run.spec.thresholds.get(stage), _title(run, stage, table)
            return cls(table, stage, metrics=metrics or SHOWN, run_threshold=own, title=title)
        together = stages if stage in stages else (stage,)
        grid = ThresholdGrid.from_run(run, together)
        choice = choose(run, goal, grid=grid)
        bootstrap = bootstrap_thresholds(run, goal, grid=grid, n_resamples=n_resamples)
        return cls._from_choice(run, goal, choice, bootstrap, stage, metrics)

    @classmethod
    def from_tuning(cls, tuning: Tuning, *, stage: str | None = None, metrics: Sequence[str] | None = None) -> Self:
        """Draw a stage's threshold as `cascade_lab.thresholds.tune` chose it, with its bootstrap.

        Parameters
        ----------
        tuning : Tuning
        stage : str, optional
            By default the first stage that was tuned.
        metrics : sequence of str, optional
            As for `from_run`.
        """
        stage = stage or next(iter(tuning.choice.thresholds))
        return cls._from_choice(tuning.run, tuning.goal, tuning.choice, tuning.bootstrap, stage, metrics)

    @classmethod
    def _from_choice(
        cls,
        run: Run,
        goal: Goal,
        choice: Choice,
        bootstrap: ThresholdBootstrap,
        stage: str,
        metrics: Sequence[str] | None,
    ) -> Self:
        others = {name: value for name, value in choice.thresholds.items() if name != stage}
        bounds = dict(metric_bounds(goal))
        wanted = tuple(dict.fromkeys((goal.metric, *bounds, *SHOWN)))[:4]
        table = sweep(run, stage, thresholds=others, goal=goal)
        return cls(
            table,
            stage,
            metrics=metrics or [name for name in wanted if name != "mean_cost"],
            bounds=bounds,
            run_threshold=run.spec.thresholds.get(stage),
            chosen=choice.thresholds[stage],
            resampled=bootstrap.thresholds[stage].dropna().to_numpy(),
            goal=goal,
            title=_title(run, stage, table),
        )

    def frame(self) -> pd.DataFrame:
        """Return one row per threshold."""
        return self.table

    def plot(self, ax: Axes | None = None, **kwargs: Any) -> Self:
        """Draw each metric over the log-odds of the threshold, and a histogram of the resampled choices below.

        A metric's value at a threshold of the table holds down to the next lower threshold. 0 and 1 are at the edges.

        Parameters
        ----------
        ax : Axes, optional
        **kwargs
            Go to `Axes.step`, which draws the metrics.
        """
        ax = self._axes(ax, (8.5, 5.2))
        low, high = axis_limits(self.table["threshold"], self.chosen, self.run_threshold)
        # At the edge, as at the lowest threshold, every text passes.
        x = np.append(low, self.table["threshold"].clip(low, high))
        set_log_odds_scale(ax, "x", low, high)
        handles: list[Any] = []
        for name, (color, line, width) in zip(self.metrics, _STYLES, strict=False):
            values = self.table[name].to_numpy()[[0, *range(len(self.table))]]
            style: Style = {"color": color, "linestyle": line, "linewidth": width, "label": metric_label(name)}
            handles += ax.step(x, values, where="pre", **(style | kwargs))
            if name in self.bounds:
                label = f"bound on {metric_label(name)}: {self.bounds[name]:g}"
                dots: Style = {"color": color, "linestyle": (0, (1, 3)), "linewidth": 1.3, "label": label}
                handles.append(ax.axhline(self.bounds[name], **dots))
        if self.run_threshold is not None:
            label = f"threshold of the run: {exact(self.run_threshold)}"
            handles.append(ax.axvline(np.clip(self.run_threshold, low, high), color="0.6", linewidth=1.2, label=label))
        if self.chosen is not None:
            label = f"chosen: {exact(self.chosen)}"
            handles.append(ax.axvline(np.clip(self.chosen, low, high), color="black", linewidth=1.6, label=label))
        if self.resampled is not None and len(self.resampled):
            handles.append(_draw_resampled(ax, self.resampled, low, high))
        ax.set_ylim(-0.16 if self.resampled is not None else -0.02, 1.02)
        ax.set_yticks(np.linspace(0, 1, 6))
        ax.grid(axis="y", color="0.9", linewidth=0.6)
        ax.set_axisbelow(True)
        ax.set_xlabel(f"threshold of stage {plain_text(self.stage)} (log-odds scale)")
        self._set_title(self.title, str(self.goal or ""), max_length=110)
        hide_spines(ax)
        draw_legend_below(ax, handles, -0.13)
        return self


def _title(run: Run, stage: str, table: pd.DataFrame) -> str:
    n = int(table[list(OUTCOMES)].iloc[0].sum())
    return f"{run.spec.name}: the threshold of stage {stage}, on {n:,} texts"


def _draw_resampled(ax: Axes, resampled: np.ndarray, low: float, high: float) -> Patch:
    """Draw the resampled thresholds as a histogram below 0; return the legend entry."""
    edges = probability(np.linspace(log_odds(low), log_odds(high), 101))
    counts, _ = np.histogram(np.clip(resampled, low, high), bins=edges)
    heights = 0.11 * counts / max(counts.max(), 1)
    ax.bar(edges[:-1], heights, np.diff(edges), bottom=-0.145, align="edge", color="0.35", linewidth=0)
    return Patch(color="0.35", label=f"chosen on each of {len(resampled)} resamples")

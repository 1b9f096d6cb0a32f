"""Draws one metric over the thresholds of two stages."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.lines import Line2D
from matplotlib.patches import Patch

from cascade_lab.displays.drawing import Display, Style, metric_label, plain_text
from cascade_lab.displays.log_odds import (
    axis_limits,
    draw_legend_below,
    log_odds,
    metric_bounds,
    probability,
    set_log_odds_scale,
)
from cascade_lab.exceptions import RunError
from cascade_lab.run import Run
from cascade_lab.text import exact
from cascade_lab.thresholds import (
    Choice,
    Goal,
    Surface,
    ThresholdBootstrap,
    ThresholdGrid,
    bootstrap_thresholds,
    choose,
    swept_stages,
)

if TYPE_CHECKING:
    from typing_extensions import Self

    from cascade_lab.thresholds import Tuning

N_CELLS = 300  # thresholds of each stage in the picture
N_RESAMPLES = 500


class ThresholdSurfaceDisplay(Display):
    """A goal's metric over the thresholds of two stages, where the bounds hold, and the chosen pair with its spread.

    Parameters
    ----------
    surface : Surface
        Of two stages.
    goal : Goal
    choice : Choice, optional
    resampled : DataFrame, optional
        The thresholds chosen on each resample of the texts: one column per stage.
    run_thresholds : mapping of str to float, optional
        The run's own thresholds.
    title : str

    Attributes
    ----------
    surface, goal, choice, resampled, run_thresholds, title
        As given.
    values : ndarray, shape (n_first, n_second)
        The goal's metric.
    feasible : ndarray of bool, shape (n_first, n_second)
        Where every bound on a metric holds. The choice respects bounds on latencies too; they are not drawn.
    ax_, figure_ : Axes, Figure
        After `plot`.
    """

    def __init__(
        self,
        surface: Surface,
        goal: Goal,
        *,
        choice: Choice | None = None,
        resampled: pd.DataFrame | None = None,
        run_thresholds: Mapping[str, float | None] | None = None,
        title: str = "",
    ):
        self.surface, self.goal, self.choice, self.resampled = surface, goal, choice, resampled
        self.run_thresholds, self.title = dict(run_thresholds or {}), title
        self.values = surface.metric(goal.metric, goal)
        self.feasible = np.ones(self.values.shape, dtype=bool)
        for name, bound in goal.at_least.items():
            self.feasible &= surface.metric(name, goal) >= bound
        for name, bound in goal.at_most.items():
            if not name.endswith("_ms"):
                self.feasible &= surface.metric(name, goal) <= bound

    @classmethod
    def from_run(
        cls, run: Run, goal: Goal, *, stages: Sequence[str] | None = None, n_resamples: int = N_RESAMPLES
    ) -> Self:
        """Compute the surface of two stages, choose their thresholds, and choose again on resamples of the texts.

        Parameters
        ----------
        run : Run
        goal : Goal
        stages : sequence of two str, optional
            By default the stages that can reject.
        n_resamples : int

        Raises
        ------
        InfeasibleError
            No thresholds satisfy the goal.
        RunError
            There are not two such stages, or the run lacks shadow scores that are needed.
        """
        stages = _two(run, stages or swept_stages(run.spec))
        grid = ThresholdGrid.from_run(run, stages)
        choice = choose(run, goal, grid=grid)
        bootstrap = bootstrap_thresholds(run, goal, grid=grid, n_resamples=n_resamples)
        return cls._from_choice(run, goal, choice, bootstrap, grid)

    @classmethod
    def from_tuning(cls, tuning: Tuning, *, stages: Sequence[str] | None = None) -> Self:
        """Draw the thresholds of two stages as `cascade_lab.thresholds.tune` chose them, with their bootstrap.

        Parameters
        ----------
        tuning : Tuning
        stages : sequence of two str, optional
            By default the stages that were tuned. The others are at their chosen thresholds.

        Raises
        ------
        RunError
            There are not two stages.
        """
        stages, chosen = _two(tuning.run, stages or tuple(tuning.grid.stages)), tuning.choice.thresholds
        grid = tuning.grid
        if stages != tuple(grid.stages):
            others = {name: value for name, value in chosen.items() if name not in stages}
            grid = ThresholdGrid.from_run(tuning.run, stages, thresholds=others)
        return cls._from_choice(tuning.run, tuning.goal, tuning.choice, tuning.bootstrap, grid)

    @classmethod
    def _from_choice(
        cls, run: Run, goal: Goal, choice: Choice, bootstrap: ThresholdBootstrap, grid: ThresholdGrid
    ) -> Self:
        # The cells are of equal size in log-odds. Of equal size in rank, a wide cell would stand for many thresholds.
        axes = []
        for stage, values in zip(grid.stages, grid.thresholds, strict=True):
            low, high = axis_limits(values, choice.thresholds[stage], run.spec.thresholds[stage])
            cells = probability(np.linspace(log_odds(low), log_odds(high), N_CELLS))
            axes.append(np.unique(np.append(cells, np.clip(choice.thresholds[stage], low, high))))
        counts = grid.with_costs(goal.used_costs).counts_at(*axes)
        return cls(
            Surface(grid.stages, axes[0], axes[1], counts, False),
            goal,
            choice=choice,
            resampled=bootstrap.thresholds[list(grid.stages)].dropna(),
            run_thresholds={name: run.spec.thresholds[name] for name in grid.stages},
            title=f"{run.spec.name}, {len(grid.in_scope):,} texts",
        )

    def frame(self) -> pd.DataFrame:
        """Return one row per pair of thresholds: the two thresholds, the goal's metric, and `feasible`."""
        first, second = np.meshgrid(self.surface.first, self.surface.second, indexing="ij")
        columns = {
            f"threshold of {name}": t.ravel() for name, t in zip(self.surface.stages, (first, second), strict=True)
        }
        return pd.DataFrame({**columns, self.goal.metric: self.values.ravel(), "feasible": self.feasible.ravel()})

    def plot(self, ax: Axes | None = None, **kwargs: Any) -> Self:
        """Draw the metric as an image over log-odds, the bounds as lines, and hatching where a bound does not hold.

        Parameters
        ----------
        ax : Axes, optional
        **kwargs
            Go to `Axes.pcolormesh`, which draws the image.
        """
        ax = self._axes(ax, (8.5, 6.4))
        x, y = self.surface.first, self.surface.second
        limits = [(v[0], v[-1]) for v in (x, y)]
        for axis, (low, high) in zip("xy", limits, strict=True):
            set_log_odds_scale(ax, axis, low, high)
        style: Style = {"cmap": "Blues", "shading": "nearest", "rasterized": True}
        image = ax.pcolormesh(x, y, self.values.T, **(style | kwargs))
        bar = self.figure_.colorbar(image, ax=ax, fraction=0.046, pad=0.02)
        bar.set_label(metric_label(self.goal.metric))
        handles = self._draw_bounds(ax)
        if self.resampled is not None and len(self.resampled):
            u, v = (np.clip(self.resampled[s], *ends) for s, ends in zip(self.surface.stages, limits, strict=True))
            label = f"chosen on each of {len(u)} resamples"
            dots: Style = {"color": "#fdae61", "markeredgecolor": "black", "markeredgewidth": 0.3, "markersize": 6}
            handles += ax.plot(u, v, ".", label=label, **dots)
        chosen = {} if self.choice is None else self.choice.thresholds
        for name, thresholds, marker, color, size in (
            ("thresholds of the run", self.run_thresholds, "s", "white", 8),
            ("chosen", chosen, "*", "#ffff33", 17),
        ):
            if not set(self.surface.stages) <= set(thresholds):
                continue
            pair = [thresholds[stage] or 0.0 for stage in self.surface.stages]
            point = [[np.clip(value, *ends)] for value, ends in zip(pair, limits, strict=True)]
            label = f"{name}: {exact(pair[0])}, {exact(pair[1])}"
            mark: Style = {
                "color": color,
                "markeredgecolor": "black",
                "markersize": size,
                "clip_on": False,
                "zorder": 4,
            }
            handles += ax.plot(*point, marker, label=label, linestyle="none", **mark)
        for axis, stage in zip("xy", self.surface.stages, strict=True):
            ax.set(**{f"{axis}label": f"threshold of stage {plain_text(stage)} (log-odds scale)"})
        self._set_title(self.title, str(self.goal), max_length=110)
        draw_legend_below(ax, handles, -0.12)
        return self

    def _draw_bounds(self, ax: Axes) -> list[Any]:
        """Draw a line along each bound and hatching where one does not hold; return what the legend names."""
        x, y = self.surface.first, self.surface.second
        handles: list[Any] = []
        if not self.feasible.all():
            broken = ax.contourf(
                x, y, self.feasible.T.astype(float), levels=[-0.5, 0.5], colors="none", hatches=["//"], zorder=2
            )
            broken.set(edgecolor="0.55", linewidth=0)
            handles.append(Patch(facecolor="white", edgecolor="0.55", hatch="//", label="a bound does not hold"))
        lines: tuple[Any, ...] = ("-", "--", "-.", ":")
        for (name, bound), line in zip(metric_bounds(self.goal), lines, strict=False):
            values = self.surface.metric(name, self.goal).T
            if np.nanmin(values) < bound < np.nanmax(values):
                ax.contour(x, y, values, levels=[bound], colors="black", linewidths=1.6, linestyles=[line])
            label = f"{metric_label(name)} {bound:g}"
            handles.append(Line2D([], [], color="black", linewidth=1.6, linestyle=line, label=label))
        return handles


def _two(run: Run, stages: Sequence[str]) -> tuple[str, ...]:
    if len(stages) != 2:
        raise RunError(
            f"{run.name}: a surface needs two stages that can reject, but got {len(stages)}; name two of "
            f"{', '.join(swept_stages(run.spec)) or 'them'} with stages=, or give the last stage a reject_label"
        )
    return tuple(stages)

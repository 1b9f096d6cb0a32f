"""What thresholds do: figures along one of them, and a figure over the plane of two."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.ticker import FixedLocator, FuncFormatter, NullFormatter, NullLocator

from cascade_lab.analysis.goals import Goal
from cascade_lab.analysis.quadrants import counts_at, points, swept_stages
from cascade_lab.analysis.thresholds import Choice, Surface, choose, sweep
from cascade_lab.analysis.tuning import Certainty, certainty
from cascade_lab.displays.words import words
from cascade_lab.errors import RunError
from cascade_lab.run import Run

N_LINES = 300  # thresholds a stage, in the picture of a surface
SHOWN = ("in_scope_accuracy", "reject_recall", "accuracy", "coverage")

_STYLES = (("#08306b", "-", 2.0), ("#d95f02", "-", 1.4), ("#1b9e77", "--", 1.6), ("0.45", ":", 1.8), ("0.2", "-.", 1.2))
_TICKS = (1e-6, 1e-5, 1e-4, 0.001, 0.01, 0.1, 0.5, 0.9, 0.99, 0.999, 0.9999, 0.99999, 0.999999)


class ThresholdDisplay:
    """Figures against the threshold of one stage, with the chosen one and its spread over resampled texts.

    Parameters
    ----------
    table : DataFrame
        What `sweep` returns.
    stage : str
    figures : sequence of str
        The columns to draw, at most five.
    bounds : mapping of str to float
        Bounds on them.
    own, chosen : float, optional
        The run's threshold; the one that serves a goal best.
    resampled : ndarray, shape (n_resamples,), optional
        The choice on each resample of the texts.
    title : str

    Attributes
    ----------
    table, stage, figures, bounds, own, chosen, resampled, title
        As given.
    ax_, figure_ : Axes, Figure
        After `plot`.
    """

    def __init__(
        self,
        table: pd.DataFrame,
        stage: str,
        *,
        figures: Sequence[str] = SHOWN,
        bounds: Mapping[str, float] | None = None,
        own: float | None = None,
        chosen: float | None = None,
        resampled: np.ndarray | None = None,
        title: str = "",
    ):
        self.table, self.stage, self.figures = table, stage, tuple(figures)
        self.bounds, self.own, self.chosen = dict(bounds or {}), own, chosen
        self.resampled, self.title = resampled, title

    @classmethod
    def from_run(
        cls,
        run: Run,
        stage: str | None = None,
        *,
        goal: Goal | None = None,
        figures: Sequence[str] | None = None,
        sure: Certainty | None = None,
    ) -> ThresholdDisplay:
        """Sweep the threshold of `stage`, by default the first that can reject.

        With a `goal`, the thresholds of up to two stages that can reject are chosen together, again on each resample,
        and the sweep has the other stage at its chosen one. `sure` is what `certainty` says, where it is known
        already; its stages are then those that are chosen together.

        Raises
        ------
        InfeasibleError
            No thresholds satisfy the goal.
        RunError
            The stage cannot reject, or the run lacks the shadow scores that it takes.
        """
        stages = swept_stages(run.spec)
        stage = stage or (*stages, run.spec.last.name)[0]  # a last stage that cannot reject is refused below
        together = stages if stage in stages and len(stages) <= 2 else (stage,)
        if sure is not None:
            together = tuple(sure.thresholds.columns)
        title = f"{run.spec.name}: the threshold of stage {stage}, on {len(run.examples):,} texts"
        own = run.spec.thresholds.get(stage)
        if goal is None:
            return cls(sweep(run, stage), stage, figures=figures or SHOWN, own=own, title=title)
        chosen = choose(run, goal, together).thresholds
        others = {name: value for name, value in chosen.items() if name != stage}
        bounds = {name: value for name, value in (*goal.at_least.items(), *goal.at_most.items()) if name[-3:] != "_ms"}
        wanted = tuple(dict.fromkeys((goal.figure, *bounds, *SHOWN)))[:4]
        return cls(
            sweep(run, stage, thresholds=others, goal=goal),
            stage,
            figures=figures or [name for name in wanted if name != "mean_cost"],
            bounds=bounds,
            own=own,
            chosen=chosen[stage],
            resampled=(sure or certainty(run, goal, together)).thresholds[stage].to_numpy(),
            title=f"{title}\n{goal}",
        )

    def plot(self, ax: Axes | None = None) -> ThresholdDisplay:
        """Draw each figure as a line over log-odds of the threshold, and the resampled choices below them.

        A figure holds from a threshold of the table down to the one before it. 0 and 1 stand at the edges.
        """
        if ax is None:
            _, ax = plt.subplots(figsize=(8.5, 5.2), layout="constrained")
        self.ax_, self.figure_ = ax, ax.get_figure(root=True)
        low, high = _limits(self.table["threshold"], self.chosen, self.own)
        # At the edge, as at the lowest threshold, every text passes.
        at = np.append(low, self.table["threshold"].clip(low, high))
        _log_odds(ax, "x", low, high)
        handles = []
        for name, (color, style, width) in zip(self.figures, _STYLES, strict=False):
            values = self.table[name].to_numpy()[[0, *range(len(self.table))]]
            handles += ax.step(at, values, where="pre", color=color, linestyle=style, linewidth=width)
            handles[-1].set_label(name.replace("_", " "))
            if name in self.bounds:
                handles.append(ax.axhline(self.bounds[name], color=color, linestyle=(0, (1, 3)), linewidth=1.3))
                handles[-1].set_label(f"bound on {name.replace('_', ' ')}: {self.bounds[name]:g}")
        if self.own is not None:
            handles.append(ax.axvline(np.clip(self.own, low, high), color="0.6", linewidth=1.2))
            handles[-1].set_label(f"the run's own: {self.own:.4g}")
        if self.chosen is not None:
            handles.append(ax.axvline(np.clip(self.chosen, low, high), color="black", linewidth=1.6))
            handles[-1].set_label(f"chosen: {self.chosen:.4g}")
        if self.resampled is not None and len(self.resampled):
            handles.append(self._spread(ax, low, high))
        ax.set_ylim(-0.16 if self.resampled is not None else -0.02, 1.02)
        ax.set_yticks(np.linspace(0, 1, 6))
        ax.grid(axis="y", color="0.9", linewidth=0.6)
        ax.set_axisbelow(True)
        ax.set_xlabel(f"threshold of stage {self.stage} (log-odds scale)")
        ax.set_title("\n".join(words(line, 110) for line in self.title.split("\n")), fontsize=11, loc="left")
        ax.spines[["top", "right"]].set_visible(False)
        ax.legend(
            handles=handles, fontsize=8, frameon=False, ncols=3, loc="upper left", bbox_to_anchor=(-0.02, -0.13),
            borderaxespad=0.0,
        )  # fmt: skip
        return self

    def _spread(self, ax: Axes, low: float, high: float) -> Patch:
        """Draw the resampled choices as a histogram under the lines, and where 95% of them lie."""
        edges = _expit(np.linspace(_logit(low), _logit(high), 101))
        counts, _ = np.histogram(np.clip(self.resampled, low, high), bins=edges)
        heights = 0.11 * counts / max(counts.max(), 1)
        ax.bar(edges[:-1], heights, np.diff(edges), bottom=-0.145, align="edge", color="0.35", linewidth=0)
        between = np.quantile(self.resampled, [0.025, 0.975])
        ax.axvspan(*np.clip(between, low, high), color="0.93", zorder=0)
        label = f"on {len(self.resampled)} resamples; 95% from {between[0]:.3g} to {between[1]:.3g}"
        return Patch(color="0.35", label=label)


class ThresholdSurfaceDisplay:
    """A goal's figure over two thresholds: where the constraints hold, what is chosen and how sure that is.

    Parameters
    ----------
    surface : Surface
        Of two stages.
    goal : Goal
    choice : Choice, optional
    resampled : DataFrame, optional
        The choice on each resample of the texts, a stage a column.
    own : mapping of str to float, optional
        The run's own thresholds.
    title : str

    Attributes
    ----------
    surface, goal, choice, resampled, own, title
        As given.
    values : ndarray, shape (n_first, n_second)
        The goal's figure.
    feasible : ndarray of bool, shape (n_first, n_second)
        Where every bound on a figure holds. Bounds on latencies are kept by the choice and not drawn.
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
        own: Mapping[str, float | None] | None = None,
        title: str = "",
    ):
        self.surface, self.goal, self.choice, self.resampled = surface, goal, choice, resampled
        self.own, self.title = dict(own or {}), title
        self.values = surface.figure(goal.figure, goal)
        self.feasible = np.ones(self.values.shape, dtype=bool)
        for name, least in goal.at_least.items():
            self.feasible &= surface.figure(name, goal) >= least
        for name, most in goal.at_most.items():
            if not name.endswith("_ms"):
                self.feasible &= surface.figure(name, goal) <= most

    @classmethod
    def from_run(
        cls, run: Run, goal: Goal, stages: Sequence[str] | None = None, *, sure: Certainty | None = None
    ) -> ThresholdSurfaceDisplay:
        """Compute the surface of two stages, by default those that can reject, the choice and its resamples.

        `sure` is what `certainty` says, where it is known already.

        Raises
        ------
        InfeasibleError
            No thresholds satisfy the goal.
        RunError
            It does not have two such stages, or lacks the shadow scores that it takes.
        """
        stages = tuple(stages or swept_stages(run.spec))
        if len(stages) != 2:
            raise RunError(
                f"{run.directory}: a surface takes two stages that can reject, and {len(stages)} are named or there; "
                "name two, or give the last stage a reject_label"
            )
        choice, found = choose(run, goal, stages), points(run, stages)
        # Even in log-odds rather than in rank, so that no wide cell stands for what lies between two ranks.
        axes = []
        for stage, values in zip(stages, found.thresholds, strict=True):
            low, high = _limits(values, choice.thresholds[stage], run.spec.thresholds[stage])
            even = _expit(np.linspace(_logit(low), _logit(high), N_LINES))
            axes.append(np.unique(np.append(even, np.clip(choice.thresholds[stage], low, high))))
        return cls(
            Surface(stages, axes[0], axes[1], counts_at(found, *axes), False),
            goal,
            choice=choice,
            resampled=(sure or certainty(run, goal, stages)).thresholds,
            own={name: run.spec.thresholds[name] for name in stages},
            title=f"{run.spec.name}, {len(run.examples):,} texts\n{goal}",
        )

    def plot(self, ax: Axes | None = None) -> ThresholdSurfaceDisplay:
        """Draw the figure as an image over log-odds, the bounds as lines, hatched where one is broken."""
        if ax is None:
            _, ax = plt.subplots(figsize=(8.5, 6.4), layout="constrained")
        self.ax_, self.figure_ = ax, ax.get_figure(root=True)
        chosen = {} if self.choice is None else self.choice.thresholds
        x, y = self.surface.first, self.surface.second
        ends = [(v[0], v[-1]) for v in (x, y)]
        for axis, (low, high) in zip("xy", ends, strict=True):
            _log_odds(ax, axis, low, high)
        image = ax.pcolormesh(x, y, self.values.T, cmap="Blues", shading="nearest", rasterized=True)
        bar = self.figure_.colorbar(image, ax=ax, fraction=0.046, pad=0.02)
        bar.set_label(self.goal.figure.replace("_", " "))
        handles: list[Line2D | Patch] = []
        if not self.feasible.all():
            broken = ax.contourf(
                x, y, self.feasible.T.astype(float), levels=[-0.5, 0.5], colors="none", hatches=["//"], zorder=2
            )
            broken.set(edgecolor="0.55", linewidth=0)
            handles.append(Patch(facecolor="white", edgecolor="0.55", hatch="//", label="a bound is broken"))
        for (name, bound), style in zip(self._bounds(), ("-", "--", "-.", ":"), strict=False):
            values = self.surface.figure(name, self.goal).T
            if np.nanmin(values) < bound < np.nanmax(values):
                ax.contour(x, y, values, levels=[bound], colors="black", linewidths=1.6, linestyles=[style])
            label = f"{name.replace('_', ' ')} {bound:g}"
            handles.append(Line2D([], [], color="black", linewidth=1.6, linestyle=style, label=label))
        if self.resampled is not None and len(self.resampled):
            u, v = (np.clip(self.resampled[s], *e) for s, e in zip(self.surface.stages, ends, strict=True))
            label = f"chosen on each of {len(u)} resamples"
            handles += ax.plot(
                u, v, ".", color="#fdae61", markeredgecolor="black", markeredgewidth=0.3, markersize=6, label=label
            )
        points = [("the run's own", self.own, "s", "white"), ("chosen", chosen, "*", "#ffff33")]
        for said, thresholds, marker, color in points:
            if set(thresholds) < set(self.surface.stages):
                continue
            at = [thresholds[stage] or 0.0 for stage in self.surface.stages]
            where = [[np.clip(value, *e)] for value, e in zip(at, ends, strict=True)]
            label = f"{said}: {at[0]:.4g}, {at[1]:.4g}"
            size = 17 if marker == "*" else 8
            handles += ax.plot(
                *where, marker, color=color, markeredgecolor="black", markersize=size, label=label, clip_on=False,
                zorder=4,
            )  # fmt: skip
        for axis, stage in zip("xy", self.surface.stages, strict=True):
            ax.set(**{f"{axis}label": f"threshold of stage {stage} (log-odds scale)"})
        ax.set_title("\n".join(words(line, 110) for line in self.title.split("\n")), fontsize=11, loc="left")
        ax.legend(
            handles=handles, fontsize=8, frameon=False, ncols=3, loc="upper left", bbox_to_anchor=(-0.02, -0.12),
            borderaxespad=0.0,
        )  # fmt: skip
        return self

    def _bounds(self) -> list[tuple[str, float]]:
        bounds = [*self.goal.at_least.items(), *self.goal.at_most.items()]
        return [(name, bound) for name, bound in bounds if not name.endswith("_ms")]


def _limits(values: pd.Series | np.ndarray, *points: float | None) -> tuple[float, float]:
    """Return the ends of an axis: where all but a thousandth of the thresholds lie, the points among them."""
    inner = np.asarray(values)[:-1]  # the last is 1, which only says that nothing passes
    inner = inner if len(inner) else np.array([0.5])
    low, high = np.quantile(inner, [0.001, 0.999])
    inside = [value for value in points if value is not None and 0 < value < 1]
    low, high = min([low, *inside]), max([high, *inside])
    margin = 0.05 * (_logit(high) - _logit(low)) + 0.2
    return float(_expit(_logit(low) - margin)), float(_expit(_logit(high) + margin))


def _log_odds(ax: Axes, axis: str, low: float, high: float) -> None:
    """Scale an axis in log-odds, with ticks that read as probabilities."""
    getattr(ax, f"set_{axis}scale")("logit")
    getattr(ax, f"set_{axis}lim")(low, high)
    which = getattr(ax, f"{axis}axis")
    which.set_major_locator(FixedLocator([tick for tick in _TICKS if low <= tick <= high]))
    which.set_major_formatter(FuncFormatter(lambda value, _: f"{value:.6f}".rstrip("0").rstrip(".")))
    which.set_minor_locator(NullLocator())
    which.set_minor_formatter(NullFormatter())


def _logit(p: np.ndarray | float) -> np.ndarray:
    p = np.clip(p, 1e-7, 1 - 1e-7)
    return np.log(p) - np.log1p(-p)


def _expit(x: np.ndarray | float) -> np.ndarray:
    return 1 / (1 + np.exp(-np.asarray(x)))

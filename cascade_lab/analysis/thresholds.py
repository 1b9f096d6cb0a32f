"""Thresholds swept and chosen on kept logits: exact, and nothing is refitted."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import NamedTuple

import numpy as np
import pandas as pd

from cascade_lab.analysis.goals import FRACTIONS, Goal, Totals, extreme, figure_of
from cascade_lab.analysis.latency import reach_within
from cascade_lab.analysis.outcomes import OUTCOMES
from cascade_lab.analysis.quadrants import Counts, Points, count, lines, points, spread
from cascade_lab.errors import InfeasibleError
from cascade_lab.run import Run

MAX_LINES = 512


class Surface(NamedTuple):
    """What a cascade does at every pair of two thresholds.

    Attributes
    ----------
    stages : tuple of str
        The stages whose thresholds move: one or two.
    first : ndarray, shape (n_first,)
        Thresholds of the first, ascending.
    second : ndarray, shape (n_second,)
        Thresholds of the second, ascending; `[0.]` where there is none.
    counts : ndarray of int, shape (n_first, n_second, 6)
        Texts of each outcome, in `OUTCOMES`' order.
    exact : bool
        Every pair that makes a difference is there; otherwise an even choice of them, by rank.
    """

    stages: tuple[str, ...]
    first: np.ndarray
    second: np.ndarray
    counts: np.ndarray
    exact: bool

    def figure(self, name: str, goal: Goal | None = None) -> np.ndarray:
        """Return a figure at every pair, shape (n_first, n_second); `goal` is for its costs and prevalence."""
        return figure_of(name, self.counts, goal)


def surface(
    run: Run,
    stages: Sequence[str] | None = None,
    *,
    thresholds: Mapping[str, float] | None = None,
    max_lines: int = MAX_LINES,
) -> Surface:
    """Count the outcomes at every pair of thresholds of two stages.

    Parameters
    ----------
    run : Run
    stages : sequence of str, optional
        One or two; by default those that can reject.
    thresholds : mapping of str to float, optional
        Of the other stages; by default those of the run.
    max_lines : int
        The most thresholds of a stage. Each one kept is a probability that occurs, and the counts there are a replay's.

    Raises
    ------
    RunError
        The stages are too many, out of order or cannot reject, or a run without the shadow scores that it takes.
    """
    found = points(run, stages, thresholds)
    places = [lines(len(values), max_lines) for values in found.thresholds]
    first, second = (values[place] for values, place in zip(found.thresholds, places, strict=True))
    exact = len(first) == len(found.thresholds[0]) and len(second) == len(found.thresholds[1])
    return Surface(found.stages, first, second, count(found, *places).all, exact)


def sweep(
    run: Run, stage: str, *, thresholds: Mapping[str, float] | None = None, goal: Goal | None = None
) -> pd.DataFrame:
    """Return what the cascade does at every threshold of `stage` that makes a difference.

    Parameters
    ----------
    run : Run
    stage : str
    thresholds : mapping of str to float, optional
        Of the other stages; by default those of the run.
    goal : Goal, optional
        For its costs and its prevalence.

    Returns
    -------
    DataFrame
        `threshold`, ascending; the number of texts of each outcome; `reach`, the fraction of texts that get beyond the
        stage; the figures of `FRACTIONS`; `macro_f1`, over the labels that occur in gold or answers; and `mean_cost`
        where the goal has costs.

    Raises
    ------
    RunError
        As `surface` does.
    """
    found = points(run, [stage], thresholds)
    counted = count(found, np.arange(len(found.thresholds[0])), np.zeros(1, dtype=int))
    counts = counted.all[:, 0]
    table = pd.DataFrame(counts, columns=list(OUTCOMES))
    table.insert(0, "threshold", found.thresholds[0])
    table["reach"] = 1 - counted.held.sum(axis=1) / len(run.examples)
    for name in goal.figures if goal else FRACTIONS:
        table[name] = figure_of(name, counts, goal)
    table["macro_f1"] = _macro_f1(found, run.examples["label"].to_numpy(dtype=object))
    return table


class Choice(NamedTuple):
    """Thresholds, and what they do on the texts that they were chosen on.

    Attributes
    ----------
    thresholds : dict of str to float
        By stage, as `Run.replay` takes them.
    counts : ndarray of int, shape (6,)
        Texts of each outcome, in `OUTCOMES`' order.
    figures : dict of str to float
        Every figure that the goal defines.
    """

    thresholds: dict[str, float]
    counts: np.ndarray
    figures: dict[str, float]


def choose(
    run: Run, goal: Goal, stages: Sequence[str] | None = None, *, thresholds: Mapping[str, float] | None = None
) -> Choice:
    """Return the thresholds that serve `goal` best, of every pair that makes a difference.

    Of equals, it is one with the highest in-scope accuracy. The parameters are those of `surface`; `run` is of the
    set to choose on, not of the one to report on.

    Raises
    ------
    InfeasibleError
        No thresholds satisfy the goal; it says which come nearest.
    RunError
        As `surface` does.
    """
    return choose_among(points(run, stages, thresholds), goal, floor=held_at_least(run, goal), where=f"{run.directory}")


def held_at_least(run: Run, goal: Goal) -> float:
    """Return the fraction of texts that the first stage must hold for the goal's latencies to be met."""
    limits = {name: value for name, value in goal.at_most.items() if name.endswith("_ms")}
    return 1 - min([reach_within(run, name, limit) for name, limit in limits.items()], default=1.0)


def choose_among(
    found: Points,
    goal: Goal,
    *,
    floor: float = 0.0,
    weights: np.ndarray | None = None,
    max_lines: int | None = None,
    where: str = "these texts",
) -> Choice:
    """Return the thresholds that serve `goal` best for some texts.

    A coarse surface comes first. What lies between its lines is looked into only if the counts at the corners, which
    bound all those between, leave room for something better: branch and bound (Land and Doig 1960).

    Parameters
    ----------
    found : Points
    goal : Goal
    floor : float
        The fraction of texts that must not get beyond the first stage.
    weights : ndarray of int, shape (n,), optional
        How often each text counts.
    max_lines : int, optional
        Look at about so many thresholds a stage (see `spread`) and not between them.
    where : str
        Whose texts they are, for messages.

    Raises
    ------
    InfeasibleError
        No thresholds satisfy the goal; it says which come nearest.
    """
    places = spread(found, max_lines) if max_lines else [lines(len(v), MAX_LINES) for v in found.thresholds]
    coarse = count(found, *places, weights=weights)
    totals = Totals.of(coarse.all[0, 0], goal)
    best = _best(coarse, places, goal, totals, floor)
    if max_lines is None and any(len(p) < len(v) for p, v in zip(places, found.thresholds, strict=True)):
        value, tie, possible = _between(coarse, goal, totals, floor)
        order = np.lexsort((-tie.ravel(), -value.ravel()))
        for block in order[possible.ravel()[order]]:
            i, j = np.unravel_index(block, value.shape)
            if best is not None and (value[i, j], tie[i, j]) <= best.rank:
                break
            inside = [np.arange(p[k], p[min(k + 1, len(p) - 1)] + 1) for p, k in zip(places, (i, j), strict=True)]
            candidate = _best(count(found, *inside, weights=weights), inside, goal, totals, floor)
            if candidate is not None and (best is None or candidate.rank > best.rank):
                best = candidate
    if best is None:
        raise InfeasibleError(f"{where}: infeasible: {_nearest(found, coarse, places, goal, totals, floor)}")
    chosen = zip(found.stages, found.thresholds, best.places, strict=False)
    return Choice(
        # What every probability reaches here, every probability is to reach elsewhere.
        {stage: float(values[place]) if place else 0.0 for stage, values, place in chosen},
        best.counts,
        {name: float(figure_of(name, best.counts, goal)) for name in goal.figures},
    )


class _Found(NamedTuple):
    rank: tuple[float, float]
    places: tuple[int, int]
    counts: np.ndarray


def _best(counted: Counts, places: Sequence[np.ndarray], goal: Goal, totals: Totals, floor: float) -> _Found | None:
    """Return the best pair of those counted, or None where none satisfies the goal."""
    counts = counted.all
    value, tie, slack = _judge(counts, counts, counted.held, goal, totals, floor)
    # A pair whose figure is undefined is no choice; in a block it may be defined at another pair.
    value = np.where((slack >= 0) & ~np.isnan(value), value, -np.inf)
    if not len(value) or value.max() == -np.inf:
        return None
    i, j = np.unravel_index(np.lexsort((-tie.ravel(), -value.ravel()))[0], value.shape)
    return _Found((value[i, j], tie[i, j]), (int(places[0][i]), int(places[1][j])), counts[i, j])


def _between(counted: Counts, goal: Goal, totals: Totals, floor: float) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return the best rank that each block between lines can have, and whether it can satisfy the goal."""

    def corner(table: np.ndarray, row: int, column: int) -> np.ndarray:
        """Shift a table so that place (i, j) holds a corner of block (i, j); a single line is its own block."""
        for axis, far in enumerate((row, column)):
            n = table.shape[axis]
            table = table.take(range(n - 1) if not far and n > 1 else range(min(1, n - 1), n), axis=axis)
        return table

    stopped = counted.stopped[:, None]
    low = corner(stopped, 0, 0) + corner(counted.rejected, 1, 0) + corner(counted.answered, 1, 1)
    high = corner(stopped, 1, 0) + corner(counted.rejected, 0, 1) + corner(counted.answered, 0, 0)
    held = corner(counted.held[:, None], 1, 0)[:, 0]
    value, tie, slack = _judge(low, high, held, goal, totals, floor)
    value = np.where(np.isnan(value), np.inf, value)
    return value, np.where(np.isnan(tie), np.inf, tie), ~(slack < 0)


def _judge(
    low: np.ndarray, high: np.ndarray, held: np.ndarray, goal: Goal, totals: Totals, floor: float
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return the goal's figure, the in-scope accuracy and the room within the constraints, each at its best."""

    def reaches(name: str, sign: int) -> np.ndarray:
        return sign * extreme(name, low, high, sign, totals, goal.costs)

    rooms = [reaches(name, +1) - least for name, least in goal.at_least.items()]
    rooms += [reaches(name, -1) + most for name, most in goal.at_most.items() if not name.endswith("_ms")]
    rooms.append(np.broadcast_to(((held @ totals.weights) / totals.n - floor)[:, None], low.shape[:2]))
    return reaches(goal.figure, goal.sign), reaches("in_scope_accuracy", +1), np.min(rooms, axis=0)


def _nearest(
    found: Points, coarse: Counts, places: Sequence[np.ndarray], goal: Goal, totals: Totals, floor: float
) -> str:
    counts = coarse.all
    room = _judge(counts, counts, coarse.held, goal, totals, floor)[2]
    wanted = str(replace(goal, maximize="accuracy", minimize=None)).partition(", ")[2] or goal.figure
    if np.isnan(room).all() or (room >= 0).any():  # the bounds hold somewhere, but the figure has no value there
        return f"{wanted} is undefined on them; take an eval set with texts in scope and out of it"
    i, j = np.unravel_index(int(np.nanargmax(room)), room.shape)
    at = zip(found.stages, found.thresholds, (places[0][i], places[1][j]), strict=False)
    names = [name for name in (*goal.at_least, *goal.at_most) if not name.endswith("_ms")]
    gives = [f"{name} {float(figure_of(name, counts[i, j], goal)):.4f}" for name in names]
    if len(names) < len(goal.at_least) + len(goal.at_most):
        gives.append(f"{1 - float(coarse.held[i] @ totals.weights / totals.n):.1%} of the texts beyond the first stage")
    nearest = ", ".join(f"{stage} {values[place]:.4f}" for stage, values, place in at)
    return f"no thresholds give {wanted}; the nearest, {nearest}, give {', '.join(gives)}; ask for less"


def _macro_f1(found: Points, y_true: np.ndarray) -> np.ndarray:
    """Return macro F1 at every threshold of the one stage of `found`, by what each threshold changes of each label."""
    n_steps = len(found.thresholds[0])
    labels, codes = np.unique([*y_true, *found.answers[0], *found.answers[2]], return_inverse=True)
    gold, stopped, answered = codes.reshape(3, -1)
    # A text is answered below its rank and stopped from there on: it adds and takes away at two steps.
    starts = np.zeros_like(found.ranks[0])
    steps = [(starts, answered, 1), (found.ranks[0], answered, -1), (found.ranks[0], stopped, 1)]
    step = np.concatenate([s for s, _, _ in steps])
    label = np.concatenate([a for _, a, _ in steps])
    sign = np.concatenate([np.full(len(s), k) for s, _, k in steps])
    hit = np.concatenate([k * (a == gold) for _, a, k in steps])
    order = np.lexsort((step, label))
    step, label, sign, hit = step[order], label[order], sign[order], hit[order]
    # Within a label, events in order of steps; its F1 after each step, and what that step changed.
    last = np.append((label[1:] != label[:-1]) | (step[1:] != step[:-1]), True)
    base = np.append(0, np.flatnonzero(label[1:] != label[:-1]) + 1)
    n_of = np.diff(np.append(base, len(label)))
    n_predicted, n_hit = ((np.cumsum(x) - np.repeat(np.cumsum(x)[base] - x[base], n_of))[last] for x in (sign, hit))
    step, label = step[last], label[last]
    n_gold = np.bincount(gold, minlength=len(labels))
    total = n_predicted + n_gold[label]
    f1 = np.divide(2 * n_hit, total, out=np.zeros(len(total)), where=total > 0)
    occurs = (total > 0).astype(int)
    new = np.append(True, label[1:] != label[:-1])
    sums = np.bincount(step, f1 - np.where(new, 0, np.roll(f1, 1)), n_steps + 1)[:n_steps].cumsum()
    before = np.where(new, n_gold[label] > 0, np.roll(occurs, 1))
    n_labels = (n_gold > 0).sum() + np.bincount(step, occurs - before, n_steps + 1)[:n_steps].cumsum()
    return sums / n_labels

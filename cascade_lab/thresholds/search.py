"""Chooses the best thresholds for a goal, on kept logits.

One or two thresholds are searched exactly (branch and bound). More are searched by turns: two move, exactly, while the
others stand still, from several starts.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import combinations, cycle
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from cascade_lab.analysis.costs import prices
from cascade_lab.analysis.latency import reach_within
from cascade_lab.analysis.outcomes import Totals, extreme_metric
from cascade_lab.exceptions import InfeasibleError, RunError
from cascade_lab.text import exact
from cascade_lab.thresholds.grid import GridCounts, ThresholdGrid, evenly_spaced
from cascade_lab.thresholds.grid_part import GridPart
from cascade_lab.thresholds.objective import LATENCIES, Goal

if TYPE_CHECKING:
    from cascade_lab.run import Run

N_STARTS = 8
_LINES = 512  # thresholds per stage between which the exact search of one or two looks
_LINES_BY_TURNS = 64  # thresholds per stage in the first search, where two of several move
_LINES_BETWEEN = 128  # thresholds per stage between which the exact search of two of several looks
_MAX_BLOCK = 64  # thresholds per stage of a block that is searched at once; a larger one is divided
BOTH_KINDS = "take an eval set with texts in scope and out of scope"
_N_REFINED = 3  # starts whose result is searched exactly


class Choice(NamedTuple):
    """Thresholds, and what they do on the texts that they were chosen on.

    Attributes
    ----------
    thresholds : dict of str to float
        Stage name to threshold, as `Run.replay` takes them.
    counts : ndarray of int, shape (6,)
        Number of texts of each outcome, in the order of `OUTCOMES`; with a cost matrix, float of shape (8,): the sums
        of the costs follow (see `costs.count_codes`).
    metrics : dict of str to float
        Every metric that the goal defines.
    """

    thresholds: dict[str, float]
    counts: np.ndarray
    metrics: dict[str, float]


def choose(
    run: Run,
    goal: Goal,
    stages: Sequence[str] | None = None,
    *,
    thresholds: Mapping[str, float] | None = None,
    grid: ThresholdGrid | None = None,
) -> Choice:
    """Return the thresholds that are best for `goal`.

    Of equally good ones, it takes one with the highest in-scope accuracy. With one or two stages the result is the best
    of all thresholds; with more it is the best that a search from several starts finds (see `choose_on_grid`).

    Parameters
    ----------
    run : Run
        A run of the set to choose on, not of the set to report on, with shadow scores.
    goal : Goal
    stages : sequence of str, optional
        The stages whose thresholds are chosen; by default all that can reject.
    thresholds : mapping of str to float, optional
        Thresholds of the other stages; by default the run's own.
    grid : ThresholdGrid, optional
        The grid of `run`, if it is built already; `stages` and `thresholds` are then not used.

    Raises
    ------
    InfeasibleError
        No thresholds satisfy the goal; the message names the nearest ones.
    RunError
        As `ThresholdGrid.from_run`.
    """
    grid = grid or ThresholdGrid.from_run(run, stages, thresholds)
    return choose_on_grid(grid, goal, min_held=min_held_fraction(run, goal))


def min_held_fraction(run: Run, goal: Goal) -> float:
    """Return the fraction of texts that the first stage must hold back for the goal's bounds on latency to be met.

    Above 1 where no threshold can meet them: the first stage alone takes longer.
    """
    limits = _latency_bounds(goal)
    if limits and not len(run.timings):
        raise RunError(f"{run.name}: has no timings, which a bound on {next(iter(limits))} needs; drop the bound")
    return 1 - min([reach_within(run, name, limit) for name, limit in limits.items()], default=1.0)


def choose_on_grid(
    grid: ThresholdGrid,
    goal: Goal,
    *,
    min_held: float = 0.0,
    weights: np.ndarray | None = None,
    max_lines: int | None = None,
    indices: Sequence[np.ndarray] | None = None,
    start: Mapping[str, float] | None = None,
    n_starts: int = N_STARTS,
) -> Choice:
    """Return the thresholds that are best for `goal` on the texts of a grid.

    Of one or two stages, the outcomes are counted at a coarse selection of thresholds first. A block between two
    neighbours of each stage is searched only if the counts at its corners, which bound all counts inside, leave room
    for a better result: branch and bound (Land and Doig 1960). A large block is divided in the same way. Of thresholds
    that are equally good, also in in-scope accuracy, one is taken.

    Of three or more stages, two thresholds move at a time, over all pairs of stages in turn, until no pair improves the
    result. That is repeated from `n_starts` random starts (always the same ones), first at 64 thresholds per stage; the
    best three results are then improved with every threshold. This finds the optimum of nearly all small cascades that
    the tests search exhaustively, but there is no guarantee.

    Parameters
    ----------
    grid : ThresholdGrid
    goal : Goal
    min_held : float
        The fraction of texts that must not get beyond the first stage of the cascade.
    weights : ndarray of int, shape (n,), optional
        How often each text counts.
    max_lines : int, optional
        Search only about this many thresholds per stage (see `ThresholdGrid.subsample_by_scope`).
    indices : sequence of ndarray of int, one per stage, optional
        Search only these thresholds, by their index in `grid.thresholds`; with one or two stages.
    start : mapping of str to float, optional
        Thresholds to start from too, with three or more stages.
    n_starts : int
        Number of random starts, with three or more stages.

    Raises
    ------
    InfeasibleError
        No thresholds satisfy the goal; the message names the nearest ones.
    """
    grid = grid.with_costs(goal.used_costs)
    totals = Totals.from_counts(goal.count(grid.outcomes[0], weights), goal.prevalence)
    task = _Task(goal, totals, min_held, weights)
    _check_latency(grid, task)
    if len(grid.stages) <= 2:
        best = _search_pair(grid, task, max_lines, only=indices)
    else:
        if indices is not None:
            raise RunError(f"{grid.name}: indices of thresholds are for one or two stages, not {len(grid.stages)}")
        best = _search_by_turns(grid, task, max_lines, start, n_starts)
    if best.room < 0 or best.value == -np.inf:
        raise InfeasibleError(f"{grid.name}: infeasible: {_describe_nearest(grid, best, task)}")
    return Choice(
        grid.thresholds_at(best.indices),
        best.counts,
        {name: float(goal.value(name, best.counts)) for name in goal.metrics},
    )


class _Task(NamedTuple):
    """What a search is for: a goal, on weighted texts."""

    goal: Goal
    totals: Totals
    min_held: float
    weights: np.ndarray | None


class _Candidate(NamedTuple):
    """Thresholds, as indices; `value` is -inf where the goal is not satisfied, or its metric undefined.

    `room` is how far the tightest bound is from being broken; below 0 it is broken.
    """

    indices: tuple[int, ...]
    counts: np.ndarray
    n_held: np.ndarray
    value: float
    tie: float
    room: float

    @property
    def rank(self) -> tuple[float, float, float]:
        """What is compared: first whether the bounds hold (or how nearly), then the metric, then in-scope accuracy."""
        return min(self.room, 0.0), self.value, self.tie


def _search_pair(
    grid: ThresholdGrid,
    task: _Task,
    max_lines: int | None,
    n_lines: int | None = None,
    *,
    only: Sequence[np.ndarray] | None = None,
) -> _Candidate:
    """Return the best thresholds of one or two stages; those nearest to the bounds where none satisfies them."""
    indices = only if only is not None else grid.subsample(n_lines or _LINES)
    if only is None and max_lines is not None:
        indices = grid.subsample_by_scope(max_lines)
    part = GridPart.whole(grid, task.weights)
    coarse = part.count(indices)
    best = _best(coarse, indices, task)
    if only is None and max_lines is None:
        best = _search_between(part, task, indices, coarse, best)
    return best or _nearest(coarse, indices, task)


def _search_between(
    part: GridPart, task: _Task, indices: Sequence[np.ndarray], counted: GridCounts, best: _Candidate | None
) -> _Candidate | None:
    """Return the best thresholds of the blocks between some that are counted already, or `best` if none is better."""
    if all(np.diff(chosen).max(initial=0) <= 1 for chosen in indices):
        return best
    value, tie, room = _bounds_between(counted, task)
    may_be_better = ~(room < 0)
    if best is not None:
        may_be_better &= (value > best.value) | ((value == best.value) & (tie > best.tie))
    blocks = np.flatnonzero(may_be_better)
    for block in blocks[np.lexsort((-tie[may_be_better], -value[may_be_better]))]:
        i, j = divmod(int(block), value.shape[1])
        if best is not None and (float(value[i, j]), float(tie[i, j])) <= (best.value, best.tie):
            break
        inside = [np.arange(p[k], p[min(k + 1, len(p) - 1)] + 1) for p, k in zip(indices, (i, j), strict=False)]
        is_small = max(map(len, inside)) <= _MAX_BLOCK
        chosen = inside if is_small else [one[evenly_spaced(len(one), 2 + len(one) // _MAX_BLOCK)] for one in inside]
        smaller = part.block(indices, counted, i, j)
        counted_inside = smaller.count(chosen)
        candidate = _best(counted_inside, chosen, task)
        if candidate is not None and (best is None or candidate.rank > best.rank):
            best = candidate
        if not is_small:
            best = _search_between(smaller, task, chosen, counted_inside, best)
    return best


def _search_by_turns(
    grid: ThresholdGrid, task: _Task, max_lines: int | None, start: Mapping[str, float] | None, n_starts: int
) -> _Candidate:
    """Return the best thresholds that moving two at a time finds from several starts."""
    n_lines = min(max_lines or _LINES_BY_TURNS, _LINES_BY_TURNS)
    rng = np.random.default_rng(0)
    starts = [tuple(int(rng.choice(i)) for i in grid.subsample_by_scope(n_lines)) for _ in range(n_starts)]
    starts.insert(0, tuple(0 for _ in grid.stages) if start is None else grid.indices(start))
    results = {result.indices: result for result in (_improve(grid, task, indices, n_lines) for indices in starts)}
    best = sorted(results.values(), key=lambda result: result.rank, reverse=True)[:_N_REFINED]
    if max_lines is None:
        best = [_improve(grid, task, result.indices, None) for result in best]
    return max(best, key=lambda result: result.rank)


def _improve(grid: ThresholdGrid, task: _Task, indices: tuple[int, ...], max_lines: int | None) -> _Candidate:
    """Move two thresholds at a time until no pair of stages improves the result."""
    pairs = list(combinations(range(len(grid.stages)), 2))
    best, n_without = None, 0
    for pair in cycle(pairs):
        others = {stage: i for k, (stage, i) in enumerate(zip(grid.stages, indices, strict=True)) if k not in pair}
        result = _search_pair(grid.fix(others), task, max_lines, _LINES_BETWEEN)
        n_without += 1
        if best is None or result.rank > best.rank:
            moved = list(indices)
            moved[pair[0]], moved[pair[1]] = result.indices
            indices = tuple(moved)
            best, n_without = result._replace(indices=indices), 0
        if n_without == len(pairs):
            return best
    raise AssertionError("the pairs never end")


def _best(counted: GridCounts, indices: Sequence[np.ndarray], task: _Task) -> _Candidate | None:
    """Return the best of the counted thresholds, or None where none satisfies the goal."""
    counts = counted.counts
    value, tie, room = _evaluate(counts, counts, counted.n_held, task)
    # A pair whose metric is undefined is no choice; in a block the metric may be defined at another pair.
    value = np.where((room >= 0) & ~np.isnan(value), value, -np.inf)
    if not len(value) or value.max() == -np.inf:
        return None
    equal = np.flatnonzero(value == value.max())
    best = int(equal[np.nan_to_num(tie.ravel()[equal], nan=-np.inf).argmax()])
    return _candidate(best, counts, counted.n_held, indices, value, tie, room)


def _nearest(counted: GridCounts, indices: Sequence[np.ndarray], task: _Task) -> _Candidate:
    """Return the thresholds that come nearest to satisfying the goal's bounds."""
    counts = counted.counts
    _, tie, room = _evaluate(counts, counts, counted.n_held, task)
    room = np.where(np.isnan(room), -np.inf, room)
    return _candidate(int(room.argmax()), counts, counted.n_held, indices, np.full(room.shape, -np.inf), tie, room)


def _candidate(
    place: int,
    counts: np.ndarray,
    n_held: np.ndarray,
    indices: Sequence[np.ndarray],
    value: np.ndarray,
    tie: np.ndarray,
    room: np.ndarray,
) -> _Candidate:
    """Return the candidate at a place of tables of shape (n_first, n_second), counted row by row."""
    i, j = divmod(place, value.shape[1])
    at = tuple(int(chosen[k]) for chosen, k in zip(indices, (i, j), strict=False))
    return _Candidate(at, counts[i, j], n_held[i], float(value[i, j]), float(tie[i, j]), float(room[i, j]))


def _bounds_between(counted: GridCounts, task: _Task) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return upper bounds on value, in-scope accuracy and room inside each block between neighbouring thresholds."""

    def corner(table: np.ndarray, row: int, column: int) -> np.ndarray:
        """Shift a table so that place (i, j) holds a corner of block (i, j); a single line is its own block."""
        for axis, far in enumerate((row, column)):
            n = table.shape[axis]
            table = table.take(range(n - 1) if not far and n > 1 else range(min(1, n - 1), n), axis=axis)
        return table

    below_first = counted.below_first[:, None]
    low = corner(below_first, 0, 0) + corner(counted.below_second, 1, 0) + corner(counted.above_both, 1, 1)
    high = corner(below_first, 1, 0) + corner(counted.below_second, 0, 1) + corner(counted.above_both, 0, 0)
    n_held = corner(counted.n_held[:, None], 1, 0)[:, 0]
    value, tie, room = _evaluate(low, high, n_held, task)
    return np.where(np.isnan(value), np.inf, value), np.where(np.isnan(tie), np.inf, tie), room


def _evaluate(
    low: np.ndarray, high: np.ndarray, n_held: np.ndarray, task: _Task
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return the goal's metric (times its sign), in-scope accuracy, and the room within the bounds.

    Each is the highest that counts between `low` and `high`, shape (n_first, n_second, 6 or 8), allow.
    """
    goal, totals = task.goal, task.totals

    def highest(name: str, sign: int) -> np.ndarray:
        return sign * extreme_metric(name, low, high, highest=sign > 0, totals=totals, costs=prices(goal.used_costs))

    rooms = [highest(name, +1) - least for name, least in goal.at_least.items()]
    rooms += [highest(name, -1) + most for name, most in goal.at_most.items() if name not in LATENCIES]
    held = (n_held @ totals.weights) / totals.n - task.min_held
    rooms.append(np.broadcast_to(held[:, None], low.shape[:2]))
    return highest(goal.metric, goal.sign), highest("in_scope_accuracy", +1), np.min(rooms, axis=0)


def _latency_bounds(goal: Goal) -> dict[str, float]:
    return {name: value for name, value in goal.at_most.items() if name in LATENCIES}


def _check_latency(grid: ThresholdGrid, task: _Task) -> None:
    """Raise InfeasibleError if the bounds on latency do not hold and no threshold of the grid can change that."""
    if not task.min_held:
        return
    bounds = ", ".join(f"{name} at most {value:g}" for name, value in _latency_bounds(task.goal).items())
    where = f"{grid.name}: infeasible: {bounds}"
    if task.min_held > 1:
        raise InfeasibleError(f"{where}: even the first stage alone takes longer; ask for less")
    if grid.is_held is not None:
        held = np.bincount(~grid.in_scope, grid.is_held * (1 if task.weights is None else task.weights), 2)
        beyond = 1 - float(held @ np.asarray(task.totals.weights) / task.totals.n)
        if 1 - beyond < task.min_held:
            raise InfeasibleError(
                f"{where}: {beyond:.1%} of the texts go beyond the first stage, at most {1 - task.min_held:.1%} may, "
                f"and its threshold is fixed; tune that stage too, not only {', '.join(grid.stages)} (--stage)"
            )


def _describe_nearest(grid: ThresholdGrid, nearest: _Candidate, task: _Task) -> str:
    """Return the message of an infeasible goal, after "infeasible: "."""
    goal, totals = task.goal, task.totals
    bounds = str(replace(goal, maximize="accuracy", minimize=None)).partition(", ")[2] or goal.metric
    names = [name for name in (*goal.at_least, *goal.at_most) if name not in LATENCIES]
    if nearest.room >= 0 or nearest.room == -np.inf:
        # The bounds hold somewhere, but the metric has no value there; or a bounded metric has no value anywhere.
        undefined = [name for name in (goal.metric, *names) if np.isnan(goal.value(name, nearest.counts))]
        what = " and ".join(dict.fromkeys(undefined or [goal.metric]))
        weighted = "" if goal.prevalence is None else f", weighted to {goal.prevalence:g} out of scope,"
        return f"{what}{weighted} is undefined on these texts; {BOTH_KINDS}"
    reached = [f"{name} {float(goal.value(name, nearest.counts)):.4f}" for name in names]
    if len(names) < len(goal.at_least) + len(goal.at_most):
        beyond = 1 - float(nearest.n_held @ totals.weights / totals.n)
        reached.append(f"{beyond:.1%} of the texts beyond the first stage")
    thresholds = ", ".join(f"{stage} {exact(value)}" for stage, value in grid.thresholds_at(nearest.indices).items())
    return f"no thresholds give {bounds}; the nearest, {thresholds}, give {', '.join(reached)}; ask for less"

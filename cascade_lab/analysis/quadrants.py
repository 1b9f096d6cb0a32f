"""The outcomes at every pair of two thresholds, as counts of points in quadrants.

At thresholds `t` of a first stage and `u` of a second, a text is *stopped* by the first (its probability is below `t`),
*rejected* by the second (below `u`) or *answered*. What becomes of it in each of the three is known beforehand, so
cumulative sums give the outcomes at every pair without a replay.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import NamedTuple

import numpy as np

from cascade_lab.analysis.outcomes import OUTCOMES, outcome_codes
from cascade_lab.errors import RunError
from cascade_lab.run import Run
from cascade_lab.serial import answer
from cascade_lab.spec import CascadeSpec, StageSpec


class Points(NamedTuple):
    """The texts of a run, as two stages see them.

    Attributes
    ----------
    stages : tuple of str
        The stages whose thresholds move: one or two.
    thresholds : tuple of two ndarrays
        Every threshold that makes a difference, ascending: each probability that occurs, and 1. A threshold between two
        of them does what the higher one does. `[0.]` for a second stage that is not there.
    ranks : ndarray of int, shape (2, n)
        How many of those thresholds a text's probability reaches.
    becomes : ndarray of int, shape (3, n)
        The outcome, as a place in `OUTCOMES`, of a text that is stopped, rejected and answered.
    answers : ndarray of str, shape (3, n)
        The cascade's answer to it in each case.
    in_scope : ndarray of bool, shape (n,)
    """

    stages: tuple[str, ...]
    thresholds: tuple[np.ndarray, np.ndarray]
    ranks: np.ndarray
    becomes: np.ndarray
    answers: np.ndarray
    in_scope: np.ndarray


class Counts(NamedTuple):
    """Texts of each outcome, in `OUTCOMES`' order, at every pair of `n_first` × `n_second` thresholds.

    Attributes
    ----------
    stopped : ndarray of int, shape (n_first, 6)
        Those that the first stage stops; it grows with the threshold.
    rejected : ndarray of int, shape (n_first, n_second, 6)
        Those that the second rejects; fewer with a higher first threshold, more with a higher second.
    answered : ndarray of int, shape (n_first, n_second, 6)
        Fewer with either.
    held : ndarray of int, shape (n_first, 2)
        Texts in scope, and out of it, that do not get beyond the first stage.
    """

    stopped: np.ndarray
    rejected: np.ndarray
    answered: np.ndarray
    held: np.ndarray

    @property
    def all(self) -> np.ndarray:
        """Texts of each outcome, shape (n_first, n_second, 6)."""
        return self.stopped[:, None] + self.rejected + self.answered


def swept_stages(spec: CascadeSpec) -> tuple[str, ...]:
    """Return the stages of a cascade that can reject, and so have a threshold to move."""
    return tuple(stage.name for stage in spec.stages if stage.reject_labels)


def points(run: Run, stages: Sequence[str] | None = None, thresholds: Mapping[str, float] | None = None) -> Points:
    """Return the texts of `run` as `stages` see them, the other stages standing at `thresholds` or at their own.

    Raises
    ------
    RunError
        Not one or two stages, in another order than the cascade's, one that cannot reject, or a run without the shadow
        scores that it takes.
    """
    stages = tuple(swept_stages(run.spec) if stages is None else stages)
    order = [stage.name for stage in run.spec.stages]
    for stage in stages:
        if not run.spec.stage(stage).reject_labels:
            raise RunError(f"{run.directory}: stage '{stage}' has no reject_label, so no threshold; name another")
    if not 1 <= len(stages) <= 2 or list(stages) != sorted(set(stages), key=order.index):
        raise RunError(f"{run.directory}: thresholds move at one stage or two, in order; name them out of {order}")
    spec = run.spec.with_thresholds({k: v for k, v in (thresholds or {}).items() if k not in stages})
    said = {stage.name: _said(run, stage, stage.name in stages) for stage in spec.stages}
    cases = [{stages[0]: False}, {stages[0]: True, stages[-1]: False}, dict.fromkeys(stages, True)]
    if len(stages) == 1:
        cases[1] = cases[2]
    walked = [_walk(run, spec, said, case) for case in cases]
    answers = np.array([predicted for predicted, _ in walked])
    y_true = run.examples["label"].to_numpy(dtype=object)
    ranks, values = np.zeros((2, len(y_true)), dtype=np.int64), [np.zeros(1), np.zeros(1)]
    for k, stage in enumerate(stages):
        p = said[stage].decisive
        arrives = walked[-1][1][stage]
        values[k] = _candidates(p[arrives])
        ranks[k] = np.where(arrives, np.searchsorted(values[k], p, side="right"), 0)
    if len(stages) == 1:
        ranks[1] = 1
    return Points(
        stages=stages,
        thresholds=(values[0], values[1]),
        ranks=ranks,
        becomes=np.array([outcome_codes(spec, y_true, predicted) for predicted in answers]),
        answers=answers,
        in_scope=np.isin(outcome_codes(spec, y_true, answers[0]), [0, 2, 4]),
    )


def places(found: Points, thresholds: Mapping[str, float]) -> tuple[int, int]:
    """Return the places in `found.thresholds` that do what `thresholds`, one for each of its stages, do."""
    at = [int(np.searchsorted(v, thresholds[s])) for s, v in zip(found.stages, found.thresholds, strict=False)]
    return at[0], at[1] if len(at) == 2 else 0


def lines(n: int, at_most: int) -> np.ndarray:
    """Return at most so many of the places 0 … n-1, evenly spread, the first and the last among them."""
    return np.unique(np.linspace(0, n - 1, min(n, at_most)).round().astype(np.int64))


def spread(found: Points, at_most: int) -> list[np.ndarray]:
    """Return about so many places of each stage, even in rank among the texts in scope and among those out of it.

    Ranks of all texts would spend nearly every place where the many texts in scope lie.
    """
    chosen = []
    for values, ranks in zip(found.thresholds, found.ranks, strict=True):
        parts = [np.unique(ranks[kind]) for kind in (found.in_scope, ~found.in_scope)]
        kept = [part[lines(len(part), at_most // 2)] for part in parts if len(part)]
        chosen.append(np.unique(np.clip(np.concatenate([[0], *kept, [len(values) - 1]]), 0, len(values) - 1)))
    return chosen


def counts_at(found: Points, first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """Return the texts of each outcome, shape (n_first, n_second, 6), at thresholds that are given, ascending."""
    at = [np.searchsorted(values, given) for values, given in zip(found.thresholds, (first, second), strict=True)]
    # Several of them may lie between two probabilities; count once, spread after.
    rows, columns = (np.unique(place) for place in at)
    return count(found, rows, columns).all[np.ix_(np.searchsorted(rows, at[0]), np.searchsorted(columns, at[1]))]


def count(found: Points, first: np.ndarray, second: np.ndarray, *, weights: np.ndarray | None = None) -> Counts:
    """Count the outcomes at thresholds whose places in `found.thresholds` are `first` and `second`, ascending.

    `weights`, shape (n,), is how often each text counts.
    """
    n_first, n_second, n_kinds = len(first), len(second), len(OUTCOMES)
    row, column = (
        np.searchsorted(places, np.arange(len(values) + 1))[ranks]
        for places, values, ranks in zip((first, second), found.thresholds, found.ranks, strict=True)
    )
    shape = (n_first + 1, n_second + 1, n_kinds)

    def histogram(kind: np.ndarray, of: tuple[int, ...], *places: np.ndarray) -> np.ndarray:
        """Count texts by `places` and kind; the count is a whole number, whatever bincount makes of weights."""
        where = np.ravel_multi_index((*places, kind), of)
        return np.bincount(where, weights, int(np.prod(of))).astype(np.int32).reshape(of)

    # A text in row r passes the first r thresholds, and one in column c those c of the second stage.
    stopped = histogram(found.becomes[0], (n_first + 1, n_kinds), row)[:-1].cumsum(axis=0)
    held = histogram((~found.in_scope).astype(int), (n_first + 1, 2), row)[:-1].cumsum(axis=0)
    passing = [histogram(kind, shape, row, column)[::-1].cumsum(axis=0)[::-1][1:] for kind in found.becomes[1:]]
    rejected = passing[0].cumsum(axis=1)[:, :-1]
    answered = passing[1][:, ::-1].cumsum(axis=1)[:, ::-1][:, 1:]
    return Counts(stopped, rejected, answered, held)


class _Said(NamedTuple):
    known: np.ndarray
    passes: np.ndarray
    stopped: np.ndarray
    passed: np.ndarray
    decisive: np.ndarray


def _said(run: Run, stage: StageSpec, moves: bool) -> _Said:
    """Return what a stage says of every example, and what it would say on either side of its threshold."""
    n, scores = len(run.examples), run.scores(stage.name)
    if moves and not stage.is_gate:
        stage = replace(stage, min_probability=None, min_probabilities={})
    found = answer(stage, scores.logits)
    known, passes, decisive = np.zeros(n, dtype=bool), np.zeros(n, dtype=bool), np.zeros(n)
    predicted = np.full(n, None, dtype=object)
    known[scores.rows], passes[scores.rows], decisive[scores.rows] = True, found.passes, found.decisive
    predicted[scores.rows] = found.predicted
    rejecting = predicted if stage.is_gate else np.full(n, stage.reject_label, dtype=object)
    return _Said(known, passes, rejecting, predicted, decisive)


def _walk(
    run: Run, spec: CascadeSpec, said: Mapping[str, _Said], forced: Mapping[str, bool]
) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """Return every answer, and who arrives at each stage, where some stages let everything pass or nothing."""
    n = len(run.examples)
    predicted, going = np.full(n, None, dtype=object), np.ones(n, dtype=bool)
    arrives = {}
    for stage in spec.stages:
        own = said[stage.name]
        missing = int((going & ~own.known).sum())
        if missing:
            raise RunError(
                f"{run.directory}: {missing} examples would reach stage '{stage.name}', which never scored them; "
                "run the cascade again with shadow scores"
            )
        arrives[stage.name] = going
        passes = own.passes if stage.name not in forced else np.full(n, forced[stage.name])
        if stage is spec.last:
            # It passes nothing on: to pass its threshold is to answer.
            words = own.passed if forced.get(stage.name, True) else own.stopped
            return np.where(going, words, predicted), arrives
        ends = going & ~passes
        predicted[ends] = own.stopped[ends]
        going = going & passes
    raise AssertionError("a cascade has a last stage")


def _candidates(p: np.ndarray) -> np.ndarray:
    """Return every threshold that divides `p` in another way: each of its values, and 1, which none may reach."""
    return np.unique(np.append(p, 1.0))

"""Counts the outcomes at every combination of thresholds, from kept logits and without a replay for each.

A text leaves the cascade at the first stage whose threshold its confidence does not reach; at a deferral stage, whose
threshold it reaches. Its outcome there, and its outcome if it goes on at every stage, do not depend on the thresholds.
So the outcomes at all pairs of two thresholds are cumulative sums of a histogram.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from decimal import ROUND_FLOOR, Decimal
from functools import cached_property
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import pandas as pd

from cascade_lab.analysis.costs import CostMatrix, Costs, count_by_place, with_costs
from cascade_lab.analysis.outcomes import outcome_codes
from cascade_lab.decisions import RoutingResult, StageDecision, require_scored, route
from cascade_lab.exceptions import RunError
from cascade_lab.spec import CascadeSpec

if TYPE_CHECKING:
    from cascade_lab.run import Run


class GridCounts(NamedTuple):
    """The number of texts of each outcome, in the order of `OUTCOMES`, at `n_first` × `n_second` thresholds.

    Where the grid has a cost matrix, the last dimension is 8 instead of 6, and the numbers are floats: the sums of the
    costs follow (see `costs.count_codes`).

    With one stage, `n_second` is 1. *Below* is for a gate and for the last stage: the texts that leave there. At a
    deferral stage the texts above leave, and its thresholds fall from one index to the next.

    Attributes
    ----------
    below_first : ndarray of int, shape (n_first, 6)
        Texts below the first threshold. They become more from one index to the next.
    below_second : ndarray of int, shape (n_first, n_second, 6)
        Texts that reach the first threshold and not the second.
    above_both : ndarray of int, shape (n_first, n_second, 6)
        Texts that reach both. They become fewer from one index to the next.
    n_held : ndarray of int, shape (n_first, 2)
        Texts in scope, and texts out of scope, that do not go beyond the first stage of the cascade.
    """

    below_first: np.ndarray
    below_second: np.ndarray
    above_both: np.ndarray
    n_held: np.ndarray

    @property
    def counts(self) -> np.ndarray:
        """All texts by outcome: shape (n_first, n_second, 6)."""
        return self.below_first[:, None] + self.below_second + self.above_both


@dataclass(frozen=True, eq=False)
class ThresholdGrid:
    """The texts of a run as the stages see them whose thresholds are chosen.

    Build it once with `from_run`, and pass it to each function that searches thresholds.

    Attributes
    ----------
    name : str
        The run's name, for messages.
    stages : tuple of str
        The stages whose thresholds move, in the order of the cascade.
    thresholds : tuple of ndarray, one per stage
        Every threshold that makes a difference: each confidence that occurs, and 1; ascending, but descending for a
        deferral stage. A threshold between two of them does what the higher one does (see `index`).
    ranks : ndarray of int, shape (n_stages, n)
        At how many of a stage's thresholds a text goes on, to a later stage or to the last stage's label: it does at
        `thresholds[k][i]` if `ranks[k] > i`. 0 for a text that does not arrive at the stage. A text whose label has a
        minimum of its own (`min_probabilities`) does not move with the threshold: it reaches all of them, or none.
    outcomes : ndarray of int, shape (n_stages + 1, n)
        Row k: the outcome (an index into `OUTCOMES`; with a cost matrix, the code of `costs.text_codes`) of a text that
        goes on at the stages before stage k, and leaves at stage k. Last row: its outcome if it goes on at all.
    predicted : ndarray of str, shape (n_stages + 1, n)
        The cascade's answer in each case.
    y_true : ndarray of str, shape (n,)
        True labels.
    in_scope : ndarray of bool, shape (n,)
        The true label is a class of the last stage.
    groups : ndarray of int, shape (n,)
        The same number for equal texts (`text_groups`).
    is_held : ndarray of bool, shape (n,), optional
        The texts that do not go beyond the first stage of the cascade, where its threshold is fixed. None where that
        stage is the first of `stages`, whose threshold decides it.
    defers : tuple of bool, one per stage
        Whether it is a deferral stage.
    cost_matrix : CostMatrix, optional
        With which `outcomes` were made: see `with_costs`.
    """

    name: str
    stages: tuple[str, ...]
    thresholds: tuple[np.ndarray, ...]
    ranks: np.ndarray
    outcomes: np.ndarray
    predicted: np.ndarray
    y_true: np.ndarray
    in_scope: np.ndarray
    groups: np.ndarray
    is_held: np.ndarray | None = None
    defers: tuple[bool, ...] = ()
    cost_matrix: CostMatrix | None = None

    @classmethod
    def from_run(
        cls, run: Run, stages: Sequence[str] | None = None, thresholds: Mapping[str, float] | None = None
    ) -> ThresholdGrid:
        """Build the grid of a run's labelled texts.

        Parameters
        ----------
        run : Run
            With shadow scores.
        stages : sequence of str, optional
            The stages whose thresholds move, in the order of the cascade; by default all that can reject.
        thresholds : mapping of str to float, optional
            Thresholds of the other stages; by default the run's own.

        Raises
        ------
        RunError
            No stage, a stage that cannot reject, another order than the cascade's, no labelled text, or a run without
            the shadow scores that this needs.
        """
        run = run.labelled
        stages = _checked_stages(run, stages)
        spec = run.spec.with_thresholds({k: v for k, v in (thresholds or {}).items() if k not in stages})
        decisions = {stage.name: run.decision(stage.name).with_threshold(stage) for stage in spec.stages}
        routes = [require_scored(result, run.name) for result in route_cases(spec, decisions, stages)]
        y_true = run.examples["label"].to_numpy(dtype=object)
        values, ranks = [], []
        for stage in stages:
            arrived, decision = routes[-1].reached[stage], decisions[stage]
            own_minimums = list(spec.stage(stage).min_probabilities)
            is_fixed = np.asarray(pd.Index(decision.label_above).isin(own_minimums))
            values.append(np.unique(np.append(decision.confidence[arrived & ~is_fixed], 1.0)))
            rank = np.searchsorted(values[-1], decision.confidence, side="right")
            if decision.role == "deferral":
                rank, values[-1] = len(values[-1]) - rank, values[-1][::-1]
            rank[is_fixed] = np.where(decision.above[is_fixed], len(values[-1]), 0)
            ranks.append(np.where(arrived, rank, 0))
        first, *later = spec.stages
        # In a cascade with one stage, no text goes beyond the first.
        goes_on = routes[-1].reached[later[0].name] if later else np.zeros(len(y_true), dtype=bool)
        return cls(
            name=run.name,
            stages=stages,
            thresholds=tuple(values),
            ranks=np.array(ranks),
            outcomes=np.array([outcome_codes(spec, y_true, case.predicted) for case in routes]),
            predicted=np.array([case.predicted for case in routes]),
            y_true=y_true,
            in_scope=np.asarray(pd.Index(y_true).isin(spec.in_scope_labels)),
            groups=run.text_groups,
            is_held=None if later and stages[0] == first.name else ~goes_on,
            defers=tuple(spec.stage(stage).is_deferral for stage in stages),
        )

    def __repr__(self) -> str:
        sizes = ", ".join(
            f"{stage} {len(values):,}" for stage, values in zip(self.stages, self.thresholds, strict=True)
        )
        return f"<ThresholdGrid {self.name}: {len(self.in_scope):,} texts, thresholds: {sizes}>"

    def with_costs(self, costs: Costs) -> ThresholdGrid:
        """Return the grid whose outcomes have the costs of a goal (`Goal.used_costs`), where these are a matrix.

        Raises
        ------
        GoalError
            The matrix lacks a label of the texts.
        """
        matrix = costs if isinstance(costs, CostMatrix) else None
        if matrix is self.cost_matrix:
            return self
        cases = zip(self.outcomes, self.predicted, strict=True)
        outcomes = np.array([with_costs(codes, self.y_true, predicted, matrix) for codes, predicted in cases])
        return replace(self, outcomes=outcomes, cost_matrix=matrix)

    def indices(self, thresholds: Mapping[str, float]) -> tuple[int, ...]:
        """Return the index in `self.thresholds` that does what a threshold does, for each stage."""
        return tuple(int(self.index(stage, thresholds[stage])) for stage in self.stages)

    def index(self, stage: str, thresholds: float | np.ndarray) -> np.ndarray:
        """Return the indices in a stage's thresholds that do what the given thresholds do."""
        k = self.stages.index(stage)
        values = self.thresholds[k]
        if not self._defers(k):
            return np.asarray(np.searchsorted(values, thresholds))
        return len(values) - 1 - np.asarray(np.searchsorted(values[::-1], thresholds))

    def _defers(self, k: int) -> bool:
        return bool(self.defers) and self.defers[k]

    def thresholds_at(self, indices: Sequence[int]) -> dict[str, float]:
        """Return the thresholds at some indices, one per stage: of those that do the same, one with the fewest digits.

        The index of the lowest threshold gives the threshold 0: where every confidence of this run reaches the
        threshold, every confidence of another run is to reach it too.
        """
        found = {}
        for k, (stage, values, i) in enumerate(zip(self.stages, self.thresholds, indices, strict=True)):
            lower = i + 1 if self._defers(k) else i - 1
            found[stage] = shortest_decimal(values[lower], values[i]) if 0 <= lower < len(values) else 0.0
        return found

    def subsample(self, n: int) -> list[np.ndarray]:
        """Return at most `n` indices of each stage's thresholds, evenly spaced, with the first and the last."""
        return [evenly_spaced(len(values), n) for values in self.thresholds]

    def subsample_by_scope(self, n: int) -> list[np.ndarray]:
        """Return about `n` indices of each stage's thresholds: half among texts in scope, half among the others.

        Most texts are in scope, so evenly spaced ranks of all texts would leave few thresholds among the others.
        """
        chosen = []
        for values, ranks in zip(self.thresholds, self.ranks, strict=True):
            parts = [np.unique(ranks[mask]) for mask in (self.in_scope, ~self.in_scope)]
            spaced = [part[evenly_spaced(len(part), n // 2)] for part in parts if len(part)]
            last = len(values) - 1
            chosen.append(np.unique(np.clip(np.concatenate([[0], *spaced, [last]]), 0, last)))
        return chosen

    def select(self, rows: np.ndarray) -> ThresholdGrid:
        """Return the grid of some texts, at the same thresholds."""
        return replace(
            self,
            ranks=self.ranks[:, rows],
            outcomes=self.outcomes[:, rows],
            predicted=self.predicted[:, rows],
            y_true=self.y_true[rows],
            in_scope=self.in_scope[rows],
            groups=self.groups[rows],
            is_held=None if self.is_held is None else self.is_held[rows],
        )

    def fix(self, indices: Mapping[str, int]) -> ThresholdGrid:
        """Return the grid of the other stages, with the thresholds of some stages fixed at the given indices."""
        moving = [k for k, stage in enumerate(self.stages) if stage not in indices]
        below = {k: self.ranks[k] <= indices[stage] for k, stage in enumerate(self.stages) if stage in indices}
        cases = []
        for case in [*moving, len(self.stages)]:
            rows = np.full(len(self.in_scope), case)
            # A fixed stage before it decides about the texts below its threshold; the earliest one comes first.
            for k in sorted(below, reverse=True):
                if k < case:
                    rows[below[k]] = k
            cases.append(rows)
        columns = np.arange(len(self.in_scope))
        return replace(
            self,
            stages=tuple(self.stages[k] for k in moving),
            thresholds=tuple(self.thresholds[k] for k in moving),
            defers=tuple(self._defers(k) for k in moving),
            ranks=self.ranks[moving],
            outcomes=self.outcomes[cases, columns],
            predicted=self.predicted[cases, columns],
            is_held=below.get(0) if self.is_held is None else self.is_held,
        )

    def outcomes_at(self, indices: Sequence[int]) -> np.ndarray:
        """Return each text's outcome, as in `outcomes`, at one threshold per stage: shape (n,)."""
        case = self.cases_at(indices)
        return self.outcomes[case, np.arange(len(case))]

    def cases_at(self, indices: Sequence[int]) -> np.ndarray:
        """Return at which of `stages` each text leaves, `len(stages)` if at none, at one threshold per stage."""
        leaves = self.ranks <= np.asarray(indices)[:, None]
        return np.where(leaves.any(axis=0), leaves.argmax(axis=0), len(self.stages))

    def count(self, indices: Sequence[np.ndarray], *, weights: np.ndarray | None = None) -> GridCounts:
        """Count the outcomes at all combinations of some thresholds of one or two stages.

        Parameters
        ----------
        indices : sequence of ndarray of int, one per stage
            Indices in `self.thresholds`, ascending.
        weights : ndarray of int, shape (n,), optional
            How often each text counts.
        """
        sizes, ranks, outcomes = self._two_stages
        first, second = (*indices, np.zeros(1, dtype=np.int64))[:2]
        n_first, n_second = len(first), len(second)
        # Of many texts, each rank is searched once.
        row, column = (
            np.searchsorted(chosen, rank) if len(rank) < size else np.searchsorted(chosen, np.arange(size + 1))[rank]
            for chosen, size, rank in zip((first, second), sizes, ranks, strict=True)
        )

        def histogram(shape: tuple[int, ...], place: np.ndarray, codes: np.ndarray) -> np.ndarray:
            return count_by_place(place, int(np.prod(shape)), codes, weights, self.cost_matrix).reshape(*shape, -1)

        # A text in row r reaches the first r of the first stage's thresholds; in column c, the first c of the second's.
        shape, cell = (n_first + 1, n_second + 1), row * (n_second + 1) + column
        below_first = _cumulative(histogram(shape[:1], row, outcomes[0])[:-1], axis=0)
        reaching = [_cumulative(histogram(shape, cell, codes)[::-1], axis=0)[::-1][1:] for codes in outcomes[1:]]
        below_second = _cumulative(reaching[0], axis=1)[:, :-1]
        above_both = _cumulative(reaching[1][:, ::-1], axis=1)[:, ::-1][:, 1:]
        out_of_scope = (~self.in_scope).astype(np.int64)
        if self.is_held is None:
            by_row = np.bincount(row * 2 + out_of_scope, weights, 2 * (n_first + 1)).reshape(-1, 2)
            n_held = by_row.astype(np.int32)[:-1].cumsum(axis=0)
        else:
            held = self.is_held * (1 if weights is None else weights)
            n_held = np.tile(np.bincount(out_of_scope, held, 2).astype(np.int32), (n_first, 1))
        return GridCounts(below_first, below_second, above_both, n_held)

    def counts_at(self, *thresholds: np.ndarray, weights: np.ndarray | None = None) -> np.ndarray:
        """Count the outcomes at any thresholds, ascending, of one or two stages: shape (n_first[, n_second], 6).

        With a cost matrix, the last dimension is 8 (see `GridCounts`).
        """
        at = [self.index(stage, given) for stage, given in zip(self.stages, thresholds, strict=True)]
        # Several thresholds may have one index: count it once.
        unique = [np.unique(index) for index in at]
        counts = self.count(unique, weights=weights).counts
        counts = counts if len(at) == 2 else counts[:, 0]
        return counts[np.ix_(*(np.searchsorted(u, index) for u, index in zip(unique, at, strict=True)))]

    @cached_property
    def _two_stages(self) -> tuple[list[int], np.ndarray, np.ndarray]:
        """The numbers of thresholds, ranks and outcomes of two stages; every text reaches a second that is absent."""
        if len(self.stages) > 2:
            raise RunError(f"{self.name}: counts are of one or two stages, not of {len(self.stages)}; fix the others")
        sizes = [len(values) for values in self.thresholds]
        if len(self.stages) == 2:
            return sizes, self.ranks, self.outcomes
        return [*sizes, 1], np.vstack([self.ranks, np.ones_like(self.ranks)]), self.outcomes[[0, 1, 1]]

    @cached_property
    def sorted_ranks(self) -> list[tuple[np.ndarray, np.ndarray, np.ndarray]]:
        """Of each of two stages: the texts' ranks, the rows of the texts by rank, and the ranks in that order."""
        _, ranks, _ = self._two_stages
        return [(own, order, own[order]) for own, order in zip(ranks, np.argsort(ranks, kind="stable"), strict=True)]


def shortest_decimal(low: float, high: float) -> float:
    """Return the number with the fewest decimals above `low` and up to `high`, in [0, 1]; of several the largest.

    >>> shortest_decimal(0.41237, 0.41291), shortest_decimal(0.2, 0.9), shortest_decimal(0.9999871, 0.9999874)
    (0.4129, 0.9, 0.9999874)
    """
    exact = Decimal(repr(float(high)))
    for n_decimals in range(28):  # the precision of Decimal
        rounded = float(exact.quantize(Decimal(1).scaleb(-n_decimals), rounding=ROUND_FLOOR))
        if rounded > low:
            return rounded
    return float(high)


def route_cases(
    spec: CascadeSpec, decisions: Mapping[str, StageDecision], stages: Sequence[str]
) -> list[RoutingResult]:
    """Return the ways of all texts if they leave at one of `stages`, case by case, or go on at all of them.

    Case k: every text goes on at the stages before stage k, and leaves at k. The last case: it goes on at all.
    """
    # Whether a text that goes on at a stage is above its threshold.
    goes_on = {stage: not spec.stage(stage).is_deferral for stage in stages}
    cases = [
        {**{earlier: goes_on[earlier] for earlier in stages[:k]}, stage: not goes_on[stage]}
        for k, stage in enumerate(stages)
    ]
    return [route(spec, decisions, force=case) for case in [*cases, goes_on]]


def swept_stages(spec: CascadeSpec) -> tuple[str, ...]:
    """Return the stages of a cascade that have a threshold to choose: those that can reject, and those that defer."""
    return tuple(stage.name for stage in spec.stages if stage.reject_labels or stage.is_deferral)


def _cumulative(counts: np.ndarray, *, axis: int) -> np.ndarray:
    """Return cumulative sums of the same type: numpy's would be twice as large."""
    return counts.cumsum(axis=axis, dtype=counts.dtype)


def _checked_stages(run: Run, stages: Sequence[str] | None) -> tuple[str, ...]:
    order = [stage.name for stage in run.spec.stages]
    stages = tuple(swept_stages(run.spec) if stages is None else stages)
    if not stages:
        raise RunError(f"{run.name}: no stage can reject, so no threshold can move; give the last a reject_label")
    for stage in stages:
        if not (run.spec.stage(stage).reject_labels or run.spec.stage(stage).is_deferral):
            raise RunError(f"{run.name}: stage '{stage}' has no reject_label, so no threshold; name another stage")
    if list(stages) != sorted(set(stages), key=order.index):
        raise RunError(f"{run.name}: stages {', '.join(stages)}: name each once, in order: {', '.join(order)}")
    return stages


def evenly_spaced(n: int, at_most: int) -> np.ndarray:
    """Return at most `at_most` of the numbers 0 … n - 1, evenly spaced, with the first and the last."""
    return np.unique(np.linspace(0, n - 1, min(n, at_most)).round().astype(np.int64))

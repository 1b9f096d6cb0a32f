"""Counts the outcomes inside a block of a grid's thresholds, from the few texts that the block's thresholds tell apart.

Thresholds that are neighbours of each other differ in the outcomes of few texts. All other texts have the same outcome
at each threshold of the block, so they are counted once, for the whole block.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import pandas as pd

from cascade_lab.thresholds.grid import GridCounts, ThresholdGrid


@dataclass(frozen=True, eq=False)
class GridPart:
    """A block of a grid's thresholds, of one or two stages.

    Attributes
    ----------
    grid : ThresholdGrid
        The texts that the thresholds of the block tell apart.
    weights : ndarray of int, shape (n,), or None
        How often each of these texts counts.
    others : GridCounts
        The counts of the other texts, which each pair of thresholds has: shapes (6,) and (2,), with a cost matrix (8,).
        `n_held` is that of all texts where the first threshold does not move it.
    """

    grid: ThresholdGrid
    weights: np.ndarray | None
    others: GridCounts

    @classmethod
    def whole(cls, grid: ThresholdGrid, weights: np.ndarray | None) -> GridPart:
        """Return the block of all thresholds."""
        zero = np.zeros((), dtype=np.int32)
        return cls(grid, weights, GridCounts(zero, zero, zero, zero))

    def count(self, indices: Sequence[np.ndarray]) -> GridCounts:
        """Count the outcomes of all texts at some thresholds of the block: see `ThresholdGrid.count`."""
        counts = self.grid.count(indices, weights=self.weights)
        total = GridCounts(*(part + others for part, others in zip(counts, self.others, strict=True)))
        if self.grid.is_held is None or not self.others.n_held.ndim:
            return total
        return total._replace(n_held=np.tile(self.others.n_held, (len(counts.n_held), 1)))

    def block(self, indices: Sequence[np.ndarray], counted: GridCounts, i: int, j: int) -> GridPart:
        """Return the block between neighbouring thresholds.

        Parameters
        ----------
        indices : sequence of ndarray of int, one per stage
            Indices in the grid's thresholds, ascending.
        counted : GridCounts
            The counts at these: what `count` returns.
        i, j : int
            Where in `indices` the block begins; it ends at the next ones, or where it begins if there are none.
        """
        first, second = (*indices, np.zeros(1, dtype=np.int64))[:2]
        next_i, next_j = min(i + 1, len(first) - 1), min(j + 1, len(second) - 1)
        by_first, by_second = self.grid.sorted_ranks
        of_first = _between(by_first, first[i], first[next_i])
        of_second = _between(by_second, second[j], second[next_j])
        chosen = np.concatenate([of_first, of_second[by_first[0][of_second] > first[next_i]]])
        others = GridCounts(
            counted.below_first[i],
            counted.below_second[next_i, j],
            counted.above_both[next_i, next_j],
            counted.n_held[i],
        )
        weights = None if self.weights is None else self.weights[chosen]
        return GridPart(self.grid.select(chosen), weights, others)


def _between(stage: tuple[np.ndarray, np.ndarray, np.ndarray], low: int, high: int) -> np.ndarray:
    """Return the rows of the texts whose rank is above `low` and at most `high`; `stage` as in `sorted_ranks`."""
    _, order, ranks = stage
    start, stop = np.searchsorted(ranks, [low, high], side="right")
    return order[start:stop]


class Kinds(NamedTuple):
    """The texts of a grid in kinds: texts of one kind have the same outcome at each of some thresholds.

    Attributes
    ----------
    grid : ThresholdGrid
        One text of each kind.
    of_text : ndarray of int, shape (n,)
        The kind of each text.
    n_texts : ndarray of int, shape (n_kinds,)
    codes : ndarray of int, shape (n_kinds,)
        The code of each kind.
    """

    grid: ThresholdGrid
    of_text: np.ndarray
    n_texts: np.ndarray
    codes: np.ndarray


def kinds_of_texts(grid: ThresholdGrid, indices: Sequence[np.ndarray], codes: np.ndarray) -> Kinds:
    """Return the kinds of a grid's texts at some of its thresholds; texts of one kind have the same of `codes` too.

    Parameters
    ----------
    grid : ThresholdGrid
    indices : sequence of ndarray of int, one per stage
        Indices in the grid's thresholds, ascending.
    codes : ndarray of int, shape (n,)
        A number of each text, at least 0, such as its outcome.
    """
    cells = [np.searchsorted(chosen, ranks) for chosen, ranks in zip(indices, grid.ranks, strict=True)]
    held = [] if grid.is_held is None else [grid.is_held.astype(np.int64)]
    kind = np.zeros(len(codes), dtype=np.int64)
    for part in (*cells, *grid.outcomes, grid.in_scope.astype(np.int64), *held, codes):
        kind = pd.factorize(kind * (int(part.max(initial=0)) + 1) + part)[0]
    _, first, of_text, n_texts = np.unique(kind, return_index=True, return_inverse=True, return_counts=True)
    return Kinds(grid.select(first), of_text, n_texts, codes[first])

"""Find all pairs of similar rows of sparse matrices, without the products of most rows that are not similar.

Two rows of length 1 whose cosine is at least a threshold have a column in common that is among the rare columns of
both. Otherwise all common columns are in the remainder of one row, which is too short (prefix filtering: Bayardo, Ma
and Srikant 2007). So only rows that share a rare column are compared.
"""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from typing import NamedTuple

import numpy as np
from scipy.sparse import csr_matrix

from cascade_lab.by_block import n_cores

MAX_PRODUCTS = 4_000_000
"""The most products of two numbers in a block of rows: about 100 MB."""
_REMAINDER = 0.75  # of the threshold: the largest length of a row without its rare columns
_TOLERANCE = 1e-5  # of float32


class SimilarRows(NamedTuple):
    """Pairs of similar rows: `rows` of the first matrix with `others` of the second, and their `cosines` (float32)."""

    rows: np.ndarray
    others: np.ndarray
    cosines: np.ndarray


def similar_rows(vectors: csr_matrix, others: csr_matrix, similarity: float) -> Iterator[tuple[int, SimilarRows]]:
    """Yield the pairs of rows of two matrices whose cosine is at least `similarity`, block by block.

    Parameters
    ----------
    vectors, others : csr_matrix of float32, shapes (n, n_columns) and (n_others, n_columns)
        Rows of length 1, or empty. No number is negative.
    similarity : float
        In (0, 1].

    Yields
    ------
    n_rows : int
        The number of rows of the block.
    SimilarRows
        The pairs of the block, by row and then by the other row.

    Examples
    --------
    >>> vectors = csr_matrix(np.array([[1, 0, 0], [0.6, 0.8, 0], [0, 0.8, 0.6]], dtype=np.float32))
    >>> [(n, found.rows.tolist(), found.others.tolist()) for n, found in similar_rows(vectors, vectors, 0.61)]
    [(3, [0, 1, 1, 2, 2], [0, 1, 2, 1, 2])]
    """
    n_of_column = np.bincount(vectors.indices, minlength=vectors.shape[1])
    if others is not vectors:
        n_of_column += np.bincount(others.indices, minlength=vectors.shape[1])
    place = np.empty(vectors.shape[1], dtype=np.int32)
    place[np.argsort(n_of_column, kind="stable")] = np.arange(vectors.shape[1])
    side = _Side.of(vectors, place, similarity)
    other_side = side if others is vectors else _Side.of(others, place, similarity)
    transposed = other_side.rare.T.tocsr()
    n_products = np.append(0, np.diff(transposed.indptr)[side.rare.indices].cumsum())[side.rare.indptr]
    starts = [0]
    while starts[-1] < vectors.shape[0]:
        most = n_products[starts[-1]] + MAX_PRODUCTS
        starts.append(max(int(np.searchsorted(n_products, most, side="right")) - 1, starts[-1] + 1))

    def of_block(ends: tuple[int, int]) -> tuple[int, SimilarRows]:
        return ends[1] - ends[0], _similar_in_block(*ends, side, other_side, transposed, similarity)

    n_threads = n_cores()
    with ThreadPoolExecutor(n_threads) as threads:
        blocks = list(pairwise(starts))
        # A few blocks at a time: what is found of them waits in memory.
        for first in range(0, len(blocks), 2 * n_threads):
            yield from threads.map(of_block, blocks[first : first + 2 * n_threads])


class _Side(NamedTuple):
    """A matrix with its columns in order, the rarest first, and each row in its rare columns and the remainder.

    `last_rare` is the place of each row's last rare column, and `remainder` the length of the row without them.
    """

    vectors: csr_matrix
    rare: csr_matrix
    last_rare: np.ndarray
    remainder: np.ndarray

    @classmethod
    def of(cls, vectors: csr_matrix, place: np.ndarray, similarity: float) -> _Side:
        ordered = csr_matrix((vectors.data.copy(), place[vectors.indices], vectors.indptr), shape=vectors.shape)
        ordered.sort_indices()
        squares = np.append(0.0, ordered.data.astype(np.float64) ** 2).cumsum()
        ends = np.repeat(squares[ordered.indptr[1:]], np.diff(ordered.indptr))
        # A column is rare if the row is too long from it on.
        is_rare = ends - squares[:-1] >= (_REMAINDER * similarity) ** 2
        n_rare = np.append(0, is_rare.cumsum())[ordered.indptr]
        rare = csr_matrix((ordered.data[is_rare], ordered.indices[is_rare], n_rare), shape=vectors.shape)
        after = ordered.indptr[:-1] + np.diff(n_rare)
        remainder = np.sqrt(np.maximum(squares[ordered.indptr[1:]] - squares[after], 0))
        return cls(ordered, rare, np.append(ordered.indices, 0)[after - 1], remainder)


def _similar_in_block(
    start: int, stop: int, first: _Side, second: _Side, transposed: csr_matrix, similarity: float
) -> SimilarRows:
    products = first.rare[start:stop] @ transposed
    rows = np.repeat(np.arange(start, stop), np.diff(products.indptr))
    others = products.indices
    # All other common columns are in the remainder of the row whose rare columns end first.
    ends_first = first.last_rare[rows] <= second.last_rare[others]
    most = products.data + np.where(ends_first, first.remainder[rows], second.remainder[others])
    may_be = most >= similarity - _TOLERANCE
    rows, others = rows[may_be], others[may_be]
    order = np.lexsort((others, rows))
    rows, others = rows[order], others[order]
    cosines = np.empty(len(rows), dtype=np.float32)
    for at in range(0, len(rows), 100_000):
        part = slice(at, at + 100_000)
        cosines[part] = np.ravel(first.vectors[rows[part]].multiply(second.vectors[others[part]]).sum(axis=1))
    is_similar = cosines >= similarity
    return SimilarRows(rows[is_similar], others[is_similar], cosines[is_similar])

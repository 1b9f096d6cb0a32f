"""Computes on the rows of large arrays block by block, on all cores: no intermediate array has all rows."""

from __future__ import annotations

import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import numpy as np

BLOCK_BYTES = 2**21
"""The size of a block in float64: one that stays in a core's cache is faster than a larger one."""


def by_block(
    function: Callable[..., tuple[np.ndarray, ...]], *arrays: np.ndarray, n_columns: int | None = None
) -> tuple[np.ndarray, ...]:
    """Return what a function returns for some rows of arrays at a time, put together.

    Threads of all cores call it, so it must only read what it shares; numpy releases the lock of the interpreter.
    A caller's `np.errstate` does not hold in them: set it inside the function.

    Parameters
    ----------
    function : function
        Takes blocks of `arrays`, and returns arrays whose first dimension is that of the block, where the result of a
        row must not depend on the other rows; or arrays of one row, such as sums over the block.
    arrays : ndarray, shape (n, ...)
    n_columns : int, optional
        The number of columns that the function computes with, where that is not the size of a row of the first array.

    Examples
    --------
    >>> by_block(lambda x: (x.sum(axis=1), x.max(axis=1)), np.array([[1, 2], [3, 4]]))
    (array([3, 7]), array([2, 4]))
    """
    n = len(arrays[0])
    width = max(1, arrays[0][:1].size if n_columns is None else n_columns)
    blocks = row_blocks(n, width)
    if len(blocks) < 2:
        return function(*arrays)
    with ThreadPoolExecutor(min(n_cores(), len(blocks))) as threads:
        parts = list(threads.map(lambda block: function(*(values[block] for values in arrays)), blocks))
    return tuple(map(np.concatenate, zip(*parts, strict=True)))


def row_blocks(n_rows: int, n_columns: int) -> list[slice]:
    """Return slices over rows whose float64 values take about `BLOCK_BYTES` each.

    >>> row_blocks(5, 131_072)
    [slice(0, 2, None), slice(2, 4, None), slice(4, 5, None)]
    """
    step = max(1, BLOCK_BYTES // (8 * n_columns))
    return [slice(start, min(start + step, n_rows)) for start in range(0, n_rows, step)]


def n_cores() -> int:
    """Return the number of cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1

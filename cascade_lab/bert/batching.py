"""Which texts are scored together: batches of one length where there are enough, the rest packed by length."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

MAX_TOKENS = 1024  # of a batch: its activations stay in a core's cache, and its products are large enough
MIN_TOKENS = 64  # below which a batch is not divided any more


def even_share(n_tokens: int, callers: int) -> int:
    """Return how many tokens a batch may have for callers that work side by side to end at about the same time.

    >>> even_share(1400, 2), even_share(3000, 2), even_share(20, 2)
    (700, 750, 64)
    """
    rounds = max(1, math.ceil(n_tokens / (callers * MAX_TOKENS)))
    return max(MIN_TOKENS, math.ceil(n_tokens / (callers * rounds)))


def batches(
    lengths: Sequence[int] | np.ndarray, *, max_texts: int | None = None, max_tokens: int = MAX_TOKENS
) -> list[np.ndarray]:
    """Divide texts into batches.

    Parameters
    ----------
    lengths : sequence of int
        Tokens of each text.
    max_texts : int, optional
        The most texts in a batch.
    max_tokens : int
        The most tokens in a batch; a longer text is a batch of its own.

    Returns
    -------
    list of ndarray of int
        The texts of each batch, those with most tokens first. As many as fill batches of a single length are in such;
        what remains of each length is put together with its neighbours'.

    >>> [batch.tolist() for batch in batches([4, 2, 4, 3, 2, 2], max_tokens=8)]
    [[0, 2], [3, 1, 4], [5]]
    """
    lengths = np.asarray(lengths, dtype=int)
    found, rest = [], []
    for length in np.unique(lengths)[::-1]:
        rows = np.flatnonzero(lengths == length)
        size = max(1, max_tokens // int(length))
        size = size if max_texts is None else min(size, max_texts)
        n_full = len(rows) // size * size
        found += np.split(rows[:n_full], range(size, n_full, size)) if n_full else []
        rest.append(rows[n_full:])
    found += _packed(np.concatenate(rest) if rest else np.zeros(0, int), lengths, max_texts or len(lengths), max_tokens)
    return sorted(found, key=lambda batch: -int(lengths[batch].sum()))


def _packed(rows: np.ndarray, lengths: np.ndarray, max_texts: int, max_tokens: int) -> list[np.ndarray]:
    """Fill batches in the order of `rows`."""
    found: list[list[int]] = []
    n_tokens = 0
    for row in rows:
        n_tokens += int(lengths[row])
        if not found or n_tokens > max_tokens or len(found[-1]) == max_texts:
            found.append([])
            n_tokens = int(lengths[row])
        found[-1].append(int(row))
    return [np.array(batch) for batch in found]

"""Groups texts into batches for scoring, by length, so that little or no padding is computed."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

MAX_TOKENS = 1024
"""The most tokens of a batch. Fewer take longer per token; more are no faster and are harder to share out equally."""
MIN_TOKENS = 64
"""A batch of this many tokens or fewer is not divided among the workers."""
MANY_BATCHES = 16
"""From this number of batches on, one batch more or less hardly changes the time."""


def tokens_per_batch(n_tokens: int, n_workers: int) -> int:
    """Return how many tokens a batch may have, so that all workers finish at about the same time.

    >>> tokens_per_batch(1400, 2), tokens_per_batch(3000, 2), tokens_per_batch(20, 2)
    (704, 768, 64)
    """
    n_rounds = max(1, math.ceil(n_tokens / (n_workers * MAX_TOKENS)))
    return max(MIN_TOKENS, round_up(math.ceil(n_tokens / (n_workers * n_rounds))))


def round_up(n: int) -> int:
    """Return `n` rounded up, by at most an eighth, to one of the eight sizes between two powers of two.

    TensorFlow keeps a compiled program for every shape that it has run, in every thread. With rounded sizes there are
    few shapes.

    >>> [round_up(n) for n in (5, 15, 17, 100, 1000)]
    [5, 15, 18, 104, 1024]
    """
    step = 1 << max(0, n.bit_length() - 4)
    return -(-n // step) * step


def make_batches(
    lengths: Sequence[int] | np.ndarray, *, max_texts: int | None = None, max_tokens: int = MAX_TOKENS
) -> list[np.ndarray]:
    """Divide texts into batches.

    Texts of one length fill batches together, which then need no padding. What remains of each length is put together
    with the texts of the nearest lengths. Where there are many batches, the last of them is filled up: it contains some
    texts twice, so that it has a size that other batches have too (see `round_up`).

    Parameters
    ----------
    lengths : sequence of int
        The number of tokens of each text.
    max_texts : int, optional
        The most texts in a batch.
    max_tokens : int
        The most tokens in a batch. A longer text is a batch alone.

    Returns
    -------
    list of ndarray of int
        The indices of the texts of each batch. Batches with most tokens come first.

    Examples
    --------
    >>> [batch.tolist() for batch in make_batches([4, 2, 4, 3, 2, 2], max_tokens=8)]
    [[0, 2], [3, 1, 4], [5]]
    """
    lengths = np.asarray(lengths, dtype=int)
    max_texts = len(lengths) if max_texts is None else max_texts
    are_many = lengths.sum() >= MANY_BATCHES * max_tokens
    max_padded = max_tokens if are_many else 2 * max_tokens
    if 0 < len(lengths) <= max_texts and lengths.sum() <= max_tokens and len(lengths) * lengths.max() <= max_padded:
        return [np.arange(len(lengths))]

    def full_size(length: int) -> int:
        return min(max_texts, max(1, max_tokens // length))

    batches: list[np.ndarray] = []
    rest: list[int] = []
    for length in np.unique(lengths)[::-1].tolist():
        rows = np.flatnonzero(lengths == length)
        size = full_size(length)
        n_full = len(rows) // size * size
        batches += np.split(rows[:n_full], range(size, n_full, size)) if n_full else []
        rest += rows[n_full:].tolist()
    batches += _pack(rest, lengths, max_texts, max_tokens, max_padded)
    if rest and are_many:
        batches[-1] = np.resize(batches[-1], full_size(int(lengths[batches[-1]].max())))
    return sorted(batches, key=lambda batch: -int(lengths[batch].sum()))


def _pack(
    rows: Sequence[int], lengths: np.ndarray, max_texts: int, max_tokens: int, max_padded: int
) -> list[np.ndarray]:
    """Fill batches with `rows` in the given order, which is by falling length.

    `max_padded` bounds a batch's tokens after padding to its longest text, since attention computes the padding too.
    """
    batches: list[list[int]] = []
    n_tokens = longest = 0
    for row in rows:
        n_tokens += int(lengths[row])
        n_texts = len(batches[-1]) + 1 if batches else 1
        if not batches or n_tokens > max_tokens or n_texts > max_texts or n_texts * longest > max_padded:
            batches.append([])
            n_tokens = longest = int(lengths[row])
        batches[-1].append(row)
    return [np.array(batch) for batch in batches]

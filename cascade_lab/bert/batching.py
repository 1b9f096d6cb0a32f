"""Which texts are scored together: batches of one length where there are enough, the rest packed by length."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

MAX_TOKENS = 1024  # of a batch: fewer take longer a token, more are no faster and divide less evenly
MIN_TOKENS = 64  # below which a batch is not divided any more
MANY = 16  # batches, of which one more or less does not matter


def even_share(n_tokens: int, callers: int) -> int:
    """Return how many tokens a batch may have for callers that work side by side to end at about the same time.

    >>> even_share(1400, 2), even_share(3000, 2), even_share(20, 2)
    (704, 768, 64)
    """
    rounds = max(1, math.ceil(n_tokens / (callers * MAX_TOKENS)))
    return max(MIN_TOKENS, rounded_up(math.ceil(n_tokens / (callers * rounds))))


def rounded_up(n: int) -> int:
    """Return `n` or up to an eighth more: one of the eight sizes from a power of two to the next.

    Every shape that occurs is held as a program of its own, by every thread; so few should occur.

    >>> [rounded_up(n) for n in (5, 15, 17, 100, 1000)]
    [5, 15, 18, 104, 1024]
    """
    step = 1 << max(0, n.bit_length() - 4)
    return -(-n // step) * step


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
        what remains of each length is put together with its neighbours'. The last of many batches has some texts more
        than once, for its size to be one that occurs anyway.

    >>> [batch.tolist() for batch in batches([4, 2, 4, 3, 2, 2], max_tokens=8)]
    [[0, 2], [3, 1, 4], [5]]
    """
    lengths = np.asarray(lengths, dtype=int)
    max_texts = len(lengths) if max_texts is None else max_texts
    are_many = lengths.sum() >= MANY * max_tokens
    max_padded = max_tokens if are_many else 2 * max_tokens
    if 0 < len(lengths) <= max_texts and lengths.sum() <= max_tokens and len(lengths) * lengths.max() <= max_padded:
        return [np.arange(len(lengths))]

    def size(length: int) -> int:
        return min(max_texts, max(1, max_tokens // length))

    found, rest = [], []
    for length in np.unique(lengths)[::-1].tolist():
        rows = np.flatnonzero(lengths == length)
        n_full = len(rows) // size(length) * size(length)
        found += np.split(rows[:n_full], range(size(length), n_full, size(length))) if n_full else []
        rest += rows[n_full:].tolist()
    found += _packed(rest, lengths, max_texts, max_tokens, max_padded)
    if rest and are_many:
        found[-1] = np.resize(found[-1], size(int(lengths[found[-1]].max())))
    return sorted(found, key=lambda batch: -int(lengths[batch].sum()))


def _packed(
    rows: Sequence[int], lengths: np.ndarray, max_texts: int, max_tokens: int, max_padded: int
) -> list[np.ndarray]:
    """Fill batches in the order of `rows`, which is that of falling lengths.

    Padded to its longest text, none is of more than `max_padded` tokens: in a grid of that size its heads attend.
    """
    found: list[list[int]] = []
    n_tokens = longest = 0
    for row in rows:
        n_tokens += int(lengths[row])
        n_texts = len(found[-1]) + 1 if found else 1
        if not found or n_tokens > max_tokens or n_texts > max_texts or n_texts * longest > max_padded:
            found.append([])
            n_tokens = longest = int(lengths[row])
        found[-1].append(row)
    return [np.array(batch) for batch in found]

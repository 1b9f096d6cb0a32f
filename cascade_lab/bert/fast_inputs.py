"""Makes the inputs of the fast graph from a batch of token ids, and chooses the form of the graph that scores it."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from cascade_lab.bert.batching import round_up
from cascade_lab.bert.tokenization import Encoding

SMALL_MIN_TOKENS, SMALL_MAX_TOKENS = 8, 64
"""The smallest and the largest number of rows for which oneDNN's float32 products have one layout of packed weights."""
_MASKED = -1e9  # added to the attention scores of padding, as bert-tensorflow adds -10000: their weight becomes 0


def feed(batch: Sequence[Encoding], n_segments: int, *, small: bool = False) -> tuple[str, list[np.ndarray]]:
    """Return which form of the graph a batch needs, and the arrays for its inputs.

    Parameters
    ----------
    batch : sequence of Encoding
    n_segments : int
        The config's `type_vocab_size`.
    small : bool
        The graph has the form `small`.

    Returns
    -------
    form : {"uniform", "ragged", "small"}
        All texts of the batch have one length; any batch; a batch of few tokens.
    arrays : list of ndarray
        `input_ids`, shape (n_tokens,): the tokens of all texts, concatenated.
        `position_rows`, shape (n_tokens,): each token's row in the table of position and segment embeddings.
        `grid`, shape (n, length): for each text and position, the index of that token in `input_ids`.

        For the other forms also `slots`, shape (n_tokens,): each token's index in the flattened grid; and `mask`,
        shape (n, length): 0 at a token, a large negative number at padding. In these forms n_tokens and n are
        rounded up, and the logits have extra rows.
    """
    lengths = np.array([len(encoding.input_ids) for encoding in batch])
    longest, n_tokens = int(lengths.max()), int(lengths.sum())
    is_small = small and n_tokens <= SMALL_MAX_TOKENS
    is_uniform = not is_small and bool((lengths == longest).all())
    size = n_tokens if is_uniform else max(round_up(n_tokens), SMALL_MIN_TOKENS if is_small else 0)
    # The tokens that rounding adds are [PAD] at position 0 and belong to no text.
    input_ids, position_rows = np.zeros((2, size), dtype=np.int32)
    input_ids[:n_tokens] = np.concatenate([encoding.input_ids for encoding in batch])
    starts = np.cumsum(lengths) - lengths
    position = np.arange(n_tokens) - np.repeat(starts, lengths)
    segment = position >= np.repeat([encoding.n_first for encoding in batch], lengths)
    position_rows[:n_tokens] = position * n_segments + segment
    if is_uniform:
        return "uniform", [input_ids, position_rows, np.arange(n_tokens, dtype=np.int32).reshape(len(batch), longest)]
    is_token = np.zeros((round_up(len(batch)), longest), dtype=bool)
    is_token[: len(batch)] = np.arange(longest) < lengths[:, None]
    grid = np.zeros(is_token.shape, dtype=np.int32)
    grid[is_token] = np.arange(n_tokens)
    slots = np.zeros(size, dtype=np.int32)
    slots[:n_tokens] = np.flatnonzero(is_token)
    mask = np.where(is_token, 0, _MASKED).astype(np.float32)
    return "small" if is_small else "ragged", [input_ids, position_rows, grid, slots, mask]

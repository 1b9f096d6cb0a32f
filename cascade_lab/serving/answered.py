"""What the service hands to its traffic log: one answered batch, with the logits of every stage that scored it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np


class SeenRows(NamedTuple):
    """What one stage scored of a batch.

    Attributes
    ----------
    rows : ndarray of int, shape (n,)
        Rows of the batch, in increasing order.
    logits : ndarray of float32, shape (n, n_labels)
    rescored : ndarray of bool, shape (n,), or None
        As in `StageOutput`.
    """

    rows: np.ndarray
    logits: np.ndarray
    rescored: np.ndarray | None = None


@dataclass(frozen=True)
class ServedCascade:
    """Which cascade answers: its digest, and what a run's manifest says of it.

    Attributes
    ----------
    digest : str
        SHA-256, as hexadecimal digits, of the spec (without paths) and of the content of every file. Two cascades with
        one digest give the same answers.
    manifest : mapping
        The keys of a run's `manifest.json` that describe the cascade: `cascade` (the spec's `to_dict()`), `thresholds`,
        `tuned_on`, `inputs`, `stages`, and those of `provenance.environment()`.
    """

    digest: str
    manifest: Mapping[str, Any]


@dataclass(frozen=True)
class Answered:
    """One answered batch. Row i of everything belongs to text i.

    Attributes
    ----------
    cascade : ServedCascade
        The cascade that answered the whole batch. Another one may answer the next batch, after a reload.
    ids : list of str
        The id of each text, as the client gave it or as the service made it.
    times : ndarray of float64, shape (n,)
        When each text arrived, in seconds since 1970 (UTC).
    texts : list of str
        Empty where the traffic log needs no texts.
    texts_b : list of str or None, or None
        The second texts; None where no text of the batch has one, or the traffic log needs none.
    predictions : mapping of str to ndarray, shape (n,)
        The columns that `Cascade.predict` returns, as `ChunkResult.columns` does: a table costs half a millisecond.
    scores : dict of str to SeenRows
        Stage name to what it scored; a stage that scored nothing has no rows.
    evidence : dict of str to ndarray of float64
        `<stage>.<score>` to a rejector's score of features, shape (n,); NaN where no stage needed it. Empty unless
        a rejector needs them.
    """

    cascade: ServedCascade
    ids: list[str]
    times: np.ndarray
    texts: list[str]
    texts_b: list[str | None] | None
    predictions: Mapping[str, np.ndarray]
    scores: dict[str, SeenRows]
    evidence: dict[str, np.ndarray]

    @property
    def digest(self) -> str:
        """The digest of the cascade that answered."""
        return self.cascade.digest

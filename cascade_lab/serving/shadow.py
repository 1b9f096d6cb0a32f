"""Shadow scoring of a service: a share of the texts that end early is scored by the later stages, when idle."""

from __future__ import annotations

import threading
from collections import deque
from hashlib import blake2b
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import pandas as pd

from cascade_lab.exceptions import CascadeLabError
from cascade_lab.serving.answered import Answered, SeenRows, ServedCascade
from cascade_lab.serving.log_files import ShadowScores

if TYPE_CHECKING:
    from cascade_lab.cascade import Cascade

MAX_WAITING = 1000
"""The most texts that wait for shadow scoring; of further ones nothing is kept."""


class _Text(NamedTuple):
    cascade: ServedCascade
    example_id: str
    time: float
    text: str
    text_b: str | None
    scored_by: frozenset[str]


class ShadowQueue:
    """The texts that wait for shadow scoring. It may be used from several threads.

    Parameters
    ----------
    share : float
        The share of the texts that is chosen, from 0 to 1; see `is_chosen`.

    Attributes
    ----------
    n_dropped : int
        How many chosen texts were not scored: too many waited, or another cascade answered meanwhile.
    """

    def __init__(self, share: float):
        self.share, self.n_dropped = share, 0
        self._waiting: deque[_Text] = deque()
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return len(self._waiting)

    def add(self, answered: Answered) -> None:
        """Let the chosen texts wait that some stage did not score."""
        if not self.share:
            return
        n_scored = np.zeros(len(answered.ids), dtype=int)
        for seen in answered.scores.values():
            n_scored[seen.rows] += 1
        early = np.flatnonzero(n_scored < len(answered.scores))
        for row in early[is_chosen([answered.ids[row] for row in early], self.share)]:
            scored_by = frozenset(name for name, seen in answered.scores.items() if row in seen.rows)
            second = None if answered.texts_b is None else answered.texts_b[row]
            time, text = float(answered.times[row]), answered.texts[row]
            with self._lock:
                if len(self._waiting) < MAX_WAITING:
                    self._waiting.append(_Text(answered.cascade, answered.ids[row], time, text, second, scored_by))
                else:
                    self.n_dropped += 1

    def score(self, cascade: Cascade, served: ServedCascade, *, n_texts: int) -> ShadowScores | None:
        """Score up to `n_texts` of the waiting texts; return None where none waits for this cascade.

        Parameters
        ----------
        cascade : Cascade
            It scores in the calling thread.
        served : ServedCascade
            What `cascade` is. Texts that another one answered are dropped.
        n_texts : int
        """
        with self._lock:
            texts = [self._waiting.popleft() for _ in range(min(n_texts, len(self._waiting)))]
        own = [text for text in texts if text.cascade.digest == served.digest]
        self.n_dropped += len(texts) - len(own)
        if not own:
            return None
        try:
            return _score(cascade, served, own)
        except CascadeLabError:  # logits that are not finite
            self.n_dropped += len(own)
            return None


def is_chosen(ids: list[str] | pd.Series, share: float) -> np.ndarray:
    """Return which texts are in a random share of all texts: bool, shape (n,).

    The id alone decides (its BLAKE2b hash, as a fraction of the largest one), so that the choice can be repeated, and
    does not depend on the text or on its answer.

    >>> is_chosen(["a", "b"], 1.0).tolist()
    [True, True]
    """
    digests = b"".join(blake2b(one.encode("utf-8", "replace"), digest_size=8).digest() for one in ids)
    return np.frombuffer(digests, dtype=">u8").astype(np.float64) / 2.0**64 < share


def _score(cascade: Cascade, served: ServedCascade, texts: list[_Text]) -> ShadowScores:
    """Score texts with the stages that did not score them; where a rejector needs features, with all stages."""
    needs_features = bool(cascade.spec.feature_evidence)
    every, scores, outputs = np.arange(len(texts)), {}, {}
    for stage in cascade.stages:
        name = stage.spec.name
        missing = np.array([row for row in every if name not in texts[row].scored_by], dtype=int)
        rows = every if needs_features else missing
        if not len(rows):
            continue
        chosen = [texts[row] for row in rows]
        second = [text.text_b for text in chosen]
        encodings = stage.encode([text.text for text in chosen], second if any(second) else None)
        output, _ = stage.score(encodings)
        outputs[name] = output
        scores[name] = SeenRows(missing, output.logits[missing] if needs_features else output.logits)
    evidence: dict[str, np.ndarray] = {}
    for spec in cascade.spec.stages if needs_features else ():
        evidence |= cascade.decide(spec, outputs)[1]
    ids, times = [text.example_id for text in texts], np.array([text.time for text in texts])
    return ShadowScores(served, ids, times, scores, evidence)

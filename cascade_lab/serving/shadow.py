"""Shadow scoring of a service: a share of the texts that end early is scored by the later stages, when idle."""

from __future__ import annotations

import threading
from collections import deque
from hashlib import blake2b
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import pandas as pd

from cascade_lab.exceptions import CascadeLabError
from cascade_lab.mixed_precision import is_mixed
from cascade_lab.mixed_scoring import score_shadow
from cascade_lab.serving.answered import Answered, SeenRows, ServedCascade
from cascade_lab.serving.log_files import ShadowScores
from cascade_lab.stage_output import ScoredRows

if TYPE_CHECKING:
    from cascade_lab.cascade import Cascade

MAX_WAITING = 1000
"""The most chosen texts that wait for their turn; further ones get none."""


class _Text(NamedTuple):
    cascade: ServedCascade
    example_id: str
    time: float
    text: str  # empty where every stage has scored it already
    text_b: str | None
    scored_by: frozenset[str]


class ShadowQueue:
    """The chosen texts, which wait until it is their turn. It may be used from several threads.

    Each chosen text waits, also one that every stage has scored already. Such a text has nothing to be scored, but
    without a turn it would always be in the sample, and a text that ended early only if there was time to score it.
    So whether a text gets its turn depends on how many texts came before it, and not on its own answer.

    Parameters
    ----------
    share : float
        The share of the texts that is chosen, from 0 to 1; see `is_chosen`.

    Attributes
    ----------
    n_dropped : int
        How many chosen texts got no turn: too many waited, or another cascade answered meanwhile.
    """

    def __init__(self, share: float):
        self.share, self.n_dropped = share, 0
        self._waiting: deque[_Text] = deque()
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return len(self._waiting)

    def add(self, answered: Answered) -> None:
        """Let the chosen texts wait."""
        if not self.share:
            return
        for row in np.flatnonzero(is_chosen(answered.ids, self.share)):
            scored_by = frozenset(name for name, seen in answered.scores.items() if row in seen.rows)
            time, text, second = float(answered.times[row]), "", None
            if len(scored_by) < len(answered.scores):
                text, second = answered.texts[row], None if answered.texts_b is None else answered.texts_b[row]
            with self._lock:
                if len(self._waiting) < MAX_WAITING:
                    self._waiting.append(_Text(answered.cascade, answered.ids[row], time, text, second, scored_by))
                else:
                    self.n_dropped += 1

    def score(self, cascade: Cascade, served: ServedCascade, *, n_texts: int) -> ShadowScores | None:
        """Take up to `n_texts` of the waiting texts, and score them with the stages that did not.

        Returns None where none waits for this cascade.

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
    """Score texts with the stages that did not score them; where a rejector needs other stages' scores, with all."""
    needs_features = bool(cascade.spec.feature_evidence)
    needs_all = needs_features or any(is_mixed(stage) and stage.rejector for stage in cascade.spec.stages)
    n_stages = len(cascade.stages)
    early = [text for text in texts if len(text.scored_by) < n_stages]
    texts = [*early, *(text for text in texts if len(text.scored_by) == n_stages)]
    every, scores, outputs = np.arange(len(early)), {}, {}
    parts: dict[str, list[ScoredRows]] = {}
    for stage in cascade.stages:
        name = stage.spec.name
        missing = np.array([row for row in every if name not in early[row].scored_by], dtype=int)
        rows = every if needs_all else missing
        if not len(rows):
            continue
        chosen = [early[row] for row in rows]
        second = [text.text_b for text in chosen]
        encodings = stage.encode(
            [text.text for text in chosen], second if any(one is not None for one in second) else None
        )
        output = score_shadow(cascade, stage, rows, encodings, parts)
        parts[name], outputs[name] = [ScoredRows(rows, output)], output
        own = output.take(missing) if needs_all else output
        scores[name] = SeenRows(missing, own.logits, own.rescored)
    evidence: dict[str, np.ndarray] = {}
    for spec in cascade.spec.stages if needs_features and early else ():
        evidence |= cascade.decide(spec, outputs)[1]
    rest = np.full(len(texts) - len(early), np.nan)
    evidence = {name: np.append(values, rest) for name, values in evidence.items()}
    ids, times = [text.example_id for text in texts], np.array([text.time for text in texts])
    return ShadowScores(served, ids, times, scores, evidence)

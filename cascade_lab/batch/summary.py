"""What a job counts while it scores: labels, reach, confidence histograms. Sums of shards; no second pass."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from cascade_lab.chunks import ChunkResult

N_BINS = 50
"""The bins of a histogram: equal parts of [0, 1]; the last one contains 1."""
MAX_REASONS = 100
"""The most different errors that are counted by their text."""


@dataclass
class Counts:
    """What is counted of texts.

    Attributes
    ----------
    n_texts, n_errors : int
        All rows, and those that could not be scored.
    errors, predicted, decided_by : Counter
        Numbers of rows by the reason, by the predicted label and by the deciding stage.
    reached : Counter
        Stage name to the number of texts that reached it.
    confidence : dict of str to ndarray of int, shape (N_BINS,)
        Stage name to the histogram of the confidences of its answers.
    probability : dict of str to ndarray of int, shape (N_BINS,)
        Stage name to the histogram over all texts that it scored: a gate's probability of its pass label, another
        stage's highest probability.
    """

    n_texts: int
    n_errors: int
    errors: Counter[str]
    predicted: Counter[str]
    decided_by: Counter[str]
    reached: Counter[str]
    confidence: dict[str, np.ndarray]
    probability: dict[str, np.ndarray]

    @classmethod
    def empty(cls, stages: Iterable[str]) -> Counts:
        names = list(stages)
        histograms = [{name: np.zeros(N_BINS, dtype=int) for name in names} for _ in range(2)]
        reached: Counter[str] = Counter(dict.fromkeys(names, 0))
        return cls(0, 0, Counter(), Counter(), Counter(dict.fromkeys(names, 0)), reached, *histograms)

    def add_errors(self, n_texts: int, errors: Sequence[str]) -> None:
        """Count rows, and those among them that cannot be scored. The place in an error does not count."""
        self.n_texts += n_texts
        self.n_errors += len(errors)
        self.errors.update(error.rpartition(": ")[2] for error in errors)

    def add_result(self, result: ChunkResult) -> None:
        """Count what was computed for a block."""
        routed = result.routed
        self.predicted.update(routed.predicted.tolist())
        for name, scored in result.scored.items():
            ends = routed.decided_by == name
            self.reached[name] += len(scored.rows)
            self.decided_by[name] += int(ends.sum())
            self.confidence[name] += histogram(routed.confidence[ends])
            self.probability[name] += histogram(result.probability[name])

    def add(self, other: Counts) -> None:
        """Add the counts of other texts."""
        self.n_texts += other.n_texts
        self.n_errors += other.n_errors
        for key in ("errors", "predicted", "decided_by", "reached"):
            for name, n in getattr(other, key).items():  # Counter.update would drop nothing, but keeps the order too
                getattr(self, key)[name] += n
        for key in ("confidence", "probability"):
            for name, counts in getattr(other, key).items():
                own = getattr(self, key)
                own[name] = own[name] + counts if name in own else counts

    def to_dict(self) -> dict[str, Any]:
        """Return the counts as plain data for a manifest, labels sorted by their number."""
        common = self.errors.most_common()
        if len(common) > MAX_REASONS:
            rest = sum(n for _, n in common[MAX_REASONS:])
            common = [*common[:MAX_REASONS], ("other errors", rest)]
        return {
            "n_texts": self.n_texts,
            "n_errors": self.n_errors,
            "errors": dict(common),
            "predicted": dict(sorted(self.predicted.items(), key=lambda item: (-item[1], item[0]))),
            "reached": dict(self.reached),
            "decided_by": dict(self.decided_by),
            "confidence": {name: counts.tolist() for name, counts in self.confidence.items()},
            "probability": {name: counts.tolist() for name, counts in self.probability.items()},
        }

    @classmethod
    def from_dict(cls, content: Mapping[str, Any]) -> Counts:
        """Read what `to_dict` returns."""
        counts: dict[str, Any] = {key: content[key] for key in ("n_texts", "n_errors")}
        counts |= {key: Counter(content[key]) for key in ("errors", "predicted", "decided_by", "reached")}
        for key in ("confidence", "probability"):
            counts[key] = {name: np.array(bins, dtype=int) for name, bins in content[key].items()}
        return cls(**counts)


def histogram(values: np.ndarray) -> np.ndarray:
    """Return how many values from 0 to 1 are in each of `N_BINS` bins of equal width.

    >>> histogram(np.array([0.0, 0.019, 0.02, 1.0])).nonzero()[0].tolist()
    [0, 1, 49]
    """
    return np.bincount(np.minimum((np.asarray(values) * N_BINS).astype(int), N_BINS - 1), minlength=N_BINS)

"""Find the texts of a run that are most similar to some of its texts: by kept features, or by their characters."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import pandas as pd

from cascade_lab.analysis.duplicates import normalized
from cascade_lab.exceptions import RunError

if TYPE_CHECKING:
    from cascade_lab.run import Run

By = Literal["features", "characters"]
"""What the similarity of two texts is computed from."""

N_GRAMS = (1, 4)
MAX_CHARACTERS = 500
"""The characters of a text that are compared."""
COLUMNS = ["example_id", "similar_id", "similarity", "text", "label", "predicted"]
MAX_SIMILARITIES = 4_000_000
"""The most similarities that are computed at once: about 50 MB."""
MAX_TEXTS = 20_000
"""A larger run is searched in a random sample of this number of its texts."""


class SimilarTexts:
    """The texts of a run, prepared to find those that are most similar to one of them.

    Parameters
    ----------
    run : Run
        With more than `MAX_TEXTS` texts it is searched in a random sample, the same every time.
    by : {"features", "characters"}, optional
        `"features"`: the cosine of the last stage's kept features, its output at `[CLS]`. `"characters"`: the cosine of
        the TF-IDF vectors over n-grams of 1 to 4 characters, which needs no words between spaces and so suits Chinese
        too. By default features where the run kept them for every text, otherwise characters.

    Attributes
    ----------
    run : Run
    by : str

    Raises
    ------
    RunError
        The run did not keep the features that `by` asks for.
    """

    def __init__(self, run: Run, *, by: By | None = None):
        kept = run.has_features and bool(run.scores(run.spec.last.name).scored.all())
        self.run = run
        self.by: By = by or ("features" if kept else "characters")
        self._ids = pd.Index(run.examples["example_id"])
        n_texts = len(self._ids)
        sample = np.random.default_rng(0).choice(n_texts, min(n_texts, MAX_TEXTS), replace=False)
        self._sample = np.sort(sample)
        if self.by == "features":
            self._vectors: Any = _features(run)
        else:
            vectorizer = text_vectorizer().fit(_texts(run.examples.iloc[self._sample]))
            self._vectors, self._vectorizer = vectorizer.transform(_texts(run.examples.iloc[self._sample])), vectorizer

    def find(self, example_ids: Sequence[str], n: int = 3) -> pd.DataFrame:
        """Return the `n` most similar texts of each of some texts, the most similar first.

        Returns
        -------
        DataFrame
            `example_id`, `similar_id`, `similarity` (at most 1), and the `text`, `label` and `predicted` of the similar
            text.

        Raises
        ------
        RunError
            The run has no such example.
        """
        rows = self._ids.get_indexer(list(example_ids))
        if not len(rows) or not n:
            return pd.DataFrame(columns=COLUMNS)
        if (rows < 0).any():
            raise RunError(f"{self.run.name}: has no example '{list(example_ids)[int(np.argmin(rows))]}'")
        examples = self.run.examples
        if self.by == "features":
            vectors, others = self._vectors[rows], self._vectors[self._sample]
        else:
            vectors, others = self._vectorizer.transform(_texts(examples.iloc[rows])), self._vectors
        places = np.searchsorted(self._sample, rows).clip(max=max(0, len(self._sample) - 1))
        itself = np.where(self._sample[places] == rows, places, -1)
        nearest, similarity = nearest_rows(vectors, others, n, itself=itself)
        found = nearest >= 0
        similar = self._sample[nearest[found]]
        return pd.DataFrame(
            {
                "example_id": self._ids.to_numpy()[np.repeat(rows, found.sum(axis=1))],
                "similar_id": self._ids.to_numpy()[similar],
                "similarity": similarity[found],
                "text": examples["text"].to_numpy()[similar],
                "label": examples["label"].to_numpy()[similar],
                "predicted": self.run.predictions["predicted"].to_numpy()[similar],
            }
        )


def nearest_rows(
    vectors: Any, others: Any, n: int, *, itself: np.ndarray | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """Return the `n` rows of a matrix that are most similar to each row of another, and their similarities.

    Parameters
    ----------
    vectors, others : ndarray or sparse matrix, shapes (n_rows, n_dimensions) and (n_others, n_dimensions)
        Rows of length 1, so that a product is a cosine.
    n : int
    itself : ndarray of int, shape (n_rows,), optional
        The row of `others` that is the row itself, which is never found; -1 where it is not among them.

    Returns
    -------
    nearest : ndarray of int, shape (n_rows, n)
        The most similar first; equally similar rows in their order. -1 where there is no other row.
    similarity : ndarray of float, shape (n_rows, n)
        NaN where there is no other row.

    Examples
    --------
    >>> vectors = np.array([[1, 0], [0, 1], [0.6, 0.8]])
    >>> nearest, similarity = nearest_rows(vectors[1:2], vectors, 2, itself=np.array([1]))
    >>> nearest.tolist(), similarity.tolist()
    ([[2, 0]], [[0.8, 0.0]])
    """
    n_rows, n_others = vectors.shape[0], others.shape[0]
    nearest, similarity = np.full((n_rows, n), -1), np.full((n_rows, n), np.nan)
    n_best = min(n, n_others)
    step = max(1, MAX_SIMILARITIES // max(1, n_others))
    for start in range(0, n_rows, step) if n_best else ():
        block = vectors[start : start + step] @ others.T
        cosines = block if isinstance(block, np.ndarray) else block.toarray()
        if itself is not None:
            among = np.flatnonzero(itself[start : start + step] >= 0)
            cosines[among, itself[start : start + step][among]] = -np.inf
        best = np.argsort(-cosines, axis=1, kind="stable")[:, :n_best]
        values = np.take_along_axis(cosines, best, axis=1)
        nearest[start : start + step, :n_best] = np.where(values > -np.inf, best, -1)
        similarity[start : start + step, :n_best] = np.where(values > -np.inf, np.minimum(values, 1), np.nan)
    return nearest, similarity


def text_vectorizer() -> Any:
    """Return scikit-learn's TF-IDF vectorizer over n-grams of 1 to 4 characters of a text.

    Case, punctuation, white space and Unicode forms are ignored (`duplicates.normalized`).
    """
    from sklearn.feature_extraction.text import TfidfVectorizer  # slow to import

    return TfidfVectorizer(
        analyzer="char", ngram_range=N_GRAMS, preprocessor=_prepared, sublinear_tf=True, dtype=np.float32
    )


def _prepared(text: str) -> str:
    """Return a normalized text with a space at both ends, so that its ends count."""
    return f" {normalized(text)} "


def _texts(examples: pd.DataFrame) -> list[str]:
    return [
        f"{text[:MAX_CHARACTERS]} {text_b[:MAX_CHARACTERS]}" if isinstance(text_b, str) else text[:MAX_CHARACTERS]
        for text, text_b in zip(examples["text"], examples["text_b"], strict=True)
    ]


def _features(run: Run) -> np.ndarray:
    """Return the last stage's features as float32 vectors of length 1."""
    stage = run.spec.last.name
    features = run.features(stage).astype(np.float32)
    if np.isnan(features).any():
        raise RunError(f"{run.name}: stage '{stage}' has no features of some texts; use by='characters'")
    return features / np.maximum(np.linalg.norm(features, axis=1, keepdims=True), 1e-12)

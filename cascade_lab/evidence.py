"""Scores of one stage's logits and features that tell how likely a text is in scope: energy, margin, distances."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import NamedTuple

import numpy as np

GEN_GAMMA, GEN_CLASSES = 0.1, 100
KNN_K = 10
_BLOCK = 4096


class Score(NamedTuple):
    """How a score is computed: from logits (`function(logits)`), or from features (`function(features, arrays)`)."""

    function: Callable[..., np.ndarray]
    arrays: tuple[str, ...] = ()

    @property
    def of_features(self) -> bool:
        """Whether the score needs the stage's features, and arrays that `fit_arrays` makes."""
        return bool(self.arrays)


def max_probability(logits: np.ndarray) -> np.ndarray:
    """Return the highest probability of each row of logits, shape (n,).

    Every function of logits here takes an array of shape (n, n_labels), already divided by the stage's temperature,
    and returns float64, shape (n,); NaN where the row is NaN.

    >>> max_probability(np.array([[0.0, 0.0], [0.0, np.log(3.0)]])).round(2).tolist()
    [0.5, 0.75]
    """
    z = np.asarray(logits, dtype=np.float64)
    return np.asarray(1 / np.exp(z - z.max(axis=1, keepdims=True)).sum(axis=1))


def max_logit(logits: np.ndarray) -> np.ndarray:
    """Return the largest logit (Hendrycks et al. 2022)."""
    return np.asarray(logits, dtype=np.float64).max(axis=1)


def energy(logits: np.ndarray) -> np.ndarray:
    """Return the logarithm of the sum of the exponentials of the logits: the negative energy of Liu et al. (2020).

    >>> energy(np.log([[1.0, 2.0, 3.0]])).round(6).tolist() == np.log([6.0]).round(6).tolist()
    True
    """
    z = np.asarray(logits, dtype=np.float64)
    highest = z.max(axis=1)
    return np.asarray(highest + np.log(np.exp(z - highest[:, None]).sum(axis=1)))


def margin(logits: np.ndarray) -> np.ndarray:
    """Return the largest logit minus the second largest: the logarithm of the ratio of the two highest probabilities.

    >>> margin(np.array([[3.0, 1.0, 0.5]])).tolist()
    [2.0]
    """
    z = np.asarray(logits, dtype=np.float64)
    second, first = np.partition(z, -2, axis=1)[:, -2:].T
    return np.where(np.isnan(z[:, 0]), np.nan, first - second)


def entropy(logits: np.ndarray) -> np.ndarray:
    """Return the entropy of the probabilities, in nats (Shannon 1948)."""
    log_p = _log_softmax(logits)
    return np.asarray(-(np.exp(log_p) * log_p).sum(axis=1))


def gen(logits: np.ndarray) -> np.ndarray:
    """Return the generalized entropy, sum of p^0.1 (1 - p)^0.1 over the 100 most probable labels (Liu et al. 2023)."""
    p = np.exp(_log_softmax(logits))
    if p.shape[1] > GEN_CLASSES:
        p = np.sort(p, axis=1)[:, -GEN_CLASSES:]  # sorted, so that the sum does not depend on the partition's order
    return np.asarray((p**GEN_GAMMA * np.clip(1 - p, 0, 1) ** GEN_GAMMA).sum(axis=1))


def log_odds(logits: np.ndarray, column: int | None = None) -> np.ndarray:
    """Return log(p / (1 - p)) of one label, by default of the most probable one.

    >>> log_odds(np.array([[0.0, 2.0]]), 1).tolist()
    [2.0]
    """
    z = np.asarray(logits, dtype=np.float64)
    columns = z.argmax(axis=1) if column is None else np.full(len(z), column)
    rows = np.arange(len(z))
    others = z.copy()
    others[rows, columns] = -np.inf
    return np.asarray(z[rows, columns] - energy(others))


def mahalanobis(features: np.ndarray, arrays: Mapping[str, np.ndarray]) -> np.ndarray:
    """Return the Mahalanobis distance to the nearest class of the training texts (Lee et al. 2018).

    Parameters
    ----------
    features : ndarray of float16, shape (n, hidden)
    arrays : mapping of str to ndarray
        `whitening`, shape (hidden, hidden): W with W Wᵀ the inverse of the covariance within classes; `class_means`,
        shape (n_classes, hidden), already multiplied by W.

    Returns
    -------
    ndarray of float64, shape (n,)
        NaN where the row of features is NaN.
    """
    return np.sqrt(_nearest_class(features, arrays["whitening"], arrays["class_means"]))


def relative_mahalanobis(features: np.ndarray, arrays: Mapping[str, np.ndarray]) -> np.ndarray:
    """Return the squared Mahalanobis distance to the nearest class minus that to all training texts (Ren et al. 2021).

    `arrays` holds those of `mahalanobis`, and `all_whitening` and `all_mean`, of all texts as one class.
    """
    nearest = _nearest_class(features, arrays["whitening"], arrays["class_means"])
    return nearest - _nearest_class(features, arrays["all_whitening"], arrays["all_mean"])


def knn(features: np.ndarray, arrays: Mapping[str, np.ndarray]) -> np.ndarray:
    """Return the cosine similarity to the 10th most similar training text (Sun et al. 2022).

    `arrays` holds `neighbours`, float16, shape (n_train, hidden): the features of the training texts, of length 1.
    """
    neighbours = arrays["neighbours"].astype(np.float32)
    k = min(KNN_K, len(neighbours))
    parts = []
    for start in range(0, len(features), _BLOCK):  # a table of all similarities could be too large
        x = np.asarray(features[start : start + _BLOCK], dtype=np.float32)
        similarity = x @ neighbours.T / _norms(x)
        parts.append(np.partition(similarity, -k, axis=1)[:, -k].astype(np.float64))
    return np.concatenate([np.empty(0), *parts])


def _norms(x: np.ndarray) -> np.ndarray:
    """Return the Euclidean norm of each row, shape (n, 1); 1 for rows of zeros, whose cosine with any row is then 0."""
    norms = np.linalg.norm(x, axis=1, keepdims=True)
    return np.where(norms > 0, norms, 1)


SCORES = {
    "max_probability": Score(max_probability),
    "max_logit": Score(max_logit),
    "energy": Score(energy),
    "margin": Score(margin),
    "entropy": Score(entropy),
    "gen": Score(gen),
    "log_odds": Score(log_odds),
    "mahalanobis": Score(mahalanobis, ("whitening", "class_means")),
    "relative_mahalanobis": Score(relative_mahalanobis, ("whitening", "class_means", "all_whitening", "all_mean")),
    "knn": Score(knn, ("neighbours",)),
}
"""Every score by name. `log_odds` of a gate is that of its pass label; of a last stage that has its reject label among
its labels, that of all other labels together."""

HIGH_OUT_OF_SCOPE = ("entropy", "gen", "mahalanobis", "relative_mahalanobis")
"""The scores that are higher for texts out of scope; all others are lower for them."""


def fit_arrays(features: np.ndarray, y_true: np.ndarray, names: set[str]) -> dict[str, np.ndarray]:
    """Return what the scores of features need: means, covariances and neighbours of the training texts.

    The covariance is that of Ledoit and Wolf (2004), which is invertible with fewer texts than dimensions.

    Parameters
    ----------
    features : ndarray, shape (n_train, hidden)
    y_true : ndarray of str, shape (n_train,)
        The classes; training texts that are out of scope are left out before.
    names : set of str
        The arrays that are needed: `Score.arrays` of the scores.

    Returns
    -------
    dict of str to ndarray
        float32; the neighbours float16.
    """
    from sklearn.covariance import LedoitWolf

    x = np.asarray(features, dtype=np.float64)
    arrays = {}
    if names & {"whitening", "class_means"}:
        classes, rows = np.unique(y_true.astype(str), return_inverse=True)
        means = np.stack([x[rows == k].mean(axis=0) for k in range(len(classes))])
        arrays["whitening"] = _whitening(
            LedoitWolf(assume_centered=True, store_precision=False).fit(x - means[rows]).covariance_
        )
        arrays["class_means"] = means @ arrays["whitening"]
    if names & {"all_whitening", "all_mean"}:
        arrays["all_whitening"] = _whitening(LedoitWolf(store_precision=False).fit(x).covariance_)
        arrays["all_mean"] = x.mean(axis=0, keepdims=True) @ arrays["all_whitening"]
    if "neighbours" in names:
        arrays["neighbours"] = x / _norms(x)
    return {
        name: values.astype(np.float16 if name == "neighbours" else np.float32)
        for name, values in arrays.items()
        if name in names
    }


def _log_softmax(logits: np.ndarray) -> np.ndarray:
    z = np.asarray(logits, dtype=np.float64)
    z = z - z.max(axis=1, keepdims=True)
    return np.asarray(z - np.log(np.exp(z).sum(axis=1, keepdims=True)))


def _whitening(covariance: np.ndarray) -> np.ndarray:
    """Return W with W Wᵀ = the inverse of the covariance."""
    values, vectors = np.linalg.eigh(covariance)
    return np.asarray(vectors / np.sqrt(values))


def _nearest_class(features: np.ndarray, whitening: np.ndarray, class_means: np.ndarray) -> np.ndarray:
    """Return the squared distance of each row, after whitening, to the nearest class mean; shape (n,)."""
    z = np.asarray(features, dtype=np.float64) @ whitening
    squared = (z**2).sum(axis=1, keepdims=True) - 2 * z @ class_means.T + (class_means**2).sum(axis=1)
    return np.asarray(squared.min(axis=1).clip(min=0))

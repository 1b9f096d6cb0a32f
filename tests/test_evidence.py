"""Each score of logits and features against another source of the same formula."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.spatial.distance import cdist
from scipy.special import logit, logsumexp, softmax
from scipy.stats import entropy as scipy_entropy
from sklearn.covariance import LedoitWolf
from sklearn.neighbors import NearestNeighbors

from cascade_lab.evidence import KNN_K, SCORES, fit_arrays, log_odds

LOGITS = np.random.default_rng(0).normal(scale=4, size=(50, 7)).astype(np.float32)


def test_scores_of_logits_equal_scipys_formulas():
    z = LOGITS.astype(np.float64)
    p = softmax(z, axis=1)
    ranked = np.sort(z, axis=1)
    expected = {
        "max_probability": p.max(axis=1),
        "max_logit": ranked[:, -1],
        "energy": logsumexp(z, axis=1),
        "margin": ranked[:, -1] - ranked[:, -2],
        "entropy": scipy_entropy(p, axis=1),
        "gen": (p**0.1 * (1 - p) ** 0.1).sum(axis=1),
        "log_odds": logit(p.max(axis=1)),
    }
    assert set(expected) == {name for name, score in SCORES.items() if not score.of_features}
    for name, values in expected.items():
        np.testing.assert_allclose(SCORES[name].function(LOGITS), values, rtol=1e-9, atol=1e-9, err_msg=name)
    np.testing.assert_allclose(log_odds(LOGITS, 2), logit(p[:, 2]))


def test_gen_takes_the_hundred_most_probable_labels():
    z = np.random.default_rng(1).normal(size=(5, 300))
    p = np.sort(softmax(z, axis=1), axis=1)[:, -100:]
    np.testing.assert_allclose(SCORES["gen"].function(z), (p**0.1 * (1 - p) ** 0.1).sum(axis=1))


@pytest.mark.parametrize("scale", [0.0, 1e4])
def test_scores_of_extreme_logits_are_finite(scale):
    z = LOGITS * np.float32(scale)
    for name, score in SCORES.items():
        if not score.of_features:
            assert np.isfinite(score.function(z)).all(), name


def test_a_row_that_was_not_scored_stays_undefined():
    z = LOGITS.copy()
    z[3] = np.nan
    for name, score in SCORES.items():
        if not score.of_features:
            assert np.flatnonzero(np.isnan(score.function(z))).tolist() == [3], name


def test_distances_equal_scikit_learns_and_scipys():
    rng = np.random.default_rng(2)
    y = rng.integers(0, 4, 300).astype(str)
    centres = {label: rng.normal(size=12) for label in np.unique(y)}
    train = np.array([centres[label] for label in y]) + rng.normal(size=(300, 12)) @ rng.normal(size=(12, 12))
    features = rng.normal(size=(40, 12)).astype(np.float16)
    arrays = fit_arrays(train, y, {name for score in SCORES.values() for name in score.arrays})
    x = features.astype(np.float64)

    means = np.stack([train[y == label].mean(axis=0) for label in np.unique(y)])
    within = LedoitWolf(assume_centered=True).fit(train - means[np.unique(y, return_inverse=True)[1]])
    distances = cdist(x, means, "mahalanobis", VI=within.get_precision())
    np.testing.assert_allclose(SCORES["mahalanobis"].function(features, arrays), distances.min(axis=1), rtol=1e-4)

    to_all = LedoitWolf().fit(train).mahalanobis(x)
    relative = distances.min(axis=1) ** 2 - to_all
    np.testing.assert_allclose(
        SCORES["relative_mahalanobis"].function(features, arrays), relative, rtol=1e-3, atol=1e-3
    )

    nearest = NearestNeighbors(n_neighbors=KNN_K, metric="cosine").fit(train)
    similarity = 1 - nearest.kneighbors(x)[0][:, -1]
    np.testing.assert_allclose(SCORES["knn"].function(features, arrays), similarity, atol=2e-3)

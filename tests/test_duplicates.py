"""Duplicates: those of brute force, with conflicting labels first."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
from scipy.sparse import csr_matrix
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.metrics.pairwise import cosine_similarity

from cascade_lab.analysis import similar_rows
from cascade_lab.analysis.duplicates import duplicates, normalized
from cascade_lab.evalset import EvalSet


def brute_force(a: EvalSet, b: EvalSet, similarity: float, is_same_set: bool) -> set[tuple[str, str, bool, bool]]:
    texts, other_texts = [normalized(t) for t in a.texts], [normalized(t) for t in b.texts]
    vectorizer = TfidfVectorizer(analyzer="char", ngram_range=(4, 4), lowercase=False, sublinear_tf=True)
    vectorizer.fit([f" {text} " for text in dict.fromkeys([*texts, *other_texts])])
    vectors, other_vectors = (vectorizer.transform(f" {text} " for text in side) for side in (texts, other_texts))
    cosines = cosine_similarity(vectors, other_vectors)
    return {
        (a.examples["example_id"][i], b.examples["example_id"][j], texts[i] == other_texts[j], label != other_label)
        for i, label in enumerate(a.examples["label"])
        for j, other_label in enumerate(b.examples["label"])
        if (texts[i] == other_texts[j] or cosines[i, j] >= similarity) and (not is_same_set or i < j)
    }


def random_texts(n: int, seed: int, prefix: str) -> EvalSet:
    rng = np.random.default_rng(seed)
    words = ["pay", "Pay", "bill!", "now", "transfer", "money", "résumé", "résumé", "🙂", "?", "what's", "whats"]
    frame = {
        "text": [" ".join(rng.choice(words, rng.integers(0, 6))) for _ in range(n)],
        "label": rng.choice(list("ab"), n),
    }
    return EvalSet.from_frame(pd.DataFrame(frame | {"example_id": [f"{prefix}{i}" for i in range(n)]}))


def test_duplicates_are_those_of_brute_force(monkeypatch):
    a, b = random_texts(150, 0, "a"), random_texts(220, 1, "b")
    monkeypatch.setattr(similar_rows, "MAX_PRODUCTS", 2000)  # many blocks
    for other, is_same_set in ((a, True), (b, False)):
        # No cosine is so near to this threshold that float32 could decide otherwise.
        others = None if is_same_set else other.examples
        table = duplicates(a.examples, others, similarity=0.8123, max_duplicates=1000)
        pairs = table[["example_id", "duplicate_id", "exact", "conflict"]].itertuples(index=False, name=None)
        assert len(table) > 100
        assert table["exact"].sum() > 20
        assert set(pairs) == brute_force(a, other, 0.8123, is_same_set)
        assert not table.duplicated(["example_id", "duplicate_id"]).any()
        assert (table["conflict"] == (table["label"] != table["duplicate_label"])).all()


@pytest.mark.parametrize("similarity", [0.3, 0.6, 0.85, 1.0])
def test_similar_rows_are_those_with_a_large_product(similarity, monkeypatch):
    rng = np.random.default_rng(0)
    # Some columns are in most rows, most are in few; and there are empty, similar and equal rows.
    dense = rng.exponential(size=(500, 60)) * (rng.random((500, 60)) < 0.7 * rng.random(60) ** 4)
    dense[:9], dense[9:12], dense[12] = dense[20:29] + 0.1 * dense[40:49], dense[50], 0
    dense[200:240] = dense[:40] + 0.05 * dense[40:80] * (np.arange(40)[:, None] % 2)
    dense /= np.maximum(np.linalg.norm(dense, axis=1, keepdims=True), 1e-9)
    matrices = [csr_matrix(part.astype(np.float32)) for part in (dense[:200], dense[200:])]
    monkeypatch.setattr(similar_rows, "MAX_PRODUCTS", 300)  # many blocks
    for first, second in ((matrices[0], matrices[0]), matrices):
        blocks = list(similar_rows.similar_rows(first, second, similarity - 1e-5))
        assert sum(n_rows for n_rows, _ in blocks) == first.shape[0]
        found = {(row, other) for _, pairs in blocks for row, other in zip(pairs.rows, pairs.others, strict=True)}
        cosines = (first @ second.T).toarray()
        assert found == set(zip(*np.nonzero(cosines >= similarity - 1e-5), strict=True))
        assert len(found) > 5


def test_of_many_near_duplicates_the_conflicting_ones_are_kept():
    frame = pd.DataFrame({"text": ["the same text"] * 40 + ["the same texts"] * 60, "label": ["a", "b"] * 50})
    table = duplicates(EvalSet.from_frame(frame).examples, similarity=0.7, max_duplicates=3)
    near = table[~table["exact"]]
    both = pd.concat([near["example_id"], near["duplicate_id"]])
    assert near["conflict"].all()
    assert (both.value_counts() >= 3).all()
    assert both.nunique() == 100


def test_of_many_duplicates_the_conflicting_ones_are_kept():
    frame = pd.DataFrame({"text": ["same text"] * 500 + ["Same, text!"], "label": ["a"] * 500 + ["b"]})
    table = duplicates(EvalSet.from_frame(frame).examples, max_duplicates=3)
    assert len(table) < 501 * 3
    assert table["conflict"].sum() == 500
    assert table["exact"].all()


def test_the_second_text_counts():
    pair = pd.DataFrame({"text": ["one", "one"], "text_b": ["two", "three"], "label": ["a", "b"]})
    assert not duplicates(EvalSet.from_frame(pair).examples)["exact"].any()


def test_copies_without_a_label_take_no_place_of_a_conflict():
    frame = pd.DataFrame({"text": ["pay"] * 7, "label": ["x", None, None, None, None, None, "y"]})
    table = duplicates(EvalSet.from_frame(frame, unlabelled=True).examples, max_duplicates=2)
    assert table["conflict"].sum() == 1
    assert table.loc[0, ["label", "duplicate_label"]].tolist() == ["x", "y"]


def test_an_unknown_label_conflicts_with_none():
    frame = pd.DataFrame({"text": ["pay", "Pay", "pay!"], "label": ["a", None, "b"]})
    table = duplicates(EvalSet.from_frame(frame, unlabelled=True).examples)
    assert len(table) == 3
    assert table["conflict"].tolist() == [True, False, False]

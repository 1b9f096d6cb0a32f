"""Duplicates: those of brute force, with conflicting labels first."""

from __future__ import annotations

import numpy as np
import pandas as pd
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.metrics.pairwise import cosine_similarity

from cascade_lab.analysis import duplicates as duplicates_module
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
    monkeypatch.setattr(duplicates_module, "MAX_SIMILARITIES", 2000)  # many blocks
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


def test_of_many_duplicates_the_conflicting_ones_are_kept():
    frame = pd.DataFrame({"text": ["same text"] * 500 + ["Same, text!"], "label": ["a"] * 500 + ["b"]})
    table = duplicates(EvalSet.from_frame(frame).examples, max_duplicates=3)
    assert len(table) < 501 * 3
    assert table["conflict"].sum() == 500
    assert table["exact"].all()


def test_the_second_text_counts():
    pair = pd.DataFrame({"text": ["one", "one"], "text_b": ["two", "three"], "label": ["a", "b"]})
    assert not duplicates(EvalSet.from_frame(pair).examples)["exact"].any()


def test_an_unknown_label_conflicts_with_none():
    frame = pd.DataFrame({"text": ["pay", "Pay", "pay!"], "label": ["a", None, "b"]})
    table = duplicates(EvalSet.from_frame(frame, unlabelled=True).examples)
    assert len(table) == 3
    assert table["conflict"].tolist() == [True, False, False]

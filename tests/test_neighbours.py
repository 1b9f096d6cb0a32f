"""Similar texts: against scikit-learn's own cosines, in Chinese, with features, in a sample, and at the edges."""

from __future__ import annotations

import numpy as np
import pytest
from helpers import GATE, random_run, run_of_probabilities
from sklearn.metrics.pairwise import cosine_similarity

import cascade_lab.analysis.neighbours as neighbours
from cascade_lab import CascadeSpec, Run
from cascade_lab.analysis.neighbours import SimilarTexts, nearest_rows, text_vectorizer
from cascade_lab.exceptions import RunError

INTENT = {"name": "intent", "labels": ["a", "b"]}


def run_of_texts(*texts, **keys):
    n = len(texts)
    p = {"gate": [[0.1, 0.9]] * n, "intent": [[0.8, 0.2]] * n}
    return run_of_probabilities([GATE, INTENT], ["a"] * n, p, texts=list(texts), **keys)


@pytest.mark.parametrize("is_sparse", [True, False])
def test_nearest_rows_are_those_of_scikit_learn(is_sparse, monkeypatch):
    """In blocks of two rows; the similarity of a row with itself is left out."""
    monkeypatch.setattr(neighbours, "MAX_SIMILARITIES", 100)
    texts = [f"{word} {other}" for word in ("pay", "play", "lost card") for other in ("now", "please", "my bill", "x")]
    vectors = text_vectorizer().fit_transform(texts)
    expected = cosine_similarity(vectors)
    np.fill_diagonal(expected, -1)
    given = vectors if is_sparse else vectors.toarray()
    nearest, similarity = nearest_rows(given, given, 3, itself=np.arange(len(texts)))
    assert similarity == pytest.approx(-np.sort(-expected, axis=1)[:, :3], abs=1e-5)
    assert np.take_along_axis(expected, nearest, axis=1) == pytest.approx(similarity, abs=1e-5)
    assert (nearest != np.arange(len(texts))[:, None]).all()


def test_chinese_texts_need_no_spaces():
    run = run_of_texts("我想查一下余额", "帮我播放一首歌", "余额还有多少?", "播放音乐", "今天天气怎么样")
    finder = SimilarTexts(run)
    assert finder.by == "characters"
    assert finder.find(["t1", "t2"], 1)[["example_id", "similar_id"]].to_numpy().tolist() == [
        ["t1", "t3"],
        ["t2", "t4"],
    ]


def test_case_punctuation_and_forms_make_no_difference():
    found = SimilarTexts(run_of_texts("Pay my BILL!", "ｐａｙ my bill", "play")).find(["t1"], 2)
    assert found["similarity"].tolist() == pytest.approx([1, found["similarity"][1]])
    assert found["similar_id"].tolist() == ["t2", "t3"]
    assert found["similarity"][1] < 0.5


def test_kept_features_are_compared_where_there_are_any():
    run = run_of_texts("a song", "a song!", "money")
    features = {"intent": np.array([[1, 0], [0, 1], [3, 0.1]], dtype=np.float16)}
    scores = {stage.name: run.scores(stage.name) for stage in run.spec.stages}
    kept = Run(run.manifest, run.examples, scores, run.predictions, run.timings, features=features)
    finder = SimilarTexts(kept)
    assert finder.by == "features"
    assert finder.find(["t1"], 1)["similar_id"].tolist() == ["t3"]
    assert SimilarTexts(kept, by="characters").find(["t1"], 1)["similar_id"].tolist() == ["t2"]
    with pytest.raises(RunError, match="has no features"):
        SimilarTexts(run, by="features")


def test_a_large_run_is_searched_in_a_sample_that_does_not_change(tmp_path, monkeypatch):
    run = random_run(tmp_path / "run", n=60)
    monkeypatch.setattr(neighbours, "MAX_TEXTS", 20)
    ids = run.examples["example_id"].tolist()
    found = SimilarTexts(run).find(ids, 3)
    assert found["example_id"].value_counts().tolist() == [3] * 60
    assert found["similar_id"].nunique() <= 20
    assert (found["example_id"] != found["similar_id"]).all()
    assert found.equals(SimilarTexts(run).find(ids, 3))


def test_edges():
    alone = SimilarTexts(run_of_texts("alone"))
    assert len(alone.find(["t1"], 3)) == 0
    assert len(alone.find([], 3)) == 0
    two = SimilarTexts(run_of_texts("", "?!")).find(["t1"], 3)  # fewer texts than asked for
    assert two["similar_id"].tolist() == ["t2"]
    with pytest.raises(RunError, match="has no example 'x'"):
        alone.find(["x"])


def test_two_texts_of_an_example_are_both_compared():
    run = run_of_texts("same", "same", "same")
    examples = run.examples.assign(text_b=["red cars", "blue water", "a red car"])
    logits = {stage.name: run.scores(stage.name).logits for stage in run.spec.stages}
    run = Run.from_logits(CascadeSpec("two", run.spec.stages), examples, logits)
    assert SimilarTexts(run).find(["t1"], 1)["similar_id"].tolist() == ["t3"]

"""Confusion matrices and their metrics on arrays, against scikit-learn."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from sklearn.metrics import (
    accuracy_score,
    confusion_matrix,
    f1_score,
    precision_recall_fscore_support,
    precision_score,
    recall_score,
)

from cascade_lab.analysis.classification import (
    confusion_matrix_frame,
    confusion_metrics,
    macro_f1,
    macro_f1_score,
    matrix_confused_pairs,
    matrix_label_metrics,
)
from cascade_lab.exceptions import RunError

LABELS = ["a", "b", "c", "d"]


def macro_metrics(y_true, y_pred) -> dict[str, float]:
    options = {"average": "macro", "zero_division": 0.0, "labels": np.unique(y_true)}
    return {
        "accuracy": accuracy_score(y_true, y_pred),
        "macro_precision": precision_score(y_true, y_pred, **options),
        "macro_recall": recall_score(y_true, y_pred, **options),
        "macro_f1": f1_score(y_true, y_pred, **options),
    }


@given(st.lists(st.tuples(st.sampled_from(LABELS), st.sampled_from(LABELS)), min_size=1, max_size=30))
def test_metrics_of_labels_are_those_of_scikit_learn(pairs):
    y_true, y_pred = (np.array(column, dtype=object) for column in zip(*pairs, strict=True))
    assert macro_f1_score(y_true, y_pred) == pytest.approx(macro_metrics(y_true, y_pred)["macro_f1"])
    matrix = confusion_matrix_frame(y_true, y_pred, LABELS)
    np.testing.assert_array_equal(matrix, confusion_matrix(y_true, y_pred, labels=LABELS))
    table = matrix_label_metrics(matrix).set_index(["label", "metric"])
    expected = precision_recall_fscore_support(list(y_true), list(y_pred), labels=LABELS, zero_division=np.nan)
    for i, name in enumerate(("precision", "recall", "f1")):
        rows = table.xs(name, level="metric").loc[LABELS]
        np.testing.assert_allclose(rows["value"], expected[i])
        np.testing.assert_array_equal(rows["support"], expected[3])
        inside = (rows["low"] <= rows["value"] + 1e-12) & (rows["value"] <= rows["high"] + 1e-12)
        assert (inside | rows["value"].isna()).all()


def test_metrics_of_many_matrices_are_those_of_scikit_learn_on_each():
    rng = np.random.default_rng(0)
    y_true, y_pred = rng.integers(0, 12, 60), rng.integers(0, 12, 60)
    y_pred[:30] = y_true[:30]
    rows, columns = confusion_matrix(y_true, y_pred, labels=range(12)).nonzero()
    drawn = rng.integers(0, 60, (40, 60))
    weights = np.array([confusion_matrix(y_true[t], y_pred[t], labels=range(12))[rows, columns] for t in drawn])
    metrics = confusion_metrics(rows, columns, 12, weights)
    for i, texts in enumerate(drawn):
        for name, expected in macro_metrics(y_true[texts], y_pred[texts]).items():
            assert metrics[name][i] == pytest.approx(expected), name


def test_macro_f1_leaves_out_labels_that_do_not_occur():
    """Four tables of counts: F1 of 1 and 2/3; one label only; one label that is only predicted; none."""
    hits = [[2, 1], [3, 0], [3, 0], [0, 0]]
    support, predicted = [[2, 2], [4, 0], [4, 0], [0, 0]], [[2, 1], [3, 0], [3, 1], [0, 0]]
    expected = [(1 + 2 / 3) / 2, 6 / 7, 6 / 7, np.nan]
    np.testing.assert_allclose(macro_f1(np.array(hits), np.array(support), np.array(predicted)), expected)


def test_one_text_that_is_rejected_hardly_moves_the_macro_f1():
    """Five labels with 80 texts each. A text of label b that was taken for a is rejected: .9251 becomes .9262.

    With the label that rejects as a sixth label of F1 0 it would be .7719.
    """
    matrix = [[75, 2, 1, 2, 0], [1, 73, 2, 2, 2], [0, 1, 74, 4, 1], [2, 1, 1, 73, 3], [2, 1, 1, 1, 75]]
    labels = np.array([*LABELS, "e"], dtype=object)
    true, predicted = np.unravel_index(np.repeat(np.arange(25), np.ravel(matrix)), (5, 5))
    y_true, y_pred = labels[true], labels[predicted]
    assert macro_f1_score(y_true, y_pred) == pytest.approx(0.9251, abs=5e-5)
    y_pred[(true == 1) & (predicted == 0)] = "oos"
    assert macro_f1_score(y_true, y_pred) == pytest.approx(0.9262, abs=5e-5)
    assert macro_f1_score(y_true, y_pred) == pytest.approx(macro_metrics(y_true, y_pred)["macro_f1"])
    assert f1_score(y_true, y_pred, average="macro", zero_division=0) == pytest.approx(0.7719, abs=5e-5)


def test_rejected_texts_of_150_labels_move_the_macro_f1_as_scikit_learn_says():
    """As many labels, texts and rejections in scope as in CLINC150's test split at about 0.95."""
    rng = np.random.default_rng(0)
    y_true = np.repeat(np.arange(150), 30).astype(object)
    y_pred = y_true.copy()
    wrong = rng.choice(4500, 230, replace=False)
    y_pred[wrong[:180]] = rng.integers(0, 150, 180)
    before = macro_f1_score(y_true, y_pred)
    y_pred[wrong[180:]] = "oos"
    expected = f1_score(y_true.astype(str), y_pred.astype(str), labels=[str(i) for i in range(150)], average="macro")
    assert macro_f1_score(y_true, y_pred) == pytest.approx(expected)
    # 50 of 4,500 texts in scope are rejected: recall falls by 50 / 4,500, and F1 by half of that.
    assert before - macro_f1_score(y_true, y_pred) == pytest.approx(50 / 4500 / 2, abs=0.001)


@pytest.mark.parametrize("normalize", ["true", "pred", "all"])
def test_fractions_are_those_of_scikit_learn_and_nan_where_there_is_nothing(normalize):
    y_true, y_pred = list("aabbc"), list("abbbb")
    matrix = confusion_matrix_frame(y_true, y_pred, LABELS, normalize=normalize)
    expected = confusion_matrix(y_true, y_pred, labels=LABELS, normalize=normalize)
    np.testing.assert_allclose(np.nan_to_num(matrix), expected)
    empty_row = matrix.loc["d"] if normalize == "true" else matrix["c"] if normalize == "pred" else None
    assert empty_row is None or empty_row.isna().all()
    with pytest.raises(RunError, match="normalize is 'row'"):
        confusion_matrix_frame(y_true, y_pred, LABELS, normalize="row")


def test_confused_pairs_are_sorted_by_frequency_then_fraction_then_label():
    y_true, y_pred = list("aaabbbbccd"), list("abcbacccaa")
    pairs = matrix_confused_pairs(confusion_matrix_frame(y_true, y_pred, LABELS), n=None)
    assert list(pairs.itertuples(index=False, name=None)) == [
        ("b", "c", 2, 0.5),
        ("d", "a", 1, 1.0),
        ("c", "a", 1, 0.5),
        ("a", "b", 1, 1 / 3),
        ("a", "c", 1, 1 / 3),
        ("b", "a", 1, 0.25),
    ]
    assert len(matrix_confused_pairs(confusion_matrix_frame(y_true, y_pred, LABELS), n=2)) == 2


def test_no_texts_give_empty_tables_and_nan():
    matrix = confusion_matrix_frame([], [], LABELS)
    assert matrix.to_numpy().sum() == 0
    assert matrix_confused_pairs(matrix).empty
    assert matrix_label_metrics(matrix)["value"].isna().all()
    assert np.isnan(macro_f1_score(np.array([]), np.array([])))

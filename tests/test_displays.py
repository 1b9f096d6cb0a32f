"""Displays: what they compute, and that what they draw fits its figure; never pixels."""

from __future__ import annotations

import itertools

import matplotlib.pyplot as plt
import numpy as np
import pytest
from sklearn.metrics import confusion_matrix

from cascade_lab import CascadeConfusionDisplay, StageLatencyDisplay
from cascade_lab.errors import SpecError


@pytest.fixture(autouse=True)
def _close_figures():
    yield
    plt.close("all")


def test_the_end_to_end_matrix_has_the_reject_label_last(tiny_run):
    display = CascadeConfusionDisplay.from_run(tiny_run)
    assert display.display_labels == ["0", "1", "2", "3", "oos"]
    predictions = tiny_run.predictions
    expected = confusion_matrix(predictions["label"], predictions["predicted"], labels=display.display_labels)
    np.testing.assert_array_equal(display.confusion_matrix, expected)
    assert display.confusion_matrix.sum() == 200


def test_a_stages_matrix_is_of_what_reached_it_and_has_a_gold_label_there(tiny_run):
    gate = CascadeConfusionDisplay.from_run(tiny_run, stage="gate")
    assert gate.confusion_matrix.sum() == 200
    intent = CascadeConfusionDisplay.from_run(tiny_run, stage="intent")
    predictions = tiny_run.predictions
    reached = predictions[(predictions["decided_by"] == "intent") & (predictions["label"] != "oos")]
    expected = confusion_matrix(reached["label"], reached["predicted"], labels=["0", "1", "2", "3"])
    np.testing.assert_array_equal(intent.confusion_matrix, expected)
    with pytest.raises(SpecError, match="no stage is named 'intnet'; did you mean 'intent'"):
        CascadeConfusionDisplay.from_run(tiny_run, stage="intnet")


@pytest.mark.parametrize(("normalize", "axis"), [("true", 1), ("pred", 0), ("all", None)])
def test_normalised_matrices_sum_to_one_or_are_nan(tiny_run, normalize, axis):
    matrix = CascadeConfusionDisplay.from_run(tiny_run, normalize=normalize).confusion_matrix
    sums = matrix.sum(axis=axis)
    assert np.all(np.isnan(sums) | np.isclose(sums, 1))


def test_the_most_confused_are_those_of_the_fullest_cells():
    matrix = np.diag([9] * 60)
    matrix[40, 7], matrix[7, 40], matrix[3, 59], matrix[20, 21] = 8, 5, 6, 1
    cut = CascadeConfusionDisplay(matrix, [f"label {i}" for i in range(60)]).most_confused(4)
    assert cut.display_labels == ["label 3", "label 7", "label 40", "label 59"]
    np.testing.assert_array_equal(cut.confusion_matrix, matrix[np.ix_([3, 7, 40, 59], [3, 7, 40, 59])])
    clean = CascadeConfusionDisplay(np.eye(3), list("abc")).most_confused()
    assert clean.display_labels == []
    clean.plot()


def drawn_inside(figure):
    """Every text lies inside the figure, and no two labels of an axis overlap."""
    figure.canvas.draw()
    frame = figure.bbox
    for ax in figure.axes:
        for axis in (ax.xaxis, ax.yaxis):
            low, high = sorted(axis.get_view_interval())
            ticks = [tick for tick in axis.get_major_ticks() if low <= tick.get_loc() <= high]
            labels = [label for tick in ticks for label in (tick.label1, tick.label2)]
            boxes = [label.get_window_extent() for label in labels if label.get_text() and label.get_visible()]
            for box in boxes:
                assert frame.x0 - 1 <= box.x0 <= box.x1 <= frame.x1 + 1
                assert frame.y0 - 1 <= box.y0 <= box.y1 <= frame.y1 + 1
            for one, other in itertools.pairwise(boxes):
                assert not one.overlaps(other), "two labels overlap"
        for text in (ax.xaxis.label, ax.yaxis.label, ax.title, ax._left_title):
            box = text.get_window_extent()
            assert not text.get_text() or (frame.x0 - 1 <= box.x0 and box.x1 <= frame.x1 + 1)


@pytest.mark.parametrize("normalize", [None, "true"])
@pytest.mark.parametrize("n", [2, 5, 15, 41, 151])
def test_a_matrix_of_n_classes_is_legible(n, normalize):
    rng = np.random.default_rng(n)
    matrix = np.diag(rng.integers(50, 2000, n)) + rng.integers(0, 30, (n, n)) * (rng.random((n, n)) < 0.1)
    if normalize:
        matrix = matrix / matrix.sum(axis=1, keepdims=True)
    labels = [f"a_rather_long_intent_name_{i}" for i in range(n)]
    display = CascadeConfusionDisplay(matrix, labels, title="so many classes", normalize=normalize).plot()
    drawn_inside(display.figure_)
    if n > 50:
        drawn_inside(display.most_confused().plot().figure_)
        assert display.ax_.get_yticklabels()[1].get_text().isdigit(), "an overview's axes are numbered"


def test_labels_are_never_read_as_formulas():
    CascadeConfusionDisplay(np.eye(2), ["$x_1$", r"$\frac"], title="$").plot().figure_.canvas.draw()


def test_a_display_draws_into_the_axes_that_it_is_given(tiny_run):
    figure, axes = plt.subplots(1, 2)
    assert CascadeConfusionDisplay.from_run(tiny_run).plot(ax=axes[0]).ax_ is axes[0]
    display = StageLatencyDisplay.from_run(tiny_run).plot(ax=axes[1])
    assert (display.ax_, display.figure_) == (axes[1], figure)


def test_the_latency_display_keeps_what_it_draws(tiny_run):
    display = StageLatencyDisplay.from_run(tiny_run).plot()
    assert list(display.stages) == ["gate", "intent"]
    assert len(display.stages["gate"].text_ms) == 200
    drawn_inside(display.figure_)
    said = " ".join(text.get_text() for text in display.ax_.texts)
    assert f"p99 {display.stages['gate'].percentiles_ms[99]:.2f}" in said

"""Displays: what they compute, that they are shown once, and that what they draw fits the figure; never pixels."""

from __future__ import annotations

import inspect
import itertools
import subprocess
import sys
from importlib import import_module

import matplotlib.pyplot as plt
import nbformat
import numpy as np
import pandas as pd
import pytest
from helpers import random_run
from nbclient import NotebookClient
from sklearn.metrics import confusion_matrix

import cascade_lab
from cascade_lab import (
    CascadeCalibrationDisplay,
    CascadeConfusionDisplay,
    ComparisonDisplay,
    CounterfactualMatrixDisplay,
    OracleLadderDisplay,
    OutcomeFlowDisplay,
    RiskCoverageDisplay,
    StageLatencyDisplay,
)
from cascade_lab.analysis.errors import GOES_ON, KINDS
from cascade_lab.analysis.outcomes import ERRORS, OUTCOMES
from cascade_lab.displays import DISPLAYS
from cascade_lab.displays.confusion import MatrixDisplay
from cascade_lab.displays.drawing import OUTCOME_STYLES, Display
from cascade_lab.exceptions import SpecError
from cascade_lab.reporting.capture import VALUES_MIME


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return random_run(tmp_path_factory.mktemp("runs") / "run", n=150, seed=2)


@pytest.fixture(autouse=True)
def _close_figures():
    yield
    plt.close("all")


def test_every_display_is_in_the_list_and_can_be_imported_from_the_package():
    modules = [import_module(f"cascade_lab.displays.{name}") for name in {*DISPLAYS.values()}]
    values = [value for module in modules for value in vars(module).values() if inspect.isclass(value)]
    classes = {value for value in values if issubclass(value, Display)} - {Display, MatrixDisplay}
    public = {getattr(cascade_lab, name) for name in DISPLAYS}
    assert classes == public
    assert {display.__name__ for display in public} == set(DISPLAYS)
    assert set(DISPLAYS) < set(cascade_lab.__all__)
    with pytest.raises(AttributeError, match="no attribute 'ThresholdDisplays'"):
        _ = cascade_lab.ThresholdDisplays


def test_neither_the_package_nor_the_colours_load_matplotlib():
    code = (
        "import sys, cascade_lab; assert not {'numpy', 'matplotlib'} & set(sys.modules);"
        "import cascade_lab.displays.drawing; assert 'matplotlib' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_every_outcome_has_its_own_colour():
    assert set(OUTCOME_STYLES) == {GOES_ON, *OUTCOMES, *KINDS}
    assert len({style.color for style in OUTCOME_STYLES.values()}) == len(OUTCOME_STYLES)
    assert {outcome for outcome, style in OUTCOME_STYLES.items() if style.hatch} == {*ERRORS, *KINDS}


@pytest.mark.parametrize(
    "make",
    [
        CascadeConfusionDisplay.from_run,
        CascadeCalibrationDisplay.from_run,
        lambda run: ComparisonDisplay.from_runs(run, run.with_thresholds({"gate0": 0.9}), n_resamples=10),
        CounterfactualMatrixDisplay.from_run,
        lambda run: OracleLadderDisplay.from_run(run),
        OutcomeFlowDisplay.from_run,
        RiskCoverageDisplay.from_run,
        StageLatencyDisplay.from_run,
    ],
)
def test_every_display_of_a_run_keeps_one_protocol(run, make):
    display = make(run)
    assert isinstance(display.frame(), pd.DataFrame)
    assert len(display.frame())
    assert repr(display).startswith(f"<{type(display).__name__}: ")
    assert display.plot() is display
    figure, axes = plt.subplots()
    assert display.plot(ax=axes, alpha=0.5).ax_ is axes
    assert display.figure_ is figure
    artists = [*axes.patches, *axes.lines, *axes.collections, *axes.images, *axes.texts]
    assert 0.5 in [artist.get_alpha() for artist in artists]


SHOWN_ONCE = [
    "made()",
    "made().plot()",
    "display = made().plot()",
    "display",
    "figure, axes = plt.subplots()\nmade().plot(axes)",
    "for _ in range(1):\n    made().plot()",
]


def test_a_cell_shows_a_display_once_and_a_report_records_it():
    """Whether it is the last value of a cell, or was drawn in it or before. A cell that only computes shows none."""
    setup = """
        import matplotlib.pyplot as plt
        from cascade_lab import CascadeConfusionDisplay
        from cascade_lab.displays.text import TextAttributionDisplay
        from cascade_lab.reporting import capture
        capture.record_outputs(get_ipython())
        def made():
            return CascadeConfusionDisplay.from_predictions(list("aab"), list("abb"), title="two labels")
    """
    sources = [inspect.cleandoc(setup), *SHOWN_ONCE, "unused = made()", "TextAttributionDisplay([], title='none')"]
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(source) for source in sources])
    NotebookClient(notebook, kernel_name="python3", timeout=120).execute()
    outputs = {cell.source: [output.data for output in cell.outputs] for cell in notebook.cells}
    for source in SHOWN_ONCE:
        assert len(outputs[source]) == 1, source
        assert "image/png" in outputs[source][0]
        shown = outputs[source][0][VALUES_MIME]
        assert shown["axes"][0]["title"] == "two labels"
    assert outputs["unused = made()"] == []
    (html,) = outputs[sources[-1]]
    assert "<b><bdi>none</bdi></b>" in html["text/html"]


def test_the_end_to_end_matrix_has_the_reject_label_last(run):
    display = CascadeConfusionDisplay.from_run(run)
    assert display.display_labels == ["label0", "label1", "label2", "label3", "oos0"]
    predictions = run.predictions
    expected = confusion_matrix(predictions["label"], predictions["predicted"], labels=display.display_labels)
    np.testing.assert_array_equal(display.confusion_matrix, expected)
    frame = display.frame()
    np.testing.assert_array_equal(frame, expected)
    assert (frame.index.name, frame.columns.name) == ("true label", "predicted label")
    axes = display.plot().ax_
    assert (axes.get_ylabel(), axes.get_xlabel()) == ("true label", "predicted label")


def test_a_stages_matrix_is_of_what_reached_it_and_has_a_true_label_there(run):
    gate = CascadeConfusionDisplay.from_run(run, stage="gate0")
    assert gate.confusion_matrix.sum() == 150
    last = CascadeConfusionDisplay.from_run(run, stage="last")
    predictions = run.predictions
    reached = predictions[(predictions["decided_by"] == "last") & (predictions["label"] != "oos0")]
    expected = confusion_matrix(reached["label"], reached["predicted"], labels=last.display_labels)
    np.testing.assert_array_equal(last.confusion_matrix, expected)
    with pytest.raises(SpecError, match="no stage is named 'gaet0'; did you mean 'gate0'"):
        CascadeConfusionDisplay.from_run(run, stage="gaet0")


def test_plain_arrays_give_what_a_run_gives(run):
    predictions = run.predictions
    of_run = CascadeConfusionDisplay.from_run(run, normalize="true")
    of_arrays = CascadeConfusionDisplay.from_predictions(
        predictions["label"], predictions["predicted"], labels=of_run.display_labels, normalize="true"
    )
    pd.testing.assert_frame_equal(of_arrays.frame(), of_run.frame())
    assert CascadeConfusionDisplay.from_predictions(["b", "a"], ["a", "a"]).display_labels == ["a", "b"]

    confidence = run.decision("gate0").confidence
    correct = run.targets("gate0") == "in"
    curve = CascadeCalibrationDisplay.from_predictions(correct, confidence, n_bins=5)
    expected = CascadeCalibrationDisplay.from_run(run, stage="gate0", n_bins=5)
    pd.testing.assert_frame_equal(curve.frame(), expected.frame())
    assert curve.metrics.loc["ece", "value"] == pytest.approx(expected.metrics.loc["ece", "value"])
    np.testing.assert_array_equal(curve.confidence, expected.confidence)

    last = RiskCoverageDisplay.from_run(run, confidences=["last"])
    decision = run.decision("last")
    correct = decision.label_above == run.examples["label"].to_numpy()
    alone = RiskCoverageDisplay.from_predictions(correct, decision.confidence, name="last")
    pd.testing.assert_frame_equal(alone.frame(), last.frame())
    assert alone.operating_point == {}
    assert "AURC" in alone.plot().ax_.get_legend().get_texts()[0].get_text()


@pytest.mark.parametrize(("normalize", "axis"), [("true", 1), ("pred", 0), ("all", None)])
def test_normalised_matrices_sum_to_one_or_are_nan(run, normalize, axis):
    matrix = CascadeConfusionDisplay.from_run(run, normalize=normalize).confusion_matrix
    sums = matrix.sum(axis=axis)
    assert np.all(np.isnan(sums) | np.isclose(sums, 1))


def test_the_most_confused_are_those_of_the_largest_cells():
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
            for box, following in itertools.pairwise(boxes):
                assert not box.overlaps(following), "two labels overlap"
        for text in (ax.xaxis.label, ax.yaxis.label, ax.title, ax._left_title):
            box = text.get_window_extent()
            assert not text.get_text() or (frame.x0 - 1 <= box.x0 and box.x1 <= frame.x1 + 1)


@pytest.mark.parametrize("normalize", [None, "true"])
@pytest.mark.parametrize("n", [2, 5, 15, 41, 151])
def test_a_matrix_of_n_labels_is_legible(n, normalize):
    rng = np.random.default_rng(n)
    matrix = np.diag(rng.integers(50, 2000, n)) + rng.integers(0, 30, (n, n)) * (rng.random((n, n)) < 0.1)
    if normalize:
        matrix = matrix / matrix.sum(axis=1, keepdims=True)
    labels = [f"a_rather_long_intent_name_{i}" for i in range(n)]
    display = CascadeConfusionDisplay(matrix, labels, title="n labels", normalize=normalize).plot()
    drawn_inside(display.figure_)
    if n > 50:
        drawn_inside(display.most_confused().plot().figure_)
        assert display.ax_.get_yticklabels()[1].get_text().isdigit(), "an overview's axes are numbered"


def test_labels_are_never_read_as_formulas():
    CascadeConfusionDisplay(np.eye(2), ["$x_1$", r"$\frac"], title="$").plot().figure_.canvas.draw()


def test_the_latency_display_keeps_what_it_draws(run):
    display = StageLatencyDisplay.from_run(run).plot()
    assert list(display.stages) == ["gate0", "last"]
    assert len(display.stages["gate0"].text_ms) == 150
    drawn_inside(display.figure_)
    texts = " ".join(text.get_text() for text in display.ax_.texts)
    assert f"p99 {display.frame().loc['gate0', 'p99_ms']:.2f}" in texts

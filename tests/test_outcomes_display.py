"""The flow, the oracle ladder and the counterfactual matrix as pictures: what they draw is legible and kept."""

from __future__ import annotations

import itertools

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
from helpers import GATE, mixed_run, random_run, run_of_probabilities
from test_errors import five_texts

from cascade_lab import CounterfactualMatrixDisplay, OracleLadderDisplay, OutcomeFlowDisplay
from cascade_lab.analysis.errors import GOES_ON, counterfactual_matrix, flow, oracle_ladder
from cascade_lab.exceptions import RunError

ALL = (OutcomeFlowDisplay, OracleLadderDisplay, CounterfactualMatrixDisplay)


@pytest.fixture(autouse=True)
def _close_figures():
    yield
    plt.close("all")


def assert_legible(display):
    """No two texts of a figure overlap, and none is cut off."""
    display.figure_.canvas.draw()
    boxes = {text.get_text(): text.get_window_extent() for text in display.ax_.texts}
    boxes["title"] = display.ax_._left_title.get_window_extent()
    frame = display.figure_.bbox
    for name, box in boxes.items():
        assert frame.x0 - 1 <= box.x0 <= box.x1 <= frame.x1 + 1, name
        assert frame.y0 - 1 <= box.y0 <= box.y1 <= frame.y1 + 1, name
    for (name, box), (other_name, other) in itertools.combinations(boxes.items(), 2):
        assert not box.overlaps(other), f"{name} and {other_name}"


def assert_title_fits(display):
    display.figure_.canvas.draw()
    assert display.ax_._left_title.get_window_extent().x1 <= display.figure_.bbox.x1


@pytest.mark.parametrize("seed", range(8))
def test_displays_of_any_cascade_are_legible_and_keep_what_they_draw(tmp_path, seed):
    run = random_run(tmp_path / "run", n=50, n_gates=1 + seed % 3, seed=seed) if seed % 2 else mixed_run(seed)
    thresholds = {"gate0": [0.0, 0.5, 1.0][seed % 3]}
    drawn = OutcomeFlowDisplay.from_run(run, thresholds=thresholds).plot()
    pd.testing.assert_frame_equal(drawn.flow, flow(run, thresholds=thresholds))
    texts = [text.get_text() for text in drawn.ax_.texts]
    for row in drawn.flow[drawn.flow["outcome"] != GOES_ON].itertuples():
        assert any(text.startswith(row.outcome) and f": {row.n_examples:,} (" in text for text in texts)
    assert_legible(drawn)
    ladder = OracleLadderDisplay.from_run(run, thresholds=thresholds).plot()
    pd.testing.assert_frame_equal(ladder.ladder, oracle_ladder(run, thresholds=thresholds))
    assert_legible(ladder)
    for stage in (None, "gate0"):
        display = CounterfactualMatrixDisplay.from_run(run, stage=stage, thresholds=thresholds)
        expected = counterfactual_matrix(run, stage, thresholds=thresholds).counterfactual
        np.testing.assert_array_equal(display.confusion_matrix, expected)
        assert_title_fits(display.plot())


def test_long_names_are_shortened_to_what_fits():
    name = "a-stage-with-a-name-that-nobody-would-write-but-may"
    stages = [{**GATE, "name": f"{name}-1"}, {**GATE, "name": f"{name}-2"}, {"name": name, "labels": ["a", "b"]}]
    rng, labels = np.random.default_rng(0), ["a", "b", "oos"] * 20
    probabilities = {stage["name"]: rng.dirichlet(np.ones(2), 60) for stage in stages}
    run = run_of_probabilities(stages, labels, probabilities, name="a cascade " * 20)
    assert_legible(OutcomeFlowDisplay.from_run(run).plot())
    assert_legible(OracleLadderDisplay.from_run(run).plot())


def test_no_gate_and_no_errors_can_be_drawn(tmp_path):
    assert_legible(OutcomeFlowDisplay.from_run(random_run(tmp_path / "run", n_gates=0)).plot())
    last = {"name": "i", "labels": ["a", "b"]}
    run = run_of_probabilities([GATE, last], ["a"], {"gate": [[0.1, 0.9]], "i": [[0.9, 0.1]]})
    for display in ALL:
        assert_title_fits(display.from_run(run).plot())


def test_hostile_labels_can_be_drawn():
    p = {"gate": [[0.9, 0.1], [0.2, 0.8]], "intent": [[0.6, 0.3, 0.1]] * 2}
    stages = [{**GATE, "labels": ["$", "in"]}, {"name": "intent", "labels": ["<b>", "$x_1$", "=1+1"]}]
    run = run_of_probabilities(stages, ["<b>", "$x_1$"], p, name="$x_1$ {")
    for display in ALL:
        display.from_run(run).plot().figure_.canvas.draw()


def test_missing_shadow_scores_are_an_error():
    with pytest.raises(RunError, match="run the cascade again with shadow scores"):
        OutcomeFlowDisplay.from_run(five_texts(shadow=False))


def test_the_rejected_texts_of_clinc150_fit_into_a_picture(clinc150_run):
    display = CounterfactualMatrixDisplay.from_run(clinc150_run)
    assert display.confusion_matrix.sum() == (clinc150_run.predictions["decided_by"] == "gate").sum()
    assert len(display.most_confused().display_labels) <= 15
    assert_title_fits(display.plot())
    assert_title_fits(display.most_confused().plot())

"""Risk against coverage, against hand-worked examples, brute force, closed forms and scikit-learn."""

from __future__ import annotations

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
from helpers import random_run
from sklearn.metrics import roc_auc_score
from test_displays import drawn_inside

from cascade_lab import RiskCoverageDisplay
from cascade_lab.analysis.bootstrap import resample_counts, wilson, wilson_of_variance
from cascade_lab.analysis.coverage import (
    AREAS,
    correct_and_confidence,
    coverage_metrics,
    operating_point,
    risk_coverage,
    risk_coverage_areas,
    risk_coverage_curve,
    weighted_areas,
)
from cascade_lab.analysis.metrics import metric_intervals
from cascade_lab.exceptions import RunError
from cascade_lab.run import Run


@pytest.fixture(scope="module", params=[1, 2, 3])
def run(request, tmp_path_factory) -> Run:
    folder = tmp_path_factory.mktemp("runs") / "one"
    return random_run(folder, n=150, n_gates=request.param, seed=request.param, skill=2.0)


def unweighted_areas(correct, confidence):
    weights = np.ones((1, len(correct)), dtype=int)
    return [float(area[0]) for area in weighted_areas(correct, confidence, weights=weights)]


def brute_force(correct):
    """Return AURC and AUGRC of an order, text by text."""
    n, risks, area, errors = len(correct), [], 0.0, 0
    for k, is_correct in enumerate(correct, 1):
        before, errors = errors, errors + int(not is_correct)
        risks.append(errors / k)
        area += (before + errors) / 2 / n / n
    return np.mean(risks), area


def test_five_texts_worked_by_hand():
    """
    order   wrong   errors so far   risk    answered wrongly, of all
    1       no      0               0       0
    2       yes     1               1/2     1/5
    3       no      1               1/3     1/5
    4       no      1               1/4     1/5
    5       yes     2               2/5     2/5

    AURC is the mean risk, 89/300. A perfect order has the risks 0, 0, 0, 1/4, 2/5. AUGRC's trapezoids are 1/10, 1/5,
    1/5 and 3/10, each 1/5 wide.
    """
    confidence, correct = np.array([0.1, 0.9, 0.8, 0.3, 0.5]), np.array([False, True, False, True, True])
    expected = [89 / 300, 89 / 300 - 13 / 100, 0.16]
    assert unweighted_areas(correct, confidence) == pytest.approx(expected)
    table = risk_coverage_areas(correct, confidence)
    assert table["value"].to_dict() == pytest.approx(dict(zip(AREAS, expected, strict=True)))
    assert (table["low"] <= table["high"]).all()


def test_areas_are_the_mean_over_the_orders_of_equal_confidences_and_weights_are_repetitions():
    rng = np.random.default_rng(0)
    confidence, correct = rng.integers(0, 4, 30) / 3, rng.random(30) >= 0.3
    orders = [np.lexsort((rng.random(30), -confidence)) for _ in range(4000)]
    aurc, augrc = np.mean([brute_force(correct[order]) for order in orders], axis=0)
    areas = unweighted_areas(correct, confidence)
    assert areas[0] == pytest.approx(aurc, abs=0.003)
    assert areas[2] == pytest.approx(augrc, abs=0.003)
    weights = rng.integers(0, 3, (5, 30))
    for i, weighted in enumerate(zip(*weighted_areas(correct, confidence, weights=weights), strict=True)):
        assert weighted == pytest.approx(unweighted_areas(correct.repeat(weights[i]), confidence.repeat(weights[i])))


def test_areas_without_ties_equal_brute_force_and_augrc_the_formula_of_its_paper():
    rng = np.random.default_rng(1)
    for _ in range(5):
        confidence, correct = rng.random(80), rng.random(80) >= 0.25
        aurc, excess, augrc = unweighted_areas(correct, confidence)
        assert (aurc, augrc) == pytest.approx(brute_force(correct[np.argsort(-confidence)]))
        assert excess == pytest.approx(aurc - brute_force(np.sort(correct)[::-1])[0])
        accuracy = correct.mean()
        auroc = roc_auc_score(correct, confidence)
        assert augrc == pytest.approx((1 - auroc) * accuracy * (1 - accuracy) + (1 - accuracy) ** 2 / 2)


def test_a_random_order_has_the_error_rate_as_its_aurc_and_a_perfect_one_the_closed_form():
    rng = np.random.default_rng(2)
    correct = np.arange(200) >= 40
    areas = np.array([unweighted_areas(correct, rng.random(200)) for _ in range(400)])
    assert areas[:, 0].mean() == pytest.approx(0.2, abs=0.006)
    assert areas[:, 2].mean() == pytest.approx(0.1, abs=0.003)
    many = np.arange(200_000) < 160_000
    aurc, excess, _ = unweighted_areas(many, -np.arange(200_000.0))
    assert aurc == pytest.approx(0.2 + 0.8 * np.log(0.8), abs=1e-5)
    assert excess == pytest.approx(0, abs=1e-9)


@pytest.mark.parametrize("n_values", [4, 1000])
def test_the_variance_of_an_area_is_that_of_redrawn_texts(n_values):
    """Texts that occur five times are one text; the upper end counts a fifth of an error more."""
    rng = np.random.default_rng(1)
    confidence = rng.integers(0, n_values, 400) / n_values
    correct = rng.random(400) < 0.4 + 0.5 * confidence
    redrawn = weighted_areas(correct, confidence, weights=resample_counts(400, n_resamples=4000))
    table = risk_coverage_areas(correct, confidence)
    for name, areas, squared_weight in zip(AREAS, redrawn, (2, 2, 1 / 3), strict=True):
        bounds = (0.0, 0.5 if name == "augrc" else 1.0)
        value, low, high = table.loc[name]
        for end, more in ((0, 0.0), (1, 0.2 * squared_weight / 400**2)):
            ends = wilson_of_variance(value, areas.var() + more, n_constant=400, bounds=bounds)
            assert (low, high)[end] - value == pytest.approx(ends[end] - value, rel=0.05), name
    groups = np.arange(400).repeat(5)
    five = risk_coverage_areas(correct.repeat(5), confidence.repeat(5), groups=groups)
    assert five.to_numpy() == pytest.approx(table.to_numpy(), abs=0.002)


@pytest.mark.filterwarnings("error")
def test_without_an_error_or_a_correct_text_an_area_has_the_interval_of_a_fraction():
    confidence = np.arange(30) / 30
    right, wrong = (risk_coverage_areas(np.full(30, is_right), confidence) for is_right in (True, False))
    assert right.loc["aurc"].tolist() == pytest.approx([0, *wilson(0, 30)[1:]])
    assert wrong.loc["aurc"].tolist() == pytest.approx([1, *wilson(30, 30)[1:]])
    assert wrong.loc["augrc", "high"] == 0.5


@pytest.mark.parametrize("confidence", ["product", "last", "gate"])
def test_a_curve_is_the_error_rate_of_those_above_each_threshold(run, confidence):
    correct, values = correct_and_confidence(run, confidence)
    table = risk_coverage(run, confidence, n_resamples=200)
    for row in table.itertuples():
        answered = values >= row.threshold
        assert row.n_examples == answered.sum()
        assert row.coverage == pytest.approx(answered.mean())
        assert row.value == pytest.approx(1 - correct[answered].mean())
        assert 0 <= row.low <= row.high <= 1
    assert table["coverage"].iloc[-1] == 1
    pd.testing.assert_frame_equal(risk_coverage_curve(correct, values, n_resamples=200), table)
    metrics = coverage_metrics(run, [confidence]).set_index("metric")
    assert list(metrics["value"]) == pytest.approx(unweighted_areas(correct, values))
    assert (metrics["low"] <= metrics["high"]).all()


def test_the_intervals_of_a_curve_are_those_of_redrawn_texts(run):
    correct, confidence = correct_and_confidence(run)
    point = risk_coverage(run, n_resamples=2000).iloc[100]
    rng, risks = np.random.default_rng(5), []
    for _ in range(2000):
        texts = rng.integers(0, len(correct), len(correct))
        best = np.lexsort((rng.random(len(correct)), -confidence[texts]))[: int(point["n_examples"])]
        risks.append(1 - correct[texts][best].mean())
    assert (point["low"], point["high"]) == pytest.approx(np.quantile(risks, [0.025, 0.975]), abs=0.02)


def test_the_operating_point_is_the_cascades_own(run):
    intervals, table = operating_point(run), metric_intervals(run)
    for name in ("coverage", "risk"):
        assert intervals[name] == pytest.approx(tuple(table.loc[name]), abs=0.015)
        assert intervals[name].value == pytest.approx(table.loc[name, "value"])


def test_what_has_no_confidence_is_refused(run):
    scores = run.scores("last")
    logits = {stage.name: run.scores(stage.name).logits for stage in run.spec.stages}
    logits["last"] = np.where(scores.shadow[:, None], np.nan, scores.logits)
    with pytest.raises(RunError, match="run the cascade again with shadow scores"):
        risk_coverage(Run.from_logits(run.spec, run.examples, logits))
    with pytest.raises(RunError, match="did you mean 'product'"):
        correct_and_confidence(run, "produkt")
    for arrays in (([True], [0.5, 0.5]), ([], [])):
        with pytest.raises(RunError, match="give one value of each per text"):
            risk_coverage_areas(*arrays)


def test_a_cascade_without_gates_has_one_confidence(tmp_path):
    alone = random_run(tmp_path / "alone", n=60, n_gates=0)
    assert set(coverage_metrics(alone)["confidence"]) == {"last"}
    with pytest.raises(RunError, match="no gate"):
        correct_and_confidence(alone, "gate")


def test_unlabelled_texts_are_left_out(run):
    is_labelled = np.arange(len(run.examples)) % 3 > 0
    examples = run.examples.assign(label=run.examples["label"].where(is_labelled, None))
    logits = {stage.name: run.scores(stage.name).logits for stage in run.spec.stages}
    partly, labelled = Run.from_logits(run.spec, examples, logits), run.select(np.flatnonzero(is_labelled))
    pd.testing.assert_frame_equal(risk_coverage(partly, n_resamples=50), risk_coverage(labelled, n_resamples=50))
    assert operating_point(partly) == operating_point(labelled)


@pytest.mark.parametrize("n_labels", [2, 41, 151])
def test_the_display_keeps_what_it_draws_and_marks_the_operating_point(tmp_path, n_labels):
    run = random_run(tmp_path / "run", n=300, n_labels=n_labels, skill=3.0)
    display = RiskCoverageDisplay.from_run(run)
    display.title = "$x_1$ $"
    display.plot()
    drawn_inside(display.figure_)
    assert list(display.curves) == ["product", "last", "gate"]
    legend = display.ax_.get_legend()
    for text in legend.get_texts():
        box = text.get_window_extent()
        assert 0 <= box.x0 <= box.x1 <= display.figure_.bbox.x1
        assert box.y0 >= 0
    assert f"risk {display.operating_point['risk'].value:.1%}" in legend.get_texts()[-1].get_text()
    assert list(RiskCoverageDisplay.from_run(run, confidences=["last"]).plot().curves) == ["last"]
    plt.close("all")


def test_areas_intervals_cover_at_their_nominal_rate():
    rng = np.random.default_rng(7)

    def draw(n):
        confidence = rng.random(n)
        return rng.random(n) <= 0.5 + confidence / 2, confidence

    truth = unweighted_areas(*draw(300_000))
    hits = []
    for _ in range(200):
        correct, confidence = draw(200)
        weights = rng.multinomial(200, np.full(200, 1 / 200), 200)
        low, high = np.quantile(weighted_areas(correct, confidence, weights=weights), [0.05, 0.95], axis=1)
        hits.append((low <= truth) & (truth <= high))
    assert np.mean(hits, axis=0) == pytest.approx([0.9, 0.9, 0.9], abs=0.06)

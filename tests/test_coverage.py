"""Risk against coverage, against hand-worked examples, brute force, closed forms and scikit-learn."""

from __future__ import annotations

import matplotlib.pyplot as plt
import numpy as np
import pytest
from random_runs import random_run
from sklearn.metrics import roc_auc_score
from test_displays import drawn_inside

from cascade_lab import RiskCoverageDisplay
from cascade_lab.analysis.coverage import areas, confidences, coverage_figures, operating_point, risk_coverage
from cascade_lab.analysis.metrics import figures
from cascade_lab.errors import RunError
from cascade_lab.run import Run, Scores


@pytest.fixture(scope="module", params=[1, 2, 3])
def run(request, tmp_path_factory) -> Run:
    folder = tmp_path_factory.mktemp("runs") / "one"
    return random_run(folder, n=150, n_gates=request.param, seed=request.param, skill=2.0)


def of_all(score, wrong):
    return [float(area[0]) for area in areas(score, wrong, weights=np.ones((1, len(score)), dtype=int))]


def brute(wrong):
    """AURC and AUGRC of an order, text by text."""
    n, risks, area, errors = len(wrong), [], 0.0, 0
    for k, is_wrong in enumerate(wrong, 1):
        before, errors = errors, errors + int(is_wrong)
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
    score, wrong = np.array([0.1, 0.9, 0.8, 0.3, 0.5]), np.array([True, False, True, False, False])
    assert of_all(score, wrong) == pytest.approx([89 / 300, 89 / 300 - 13 / 100, 0.16])


def test_areas_are_the_mean_over_the_orders_of_equal_confidences_and_weights_are_repetitions():
    rng = np.random.default_rng(0)
    score, wrong = rng.integers(0, 4, 30) / 3, rng.random(30) < 0.3
    orders = [np.lexsort((rng.random(30), -score)) for _ in range(4000)]
    aurc, augrc = np.mean([brute(wrong[order]) for order in orders], axis=0)
    found = of_all(score, wrong)
    assert found[0] == pytest.approx(aurc, abs=0.003)
    assert found[2] == pytest.approx(augrc, abs=0.003)
    weights = rng.integers(0, 3, (5, 30))
    for i, area in enumerate(zip(*areas(score, wrong, weights=weights), strict=True)):
        assert area == pytest.approx(of_all(score.repeat(weights[i]), wrong.repeat(weights[i])))


def test_areas_without_ties_are_brute_forces_and_augrc_is_that_of_its_papers_formula():
    rng = np.random.default_rng(1)
    for _ in range(5):
        score, wrong = rng.random(80), rng.random(80) < 0.25
        aurc, excess, augrc = of_all(score, wrong)
        assert (aurc, augrc) == pytest.approx(brute(wrong[np.argsort(-score)]))
        assert excess == pytest.approx(aurc - brute(np.sort(wrong))[0])
        accuracy = 1 - wrong.mean()
        auroc = roc_auc_score(~wrong, score)
        assert augrc == pytest.approx((1 - auroc) * accuracy * (1 - accuracy) + (1 - accuracy) ** 2 / 2)


def test_a_random_order_has_the_error_rate_as_its_aurc_and_a_perfect_one_the_closed_form():
    rng = np.random.default_rng(2)
    wrong = np.arange(200) < 40
    found = np.array([of_all(rng.random(200), wrong) for _ in range(400)])
    assert found[:, 0].mean() == pytest.approx(0.2, abs=0.006)
    assert found[:, 2].mean() == pytest.approx(0.1, abs=0.003)
    many = np.arange(200_000) < 40_000
    aurc, excess, _ = of_all(-np.arange(200_000.0), many[::-1])
    assert aurc == pytest.approx(0.2 + 0.8 * np.log(0.8), abs=1e-5)
    assert excess == pytest.approx(0, abs=1e-9)


@pytest.mark.parametrize("confidence", ["product", "last", "gate"])
def test_a_curve_is_the_error_rate_of_those_above_each_threshold(run, confidence):
    score, wrong = confidences(run, confidence)
    table = risk_coverage(run, confidence, n_resamples=200)
    for row in table.itertuples():
        answered = score >= row.threshold
        assert row.n_examples == answered.sum()
        assert row.coverage == pytest.approx(answered.mean())
        assert row.value == pytest.approx(wrong[answered].mean())
        assert 0 <= row.low <= row.high <= 1
    assert table["coverage"].iloc[-1] == 1
    figure = coverage_figures(run, [confidence], n_resamples=100).set_index("figure")
    assert list(figure["value"]) == pytest.approx(of_all(score, wrong))
    assert (figure["low"] <= figure["high"]).all()


def test_the_intervals_of_a_curve_are_those_of_redrawn_texts(run):
    score, wrong = confidences(run)
    point = risk_coverage(run, n_resamples=2000).iloc[100]
    rng, risks = np.random.default_rng(5), []
    for _ in range(2000):
        texts = rng.integers(0, len(score), len(score))
        best = np.lexsort((rng.random(len(score)), -score[texts]))[: int(point["n_examples"])]
        risks.append(wrong[texts][best].mean())
    assert (point["low"], point["high"]) == pytest.approx(np.quantile(risks, [0.025, 0.975]), abs=0.02)


def test_the_operating_point_is_the_cascades_own(run):
    found, table = operating_point(run), figures(run)
    for name in ("coverage", "risk"):
        assert found[name] == pytest.approx(tuple(table.loc[name]), abs=0.015)
        assert found[name].value == pytest.approx(table.loc[name, "value"])


def test_what_has_no_confidence_is_refused(run, tmp_path):
    bare, whole = Run.read(run.directory), run.scores("last")
    kept = ~whole.shadow
    bare._scores["last"] = Scores(whole.rows[kept], whole.logits[kept], whole.shadow[kept])
    with pytest.raises(RunError, match="run the cascade again with shadow scores"):
        risk_coverage(bare)
    with pytest.raises(RunError, match="did you mean 'product'"):
        confidences(run, "produkt")
    alone = random_run(tmp_path / "alone", n=60, n_gates=0)
    assert set(coverage_figures(alone, n_resamples=10)["confidence"]) == {"last"}
    with pytest.raises(RunError, match="no gate"):
        confidences(alone, "gate")


@pytest.mark.parametrize("n_labels", [2, 41, 151])
def test_the_display_keeps_what_it_draws_and_marks_where_the_cascade_stands(tmp_path, n_labels):
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
        score = rng.random(n)
        return score, rng.random(n) > 0.5 + score / 2

    truth = of_all(*draw(300_000))
    hits = []
    for _ in range(200):
        score, wrong = draw(200)
        weights = rng.multinomial(200, np.full(200, 1 / 200), 200)
        low, high = np.quantile(areas(score, wrong, weights=weights), [0.05, 0.95], axis=1)
        hits.append((low <= truth) & (truth <= high))
    assert np.mean(hits, axis=0) == pytest.approx([0.9, 0.9, 0.9], abs=0.06)

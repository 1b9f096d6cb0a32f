"""Prevalence and accuracy without labels: against EM, scikit-learn, and simulation with a known truth."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.special import expit
from sklearn.linear_model import LogisticRegression

from cascade_lab.analysis.bootstrap import wilson
from cascade_lab.analysis.prevalence import (
    Labelled,
    Unlabelled,
    _fit,
    atc_note,
    black_box_interval,
    black_box_prevalence,
    estimate_notes,
    estimate_shift,
    fits_prevalence_shift,
    shifted_prevalence,
    threshold_accuracy,
)


def draw(rng: np.random.Generator, n: int, prevalence: float, *, moved: float = 0.0) -> Labelled:
    """Return texts with one score; `moved` changes that of the texts in scope."""
    out = rng.random(n) < prevalence
    score = rng.normal(size=n) + np.where(out, 2.5, moved)
    rejected, confidence = score > 1.6, expit(3 - 1.5 * score)
    correct = np.where(out, rejected, ~rejected & (rng.random(n) < confidence))
    confidence = np.where(rejected, expit(score), confidence)
    return Labelled(score[:, None], rejected, rejected.astype(int), confidence, out, correct)


def em(posterior: np.ndarray, prior: float) -> float:
    """Return what the iteration of Saerens et al. (2002), equation 4, ends at."""
    prevalence = prior
    for _ in range(20_000):
        odds = posterior / (1 - posterior) * (prevalence / prior) * ((1 - prior) / (1 - prevalence))
        prevalence = (odds / (1 + odds)).mean()
    return prevalence


@pytest.mark.parametrize("prevalence", [0.02, 0.3, 0.8])
def test_the_prevalence_is_what_em_converges_to(prevalence):
    rng = np.random.default_rng(0)
    out = rng.random(300) < prevalence
    posterior = expit(rng.normal(np.where(out, 1.5, -1.5)))
    assert shifted_prevalence(posterior, 0.5) == pytest.approx(em(posterior, 0.5), abs=1e-5)
    weights = np.stack([np.ones(300), np.arange(300) % 3])
    both = shifted_prevalence(posterior, 0.5, weights)
    assert both[1] == pytest.approx(shifted_prevalence(np.repeat(posterior, np.arange(300) % 3), 0.5))


def test_without_evidence_of_the_other_kind_the_prevalence_is_at_its_end():
    assert shifted_prevalence([0.01] * 5, 0.5) == pytest.approx(0, abs=1e-8)
    assert shifted_prevalence([0.99] * 5, 0.5) == pytest.approx(1, abs=1e-8)
    assert np.isnan(shifted_prevalence([], 0.5))


def test_the_regression_is_scikit_learns():
    rng = np.random.default_rng(1)
    texts = draw(rng, 500, 0.1)
    values = np.column_stack([texts.evidence, rng.normal(size=500), np.zeros(500)])
    weights, bias = _fit(values, texts.out_of_scope)
    scaled = (values - values.mean(axis=0)) / np.where(values.std(axis=0) > 0, values.std(axis=0), 1)
    model = LogisticRegression(tol=1e-10, max_iter=1000).fit(scaled, texts.out_of_scope)
    assert expit(values @ weights + bias) == pytest.approx(model.predict_proba(scaled)[:, 1], abs=1e-5)
    assert np.isfinite(_fit(np.arange(20.0)[:, None], np.arange(20) > 9)[0]).all()  # separable


def test_black_box_estimation_solves_the_confusion_matrix():
    """As Lipton et al. (2018) do: the joint shares C, and w = C^-1 mu; the prevalence is w times the old one."""
    joint = np.array([[0.72, 0.05], [0.08, 0.15]])  # rows: answered, rejected; columns: in scope, out of scope
    now = np.array([0.6, 0.4])
    ratio = np.linalg.solve(joint, now)
    recall, false_rate = joint[1, 1] / joint[:, 1].sum(), joint[1, 0] / joint[:, 0].sum()
    assert black_box_prevalence(now[1], recall, false_rate) == pytest.approx(ratio[1] * joint[:, 1].sum())
    assert black_box_prevalence(0.0, recall, false_rate) == 0
    assert np.isnan(black_box_prevalence(0.3, 0.2, 0.2))


def test_thresholded_confidence_gives_the_accuracy_of_the_same_texts():
    rng = np.random.default_rng(2)
    confidence, correct = rng.random(200), rng.random(200) < 0.7
    assert threshold_accuracy(confidence, correct, confidence) == pytest.approx(correct.mean())
    assert threshold_accuracy([0.5], [False], [0.9]) == 0
    assert np.isnan(threshold_accuracy([], [], [0.9]))


def _simulate(n_times: int, prevalence: float) -> np.ndarray:
    """Return how often each interval contains the truth, NaN where none is given, and how often each is given.

    The truth of the accuracies is that of all such texts.
    """
    truth_of = draw(np.random.default_rng(9), 400_000, prevalence).correct.mean()
    truth, rng, covered = np.array([prevalence, prevalence, truth_of, truth_of]), np.random.default_rng(0), []
    for seed in range(n_times):
        labelled, unlabelled = draw(rng, 1000, 0.1), Unlabelled(*draw(rng, 1500, prevalence)[:4])
        table = estimate_shift(labelled, unlabelled, n_resamples=60, seed=seed)
        is_covered = (table["low"] <= truth) & (truth <= table["high"])
        covered.append(np.where(table["low"].isna(), np.nan, is_covered))
    return np.array(covered)


def test_intervals_contain_a_known_prevalence():
    covered = _simulate(15, 0.2)
    assert (covered[:, :3].mean(axis=0) >= 0.7).all()  # 11 of 15; if 0.95 is true, P(fewer) < 0.001
    assert np.isnan(covered[:, 3]).all()  # twice as many out of scope: confidence does not tell the accuracy


@pytest.mark.slow
@pytest.mark.parametrize("prevalence", [0.02, 0.1, 0.3])
def test_intervals_contain_a_known_prevalence_as_often_as_they_say(prevalence):
    """0.93 to 0.97, each with three standard errors of 600 simulations."""
    covered = _simulate(600, prevalence)
    is_given = ~np.isnan(covered)
    assert is_given[:, :3].all()
    assert is_given[:, 3].mean() > 0.8 if prevalence == 0.1 else not is_given[:, 3].any()
    for column in covered.T[: 4 if prevalence == 0.1 else 3]:
        n = np.isfinite(column).sum()
        low, high = 0.93 - 3 * np.sqrt(0.93 * 0.07 / n), 0.97 + 3 * np.sqrt(0.97 * 0.03 / n)
        assert low <= np.nanmean(column) <= high, np.nanmean(covered, axis=0)


def test_the_test_of_the_assumption_is_quiet_under_another_prevalence_and_sees_other_texts():
    rng, n_quiet, n_moved = np.random.default_rng(3), 0, 0
    for seed in range(40):
        labelled = draw(rng, 800, 0.15)
        quiet, moved = (Unlabelled(*draw(rng, 1000, 0.3, moved=moved)[:4]) for moved in (0.0, 0.5))
        n_quiet += fits_prevalence_shift(labelled, quiet, n_resamples=99, seed=seed) <= 0.1
        n_moved += fits_prevalence_shift(labelled, moved, n_resamples=99, seed=seed) <= 0.1
    assert n_quiet <= 11  # 4 are expected; P(more) < 0.001
    assert n_moved >= 36


def test_a_sample_of_one_kind_gives_no_prevalence():
    rng = np.random.default_rng(4)
    table = estimate_shift(draw(rng, 50, 0.0), Unlabelled(*draw(rng, 50, 0.1)[:4]), n_resamples=5)
    assert table["now"].isna().tolist() == [True, True, True, False]


def test_few_texts_give_no_estimate_and_a_sentence():
    rng = np.random.default_rng(5)
    labelled, texts = draw(rng, 400, 0.1), Unlabelled(*draw(rng, 40, 0.1)[:4])
    one = Unlabelled(*(values[:1] for values in texts))
    table = estimate_shift(labelled, one, n_resamples=5)
    assert table[["now", "low", "high"]].isna().all(axis=None)
    assert np.isnan(fits_prevalence_shift(labelled, one))
    assert estimate_notes(labelled, one) == [
        "Prevalence and accuracy are not estimated: at least 20 labelled texts and 20 texts of the traffic are needed; "
        "there are 400 and 1."
    ]
    few = draw(rng, 400, 0.0)._replace(out_of_scope=np.arange(400) < 9)
    table = estimate_shift(few, texts, n_resamples=5)
    assert table["now"].isna().tolist() == [True, True, True, False]
    assert table["low"].isna().all()
    assert "there are 391 and 9" in estimate_notes(few, texts)[0]
    assert atc_note(table).endswith("whether the share out of scope has changed is not known.")
    assert estimate_notes(labelled, texts) == []


@pytest.mark.parametrize("noise", [0.0, 1e-9])
def test_constant_evidence_gives_no_prevalence(noise):
    rng = np.random.default_rng(6)
    labelled, texts = draw(rng, 300, 0.3), Unlabelled(*draw(rng, 200, 0.3)[:4])
    same = [0.1 + noise * rng.normal(size=(n, 3)) for n in (300, 200)]  # 0.1 is not the mean of 300 times 0.1
    labelled, texts = (each._replace(evidence=x) for each, x in zip((labelled, texts), same, strict=True))
    table = estimate_shift(labelled, texts, n_resamples=5)
    assert table.loc[["prevalence_em", "accuracy_reweighted"], ["now", "low", "high"]].isna().all(axis=None)
    assert table.loc[["prevalence_black_box", "accuracy_atc"]].notna().all(axis=None)
    assert np.isnan(fits_prevalence_shift(labelled, texts))
    assert "do not tell" in estimate_notes(labelled, texts)[0]


def test_a_stage_without_labelled_texts_is_left_out_of_the_accuracy():
    rng = np.random.default_rng(7)
    labelled, texts = draw(rng, 300, 0.1), Unlabelled(*draw(rng, 200, 0.1)[:4])
    with_new = texts._replace(stage=np.append(texts.stage[:-1], 2))
    others = Unlabelled(*(values[:-1] for values in texts))
    found, expected = (
        estimate_shift(labelled, each, n_resamples=2).loc["accuracy_atc", "now"] for each in (with_new, others)
    )
    assert found == pytest.approx(expected)
    assert "leaves out 1 of 200 texts" in estimate_notes(labelled, with_new)[0]
    nowhere = texts._replace(stage=np.full(200, 2))
    assert np.isnan(estimate_shift(labelled, nowhere, n_resamples=2).loc["accuracy_atc", "now"])


def test_accuracy_by_confidence_has_an_interval_only_if_the_prevalence_is_the_same():
    rng = np.random.default_rng(10)
    labelled, sides = draw(rng, 1000, 0.1), [draw(rng, 1500, prevalence)[:4] for prevalence in (0.1, 0.3)]
    same, other = (estimate_shift(labelled, Unlabelled(*side), n_resamples=40) for side in sides)
    assert same.loc["accuracy_atc"].notna().all()
    assert atc_note(same) == ""
    assert other.loc["accuracy_atc"].isna().tolist() == [False, False, True, True]
    assert other.drop(index="accuracy_atc").notna().all(axis=None)
    assert "the share out of scope has changed" in atc_note(other)


def test_the_interval_of_black_box_estimation_is_the_delta_methods():
    """Of 40 labelled texts out of scope 30 are rejected, of 160 others 8; of 500 new texts 100."""
    out = np.arange(200) < 40
    rejected = np.isin(np.arange(200), [*range(30), *range(40, 48)])
    blank = np.zeros((200, 1))
    labelled = Labelled(blank, rejected, np.zeros(200), np.zeros(200), out, rejected == out)
    low, high = black_box_interval(labelled, np.arange(500) < 100)
    value = (0.2 - 0.05) / (0.75 - 0.05)
    variances = [p * (1 - p) / n for p, n in ((100.5 / 501, 500), (30.5 / 41, 40), (8.5 / 161, 160))]
    half = 1.95996 * np.sqrt(variances[0] + value**2 * variances[1] + (1 - value) ** 2 * variances[2]) / 0.7
    assert (low, high) == pytest.approx((value - half, value + half), abs=1e-5)
    assert black_box_interval(labelled, np.zeros(500, dtype=bool))[0] == 0
    assert np.isnan(black_box_interval(labelled._replace(rejected=~rejected), rejected)).all()


def test_intervals_at_the_ends_are_as_wide_as_those_of_labelled_texts():
    rng = np.random.default_rng(8)
    labelled, texts = draw(rng, 400, 0.2), Unlabelled(*draw(rng, 40, 0.0, moved=-3.0)[:4])
    table = estimate_shift(labelled, texts, n_resamples=20)
    for name in ("prevalence_em", "prevalence_black_box"):
        assert table.loc[name, ["now", "low"]].tolist() == [0, 0]
        assert table.loc[name, "high"] >= wilson(0, 40).high - 1e-12

"""Figures of a stage and of a cascade against scikit-learn, scipy and simulations."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
from random_runs import random_run
from scipy.stats import norm
from sklearn.metrics import (
    accuracy_score,
    average_precision_score,
    confusion_matrix,
    f1_score,
    precision_recall_fscore_support,
    precision_score,
    recall_score,
    roc_auc_score,
    top_k_accuracy_score,
)

from cascade_lab.analysis.metrics import (
    class_figures,
    confused_pairs,
    confusion,
    figures,
    figures_of,
    in_scope_answers,
    judged,
    wilson,
)
from cascade_lab.analysis.resamples import cell_figures, ranking_figures
from cascade_lab.errors import RunError, SpecError
from cascade_lab.run import Run, Scores

FEW = {"n_resamples": 50}


@pytest.fixture(scope="module", params=[1, 2, 3])
def run(request, tmp_path_factory) -> Run:
    """Random cascades of two, three and four stages."""
    folder = tmp_path_factory.mktemp("runs") / "one"
    return random_run(folder, n=240, n_gates=request.param, n_labels=6, seed=request.param, skill=2.0)


def macro(y_true, y_pred) -> dict[str, float]:
    how = {"average": "macro", "zero_division": 0.0}
    return {
        "accuracy": accuracy_score(y_true, y_pred),
        "macro_precision": precision_score(y_true, y_pred, **how),
        "macro_recall": recall_score(y_true, y_pred, **how),
        "macro_f1": f1_score(y_true, y_pred, **how),
    }


def test_figures_of_resamples_are_those_of_scikit_learn_on_the_drawn_texts():
    rng = np.random.default_rng(0)
    y_true, y_pred = rng.integers(0, 12, 60), rng.integers(0, 12, 60)
    y_pred[:30] = y_true[:30]
    counts = confusion_matrix(y_true, y_pred, labels=range(12))
    gold, said = counts.nonzero()
    score = rng.integers(0, 9, 60) / 8  # with ties
    drawn = rng.integers(0, 60, (40, 60))
    weights = np.array([np.bincount(texts, minlength=60) for texts in drawn])
    cells = np.array([confusion_matrix(y_true[t], y_pred[t], labels=range(12))[gold, said] for t in drawn])
    found = cell_figures(gold, said, 12, cells)
    auroc, precision = ranking_figures(y_true > 5, score, weights=weights)
    for i, texts in enumerate(drawn):
        for name, expected in macro(y_true[texts], y_pred[texts]).items():
            assert found[name][i] == pytest.approx(expected), name
        assert auroc[i] == pytest.approx(roc_auc_score(y_true[texts] > 5, score[texts]))
        assert precision[i] == pytest.approx(average_precision_score(y_true[texts] > 5, score[texts]))


@pytest.mark.parametrize("on", ["reached", "all"])
def test_a_stages_figures_are_those_of_scikit_learn(run, on):
    place = [stage.name for stage in run.spec.stages]
    arrives = run.predictions["decided_by"].map(place.index).to_numpy()
    for i, stage in enumerate(run.spec.stages):
        table = figures(run, stage.name, on=on, **FEW)
        kept = pd.notna(run.gold(stage.name)) & ((arrives >= i) | (on == "all"))
        y_true = run.gold(stage.name)[kept].astype(str)
        logits = run.scores(stage.name).logits[kept]
        if stage.is_gate:
            p = 1 / (1 + np.exp(logits[:, 0].astype(float) - logits[:, 1]))
            y_pred = np.where(p >= 0.5, "in", stage.labels[0])
            expected = {
                "auroc": roc_auc_score(y_true == "in", p),
                "average_precision": average_precision_score(y_true == "in", p),
            }
        else:
            y_pred = np.array(stage.labels)[logits.argmax(axis=1)]
            labels = sorted(stage.labels)
            assert labels == list(stage.labels)
            expected = {
                f"top_{k}_accuracy": top_k_accuracy_score(y_true, logits, k=k, labels=labels) for k in (1, 3, 5)
            }
        assert dict(table["value"]) == pytest.approx({**macro(y_true, y_pred), **expected})
        assert ((table["low"] <= table["value"] + 0.02) & (table["value"] <= table["high"] + 0.02)).all()
        matrix = confusion(run, stage.name, on=on)
        np.testing.assert_array_equal(
            matrix.loc[list(stage.labels), list(stage.labels)], confusion_matrix(y_true, y_pred, labels=stage.labels)
        )
        assert matrix.to_numpy().sum() == len(y_true)


def test_the_cascades_figures_are_those_of_metrics_json_and_of_the_definitions(run):
    table = figures(run, **FEW)["value"]
    answers = run.predictions
    kept = figures_of(run.spec, answers)
    assert {name: table[name] for name in kept} == pytest.approx(kept)
    y_true, y_pred = answers["label"].to_numpy(str), answers["predicted"].to_numpy(str)
    assert {name: table[name] for name in macro(y_true, y_pred)} == pytest.approx(macro(y_true, y_pred))
    answered = ~answers["predicted"].isin(run.spec.reject_labels)
    assert table["coverage"] == pytest.approx(answered.mean())
    assert table["risk"] == pytest.approx((y_true != y_pred)[answered].mean())


@pytest.mark.parametrize("stage", [None, "gate0", "last"])
def test_each_labels_figures_are_those_of_scikit_learn_and_nan_where_undefined(run, stage):
    table = class_figures(run, stage).set_index(["label", "figure"])
    if stage is None:
        y_true, y_pred, labels = run.predictions["label"], run.predictions["predicted"], list(run.spec.labels)
    else:
        found = judged(run, stage)
        y_true, y_pred, labels = found.y_true, found.y_pred, list(confusion(run, stage).index)
    expected = precision_recall_fscore_support(list(y_true), list(y_pred), labels=labels, zero_division=np.nan)
    for i, name in enumerate(("precision", "recall", "f1")):
        values = table.xs(name, level="figure").loc[labels]
        np.testing.assert_allclose(values["value"], expected[i])
        np.testing.assert_array_equal(values["support"], expected[3])
        inside = (values["low"] <= values["value"]) & (values["value"] <= values["high"])
        assert (inside | values["value"].isna()).all()


def test_wilsons_interval_is_its_formula_and_undefined_of_nothing():
    z = norm.ppf(0.95)
    p, n = 7 / 20, 20
    middle = (p + z**2 / (2 * n)) / (1 + z**2 / n)
    half = z / (1 + z**2 / n) * np.sqrt(p * (1 - p) / n + z**2 / (4 * n**2))
    assert wilson(7, 20, level=0.9) == pytest.approx((p, middle - half, middle + half))
    assert np.isnan(wilson(0, 0)).all()


@pytest.mark.parametrize(("normalize", "like"), [("true", "true"), ("pred", "pred"), ("all", "all")])
def test_normalised_matrices_are_those_of_scikit_learn(run, normalize, like):
    matrix = confusion(run, normalize=normalize)
    y_true, y_pred = run.predictions["label"], run.predictions["predicted"]
    expected = confusion_matrix(list(y_true), list(y_pred), labels=list(run.spec.labels), normalize=like)
    np.testing.assert_allclose(np.nan_to_num(matrix), expected)


def test_confused_pairs_are_the_matrix_off_its_diagonal(run):
    for stage in (None, "gate0", "last"):
        pairs, matrix = confused_pairs(run, stage, n=None), confusion(run, stage)
        assert pairs["n_examples"].sum() == matrix.to_numpy().sum() - np.trace(matrix)
        assert pairs["n_examples"].is_monotonic_decreasing
        for row in pairs.itertuples():
            assert row.n_examples == matrix.loc[row.gold, row.answer] > 0
            assert row.fraction_of_gold == pytest.approx(row.n_examples / matrix.loc[row.gold].sum())
    assert len(confused_pairs(run, n=3)) == 3


def test_the_best_class_in_scope_is_the_cascades_answer_where_it_gives_one(run):
    found, answers = in_scope_answers(run), run.predictions
    answered = ~answers["predicted"].isin(run.spec.reject_labels).to_numpy()
    right = (answers["label"] == answers["predicted"]).to_numpy()
    np.testing.assert_array_equal(found.right[answered], right[answered])
    np.testing.assert_allclose(found.p_class[answered], answers["probability"][answered])
    live = in_scope_answers(run, on="reached")
    np.testing.assert_array_equal(live.right, found.right[answered])
    np.testing.assert_array_equal(live.p_gates, found.p_gates[answered])


def test_what_was_not_scored_is_not_made_up(run):
    bare = Run.read(run.directory)
    whole = run.scores("last")
    kept = ~whole.shadow
    bare._scores["last"] = Scores(whole.rows[kept], whole.logits[kept], whole.shadow[kept])
    pd.testing.assert_frame_equal(figures(bare, "last", **FEW), figures(run, "last", **FEW))
    with pytest.raises(RunError, match="scored only what reached it; run the cascade again with shadow scores"):
        figures(bare, "last", on="all")
    with pytest.raises(RunError, match="must be 'reached'"):
        figures(run, "last", on="live")
    with pytest.raises(RunError, match="normalize is 'row'"):
        confusion(run, normalize="row")
    with pytest.raises(SpecError, match="did you mean 'gate"):
        class_figures(run, "gate")


def test_a_stage_that_nothing_reached_has_figures_that_are_nan(run):
    empty = Run.read(run.directory)
    whole = run.scores("last")
    empty._scores["last"] = Scores(whole.rows, whole.logits, np.ones(len(whole.rows), dtype=bool))
    assert figures(empty, "last", **FEW).isna().all(axis=None)
    assert class_figures(empty, "last")[["value", "low", "high"]].isna().all(axis=None)
    assert confused_pairs(empty, "last").empty
    assert confusion(empty, "last", normalize="all").isna().all(axis=None)


def test_intervals_cover_at_their_nominal_rate(tmp_path):
    """Of many eval sets drawn from one large one, nine in ten intervals at 90% hold the large one's figure."""
    population = random_run(tmp_path / "all", n=20000, n_labels=3, seed=9, skill=1.5)
    truth = {stage: figures(population, stage, n_resamples=1)["value"] for stage in (None, "gate0")}
    f1 = class_figures(population).set_index(["label", "figure"])["value"]
    rng = np.random.default_rng(0)
    held: dict[str, list[bool]] = {}
    for _ in range(50):
        rows = np.sort(rng.choice(20000, 250, replace=False))
        run = Run(population.directory)
        run.examples = population.examples.iloc[rows].reset_index(drop=True)
        run.predictions = population.predictions.iloc[rows].reset_index(drop=True)
        for stage in run.spec.stages:
            whole = population.scores(stage.name)
            run._scores[stage.name] = Scores(np.arange(250), whole.logits[rows], whole.shadow[rows])
        for stage, expected in truth.items():
            for name, row in figures(run, stage, level=0.9, n_resamples=200).iterrows():
                held.setdefault(f"{stage} {name}", []).append(row["low"] <= expected[name] <= row["high"])
        for row in class_figures(run, level=0.9).itertuples():
            held.setdefault(f"labels' {row.figure}", []).append(row.low <= f1[row.label, row.figure] <= row.high)
    rates = {name: np.mean(hits) for name, hits in held.items()}
    assert all(0.8 <= rate <= 0.98 for rate in rates.values()), rates
    assert np.mean(list(rates.values())) == pytest.approx(0.9, abs=0.05)

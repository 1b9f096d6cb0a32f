"""Metrics of a stage and of a cascade: by hand, against scikit-learn, and by simulation."""

from __future__ import annotations

import json
import math
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
from helpers import GATE, memory_run, random_run, run_of_probabilities, without_texts
from scipy.stats import mannwhitneyu
from sklearn.metrics import (
    average_precision_score,
    confusion_matrix,
    precision_recall_fscore_support,
    roc_auc_score,
    top_k_accuracy_score,
)
from test_classification import macro_metrics

from cascade_lab.analysis.calibration import calibration_metrics
from cascade_lab.analysis.intervals import outcome_intervals
from cascade_lab.analysis.metrics import (
    confused_pairs,
    confusion,
    in_scope_predictions,
    label_metrics,
    labelled_decisions,
    metric_intervals,
    prediction_metrics,
    summarize,
)
from cascade_lab.analysis.outcomes import FRACTIONS, outcome_codes
from cascade_lab.analysis.summary import error_summary, interval_notes, run_summary
from cascade_lab.exceptions import RunError, SpecError
from cascade_lab.run import Run

FEW = {"n_resamples": 50}


def test_six_texts_by_hand():
    """A gate at 0.5, then four classes.

    =====  =====  =====  ======  ===================================================
    label  p(in)  class  answer  what it is
    =====  =====  =====  ======  ===================================================
    0      .9     0      0       right
    1      .8     2      2       wrong class
    2      .3     2      oos     false reject (the class would have been right)
    oos    .2     1      oos     right reject
    oos    .6     3      3       false accept
    oos    .1     0      oos     right reject
    =====  =====  =====  ======  ===================================================
    """
    p_in = np.array([0.9, 0.8, 0.3, 0.2, 0.6, 0.1])
    p = {"gate": np.stack([1 - p_in, p_in], axis=1), "intent": 0.01 + 0.96 * np.eye(4)[[0, 2, 2, 1, 3, 0]]}
    run = run_of_probabilities(
        [GATE, {"name": "intent", "labels": list("0123")}], ["0", "1", "2", "oos", "oos", "oos"], p
    )
    metrics = summarize(run)
    gate, intent = metrics["stages"]["gate"], metrics["stages"]["intent"]
    assert (metrics["n_examples"], metrics["n_labelled"]) == (6, 6)
    assert metrics["end_to_end"] == pytest.approx(
        {
            "accuracy": 3 / 6,
            # F1 of 0: 1; of 1: 0; of 2: 0; of oos: 2/3; 3 is predicted, but never true, and has none
            "macro_f1": (1 + 0 + 0 + 2 / 3) / 4,
            "in_scope_accuracy": 1 / 3,
            "reject_recall": 2 / 3,
            "reject_precision": 2 / 3,
        }
    )
    assert gate == pytest.approx(
        {
            "reach": 1.0,
            "n_reached": 6,
            "n_with_target": 6,
            "n_out_of_scope": 3,
            "accuracy": 4 / 6,
            "macro_f1": 2 / 3,
            "auroc": mannwhitneyu(p_in[:3], p_in[3:]).statistic / 9,
            "average_precision": (1 / 1 + 2 / 2 + 3 / 4) / 3,  # the texts to stop have ranks 1, 2 and 4
        }
    )
    assert (intent["reach"], intent["n_reached"], intent["n_with_target"]) == (0.5, 3, 2)
    assert intent["accuracy"] == pytest.approx(1 / 2)


def test_a_last_stage_with_a_label_for_texts_out_of_scope_is_measured_on_them_too():
    """Two texts out of scope reach it, and it rejects one; the gate stops a third one. Then the stage alone."""
    last = {"name": "intent", "labels": ["a", "oos"], "reject_label": "oos"}
    p = {
        "gate": [[0.1, 0.9]] * 4 + [[0.9, 0.1]],
        "intent": [[0.9, 0.1], [0.4, 0.6], [0.3, 0.7], [0.8, 0.2], [0.1, 0.9]],
    }
    labels = ["a", "a", "oos", "oos", "oos"]
    run = run_of_probabilities([GATE, last], labels, p)
    intent = summarize(run)["stages"]["intent"]
    assert (intent["n_reached"], intent["n_with_target"], intent["n_out_of_scope"]) == (4, 4, 2)
    assert intent["accuracy"] == 2 / 4
    for on, n, n_out_of_scope in (("reached", 4, 2), ("all", 5, 3)):
        calibration = calibration_metrics(run, "intent", on=on, **FEW)
        assert (calibration.attrs["n_examples"], calibration.attrs["n_out_of_scope"]) == (n, n_out_of_scope)
    alone = run_of_probabilities([last], labels, {"intent": p["intent"]})
    metrics = summarize(alone)
    assert metrics["stages"]["intent"]["accuracy"] == metrics["end_to_end"]["accuracy"] == 3 / 5
    assert metrics["end_to_end"]["reject_recall"] == 2 / 3


def test_what_is_undefined_is_nan_and_null_in_the_file(tmp_path):
    last = {"name": "i", "labels": ["a", "b"]}
    run = run_of_probabilities([GATE, last], ["a"], {"gate": [[0.1, 0.9]], "i": [[0.9, 0.1]]})
    assert math.isnan(run.metrics["end_to_end"]["reject_recall"])
    assert math.isnan(run.metrics["stages"]["gate"]["auroc"])
    content = json.loads((run.write(tmp_path / "run").directory / "metrics.json").read_text())
    assert content["end_to_end"]["reject_recall"] is None
    assert content["end_to_end"]["in_scope_accuracy"] == 1.0


def test_unlabelled_texts_count_only_in_the_reach():
    """t1 is right and t2 a false reject; t3 (passed) and t4 (stopped) have no label."""
    last = {"name": "i", "labels": ["a", "b"]}
    p = {"gate": [[0.1, 0.9], [0.9, 0.1], [0.1, 0.9], [0.9, 0.1]], "i": [[0.9, 0.1]] * 4}
    run = run_of_probabilities([GATE, last], ["a", "b", None, None], p)
    metrics = summarize(run)
    assert (metrics["n_examples"], metrics["n_labelled"]) == (4, 2)
    assert metrics["end_to_end"]["accuracy"] == 0.5
    gate, intent = metrics["stages"]["gate"], metrics["stages"]["i"]
    assert (gate["n_reached"], gate["n_with_target"], gate["accuracy"]) == (4, 2, 0.5)
    assert (intent["reach"], intent["n_reached"], intent["n_with_target"]) == (0.5, 2, 1)
    assert confusion(run).to_numpy().sum() == confusion(run, "gate").to_numpy().sum() == 2
    assert metric_intervals(run).loc["accuracy", "value"] == 0.5
    assert labelled_decisions(run, "i").rows.tolist() == [0]
    assert in_scope_predictions(run).correct.tolist() == [True, False]
    with pytest.raises(RunError, match="no example has a label"):
        summarize(run_of_probabilities([GATE, last], [None] * 4, p))


def test_the_clinc150_cascade_has_the_accuracies_of_the_independent_implementation(clinc150_run):
    """Its makers computed these for validation with PyTorch, at three thresholds."""
    for threshold, expected in ((0.5, (0.9557, 0.540, 0.9423)), (0.9, (0.9470, 0.630, 0.9368)),
                                (0.99, (0.9157, 0.750, 0.9103))):  # fmt: skip
        predictions = clinc150_run.replay({"gate": threshold})
        metrics = prediction_metrics(clinc150_run.spec, predictions)
        values = [round(metrics[name], 4) for name in ("in_scope_accuracy", "reject_recall", "accuracy")]
        assert values == pytest.approx(expected, abs=1e-4)
    assert without_texts(clinc150_run.replay()).equals(clinc150_run.predictions)


@pytest.fixture(scope="module", params=[1, 2, 3])
def run(request, tmp_path_factory) -> Run:
    """Random cascades of two, three and four stages."""
    folder = tmp_path_factory.mktemp("runs") / "run"
    return random_run(folder, n=240, n_gates=request.param, n_labels=6, seed=request.param, skill=2.0)


@pytest.mark.parametrize("on", ["reached", "all"])
def test_the_metrics_of_a_stage_are_those_of_scikit_learn(run, on):
    names = [stage.name for stage in run.spec.stages]
    decided_at = run.predictions["decided_by"].map(names.index).to_numpy()
    for i, stage in enumerate(run.spec.stages):
        table = metric_intervals(run, stage.name, on=on, **FEW)
        rows = pd.notna(run.targets(stage.name)) & ((decided_at >= i) | (on == "all"))
        y_true = run.targets(stage.name)[rows].astype(str)
        logits = run.scores(stage.name).logits[rows]
        if stage.is_gate:
            p = 1 / (1 + np.exp(logits[:, 0].astype(float) - logits[:, 1]))
            y_pred = np.where(p >= 0.5, "in", stage.labels[0])
            expected = {
                "auroc": roc_auc_score(y_true != "in", 1 - p),
                "average_precision": average_precision_score(y_true != "in", 1 - p),
            }
        else:
            y_pred = np.array(stage.labels)[logits.argmax(axis=1)]
            labels = sorted(stage.labels)
            assert labels == list(stage.labels)
            expected = {
                f"top_{k}_accuracy": top_k_accuracy_score(y_true, logits, k=k, labels=labels) for k in (1, 3, 5)
            }
        assert dict(table["value"]) == pytest.approx({**macro_metrics(y_true, y_pred), **expected})
        assert ((table["low"] <= table["value"] + 0.02) & (table["value"] <= table["high"] + 0.02)).all()
        matrix = confusion(run, stage.name, on=on)
        np.testing.assert_array_equal(
            matrix.loc[list(stage.labels), list(stage.labels)], confusion_matrix(y_true, y_pred, labels=stage.labels)
        )
        assert matrix.to_numpy().sum() == len(y_true)


def test_the_metrics_of_a_cascade_are_those_of_metrics_json_and_of_their_definitions(run):
    values = metric_intervals(run, **FEW)["value"]
    predictions = run.predictions
    metrics = prediction_metrics(run.spec, predictions)
    assert {name: values[name] for name in metrics} == pytest.approx(metrics)
    y_true, y_pred = predictions["label"].to_numpy(str), predictions["predicted"].to_numpy(str)
    assert {name: values[name] for name in macro_metrics(y_true, y_pred)} == pytest.approx(
        macro_metrics(y_true, y_pred)
    )
    answered = ~predictions["predicted"].isin(run.spec.reject_labels)
    assert values["coverage"] == pytest.approx(answered.mean())
    assert values["risk"] == pytest.approx((y_true != y_pred)[answered].mean())
    intervals = outcome_intervals(outcome_codes(run.spec, predictions["label"], predictions["predicted"]), **FEW)
    assert {name: values[name] for name in FRACTIONS} == pytest.approx(
        {name: row.value for name, row in intervals.items()}
    )


@pytest.mark.parametrize("stage", [None, "gate0", "last"])
def test_the_metrics_of_labels_are_those_of_scikit_learn(run, stage):
    table = label_metrics(run, stage).set_index(["label", "metric"])
    if stage is None:
        y_true, y_pred, labels = run.predictions["label"], run.predictions["predicted"], list(run.spec.labels)
    else:
        decisions = labelled_decisions(run, stage)
        y_true, y_pred, labels = decisions.y_true, decisions.y_pred, list(confusion(run, stage).index)
    expected = precision_recall_fscore_support(list(y_true), list(y_pred), labels=labels, zero_division=np.nan)
    for i, name in enumerate(("precision", "recall", "f1")):
        np.testing.assert_allclose(table.xs(name, level="metric").loc[labels]["value"], expected[i])


def test_confused_pairs_are_the_matrix_off_its_diagonal(run):
    for stage in (None, "gate0", "last"):
        pairs, matrix = confused_pairs(run, stage, n=None), confusion(run, stage)
        assert pairs["n_examples"].sum() == matrix.to_numpy().sum() - np.trace(matrix)
        assert pairs["n_examples"].is_monotonic_decreasing
        for row in pairs.itertuples():
            assert row.n_examples == matrix.loc[row.label, row.predicted] > 0
            assert row.fraction_of_label == pytest.approx(row.n_examples / matrix.loc[row.label].sum())
    assert len(confused_pairs(run, n=3)) == 3


def test_the_prediction_in_scope_is_the_answer_where_the_cascade_gives_one(run):
    table, predictions = in_scope_predictions(run), run.predictions
    answered = ~predictions["predicted"].isin(run.spec.reject_labels).to_numpy()
    right = (predictions["label"] == predictions["predicted"]).to_numpy()
    np.testing.assert_array_equal(table.correct[answered], right[answered])
    np.testing.assert_allclose(table.p_class[answered], predictions["probability"][answered])
    reached = in_scope_predictions(run, on="reached")
    np.testing.assert_array_equal(reached.correct, table.correct[answered])
    np.testing.assert_array_equal(reached.p_gates, table.p_gates[answered])


def test_scores_that_are_missing_are_an_error_where_they_are_needed(run):
    logits = {stage.name: run.scores(stage.name).logits for stage in run.spec.stages}
    bare = memory_run(run.spec, run.examples, logits, shadow=False)
    pd.testing.assert_frame_equal(metric_intervals(bare, "last", **FEW), metric_intervals(run, "last", **FEW))
    for function in (metric_intervals, labelled_decisions, confusion):
        with pytest.raises(RunError, match=r"'last' never scored \d+ of .*run the cascade again with shadow scores"):
            function(bare, "last", on="all")
    with pytest.raises(RunError, match="'last' never scored"):
        in_scope_predictions(bare)
    with pytest.raises(RunError, match="must be 'reached'"):
        metric_intervals(run, "last", on="live")
    with pytest.raises(RunError, match="normalize is 'row'"):
        confusion(run, normalize="row")
    with pytest.raises(SpecError, match="did you mean 'gate"):
        label_metrics(run, "gate")


def test_the_metrics_of_a_stage_that_no_text_reached_are_nan(run):
    stages = [replace(run.spec.stages[0], threshold=1.0), *run.spec.stages[1:]]
    closed = run.with_spec(replace(run.spec, stages=tuple(stages)))
    assert closed.predictions["decided_by"].eq("gate0").all()
    assert metric_intervals(closed, "last", **FEW).isna().all(axis=None)
    assert label_metrics(closed, "last")[["value", "low", "high"]].isna().all(axis=None)
    assert confused_pairs(closed, "last").empty
    assert confusion(closed, "last", normalize="all").isna().all(axis=None)


def test_texts_that_repeat_count_once_in_every_interval(tmp_path):
    """A run of 60 texts, and one in which each of them occurs five times."""
    run = random_run(tmp_path / "run", n=60, n_labels=3, seed=4, skill=2.0)
    rows = np.repeat(np.arange(60), 5)
    examples = run.examples.iloc[rows].assign(example_id=[f"{i}" for i in range(300)])
    logits = {stage.name: run.scores(stage.name).logits[rows] for stage in run.spec.stages}
    five = Run.from_logits(run.spec, examples.reset_index(drop=True), logits)
    for stage in (None, "gate0", "last"):
        single, table = metric_intervals(run, stage, n_resamples=4000), metric_intervals(five, stage, n_resamples=4000)
        np.testing.assert_allclose(table.to_numpy(), single.to_numpy(), atol=0.03)
        assert "240 of 300 texts repeat an earlier one" in table.attrs["notes"][0] or stage == "last"
        pd.testing.assert_frame_equal(label_metrics(five, stage).drop(columns="support"),
                                      label_metrics(run, stage).drop(columns="support"))  # fmt: skip
    assert single.attrs["notes"] == []
    assert any("240 of 300 texts repeat" in sentence for sentence in run_summary(five))
    assert any("240 of 300 texts repeat" in sentence for sentence in error_summary(five))


def test_where_too_few_texts_allow_no_interval_a_note_says_why():
    """Three labels, one with a single text; a gate that saw one text out of scope."""
    last = {"name": "i", "labels": ["a", "b", "c"]}
    labels = ["a"] * 6 + ["b"] * 6 + ["c", "oos"]
    p = {"gate": [[0.1, 0.9]] * 13 + [[0.9, 0.1]], "i": np.eye(3)[[0] * 6 + [1] * 6 + [2, 0]] * 0.7 + 0.1}
    run = run_of_probabilities([GATE, last], labels, p)
    whole, gate = metric_intervals(run), metric_intervals(run, "gate")
    assert whole.loc["macro_f1", "value"] == 1
    assert whole.loc[["macro_f1", "macro_recall", "macro_precision"], ["low", "high"]].isna().all(axis=None)
    assert whole.loc["accuracy", "low"] == pytest.approx(14 / (14 + 1.96**2), abs=0.001)
    assert whole.attrs["notes"] == ["Macro metrics have no interval: 2 of 4 labels have fewer than 5 texts."]
    assert gate.loc[["auroc", "average_precision"], ["low", "high"]].isna().all(axis=None)
    assert interval_notes(run)[-2:] == [
        "Stage gate: AUROC and average precision have no interval: one kind has a single text.",
        "Stage i: Macro metrics have no interval: 1 of 3 labels has fewer than 5 texts.",
    ]


def test_intervals_cover_at_their_nominal_rate(tmp_path):
    """Of many eval sets drawn from a large one, nine in ten intervals at 90% contain the metric of the large one."""
    population = random_run(tmp_path / "all", n=20000, n_labels=3, seed=9, skill=1.5)
    truth = {stage: metric_intervals(population, stage, n_resamples=1)["value"] for stage in (None, "gate0")}
    of_labels = label_metrics(population).set_index(["label", "metric"])["value"]
    rng = np.random.default_rng(0)
    covered: dict[str, list[bool]] = {}
    for _ in range(50):
        run = population.select(np.sort(rng.choice(20000, 250, replace=False)))
        for stage, expected in truth.items():
            for name, row in metric_intervals(run, stage, level=0.9, n_resamples=200).iterrows():
                covered.setdefault(f"{stage} {name}", []).append(row["low"] <= expected[name] <= row["high"])
        for row in label_metrics(run, level=0.9).itertuples():
            is_covered = row.low <= of_labels[row.label, row.metric] <= row.high
            covered.setdefault(f"of labels: {row.metric}", []).append(is_covered)
    rates = {name: np.mean(hits) for name, hits in covered.items()}
    assert all(0.8 <= rate <= 0.98 for rate in rates.values()), rates
    assert np.mean(list(rates.values())) == pytest.approx(0.9, abs=0.05)

"""A rejector: fitted, written, read, live, replayed, and compared with the rule of now."""

from __future__ import annotations

import shutil
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
from helpers import mixed_run, random_run
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import average_precision_score, roc_auc_score, roc_curve
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from typer.testing import CliRunner

from cascade_lab import Cascade, CascadeSpec, EvalSet, Run, StageSpec
from cascade_lab.cli import app
from cascade_lab.evidence import energy, log_odds
from cascade_lab.exceptions import GoalError, RunError, SpecError
from cascade_lab.rejector import Rejector, logit_evidence
from cascade_lab.thresholds import Goal, compare_rejectors, fit_rejector, tune
from cascade_lab.thresholds.out_of_fold import fitted_on_itself, out_of_fold_run
from cascade_lab.thresholds.rejector import evidence_names
from cascade_lab.thresholds.rejector_comparison import rule_metrics


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return random_run(tmp_path_factory.mktemp("rejector") / "run", n=400, n_labels=5, skill=2.5)


@pytest.fixture(scope="module")
def with_features(tiny, tiny_evalset, tmp_path_factory):
    """A run of the tiny cascade that kept its features."""
    with Cascade.load(tiny, keep_features=True) as cascade:
        return cascade.run(EvalSet.read(tiny_evalset), output=tmp_path_factory.mktemp("runs") / "features")


def test_weights_are_scikit_learns_regression_on_the_evidence(run):
    fitted = fit_rejector(run, ["gate0", "energy"])
    gate, last = (run.scores(name).logits for name in ("gate0", "last"))
    x = np.column_stack([log_odds(gate, 1), energy(last)])
    in_scope = ~run.examples["label"].str.startswith("oos").to_numpy()
    model = make_pipeline(StandardScaler(), LogisticRegression(max_iter=1000)).fit(x, in_scope)
    replayed = run.with_spec(fitted.spec)
    np.testing.assert_allclose(replayed.decision("last").confidence, model.predict_proba(x)[:, 1], atol=1e-6)
    assert fitted.spec.rejector.evidence == ("gate0.log_odds", "last.energy")


def test_out_of_fold_confidences_are_of_fits_without_the_text(run):
    fitted = fit_rejector(run, ["gate0", "energy"])
    inside, outside = (r.decision("last").confidence for r in (run.with_spec(fitted.spec), fitted.run))
    assert 0 < np.abs(inside - outside).max() < 0.2
    again = out_of_fold_run(run.with_spec(fitted.spec))
    np.testing.assert_allclose(again.decision("last").confidence, outside, atol=1e-9)


def test_predictions_are_by_the_confidence_and_thresholds_in_the_spec(run):
    spec = fit_rejector(run, ["gate0", "energy"], at_least=0.6).spec
    replayed = run.with_spec(spec)
    z = {name: run.scores(name).logits.astype(np.float64) for name in ("gate0", "last")}
    w, b = spec.rejector.weights, spec.rejector.bias
    confidence = 1 / (1 + np.exp(-(b + w[0] * log_odds(z["gate0"], 1) + w[1] * energy(z["last"]))))
    passes = 1 / (1 + np.exp(-log_odds(z["gate0"], 1))) >= spec.thresholds["gate0"]
    best = np.array(spec.last.labels)[z["last"].argmax(axis=1)]
    expected = np.where(~passes | (confidence < spec.last.min_probability), "oos0", best)
    assert (replayed.predictions["predicted"] == expected).all()
    assert 0 < (~passes | (confidence < spec.last.min_probability)).mean() < 1


def test_every_random_cascade_replays_its_own_rejector():
    for seed in range(12):
        run = mixed_run(seed, n=300).labelled
        last = run.spec.last.name
        stages = [stage.name for stage in run.spec.stages]
        rejector = Rejector(tuple(f"{name}.log_odds" for name in stages), (0.4,) * len(stages), -0.2)
        spec = replace(run.spec, stages=(*run.spec.stages[:-1], replace(run.spec.last, rejector=rejector)))
        changed = run.with_spec(spec)
        assert CascadeSpec.from_dict(changed.manifest["cascade"]).rejector == rejector
        again = changed.with_thresholds({stages[0]: 0.3}).with_thresholds({stages[0]: spec.stages[0].threshold})
        pd.testing.assert_frame_equal(again.predictions, changed.predictions)
        np.testing.assert_array_equal(changed.select(np.arange(40)).decision(last).confidence,
                                      changed.decision(last).confidence[:40])  # fmt: skip


def test_log_odds_of_a_last_stage_with_its_reject_label_are_those_of_all_other_labels():
    """Two texts; a topic stage with the labels pay, play and oos, whose probabilities are .5, .3, .2 and .1, .1, .8."""
    stage = StageSpec("topic", ("pay", "play", "oos"), reject_label="oos")
    logits = {"topic": np.log([[0.5, 0.3, 0.2], [0.1, 0.1, 0.8]])}
    expected = np.log([0.8 / 0.2, 0.2 / 0.8])
    np.testing.assert_allclose(logit_evidence([stage], ["topic.log_odds"], logits)["topic.log_odds"], expected)
    open_stage = replace(stage, reject_label=None)
    values = logit_evidence([open_stage], ["topic.log_odds"], logits)["topic.log_odds"]
    np.testing.assert_allclose(values, np.log([0.5 / 0.5, 0.8 / 0.2]))
    run = Run.from_logits(
        CascadeSpec("one", (replace(stage, min_probability=0.5, rejector=Rejector(("topic.log_odds",), (1.0,), 0.0)),)),
        pd.DataFrame({"text": ["a", "b"], "label": ["pay", "play"]}),
        logits,
    )
    np.testing.assert_allclose(run.decision("topic").confidence, [0.8, 0.2])
    assert run.predictions["predicted"].tolist() == ["pay", "oos"]
    # Another reject label is other evidence.
    other = run.with_spec(replace(run.spec, stages=(replace(run.spec.last, reject_label="play"),)))
    np.testing.assert_allclose(other.decision("topic").confidence, [0.7, 0.9])


def test_live_run_replays_exactly_with_distances_and_survives_a_copy(with_features, tiny_evalset, tmp_path):
    fitted = fit_rejector(with_features, ["gate", "energy", "mahalanobis", "gate.knn"], train_run=with_features)
    fitted.write(tmp_path / "there" / "rejector.toml")
    shutil.copytree(tmp_path / "there", tmp_path / "here")
    shutil.rmtree(tmp_path / "there")
    path = tmp_path / "here" / "rejector.toml"
    spec = CascadeSpec.read(path)
    spec = spec.with_thresholds({"gate": 0.0, "intent": float(np.median(fitted.run.decision("intent").confidence))})
    evalset = EvalSet.read(tiny_evalset)
    with Cascade.load(spec) as cascade:
        run = cascade.run(evalset, output=tmp_path / "run", batch_size=16)
        table = cascade.predict(evalset.texts)
        one = cascade.predict(evalset.texts[:1])
    for file in path.parent.iterdir():
        file.unlink()  # a run needs nothing outside of its directory
    run = Run.read(tmp_path / "run")
    assert not run.has_features
    replayed = run.with_thresholds({"gate": 1.0}).with_thresholds({"gate": 0.0})
    for column in ("predicted", "decided_by", "probability", "confidence"):
        np.testing.assert_array_equal(run.predictions[column], replayed.predictions[column])
    assert 0.1 < (run.predictions["predicted"] == "oos").mean() < 0.9
    np.testing.assert_allclose(table["confidence"], run.predictions["confidence"], atol=1e-3)
    np.testing.assert_allclose(one["confidence"], table["confidence"][:1], atol=1e-3)
    np.testing.assert_allclose(run.decision("intent").confidence,
                               with_features.with_confidence(spec, run.decision("intent").confidence, evidence={})
                               .decision("intent").confidence)  # fmt: skip


def test_features_are_those_of_bert_tensorflow(tiny, with_features):
    spec = CascadeSpec.read(tiny)
    stages = tuple(replace(stage, engine="reference") for stage in spec.stages)
    batch = with_features.examples["text"].tolist()[:20]
    with Cascade.load(replace(spec, stages=stages), keep_features=True) as cascade:
        for stage in cascade.stages:
            features = stage.score(stage.encode(batch))[0].features
            np.testing.assert_allclose(features, with_features.features(stage.spec.name)[:20], atol=4e-3)
    assert with_features.features("gate").dtype == np.float16


def test_features_in_bfloat16_are_near_those_in_float32(tiny, with_features):
    from cascade_lab.bert.fast import has_bfloat16

    if not has_bfloat16():
        pytest.skip("this processor has no bfloat16 instructions")
    spec = CascadeSpec.read(tiny)
    stages = tuple(replace(stage, precision="bfloat16") for stage in spec.stages)
    with Cascade.load(replace(spec, stages=stages), keep_features=True) as cascade:
        for stage in cascade.stages:
            features = stage.score(stage.encode(with_features.examples["text"].tolist()[:20]))[0].features
            assert features.dtype == np.float16
            difference = np.abs(features - with_features.features(stage.spec.name)[:20])
            assert 0 < difference.max() < 0.2  # of values with a mean square of about 1


def test_a_run_without_features_is_refused_in_one_line(run, tiny_run, with_features):
    with pytest.raises(RunError, match="give a run of the training set"):
        fit_rejector(run, ["mahalanobis"])
    with pytest.raises(RunError, match="--keep-features"):
        fit_rejector(with_features, ["mahalanobis"], train_run=tiny_run)
    with pytest.raises(RunError, match="--keep-features"):
        fit_rejector(tiny_run, ["mahalanobis"], train_run=with_features)
    with pytest.raises(GoalError, match="did you mean 'energy'"):
        evidence_names(run.spec, ["enrgy"])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"evidence": []}, "must be a list of scores"),
        ({"evidence": ["gate0.log_odds", "last.enrgy"]}, "did you mean 'energy'"),
        ({"evidence": ["gat0.log_odds", "last.energy"]}, "no stage has that name"),
        ({"evidence": ["last.energy", "last.energy"]}, "twice"),
        ({"weights": [1.0]}, "must be 2 numbers"),
        ({"weights": [1.0, float("nan")]}, "must be 2 numbers"),
        ({"bias": True}, "bias must be a number"),
        ({"evidence": ["last.energy", "last.knn"]}, "arrays_sha256 are missing"),
        ({"wieghts": []}, "did you mean 'weights'"),
    ],
)
def test_a_wrong_table_is_refused_by_key(run, change, message):
    content = fit_rejector(run, ["gate0", "energy"]).spec.to_dict()
    content["stage"][-1]["rejector"] |= change
    with pytest.raises(SpecError, match=message):
        CascadeSpec.from_dict(content)


def test_another_file_of_arrays_is_refused(with_features, tmp_path):
    fit_rejector(with_features, ["gate", "mahalanobis"], train_run=with_features).write(tmp_path / "a.toml")
    (arrays,) = tmp_path.glob("*.npz")
    arrays.write_bytes(arrays.read_bytes() + b"\0")
    with pytest.raises(SpecError, match="another SHA-256"):
        CascadeSpec.read(tmp_path / "a.toml").rejector.read_arrays()


def test_metrics_of_a_rule_equal_scikit_learns():
    rng = np.random.default_rng(4)
    in_scope = rng.random(500) < 0.7
    confidence = np.round(rng.normal(size=500) + in_scope, 1)  # with ties
    correct = rng.random(500) < 0.9
    weights = np.vstack([np.ones(500, int), rng.integers(0, 3, 500)])
    metrics = rule_metrics(confidence, correct, in_scope, 0.6, weights=weights)
    for row, weight in enumerate(weights):
        auroc = roc_auc_score(in_scope, confidence, sample_weight=weight)
        aupr = average_precision_score(~in_scope, -confidence, sample_weight=weight)
        fpr, tpr, _ = roc_curve(in_scope, confidence, sample_weight=weight, drop_intermediate=False)
        recalls = [
            np.average(confidence[~in_scope] < t, weights=weight[~in_scope])
            for t in np.unique(confidence)
            if np.average((correct & (confidence >= t))[in_scope], weights=weight[in_scope]) >= 0.6
        ]
        expected = {"auroc": auroc, "aupr": aupr, "fpr95": fpr[tpr >= 0.95 - 1e-12][0], "recall": max(recalls)}
        for name, value in expected.items():
            assert metrics[name][row] == pytest.approx(value), name


def test_comparison_proposes_the_fewest_scores_near_the_best(run):
    comparison = compare_rejectors(run, at_least=0.6, n_resamples=50)
    table = comparison.table
    best = table[table["n_scores"] > 0].iloc[0]
    near = table[(table["n_scores"] > 0) & (table["recall"] >= best["recall"] - best["standard_error"])]
    assert table.loc[comparison.proposed, "n_scores"] == near["n_scores"].min()
    now = table[table["n_scores"] == 0].iloc[0]
    assert now["recall_difference"] == 0
    assert (table["recall_difference"] == table["recall"] - now["recall"]).all()


def test_tune_uses_out_of_fold_confidences_on_the_run_of_the_fit(run):
    fitted = fit_rejector(run, ["gate0", "energy"], at_least=0.6)
    own = run.with_spec(fitted.spec)
    assert fitted_on_itself(own)
    goal = Goal(maximize="reject_recall", at_least={"in_scope_accuracy": 0.6})
    tuning = tune(own, goal)
    np.testing.assert_allclose(
        tuning.run.decision("last").confidence, fitted.run.decision("last").confidence, atol=1e-9
    )
    assert any("rejector" in note for note in tuning.notes)


def test_command_compares_fits_and_writes(run, tmp_path):
    output = tmp_path / "rejector.toml"
    arguments = ["fit-rejector", str(run.directory), "--in-scope-accuracy", "0.6", "--output", str(output)]
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 0, result.output
    assert "proposed: " in result.output
    assert CascadeSpec.read(output).rejector is not None
    refused = CliRunner().invoke(app, [*arguments, "--evidence", "energy"])
    assert refused.exit_code == 2
    assert "--overwrite" in refused.output
    unreachable = CliRunner().invoke(app, [*arguments[:2], "--in-scope-accuracy", "1", "--output", str(tmp_path / "b")])
    assert unreachable.exit_code == 2


def test_few_texts_are_refused(run):
    few = run.select(np.flatnonzero(run.examples["label"].str.startswith("oos"))[:5])
    with pytest.raises(RunError, match="a rejector needs at least"):
        fit_rejector(few, ["energy"])


def test_bfloat16_is_checked_with_the_rejector(with_features, tiny_evalset, tmp_path):
    from cascade_lab.bert.fast import has_bfloat16
    from cascade_lab.precision_check import verify_precision

    if not has_bfloat16():
        pytest.skip("this processor has no bfloat16 instructions")
    fitted = fit_rejector(with_features, ["gate", "mahalanobis"], train_run=with_features)
    fitted.write(tmp_path / "rejector.toml")
    check = verify_precision(CascadeSpec.read(tmp_path / "rejector.toml"), EvalSet.read(tiny_evalset))
    assert check.stages["max"].gt(0).all()

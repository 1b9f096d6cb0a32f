"""Rejectors in cascades with a deferral stage: what it answers is accepted, and its threshold stays as it is."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path
from textwrap import dedent

import numpy as np
import pandas as pd
import pytest
from helpers import memory_run, texts, without_texts, write_checkpoint
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from cascade_lab import CascadeSpec, EvalSet, Run, StageSpec
from cascade_lab.displays import RejectScoreDisplay
from cascade_lab.evidence import energy, log_odds
from cascade_lab.exceptions import RunError, SpecError
from cascade_lab.thresholds import Goal, compare_deferral_rules, compare_rejectors, fit_rejector, tune
from cascade_lab.thresholds.rejector_comparison import NOW

TOPICS = ("a", "b", "c", "d")

CASCADE = """
    name = "deferral"
    max_seq_length = 24

    [[stage]]
    name = "small"
    role = "deferral"
    init_checkpoint = "small"
    bert_config_file = "small/bert_config.json"
    vocab_file = "small/vocab.txt"
    labels = ["a", "b", "c", "d"]
    threshold = 0.7

    [[stage]]
    name = "large"
    init_checkpoint = "large"
    bert_config_file = "large/bert_config.json"
    vocab_file = "large/vocab.txt"
    labels = ["a", "b", "c", "d"]
    reject_label = "oos"
"""


def deferral_run(n: int = 500, *, seed: int = 0, gate_first: bool = False) -> Run:
    """Return a run of a small stage that defers, a gate (before or after it) and a large stage that can reject."""
    rng = np.random.default_rng(seed)
    label = rng.integers(0, 5, n)  # 4: out of scope
    inside = label < 4
    logits = {}
    for name, skill in (("small", 2.0), ("large", 4.0)):
        z = rng.normal(size=(n, 4))
        z[np.flatnonzero(inside), label[inside]] += skill
        logits[name] = z.astype(np.float32)
    logits["gate"] = np.column_stack([np.zeros(n), rng.normal(size=n) + np.where(inside, 1.5, -0.5)]).astype(np.float32)
    small = StageSpec("small", TOPICS, role="deferral", threshold=0.75)
    gate = StageSpec("gate", ("oos", "in"), pass_label="in", threshold=0.3)
    first = (gate, small) if gate_first else (small, gate)
    spec = CascadeSpec("deferral", (*first, StageSpec("large", TOPICS, reject_label="oos", min_probability=0.2)))
    examples = pd.DataFrame(
        {
            "example_id": [str(i) for i in range(n)],
            "text": [f"text {i}" for i in range(n)],
            "text_b": None,
            "label": np.array([*TOPICS, "oos"], dtype=object)[label],
        }
    )
    return memory_run(spec, examples, logits, seed=seed)


@pytest.mark.parametrize("gate_first", [False, True])
def test_a_rejector_is_fitted_on_all_texts_and_leaves_the_deferral_stage_alone(gate_first):
    run = deferral_run(gate_first=gate_first)
    fitted = fit_rejector(run, ["gate", "energy"], at_least=0.7)
    z = {name: run.scores(name).logits.astype(np.float64) for name in ("small", "gate", "large")}
    x = np.column_stack([log_odds(z["gate"], 1), energy(z["large"])])
    in_scope = (run.examples["label"] != "oos").to_numpy()
    expected = (
        make_pipeline(StandardScaler(), LogisticRegression(max_iter=1000)).fit(x, in_scope).predict_proba(x)[:, 1]
    )
    replayed = run.with_spec(fitted.spec)
    np.testing.assert_allclose(replayed.decision("large").confidence, expected, atol=1e-6)
    assert fitted.spec.thresholds["small"] == 0.75

    # The rule by hand: the small stage answers where it is sure; then, or before, the gate; then the rejector.
    p_small = (np.exp(z["small"]) / np.exp(z["small"]).sum(axis=1, keepdims=True)).max(axis=1)
    gate_stops = 1 / (1 + np.exp(-log_odds(z["gate"], 1))) < fitted.spec.thresholds["gate"]
    by_large = np.where(expected < fitted.spec.last.min_probability, "oos", np.array(TOPICS)[z["large"].argmax(axis=1)])
    sure, answer = p_small >= 0.75, np.array(TOPICS)[z["small"].argmax(axis=1)]
    later = np.where(gate_stops, "oos", by_large)
    by_hand = np.where(gate_stops & gate_first, "oos", np.where(sure, answer, later))
    assert (replayed.predictions["predicted"].to_numpy() == by_hand).all()
    decided = replayed.predictions["decided_by"].value_counts()
    assert decided["small"] > 50
    assert decided["large"] > 50


@pytest.mark.parametrize(("gate_first", "seed"), [(False, 0), (True, 1)])
def test_recalls_are_the_best_of_replays(gate_first, seed):
    """Of a rule: over all thresholds of the last stage, gates open. Of now: over all pairs with the gate's."""
    run = deferral_run(150, seed=seed, gate_first=gate_first)
    comparison = compare_rejectors(run, at_least=0.7, n_resamples=20)
    y_true = run.examples["label"].to_numpy()

    def recall(replays):
        best = -1.0
        for predicted in replays:
            right = predicted == y_true
            if right[y_true != "oos"].mean() >= 0.7 - 1e-12:
                best = max(best, right[y_true == "oos"].mean())
        return best

    rule = "gate + energy"
    with_rule = run.with_spec(fit_rejector(run, ["gate", "energy"], at_least=0.7).spec)
    confidence = comparison.confidence[rule].to_numpy()
    with_rule = with_rule.with_confidence(with_rule.spec.with_thresholds({"gate": 0.0}), confidence, evidence={})
    replays = [with_rule.replay({"large": t})["predicted"].to_numpy() for t in np.unique(np.append(confidence, 1.0))]
    assert comparison.table.loc[rule, "recall"] == pytest.approx(recall(replays))
    answered = (with_rule.predictions["decided_by"] == "small").to_numpy()
    assert (confidence[answered] == 1).all()
    assert (confidence[~answered] < 1).all()

    grid = [np.unique(np.append(run.decision(name).confidence, [0.0, 1.0]))[::12] for name in ("gate", "large")]
    pairs = [run.replay({"gate": g, "large": t})["predicted"].to_numpy() for g in grid[0] for t in grid[1]]
    assert comparison.table.loc[NOW, "recall"] >= recall(pairs) - 1e-12


def test_the_comparison_is_drawn():
    display = RejectScoreDisplay(compare_rejectors(deferral_run(), at_least=0.7, n_resamples=20)).plot()
    points = display.frame()
    assert points["reject_recall"].max() < 1  # the small stage accepts some texts that are out of scope
    display.plot_histogram(rule=NOW)
    assert display.ax_.get_xlim()[1] < 100


@pytest.fixture(scope="module")
def live(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """A run, with features, of two tiny checkpoints; the large one is mostly right, and a fifth is out of scope."""
    from cascade_lab import Cascade

    folder = tmp_path_factory.mktemp("live")
    for seed, name in enumerate(("small", "large")):
        write_checkpoint(folder / name, 4, seed=seed)
    (folder / "cascade.toml").write_text(dedent(CASCADE))
    lines = texts(240, seed=3)
    spec = CascadeSpec.read(folder / "cascade.toml")
    with Cascade.load(spec, keep_features=True) as cascade:
        first = cascade.run(
            EvalSet.from_frame(pd.DataFrame({"text": lines, "label": "a"})), output=folder / "unlabelled"
        )
        rng = np.random.default_rng(0)
        by_large = np.where(rng.random(240) < 0.8, first.decision("large").label_above, rng.choice(list("abcd"), 240))
        labels = np.where(rng.random(240) < 0.2, "oos", by_large)
        median = float(first.decision("small").confidence.mean())
        cascade = cascade.with_spec(spec.with_thresholds({"small": median}))
        return cascade.run(EvalSet.from_frame(pd.DataFrame({"text": lines, "label": labels})), output=folder / "run")


def test_both_stages_decide_by_distances_live_and_in_a_replay(live: Run, tmp_path: Path):
    """Both rules need the small stage's distances: a row's value is computed once, so that it is the same in both."""
    from cascade_lab import Cascade

    rules = compare_deferral_rules(live, evidence=["margin", "knn"], train_run=live)
    rules.write(tmp_path / "there" / "small.toml")
    run = live.with_spec(CascadeSpec.read(tmp_path / "there" / "small.toml"))
    fitted = fit_rejector(run, ["energy", "small.knn", "mahalanobis"], train_run=live, at_least=0.3)
    fitted.write(tmp_path / "there" / "both.toml")
    shutil.copytree(tmp_path / "there", tmp_path / "here")
    shutil.rmtree(tmp_path / "there")
    spec = CascadeSpec.read(tmp_path / "here" / "both.toml")
    small, large = (stage.rejector for stage in spec.stages)
    assert (small.evidence, large.evidence) == (
        ("small.margin", "small.knn"),
        ("large.energy", "small.knn", "large.mahalanobis"),
    )
    assert small.arrays == large.arrays
    expected = run.with_spec(spec)
    with Cascade.load(spec) as cascade:
        evalset = EvalSet.from_frame(live.examples[["text", "label"]])
        made = cascade.run(evalset, output=tmp_path / "run", batch_size=16)
        answers = cascade.predict(evalset.texts)
    shutil.rmtree(tmp_path / "here")  # a run needs nothing outside of its directory
    made = Run.read(tmp_path / "run")
    moved = made.with_thresholds({"small": 1.0}).with_thresholds({"small": spec.thresholds["small"]})
    for replayed in (without_texts(made.replay()), moved.predictions):
        pd.testing.assert_frame_equal(replayed, made.predictions)
    assert made.predictions["decided_by"].value_counts().min() > 20
    assert 0 < (made.predictions["predicted"] == "oos").mean() < 1
    for table in (answers, expected.predictions):  # a text at the threshold may be decided elsewhere
        same = (table["decided_by"] == made.predictions["decided_by"]).to_numpy()
        assert same.mean() > 0.98
        np.testing.assert_allclose(table["confidence"][same], made.predictions["confidence"][same], atol=2e-3)
    few = made.select(np.arange(30))
    pd.testing.assert_frame_equal(without_texts(few.replay()), few.predictions)


def test_rules_with_other_training_texts_are_refused(live: Run, tmp_path: Path):
    compare_deferral_rules(live, evidence=["knn"], train_run=live).write(tmp_path / "small.toml")
    run = live.with_spec(CascadeSpec.read(tmp_path / "small.toml"))
    half = live.select(np.arange(120))
    with pytest.raises(RunError, match="is of other training texts"):
        fit_rejector(run, ["mahalanobis"], train_run=half, at_least=0.3)
    with pytest.raises(RunError, match="needs the features of the training texts"):
        compare_deferral_rules(live, evidence=["knn"])
    # A rule of logits leaves the other stage's file as it is.
    fit_rejector(run, ["energy"], at_least=0.3).write(tmp_path / "both.toml")
    spec = CascadeSpec.read(tmp_path / "both.toml")
    assert spec.stages[0].rejector.arrays.resolve() == run.spec.stages[0].rejector.arrays.resolve()
    other = replace(spec.stages[0].rejector, arrays_sha256="0" * 64)
    wrong = replace(spec.last, rejector=replace(other, evidence=("large.knn",), weights=(1.0,)))
    with pytest.raises(SpecError, match="all rejectors of a cascade share one"):
        CascadeSpec.from_dict(replace(spec, stages=(spec.stages[0], wrong)).to_dict())


def test_tune_takes_out_of_fold_confidences_of_a_deferral_rule_on_the_run_of_its_fit():
    run = deferral_run(600)
    rules = compare_deferral_rules(run, evidence=["margin", "energy"])
    own = run.with_spec(rules.spec)
    tuning = tune(own, Goal("accuracy"), n_resamples=20, n_repeats=1)
    assert any("The rejector of small was fitted on these texts" in note for note in tuning.notes)
    inside, outside = (one.decision("small").confidence for one in (own, tuning.run))
    assert 0 < np.abs(inside - outside).max() < 0.3
    other = deferral_run(600, seed=1)
    assert not any(
        "was fitted" in note
        for note in tune(other.with_spec(rules.spec), Goal("accuracy"), n_resamples=20, n_repeats=1).notes
    )

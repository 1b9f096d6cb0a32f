"""Mixed precision: what can change is found, the promise holds, and a real cascade answers as in float32."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
from helpers import random_spec
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.special import expit, logit
from typer.testing import CliRunner

from cascade_lab import Cascade, CascadeSpec, EvalSet, Run, StageSpec
from cascade_lab.batch.scoring import Block, score_block
from cascade_lab.batch.shards import Settings
from cascade_lab.bert import fast
from cascade_lab.calibrator import Calibrator
from cascade_lab.cli import app
from cascade_lab.cli.verify_precision import rounded_up
from cascade_lab.decisions import decide
from cascade_lab.exceptions import CheckpointError, RunError, SpecError
from cascade_lab.mixed_precision import (
    could_differ,
    differences,
    in_float32,
    n_bounds,
    outside_probability,
    without_stale_bounds,
)
from cascade_lab.mixed_scoring import with_time_of
from cascade_lab.precision_bounds import PrecisionBounds
from cascade_lab.precision_check import measure_bounds, verify_mixed, verify_precision
from cascade_lab.provenance import sha256
from cascade_lab.rejector import Rejector
from cascade_lab.serving.batching import Batcher
from cascade_lab.serving.collect import collect
from cascade_lab.serving.live_cascade import LiveCascade
from cascade_lab.serving.shadow import ShadowQueue
from cascade_lab.serving.traffic_log import TrafficLog
from cascade_lab.stage import Batch, Stage
from cascade_lab.stage_output import StageOutput, decide_from_outputs

BFLOAT16 = pytest.mark.skipif(not fast.has_bfloat16(), reason="the processor cannot multiply bfloat16")

GATE = StageSpec("gate", ("oos", "in"), pass_label="in", threshold=0.5, precision="mixed")
LAST = StageSpec("last", ("a", "b", "c", "d"), precision="mixed")
PLATT = Calibrator("platt", {"weight": 1.7, "bias": 0.4})
ISOTONIC = Calibrator("isotonic", {"log_odds": (-3.0, 0.0, 3.0), "probabilities": (0.1, 0.5, 0.9)})
VECTOR = Calibrator("vector", {"weights": (1.0, 2.0, 0.5, 1.5), "biases": (0.0, 0.3, -0.2, 0.0)})
RULE = Rejector(("gate.log_odds", "last.energy", "last.margin"), (0.5, 0.3, 0.9), -1.0)
SURE = {"reject_label": "oos", "min_probability": 0.5}
EACH = {"reject_label": "oos", "min_probability": 0.4, "min_probabilities": {"a": 0.7, "c": 0.2}}
DEFERRAL = {"role": "deferral", "threshold": 0.5}
CASES = {
    "gate": (GATE, LAST),
    "gate of three labels": (replace(GATE, labels=("oos", "in", "chat")), LAST),
    "gate with Platt": (replace(GATE, calibrator=PLATT), LAST),
    "gate with isotonic": (replace(GATE, labels=("oos", "in", "chat"), calibrator=ISOTONIC), LAST),
    "last": (LAST,),
    "last with temperature": (replace(LAST, temperature=2.5, **SURE),),
    "last with vector": (replace(LAST, calibrator=VECTOR, **SURE),),
    "last with minimums": (replace(LAST, **EACH),),
    "deferral": (replace(LAST, name="small", **DEFERRAL), LAST),
    "rejector": (GATE, replace(LAST, rejector=RULE, **SURE)),
    "rejector with minimums": (GATE, replace(LAST, rejector=RULE, temperature=0.7, **EACH)),
    "deferral with rejector": (
        GATE,
        replace(LAST, rejector=RULE, **DEFERRAL),
        replace(LAST, name="large"),
    ),
}
N = 40


def of_interest(stages: tuple[StageSpec, ...]) -> StageSpec:
    """The stage that a case is about: the one with a rejector, else the first."""
    return next((stage for stage in stages if stage.rejector), stages[0])


def close_call(seed: int, stages: tuple[StageSpec, ...]):
    """Logits in two precisions that change every decision, with thresholds and margins near what they can reach.

    Returns the cascade with bounds measured on these logits, and the outputs `lower` and `exact` of every stage.
    """
    rng = np.random.default_rng(seed)
    size = 10.0 ** rng.uniform(-3, 0)
    lower, exact = {}, {}
    for stage in stages:
        z = rng.normal(0, 1.5, (N, len(stage.labels)))
        push = rng.uniform(-size, size, z.shape)
        rows, order = np.arange(N), z.argsort(axis=1)
        half = N // 2  # in these rows the second label is pushed up and the first down, which is about as far away
        top, second = order[:half, -1], order[:half, -2]
        z[rows[:half], second] = z[rows[:half], top] - 2 * size * rng.choice([0.9, 0.999, 1.001, 1.1], half)
        push[rows[:half], top], push[rows[:half], second] = -size, size
        lower[stage.name] = StageOutput(z, None)
        exact[stage.name] = StageOutput(z + push, None)
    spec = CascadeSpec("close", stages)
    stage = of_interest(stages)
    found = differences(spec, stage, lower, exact, {})
    bounds = PrecisionBounds(float(found.labels.max()), float(found.confidence.max()), "")
    # The threshold is as far from one text's confidence as the bound allows, or a little less or more.
    confidence = decide_from_outputs(spec, stage, lower, {})[0].confidence[rng.integers(N)]
    away = bounds.confidence * rng.choice([-1.001, -0.999, -0.5, 0.5, 0.999, 1.001])
    threshold = float(expit(logit(confidence) + away))
    changed = {"precision_bounds": bounds}
    if stage.role != "final":
        changed["threshold"] = threshold
    elif stage.min_probabilities:
        changed["min_probabilities"] = {"a": threshold, "c": 0.2, "d": min(1.0, threshold * 1.1)}
    elif stage.reject_label:
        changed["min_probability"] = threshold
    stage = replace(stage, **changed)
    return replace(spec, stages=tuple(stage if s.name == stage.name else s for s in stages)), stage, lower, exact


def outcome(spec: CascadeSpec, stage: StageSpec, outputs):
    """What a stage does with each text: goes on, or the label that it answers with."""
    decision = decide_from_outputs(spec, stage, outputs, {})[0]
    return np.where(decision.ends, decision.label, "goes on"), decision


@pytest.mark.parametrize("case", CASES)
@given(seed=st.integers(0, 2**32 - 1))
@settings(max_examples=25, deadline=None)
def test_a_decision_that_float32_could_change_within_the_bounds_is_found(case, seed):
    spec, stage, lower, exact = close_call(seed, CASES[case])
    expected, _ = outcome(spec, stage, exact)
    # A rejector meets the scores of the gate in either precision, text by text.
    again = np.random.default_rng(seed).random(N) < 0.5
    some = (
        StageOutput(np.where(again[:, None], exact["gate"].logits, lower["gate"].logits), None)
        if "gate" in exact
        else None
    )
    for outputs in (lower, *([{**lower, "gate": some}] if some is not None and stage.name != "gate" else [])):
        got, decision = outcome(spec, stage, outputs)
        unsure = could_differ(stage, outputs[stage.name].logits, decision)
        assert (got == expected)[~unsure].all()
    twice = replace(stage, precision_bounds=PrecisionBounds(1e9, 1e9, ""))
    decision = outcome(spec, stage, lower)[1]
    assert could_differ(twice, lower[stage.name].logits, decision).all(), "everything is within such bounds"


@pytest.mark.parametrize("case", CASES)
def test_bounds_that_are_too_small_would_let_decisions_change(case):
    """The test above can fail: with half the bounds, decisions change that are not found."""
    n_changed = 0
    for seed in range(40):
        spec, stage, lower, exact = close_call(seed, CASES[case])
        bounds = stage.precision_bounds
        small = replace(stage, precision_bounds=PrecisionBounds(bounds.labels / 2, bounds.confidence / 2, ""))
        got, decision = outcome(spec, stage, lower)
        unsure = could_differ(small, lower[stage.name].logits, decision)
        n_changed += (got != outcome(spec, stage, exact)[0])[~unsure].sum()
    assert n_changed > 0


@pytest.mark.parametrize("n_maxima", [1, 2, 4])
def test_the_promise_holds_in_the_stated_share_of_samples(n_maxima):
    """Independent quantities of 200 texts: the probability that a new text exceeds a maximum is known exactly."""
    n_samples, n = 4000, 200
    limit = outside_probability(n, n_maxima, level=0.95)
    maxima = np.random.default_rng(n_maxima).random((n_samples, n, n_maxima)).max(axis=1)
    kept = (1 - maxima.prod(axis=1) <= limit).mean()
    assert 0.95 - 3 * np.sqrt(0.95 * 0.05 / n_samples) <= kept <= 0.97


def test_the_promise_holds_with_dependent_and_tied_quantities():
    rng = np.random.default_rng(5)
    n_samples, n = 2000, 100
    limit = outside_probability(n, 2, level=0.95)
    kept = 0
    for _ in range(n_samples):
        one = rng.integers(0, 30, n)  # ties; the other is 29 - one: never are both large
        low, high = one.min(), one.max()
        kept += (low + 29 - high) / 30 <= limit
    assert kept / n_samples >= 0.95


def test_limits_of_few_texts_and_of_no_bound():
    assert outside_probability(2, 3) == 1.0
    assert outside_probability(100, 0) == 0.0
    spec = random_spec(n_gates=2)
    assert n_bounds(spec) == 0
    mixed = replace(spec, stages=tuple(replace(stage, precision="mixed") for stage in spec.stages))
    assert n_bounds(mixed) == 1 + 1 + 2, "a gate of two labels has one label to reject with"


@pytest.fixture(scope="module")
def measured(tiny, tiny_evalset):
    """The tiny cascade with mixed precision, its bounds measured on its 200 texts."""
    return measure_bounds(CascadeSpec.read(tiny), EvalSet.read(tiny_evalset))


@pytest.fixture(scope="module")
def mixed(measured, tiny, tiny_evalset):
    """The same cascade, with thresholds that many texts are near; loaded."""
    with Cascade.load(at_medians(measured.spec, tiny_evalset)) as cascade:
        yield cascade


def at_medians(spec: CascadeSpec, evalset) -> CascadeSpec:
    """The cascade with thresholds in the middle of the confidences, and a last stage that rejects."""
    last = replace(spec.last, reject_label="oos", min_probability=0.0)
    spec = replace(spec, stages=(*spec.stages[:-1], last))
    with Cascade.load(in_float32(spec)) as cascade:
        found = cascade.predict(EvalSet.read(evalset).texts)
    return spec.with_thresholds(
        {"gate": found["gate_probability"].median(), "intent": found["intent_probability"].median()}
    )


def with_bounds(spec: CascadeSpec, labels: float, confidence: float) -> CascadeSpec:
    stages = []
    for stage in spec.stages:
        bounds = replace(stage.precision_bounds, labels=labels, confidence=confidence)
        stages.append(replace(stage, precision_bounds=bounds))
    return replace(spec, stages=tuple(stages))


@BFLOAT16
def test_a_mixed_cascade_answers_as_in_float32_in_every_way(mixed, tiny_evalset, tmp_path):
    evalset = EvalSet.read(tiny_evalset)
    with Cascade.load(in_float32(mixed.spec)) as cascade:
        expected = cascade.predict(evalset.texts)
    found = mixed.predict(evalset.texts)
    pd.testing.assert_frame_equal(found[["predicted", "decided_by"]], expected[["predicted", "decided_by"]])
    alone = pd.concat([mixed.predict([text]) for text in evalset.texts[:40]], ignore_index=True)
    assert alone["predicted"].tolist() == expected["predicted"].tolist()[:40]
    run = mixed.run(evalset, output=tmp_path / "run")
    assert run.predictions["predicted"].tolist() == expected["predicted"].tolist()
    replayed = run.with_thresholds({}).predictions
    pd.testing.assert_frame_equal(replayed, run.predictions)
    for stage in mixed.stages:
        name = stage.spec.name
        scores = Run.read(tmp_path / "run").scores(name)
        assert 0 < scores.rescored.sum() < len(scores.rescored)
        assert (scores.rescored & scores.shadow).any() or name == "gate", "shadow scores follow the same rule"
        encodings = stage.encode(evalset.texts)
        in_bfloat16, exact = (one.score(encodings)[0].logits for one in (stage, stage.exact))
        np.testing.assert_allclose(scores.logits[scores.rescored], exact[scores.rescored], atol=1e-5)
        np.testing.assert_allclose(scores.logits[~scores.rescored], in_bfloat16[~scores.rescored], atol=1e-2)
        assert np.abs(scores.logits - exact)[~scores.rescored].max() > 1e-4
        assert run.manifest["stages"][name]["precision"] == "mixed"
        # Every text near the threshold was scored again, and the others were not.
        decision = run.decision(name)
        assert not could_differ(run.spec.stage(name), scores.logits, decision)[~scores.rescored].any()


@BFLOAT16
def test_with_huge_bounds_every_score_is_in_float32(mixed, tiny_evalset, tmp_path):
    evalset = EvalSet.read(tiny_evalset)
    with Cascade.load(with_bounds(mixed.spec, 1e9, 1e9)) as cascade:
        run = cascade.run(evalset, output=tmp_path / "run")
        for stage in cascade.stages:
            scores = run.scores(stage.spec.name)
            assert scores.rescored.all()
            expected = stage.exact.score(stage.encode(evalset.texts))[0].logits
            np.testing.assert_allclose(scores.logits, expected, atol=1e-5)
        probability = cascade.predict(evalset.texts)["gate_probability"]
        assert run.timings.groupby("stage")["n_examples"].sum()["gate"] == len(evalset)
    with Cascade.load(in_float32(mixed.spec)) as cascade:
        np.testing.assert_allclose(probability, cascade.predict(evalset.texts)["gate_probability"], atol=1e-6)


def test_the_time_of_a_second_scoring_is_shared_out_by_tokens():
    batches = [Batch(2, 8, 16, 1.0), Batch(3, 8, 24, 2.0)]
    assert [batch.run_seconds for batch in with_time_of(batches, [Batch(1, 8, 8, 5.0)])] == [3.0, 5.0]
    assert with_time_of([], [Batch(1, 8, 8, 5.0)]) == []


@BFLOAT16
@pytest.mark.parametrize("evidence", [("gate.log_odds", "intent.energy"), ("gate.mahalanobis", "intent.margin")])
def test_a_rejector_over_two_stages_decides_as_in_float32(measured, tiny_evalset, tmp_path, evidence):
    """Where its decision is close, the gate's scores are in float32 too, although the gate's own decision was clear."""
    evalset = EvalSet.read(tiny_evalset)
    arrays = tmp_path / "rejector.npz"
    rng = np.random.default_rng(0)
    np.savez(arrays, **{"gate.class_means": rng.normal(0, 1, (3, 32)), "gate.whitening": np.eye(32)})
    rejector = Rejector(evidence, (0.05, 0.1), 0.0, arrays, sha256(arrays))
    last = replace(measured.spec.last, rejector=rejector, reject_label="oos", min_probability=0.5)
    gate = replace(measured.spec.stages[0], threshold=0.0)
    bounds = measure_bounds(replace(measured.spec, stages=(gate, last)), evalset)
    with Cascade.load(in_float32(bounds.spec)) as cascade:
        confidence = cascade.predict(evalset.texts)["confidence"]
        spec = bounds.spec.with_thresholds({"intent": confidence.median()})
        expected = cascade.with_spec(in_float32(spec)).predict(evalset.texts)
    with Cascade.load(spec) as cascade:
        run = cascade.run(evalset, output=tmp_path / "run")
        found = cascade.predict(evalset.texts)
    assert run.predictions["predicted"].tolist() == expected["predicted"].tolist()
    assert set(run.predictions["predicted"]) > {"oos"}
    again = run.scores("intent").rescored
    assert 0 < again.sum() < len(again)
    assert (run.scores("gate").rescored >= again).all()
    np.testing.assert_allclose(found["gate_probability"][again], expected["gate_probability"][again], atol=1e-6)
    np.testing.assert_allclose(found["confidence"][again], expected["confidence"][again], atol=1e-6)
    pd.testing.assert_frame_equal(run.with_thresholds({}).predictions, run.predictions)


@BFLOAT16
def test_what_bounds_depend_on_is_checked_and_thresholds_are_free(measured, tiny_evalset):
    spec = measured.spec
    gate, last = spec.stages
    without = replace(spec, stages=(gate, replace(last, precision_bounds=None)))
    with pytest.raises(CheckpointError, match=r"stage 'intent': precision mixed needs precision_bounds; measure them"):
        Cascade.load(without)
    with pytest.raises(CheckpointError, match=r"stage 'intent': its precision_bounds .*verify-precision.*--calibrate"):
        Cascade.load(replace(spec, stages=(gate, replace(last, max_seq_length=20))))
    with Cascade.load(spec) as cascade:
        free = replace(last, reject_label="oos", min_probability=0.4, min_probabilities={"0": 0.6})
        assert len(cascade.with_spec(replace(spec, stages=(gate, free))).predict(["pay"])) == 1
        for changed in (
            replace(last, temperature=2.0),
            replace(last, calibrator=VECTOR),
            replace(last, rejector=Rejector(("gate.log_odds",), (1.0,), 0.0), reject_label="oos"),
            replace(last, precision_bounds=gate.precision_bounds),
            without.last,
        ):
            with pytest.raises(
                CheckpointError, match=r"stage 'intent': .*measure them with `cascade-lab verify-precision"
            ):
                cascade.with_spec(replace(spec, stages=(gate, changed)))
    warmer = replace(spec, stages=(gate, replace(last, temperature=2.0)))
    kept = without_stale_bounds(spec, warmer)
    assert [stage.precision_bounds is None for stage in kept.stages] == [False, True]
    rule = Rejector(("gate.log_odds",), (1.0,), 0.0)
    before = replace(spec, stages=(gate, replace(last, rejector=rule, reject_label="oos")))
    after = replace(before, stages=(replace(gate, temperature=2.0), before.last))
    assert [s.precision_bounds is None for s in without_stale_bounds(before, after).stages] == [True, True]


@BFLOAT16
def test_the_spec_keeps_its_bounds_in_every_form(measured, tmp_path):
    spec = measured.spec
    spec.write(tmp_path / "mixed.toml")
    assert CascadeSpec.read(tmp_path / "mixed.toml").to_dict() == spec.to_dict()
    assert CascadeSpec.from_dict(spec.to_dict()).to_dict() == spec.to_dict()
    bounds = [stage.precision_bounds for stage in CascadeSpec.from_dict(spec.to_dict()).stages]
    assert bounds == [stage.precision_bounds for stage in spec.stages]
    bounds = CascadeSpec.read(tmp_path / "mixed.toml").last.precision_bounds
    assert bounds == spec.last.precision_bounds
    assert bounds.measured_on["n_texts"] == measured.n_texts
    assert bounds.measured_on["outside_probability"] == outside_probability(measured.n_texts, 3)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"labels": -1}, "precision_bounds.labels is -1; it must be a number, at least 0"),
        ({"confidence": True}, "precision_bounds.confidence is True"),
        ({"confidence": float("inf")}, "precision_bounds.confidence is inf"),
        ({"digest": 3}, "precision_bounds.digest is 3; it must be a string"),
        ({"measured_on": 3}, "precision_bounds.measured_on must be a table"),
        ({"label": 1}, "precision_bounds: unknown key 'label'; did you mean 'labels'"),
    ],
)
def test_a_wrong_table_of_bounds_is_refused(tiny, change, message):
    content = CascadeSpec.read(tiny).to_dict()
    content["stage"][1]["precision_bounds"] = {"labels": 0.1, "confidence": 0.1, "digest": ""} | change
    with pytest.raises(SpecError, match=f"stage 'intent': {message}"):
        CascadeSpec.from_dict(content)
    content["stage"][1]["precision_bounds"] = 3
    with pytest.raises(SpecError, match="precision_bounds must be a table, not 3"):
        CascadeSpec.from_dict(content)


@BFLOAT16
def test_the_command_writes_a_mixed_cascade_and_compares_it(tiny, tiny_evalset, tmp_path):
    output = tmp_path / "mixed.toml"
    arguments = ["verify-precision", str(tiny), str(tiny_evalset)]
    for flags, message in (
        (["--calibrate"], "--calibrate is given without --output"),
        (["--output", str(output)], "--output is given without --calibrate"),
    ):
        result = CliRunner().invoke(app, [*arguments, *flags])
        assert result.exit_code == 2
        assert message in result.output
    result = CliRunner().invoke(app, [*arguments, "--calibrate", "--output", str(output)])
    assert result.exit_code == 0, result.output
    assert "with confidence 95%, fewer than" in result.output
    assert "are outside the bounds; only those can get another answer than in float32" in " ".join(
        result.output.split()
    )
    assert {stage.precision for stage in CascadeSpec.read(output).stages} == {"mixed"}
    again = CliRunner().invoke(app, [*arguments, "--calibrate", "--output", str(output)])
    assert again.exit_code == 2
    assert "--overwrite" in again.output
    result = CliRunner().invoke(app, ["verify-precision", str(output), str(tiny_evalset)])
    assert result.exit_code == 0, result.output
    assert "0 of 200 texts get another answer than in float32" in result.output
    n = len(set(EvalSet.read(tiny_evalset).texts))
    assert f"at most {rounded_up(1 - 0.05 ** (1 / n))} of texts like these" in result.output
    result = CliRunner().invoke(app, ["inspect", str(output)])
    assert "mixed" in result.output


@BFLOAT16
def test_a_service_and_its_log_say_which_scores_are_float32s(mixed, tiny_evalset, tmp_path):
    texts = EvalSet.read(tiny_evalset).texts
    live = LiveCascade.of(mixed)
    logged, queue = [], ShadowQueue(1.0)
    with Batcher(mixed, log=logged.append) as batcher:
        found = batcher.predict(texts)
    with TrafficLog(tmp_path / "log", shadow=1.0) as log:
        for batch in logged:
            log.add(batch)
            queue.add(batch)
        log.add_shadow(queue.score(mixed, live.served, n_texts=1000))
    warmer = replace(mixed.spec, stages=(mixed.spec.stages[0], replace(mixed.spec.last, temperature=2.0)))
    warmer.write(tmp_path / "warmer.toml")
    with pytest.raises(CheckpointError, match="verify-precision"):
        live.reload(tmp_path / "warmer.toml")
    mixed.spec.with_thresholds({"gate": 0.4}).write(tmp_path / "other.toml")
    assert live.reload(tmp_path / "other.toml").cascade.stages is mixed.stages
    with Cascade.load(in_float32(mixed.spec)) as cascade:
        assert found["predicted"].tolist() == cascade.predict(texts)["predicted"].tolist()
    run = collect(tmp_path / "log").run
    run.write(tmp_path / "run")
    pd.testing.assert_frame_equal(run.with_thresholds({}).predictions, run.predictions)
    for one in (run, Run.read(tmp_path / "run")):
        for stage in ("gate", "intent"):
            scores = one.scores(stage)
            unsure = could_differ(one.spec.stage(stage), scores.logits, one.decision(stage))
            assert 0 < scores.rescored.sum() < len(scores.rescored)
            assert not unsure[~scores.rescored].any()


@BFLOAT16
def test_a_scoring_job_keeps_which_scores_are_float32s(mixed, tiny_evalset):
    texts = EvalSet.read(tiny_evalset).texts
    block = Block([*range(len(texts))], texts, None, [None] * len(texts))
    tables, _ = score_block(mixed, block, Settings("", "", ("scores",), 1.0, True, ""), "int64")
    with Cascade.load(in_float32(mixed.spec)) as cascade:
        assert tables["predictions"]["predicted"].to_pylist() == cascade.predict(texts)["predicted"].tolist()
    of_intent = tables["scores/intent"].to_pandas()
    assert 0 < of_intent["rescored"].sum() < len(of_intent) == len(texts)
    assert (of_intent["rescored"] & of_intent["shadow"]).any()


@BFLOAT16
def test_a_new_temperature_leaves_the_bounds_out_and_says_so(mixed, tiny_evalset, tmp_path):
    mixed.run(EvalSet.read(tiny_evalset), output=tmp_path / "run")
    output = tmp_path / "warm.toml"
    result = CliRunner().invoke(app, ["calibrate", str(tmp_path / "run"), "--stage", "intent", "--output", str(output)])
    assert result.exit_code == 0, result.output
    assert "intent: the precision_bounds no longer fit, and were left out; measure them again:" in result.output
    assert [s.precision_bounds is None for s in CascadeSpec.read(output).stages] == [False, True]
    assert "cascade-lab run" not in result.output  # it would be refused
    result = CliRunner().invoke(app, ["inspect", str(tmp_path / "run")])
    assert "of its 200 kept scores are in float32, the others in bfloat16" in result.output


@BFLOAT16
def test_only_stages_that_ask_for_it_are_measured(tiny, tiny_evalset):
    spec = CascadeSpec.read(tiny)
    one = replace(spec, stages=(spec.stages[0], replace(spec.last, precision="mixed")))
    measured = measure_bounds(one, EvalSet.read(tiny_evalset).limit(20))
    assert [stage.precision for stage in measured.spec.stages] == ["float32", "mixed"]
    assert measured.spec.stages[0].precision_bounds is None
    assert measured.stages.index.tolist() == ["intent"]


@BFLOAT16
def test_a_stage_of_the_reference_engine_stays_in_float32(tiny, tiny_evalset):
    spec = CascadeSpec.read(tiny)
    gate, last = replace(spec.stages[0], engine="reference"), replace(spec.last, precision="mixed")
    found = measure_bounds(replace(spec, stages=(gate, last)), EvalSet.read(tiny_evalset).limit(20))
    assert found.stages.index.tolist() == ["intent"]
    with pytest.raises(RunError, match="stage 'gate': the reference engine has float32 only"):
        verify_precision(replace(spec, stages=(gate, spec.last)), EvalSet.read(tiny_evalset).limit(20))


def test_a_rejector_in_one_precision_cannot_use_mixed_scores(measured, tiny_evalset):
    """Its confidence would be in bfloat16, without bounds: here it rejects, and float32 would not."""
    gate = replace(measured.spec.stages[0], precision="mixed", precision_bounds=PrecisionBounds(0.2, 0.2, ""))
    last = replace(
        measured.spec.last,
        precision="float32",
        precision_bounds=None,
        rejector=Rejector(("gate.log_odds",), (1.0,), -4.01),
        reject_label="oos",
        min_probability=0.5,
    )
    logits = np.array([[0.0, 4.0]])
    assert not could_differ(gate, logits, decide(gate, logits)).any()
    spec = replace(measured.spec, stages=(gate, last))
    for use in (Cascade.load, lambda spec: measure_bounds(spec, EvalSet.read(tiny_evalset).limit(20))):
        with pytest.raises(CheckpointError, match="stage 'intent': its rejector uses scores of stage 'gate'"):
            use(spec)


def test_without_bfloat16_nothing_can_be_compared(tiny, tiny_evalset, monkeypatch):
    monkeypatch.setattr("cascade_lab.precision_check.has_bfloat16", lambda: False)
    with pytest.raises(CheckpointError, match="this processor has no bfloat16 instructions"):
        verify_precision(CascadeSpec.read(tiny), EvalSet.read(tiny_evalset).limit(5))


def test_missing_bfloat16_is_refused_in_one_line(tiny, monkeypatch):
    spec = replace(CascadeSpec.read(tiny).last, precision="mixed")
    monkeypatch.setattr(fast, "has_bfloat16", lambda: False)
    with pytest.raises(
        CheckpointError, match=r"stage 'intent': precision mixed needs a processor .*; set precision = "
    ):
        Stage(spec)


@BFLOAT16
@pytest.mark.slow
def test_on_clinc150_no_answer_changes_and_few_texts_are_scored_again(clinc150):
    sets = {split: EvalSet.read(clinc150 / "data_full.json", split=split) for split in ("val", "test")}
    measured = measure_bounds(CascadeSpec.read(clinc150 / "cascade.toml"), sets["val"])
    assert measured.n_texts > 3000
    assert measured.outside_probability < 0.0025
    assert (measured.stages["rescored"] < 0.05).all()
    check = verify_mixed(measured.spec, sets["test"])
    assert len(check.changed) == 0
    assert (check.stages["n_rescored"] < 0.05 * check.stages["n_scored"]).all()

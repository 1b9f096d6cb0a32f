"""Calibrators: fitted, compared, written, live and replayed, against scikit-learn, scipy and formulas written out."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
from helpers import logits_of, memory_run, mixed_run, without_texts
from scipy.optimize import minimize
from scipy.special import expit, log_expit, log_softmax, logit
from sklearn.isotonic import IsotonicRegression
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import log_loss
from test_calibration import FEW, simulated, spec_of
from typer.testing import CliRunner

from cascade_lab import Cascade, CascadeCalibrationDisplay, CascadeSpec, EvalSet, Run
from cascade_lab.analysis import audit, calibration_metrics, metric_intervals, near_threshold
from cascade_lab.analysis.calibrator_fits import fit_beta, fit_isotonic, fit_platt, fit_vector
from cascade_lab.analysis.calibrators import calibrated, compare_calibrators, fit_stage
from cascade_lab.analysis.metrics import labelled_decisions
from cascade_lab.analysis.temperature import fit_temperatures, texts_to_fit
from cascade_lab.calibrator import Calibrator
from cascade_lab.cli import app
from cascade_lab.decisions import decide, probabilities
from cascade_lab.exceptions import CalibrationError, CascadeLabError, SpecError
from cascade_lab.export import export_cascade
from cascade_lab.latency_benchmark import serve_batch
from cascade_lab.rejector import Rejector

NO_TEMPERATURE = pd.DataFrame()
PLATT = Calibrator("platt", {"weight": 0.7, "bias": -0.4})
BETA = Calibrator("beta", {"a": 0.5, "b": 1.4, "c": 0.3})
ISOTONIC = Calibrator("isotonic", {"log_odds": (-2.0, -0.5, 0.1, 3.0), "probabilities": (0.05, 0.3, 0.3, 0.95)})
OF_GATES = [PLATT, BETA, ISOTONIC]


def by_formula(calibrator: Calibrator, s: np.ndarray) -> np.ndarray:
    """The probability of a gate's pass label, as the papers write it: with the uncalibrated probability q."""
    q, v = 1 / (1 + np.exp(-np.asarray(s, dtype=np.float64))), calibrator.parameters
    if calibrator.method == "platt":
        return 1 / (1 + np.exp(-(v["weight"] * s + v["bias"])))
    if calibrator.method == "beta":
        return 1 / (1 + 1 / (np.exp(v["c"]) * q ** v["a"] / (1 - q) ** v["b"]))
    return np.interp(s, v["log_odds"], v["probabilities"])


def events(n: int = 600, seed: int = 0, *, weight: float = 0.6, bias: float = -0.5) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    s = rng.normal(0, 3, n)
    return rng.random(n) < expit(weight * s + bias), s


def gate_and_classes(calibrator: Calibrator, n_labels: int = 3) -> CascadeSpec:
    rng = np.random.default_rng(n_labels)
    vector = {"weights": rng.uniform(0.4, 1.5, n_labels).tolist(), "biases": rng.normal(size=n_labels).tolist()}
    spec = spec_of(n_labels, calibrator={"method": "vector", **vector}, min_probability=0.6, reject_label="oos")
    return replace(spec, stages=(replace(spec.stages[0], calibrator=calibrator), spec.last))


def biased(spec: CascadeSpec, *, n: int, seed: int) -> Run:
    """A run whose gate passes too much: its labels are drawn after its log-odds were moved by 1.5."""
    run = simulated(spec, n=n, seed=seed)
    logits = logits_of(run)
    moved = np.array(logits["gate"])
    moved[:, spec.stages[0].labels.index("in")] += 1.5
    examples = run.examples[["example_id", "text", "text_b", "label"]]
    return memory_run(spec, examples, {**logits, "gate": moved}, seed=seed)


def test_platt_is_scikit_learns_logistic_regression():
    y, s = events()
    model = LogisticRegression(C=np.inf, tol=1e-10, max_iter=1000).fit(s[:, None], y)
    fitted = fit_platt(y, s).parameters
    assert fitted["weight"] == pytest.approx(model.coef_[0, 0], rel=1e-4)
    assert fitted["bias"] == pytest.approx(model.intercept_[0], rel=1e-4)
    many = fit_platt(*events(60_000)).parameters
    assert (many["weight"], many["bias"]) == pytest.approx((0.6, -0.5), abs=0.03)


@pytest.mark.parametrize("seed", range(4))
def test_beta_has_the_least_log_loss_of_its_formula(seed):
    rng = np.random.default_rng(seed)
    s = rng.normal(0, 2, 500)
    truth = Calibrator("beta", {"a": rng.uniform(0, 2), "b": rng.uniform(0.2, 2), "c": rng.normal()})
    y = rng.random(500) < by_formula(truth, s)

    def loss(x):
        return log_loss(y, by_formula(Calibrator("beta", dict(zip("abc", x, strict=True))), s))

    best = minimize(loss, [1, 1, 0], method="SLSQP", bounds=[(0, None), (0, None), (None, None)], tol=1e-13)
    fitted = list(fit_beta(y, s).parameters.values())
    assert loss(fitted) <= best.fun + 1e-9
    np.testing.assert_allclose(fitted, best.x, atol=2e-3)


def test_beta_with_a_weight_at_its_bound_is_the_regression_on_the_other():
    """Where a free fit would make `a` negative, it is 0."""
    rng = np.random.default_rng(1)
    s = rng.normal(0, 2, 3000)
    y = rng.random(3000) < expit(-0.6 * log_expit(s) - 1.5 * log_expit(-s) - 0.5)
    fitted = fit_beta(y, s).parameters
    one = LogisticRegression(C=np.inf, tol=1e-10, max_iter=1000).fit(-log_expit(-s)[:, None], y)
    assert fitted["a"] == 0
    assert (fitted["b"], fitted["c"]) == pytest.approx((one.coef_[0, 0], one.intercept_[0]), rel=1e-3)


@pytest.mark.parametrize("decimals", [0, 9])
def test_isotonic_is_scikit_learns(decimals):
    y, s = events(300)
    s = s.round(decimals)  # with ties
    model = IsotonicRegression(y_min=1 / 302, y_max=301 / 302, out_of_bounds="clip").fit(s, y)
    at = np.concatenate([s, np.random.default_rng(1).normal(0, 5, 200)])
    np.testing.assert_allclose(expit(fit_isotonic(y, s).log_odds(at)), model.predict(at), atol=1e-12)


def test_vector_is_a_logistic_regression_and_the_least_penalized_log_loss():
    rng = np.random.default_rng(0)
    z = rng.normal(0, 2, (800, 2))
    y = (rng.random(800) < expit(0.9 * z[:, 1] - 0.4 * z[:, 0] + 0.3)).astype(int)
    model = LogisticRegression(C=np.inf, tol=1e-10, max_iter=1000).fit(np.column_stack([-z[:, 0], z[:, 1]]), y)
    fitted = fit_vector(y, z, penalty=0).parameters
    np.testing.assert_allclose(fitted["weights"], model.coef_[0], rtol=1e-3)
    assert fitted["biases"][1] - fitted["biases"][0] == pytest.approx(model.intercept_[0], abs=1e-3)

    z, y = rng.normal(0, 2, (120, 5)), rng.integers(0, 4, 120)  # no text has the last label
    temperature = fit_stage(spec_of(5).last, "temperature", z, y).temperature

    def loss(x):
        w, b = x[:5], x[5:]
        log_p = log_softmax(w * z + b, axis=1)[np.arange(120), y]
        return -log_p.sum() + 100 / 2 * (((temperature * w - 1) ** 2).sum() + (b**2).sum())

    best = minimize(loss, np.ones(10), method="BFGS", options={"gtol": 1e-6})
    fitted = fit_vector(y, z).parameters
    np.testing.assert_allclose([*fitted["weights"], *fitted["biases"]], best.x, atol=1e-4)


def test_arrays_that_cannot_be_fitted_are_refused():
    y, s = events(50)
    for fit in (fit_platt, fit_beta):
        with pytest.raises(CalibrationError, match="separate the 4 texts"):
            fit([0, 0, 1, 1], [-2, 0, 0, 2])
    for fit in (fit_platt, fit_beta, fit_isotonic):
        with pytest.raises(CalibrationError, match="all 3 texts should pass; give texts of both kinds"):
            fit([1, 1, 1], [0, 1, 2])
        with pytest.raises(CalibrationError, match="not higher for the texts that should pass"):
            fit([1, 1, 1, 0, 0, 1, 0, 0], np.arange(8.0))
        with pytest.raises(CalibrationError, match="one value of each per text"):
            fit(y, s[:9])
    assert fit_isotonic([0, 0, 1, 1], [-2, -1, 1, 2]).parameters["probabilities"] == (1 / 6, 1 / 6, 5 / 6, 5 / 6)


@pytest.mark.parametrize("calibrator", OF_GATES, ids=lambda c: c.method)
@pytest.mark.parametrize("labels", [("oos", "in"), ("in", "oos", "chat")])
def test_a_gate_has_the_calibrated_probability_and_the_others_keep_their_proportions(calibrator, labels):
    gate = replace(spec_of(gate_labels=labels).stages[0], calibrator=calibrator)
    z = np.random.default_rng(0).normal(0, 2, (40, len(labels)))
    raw = probabilities(replace(gate, calibrator=None), z)
    column = labels.index("in")
    q = by_formula(calibrator, logit(raw[:, column]))
    p = probabilities(gate, z)
    np.testing.assert_allclose(p[:, column], q, atol=1e-12)
    others = np.delete(raw, column, axis=1) / (1 - raw[:, [column]])
    np.testing.assert_allclose(np.delete(p, column, axis=1), others * (1 - q)[:, None], atol=1e-12)
    decision = decide(gate, np.vstack([z, np.full(len(labels), np.nan)]))
    np.testing.assert_array_equal(decision.confidence[:-1], p[:, column])
    assert decision.scored.tolist() == [True] * 40 + [False]


@pytest.mark.parametrize("calibrator", OF_GATES, ids=lambda c: c.method)
def test_runs_replay_write_and_analyse_by_the_calibrated_probabilities(calibrator, tmp_path):
    spec = gate_and_classes(calibrator)
    run = simulated(spec, n=200, seed=1).write(tmp_path / "run")
    assert run.spec == spec
    z = {name: values.astype(np.float64) for name, values in logits_of(run).items()}
    passes = by_formula(calibrator, z["gate"][:, 1] - z["gate"][:, 0])
    vector = spec.last.calibrator.parameters
    log_p = log_softmax(z["last"] * vector["weights"] + vector["biases"], axis=1)
    best, p_best = np.array(spec.last.labels)[log_p.argmax(axis=1)], np.exp(log_p.max(axis=1))
    for threshold in (0.3, 0.5, 0.8):
        answer = np.where((passes >= threshold) & (p_best >= 0.6), best, "oos")
        assert run.replay({"gate": threshold})["predicted"].tolist() == answer.tolist()
    changed = run.with_spec(replace(spec, stages=(replace(spec.stages[0], calibrator=None), spec.last)))
    raw = expit(z["gate"][:, 1] - z["gate"][:, 0])
    np.testing.assert_allclose(changed.decision("gate").confidence, raw)
    np.testing.assert_allclose(changed.with_spec(spec).decision("gate").confidence, passes)
    # Log loss, top-k accuracy, distances and the audit are by the same probabilities.
    last = labelled_decisions(run, "last", on="all")
    columns = pd.Index(spec.last.labels).get_indexer(last.y_true)
    table = calibration_metrics(run, "last", on="all", **FEW)
    losses = -log_p[last.rows, columns]
    assert table.loc["log_loss", "value"] == pytest.approx(losses.mean())
    ranks = (log_p[last.rows] > log_p[last.rows, columns][:, None]).sum(axis=1)
    top = metric_intervals(run, "last", on="all", top_k=(2,)).loc["top_2_accuracy", "value"]
    assert top == pytest.approx((ranks < 2).mean())
    near = near_threshold(run, "gate", 300)
    np.testing.assert_allclose(near["logit_distance"], logit(near["confidence"]) - logit(0.5), atol=1e-9)
    plain = tuple(replace(stage, calibrator=None) for stage in spec.stages)
    equal = {"gate": np.column_stack([np.zeros(200), logit(passes)]), "last": log_p}
    other = memory_run(replace(spec, stages=plain), run.examples, {k: v.astype(np.float32) for k, v in equal.items()})
    assert audit(run)["example_id"].tolist() == audit(other)["example_id"].tolist()
    title = CascadeCalibrationDisplay.from_run(run, stage="gate", on="all").title
    assert title == f"stage gate ({calibrator.method}), on all texts"


def test_every_random_cascade_replays_with_calibrators():
    for seed in range(8):
        run = mixed_run(seed)
        stages = []
        for stage in run.spec.stages:
            n = len(stage.labels)
            vector = Calibrator("vector", {"weights": (0.8,) * n, "biases": tuple(np.linspace(-1, 1, n))})
            calibrator = OF_GATES[seed % 3] if stage.is_gate else vector
            stages.append(replace(stage, temperature=1.0, calibrator=calibrator))
        spec = replace(run.spec, stages=tuple(stages))
        changed = run.with_spec(spec)
        assert CascadeSpec.from_dict(changed.manifest["cascade"]) == spec
        again = Run.from_logits(spec, run.examples, logits_of(run))
        assert again.predictions["predicted"].tolist() == changed.predictions["predicted"].tolist()
        gate = spec.stages[0]
        moved = changed.with_thresholds({gate.name: 0.1}).with_thresholds({gate.name: gate.threshold})
        pd.testing.assert_frame_equal(moved.predictions, changed.predictions)


def test_extreme_logits_give_probabilities_without_a_warning():
    huge = float(np.finfo(np.float32).max)
    z = np.array([[huge, -huge], [-huge, huge], [0.0, 0.0], [1e-38, -1e-38], [huge, huge]], dtype=np.float32)
    for calibrator in (*OF_GATES, Calibrator("platt", {"weight": 1e100, "bias": -1e100})):
        p = probabilities(gate_and_classes(calibrator).stages[0], z)
        np.testing.assert_allclose(p.sum(axis=1), 1)
        assert p[0, 1] <= p[2, 1] <= p[1, 1]
    last = gate_and_classes(PLATT, n_labels=2).last
    np.testing.assert_allclose(probabilities(last, z).sum(axis=1), 1)


@pytest.mark.parametrize("labels", [("oos", "in"), ("oos", "chat", "in")])
def test_a_gate_keeps_every_decision_at_any_threshold(labels):
    run = biased(spec_of(gate_labels=labels), n=300, seed=3)
    comparisons = {name: compare_calibrators(run, ["gate"], method=name) for name in ("platt", "beta", "isotonic")}
    temperature = fit_temperatures(run, ["gate"], **FEW)
    for name, comparison in comparisons.items():
        p = np.sort(run.decision("gate").confidence)
        for threshold in (0.0, 1.0, 0.3, *p[20::120]):
            before = run.with_thresholds({"gate": float(threshold)})
            result = calibrated(before, NO_TEMPERATURE, comparison)
            after = before.with_spec(result.spec)
            n_differ = int((after.predictions["decided_by"] != before.predictions["decided_by"]).sum())
            if name != "isotonic":
                assert n_differ == result.n_changed == 0
                assert "gate" in result.kept
            else:
                assert ("gate" in result.kept) == (n_differ == 0)
            # From one calibrator to another, and back to a temperature.
            other = calibrated(after, NO_TEMPERATURE, comparisons["platt"])
            if "gate" in other.kept:
                again = after.with_spec(other.spec).predictions["decided_by"]
                assert again.tolist() == after.predictions["decided_by"].tolist()
            cooler = calibrated(after, temperature)
            assert cooler.spec.stage("gate").calibrator is None
            assert ("gate" in cooler.kept) == (cooler.n_changed == 0) or len(labels) > 2


def test_held_out_losses_are_those_of_refits_without_the_text():
    run = biased(spec_of(), n=400, seed=4)
    table = compare_calibrators(run).table
    texts = texts_to_fit(run, "gate", on="reached", n_folds=5, seed=0)
    y, s = texts.codes == 1, np.diff(texts.logits)[:, 0]
    losses = {"platt": np.empty(len(y)), "isotonic": np.empty(len(y))}
    for k in range(5):
        inside = texts.fold == k
        model = LogisticRegression(C=np.inf, tol=1e-10).fit(s[~inside, None], y[~inside])
        n = int((~inside).sum())
        steps = IsotonicRegression(y_min=1 / (n + 2), y_max=(n + 1) / (n + 2), out_of_bounds="clip")
        p = {
            "platt": model.predict_proba(s[inside, None])[:, 1],
            "isotonic": steps.fit(s[~inside], y[~inside]).predict(s[inside]),
        }
        for name, values in p.items():
            losses[name][inside] = -np.log(np.where(y[inside], values, 1 - values))
    for name, values in losses.items():
        row = table.loc[("gate", name)]
        assert row["held_out"] == pytest.approx(values.mean(), abs=1e-6)
        assert row["gain"] == pytest.approx(table.loc[("gate", "temperature"), "held_out"] - values.mean(), abs=1e-6)
    plain = table.loc[("last", "temperature")]
    assert plain["held_out"] == pytest.approx(fit_temperatures(run, ["last"], **FEW).loc["last", "held_out"], abs=1e-3)


def test_equal_texts_are_in_one_fold_and_count_once_in_the_standard_error():
    run = biased(spec_of(), n=200, seed=5)
    twice = run.select(np.repeat(np.arange(200), 2))
    texts = texts_to_fit(twice, "gate", on="all", n_folds=5, seed=0)
    assert (texts.fold[::2] == texts.fold[1::2]).all()
    one, two = (compare_calibrators(r, ["gate"], method="platt", on="all").table for r in (run, twice))
    for column in ("held_out", "gain", "standard_error"):
        np.testing.assert_allclose(two[column], one[column], rtol=1e-4)


@pytest.mark.slow
def test_auto_takes_platt_for_a_biased_gate_and_mostly_a_temperature_where_that_is_the_truth():
    comparison = compare_calibrators(biased(spec_of(), n=1000, seed=6))
    assert comparison.chosen["gate"].calibrator.method in ("platt", "beta")
    assert comparison.table["chosen"].groupby(level="stage").sum().tolist() == [1, 1]
    assert "last" not in comparison.chosen
    n_other = 0
    for seed in range(12):
        n_other += len(compare_calibrators(simulated(spec_of(), n=250, seed=seed, temperature=1.6), ["gate"]).chosen)
    assert n_other <= 4  # a gain above one standard error by chance


def test_vector_is_chosen_for_biased_classes_and_lowers_the_loss_on_other_texts():
    spec = spec_of(6)
    bias = np.array([2.0, -2.0, 1.0, 0.0, -1.0, 0.0])

    def moved(n, seed):
        run = simulated(spec, n=n, seed=seed)
        logits = logits_of(run)
        examples = run.examples[["example_id", "text", "text_b", "label"]]
        last = (logits["last"] + bias).astype(np.float32)
        return memory_run(spec, examples, {**logits, "last": last}, seed=seed)

    val, test = moved(800, 1), moved(2000, 2)
    comparison = compare_calibrators(val)
    assert comparison.chosen["last"].calibrator.method == "vector"
    result = calibrated(val, NO_TEMPERATURE, comparison)
    assert "last" not in result.kept
    assert result.n_changed > 0
    before, after = (calibration_metrics(r, "last", on="all", **FEW) for r in (test, test.with_spec(result.spec)))
    assert after.loc["log_loss", "high"] < before.loc["log_loss", "low"]
    assert after.loc["ece", "value"] < before.loc["ece", "value"]


def test_a_rejectors_evidence_is_of_the_logits_and_its_stage_is_kept_only_at_the_same_temperatures():
    run = biased(spec_of(4, min_probability=0.3, reject_label="oos"), n=300, seed=7)
    rejector = Rejector(("gate.log_odds", "last.energy"), (0.5, 0.4), -1.0)
    spec = replace(run.spec, stages=(run.spec.stages[0], replace(run.spec.last, rejector=rejector)))
    own = run.with_spec(spec)
    platt = calibrated(own, NO_TEMPERATURE, compare_calibrators(own, method="platt"))
    assert platt.n_changed == 0
    assert platt.kept == ("gate", "last")
    confidence = own.with_spec(platt.spec).decision("last").confidence
    np.testing.assert_array_equal(confidence, own.decision("last").confidence)
    assert calibrated(own, fit_temperatures(own, ["gate"], **FEW)).kept == ("gate",)


def test_a_deferral_stage_has_vector_scaling_and_answers_by_its_probabilities():
    labels = ["label0", "label1", "label2"]
    small = {"name": "small", "labels": labels, "role": "deferral", "threshold": 0.7}
    spec = CascadeSpec.from_dict({"name": "deferral", "stage": [small, {"name": "last", "labels": labels}]})
    rng = np.random.default_rng(0)
    y = rng.integers(0, 3, 400)
    logits = {name: (rng.normal(size=(400, 3)) + 2 * np.eye(3)[y]).astype(np.float32) for name in ("small", "last")}
    logits["small"] += np.array([1.5, 0, -1.5], dtype=np.float32)
    examples = pd.DataFrame({"example_id": [f"{i}" for i in range(400)], "text": [f"text {i}" for i in range(400)]})
    run = memory_run(spec, examples.assign(text_b=None, label=np.array(labels)[y]), logits)
    comparison = compare_calibrators(run, ["small"])
    assert list(comparison.chosen) == ["small"]
    result = calibrated(run, NO_TEMPERATURE, comparison)
    assert result.kept == ("last",)
    assert result.spec.thresholds == spec.thresholds
    vector = result.spec.stages[0].calibrator.parameters
    p = np.exp(log_softmax(logits["small"] * np.array(vector["weights"]) + vector["biases"], axis=1))
    answer = np.where(p.max(axis=1) >= 0.7, p.argmax(axis=1), logits["last"].argmax(axis=1))
    assert run.with_spec(result.spec).predictions["predicted"].tolist() == np.array(labels)[answer].tolist()


def of_gate(**calibrator) -> dict:
    return {"stage": 0, "calibrator": calibrator}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (of_gate(method="plat"), "did you mean 'platt'"),
        (of_gate(method=["platt"]), "is no method"),
        (of_gate(method="platt", weight=1.0), "calibrator.bias must be a number"),
        (of_gate(method="platt", weight=1.0, bias=0.0, c=1.0), "unknown key 'calibrator.c' of method 'platt'"),
        (of_gate(method="platt", weight=-1.0, bias=0.0), "weight must be above 0, so that"),
        (of_gate(method="platt", weight=float("nan"), bias=0.0), "calibrator.weight must be a number"),
        (of_gate(method="platt", weight=10**400, bias=0.0), "calibrator.weight must be a number"),
        (of_gate(method="platt", weight=True, bias=0.0), "calibrator.weight must be a number"),
        (of_gate(method="beta", a=0, b=0, c=1), "one of them above 0"),
        (of_gate(method="isotonic", log_odds=[0.0, 0.0], probabilities=[0.1, 0.2]), "log_odds must rise"),
        (of_gate(method="isotonic", log_odds=[0.0, 1.0], probabilities=[0.2, 0.1]), "each at least the one before"),
        (of_gate(method="isotonic", log_odds=[0.0, 1.0], probabilities=[0.2, 1.0]), "between 0 and 1"),
        (of_gate(method="isotonic", log_odds=[0.0, 1.0], probabilities=[0.2]), "the same length"),
        (of_gate(method="isotonic", log_odds=[], probabilities=[]), "must be a list of numbers"),
        (of_gate(method="vector", weights=[1.0, 1.0], biases=[0.0, 0.0]), "a gate can have: platt, beta, isotonic"),
        ({"stage": 0, "calibrator": "platt"}, "calibrator must be a table"),
        ({"stage": 0, "calibrator": PLATT.to_dict(), "temperature": 2.0}, "has a temperature and a calibrator"),
        ({"stage": 1, "calibrator": PLATT.to_dict()}, "without pass_label can have: vector"),
        ({"stage": 1, "calibrator": {"method": "vector", "weights": [1.0], "biases": [0.0]}}, "must have 4 numbers"),
    ],
)
def test_a_wrong_table_is_refused_by_key(change, message):
    content = spec_of(4).to_dict()
    content["stage"][change.pop("stage")] |= change
    with pytest.raises(SpecError, match=message):
        CascadeSpec.from_dict(content)


def test_live_predictions_replay_timing_and_exports_are_by_the_calibrator(tiny, tiny_evalset, tiny_run, tmp_path):
    s = np.diff(tiny_run.scores("gate").logits.astype(np.float64))[:, 0]
    bias = tuple(np.linspace(-0.5, 0.5, 4).tolist())
    last = Calibrator("vector", {"weights": (0.5, 1.0, 1.5, 0.8), "biases": bias})
    spec = CascadeSpec.read(tiny)
    platt = Calibrator("platt", {"weight": 0.5, "bias": float(-0.5 * np.median(s))})
    spec = replace(spec, stages=(replace(spec.stages[0], calibrator=platt), replace(spec.last, calibrator=last)))
    spec.write(tmp_path / "calibrated.toml")
    assert [stage.calibrator for stage in CascadeSpec.read(tmp_path / "calibrated.toml").stages] == [platt, last]
    evalset = EvalSet.read(tiny_evalset)
    with Cascade.load(tmp_path / "calibrated.toml") as cascade:
        run = cascade.run(evalset, output=tmp_path / "run", batch_size=16)
        table, one = cascade.predict(evalset.texts), cascade.predict(evalset.texts[:1])
        served, _ = serve_batch(cascade, evalset.texts, spec=cascade.spec)
    pd.testing.assert_frame_equal(without_texts(run.replay()), run.predictions)
    assert 60 < (run.predictions["decided_by"] == "gate").sum() < 140
    z = logits_of(run)
    passes = by_formula(platt, np.diff(z["gate"].astype(np.float64))[:, 0])
    np.testing.assert_allclose(run.decision("gate").confidence, passes, atol=1e-12)
    for answers in (table, served):
        assert answers["predicted"].tolist() == run.predictions["predicted"].tolist()
        np.testing.assert_allclose(answers["confidence"], run.predictions["confidence"], atol=1e-5)
    np.testing.assert_allclose(one["confidence"], table["confidence"][:1], atol=1e-5)
    export_cascade(spec, tmp_path / "exported", format="hf")
    described = json.loads((tmp_path / "exported" / "export.json").read_text())["stages"]
    assert [stage["calibrator"] for stage in described] == [platt.to_dict(), last.to_dict()]
    features = replace(spec.last, rejector=Rejector(("intent.knn",), (1.0,), 0.0))
    with pytest.raises(CascadeLabError, match=r"its rejector needs intent\.knn"):
        export_cascade(replace(spec, stages=(spec.stages[0], features)), tmp_path / "no", format="saved_model")


@pytest.mark.parametrize("labels", [("oos", "in"), ("oos", "in", "chat")])
def test_the_graph_of_an_export_computes_the_same_probabilities(labels):
    from cascade_lab.bert.quiet_tensorflow import tf
    from cascade_lab.bert.saved_model import probabilities_t

    gate = spec_of(gate_labels=labels).stages[0]
    z = np.random.default_rng(0).normal(0, 3, (50, len(labels))).astype(np.float32)
    for stage in (*(replace(gate, calibrator=c) for c in OF_GATES), replace(gate, temperature=1.7), gate):
        with tf.Graph().as_default(), tf.compat.v1.Session() as session:
            p = session.run(probabilities_t(stage, tf.constant(z)))
        assert p.dtype == np.float32
        np.testing.assert_allclose(p, probabilities(stage, z), atol=2e-7)


def test_the_command_compares_chooses_and_writes(tmp_path):
    val = biased(spec_of(4), n=400, seed=8).write(tmp_path / "val")
    output = tmp_path / "auto.toml"
    result = CliRunner().invoke(app, ["calibrate", str(val.directory), "--method", "auto", "--output", str(output)])
    assert result.exit_code == 0, result.output
    assert "held out: log loss by cross-validation" in result.output
    assert "which decides the same" in result.output
    assert "no answer of this run changes" in result.output
    written = CascadeSpec.read(output)
    gate = written.stages[0]
    assert f"gate: {gate.calibrator.method} (" in result.output
    source = written.calibrated_on["gate"]
    assert (source["method"], source["run_id"]) == (gate.calibrator.method, val.manifest["run_id"])
    assert written.calibrated_on["last"]["value"] == written.last.temperature
    with pytest.raises(CalibrationError, match="the calibration of gate was fitted on this eval set"):
        calibration_metrics(val.with_spec(written), "gate", **FEW)
    only = ["calibrate", str(val.directory), "--method", "isotonic", "--output", str(tmp_path / "isotonic.toml")]
    assert CliRunner().invoke(app, only).exit_code == 0
    assert CascadeSpec.read(tmp_path / "isotonic.toml").last.calibrator is None
    for arguments, message in (
        (["--method", "plat"], "did you mean 'platt'"),
        (
            ["--method", "platt", "--stage", "last"],
            "'platt' is not for stage 'last', which can have: temperature, vector",
        ),
    ):
        command = ["calibrate", str(val.directory), *arguments, "--output", str(tmp_path / "no.toml")]
        refused = CliRunner().invoke(app, command)
        assert refused.exit_code == 2
        assert message in refused.output
        assert not (tmp_path / "no.toml").exists()

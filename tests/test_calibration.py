"""Calibration and temperatures against scikit-learn, scipy, and simulations whose truth is known."""

from __future__ import annotations

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
from helpers import memory_run, random_run, without_texts
from scipy.optimize import minimize_scalar
from sklearn.calibration import calibration_curve
from sklearn.metrics import brier_score_loss, log_loss
from test_displays import drawn_inside
from typer.testing import CliRunner

from cascade_lab import CascadeCalibrationDisplay
from cascade_lab.analysis.calibration import (
    assign_bins,
    calibration_error,
    calibration_metrics,
    class_confidences,
    confidences,
    reliability,
    reliability_curve,
    yes_no_confidences,
)
from cascade_lab.analysis.calibrators import calibrated
from cascade_lab.analysis.metrics import in_scope_predictions, labelled_decisions
from cascade_lab.analysis.temperature import fit_temperature, fit_temperatures
from cascade_lab.cli import app
from cascade_lab.decisions import softmax
from cascade_lab.exceptions import CalibrationError, RunError
from cascade_lab.run import Run
from cascade_lab.spec import CascadeSpec
from cascade_lab.thresholds.objective import Goal
from cascade_lab.thresholds.search import choose
from cascade_lab.thresholds.tuning import write_tuned

FEW = {"n_resamples": 50}


def spec_of(n_labels: int = 4, *, gate_labels=("oos", "in"), **last) -> CascadeSpec:
    gate = {"name": "gate", "labels": list(gate_labels), "pass_label": "in", "threshold": 0.5}
    classes = {"name": "last", "labels": [f"label{i}" for i in range(n_labels)], **last}
    return CascadeSpec.from_dict({"name": "simulated", "stage": [gate, classes]})


def simulated(spec: CascadeSpec, *, n: int, seed: int, temperature: float = 1.0) -> Run:
    """Make a run whose labels are drawn from its own probabilities at `temperature`: it is calibrated there."""
    rng = np.random.default_rng(seed)
    logits, labels_of = {}, {}
    for stage in spec.stages:
        z = rng.normal(0, 2.5, (n, len(stage.labels))).astype(np.float32)
        columns = (softmax(z, temperature).cumsum(axis=1) < rng.random((n, 1))).sum(axis=1)
        logits[stage.name], labels_of[stage.name] = z, np.array(stage.labels, dtype=object)[columns]
    labels = np.where(labels_of["gate"] == "in", labels_of["last"], labels_of["gate"])
    ids = [f"{i}" for i in range(n)]
    examples = pd.DataFrame({"example_id": ids, "text": [f"text {seed} {i}" for i in ids], "text_b": None})
    return memory_run(spec, examples.assign(label=labels), logits, seed=seed)


@pytest.fixture(scope="module", params=[1, 2, 3])
def run(request, tmp_path_factory) -> Run:
    """Random cascades of two, three and four stages."""
    folder = tmp_path_factory.mktemp("runs") / "one"
    return random_run(folder, n=300, n_gates=request.param, seed=request.param, skill=2.0)


@pytest.mark.parametrize("on", ["reached", "all"])
def test_scores_and_curves_are_those_of_scikit_learn(run, on):
    for stage in run.spec.stages:
        table = confidences(run, stage.name, on=on)
        metrics = calibration_metrics(run, stage.name, on=on, **FEW)
        decisions = labelled_decisions(run, stage.name, on=on)
        p = softmax(decisions.logits)
        y_true = list(decisions.y_true)
        if stage.is_gate:
            correct = decisions.y_true == "in"
            np.testing.assert_allclose(table.confidence, p[:, 1])
            assert metrics.loc["brier", "value"] == pytest.approx(brier_score_loss(correct, p[:, 1]))
            assert metrics.loc["log_loss", "value"] == pytest.approx(log_loss(correct, p[:, 1]))
        else:
            correct = decisions.y_true == np.array(stage.labels)[p.argmax(axis=1)]
            np.testing.assert_allclose(table.confidence, p.max(axis=1))
            brier = brier_score_loss(y_true, p, labels=list(stage.labels), scale_by_half=False)
            assert metrics.loc["brier", "value"] == pytest.approx(brier)
            assert metrics.loc["log_loss", "value"] == pytest.approx(log_loss(y_true, p, labels=list(stage.labels)))
        np.testing.assert_array_equal(table.correct, correct)
        for bins, strategy in (("equal_mass", "quantile"), ("equal_width", "uniform")):
            curve = reliability(run, stage.name, on=on, bins=bins, n_bins=10)
            if bins == "equal_width" or len(correct) % 10 == 0:  # else scikit-learn interpolates between texts
                values, mean = calibration_curve(correct, table.confidence, n_bins=10, strategy=strategy)
                np.testing.assert_allclose(curve["value"], values)
                np.testing.assert_allclose(curve["mean_confidence"], mean)
            gaps = (curve["value"] - curve["mean_confidence"]).abs()
            ece = calibration_metrics(run, stage.name, on=on, bins=bins, n_bins=10, **FEW)
            name = "ece" if bins == "equal_width" else "adaptive_ece"
            assert ece.loc[name, "value"] == pytest.approx(np.average(gaps, weights=curve["n_examples"]))
            assert (ece.attrs["n_bins"], ece.attrs["bins"]) == (len(curve), bins)
            n_out_of_scope = (~run.examples["label"].iloc[decisions.rows].isin(run.spec.in_scope_labels)).sum()
            assert ece.attrs["n_out_of_scope"] == n_out_of_scope
        assert metrics.loc["overconfidence", "value"] == pytest.approx(table.confidence.mean() - correct.mean())


@pytest.mark.parametrize("on", ["reached", "all"])
def test_the_cascade_has_the_product_as_confidence(run, on):
    table, best = confidences(run, on=on), in_scope_predictions(run, on=on)
    p = best.p_gates * best.p_class
    metrics = calibration_metrics(run, on=on, **FEW)
    assert metrics.loc["brier", "value"] == pytest.approx(brier_score_loss(best.correct, p))
    assert metrics.loc["log_loss", "value"] == pytest.approx(log_loss(best.correct, p))
    n = len(table.confidence)
    assert reliability(run, on=on)["n_examples"].sum() == n == metrics.attrs["n_examples"]
    # The same from plain arrays.
    pd.testing.assert_frame_equal(calibration_error(best.correct, p, **FEW), metrics)
    pd.testing.assert_frame_equal(reliability_curve(best.correct, p), reliability(run, on=on))


def test_unlabelled_texts_are_left_out(run):
    n = len(run.examples)
    examples = run.examples.assign(label=run.examples["label"].where(np.arange(n) % 3 > 0, None))
    logits = {stage.name: run.scores(stage.name).logits for stage in run.spec.stages}
    partly = Run.from_logits(run.spec, examples, logits)
    rows = np.flatnonzero(np.arange(n) % 3 > 0)
    for stage in (None, "gate0", "last"):
        expected = calibration_metrics(run.select(rows), stage, on="all", **FEW)
        pd.testing.assert_frame_equal(calibration_metrics(partly, stage, on="all", **FEW), expected)
    pd.testing.assert_frame_equal(fit_temperatures(partly, **FEW), fit_temperatures(run.select(rows), **FEW))
    assert calibrated(partly, fit_temperatures(partly, **FEW)).n_changed == 0


def test_arrays_that_do_not_fit_are_refused():
    with pytest.raises(CalibrationError, match=r"correct has shape \(1,\) and confidence \(2,\)"):
        reliability_curve([True], [0.5, 0.5])
    for confidence in (1.5, -0.1, np.nan):
        with pytest.raises(CalibrationError, match=r"not in \[0, 1\]"):
            calibration_error([True, False], [0.5, confidence])
    assert class_confidences([1], [[0.0, 0.0]], temperature=2.0).log_loss == pytest.approx(np.log(2))
    assert np.isfinite(yes_no_confidences([True], [0.0]).log_loss).all()


def test_bins_of_equal_mass_are_even_and_keep_equal_probabilities_together():
    p = np.random.default_rng(0).random(1003)
    bins = assign_bins(p, n_bins=15, bins="equal_mass")
    sizes = np.bincount(bins)
    assert len(sizes) == 15
    assert sizes.max() - sizes.min() <= 1
    assert all(p[bins == i].max() < p[bins == i + 1].min() for i in range(14))
    tied = np.repeat([0.2, 0.5, 1.0], [10, 80, 10])
    assert len(set(assign_bins(tied, n_bins=10, bins="equal_mass")[10:90])) == 1


def test_bins_of_equal_width_contain_their_upper_ends():
    """As Guo et al. (2017) define them, and scikit-learn's calibration_curve: bin m of M is ((m - 1) / M, m / M]."""
    p = np.array([0.0, 0.05, 0.25, 0.26, 0.5, 0.75, 0.751, 1.0])
    assert assign_bins(p, n_bins=4).tolist() == [0, 0, 0, 1, 1, 2, 3, 3]


def test_unknown_bins_are_refused():
    p = np.array([0.5])
    with pytest.raises(CalibrationError, match="'equal_width' or 'equal_mass'"):
        assign_bins(p, bins="quantile")
    with pytest.raises(CalibrationError, match="n_bins is 0; give at least 1"):
        assign_bins(p, n_bins=0)


def test_true_probabilities_have_the_ece_of_chance_and_others_a_higher_one():
    run = simulated(spec_of(), n=4000, seed=1)
    for stage in ("gate", "last", None):
        table = calibration_metrics(run, stage, on="all", n_resamples=300)
        # The mean of |N(0, v / n)| over bins, v the variance in one: sqrt(2 v / (pi n)).
        p = confidences(run, stage, on="all").confidence
        bins = assign_bins(p)
        parts = [np.sqrt(2 * (p * (1 - p))[bins == i].sum() / np.pi) for i in range(15)]
        assert table.loc["ece_if_calibrated", "value"] == pytest.approx(sum(parts) / len(p), rel=0.05)
        low, high = table.loc["ece_if_calibrated", ["low", "high"]]
        assert low * 0.9 <= table.loc["ece", "value"] <= high * 1.1
        assert table.loc["overconfidence", "low"] <= 0.003
    zeros = [calibration_metrics(simulated(spec_of(), n=300, seed=seed), "gate", n_resamples=200) for seed in range(20)]
    assert np.mean([table.loc["ece", "low"] == 0 for table in zeros]) >= 0.85
    hot = simulated(spec_of(), n=4000, seed=2, temperature=2.0)
    table = calibration_metrics(hot, "last", n_resamples=300)
    assert table.loc["ece", "low"] > table.loc["ece_if_calibrated", "high"]
    assert table.loc["overconfidence", "low"] > 0.05


def test_logits_that_do_not_fit_are_refused():
    with pytest.raises(CalibrationError, match="logits have 8 rows, but there are 4 labels"):
        fit_temperature([0, 0, 0, 1], [[1, -1]] * 8)
    for value in (np.nan, -np.inf):
        with pytest.raises(CalibrationError, match="logits row 1 has a value that is not finite"):
            fit_temperature([0, 1, 1, 0], [[1, 0], [value, 0], [0, 1], [1, 0]])


def test_the_true_temperature_is_recovered_and_is_the_one_of_least_log_loss():
    run = simulated(spec_of(12), n=6000, seed=3, temperature=1.7)
    fitted = fit_temperatures(run, on="all")
    for name, row in fitted.iterrows():
        assert row["low"] < 1.7 < row["high"]
        assert row["value"] == pytest.approx(1.7, rel=0.06)
        decisions, spec = labelled_decisions(run, name, on="all"), run.spec.stage(name)

        def loss(t, decisions=decisions, spec=spec):
            return log_loss(list(decisions.y_true), softmax(decisions.logits, t), labels=sorted(spec.labels))

        if list(spec.labels) == sorted(spec.labels):
            best = minimize_scalar(loss, bounds=(0.5, 4), method="bounded", options={"xatol": 1e-6})
            assert row["value"] == pytest.approx(best.x, rel=1e-4)
            assert (row["before"], row["after"]) == pytest.approx((loss(1.0), best.fun))
        assert row["after"] <= row["held_out"] < row["before"]
        places = np.random.default_rng(0).permutation(len(decisions.rows)) % 5  # the folds of seed 0
        folds = [np.flatnonzero(places == fold) for fold in range(5)]
        codes, losses = pd.Index(spec.labels).get_indexer(decisions.y_true), []

        def part(t, texts, z=decisions.logits, codes=codes):
            return -np.log(softmax(z[texts], t)[np.arange(len(texts)), codes[texts]])

        for fold in folds:
            train = np.setdiff1d(np.arange(len(codes)), fold)
            again = minimize_scalar(lambda t, train=train, part=part: part(t, train).mean(), bounds=(0.5, 4)).x
            losses.append(part(again, fold).mean())
        assert row["held_out"] == pytest.approx(np.average(losses, weights=[len(f) for f in folds]), abs=2e-5)
    cooler = run.with_spec(calibrated(run, fitted).spec)
    again = fit_temperatures(cooler, on="all")
    np.testing.assert_allclose(again["value"], fitted["value"], rtol=1e-6)
    np.testing.assert_allclose(again["before"], again["after"])


def test_the_temperatures_interval_is_that_of_refits_and_covers():
    spec, hits = spec_of(5), []
    for seed in range(40):
        run = simulated(spec, n=200, seed=seed, temperature=1.5)
        row = fit_temperatures(run, ["last"], on="all", level=0.9, n_resamples=200, n_folds=2).loc["last"]
        hits.append(row["low"] <= 1.5 <= row["high"])
    assert np.mean(hits) == pytest.approx(0.9, abs=0.11)
    decisions = labelled_decisions(run, "last", on="all")
    rng, refitted = np.random.default_rng(0), []
    codes = pd.Index(spec.last.labels).get_indexer(decisions.y_true)
    for _ in range(100):
        texts = rng.integers(0, len(codes), len(codes))

        def loss(t, texts=texts):
            return -np.log(softmax(decisions.logits[texts], t)[np.arange(len(texts)), codes[texts]]).mean()

        refitted.append(minimize_scalar(loss, bounds=(0.5, 6), method="bounded").x)
    assert (row["low"], row["high"]) == pytest.approx(np.quantile(refitted, [0.05, 0.95]), rel=0.07)


def test_intervals_of_ece_brier_and_log_loss_cover_at_their_nominal_rate():
    """Overconfident by design; the truth is that of many texts, whose ECE has hardly any chance in it."""
    spec, hits = spec_of(3), []
    many = simulated(spec, n=15_000, seed=99, temperature=2.5)
    names = ["ece", "overconfidence", "brier", "log_loss"]
    truth = {stage: calibration_metrics(many, stage, on="all", n_resamples=2)["value"] for stage in ("gate", None)}
    for seed in range(24):
        run = simulated(spec, n=400, seed=seed, temperature=2.5)
        for stage, true in truth.items():
            table = calibration_metrics(run, stage, on="all", level=0.9, n_resamples=150).loc[names]
            hits.append((table["low"] <= true[names]) & (true[names] <= table["high"]))
    assert np.mean(hits, axis=0) == pytest.approx([0.9] * 4, abs=0.11)


def test_a_gate_of_two_labels_keeps_every_decision_at_any_threshold(run):
    gate = run.spec.stages[0].name
    p = np.sort(1 / (1 + np.exp(-np.diff(run.scores(gate).logits.astype(np.float64))[:, 0])))
    fitted = fit_temperatures(run, **FEW)
    for threshold in (0.0, 1.0, 0.3, *p[20::90]):  # also probabilities of texts, where the last digit counts
        before = run.with_thresholds({gate: float(threshold)})
        result = calibrated(before, fitted)
        assert result.n_changed == 0
        assert set(result.kept) == {stage.name for stage in run.spec.stages}
        after = run.with_spec(result.spec).predictions["decided_by"]
        pd.testing.assert_series_equal(after, before.predictions["decided_by"])
    assert result.spec.stage(gate).temperature == fitted.loc[gate, "value"]


def test_thresholds_that_cannot_move_exactly_stay_and_the_command_tells(tmp_path):
    spec = spec_of(4, gate_labels=("oos", "chat", "in"), min_probability=0.6, reject_label="oos")
    run = simulated(spec, n=800, seed=5, temperature=2.0).write(tmp_path / "run")
    result = calibrated(run, fit_temperatures(run, **FEW))
    assert result.kept == ()
    assert result.spec.thresholds == run.spec.thresholds
    changed = run.with_spec(result.spec).predictions["predicted"] != run.predictions["predicted"]
    assert result.n_changed == changed.sum() > 0
    assert list(result.spec.calibrated_on) == ["gate", "last"]
    assert result.spec.tuned_on is None
    command = CliRunner().invoke(app, ["calibrate", str(run.directory), "--output", str(tmp_path / "c.toml")])
    assert "last: its threshold stays as it is" in command.output
    assert f"{result.n_changed} answers of this run change; tune thresholds again" in command.output


def test_a_run_at_other_thresholds_is_the_run_that_the_cascade_would_make(run):
    thresholds = {run.spec.stages[0].name: 0.8}
    view = run.with_thresholds(thresholds)
    pd.testing.assert_frame_equal(view.predictions, without_texts(run.replay(thresholds)))
    names = [stage.name for stage in run.spec.stages]
    decided_by = view.predictions["decided_by"].map(names.index).to_numpy()
    for i, name in enumerate(names):
        np.testing.assert_array_equal(view.scores(name).shadow, decided_by < i)
        assert view.metrics["stages"][name]["n_reached"] == (decided_by >= i).sum()


def test_the_command_writes_the_cascade_and_its_source_and_the_same_set_is_refused(tmp_path):
    spec = spec_of(4)
    val = simulated(spec, n=500, seed=6, temperature=1.5).write(tmp_path / "val")
    test = simulated(spec, n=500, seed=7, temperature=1.5)
    output = tmp_path / "new" / "calibrated.toml"
    result = CliRunner().invoke(app, ["calibrate", str(val.directory), "--output", str(output)])
    assert result.exit_code == 0, result.output
    assert "no answer of this run changes" in result.output
    written = CascadeSpec.read(output)
    provenance = written.calibrated_on
    for stage in written.stages:
        source = provenance[stage.name]
        assert source["value"] == stage.temperature != 1.0
        assert source["run_id"] == val.manifest["run_id"]
        assert source["evalset"]["sha256"] == val.manifest["evalset"]["sha256"]
    calibration_metrics(test.with_spec(written), "gate", **FEW)
    for stage in ("gate", None):
        with pytest.raises(CalibrationError, match="was fitted on this eval set"):
            calibration_metrics(val.with_spec(written), stage, **FEW)
    calibration_metrics(val.with_spec(written), "gate", allow_fitted_set=True, **FEW)
    again = CliRunner().invoke(app, ["calibrate", str(val.directory), "--output", str(output)])
    assert again.exit_code == 2
    assert "exists already" in again.output
    # Fitting one stage again, on another set, keeps the source of the other stage.
    other = calibrated(test.with_spec(written), fit_temperatures(test, ["gate"])).spec
    with pytest.raises(CalibrationError, match="the calibration of gate was"):
        calibration_metrics(test.with_spec(other), **FEW)
    assert other.calibrated_on["last"] == provenance["last"]
    # Tuning thresholds afterwards keeps the temperatures and their source.
    view, goal = test.with_spec(written), Goal("accuracy")
    write_tuned(view, choose(view, goal), goal, tmp_path / "tuned.toml")
    assert CascadeSpec.read(tmp_path / "tuned.toml").calibrated_on == provenance


@pytest.mark.parametrize("n_labels", [2, 41, 151])
def test_the_diagram_keeps_what_it_draws_and_fits_its_figure(tmp_path, n_labels):
    run = random_run(tmp_path / "run", n=300, n_labels=n_labels, skill=3.0)
    cases = [("gate0", "reached", "equal_mass"), ("last", "all", "equal_width"), (None, "all", "equal_mass")]
    for stage, on, bins in cases:
        display = CascadeCalibrationDisplay.from_run(run, stage=stage, on=on, bins=bins).plot()
        drawn_inside(display.figure_)
        pd.testing.assert_frame_equal(display.curve, reliability(run, stage, on=on, bins=bins))
        assert f"{len(display.curve)} bins of {bins.replace('_', ' ')}" in display.ax_.get_title("left")
        plt.close(display.figure_)


def test_labels_of_a_diagram_are_never_read_as_formulas_and_no_texts_can_be_drawn():
    spec = spec_of(gate_labels=(r"$\\frac", "in"), reject_label="oos")
    run = simulated(spec, n=40, seed=0)
    display = CascadeCalibrationDisplay.from_run(run, stage="gate")
    display.title, display.event = "$x_1$ $", r"$\\frac"
    drawn_inside(display.plot().figure_)
    display.title, display.event = "long\n" * 30_000, "<b>" * 30_000
    drawn_inside(display.plot().figure_)
    never = run.with_spec(run.spec.with_thresholds({"gate": 1.0}))
    empty = CascadeCalibrationDisplay.from_run(never, stage="last").plot()
    drawn_inside(empty.figure_)
    assert "no texts" in empty.ax_.get_title("left")
    plt.close("all")


def test_what_cannot_be_fitted_is_refused():
    spec = spec_of(3)
    logits = {"gate": np.array([[0.0, 3.0]] * 20), "last": np.eye(3)[[0, 1] * 10] * 4}
    examples = pd.DataFrame({"example_id": [f"{i}" for i in range(20)], "text": "x", "text_b": None})
    labels = ["label0", "label1"] * 10
    logits = {name: z.astype(np.float32) for name, z in logits.items()}
    run = memory_run(spec, examples.assign(label=labels), logits)
    with pytest.raises(CalibrationError, match=r"'last': no temperature from 0\.01 to 100 has the lowest log loss"):
        fit_temperatures(run, ["last"])
    with pytest.raises(CalibrationError, match="3 texts have a target at stage 'gate', and fitting takes at least 5"):
        fit_temperatures(run.select(np.arange(3)))
    stopped = {**logits, "gate": np.array([[3.0, 0.0]] * 20, dtype=np.float32)}
    bare = memory_run(spec, examples.assign(label=labels), stopped, shadow=False)
    metrics = calibration_metrics(bare, "last", **FEW)
    assert metrics.isna().all(axis=None)
    assert reliability(bare, "last").empty
    with pytest.raises(RunError, match="with shadow scores"):
        calibration_metrics(bare, on="all")


def test_the_array_layer_fits_the_temperature_of_the_run():
    run = simulated(spec_of(5), n=400, seed=8, temperature=1.5)
    decisions = labelled_decisions(run, "last", on="all")
    codes = pd.Index(run.spec.last.labels).get_indexer(decisions.y_true)
    fitted = fit_temperatures(run, ["last"], on="all", **FEW)
    assert fit_temperature(codes, decisions.logits) == fitted.loc["last", "value"]

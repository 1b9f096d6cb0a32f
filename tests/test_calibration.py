"""Calibration and temperatures against scikit-learn, scipy, and simulations whose truth is known."""

from __future__ import annotations

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
from random_runs import random_run, write_run
from scipy.optimize import minimize_scalar
from sklearn.calibration import calibration_curve
from sklearn.metrics import brier_score_loss, log_loss
from test_displays import drawn_inside
from typer.testing import CliRunner

from cascade_lab import CascadeCalibrationDisplay
from cascade_lab.analysis.calibration import assign_bins, calibration_figures, claims, reliability
from cascade_lab.analysis.goals import Goal
from cascade_lab.analysis.metrics import in_scope_answers, judged
from cascade_lab.analysis.temperature import calibrated, fit_temperatures, rescored
from cascade_lab.analysis.thresholds import choose
from cascade_lab.analysis.tuning import write_tuned
from cascade_lab.cli import app
from cascade_lab.errors import CalibrationError, RunError
from cascade_lab.run import Run
from cascade_lab.serial import probabilities
from cascade_lab.spec import CascadeSpec

COMMON = {"init_checkpoint": "none", "bert_config_file": "none", "vocab_file": "none"}
FEW = {"n_resamples": 50}


def spec_of(n_labels: int = 4, *, gate_labels=("oos", "in"), **last) -> CascadeSpec:
    gate = {"name": "gate", "labels": list(gate_labels), "pass_label": "in", "threshold": 0.5, **COMMON}
    classes = {"name": "last", "labels": [f"label{i}" for i in range(n_labels)], **COMMON, **last}
    return CascadeSpec.from_dict({"name": "simulated", "stage": [gate, classes]})


def simulated(folder, spec: CascadeSpec, *, n: int, seed: int, temperature: float = 1.0) -> Run:
    """Write a run whose labels are drawn from its own probabilities at `temperature`: calibrated there, by design."""
    rng = np.random.default_rng(seed)
    logits, drawn = {}, {}
    for stage in spec.stages:
        z = rng.normal(0, 2.5, (n, len(stage.labels))).astype(np.float32)
        p = probabilities(z, temperature)
        places = (p.cumsum(axis=1) < rng.random((n, 1))).sum(axis=1)
        logits[stage.name], drawn[stage.name] = z, np.array(stage.labels, dtype=object)[places]
    labels = np.where(drawn["gate"] == "in", drawn["last"], drawn["gate"])
    ids = [f"{i}" for i in range(n)]
    examples = pd.DataFrame({"example_id": ids, "text": [f"text {seed} {i}" for i in ids], "text_b": None})
    return write_run(folder, spec, examples.assign(label=labels), logits, seed=seed)


@pytest.fixture(scope="module", params=[1, 2, 3])
def run(request, tmp_path_factory) -> Run:
    """Random cascades of two, three and four stages."""
    folder = tmp_path_factory.mktemp("runs") / "one"
    return random_run(folder, n=300, n_gates=request.param, seed=request.param, skill=2.0)


@pytest.mark.parametrize("on", ["reached", "all"])
def test_scores_and_curves_are_those_of_scikit_learn(run, on):
    for stage in run.spec.stages:
        found = claims(run, stage.name, on=on)
        table = calibration_figures(run, stage.name, on=on, **FEW)
        said = judged(run, stage.name, on=on)
        p = probabilities(said.logits)
        y_true = list(said.y_true)
        if stage.is_gate:
            came = said.y_true == "in"
            np.testing.assert_allclose(found.p, p[:, 1])
            assert table.loc["brier", "value"] == pytest.approx(brier_score_loss(came, p[:, 1]))
            assert table.loc["log_loss", "value"] == pytest.approx(log_loss(came, p[:, 1]))
        else:
            came = said.y_true == np.array(stage.labels)[p.argmax(axis=1)]
            np.testing.assert_allclose(found.p, p.max(axis=1))
            brier = brier_score_loss(y_true, p, labels=list(stage.labels), scale_by_half=False)
            assert table.loc["brier", "value"] == pytest.approx(brier)
            assert table.loc["log_loss", "value"] == pytest.approx(log_loss(y_true, p, labels=list(stage.labels)))
        np.testing.assert_array_equal(found.came, came)
        for bins, strategy in (("equal_mass", "quantile"), ("equal_width", "uniform")):
            curve = reliability(run, stage.name, on=on, bins=bins, n_bins=10)
            if bins == "equal_width" or len(came) % 10 == 0:  # else quantiles split between texts by interpolation
                right, claimed = calibration_curve(came, found.p, n_bins=10, strategy=strategy)
                np.testing.assert_allclose(curve["value"], right)
                np.testing.assert_allclose(curve["claimed"], claimed)
            gaps = (curve["value"] - curve["claimed"]).abs()
            ece = calibration_figures(run, stage.name, on=on, bins=bins, n_bins=10, **FEW)
            assert ece.loc["ece", "value"] == pytest.approx(np.average(gaps, weights=curve["n_examples"]))
            assert (ece.attrs["n_bins"], ece.attrs["bins"]) == (len(curve), bins)
        assert table.loc["overclaim", "value"] == pytest.approx(found.p.mean() - came.mean())


@pytest.mark.parametrize("on", ["reached", "all"])
def test_the_product_claims_that_the_class_is_right(run, on):
    found, answers = claims(run, on=on), in_scope_answers(run, on=on)
    p = answers.p_gates * answers.p_class
    table = calibration_figures(run, on=on, **FEW)
    assert table.loc["brier", "value"] == pytest.approx(brier_score_loss(answers.right, p))
    assert table.loc["log_loss", "value"] == pytest.approx(log_loss(answers.right, p))
    assert reliability(run, on=on)["n_examples"].sum() == len(found.p) == table.attrs["n_examples"]


def test_bins_of_equal_mass_are_even_and_keep_equal_probabilities_together():
    p = np.random.default_rng(0).random(1003)
    sizes = np.bincount(assign_bins(p, n_bins=15))
    assert len(sizes) == 15
    assert sizes.max() - sizes.min() <= 1
    assert all(p[assign_bins(p) == i].max() < p[assign_bins(p) == i + 1].min() for i in range(14))
    tied = np.repeat([0.2, 0.5, 1.0], [10, 80, 10])
    assert len(set(assign_bins(tied, n_bins=10)[10:90])) == 1
    with pytest.raises(CalibrationError, match="'equal_mass' or 'equal_width'"):
        assign_bins(p, bins="quantile")


def test_probabilities_that_are_true_have_the_ece_of_chance_and_others_more(tmp_path):
    run = simulated(tmp_path / "true", spec_of(), n=4000, seed=1)
    for stage in ("gate", "last", None):
        table = calibration_figures(run, stage, on="all", n_resamples=300)
        # The mean of |N(0, v / n)| over bins, v the variance in one: sqrt(2 v / (pi n)).
        p = claims(run, stage, on="all").p
        bins = assign_bins(p)
        parts = [np.sqrt(2 * (p * (1 - p))[bins == i].sum() / np.pi) for i in range(15)]
        assert table.loc["ece_if_calibrated", "value"] == pytest.approx(sum(parts) / len(p), rel=0.05)
        low, high = table.loc["ece_if_calibrated", ["low", "high"]]
        assert low * 0.9 <= table.loc["ece", "value"] <= high * 1.1
        assert table.loc["overclaim", "low"] <= 0.003
    zeros = [
        calibration_figures(simulated(tmp_path / f"{seed}", spec_of(), n=300, seed=seed), "gate", n_resamples=200)
        for seed in range(20)
    ]
    assert np.mean([table.loc["ece", "low"] == 0 for table in zeros]) >= 0.85
    hot = simulated(tmp_path / "hot", spec_of(), n=4000, seed=2, temperature=2.0)
    table = calibration_figures(hot, "last", n_resamples=300)
    assert table.loc["ece", "low"] > table.loc["ece_if_calibrated", "high"]
    assert table.loc["overclaim", "low"] > 0.05


def test_the_true_temperature_is_recovered_and_is_the_one_of_least_log_loss(tmp_path):
    run = simulated(tmp_path / "run", spec_of(12), n=6000, seed=3, temperature=1.7)
    fitted = fit_temperatures(run, on="all")
    for name, row in fitted.iterrows():
        assert row["low"] < 1.7 < row["high"]
        assert row["value"] == pytest.approx(1.7, rel=0.06)
        said, spec = judged(run, name, on="all"), run.spec.stage(name)

        def loss(t, said=said, spec=spec):
            return log_loss(list(said.y_true), probabilities(said.logits, t), labels=sorted(spec.labels))

        if list(spec.labels) == sorted(spec.labels):
            best = minimize_scalar(loss, bounds=(0.5, 4), method="bounded", options={"xatol": 1e-6})
            assert row["value"] == pytest.approx(best.x, rel=1e-4)
            assert (row["before"], row["after"]) == pytest.approx((loss(1.0), best.fun))
        assert row["after"] <= row["held_out"] < row["before"]
        places = np.random.default_rng(0).permutation(len(said.rows)) % 5  # the folds of seed 0
        folds = [np.flatnonzero(places == fold) for fold in range(5)]
        codes, losses = pd.Index(spec.labels).get_indexer(said.y_true), []

        def part(t, texts, z=said.logits, codes=codes):
            return -np.log(probabilities(z[texts], t)[np.arange(len(texts)), codes[texts]])

        for fold in folds:
            train = np.setdiff1d(np.arange(len(codes)), fold)
            again = minimize_scalar(lambda t, train=train, part=part: part(t, train).mean(), bounds=(0.5, 4)).x
            losses.append(part(again, fold).mean())
        assert row["held_out"] == pytest.approx(np.average(losses, weights=[len(f) for f in folds]), abs=2e-5)
    cooler = rescored(run, calibrated(run, fitted).spec)
    again = fit_temperatures(cooler, on="all")
    np.testing.assert_allclose(again["value"], fitted["value"], rtol=1e-6)
    np.testing.assert_allclose(again["before"], again["after"])


def test_the_temperatures_interval_is_that_of_refits_and_covers(tmp_path):
    spec, hits = spec_of(5), []
    for seed in range(40):
        run = simulated(tmp_path / f"{seed}", spec, n=200, seed=seed, temperature=1.5)
        row = fit_temperatures(run, ["last"], on="all", level=0.9, n_resamples=200, n_folds=2).loc["last"]
        hits.append(row["low"] <= 1.5 <= row["high"])
    assert np.mean(hits) == pytest.approx(0.9, abs=0.11)
    said = judged(run, "last", on="all")
    rng, refitted = np.random.default_rng(0), []
    codes = pd.Index(spec.last.labels).get_indexer(said.y_true)
    for _ in range(100):
        texts = rng.integers(0, len(codes), len(codes))

        def loss(t, texts=texts):
            return -np.log(probabilities(said.logits[texts], t)[np.arange(len(texts)), codes[texts]]).mean()

        refitted.append(minimize_scalar(loss, bounds=(0.5, 6), method="bounded").x)
    assert (row["low"], row["high"]) == pytest.approx(np.quantile(refitted, [0.05, 0.95]), rel=0.07)


def test_intervals_of_ece_brier_and_log_loss_cover_at_their_nominal_rate(tmp_path):
    """Overconfident by design; the truth is that of many texts, whose ECE has next to no part of chance in it."""
    spec, hits = spec_of(3), []
    many = simulated(tmp_path / "many", spec, n=15_000, seed=99, temperature=2.5)
    names = ["ece", "overclaim", "brier", "log_loss"]
    truth = {stage: calibration_figures(many, stage, on="all", n_resamples=2)["value"] for stage in ("gate", None)}
    for seed in range(24):
        run = simulated(tmp_path / f"{seed}", spec, n=400, seed=seed, temperature=2.5)
        for stage, true in truth.items():
            table = calibration_figures(run, stage, on="all", level=0.9, n_resamples=150).loc[names]
            hits.append((table["low"] <= true[names]) & (true[names] <= table["high"]))
    assert np.mean(hits, axis=0) == pytest.approx([0.9] * 4, abs=0.11)


def test_a_gate_of_two_labels_keeps_every_decision_whatever_its_threshold(run):
    gate = run.spec.stages[0].name
    p = np.sort(1 / (1 + np.exp(-np.diff(run.scores(gate).logits.astype(np.float64))[:, 0])))
    fitted = fit_temperatures(run, **FEW)
    for threshold in (0.0, 1.0, 0.3, *p[20::90]):  # also probabilities that occur, where the last digit counts
        before = rescored(run, run.spec.with_thresholds({gate: float(threshold)}))
        found = calibrated(before, fitted)
        assert found.n_changed == 0
        assert set(found.kept) == {stage.name for stage in run.spec.stages}
        pd.testing.assert_series_equal(
            rescored(run, found.spec).predictions["decided_by"], before.predictions["decided_by"]
        )
    assert found.spec.stage(gate).temperature == fitted.loc[gate, "value"]


def test_thresholds_that_cannot_move_exactly_stay_and_it_is_said(tmp_path):
    spec = spec_of(4, gate_labels=("oos", "chat", "in"), min_probability=0.6, reject_label="oos")
    run = simulated(tmp_path / "run", spec, n=800, seed=5, temperature=2.0)
    found = calibrated(run, fit_temperatures(run, **FEW))
    assert found.kept == ()
    assert found.spec.thresholds == run.spec.thresholds
    changed = rescored(run, found.spec).predictions["predicted"] != run.predictions["predicted"]
    assert found.n_changed == changed.sum() > 0
    assert list(found.spec.calibrated_on) == ["gate", "last"]
    assert found.spec.tuned_on is None
    said = CliRunner().invoke(app, ["calibrate", str(run.directory), "--output", str(tmp_path / "c.toml")])
    assert "last: its threshold stays as it is" in said.output
    assert f"{found.n_changed} answers of this run change; tune thresholds again" in said.output


def test_a_run_at_other_thresholds_is_the_run_that_would_have_been_made(run):
    thresholds = {run.spec.stages[0].name: 0.8}
    made = rescored(run, run.spec.with_thresholds(thresholds))
    pd.testing.assert_frame_equal(made.predictions, run.replay(thresholds))
    place = [stage.name for stage in run.spec.stages]
    decided = made.predictions["decided_by"].map(place.index).to_numpy()
    for i, name in enumerate(place):
        np.testing.assert_array_equal(made.scores(name).shadow, decided < i)
        assert made.metrics["stages"][name]["n_reached"] == (decided >= i).sum()


def test_the_command_writes_the_cascade_with_its_provenance_and_the_same_set_is_guarded(tmp_path):
    spec = spec_of(4)
    val = simulated(tmp_path / "val", spec, n=500, seed=6, temperature=1.5)
    test = simulated(tmp_path / "test", spec, n=500, seed=7, temperature=1.5)
    output = tmp_path / "new" / "calibrated.toml"
    said = CliRunner().invoke(app, ["calibrate", str(val.directory), "--output", str(output)])
    assert said.exit_code == 0, said.output
    assert "no answer of this run changes" in said.output
    written = CascadeSpec.read(output)
    provenance = written.calibrated_on
    for stage in written.stages:
        found = provenance[stage.name]
        assert found["value"] == stage.temperature != 1.0
        assert found["run_id"] == val.manifest["run_id"]
        assert found["evalset"]["sha256"] == val.manifest["evalset"]["sha256"]
    calibration_figures(rescored(test, written), "gate", **FEW)
    for stage in ("gate", None):
        with pytest.raises(CalibrationError, match="was fitted on this eval set"):
            calibration_figures(rescored(val, written), stage, **FEW)
    calibration_figures(rescored(val, written), "gate", fitted_here=True, **FEW)
    again = CliRunner().invoke(app, ["calibrate", str(val.directory), "--output", str(output)])
    assert again.exit_code == 2
    assert "exists already" in again.output
    # A stage that is fitted again, on another set, leaves what was said of the other.
    other = calibrated(rescored(test, written), fit_temperatures(test, ["gate"])).spec
    with pytest.raises(CalibrationError, match="the temperature of gate was"):
        calibration_figures(rescored(test, other), **FEW)
    assert other.calibrated_on["last"] == provenance["last"]
    # Thresholds that are tuned afterwards leave the temperatures, and what was said of them, as they are.
    view, goal = rescored(test, written), Goal("accuracy")
    write_tuned(view, choose(view, goal), goal, tmp_path / "tuned.toml")
    assert CascadeSpec.read(tmp_path / "tuned.toml").calibrated_on == provenance


@pytest.mark.parametrize("n_labels", [2, 41, 151])
def test_the_diagram_keeps_what_it_draws_and_fits_its_figure(tmp_path, n_labels):
    run = random_run(tmp_path / "run", n=300, n_labels=n_labels, skill=3.0)
    asked = [("gate0", "reached", "equal_mass"), ("last", "all", "equal_width"), (None, "all", "equal_mass")]
    for stage, on, bins in asked:
        display = CascadeCalibrationDisplay.from_run(run, stage=stage, on=on, bins=bins).plot()
        drawn_inside(display.figure_)
        pd.testing.assert_frame_equal(display.curve, reliability(run, stage, on=on, bins=bins))
        assert f"{len(display.curve)} bins of {bins.replace('_', ' ')}" in display.ax_.get_title("left")
        plt.close(display.figure_)


def test_labels_of_a_diagram_are_never_read_as_formulas_and_no_texts_can_be_drawn(tmp_path):
    spec = spec_of(gate_labels=(r"$\\frac", "in"), reject_label="oos")
    run = simulated(tmp_path / "run", spec, n=40, seed=0)
    display = CascadeCalibrationDisplay.from_run(run, stage="gate")
    display.title, display.event = "$x_1$ $", r"$\\frac"
    drawn_inside(display.plot().figure_)
    display.title, display.event = "long\n" * 30_000, "<b>" * 30_000
    drawn_inside(display.plot().figure_)
    never = rescored(run, run.spec.with_thresholds({"gate": 1.0}))
    empty = CascadeCalibrationDisplay.from_run(never, stage="last").plot()
    drawn_inside(empty.figure_)
    assert "no texts" in empty.ax_.get_title("left")
    plt.close("all")


def test_what_cannot_be_fitted_is_refused(tmp_path):
    spec = spec_of(3)
    logits = {"gate": np.array([[0.0, 3.0]] * 20), "last": np.eye(3)[[0, 1] * 10] * 4}
    examples = pd.DataFrame({"example_id": [f"{i}" for i in range(20)], "text": "x", "text_b": None})
    labels = ["label0", "label1"] * 10
    logits = {name: z.astype(np.float32) for name, z in logits.items()}
    run = write_run(tmp_path / "right", spec, examples.assign(label=labels), logits)
    with pytest.raises(CalibrationError, match=r"'last': no temperature from 0\.01 to 100 has the least log loss"):
        fit_temperatures(run, ["last"])
    few = write_run(
        tmp_path / "few", spec, examples[:3].assign(label=labels[:3]), {k: z[:3] for k, z in logits.items()}
    )
    with pytest.raises(CalibrationError, match="3 texts have a gold label at stage 'gate'; fit it on more"):
        fit_temperatures(few)
    stopped = {**logits, "gate": np.array([[3.0, 0.0]] * 20, dtype=np.float32)}
    bare = write_run(tmp_path / "bare", spec, examples.assign(label=labels), stopped, shadow=False)
    table = calibration_figures(bare, "last", **FEW)
    assert table.isna().all(axis=None)
    assert reliability(bare, "last").empty
    with pytest.raises(RunError, match="with shadow scores"):
        calibration_figures(bare, on="all")

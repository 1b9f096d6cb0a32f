"""A live deferral cascade of tiny checkpoints: its run is its replay, and every command and notebook takes it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from textwrap import dedent

import matplotlib.pyplot as plt
import nbformat
import numpy as np
import pandas as pd
import pytest
from helpers import texts, without_texts, write_checkpoint
from typer.testing import CliRunner

from cascade_lab import CascadeSpec, EvalSet, Run
from cascade_lab.cli import app
from cascade_lab.rejector import Rejector

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
"""


@pytest.fixture(scope="module")
def live(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, list[str]]:
    """A two-stage deferral cascade of tiny checkpoints, and a run of it: the file, the run and the texts."""
    from cascade_lab import Cascade

    folder = tmp_path_factory.mktemp("deferral")
    for seed, name in enumerate(("small", "large")):
        write_checkpoint(folder / name, 4, seed=seed)
    (folder / "cascade.toml").write_text(dedent(CASCADE))
    lines = texts(80, seed=3)
    spec = CascadeSpec.read(folder / "cascade.toml")
    with Cascade.load(spec.with_thresholds({"small": 1.0})) as cascade:
        by_large = cascade.predict(lines)
    spec = spec.with_thresholds({"small": float(by_large["small_probability"].median()) + 1e-4})
    spec.write(folder / "cascade.toml")
    rng = np.random.default_rng(0)
    labels = np.where(rng.random(len(lines)) < 0.7, by_large["predicted"], rng.choice(list("abcd"), len(lines)))
    evalset = EvalSet.from_frame(pd.DataFrame({"text": lines, "label": labels}))
    other = EvalSet.from_frame(pd.DataFrame({"text": texts(80, seed=4), "label": labels}))
    with Cascade.load(spec) as cascade:
        cascade.run(evalset, output=folder / "run")
        cascade.run(other, output=folder / "other")
    return folder / "cascade.toml", folder / "run", lines


def test_a_live_run_is_its_replay(live: tuple[Path, Path, list[str]]):
    from cascade_lab import Cascade
    from cascade_lab.latency_benchmark import serve_batch

    path, folder, lines = live
    run = Run.read(folder)
    run.check()
    pd.testing.assert_frame_equal(without_texts(run.replay()), run.predictions)
    decided = run.predictions["decided_by"]
    assert 0.3 < (decided == "small").mean() < 0.7
    assert run.scores("large").shadow.sum() == (decided == "small").sum()
    assert run.timings.groupby("stage")["n_examples"].sum().to_dict() == {
        "small": 80, "large": int((decided == "large").sum()),
    }  # fmt: skip
    with Cascade.load(path) as cascade:
        assert cascade.predict(lines)["predicted"].tolist() == run.predictions["predicted"].tolist()
        few = pd.concat([cascade.predict([text]) for text in lines[:8]], ignore_index=True)
        assert few["decided_by"].tolist() == decided.tolist()[:8]
        assert few["large_probability"].isna().tolist() == (decided[:8] == "small").tolist()  # nothing is run ahead
        served, timings = serve_batch(cascade, lines, spec=cascade.spec)
    assert served["predicted"].tolist() == run.predictions["predicted"].tolist()
    assert [timing["n_examples"] for timing in timings] == [80, int((decided == "large").sum())]


def test_a_learned_rule_is_the_same_in_the_file_live_and_in_a_replay(
    live: tuple[Path, Path, list[str]], tmp_path: Path
):
    from cascade_lab import Cascade

    path, folder, lines = live
    spec = CascadeSpec.read(path)
    rule = Rejector(("small.margin", "small.energy"), (0.8, -0.2), -0.5)
    small = replace(spec.stages[0], rejector=rule)
    run = Run.read(folder)
    confidence = run.with_spec(replace(spec, stages=(small, spec.last))).decision("small").confidence
    small = replace(small, threshold=float(np.median(confidence)) + 1e-4)
    replace(spec, stages=(small, spec.last)).write(path.parent / "learned.toml")
    expected = run.with_spec(replace(spec, stages=(small, spec.last))).predictions
    assert 0.3 < (expected["decided_by"] == "small").mean() < 0.7
    with Cascade.load(path.parent / "learned.toml") as cascade:
        predicted = cascade.predict(lines)
        learned = cascade.run(EvalSet.from_frame(run.examples[["text", "label"]]), output=tmp_path / "learned")
    for table in (predicted, learned.predictions):
        assert table["predicted"].tolist() == expected["predicted"].tolist()
        assert table["decided_by"].tolist() == expected["decided_by"].tolist()
        assert table["confidence"].to_numpy() == pytest.approx(expected["confidence"].to_numpy(), abs=1e-5)
    pd.testing.assert_frame_equal(without_texts(learned.replay()), learned.predictions)


def cascade_lab(*arguments):
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


@pytest.mark.parametrize("notebook", ["01_run_cascade", "03_analyse_errors", "04_tune_thresholds"])
def test_notebooks_take_a_deferral_cascade(
    notebook: str, live: tuple[Path, Path, list[str]], monkeypatch: pytest.MonkeyPatch
):
    """Every cell runs in this process, which takes a tenth of the time of a kernel's start."""
    from IPython.core.interactiveshell import InteractiveShell

    from cascade_lab.reporting.report import notebook_path

    monkeypatch.setenv("MPLBACKEND", "agg")
    _, run, _ = live
    given = {"run_dir": str(run)} | ({"test_dir": str(run.parent / "other")} if notebook.startswith("04") else {})
    shell = InteractiveShell()
    for cell in nbformat.read(notebook_path(notebook), as_version=4).cells:
        if cell.cell_type == "code":
            shell.run_cell(cell.source).raise_error()
        if "parameters" in cell.metadata.get("tags", []):
            shell.push(given)
    shell.history_manager.end_session()
    plt.close("all")


@pytest.mark.slow
def test_reports_of_a_deferral_cascade(live: tuple[Path, Path, list[str]]):
    from cascade_lab.reporting.report import write_report

    _, folder, _ = live
    for notebook in ("01_run_cascade", "03_analyse_errors"):
        report = write_report(Run.read(folder), folder.parent / f"{notebook}.html", notebook=notebook)
        assert "small" in report.read_text(encoding="utf-8")


def test_commands_take_a_deferral_cascade(live: tuple[Path, Path, list[str]], tmp_path: Path):
    """`tune` prints what accuracy costs; `inspect` and `predict` show the rule and the probabilities."""
    path, run, _ = live
    shown = cascade_lab("tune", run, "--maximize", "accuracy", "--output", tmp_path / "tuned.toml", "--write-anyway")
    assert "accuracy against time" in shown.stdout
    assert CascadeSpec.read(tmp_path / "tuned.toml").stages[0].is_deferral
    assert "answers at confidence ≥" in cascade_lab("inspect", path).stdout
    refused = cascade_lab("fit-rejector", run, "--output", tmp_path / "x.toml")
    assert refused.exit_code == 2
    assert "no stage has a label to reject with" in refused.stderr


def test_other_analyses_take_a_deferral_cascade(live: tuple[Path, Path, list[str]]):
    """Calibration, audit, comparison and the explorer; the audit's probabilities add up to 1 for every text."""
    from cascade_lab.analysis import audit, compare, coverage_metrics, fit_temperatures
    from cascade_lab.analysis.label_audit import _cascade_probabilities
    from cascade_lab.explorer import Explorer

    _, folder, _ = live
    run = Run.read(folder)
    assert _cascade_probabilities(run)[1].sum(axis=1) == pytest.approx(1)
    assert "suggested_label" in audit(run)
    assert coverage_metrics(run)["confidence"].unique().tolist() == ["last"]
    assert fit_temperatures(run, ["large"], on="all", n_resamples=10).index.tolist() == ["large"]
    moved = run.with_thresholds({"small": 0.0})
    split = compare(run, moved).decomposition
    accuracy = {name: run_.metrics["end_to_end"]["accuracy"] for name, run_ in (("AA", run), ("BB", moved))}
    assert {name: split.accuracies[name] for name in accuracy} == pytest.approx(accuracy)
    explorer = Explorer(run)
    explorer.move({"small": 0.0})
    assert explorer.predictions["decided_by"].eq("small").all()


def test_the_latency_benchmark_takes_a_deferral_cascade(live: tuple[Path, Path, list[str]]):
    """The predicted cost rises with the threshold of the deferral stage, as more texts go on."""
    from cascade_lab.analysis.serving_latency import predicted_cost
    from cascade_lab.analysis.serving_summary import cost_and_quality, summary
    from cascade_lab.latency_benchmark import measure_run

    _, folder, _ = live
    run = Run.read(folder)
    study = measure_run(run, batch_sizes=[8], repeats=2, limit=24)
    costs = predicted_cost(study, [0.0, run.spec.thresholds["small"], 1.0])
    assert costs["reach"].is_monotonic_increasing
    assert costs["reach"].iloc[[0, 2]].tolist() == [0.0, 1.0]
    assert any("if small answers (nearly) all texts" in sentence for sentence in summary(study))
    assert len(cost_and_quality(study, run)) == len(study.settings["checked"]) + 1

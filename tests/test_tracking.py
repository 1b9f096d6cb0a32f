"""What `cascade-lab log` sends, and that MLflow and Weights & Biases get it.

Their parts are skipped where they are not installed; `make test-log` runs them.
"""

from __future__ import annotations

import json
import math
import re
import shutil
import sys
from dataclasses import replace

import pytest
from helpers import HOSTILE, logits_of, random_run, write_run
from typer.testing import CliRunner

from cascade_lab import CascadeSpec, Run
from cascade_lab.analysis import metric_intervals
from cascade_lab.cli import app
from cascade_lab.exceptions import RunError
from cascade_lab.provenance import sha256
from cascade_lab.tracking import DIGEST, log_run, run_record

MLFLOW_NAME = re.compile(r"[/\w.\- :]{1,250}")  # of a parameter, a metric or a tag, as MLflow's documentation gives it


def cascade_lab(*arguments):
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def refused(*arguments: object, words: str) -> None:
    result = cascade_lab("log", *arguments)
    assert (result.exit_code, result.stderr.count("\n")) == (2, 1), result.output
    assert words in result.stderr
    assert len(result.stderr) < 700


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Run:
    made = random_run(tmp_path_factory.mktemp("tracking") / "first", n=300, n_labels=5, seed=2)
    for name in ("report.html", "report.json", "mine.html", "notes.txt"):
        (made.directory / name).write_text("{}")
    (made.directory / "figures").mkdir()
    (made.directory / "figures" / "latency.png").write_bytes(b"x")
    (made.directory / "figures" / "other.png").symlink_to("/etc/hostname")
    return made


def test_a_record_has_the_metrics_of_the_run_with_their_intervals(run):
    record = run_record(run)
    written = json.loads((run.directory / "metrics.json").read_text(encoding="utf-8"))
    parts = {"": written["end_to_end"]} | {f"{name}/": values for name, values in written["stages"].items()}
    for prefix, metrics in parts.items():
        for name, value in metrics.items():
            assert record.metrics.get(f"{prefix}{name}") == value
        table = metric_intervals(run, prefix.rstrip("/") or None)
        for name, row in table.iterrows():
            for end in ("low", "high"):
                assert record.metrics.get(f"{prefix}{name}_{end}", math.nan) == pytest.approx(row[end], nan_ok=True)
    assert record.metrics["gate0/decided"] == (run.predictions["decided_by"] == "gate0").mean()
    assert record.metrics["last/p50_ms"] > 0
    assert all(map(math.isfinite, record.metrics.values()))
    assert "texts correctly" in record.summary


def test_a_record_has_the_settings_the_digests_and_the_runs_own_files(run):
    record = run_record(run)
    assert {"gate0/threshold": 0.5, "last/n_labels": 5, "n_examples": 300, "cascade": "random"}.items() <= (
        record.parameters.items()
    )
    assert record.tags[DIGEST] == sha256(run.directory / "manifest.json")
    contents = run.manifest["contents"]
    assert {f"sha256/{name}": digest for name, digest in contents.items()}.items() <= record.tags.items()
    assert set(record.files) == {
        "manifest.json", "metrics.json", *contents, "report.html", "report.json", "figures/latency.png",
    }  # fmt: skip
    assert not any(name.endswith(".parquet") for name in run_record(run, tables=False).files)


def test_names_in_any_script_and_hostile_ones_are_taken(tmp_path):
    made = random_run(tmp_path / "made", n=60, n_gates=2)
    stages = [
        replace(stage, name=name) for stage, name in zip(made.spec.stages, ("闸门", "a b/..", "意图"), strict=True)
    ]
    logits = dict(zip((stage.name for stage in stages), logits_of(made).values(), strict=True))
    spec = CascadeSpec(HOSTILE[3] + HOSTILE[5], tuple(stages))
    run = write_run(tmp_path / "run", spec, made.examples, logits)
    record = run_record(run)
    assert "闸门/accuracy" in record.metrics
    assert len({key.split("/")[0] for key in record.parameters if "/" in key}) == 3
    for key in (*record.parameters, *record.metrics, *record.tags):
        assert MLFLOW_NAME.fullmatch(key), key
        assert ".." not in key
    assert all(len(value) <= 500 and value.isprintable() for value in record.parameters.values() if type(value) is str)


def test_a_run_without_labels_is_logged_without_metrics_that_need_them(tmp_path):
    made = random_run(tmp_path / "made", n=60)
    run = write_run(tmp_path / "run", made.spec, made.examples.assign(label=None), logits_of(made))
    record = run_record(run)
    assert {name for name in record.metrics if "_ms" not in name} == {"gate0/decided", "last/decided"}
    assert "metrics.json" not in record.files


def test_what_cannot_be_logged_is_one_line(run, tmp_path, monkeypatch):
    with pytest.raises(RunError, match="unknown tracker 'mlfow'; did you mean 'mlflow'"):
        log_run(run, "mlfow")
    with pytest.raises(RunError, match="only in memory"):
        log_run(run.with_thresholds({"gate0": 0.1}), "mlflow")
    shutil.copytree(run.directory, tmp_path / "damaged", symlinks=True)
    (tmp_path / "damaged" / "predictions.parquet").write_bytes(b"no")
    refused(tmp_path / "damaged", "--to", "mlflow", words="predictions.parquet")
    refused(tmp_path / "none", "--to", "wandb", words="no such run directory")
    for name in ("mlflow", "wandb"):
        monkeypatch.setitem(sys.modules, name, None)
        refused(run.directory, "--to", name, words=f"{name} is not installed")


@pytest.fixture
def mlflow(tmp_path, monkeypatch):
    mlflow = pytest.importorskip("mlflow")
    monkeypatch.setenv("MLFLOW_DISABLE_TELEMETRY", "true")
    monkeypatch.chdir(tmp_path)  # a database in a file has its artifacts in mlruns/
    return mlflow


@pytest.mark.parametrize("store", ["sqlite:///{}/mlflow.db", "file://{}/store"])
def test_mlflow_has_what_was_logged_and_gives_the_run_back(store, run, mlflow, tmp_path, monkeypatch):
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")  # newer versions refuse folders without it
    uri = store.format(tmp_path)
    result = cascade_lab("log", run.directory, "--to", "mlflow", "--tracking-uri", uri, "--name", "付款 1")
    assert result.exit_code == 0, result.output
    assert "mlflow: run 付款 1 (" in result.stdout
    assert f"look at it: mlflow ui --backend-store-uri {uri}\n" in result.stdout
    client, record = mlflow.tracking.MlflowClient(uri), run_record(run)
    experiment = client.get_experiment_by_name("random")
    (found,) = client.search_runs([experiment.experiment_id])
    assert (found.info.status, found.info.run_name) == ("FINISHED", "付款 1")
    assert found.data.metrics == record.metrics
    assert found.data.params == {key: str(value) for key, value in record.parameters.items()}
    assert record.tags.items() <= found.data.tags.items()
    copy = client.download_artifacts(found.info.run_id, "", str(tmp_path))
    again = Run.read(copy)
    again.check()
    assert sha256(again.directory / "manifest.json") == found.data.tags[DIGEST]
    assert again.replay({"gate0": 0.3}).equals(run.replay({"gate0": 0.3}))
    assert (again.directory / "figures" / "latency.png").is_file()


def test_mlflow_takes_a_run_once_unless_it_is_asked_again(run, mlflow, tmp_path, monkeypatch):
    uri = f"sqlite:///{tmp_path}/mlflow.db"
    client = mlflow.tracking.MlflowClient(uri)
    to = (run.directory, "--to", "mlflow", "--tracking-uri", uri)

    def stop(*_: object, **__: object) -> None:
        raise OSError("no space left")

    with monkeypatch.context() as broken:
        broken.setattr(mlflow.tracking.MlflowClient, "log_artifact", stop)
        refused(*to, words="mlflow: the run was not logged: no space left")
    assert cascade_lab("log", *to).exit_code == 0  # the first one failed
    refused(*to, words="first: is logged already, as 'first' (")
    assert cascade_lab("log", *to, "--again", "--no-tables").exit_code == 0
    assert cascade_lab("log", *to, "--experiment", "other").exit_code == 0
    statuses = {}
    for name in ("random", "other"):
        runs = client.search_runs([client.get_experiment_by_name(name).experiment_id])
        statuses[name] = sorted(found.info.status for found in runs)
    assert statuses == {"random": ["FAILED", "FINISHED", "FINISHED"], "other": ["FINISHED"]}
    moved = run.with_thresholds({"gate0": 0.9}).write(tmp_path / "moved")  # the same run id, another manifest
    assert cascade_lab("log", moved.directory, *to[1:]).exit_code == 0


@pytest.mark.parametrize("uri", ["http://127.0.0.1:9", "ftp://a", "sqlite:////proc/none/a.db", "x:y:z"])
def test_a_server_or_a_store_that_is_not_there_is_one_line(uri, run, mlflow):
    refused(run.directory, "--to", "mlflow", "--tracking-uri", uri, words="mlflow: the run was not logged: ")


def test_wandb_keeps_a_run_offline_once_unless_it_is_asked_again(run, tmp_path, monkeypatch):
    wandb = pytest.importorskip("wandb")
    for name, value in {"MODE": "offline", "DIR": tmp_path, "DATA_DIR": tmp_path, "CACHE_DIR": tmp_path}.items():
        monkeypatch.setenv(f"WANDB_{name}", str(value))
    to = (run.directory, "--to", "wandb", "--experiment", "desk")

    def stop(*_: object, **__: object) -> None:
        raise OSError("no space left")

    with monkeypatch.context() as broken:
        broken.setattr(wandb.Artifact, "add_file", stop)
        refused(*to, words="wandb: the run was not logged: no space left")
    result = cascade_lab("log", *to)
    assert result.exit_code == 0, result.output
    assert f"upload it: wandb sync {tmp_path}" in result.stdout
    record, digest = run_record(run), run_record(run).tags[DIGEST]
    (kept,) = (tmp_path / "wandb").glob(f"offline-run-*-{digest[:12]}/*.wandb")
    content = kept.read_bytes()
    for words in ("gate0/threshold", "accuracy_low", "gate0/auroc", "manifest.json", "report.html", digest):
        assert words.encode() in content, words
    assert repr(record.metrics["accuracy"])[:12].encode() in content
    refused(*to, words="first: is logged already, as ")
    assert cascade_lab("log", *to, "--again").exit_code == 0
    refused(*to[:3], "--experiment", "a/b", "--again", words="wandb: the run was not logged: Invalid project name")

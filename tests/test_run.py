"""The run directory: its contract, its wholeness under crashes and full disks, and what is refused."""

from __future__ import annotations

import hashlib
import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest

from cascade_lab import Cascade, EvalSet, Run
from cascade_lab.errors import RunError
from cascade_lab.run import unfinished


def sha256(path):
    return hashlib.sha256(Path(path).read_bytes()).hexdigest()


def test_the_directory_holds_the_tables_of_the_contract(tiny_run):
    folder = tiny_run.directory
    assert sorted(p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file()) == [
        "examples.parquet", "manifest.json", "metrics.json", "predictions.parquet",
        "scores/gate.parquet", "scores/intent.parquet", "timings.parquet",
    ]  # fmt: skip
    schema = {name: str(kind) for name, kind in zip(*_schema(folder / "scores/intent.parquet"), strict=True)}
    assert schema == {"example_id": "string", "logits": "fixed_size_list<element: float>[4]", "shadow": "bool"}
    assert _schema(folder / "examples.parquet")[0] == ["example_id", "text", "text_b", "label"]
    assert _schema(folder / "predictions.parquet")[0] == [
        "example_id",
        "label",
        "predicted",
        "decided_by",
        "probability",
    ]
    assert _schema(folder / "timings.parquet")[0] == [
        "stage", "batch", "n_examples", "sequence_length", "n_tokens", "tokenize_seconds", "run_seconds",
    ]  # fmt: skip


def _schema(path):
    schema = pq.read_schema(path)
    return schema.names, schema.types


def test_the_manifest_says_what_ran_on_what(tiny_run, tiny, tiny_evalset):
    manifest = tiny_run.manifest
    for key in ("schema_version", "run_id", "cascade", "thresholds", "tuned_on", "git", "packages", "processor",
                "seed", "started", "wall_seconds"):  # fmt: skip
        assert key in manifest
    assert manifest["evalset"] == {
        "source": str(tiny_evalset), "split": None, "sha256": sha256(tiny_evalset), "n_examples": 200,
    }  # fmt: skip
    inputs = manifest["inputs"]
    assert {Path(path).name for path in inputs} >= {"vocab.txt", "bert_config.json", "model.ckpt-7.index"}
    assert len(inputs) == 8
    for path, digest in {**inputs, **{tiny_run.directory / k: v for k, v in manifest["contents"].items()}}.items():
        assert sha256(path) == digest, path
    assert manifest["packages"]["tensorflow"].startswith("2.21")
    assert manifest["stages"]["gate"]["precision"] == "float32"
    assert tiny_run.spec.to_dict() == manifest["cascade"]


def test_further_columns_are_kept_for_slicing(tiny, tmp_path):
    path = tmp_path / "set.jsonl"
    path.write_text('{"text": "pay", "label": "1", "channel": "chat", "turns": 3, "text_b": "now"}\n')
    with Cascade.load(tiny) as cascade:
        run = cascade.run(EvalSet.read(path), output=tmp_path / "run")
    assert run.examples.iloc[0].to_dict() == {
        "example_id": "0", "text": "pay", "text_b": "now", "label": "1", "channel": "chat", "turns": 3,
    }  # fmt: skip


def test_a_run_is_never_overwritten_unless_asked(tiny, tiny_run, tiny_evalset, tmp_path):
    shutil.copytree(tiny_run.directory, tmp_path / "run")
    before = {path: sha256(path) for path in (tmp_path / "run").rglob("*") if path.is_file()}
    evalset = EvalSet.read(tiny_evalset).limit(20)
    with Cascade.load(tiny) as cascade:
        with pytest.raises(RunError, match="run exists already; choose another output, or ask to overwrite it"):
            cascade.run(evalset, output=tmp_path / "run")
        assert before == {path: sha256(path) for path in (tmp_path / "run").rglob("*") if path.is_file()}
        cascade.run(evalset, output=tmp_path / "run", overwrite=True)
    assert len(Run.read(tmp_path / "run").examples) == 20
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


def test_what_is_no_run_is_not_overwritten_even_when_asked(tmp_path):
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "chapter.txt").write_text("years of work")
    with (
        pytest.raises(RunError, match="is not a run, so it is not overwritten"),
        unfinished(tmp_path / "thesis", overwrite=True),
    ):
        pass
    assert (tmp_path / "thesis" / "chapter.txt").read_text() == "years of work"


def test_a_failure_in_the_middle_leaves_nothing(tmp_path):
    def interrupted():
        with unfinished(tmp_path / "run") as folder:
            (folder / "examples.parquet").write_text("half")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert not list(tmp_path.iterdir())


def test_a_crash_leaves_a_directory_that_says_it_is_unfinished(tmp_path):
    code = f"""
import os
from cascade_lab.run import unfinished
with unfinished({str(tmp_path / "run")!r}) as folder:
    (folder / "examples.parquet").write_text("half")
    os._exit(9)
"""
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 9
    assert [path.name for path in tmp_path.iterdir()] == ["run.unfinished"]
    with pytest.raises(RunError, match="an unfinished run, left by a crash"):
        Run.read(tmp_path / "run.unfinished")
    with pytest.raises(RunError, match="unfinished is an unfinished run"), unfinished(tmp_path / "run"):
        pass
    with unfinished(tmp_path / "run", overwrite=True) as folder:
        assert not list(folder.iterdir())


def test_a_full_disk(tiny, tiny_evalset, small_disk):
    frame = EvalSet.read(tiny_evalset).examples
    frame["noise"] = [np.random.default_rng(i).bytes(2000).hex() for i in range(len(frame))]
    with Cascade.load(tiny) as cascade, pytest.raises(RunError, match=r"cannot be written \(.*[Nn]o space left"):
        cascade.run(EvalSet.from_frame(frame), output=small_disk / "run")
    assert not list(small_disk.iterdir())


def test_a_read_only_disk(tiny, tiny_evalset, small_disk):
    subprocess.run(["mount", "-o", "remount,ro", str(small_disk)], check=True)
    with Cascade.load(tiny) as cascade, pytest.raises(RunError, match=r"cannot be written \(Read-only file system\)"):
        cascade.run(EvalSet.read(tiny_evalset).limit(5), output=small_disk / "run")


def test_an_output_below_a_file(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(RunError, match="cannot be written"), unfinished(tmp_path / "file" / "run"):
        pass


def test_what_is_no_run_is_refused(tiny_run, tmp_path):
    with pytest.raises(RunError, match="no such run directory"):
        Run.read(tmp_path / "none")
    with pytest.raises(RunError, match=r"not a run directory \(it has no manifest.json\)"):
        Run.read(tmp_path)
    shutil.copytree(tiny_run.directory, tmp_path / "run")
    (tmp_path / "run" / "scores" / "gate.parquet").write_bytes(b"PAR1")
    with pytest.raises(RunError, match="parquet: cannot be read"):
        Run.read(tmp_path / "run").replay()
    manifest = json.loads((tmp_path / "run" / "manifest.json").read_text())
    (tmp_path / "run" / "manifest.json").write_text(json.dumps({**manifest, "schema_version": 99}))
    with pytest.raises(RunError, match="has schema version 99, and this package reads 1"):
        Run.read(tmp_path / "run")


def test_rows_are_joined_on_example_id_and_not_on_position(tiny_run, tmp_path):
    shutil.copytree(tiny_run.directory, tmp_path / "run")
    path = tmp_path / "run" / "scores" / "intent.parquet"
    table = pq.read_table(path)
    pq.write_table(table.take(np.random.default_rng(0).permutation(len(table))), path)
    assert Run.read(tmp_path / "run").replay().equals(tiny_run.predictions)


def test_a_replay_that_needs_shadow_scores_says_so(tiny, tiny_evalset, tmp_path):
    with Cascade.load(tiny) as cascade:
        p = cascade.predict(EvalSet.read(tiny_evalset).examples["text"].tolist())["gate_probability"]
    from cascade_lab import CascadeSpec

    with Cascade.load(CascadeSpec.read(tiny).with_thresholds({"gate": float(p.median())})) as cascade:
        run = cascade.run(EvalSet.read(tiny_evalset), output=tmp_path / "run", shadow=False)
    assert run.replay({"gate": 1.0})["decided_by"].eq("gate").all()
    with pytest.raises(RunError, match=r"\d+ examples would reach a stage that never scored them"):
        run.replay({"gate": 0.0})

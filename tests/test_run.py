"""Runs: the directory and its contract, crashes and full disks, runs in memory, logits from elsewhere."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow.parquet as pq
import pytest
from helpers import memory_run, random_run, random_spec, rewrite_table, without_texts

from cascade_lab import Cascade, CascadeSpec, EvalSet, Run, StageSpec
from cascade_lab.exceptions import CheckpointError, RunError
from cascade_lab.run_directory import unfinished_run


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
        "confidence",
    ]
    assert _schema(folder / "timings.parquet")[0] == [
        "stage", "batch", "n_examples", "sequence_length", "n_tokens", "tokenize_seconds", "run_seconds",
    ]  # fmt: skip


def _schema(path):
    schema = pq.read_schema(path)
    return schema.names, schema.types


def test_the_manifest_says_what_ran_on_what(tiny_run, tiny, tiny_evalset):
    manifest = tiny_run.manifest
    assert set(manifest) >= {
        "schema_version", "run_id", "source", "cascade", "thresholds", "tuned_on", "git", "packages", "processor",
        "seed", "started", "wall_seconds",
    }  # fmt: skip
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
        with pytest.raises(RunError, match="run exists already; choose another output, or pass --overwrite"):
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
        unfinished_run(tmp_path / "thesis", overwrite=True),
    ):
        pass
    assert (tmp_path / "thesis" / "chapter.txt").read_text() == "years of work"


def test_a_failure_in_the_middle_leaves_nothing(tmp_path):
    def interrupted():
        with unfinished_run(tmp_path / "run") as folder:
            (folder / "examples.parquet").write_text("half")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert not list(tmp_path.iterdir())


def test_a_crash_leaves_a_directory_that_says_it_is_unfinished(tmp_path):
    code = f"""
import os
from cascade_lab.run_directory import unfinished_run
with unfinished_run({str(tmp_path / "run")!r}) as folder:
    (folder / "examples.parquet").write_text("half")
    os._exit(9)
"""
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 9
    assert sorted(path.name for path in tmp_path.iterdir()) == [".run.lock", "run.unfinished"]
    with pytest.raises(RunError, match="an unfinished run, left by a crash"):
        Run.read(tmp_path / "run.unfinished")
    with unfinished_run(tmp_path / "run") as folder:
        assert not list(folder.iterdir())
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


def test_a_run_that_another_writes_is_refused(tiny, tiny_evalset, tmp_path):
    with unfinished_run(tmp_path / "run"), Cascade.load(tiny) as cascade:
        for overwrite in (False, True):
            with pytest.raises(RunError, match=rf"run: process {os.getpid()} is writing this run; wait until"):
                cascade.run(EvalSet.read(tiny_evalset).limit(5), output=tmp_path / "run", overwrite=overwrite)


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
    with pytest.raises(RunError, match="cannot be written"), unfinished_run(tmp_path / "file" / "run"):
        pass


def test_what_is_no_run_is_refused(tiny_run, tmp_path):
    with pytest.raises(RunError, match="no such run directory"):
        Run.read(tmp_path / "none")
    with pytest.raises(RunError, match=r"not a run directory \(it has no manifest.json\)"):
        Run.read(tmp_path)
    shutil.copytree(tiny_run.directory, tmp_path / "run")
    (tmp_path / "run" / "scores" / "gate.parquet").write_bytes(b"PAR1")
    with pytest.raises(RunError, match=r"gate\.parquet: changed since the run"):
        Run.read(tmp_path / "run").replay()
    rewrite_table(tmp_path / "run", "scores/gate.parquet", b"PAR1")
    with pytest.raises(RunError, match=r"gate\.parquet: cannot be read"):
        Run.read(tmp_path / "run").replay()
    manifest = json.loads((tmp_path / "run" / "manifest.json").read_text())
    (tmp_path / "run" / "manifest.json").write_text(json.dumps({**manifest, "schema_version": 99}))
    with pytest.raises(RunError, match="has schema version 99, and this package reads 1 and 2"):
        Run.read(tmp_path / "run")


def test_rows_are_joined_on_example_id_and_not_on_position(tiny_run, tmp_path):
    shutil.copytree(tiny_run.directory, tmp_path / "run")
    for name in ("scores/intent.parquet", "predictions.parquet"):
        table = pq.read_table(tmp_path / "run" / name)
        rewrite_table(tmp_path / "run", name, table.take(np.random.default_rng(0).permutation(len(table))))
    assert Run.read(tmp_path / "run").predictions.equals(tiny_run.predictions)
    assert without_texts(Run.read(tmp_path / "run").replay()).equals(tiny_run.predictions)


def test_a_replay_that_needs_shadow_scores_says_so(tiny, tiny_evalset, tmp_path):
    with Cascade.load(tiny) as cascade:
        p = cascade.predict(EvalSet.read(tiny_evalset).examples["text"].tolist())["gate_probability"]
    with Cascade.load(CascadeSpec.read(tiny).with_thresholds({"gate": float(p.median())})) as cascade:
        run = cascade.run(EvalSet.read(tiny_evalset), output=tmp_path / "run", shadow=False)
    assert run.replay({"gate": 1.0})["decided_by"].eq("gate").all()
    with pytest.raises(RunError, match=r"stage 'intent' never scored \d+ of the examples that this needs"):
        run.replay({"gate": 0.0})


def test_a_run_of_schema_version_1_is_read_and_upgraded():
    """The directory was written by the package that had version 1; its metrics.json is of that package too."""
    folder = Path(__file__).parent / "data" / "run_version_1"
    run = Run.read(folder)
    assert (run.manifest["schema_version"], run.manifest["source"]) == (2, "evaluation")
    assert run.manifest["stages"] == {"gate0": {"n_workers": 2, "engine": "fast"}}
    assert list(run.predictions)[-2:] == ["probability", "confidence"]
    pd.testing.assert_frame_equal(run.predictions, without_texts(run.replay()))
    then = json.loads((folder / "metrics.json").read_text())
    assert run.metrics["end_to_end"] == pytest.approx(then["end_to_end"])
    for name, metrics in then["stages"].items():
        assert run.metrics["stages"][name]["accuracy"] == pytest.approx(metrics["accuracy"])
    run.check()


def test_a_run_in_memory_is_the_run_that_is_read_back(tmp_path):
    run = random_run(tmp_path / "run", n_gates=2, seed=4)
    in_memory = memory_run(run.spec, run.examples, {s.name: run.scores(s.name).logits for s in run.spec.stages}, seed=4)
    assert in_memory.directory is None
    pd.testing.assert_frame_equal(in_memory.predictions, run.predictions)
    for stage in run.spec.stages:
        for ours, theirs in zip(in_memory.scores(stage.name), run.scores(stage.name), strict=True):
            np.testing.assert_array_equal(ours, theirs)
    assert in_memory.metrics == run.metrics == json.loads((tmp_path / "run" / "metrics.json").read_text())


def test_tables_are_read_when_they_are_needed(tmp_path):
    random_run(tmp_path / "run")
    for path in (tmp_path / "run").rglob("*.parquet"):
        path.unlink()
    run = Run.read(tmp_path / "run")
    assert run.spec.last.name == "last"
    with pytest.raises(RunError, match=r"examples\.parquet: cannot be read"):
        run.examples  # noqa: B018


def test_the_same_run_at_another_spec_is_what_that_cascade_would_have_made(tmp_path):
    run = random_run(tmp_path / "run", n_gates=2, seed=1)
    moved = run.with_thresholds({"gate0": 0.9, "last": 0.4})
    logits = {stage.name: run.scores(stage.name).logits for stage in run.spec.stages}
    anew = memory_run(moved.spec, run.examples, logits)
    pd.testing.assert_frame_equal(moved.predictions, anew.predictions)
    for stage in run.spec.stages:
        np.testing.assert_array_equal(moved.scores(stage.name).shadow, anew.scores(stage.name).shadow)
        np.testing.assert_array_equal(moved.decision(stage.name).label, anew.decision(stage.name).label)
    assert moved.manifest["thresholds"] == {"gate0": 0.9, "gate1": 0.5, "last": 0.4}
    assert run.spec.thresholds["gate0"] == 0.5


TWO = CascadeSpec(
    "two",
    (
        StageSpec("gate", ("oos", "in"), pass_label="in", threshold=0.5),
        StageSpec("topic", ("pay", "play", "lost"), min_probability=0.5, reject_label="oos"),
    ),
)
EXAMPLES = pd.DataFrame({"text": ["a bill", "a song", "hello", "my card"], "label": ["pay", "play", "oos", None]})
NAN = [np.nan] * 3
LOGITS = {"gate": np.array([[0, 2], [0, 1], [3, 0], [0, 4]]), "topic": np.array([[2, 0, 0], [1, 0, 0], NAN, [0, 0, 5]])}


def test_logits_from_elsewhere_make_a_run():
    """hello stops at the gate; p(pay) of 'a song' is e / (e + 2) = 0.576, above 0.5; 'my card' has no label."""
    run = Run.from_logits(TWO, EXAMPLES, LOGITS)
    assert run.predictions["predicted"].tolist() == ["pay", "pay", "oos", "lost"]
    assert run.predictions["decided_by"].tolist() == ["topic", "topic", "gate", "topic"]
    assert run.manifest["source"] == "logits"
    assert run.scores("topic").scored.tolist() == [True, True, False, True]
    assert (run.metrics["n_examples"], run.metrics["n_labelled"]) == (4, 3)
    assert run.metrics["end_to_end"]["accuracy"] == pytest.approx(2 / 3)
    assert len(run.timings) == 0
    with pytest.raises(RunError, match="stage 'topic' never scored 1 "):
        run.replay({"gate": 0.0})


def test_logits_from_elsewhere_are_written_and_read(tmp_path):
    run = Run.from_logits(TWO, EXAMPLES, LOGITS)
    again = run.write(tmp_path / "run")
    pd.testing.assert_frame_equal(again.predictions, run.predictions)
    assert again.spec == run.spec
    again.check()
    with pytest.raises(RunError, match="exists already"):
        run.write(tmp_path / "run")


def test_masked_rows_and_probabilities_are_taken():
    p = np.array([[0.9, 0.05, 0.05], [0.2, 0.2, 0.6], [1.0, 0.0, 0.0], [0.0, 1.0, 0.0]])
    masked = np.ma.masked_array(p, mask=[[False] * 3, [False] * 3, [True] * 3, [False] * 3])
    gate = np.array([[0.1, 0.9], [0.2, 0.8], [0.8, 0.2], [0.0, 1.0]])
    run = Run.from_logits(TWO, EXAMPLES, {"gate": gate, "topic": masked}, probabilities=True)
    assert run.predictions["predicted"].tolist() == ["pay", "lost", "oos", "play"]
    np.testing.assert_allclose(run.predictions["confidence"], [0.9, 0.6, 0.2, 1.0], atol=1e-6)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"topic": LOGITS["topic"][:3]}, r"shape \(3, 3\), but there are 4 examples"),
        ({"topic": LOGITS["topic"][:, :2]}, "2 columns, but the stage has 3 labels"),
        ({"topic": np.where(np.eye(4, 3) == 1, np.nan, LOGITS["topic"])}, "row 0 mixes NaN and numbers"),
        ({"topic": np.where(np.eye(4, 3) == 1, np.inf, 0.0)}, "row 0 has a value that is infinite in float32"),
        ({"gate": np.full((4, 2), 0.5)}, "every row sums to 1, so these look like probabilities.*--probabilities"),
        ({"gate": [["a", "b"]] * 4}, "are not numbers"),
        ({"gates": LOGITS["gate"]}, "no such stage; did you mean 'gate'"),
        ({"gate": np.where(LOGITS["gate"] == 3, 0, LOGITS["gate"])}, "stage 'topic' never scored 1 "),
    ],
)
def test_logits_that_cannot_be_right_are_refused_in_one_line(change, message):
    with pytest.raises(RunError, match=message) as error:
        Run.from_logits(TWO, EXAMPLES, {**LOGITS, **change})
    assert "\n" not in str(error.value)


def test_logits_for_a_missing_stage_or_of_no_distribution_are_refused():
    with pytest.raises(RunError, match="stage 'topic' has no logits"):
        Run.from_logits(TWO, EXAMPLES, {"gate": LOGITS["gate"]})
    with pytest.raises(RunError, match="row 0 is not a distribution"):
        Run.from_logits(TWO, EXAMPLES, LOGITS, probabilities=True)


def test_a_cascade_that_was_scored_elsewhere_cannot_be_loaded():
    with pytest.raises(CheckpointError, match=r"stage 'gate0'.*its logits were computed elsewhere"):
        Cascade.load(random_spec())


def test_what_needs_labels_says_so_where_there_are_none():
    run = Run.from_logits(TWO, EXAMPLES.assign(label=None), LOGITS)
    assert run.predictions["predicted"].tolist() == ["pay", "pay", "oos", "lost"]
    with pytest.raises(RunError, match="no example has a label"):
        run.metrics  # noqa: B018

"""Scoring jobs: equal bytes whatever happens, rows that cannot be scored, refusals, kept scores, the command."""

from __future__ import annotations

import gzip
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from contextlib import suppress
from dataclasses import replace
from hashlib import sha256
from pathlib import Path

import numpy as np
import pandas as pd
import psutil
import pyarrow as pa
import pyarrow.dataset as ds
import pyarrow.parquet as pq
import pytest
from helpers import WORDS, write_checkpoint
from typer.testing import CliRunner

from cascade_lab import Cascade, CascadeSpec, EvalSet, Run
from cascade_lab.batch.job import score
from cascade_lab.batch.ray_engine import check_reachable
from cascade_lab.batch.scoring import Block, load_for_scoring, score_block, score_shard
from cascade_lab.batch.shards import Settings
from cascade_lab.cli import app
from cascade_lab.exceptions import CascadeLabError, RunError
from cascade_lab.thresholds import fit_rejector

COMMAND = [sys.executable, "-m", "cascade_lab", "score"]


def numbered_texts(n: int, *, seed: int = 0) -> list[str]:
    """Return different texts of 2 to 15 words."""
    rng, words = np.random.default_rng(seed), np.array(WORDS)
    return [f"{' '.join(words[rng.integers(0, len(words), k)])} {i}" for i, k in enumerate(rng.integers(1, 15, n))]


def write_texts(folder: Path, n: int, *, files: int = 3) -> Path:
    """Write texts with whole-numbered ids as parquet files with row groups of unequal sizes."""
    folder.mkdir()
    for i, part in enumerate(np.array_split(np.arange(n), files)):
        table = pa.table({"id": part, "text": numbered_texts(len(part), seed=i)})
        pq.write_table(table, folder / f"{i}.parquet", row_group_size=700 + 100 * i)
    return folder


def contents(folder: Path) -> dict[str, str]:
    """Return the digest of each file that a job must write alike; its plan and its manifest have times in them."""
    return {
        path.relative_to(folder).as_posix(): sha256(path.read_bytes()).hexdigest()
        for path in folder.rglob("*")
        if path.is_file() and path.name not in ("job.json", "manifest.json")
    }


def predictions_of(folder: Path) -> pd.DataFrame:
    return ds.dataset(folder / "predictions").to_table().to_pandas()


@pytest.fixture(scope="module")
def texts_folder(tmp_path_factory) -> Path:
    return write_texts(tmp_path_factory.mktemp("texts") / "in", 6000)


@pytest.fixture(scope="module")
def whole(tiny: Path, texts_folder: Path, tmp_path_factory) -> Path:
    """The output of a job that nothing interrupted: two workers with one thread."""
    folder = tmp_path_factory.mktemp("whole") / "out"
    result = score(tiny, [texts_folder], folder, shard_rows=1000, workers=2, keep=["scores", "features"], sample=0.3)
    assert (result.is_whole, result.n_new, len(result.counts.reached)) == (True, 6000, 2)
    return folder


def test_predictions_are_those_of_the_cascade(whole, tiny, texts_folder):
    texts = pa.concat_tables([pq.read_table(path) for path in sorted(texts_folder.glob("*"))]).to_pandas()
    found = predictions_of(whole)
    assert found["example_id"].tolist() == texts["id"].tolist()
    assert found["error"].isna().all()
    with Cascade.load(tiny) as cascade:
        expected = cascade.predict(texts["text"])
    assert (found["predicted"] == expected["predicted"]).mean() > 0.999  # a threshold may be within the last bits
    assert np.allclose(found["probability"], expected["probability"], atol=1e-5)


def test_the_summary_is_that_of_the_predictions(whole):
    found, manifest = predictions_of(whole), json.loads((whole / "manifest.json").read_text())
    assert manifest["predicted"] == found["predicted"].value_counts().to_dict()
    assert manifest["decided_by"] == found["decided_by"].value_counts().to_dict()
    assert manifest["reached"] == {"gate": 6000, "intent": (found["decided_by"] == "intent").sum()}
    for stage, own in found.groupby("decided_by"):
        assert manifest["confidence"][stage] == np.histogram(own["confidence"], np.linspace(0, 1, 51))[0].tolist()
    assert sum(manifest["probability"]["gate"]) == 6000
    assert (manifest["n_texts"], manifest["n_errors"], manifest["unreadable"]) == (6000, 0, [])


def test_kept_scores_are_a_run_whose_replay_is_what_was_predicted(whole, tmp_path):
    run = Run.read_scores(whole)
    n = len(run.examples)
    assert 0.25 < n / 6000 < 0.35
    assert (run.manifest["source"], run.manifest["evalset"]["n_examples"]) == ("batch", n)
    replayed = run.replay()
    columns = ["example_id", "predicted", "decided_by", "probability", "confidence"]
    assert replayed[columns].equals(run.predictions[columns])
    assert all(run.scores(stage).scored.all() for stage in ("gate", "intent"))
    assert (run.scores("intent").shadow == (run.predictions["decided_by"] == "gate")).all()
    assert run.features("intent").shape == (n, 32)
    assert len(run.with_thresholds({"gate": 0.99}).predictions) == n
    result = CliRunner().invoke(app, ["collect", str(whole), "--output", str(tmp_path / "run")])
    assert result.exit_code == 0, result.output
    written = Run.read(tmp_path / "run")
    assert written.replay()[columns].equals(replayed[columns])
    assert np.array_equal(written.features("gate"), run.features("gate"))


def test_collect_joins_labels_by_id(whole, tmp_path):
    ids = Run.read_scores(whole).examples["example_id"]
    labels = pd.DataFrame(
        {"example_id": ids[::2], "label": ["oos", "0"] * (len(ids[::2]) // 2) + ["1"] * (len(ids[::2]) % 2)}
    )
    labels.to_csv(tmp_path / "labels.csv", index=False)
    arguments = ["collect", str(whole), "--labels", str(tmp_path / "labels.csv"), "--output", str(tmp_path / "run")]
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 0, result.output
    run = Run.read(tmp_path / "run")
    assert run.labelled.predictions["label"].tolist() == labels["label"].tolist()
    result = CliRunner().invoke(app, ["collect", str(whole), "--sample"])
    assert (result.exit_code, "omit --since" in result.output) == (2, True)


def settings_of(cascade: Path, folder: Path) -> Settings:
    job = json.loads((folder / "job.json").read_text())
    return Settings(str(cascade), job["cascade_digest"], ("scores", "features"), 0.3, True, str(folder))


def shards_of_job(folder: Path):
    from cascade_lab.batch.job import shards_of
    from cascade_lab.batch.plan_file import plan_from_dict

    return shards_of(plan_from_dict(json.loads((folder / "job.json").read_text()), folder / "job.json"))


def test_bytes_depend_neither_on_threads_nor_on_the_order_of_shards(whole, tiny, tmp_path):
    settings, shards = settings_of(tiny, whole)._replace(folder=str(tmp_path)), shards_of_job(whole)
    with load_for_scoring(settings) as cascade:
        for shard in reversed(shards):
            score_shard(cascade, shard, settings, threads=3)
    assert contents(tmp_path) == contents(whole)


def run_and_kill(
    arguments: list[str], folder: Path, rng: random.Random, *, only_worker: bool, from_start: bool
) -> bool:
    """Start the command; kill it, or one of its workers. Return whether it ended well in spite of that.

    The time is random: up to 6 seconds from the start, or up to 3 after a further shard is done.
    """
    n_done = len(list(folder.glob("shards/*.json")))
    process = subprocess.Popen([*COMMAND, *arguments], stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    while not from_start and process.poll() is None and len(list(folder.glob("shards/*.json"))) == n_done:
        time.sleep(0.05)
    try:
        process.wait(rng.uniform(0, 6 if from_start else 3))
    except subprocess.TimeoutExpired:
        parent, children = psutil.Process(process.pid), []
        for child in parent.children():
            with suppress(psutil.Error):  # it has just ended
                children += [child] if "spawn_main" in " ".join(child.cmdline()) else []
        victim = rng.choice(children) if only_worker and children else parent
        with suppress(psutil.NoSuchProcess):
            victim.kill()
        if victim == parent:  # its workers notice, and end
            assert not psutil.wait_procs(children, timeout=60)[1]
    output = process.communicate(timeout=1200)
    assert process.returncode in (0, -signal.SIGKILL), output
    return process.returncode == 0


@pytest.mark.parametrize(
    ("n", "n_kills", "shard_rows"), [(6000, 2, 1000), pytest.param(200_000, 50, 2000, marks=pytest.mark.slow)]
)
def test_killed_jobs_go_on_and_end_with_equal_bytes(tiny, whole, texts_folder, tmp_path, n, n_kills, shard_rows):
    """Kills the first process or one worker; a job that ends before loses a part of its shards again."""
    rng, folder, expected = random.Random(n), tmp_path / "out", whole
    if n != 6000:
        texts_folder, expected = write_texts(tmp_path / "in", n, files=5), tmp_path / "expected"
    options = ["--shard-rows", str(shard_rows), "--keep", "scores,features", "--sample", "0.3"]
    arguments = [str(tiny), str(texts_folder), *options, "--workers", "2", "--output"]
    if n != 6000:
        assert subprocess.run([*COMMAND, *arguments, str(expected)], check=False).returncode == 0
    n_done = []
    for i in range(n_kills):
        is_whole = run_and_kill([*arguments, str(folder)], folder, rng, only_worker=i % 2 == 0, from_start=i % 4 == 3)
        done = sorted((folder / "shards").glob("*.json")) if (folder / "shards").exists() else []
        n_done.append(len(done))
        if is_whole:
            assert contents(folder) == contents(expected)
            for path in rng.sample(done, k=len(done) // 2):
                path.unlink()
    result = score(
        tiny, [texts_folder], folder, shard_rows=shard_rows, workers=1, keep=["scores", "features"], sample=0.3
    )
    assert result.is_whole
    assert contents(folder) == contents(expected)
    print(f"{n_kills} kills; shards done after each: {n_done}")


@pytest.fixture(scope="module")
def with_rejector(tiny: Path, tiny_evalset: Path, tmp_path_factory) -> Path:
    """The tiny cascade with a rejector over distances, of which both stages' features are needed."""
    folder, spec = tmp_path_factory.mktemp("rejector"), CascadeSpec.read(tiny)
    spec = replace(spec, stages=(spec.stages[0], replace(spec.last, reject_label="oos")))
    with Cascade.load(spec, keep_features=True) as cascade:
        run = cascade.run(EvalSet.read(tiny_evalset), output=folder / "run")
    fitted = fit_rejector(run, ["gate.mahalanobis", "mahalanobis"], train_run=run, at_least=0.01)
    fitted.write(folder / "cascade.toml")
    return folder / "cascade.toml"


@pytest.fixture(scope="module")
def faulty(with_rejector, tmp_path_factory):
    """The result of the command on a folder with every fault of a row and of a file, and the output folder."""
    folder = tmp_path_factory.mktemp("faulty")
    inputs = folder / "in"
    inputs.mkdir()
    broken = pa.Array.from_buffers(
        pa.string(), 3, [None, pa.py_buffer(np.array([0, 3, 6, 8], dtype=np.int32)), pa.py_buffer(b"pay\xff\xfe\xfdok")]
    )
    pq.write_table(pa.table({"id": ["p1", "p2", "p3"], "text": broken}), inputs / "a.parquet")
    pq.write_table(pa.table({"id": ["n1", None, "n3"], "text": ["pay", "bill", None]}), inputs / "b.parquet")
    (inputs / "c.csv.gz").write_bytes(gzip.compress(b'id,text\nc1,"pay, now"\nc2,pay,now\nc3,\nc4\n'))
    lines = ['{"id": "j1", "text": "pay"}', "{not json", '{"id": "j2", "text": 7}', '{"id": "j3", "text": "\\ud800"}']
    (inputs / "d.jsonl").write_text("\n".join([*lines, '{"id": "j4", "text": "a", "text_b": "b"}', "[1]"]))
    (inputs / "e.tsv").write_bytes("id\ttext\ne1\tpay\ne2\tünïcode\n".encode() + b"e3\t\xff\n")
    (inputs / "f.parquet").write_bytes((inputs / "a.parquet").read_bytes()[:-20])
    arguments = ["score", str(with_rejector), str(inputs), "--output", str(folder / "out"), "--workers", "1"]
    result = CliRunner().invoke(app, [*arguments, "--keep", "scores"])
    return result, folder / "out"


def test_rows_that_cannot_be_scored_have_an_error_and_stop_nothing(faulty):
    _, folder = faulty
    found = predictions_of(folder)
    named = dict(
        zip(found["example_id"], found["error"].astype(object).where(found["error"].notna(), None), strict=True)
    )
    expected = {
        "p1": None, "p2": "text is not UTF-8", "p3": None, "n1": None, "n3": "has no text", "c1": None,
        "c3": None, "c4": "has no text", "j1": None, "j2": "text is no string", "j3": "text is not UTF-8",
        "j4": None, "e1": None, "e2": None, "e3": "text is not UTF-8",
    }  # fmt: skip
    assert {one: named[one] for one in expected} == expected
    without = found[found["example_id"].isna()]["error"].tolist()
    inputs = folder.parent / "in"
    assert without == [
        f"{inputs}/b.parquet:2: has no id",
        f"{inputs}/c.csv.gz:2: has 3 fields, but the header has 2",
        f"{inputs}/d.jsonl:2: is not JSON",
        f"{inputs}/d.jsonl:6: is not a JSON object",
    ]
    is_error = found["error"].notna()
    for column in ("predicted", "decided_by", "probability", "confidence"):
        assert (found[column].isna() == is_error).all(), column


def test_a_file_that_cannot_be_read_is_named_and_the_exit_code_is_3(faulty):
    result, folder = faulty
    assert result.exit_code == 3, result.output
    assert f"not read: {folder.parent}/in/f.parquet: cannot be read" in result.output
    assert "note: 10 rows could not be scored (text is not UTF-8: 3; has no text: 2" in result.output
    manifest = json.loads((folder / "manifest.json").read_text())
    assert [one["name"] for one in manifest["unreadable"]] == [f"{folder.parent}/in/f.parquet"]
    assert manifest["n_errors"] == 10


def test_kept_scores_of_a_cascade_with_distances_replay_alike_and_have_no_row_with_an_error(faulty, tmp_path):
    _, folder = faulty
    run = Run.read_scores(folder)
    found = predictions_of(folder)
    assert run.examples["example_id"].tolist() == found[found["error"].isna()]["example_id"].tolist()
    evidence = run.evidence(run.spec)
    assert sorted(evidence) == ["gate.mahalanobis", "intent.mahalanobis"]
    assert all(np.isfinite(values).all() for values in evidence.values())
    columns = ["example_id", "predicted", "decided_by", "probability", "confidence"]
    assert run.replay()[columns].equals(run.predictions[columns])
    written = run.write(tmp_path / "run")
    assert written.replay()[columns].equals(run.predictions[columns])


def copy_of(whole: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(whole, tmp_path / "out"))


def again(cascade: Path, inputs: Path, folder: Path, **change):
    options = {"shard_rows": 1000, "workers": 1, "keep": ["scores", "features"], "sample": 0.3} | change
    return score(cascade, [inputs], folder, **options)


def test_a_finished_job_is_only_summed_up(whole, tiny, texts_folder, tmp_path):
    folder = copy_of(whole, tmp_path)
    result = again(tiny, texts_folder, folder)
    assert (result.n_new, result.counts.n_texts, result.is_whole) == (0, 6000, True)


def test_files_that_came_later_are_left_out_and_named(whole, tiny, texts_folder, tmp_path):
    folder = copy_of(whole, tmp_path)
    for name in "xyzw":
        (tmp_path / f"{name}.csv").write_text("id,text\n7000,pay\n")
    inputs = [texts_folder, *(tmp_path / f"{name}.csv" for name in "xyzw")]
    result = score(tiny, inputs, folder, shard_rows=1000, keep=["scores", "features"], sample=0.3)
    names = ", ".join(f"{tmp_path}/{name}.csv" for name in "xyz")
    assert result.notes == (
        f"4 files came after the job was planned, and are left out: {names} and 1 more; score them into another "
        "--output",
    )


def test_other_inputs_options_and_cascades_are_refused(whole, tiny, texts_folder, tmp_path):
    folder, inputs = copy_of(whole, tmp_path), tmp_path / "in"
    with pytest.raises(RunError, match=r"was begun with shard-rows 1000, not 999; choose another --output"):
        again(tiny, texts_folder, folder, shard_rows=999)
    with pytest.raises(RunError, match=r"was begun with keep .*features.*, not"):
        again(tiny, texts_folder, folder, keep=["scores"])
    spec = CascadeSpec.read(tiny).with_thresholds({"gate": 0.6})
    spec.write(tmp_path / "other.toml")
    with pytest.raises(RunError, match=r"was begun with another cascade than .*other.toml is now"):
        again(tmp_path / "other.toml", texts_folder, folder)
    shutil.copytree(texts_folder, inputs)
    with pytest.raises(RunError, match="was begun with other inputs"):
        again(tiny, inputs, folder)
    with pytest.raises(RunError, match="is not the output of a scoring job"):
        again(tiny, texts_folder, inputs)


def test_changed_and_missing_inputs_are_named_and_touched_ones_are_not(whole, tiny, texts_folder, tmp_path):
    folder, path = copy_of(whole, tmp_path), texts_folder / "1.parquet"
    content = path.read_bytes()
    try:
        os.utime(path)
        assert again(tiny, texts_folder, folder).is_whole
        path.write_bytes(content[:-1] + b"x")
        with pytest.raises(RunError, match=r"in/1.parquet: was changed since the job began; put it back"):
            again(tiny, texts_folder, folder)
        path.unlink()
        with pytest.raises(RunError, match=r"in/1.parquet: was an input when the job began and is gone"):
            again(tiny, texts_folder, folder)
    finally:
        path.write_bytes(content)


def test_a_part_that_was_changed_is_named(whole, tiny, texts_folder, tmp_path):
    folder = copy_of(whole, tmp_path)
    (folder / "scores" / "gate" / "part-00002.parquet").write_bytes(b"x")
    with pytest.raises(RunError, match=r"gate/part-00002.parquet: is missing or was changed; delete .*00002.json"):
        again(tiny, texts_folder, folder)
    with pytest.raises(RunError, match=r"part-00002.parquet: is missing or was changed"):
        Run.read_scores(folder)


def test_two_processes_cannot_write_one_job(whole, tiny, texts_folder, tmp_path):
    from cascade_lab.locks import lock

    folder = copy_of(whole, tmp_path)
    with (
        lock(folder, "scoring job", RunError),
        pytest.raises(RunError, match="is writing this scoring job; wait until it has ended"),
    ):
        again(tiny, texts_folder, folder)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"keep": ["logits"]}, "--keep logits: is not kept; give scores or features"),
        ({"keep": ["features"]}, "needs the scores too"),
        ({"sample": 0.1}, "add --keep scores"),
        ({"sample": 0.0, "keep": ["scores"]}, "must be above 0"),
        ({"make_ids": True, "id_column": "id"}, "exclude each other"),
    ],
)
def test_options_that_make_no_sense_are_refused(tiny, texts_folder, tmp_path, options, message):
    with pytest.raises(CascadeLabError, match=message):
        score(tiny, [texts_folder], tmp_path / "out", **options)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("address", "message"),
    [("here", "is no address of a cluster"), ("ray://here:1", "is no address"), ("127.0.0.1:1", "cannot be reached")],
)
def test_a_ray_cluster_that_does_not_answer_is_refused(address, message):
    with pytest.raises(RunError, match=message):
        check_reachable(address)
    check_reachable("auto")


def test_a_duplicate_id_leaves_nothing_behind(tiny, tmp_path):
    (tmp_path / "a.csv").write_text("id,text\n1,x\n1,y\n")
    with pytest.raises(CascadeLabError, match=r"a.csv row 2: id '1' is at .*a.csv row 1 too"):
        score(tiny, [tmp_path / "a.csv"], tmp_path / "out")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.csv"]


def test_texts_whose_logits_are_not_finite_have_an_error(tiny, tmp_path):
    """One word has an embedding that overflows: the texts with it fail, and those beside them do not."""
    from cascade_lab.bert.checkpoint_reader import CheckpointReader

    shutil.copytree(tiny.parent, tmp_path / "cascade")
    prefix = next((tmp_path / "cascade" / "gate").glob("*.index")).with_suffix("")
    name = "bert/embeddings/word_embeddings"
    words = CheckpointReader(str(prefix)).read(name).copy()
    vocabulary = (tmp_path / "cascade" / "gate" / "vocab.txt").read_text().split()
    words[vocabulary.index("music")] = 3e38
    for path in (tmp_path / "cascade" / "gate").glob("model.ckpt*"):
        path.unlink()
    write_checkpoint(tmp_path / "cascade" / "gate", 2, seed=1, **{name.replace("/", "__"): words})
    texts = ["pay", "play music", "bill", "music", *(f"card {i}" for i in range(60))]
    block = Block(list(range(64)), texts, None, [None] * 64)
    settings = Settings("", "", ("scores",), 1.0, True, "")
    with Cascade.load(tmp_path / "cascade" / "cascade.toml", n_workers=1) as cascade:
        tables, counts = score_block(cascade, block, settings, "int64")
    errors = tables["predictions"]["error"].to_pandas()
    assert errors.notna().to_numpy().nonzero()[0].tolist() == [1, 3]
    assert (counts.n_errors, counts.errors) == (2, {"gets a logit that is not finite": 2})
    assert sorted(map(int, tables["scores/intent"]["example_id"].to_pylist())) == [0, 2, *range(4, 64)]


def test_a_dry_run_says_hours_and_bytes_and_writes_nothing(tiny, texts_folder, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    result = CliRunner().invoke(app, ["score", str(tiny), str(texts_folder), "--dry-run", "--shard-rows", "1000"])
    assert result.exit_code == 0, result.output
    lines = result.output.splitlines()
    assert lines[0].startswith("input: 6,000 texts in 3 files; ")
    assert lines[1].startswith("measured: 1,0")
    assert lines[2].startswith("the whole input: ")
    assert list(tmp_path.iterdir()) == []

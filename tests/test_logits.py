"""Logits of other software: every kind of file gives the same array, and what is wrong is named in one line."""

from __future__ import annotations

import pickle

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from typer.testing import CliRunner

from cascade_lab import EvalSet, Run
from cascade_lab.cli import app
from cascade_lab.exceptions import RunError
from cascade_lab.logits import read_logits
from cascade_lab.spec import CascadeSpec, StageSpec

GATE = StageSpec("gate", ("oos", "in"), pass_label="in", threshold=0.5)
TOPIC = StageSpec("topic", ("pay", "play", "sing"))
IDS = ["a", "b", "c", "d"]
LOGITS = np.array([[2.0, -1.0, 0.5], [0.0, 3.0, 1.0], [0.25, 0.0, 4.0], [np.nan, np.nan, np.nan]])
SPEC = """
name = "elsewhere"

[[stage]]
name = "gate"
labels = ["oos", "in"]
pass_label = "in"
threshold = 0.5

[[stage]]
name = "topic"
labels = ["pay", "play", "sing"]
"""


def write_npy(path, values):
    np.save(path, values)


def write_npz(path, values):
    np.savez(path, gate=np.zeros((4, 2)), topic=values)


def write_table(path, values, *, order=(2, 0, 1), ids=None):
    frame = pd.DataFrame({TOPIC.labels[k]: values[:, k] for k in order})
    if ids is not None:
        frame.insert(0, "example_id", ids)
    if path.suffix == ".csv":
        frame.to_csv(path, index=False)
    else:
        frame.to_parquet(path)


def write_lists(path, values, kind=None):
    lists = [None if np.isnan(row).all() else row.tolist() for row in values]
    pq.write_table(pa.table({"logits": pa.array(lists, kind or pa.list_(pa.float64()))}), path)


def write_ids(path, values):
    """Write the scored rows alone, in another order."""
    write_table(path, values[[2, 0, 1]], ids=["c", "a", "b"])


def write_scores(path, values):
    """Write a table as the run directory has it."""
    kind = pa.list_(pa.float32(), 3)
    lists = pa.array(values[:3].astype(np.float32).tolist(), kind)
    pq.write_table(pa.table({"example_id": ["a", "b", "c"], "logits": lists, "shadow": [False, True, False]}), path)


KINDS = {
    "x.npy": write_npy,
    "x.npz": write_npz,
    "columns.parquet": write_table,
    "lists.parquet": write_lists,
    "large.parquet": lambda path, values: write_lists(path, values, pa.large_list(pa.float32())),
    "fixed.parquet": lambda path, values: write_lists(path, values, pa.list_(pa.float64(), 3)),
    "ids.parquet": write_ids,
    "scores.parquet": write_scores,
    "columns.csv": write_table,
    "ids.csv": write_ids,
}


@pytest.mark.parametrize("name", KINDS)
def test_every_kind_of_file_gives_the_same_logits(tmp_path, name):
    KINDS[name](tmp_path / name, LOGITS)
    np.testing.assert_array_equal(read_logits(tmp_path / name, TOPIC, IDS), LOGITS)


@pytest.mark.parametrize("dtype", ["float16", "float32", "int64"])
def test_any_type_of_number_is_taken(tmp_path, dtype):
    values = np.array([[1, 2, 3], [4, 5, 6]], dtype=dtype)
    np.save(tmp_path / "x.npy", values)
    logits = read_logits(tmp_path / "x.npy", TOPIC, ["a", "b"])
    assert logits.dtype.kind == "f"
    np.testing.assert_array_equal(logits, values)


@pytest.mark.parametrize(
    "content",
    [
        "\ufeffpay;play;sing\r\n2;-1;0.5\r\n;;\r\n",
        "pay\tplay\tsing\n2.0\t-1e0\t5e-1\nnan\tNaN\t\n",
        '"sing","pay","play"\n"0.5"," 2","-1"\n,,\n\n',
    ],
)
def test_csv_as_spreadsheets_write_it(tmp_path, content):
    (tmp_path / "x.csv").write_bytes(content.encode())
    expected = [[2.0, -1.0, 0.5], [np.nan] * 3]
    np.testing.assert_array_equal(read_logits(tmp_path / "x.csv", TOPIC, ["a", "b"]), expected)


def test_ids_stay_as_they_are_and_labels_may_be_named_like_the_columns(tmp_path):
    (tmp_path / "x.csv").write_text("example_id,pay,play,sing\nNA,1,2,3\n007,4,5,6\n")
    np.testing.assert_array_equal(read_logits(tmp_path / "x.csv", TOPIC, ["007", "NA"]), [[4, 5, 6], [1, 2, 3]])
    odd = StageSpec("odd", ("logits", "example_id"))
    (tmp_path / "odd.csv").write_text("example_id,logits\n1,2\n3,4\n")
    np.testing.assert_array_equal(read_logits(tmp_path / "odd.csv", odd, ["a", "b"]), [[2, 1], [4, 3]])


def refuse(path, message, stage=TOPIC, ids=IDS):
    with pytest.raises(RunError, match=message) as refused:
        read_logits(path, stage, ids)
    assert str(refused.value).startswith(str(path))
    assert "\n" not in str(refused.value)


def test_an_array_of_another_shape_or_kind_is_refused(tmp_path):
    def refuse_array(values, message):
        np.save(tmp_path / "x.npy", values)
        refuse(tmp_path / "x.npy", message)

    refuse_array(LOGITS[:3], "has 3 rows, but there are 4 examples; give one row per example")
    refuse_array(LOGITS[:, :2], "the array is 4 × 2, but stage 'topic' has 3 labels")
    refuse_array(LOGITS[:, 0], "the array is 4, but stage 'topic' has 3 labels")
    refuse_array(np.array(1.0), "the array is a single number")
    refuse_array(LOGITS.astype(str), "has values of type <U")
    refuse_array(LOGITS > 0, "has values of type bool")
    refuse_array(LOGITS.astype(complex), "has values of type complex128")
    refuse_array(LOGITS.astype(object), "pickled objects are not read")
    (tmp_path / "x.npy").write_bytes(pickle.dumps(LOGITS))
    refuse(tmp_path / "x.npy", "pickled objects are not read")
    np.savez(tmp_path / "x.npz", gate=LOGITS, topics=LOGITS)
    refuse(tmp_path / "x.npz", "has no array named 'topic'; did you mean 'topics'")
    np.savez(tmp_path / "x.npz", topic=LOGITS.astype(object))
    refuse(tmp_path / "x.npz", "pickled objects are not read")
    np.savez(tmp_path / "x.npz", whatever=LOGITS)
    np.testing.assert_array_equal(read_logits(tmp_path / "x.npz", TOPIC, IDS), LOGITS)


def test_a_table_with_other_columns_is_refused(tmp_path):
    def refuse_csv(content, message):
        (tmp_path / "x.csv").write_text(content)
        refuse(tmp_path / "x.csv", message)

    refuse_csv("pay,plya,sing\n1,2,3\n", "no column is named by label 'play' of stage 'topic'; did you mean 'plya'")
    refuse_csv("pay,play\n1,2\n", "no column is named by label 'sing' of stage 'topic'$")
    refuse_csv("pay,play,sing,pays\n1,2,3,4\n", "column 'pays' is not a label .*did you mean 'pay'.*drop the column")
    refuse_csv("pay,play,sing,pay\n1,2,3,4\n", "two columns are named 'pay'; rename one")
    refuse_csv("pay,play,sing\n1,2,3\n1,much,3\n", "is not a csv file of numbers .*much")
    refuse_csv("pay,play,sing\n1,2,3,4\n", "is not a csv file of numbers .*Expected 3 columns, got 4")
    refuse_csv("pay,play,sing\n1,2,3\n", "has 1 rows, but there are 4 examples")
    refuse_csv("example_id,pay,play,sing\na,1,2,3\na,1,2,3\n", "example_id 'a' occurs twice")
    refuse_csv("example_id,pay,play,sing\na,1,2,3\ne,1,2,3\n", "example_id 'e' is not in the eval set")
    refuse_csv("", "is not a csv file of numbers")
    write_lists(tmp_path / "x.parquet", LOGITS[:, :2])
    refuse(tmp_path / "x.parquet", "row 1: has 2 logits, but stage 'topic' has 3 labels")
    pq.write_table(pa.table({"logits": ["a", "b"]}), tmp_path / "x.parquet")
    refuse(tmp_path / "x.parquet", "column 'logits' is string, not a list of numbers")
    pq.write_table(pa.table({"logits": [["a", "b", "c"]]}), tmp_path / "x.parquet")
    refuse(tmp_path / "x.parquet", "column 'logits' is string, not a number")
    pq.write_table(pa.table({"pay": ["1"], "play": [1], "sing": [1]}), tmp_path / "x.parquet")
    refuse(tmp_path / "x.parquet", "column 'pay' is string, not a number")
    pq.write_table(pa.table({"example_id": ["a", None], "logits": [[1.0, 2, 3]] * 2}), tmp_path / "x.parquet")
    refuse(tmp_path / "x.parquet", "row 2: has no example_id")


@pytest.mark.parametrize("suffix", [".npy", ".npz", ".parquet", ".csv"])
@pytest.mark.parametrize(
    "content", [b"", b"\x00\xff" * 40, b"PK\x03\x04" + b"\x00" * 40, b"PAR1" * 4, b"\x93NUMPY\x01"]
)
def test_a_broken_file_is_one_line(tmp_path, suffix, content):
    (tmp_path / f"x{suffix}").write_bytes(content)
    refuse(tmp_path / f"x{suffix}", "; |no column is named")


def test_a_file_that_cannot_be_read_is_one_line(tmp_path):
    for name in ("no.npy", "no.npz", "no.parquet", "no.csv"):
        refuse(tmp_path / name, "cannot be read")
    (tmp_path / "folder.npy").mkdir()
    refuse(tmp_path / "folder.npy", "cannot be read")
    refuse(tmp_path / "x.txt", "unknown kind of logits file; give a file that ends in .npy, .npz, .parquet, .csv")


@pytest.fixture
def elsewhere(tmp_path):
    """A cascade without checkpoints, four texts of which one has no label, and their logits as two files."""
    (tmp_path / "cascade.toml").write_text(SPEC)
    (tmp_path / "texts.tsv").write_text(
        "example_id\ttext\tlabel\na\tpay me\tpay\nb\tplay it\tpay\nc\tsing [b]x[/b]\t\nd\tgo away\toos\n"
    )
    np.save(tmp_path / "gate.npy", np.array([[0.0, 2.0], [1.0, 3.0], [0.0, 1.0], [4.0, 0.0]]))
    write_ids(tmp_path / "topic.csv", LOGITS)
    return tmp_path


def import_logits(folder, *more, gate="gate.npy", topic="topic.csv", output="run"):
    arguments = ["import-logits", folder / "cascade.toml", folder / "texts.tsv", "--logits", f"gate={folder / gate}"]
    arguments += ["--logits", f"topic={folder / topic}", "--output", folder / output, *more]
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def test_the_command_writes_the_run_that_from_logits_makes(elsewhere):
    result = import_logits(elsewhere)
    assert result.exit_code == 0, result.output
    run = Run.read(elsewhere / "run")
    expected = Run.from_logits(
        CascadeSpec.read(elsewhere / "cascade.toml"),
        EvalSet.read(elsewhere / "texts.tsv", unlabelled=True),
        {"gate": np.load(elsewhere / "gate.npy"), "topic": LOGITS},
    )
    pd.testing.assert_frame_equal(run.predictions, expected.predictions)
    assert run.predictions["predicted"].tolist() == ["pay", "play", "sing", "oos"]
    assert run.manifest["source"] == "logits"
    assert {path.rpartition("/")[2] for path in run.manifest["inputs"]} == {"gate.npy", "topic.csv"}
    assert run.metrics["end_to_end"]["accuracy"] == pytest.approx(2 / 3)
    assert "0.6667" in result.stdout
    assert "metrics: on the 3 of 4 texts that have a label" in result.stdout
    assert "topic: scored 3 of 4 texts" in result.stdout
    assert "ms/text" not in result.stdout, "nothing was timed"
    assert f"run: {elsewhere / 'run'}" in result.stdout
    assert max(len(row) for row in result.stdout.splitlines() if str(elsewhere) not in row) <= 80


def test_texts_without_any_label_are_imported(elsewhere):
    (elsewhere / "texts.tsv").write_text("example_id\ttext\na\tpay me\nb\tplay it\nc\tsing\nd\tgo away\n")
    result = import_logits(elsewhere)
    assert result.exit_code == 0, result.output
    assert "metrics: on the 0 of 4 texts that have a label" in result.stdout
    assert Run.read(elsewhere / "run").predictions["predicted"].tolist() == ["pay", "play", "sing", "oos"]


def test_probabilities_must_be_declared_and_give_the_same_answers(elsewhere):
    for name, n_labels in (("gate", 2), ("topic", 3)):
        p = np.random.default_rng(0).dirichlet(np.ones(n_labels), 4)
        np.save(elsewhere / f"{name}-p.npy", p)
    files = {"gate": "gate-p.npy", "topic": "topic-p.npy"}
    refused = import_logits(elsewhere, **files)
    assert refused.exit_code == 2
    assert "--probabilities" in refused.stderr
    result = import_logits(elsewhere, "--probabilities", **files)
    assert result.exit_code == 0, result.output
    run = Run.read(elsewhere / "run")
    np.testing.assert_allclose(run.decision("gate").confidence, np.load(elsewhere / "gate-p.npy")[:, 1], rtol=1e-6)
    refused = import_logits(elsewhere, "--probabilities", output="other")
    assert refused.exit_code == 2
    assert not (elsewhere / "other").exists()


def test_what_cannot_be_imported_is_one_line_and_leaves_nothing(elsewhere):
    def refuse(message, *more, **files):
        result = import_logits(elsewhere, *more, **files)
        assert result.exit_code == 2, result.output
        assert result.stderr.startswith("error: ")
        assert result.stderr.count("\n") == 1
        assert message in result.stderr
        assert not (elsewhere / "run").exists()

    for name, value, message in (("nan", np.nan, "NaN"), ("inf", np.inf, "infinite")):
        gate = np.load(elsewhere / "gate.npy")
        gate[1, 1] = value
        np.save(elsewhere / f"{name}.npy", gate)
        refuse(message, gate=f"{name}.npy")
    np.save(elsewhere / "few.npy", np.zeros((4, 3)))
    refuse("few.npy: the array is 4 × 3, but stage 'gate' has 2 labels", gate="few.npy")
    refuse("stage 'gate' has a file already", "--logits", "gate=x.npy")
    refuse("did you mean 'topic'", "--logits", "topik=x.npy")
    refuse("'gate.npy' is not STAGE=FILE", "--logits", "gate.npy")
    write_table(elsewhere / "never.csv", LOGITS[:1], ids=["a"])
    refuse("never scored", topic="never.csv")
    arguments = [elsewhere / "cascade.toml", elsewhere / "texts.tsv", "--logits", f"gate={elsewhere / 'gate.npy'}"]
    alone = CliRunner().invoke(app, ["import-logits", *map(str, arguments), "--output", str(elsewhere / "run")])
    assert "stage 'topic' has no logits; add --logits topic=FILE" in alone.stderr


def test_an_existing_run_is_replaced_only_if_asked(elsewhere):
    assert import_logits(elsewhere).exit_code == 0
    refused = import_logits(elsewhere)
    assert refused.exit_code == 2
    assert "exists already" in refused.stderr
    assert "--overwrite" in refused.stderr
    assert import_logits(elsewhere, "--overwrite").exit_code == 0


def test_clinc150s_logits_give_the_metrics_of_its_validation_set(clinc150, tmp_path):
    """The checkpoints' logits as an npz, computed elsewhere, beside a cascade that needs no TensorFlow."""
    logits = f"={clinc150 / 'expected_val.npz'}"
    arguments = [clinc150 / "cascade.toml", clinc150 / "data_full.json", "--split", "val", "--output", tmp_path / "run"]
    arguments += ["--logits", f"gate{logits}", "--logits", f"intent{logits}"]
    result = CliRunner().invoke(app, ["import-logits", *map(str, arguments)])
    assert result.exit_code == 0, result.output
    metrics = Run.read(tmp_path / "run").metrics["end_to_end"]
    assert metrics["accuracy"] == pytest.approx(0.9423, abs=5e-5)
    assert metrics["reject_recall"] == 0.54

"""Eval sets: five file formats, unlabelled texts, and every unusable row is refused with its location."""

from __future__ import annotations

import json
from pathlib import Path

import pandas as pd
import pytest

from cascade_lab import EvalSet
from cascade_lab.exceptions import EvalSetError

ROWS = [
    {"example_id": "a", "text": "pay my bill", "text_b": None, "label": "1", "topic": "money"},
    {"example_id": "b", "text": 'say "hi", please', "text_b": "now", "label": "oos", "topic": "talk"},
]


def write(folder, kind):
    path = folder / f"set.{kind}"
    frame = pd.DataFrame(ROWS)
    if kind == "tsv":
        lines = ["\t".join(frame.columns), *("\t".join(row[key] or "" for key in frame.columns) for row in ROWS)]
        path.write_text("\n".join(lines) + "\n")
    elif kind == "csv":
        frame.to_csv(path, index=False)
    elif kind == "jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    else:
        frame.to_parquet(path, index=False)
    return path


@pytest.mark.parametrize("kind", ["tsv", "csv", "jsonl", "parquet"])
def test_every_file_format_gives_the_same_examples(kind, tmp_path):
    evalset = EvalSet.read(write(tmp_path, kind))
    assert evalset.examples.to_dict("records") == ROWS
    assert evalset.locations[1].endswith({"parquet": "row 2", "jsonl": "line 2"}.get(kind, "line 3"))


def test_missing_ids_are_numbered_and_unusual_texts_do_not_change(tmp_path):
    odd = ["", "x" * 100_000, "bell\x07 form\x0cfeed line\u2028sep", "שלום عالم", "🙂🏳️‍🌈", "<b>&amp;"]
    path = tmp_path / "odd.tsv"
    path.write_text("text\tlabel\n" + "".join(f"{text}\t1\n" for text in odd), encoding="utf-8")
    examples = EvalSet.read(path).examples
    assert examples["text"].tolist() == odd
    assert examples["example_id"].tolist() == ["0", "1", "2", "3", "4", "5"]


def test_quoted_csv_fields_may_contain_newlines_and_a_row_has_the_number_of_its_first_line(tmp_path):
    path = tmp_path / "set.csv"
    path.write_text('text,label\n"two\nlines",1\n"a ""quoted"" word",2\nno label,\n')
    with pytest.raises(EvalSetError, match=r"set\.csv line 5: has no label"):
        EvalSet.read(path)
    path.write_text('text,label\n"two\nlines",1\n"a ""quoted"" word",2\n')
    assert EvalSet.read(path).examples["text"].tolist() == ["two\nlines", 'a "quoted" word']


def test_a_split_is_a_column_or_a_part_of_clinc150s_json(tmp_path):
    path = tmp_path / "set.csv"
    path.write_text("text,label,split\na,1,dev\nb,1,test\n")
    assert EvalSet.read(path, split="test").examples["text"].tolist() == ["b"]
    with pytest.raises(EvalSetError, match="no row has split 'tset'; its splits are dev, test"):
        EvalSet.read(path, split="tset")
    path = tmp_path / "set.json"
    path.write_text(json.dumps({"test": [["hi", "greeting"]], "oos_test": [["why", "oos"]], "val": []}))
    examples = EvalSet.read(path, split="test").examples
    assert examples["example_id"].tolist() == ["test-0", "oos_test-0"]
    assert examples["label"].tolist() == ["greeting", "oos"]
    with pytest.raises(EvalSetError, match="contains several splits; choose one with --split: test, val"):
        EvalSet.read(path)
    with pytest.raises(EvalSetError, match="has no split 'train'; choose one with --split: test, val"):
        EvalSet.read(path, split="train")


def test_clinc150s_published_file(clinc150):
    evalset = EvalSet.read(clinc150 / "data_full.json", split="test")
    assert len(evalset) == 5500
    assert (evalset.examples["label"] == "oos").sum() == 1000
    assert evalset.sha256 == "36923c3705a59e08fe9c3883d8bc2dd966ef93e22cb78ac41171782a698d56e0"


def test_a_limit_takes_evenly_spaced_examples():
    evalset = EvalSet.from_frame(pd.DataFrame({"text": list("abcdefghij"), "label": ["1"] * 5 + ["2"] * 5}))
    assert evalset.limit(4).examples["text"].tolist() == ["a", "d", "g", "j"]
    assert len(evalset.limit(99)) == 10


BAD = {
    "unknown kind": ("set.txt", b"text", "unknown format of an eval set"),
    "empty": ("set.jsonl", b"", "contains no example"),
    "header alone": ("set.tsv", b"text\tlabel\n", "contains no example"),
    "no text column": (
        "set.tsv",
        b"txt\tlabel\na\t1\n",
        "line 1: no column 'text'; it has txt, label; did you mean 'txt'\\? Pass --text-column txt",
    ),
    "no label column": (
        "set.csv",
        b"text\na\n",
        "line 1: no column 'label'; .* with unlabelled=True",
    ),
    "row without text": ("set.tsv", b"label\ttext\n1\ta\n1\n", "line 3: has no text"),
    "null text": ("set.jsonl", b'{"text": null, "label": "1"}\n', "line 1: has no text"),
    "text is a number": ("set.jsonl", b'{"text": 5, "label": "1"}\n', "line 1: text is 5; it must be a string"),
    "row without label": ("set.tsv", b"text\tlabel\na\n", "line 2: has no label; fill it in.* with unlabelled=True"),
    "too many fields": ("set.tsv", b"text\tlabel\na\t1\tb\n", "line 2: has 3 fields, but the header has 2"),
    "doubled id": ("set.csv", b"text,label,example_id\na,1,x\nb,1,x\n", "line 3: example_id 'x' is at .* line 2 too"),
    "not UTF-8": ("set.tsv", b"text\tlabel\na\t1\n\xff\t1\n", "line 3: byte 15 is not UTF-8"),
    "not UTF-8 in json": ("set.json", b'{"test": [["\xff", "1"]]}', "line 1: byte 12 is not UTF-8"),
    "not JSON": ("set.jsonl", b'{"text": "a", "label": "1"}\n{"text\n', "line 2: not JSON"),
    "not an object": ("set.jsonl", b"[1]\n", "line 1: not a JSON object"),
    "not CLINC150's json": ("set.json", b'[["text", "a"]]', "not CLINC150's json"),
    "not parquet": ("set.parquet", b"PAR1", "not a readable parquet file"),
    "half a surrogate pair": (
        "set.jsonl",
        b'{"text": "\\ud83d", "label": "1"}\n',
        "half a surrogate pair at character 0",
    ),
    "mixed column": ("set.jsonl", b'{"text":"a","label":"1","n":1}\n{"text":"a","label":"1","n":"x"}\n', "'n' mixes"),
}


@pytest.mark.parametrize("fault", BAD)
def test_a_bad_eval_set_is_refused_with_the_location_of_the_error(fault, tmp_path):
    name, content, message = BAD[fault]
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(EvalSetError, match=message):
        EvalSet.read(path, split="test" if name.endswith(".json") else None)


def test_a_missing_eval_set(tmp_path):
    with pytest.raises(EvalSetError, match=r"none\.tsv: cannot be read \(No such file"):
        EvalSet.read(tmp_path / "none.tsv")


UNLABELLED = {
    "tsv": "text\tlabel\npay my bill\t1\nsing\t\n",
    "csv": "text,label\npay my bill,1\nsing,\n",
    "jsonl": '{"text": "pay my bill", "label": 1}\n{"text": "sing", "label": null}\n',
}


@pytest.mark.parametrize("kind", [*UNLABELLED, "parquet"])
def test_unlabelled_texts_have_the_label_none(kind, tmp_path):
    path = tmp_path / f"set.{kind}"
    if kind == "parquet":
        pd.DataFrame({"text": ["pay my bill", "sing"], "label": ["1", None]}).to_parquet(path)
    else:
        path.write_text(UNLABELLED[kind])
    evalset = EvalSet.read(path, unlabelled=True)
    assert evalset.examples["label"].tolist() == ["1", None]
    assert evalset.origin["n_examples"] == 2
    with pytest.raises(EvalSetError, match=r"has no label; .* drop the row, or read unlabelled texts"):
        EvalSet.read(path)
    with pytest.raises(EvalSetError, match="has no label; fill in the column 'label' or drop the row"):
        evalset.column("label")


@pytest.mark.parametrize("content", ["text\npay\nsing\n", "text\tlabel\npay\t\nsing\t\n"])
def test_a_set_without_any_label_is_read_and_written(content, tmp_path):
    path = tmp_path / "set.tsv"
    path.write_text(content)
    evalset = EvalSet.read(path, unlabelled=True)
    assert evalset.examples["label"].tolist() == [None, None]
    for ending in ("tsv", "jsonl", "parquet"):
        again = EvalSet.read(evalset.write(tmp_path / f"again.{ending}"), unlabelled=True)
        pd.testing.assert_frame_equal(again.examples, evalset.examples)


def test_a_table_with_some_labels_keeps_integers():
    """pandas stores 7 beside a missing value as 7.0; the label is still "7"."""
    frame = pd.DataFrame({"text": ["a", "b", "c"], "label": [7, None, 8]})
    assert EvalSet.from_frame(frame, unlabelled=True).examples["label"].tolist() == ["7", None, "8"]
    assert EvalSet.from_frame(frame[["text"]], unlabelled=True).examples["label"].tolist() == [None] * 3
    with pytest.raises(EvalSetError, match="row 1: has no label"):
        EvalSet.from_frame(frame)
    with pytest.raises(EvalSetError, match="row 0: has no text"):
        EvalSet.from_frame(pd.DataFrame({"text": [None]}), unlabelled=True)


def test_a_set_that_cannot_be_written_leaves_the_old_file(tmp_path, monkeypatch):
    evalset = EvalSet.from_frame(pd.DataFrame({"text": ["a"], "label": ["1"]}))
    path = evalset.write(tmp_path / "new" / "set.tsv")
    before = path.read_bytes()

    def fail(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", fail)
    with pytest.raises(EvalSetError, match=r"set\.tsv: cannot be written \(No space left on device\)"):
        evalset.write(path)
    assert path.read_bytes() == before
    assert [file.name for file in path.parent.iterdir()] == ["set.tsv"]

"""Eval sets in: five kinds of file, and each fault of a row."""

from __future__ import annotations

import json

import pandas as pd
import pytest

from cascade_lab import EvalSet
from cascade_lab.errors import EvalSetError

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
def test_every_kind_of_file_gives_the_same_examples(kind, tmp_path):
    evalset = EvalSet.read(write(tmp_path, kind))
    assert evalset.examples.to_dict("records") == ROWS
    assert evalset.locations[1].endswith({"parquet": "row 2", "jsonl": "line 2"}.get(kind, "line 3"))


def test_ids_are_given_where_there_are_none_and_texts_like_any_other_are_kept(tmp_path):
    odd = ["", "x" * 100_000, "bell\x07 form\x0cfeed line\u2028sep", "שלום عالم", "🙂🏳️‍🌈", "<b>&amp;"]
    path = tmp_path / "odd.tsv"
    path.write_text("text\tlabel\n" + "".join(f"{text}\t1\n" for text in odd), encoding="utf-8")
    examples = EvalSet.read(path).examples
    assert examples["text"].tolist() == odd
    assert examples["example_id"].tolist() == ["0", "1", "2", "3", "4", "5"]


def test_quoted_csv_fields_may_hold_newlines_and_the_line_number_is_the_rows_first(tmp_path):
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
    with pytest.raises(EvalSetError, match="no row of split 'tset'; it has dev, test"):
        EvalSet.read(path, split="tset")
    path = tmp_path / "set.json"
    path.write_text(json.dumps({"test": [["hi", "greeting"]], "oos_test": [["why", "oos"]], "val": []}))
    examples = EvalSet.read(path, split="test").examples
    assert examples["example_id"].tolist() == ["test-0", "oos_test-0"]
    assert examples["label"].tolist() == ["greeting", "oos"]
    with pytest.raises(EvalSetError, match="choose a split with --split: test, val"):
        EvalSet.read(path)
    with pytest.raises(EvalSetError, match="has no split 'train': test, val"):
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
    "unknown kind": ("set.txt", b"text", "unknown kind of eval set"),
    "empty": ("set.jsonl", b"", "holds no example"),
    "header alone": ("set.tsv", b"text\tlabel\n", "holds no example"),
    "no text column": ("set.tsv", b"txt\tlabel\na\t1\n", "line 1: no column 'text'"),
    "no label column": ("set.csv", b"text\na\n", "line 1: no column 'label'"),
    "row without text": ("set.tsv", b"label\ttext\n1\ta\n1\n", "line 3: has no text"),
    "null text": ("set.jsonl", b'{"text": null, "label": "1"}\n', "line 1: has no text"),
    "text is a number": ("set.jsonl", b'{"text": 5, "label": "1"}\n', "line 1: text is 5; it must be a string"),
    "row without label": ("set.tsv", b"text\tlabel\na\n", "line 2: has no label"),
    "too many fields": ("set.tsv", b"text\tlabel\na\t1\tb\n", "line 2: has 3 fields, and the header 2"),
    "doubled id": ("set.csv", b"text,label,example_id\na,1,x\nb,1,x\n", "line 3: example_id 'x' stands at .* line 2"),
    "not UTF-8": ("set.tsv", b"text\tlabel\na\t1\n\xff\t1\n", "line 3: byte 15 is not UTF-8"),
    "not UTF-8 in json": ("set.json", b'{"test": [["\xff", "1"]]}', "line 1: byte 12 is not UTF-8"),
    "not JSON": ("set.jsonl", b'{"text": "a", "label": "1"}\n{"text\n', "line 2: not JSON"),
    "not an object": ("set.jsonl", b"[1]\n", "line 1: not an object"),
    "not CLINC150's json": ("set.json", b'[{"text": "a"}]', "not CLINC150's json"),
    "not parquet": ("set.parquet", b"PAR1", "not a readable parquet file"),
    "half a surrogate pair": (
        "set.jsonl",
        b'{"text": "\\ud83d", "label": "1"}\n',
        "half a surrogate pair at character 0",
    ),
    "mixed column": ("set.jsonl", b'{"text":"a","label":"1","n":1}\n{"text":"a","label":"1","n":"x"}\n', "'n' mixes"),
}


@pytest.mark.parametrize("fault", BAD)
def test_a_bad_eval_set_is_refused_with_the_place_of_the_fault(fault, tmp_path):
    name, content, message = BAD[fault]
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(EvalSetError, match=message):
        EvalSet.read(path, split="test" if name.endswith(".json") else None)


def test_a_missing_eval_set(tmp_path):
    with pytest.raises(EvalSetError, match=r"none\.tsv: cannot be read \(No such file"):
        EvalSet.read(tmp_path / "none.tsv")

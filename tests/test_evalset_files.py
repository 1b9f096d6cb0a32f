"""The file formats of eval sets: what spreadsheets, pandas and Hugging Face write, and what is refused in one line."""

from __future__ import annotations

import csv
import datetime
import json

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from cascade_lab import EvalSet, evalset_parquet
from cascade_lab.exceptions import EvalSetError
from cascade_lab.label_files import read_label_map


def read(folder, name, content, **options):
    path = folder / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return EvalSet.read(path, **options)


def refused(folder, name, content, message, **options):
    with pytest.raises(EvalSetError, match=message) as caught:
        read(folder, name, content, **options)
    assert "\n" not in str(caught.value)
    assert name in str(caught.value)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('text\tlabel\n"two\nlines"\tdoor\nplain\tgarden\n', "line 2: opens a quote that line 3 closes.* file .csv"),
        ('label\ttext\ndoor\t"two\nlines"\ngarden\tplain\n', "line 2: opens a quote that line 3 closes"),
        ('text\tlabel\nsay "hi"\tdoor\n"a\n\nb"\tdoor\n', "line 3: opens a quote that line 5 closes"),
        ('"text"\t"label"\n"open it"\t"door"\n', "line 1: the field \"text\" is in quotes"),
        ('text\tlabel\n"say ""hi"" now"\tdoor\n', "line 2: the field .* is in quotes"),
        ('text\tlabel\nplain\tdoor\n"a\ttab"\tdoor\n', "line 3: the field .* is in quotes"),
        ('text\tlabel\r\n"please, open it"\tdoor\r\nplain\tgarden\r\n', "line 2: the field .* is in quotes"),
    ],
)  # fmt: skip
def test_a_tsv_that_is_quoted_like_a_csv_is_refused_and_read_as_csv(content, message, tmp_path):
    refused(tmp_path, "set.tsv", content, message)
    refused(tmp_path, "set.tsv", content, message, unlabelled=True)
    assert not any(text.startswith('"') for text in read(tmp_path, "set.csv", content).texts)


@pytest.mark.parametrize(
    "texts",
    [
        ['"I like it.', 'It is good"'],
        ['"hello"', "a, b"],
        ['" He said , " it is "', '"'],
        ['say "hi"', '"yes, sir" he said', '""Hello""'],
        ['"', '""', "6 foot 2\""],
    ],
)  # fmt: skip
def test_quote_marks_of_an_ordinary_tsv_are_characters(texts, tmp_path):
    content = "text\tlabel\n" + "".join(f"{text}\t1\n" for text in texts)
    assert read(tmp_path, "set.tsv", content).texts == texts


def test_names_of_columns_lose_their_blanks_and_the_nearest_name_is_shown(tmp_path):
    for name, content in (
        ("set.csv", "text, label\nopen the door, door\n"),
        ("set.tsv", " text \tlabel \nopen the door\tdoor\n"),
        ("set.csv", " text ; label\nopen the door; door\n"),
    ):
        examples = read(tmp_path, name, content).examples
        assert examples[["text", "label"]].to_numpy().tolist() == [["open the door", "door"]]
    for header, message in (
        ("Text,Label", "no column 'text'; it has Text, Label; did you mean 'Text'?"),
        ("text,LABEL", "no column 'label'; it has text, LABEL; did you mean 'LABEL'?"),
        ("label,text_a", "no column 'text'; it has label, text_a; .*did you mean 'text_a'?"),
        ("sentence,label", "no column 'text'; it has sentence, label; .*did you mean 'sentence'?"),
    ):
        refused(tmp_path, "set.csv", f"{header}\na,b\n", message.replace("?", r"\?"))
    pd.DataFrame({"Text": ["a"], "label": ["b"]}).to_parquet(tmp_path / "set.parquet")
    with pytest.raises(EvalSetError, match=r"it has Text, label; did you mean 'Text'\?"):
        EvalSet.read(tmp_path / "set.parquet")
    with pytest.raises(EvalSetError, match=r"the table: no column 'text'; it has Text, label; did you mean 'Text'\?"):
        EvalSet.from_frame(pd.DataFrame({"Text": ["a"], "label": ["b"]}))


@pytest.mark.parametrize("separator", [";", ",", "\t", "|"])
def test_excels_first_line_names_the_separator(separator, tmp_path):
    lines = [f"sep={separator}", f"text{separator}label", f"open the door{separator}door", f"paint{separator}"]
    for mark in ("", "\ufeff"):
        refused(tmp_path, "set.csv", mark + "\r\n".join(lines), "line 4: has no label")
        examples = read(tmp_path, "set.csv", mark + "\r\n".join(lines[:3])).examples
        assert examples[["text", "label"]].to_numpy().tolist() == [["open the door", "door"]]
    refused(tmp_path, "set.tsv", "\n".join(lines), "line 1: 'sep=.' is a line that Excel reads")


def test_a_refused_csv_leaves_pythons_limit_of_a_field_as_it_was(tmp_path):
    before, errors = csv.field_size_limit(), []
    for content in ("sentence,label\na,b\n", "text,label\na,b,c\n", 'text,label\n"a\n'):
        with pytest.raises(EvalSetError) as caught:
            read(tmp_path, "set.csv", content)
        errors.append(caught)
        assert csv.field_size_limit() == before
    assert read(tmp_path, "set.csv", f"text,label\n{'x' * 2 * before},b\n").texts == ["x" * 2 * before]


@pytest.mark.parametrize(("ending", "comma"), [("csv", ","), ("csv", ";"), ("tsv", "\t")])
def test_columns_without_name_and_value_and_rows_of_bare_separators_are_nothing(ending, comma, tmp_path):
    def table(*lines):
        return "\n".join(lines).replace(",", comma) + "\n"

    content = table(",,,", ",text,label,,", ",open,door,,", ",,,,", ",paint,light, ,", ",,", "", ",shut,door,,,,")
    examples = read(tmp_path, f"set.{ending}", content).examples
    assert list(examples.columns) == ["example_id", "text", "text_b", "label"]
    assert examples["text"].tolist() == ["open", "paint", "shut"]
    refused(
        tmp_path, f"set.{ending}", table("text,label,,", "a,b,c,d"), "line 1: columns 3 and 4 have values but no name"
    )
    refused(tmp_path, f"set.{ending}", table("text,label", "a,b,,d"), "line 2: has 4 fields, but the header has 2")
    # pandas writes its row numbers as one column without a name.
    assert read(tmp_path, f"set.{ending}", table(",text,label", "0,a,b")).examples[""].tolist() == ["0"]


def test_json_is_an_array_or_lines_and_a_split_is_a_column(tmp_path):
    rows = [{"text": "open", "label": "door", "split": "test"}, {"text": "paint", "label": 1, "split": "dev"}]
    lines = "".join(json.dumps(row) + "\n" for row in rows)
    for content in (lines, json.dumps(rows), json.dumps(rows, indent=2), "\ufeff" + lines):
        assert read(tmp_path, "set.json", content).examples["label"].tolist() == ["door", "1"]
        assert read(tmp_path, "set.json", content, split="dev").texts == ["paint"]
    assert read(tmp_path, "set.json", json.dumps(rows[0])).texts == ["open"]
    refused(tmp_path, "set.jsonl", json.dumps(rows, indent=2), "is one JSON array.* name it .json")
    refused(tmp_path, "set.jsonl", json.dumps(rows), "is one JSON array.* name it .json")
    refused(tmp_path, "set.json", lines + "{", "line 3: not JSON")
    refused(tmp_path, "set.json", json.dumps({"data": rows}), "not CLINC150's json.* name the file .jsonl")
    refused(tmp_path, "set.json", "", "contains no example")


@pytest.mark.parametrize("name", ["set.json", "set.jsonl"])
def test_json_without_the_column_names_its_keys(name, tmp_path):
    content = '{"id": 0, "utt": "open", "intent": "door"}\n' * 2
    refused(tmp_path, name, content, r"no row has 'text'; its keys are id, utt, intent; .*did you mean 'utt'\?")
    refused(tmp_path, name, '{"text": "a", "intent": "b"}\n', r"no row has 'label'; its keys are text, intent")
    refused(tmp_path, name, '{"text": "a", "label": "b"}\n{"utt": "a", "label": "b"}\n', "line 2: has no text")


DEEP = "[" * 100_000


@pytest.mark.parametrize("name", ["set.json", "set.jsonl"])
@pytest.mark.parametrize("value", [DEEP + "]" * 100_000, '{"a":' * 100_000 + "1" + "}" * 100_000, "1" * 5000])
def test_json_that_is_too_deep_or_a_number_that_is_too_long_is_refused(name, value, tmp_path):
    refused(tmp_path, name, f'{{"text": "a", "label": "b", "c": {value}}}', "not JSON")


def test_integers_beyond_64_bits_are_kept_as_texts(tmp_path):
    for big in (2**64, -(2**63) - 1, 10**300):
        content = f'{{"text": "a", "label": "b", "n": {big}}}\n{{"text": "a", "label": "b", "n": 1}}\n'
        assert read(tmp_path, "set.jsonl", content).examples["n"].tolist() == [str(big), "1"]
        frame = pd.DataFrame({"text": ["a"], "label": ["b"], "n": pd.Series([big], dtype=object)})
        assert EvalSet.from_frame(frame).examples["n"].tolist() == [str(big)]
    row = '{"text": "a", "label": "b", "n": %s}\n'
    with pytest.raises(EvalSetError, match="column 'n' mixes types"):
        read(tmp_path, "set.jsonl", row % 2**64 + row % '"x"')
    assert read(tmp_path, "set.jsonl", json.dumps({"text": "a", "label": 2**64})).examples["label"].tolist() == [
        str(2**64)
    ]


@pytest.mark.parametrize("value", [{}, {"a": {}}, [{}], [1, "x"]])
def test_a_column_that_a_run_cannot_keep_is_refused_on_reading(value, tmp_path):
    with pytest.raises(EvalSetError, match="column 'meta' "):
        read(tmp_path, "set.jsonl", json.dumps({"text": "a", "label": "b", "meta": value}))


@pytest.mark.parametrize("key", ["label", "example_id", "topic", "\ud83d"])
def test_half_a_surrogate_pair_is_refused_in_every_column(key, tmp_path):
    for value in ("\ud83d", 1) if key == "\ud83d" else ("\ud83d",):
        with pytest.raises(EvalSetError, match="has half a surrogate pair"):
            read(tmp_path, "set.jsonl", json.dumps({"text": "a", "label": "b", "topic": "c", key: value}))


def test_rows_with_a_key_each_are_bounded(tmp_path):
    lines = "".join(f'{{"text": "a", "label": "b", "k{i}": 1}}\n' for i in range(6000))
    with pytest.raises(EvalSetError, match="the 6,000 rows have 6,002 different columns"):
        read(tmp_path, "set.jsonl", lines)


@pytest.mark.parametrize("value", [["door", "garden"], {"name": "door"}, []])
def test_a_label_that_is_a_list_or_an_object_is_refused_by_its_row(value, tmp_path):
    row = {"text": "a", "label": "b", "topic": "c"}
    for key, options in (("label", {}), ("label", {"unlabelled": True}), ("example_id", {})):
        content = f"{json.dumps(row)}\n{json.dumps({**row, key: value})}\n"
        refused(tmp_path, "set.jsonl", content, f"line 2: {key} is .*; it must be a string or a number", **options)
    read_set = read(
        tmp_path, "set.jsonl", f"{json.dumps({**row, 'topic': [value]})}\n" if value != {} else json.dumps(row)
    )
    if value != {}:
        try:
            read_set.column("topic")
        except EvalSetError as error:
            assert "line 1: topic is" in str(error)  # noqa: PT017
        else:
            pytest.fail("a list was taken as a label")
    pq.write_table(pa.table({"text": ["a"], "label": [["x", "y"]]}), tmp_path / "set.parquet")
    with pytest.raises(EvalSetError, match=r"row 1: label is \['x', 'y'\]; it must be a string or a number"):
        EvalSet.read(tmp_path / "set.parquet")


def test_other_columns_become_text_and_label(tmp_path):
    content = "sentence,intent,label,id\nopen,door,x,1\npaint,light,y,2\n"
    names = {"text_column": "sentence", "label_column": "intent"}
    evalset = read(tmp_path, "set.csv", content, **names)
    assert list(evalset.examples.columns) == ["example_id", "text", "text_b", "label", "id"]
    assert evalset.examples[["text", "label"]].to_numpy().tolist() == [["open", "door"], ["paint", "light"]]
    assert evalset.origin["read_as"] == names
    rows = [{"sentence": "open", "intent": 1}, {"sentence": "paint", "intent": 2}]
    assert read(tmp_path, "set.jsonl", "\n".join(map(json.dumps, rows)), **names).column("label") == ["1", "2"]
    pd.DataFrame(rows).to_parquet(tmp_path / "set.parquet")
    assert EvalSet.read(tmp_path / "set.parquet", **names).column("label") == ["1", "2"]
    for header, options, message in (
        ("sentence,intent", {}, "it has sentence, intent; did you mean 'sentence'. Pass --text-column sentence"),
        (
            "text,the intent",
            {"label_column": "the intnt"},
            "Pass --label-column 'the intent' .label_column='the intent'",
        ),
        ("open the door,door", {}, "it has open the door, door; name .* with --text-column .* with --columns"),
        ("text,label", {"text_column": "label"}, "the texts and the labels are both column 'label'"),
        ("text,intent", {"label_column": "intnt", "unlabelled": True}, "no column 'intnt'; .*did you mean 'intent'"),
    ):
        refused(tmp_path, "set.csv", f"{header}\na,b\n", message, **options)


def test_a_file_without_a_header_is_read_with_the_names_of_its_columns(tmp_path):
    for name, content in (
        ("set.csv", "open; the door,door\npaint,light\n"),
        ("set.csv", '"open; the door",door\n\npaint,light\n'),
        ("set.tsv", "open; the door\tdoor\npaint\tlight\n"),
    ):
        examples = read(tmp_path, name, content, columns=["text", "label"]).examples
        assert examples[["text", "label"]].to_numpy().tolist() == [["open; the door", "door"], ["paint", "light"]]
    columns = {"columns": ["label", "sentence"], "text_column": "sentence"}
    assert read(tmp_path, "set.tsv", "door\topen\n", **columns).texts == ["open"]
    refused(
        tmp_path,
        "set.csv",
        "open,door,x\n",
        "line 1: has 3 fields, but --columns .columns=. names 2",
        columns=["text", "label"],
    )
    refused(tmp_path, "set.csv", "open\n", "line 1: has no label", columns=["text", "label"])
    refused(tmp_path, "set.csv", "open,door\n", "no column 'text'; it has txt, label", columns=["txt", "label"])
    refused(tmp_path, "set.csv", "open,door\n", "two columns have the same name", columns=["text", "text", "label"])
    refused(tmp_path, "set.jsonl", '{"text": "a"}', "this format has names already", columns=["text", "label"])


def test_labels_are_mapped_to_those_of_the_cascade(tmp_path):
    (tmp_path / "map.csv").write_text("from,to\nTür,door\nLicht,light\n", encoding="utf-8")
    label_map = read_label_map(tmp_path / "map.csv")
    evalset = read(tmp_path, "set.csv", "text,label\na,Tür\nb,other\n", label_map=label_map)
    assert evalset.column("label") == ["door", "other"]
    assert set(evalset.origin["read_as"]) == {"label_map_sha256"}
    refused(
        tmp_path, "set.csv", "text,label\na,x\n", "the map of labels has none of its labels .x.", label_map=label_map
    )
    for name, content, message in (
        ("map.csv", "a,b\n", "no column 'from'; it has a, b"),
        ("map.csv", "from,to\nx,y\nx,z\n", "line 3: 'x' becomes 'y' above"),
        ("map.csv", "from,to\nx,\n", "line 2: has no to"),
        ("map.txt", "", "unknown format of a map of labels"),
    ):
        (tmp_path / name).write_text(content)
        with pytest.raises(EvalSetError, match=message):
            read_label_map(tmp_path / name)


def test_encodings_are_read_by_their_marks_or_named(tmp_path):
    content = "text\tlabel\nöffne 开灯\tdoor\n"
    for encoding in ("utf-8-sig", "utf-16", "utf-32", "utf-16-le", "utf-16-be"):
        assert read(tmp_path, "set.tsv", content.encode(encoding)).texts == ["öffne 开灯"]
    assert read(tmp_path, "set.tsv", content.encode("gb18030"), encoding="gb18030").texts == ["öffne 开灯"]
    refused(tmp_path, "set.tsv", "text\tlabel\nöl\t1\n".encode("cp1252"), "line 2: byte 11 is not UTF-8; .*encoding=")
    refused(tmp_path, "set.tsv", content, "no encoding is named 'utf-9'", encoding="utf-9")


def write_parquet(folder, table):
    pq.write_table(table, folder / "set.parquet")
    return folder / "set.parquet"


def test_parquet_with_two_columns_of_one_name_is_refused_by_that_name(tmp_path):
    table = pa.Table.from_arrays([pa.array(["a"])] * 4, names=["text", "label", "x", "x"])
    with pytest.raises(EvalSetError, match=r"two columns have the same name \('x'\)"):
        EvalSet.read(write_parquet(tmp_path, table))
    frame = pd.DataFrame([["a", "b", 1, 2]], columns=["text", "label", "x", "x"])
    with pytest.raises(EvalSetError, match=r"the table: two columns have the same name \('x'\)"):
        EvalSet.from_frame(frame)


def test_the_numbers_of_a_classlabel_become_names(tmp_path):
    features = {"label": {"names": ["light", "garden", "door"], "_type": "ClassLabel"}, "text": {"_type": "Value"}}
    metadata = {b"huggingface": json.dumps({"info": {"features": features}}).encode()}
    table = pa.table({"text": ["a", "b", "c"], "label": [2, 0, 1]})
    path = write_parquet(tmp_path, table.replace_schema_metadata(metadata))
    assert EvalSet.read(path).examples["label"].tolist() == ["door", "light", "garden"]
    table = pa.table({"text": ["a", "b"], "label": [-1, None]}).replace_schema_metadata(metadata)
    assert EvalSet.read(write_parquet(tmp_path, table), unlabelled=True).examples["label"].tolist() == [None, None]
    table = pa.table({"text": ["a", "b"], "label": [0, 3]}).replace_schema_metadata(metadata)
    with pytest.raises(EvalSetError, match="row 2: label is 3, but the file names the classes 0 to 2"):
        EvalSet.read(write_parquet(tmp_path, table))
    for broken in (b"\xff", b"[]", b"null", b'{"info": 1}', b'{"info": {"features": {"label": 3}}}', b"[" * 100_000):
        table = pa.table({"text": ["a"], "label": [1]}).replace_schema_metadata({b"huggingface": broken})
        assert EvalSet.read(write_parquet(tmp_path, table)).examples["label"].tolist() == ["1"]


@pytest.mark.parametrize(
    "values",
    [
        pa.array([2**62], pa.timestamp("ms")),
        pa.array([-(2**62)], pa.timestamp("us")),
        pa.array([2**30], pa.date32()),
        pa.array([0], pa.timestamp("s", tz="Nowhere/Atlantis")),
        pa.Array.from_buffers(pa.string(), 1, [None, pa.py_buffer(b"\0\0\0\0\1\0\0\0"), pa.py_buffer(b"\xff")]),
    ],
)
def test_parquet_values_that_cannot_be_read_are_refused_by_their_column(values, tmp_path):
    path = write_parquet(tmp_path, pa.table({"text": ["a"], "label": ["b"], "when": values}))
    with pytest.raises(EvalSetError, match="'when'"):
        EvalSet.read(path)


def test_dates_are_kept(tmp_path):
    day = datetime.date(2026, 11, 26)
    path = write_parquet(tmp_path, pa.table({"text": ["a"], "label": ["b"], "day": [day]}))
    assert EvalSet.read(path).examples["day"].tolist() == [day]


def test_a_small_parquet_of_many_long_texts_is_bounded(tmp_path, monkeypatch):
    text = pa.array(["pay my bill " * 100] * 3000)
    path = write_parquet(
        tmp_path, pa.table({"text": text.dictionary_encode().cast(pa.string()), "label": ["1"] * 3000})
    )
    assert path.stat().st_size < 35_000
    assert len(EvalSet.read(path)) == 3000
    monkeypatch.setattr(evalset_parquet, "MAX_BYTES", 2**20)
    with pytest.raises(EvalSetError, match=r"set\.parquet: its values take more than .* GiB of memory; split the file"):
        EvalSet.read(path)

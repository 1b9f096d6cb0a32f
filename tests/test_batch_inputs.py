"""The input of a scoring job: finding files, reading any rows of them, ids that occur twice, and the plan's shards."""

from __future__ import annotations

import gzip
import json

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cascade_lab.batch.inputs import find_files
from cascade_lab.batch.plan import MARK_ROWS, divide, make_plan
from cascade_lab.batch.reading import Columns, Piece, read_rows
from cascade_lab.exceptions import EvalSetError

TEXTS = ["pay", 'a "quoted", text', "two\nlines", "tab\tinside", "ünïcode 付款", "", "x" * 500]


def write_csv(path, rows):
    pd.DataFrame(rows).to_csv(path, index=False)


def rows_of(file, piece=None):
    return [text for rows in read_rows(file, piece, Columns("text", None)) for text in rows.texts]


def plan_of(folder, tmp_path, **options):
    hashes = tmp_path / "hashes"
    hashes.mkdir(exist_ok=True)
    return make_plan(find_files([folder]), hashes, **options)


@pytest.mark.parametrize("ending", [".csv", ".csv.gz", ".jsonl", ".jsonl.gz", ".parquet", ".tsv", ".tsv.gz"])
def test_any_rows_of_a_file_are_read_as_in_a_whole_reading(tmp_path, ending):
    """From the offsets of a plan, in rows whose number is no multiple of anything, texts with quotes and line ends."""
    rng = np.random.default_rng(0)
    texts = [f"{i} {TEXTS[k]}" for i, k in enumerate(rng.integers(0, len(TEXTS), 12_500))]
    if ".tsv" in ending:
        texts = [" ".join(text.split()) for text in texts]
    frame = pd.DataFrame({"other": range(len(texts)), "text": texts})
    path = tmp_path / f"texts{ending}"
    if ending == ".parquet":
        pq.write_table(pa.table({"other": frame["other"], "text": texts}), path, row_group_size=3000)
    else:
        plain = {
            ".csv": lambda: frame.to_csv(index=False),
            ".tsv": lambda: "other\ttext\n" + "".join(f"{i}\t{text}\n" for i, text in enumerate(texts)),
            ".jsonl": lambda: "".join(json.dumps(row) + "\n" for row in frame.to_dict("records")),
        }[ending.removesuffix(".gz")]().encode()
        path.write_bytes(gzip.compress(plain) if ending.endswith(".gz") else plain)
    [file] = find_files([path])
    assert rows_of(file) == texts
    plan = plan_of(path, tmp_path, shard_rows=4500)
    assert len(plan.shards) > 1
    assert [text for shard in plan.shards for piece in shard for text in rows_of(file, piece)] == texts
    assert rows_of(file, Piece(0, 8191, 9_000, 0)) == texts[8191:9_000]


def test_folders_are_searched_for_known_formats_in_a_fixed_order(tmp_path):
    for name in ("b/2.csv", "a.parquet", "b/1.jsonl.gz", "_SUCCESS.csv", ".hidden/x.csv", "notes.txt", "c.parquet.gz"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(b"")
    names = [file.name.removeprefix(f"{tmp_path}/") for file in find_files([tmp_path, tmp_path / "a.parquet"])]
    assert names == ["a.parquet", "b/1.jsonl.gz", "b/2.csv"]
    uri = find_files([f"file://{tmp_path}/b"])
    assert [file.path for file in uri] == [f"file://{tmp_path}/b/{name}" for name in ("1.jsonl.gz", "2.csv")]
    with pytest.raises(EvalSetError, match="no such file or folder"):
        find_files([tmp_path / "missing"])
    with pytest.raises(EvalSetError, match="unknown format"):
        find_files([tmp_path / "notes.txt"])


@settings(max_examples=100, deadline=None)
@given(
    st.lists(st.lists(st.integers(1, 40), max_size=6), min_size=1, max_size=6).filter(lambda files: any(files)),
    st.integers(1, 30),
)
def test_shards_have_each_row_once_in_order_and_about_the_wanted_size(sizes, size):
    units = []
    for of_file in sizes:
        ends = np.cumsum(of_file).tolist()
        units.append([(end - n, end, 7 * (end - n)) for n, end in zip(of_file, ends, strict=True)])
    shards = list(divide(units, size))
    rows = [(piece.file, row) for shard in shards for piece in shard for row in range(piece.start, piece.stop)]
    assert rows == [(i, row) for i, of_file in enumerate(sizes) for row in range(sum(of_file))]
    starts = {(i, start): offset for i, of_file in enumerate(units) for start, _, offset in of_file}
    for shard in shards:
        assert sum(piece.stop - piece.start for piece in shard) <= 2 * size
        assert all(piece.offset in (0, starts.get((piece.file, piece.start))) for piece in shard)


def test_the_default_plan_has_64_shards_and_none_smaller_than_a_mark(tmp_path):
    write_csv(tmp_path / "a.csv", {"text": ["x"] * 30_000})
    plan = plan_of(tmp_path / "a.csv", tmp_path)
    assert [sum(piece.stop - piece.start for piece in shard) for shard in plan.shards] == [8192, 8192, 8192, 5424]
    assert MARK_ROWS == 8192


@pytest.mark.parametrize("kind", ["int64", "string"])
def test_an_id_that_occurs_twice_is_refused_with_its_two_places(tmp_path, kind):
    ids = list(range(3000)) if kind == "int64" else [f"id-{i}" for i in range(3000)]
    folder = tmp_path / "in"
    folder.mkdir()
    pq.write_table(pa.table({"example_id": ids[:2000], "text": ["x"] * 2000}), folder / "a.parquet")
    last = [*ids[2000:], ids[17]]
    pq.write_table(pa.table({"example_id": last[:-1], "text": ["x"] * 1000}), folder / "b.parquet")
    assert plan_of(folder, tmp_path).id_type == kind
    pq.write_table(pa.table({"example_id": last, "text": ["x"] * 1001}), folder / "b.parquet")
    with pytest.raises(EvalSetError, match=rf"b.parquet row 1001: id '{ids[17]}' is at .*a.parquet row 18 too"):
        plan_of(folder, tmp_path)
    made = plan_of(folder, tmp_path, make_ids=True)
    assert (made.columns.ids, made.id_type, made.n_rows) == (None, "string", 3001)


def test_a_number_and_its_digits_are_the_same_id(tmp_path):
    folder = tmp_path / "in"
    folder.mkdir()
    pq.write_table(pa.table({"id": [1, 2], "text": ["x", "y"]}), folder / "a.parquet")
    write_csv(folder / "b.csv", {"id": ["3", "x"], "text": ["x", "y"]})
    assert plan_of(folder, tmp_path).id_type == "string"
    write_csv(folder / "b.csv", {"id": ["2"], "text": ["x"]})
    with pytest.raises(EvalSetError, match=r"id '2' is at .*a.parquet row 2 too"):
        plan_of(folder, tmp_path)


def test_equal_hashes_of_different_ids_are_no_fault(tmp_path, monkeypatch):
    """With hashes of four values nearly all ids have the same hash as another one."""
    from cascade_lab.batch import duplicate_ids

    write_csv(tmp_path / "a.csv", {"id": range(100), "text": ["x"] * 100})
    hashes = duplicate_ids.id_hashes
    monkeypatch.setattr(duplicate_ids, "id_hashes", lambda ids: hashes(ids) % np.uint64(4))
    assert plan_of(tmp_path / "a.csv", tmp_path).n_rows == 100


def faulty_files(folder):
    """Write files that cannot be read, and return what is said about each."""
    folder.mkdir()
    table = pa.table({"id": range(3000), "text": ["x" * 50] * 3000})
    pq.write_table(table, folder / "cut.parquet")
    whole = (folder / "cut.parquet").read_bytes()
    (folder / "cut.parquet").write_bytes(whole[: len(whole) // 2])
    pq.write_table(table, folder / "page.parquet", compression="none", use_dictionary=False)
    page = bytearray((folder / "page.parquet").read_bytes())
    page[60_000:60_400] = b"\xff" * 400
    (folder / "page.parquet").write_bytes(page)
    pq.write_table(table.rename_columns(["id", "body"]), folder / "columns.parquet")
    pq.write_table(table.set_column(1, "text", [range(3000)]), folder / "numbers.parquet")
    (folder / "cut.csv.gz").write_bytes(gzip.compress(b"id,text\n" + b"1,abc\n" * 9000)[:60])
    (folder / "empty.csv").write_bytes(b"")
    (folder / "open.csv").write_bytes(b'id,text\n9001,"never closed\n' + b"9002,x\n" * 10)
    (folder / "none.jsonl").write_bytes(b'{"id": 9100, "body": "x"}\n')
    return {
        "cut.parquet": "cannot be read",
        "page.parquet": "cannot be read",
        "columns.parquet": "no column 'text'",
        "numbers.parquet": "must hold strings, not int64",
        "cut.csv.gz": "cannot be read",
        "empty.csv": "no column 'text'",
        "open.csv": "cannot be read (unexpected end of data)",
        "none.jsonl": "no row has a text",
    }


def test_files_that_cannot_be_read_are_named_with_a_reason_and_the_rest_is_planned(tmp_path):
    expected = faulty_files(tmp_path / "in")
    pq.write_table(pa.table({"id": [5000], "text": ["good"]}), tmp_path / "in" / "a.parquet")
    plan = plan_of(tmp_path / "in", tmp_path)
    assert [file.file.name for file in plan.files] == [f"{tmp_path}/in/a.parquet"]
    found = {file.name.rpartition("/")[2]: file.reason for file in plan.unreadable}
    assert found.keys() == expected.keys()
    for name, reason in expected.items():
        assert reason in found[name], name
        assert found[name].startswith(f"{tmp_path}/in/{name}"), name
        assert "\n" not in found[name], name


@pytest.mark.parametrize("n", [500, pytest.param(10_000, marks=pytest.mark.slow)])
def test_many_small_files_are_planned_into_few_shards(tmp_path, n):
    folder = tmp_path / "in"
    folder.mkdir()
    for i in range(n):
        (folder / f"{i:05}.csv").write_bytes(f"id,text\n{2 * i},a\n{2 * i + 1},b\n".encode())
    plan = plan_of(folder, tmp_path)
    assert (plan.n_rows, len(plan.files), len(plan.shards), plan.id_type) == (2 * n, n, -(-2 * n // 8192), "string")

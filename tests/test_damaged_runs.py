"""Tests that no damaged run directory makes a command fail with a traceback: each is refused in one line, or works.

A damaged run is a good one with one change: of the manifest, of a table, or of the files. Every command that reads runs
is called on each, in this process.
"""

from __future__ import annotations

import itertools
import json
import os
import re
import shutil
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from helpers import random_run, rewrite_table
from typer.testing import CliRunner

from cascade_lab import Run
from cascade_lab.cli import app
from cascade_lab.exceptions import CascadeLabError, RunError

Damage = Callable[[Path], None]
TABLES = ("examples.parquet", "predictions.parquet", "timings.parquet", "scores/gate0.parquet", "scores/last.parquet")
VALUES = (None, True, 0, -1, 2**70, 1.5, "", "x" * 5000, "\x1b[31m", "\ud800", [], [[]], {}, {"a": {}}, [None])
KEYS = (
    ("schema_version",),
    ("run_id",),
    ("source",),
    ("evalset",),
    ("evalset", "source"),
    ("evalset", "split"),
    ("evalset", "n_examples"),
    ("inputs",),
    ("inputs", "x"),
    ("contents",),
    ("contents", "examples.parquet"),
    ("stages",),
    ("packages",),
    ("batch_size",),
    ("started",),
    ("processor",),
    ("thresholds",),
    ("tuned_on",),
    ("cascade",),
    ("cascade", "name"),
    ("cascade", "tuned_on"),
    ("cascade", "calibrated_on"),
    ("cascade", "stage"),
    ("cascade", "stage", 0),
    ("cascade", "stage", 0, "name"),
    ("cascade", "stage", 0, "labels"),
    ("cascade", "stage", 0, "labels", 0),
    ("cascade", "stage", 0, "pass_label"),
    ("cascade", "stage", 0, "threshold"),
    ("cascade", "stage", 1, "labels"),
    ("cascade", "stage", 1, "reject_label"),
    ("cascade", "stage", 1, "temperature"),
    ("cascade", "stage", 1, "min_probability"),
    ("cascade", "stage", 1, "min_probabilities"),
)


def whole_manifests() -> Iterator[tuple[str, bytes]]:
    for text in ("", "[]", "null", "3", '"x"', "{}", "{", "nul", "NaN", '{"schema_version": 2}', "[" * 99_999):
        yield f"manifest {text[:30]}", text.encode()
    yield "manifest deep object", b'{"schema_version":' * 99_999
    yield "manifest of bytes", bytes(range(256))
    yield "manifest in UTF-16", json.dumps({"schema_version": 2}).encode("utf-16")
    yield "manifest of a number", b"1" * 9999


def changed_manifests() -> Iterator[tuple[str, Damage]]:
    """Each key of the manifest without its value, and with each value of another kind."""
    for key, value in itertools.product(KEYS, ("missing", *VALUES)):
        yield f"{'.'.join(map(str, key))} = {str(value)[:20]!a}", lambda run, key=key, value=value: put(run, key, value)
    deep: Any = 0
    for _ in range(300):
        deep = {"a": deep}
    for key in (("evalset",), ("tuned_on",), ("cascade", "tuned_on"), ("stages",), ("extra",)):
        yield f"{'.'.join(key)} deep", lambda run, key=key: put(run, key, deep)
    for name in ("../x", "/dev/zero", "a\0b", ".", "x" * 999, "scores"):
        yield f"contents names {name[:9]!a}", lambda run, name=name: put(run, ("contents", name), "0" * 64)
    fewer = ["label0", "label1"]
    yield "fewer labels than logits", lambda run: put(run, ("cascade", "stage", 1, "labels"), fewer)
    yield "labels of a file", lambda run: put(run, ("cascade", "stage", 1, "labels"), "/etc/passwd")
    yield "another stage", lambda run: put(run, ("cascade", "stage", 0, "name"), "other")
    yield "one stage", lambda run: put(run, ("cascade", "stage"), [{"name": "last", "labels": ["a", "b"]}])


def put(run: Path, key: tuple[Any, ...], value: Any) -> None:
    path = run / "manifest.json"
    manifest = part = json.loads(path.read_text(encoding="utf-8"))
    for name in key[:-1]:
        part = part[name]
    if value == "missing":
        part.pop(key[-1], None)
    else:
        part[key[-1]] = value
    path.write_text(json.dumps(manifest), encoding="utf-8", errors="surrogatepass")


def damaged_files() -> Iterator[tuple[str, Damage]]:
    for name in TABLES:
        yield f"{name} missing", lambda run, name=name: (run / name).unlink()
        yield f"{name} a folder", lambda run, name=name: ((run / name).unlink(), (run / name).mkdir())
        yield f"{name} a pipe", lambda run, name=name: ((run / name).unlink(), os.mkfifo(run / name))
        yield f"{name} a device", lambda run, name=name: link(run / name, Path("/dev/zero"))
        yield f"{name} a link out", lambda run, name=name: link_copy(run / name)
        yield f"{name} a broken link", lambda run, name=name: link(run / name, run / "none")
        for other in TABLES:
            if other != name:
                yield f"{name} is {other}", lambda run, name=name, other=other: shutil.copy(run / other, run / name)
                yield (
                    f"{name} is {other}, rehashed",
                    lambda run, name=name, other=other: rewrite_table(run, name, (run / other).read_bytes()),
                )
        for size in (0, 4, 100, -100, -8, -4):
            yield (
                f"{name} cut at {size}",
                lambda run, name=name, size=size: rewrite_table(run, name, (run / name).read_bytes()[:size]),
            )
    yield "manifest a device", lambda run: link(run / "manifest.json", Path("/dev/zero"))
    yield "manifest a pipe", lambda run: ((run / "manifest.json").unlink(), os.mkfifo(run / "manifest.json"))
    yield "manifest a link out", lambda run: link_copy(run / "manifest.json")


def link(path: Path, target: Path) -> None:
    path.unlink()
    path.symlink_to(target)


def link_copy(path: Path) -> None:
    outside = Path(f"{path.parent}-outside") / path.name
    outside.parent.mkdir(exist_ok=True)
    shutil.move(path, outside)
    path.symlink_to(outside)


def damaged_tables() -> Iterator[tuple[str, Damage]]:
    """Each column of each table missing, twice, empty, and of other types; rows missing, twice, reversed, none."""
    for name in TABLES:
        for how, change in table_changes(name):
            yield (
                f"{name}: {how}",
                lambda run, name=name, change=change: rewrite_table(run, name, change(pq.read_table(run / name))),
            )


def table_changes(name: str) -> Iterator[tuple[str, Callable[[pa.Table], pa.Table]]]:
    columns = {
        "examples.parquet": ["example_id", "text", "text_b", "label"],
        "predictions.parquet": ["example_id", "label", "predicted", "decided_by", "probability", "confidence"],
        "timings.parquet": ["stage", "n_examples", "sequence_length", "n_tokens", "tokenize_seconds", "run_seconds"],
    }.get(name, ["example_id", "logits", "shadow"])
    for column in columns:
        yield f"no {column}", lambda table, column=column: table.drop_columns(column)
        yield f"{column} twice", lambda table, column=column: table.append_column(column, table[column])
        for what, cells in other_cells():
            yield (
                f"{column} {what}",
                lambda table, column=column, cells=cells: table.set_column(
                    table.column_names.index(column), column, cells(len(table))
                ),
            )
    yield "no row", lambda table: table.slice(0, 0)
    yield "one row", lambda table: table.slice(0, 1)
    yield "rows twice", lambda table: pa.concat_tables([table, table])
    yield "a row twice", lambda table: pa.concat_tables([table.slice(0, 1), table.slice(0, len(table) - 1)])
    yield "reversed", lambda table: table.take(np.arange(len(table))[::-1].copy())
    yield "no column", lambda table: table.select([])
    yield "nested column", lambda table: table.append_column("nested", pa.array([[{"a": [1]}]] * len(table)))
    yield "nameless column", lambda table: table.append_column("", pa.array([1] * len(table)))
    yield (
        "date out of range",
        lambda table: table.append_column("when", pa.array([2**62] * len(table), pa.timestamp("us"))),
    )
    if name.startswith("scores"):
        for width in (1, 3, 5):
            yield (
                f"{width} logits",
                lambda table, width=width: with_logits(
                    table, pa.FixedSizeListArray.from_arrays(pa.array(np.zeros(width * len(table), np.float32)), width)
                ),
            )
        for value in (np.nan, np.inf, -np.inf, 3e38, 1e39):
            yield f"logits {value}", lambda table, value=value: with_logits(table, changed_first(table, value))
        yield (
            "ragged logits",
            lambda table: with_logits(
                table, pa.array([[0.0] * (3 if i else 5) for i in range(len(table))], pa.list_(pa.float32()))
            ),
        )
        yield "half logits", lambda table: with_logits(table, table["logits"].cast(pa.list_(pa.float16())))
        yield "logits of doubles", lambda table: with_logits(table, table["logits"].cast(pa.list_(pa.float64())))


def other_cells() -> Iterator[tuple[str, Callable[[int], pa.Array]]]:
    yield "null", lambda n: pa.nulls(n)
    yield "null strings", lambda n: pa.nulls(n, pa.string())
    yield "null numbers", lambda n: pa.nulls(n, pa.float64())
    yield "words", lambda n: pa.array([f"word {i}" for i in range(n)])
    yield "hostile words", lambda n: pa.array([f"\x1b[31m<b>{i}\u202e" for i in range(n)])
    yield "one word", lambda n: pa.array(["word"] * n)
    yield "numbers", lambda n: pa.array(np.arange(n, dtype=np.int64))
    yield "large numbers", lambda n: pa.array(np.full(n, 2**63 - 1))
    yield "negative numbers", lambda n: pa.array(np.full(n, -1.0))
    yield "infinite numbers", lambda n: pa.array(np.full(n, np.inf))
    yield "NaN", lambda n: pa.array(np.full(n, np.nan))
    yield "bytes", lambda n: pa.array([b"\xff"] * n)
    yield "booleans", lambda n: pa.array([True] * n)
    yield "objects", lambda n: pa.array([{"a": 1}] * n)
    yield "lists", lambda n: pa.array([["a"]] * n)
    yield "dates", lambda n: pa.array([2**40] * n, pa.timestamp("ns"))
    yield "a dictionary", lambda n: pa.array(["word"] * n).dictionary_encode()
    yield "decimals", lambda n: pa.array([1] * n).cast(pa.decimal128(38, 2))


def with_logits(table: pa.Table, logits: Any) -> pa.Table:
    return table.set_column(table.column_names.index("logits"), "logits", logits)


def changed_first(table: pa.Table, value: float) -> pa.Array:
    rows = table["logits"].to_pylist()
    rows[0][0] = value
    return pa.array(rows, pa.list_(pa.float64()))


def every_damage() -> list[tuple[str, Damage]]:
    whole = [
        (name, lambda run, content=content: (run / "manifest.json").write_bytes(content))
        for name, content in whole_manifests()
    ]
    return [*whole, *changed_manifests(), *damaged_files(), *damaged_tables()]


def commands(run: Path, good: Path, output: Path) -> list[list[str]]:
    """Return the commands that read a run; `report` and `verify` read it before they start a kernel."""
    tune = ["tune", str(run), "--maximize", "accuracy", "--output", f"{output}.toml", "--overwrite"]
    return [
        ["inspect", str(run)],
        tune,
        ["calibrate", str(run), "--output", f"{output}.toml", "--overwrite"],
        ["compare", str(run), str(good)],
        ["compare", str(good), str(run)],
        ["audit", str(run), "--output", f"{output}.csv", "--overwrite"],
        ["audit", str(good), "--against", str(run), "--output", f"{output}.csv", "--overwrite"],
        ["correct", str(run), str(good.parent / "audit.csv"), "--output", f"{output}.tsv", "--overwrite"],
        ["report", str(run), "--output", f"{output}.html"],
        ["verify", str(good.parent / "report.html"), "--run", str(run)],
    ]


@pytest.fixture(scope="module")
def good(tmp_path_factory) -> Path:
    """A small run, and beside it an audit and a report of it."""
    folder = tmp_path_factory.mktemp("good")
    random_run(folder / "run", n=12, seed=2)
    path = str(folder / "audit.csv")
    assert CliRunner().invoke(app, ["audit", str(folder / "run"), "--output", path]).exit_code == 0
    record = {"schema_version": 2, "notebook": "01_run_cascade", "notebook_sha256": "0", "parameters": {}}
    record |= {"runs": {"run_dir": {"run_id": "random-2"}}, "files": {}, "packages": {}, "outputs": []}
    (folder / "report.json").write_text(json.dumps(record))
    (folder / "report.html").write_text("")
    return folder / "run"


@pytest.fixture
def no_kernel(monkeypatch):
    """Execute no notebook: the tables are read, and nothing else."""
    monkeypatch.setattr("cascade_lab.reporting.report._execute", lambda *_, **__: [])
    monkeypatch.setattr("cascade_lab.reporting.report.write_figures", lambda *_, **__: [])


def outcome(arguments: list[str]) -> str:
    """Call a command; return "accepted" or "refused". Fail on a traceback, a RuntimeWarning, or more than one line."""
    with warnings.catch_warnings():
        warnings.simplefilter("error", RuntimeWarning)
        result = CliRunner().invoke(app, arguments)
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise AssertionError(f"{arguments}: {result.exception!r}") from result.exception
    if result.exit_code in (0, 1):  # 1: a report differs
        return "accepted"
    assert result.exit_code == 2, arguments
    assert result.stderr.startswith("error: "), (arguments, result.stderr)
    assert result.stderr.removesuffix("\n").isprintable(), (arguments, result.stderr)
    assert len(result.stderr) < 2000, (arguments, result.stderr)
    return "refused"


def damaged(good: Path, folder: Path, damage: Damage) -> Path:
    run = shutil.copytree(good, folder / "run")
    damage(run)
    return run


def refusal(run: Path, name: str) -> str | None:
    """Read a run with all its tables; return the message where it is refused."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            Run.read(run).check()
    except CascadeLabError as error:
        return str(error)
    except Exception as error:
        raise AssertionError(name) from error
    return None


def test_a_damaged_run_is_refused_in_one_line_or_read(good, tmp_path):
    """One in five of all changes, read with all tables; `make test-fuzz` takes all changes and all commands."""
    assert Run.read(good).check() is None
    n_refused = 0
    changes = every_damage()[::5]
    for number, (name, damage) in enumerate(changes):
        run = damaged(good, tmp_path / str(number), damage)
        message = refusal(run, name)
        if message is not None:
            n_refused += 1
            assert "\n" not in message, name
            assert message.startswith(f"{run}"), (name, message)
            assert re.search("; .*(put|give|run again|copy)", message), (name, message)
    assert len(changes) / 2 < n_refused < len(changes)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("manifest null", "manifest.json: is not a JSON object"),
        ("manifest deep object", "manifest.json: is nested too deeply"),
        ("run_id = 'missing'", "manifest.json: has no run_id"),
        ("evalset = '[]'", r"manifest.json: evalset must be an object, not \[\]"),
        ("cascade = 'missing'", "manifest.json: has no cascade"),
        ("contents names '../x'", "contents names '../x', which is not a file of the run"),
        ("fewer labels than logits", "label 'label2' is no answer of the cascade"),
        ("labels of a file", "a stage has no list of labels"),
        ("scores/last.parquet is scores/gate0.parquet", "scores/last.parquet: changed since the run"),
        ("scores/last.parquet is scores/gate0.parquet, rehashed", "does not have 4 logits per example"),
        ("predictions.parquet is timings.parquet, rehashed", "no column is named 'example_id'"),
        ("examples.parquet: a row twice", "example_id '0' occurs twice"),
        ("examples.parquet: no row", "has no example"),
        ("predictions.parquet: one row", "has 1 rows, but there are 12 examples"),
        ("predictions.parquet: label one word", "its labels are not those of examples.parquet"),
        ("scores/last.parquet: example_id words", "example_id 'word 0' is not in examples.parquet"),
        ("scores/last.parquet: logits inf", "a logit is infinite or NaN"),
        ("timings.parquet: stage one word", "stage 'word' is no stage of the cascade"),
        ("timings.parquet: run_seconds NaN", "run_seconds has a value that is below 0 or not a number"),
        ("examples.parquet a link out", "is a link to a file outside the run"),
        ("examples.parquet a pipe", "examples.parquet: is not a file"),
        ("manifest a device", "manifest.json: is not a file"),
    ],
)
def test_the_line_says_what_is_damaged(good, tmp_path, name, message):
    run = damaged(good, tmp_path, dict(every_damage())[name])
    with pytest.raises(RunError, match=message):
        Run.read(run).check()


def test_a_stage_that_scored_nothing_is_read(good, tmp_path):
    """Nothing passed the gate, and there are no shadow scores: the last stage's table has no row."""
    run = damaged(good, tmp_path, dict(every_damage())["scores/last.parquet: no row"])
    assert not Run.read(run).scores("last").scored.any()


def test_every_command_that_reads_runs_refuses_a_damaged_one(good, no_kernel, tmp_path):
    run = damaged(good, tmp_path, dict(every_damage())["examples.parquet: label one word"])
    outcomes = [outcome(command) for command in commands(run, good, tmp_path / "out")]
    assert set(outcomes) == {"refused"}


def test_a_small_file_cannot_fill_the_memory(good, tmp_path, monkeypatch):
    """A text that is repeated takes little in the file, and a null takes nothing: what they take in memory counts."""
    monkeypatch.setattr("cascade_lab.parquet_files.MAX_BYTES", 10**6)
    table = pq.read_table(good / "examples.parquet").slice(0, 1)
    many = pa.concat_tables([table.set_column(1, "text", pa.array(["x" * 1000]))] * 2000)
    nulls = pa.table({**dict.fromkeys(table.column_names, pa.nulls(200_000, pa.string()))})
    for number, bomb in enumerate((many, nulls)):
        run = damaged(good, tmp_path / str(number), lambda run, bomb=bomb: rewrite_table(run, "examples.parquet", bomb))
        assert (run / "examples.parquet").stat().st_size < 50_000
        with pytest.raises(RunError, match=r"its values take more than .* of memory"):
            Run.read(run).check()


@pytest.mark.fuzz
def test_no_damaged_run_makes_a_command_fail(good, no_kernel, tmp_path):
    outcomes: Counter[str] = Counter()
    changes = every_damage()
    for number, (_, damage) in enumerate(changes):
        run = damaged(good, tmp_path / str(number), damage)
        outcomes.update(outcome(command) for command in commands(run, good, tmp_path / "out"))
        shutil.rmtree(tmp_path / str(number))
    print(f"\nruns: {len(changes):,} damaged, {outcomes.total():,} commands: {dict(outcomes)}, crashed 0")


@pytest.mark.fuzz
@pytest.mark.parametrize("name", ["manifest.json", *TABLES])
def test_no_changed_byte_of_a_run_makes_it_fail(good, tmp_path, name):
    """Random bytes of one file are changed; its digest in the manifest is made right, so that the file is parsed."""
    rng = np.random.default_rng(0)
    outcomes: Counter[str] = Counter()
    content = np.frombuffer((good / name).read_bytes(), np.uint8)
    for number in range(300):
        changed = content.copy()
        places = rng.integers(len(content), size=rng.integers(1, 5))
        changed[places] = rng.integers(256, size=len(places))
        run = shutil.copytree(good, tmp_path / str(number))
        if name == "manifest.json":
            (run / name).write_bytes(changed.tobytes())
        else:
            rewrite_table(run, name, changed.tobytes())
        outcomes["accepted" if refusal(run, f"{name} {places} {changed[places]}") is None else "refused"] += 1
        shutil.rmtree(run)
    print(f"\n{name}: {outcomes.total()} changed, {dict(outcomes)}, crashed 0")

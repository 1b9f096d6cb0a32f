"""Damages of run directories, and the commands that read runs: the product of the two must never crash.

A damage changes a good run in one place: its manifest, a table, or its files. There are two good runs: a plain one, and
one whose cascade has a rejector of features and a calibrator.
"""

from __future__ import annotations

import itertools
import json
import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from helpers import logits_of, random_run, rewrite_table

from cascade_lab import CascadeSpec, Run
from cascade_lab.calibrator import Calibrator
from cascade_lab.reporting.record import SCHEMA_VERSION
from cascade_lab.thresholds import fit_rejector

Damage = Callable[[Path], None]
TABLES = ("examples.parquet", "predictions.parquet", "timings.parquet", "scores/gate0.parquet", "scores/last.parquet")
FEATURES, EVIDENCE = "features/last.parquet", "evidence.parquet"
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
REJECTOR_KEYS = (
    ("cascade", "stage", 0, "calibrator"),
    ("cascade", "stage", 0, "calibrator", "method"),
    ("cascade", "stage", 0, "calibrator", "weight"),
    ("cascade", "stage", 0, "calibrator", "bias"),
    ("cascade", "stage", 1, "rejector"),
    ("cascade", "stage", 1, "rejector", "evidence"),
    ("cascade", "stage", 1, "rejector", "evidence", 0),
    ("cascade", "stage", 1, "rejector", "evidence", 1),
    ("cascade", "stage", 1, "rejector", "weights"),
    ("cascade", "stage", 1, "rejector", "weights", 0),
    ("cascade", "stage", 1, "rejector", "bias"),
    ("cascade", "stage", 1, "rejector", "arrays"),
    ("cascade", "stage", 1, "rejector", "arrays_sha256"),
    ("cascade", "stage", 1, "rejector", "fitted_on"),
    ("cascade", "stage", 1, "rejector", "fitted_on", "run_id"),
    ("cascade", "stage", 1, "rejector", "fitted_on", "sha256"),
    ("contents", FEATURES),
    ("contents", EVIDENCE),
)
"""Of a run whose cascade has a rejector and a calibrator."""


def whole_manifests() -> Iterator[tuple[str, bytes]]:
    for text in ("", "[]", "null", "3", '"x"', "{}", "{", "nul", "NaN", '{"schema_version": 2}', "[" * 99_999):
        yield f"manifest {text[:30]}", text.encode()
    yield "manifest deep object", b'{"schema_version":' * 99_999
    yield "manifest of bytes", bytes(range(256))
    yield "manifest in UTF-16", json.dumps({"schema_version": 2}).encode("utf-16")
    yield "manifest of a number", b"1" * 9999


def changed_keys(keys: Sequence[tuple[Any, ...]]) -> Iterator[tuple[str, Damage]]:
    """Each key of the manifest without its value, and with each value of another kind."""
    for key, value in itertools.product(keys, ("missing", *VALUES)):
        yield f"{'.'.join(map(str, key))} = {str(value)[:20]!a}", lambda run, key=key, value=value: put(run, key, value)


def changed_manifests() -> Iterator[tuple[str, Damage]]:
    """Manifests whose parts do not belong together, or are nested deeply."""
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
    if value == "missing" and isinstance(part, list):
        del part[key[-1]]
    elif value == "missing":
        part.pop(key[-1], None)
    else:
        part[key[-1]] = value
    path.write_text(json.dumps(manifest), encoding="utf-8", errors="surrogatepass")


def damaged_files(tables: Sequence[str]) -> Iterator[tuple[str, Damage]]:
    for name in tables:
        yield f"{name} missing", lambda run, name=name: (run / name).unlink()
        yield f"{name} a folder", lambda run, name=name: ((run / name).unlink(), (run / name).mkdir())
        yield f"{name} a pipe", lambda run, name=name: ((run / name).unlink(), os.mkfifo(run / name))
        yield f"{name} a device", lambda run, name=name: link(run / name, Path("/dev/zero"))
        yield f"{name} a link out", lambda run, name=name: link_copy(run, name)
        yield f"{name} a broken link", lambda run, name=name: link(run / name, run / "none")
        for other in tables:
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


def damaged_manifest_files() -> Iterator[tuple[str, Damage]]:
    yield "manifest a device", lambda run: link(run / "manifest.json", Path("/dev/zero"))
    yield "manifest a pipe", lambda run: ((run / "manifest.json").unlink(), os.mkfifo(run / "manifest.json"))
    yield "manifest a link out", lambda run: link_copy(run, "manifest.json")


def link(path: Path, target: Path) -> None:
    path.unlink()
    path.symlink_to(target)


def link_copy(run: Path, name: str) -> None:
    outside = Path(f"{run}-outside")
    outside.mkdir()
    shutil.move(run / name, outside / "file")
    (run / name).symlink_to(outside / "file")


def damaged_tables(tables: Sequence[str]) -> Iterator[tuple[str, Damage]]:
    """Each column of each table missing, twice, empty, and of other types; rows missing, twice, reversed, none."""
    for name in tables:
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
        FEATURES: ["example_id", "cls"],
        EVIDENCE: ["example_id", "last.mahalanobis"],
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
    if name == FEATURES:
        for what, vectors in other_features():
            yield f"cls {what}", lambda table, vectors=vectors: table.set_column(1, "cls", vectors(len(table)))
    if name.startswith("scores"):
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


def other_features() -> Iterator[tuple[str, Callable[[int], pa.Array]]]:
    def vectors(n: int, width: int, value: float, dtype: Any = np.float16) -> pa.Array:
        return pa.FixedSizeListArray.from_arrays(pa.array(np.full(n * width, value, dtype)), width)

    yield "of 1 number", lambda n: vectors(n, 1, 0.5)
    yield "of 9 numbers", lambda n: vectors(n, 9, 0.5)
    yield "all zero", lambda n: vectors(n, 6, 0)
    yield "NaN", lambda n: vectors(n, 6, np.nan)
    yield "infinite", lambda n: vectors(n, 6, np.inf)
    yield "largest", lambda n: vectors(n, 6, 65504)
    yield "of float32", lambda n: vectors(n, 6, 0.5, np.float32)
    yield "null", lambda n: pa.nulls(n, pa.list_(pa.float16(), 6))
    yield "ragged", lambda n: pa.array([[0.5] * (6 if i else 3) for i in range(n)], pa.list_(pa.float32()))


def every_damage() -> list[tuple[str, Damage]]:
    """Damages of a plain run."""
    whole = [
        (name, lambda run, content=content: (run / "manifest.json").write_bytes(content))
        for name, content in whole_manifests()
    ]
    files = [*damaged_manifest_files(), *damaged_files(TABLES), *damaged_tables(TABLES)]
    return [*whole, *changed_keys(KEYS), *changed_manifests(), *files]


def every_damage_with_rejector() -> list[tuple[str, Damage]]:
    """Damages of a run whose cascade has a rejector and a calibrator: of what a plain run does not have."""
    tables = (FEATURES, EVIDENCE)
    return [*changed_keys(REJECTOR_KEYS), *damaged_files(tables), *damaged_tables(tables)]


def write_good_runs(folder: Path) -> dict[str, Path]:
    """Write the two good runs; return them by name.

    Beside them are a run of other texts for each, a filled-in audit, and the record of a report.
    """
    plain, other = (random_run(folder / name, n=48, seed=seed) for name, seed in (("plain", 2), ("plain-other", 3)))
    audit = 'example_id,text,label,corrected_label\n0,"{}",{},label0\n'
    (folder / "audit.csv").write_text(audit.format(plain.examples["text"][0], plain.examples["label"][0]))
    record = {"schema_version": SCHEMA_VERSION, "notebook": "01_run_cascade", "notebook_sha256": "0", "parameters": {}}
    record |= {"runs": {"run_dir": {"run_id": "random-2"}}, "files": {}, "packages": {}, "fonts": {}, "outputs": []}
    (folder / "report.json").write_text(json.dumps(record))
    (folder / "report.html").write_text("")
    gate = replace(plain.spec.stages[0], calibrator=Calibrator("platt", {"weight": 1.5, "bias": 0.1}))
    spec = replace(plain.spec, stages=(gate, plain.spec.last))
    runs = {"rejector": with_features(plain.with_spec(spec)), "rejector-other": with_features(other.with_spec(spec))}
    fitted = fit_rejector(runs["rejector"], ["gate0", "mahalanobis"], train_run=runs["rejector"])
    fitted.write(folder / "cascade.toml")
    for name, run in runs.items():
        run.with_spec(CascadeSpec.read(folder / "cascade.toml")).write(folder / name)
    return {"plain": folder / "plain", "rejector": folder / "rejector"}


def with_features(run: Run) -> Run:
    """Return a run that kept features of its last stage: six numbers that are mixtures of its logits."""
    mixture = np.random.default_rng(0).normal(size=(4, 6))
    features = {"last": (logits_of(run)["last"] @ mixture).astype(np.float16)}
    scores = {stage.name: run.scores(stage.name) for stage in run.spec.stages}
    return Run(run.manifest, run.examples, scores, run.predictions, run.timings, features=features)


def commands(run: Path, good: Path, output: Path) -> list[list[str]]:
    """Return the commands that read a run; `report` and `verify` read it before they start a kernel."""
    new = ["--output", f"{output}.toml", "--overwrite"]
    tune = ["tune", "--maximize", "accuracy", "--write-anyway", *new]
    return [
        ["inspect", str(run)],
        [*tune, str(run)],
        [*tune, str(good.with_name(f"{good.name}-other")), "--stage", "gate0", "--test", str(run)],
        ["calibrate", str(run), *new],
        ["calibrate", str(run), "--method", "auto", "--stage", "gate0", *new],
        ["fit-rejector", str(run), "--evidence", "gate0,energy", *new],
        ["fit-rejector", str(run), "--evidence", "gate0,knn", "--train-run", str(run), *new],
        ["compare", str(run), str(good)],
        ["compare", str(good), str(run)],
        ["audit", str(run), "--output", f"{output}.csv", "--overwrite"],
        ["audit", str(good), "--against", str(run), "--output", f"{output}.csv", "--overwrite"],
        ["correct", str(run), str(good.parent / "audit.csv"), "--output", f"{output}.tsv", "--overwrite"],
        ["report", str(run), "--output", f"{output}.html"],
        ["verify", str(good.parent / "report.html"), "--run", str(run)],
    ]

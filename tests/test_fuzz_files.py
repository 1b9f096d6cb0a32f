"""Fuzzers of what users hand over: eval sets, `cascade.toml`, the JSON of reports, studies. `make test-fuzz` runs them.

A good file is changed at random: bytes, pieces, and values of the right syntax. Each result is read, or refused in one
line; nothing else may happen. A short round of each is in the normal suite.
"""

from __future__ import annotations

import json
import warnings
from collections import Counter
from collections.abc import Callable
from typing import Any

import numpy as np
import pandas as pd
import pytest
from test_spec import SPEC

from cascade_lab import CascadeSpec, EvalSet, Run
from cascade_lab.analysis.open_set import OPEN_SET_METRICS
from cascade_lab.analysis.study_results import HeldOutResults, StudyResults
from cascade_lab.exceptions import CascadeLabError
from cascade_lab.reporting import verify
from cascade_lab.reporting.record import SCHEMA_VERSION

SHORT, LONG = 60, 1500
PIECES = [
    b"", b"\0", b"\n", b"\r", b"\t", b",", b'"', b"'", b"[", b"]", b"{", b"}", b"[[", b"]]", b"=", b".", b"#", b"\\",
    b"\xff", b"\xef\xbb\xbf", b"\xff\xfe", b"\xed\xa0\x80", b"\\ud800", b"null", b"NaN", b"1e999", b"9" * 30, b"true",
    b"[" * 3000, b"{" * 3000, b'{"a":' * 3000, b"a." * 3000, b"x" * 5000, b"\x1b[31m", "\u202e".encode(), b"{}", b"[]",
    b"2026-02-31", b"../", b"~nobody/", b"inf", b"0x", b"sep=;\n", b"text", b"label", b"PAR1",
]  # fmt: skip
VALUES: list[Any] = [
    None,
    True,
    0,
    -1,
    2**70,
    1.5,
    1e308,
    "",
    "x" * 3000,
    "\ud800",
    [],
    {},
    [[]],
    {"a": {}},
    "\x1b[31m",
]


def changed_bytes(content: bytes, rng: np.random.Generator) -> bytes:
    """Return a content with one to four changes: a byte, a piece put in or in the place of others, a part left out."""
    for _ in range(rng.integers(1, 5)):
        at = int(rng.integers(len(content) + 1))
        length = int(rng.integers(0, 12))
        kind = rng.integers(4)
        if kind == 0:
            piece = bytes(rng.integers(0, 256, rng.integers(1, 4), dtype=np.uint8))
        elif kind == 1:
            piece = PIECES[rng.integers(len(PIECES))]
        elif kind == 2:  # another part of the file
            start = int(rng.integers(len(content) + 1))
            piece = content[start : start + int(rng.integers(40))]
        else:
            piece, length = b"", int(rng.integers(60))
        content = content[:at] + piece + content[at + length :]
    return content


def changed_value(content: Any, rng: np.random.Generator) -> Any:
    """Return JSON with one value replaced or left out, at any depth."""
    content = json.loads(json.dumps(content))
    part = content
    while isinstance(part, dict | list) and part:
        keys = list(part) if isinstance(part, dict) else range(len(part))
        key = keys[int(rng.integers(len(keys)))]
        if not isinstance(part[key], dict | list) or not part[key] or rng.random() < 0.3:
            if rng.random() < 0.2:
                del part[key]
            else:
                part[key] = VALUES[rng.integers(len(VALUES))]
            break
        part = part[key]
    return content


def tried(read: Callable[[], Any], what: str) -> str:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", RuntimeWarning)
            read()
    except CascadeLabError as error:
        lines = str(error).count("\n")
    except Exception as error:
        raise AssertionError(what) from error
    else:
        return "accepted"
    assert lines == 0, what
    return "refused"


def report(name: str, outcomes: Counter[str]) -> None:
    print(f"\n{name}: tried {outcomes.total():,}, {dict(outcomes)}, crashed 0")


rounds = pytest.mark.parametrize(
    "n", [pytest.param(SHORT, id="short"), pytest.param(LONG, id="long", marks=pytest.mark.fuzz)]
)


@rounds
@pytest.mark.parametrize("ending", ["tsv", "csv", "json", "jsonl", "parquet"])
def test_eval_sets(ending, n, tmp_path):
    rows = pd.DataFrame(
        {
            "example_id": [f"{i}" for i in range(6)],
            "text": ["pay my bill", "付款", 'say "no", please', "", "a\u2028b", "x"],
            "label": ["pay", "pay", "oos", "play", "1", "null"],
            "split": ["test", "dev"] * 3,
            "n": [1, 2, 3, 4, 5, 6],
        }
    )
    path = tmp_path / f"set.{ending}"
    {
        "tsv": lambda: rows.assign(text="plain").to_csv(path, sep="\t", index=False),
        "csv": lambda: rows.to_csv(path, index=False),
        "json": lambda: rows.to_json(path, orient="records"),
        "jsonl": lambda: rows.to_json(path, orient="records", lines=True),
        "parquet": lambda: rows.to_parquet(path),
    }[ending]()
    good = path.read_bytes()
    assert len(EvalSet.read(path)) == 6
    rng, outcomes = np.random.default_rng(1), Counter()
    for number in range(n):
        if ending in ("json", "jsonl") and rng.random() < 0.5:
            content = json.dumps(changed_value(json.loads(rows.to_json(orient="records")), rng)).encode()
            content = content if ending == "json" else content.strip(b"[]").replace(b"}, {", b"}\n{")
        else:
            content = changed_bytes(good, rng)
        path.write_bytes(content)
        options: dict[str, Any] = [{}, {"split": "test"}, {"unlabelled": True}, {"label_column": "n"}][number % 4]

        def read(options: dict[str, Any] = options) -> None:
            evalset = EvalSet.read(path, **options)
            evalset.write(tmp_path / "copy.jsonl")

        outcomes[tried(read, f"{number}: {content[:2000]!r}")] += 1
    report(f"eval sets, {ending}", outcomes)


TUNED = """
[tuned_on]
run_id = "1"
goal = "maximize accuracy"
costs = {"false accept" = 5.0}
prevalence = 0.5
[tuned_on.evalset]
n_examples = 9
sha256 = "00"
[tuned_on.figures]
accuracy = 0.5
[tuned_on.intervals]
accuracy = [0.1, 0.9]
[calibrated_on.gate]
evalset = {sha256 = "00"}
"""


@rounds
def test_cascade_files(n, tmp_path):
    good = (SPEC + TUNED).encode()
    path = tmp_path / "cascade.toml"
    path.write_bytes(good)
    CascadeSpec.read(path)
    rng, outcomes = np.random.default_rng(2), Counter()

    def read() -> None:
        spec = CascadeSpec.read(path)
        spec.write(tmp_path / "copy.toml")
        assert CascadeSpec.read(tmp_path / "copy.toml").to_dict() == spec.to_dict()

    for number in range(n):
        path.write_bytes(changed_bytes(good, rng))
        outcomes[tried(read, f"{number}: {path.read_bytes()!r}")] += 1
    report("cascade.toml", outcomes)


@pytest.fixture
def record(tmp_path) -> dict[str, Any]:
    """The JSON of a report of a run, beside the run."""
    from helpers import random_run

    run = random_run(tmp_path / "run", n=12, seed=2)
    (run.directory / "report.html").write_text("<p>page</p>")
    identity = {"name": "random", "n_examples": 12, "run_id": run.manifest["run_id"], "evalset": {}, "packages": {}}
    table = {"section": "One", "kind": "table", "columns": ["a"], "index": ["x"], "rows": [[0.5]]}
    axes = {"title": "t", "images": [[[1, 2]]], "x_labels": ["p", "q"], "lines": [{"label": "l", "points": [[0, 1]]}]}
    return {
        "schema_version": SCHEMA_VERSION,
        "notebook": "01_run_cascade",
        "notebook_sha256": "00",
        "parameters": {"n": 3},
        "runs": {"run_dir": {**identity, "thresholds": {"gate0": 0.5}}},
        "files": {},
        "packages": {"numpy": "2"},
        "fonts": {},
        "outputs": [table, {"section": "One", "kind": "figure", "axes": [axes]}, {**table, "section": "Two"}],
    }


@rounds
def test_records_of_reports(record, n, tmp_path, monkeypatch):
    """No kernel is started: what is rebuilt is the record as it was."""
    monkeypatch.setattr(verify, "build_report", lambda *_, **__: ("<p>page</p>", record))
    path = tmp_path / "run" / "report.json"
    rng, outcomes = np.random.default_rng(3), Counter()
    run = Run.read(tmp_path / "run")
    for number in range(n):
        by_value = rng.random() < 0.7
        changed = json.dumps(changed_value(record, rng)).encode() if by_value else None
        path.write_bytes(changed or changed_bytes(json.dumps(record).encode(), rng))
        outcomes[tried(lambda: verify.verify_report(path, run), f"{number}: {path.read_bytes()!r}")] += 1
    report("records of reports", outcomes)


@rounds
def test_results_of_studies(n, tmp_path):
    sides = {"in_scope_accuracy": 0.9, "reject_recall": 0.4}
    row = {"scheme": "a", "stages": ["x"], "seed": 0, "thresholds": {}, "infeasible": None}
    row |= {"validation": sides, "test": sides, "paper": sides}
    models = {"x": {"curve": [{"epoch": 1, "dev_accuracy": 0.5}, {"epoch": 2, "dev_accuracy": 0.6}]}}
    good = {"rows": [row, {**row, "seed": 1}, {**row, "scheme": "b", "paper": None}], "models": models}
    good |= {"packages": {"tensorflow": "2"}, "processor": "p"}
    path = tmp_path / "results.json"
    rng, outcomes = np.random.default_rng(4), Counter()

    def read() -> None:
        results = StudyResults.read(path)
        results.table(), results.curves(), str(results.summary(best_in_paper=0.5))

    path.write_text(json.dumps(good))
    read()
    for number in range(n):
        path.write_text(json.dumps(changed_value(good, rng)))
        outcomes[tried(read, f"{number}: {path.read_text()}")] += 1
    report("results of studies", outcomes)


@rounds
def test_results_of_studies_with_held_out_labels(n, tmp_path):
    metrics = dict.fromkeys((*OPEN_SET_METRICS, "known_accepted"), 0.5)
    row = {"known_ratio": 0.5, "seed": 0, "rule": "energy", "threshold": 0.5, "validation": metrics, "test": metrics}
    models = {"x": {"curve": [{"epoch": 1, "dev_accuracy": 0.5}]}}
    good = {"rows": [row, {**row, "seed": 1}, {**row, "known_ratio": 1}], "models": models, "accept": 0.95}
    good |= {"packages": {"tensorflow": "2"}, "processor": "p"}
    path = tmp_path / "results.json"
    rng, outcomes = np.random.default_rng(6), Counter()

    def read() -> None:
        results = HeldOutResults.read(path)
        results.table(), results.curves(), results.metrics(), str(results.summary())

    path.write_text(json.dumps(good))
    read()
    for number in range(n):
        path.write_text(json.dumps(changed_value(good, rng)))
        outcomes[tried(read, f"{number}: {path.read_text()}")] += 1
    report("results of studies with held-out labels", outcomes)

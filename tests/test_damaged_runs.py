"""Tests that no damaged run directory makes a command fail with a traceback: each is refused in one line, or works.

Every command that reads runs is called on the damaged runs of `damages`, in this process.
"""

from __future__ import annotations

import re
import shutil
import warnings
from collections import Counter
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from damages import (
    EVIDENCE,
    FEATURES,
    TABLES,
    Damage,
    commands,
    every_damage,
    every_damage_with_rejector,
    write_good_runs,
)
from helpers import rewrite_table
from typer.testing import CliRunner

from cascade_lab import Run
from cascade_lab.cli import app
from cascade_lab.exceptions import CascadeLabError, RunError
from cascade_lab.leaderboard import leaderboard

N_PARTS = 8
DAMAGES = {"plain": every_damage(), "rejector": every_damage_with_rejector()}


@pytest.fixture(scope="module")
def goods(tmp_path_factory) -> dict[str, Path]:
    return write_good_runs(tmp_path_factory.mktemp("good"))


@pytest.fixture
def good(goods) -> Path:
    return goods["plain"]


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


def report(name: str, outcomes: Counter[str]) -> None:
    print(f"\n{name}: tried {outcomes.total():,}, {dict(outcomes)}, crashed 0")


def damaged(good: Path, folder: Path, damage: Damage) -> Path:
    run = shutil.copytree(good, folder / "run")
    damage(run)
    return run


def refusal(run: Path, name: str) -> str | None:
    """Read a run with all its tables, and replay it; return the message where it is refused."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            read = Run.read(run)
            read.check()
            for stage in read.spec.stages if read.has_features else ():
                if f"features/{stage.name}.parquet" in read.manifest["contents"]:
                    read.features(stage.name)
            read.replay() if read.spec.rejector else None
    except CascadeLabError as error:
        return str(error)
    except Exception as error:
        raise AssertionError(name) from error
    return None


@pytest.mark.parametrize("kind", DAMAGES)
def test_a_damaged_run_is_refused_in_one_line_or_read(kind, goods, tmp_path):
    """One in five of all changes, read with all tables; `make test-fuzz` takes all changes, and the commands."""
    good = goods[kind]
    assert refusal(good, "good") is None
    n_refused = 0
    changes = DAMAGES[kind][::5]
    for number, (name, damage) in enumerate(changes):
        run = damaged(good, tmp_path / str(number), damage)
        message = refusal(run, name)
        if message is not None:
            n_refused += 1
            assert "\n" not in message, name
            assert message.startswith(f"{run}"), (name, message)
            assert re.search("; .*(put|give|run again|copy)", message), (name, message)
    assert len(changes) / 3 < n_refused < len(changes)


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
        ("predictions.parquet: one row", "has 1 rows, but there are 48 examples"),
        ("predictions.parquet: label one word", "its labels are not those of examples.parquet"),
        ("scores/last.parquet: example_id words", "example_id 'word 0' is not in examples.parquet"),
        ("scores/last.parquet: logits inf", "a logit is infinite or NaN"),
        ("timings.parquet: stage one word", "stage 'word' is no stage of the cascade"),
        ("timings.parquet: run_seconds NaN", "run_seconds has a value that is below 0 or not a number"),
        ("timings.parquet: n_examples large numbers", "has more than the run's 48 examples"),
        ("examples.parquet a link out", "is a link to a file outside the run"),
        ("examples.parquet a pipe", "examples.parquet: is not a file"),
        ("manifest a device", "manifest.json: is not a file"),
    ],
)
def test_the_line_says_what_is_damaged(good, tmp_path, name, message):
    run = damaged(good, tmp_path, dict(DAMAGES["plain"])[name])
    with pytest.raises(RunError, match=message):
        Run.read(run).check()


def test_a_stage_that_scored_nothing_is_read(good, tmp_path):
    """Nothing passed the gate, and there are no shadow scores: the last stage's table has no row."""
    run = damaged(good, tmp_path, dict(DAMAGES["plain"])["scores/last.parquet: no row"])
    assert not Run.read(run).scores("last").scored.any()


def test_every_command_that_reads_runs_refuses_a_damaged_one(good, no_kernel, tmp_path):
    run = damaged(good, tmp_path, dict(DAMAGES["plain"])["examples.parquet: label one word"])
    outcomes = [outcome(command) for command in commands(run, good, tmp_path / "out")]
    assert set(outcomes) == {"refused"}


@pytest.mark.slow
def test_every_command_that_reads_runs_accepts_a_good_one(goods, no_kernel, tmp_path):
    """Otherwise the refusals of damaged ones would prove nothing."""
    for kind, run in goods.items():
        outcomes = {tuple(command): outcome(command) for command in commands(run, run, tmp_path / "out")}
        refused = [command[:4] for command, how in outcomes.items() if how == "refused"]
        # The plain run has no features, which the distances need.
        assert len(refused) == (kind == "plain"), refused


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
@pytest.mark.parametrize("kind", DAMAGES)
def test_a_damaged_run_is_one_row_of_the_list_of_runs(kind, goods, tmp_path):
    """A fault of the logits alone is not seen: the list reads the examples and the predictions."""
    for number, (_, damage) in enumerate(DAMAGES[kind]):
        damaged(goods[kind], tmp_path / "runs" / str(number), damage)
    with warnings.catch_warnings():
        warnings.simplefilter("error", RuntimeWarning)
        listed = leaderboard(tmp_path / "runs")
    assert len(listed) == len(DAMAGES[kind])
    problems = listed["problem"].dropna()
    assert len(problems) > len(listed) / 3
    assert all(problem.isprintable() for problem in problems)
    assert outcome(["runs", str(tmp_path / "runs")]) == "accepted"


@pytest.mark.fuzz
@pytest.mark.parametrize("part", range(N_PARTS))
@pytest.mark.parametrize("kind", DAMAGES)
def test_no_damaged_run_makes_a_command_fail(kind, part, goods, no_kernel, tmp_path):
    """Each damage meets every third command, another third from one damage to the next."""
    outcomes: Counter[str] = Counter()
    for number, (_, damage) in list(enumerate(DAMAGES[kind]))[part::N_PARTS]:
        run = damaged(goods[kind], tmp_path / str(number), damage)
        called = commands(run, goods[kind], tmp_path / "out")[number // N_PARTS % 3 :: 3]
        outcomes.update(outcome(command) for command in called)
        shutil.rmtree(tmp_path / str(number))
    report(f"{kind} runs, part {part + 1} of {N_PARTS}", outcomes)


@pytest.mark.fuzz
@pytest.mark.parametrize("name", ["manifest.json", *TABLES, FEATURES, EVIDENCE])
def test_no_changed_byte_of_a_run_makes_it_fail(goods, tmp_path, name):
    """Random bytes of one file are changed; its digest in the manifest is made right, so that the file is parsed."""
    good = goods["rejector"]
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
    report(f"{name}, bytes changed", outcomes)

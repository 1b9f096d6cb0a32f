"""`cascade-lab compare`: what it prints and writes, and how it refuses bad input."""

from __future__ import annotations

import json

import pytest
from helpers import HOSTILE, hostile_pair, perturbed_run, random_run
from typer.testing import CliRunner

from cascade_lab.analysis.comparison import WIN, compare
from cascade_lab.cli import app


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pair")
    a = random_run(folder / "a", n=300, n_gates=2, n_labels=5, seed=1, skill=2.0)
    return a, perturbed_run(a, folder / "b", thresholds={"gate0": 0.4, "last": 0.3})


def run_compare(*arguments):
    return CliRunner().invoke(app, ["compare", *map(str, arguments)])


def test_the_command_prints_and_writes_the_comparison(pair, tmp_path):
    a, b = pair
    result = run_compare(a.directory, b.directory, "--output", tmp_path / "c.json", "--texts", 2)
    assert result.exit_code == 0, result.output
    comparison = compare(a, b)
    difference = comparison.metrics.loc["accuracy", "difference"]
    words = " ".join(result.output.split())
    assert words.startswith(comparison.verdict)
    assert comparison.difference in words
    assert words.count(f"{100 * difference:+.2f}") >= 3, "the sentence, the table and the parts have one unit"
    assert f"B right where A is wrong: {len(comparison.changes(WIN))}; " in result.output
    for part in ("p (Holm)", "from separate runs", "2 most confident"):
        assert part in result.output, part
    assert max(map(len, result.output.replace(str(tmp_path), "").splitlines())) <= 100
    content = json.loads((tmp_path / "c.json").read_text(encoding="utf-8"))
    (of_two,) = content["comparisons"]
    assert of_two["metrics"][0]["difference"] == pytest.approx(difference)
    assert len(of_two["changes"]) == comparison.pairs["change"].notna().sum()
    assert sum(effect["value"] for effect in of_two["decomposition"]["effects"].values()) == pytest.approx(difference)
    assert of_two["a"]["run_id"] == content["runs"][0]["run_id"] == a.manifest["run_id"]


def test_hostile_texts_are_harmless_on_the_terminal_and_whole_in_the_json(tmp_path):
    a, b = (str(run.directory) for run in hostile_pair(tmp_path))
    result = run_compare(a, b, "--texts", "50", "--output", tmp_path / "c.json")
    assert result.exit_code == 0, result.output
    assert "\x1b" not in result.output
    assert "[bold]b[/bold]" in result.output
    assert max(map(len, result.output.splitlines())) < 250
    content = json.loads((tmp_path / "c.json").read_text(encoding="utf-8"))
    assert {row["text"] for row in content["comparisons"][0]["changes"]} == set(HOSTILE)


def test_bad_input_is_one_line_and_exit_code_2(pair, tmp_path):
    a, b = (run.directory for run in pair)
    other = random_run(tmp_path / "other", n=300, n_gates=2, n_labels=5, seed=8).directory
    (tmp_path / "there.json").write_text("mine")
    for arguments, message in (
        ([a, tmp_path / "nowhere"], "no such run directory"),
        ([a], "a comparison needs two runs or more; give another run"),
        ([a, b, a], "is given twice; give another run to compare it with"),
        ([a, b, other], "in each; compare runs of one eval set"),
        ([a, b, "--picture", tmp_path / "there.json"], "exists already"),
        ([a, other], "in each; compare runs of one eval set"),
        ([a, b, "--column", "domian"], "no column 'domian'"),
        ([a, b, "--output", tmp_path / "there.json"], "exists already"),
        ([a, b, "--output", tmp_path / "there.json" / "c.json"], "cannot be written"),
    ):
        result = run_compare(*arguments)
        assert result.exit_code == 2, result.output
        assert message in result.stderr
        assert result.stderr.startswith("error: ")
        assert result.stderr.count("\n") == 1
    assert (tmp_path / "there.json").read_text() == "mine"

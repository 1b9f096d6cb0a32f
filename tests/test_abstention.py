"""Where no thresholds can be guaranteed: what the line says, against choosing again with what it proposes."""

from __future__ import annotations

import re

import numpy as np
import pytest
from helpers import logits_of, memory_run, random_run
from typer.testing import CliRunner

from cascade_lab.cli import app
from cascade_lab.exceptions import InfeasibleError
from cascade_lab.thresholds import Goal, choose_with_guarantee, tune

GOAL = Goal("accuracy")
BOUND = r"(\w+) at (least|most) ([\d.]+)"


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return repeated(random_run(tmp_path_factory.mktemp("runs") / "r", n=600, seed=1, skill=2.5), 1)


def repeated(run, times):
    """Return a run with each text several times, as different texts."""
    rows = np.tile(np.arange(len(run.examples)), times)
    examples = run.examples.iloc[rows].reset_index(drop=True)
    texts = [f"text {i}" for i in range(len(rows))]
    examples = examples.assign(text=texts, example_id=texts)
    return memory_run(run.spec, examples, {name: values[rows] for name, values in logits_of(run).items()})


def abstention(run, at_least, at_most=None, goal=GOAL):
    with pytest.raises(InfeasibleError) as error:
        choose_with_guarantee(run, goal, at_least, at_most=at_most or {})
    assert "\n" not in str(error.value)
    return str(error.value)


def proposed(message):
    return [(name, float(value)) for name, _, value in re.findall(BOUND, message.partition("ask for less: ")[2])]


@pytest.mark.parametrize("asked", [{"in_scope_accuracy": 0.99}, {"in_scope_accuracy": 0.45, "reject_recall": 0.99}])
def test_the_proposed_bound_can_be_guaranteed_and_a_stricter_one_cannot(run, asked):
    message = abstention(run, asked)
    assert "abstained: no thresholds have in_scope_accuracy at least" in message
    assert ("with the other bounds kept" in message) == (len(asked) > 1)
    assert proposed(message)
    for name, value in proposed(message):
        assert 0 < value < asked[name]
        assert choose_with_guarantee(run, GOAL, {**asked, name: value}).thresholds
        abstention(run, {**asked, name: value + 0.003})


def test_all_bounds_are_relaxed_where_one_is_not_enough(run):
    asked = {"in_scope_accuracy": 0.999, "reject_recall": 0.999}
    message = abstention(run, asked)
    assert re.search(rf"ask for less: {BOUND} and {BOUND} can be guaranteed; no number of texts like these", message)
    assert choose_with_guarantee(run, GOAL, dict(proposed(message))).thresholds
    abstention(run, {name: value + 0.01 for name, value in proposed(message)})


def test_an_upper_bound_is_relaxed_upwards(run):
    message = abstention(run, {}, {"risk": 0.02})
    ((name, value),) = proposed(message)
    assert (name, value > 0.02) == ("risk", True)
    assert choose_with_guarantee(run, GOAL, {}, at_most={"risk": value}).thresholds
    abstention(run, {}, {"risk": value - 0.003})


def test_the_proposed_number_of_texts_is_enough_and_far_fewer_are_not(run):
    """Further texts with the same outcomes: each text several times."""
    small = run.select(np.arange(100))
    asked = {"in_scope_accuracy": 0.8}
    number = re.search(r"or tune on about ([\d,]+) texts like these 100$", abstention(small, asked))[1]
    n = float(number.replace(",", ""))
    assert 200 < n < 20_000
    assert choose_with_guarantee(repeated(small, int(np.ceil(1.05 * n / 100))), GOAL, asked).thresholds
    abstention(repeated(small, int(0.9 * n / 100)), asked)


def test_a_goal_that_no_candidate_satisfies_is_no_matter_of_the_guarantee(run):
    goal = Goal("accuracy", at_least={"reject_recall": 1.0, "in_scope_accuracy": 0.99})
    message = abstention(run, {"in_scope_accuracy": 0.3}, goal=goal)
    assert "infeasible: no thresholds that are tested for a guarantee satisfy: maximize accuracy, reject" in message


def test_tune_abstains_in_one_line_and_writes_nothing(run, tmp_path):
    run.write(tmp_path / "run")
    bound = ["--maximize", "accuracy", "--output", tmp_path / "t.toml"]
    for options in (
        ["--guarantee", "in_scope_accuracy=0.99"],
        ["--at-least", "in_scope_accuracy=0.89", "--confidence", "0.9"],
    ):
        arguments = map(str, ["tune", tmp_path / "run", *bound, *options, "--write-anyway"])
        result = CliRunner().invoke(app, list(arguments))
        assert result.exit_code == 2
        assert len(result.output.strip().splitlines()) == 1
        assert "abstained: no thresholds have in_scope_accuracy at least" in result.output
        assert "can be guaranteed" in result.output
        assert [file.name for file in tmp_path.iterdir()] == ["run"]
    with pytest.raises(InfeasibleError, match="abstained"):
        tune(run, GOAL, guarantee={"in_scope_accuracy": 0.99})

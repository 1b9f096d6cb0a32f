"""Goals: what is refused, how a goal reads, and metrics at its costs and its prevalence."""

from __future__ import annotations

import numpy as np
import pytest
from helpers import random_run

from cascade_lab.analysis.outcomes import METRICS, OUTCOMES, outcome_counts
from cascade_lab.exceptions import GoalError
from cascade_lab.thresholds import Goal

COSTS = {"false reject": 1.0, "false accept": 5.0, "wrong class": 2.0, "right": -0.5}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({}, "one metric"),
        ({"maximize": "accuracy", "minimize": "risk"}, "one metric"),
        ({"maximize": "acuracy"}, "did you mean 'accuracy'"),
        ({"maximize": "p95_ms"}, "no metric"),
        ({"minimize": "mean_cost"}, "needs the cost"),
        ({"minimize": "mean_cost", "costs": {"false acept": 1}}, "did you mean 'false accept'"),
        ({"maximize": "accuracy", "prevalence": 1.0}, "between 0 and 1"),
    ],
)
def test_goals_that_are_refused(arguments, message):
    with pytest.raises(GoalError, match=message):
        Goal(**arguments)


def test_a_goal_reads_as_a_sentence():
    bounds = {"at_least": {"coverage": 0.9}, "at_most": {"p95_ms": 20}}
    goal = Goal("accuracy", **bounds, costs={"false accept": 5}, prevalence=0.1)
    assert str(goal) == (
        "maximize accuracy, coverage at least 0.9, p95_ms at most 20, false accept costs 5, 0.1 out of scope"
    )


def test_a_prevalence_gives_the_metrics_of_a_set_with_that_prevalence(tmp_path):
    """Each text out of scope ten times gives the same metrics as the weights for that prevalence."""
    run = random_run(tmp_path / "run", n=150, seed=3)
    counts = outcome_counts(run.spec, run.predictions).to_numpy()
    in_scope = np.isin(OUTCOMES, ["right", "false reject", "wrong class"])
    repeated = np.where(in_scope, counts, 10 * counts)
    prevalence = repeated[~in_scope].sum() / repeated.sum()
    weighted = Goal(minimize="mean_cost", costs=COSTS, prevalence=prevalence)
    plain = Goal(minimize="mean_cost", costs=COSTS)
    for name in METRICS:
        assert weighted.value(name, counts) == pytest.approx(plain.value(name, repeated)), name

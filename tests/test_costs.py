"""Cost matrices: against replays of every threshold pair, sums by hand and by scikit-learn, and Chow's rule."""

from __future__ import annotations

import itertools
from dataclasses import replace
from functools import partial

import numpy as np
import pandas as pd
import pytest
from helpers import memory_run, random_run, random_spec
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import confusion_matrix
from test_surfaces import COSTS
from test_tuning import labels_differ
from typer.testing import CliRunner

from cascade_lab import thresholds
from cascade_lab.analysis import tuning_origin
from cascade_lab.analysis.bootstrap import resample_counts
from cascade_lab.analysis.costs import count_codes, run_codes, text_codes
from cascade_lab.analysis.intervals import outcome_intervals
from cascade_lab.analysis.outcomes import LabelScope, metric_from_counts
from cascade_lab.cli import app
from cascade_lab.exceptions import GoalError, InfeasibleError, SpecError
from cascade_lab.run import Run
from cascade_lab.spec import CascadeSpec
from cascade_lab.thresholds import (
    CostMatrix,
    Goal,
    ThresholdGrid,
    choose,
    choose_by_prevalence,
    outcome_cost_matrix,
    surface,
    sweep,
    tune,
)

NOT_NEGATIVE = {outcome: cost for outcome, cost in COSTS.items() if cost > 0}


def random_costs(spec, seed):
    """Return a matrix whose labels are in another order; a third of its cells are 0, others have decimals."""
    rng, labels = np.random.default_rng(seed), list(spec.labels)
    cells = rng.choice([0, 1, 2.5, 10, round(float(rng.uniform(0, 3)), 4)], (len(labels), len(labels)))
    frame = pd.DataFrame(np.where(rng.random(cells.shape) < 0.3, 0, cells + 0.01), labels, labels)
    return frame.loc[list(rng.permutation(labels)), list(rng.permutation(labels))]


def cost_of(frame, predictions, prevalence=None):
    """Return the mean cost of predictions, one cell after the other."""
    cells = frame.stack().to_dict()
    cost = np.array([cells[pair] for pair in zip(predictions["label"], predictions["predicted"], strict=True)])
    is_out = predictions["label"].str.startswith("oos").to_numpy()
    if prevalence is None:
        return cost.mean()
    return (1 - prevalence) * cost[~is_out].mean() + prevalence * cost[is_out].mean()


def test_six_texts_by_hand():
    """p as q (10), p rejected (2), q as p (3), q right (0), out of scope as p (7), out of scope rejected (0): 22."""
    matrix = CostMatrix.from_lines(["true,p,q,o", "p,0,10,2", "q,3,0,1", "o,7,4,0"])
    y_true, y_pred = list("ppqqoo"), list("qopqpo")
    counts = count_codes(text_codes(LabelScope(("p", "q"), ("o",)), y_true, y_pred, matrix), costs=matrix)
    assert counts.tolist() == [1, 1, 1, 1, 2, 0, 15, 7]
    assert float(metric_from_counts("mean_cost", counts, costs=matrix.prices)) == pytest.approx(22 / 6)
    weighted = metric_from_counts("mean_cost", counts, costs=matrix.prices, prevalence=0.9)
    assert float(weighted) == pytest.approx(0.1 * 15 / 4 + 0.9 * 7 / 2)
    assert float(metric_from_counts("accuracy", counts, costs=matrix.prices)) == pytest.approx(2 / 6)


@settings(deadline=None, max_examples=6)
@given(seed=st.integers(0, 10_000), n_gates=st.integers(0, 2))
def test_mean_costs_are_those_of_replays_at_every_pair_of_thresholds(tmp_path_factory, seed, n_gates):
    """Of a surface and of a sweep, at the set's prevalence and at another."""
    run = random_run(tmp_path_factory.mktemp("runs") / "r", n=11, n_gates=n_gates, seed=seed)
    frame = random_costs(run.spec, seed)
    prevalence = 0.3 if n_gates and run.examples["label"].str.startswith("oos").any() else None
    goal = Goal(minimize="mean_cost", cost_matrix=frame, prevalence=prevalence)
    if not n_gates:
        run = run.with_spec(replace(run.spec, stages=(replace(run.spec.last, reject_label="oos0"),)))
    stages = [stage.name for stage in run.spec.stages][-2:]
    table = surface(run, stages, goal=goal)
    assert table.exact
    costs = table.metric("mean_cost", goal)
    for (i, first), (j, second) in itertools.product(enumerate(table.first), enumerate(table.second)):
        replayed = run.replay(dict(zip(stages, (first, second), strict=False)))
        assert costs[i, j] == pytest.approx(cost_of(frame, replayed, prevalence), abs=1e-9)
    for row in sweep(run, stages[0], goal=goal).to_dict("records"):
        expected = cost_of(frame, run.replay({stages[0]: row["threshold"]}), prevalence)
        assert row["mean_cost"] == pytest.approx(expected, abs=1e-9)


@settings(deadline=None, max_examples=6)
@given(seed=st.integers(0, 10_000))
def test_the_best_thresholds_within_several_bounds_are_those_of_all_pairs(tmp_path_factory, seed):
    """Bounds on the cost, from both sides, and on other metrics, against every replay."""
    rng = np.random.default_rng(seed)
    run = random_run(tmp_path_factory.mktemp("runs") / "r", n=12, seed=seed)
    frame = random_costs(run.spec, seed)
    grid = ThresholdGrid.from_run(run)
    replays = [run.replay(dict(zip(grid.stages, pair, strict=True))) for pair in itertools.product(*grid.thresholds)]
    right = np.array([(p["label"] == p["predicted"]).to_numpy() for p in replays])
    rejected = np.array([p["predicted"].str.startswith("oos").to_numpy() for p in replays])
    is_in = ~run.examples["label"].str.startswith("oos").to_numpy()
    with np.errstate(invalid="ignore"):
        metrics = {
            "mean_cost": np.array([cost_of(frame, p) for p in replays]),
            "in_scope_accuracy": right[:, is_in].mean(axis=1),
            "coverage": 1 - rejected.mean(axis=1),
            "accuracy": right.mean(axis=1),
        }
    at_most = {"mean_cost": float(np.quantile(metrics["mean_cost"], rng.uniform(0.05, 0.6))) + 1e-9}
    at_least = {"coverage": float(rng.uniform(0, 0.8)), "in_scope_accuracy": float(rng.uniform(0, 0.5))}
    bounds = {"at_most": at_most, "at_least": at_least, "cost_matrix": frame}
    for goal in (
        Goal(minimize="mean_cost", at_least=at_least, cost_matrix=frame),
        Goal(maximize="accuracy", **bounds),
        Goal(maximize="coverage", **bounds),
    ):
        allowed = np.all([metrics[name] >= least for name, least in goal.at_least.items()], axis=0)
        for name, most in goal.at_most.items():
            allowed &= metrics[name] <= most
        values = np.where(allowed, goal.sign * metrics[goal.metric], -np.inf)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("cascade_lab.thresholds.search._LINES", 5)  # so that it looks between them
            if values.max() == -np.inf:
                with pytest.raises(InfeasibleError):
                    choose(run, goal)
                continue
            choice = choose(run, goal)
        assert goal.sign * choice.metrics[goal.metric] == pytest.approx(values.max(), abs=1e-9)
        assert choice.metrics["mean_cost"] == pytest.approx(cost_of(frame, run.replay(choice.thresholds)), abs=1e-9)


def test_three_thresholds_have_the_cost_that_they_say(tmp_path):
    run = random_run(tmp_path / "r", n=60, n_gates=2, seed=5)
    frame = random_costs(run.spec, 5)
    choice = choose(run, Goal(minimize="mean_cost", cost_matrix=frame))
    assert choice.metrics["mean_cost"] == pytest.approx(cost_of(frame, run.replay(choice.thresholds)), abs=1e-9)
    rng = np.random.default_rng(0)
    others = [run.replay(dict(zip(run.spec.thresholds, rng.random(3), strict=True))) for _ in range(60)]
    assert choice.metrics["mean_cost"] <= min(cost_of(frame, replay) for replay in others) + 1e-9


@pytest.mark.parametrize("options", [{}, {"prevalence": 0.1}, {"at_least": {"in_scope_accuracy": 0.3}}], ids=str)
def test_a_matrix_of_the_outcomes_costs_does_what_these_costs_do(tmp_path, options):
    """Thresholds, metrics, cross-validation, the test run, thresholds per label and other prevalences."""
    run, test = (labels_differ(tmp_path / name, name, seed=seed, n=120) for name, seed in (("run", 2), ("test", 4)))
    matrix = outcome_cost_matrix(run.spec, NOT_NEGATIVE)
    goals = [
        Goal(minimize="mean_cost", **kind, **options) for kind in ({"costs": NOT_NEGATIVE}, {"cost_matrix": matrix})
    ]
    a, b = (tune(run, goal, test=test, by_label=True, n_resamples=30, n_repeats=1) for goal in goals)
    assert a.choice.thresholds == b.choice.thresholds
    assert a.per_label.min_probabilities == b.per_label.min_probabilities
    for name in ("comparison", "cross_validation"):
        pd.testing.assert_frame_equal(getattr(a, name), getattr(b, name), atol=0.005)
    assert b.metrics["test"].to_dict() == pytest.approx(a.metrics["test"].to_dict())
    assert {n: i.low for n, i in a.intervals.items()} == pytest.approx({n: i.low for n, i in b.intervals.items()})
    tables = [choose_by_prevalence(run, goal, [0.1, 0.5]) for goal in goals]
    pd.testing.assert_frame_equal(*tables)


def test_the_mean_cost_is_the_confusion_matrix_times_the_costs(tmp_path):
    """On the tuning set, on each half and on another run, after the file is written and read."""
    run, test = (labels_differ(tmp_path / name, name, seed=seed, n=150) for name, seed in (("run", 2), ("test", 4)))
    frame = random_costs(run.spec, 7)
    tuning = tune(run, Goal(minimize="mean_cost", cost_matrix=frame), test=test, n_resamples=20, n_repeats=1)
    tuning.write(tmp_path / "t.toml")
    spec = CascadeSpec.read(tmp_path / "t.toml")
    labels = list(run.spec.labels)

    def mean_cost(run):
        predictions = run.with_spec(spec).predictions
        counts = confusion_matrix(predictions["label"], predictions["predicted"], labels=labels)
        return (counts * frame.loc[labels, labels].to_numpy()).sum() / counts.sum()

    assert spec.tuned_on["figures"]["mean_cost"] == pytest.approx(mean_cost(run), abs=1e-9)
    assert tuning.metrics.loc["mean_cost", "test"] == pytest.approx(mean_cost(test), abs=1e-9)
    written = CostMatrix.from_lines(spec.tuned_on["cost_matrix"]).frame()
    assert written.loc[labels, labels].equals(frame.loc[labels, labels])
    served = test.with_spec(spec).write(tmp_path / "served")
    table = tuning_origin(Run.read(served.directory)).frame()
    assert table.loc["mean_cost", ("on this set", "value")] == pytest.approx(mean_cost(test), abs=1e-9)
    assert table.loc["mean_cost", ("on the tuning set", "value")] == pytest.approx(mean_cost(run), abs=1e-9)
    damaged = {**spec.tuned_on, "cost_matrix": [*spec.tuned_on["cost_matrix"][:-1], "oos0,1"]}
    replace(spec, tuned_on=damaged).write(tmp_path / "damaged.toml")
    with pytest.raises(SpecError, match=r"tuned_on\.cost_matrix: the row of .* or delete the table"):
        CascadeSpec.read(tmp_path / "damaged.toml")


def test_intervals_of_the_mean_cost_are_those_of_resampled_texts(tmp_path):
    """Their width is that of numpy's bootstrap of the texts' costs, also where texts repeat."""
    run = random_run(tmp_path / "r", n=400, seed=3)
    frame = random_costs(run.spec, 3)
    matrix, predictions = CostMatrix.from_frame(frame), run.predictions
    cost = np.array([frame.loc[y, x] for y, x in zip(predictions["label"], predictions["predicted"], strict=True)])
    for groups in (None, np.arange(400) // 4):
        found = outcome_intervals(run_codes(run, matrix), ["mean_cost"], costs=matrix, groups=groups)["mean_cost"]
        assert found.value == pytest.approx(cost.mean(), abs=1e-9)
        draws = resample_counts(400, groups=groups, n_resamples=2000, seed=1)
        spread = 1.96 * np.std((draws @ cost) / draws.sum(axis=1))
        assert (found.high - found.low) / 2 == pytest.approx(spread, rel=0.12)


@pytest.mark.parametrize("cost", [0.1, 0.25, 0.4])
def test_the_best_minimum_probability_is_that_of_chows_rule(cost):
    """Where probabilities are calibrated, a text is rejected if its probability is below 1 - cost (Chow 1970).

    A wrong label costs 1 and to reject costs `cost`, whatever the text; 40,000 texts of three labels.
    """
    rng, n = np.random.default_rng(1), 40_000
    spec = random_spec(n_gates=0, n_labels=3)
    probabilities = rng.dirichlet([0.6, 0.6, 0.6], n)
    y_true = np.array(spec.last.labels)[(rng.random(n)[:, None] > probabilities.cumsum(axis=1)).sum(axis=1).clip(0, 2)]
    texts = [f"text {i}" for i in range(n)]
    ids = [f"{i}" for i in range(n)]
    examples = pd.DataFrame({"example_id": ids, "text": texts, "text_b": None, "label": y_true})
    run = memory_run(spec, examples, {"last": np.log(probabilities + 1e-12)})
    frame = outcome_cost_matrix(spec, {"wrong class": 1, "false reject": cost, "false accept": 1})
    choice = choose(run, Goal(minimize="mean_cost", cost_matrix=frame))
    assert choice.thresholds["last"] == pytest.approx(1 - cost, abs=0.03)
    at_chow = cost_of(frame, run.replay({"last": 1 - cost}))
    assert at_chow - 0.002 <= choice.metrics["mean_cost"] <= at_chow


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        (["", "  "], r"has no costs; give a line of predicted labels"),
        (["true;pay;oos", "pay;0;1", "oos;5;0"], r"has no costs; .* with commas between the cells"),
        (["true,pay,oos", "pay,0,1e-320", "oos,0,0"], r"all costs are 0, so no thresholds"),
        (["true,pay,oos", "pay,0,1"], r"'oos' has no row; add it"),
        (["true,pay", "pay,0", "oos,1"], r"'oos' has no column; add it"),
        (["true,pay,oos", "pay,0,1", "oos,5"], r"the row of 'oos' has 1 costs, for 2 columns"),
        (["true,pay,oos", "pay,0,1", "oos,5,"], r"the cost of answering 'oos' for 'oos' is empty; give a number"),
        (["true,pay,oos", "pay,0,1", "oos,5,zero"], r"the cost of answering 'oos' for 'oos' is 'zero'; give a number"),
        (["true,pay,oos", "pay,0,-1", "oos,5,0"], r".*answering 'oos' for 'pay' is -1\.0; .* not negative"),
        (["true,pay,oos", "pay,0,nan", "oos,5,0"], r".*answering 'oos' for 'pay' is nan; .* not negative"),
        (["true,pay,oos", "pay,0,inf", "oos,5,0"], r".*answering 'oos' for 'pay' is inf; .* not negative"),
        (["true,pay,pay", "pay,0,1", "oos,5,0"], r"'pay' has more than one column; leave one"),
        (["true,pay,oos", "pay,0,1", "pay,5,0", "oos,1,0"], r"'pay' has more than one row; leave one"),
        (["true,pay,", "pay,0,1", ",5,0"], r"a row has no label; name it"),
        (["true,pay,oos", "pay,2,2", "oos,2,2"], r"all costs are 2, so no thresholds are better"),
        (['true,"pay,oos', "pay,0,1"], r"cannot be read: unexpected end of data; give csv"),
    ],
)
def test_matrices_that_are_refused(tmp_path, lines, message):
    path = tmp_path / "costs.csv"
    path.write_text("\n".join(lines))
    with pytest.raises(GoalError, match=rf"costs\.csv: {message}") as error:
        CostMatrix.read(path)
    assert "\n" not in str(error.value)


def test_files_that_cannot_be_read_are_refused(tmp_path):
    with pytest.raises(GoalError, match=r"none\.csv: cannot be read: No such file"):
        CostMatrix.read(tmp_path / "none.csv")
    (tmp_path / "latin.csv").write_bytes("label,\xe9\n\xe9,1".encode("latin-1"))
    with pytest.raises(GoalError, match=r"latin\.csv: cannot be read: .* give a csv file in UTF-8"):
        CostMatrix.read(tmp_path / "latin.csv")


def test_a_matrix_has_the_labels_of_the_cascade(tmp_path):
    run = random_run(tmp_path / "r", n=40)
    frame = random_costs(run.spec, 1)
    few = Goal(minimize="mean_cost", cost_matrix=frame.drop("label1").drop(columns="label1"))
    with pytest.raises(GoalError, match="cost_matrix: 'label1' has no row and no column; add them"):
        tune(run, few)
    with pytest.raises(GoalError, match="cost_matrix: 'label1' has no row and no column; add them"):
        choose(run, few)
    other = frame.rename(index={"label1": "labell1"}, columns={"label1": "labell1"})
    more = pd.concat([frame, other.loc[["labell1"]]]).assign(labell1=1.0).fillna(1.0)
    with pytest.raises(GoalError, match="the cascade cannot answer 'labell1'; did you mean 'label1'"):
        tune(run, Goal(minimize="mean_cost", cost_matrix=more))
    with pytest.raises(GoalError, match=r"leave out costs \(--cost\) or cost_matrix \(--cost-matrix\)"):
        Goal(minimize="mean_cost", cost_matrix=frame, costs={"false accept": 1})
    assert str(Goal(minimize="mean_cost", cost_matrix=frame)) == "minimize mean_cost, costs of 5 labels"
    assert Goal(minimize="mean_cost", cost_matrix=frame) == Goal(minimize="mean_cost", cost_matrix=frame.copy())


def test_labels_with_commas_and_costs_with_many_decimals_survive_a_file(tmp_path):
    labels = ["a, b", 'say "c"', "oos"]
    matrix = CostMatrix.from_frame(pd.DataFrame(np.random.default_rng(0).random((3, 3)) / 3, labels, labels))
    (tmp_path / "costs.csv").write_text("\ufeff" + "\r\n".join(matrix.lines()), encoding="utf-8")
    assert CostMatrix.read(tmp_path / "costs.csv") == matrix
    large = CostMatrix.from_frame(pd.DataFrame([[0, 3e12], [1e12, 0]], ["a", "b"], ["a", "b"]))
    assert large.of(["a", "b"], ["b", "a"]) == pytest.approx([3e12, 1e12])


def test_sums_of_costs_do_not_depend_on_the_order_of_the_texts():
    """So equal decisions have equal costs to the last bit, and ties are ties."""
    rng = np.random.default_rng(0)
    matrix = CostMatrix(("a", "b"), ((0.1, 0.7), (1 / 3, 0.2)))
    scope = LabelScope(("a",), ("b",))
    codes = text_codes(scope, rng.choice(["a", "b"], 5000), rng.choice(["a", "b"], 5000), matrix)
    sums = {tuple(count_codes(rng.permutation(codes), costs=matrix)) for _ in range(20)}
    assert len(sums) == 1


def test_a_grid_takes_the_costs_of_another_goal(tmp_path):
    run = random_run(tmp_path / "r", n=50, seed=2)
    grid = ThresholdGrid.from_run(run)
    for seed in (1, 2):
        goal = Goal(minimize="mean_cost", cost_matrix=random_costs(run.spec, seed))
        priced = grid.with_costs(goal.used_costs)
        assert priced.with_costs(goal.used_costs) is priced
        again = choose(run, goal, grid=grid.with_costs(goal.used_costs).with_costs(Goal("accuracy").used_costs))
        assert again.thresholds == choose(run, goal).thresholds
        assert again.counts.tolist() == choose(run, goal).counts.tolist()
        assert choose(run, Goal("accuracy"), grid=priced).thresholds == choose(run, Goal("accuracy")).thresholds


def test_tune_reads_a_matrix_and_refuses_others_in_one_line(tmp_path, monkeypatch):
    monkeypatch.setattr(thresholds, "tune", partial(thresholds.tune, n_resamples=10, n_repeats=1))
    run = random_run(tmp_path / "run", n=150, seed=4)
    costs, output = tmp_path / "costs.csv", tmp_path / "t.toml"
    frame = random_costs(run.spec, 4)

    def tune_with(*options):
        arguments = ["tune", run.directory, "--minimize", "mean_cost", "--cost-matrix", costs, "--output", output]
        return CliRunner().invoke(app, [str(argument) for argument in (*arguments, "--write-anyway", *options)])

    frame.to_csv(costs)
    bounds = ["--at-least", "coverage=0.4", "--at-least", "in_scope_accuracy=0.3", "--at-most", "mean_cost=5"]
    result = tune_with(*bounds)
    assert result.exit_code == 0, result.output
    spec = CascadeSpec.read(output)
    assert f"{cost_of(frame, run.replay(spec.thresholds)):.4f}" in result.output
    assert spec.tuned_on["figures"]["coverage"] >= 0.4
    assert "goal: minimize mean_cost, coverage at least 0.4, in_scope_accuracy at least 0.3" in result.output
    output.unlink()
    for table, options, message in (
        (frame, ["--cost", "false accept=5"], "leave out costs (--cost) or cost_matrix (--cost-matrix)"),
        (frame.drop(columns="label0"), [], "'label0' has no column; add it"),
        (frame.drop(columns="oos0").drop("oos0"), [], "'oos0' has no row and no column; add them"),
        (frame.replace(0, np.nan), [], "is empty; give a number"),
        (-frame, [], "give a number that is not negative"),
    ):
        table.to_csv(costs)
        refused = tune_with(*options)
        assert refused.exit_code == 2
        assert message in refused.output
        assert len(refused.output.strip().splitlines()) == 1
        assert not output.exists()

"""Several runs against the first one: by hand, in the case of two, with other texts and labels, and by simulation."""

from __future__ import annotations

import json

import matplotlib.pyplot as plt
import nbformat
import numpy as np
import pandas as pd
import pytest
from helpers import GATE, HOSTILE, one_stage_run, perturbed_run, random_run, run_of_probabilities
from test_comparison_display import assert_inside
from typer.testing import CliRunner

from cascade_lab import ComparisonDisplay, LeaderboardDisplay, Run
from cascade_lab.analysis import compare, compare_many, paired_metrics
from cascade_lab.analysis.many_runs import FIRST, HIGHER, LOWER, NO_TEST, NOT_DECIDED
from cascade_lab.analysis.paired import holm, holm_over_runs, mcnemar, wins_and_losses
from cascade_lab.cli import app
from cascade_lab.exceptions import RunError
from cascade_lab.reporting.report import write_report
from cascade_lab.reporting.verify import verify_report

INTENT = {"name": "intent", "labels": ["a", "b"]}


def run_right_on(right: list[bool], name: str) -> Run:
    """Return a run of texts with true label a, each predicted rightly, or else as b."""
    p = {"gate": [[0.1, 0.9]] * len(right), "intent": [[0.9, 0.1] if hit else [0.1, 0.9] for hit in right]}
    run = run_of_probabilities([GATE, INTENT], ["a"] * len(right), p, name=name)
    return Run(run.manifest, run.examples, {s: run.scores(s) for s in p}, run.predictions, run.timings, name=name)


@pytest.fixture(scope="module")
def by_hand():
    """Five runs of 20 texts, the first of which is right on 10 of them.

    ======  ====  ======  ======  ============================  ========================  ===========
    run     wins  losses  p       p in order, times tests left  p after Holm's correction  decision
    ======  ====  ======  ======  ============================  ========================  ===========
    up         9       0  0.0039  0.0039 * 4                    0.0156                    higher
    down       0       8  0.0078  0.0078 * 3                    0.0234                    lower
    close      6       0  0.0312  0.0312 * 2                    0.0625                    not decided
    same       0       0  1       1 * 1                         1                         not decided
    ======  ====  ======  ======  ============================  ========================  ===========
    """
    first = [True] * 10 + [False] * 10
    rights = {
        "first": first,
        "down": [False] * 8 + [True] * 2 + [False] * 10,
        "up": [True] * 19 + [False],
        "same": first,
        "close": [True] * 16 + [False] * 4,
    }
    return compare_many([run_right_on(right, f"runs/{name}") for name, right in rights.items()], n_resamples=50)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("many")
    a = random_run(folder / "a", n=300, n_gates=2, n_labels=5, seed=1, skill=2.0)
    perturbed_run(a, folder / "b", thresholds={"gate0": 0.4, "last": 0.3})
    perturbed_run(a, folder / "deeper" / "b", noise=0.2)
    perturbed_run(a, folder / "no-shadow", noise=0.5, shadow=False)
    return folder


NAMES = ("a", "b", "deeper/b", "no-shadow")


@pytest.fixture(scope="module")
def runs(folder):
    return [Run.read(folder / name) for name in NAMES]


def test_five_runs_by_hand(by_hand):
    board = by_hand.leaderboard()
    assert board.index.tolist() == ["up", "close", "first", "same", "down"]
    assert board["accuracy"].tolist() == pytest.approx([0.95, 0.8, 0.5, 0.5, 0.1])
    assert board["difference"].dropna().tolist() == pytest.approx([0.45, 0.3, 0, -0.4])
    assert board["p_value"].dropna().tolist() == pytest.approx([2 / 2**9, 2 / 2**6, 1, 2 / 2**8])
    assert board["p_holm"].dropna().tolist() == pytest.approx([8 / 2**9, 4 / 2**6, 1, 6 / 2**8])
    assert board["decision"].tolist() == [HIGHER, NOT_DECIDED, FIRST, NOT_DECIDED, LOWER]
    assert by_hand.verdict == (
        "up is right more often than first; down is right less often than first (McNemar's exact test, p < 0.05 after "
        "Holm's correction for 4 runs). These texts do not decide about close and same."
    )
    assert by_hand.summary()[-1].startswith("Advice: prefer up to first")
    assert by_hand.leaderboard("risk")["decision"].tolist() == [NO_TEST] * 2 + [FIRST] + [NO_TEST] * 2
    assert by_hand.leaderboard("risk").index.tolist() == board.index.tolist(), "the lowest risk first"
    assert by_hand.values().loc["up", "accuracy"] == pytest.approx(0.95)
    with pytest.raises(RunError, match="runs are not compared by 'acuracy'; did you mean 'accuracy'"):
        by_hand.leaderboard("acuracy")


def test_one_run_of_several_is_looked_at_with_the_corrected_p(by_hand):
    assert by_hand.comparison() is by_hand.comparison("up")
    close = by_hand.comparison("close")
    assert not close.is_decided, "p is 0.03, but one of four runs"
    assert "p = 0.062 after Holm's correction for 4 runs, not below 0.05" in close.verdict
    assert "does not decide between A and B" in close.summary()[-1]
    with pytest.raises(RunError, match="no run that is compared with first is named 'closed'; did you mean 'close'"):
        by_hand.comparison("closed")


def test_where_no_run_differs_the_verdict_names_the_lowest_p():
    rights = [[True] * 10 + [False] * 10, [True] * 12 + [False] * 8, [True] * 9 + [False] * 11]
    many = compare_many([run_right_on(right, name) for right, name in zip(rights, "abc", strict=True)], n_resamples=50)
    assert many.verdict == (
        "These texts do not show that any of the 2 runs is right more or less often than a (McNemar's exact test: the "
        "lowest p is 1 after Holm's correction for 2 runs, not below 0.05)."
    )
    assert "gives no reason to replace a" in many.summary()[-1]


def test_two_runs_are_the_comparison_of_the_two(runs):
    many, two = compare_many(runs[:2], n_resamples=50), compare(*runs[:2], n_resamples=50)
    (comparison,) = many.comparisons
    for name in ("metrics", "pairs", "labels", "slices", "latency"):
        pd.testing.assert_frame_equal(getattr(comparison, name), getattr(two, name))
    assert (comparison.runs, comparison.decomposition) == (two.runs, two.decomposition)
    assert many.verdict == two.verdict
    assert many.summary() == two.summary()


def test_each_run_is_compared_with_the_first_one(runs, folder):
    many = compare_many(runs, n_resamples=50)
    assert many.names == ("a", f"{folder.name}/b", "deeper/b", "no-shadow")
    for name, run in zip(many.names[1:], runs[1:], strict=True):
        own = compare(runs[0], run, n_resamples=50).metrics
        pd.testing.assert_frame_equal(many.metrics.loc[name].drop(columns="p_holm"), own.drop(columns="p_holm"))
        assert (many.metrics.loc[name, "p_holm"].dropna() >= own["p_value"].dropna()).all()
    assert many.comparison("no-shadow").decomposition is None
    assert many.comparison("deeper/b").decomposition is not None


def test_texts_that_a_run_lacks_are_left_out_of_all_comparisons(runs, tmp_path):
    part = perturbed_run(runs[0], tmp_path / "part", order=np.arange(50, 300))
    few = perturbed_run(runs[0], tmp_path / "few", order=np.arange(0, 200), noise=0.3)
    unlabelled = runs[1].examples.assign(label=runs[1].examples["label"].mask(np.arange(300) == 60))
    third = perturbed_run(runs[1], tmp_path / "third", noise=0, examples=unlabelled)
    many = compare_many([runs[0], part, few, third], n_resamples=50)
    assert many.n_examples == 149
    assert many.runs_table()["n_alone"].to_dict() == {"a": 151, "part": 101, "few": 51, "third": 150}
    assert many.notes == [
        "Texts that are not in all runs are left out: 151 of a, 101 of part, 51 of few, 150 of third."
    ]
    rows = np.flatnonzero((np.arange(300) >= 50) & (np.arange(300) < 200) & (np.arange(300) != 60))
    of_first = runs[0].select(rows).metrics["end_to_end"]
    for comparison in many.comparisons:
        assert comparison.metrics.loc["accuracy", "a"] == pytest.approx(of_first["accuracy"])
        assert comparison.decomposition.accuracies["AA"] == pytest.approx(of_first["accuracy"])
        own = [compare(runs[0], other, n_resamples=2).latency for other in (part, few, third)]
    for comparison, latency in zip(many.comparisons, own, strict=True):
        pd.testing.assert_frame_equal(comparison.latency, latency)


def test_a_label_that_rejects_in_one_run_rejects_in_all(tmp_path):
    a = random_run(tmp_path / "a", n=200, n_labels=6, seed=3)
    one = one_stage_run(a, tmp_path / "one")
    other = one_stage_run(a, tmp_path / "other", seed=6)
    many = compare_many([one, other, a], n_resamples=50)
    assert many.metrics["a"].unstack("metric").nunique().eq(1).all(), "the first run has one value of each metric"
    out_of_scope = a.examples["label"] == "oos0"
    right = one.predictions["predicted"] == one.predictions["label"]
    assert many.leaderboard("reject_recall").loc["one", "reject_recall"] == pytest.approx(right[out_of_scope].mean())
    assert [note.split("'")[0] for note in many.notes] == ["one", "other"]
    assert "as in a. Add" in many.notes[0]


def test_a_run_that_was_tuned_on_these_texts_is_named(runs):
    manifest = {**runs[1].manifest, "evalset": {**runs[1].manifest["evalset"], "sha256": "x"}}
    spec = runs[1].spec.to_dict() | {
        "tuned_on": {"run_id": "y", "goal": "g", "evalset": {"n_examples": 1, "sha256": "x"}}
    }
    scores = {stage.name: runs[1].scores(stage.name) for stage in runs[1].spec.stages}
    manifest |= {"cascade": spec}
    tuned = Run(manifest, runs[1].examples, scores, runs[1].predictions, runs[1].timings, name="tuned")
    many = compare_many([runs[0], tuned, runs[2]], n_resamples=2)
    assert many.notes[0].startswith("Warning: the thresholds of tuned were chosen on these same texts")
    assert many.notes[0] in many.summary()
    warning = compare(runs[0], tuned, n_resamples=2).summary()
    assert any(sentence.startswith("Warning: the thresholds of B were chosen") for sentence in warning)


def test_runs_that_cannot_be_compared_are_refused(runs, tmp_path):
    a, b = runs[:2]
    strangers = a.examples.assign(example_id="no-" + a.examples["example_id"])
    other_label = a.examples.assign(label=a.examples["label"].where(a.examples.index != 7, "oos0"))
    other_label.loc[7, "label"] = "label0" if a.examples.loc[7, "label"] != "label0" else "label1"
    halves = [perturbed_run(a, tmp_path / f"{n}", order=np.arange(n, n + 100)) for n in (0, 100)]
    for wrong, message in (
        ([a], "needs two runs or more"),
        ([a, b, a], f"{a.name}: is given twice"),
        ([a, b, b], f"{b.name}: is given twice"),
        ([a, b, perturbed_run(a, tmp_path / "s", examples=strangers)], "s: no labelled example_id in common"),
        ([a, *halves], "no labelled example_id is in all 3 runs"),
        ([a, b, perturbed_run(a, tmp_path / "l", examples=other_label)], "l: example_id '7' has another label in each"),
        (
            [
                a,
                b,
                Run.from_logits(
                    a.spec, a.examples.assign(label=None), {s.name: a.scores(s.name).logits for s in a.spec.stages}
                ),
            ],
            "no example has a label",
        ),
    ):
        with pytest.raises(RunError) as error:
            compare_many(wrong, n_resamples=2)
        assert message in str(error.value)
        assert "\n" not in str(error.value)


def test_equal_runs_seem_to_differ_in_at_most_5_percent_of_eval_sets():
    """Five runs that are right equally often, on texts of which some are harder, in 1,000 eval sets of 150 texts."""
    rng, n_false_alarms, n_without_correction = np.random.default_rng(0), 0, 0
    for _ in range(1000):
        right = rng.random((5, 150)) < rng.uniform(0.4, 1, 150)
        p_values = [mcnemar(*wins_and_losses(one.astype(int) - right[0])) for one in right[1:]]
        n_false_alarms += holm(np.array(p_values)).min() < 0.05
        n_without_correction += min(p_values) < 0.05
    assert n_false_alarms / 1000 <= 0.05
    assert n_without_correction / 1000 > 0.075, "without the correction there are more"


@pytest.mark.slow
def test_equal_runs_seem_to_differ_in_at_most_5_percent_of_eval_sets_for_each_metric_with_a_test():
    rng, n_false_alarms = np.random.default_rng(1), {}
    labels = np.array(["x", "y", "z", "oos"], dtype=object)
    for seed in range(300):
        truth = rng.integers(0, 4, 200)
        hard = rng.random(200) < 0.5
        runs = [np.where(hard & (rng.random(200) < 0.6), rng.integers(0, 4, 200), truth) for _ in range(5)]
        tables = [
            paired_metrics(labels[truth], labels[runs[0]], labels[other], {"oos"}, n_resamples=2, seed=seed)
            for other in runs[1:]
        ]
        lowest = pd.concat(holm_over_runs(tables), axis=1)["p_holm"].min(axis=1).dropna()
        for metric, p in lowest.items():
            n_false_alarms[metric] = n_false_alarms.get(metric, 0) + (p < 0.05)
    assert sorted(n_false_alarms) == ["accuracy", "coverage", "in_scope_accuracy", "reject_recall"]
    assert max(n_false_alarms.values()) / 300 <= 0.05


def test_the_picture_colours_what_is_decided_and_is_legible(by_hand, runs):
    display = LeaderboardDisplay(by_hand).plot()
    faces = {
        line.get_ydata()[0]: line.get_markerfacecolor() for line in display.ax_.lines if len(line.get_xdata()) == 1
    }
    decided, undecided = [faces[row] for row in (0, 4)], [faces[row] for row in (1, 3)]
    assert len({*decided}) == 2
    assert {*undecided} == {"white"}
    points = [line.get_xdata()[0] for line in display.ax_.lines if len(line.get_xdata()) == 1]
    assert points == pytest.approx([45, 30, 0, 0, -40])
    assert_inside(display.figure_)
    assert_inside(ComparisonDisplay(by_hand.comparison()).plot().figure_)
    plt.close("all")
    hostile = [run_right_on([True] * n + [False] * 9, name) for n, name in enumerate(HOSTILE, 1)]
    hostile = [run.select(np.arange(10)) for run in hostile]
    for compared, metric in ((runs, "accuracy"), (runs[:2], "risk"), (hostile, "reject_recall")):
        display = LeaderboardDisplay.from_runs(compared, metric=metric, n_resamples=20)
        assert display.plot() is display
        assert display.frame().columns[0] == metric
        assert_inside(display.figure_)
        plt.close(display.figure_)


def test_the_command_prints_a_leaderboard_and_writes_all_numbers_and_a_picture(folder, runs, tmp_path):
    arguments = ["compare", *(str(folder / name) for name in NAMES)]
    outputs = ["--output", str(tmp_path / "c.json"), "--picture", str(tmp_path / "c.png")]
    result = CliRunner().invoke(app, [*arguments, *outputs], env={"COLUMNS": "80"})
    assert result.exit_code == 0, result.output
    many = compare_many(runs)
    words = " ".join(result.output.split())
    assert words.startswith(many.verdict)
    assert "3 runs against a, on the 300 texts that all of them have" in result.output
    for row in many.leaderboard().dropna().itertuples():
        assert f"{100 * row.difference:+.2f}" in result.output
    assert "The intervals are not corrected" in words
    assert max(map(len, result.output.replace(str(tmp_path), "").splitlines())) <= 80
    assert (tmp_path / "c.png").read_bytes().startswith(b"\x89PNG")
    content = json.loads((tmp_path / "c.json").read_text(encoding="utf-8"))
    assert [run["short_name"] for run in content["runs"]] == list(many.names)
    assert [row["run"] for row in content["leaderboard"]] == many.leaderboard().index.tolist()
    for name, comparison in zip(many.names[1:], content["comparisons"], strict=True):
        metrics = pd.DataFrame(comparison["metrics"]).set_index("metric").astype(float)
        pd.testing.assert_frame_equal(metrics, many.metrics.loc[name], check_names=False)
        assert {"labels", "slices", "changes", "decomposition", "latency"} <= comparison.keys()


def test_a_report_takes_a_list_of_runs_and_is_verified_with_it(folder, tmp_path):
    parameters = 'run_a = "../runs/a"\nother_runs = ["../runs/b"]'
    read = (
        "from cascade_lab import Run\nprint(*(f'{run}: {len(Run.read(run).examples)}' for run in [run_a, *other_runs]))"
    )
    cells = [
        nbformat.v4.new_code_cell(parameters, metadata={"tags": ["parameters"]}),
        nbformat.v4.new_code_cell(read),
    ]
    notebook = tmp_path / "small.ipynb"
    nbformat.write(nbformat.v4.new_notebook(cells=cells), notebook)
    others = [str(folder / name) for name in NAMES[1:3]]
    options = {"notebook": notebook, "parameters": {"other_runs": others}}
    report = write_report(Run.read(folder / "a"), tmp_path / "report.html", **options)
    assert "../runs/other_runs_1: 300 ../runs/other_runs_2: 300" in report.read_text(encoding="utf-8")
    record = json.loads(report.with_suffix(".json").read_text(encoding="utf-8"))
    assert list(record["runs"]) == ["run_a", "other_runs_1", "other_runs_2"]
    assert verify_report(report, Run.read(folder / "a"), **options).holds
    with pytest.raises(RunError, match="read another run or file as other_runs; give it: -p other_runs=PATH"):
        verify_report(report, Run.read(folder / "a"), notebook=notebook)
    for given in ({}, {"other_runs": ["none"]}):
        with pytest.raises(RunError, match=r"give it: -p other_runs=RUN|none: no such run directory"):
            write_report(Run.read(folder / "a"), tmp_path / "no.html", notebook=notebook, parameters=given)

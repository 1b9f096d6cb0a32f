"""Deferral stages: a cascade worked by hand, the file, what a threshold costs, and whether confidence is enough."""

from __future__ import annotations

from itertools import product
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from helpers import memory_run, run_of_probabilities

from cascade_lab import CascadeSpec, Run, StageSpec
from cascade_lab.analysis import (
    blame,
    confusion,
    deferrals,
    error_summary,
    flow,
    metric_intervals,
    near_threshold,
    oracle_ladder,
    run_summary,
)
from cascade_lab.analysis.calibration import calibration_metrics
from cascade_lab.analysis.metrics import in_scope_predictions, stage_metrics
from cascade_lab.displays import CostFrontDisplay
from cascade_lab.exceptions import GoalError, RunError, SpecError
from cascade_lab.thresholds import Goal, ThresholdGrid, choose, compare_deferral_rules, cost_front, cost_summary, sweep

STAGES = [
    {"name": "small", "labels": ["pay", "play"], "role": "deferral", "threshold": 0.8},
    {"name": "gate", "labels": ["oos", "in"], "pass_label": "in", "threshold": 0.5},
    {"name": "large", "labels": ["pay", "play", "lost"]},
]
LABELS = ["pay", "play", "lost", "pay", "play", "oos", "oos", "play", "lost"]
SMALL = [[0.9, 0.1], [0.85, 0.15], [0.81, 0.19], [0.6, 0.4], [0.55, 0.45], [0.7, 0.3], [0.95, 0.05], [0.3, 0.7]]
SMALL = [*SMALL, [0.51, 0.49]]
GATE = [[0.2, 0.8], [0.1, 0.9], [0.3, 0.7], [0.1, 0.9], [0.4, 0.6], [0.9, 0.1], [0.9, 0.1], [0.8, 0.2], [0.2, 0.8]]
LARGE = [[0.8, 0.1, 0.1], [0.1, 0.8, 0.1], [0.6, 0.2, 0.2], [0.7, 0.2, 0.1], [0.1, 0.7, 0.2], [0.4, 0.3, 0.3]]
LARGE = [*LARGE, [0.4, 0.3, 0.3], [0.1, 0.8, 0.1], [0.5, 0.3, 0.2]]


@pytest.fixture
def run() -> Run:
    return run_of_probabilities(STAGES, LABELS, {"small": SMALL, "gate": GATE, "large": LARGE})


def test_nine_texts_worked_by_hand(run: Run):
    """
    text | true | small, 0.8 | gate  | large | answer | kind
    t1   | pay  | pay  .90   | in    | pay   | pay    | right answer
    t2   | play | pay  .85   | in    | play  | pay    | recoverable overconfident answer
    t3   | lost | pay  .81   | in    | pay   | pay    | unrecoverable overconfident answer
    t4   | pay  | pay  .60   | in    | pay   | pay    | needless deferral
    t5   | play | pay  .55   | in    | play  | play   | useful deferral
    t6   | oos  | pay  .70   | oos   | pay   | oos    | useful deferral
    t7   | oos  | pay  .95   | oos   | pay   | pay    | recoverable overconfident answer
    t8   | play | play .70   | oos   | play  | oos    | harmful deferral; the gate's recoverable reject
    t9   | lost | pay  .51   | in    | pay   | pay    | vain deferral; the wrong class of large
    """
    predictions = run.predictions
    assert predictions["predicted"].tolist() == ["pay", "pay", "pay", "pay", "play", "oos", "pay", "oos", "pay"]
    assert predictions["decided_by"].tolist() == [
        "small", "small", "small", "large", "large", "gate", "small", "gate", "large",
    ]  # fmt: skip
    assert predictions["confidence"].round(2).tolist() == [0.9, 0.85, 0.81, 0.7, 0.7, 0.1, 0.95, 0.2, 0.5]
    errors = blame(run)[["example_id", "fault", "kind", "would_become"]]
    assert [tuple(row) for row in errors.to_numpy()] == [
        ("t2", "small", "recoverable overconfident answer", "play"),
        ("t3", "small", "unrecoverable overconfident answer", "pay"),
        ("t7", "small", "recoverable overconfident answer", "oos"),
        ("t8", "gate", "recoverable reject", "play"),
        ("t9", "large", "wrong class", "play"),
    ]
    assert deferrals(run)["n_examples"].tolist() == [1, 2, 1, 2, 1, 1, 1]
    assert deferrals(run)["fraction"].sum() == pytest.approx(1)
    ladder = oracle_ladder(run)["accuracy"] * 9
    assert ladder.round(6).to_dict() == {
        "as it is": 4,
        "perfect small": 7,  # it lacks the label of t3 and t9, and defers them
        "perfect gate": 5,
        "perfect large": 5,
        "perfect rule of small": 7,  # it answers t1, t4 and t8
        "all perfect": 9,
    }
    small = stage_metrics(run, "small")
    assert (small["reach"], small["n_reached"], small["n_with_target"], small["accuracy"]) == (1.0, 9, 4, 0.25)
    assert small["answered"] == pytest.approx(4 / 9)
    assert [stage_metrics(run, name)["n_reached"] for name in ("gate", "large")] == [5, 3]
    ends = flow(run).groupby(["stage", "outcome"])["n_examples"].sum()
    assert ends["small", "goes on"] == 5
    assert ends["gate", "goes on"] == 3
    assert ends["small", "recoverable overconfident answer"] == 2


def test_thresholds_of_a_deferral_stage(run: Run):
    """At 0 the stage answers every text, at 1 none; a grid knows the counts of every threshold between."""
    assert (run.replay({"small": 0})["decided_by"] == "small").all()
    assert (run.replay({"small": 1})["decided_by"] != "small").all()
    grid = ThresholdGrid.from_run(run)
    assert grid.stages == ("small", "gate")
    table = sweep(run, "small")
    assert table["threshold"].is_monotonic_increasing
    for row in table.itertuples():
        replayed = run.replay({"small": row.threshold})
        assert row.accuracy == pytest.approx((replayed["predicted"] == replayed["label"]).mean())
        assert row.reach == pytest.approx((replayed["decided_by"] != "small").mean())
    # Chosen at the lowest threshold of these texts means that any other text is answered too.
    lowest = grid.thresholds_at([len(grid.thresholds[0]) - 1, 0])
    assert lowest == {"small": 0.0, "gate": 0.0}
    assert grid.thresholds_at([0, 0])["small"] == 1.0


def test_metrics_and_sentences(run: Run):
    """The stage's matrix has the texts that it answers, with the labels of later stages; all texts with `on="all"`."""
    matrix = confusion(run, "small")
    assert list(matrix.columns) == ["pay", "play", "lost", "oos"]
    assert matrix["pay"].to_dict() == {"pay": 1, "play": 1, "lost": 1, "oos": 1}
    assert matrix.to_numpy().sum() == 4
    assert confusion(run, "small", on="all").to_numpy().sum() == 9
    assert metric_intervals(run, "small").loc["top_1_accuracy", "value"] == 0.25
    best = in_scope_predictions(run)
    assert best.correct.tolist() == [True, False, False, True, True, False, False, True, False]
    assert best.p_gates.round(2).tolist() == [1, 1, 1, 0.9, 0.6, 0.1, 1, 0.2, 0.8]
    assert calibration_metrics(run, "small").attrs["n_out_of_scope"] == 0  # of the texts with a label of the stage
    assert any("defers 5, 1 of them needlessly" in sentence for sentence in error_summary(run))
    assert run_summary(run)
    near = near_threshold(run, "small", 1)
    assert near["example_id"].tolist() in (["t6", "t3"], ["t8", "t3"])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"threshold": None}, "stage 'small': threshold is missing"),
        ({"labels": ["pay", "plai"]}, "label 'plai' is no answer .*did you mean 'play'"),
        ({"pass_label": "pay"}, "pass_label does not belong to a deferral stage"),
        ({"min_probability": 0.0}, "min_probability does not belong to a deferral stage"),
        ({"role": "defferal"}, "role is 'defferal'; it is one of gate, deferral, final"),
        ({"role": "final"}, "every stage but the last"),
        (
            {"rejector": {"evidence": ["large.energy"], "weights": [1.0], "bias": 0.0}},
            "no stage up to this one has that name",
        ),
    ],
)
def test_a_wrong_file_is_refused(change: dict, message: str):
    small = {key: value for key, value in {**STAGES[0], **change}.items() if value is not None}
    with pytest.raises(SpecError, match=message):
        CascadeSpec.from_dict({"name": "x", "stage": [small, *STAGES[1:]]})


def test_a_deferral_stage_is_not_the_last():
    with pytest.raises(SpecError, match="no stage follows"):
        CascadeSpec.from_dict({"name": "x", "stage": [STAGES[1], STAGES[0]]})


def test_the_file_keeps_the_role(tmp_path: Path):
    spec = CascadeSpec.from_dict({"name": "x", "max_seq_length": 24, "stage": STAGES})
    spec.write(tmp_path / "cascade.toml")
    read = CascadeSpec.read(tmp_path / "cascade.toml")
    assert read.thresholds == {"small": 0.8, "gate": 0.5, "large": None}
    assert [stage.role for stage in read.stages] == ["deferral", "gate", "final"]
    assert (tmp_path / "cascade.toml").read_text().count("role") == 1
    assert read.in_scope_labels == ("pay", "play", "lost")
    assert read.labels == (*read.in_scope_labels, "oos")


def test_a_rule_of_evidence(run: Run):
    """A deferral stage's rejector is a logistic regression on logits of the stages up to it, live and in a replay."""
    rejector = {"evidence": ["small.margin"], "weights": [2.0], "bias": -1.0}
    stages = [{**STAGES[0], "rejector": rejector}, *STAGES[1:]]
    with_rule = run.with_spec(CascadeSpec.from_dict({"name": "x", "stage": stages}))
    margin = np.abs(np.diff(np.log(SMALL), axis=1))[:, 0]  # the difference of the two highest logits
    expected = 1 / (1 + np.exp(-(2 * margin - 1)))
    assert with_rule.decision("small").confidence == pytest.approx(expected, abs=1e-6)
    answered = (with_rule.predictions["decided_by"] == "small").to_numpy()
    assert (answered == (expected >= 0.8)).all()
    assert answered.any()
    assert not answered.all()


def random_deferral_run(
    n: int = 300, *, seed: int = 0, n_small: int = 1, timed: bool = True, misleading: bool = False
) -> Run:
    """Return a run of small stages before a large one, which is right more often.

    `misleading`: the small stage is sure, and wrong, of one label that the large one knows: it is not enough to look at
    its highest probability.
    """
    rng = np.random.default_rng(seed)
    labels = ["a", "b", "c"]
    y_true = rng.integers(0, 3, n)
    logits = {}
    for k, skill in enumerate([*np.linspace(1.0, 1.6, n_small), 3.0]):
        z = rng.normal(size=(n, 3))
        z[np.arange(n), y_true] += skill
        logits[f"stage{k}"] = z.astype(np.float32)
    if misleading:
        hard = rng.random(n) < 0.3
        z = logits["stage0"]
        z[hard] = rng.normal(size=(int(hard.sum()), 3)) * 0.2 - 8
        z[hard, (y_true[hard] + 1) % 3] += 6
    stages = [StageSpec(f"stage{k}", tuple(labels), role="deferral", threshold=0.7) for k in range(n_small)]
    spec = CascadeSpec("front", (*stages, StageSpec(f"stage{n_small}", tuple(labels))))
    examples = pd.DataFrame(
        {
            "example_id": [str(i) for i in range(n)],
            "text": [f"text {i}" for i in range(n)],
            "text_b": None,
            "label": np.array(labels)[y_true],
        }
    )
    run = memory_run(spec, examples, logits)
    return run if timed else Run.from_logits(spec, examples, logits)


@pytest.mark.parametrize("n_small", [1, 2])
def test_the_front_is_that_of_replays(n_small: int):
    """No replay at any pair of thresholds is both faster and more accurate than a point of the front."""
    run = random_deferral_run(40, n_small=n_small)
    ms = {f"stage{k}": 10.0**k for k in range(n_small + 1)}
    front = cost_front(run, stage_ms=ms)
    names = [f"stage{k}" for k in range(n_small)]

    def at(thresholds: dict[str, float]) -> tuple[float, float]:
        replayed = run.replay(thresholds)
        index = replayed["decided_by"].map([stage.name for stage in run.spec.stages].index)
        spent = np.cumsum(list(ms.values()))[index]
        return float(spent.mean()), float((replayed["predicted"] == replayed["label"]).mean())

    for row in front.to_dict("records"):
        assert at({name: row[name] for name in names}) == pytest.approx((row["mean_ms"], row["accuracy"]))
    assert front["mean_ms"].is_monotonic_increasing
    assert front["accuracy"].is_monotonic_increasing
    values = [np.unique(np.append(run.decision(name).confidence, 1.0)) for name in names]
    for thresholds in product(*(value[:: len(values) ** 2] for value in values)):
        mean_ms, accuracy = at(dict(zip(names, thresholds, strict=True)))
        assert ((front["mean_ms"] <= mean_ms + 1e-9) & (front["accuracy"] >= accuracy - 1e-9)).any()
    assert front.attrs["own"]["accuracy"] == pytest.approx(at({})[1])


@pytest.mark.parametrize("seed", [0, 1])
def test_the_best_thresholds_of_a_deferral_stage_and_a_gate(seed: int):
    """The search finds the best of all pairs of thresholds, with a bound or without, as replays count them."""
    rng = np.random.default_rng(seed)
    labels = rng.choice(["pay", "play", "lost", "oos"], 16)
    sizes = {"small": 2, "gate": 2, "large": 3}
    stages = STAGES if seed % 2 else [STAGES[1], STAGES[0], STAGES[2]]
    run = run_of_probabilities(
        stages, list(labels), {name: rng.dirichlet(np.full(size, 0.8), 16) + 1e-6 for name, size in sizes.items()}
    )
    pairs = product(*(np.unique(np.append(run.decision(s).confidence, [0, 1])) for s in ("small", "gate")))
    found = []
    for small, gate in pairs:
        replayed = run.replay({"small": small, "gate": gate})
        right, out = replayed["predicted"] == replayed["label"], replayed["label"] == "oos"
        found.append((right.mean(), right[out].mean()))
    for least in (0.0, 0.5):
        choice = choose(run, Goal("accuracy", at_least={"reject_recall": least}))
        assert choice.metrics["accuracy"] == pytest.approx(max(a for a, recall in found if recall >= least))
        replayed = run.replay(choice.thresholds)
        assert (replayed["predicted"] == replayed["label"]).mean() == pytest.approx(choice.metrics["accuracy"])


def test_a_bound_on_the_time_bounds_what_is_deferred():
    run = random_deferral_run(200)
    n_first, n_second = run.timings["n_examples"]
    limit = 11 / n_first + 0.4 * 11 / n_second  # a batch of each stage takes 11 ms; at most 40% may go on
    chosen = choose(run, Goal("accuracy", at_most={"mean_ms": limit})).thresholds
    table = sweep(run, "stage0")
    allowed = table[table["reach"] <= 0.4 + 1e-9]
    replayed = run.replay(chosen)
    assert (replayed["decided_by"] == "stage1").mean() <= 0.4 + 1e-9
    assert (replayed["predicted"] == replayed["label"]).mean() == pytest.approx(allowed["accuracy"].max())


def test_a_front_with_a_test_run_is_drawn():
    run, other = random_deferral_run(seed=0), random_deferral_run(seed=1)
    other.examples["text"] = [f"other {i}" for i in range(len(other.examples))]
    front = cost_front(run, test=other)
    row = front.iloc[len(front) // 2]
    replayed = other.replay({"stage0": row["stage0"]})
    assert row["test_accuracy"] == pytest.approx((replayed["predicted"] == replayed["label"]).mean())
    assert "less time than now and no less accurate" in cost_summary(front)[1]
    display = CostFrontDisplay(front).plot()
    assert display.frame() is front
    assert display.ax_.get_xlabel().startswith("predicted milliseconds")
    with pytest.raises(RunError, match="was not timed"):
        cost_front(random_deferral_run(timed=False))
    with pytest.raises(GoalError, match="stage_ms lacks stage 'stage1'"):
        cost_front(run, stage_ms={"stage0": 1.0})


def test_is_confidence_enough():
    """A learned rule wins where the small stage is sure of wrong answers of a kind that its logits show."""
    rules = compare_deferral_rules(random_deferral_run(1500, misleading=True))
    assert rules.learned_is_better
    assert rules.table.loc["learned rule", "accuracy_difference"] > 0.05
    assert rules.summary()[1].startswith("Confidence is not enough")
    run = random_deferral_run(1500, misleading=True)
    learned = run.with_spec(rules.spec)
    share = (learned.predictions["decided_by"] != "stage0").mean()
    assert share == pytest.approx(rules.deferred, abs=0.01)
    assert learned.metrics["end_to_end"]["accuracy"] > run.metrics["end_to_end"]["accuracy"] + 0.05
    # Where the stage's probabilities are those of the truth, a rule that is learned is no better.
    plain = compare_deferral_rules(random_deferral_run(1500))
    assert not plain.learned_is_better
    assert "keep the confidence" in plain.summary()[1]
    with pytest.raises(RunError, match="needs at least 20 such texts"):
        compare_deferral_rules(random_deferral_run(40))
    with pytest.raises(RunError, match="stage 'stage1' does not defer"):
        compare_deferral_rules(random_deferral_run(), "stage1")

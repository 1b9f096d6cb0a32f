"""Blame, flow, oracle ladder and counterfactual matrix: a cascade worked by hand, and random ones text by text."""

from __future__ import annotations

import itertools
from dataclasses import replace
from typing import NamedTuple

import numpy as np
import pandas as pd
import pytest
from helpers import GATE, mixed_run, random_run, run_of_probabilities
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import confusion_matrix

from cascade_lab import CascadeSpec, Run, StageSpec
from cascade_lab.analysis.errors import (
    GOES_ON,
    KINDS,
    RECOVERABLE,
    UNRECOVERABLE,
    blame,
    blame_counts,
    counterfactual_matrix,
    flow,
    oracle_ladder,
)
from cascade_lab.analysis.metrics import prediction_metrics
from cascade_lab.analysis.outcomes import ERRORS, FALSE_ACCEPT, FALSE_REJECT, WRONG_CLASS, WRONG_REJECT, outcome_counts
from cascade_lab.exceptions import RunError, SpecError


def five_texts(*, shadow=True, texts=None, labels=("a", "b", "b", "oos", "b")):
    last = {"name": "intent", "labels": ["a", "b", "c"]}
    probabilities = {
        "gate": [[0.1, 0.9], [0.6, 0.4], [0.8, 0.2], [0.3, 0.7], [0.2, 0.8]],
        "intent": [[0.8, 0.1, 0.1], [0.1, 0.7, 0.2], [0.1, 0.3, 0.6], [0.5, 0.2, 0.3], [0.1, 0.3, 0.6]],
    }
    return run_of_probabilities([GATE, last], list(labels), probabilities, shadow=shadow, texts=texts)


def test_five_texts_by_hand():
    """A gate at 0.5 and three intents; p(in), then p(a), p(b), p(c).

    ====  =====  =====  =============  ======  =======================================================================
    text  label  p(in)  intent         answer  what it is
    ====  =====  =====  =============  ======  =======================================================================
    t1    a      0.9    0.8, 0.1, 0.1  a       right
    t2    b      0.4    0.1, 0.7, 0.2  oos     a false reject of the gate; intent would answer b: recoverable
    t3    b      0.2    0.1, 0.3, 0.6  oos     a false reject of the gate; intent would answer c: unrecoverable
    t4    oos    0.7    0.5, 0.2, 0.3  a       a false accept of the gate; stopped, the answer would be oos
    t5    b      0.8    0.1, 0.3, 0.6  c       a wrong class of the intent stage; its next choice is b
    ====  =====  =====  =============  ======  =======================================================================

    One in five is right. With a perfect gate t2 and t4 are right too (3/5); with a perfect intent stage t5 (2/5), but
    not t4, because the stage has no label oos. If t2 and t3 had passed, b would have become b once and c once.
    """
    run = five_texts()
    table = blame(run)
    expected = [
        ("t2", "b", "oos", "gate", "gate", RECOVERABLE, "b"),
        ("t3", "b", "oos", "gate", "gate", UNRECOVERABLE, "c"),
        ("t4", "oos", "a", "intent", "gate", FALSE_ACCEPT, "oos"),
        ("t5", "b", "c", "intent", "intent", WRONG_CLASS, "b"),
    ]
    columns = ["example_id", "label", "predicted", "decided_by", "fault", "kind", "would_become"]
    assert list(table[columns].itertuples(index=False, name=None)) == expected
    assert table["probability"].tolist() == pytest.approx([0.6, 0.8, 0.5, 0.6])
    assert table["confidence"].tolist() == pytest.approx([0.4, 0.2, 0.5, 0.6])
    assert table["text"].tolist() == ["text 2", "text 3", "text 4", "text 5"]
    assert table["missed_by"].isna().all()

    counts = blame_counts(run)
    assert counts["n_examples"].to_dict() == {
        ("gate", RECOVERABLE): 1,
        ("gate", UNRECOVERABLE): 1,
        ("gate", FALSE_ACCEPT): 1,
        ("intent", WRONG_CLASS): 1,
    }
    assert counts["of_errors"].tolist() == [0.25] * 4
    assert counts["of_all"].tolist() == [0.2] * 4

    ladder = oracle_ladder(run)
    assert ladder.index.tolist() == ["as it is", "perfect gate", "perfect intent", "all perfect"]
    assert ladder["accuracy"].tolist() == [0.2, 0.6, 0.4, 1.0]
    assert ladder["in_scope_accuracy"].tolist() == [0.25, 0.5, 0.5, 1.0]
    assert ladder["reject_recall"].tolist() == [0.0, 1.0, 0.0, 1.0]
    assert ladder["points"].tolist() == pytest.approx([0, 40, 20, 80])

    live, counterfactual = counterfactual_matrix(run)
    assert counterfactual.stack().loc[lambda cells: cells > 0].to_dict() == {("b", "b"): 1, ("b", "c"): 1}
    assert live.stack().loc[lambda cells: cells > 0].to_dict() == {("a", "a"): 1, ("b", "c"): 1, ("oos", "a"): 1}
    assert (live.index.name, live.columns.name) == ("true label", "predicted label")

    rows = flow(run)[["stage", "outcome", "fault", "n_examples", "fraction"]].fillna("")
    assert list(rows.itertuples(index=False, name=None)) == [
        ("gate", GOES_ON, "", 3, 0.6),
        ("gate", RECOVERABLE, "gate", 1, 0.2),
        ("gate", UNRECOVERABLE, "gate", 1, 0.2),
        ("intent", "right", "", 1, 0.2),
        ("intent", FALSE_ACCEPT, "gate", 1, 0.2),
        ("intent", WRONG_CLASS, "intent", 1, 0.2),
    ]


def test_a_reject_of_the_last_stage_is_its_own_fault():
    """The last stage rejects with `unsure`, which no gate has: two false rejects, and a false accept."""
    last = {"name": "intent", "labels": ["a", "b"], "min_probability": 0.7, "reject_label": "unsure"}
    p = {"gate": [[0.1, 0.9]] * 3 + [[0.9, 0.1]], "intent": [[0.6, 0.4], [0.6, 0.4], [0.8, 0.2], [0.8, 0.2]]}
    run = run_of_probabilities([GATE, last], ["a", "b", "unsure", "unsure"], p)
    assert blame(run)[["example_id", "fault", "kind", "would_become"]].to_numpy().tolist() == [
        ["t1", "intent", RECOVERABLE, "a"],
        ["t2", "intent", UNRECOVERABLE, "a"],
        ["t3", "intent", FALSE_ACCEPT, "unsure"],
        ["t4", "gate", WRONG_REJECT, "a"],
    ]
    assert oracle_ladder(run)["accuracy"].tolist() == [0.0, 0.0, 0.75, 1.0]


def test_a_last_stage_that_could_have_rejected_is_named_in_missed_by():
    """The last stage has the gate's reject label as a class: the gate is at fault, and the last stage missed it."""
    last = {"name": "intent", "labels": ["a", "b", "oos"]}
    p = {"gate": [[0.1, 0.9]] * 3, "intent": [[0.6, 0.3, 0.1], [0.3, 0.2, 0.5], [0.3, 0.2, 0.5]]}
    run = run_of_probabilities([GATE, last], ["oos", "oos", "a"], p)
    table = blame(run)[["example_id", "fault", "kind", "would_become", "missed_by"]].fillna("")
    assert table.to_numpy().tolist() == [
        ["t1", "gate", FALSE_ACCEPT, "oos", "intent"],
        ["t3", "intent", UNRECOVERABLE, "a", ""],
    ]
    assert oracle_ladder(run)["accuracy"].tolist() == pytest.approx([1 / 3, 2 / 3, 1.0, 1.0])


# Random cascades, each text followed by itself in plain Python.


def stage_answer(stage: StageSpec, logits: np.ndarray) -> str | None:
    """Return a stage's answer, or None where it passes the text on."""
    e = np.exp(logits.astype(np.float64) / stage.temperature)
    p = dict(zip(stage.labels, e / e.sum(), strict=True))
    if stage.is_gate:
        others = {label: value for label, value in p.items() if label != stage.pass_label}
        return None if p[stage.pass_label] >= stage.threshold else max(others, key=others.get)
    best = max(p, key=p.get)
    minimum = stage.min_probabilities.get(best, stage.min_probability or 0)
    return stage.reject_label if stage.reject_label and p[best] < minimum else best


def end_of(answers: list[str | None], start: int = 0) -> tuple[int, str]:
    """Return the place of the stage where a text ends that enters the cascade at `start`, and its answer there."""
    return next((place, answer) for place, answer in enumerate(answers) if place >= start and answer is not None)


def can_be_right(stages: tuple[StageSpec, ...], answers: list[str | None], perfect: list[str], label: str) -> bool:
    """Whether the perfect stages can bring the text to its label by any choice of answers."""
    for place, stage in enumerate(stages):
        if stage.name in perfect:
            own = [*(name for name in stage.labels if name != stage.pass_label), *stage.reject_labels]
            if_passed = stage.is_gate and can_be_right(stages[place + 1 :], answers[place + 1 :], perfect, label)
            return label in own or if_passed
        if answers[place] is not None:
            return answers[place] == label
    raise AssertionError("the last stage always answers")


class Case(NamedTuple):
    """A run, thresholds to analyse it at, and what a loop over its texts gives."""

    run: Run
    thresholds: dict[str, float] | None
    spec: CascadeSpec
    labels: list[str]
    answers: list[list[str | None]]
    ends: list[tuple[int, str]]

    @property
    def wrong(self) -> list[int]:
        return [row for row, (_, answer) in enumerate(self.ends) if answer != self.labels[row]]


@pytest.fixture(scope="module")
def case(tmp_path_factory):
    def of_seed(seed: int, has_thresholds: bool) -> Case:
        folder = tmp_path_factory.mktemp("runs") / "run"
        run = random_run(folder, n=50, n_gates=1 + seed % 3, seed=seed) if seed % 2 else mixed_run(seed)
        thresholds = {"gate0": (seed % 97) / 97} if has_thresholds else None
        spec = run.spec.with_thresholds(thresholds or {})
        labels = run.examples["label"].tolist()
        logits = [run.scores(stage.name).logits for stage in spec.stages]
        answers = [
            [stage_answer(stage, scores[row]) for stage, scores in zip(spec.stages, logits, strict=True)]
            for row in range(len(labels))
        ]
        return Case(run, thresholds, spec, labels, answers, [end_of(row) for row in answers])

    return of_seed


def random_cases(n: int):
    def decorate(test):
        return settings(deadline=None, max_examples=n)(given(st.integers(0, 100_000), st.booleans())(test))

    return decorate


@random_cases(30)
def test_blame_is_that_of_a_loop_over_the_texts(case, seed, has_thresholds):
    run, thresholds, spec, labels, answers, ends = case(seed, has_thresholds)
    wrong = [row for row, (_, answer) in enumerate(ends) if answer != labels[row]]
    stages, names = spec.stages, [stage.name for stage in spec.stages]
    table = blame(run, thresholds=thresholds)
    ids = run.examples["example_id"].tolist()
    assert table["example_id"].tolist() == [ids[row] for row in wrong]
    assert table["predicted"].tolist() == [ends[row][1] for row in wrong]
    for error, row in zip(table.itertuples(), wrong, strict=True):
        label, (end, _) = labels[row], ends[row]
        # A stage is wrong if it does not stop its own labels with the right one, or does not pass the others.
        fault = next(
            place
            for place in range(end + 1)
            if (label in stages[place].reject_labels or place == len(stages) - 1 or answers[row][place] is not None)
            and answers[row][place] != label
        )
        assert error.fault == names[fault]
        stage, stopped = stages[fault], answers[row][fault] is not None
        if stage.is_gate and stopped and label not in stage.reject_labels:
            assert error.would_become == end_of(answers[row], fault + 1)[1]
        elif stage.is_gate and not stopped:
            assert error.would_become in stage.reject_labels
        else:
            assert error.would_become not in (error.predicted, stage.pass_label)
            assert error.would_become in (*stage.labels, *stage.reject_labels)
        could = end > fault and label in (*stages[end].labels, *stages[end].reject_labels)
        assert error.missed_by == names[end] if could else pd.isna(error.missed_by)
        if error.kind in (RECOVERABLE, UNRECOVERABLE):
            scores = run.scores(spec.last.name).logits[row]
            assert (spec.last.labels[int(scores.argmax())] == label) == (error.kind == RECOVERABLE)


@pytest.mark.parametrize("seed", range(8))
def test_a_reject_is_recoverable_if_any_thresholds_give_the_true_label(seed):
    """Each text is above and below the threshold of every stage in every combination, also without label minimums."""
    run = mixed_run(seed, n=30)
    last = run.spec.last
    stages = [stage.name for stage in run.spec.stages if stage.is_gate or stage.reject_label is not None]
    specs = [run.spec]
    if last.min_probabilities:
        specs.append(replace(run.spec, stages=(*run.spec.stages[:-1], replace(last, min_probabilities={}))))
    saved: set[str] = set()
    for spec in specs:
        for values in itertools.product((0.0, 0.5, 1.0), repeat=len(stages)):
            predictions = run.with_spec(spec).replay(dict(zip(stages, values, strict=True)))
            saved |= set(predictions.loc[predictions["predicted"] == predictions["label"], "example_id"])
    table = blame(run)
    for kind, can_be_saved in ((RECOVERABLE, True), (UNRECOVERABLE, False)):
        assert all((example in saved) == can_be_saved for example in table.loc[table["kind"] == kind, "example_id"])


@random_cases(15)
def test_counts_and_flow_add_up_to_the_outcomes(case, seed, has_thresholds):
    run, thresholds, spec, labels, _, ends = case_ = case(seed, has_thresholds)
    n_wrong = len(case_.wrong)
    counts = outcome_counts(spec, run.replay(thresholds))
    by_kind = blame_counts(run, thresholds=thresholds)["n_examples"].groupby("kind", observed=True).sum()
    by_kind = by_kind.reindex(KINDS, fill_value=0)
    assert by_kind[RECOVERABLE] + by_kind[UNRECOVERABLE] == counts[FALSE_REJECT]
    assert all(by_kind[kind] == counts[kind] for kind in ERRORS if kind != FALSE_REJECT)
    assert by_kind.sum() == n_wrong
    table = flow(run, thresholds=thresholds)
    ending = table[table["outcome"] != GOES_ON]
    assert ending["n_examples"].sum() == len(labels)
    assert ending[ending["outcome"].isin(KINDS)]["n_examples"].sum() == n_wrong
    for place, stage in enumerate(spec.stages[:-1]):
        goes_on = table[(table["stage"] == stage.name) & (table["outcome"] == GOES_ON)]["n_examples"].item()
        assert goes_on == sum(end > place for end, _ in ends)


@random_cases(15)
def test_the_ladder_is_that_of_trying_every_answer_of_the_perfect_stages(case, seed, has_thresholds):
    run, thresholds, spec, labels, answers, _ = case_ = case(seed, has_thresholds)
    names = [stage.name for stage in spec.stages]
    ladder = oracle_ladder(run, thresholds=thresholds)
    rungs = {"as it is": [], **{f"perfect {name}": [name] for name in names}, "perfect gates": names[:-1]}
    for rung, perfect in (rungs | {"all perfect": names}).items():
        if rung == "perfect gates" and len(names) == 2:
            assert rung not in ladder.index
            continue
        right = np.array(
            [can_be_right(spec.stages, row, perfect, label) for row, label in zip(answers, labels, strict=True)]
        )
        in_scope = np.isin(labels, spec.in_scope_labels)
        assert ladder.loc[rung, "accuracy"] == pytest.approx(right.mean())
        assert ladder.loc[rung, "points"] == pytest.approx(100 * (right.mean() - 1 + len(case_.wrong) / len(labels)))
        for name, rows in (("in_scope_accuracy", in_scope), ("reject_recall", ~in_scope)):
            expected = right[rows].mean() if rows.any() else np.nan
            assert ladder.loc[rung, name] == pytest.approx(expected, nan_ok=True)
    metrics = prediction_metrics(spec, run.replay(thresholds))
    for name in ("accuracy", "in_scope_accuracy", "reject_recall"):
        assert ladder.loc["as it is", name] == pytest.approx(metrics[name], nan_ok=True)
    assert ladder.loc["all perfect", "accuracy"] == 1.0


@random_cases(15)
def test_the_counterfactual_matrix_is_that_of_passing_every_text(case, seed, has_thresholds):
    run, thresholds, spec, labels, answers, ends = case(seed, has_thresholds)
    gates = [stage.name for stage in spec.stages[:-1]]
    for stage in (None, gates[seed % len(gates)]):
        opened = [place for place, name in enumerate(gates) if stage in (None, name)]
        would_become = [
            end_of([None if place in opened else answer for place, answer in enumerate(row)])[1] for row in answers
        ]
        stopped = np.array([end in opened for end, _ in ends])
        live, counterfactual = counterfactual_matrix(run, stage, thresholds=thresholds)
        for matrix, rows in ((counterfactual, stopped), (live, ~stopped), (counterfactual + live, stopped | True)):
            assert matrix.index.tolist() == matrix.columns.tolist() == list(spec.labels)
            y_true, y_pred = np.array(labels)[rows], np.array(would_become)[rows]
            expected = confusion_matrix(y_true, y_pred, labels=spec.labels) if rows.any() else 0
            assert (matrix.to_numpy() == expected).all()


@pytest.mark.parametrize("n_gates", [1, 2, 3])
def test_a_perfect_gate_gains_the_recoverable_errors_that_it_causes(tmp_path, n_gates):
    run = random_run(tmp_path / "run", n=400, n_gates=n_gates, seed=n_gates)
    table, ladder = blame(run), oracle_ladder(run)
    for stage in (f"gate{i}" for i in range(n_gates)):
        recovered = ((table["fault"] == stage) & (table["would_become"] == table["label"])).sum()
        assert ladder.loc[f"perfect {stage}", "points"] == pytest.approx(100 * recovered / 400)


def test_the_ladders_intervals_cover(tmp_path):
    """The gain of a perfect gate in 6,000 texts lies in the 90% interval of most samples of 150 of them."""
    population = random_run(tmp_path / "all", n=6000, n_gates=1, seed=1)
    truth = oracle_ladder(population).loc["perfect gate0"]
    rng, covered, n_samples = np.random.default_rng(0), np.zeros(2), 80
    for _ in range(n_samples):
        sample = population.select(rng.choice(6000, 150, replace=False))
        row = oracle_ladder(sample, level=0.9).loc["perfect gate0"]
        covered += [row[f"{name}_low"] <= truth[name] <= row[f"{name}_high"] for name in ("accuracy", "points")]
    assert (covered / n_samples > 0.83).all()
    assert (covered / n_samples < 0.97).all()


@pytest.mark.parametrize("function", [blame, blame_counts, flow, oracle_ladder, counterfactual_matrix])
def test_missing_shadow_scores_are_an_error_where_they_are_needed(function):
    with pytest.raises(RunError, match=r"'intent' never scored 2 of .*run the cascade again with shadow scores"):
        function(five_texts(shadow=False))


def test_a_right_reject_needs_no_shadow_scores():
    last = {"name": "intent", "labels": ["a", "b"]}
    p = {"gate": [[0.9, 0.1], [0.1, 0.9]], "intent": [[0.5, 0.5], [0.4, 0.6]]}
    run = run_of_probabilities([GATE, last], ["oos", "a"], p, shadow=False)
    assert blame(run)["kind"].tolist() == [WRONG_CLASS]
    assert oracle_ladder(run)["accuracy"].tolist() == [0.5, 0.5, 1.0, 1.0]


def test_unlabelled_texts_are_left_out():
    run = five_texts(labels=("a", None, "b", "oos", None))
    assert blame(run)["example_id"].tolist() == ["t3", "t4"]
    assert blame_counts(run)["of_all"].tolist() == [1 / 3, 1 / 3]
    assert flow(run)["n_examples"].tolist() == [2, 1, 1, 1]
    assert oracle_ladder(run)["accuracy"].tolist() == pytest.approx([1 / 3, 2 / 3, 1 / 3, 1])
    assert counterfactual_matrix(run).counterfactual.to_numpy().sum() == 1
    with pytest.raises(RunError, match="no example has a label"):
        blame(five_texts(labels=[None] * 5))


def test_an_unknown_stage_and_the_last_one_have_no_counterfactual_matrix():
    with pytest.raises(RunError, match="stage 'intent' is the last one"):
        counterfactual_matrix(five_texts(), "intent")
    with pytest.raises(SpecError, match="did you mean 'gate'"):
        counterfactual_matrix(five_texts(), "gaet")


def test_a_single_stage_has_errors_and_no_gate(tmp_path):
    run = random_run(tmp_path / "run", n_gates=0)
    table = blame(run)
    assert set(table["fault"]) == {"last"}
    assert set(table["kind"]) == {WRONG_CLASS}
    assert oracle_ladder(run).index.tolist() == ["as it is", "perfect last"]
    assert counterfactual_matrix(run).counterfactual.to_numpy().sum() == 0


def test_a_run_without_errors_has_empty_tables():
    last = {"name": "i", "labels": ["a", "b"]}
    run = run_of_probabilities([GATE, last], ["a"], {"gate": [[0.1, 0.9]], "i": [[0.9, 0.1]]})
    assert len(blame(run)) == len(blame_counts(run)) == 0


def test_texts_are_kept_as_they_are_and_escaped_in_html():
    hostile = ["<script>alert(1)</script>", '=HYPERLINK("http://x")', "$x_1$", "a" * 50_000, "\u202eשלום 🙂\ttab\nline"]
    table = blame(five_texts(texts=hostile))
    assert table["text"].tolist() == hostile[1:]
    assert "<script>" not in blame(five_texts(texts=hostile[::-1]))._repr_html_()


def test_the_errors_of_clinc150_add_up(clinc150_run):
    predictions = clinc150_run.predictions
    n_errors = int((predictions["label"] != predictions["predicted"]).sum())
    assert len(blame(clinc150_run)) == blame_counts(clinc150_run)["n_examples"].sum() == n_errors
    ladder = oracle_ladder(clinc150_run)
    assert ladder.loc["as it is", "accuracy"] == pytest.approx(clinc150_run.metrics["end_to_end"]["accuracy"])
    assert ladder.loc["all perfect", "accuracy"] == 1
    stopped = (predictions["decided_by"] == "gate").sum()
    assert counterfactual_matrix(clinc150_run).counterfactual.to_numpy().sum() == stopped

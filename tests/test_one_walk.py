"""One walk through the stages: whoever asks where a text leaves a cascade gets the answer of a plain Python loop.

Random cascades of one to four stages, gates and deferral stages in any order, with random thresholds, minimums by
label and gaps in what was scored.
"""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import numpy as np
import pandas as pd
import pytest
from helpers import memory_run, texts, write_checkpoint
from hypothesis import given, settings
from hypothesis import strategies as st

from cascade_lab import CascadeSpec, EvalSet, Run, StageSpec
from cascade_lab.analysis import blame, counterfactual_matrix, deferrals, flow, oracle_ladder
from cascade_lab.analysis.decomposition import decompose
from cascade_lab.analysis.deferral import DEFERRAL_KINDS
from cascade_lab.analysis.outcomes import outcome_counts
from cascade_lab.exceptions import RunError
from cascade_lab.explorer import Explorer
from cascade_lab.thresholds import ThresholdGrid, surface, sweep


class Case(NamedTuple):
    """A cascade, its examples, and every stage's logits."""

    spec: CascadeSpec
    examples: pd.DataFrame
    logits: dict[str, np.ndarray]
    thresholds: dict[str, float]


LEVELS = st.sampled_from([0.0, 0.2, 0.35, 0.5, 0.5, 0.65, 0.8, 1.0])


@st.composite
def cases(draw: st.DrawFn) -> Case:
    n_stages, n = draw(st.integers(1, 4)), draw(st.integers(1, 12))
    stages, thresholds = [], {}
    for index in range(n_stages - 1):
        if draw(st.booleans()):
            labels = draw(st.permutations(["pay", "play", "lost"]))[: draw(st.integers(2, 3))]
            if any(stage.is_gate for stage in stages) and draw(st.booleans()):
                labels.append(next(stage for stage in stages if stage.is_gate).reject_labels[0])
            stages.append(StageSpec(f"small{index}", tuple(labels), role="deferral", threshold=draw(LEVELS)))
            thresholds[f"small{index}"] = draw(LEVELS)
            continue
        labels = [f"oos{index}", f"other{index}", "in"][: draw(st.integers(2, 3)) - 3 or None]
        labels = draw(st.permutations(["in", *(label for label in labels if label != "in")]))
        stages.append(StageSpec(f"gate{index}", tuple(labels), pass_label="in", threshold=draw(LEVELS)))
        thresholds[f"gate{index}"] = draw(LEVELS)
    labels = ("pay", "play", "lost")
    reject = draw(st.sampled_from([None, "oos0", "unsure"]))
    minimums = draw(st.dictionaries(st.sampled_from(labels), LEVELS, max_size=2)) if reject else {}
    minimum = draw(st.none() | LEVELS) if reject else None
    stages.append(StageSpec("last", labels, min_probability=minimum, min_probabilities=minimums, reject_label=reject))
    if reject:
        thresholds["last"] = draw(LEVELS)
    spec = CascadeSpec("random", tuple(stages))
    rng = np.random.default_rng(draw(st.integers(0, 10_000)))
    examples = pd.DataFrame(
        {
            "example_id": [str(i) for i in range(n)],
            "text": [f"text {i}" for i in range(n)],
            "text_b": None,
            "label": rng.choice(spec.labels, n),
        }
    )
    # Few distinct logits, so that ties at thresholds and between labels occur.
    logits = {s.name: 2 * rng.integers(-1, 2, (n, len(s.labels))).astype(np.float32) for s in spec.stages}
    return Case(spec, examples, logits, thresholds)


def plain_walk(
    spec: CascadeSpec,
    logits: dict[str, np.ndarray],
    row: int,
    *,
    perfect: str = "",
    label: str = "",
    rule: str = "",
    defers: str = "",
) -> tuple[str, str]:
    """Return the answer to one example and the stage that gives it, by the words of the documentation alone.

    The stage `perfect` decides for whatever can still lead to the true `label`; the stage `rule` answers exactly where
    its own label is right; the stage `defers` answers nothing.
    """
    for index, stage in enumerate(spec.stages):
        later = {name for s in spec.stages[index + 1 :] for name in (*s.labels, s.reject_label)}
        if stage.name == perfect and label in {*stage.labels, stage.reject_label} - {stage.pass_label}:
            return label, stage.name
        if stage.name == perfect and label in later:
            continue
        weights = np.exp(logits[stage.name][row].astype(np.float64))
        p = dict(zip(stage.labels, weights / weights.sum(), strict=True))
        if stage.pass_label is not None:
            if p[stage.pass_label] >= stage.threshold:
                continue
            return max((label for label in stage.labels if label != stage.pass_label), key=p.__getitem__), stage.name
        best = max(stage.labels, key=p.__getitem__)
        if stage.role == "deferral":
            if best == label if stage.name == rule else p[best] >= stage.threshold and stage.name != defers:
                return best, stage.name
            continue
        minimum = stage.min_probabilities.get(best, stage.min_probability or 0.0)
        if stage.reject_label is not None and p[best] < minimum:
            return stage.reject_label, stage.name
        return best, stage.name
    raise AssertionError("the last stage answers")


def plain_walks(spec: CascadeSpec, logits: dict[str, np.ndarray], n: int) -> tuple[list[str], list[str]]:
    pairs = [plain_walk(spec, logits, row) for row in range(n)]
    return [label for label, _ in pairs], [stage for _, stage in pairs]


@settings(max_examples=150, deadline=None)
@given(cases())
def test_run_and_replay(case: Case):
    n = len(case.examples)
    run = memory_run(case.spec, case.examples, case.logits)
    predicted, decided_by = plain_walks(case.spec, case.logits, n)
    assert run.predictions["predicted"].tolist() == predicted
    assert run.predictions["decided_by"].tolist() == decided_by
    moved = case.spec.with_thresholds(case.thresholds)
    predicted, decided_by = plain_walks(moved, case.logits, n)
    replayed = run.replay(case.thresholds)
    assert (replayed["predicted"].tolist(), replayed["decided_by"].tolist()) == (predicted, decided_by)
    from_logits = Run.from_logits(moved, case.examples, case.logits)
    assert from_logits.predictions["predicted"].tolist() == predicted


@settings(max_examples=100, deadline=None)
@given(cases())
def test_error_analysis(case: Case):
    """Blame lists the errors of the walk, the flow ends where it ends, and open gates are a walk at threshold 0."""
    n = len(case.examples)
    run = memory_run(case.spec, case.examples, case.logits)
    y_true = case.examples["label"].to_numpy()
    moved = case.spec.with_thresholds(case.thresholds)
    predicted, decided_by = plain_walks(moved, case.logits, n)
    errors = blame(run, thresholds=case.thresholds)
    wrong = [row for row in range(n) if predicted[row] != y_true[row]]
    assert errors["example_id"].tolist() == [str(row) for row in wrong]
    assert errors["predicted"].tolist() == [predicted[row] for row in wrong]
    ends = flow(run, thresholds=case.thresholds)
    ends = ends[ends["outcome"] != "goes on"].groupby("stage")["n_examples"].sum().to_dict()
    assert ends == pd.Series(decided_by).value_counts().to_dict()
    ladder = oracle_ladder(run, thresholds=case.thresholds)
    assert ladder.loc["as it is", "accuracy"] == pytest.approx(np.mean(np.array(predicted) == y_true))
    for stage in case.spec.stages:
        better = [plain_walk(moved, case.logits, row, perfect=stage.name, label=y_true[row])[0] for row in range(n)]
        assert ladder.loc[f"perfect {stage.name}", "accuracy"] == pytest.approx(np.mean(np.array(better) == y_true))
        if stage.is_deferral:
            ruled = [plain_walk(moved, case.logits, row, rule=stage.name, label=y_true[row])[0] for row in range(n)]
            accuracy = ladder.loc[f"perfect rule of {stage.name}", "accuracy"]
            assert accuracy == pytest.approx(np.mean(np.array(ruled) == y_true))
            assert_deferrals(case, run, stage.name)
            for error in errors[errors["fault"] == stage.name].itertuples():
                deferred, _ = plain_walk(moved, case.logits, int(error.example_id), defers=stage.name)
                assert error.decided_by == stage.name
                assert error.would_become == deferred
                assert error.kind.startswith("recoverable" if deferred == error.label else "unrecoverable")
    gates = [stage.name for stage in case.spec.stages if stage.is_gate]
    if gates:
        opened, _ = plain_walks(moved.with_thresholds(dict.fromkeys(gates, 0.0)), case.logits, n)
        live, counterfactual = counterfactual_matrix(run, thresholds=case.thresholds)
        both = (live + counterfactual).to_numpy()
        assert both.sum() == n
        assert np.trace(both) == int(np.sum(np.array(opened) == y_true))


def assert_deferrals(case: Case, run: Run, name: str) -> None:
    """Compare `deferrals` of a stage with the walk: every text that reached it is of one kind."""
    moved, y_true = case.spec.with_thresholds(case.thresholds), case.examples["label"].to_numpy()
    order = [stage.name for stage in case.spec.stages]
    counts = dict.fromkeys(DEFERRAL_KINDS, 0)
    for row, label in enumerate(y_true):
        answer, by = plain_walk(moved, case.logits, row)
        if order.index(by) < order.index(name):
            continue
        later, _ = plain_walk(moved, case.logits, row, defers=name)
        answers_all = moved.with_thresholds({name: 0.0})
        own, _ = plain_walk(answers_all, case.logits, row)
        if by == name:
            kind = 0 if answer == label else 1 if later == label else 2
        else:
            kinds = {(False, True): 3, (True, True): 4, (True, False): 5, (False, False): 6}
            kind = kinds[own == label, later == label]
        counts[DEFERRAL_KINDS[kind]] += 1
    table = deferrals(run, thresholds=case.thresholds)
    assert table[table["stage"] == name].set_index("kind")["n_examples"].to_dict() == counts


@settings(max_examples=100, deadline=None)
@given(cases())
def test_threshold_search(case: Case):
    """A grid's counts at any thresholds are those of the walk there."""
    if not case.thresholds:
        return
    run = memory_run(case.spec, case.examples, case.logits)
    stages = list(case.thresholds)[-2:]
    case = case._replace(thresholds={name: case.thresholds[name] for name in stages})
    grid = ThresholdGrid.from_run(run, stages)
    at = [np.array([value]) for value in case.thresholds.values()]
    counts = grid.counts_at(*at)[(0,) * len(at)]
    predicted, _ = plain_walks(case.spec.with_thresholds(case.thresholds), case.logits, len(case.examples))
    expected = outcome_counts(case.spec, case.examples.assign(predicted=predicted))
    assert counts.tolist() == expected.tolist()
    table = sweep(run, stages[0])
    row = table[table["threshold"] >= case.thresholds[stages[0]]].iloc[0]
    predicted, _ = plain_walks(
        case.spec.with_thresholds({stages[0]: case.thresholds[stages[0]]}), case.logits, len(case.examples)
    )
    assert row["accuracy"] == pytest.approx(np.mean(np.array(predicted) == case.examples["label"].to_numpy()))
    assert surface(run, stages).counts.sum(axis=-1).max() == len(case.examples)


@settings(max_examples=60, deadline=None)
@given(cases())
def test_explorer(case: Case):
    run = memory_run(case.spec, case.examples, case.logits)
    if not case.thresholds:
        return
    explorer = Explorer(run)
    explorer.move(case.thresholds)
    predicted, decided_by = plain_walks(case.spec.with_thresholds(case.thresholds), case.logits, len(case.examples))
    assert explorer.predictions["predicted"].tolist() == predicted
    assert explorer.predictions["decided_by"].tolist() == decided_by


@settings(max_examples=60, deadline=None)
@given(cases())
def test_comparison(case: Case):
    """Gates of one run before the last stage of the other: with B at other thresholds, BB is B's own walk."""
    if len(case.spec.stages) < 2:
        return
    run = memory_run(case.spec, case.examples, case.logits)
    other = run.with_thresholds(case.thresholds)
    accuracies = decompose(run, other).accuracies
    y_true = case.examples["label"].to_numpy()
    for name, spec in (("AA", case.spec), ("BB", other.spec)):
        predicted, _ = plain_walks(spec, case.logits, len(y_true))
        assert accuracies[name] == pytest.approx(np.mean(np.array(predicted) == y_true))


@pytest.mark.parametrize("n_stages", [1, 2, 3, 4])
def test_live_runs_and_the_latency_benchmark(n_stages: int, tmp_path: Path):
    """`predict`, `run`, `serve_batch` and the replay of the run agree with the walk on the logits that were kept."""
    from cascade_lab import Cascade
    from cascade_lab.latency_benchmark import serve_batch

    stages = []
    for index in range(n_stages):
        write_checkpoint(tmp_path / f"{index}", 4 if index == n_stages - 1 else 2, seed=10 + index)
        files = {
            "init_checkpoint": tmp_path / f"{index}",
            "bert_config_file": tmp_path / f"{index}" / "bert_config.json",
            "vocab_file": tmp_path / f"{index}" / "vocab.txt",
            "max_seq_length": 24,
        }
        is_last = index == n_stages - 1
        role = {"min_probability": 0.6, "reject_label": "oos"} if is_last else {"pass_label": "in", "threshold": 0.5}
        labels = ("a", "b", "c", "d") if is_last else (f"oos{index}", "in")
        stages.append(StageSpec(f"stage{index}", labels, **files, **role))
    spec = CascadeSpec("live", tuple(stages))
    lines = texts(60, seed=5)
    evalset = EvalSet.from_frame(pd.DataFrame({"text": lines, "label": "a"}))
    with Cascade.load(spec) as cascade:
        # Thresholds that divide what reaches a stage.
        confidence = cascade.predict(lines)[[f"{stage.name}_probability" for stage in stages]]
        middle = {s.name: float(confidence[f"{s.name}_probability"].median()) for s in stages}
        middle = {name: value + 1e-4 for name, value in middle.items() if value == value}
    spec = spec.with_thresholds(middle)
    with Cascade.load(spec) as cascade:
        run = cascade.run(evalset, output=tmp_path / "run")
        many, few = cascade.predict(lines), pd.concat([cascade.predict([line]) for line in lines], ignore_index=True)
        served, timings = serve_batch(cascade, lines, spec=spec)
    logits = {stage.name: run.scores(stage.name).logits for stage in spec.stages}
    predicted, decided_by = plain_walks(spec, logits, len(lines))
    for table in (run.predictions, run.replay(), many, few, served):
        assert table["predicted"].tolist() == predicted
        assert table["decided_by"].tolist() == decided_by
    order = [stage.name for stage in spec.stages]
    arrived = [sum(order.index(name) >= index for name in decided_by) for index in range(n_stages)]
    assert [timing["n_examples"] for timing in timings] == [n for n in arrived if n]


@settings(max_examples=60, deadline=None)
@given(cases(), st.integers(0, 10_000))
def test_gaps_in_what_was_scored(case: Case, seed: int):
    """Without shadow scores, other thresholds are replayed where every text was scored, and refused where not."""
    run = memory_run(case.spec, case.examples, case.logits, shadow=False)
    moved = case.spec.with_thresholds(case.thresholds)
    n = len(case.examples)
    _, before = plain_walks(case.spec, case.logits, n)
    predicted, after = plain_walks(moved, case.logits, n)
    order = [stage.name for stage in case.spec.stages]
    needs_more = any(order.index(b) < order.index(a) for b, a in zip(before, after, strict=True))
    if needs_more:
        with pytest.raises(RunError, match="never scored"):
            run.replay(case.thresholds)
    else:
        assert run.replay(case.thresholds)["predicted"].tolist() == predicted

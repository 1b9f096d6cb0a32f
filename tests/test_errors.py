"""Blame, the oracle ladder and ghosts: a cascade worked by hand, and random ones gone through text by text."""

from __future__ import annotations

import itertools

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from random_runs import random_run
from sklearn.metrics import confusion_matrix

from cascade_lab.analysis.errors import (
    DOOMED,
    GOES_ON,
    KINDS,
    RECOVERABLE,
    blame,
    blame_counts,
    flow,
    ghost_matrix,
    oracle_ladder,
    should_say,
)
from cascade_lab.analysis.examples import confident_errors, confused_texts, near_threshold
from cascade_lab.analysis.metrics import figures_of
from cascade_lab.analysis.outcomes import ERRORS, FALSE_ACCEPT, FALSE_REJECT, WRONG_CLASS, WRONG_REJECT, outcome_counts
from cascade_lab.displays.outcomes import GhostMatrixDisplay, OracleLadderDisplay, OutcomeFlowDisplay
from cascade_lab.errors import RunError, SpecError
from cascade_lab.run import SCHEMA_VERSION, Run, Scores, write_json, write_tables
from cascade_lab.serial import gold, serve
from cascade_lab.spec import CascadeSpec

PATHS = {"init_checkpoint": "none", "bert_config_file": "none", "vocab_file": "none"}
GATE = {"name": "gate", "labels": ["oos", "in"], "pass_label": "in", "threshold": 0.5}


def write_run(folder, stages, gold_labels, p, *, texts=None, shadow=True, name="by hand"):
    """Write a run of stages that say the probabilities `p`: stage name to a row a text."""
    spec = CascadeSpec.from_dict({"name": name, "stage": [{**PATHS, **stage} for stage in stages]})
    n, names = len(gold_labels), [stage.name for stage in spec.stages]
    ids = [f"t{i + 1}" for i in range(n)]
    texts = [f"text {i + 1}" for i in range(n)] if texts is None else texts
    examples = pd.DataFrame({"example_id": ids, "text": texts, "text_b": None, "label": gold_labels})
    logits = {stage: np.log(np.array(rows)).astype(np.float32) for stage, rows in p.items()}
    answers = serve(spec, logits)
    stopped_at = answers["decided_by"].map(names.index).to_numpy()
    scores = {}
    for place, stage in enumerate(names):
        off = stopped_at < place
        kept = np.arange(n) if shadow else np.flatnonzero(~off)
        scores[stage] = Scores(kept, logits[stage][kept], off[kept])
    folder.mkdir(parents=True)
    columns = ["stage", "batch", "n_examples", "sequence_length", "n_tokens", "tokenize_seconds", "run_seconds"]
    contents = write_tables(folder, examples, scores, answers, pd.DataFrame(columns=columns))
    manifest = {"schema_version": SCHEMA_VERSION, "run_id": name, "cascade": spec.to_dict(), "contents": contents}
    write_json(folder / "manifest.json", manifest)
    return Run.read(folder)


def five_texts(folder, *, shadow=True, texts=None):
    last = {"name": "intent", "labels": ["a", "b", "c"]}
    p = {
        "gate": [[0.1, 0.9], [0.6, 0.4], [0.8, 0.2], [0.3, 0.7], [0.2, 0.8]],
        "intent": [[0.8, 0.1, 0.1], [0.1, 0.7, 0.2], [0.1, 0.3, 0.6], [0.5, 0.2, 0.3], [0.1, 0.3, 0.6]],
    }
    return write_run(folder, [GATE, last], ["a", "b", "b", "oos", "b"], p, shadow=shadow, texts=texts)


def test_five_texts_by_hand(tmp_path):
    """A gate at 0.5 and three intents; p(in), then p(a), p(b), p(c).

    ====  =====  =====  =============  ======  =========================================================
    text  label  p(in)  intent         answer  what it is
    ====  =====  =====  =============  ======  =========================================================
    t1    a      0.9    0.8, 0.1, 0.1  a       right
    t2    b      0.4    0.1, 0.7, 0.2  oos     the gate's false reject; intent says b: recoverable
    t3    b      0.2    0.1, 0.3, 0.6  oos     the gate's false reject; intent says c: doomed
    t4    oos    0.7    0.5, 0.2, 0.3  a       the gate's false accept; stopped, it would be oos
    t5    b      0.8    0.1, 0.3, 0.6  c       the intent stage's wrong class; its next choice is b
    ====  =====  =====  =============  ======  =========================================================

    One in five is right. A perfect gate also gets t2 and t4 (3/5); a perfect intent stage t5 (2/5), and not t4, since
    it cannot say oos. Had t2 and t3 gone on, b would have become b once and c once.
    """
    run = five_texts(tmp_path / "run")
    table = blame(run)
    expected = [
        ("t2", "b", "oos", "gate", "gate", RECOVERABLE, "b"),
        ("t3", "b", "oos", "gate", "gate", DOOMED, "c"),
        ("t4", "oos", "a", "intent", "gate", FALSE_ACCEPT, "oos"),
        ("t5", "b", "c", "intent", "intent", WRONG_CLASS, "b"),
    ]
    columns = ["example_id", "label", "predicted", "decided_by", "fault", "kind", "would_become"]
    assert list(table[columns].itertuples(index=False, name=None)) == expected
    assert table["probability"].tolist() == pytest.approx([0.6, 0.8, 0.5, 0.6])
    assert table["text"].tolist() == ["text 2", "text 3", "text 4", "text 5"]
    assert table["missed_by"].isna().all()

    counts = blame_counts(run)
    assert counts["n_examples"].to_dict() == {
        ("gate", RECOVERABLE): 1,
        ("gate", DOOMED): 1,
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

    ghosts = ghost_matrix(run)
    assert ghosts.ghost.stack().loc[lambda cells: cells > 0].to_dict() == {("b", "b"): 1, ("b", "c"): 1}
    assert ghosts.live.stack().loc[lambda cells: cells > 0].to_dict() == {("a", "a"): 1, ("b", "c"): 1, ("oos", "a"): 1}

    found = flow(run)[["stage", "outcome", "fault", "n_examples", "fraction"]].fillna("")
    assert list(found.itertuples(index=False, name=None)) == [
        ("gate", GOES_ON, "", 3, 0.6),
        ("gate", RECOVERABLE, "gate", 1, 0.2),
        ("gate", DOOMED, "gate", 1, 0.2),
        ("intent", "right", "", 1, 0.2),
        ("intent", FALSE_ACCEPT, "gate", 1, 0.2),
        ("intent", WRONG_CLASS, "intent", 1, 0.2),
    ]

    assert confident_errors(run, 2)["example_id"].tolist() == ["t3", "t2"]
    pairs = confused_texts(run, 1, 5)
    assert pairs[["label", "predicted", "n_examples", "example_id"]].to_numpy().tolist() == [
        ["b", "oos", 2, "t3"],
        ["b", "oos", 2, "t2"],
    ]
    assert pairs["of_label"].tolist() == pytest.approx([2 / 3] * 2)
    near = near_threshold(run, "gate", 1)
    assert near["example_id"].tolist() == ["t2", "t4"]
    assert near["distance"].tolist() == pytest.approx([-0.1, 0.2])
    assert near["logit_distance"].tolist() == pytest.approx([np.log(4 / 6), np.log(7 / 3)], abs=1e-6)
    # 0.7 is not quite a float32's probability: the threshold that t4 ties with is its own, and it stays above.
    tie = near_threshold(run, "gate", 1, thresholds={"gate": float(near["p"][1])})
    assert tie["example_id"].tolist() == ["t2", "t4"]
    assert tie["distance"][1] == 0


def test_the_last_stages_own_rejects_are_its_fault(tmp_path):
    """The last stage rejects below 0.5 with `unsure`, which no gate knows: two false rejects, and a false accept."""
    last = {"name": "intent", "labels": ["a", "b"], "min_probability": 0.7, "reject_label": "unsure"}
    p = {"gate": [[0.1, 0.9]] * 3 + [[0.9, 0.1]], "intent": [[0.6, 0.4], [0.6, 0.4], [0.8, 0.2], [0.8, 0.2]]}
    run = write_run(tmp_path / "run", [GATE, last], ["a", "b", "unsure", "unsure"], p)
    found = blame(run)[["example_id", "fault", "kind", "would_become"]]
    assert found.to_numpy().tolist() == [
        ["t1", "intent", RECOVERABLE, "a"],
        ["t2", "intent", DOOMED, "a"],
        ["t3", "intent", FALSE_ACCEPT, "unsure"],
        ["t4", "gate", WRONG_REJECT, "a"],
    ]
    assert near_threshold(run, "intent", 5)["distance"].tolist() == pytest.approx([-0.1, -0.1, 0.1], abs=1e-6)
    assert oracle_ladder(run)["accuracy"].tolist() == [0.0, 0.0, 0.75, 1.0]


def test_a_last_stage_that_could_have_rejected_is_named_beside_the_gate(tmp_path):
    """151 labels, one of them the gate's own: the gate is at fault first, and the last stage missed it."""
    last = {"name": "intent", "labels": ["a", "b", "oos"]}
    p = {"gate": [[0.1, 0.9]] * 3, "intent": [[0.6, 0.3, 0.1], [0.3, 0.2, 0.5], [0.3, 0.2, 0.5]]}
    run = write_run(tmp_path / "run", [GATE, last], ["oos", "oos", "a"], p)
    found = blame(run)[["example_id", "fault", "kind", "would_become", "missed_by"]].fillna("")
    assert found.to_numpy().tolist() == [
        ["t1", "gate", FALSE_ACCEPT, "oos", "intent"],
        ["t3", "intent", RECOVERABLE, "a", ""],
    ]
    assert oracle_ladder(run)["accuracy"].tolist() == pytest.approx([1 / 3, 2 / 3, 1.0, 1.0])


# Every text gone through by itself, in plain Python.


def softmax(logits, temperature):
    e = np.exp(np.asarray(logits, dtype=np.float64) / temperature)
    return e / e.sum()


def says(stage, logits):
    """Return a stage's answer, or None where it passes the text on."""
    p = dict(zip(stage.labels, softmax(logits, stage.temperature), strict=True))
    if stage.is_gate:
        others = {label: value for label, value in p.items() if label != stage.pass_label}
        return None if p[stage.pass_label] >= stage.threshold else max(others, key=others.get)
    best = max(p, key=p.get)
    least = stage.min_probabilities.get(best, stage.min_probability or 0)
    return stage.reject_label if stage.reject_label and p[best] < least else best


def course(said, start=0):
    """Return the place and the answer at which a text ends that enters the cascade at place `start`."""
    return next((place, word) for place, word in enumerate(said) if place >= start and word is not None)


def best(stages, said, perfect, label):
    """Can the perfect stages, by whatever they say, bring the text to its label?"""
    for place, stage in enumerate(stages):
        if stage.name in perfect:
            own = [*(name for name in stage.labels if name != stage.pass_label), *stage.reject_labels]
            going_on = stage.is_gate and best(stages[place + 1 :], said[place + 1 :], perfect, label)
            return label in own or going_on
        if said[place] is not None:
            return said[place] == label
    raise AssertionError("the last stage answers")


def mixed_run(folder, seed):
    """A cascade of 2 to 4 stages of any kind: gates that share a reject label or have two, a last stage that rejects
    by a class, by `min_probability`, by both or not at all; and thresholds anywhere."""
    rng = np.random.default_rng(seed)
    n_gates = int(rng.integers(1, 4))
    stages = []
    for i in range(n_gates):
        rejects = ["oos"] if rng.random() < 0.4 else [f"oos{i}", "abuse"] if rng.random() < 0.5 else [f"oos{i}"]
        stages.append({"name": f"gate{i}", "labels": [*rejects, "in"], "pass_label": "in", "threshold": rng.random()})
        stages[-1]["temperature"] = float(rng.uniform(0.5, 2))
    labels = [f"label{i}" for i in range(int(rng.integers(2, 5)))]
    last = {"name": "last", "labels": labels + (["oos"] if rng.random() < 0.4 else [])}
    if rng.random() < 0.6:
        last |= {"reject_label": str(rng.choice(["oos", "unsure"])), "min_probability": rng.random() * 0.6}
        last["min_probabilities"] = {"label0": rng.random()}
    stages.append(last)
    spec = CascadeSpec.from_dict({"name": "x", "stage": [{**PATHS, **stage} for stage in stages]})
    n = 50
    p = {stage.name: rng.dirichlet(np.full(len(stage.labels), 0.7), n) + 1e-6 for stage in spec.stages}
    return write_run(folder, stages, rng.choice(spec.labels, n).tolist(), p)


def any_run(folder, seed):
    return random_run(folder, n=50, n_gates=1 + seed % 3, seed=seed) if seed % 2 else mixed_run(folder, seed)


@settings(deadline=None, max_examples=30)
@given(seed=st.integers(0, 100_000), other=st.booleans())
def test_every_error_of_a_random_cascade_against_going_through_it_text_by_text(tmp_path_factory, seed, other):
    run = any_run(tmp_path_factory.mktemp("runs") / "r", seed)
    thresholds = {"gate0": (seed % 97) / 97} if other else None
    spec = run.spec.with_thresholds(thresholds or {})
    stages, names = spec.stages, [stage.name for stage in spec.stages]
    labels = run.examples["label"].tolist()
    said = [[says(s, run.scores(s.name).logits[row]) for s in stages] for row in range(len(labels))]
    ends = [course(words) for words in said]

    table = blame(run, thresholds=thresholds)
    wrong = [row for row, (_, word) in enumerate(ends) if word != labels[row]]
    ids = run.examples["example_id"].tolist()
    assert table["example_id"].tolist() == [ids[row] for row in wrong]
    assert table["predicted"].tolist() == [ends[row][1] for row in wrong]
    for found, row in zip(table.itertuples(), wrong, strict=True):
        label, (end, _) = labels[row], ends[row]
        # A stage is wrong if it does not stop its own with their label, or does not pass the others on.
        fault = next(
            place
            for place in range(end + 1)
            if (label in stages[place].reject_labels or place == len(stages) - 1 or said[row][place] is not None)
            and said[row][place] != label
        )
        assert found.fault == names[fault]
        stage, stopped = stages[fault], said[row][fault] is not None
        own = label in stage.reject_labels
        if stage.is_gate and stopped and not own:
            assert found.would_become == course(said[row], fault + 1)[1]
        elif stage.is_gate and not stopped:
            assert found.would_become in stage.reject_labels
        else:
            assert found.would_become not in (found.predicted, stage.pass_label)
            assert found.would_become in (*stage.labels, *stage.reject_labels)
        could = end > fault and label in (*stages[end].labels, *stages[end].reject_labels)
        assert found.missed_by == names[end] if could else pd.isna(found.missed_by)
        if found.kind in (RECOVERABLE, DOOMED):
            assert (found.would_become == label) == (found.kind == RECOVERABLE)

    # Kinds agree with the outcomes, and everything sums.
    outcomes_of = outcome_counts(spec, run.replay(thresholds))
    kinds = table["kind"].value_counts().reindex(KINDS, fill_value=0)
    assert kinds[RECOVERABLE] + kinds[DOOMED] == outcomes_of[FALSE_REJECT]
    assert all(kinds[kind] == outcomes_of[kind] for kind in ERRORS if kind != FALSE_REJECT)
    assert blame_counts(run, thresholds=thresholds)["n_examples"].sum() == len(wrong)
    flowing = flow(run, thresholds=thresholds)
    ending = flowing[flowing["outcome"] != GOES_ON]
    assert ending["n_examples"].sum() == len(labels)
    assert ending[ending["outcome"].isin(KINDS)]["n_examples"].sum() == len(wrong)
    for place, name in enumerate(names[:-1]):
        goes_on = flowing[(flowing["stage"] == name) & (flowing["outcome"] == GOES_ON)]["n_examples"].item()
        assert goes_on == sum(end > place for end, _ in ends)

    # The ladder, against trying every word that a perfect stage could say.
    ladder = oracle_ladder(run, thresholds=thresholds, n_resamples=10)
    gates = names[:-1]
    rungs = {"as it is": [], **{f"perfect {name}": [name] for name in names}, "perfect gates": gates}
    for rung, perfect in (rungs | {"all perfect": names}).items():
        if rung == "perfect gates" and len(gates) == 1:
            assert rung not in ladder.index
            continue
        right = np.array([best(stages, words, perfect, label) for words, label in zip(said, labels, strict=True)])
        in_scope = np.isin(labels, spec.in_scope_labels)
        assert ladder.loc[rung, "accuracy"] == pytest.approx(right.mean())
        assert ladder.loc[rung, "points"] == pytest.approx(100 * (right.mean() - 1 + len(wrong) / len(labels)))
        assert ladder.loc[rung, "in_scope_accuracy"] == pytest.approx(right[in_scope].mean(), nan_ok=True)
        assert ladder.loc[rung, "reject_recall"] == pytest.approx(right[~in_scope].mean(), nan_ok=True)
    figures = figures_of(spec, run.replay(thresholds))
    for name in ("accuracy", "in_scope_accuracy", "reject_recall"):
        assert ladder.loc["as it is", name] == pytest.approx(figures[name], nan_ok=True)
    assert ladder.loc["all perfect", "accuracy"] == 1.0

    # Ghosts and the living, for all gates and for one.
    for stage in (None, gates[seed % len(gates)]):
        opened = [place for place, name in enumerate(gates) if stage in (None, name)]
        would = [course([None if place in opened else word for place, word in enumerate(words)])[1] for words in said]
        stops = np.array([end in opened for end, _ in ends])
        ghosts = ghost_matrix(run, stage, thresholds=thresholds)
        for matrix, rows in ((ghosts.ghost, stops), (ghosts.live, ~stops), (ghosts.ghost + ghosts.live, stops | True)):
            assert matrix.index.tolist() == matrix.columns.tolist() == list(spec.labels)
            y_true, y_pred = np.array(labels)[rows], np.array(would)[rows]
            expected = confusion_matrix(y_true, y_pred, labels=spec.labels) if rows.any() else 0
            assert (matrix.to_numpy() == expected).all()


@settings(deadline=None, max_examples=15)
@given(seed=st.integers(0, 100_000), n=st.integers(0, 12))
def test_near_threshold_against_sorting_everything(tmp_path_factory, seed, n):
    run = any_run(tmp_path_factory.mktemp("runs") / "r", seed)
    thresholds = {"gate0": (seed % 89) / 89} | ({"last": 0.4} if seed % 2 else {})
    spec = run.spec.with_thresholds(thresholds)
    for place, stage in enumerate(spec.stages):
        if not (stage.is_gate or stage.min_probability):
            with pytest.raises(RunError, match="has no min_probability"):
                near_threshold(run, stage.name, thresholds=thresholds)
            continue
        distances = []
        for row in range(len(run.examples)):
            said = [says(s, run.scores(s.name).logits[row]) for s in spec.stages]
            if course(said)[0] >= place:
                p = softmax(run.scores(stage.name).logits[row], stage.temperature)
                at = stage.labels.index(stage.pass_label) if stage.is_gate else int(p.argmax())
                least = stage.min_probabilities.get(stage.labels[at], stage.min_probability)
                distances.append(p[at] - (stage.threshold if stage.is_gate else least))
        below, above = sorted(d for d in distances if d < 0), sorted(d for d in distances if d >= 0)
        found = near_threshold(run, stage.name, n, thresholds=thresholds)
        assert found["distance"].tolist() == pytest.approx(below[len(below) - min(n, len(below)) :] + above[:n])
        with np.errstate(divide="ignore"):
            p, t = found["p"], found["threshold"]
            expected = np.log(p) - np.log1p(-p) - np.log(t) + np.log1p(-t)
        assert found["logit_distance"].tolist() == pytest.approx(expected.tolist(), abs=1e-6)
        assert (found["right"] == (found["label"] == found["predicted"])).all()


@pytest.mark.parametrize("n_gates", [1, 2, 3])
def test_what_a_perfect_gate_is_worth_is_what_can_be_recovered_from_its_faults(tmp_path, n_gates):
    run = random_run(tmp_path / "run", n=400, n_gates=n_gates, seed=n_gates)
    table, ladder = blame(run), oracle_ladder(run)
    for stage in (f"gate{i}" for i in range(n_gates)):
        recovered = ((table["fault"] == stage) & (table["would_become"] == table["label"])).sum()
        assert ladder.loc[f"perfect {stage}", "points"] == pytest.approx(100 * recovered / 400)


def test_what_a_stage_should_say_agrees_with_the_gold_wherever_there_is_one(tmp_path):
    for seed in range(20):
        run = any_run(tmp_path / f"{seed}", seed)
        for stage in run.spec.stages:
            expected = gold(run.spec, stage, run.examples)
            found = should_say(run.spec, stage.name, run.examples["label"].to_numpy())
            known = expected != None  # noqa: E711
            assert (found[known] == expected[known]).all()


def test_the_ladders_intervals_cover(tmp_path):
    """What one perfect gate is worth in 6,000 texts lies in the 90% interval of most samples of 150 of them."""
    whole = random_run(tmp_path / "whole", n=6000, n_gates=1, seed=1)
    truth = oracle_ladder(whole).loc["perfect gate0"]
    rng, covered, n_samples = np.random.default_rng(0), np.zeros(2), 80
    spec, labels = whole.spec.to_dict()["stage"], whole.examples["label"].to_numpy()
    for i in range(n_samples):
        rows = rng.choice(6000, 150, replace=False)
        p = {stage: np.exp(whole.scores(stage).logits[rows]) for stage in ("gate0", "last")}
        found = oracle_ladder(write_run(tmp_path / f"{i}", spec, labels[rows].tolist(), p), level=0.9)
        row = found.loc["perfect gate0"]
        covered += [row[f"{name}_low"] <= truth[name] <= row[f"{name}_high"] for name in ("accuracy", "points")]
    assert (covered / n_samples > 0.83).all()
    assert (covered / n_samples < 0.97).all()


def test_without_shadow_scores_it_says_so_where_they_are_needed(tmp_path):
    run = five_texts(tmp_path / "run", shadow=False)
    for ask in (blame, blame_counts, flow, oracle_ladder, ghost_matrix, OutcomeFlowDisplay.from_run):
        with pytest.raises(RunError, match=r"2 examples .*run the cascade again with shadow scores"):
            ask(run)
    assert confident_errors(run)["example_id"].tolist() == ["t3", "t2", "t5", "t4"]
    assert len(confused_texts(run)) == 4
    assert near_threshold(run, "gate", 1)["example_id"].tolist() == ["t2", "t4"]
    # What the gate stopped rightly needs none.
    last = {"name": "intent", "labels": ["a", "b"]}
    p = {"gate": [[0.9, 0.1], [0.1, 0.9]], "intent": [[0.5, 0.5], [0.4, 0.6]]}
    rightly = write_run(tmp_path / "rightly", [GATE, last], ["oos", "a"], p, shadow=False)
    assert blame(rightly)["kind"].tolist() == [WRONG_CLASS]
    assert oracle_ladder(rightly)["accuracy"].tolist() == [0.5, 0.5, 1.0, 1.0]


def test_a_stage_that_is_no_gate_or_not_there_is_refused(tmp_path):
    run = five_texts(tmp_path / "run")
    with pytest.raises(RunError, match="stage 'intent' is the last one"):
        ghost_matrix(run, "intent")
    with pytest.raises(SpecError, match="did you mean 'gate'"):
        ghost_matrix(run, "gaet")
    with pytest.raises(SpecError, match="did you mean 'gate'"):
        near_threshold(run, "gaet")


def test_a_single_stage_has_errors_and_nothing_to_open(tmp_path):
    run = random_run(tmp_path / "run", n_gates=0)
    table = blame(run)
    assert set(table["fault"]) == {"last"}
    assert set(table["kind"]) == {WRONG_CLASS}
    assert oracle_ladder(run).index.tolist() == ["as it is", "perfect last"]
    assert ghost_matrix(run).ghost.to_numpy().sum() == 0
    legible(OutcomeFlowDisplay.from_run(run).plot())


def test_a_run_without_errors_has_empty_tables(tmp_path):
    run = write_run(
        tmp_path / "run", [GATE, {"name": "i", "labels": ["a", "b"]}], ["a"], {"gate": [[0.1, 0.9]], "i": [[0.9, 0.1]]}
    )
    for table in (blame(run), blame_counts(run), confident_errors(run), confused_texts(run)):
        assert len(table) == 0
    legible(OutcomeFlowDisplay.from_run(run).plot())
    OracleLadderDisplay.from_run(run).plot().figure_.canvas.draw()
    GhostMatrixDisplay.from_run(run).plot().figure_.canvas.draw()
    plt.close("all")


def legible(display):
    """No two texts of a figure overlap, and none is cut off."""
    display.figure_.canvas.draw()
    boxes = {text.get_text(): text.get_window_extent() for text in display.ax_.texts}
    boxes["title"] = display.ax_._left_title.get_window_extent()
    frame = display.figure_.bbox
    for name, box in boxes.items():
        assert frame.x0 - 1 <= box.x0 <= box.x1 <= frame.x1 + 1, name
        assert frame.y0 - 1 <= box.y0 <= box.y1 <= frame.y1 + 1, name
    for (name, one), (other_name, other) in itertools.combinations(boxes.items(), 2):
        assert not one.overlaps(other), f"{name} and {other_name}"
    plt.close(display.figure_)


def title_fits(display):
    display.figure_.canvas.draw()
    assert display.ax_._left_title.get_window_extent().x1 <= display.figure_.bbox.x1
    plt.close(display.figure_)


def test_long_names_are_shortened_to_what_fits(tmp_path):
    name = "a-stage-with-a-name-that-nobody-would-write-but-may"
    stages = [{**GATE, "name": f"{name}-1"}, {**GATE, "name": f"{name}-2"}, {"name": name, "labels": ["a", "b"]}]
    rng, gold_labels = np.random.default_rng(0), ["a", "b", "oos"] * 20
    p = {stage["name"]: rng.dirichlet(np.ones(2), 60) for stage in stages}
    run = write_run(tmp_path / "run", stages, gold_labels, p, name="a cascade " * 20)
    legible(OutcomeFlowDisplay.from_run(run).plot())
    legible(OracleLadderDisplay.from_run(run, n_resamples=10).plot())


@pytest.mark.parametrize("seed", range(8))
def test_displays_of_any_cascade_are_legible_and_keep_what_they_draw(tmp_path, seed):
    run = any_run(tmp_path / "run", seed)
    thresholds = {"gate0": [0.0, 0.5, 1.0][seed % 3]}
    drawn = OutcomeFlowDisplay.from_run(run, thresholds=thresholds).plot()
    pd.testing.assert_frame_equal(drawn.flow, flow(run, thresholds=thresholds))
    said = [text.get_text() for text in drawn.ax_.texts]
    for row in drawn.flow[drawn.flow["outcome"] != GOES_ON].itertuples():
        assert any(text.startswith(row.outcome) and f": {row.n_examples:,} (" in text for text in said)
    legible(drawn)
    ladder = OracleLadderDisplay.from_run(run, thresholds=thresholds, n_resamples=50).plot()
    pd.testing.assert_frame_equal(ladder.ladder, oracle_ladder(run, thresholds=thresholds, n_resamples=50))
    legible(ladder)
    for stage in (None, "gate0"):
        ghost = GhostMatrixDisplay.from_run(run, stage=stage, thresholds=thresholds)
        np.testing.assert_array_equal(ghost.confusion_matrix, ghost_matrix(run, stage, thresholds=thresholds).ghost)
        title_fits(ghost.plot())


def test_hostile_texts_and_labels_come_through_unharmed_and_harmless(tmp_path):
    hostile = [
        "<script>alert(1)</script>",
        "=HYPERLINK(\"http://example.com\")",
        "$x_1$",
        "a" * 50_000,
        "\u202eשלום مرحبا 🙂\ttab\nline",
    ]  # fmt: skip
    run = five_texts(tmp_path / "run", texts=hostile)
    assert blame(run)["text"].tolist() == hostile[1:]
    labels = ["<b>", "$x_1$", "=1+1"]
    p = {"gate": [[0.9, 0.1], [0.2, 0.8]], "intent": [[0.6, 0.3, 0.1]] * 2}
    stages = [{**GATE, "labels": ["$", "in"]}, {"name": "intent", "labels": labels}]
    run = write_run(tmp_path / "labels", stages, ["<b>", "$x_1$"], p, texts=hostile[:1] * 2, name="$x_1$ {")
    html = blame(run)._repr_html_()
    assert "<script>" not in html
    assert "<b>" not in html
    for display in (OutcomeFlowDisplay, OracleLadderDisplay, GhostMatrixDisplay):
        display.from_run(run).plot().figure_.canvas.draw()
    plt.close("all")


def test_clinc150s_real_errors_add_up(clinc150_run):
    predictions = clinc150_run.predictions
    n_errors = int((predictions["label"] != predictions["predicted"]).sum())
    assert len(blame(clinc150_run)) == blame_counts(clinc150_run)["n_examples"].sum() == n_errors
    ladder = oracle_ladder(clinc150_run)
    assert ladder.loc["as it is", "accuracy"] == pytest.approx(clinc150_run.metrics["end_to_end"]["accuracy"])
    assert ladder.loc["all perfect", "accuracy"] == 1
    display = GhostMatrixDisplay.from_run(clinc150_run)
    assert display.confusion_matrix.sum() == (predictions["decided_by"] == "gate").sum()
    assert len(display.most_confused().display_labels) <= 15
    title_fits(display.plot())
    title_fits(display.most_confused().plot())

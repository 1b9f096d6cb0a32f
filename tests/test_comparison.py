"""Two runs compared: against following each text by itself, and with runs that cannot be compared."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
from helpers import (
    GATE,
    logits_of,
    one_stage_run,
    perturbed_run,
    random_run,
    run_of_probabilities,
    write_run,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from test_errors import end_of, stage_answer

from cascade_lab import CascadeSpec
from cascade_lab.analysis.comparison import BOTH_WRONG, LOSS, WIN, compare
from cascade_lab.analysis.decomposition import decompose
from cascade_lab.analysis.metrics import prediction_metrics
from cascade_lab.analysis.paired import holm
from cascade_lab.exceptions import RunError


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pair")
    a = random_run(folder / "a", n=300, n_gates=2, n_labels=5, seed=1, skill=2.0)
    return a, perturbed_run(a, folder / "b", thresholds={"gate0": 0.4, "last": 0.3})


def mixed_answers(gates, last, ids):
    """Return the answers of one run's gates in front of another run's last stage, one text at a time."""
    answers = []
    for example_id in ids:
        parts = [*((gates, stage) for stage in gates.spec.stages[:-1]), (last, last.spec.last)]
        rows = {id(run): run.examples["example_id"].tolist().index(example_id) for run in (gates, last)}
        of_stages = [stage_answer(stage, run.scores(stage.name).logits[rows[id(run)]]) for run, stage in parts]
        answers.append(end_of(of_stages)[1])
    return answers


@settings(max_examples=8, deadline=None)
@given(n_gates=st.integers(1, 3), n_labels=st.integers(2, 5), seed=st.integers(0, 999))
def test_a_comparison_is_that_of_following_each_text(tmp_path_factory, n_gates, n_labels, seed):
    folder, rng = tmp_path_factory.mktemp("order"), np.random.default_rng(seed)
    a = random_run(folder / "a", n=60, n_gates=n_gates, n_labels=n_labels, seed=seed)
    thresholds = {"gate0": 0.35, "last": 0.3}
    b = perturbed_run(a, folder / "b", seed=seed, order=rng.permutation(60), thresholds=thresholds)
    comparison = compare(a, b, n_resamples=50)

    ids, y_true = a.examples["example_id"].tolist(), a.examples["label"].to_numpy()
    accuracies = comparison.decomposition.accuracies
    for name, (gates, last) in {"AA": (a, a), "BA": (b, a), "AB": (a, b), "BB": (b, b)}.items():
        assert accuracies[name] == pytest.approx(np.mean(mixed_answers(gates, last, ids) == y_true))
    effects = comparison.decomposition.frame()["accuracy_gained"]
    assert effects.index.tolist() == ["gate", "classifier", "interaction"]
    assert effects.sum() == pytest.approx(comparison.metrics.loc["accuracy", "difference"], abs=1e-12)
    for side, run in (("a", a), ("b", b)):
        for name, value in prediction_metrics(run.spec, run.predictions).items():
            if name in comparison.metrics.index:
                assert comparison.metrics.loc[name, side] == pytest.approx(value, nan_ok=True), name
    merged = a.predictions.merge(b.predictions, on=["example_id", "label"])
    right_a, right_b = (merged[f"predicted_{side}"] == merged["label"] for side in "xy")
    counts = comparison.pairs["change"].value_counts()
    assert counts.get(WIN, 0) == (right_b & ~right_a).sum() == comparison.labels["wins"].sum()
    assert counts.get(LOSS, 0) == (right_a & ~right_b).sum() == comparison.labels["losses"].sum()
    differs = ~right_a & ~right_b & (merged["predicted_x"] != merged["predicted_y"])
    assert counts.get(BOTH_WRONG, 0) == differs.sum()
    counted = ["n_examples", "wins", "losses"]
    for _, rows in comparison.slices.groupby("column"):
        assert rows[counted].sum().tolist() == comparison.labels[counted].sum().tolist()


def test_the_order_of_the_rows_does_not_matter(pair, tmp_path):
    comparison, rng = compare(*pair, n_resamples=50), np.random.default_rng(0)
    shuffled = [
        perturbed_run(run, tmp_path / name, noise=0, order=rng.permutation(300))
        for run, name in zip(pair, "ab", strict=True)
    ]
    again = compare(*shuffled, n_resamples=50)
    for name in ("metrics", "labels", "slices"):
        pd.testing.assert_frame_equal(getattr(again, name), getattr(comparison, name))
    assert again.decomposition == comparison.decomposition
    changes = [c.changes(WIN).reset_index(drop=True) for c in (comparison, again)]
    pd.testing.assert_frame_equal(*changes)


def test_swapping_a_and_b_changes_the_signs(pair):
    a, b = pair
    comparison, back = compare(a, b, n_resamples=50), compare(b, a, n_resamples=50)
    np.testing.assert_allclose(back.metrics["difference"], -comparison.metrics["difference"])
    np.testing.assert_allclose(back.metrics["p_value"], comparison.metrics["p_value"])
    assert back.labels["wins"].sum() == comparison.labels["losses"].sum()


def test_a_run_against_the_same_one_differs_in_nothing(pair):
    with pytest.raises(RunError, match="is given twice; give another run"):
        compare(pair[0], pair[0])
    comparison = compare(pair[0], pair[0].with_thresholds({}))
    assert (comparison.metrics["difference"] == 0).all()
    assert (comparison.metrics["low"] <= 0).all()
    assert (comparison.metrics["high"] >= 0).all()
    assert comparison.metrics["p_holm"].equals(comparison.metrics["p_value"].rename("p_holm"))
    assert comparison.metrics["p_value"].dropna().eq(1).all()
    assert comparison.metrics["p_value"].notna().sum() == 4
    assert comparison.pairs["change"].isna().all()
    assert (comparison.labels[["p_value", "p_holm"]] == 1).all(axis=None)
    assert comparison.changed_labels().empty
    for effect in comparison.decomposition.effects.values():
        assert effect.value == 0
        assert effect.low == -effect.high < 0
    assert comparison.verdict.startswith("These texts do not show which run is right more often")
    assert "Compare them on more texts" in comparison.summary()[-1]


def test_the_changed_texts_come_with_the_most_probable_wrong_answer_first(pair):
    comparison = compare(*pair, n_resamples=50)
    for kind, columns in ((WIN, ["probability_a"]), (LOSS, ["probability_b"])):
        changed = comparison.changes(kind)
        assert changed[columns[0]].is_monotonic_decreasing
        pd.testing.assert_frame_equal(comparison.changes(kind, 3), changed.head(3))
    assert comparison.changes(BOTH_WRONG)[["probability_a", "probability_b"]].max(axis=1).is_monotonic_decreasing


def test_the_summary_begins_with_the_verdict_and_ends_with_advice():
    """B passes the five texts that A's gate stops: five wins, and no text changes for the worse."""
    last = {"name": "intent", "labels": ["a", "b"]}
    p = {"gate": [[0.6, 0.4]] * 6 + [[0.9, 0.1]] * 2, "intent": [[0.9, 0.1]] * 8}
    run = run_of_probabilities([GATE, last], ["a"] * 6 + ["oos"] * 2, p)
    comparison = compare(run, run.with_thresholds({"gate": 0.3}))
    assert comparison.verdict == (
        "B is right more often than A (B alone is right on 6 of the texts, A alone on 0; McNemar's exact test: p = "
        "0.031, below 0.05)."
    )
    sentences = comparison.summary()
    assert sentences[:2] == [comparison.verdict, comparison.difference]
    assert comparison.difference.startswith("The difference B - A is +75.00 percentage points of accuracy, with a 95% ")
    assert "Of the texts in scope, A answers 0.0% correctly and B 100.0%." in sentences[2]
    assert "largest part of the difference is the gate: +75.00 percentage points" in sentences[4]
    assert sentences[-1].startswith("Advice: prefer B to A")
    table = comparison.runs_table()
    assert table.index.tolist() == ["A", "B"]
    assert table["thresholds"].tolist() == ["gate 0.5", "gate 0.3"]


def test_four_wins_to_none_are_not_decided_whatever_the_interval():
    """Four changes of one kind occur by chance in 1 of 8 cases; the bootstrap's interval would exclude zero."""
    last = {"name": "intent", "labels": ["a", "b"]}
    p = {"gate": [[0.6, 0.4]] * 4 + [[0.1, 0.9]] * 96, "intent": [[0.9, 0.1]] * 100}
    run = run_of_probabilities([GATE, last], ["a"] * 100, p)
    comparison = compare(run, run.with_thresholds({"gate": 0.3}))
    row = comparison.metrics.loc["accuracy"]
    assert (row["difference"], row["p_value"]) == (pytest.approx(0.04), 0.125)
    assert not comparison.is_decided
    assert comparison.verdict == (
        "These texts do not show which run is right more often (B alone is right on 4 of the texts, A alone on 0; "
        "McNemar's exact test: p = 0.12, not below 0.05)."
    )
    assert "the test decides" in comparison.difference
    assert "right more often" not in "".join(comparison.summary()[1:3])
    assert comparison.summary()[-1].startswith("Advice: accuracy does not decide")


def test_wins_on_one_text_that_repeats_are_one_win():
    last = {"name": "intent", "labels": ["a", "b"]}
    p = {"gate": [[0.6, 0.4]] * 20 + [[0.1, 0.9]] * 80, "intent": [[0.9, 0.1]] * 100}
    texts = ["again"] * 20 + [f"text {i}" for i in range(80)]
    run = run_of_probabilities([GATE, last], ["a"] * 100, p, texts=texts)
    comparison = compare(run, run.with_thresholds({"gate": 0.3}))
    assert (
        "B alone is right on 1 of the different texts, A alone on 0; McNemar's exact test: p = 1" in comparison.verdict
    )
    assert comparison.summary()[2].startswith("19 of 100 texts repeat an earlier one")


def test_only_common_texts_count_and_they_must_be_the_same(pair, tmp_path):
    a, b = pair
    part = perturbed_run(a, tmp_path / "part", order=np.arange(50, 300))
    more = a.examples.copy()
    more.loc[60:, "example_id"] = "more-" + more.loc[60:, "example_id"]
    comparison = compare(part, perturbed_run(a, tmp_path / "more", examples=more))
    assert len(comparison.pairs) == 10
    assert [run["n_alone"] for run in comparison.runs] == [240, 290]

    for column, value in (("text", "another"), ("text_b", "another"), ("label", "label1")):
        examples = a.examples.copy()
        row = int(np.flatnonzero(examples["label"] == "label0")[3])
        examples.loc[row, column] = value
        with pytest.raises(RunError, match=f"'{row}' has another {column} in each; compare runs of one eval set"):
            compare(a, perturbed_run(a, tmp_path / column, examples=examples))
    strangers = a.examples.assign(example_id="no-" + a.examples["example_id"])
    with pytest.raises(RunError, match="no labelled example_id in common"):
        compare(a, perturbed_run(a, tmp_path / "strangers", examples=strangers))
    with pytest.raises(RunError, match="no column 'domian'"):
        compare(a, b, columns=["domian"])


def test_unlabelled_texts_are_left_out(pair):
    a, b = pair
    labelled = np.arange(300) >= 100
    examples = b.examples.assign(label=b.examples["label"].where(labelled, None))
    partly = perturbed_run(b, b.directory.parent / "partly", noise=0, examples=examples)
    comparison = compare(a, partly, n_resamples=50)
    expected = compare(a.select(np.flatnonzero(labelled)), b.select(np.flatnonzero(labelled)), n_resamples=50)
    pd.testing.assert_frame_equal(comparison.metrics, expected.metrics)
    assert comparison.decomposition == expected.decomposition


def test_slices_are_by_tokens_and_by_columns_of_either_run(pair, tmp_path):
    a, b = pair
    examples = b.examples.assign(
        domain=np.where(np.arange(300) % 3 == 0, "bank", None), age=np.arange(300.0), unique=a.examples["example_id"]
    )
    b = perturbed_run(b, tmp_path / "sliced", noise=0, examples=examples)
    comparison = compare(a, b)
    assert sorted(comparison.slices.index.unique("column")) == ["age", "domain", "tokens"]
    bank = comparison.slices.loc["domain", "bank"]
    rows = np.arange(300) % 3 == 0
    right = (a.predictions["predicted"] == a.predictions["label"]).to_numpy()
    assert bank["n_examples"] == 100
    assert bank["accuracy_a"] == pytest.approx(right[rows].mean())
    assert comparison.slices.loc["domain"].index.tolist().count("missing") == 1
    assert sorted(comparison.slices.loc["age", "n_examples"]) == [75, 75, 75, 75]
    assert "0 to 74" in comparison.slices.loc["age"].index
    assert set(compare(a, b, columns=["unique"]).slices.index.unique("column")) == {"unique", "tokens"}
    np.testing.assert_allclose(comparison.slices["p_holm"], holm(comparison.slices["p_value"].to_numpy()))


def test_without_shadow_scores_the_runs_are_compared_but_not_decomposed(pair, tmp_path):
    a = pair[0]
    bare = perturbed_run(a, tmp_path / "bare", shadow=False)
    with pytest.raises(RunError, match=r"stage '\w+ of B' never scored \d+ of .*shadow scores"):
        decompose(a, bare)
    comparison = compare(a, bare)
    assert comparison.decomposition is None
    assert "shadow scores" in comparison.not_decomposed
    assert len(comparison.metrics) == 7


@pytest.mark.parametrize("reject_label", [None, "oos0"])
def test_a_gate_and_k_labels_against_one_stage_of_k_plus_1(tmp_path, reject_label):
    a = random_run(tmp_path / "a", n=200, n_labels=6, seed=3)
    b = one_stage_run(a, tmp_path / "b", reject_label=reject_label)
    comparison = compare(a, b)
    out_of_scope = a.examples["label"] == "oos0"
    for side, run in (("a", a), ("b", b)):
        right = run.predictions["predicted"] == run.predictions["label"]
        assert comparison.metrics.loc["reject_recall", side] == pytest.approx(right[out_of_scope].mean())
        assert comparison.metrics.loc["in_scope_accuracy", side] == pytest.approx(right[~out_of_scope].mean())
    assert 0 < comparison.metrics.loc["accuracy", "p_value"] < 1
    assert "has one stage only" in comparison.not_decomposed
    # The same as each run's own metrics, or a note says why not.
    for side, run in (("a", a), ("b", b)):
        own = run.metrics["end_to_end"]
        scoped = {"in_scope_accuracy", "reject_recall", "reject_precision"}
        for name in (own.keys() & set(comparison.metrics.index)) - (
            scoped if side == "b" and reject_label is None else set()
        ):
            assert comparison.metrics.loc[name, side] == pytest.approx(own[name], nan_ok=True), name
    note = "B's own metrics count the label oos0 as a class; here it rejects, as in A."
    assert [text[: len(note)] for text in comparison.scope_notes] == ([note] if reject_label is None else [])
    stages = ["gate0", "last", "all stages", "all", "all stages"]
    assert comparison.latency.index.tolist() == list(zip("AAABB", stages, strict=True))
    assert comparison.latency.loc[("A", "all stages"), "mean_ms"] == pytest.approx(2 * 11 / 200)
    assert comparison.latency.loc[("B", "all stages"), "mean_ms"] == pytest.approx(11 / 200)


def test_last_stages_with_other_labels_cannot_be_swapped(tmp_path):
    a = random_run(tmp_path / "a", n=40, n_labels=3, seed=2)
    fewer = a.examples["label"] != "label2"
    last = replace(a.spec.last, labels=("label0", "label1"))
    logits = {name: scores[fewer][:, :2] for name, scores in logits_of(a).items()}
    spec = CascadeSpec("two", (*a.spec.stages[:-1], last))
    b = write_run(tmp_path / "b", spec, a.examples[fewer].reset_index(drop=True), logits)
    comparison = compare(a, b)
    assert "only one of the last stages has the label 'label2'" in comparison.not_decomposed
    assert comparison.runs[0]["n_alone"] == (~fewer).sum()

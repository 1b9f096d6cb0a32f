"""Two runs compared: by independent statistics, by brute force, and end to end.

The hand-worked pair. Four texts; gold labels x, x, y, oos, where oos rejects:

    gold   A     B
    x      x     x      both right
    x      y     x      a win
    y      y     oos    a loss
    oos    x     y      wrong otherwise

Accuracy 2/4 in both, p = 1; in scope 2/3 in both; B rejects one text, and wrongly: reject precision undefined to 0.
"""

from __future__ import annotations

import itertools
import json
from dataclasses import replace
from math import comb

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from random_runs import random_run, write_run
from sklearn.metrics import f1_score
from test_displays import drawn_inside
from typer.testing import CliRunner

from cascade_lab import ComparisonDisplay, Run
from cascade_lab.analysis.comparison import compare, decompose
from cascade_lab.analysis.metrics import figures_of
from cascade_lab.analysis.paired import holm, mcnemar, paired_figures
from cascade_lab.cli import app
from cascade_lab.errors import RunError
from cascade_lab.serial import probabilities
from cascade_lab.spec import CascadeSpec


def logits_of(run):
    return {stage.name: run.scores(stage.name).logits for stage in run.spec.stages}


def another(run, folder, *, seed=0, noise=1.5, order=None, thresholds=None, shadow=True, examples=None):
    """Write a run of the same texts by a cascade whose logits differ by chance, its rows in another order."""
    rng = np.random.default_rng(seed)
    logits = {name: scores + rng.normal(0, noise, scores.shape) for name, scores in logits_of(run).items()}
    order = np.arange(len(run.examples)) if order is None else order
    examples = (run.examples if examples is None else examples).iloc[order].reset_index(drop=True)
    logits = {name: scores[order].astype(np.float32) for name, scores in logits.items()}
    return write_run(folder, run.spec.with_thresholds(thresholds or {}), examples, logits, shadow=shadow)


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pair")
    a = random_run(folder / "a", n=300, n_gates=2, n_labels=5, seed=1, skill=2.0)
    return a, another(a, folder / "b", thresholds={"gate0": 0.4, "last": 0.3})


def test_the_hand_worked_pair():
    y_true, a, b = ["x", "x", "y", "oos"], ["x", "y", "y", "x"], ["x", "x", "oos", "y"]
    found = paired_figures(y_true, a, b, {"oos"})
    assert found.loc["accuracy", ["a", "b", "difference", "p_value"]].tolist() == [0.5, 0.5, 0, 1]
    assert found.loc["in_scope_accuracy", ["a", "b", "p_value"]].tolist() == pytest.approx([2 / 3, 2 / 3, 1])
    assert found.loc["coverage", ["a", "b", "p_value"]].tolist() == [1, 0.75, 1]
    assert found.loc["risk", ["a", "b"]].tolist() == pytest.approx([1 / 2, 1 / 3])
    assert np.isnan(found.loc["reject_precision", "a"])
    assert np.isnan(found.loc["reject_precision", "difference"])
    assert found.loc["reject_precision", "b"] == 0
    assert found.loc["macro_f1", "b"] == pytest.approx(f1_score(y_true, b, average="macro"))


def test_mcnemar_is_exact():
    """Against every way in which the texts on which A and B differ could have fallen."""
    for n in range(11):
        for wins in range(n + 1):
            outcomes = [sum(signs) for signs in itertools.product((0, 1), repeat=n)]
            as_extreme = [k for k in outcomes if abs(2 * k - n) >= abs(2 * wins - n)]
            assert mcnemar(wins, n - wins) == pytest.approx(len(as_extreme) / len(outcomes))
    assert mcnemar(40, 20) == pytest.approx(2 * sum(comb(60, k) for k in range(21)) / 2**60)


@given(st.lists(st.floats(0, 1), min_size=1, max_size=8))
def test_holm_rejects_what_the_step_down_procedure_rejects(p_values):
    p = np.array(p_values)
    adjusted = holm(p)
    for alpha in (0.01, 0.05, 0.2, 0.5):
        rejected = set()
        for step, i in enumerate(np.argsort(p, kind="stable")):
            if p[i] * (len(p) - step) > alpha:
                break
            rejected.add(int(i))
        assert set(np.flatnonzero(adjusted <= alpha)) == rejected


def test_the_intervals_cover_at_their_nominal_rate():
    """250 eval sets of 400 texts from one known population; the true differences are those of the population."""
    rng = np.random.default_rng(0)
    labels = np.array(["x", "y", "z", "oos"], dtype=object)
    gold = rng.choice(4, 40, p=[0.25, 0.25, 0.2, 0.3])
    said = [np.where(rng.random(40) < skill, gold, rng.integers(0, 4, 40)) for skill in (0.6, 0.75)]
    weights = rng.dirichlet(np.ones(40))
    truth = {}
    for name, statistic in {
        "accuracy": lambda y: weights @ (y == gold),
        "reject_recall": lambda y: weights @ ((y == gold) & (gold == 3)) / (weights @ (gold == 3)),
        "reject_precision": lambda y: weights @ ((y == gold) & (y == 3)) / (weights @ (y == 3)),
        "coverage": lambda y: weights @ (y != 3),
        "risk": lambda y: weights @ ((y != gold) & (y != 3)) / (weights @ (y != 3)),
        "macro_f1": lambda y: f1_score(gold, y, average="macro", sample_weight=weights),
    }.items():
        truth[name] = statistic(said[1]) - statistic(said[0])
    covered = dict.fromkeys(truth, 0)
    for seed in range(250):
        rows = rng.choice(40, 400, p=weights)
        y_true, a, b = (labels[codes[rows]] for codes in (gold, *said))
        found = paired_figures(y_true, a, b, {"oos"}, n_resamples=300, seed=seed)
        for name, value in truth.items():
            covered[name] += found.loc[name, "low"] <= value <= found.loc[name, "high"]
    for name, times in covered.items():
        assert 0.9 <= times / 250 <= 0.99, name


def brute_force(gates: Run, last: Run, ids):
    """Return the answers to the texts of `ids` of one run's gates before another's last stage, one text at a time."""
    answers = []
    for example_id in ids:
        for run, stage in [*((gates, stage) for stage in gates.spec.stages[:-1]), (last, last.spec.last)]:
            scores = run.scores(stage.name)
            row = run.examples["example_id"].tolist().index(example_id)
            p = dict(zip(stage.labels, probabilities(scores.logits[[row]])[0], strict=True))
            if stage.is_gate:
                if p.pop(stage.pass_label) >= stage.threshold:
                    continue
                answers.append(max(p, key=p.get))
                break
            best = max(p, key=p.get)
            answers.append(best if p[best] >= (stage.min_probability or 0) else stage.reject_label)
    return answers


@settings(max_examples=8, deadline=None)
@given(n_gates=st.integers(1, 3), n_labels=st.integers(2, 5), seed=st.integers(0, 999))
def test_a_comparison_is_brute_force_whatever_the_order_of_the_rows(tmp_path_factory, n_gates, n_labels, seed):
    folder, rng = tmp_path_factory.mktemp("order"), np.random.default_rng(seed)
    a = random_run(folder / "a", n=60, n_gates=n_gates, n_labels=n_labels, seed=seed)
    order, thresholds = rng.permutation(60), {"gate0": 0.35, "last": 0.3}
    b = another(a, folder / "b", seed=seed, order=order, thresholds=thresholds)
    found = compare(a, b, n_resamples=50)

    ids, y_true = a.examples["example_id"].tolist(), a.examples["label"].to_numpy()
    accuracies = found.decomposition.accuracies
    for name, (gates, last) in {"AA": (a, a), "BA": (b, a), "AB": (a, b), "BB": (b, b)}.items():
        assert accuracies[name] == pytest.approx(np.mean(brute_force(gates, last, ids) == y_true))
    effects = {name: effect.value for name, effect in found.decomposition.effects.items()}
    assert list(effects) == ["gate", "classifier", "interaction"]
    assert sum(effects.values()) == pytest.approx(found.figures.loc["accuracy", "difference"], abs=1e-12)
    for side, run in (("a", a), ("b", b)):
        for name, value in figures_of(run.spec, run.predictions).items():
            if name in found.figures.index:
                assert found.figures.loc[name, side] == pytest.approx(value, nan_ok=True), name
    merged = a.predictions.merge(b.predictions, on=["example_id", "label"])
    right_a, right_b = (merged[f"predicted_{side}"] == merged["label"] for side in "xy")
    counts = found.pairs["change"].value_counts()
    assert counts.get("win", 0) == (right_b & ~right_a).sum() == found.classes["wins"].sum()
    assert counts.get("loss", 0) == (right_a & ~right_b).sum() == found.classes["losses"].sum()
    otherwise = ~right_a & ~right_b & (merged["predicted_x"] != merged["predicted_y"])
    assert counts.get("wrong otherwise", 0) == otherwise.sum()
    for _, rows in found.slices.groupby("column"):
        assert (
            rows[["n_examples", "wins", "losses"]].sum().tolist()
            == found.classes[["n_examples", "wins", "losses"]].sum().tolist()
        )

    shuffled = [another(run, folder / f"{i}", noise=0, order=rng.permutation(60)) for i, run in enumerate((a, b))]
    again = compare(*shuffled, n_resamples=50)
    pd.testing.assert_frame_equal(again.figures, found.figures)
    pd.testing.assert_frame_equal(again.classes, found.classes)
    pd.testing.assert_frame_equal(again.slices, found.slices)
    assert again.decomposition == found.decomposition
    pd.testing.assert_frame_equal(
        again.changes("win").reset_index(drop=True), found.changes("win").reset_index(drop=True)
    )

    back = compare(b, a, n_resamples=50)
    np.testing.assert_allclose(back.figures["difference"], -found.figures["difference"])
    np.testing.assert_allclose(back.figures["p_value"], found.figures["p_value"])
    assert back.classes["wins"].sum() == found.classes["losses"].sum()


def test_a_run_against_itself_differs_in_nothing(pair):
    found = compare(pair[0], pair[0])
    assert (found.figures[["difference", "low", "high"]] == 0).all(axis=None)
    assert found.figures["p_value"].dropna().eq(1).all()
    assert found.figures["p_value"].notna().sum() == 4
    assert found.pairs["change"].isna().all()
    assert (found.classes[["p_value", "p_holm"]] == 1).all(axis=None)
    assert [effect == (0, 0, 0) for effect in found.decomposition.effects.values()] == [True] * 3
    assert found.verdict.startswith("Which is more often right cannot be told")


def test_only_common_texts_count_and_they_must_be_the_same(pair, tmp_path):
    a, b = pair
    part = another(a, tmp_path / "part", order=np.arange(50, 300))
    more = a.examples.copy()
    more.loc[60:, "example_id"] = "more-" + more.loc[60:, "example_id"]
    found = compare(part, another(a, tmp_path / "more", examples=more))
    assert len(found.pairs) == 10
    assert [run["n_alone"] for run in found.runs] == [240, 290]

    for column, value in (("text", "another"), ("text_b", "another"), ("label", "label1")):
        examples = a.examples.copy()
        row = int(np.flatnonzero(examples["label"] == "label0")[3])
        examples.loc[row, column] = value
        with pytest.raises(RunError, match=f"'{row}' has another {column} in each; compare runs of one eval set"):
            compare(a, another(a, tmp_path / column, examples=examples))
    strangers = a.examples.assign(example_id="no-" + a.examples["example_id"])
    with pytest.raises(RunError, match="no example_id in common"):
        compare(a, another(a, tmp_path / "strangers", examples=strangers))
    with pytest.raises(RunError, match="no column 'domian'"):
        compare(a, b, columns=["domian"])


def test_slices_are_by_words_and_by_columns_of_either_run(pair, tmp_path):
    a, b = pair
    examples = b.examples.assign(
        domain=np.where(np.arange(300) % 3 == 0, "bank", None), age=np.arange(300.0), unique=a.examples["example_id"]
    )
    b = another(b, tmp_path / "sliced", noise=0, examples=examples)
    found = compare(a, b)
    assert sorted(found.slices.index.unique("column")) == ["age", "domain", "words"]
    bank = found.slices.loc["domain", "bank"]
    rows = np.arange(300) % 3 == 0
    right = (a.predictions["predicted"] == a.predictions["label"]).to_numpy()
    assert bank["n_examples"] == 100
    assert bank["accuracy_a"] == pytest.approx(right[rows].mean())
    assert found.slices.loc["domain"].index.tolist().count("missing") == 1
    assert sorted(found.slices.loc["age", "n_examples"]) == [75, 75, 75, 75]
    assert "0 to 74" in found.slices.loc["age"].index
    assert set(compare(a, b, columns=["unique"]).slices.index.unique("column")) == {"unique", "words"}
    np.testing.assert_allclose(found.slices["p_holm"], holm(found.slices["p_value"].to_numpy()))


def test_without_shadow_scores_the_stages_cannot_be_swapped_but_the_wholes_are_compared(pair, tmp_path):
    a = pair[0]
    blind = another(a, tmp_path / "blind", shadow=False)
    with pytest.raises(RunError, match=r"blind: \d+ examples would reach its last stage.*shadow scores"):
        decompose(a, blind)
    found = compare(a, blind)
    assert found.decomposition is None
    assert "shadow scores" in found.not_decomposed
    assert len(found.figures) == 7


def one_stage(run, folder, *, seed=5, reject_label=None):
    """Write a run of the same texts through one stage of K+1 labels, the last of which is oos0."""
    last = run.spec.last
    stage = replace(last, name="all", labels=(*last.labels, "oos0"), reject_label=reject_label)
    scores = np.random.default_rng(seed).normal(size=(len(run.examples), len(stage.labels)))
    scores[np.arange(len(scores)), [stage.labels.index(label) for label in run.examples["label"]]] += 2
    return write_run(folder, CascadeSpec("one", (stage,)), run.examples, {"all": scores.astype(np.float32)})


@pytest.mark.parametrize("reject_label", [None, "oos0"])
def test_a_gate_and_k_labels_against_one_stage_of_k_plus_1(tmp_path, reject_label):
    a = random_run(tmp_path / "a", n=200, n_labels=6, seed=3)
    b = one_stage(a, tmp_path / "b", reject_label=reject_label)
    found = compare(a, b)
    out_of_scope = a.examples["label"] == "oos0"
    for side, run in (("a", a), ("b", b)):
        right = run.predictions["predicted"] == run.predictions["label"]
        assert found.figures.loc["reject_recall", side] == pytest.approx(right[out_of_scope].mean())
        assert found.figures.loc["in_scope_accuracy", side] == pytest.approx(right[~out_of_scope].mean())
    assert 0 < found.figures.loc["accuracy", "p_value"] < 1
    assert "has no gate" in found.not_decomposed
    latency = found.latency
    stages = ["gate0", "last", "all stages", "all", "all stages"]
    assert latency.index.tolist() == list(zip("AAABB", stages, strict=True))
    assert latency.loc[("A", "all stages"), "mean_ms"] == pytest.approx(2 * 11 / 200)
    assert latency.loc[("B", "all stages"), "mean_ms"] == pytest.approx(11 / 200)


def test_last_stages_with_other_labels_cannot_be_swapped(pair, tmp_path):
    a = random_run(tmp_path / "a", n=40, n_labels=3, seed=2)
    fewer = a.examples["label"] != "label2"
    last = replace(a.spec.last, labels=("label0", "label1"))
    logits = {name: scores[fewer][:, :2] for name, scores in logits_of(a).items()}
    spec = CascadeSpec("two", (*a.spec.stages[:-1], last))
    b = write_run(tmp_path / "b", spec, a.examples[fewer].reset_index(drop=True), logits)
    found = compare(a, b)
    assert "only one's last stage answers 'label2'" in found.not_decomposed
    assert found.runs[0]["n_alone"] == (~fewer).sum()


HOSTILE = [
    "<script>alert(1)</script>",
    '=HYPERLINK("http://x")',
    "$x_1$",
    "[bold]b[/bold]\x1b[31m",
    "مرحبا 🙂",
    "y" * 50_000,
]


@pytest.fixture(scope="module")
def hostile(tmp_path_factory):
    """Two runs whose texts, labels and columns are of the worst kind."""
    folder = tmp_path_factory.mktemp("hostile")
    made = random_run(folder / "made", n=200, n_labels=len(HOSTILE), seed=7)
    names = {f"label{i}": text for i, text in enumerate(HOSTILE)}
    last = replace(made.spec.last, labels=tuple(HOSTILE))
    spec = CascadeSpec(HOSTILE[3], (*made.spec.stages[:-1], last))
    texts = np.array(HOSTILE, dtype=object)[np.arange(200) % len(HOSTILE)]
    examples = made.examples.assign(text=texts, text_b=texts, label=made.examples["label"].replace(names), source=texts)
    a = write_run(folder / "a$b$", spec, examples, logits_of(made))
    return a, another(a, folder / "[bold]b")


def test_hostile_texts_are_harmless_on_the_terminal_and_whole_in_the_json(hostile, tmp_path):
    a, b = (str(run.directory) for run in hostile)
    said = CliRunner().invoke(app, ["compare", a, b, "--texts", "50", "--output", str(tmp_path / "c.json")])
    assert said.exit_code == 0, said.output
    assert "\x1b" not in said.output
    assert "[bold]b[/bold]" in said.output
    assert max(map(len, said.output.splitlines())) < 250
    written = json.loads((tmp_path / "c.json").read_text(encoding="utf-8"))
    assert {row["text"] for row in written["changes"]} == set(HOSTILE)


def inside(figure):
    """What is drawn lies inside the figure: also at the right, where the figures stand."""
    figure.canvas.draw()
    for ax in figure.axes:
        for right in ax.child_axes:
            for label in right.get_yticklabels():
                assert label.get_window_extent().x1 <= figure.bbox.x1 + 1
        if ax.axison:
            drawn_inside(figure)


@pytest.mark.parametrize("n", [2, 41, 151])
def test_the_pictures_of_n_classes_are_legible(tmp_path, n):
    a = random_run(tmp_path / "a", n=100 + 20 * n, n_labels=n, seed=n, skill=4.0)
    display = ComparisonDisplay.from_runs(a, another(a, tmp_path / "b", noise=0.6), n_resamples=100)
    for plot in (display.plot, display.plot_classes, display.plot_decomposition):
        assert plot() is display
        inside(display.figure_)
        plt.close(display.figure_)
    display.plot_classes()
    bars = {bar.get_width() for container in display.ax_.containers for bar in container}
    assert max(bars) <= display.comparison.classes["wins"].max()
    assert min(bars) == -display.comparison.classes["losses"].max()
    plt.close("all")


def test_pictures_of_hostile_labels_of_nothing_changed_and_of_no_gate(hostile, tmp_path):
    a = hostile[0]
    for display in (
        ComparisonDisplay.from_runs(*hostile),
        ComparisonDisplay.from_runs(a, a),
        ComparisonDisplay.from_runs(
            random_run(tmp_path / "a", n_labels=3), one_stage(Run(tmp_path / "a"), tmp_path / "b")
        ),
    ):
        for plot in (display.plot, display.plot_classes, display.plot_decomposition):
            _, ax = plt.subplots(layout="constrained")
            assert plot(ax=ax).ax_ is ax
            inside(display.figure_)
    plt.close("all")


def compared(*arguments):
    return CliRunner().invoke(app, ["compare", *map(str, arguments)])


def test_the_command_says_who_is_better_and_writes_it(pair, tmp_path):
    a, b = pair
    said = compared(a.directory, b.directory, "--output", tmp_path / "c.json", "--texts", 2)
    assert said.exit_code == 0, said.output
    found = compare(a, b)
    difference = found.figures.loc["accuracy", "difference"]
    assert f"{difference:+.4f}" in said.output
    assert f"B right where A is wrong: {len(found.changes('win'))}; " in said.output
    for part in ("often right than A", "classifier: B's for A's", "p (Holm)", "from separate runs", "2 most confident"):
        assert part in said.output, part
    assert max(map(len, said.output.replace(str(tmp_path), "").splitlines())) <= 100
    written = json.loads((tmp_path / "c.json").read_text(encoding="utf-8"))
    assert written["figures"][0]["difference"] == pytest.approx(difference)
    assert len(written["changes"]) == found.pairs["change"].notna().sum()
    assert sum(effect["value"] for effect in written["decomposition"]["effects"].values()) == pytest.approx(difference)
    assert written["a"]["run_id"] == a.manifest["run_id"]


def test_bad_input_is_one_line_and_exit_code_2(pair, tmp_path):
    a, b = (run.directory for run in pair)
    other = random_run(tmp_path / "other", n=300, n_gates=2, n_labels=5, seed=8).directory
    (tmp_path / "there.json").write_text("mine")
    for arguments, says in (
        ([a, tmp_path / "nowhere"], "no such run directory"),
        ([a, other], "in each; compare runs of one eval set"),
        ([a, b, "--column", "domian"], "no column 'domian'"),
        ([a, b, "--output", tmp_path / "there.json"], "exists already"),
        ([a, b, "--output", tmp_path / "no" / "c.json"], "cannot be written"),
    ):
        said = compared(*arguments)
        assert said.exit_code == 2, said.output
        assert says in said.stderr
        assert said.stderr.startswith("error: ")
        assert said.stderr.count("\n") == 1
    assert (tmp_path / "there.json").read_text() == "mine"

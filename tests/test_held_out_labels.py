"""A study with held-out labels: the protocol on real texts, its metrics, what it reads, and what it refuses."""

from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from sklearn.metrics import f1_score, roc_auc_score
from typer.testing import CliRunner

from cascade_lab import CascadeSpec, EvalSet, HeldOutDisplay, Run
from cascade_lab.analysis.duplicates import text_groups
from cascade_lab.analysis.open_set import open_set_metrics
from cascade_lab.analysis.study_results import HeldOutResults, StudyResults
from cascade_lab.cli import app
from cascade_lab.exceptions import CascadeLabError, RunError, SpecError
from cascade_lab.held_out_labels import known_labels, read_splits, run_held_out_study

DEMO = Path(__file__).parent.parent / "data"
LABELS = ("account_locked", "file_restore", "malware_suspected", "phishing_report", "sim_roaming", "username_lookup")
RECIPE = """
evaluate = "texts.csv"
out_of_scope = "oos"

[finetune]
max_seq_length = 24
train_batch_size = 16
learning_rate = 5e-4
num_train_epochs = 4
threads = 1
"""


@pytest.mark.parametrize("seed", range(5))
def test_metrics_are_those_of_scikit_learn_and_of_the_paper(seed):
    rng = np.random.default_rng(seed)
    labels = np.array(["a", "b", "c", "d", "oos"])
    y_true = rng.choice(labels, 60)
    y_pred = np.where(rng.random(60) < 0.6, y_true, rng.choice(labels, 60))
    confidence = rng.random(60).round(1)
    metrics = open_set_metrics(y_true, y_pred, confidence, open_label="oos")
    known = [label for label in labels[:-1] if label in y_true]
    scores = [f1_score(y_true, y_pred, labels=of, average="macro", zero_division=0) for of in (known, ["oos"])]
    assert (metrics["known_f1"], metrics["open_f1"]) == pytest.approx(tuple(scores))
    assert metrics["auroc"] == pytest.approx(roc_auc_score(y_true != "oos", confidence))
    assert metrics["harmonic_mean"] == pytest.approx(2 / (1 / scores[0] + 1 / scores[1]))
    # The paper's definition: F1 from precision and recall of each class, the open class last.
    f1 = []
    for label in (*known, "oos"):
        hits = ((y_true == label) & (y_pred == label)).sum()
        precision, recall = (hits / max((y == label).sum(), 1) for y in (y_pred, y_true))
        f1.append(2 * precision * recall / (precision + recall) if hits else 0.0)
    assert (np.mean(f1[:-1]), f1[-1]) == pytest.approx((metrics["known_f1"], metrics["open_f1"]))


def test_metrics_without_open_or_known_texts_are_undefined():
    """All texts known and one answered wrongly; then all texts unknown and every one rejected."""
    metrics = open_set_metrics(["a", "a"], ["a", "oos"], [0.9, 0.2], open_label="oos")
    assert metrics["known_f1"] == pytest.approx(2 / 3)
    assert np.isnan([metrics["auroc"], metrics["open_f1"], metrics["harmonic_mean"]]).all()
    metrics = open_set_metrics(["oos"], ["oos"], [0.2], open_label="oos")
    assert metrics["open_f1"] == 1
    assert np.isnan([metrics["auroc"], metrics["known_f1"], metrics["harmonic_mean"]]).all()
    metrics = open_set_metrics(["a", "oos"], ["b", "a"], [0.2, 0.9], open_label="oos")
    assert (metrics["known_f1"], metrics["open_f1"], metrics["harmonic_mean"]) == (0, 0, 0)


def test_known_labels_are_drawn_by_seed_and_grow_with_the_ratio():
    labels = [f"label {i}" for i in range(40)]
    drawn = {(ratio, seed): known_labels(labels, ratio, seed) for ratio in (0.25, 0.5, 1) for seed in range(3)}
    assert [len(drawn[ratio, 0]) for ratio in (0.25, 0.5, 1)] == [10, 20, 40]
    assert len({tuple(drawn[0.25, seed]) for seed in range(3)}) == 3
    for seed in range(3):
        assert set(drawn[0.25, seed]) < set(drawn[0.5, seed]) < set(drawn[1, seed]) == set(labels)
    assert known_labels(reversed(labels), 0.5, 1) == drawn[0.5, 1], "the order of the labels has no part in it"


@pytest.fixture(scope="module")
def ground(tmp_path_factory) -> Path:
    """A folder with texts.csv, some of the demo's texts with their splits, and study.toml."""
    folder = tmp_path_factory.mktemp("held-out")
    parts = []
    for split in ("train", "dev", "test"):
        frame = pd.read_csv(DEMO / f"{split}.tsv", sep="\t", quoting=3)
        frame = frame.loc[frame["label"].isin([*LABELS, "oos"]), ["example_id", "text", "label"]]
        parts.append(frame.groupby("label").head(60 if split == "train" else 30).assign(split=split))
    pd.concat(parts).to_csv(folder / "texts.csv", index=False)
    (folder / "study.toml").write_text(RECIPE)
    return folder


ARGUMENTS = ("--known-ratio", "0.5", "--seeds", "0", "--accept", "0.9")
RULES = ("max_probability", "mahalanobis", "energy,mahalanobis")


@pytest.fixture(scope="module")
def studied(ground) -> tuple[Path, str]:
    """The output of the command, and what it printed."""
    rules = [part for rule in RULES for part in ("--evidence", rule)]
    arguments = ("study", ground / "study.toml", "--init", DEMO / "intent", "--output", ground / "out", *ARGUMENTS)
    result = CliRunner().invoke(app, [*map(str, arguments), *rules], env={"COLUMNS": "200"})
    assert result.exit_code == 0, result.output
    return ground / "out", result.stdout


def test_a_study_never_trains_on_held_out_labels_and_tests_on_all_texts(ground, studied):
    output, printed = studied
    assert "energy + mahalanobis" in printed
    texts = pd.read_csv(ground / "texts.csv")
    known = known_labels(LABELS, 0.5, seed=0)
    assert len(known) == 3
    name = "known-0.5-seed0"
    training = json.loads((output / "models" / name / "training.json").read_text())
    assert training["labels"] == known
    is_known = texts["label"].isin(known)
    for key, split in (("train", "train"), ("dev", "dev")):
        assert training[key]["n_examples"] == (is_known & (texts["split"] == split)).sum()
    validation, test, train = (Run.read(output / "runs" / f"{name}-{split}") for split in ("val", "test", "train"))
    assert set(train.examples["label"]) == set(known)
    assert set(validation.examples["label"]) == {*known, "oos"}
    expected = texts[texts["split"] == "test"].reset_index(drop=True)
    assert test.examples["original_label"].tolist() == expected["label"].tolist()
    answers = expected["label"].where(expected["label"].isin(known), "oos")
    assert test.examples["label"].tolist() == answers.tolist()


def test_metrics_of_a_study_are_those_of_the_written_cascades(studied):
    output, _ = studied
    results = HeldOutResults.read(output / "results.json")
    runs = {split: Run.read(output / "runs" / f"known-0.5-seed0-{split}") for split in ("val", "test")}
    assert [row["rule"] for row in results.content["rows"]] == [rule.replace(",", " + ") for rule in RULES]
    for row, rule in zip(results.content["rows"], RULES, strict=True):
        spec = CascadeSpec.read(output / "cascades" / f"known-0.5-seed0-{rule.replace(',', '-')}.toml")
        replayed = runs["test"].with_spec(spec)
        y_true, y_pred = (replayed.predictions[name].tolist() for name in ("label", "predicted"))
        known = list(spec.in_scope_labels)
        f1 = [f1_score(y_true, y_pred, labels=of, average="macro", zero_division=0) for of in (known, ["oos"])]
        assert (row["test"]["known_f1"], row["test"]["open_f1"]) == pytest.approx(tuple(f1)), rule
        confidence = replayed.decision("classifier").confidence
        assert row["test"]["auroc"] == pytest.approx(roc_auc_score(np.array(y_true) != "oos", confidence))
        assert row["threshold"] == spec.last.min_probability
        if "," in rule:
            assert dict(spec.rejector.fitted_on)["n_out_of_scope"] == 30, "validation's texts of the label oos"
            continue
        # Of one score the threshold is the highest one that accepts 90% of the known validation texts.
        decision = runs["val"].with_spec(spec).decision("classifier")
        confidence = decision.confidence[(runs["val"].examples["label"] != "oos").to_numpy()]
        higher = confidence[confidence > row["threshold"]].min()
        assert np.mean(confidence >= row["threshold"]) >= 0.9 > np.mean(confidence >= higher)
        assert row["validation"]["known_accepted"] == np.mean(confidence >= row["threshold"])


def test_the_rules_tell_unknown_texts_from_known_ones(studied):
    """Three requests known, three held out, and the demo's texts out of scope, from the demo's own encoder."""
    results = HeldOutResults.read(studied[0] / "results.json")
    assert results.rows["test.auroc"].min() > 0.7
    assert results.rows["test.known_f1"].min() > 0.5


def test_a_study_resumes_and_refuses_other_settings(ground, studied):
    output, _ = studied
    before = json.loads((output / "results.json").read_text())
    trained_at = (output / "models" / "known-0.5-seed0" / "training.json").stat().st_mtime_ns
    flags = dict(max_seq_length=24, train_batch_size=16, learning_rate=5e-4, num_train_epochs=4, threads=1)
    options = {"known_ratios": [0.5], "seeds": [0], "accept": 0.9, "out_of_scope": "oos", "output": output}
    arguments = {"data": ground / "texts.csv", "init": DEMO / "intent", **options}
    again = run_held_out_study(**arguments, rules=[["max_probability"]], flags=flags)
    assert again["rows"] == before["rows"][:1]
    assert (output / "models" / "known-0.5-seed0" / "training.json").stat().st_mtime_ns == trained_at
    (output / "results.json").write_text(json.dumps(before))
    with pytest.raises(SpecError, match="was trained with other flags"):
        run_held_out_study(**arguments, flags={**flags, "num_train_epochs": 5})
    with pytest.raises(SpecError, match="was trained with other initial weights"):
        run_held_out_study(**{**arguments, "init": DEMO / "gate"}, flags=flags)


def test_results_as_tables_sentences_and_picture(studied):
    output, _ = studied
    results = HeldOutResults.read(output / "results.json")
    content = dict(results.content)
    other = [{**row, "seed": 1, "test": {**row["test"], "open_f1": 0.5}} for row in content["rows"]]
    results = HeldOutResults({**content, "rows": [*content["rows"], *other]})
    table = results.table()
    assert table.index.tolist() == [(0.5, rule.replace(",", " + ")) for rule in RULES]
    assert table["seeds"].tolist() == [2, 2, 2]
    first = content["rows"][0]["test"]["open_f1"]
    low, high = sorted([first, 0.5])
    assert table["open F1"].iloc[0] == f"{50 * (first + 0.5):.1f} ({100 * low:.1f} to {100 * high:.1f})"
    display = HeldOutDisplay.from_results(results, metric="open_f1").plot()
    row = display.frame().iloc[0]
    assert (row["mean"], row["low"], row["high"]) == pytest.approx(((first + 0.5) / 2, low, high))
    assert [text.get_text() for text in display.ax_.get_legend().get_texts()] == table.index.get_level_values(
        1
    ).tolist()
    assert len(results.curves()) == 1
    assert "With 50.0% of the labels known" in str(results.summary())
    with pytest.raises(RunError, match="did you mean 'open_f1'"):
        HeldOutDisplay.from_results(results, metric="open_f2")
    with pytest.raises(RunError, match="read it with HeldOutResults"):
        StudyResults.read(output / "results.json")


def test_damaged_results_are_refused_in_one_line(studied, tmp_path):
    good = json.loads((studied[0] / "results.json").read_text())
    row = good["rows"][0]
    rows = (
        [], [3], *([{**row, "test": {**row["test"], "auroc": value}}] for value in ("high", 1e308)),
        [{**row, "scheme": "a"}], [{**row, "known_ratio": 2}],
    )  # fmt: skip
    for change in (*({"rows": part} for part in rows), {"accept": None}, {"models": {}}):
        (tmp_path / "results.json").write_text(json.dumps({**good, **change}))
        with pytest.raises(RunError, match=r"results\.json.*; \w"):
            HeldOutResults.read(tmp_path / "results.json")


def frame_of(counts: dict[str, int]) -> pd.DataFrame:
    return pd.DataFrame(
        [(f"{label} {i}", label) for label, n in counts.items() for i in range(n)], columns=["text", "label"]
    )


def test_a_file_without_splits_is_dealt_by_label_with_equal_texts_together(tmp_path):
    frame = frame_of({"pay": 50, "play": 25, "stop": 10})
    frame = pd.concat([frame, frame.iloc[:20]])
    frame.to_csv(tmp_path / "texts.csv", index=False)
    splits, files = read_splits(tmp_path / "texts.csv")
    assert files == [tmp_path / "texts.csv"]
    together = pd.concat([evalset.examples.assign(part=split) for split, evalset in splits.items()])
    assert sorted(together["text"]) == sorted(frame["text"])
    groups = text_groups(together)
    assert together.groupby(groups)["part"].nunique().max() == 1
    counts = pd.crosstab(together["label"], together["part"])
    for label, n in frame["label"].value_counts().items():
        assert counts.loc[label, "train"] == pytest.approx(0.6 * n, abs=3)
        assert counts.loc[label, "test"] == pytest.approx(0.2 * n, abs=3)
    again, _ = read_splits(tmp_path / "texts.csv")
    assert all(again[split].examples.equals(splits[split].examples) for split in splits)


def test_splits_of_a_folder_of_a_column_and_of_clinc150s_json(tmp_path):
    frame = frame_of({"pay": 4, "play": 4})
    (tmp_path / "folder").mkdir()
    EvalSet.from_frame(frame).write(tmp_path / "folder" / "train.tsv")
    frame.to_csv(tmp_path / "folder" / "dev.csv", index=False)
    EvalSet.from_frame(frame).write(tmp_path / "folder" / "test.jsonl")
    splits, files = read_splits(tmp_path / "folder")
    assert [path.name for path in files] == ["train.tsv", "dev.csv", "test.jsonl"]
    assert {split: len(evalset) for split, evalset in splits.items()} == {"train": 8, "val": 8, "test": 8}
    pairs = frame.to_numpy().tolist()
    content = {"train": pairs, "val": pairs[:2], "test": pairs[:3], "oos_test": [["hello", "oos"]]}
    (tmp_path / "full.json").write_text(json.dumps(content))
    splits, _ = read_splits(tmp_path / "full.json")
    assert {split: len(evalset) for split, evalset in splits.items()} == {"train": 8, "val": 2, "test": 4}
    frame.assign(split=["train", "dev", "test", "train"] * 2).to_csv(tmp_path / "column.csv", index=False)
    splits, _ = read_splits(tmp_path / "column.csv")
    assert {split: len(evalset) for split, evalset in splits.items()} == {"train": 4, "val": 2, "test": 2}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("text,label,split\na,x,train\nb,x,test\n", "its splits are test, train; a study .* needs a split val"),
        ("text,label\na,x\nb,x\nc,y\n", "label 'y' has 1 texts; .* give a column split"),
        ("no table", "column 'text'"),
    ],
)
def test_files_without_three_splits_are_refused(content, message, tmp_path):
    (tmp_path / "texts.csv").write_text(content)
    with pytest.raises(CascadeLabError, match=message):
        read_splits(tmp_path / "texts.csv")
    with pytest.raises(CascadeLabError, match=r"has no file for the split train; give a folder with .*train\.tsv"):
        read_splits(tmp_path)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--seeds", "0"), "--seeds belongs to a study with held-out labels; give --known-ratio"),
        ((), "is no TOML file of a study; .* give --known-ratio"),
        (("--known-ratio", "half"), "'half' is not a list of numbers"),
        (("--known-ratio", "0.2"), "0.2 of 4 labels leaves 1; a classifier needs 2: give a ratio of at least 0.5"),
        (("--known-ratio", "1"), "1 of 4 labels holds out none; give a lower ratio"),
        (("--known-ratio", "nan"), "is nan; it must be above 0 and at most 1"),
        (("--known-ratio", "0.5", "--seeds", "-1"), "the seeds are -1; give different whole numbers from 0"),
        (("--known-ratio", "1.5"), "is 1.5; it must be above 0 and at most 1"),
        (("--known-ratio", "0.5", "--seeds", "1,1"), "give different whole numbers"),
        (("--known-ratio", "0.5", "--accept", "0"), "accept is 0; it must be above 0"),
        (("--known-ratio", "0.5", "--evidence", "enrgy"), "did you mean 'energy'"),
        (("--known-ratio", "0.5", "--evidence", "energy", "--evidence", "energy"), "a rule is given twice"),
        (("--known-ratio", "0.5", "--evidence", "energy,knn"), "rule energy,knn is fitted on .* there are 0 different"),
        (("--known-ratio", "0.5", "--out-of-scope", "stp"), "no text has the label 'stp'; did you mean 'stop'"),
        (("--known-ratio", "0.5", "--evidence", "gate"), "no evidence is named 'gate'"),
    ],
)
def test_settings_that_cannot_work_are_refused_before_a_training(arguments, message, tmp_path):
    frame_of({"pay": 10, "play": 10, "stop": 10, "call": 10}).to_csv(tmp_path / "texts.csv", index=False)
    command = ("study", tmp_path / "texts.csv", "--init", DEMO / "gate", "--output", tmp_path / "out", *arguments)
    result = CliRunner().invoke(app, list(map(str, command)))
    assert result.exit_code == 2, result.output
    assert re.search(message, " ".join(result.output.split())), result.output
    assert not (tmp_path / "out").exists()


def test_a_label_unknown_or_without_test_texts_is_refused(tmp_path):
    frame = frame_of({"pay": 10, "unknown": 10, "stop": 10})
    frame.to_csv(tmp_path / "texts.csv", index=False)
    options = {"init": DEMO / "gate", "output": tmp_path / "out"}
    with pytest.raises(SpecError, match=r"'unknown' is a label; .* give it as --out-of-scope"):
        run_held_out_study(tmp_path / "texts.csv", **options)
    frame["split"] = np.where(frame["label"] == "stop", "train", ["train", "val", "test"] * 10)
    frame.to_csv(tmp_path / "texts.csv", index=False)
    with pytest.raises(SpecError, match="label 'stop' has no text in val"):
        run_held_out_study(tmp_path / "texts.csv", **options, known_ratios=[1], out_of_scope="unknown")

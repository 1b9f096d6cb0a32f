"""Label audit: planted noise is found, and the csv file is read back as it was written."""

from __future__ import annotations

import csv
import io

import numpy as np
import pandas as pd
import pytest
from cleanlab.filter import find_label_issues
from helpers import random_run, random_spec
from hypothesis import example, given, settings
from hypothesis import strategies as st
from scipy.special import softmax
from typer.testing import CliRunner

from cascade_lab.analysis.confident_learning import label_issues
from cascade_lab.analysis.label_audit import (
    COLUMNS,
    audit,
    doubtful_labels,
    read_corrections,
    unescape_cell,
    write_audit,
)
from cascade_lab.cli import app
from cascade_lab.evalset import EvalSet
from cascade_lab.exceptions import CascadeLabError, EvalSetError, RunError
from cascade_lab.run import Run

FORMULAS = ("=", "+", "-", "@", "＝", "＋", "－", "＠")
HOSTILE = [
    '=HYPERLINK("http://x";"y")',
    "'=1+1",
    "''tis",
    "'apostrophe",
    "\t=1",
    "a;=1+1",
    'a;"=1+1"',
    "line\n=1+1\r\n-2",
    "-1",
    "+49 30",
    "@me",
    "＝1",
    "<script>alert(1)</script>",
    "$x_1$",
    "שלום =1 ‮abc",
    "🙂🏳️‍🌈",
    "",
    "x" * 50_000,
    'say "hi", ok',
]


def with_examples(run: Run, examples: pd.DataFrame) -> Run:
    """Return the same scores for other texts or labels."""
    scores = {stage.name: run.scores(stage.name) for stage in run.spec.stages}
    predictions = run.predictions.assign(label=examples["label"])
    return Run(run.manifest, examples, scores, predictions, run.timings)


def with_noise(run: Run, fraction: float, seed: int) -> tuple[Run, np.ndarray]:
    """Give a fraction of the texts another of the cascade's labels; return the run, and which texts."""
    rng = np.random.default_rng(seed)
    labels = run.examples["label"].to_numpy(dtype=object).copy()
    flipped = rng.random(len(labels)) < fraction
    for i in np.flatnonzero(flipped):
        labels[i] = rng.choice([label for label in run.spec.labels if label != labels[i]])
    return with_examples(run, run.examples.assign(label=labels)), flipped


@pytest.mark.parametrize("n_gates", [1, 2, 3])
def test_planted_noise_is_found_with_far_more_precision_than_by_reading_every_error(tmp_path, n_gates):
    clean = random_run(tmp_path / "run", n=1500, n_gates=n_gates, n_labels=6, seed=n_gates, skill=3.5)
    noisy, flipped = with_noise(clean, 0.05, seed=n_gates)
    errors = (noisy.examples["label"] != clean.predictions["predicted"]).to_numpy()
    doubtful = doubtful_labels(noisy)
    is_doubtful = noisy.examples["example_id"].isin(doubtful["example_id"]).to_numpy()
    precision, precision_of_errors = flipped[is_doubtful].mean(), flipped[errors].mean()
    assert precision > 0.7
    assert 1 - precision < (1 - precision_of_errors) / 2
    assert flipped[is_doubtful].sum() / flipped.sum() > 0.35
    # The suggested label is usually the one from before.
    original = clean.examples.set_index("example_id")["label"]
    planted = doubtful[doubtful["example_id"].isin(clean.examples["example_id"][flipped])]
    assert (original[planted["example_id"]].to_numpy() == planted["suggested_label"]).mean() > 0.85
    # The most doubtful labels come first, and are wrong more often.
    first = doubtful["example_id"].head(len(doubtful) // 2)
    assert doubtful["score"].is_monotonic_increasing
    assert flipped[noisy.examples["example_id"].isin(first)].mean() >= precision
    # Where nothing is planted, hardly anything is found.
    assert len(doubtful_labels(clean)) < 0.3 * len(doubtful)


def test_the_score_is_the_product_along_the_cascade_and_no_stage_predicts_a_doubtful_label(tmp_path):
    run, _ = with_noise(random_run(tmp_path / "run", n=400, n_gates=2, seed=3, skill=3), 0.1, seed=0)
    p0, p1, p2 = (softmax(run.scores(name).logits.astype(float), axis=1) for name in ("gate0", "gate1", "last"))
    doubtful = doubtful_labels(run)
    assert len(doubtful) > 10
    for row in doubtful.itertuples():
        i = int(row.example_id)
        probability = {"oos0": p0[i, 0], "oos1": p0[i, 1] * p1[i, 0]}
        probability |= {f"label{k}": p0[i, 1] * p1[i, 1] * p2[i, k] for k in range(4)}
        assert row.score == pytest.approx(probability[row.label])
        assert row.suggested_label == max(probability, key=probability.get)
        predicted_by_gate = {"oos0": p0[i, 0] > 0.5, "oos1": p1[i, 0] > 0.5}
        assert not predicted_by_gate.get(row.label, row.label == f"label{p2[i].argmax()}")
        assert set(row.doubted_by.split(", ")) <= {"gate0", "gate1", "last"}
        assert f"last: label{p2[i].argmax()} {p2[i].max():.2f}" in row.stages_say


def test_a_run_without_shadow_scores_is_refused(tmp_path):
    run = random_run(tmp_path / "run", n=60, n_labels=30, seed=1)
    scores = run.scores("last")
    logits = {stage.name: run.scores(stage.name).logits for stage in run.spec.stages}
    logits["last"] = np.where(scores.shadow[:, None], np.nan, scores.logits)
    with pytest.raises(RunError, match=r"never scored .* run the cascade again with shadow scores"):
        doubtful_labels(Run.from_logits(run.spec, run.examples, logits))


def test_a_label_that_no_text_has_does_no_harm(tmp_path):
    run = random_run(tmp_path / "run", n=60, n_labels=30, seed=1)
    assert set(doubtful_labels(run)["example_id"]) <= set(run.examples["example_id"])
    alone = random_run(tmp_path / "alone", n=20, n_gates=0, seed=1)
    assert "label doubted" not in audit(with_examples(alone, alone.examples.assign(label="label1")))["reason"].str.cat()


def test_unlabelled_texts_are_left_out(tmp_path):
    run, _ = with_noise(random_run(tmp_path / "run", n=300, seed=4, skill=3), 0.1, seed=0)
    is_labelled = np.arange(300) % 3 > 0
    partly = with_examples(run, run.examples.assign(label=run.examples["label"].where(is_labelled, None)))
    labelled = run.select(np.flatnonzero(is_labelled))
    pd.testing.assert_frame_equal(doubtful_labels(partly), doubtful_labels(labelled))
    pd.testing.assert_frame_equal(audit(partly, partly), audit(labelled, partly))


@pytest.mark.parametrize("seed", range(6))
def test_issues_are_those_of_cleanlab(seed):
    rng = np.random.default_rng(seed)
    n_labels, labels = int(rng.integers(2, 9)), [f"label{k}" for k in range(9)]
    p = rng.dirichlet([rng.uniform(0.1, 1)] * n_labels, 400)
    # Labels that follow the probabilities, with noise; in some cases the last label has no text.
    codes = np.array([rng.choice(n_labels, p=row) for row in p]) % (n_labels - seed % 2)
    p[:20] = np.round(p[:20], 1) + 1e-3  # ties
    p /= p.sum(axis=1, keepdims=True)
    expected = find_label_issues(codes, p, filter_by="low_self_confidence", n_jobs=1)
    is_issue = label_issues(np.array(labels, dtype=object)[codes], p, labels[:n_labels])
    assert expected.any() or n_labels - seed % 2 < 2
    np.testing.assert_array_equal(is_issue, expected)


@pytest.mark.parametrize(
    ("p", "y_true", "message"),
    [
        (np.log(np.full((2, 2), 0.5)), ["a", "b"], "not a number from 0 to 1"),
        (np.full((2, 2), np.nan), ["a", "b"], "not a number from 0 to 1"),
        (np.full((2, 2), 50.0), ["a", "b"], "not a number from 0 to 1"),
        (np.full((3, 2), 0.5), ["a", "b"], r"shape \(3, 2\), but 2 examples and 2 labels need \(2, 2\)"),
        (np.full((2, 4), 0.25), ["a", "b"], r"shape \(2, 4\)"),
    ],
)
def test_what_is_no_table_of_probabilities_is_refused(p, y_true, message):
    with pytest.raises(RunError, match=message):
        label_issues(y_true, p, ["a", "b"])


def test_issues_are_only_among_known_labels():
    rng = np.random.default_rng(0)
    p = rng.dirichlet([0.2] * 3, 300)
    y_true = np.array(["a", "b", "c"], dtype=object)[p.argmax(axis=1)]
    y_true[:30] = np.roll(["a", "b", "c"], 1)[p[:30].argmax(axis=1)]
    y_true[30:60] = [None, "unknown"] * 15
    is_issue = label_issues(y_true, p, ["a", "b", "c"])
    assert is_issue[:30].mean() > 0.5
    assert not is_issue[30:60].any()
    assert is_issue[60:].mean() < 0.05
    assert not label_issues(["a"] * 5, np.full((5, 2), 0.5), ["a", "b"]).any()


def table_of(evalset: EvalSet, corrected: list[str]) -> pd.DataFrame:
    rows = evalset.examples.assign(corrected_label=corrected, score=0.5, reason="=1")
    return rows.reindex(columns=COLUMNS).astype(object)


@pytest.fixture(scope="module")
def spec():
    return random_spec()


cells = st.text(st.characters(exclude_categories=["Cs"]) | st.sampled_from("=+-@'\t\r\n;,\"＝"), max_size=12)


@settings(max_examples=100, deadline=None)
@given(texts=st.lists(cells, min_size=1, max_size=4), ids=st.lists(cells.filter(bool), min_size=4, max_size=4))
@example(texts=HOSTILE, ids=[f"'=-{i}" for i in range(len(HOSTILE))])
def test_the_csv_runs_no_formula_and_comes_back(spec, tmp_path_factory, texts, ids):
    path = tmp_path_factory.getbasetemp() / "audit.csv"
    ids = [text.replace("\0", "0") for text in ids]
    if len(set(ids)) < len(ids):
        return
    frame = pd.DataFrame({"example_id": ids[: len(texts)], "text": texts, "label": "label1"})
    evalset = EvalSet.from_frame(frame)
    write_audit(table_of(evalset, ["label2", *[""] * (len(texts) - 1)]), path)
    content = path.read_bytes().decode("utf-8-sig")
    for row in csv.reader(io.StringIO(content, newline="")):
        assert not any(cell.startswith((*FORMULAS, "\t", "\r", "\n")) for cell in row), row
    # Where a cell begins for a spreadsheet with another separator, which may skip white space.
    for delimiter in ";\t":
        for row in csv.reader(io.StringIO(content, newline=""), delimiter=delimiter):
            assert not any(cell.lstrip("\t\r\n").startswith(FORMULAS) for cell in row), row
    corrected = read_corrections(path, evalset, spec)
    assert corrected.examples["label"].tolist() == ["label2", *["label1"] * (len(texts) - 1)]
    assert corrected.texts == texts
    # Every cell is read as it was written.
    with path.open(encoding="utf-8-sig", newline="") as file:
        texts_read = [row["text"] for row in csv.DictReader(file)]
    assert [unescape_cell(cell) for cell in texts_read] == [text.replace("\0", "") for text in texts]


@pytest.fixture
def evalset():
    frame = pd.DataFrame({"example_id": ["a", "b", "c"], "text": ["pay", "'tis\r\n-5", "x" * 50_000]})
    return EvalSet.from_frame(frame.assign(label=["label0", "oos0", "label1"], last_label=["label3", "", "label1"]))


def test_corrections_survive_what_spreadsheets_do_to_a_csv(spec, evalset, tmp_path):
    path = write_audit(table_of(evalset, ["label1", "label2", "oos0"]), tmp_path / "audit.csv")
    rows = list(csv.DictReader(io.StringIO(path.read_bytes().decode("utf-8-sig"), newline="")))
    # Rows sorted, a column missing, semicolons, other line ends, apostrophes removed, a cell cut, spaces added.
    rows = [{key: row[key] for key in ("text", "label", "corrected_label", "example_id")} for row in reversed(rows)]
    for row in rows:
        row["text"] = row["text"].removeprefix("'").replace("\r\n", "\n")[:32_767]
        row["corrected_label"] += " "
    written = io.StringIO()
    writer = csv.DictWriter(written, list(rows[0]), delimiter=";")
    writer.writeheader()
    writer.writerows(rows)
    path.write_text(written.getvalue(), encoding="utf-8-sig", newline="")
    corrected = read_corrections(path, evalset, spec)
    assert corrected.examples["label"].tolist() == ["label1", "label2", "oos0"]
    assert corrected.texts == evalset.texts
    # The stage's own label belonged to the wrong label.
    assert corrected.examples["last_label"].tolist() == ["", "", ""]
    assert evalset.examples["label"].tolist() == ["label0", "oos0", "label1"]
    assert corrected.sha256 != evalset.sha256


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ("z,pay,label0,label1", "audit.csv line 3: no example has the id 'z'"),
        ("a,pya,label0,label1", "audit.csv line 3: the text of 'a' is not the eval set's"),
        ("a,pay,label1,", "audit.csv line 3: the label of 'a' has changed; write the right one into corrected_label"),
        ("a,pay,label0,lable1", "line 3: corrected_label 'lable1' is no answer of the cascade; did you mean 'label1'"),
        ("a,pay,label0,in", "line 3: corrected_label 'in' is no answer of the cascade"),
        ("b,pay,label0,", "line 3: example_id 'b' is at .* line 2 too"),
        ("a,p\xe9y,label0,", "not UTF-8"),
    ],
)
def test_a_row_that_does_not_fit_is_named(spec, tmp_path, row, message):
    frame = pd.DataFrame({"example_id": ["a", "b"], "text": ["pay", "bill"], "label": ["label0", "label1"]})
    path = tmp_path / "audit.csv"
    path.write_bytes(f"example_id,text,label,corrected_label\nb,bill,label1,label2\n{row}\n".encode("cp1252"))
    with pytest.raises(EvalSetError, match=message) as error:
        read_corrections(path, EvalSet.from_frame(frame), spec)
    assert "\n" not in str(error.value)


def test_a_short_row_has_no_correction(spec, evalset, tmp_path):
    (tmp_path / "a.csv").write_text("example_id,text,label,corrected_label\na,pay,label0\nb,'tis -5,oos0,label2\n")
    frame = evalset.examples.assign(text=["pay", "'tis -5", ""])
    corrected = read_corrections(tmp_path / "a.csv", EvalSet.from_frame(frame), spec)
    assert corrected.examples["label"].tolist() == ["label0", "label2", "label1"]


def test_a_csv_that_is_no_audit_is_refused(spec, evalset, tmp_path):
    (tmp_path / "a.csv").write_text("text,label\npay,label0\n")
    with pytest.raises(EvalSetError, match=r"no column 'corrected_label'; give what `cascade-lab audit` wrote"):
        read_corrections(tmp_path / "a.csv", evalset, spec)


@pytest.mark.parametrize("kind", ["tsv", "jsonl", "parquet"])
def test_an_eval_set_is_written_and_read_again(tmp_path, kind):
    texts = [text for text in HOSTILE if kind != "tsv" or not any(char in text for char in "\t\r\n")]
    frame = pd.DataFrame({"text": texts, "label": "1", "topic": [*texts[1:], "last"]})
    single = EvalSet.from_frame(frame)
    paired = EvalSet.from_frame(frame.assign(text_b=[None, *texts[:-1]]).drop(index=[len(texts) - 2, len(texts) - 1]))
    for evalset in (single, paired):
        again = EvalSet.read(evalset.write(tmp_path / f"set.{kind}"))
        pd.testing.assert_frame_equal(again.examples, evalset.examples)


def test_what_a_tsv_cannot_hold_is_named_and_no_other_kind_is_written(tmp_path):
    evalset = EvalSet.from_frame(pd.DataFrame({"text": ["a", "b\nc"], "label": "1"}))
    with pytest.raises(EvalSetError, match=r"set\.tsv line 3: text contains a tab or a line break, .* write \.jsonl"):
        evalset.write(tmp_path / "set.tsv")
    with pytest.raises(EvalSetError, match=r"give a file that ends in \.tsv, \.jsonl, \.parquet"):
        evalset.write(tmp_path / "set.csv")
    (tmp_path / "file").touch()
    with pytest.raises(EvalSetError, match="cannot be written"):
        evalset.write(tmp_path / "file" / "set.jsonl")
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_an_unlabelled_eval_set_can_be_corrected(spec, tmp_path):
    frame = pd.DataFrame({"example_id": ["a", "b"], "text": ["pay", "bill"], "label": ["label0", None]})
    evalset = EvalSet.from_frame(frame, unlabelled=True)
    path = tmp_path / "audit.csv"
    path.write_text("example_id,text,label,corrected_label\na,pay,label0,label1\n")
    assert read_corrections(path, evalset, spec).examples["label"].tolist() == ["label1", None]


def test_an_audit_is_written_whole_or_not_at_all(evalset, tmp_path, small_disk):
    path = write_audit(table_of(evalset, ["", "", ""]), tmp_path / "new" / "audit.csv")
    assert path.is_file()
    large = pd.concat([table_of(evalset, ["", "", ""])] * 100)
    with pytest.raises(CascadeLabError, match="cannot be written"):
        write_audit(large, small_disk / "audit.csv")
    assert not list(small_disk.iterdir())


def test_from_a_run_to_a_corrected_eval_set_by_the_commands(tmp_path):
    clean = random_run(tmp_path / "clean", n=400, n_labels=6, seed=5, skill=4)
    noisy, flipped = with_noise(clean, 0.08, seed=5)
    texts = [f"{text} {i}" for i, text in enumerate(noisy.examples["text"])]
    texts[:4] = ["[red]=1+1[/red]\x1b[31m", "Pay me!", "pay me", "=cmd"]
    examples = noisy.examples.assign(text=texts)
    examples.loc[[1, 2], "label"] = ["label0", "label1"]
    run = with_examples(clean, examples).write(tmp_path / "run")
    training = tmp_path / "train.tsv"
    training.write_text("text\tlabel\nPAY ME\tlabel0\nnothing like it\tlabel1\n")
    path, corrected = tmp_path / "audit.csv", tmp_path / "corrected.tsv"

    def cascade_lab(*arguments):
        return CliRunner().invoke(app, [str(argument) for argument in arguments])

    result = cascade_lab("audit", run.directory, "--against", training, "--output", path)
    assert result.exit_code == 0, result.output
    assert "exact duplicate with another label" in result.output
    assert "in the other set" in result.output
    assert "\x1b" not in result.output
    refused = cascade_lab("audit", run.directory, "--output", path)
    assert refused.exit_code == 2
    assert "exists already" in refused.output
    against = ("--against", run.directory, "--overwrite")
    refused = cascade_lab("audit", run.directory, *against, "--split", "train", "--output", path)
    assert "is a run, which has no splits" in refused.output
    assert cascade_lab("audit", run.directory, *against, "--output", tmp_path / "same.csv").exit_code == 0

    table = pd.read_csv(path, dtype=str, keep_default_na=False, encoding="utf-8-sig")
    assert table.columns.tolist() == COLUMNS
    doubted = table["reason"].str.contains("doubted")
    assert doubted[: doubted.sum()].all()
    assert {"1", "2"} <= set(table["example_id"][table["reason"].str.contains("exact duplicate with another label")])
    table.loc[doubted, "corrected_label"] = table.loc[doubted, "suggested_label"]
    table.to_csv(path, index=False)
    result = cascade_lab("correct", run.directory, path, "--output", corrected)
    assert result.exit_code == 0, result.output
    assert f"{doubted.sum()} of 400 labels corrected" in result.output
    after = EvalSet.read(corrected).examples
    assert after["text"].tolist() == texts
    assert (after["label"] != clean.examples["label"]).sum() < 0.6 * flipped.sum()

"""Label audit: planted noise is found, duplicates are those of brute force, and the csv comes back as it went."""

from __future__ import annotations

import csv
import io

import numpy as np
import pandas as pd
import pyarrow.parquet as pq
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from random_runs import random_run
from scipy.special import softmax
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.metrics.pairwise import cosine_similarity
from typer.testing import CliRunner

from cascade_lab.analysis import duplicates as duplicates_room
from cascade_lab.analysis.audit import COLUMNS, _as_it_was, audit, doubtful_labels, read_corrections, write_audit
from cascade_lab.analysis.duplicates import duplicates, normalized
from cascade_lab.cli import app
from cascade_lab.errors import EvalSetError, RunError
from cascade_lab.evalset import EvalSet
from cascade_lab.run import Run, Scores, examples_table

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


def with_labels(run: Run, labels: np.ndarray) -> Run:
    fresh = Run(run.directory)
    fresh.examples = run.examples.assign(label=labels)
    return fresh


def with_noise(run: Run, fraction: float, seed: int) -> tuple[Run, np.ndarray]:
    """Give a fraction of the texts another of the cascade's labels; return the run, and which."""
    rng = np.random.default_rng(seed)
    labels = run.examples["label"].to_numpy(dtype=object).copy()
    flipped = rng.random(len(labels)) < fraction
    for i in np.flatnonzero(flipped):
        labels[i] = rng.choice([label for label in run.spec.labels if label != labels[i]])
    return with_labels(run, labels), flipped


@pytest.mark.parametrize("n_gates", [1, 2, 3])
def test_planted_noise_is_found_with_far_more_precision_than_by_reading_every_error(tmp_path, n_gates):
    made = random_run(tmp_path / "run", n=1500, n_gates=n_gates, n_labels=6, seed=n_gates, skill=3.5)
    noisy, flipped = with_noise(made, 0.05, seed=n_gates)
    errors = (noisy.examples["label"] != made.predictions["predicted"]).to_numpy()
    doubtful = doubtful_labels(noisy)
    found = noisy.examples["example_id"].isin(doubtful["example_id"]).to_numpy()
    precision, naive = flipped[found].mean(), flipped[errors].mean()
    assert precision > 0.7
    assert 1 - precision < (1 - naive) / 2
    assert flipped[found].sum() / flipped.sum() > 0.35
    # Most often, what is suggested is what the label was.
    truth = made.examples.set_index("example_id")["label"]
    planted = doubtful[doubtful["example_id"].isin(made.examples["example_id"][flipped])]
    assert (truth[planted["example_id"]].to_numpy() == planted["suggested_label"]).mean() > 0.85
    # The most doubtful come first, and are the more often wrong.
    first = doubtful["example_id"].head(len(doubtful) // 2)
    assert doubtful["score"].is_monotonic_increasing
    assert flipped[noisy.examples["example_id"].isin(first)].mean() >= precision
    # Where nothing is planted, next to nothing is found.
    assert len(doubtful_labels(made)) < 0.3 * len(doubtful)


def test_the_score_is_the_product_along_the_cascade_and_no_stage_gives_a_doubtful_label(tmp_path):
    made, _ = with_noise(random_run(tmp_path / "run", n=400, n_gates=2, seed=3, skill=3), 0.1, seed=0)
    p0, p1, p2 = (softmax(made.scores(name).logits.astype(float), axis=1) for name in ("gate0", "gate1", "last"))
    doubtful = doubtful_labels(made)
    assert len(doubtful) > 10
    for row in doubtful.itertuples():
        i = int(row.example_id)
        of = {"oos0": p0[i, 0], "oos1": p0[i, 1] * p1[i, 0]}
        of |= {f"label{k}": p0[i, 1] * p1[i, 1] * p2[i, k] for k in range(4)}
        assert row.score == pytest.approx(of[row.label])
        assert row.suggested_label == max(of, key=of.get)
        given_by = {"oos0": p0[i, 0] > 0.5, "oos1": p1[i, 0] > 0.5}
        assert not given_by.get(row.label, row.label == f"label{p2[i].argmax()}")
        assert set(row.doubted_by.split(", ")) <= {"gate0", "gate1", "last"}
        assert f"last: label{p2[i].argmax()} {p2[i].max():.2f}" in row.stages_say


def test_a_run_without_shadow_scores_is_refused_and_a_label_that_nobody_bears_does_no_harm(tmp_path):
    made = random_run(tmp_path / "run", n=60, n_labels=30, seed=1)
    assert set(doubtful_labels(made)["example_id"]) <= set(made.examples["example_id"])
    scores = made.scores("last")
    kept = ~scores.shadow
    made._scores["last"] = Scores(scores.rows[kept], scores.logits[kept], scores.shadow[kept])
    with pytest.raises(RunError, match=r"never scored .* run the cascade again with shadow scores"):
        doubtful_labels(made)
    alone = random_run(tmp_path / "alone", n=20, n_gates=0, seed=1)
    assert len(audit(with_labels(alone, np.full(20, "label1", dtype=object)))) >= 0


def brute_force(a: EvalSet, b: EvalSet, similarity: float, within: bool) -> set[tuple[str, str, bool, bool]]:
    texts, other = [normalized(t) for t in a.texts], [normalized(t) for t in b.texts]
    vectorizer = TfidfVectorizer(analyzer="char", ngram_range=(4, 4), lowercase=False, sublinear_tf=True)
    vectorizer.fit([f" {text} " for text in dict.fromkeys([*texts, *other])])
    cosines = cosine_similarity(*(vectorizer.transform([f" {text} " for text in side]) for side in (texts, other)))
    return {
        (a.examples["example_id"][i], b.examples["example_id"][j], texts[i] == other[j], one != two)
        for i, one in enumerate(a.examples["label"])
        for j, two in enumerate(b.examples["label"])
        if (texts[i] == other[j] or cosines[i, j] >= similarity) and (not within or i < j)
    }


def some_texts(n: int, seed: int, prefix: str) -> EvalSet:
    rng = np.random.default_rng(seed)
    words = ["pay", "Pay", "bill!", "now", "transfer", "money", "résumé", "résumé", "🙂", "?", "what's", "whats"]
    frame = {
        "text": [" ".join(rng.choice(words, rng.integers(0, 6))) for _ in range(n)],
        "label": rng.choice(list("ab"), n),
    }
    return EvalSet.from_frame(pd.DataFrame(frame | {"example_id": [f"{prefix}{i}" for i in range(n)]}))


def test_duplicates_are_those_of_brute_force(monkeypatch):
    a, b = some_texts(150, 0, "a"), some_texts(220, 1, "b")
    monkeypatch.setattr(duplicates_room, "_BLOCK", 2000)  # many blocks
    for other, within in ((a, True), (b, False)):
        # No cosine lies so near to the threshold that float32 could decide otherwise.
        found = duplicates(a.examples, None if within else other.examples, similarity=0.8123, most=1000)
        pairs = found[["example_id", "duplicate_id", "exact", "conflict"]].itertuples(index=False, name=None)
        assert len(found) > 100
        assert found["exact"].sum() > 20
        assert set(pairs) == brute_force(a, other, 0.8123, within)
        assert not found.duplicated(["example_id", "duplicate_id"]).any()
        assert (found["conflict"] == (found["label"] != found["duplicate_label"])).all()


def test_of_many_duplicates_the_conflicting_ones_are_kept():
    frame = pd.DataFrame({"text": ["same text"] * 500 + ["Same, text!"], "label": ["a"] * 500 + ["b"]})
    examples = EvalSet.from_frame(frame).examples
    found = duplicates(examples, most=3)
    assert len(found) < 501 * 3
    assert found["conflict"].sum() == 500
    assert found["exact"].all()
    pair = pd.DataFrame({"text": ["one", "one"], "text_b": ["two", "three"], "label": ["a", "b"]})
    assert not duplicates(EvalSet.from_frame(pair).examples)["exact"].any()


def table_of(evalset: EvalSet, corrected: list[str]) -> pd.DataFrame:
    rows = evalset.examples.assign(corrected_label=corrected, score=0.5, reason="=1")
    return rows.reindex(columns=COLUMNS).astype(object)


@pytest.fixture(scope="module")
def spec(tmp_path_factory):
    return random_run(tmp_path_factory.mktemp("runs") / "run", n=10).spec


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
    # What begins a cell for a spreadsheet with another separator, which may leave out the space before.
    for delimiter in ";\t":
        for row in csv.reader(io.StringIO(content, newline=""), delimiter=delimiter):
            assert not any(cell.lstrip("\t\r\n").startswith(FORMULAS) for cell in row), row
    corrected = read_corrections(path, evalset, spec)
    assert corrected.examples["label"].tolist() == ["label2", *["label1"] * (len(texts) - 1)]
    assert corrected.texts == texts
    # Cell by cell, what was written is what was there.
    with path.open(encoding="utf-8-sig", newline="") as file:
        read = [row["text"] for row in csv.DictReader(file)]
    assert [_as_it_was(cell) for cell in read] == [text.replace("\0", "") for text in texts]


@pytest.fixture
def evalset():
    frame = pd.DataFrame({"example_id": ["a", "b", "c"], "text": ["pay", "'tis\r\n-5", "x" * 50_000]})
    return EvalSet.from_frame(frame.assign(label=["label0", "oos0", "label1"], last_label=["label3", "", "label1"]))


def test_corrections_survive_what_spreadsheets_do_to_a_csv(spec, evalset, tmp_path):
    path = write_audit(table_of(evalset, ["label1", "label2", "oos0"]), tmp_path / "audit.csv")
    rows = list(csv.DictReader(io.StringIO(path.read_bytes().decode("utf-8-sig"), newline="")))
    # Sorted, a column gone, semicolons, line ends made one, apostrophes swallowed, a cell cut, spaces left behind.
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
    # What a stage should have said went with the wrong label.
    assert corrected.examples["last_label"].tolist() == ["", "", ""]
    assert evalset.examples["label"].tolist() == ["label0", "oos0", "label1"]
    assert corrected.sha256 != evalset.sha256


@pytest.mark.parametrize(
    ("row", "says"),
    [
        ("z,pay,label0,label1", "audit.csv line 3: no example has the id 'z'"),
        ("a,pya,label0,label1", "audit.csv line 3: the text of 'a' is not the eval set's"),
        ("a,pay,label1,", "audit.csv line 3: the label of 'a' has changed; write the right one into corrected_label"),
        ("a,pay,label0,lable1", "line 3: corrected_label 'lable1' is no answer of the cascade; did you mean 'label1'"),
        ("a,pay,label0,in", "line 3: corrected_label 'in' is no answer of the cascade"),
        ("b,pay,label0,", "line 3: example_id 'b' stands at .* line 2 too"),
        ("a,p\xe9y,label0,", "not UTF-8"),
    ],
)
def test_a_row_that_does_not_fit_is_named(spec, tmp_path, row, says):
    frame = pd.DataFrame({"example_id": ["a", "b"], "text": ["pay", "bill"], "label": ["label0", "label1"]})
    path = tmp_path / "audit.csv"
    path.write_bytes(f"example_id,text,label,corrected_label\nb,bill,label1,label2\n{row}\n".encode("cp1252"))
    with pytest.raises(EvalSetError, match=says) as error:
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
    with pytest.raises(EvalSetError, match=r"set\.tsv line 3: text would hold a tab or a line's end, .* write \.jsonl"):
        evalset.write(tmp_path / "set.tsv")
    with pytest.raises(EvalSetError, match=r"give a file that ends in \.tsv, \.jsonl, \.parquet"):
        evalset.write(tmp_path / "set.csv")
    with pytest.raises(EvalSetError, match="cannot be written"):
        evalset.write(tmp_path / "none" / "set.jsonl")
    assert not list(tmp_path.iterdir())


def test_from_a_run_to_a_corrected_eval_set_by_the_commands(tmp_path):
    made = random_run(tmp_path / "run", n=400, n_labels=6, seed=5, skill=4)
    noisy, flipped = with_noise(made, 0.08, seed=5)
    texts = [f"{text} {i}" for i, text in enumerate(noisy.examples["text"])]
    texts[:4] = ["[red]=1+1[/red]\x1b[31m", "Pay me!", "pay me", "=cmd"]
    noisy.examples["text"] = texts
    noisy.examples.loc[[1, 2], "label"] = ["label0", "label1"]
    pq.write_table(examples_table(noisy.examples), made.directory / "examples.parquet")
    training = tmp_path / "train.tsv"
    training.write_text("text\tlabel\nPAY ME\tlabel0\nnothing like it\tlabel1\n")
    path, corrected = tmp_path / "audit.csv", tmp_path / "corrected.tsv"

    def cascade_lab(*arguments):
        return CliRunner().invoke(app, [str(argument) for argument in arguments])

    said = cascade_lab("audit", made.directory, "--against", training, "--output", path)
    assert said.exit_code == 0, said.output
    assert "exact duplicate with another label" in said.output
    assert "in the other set" in said.output
    assert "\x1b" not in said.output
    refused = cascade_lab("audit", made.directory, "--output", path)
    assert refused.exit_code == 2
    assert "exists already" in refused.output
    against = ("--against", made.directory, "--overwrite")
    refused = cascade_lab("audit", made.directory, *against, "--split", "train", "--output", path)
    assert "is a run, which has no splits" in refused.output
    assert cascade_lab("audit", made.directory, *against, "--output", tmp_path / "same.csv").exit_code == 0

    table = pd.read_csv(path, dtype=str, keep_default_na=False, encoding="utf-8-sig")
    assert table.columns.tolist() == COLUMNS
    doubted = table["reason"].str.contains("doubted")
    assert doubted[: doubted.sum()].all()
    assert {"1", "2"} <= set(table["example_id"][table["reason"].str.contains("exact duplicate with another label")])
    table.loc[doubted, "corrected_label"] = table.loc[doubted, "suggested_label"]
    table.to_csv(path, index=False)
    said = cascade_lab("correct", made.directory, path, "--output", corrected)
    assert said.exit_code == 0, said.output
    assert f"{doubted.sum()} of 400 labels corrected" in said.output
    after = EvalSet.read(corrected).examples
    assert after["text"].tolist() == texts
    truth = made.examples["label"].to_numpy()
    assert (after["label"].to_numpy() != truth).sum() < 0.6 * flipped.sum()

"""Slices: what is counted is right, what is planted is found, and what is chance is not."""

from __future__ import annotations

import itertools
import json

import numpy as np
import pandas as pd
import pytest
from random_runs import random_run
from scipy.stats import binomtest, hypergeom

from cascade_lab.analysis.slices import features, find_slices, slices
from cascade_lab.errors import RunError
from cascade_lab.evalset import EvalSet
from cascade_lab.provenance import sha256
from cascade_lab.run import Run

pytestmark = pytest.mark.filterwarnings("ignore:.*slices by wordpieces are left out")

HOSTILE = [
    "it's",
    'say "hi"',
    "[a]",
    "$x_1$",
    "=HYPERLINK(1)",
    "<script>alert(1)</script>",
    "a\nb",
    "ع",
    "🙂",
    "`",
    "\\",
]


def with_columns(run: Run, **columns) -> Run:
    """Give the examples of a run further columns, and the run a fresh face; the directory stays as it is."""
    fresh = Run(run.directory)
    fresh.examples = run.examples.assign(**columns)
    return fresh


def with_errors(run: Run, wrong: np.ndarray) -> Run:
    """Let the answers be wrong where `wrong` says so."""
    answers = run.predictions.assign(predicted=np.where(wrong, "another", run.examples["label"]))
    fresh = with_columns(run)
    fresh.predictions = answers
    return fresh


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return random_run(tmp_path_factory.mktemp("runs") / "one", n=1200, n_gates=1, seed=1)


@pytest.mark.parametrize("n_gates", [1, 2, 3])
@pytest.mark.parametrize("of", ["error", "false reject", "false accept", "stage"])
def test_the_values_of_a_column_share_out_its_errors_and_a_rule_gives_its_texts(tmp_path, n_gates, of):
    made = random_run(tmp_path / "run", n=300, n_gates=n_gates, seed=n_gates)
    rng = np.random.default_rng(n_gates)
    made = with_columns(
        made,
        topic=rng.choice(["a", "b", None], 300),
        size=rng.choice([1.5, 2.25, np.nan, 7.0, -3.0, 8.0], 300),
        polite=rng.random(300) < 0.3,
    )
    stage = made.spec.stages[n_gates - 1].name
    found = slices(made, of=stage if of == "stage" else of, min_size=1)
    in_scope = made.predictions["label"].isin(made.spec.in_scope_labels)
    right = made.predictions["label"] == made.predictions["predicted"]
    rejected = made.predictions["predicted"].isin(made.spec.reject_labels)
    scores = made.scores(stage)
    reached = np.isin(np.arange(300), scores.rows[~scores.shadow])
    passes = pd.Series(made.predictions["decided_by"] != stage)
    should_pass = pd.Series(made.gold(stage) == made.spec.stage(stage).pass_label)
    asked = pd.Series(reached & pd.notna(made.gold(stage)))
    # A gate of two labels errs where it passes what it should stop, or the other way round.
    about, wrong = {
        "error": (right | True, ~right),
        "false reject": (in_scope, rejected),
        "false accept": (~in_scope, ~rejected),
        "stage": (asked, passes != should_pass),
    }[of]
    table = features(made)
    for column, rows in found.groupby("slice"):
        assert rows["n_examples"].sum() == about.sum(), column
        assert rows["n_errors"].sum() == (wrong & about).sum(), column
    for row in found.itertuples():
        members = table.query(row.rule).index
        assert (row.n_examples, row.n_errors) == (about[members].sum(), (about & wrong)[members].sum()), row.rule


def test_figures_against_the_formulas(run):
    found = slices(run, ["label", "n_words"])
    n, n_wrong = len(run.examples), int((run.predictions["label"] != run.predictions["predicted"]).sum())
    for row in found.itertuples():
        k, size = row.n_errors, row.n_examples
        assert row.error_rate == k / size
        assert row.lift == pytest.approx(k / size / (n_wrong / n))
        assert (row.low, row.high) == pytest.approx(tuple(binomtest(k, size).proportion_ci(0.95)))
        chances = hypergeom(n, n_wrong, size).pmf(np.arange(size + 1))
        assert row.p_value == pytest.approx(chances[chances <= chances[k] * (1 + 1e-7)].sum())
    p = found["p_value"].to_numpy()
    assert len(p) >= 6
    # Holm's test is Bonferroni's, closed: a row falls when every set of rows that it belongs to does.
    for i in range(len(p)):
        sets = [s for size in range(1, len(p) + 1) for s in itertools.combinations(range(len(p)), size) if i in s]
        assert found["p_holm"][i] == pytest.approx(max(min(1, len(s) * min(p[list(s)])) for s in sets))


def test_rules_of_ones_own(run):
    rules = {"short": "n_words <= 2", "pays": lambda table: table["text"].str.contains("pay"), "none": "n_words > 99"}
    found = slices(run, rules=rules).set_index("slice")
    short = run.examples["text"].str.split().str.len() <= 2
    assert found.loc["short", "n_examples"] == short.sum()
    assert found.loc["short", "n_errors"] == (short & (run.predictions["label"] != run.predictions["predicted"])).sum()
    assert found.loc["pays", "rule"] == "pays"
    assert found.loc["none", "n_examples"] == 0
    assert np.isnan(found.loc["none", "error_rate"])
    assert slices(run, "n_words", rules=["has_pay"])["slice"].nunique() == 2


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ({"by": "n_word"}, "did you mean 'n_words'"),
        ({"of": "false rejct"}, "did you mean 'false reject'"),
        ({"rules": ["n_wrods > 3"]}, "rule 'n_wrods > 3' cannot be applied"),
        ({"rules": ["n_words >"]}, "cannot be applied"),
        ({"rules": ["n_words + 1"]}, "must say true or false of each of 1200 texts"),
        ({"rules": {"x": lambda table: table["n_words"] / "a"}}, "rule 'x' cannot be applied"),
        ({"rules": {"x": lambda table: [True]}}, "must say true or false"),
        ({"by": "dates"}, "column 'dates' holds neither texts, numbers nor truth values"),
    ],
)
def test_what_cannot_be_sliced_is_refused_in_one_line(run, arguments, says):
    made = with_columns(run, dates=pd.Timestamp("2026-01-01"))
    with pytest.raises(RunError, match=says) as error:
        slices(made, **arguments)
    assert "\n" not in str(error.value)


def test_hostile_values_and_names_are_only_words(run):
    rng = np.random.default_rng(0)
    values = rng.choice(HOSTILE, len(run.examples))
    names = ["it's [x] $y$", 'q"uote', "class", "=1+1", "<script>", "a.b", "@x", "#hash", "🙂", ""]
    made = with_columns(run, **{name: values for name in names})
    table = features(made)
    found = slices(made, names)
    assert len(found) == len(names) * len(HOSTILE)
    for row in found.itertuples():
        assert len(table.query(row.rule)) == row.n_examples
        assert "\n" not in row.rule
    # No query can name these; they are counted all the same.
    made = with_columns(run, **{name: values for name in ("new\nline", "x`y")})
    assert len(slices(made, ["new\nline", "x`y"])) == 2 * len(HOSTILE)


@pytest.mark.parametrize("seed", range(3))
def test_a_planted_slice_is_found_by_its_rule_on_texts_that_the_tree_never_saw(run, seed):
    rng = np.random.default_rng(seed)
    made = with_columns(
        run,
        topic=rng.choice(["it's $money$", "talk", "play", None], 1200),
        age=rng.integers(0, 90, 1200).astype(str),  # as a tsv gives it
        noise=rng.choice(list("abcdefgh"), 1200),
    )
    planted = (made.examples["topic"] == "it's $money$") & (made.examples["age"].astype(int) > 60)
    made = with_errors(made, rng.random(1200) < np.where(planted, 0.6, 0.08))
    found = find_slices(made, seed=seed)
    best = found.iloc[0]
    assert "it's $money$" in best["rule"]
    assert "age >" in best["rule"]
    assert best["p_holm"] < 1e-6
    # Its figures are those of the rule on the half that was held out.
    held_out = np.random.default_rng(seed).permutation(1200) >= 600
    for row in found.itertuples():
        members = features(made)[held_out].query(row.rule).index
        wrong = made.predictions["label"] != made.predictions["predicted"]
        assert (row.n_examples, row.n_errors) == (len(members), wrong[members].sum()), row.rule
    members = features(made)[held_out].query(best["rule"]).index
    assert planted[members].mean() > 0.8
    assert (planted[members].sum() / planted[held_out].sum()) > 0.6
    pd.testing.assert_frame_equal(found, find_slices(made, seed=seed))


def part(run: Run, rows: np.ndarray) -> Run:
    kept = with_columns(run)
    kept.examples, kept.predictions = (t[rows].reset_index(drop=True) for t in (run.examples, run.predictions))
    return kept


def test_on_noise_slices_survive_no_more_often_than_they_may(run):
    """At level 0.1 a run has a false alarm at most one time in ten; on the texts that the tree saw, far more often."""
    topics = np.random.default_rng(0).choice(list("abcdefghij"), 1200)
    run = part(with_columns(run, topic=topics), np.arange(1200) < 500)
    n, found, given, flattered = 60, 0, 0, 0
    for seed in range(n):
        noise = with_errors(run, np.random.default_rng(1000 + seed).random(500) < 0.2)
        alarms = find_slices(noise, seed=seed)
        found += bool((alarms["p_holm"] <= 0.1).any())
        given += bool((slices(noise)["p_holm"] <= 0.1).any())
        seen = np.random.default_rng(seed).permutation(500) < 250
        flattered += bool((slices(part(noise, seen), rules=alarms["rule"].tolist())["p_holm"] <= 0.1).any())
    # More than 11 of 60 come by chance less than once in 50 times at 0.1.
    assert found <= 11
    assert given <= 11
    assert flattered > 11


def test_wordpieces_are_the_last_stages_and_go_when_its_vocabulary_does(run, tmp_path):
    vocabulary = tmp_path / "vocab.txt"
    vocabulary.write_text("\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "pay", "bill", "##s", "rare", "a"]))
    folder = tmp_path / "run"
    made = random_run(folder, n=30)
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["cascade"]["stage"][-1]["vocab_file"] = str(vocabulary)
    manifest["inputs"] = {"vocab.txt": sha256(vocabulary)}
    (folder / "manifest.json").write_text(json.dumps(manifest))
    texts = ["pay bills", "rare", "a PÁY zebra", *["pay"] * 27]
    made = with_columns(Run.read(folder), text=texts, text_b=[None, "a bill", *[None] * 28])
    table = features(made)
    assert table["n_words"].tolist()[:4] == [2, 3, 3, 1]
    assert table["n_wordpieces"].tolist()[:4] == [3, 3, 3, 1]
    assert table["n_unknown"].tolist()[:4] == [0, 0, 1, 0]
    # bill is in two texts, ##s, rare in one, a in two; pay in most.
    assert table["n_rare"].tolist()[:4] == [2, 3, 1, 0]
    assert [column for column in table if column.startswith("has_")] == ["has_pay"]
    vocabulary.write_text("[UNK]\n[CLS]\n[SEP]\npay")
    with pytest.warns(UserWarning, match=r"vocab\.txt is no longer the one of the run; slices by wordpieces are left"):
        assert "n_rare" not in features(made)
    vocabulary.unlink()
    with pytest.warns(UserWarning, match=r"vocab\.txt cannot be read \(No such file or directory\)"):
        found = slices(made, min_size=1)
    assert "n_words" in set(found["slice"])


def test_wordpieces_are_those_of_the_reference(clinc150, tmp_path):
    from cascade_lab.bert.tokenization import Tokenizer

    vocabulary = clinc150 / "intent" / "vocab.txt"
    texts = EvalSet.read(clinc150 / "data_full.json", split="val").texts
    made = random_run(tmp_path / "run", n=len(texts))
    manifest = json.loads((made.directory / "manifest.json").read_text())
    manifest["cascade"]["stage"][-1]["vocab_file"] = str(vocabulary)
    manifest["inputs"] = {"vocab.txt": sha256(vocabulary)}
    (made.directory / "manifest.json").write_text(json.dumps(manifest))
    table = features(with_columns(Run.read(made.directory), text=texts))
    reference = Tokenizer(vocabulary, do_lower_case=True, max_seq_length=64)
    assert table["n_wordpieces"].tolist() == [len(ids) for ids in reference.ids(texts)]

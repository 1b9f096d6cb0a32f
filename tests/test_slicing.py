"""Slices: counts are right, a planted slice is found, and noise is not."""

from __future__ import annotations

import itertools

import numpy as np
import pandas as pd
import pytest
from helpers import random_run
from scipy.stats import binomtest, hypergeom

from cascade_lab.analysis.slicing import error_slices, find_error_slices, find_slices, slice_summary, slices
from cascade_lab.analysis.text_features import features
from cascade_lab.evalset import EvalSet
from cascade_lab.exceptions import RunError
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


def with_columns(run: Run, *, spec=None, inputs=None, **columns) -> Run:
    """Return the run with further columns of its examples, or another spec or other digests of its inputs."""
    manifest = run.manifest | ({} if inputs is None else {"inputs": inputs})
    manifest |= {} if spec is None else {"cascade": spec}
    scores = {stage.name: run.scores(stage.name) for stage in run.spec.stages}
    return Run(manifest, run.examples.assign(**columns), scores, run.predictions, run.timings)


def with_vocabulary(run: Run, path, **columns) -> Run:
    """Return the run with a vocabulary of its last stage."""
    spec = run.spec.to_dict()
    spec["stage"][-1]["vocab_file"] = str(path)
    return with_columns(run, spec=spec, inputs={path.name: sha256(path)}, **columns)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return random_run(tmp_path_factory.mktemp("runs") / "run", n=1200, n_gates=1, seed=1)


@pytest.mark.parametrize("n_gates", [1, 2, 3])
@pytest.mark.parametrize("of", ["error", "false reject", "false accept", "stage"])
def test_the_slices_of_a_column_contain_all_its_errors_and_a_rule_gives_its_texts(tmp_path, n_gates, of):
    rng = np.random.default_rng(n_gates)
    run = with_columns(
        random_run(tmp_path / "run", n=300, n_gates=n_gates, seed=n_gates),
        topic=rng.choice(["a", "b", None], 300),
        size=rng.choice([1.5, 2.25, np.nan, 7.0, -3.0, 8.0], 300),
        polite=rng.random(300) < 0.3,
    )
    stage = run.spec.stages[n_gates - 1].name
    result = slices(run, of=stage if of == "stage" else of, min_size=1)
    in_scope = run.predictions["label"].isin(run.spec.in_scope_labels)
    right = run.predictions["label"] == run.predictions["predicted"]
    rejected = run.predictions["predicted"].isin(run.spec.reject_labels)
    scores, targets = run.scores(stage), run.targets(stage)
    passes = pd.Series(run.predictions["decided_by"] != stage)
    should_pass = pd.Series(targets == run.spec.stage(stage).pass_label)
    reached = pd.Series(scores.scored & ~scores.shadow & pd.notna(targets))
    # A gate of two labels errs where it passes a text that it should stop, or stops one that it should pass.
    about, wrong = {
        "error": (right | True, ~right),
        "false reject": (in_scope, rejected),
        "false accept": (~in_scope, ~rejected),
        "stage": (reached, passes != should_pass),
    }[of]
    table = features(run)
    for column, rows in result.groupby("slice"):
        assert rows["n_examples"].sum() == about.sum(), column
        assert rows["n_errors"].sum() == (wrong & about).sum(), column
    for row in result.itertuples():
        members = table.query(row.rule).index
        assert (row.n_examples, row.n_errors) == (about[members].sum(), (about & wrong)[members].sum()), row.rule


def test_values_equal_the_formulas(run):
    table = slices(run, ["label", "n_tokens"])
    n, n_wrong = len(run.examples), int((run.predictions["label"] != run.predictions["predicted"]).sum())
    for row in table.itertuples():
        k, size = row.n_errors, row.n_examples
        assert row.error_rate == k / size
        assert row.lift == pytest.approx(k / size / (n_wrong / n))
        assert (row.low, row.high) == pytest.approx(tuple(binomtest(k, size).proportion_ci(0.95)))
        chances = hypergeom(n, n_wrong, size).pmf(np.arange(size + 1))
        assert row.p_value == pytest.approx(chances[chances <= chances[k] * (1 + 1e-7)].sum())
    p = table["p_value"].to_numpy()
    assert len(p) >= 6
    # Holm's test is the closed form of Bonferroni's: a row is rejected if every set of rows that contains it is.
    for i in range(len(p)):
        sets = [s for size in range(1, len(p) + 1) for s in itertools.combinations(range(len(p)), size) if i in s]
        assert table["p_holm"][i] == pytest.approx(max(min(1, len(s) * min(p[list(s)])) for s in sets))


def test_your_own_rules(run):
    rules = {"short": "n_tokens <= 2", "pays": lambda table: table["text"].str.contains("pay"), "none": "n_tokens > 99"}
    table = slices(run, rules=rules).set_index("slice")
    short = run.examples["text"].str.split().str.len() <= 2
    assert table.loc["short", "n_examples"] == short.sum()
    assert table.loc["short", "n_errors"] == (short & (run.predictions["label"] != run.predictions["predicted"])).sum()
    assert table.loc["pays", "rule"] == "pays"
    assert table.loc["none", "n_examples"] == 0
    assert np.isnan(table.loc["none", "error_rate"])
    assert slices(run, "n_tokens", rules=["has_pay"])["slice"].nunique() == 2


def test_unlabelled_texts_are_left_out(run):
    is_labelled = np.arange(len(run.examples)) % 3 > 0
    examples = run.examples.assign(label=run.examples["label"].where(is_labelled, None))
    logits = {stage.name: run.scores(stage.name).logits for stage in run.spec.stages}
    partly, labelled = Run.from_logits(run.spec, examples, logits), run.select(np.flatnonzero(is_labelled))
    for of in ("error", "gate0", "false reject"):
        pd.testing.assert_frame_equal(slices(partly, of=of), slices(labelled, of=of))
        pd.testing.assert_frame_equal(find_slices(partly, of=of), find_slices(labelled, of=of))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"by": "n_token"}, "did you mean 'n_tokens'"),
        ({"of": "false rejct"}, "did you mean 'false reject'"),
        ({"rules": ["n_wrods > 3"]}, "rule 'n_wrods > 3' cannot be applied"),
        ({"rules": ["n_tokens >"]}, "cannot be applied"),
        ({"rules": ["n_tokens + 1"]}, "must give True or False for each of 1200 texts"),
        ({"rules": {"x": lambda table: table["n_tokens"] / "a"}}, "rule 'x' cannot be applied"),
        ({"rules": {"x": lambda table: [True]}}, "must give True or False"),
        ({"by": "dates"}, "column 'dates' is neither text, number nor bool"),
    ],
)
def test_what_cannot_be_sliced_is_refused_in_one_line(run, arguments, message):
    with pytest.raises(RunError, match=message) as error:
        slices(with_columns(run, dates=pd.Timestamp("2026-01-01")), **arguments)
    assert "\n" not in str(error.value)


def test_hostile_values_and_names_are_only_text(run):
    rng = np.random.default_rng(0)
    values = rng.choice(HOSTILE, len(run.examples))
    names = ["it's [x] $y$", 'q"uote', "class", "=1+1", "<script>", "a.b", "@x", "#hash", "🙂", ""]
    hostile = with_columns(run, **{name: values for name in names})
    table = features(hostile)
    result = slices(hostile, names)
    assert len(result) == len(names) * len(HOSTILE)
    for row in result.itertuples():
        assert len(table.query(row.rule)) == row.n_examples
        assert "\n" not in row.rule
    # No query can name these columns, but their slices are counted.
    hostile = with_columns(run, **{name: values for name in ("new\nline", "x`y")})
    assert len(slices(hostile, ["new\nline", "x`y"])) == 2 * len(HOSTILE)


@pytest.mark.parametrize("seed", range(3))
def test_a_planted_slice_is_found_on_texts_that_the_tree_never_saw(run, seed):
    rng = np.random.default_rng(seed)
    table = features(
        with_columns(
            run,
            topic=rng.choice(["it's $money$", "talk", "play", None], 1200),
            age=rng.integers(0, 90, 1200).astype(str),  # as a tsv gives it
            noise=rng.choice(list("abcdefgh"), 1200),
        )
    )
    planted = (table["topic"] == "it's $money$") & (table["age"] > 60)
    is_error = rng.random(1200) < np.where(planted, 0.6, 0.08)
    result = find_error_slices(table, is_error, seed=seed)
    best = result.iloc[0]
    assert "it's $money$" in best["rule"]
    assert "age >" in best["rule"]
    assert best["p_holm"] < 1e-6
    assert best["rule"] in slice_summary(result)[0]
    # Its values are those of the rule on the half that was held out.
    held_out = np.random.default_rng(seed).permutation(1200) >= 600
    for row in result.itertuples():
        members = table[held_out].query(row.rule).index
        assert (row.n_examples, row.n_errors) == (len(members), is_error[members].sum()), row.rule
    members = table[held_out].query(best["rule"]).index
    assert planted[members].mean() > 0.8
    assert (planted[members].sum() / planted[held_out].sum()) > 0.6
    pd.testing.assert_frame_equal(result, find_error_slices(table, is_error, seed=seed))


def test_slices_in_noise_are_significant_no_more_often_than_the_level(run):
    """At level 0.1, one run in ten has a false alarm; on the texts that the tree saw, far more runs have one."""
    topics = np.random.default_rng(0).choice(list("abcdefghij"), 1200)
    table = features(with_columns(run, topic=topics))[:500]
    n_searched, n_listed, n_seen = 0, 0, 0
    for seed in range(60):
        is_error = np.random.default_rng(1000 + seed).random(500) < 0.2
        searched = find_error_slices(table, is_error, seed=seed)
        n_searched += bool((searched["p_holm"] <= 0.1).any())
        n_listed += bool((error_slices(table, is_error)["p_holm"] <= 0.1).any())
        seen = np.random.default_rng(seed).permutation(500) < 250
        on_seen = error_slices(table[seen], is_error[seen], rules=searched["rule"].tolist())
        n_seen += bool((on_seen["p_holm"] <= 0.1).any())
    # More than 11 of 60 have a probability below 1/50 at 0.1.
    assert n_searched <= 11
    assert n_listed <= 11
    assert n_seen > 11


def test_the_summary_names_only_a_slice_that_is_clearly_worse(run):
    table = pd.DataFrame({"topic": ["a"] * 100 + ["b"] * 100})
    noise = np.arange(200) % 5 == 0
    assert slice_summary(error_slices(table, noise)) == ["No slice has clearly more errors than the rest."]
    worse = slice_summary(error_slices(table, noise | (table["topic"] == "b")))
    assert worse == ["Where topic == 'b', 100% of the texts are wrong: 1.7 times the error rate of all texts."]
    assert slice_summary(slices(run, rules=["n_tokens > 99"])) == ["No slice has clearly more errors than the rest."]


def test_wordpieces_come_from_the_last_stages_vocabulary(tmp_path):
    vocabulary = tmp_path / "vocab.txt"
    vocabulary.write_text("\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "pay", "bill", "##s", "rare", "a"]))
    texts = ["pay bills", "rare", "a PÁY zebra", *["pay"] * 27]
    bare = random_run(tmp_path / "run", n=30)
    run = with_vocabulary(bare, vocabulary, text=texts, text_b=[None, "a bill", *[None] * 28])
    table = features(run)
    assert table["n_tokens"].tolist()[:4] == [2, 3, 3, 1]
    assert table["n_wordpieces"].tolist()[:4] == [3, 3, 3, 1]
    assert table["n_unknown"].tolist()[:4] == [0, 0, 1, 0]
    # Two texts contain bill and a, one contains ##s and rare, most contain pay.
    assert table["n_rare"].tolist()[:4] == [2, 3, 1, 0]
    assert [column for column in table if column.startswith("has_")] == ["has_pay"]
    vocabulary.write_text("[UNK]\n[CLS]\n[SEP]\npay")
    with pytest.warns(UserWarning, match=r"vocab\.txt has changed since the run; slices by wordpieces are left out"):
        assert "n_rare" not in features(run)
    vocabulary.unlink()
    with pytest.warns(UserWarning, match=r"vocab\.txt cannot be read \(No such file or directory\)"):
        result = slices(run, min_size=1)
    assert "n_tokens" in set(result["slice"])


def test_a_stage_that_was_scored_elsewhere_has_no_wordpieces(run):
    assert run.spec.last.vocab_file is None
    with pytest.warns(UserWarning, match="stage 'last' has no vocab_file, because it was scored elsewhere; slices by"):
        table = features(run)
    assert "n_tokens" in table
    assert "n_wordpieces" not in table


def test_wordpieces_are_those_of_the_reference(clinc150, tmp_path):
    from cascade_lab.bert.tokenization import Tokenizer

    vocabulary = clinc150 / "intent" / "vocab.txt"
    texts = EvalSet.read(clinc150 / "data_full.json", split="val").texts
    run = random_run(tmp_path / "run", n=len(texts))
    table = features(with_vocabulary(run, vocabulary, text=texts))
    reference = Tokenizer(vocabulary, do_lower_case=True, max_seq_length=64)
    assert table["n_wordpieces"].tolist() == [len(ids) for ids in reference.ids(texts)]


def test_no_slice_repeats_the_label_the_split_or_the_prediction(run):
    rng = np.random.default_rng(0)
    labels, predicted = run.examples["label"], run.predictions["predicted"]
    in_scope = labels.isin(run.spec.in_scope_labels)
    numbers = labels.map({label: i for i, label in enumerate(sorted(set(labels)))})
    typos = rng.random(len(labels)) < 0.03
    given = with_columns(
        run,
        german=labels.map("Absicht {}".format),
        finer=labels + rng.choice(["/a", "/b"], len(labels)),
        number=numbers,
        nearly=np.where(typos, "label0", labels),
        scope=np.where(in_scope, "in", "out"),
        answer=predicted.to_numpy(),
        rejected=predicted.isin(run.spec.reject_labels).to_numpy(),
        split=np.where(np.arange(len(labels)) % 3 == 0, "train", "test"),
        source=np.where(np.arange(len(labels)) % 3 == 0, "a.tsv", "b.tsv"),
        stage=run.predictions["decided_by"].to_numpy(),
        one=np.where(labels == "label1", "one", rng.choice(["two", "three"], len(labels))),
        weekday=rng.choice(["mo", "tu", "we"], len(labels)),
        half=np.where(labels.isin(["label0", "oos0"]) ^ (rng.random(len(labels)) < 0.3), "x", "y"),
        unique=[f"{i}" for i in range(len(labels))],
    )
    for table in (slices(given), find_slices(given)):
        left_out = table.attrs["left_out"]
        assert left_out.pop("stage") in ("whether the text is rejected", "the stage that decides")
        assert left_out.pop("one == 'one'") == "the label"
        left_out.pop("one != 'one'", None)
        assert left_out == {
            "german": "the label",
            "finer": "the label",
            "number": "the label",
            "nearly": "the label",
            "scope": "whether the label is in scope",
            "answer": "the prediction",
            "rejected": "the prediction",
            "split": "the split",
            "source": "the split",
        }
        assert (
            "Left out of the slices, because they tell nothing new: german (repeats the label)"
            in slice_summary(table)[1]
        )
    assert {"weekday", "half", "one"} <= set(slices(given)["slice"])
    assert slices(given, "scope")["slice"].tolist() == ["scope", "scope"], "what is asked for by name is given"
    assert not slices(run).attrs["left_out"]
    assert "label" not in set(slices(run)["slice"])


def test_words_together_that_repeat_a_label_are_no_slice():
    """Of 400 texts, those with both words are the label's; each word alone says little."""
    a, b = np.arange(400) % 2 == 0, np.arange(400) % 4 < 2
    noise = np.random.default_rng(0).choice(["x", "y"], 400)
    label = np.where(a & b, "both", noise)
    table = pd.DataFrame({"label": label, "has_a": a, "has_b": b})
    both = "has_a and has_b"
    assert both in find_error_slices(table, a & b, columns=["has_b", "has_a"])["rule"].tolist()
    found = find_error_slices(table, a & b)
    assert both not in found["rule"].tolist()
    assert found.attrs["left_out"] == {both: "the label"}

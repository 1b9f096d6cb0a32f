"""Objects show themselves in one manner: compact HTML in a notebook cell, one line elsewhere, every text escaped."""

from __future__ import annotations

import inspect
import re
from dataclasses import replace
from html.parser import HTMLParser

import pandas as pd
import pytest
from helpers import HOSTILE, hostile_pair, random_run, run_of_probabilities

from cascade_lab import Cascade, CascadeSpec, EvalSet, Run, StageSpec
from cascade_lab.object_html import object_html
from cascade_lab.rejector import Rejector
from cascade_lab.reporting.html import sanitize
from cascade_lab.thresholds import Goal, tune


class Cells(HTMLParser):
    """Reads the texts of an object's HTML: of its first line, and of each row; notes every tag and attribute."""

    def __init__(self, html: str):
        super().__init__()
        self.first, self.rows, self.tags, self.attributes = "", [], set(), set()
        self.feed(html)
        self.close()

    def handle_starttag(self, tag, attributes):
        self.tags.add(tag)
        self.attributes |= {name for name, _ in attributes}
        if tag == "tr":
            self.rows.append([])
        elif tag in ("td", "th"):
            self.rows[-1].append("")

    def handle_data(self, data):
        if self.rows and self.rows[-1]:
            self.rows[-1][-1] += data.strip("\n")
        elif not self.rows:
            self.first += data.strip("\n")


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Run:
    return random_run(tmp_path_factory.mktemp("html") / "run", n=300, n_labels=7, seed=1)


def test_a_run_shows_its_texts_and_what_each_stage_decided(run):
    cells = Cells(run._repr_html_())
    accuracy = run.metrics["end_to_end"]["accuracy"]
    assert cells.first == f"random: {run.name}, 300 texts of random.tsv, accuracy {accuracy:.4f}"
    decided = run.predictions["decided_by"].value_counts()
    assert cells.rows[0] == ["stage", "role", "labels", "passes", "rejects with", "threshold", "texts", "decided"]
    at_gate = int(decided["gate0"])
    assert cells.rows[1] == ["gate0", "gate", "2: oos0, in", "in", "", "0.5", "300", f"{at_gate}"]
    assert cells.rows[2][3:] == ["", "oos0", "–", f"{300 - at_gate}", f"{decided['last']}"]
    assert cells.rows[2][2] == "7: label0, label1, label2, label3, label4, …"
    assert repr(run) == f"<Run {run.name}: 300 examples, stages gate0, last>"


def test_a_run_without_labels_and_one_with_some_say_so():
    stages = [{"name": "only", "labels": ["a", "b"]}]
    for labels, words in (([None, None], "no labels"), (["a", None], "1 with a label, accuracy 1.0000")):
        found = run_of_probabilities(stages, labels, {"only": [[0.9, 0.1], [0.2, 0.8]]})
        assert Cells(found._repr_html_()).first.endswith(f"2 texts of random.tsv, {words}")


def test_specs_show_what_is_not_as_by_default():
    gate = StageSpec("闸门", ("否", "是"), pass_label="是", threshold=0.1 + 0.2, temperature=1.5)
    rejector = Rejector(("闸门.log_odds",), (1.0,), 0.0)
    last = StageSpec("last", ("a", "b"), reject_label="no", min_probability=0.25, rejector=rejector, engine="reference")
    spec = CascadeSpec("客服", (gate, last), tuned_on={"goal": "maximize accuracy"})
    cells = Cells(spec._repr_html_())
    assert cells.first == (
        "客服: cascade of 2 stages, 2 labels in scope, rejects with 否, no, tuned to maximize accuracy"
    )
    assert cells.rows[1] == ["闸门", "gate", "2: 否, 是", "是", "", "0.30000000000000004", "temperature 1.5"]
    assert cells.rows[2][-1] == "rejector over 闸门.log_odds, engine reference"
    assert Cells(last._repr_html_()).first == "last: final stage, scored elsewhere"
    assert repr(spec) == "<CascadeSpec 客服: stages and thresholds 闸门 0.30000000000000004, last 0.25>"
    assert repr(replace(gate, threshold=0.5)) == "<StageSpec 闸门: gate, 2 labels, threshold 0.5>"


def test_an_eval_set_shows_its_first_rows_and_how_many_there_are(tiny_evalset):
    evalset = EvalSet.read(tiny_evalset)
    cells = Cells(evalset._repr_html_())
    assert cells.first == f"{tiny_evalset}: 200 texts, 5 labels"
    assert cells.rows[0] == ["example_id", "text", "label"]
    assert [row[1] for row in cells.rows[1:6]] == evalset.texts[:5]
    assert cells.rows[6:] == [["…", "…", "…"]]
    pairs = EvalSet.from_frame(pd.DataFrame({"text": ["a", "b"], "text_b": ["c", None]}), unlabelled=True)
    assert repr(pairs) == "<EvalSet a table: 2 texts, some in pairs, no labels>"
    assert Cells(pairs._repr_html_()).rows[2] == ["1", "b", "–"]
    assert Cells(pairs.take([])._repr_html_()).first == "a table: 0 texts"
    nested = EvalSet.from_frame(pd.DataFrame({"text": ["a"], "label": ["b"], "more": [[1, None]], "n": [float("nan")]}))
    assert Cells(nested._repr_html_()).rows == [["example_id", "text", "label", "more"], ["0", "a", "b", "[1, None]"]]


def test_a_cascade_and_a_tuning_show_themselves(tiny, run):
    with Cascade.load(tiny) as cascade:
        assert repr(cascade) == "<Cascade tiny: stages gate, intent>"
        assert cascade._repr_html_() == cascade.spec._repr_html_()
    tuning = tune(run, Goal("accuracy"), n_resamples=5, n_repeats=1)
    cells = Cells(tuning._repr_html_())
    assert cells.rows[1][:2] == ["gate0", "0.5"]
    value = f"{tuning.choice.metrics['accuracy']:.4f}"
    assert next(row for row in cells.rows if row[:2] == ["this set", "accuracy"])[3] == value


def test_hostile_texts_are_shown_as_they_are_and_a_report_changes_nothing(tmp_path):
    run, _ = hostile_pair(tmp_path)
    evalset = EvalSet.from_frame(run.examples.drop(columns="example_id"))
    for shown in (run, run.spec, run.spec.last, evalset, tune(run, Goal("accuracy"), n_resamples=5, n_repeats=1)):
        html, line = shown._repr_html_(), repr(shown)
        cells = Cells(html)
        assert cells.tags == {"p", "b", "bdi", "table", "thead", "tbody", "tr", "th", "td"}
        assert cells.attributes == {"dir", "style"}
        assert "\x1b" not in html + line
        assert line.count("\n") == 0
        assert len(html) < 12_000
        kept = Cells(sanitize(html))
        assert (kept.rows, kept.attributes) == (cells.rows, cells.attributes)
    assert any(HOSTILE[0] in cell for row in Cells(evalset._repr_html_()).rows for cell in row)


def test_numbers_are_aligned_to_the_right_and_texts_as_their_script_is_read():
    html = object_html("x", [], [{"n": "1,451", "p": "-0.5%", "text": "مرحبا"}, {"n": "–", "p": "", "text": "12"}])
    assert re.findall(r'<td dir="auto" style="text-align: (\w+)">', html) == ["right", "right", "start"] * 2


def test_the_docstring_of_run_names_every_attribute():
    names = {name for name, value in vars(Run).items() if not name.startswith("_") and not inspect.isroutine(value)}
    listed = Run.__doc__.partition("Attributes")[2]
    for name in {*names, "manifest", "directory", "name"}:
        assert re.search(rf"\b{name}\b", listed), name

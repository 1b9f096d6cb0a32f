"""Confusions and slices that open to their texts: which texts, what is shown, and that no text does anything."""

from __future__ import annotations

import re
from html import unescape

import numpy as np
import pytest
from helpers import HOSTILE, hostile_pair, mixed_run, random_run
from test_errors import five_texts

from cascade_lab import open_confusions, open_slices
from cascade_lab.analysis import confident_errors, confused_pairs, slices
from cascade_lab.analysis.outcomes import ERRORS, outcomes
from cascade_lab.analysis.text_features import features
from cascade_lab.exceptions import RunError


def tables(html):
    """The groups as people see them: the line, then the cells of each text."""
    parts = re.findall(r"<details><summary>(.*?)</summary>(.*?)</details>", html, flags=re.DOTALL)
    plain = lambda part: unescape(re.sub(r"<[^>]*>", "", part.replace("<br>", " | ")))  # noqa: E731
    rows = [re.findall(r"<tr>(.*?)</tr>", body.split("<tbody>")[1], flags=re.DOTALL) for _, body in parts]
    return [
        (plain(line), [[plain(cell) for cell in re.findall(r"<td[^>]*>(.*?)</td>", row, flags=re.DOTALL)] for row in r])
        for (line, _), r in zip(parts, rows, strict=True)
    ]


def test_five_texts_by_hand():
    """The cascade of `test_errors`: each stage's most probable label, and its probability of the right one."""
    run = five_texts(texts=["pay a", "pay b", "pay bb", "hello", "pay bbb"])
    opened = open_confusions(run, n_similar=1)
    shown = tables(opened._repr_html_())
    assert [line for line, _ in shown] == [
        "b → oos: 2 texts, 66.7% of this true label",
        "b → c: 1 text, 33.3% of this true label",
        "oos → a: 1 text, 100.0% of this true label",
    ]
    first = shown[0][1]
    assert [cells[:3] for cells in first] == [
        ["pay bb", "oos 0.80; in 0.20", "(c 0.60; b 0.30)"],
        ["pay b", "oos 0.60; in 0.40", "(b 0.70)"],
    ]
    assert re.fullmatch(r"pay bbb \(b, 0\.\d\d\)", first[0][3])
    assert shown[2][1][0][1:3] == ["in 0.70; oos 0.30", "a 0.50"]
    frame = opened.frame()
    assert len(frame) == 4
    assert frame["similar_id"].iloc[0] == "t5"
    assert frame[["label", "predicted", "n_examples"]].iloc[0].tolist() == ["b", "oos", 2]
    assert repr(opened) == "<GroupedTexts: 3 confusions of by hand, 4 texts>"


def test_class_confusions_are_apart_from_errors_of_the_scope():
    run = mixed_run(3, n=120)
    kinds = {}
    for outcome in ERRORS:
        frame = open_confusions(run, None, 1000, outcome=outcome, n_similar=0).texts
        assert (outcomes(run.spec, frame["label"], frame["predicted"]) == outcome).all()
        kinds[outcome] = set(frame["example_id"])
    assert sum(map(len, kinds.values())) == len(confident_errors(run, None))
    both = open_confusions(run, None, 1000, outcome=("false accept", "false reject"), n_similar=0).texts
    assert set(both["example_id"]) == kinds["false accept"] | kinds["false reject"]
    with pytest.raises(RunError, match="did you mean 'wrong class'"):
        open_confusions(run, outcome="wrong clas")


def test_the_most_frequent_confusions_at_other_thresholds(tmp_path):
    run = random_run(tmp_path / "run", n=300)
    thresholds = {"gate0": 0.9}
    opened = open_confusions(run, 5, 2, n_similar=0, thresholds=thresholds)
    expected = confused_pairs(run.with_thresholds(thresholds), n=5)["n_examples"].tolist()
    assert opened.groups["n_examples"].tolist() == expected
    assert opened.texts.groupby("group").size().max() <= 2


def test_slices_open_to_their_errors(tmp_path):
    run = random_run(tmp_path / "run", n=300)
    table = slices(run, by="n_tokens")
    opened = open_slices(run, table, 3, 4)
    assert len(opened) == min(3, (table["n_errors"] > 0).sum())
    shown = [cells[1:3] for _, rows in tables(opened._repr_html_()) for cells in rows]
    assert shown == opened.texts[["label", "predicted"]].to_numpy().tolist()
    described = features(run).set_index("example_id")
    for place, group in opened.groups.iterrows():
        texts = opened.texts[opened.texts["group"] == place]
        assert (texts["label"] != texts["predicted"]).all()
        assert len(texts) == min(4, group["n_errors"])
        assert described.loc[texts["example_id"]].eval(group["rule"]).all()
    with pytest.raises(RunError, match="use the columns of features"):
        open_slices(run, table.assign(rule="my own"))


def test_nothing_in_texts_and_labels_does_anything(tmp_path):
    run, _ = hostile_pair(tmp_path)
    few = run.select(np.arange(24))  # texts of 50,000 characters are slow to describe
    for opened in (open_confusions(run, 40, 6), open_slices(few, slices(few, by="source", min_size=1))):
        html = opened._repr_html_()
        assert set(re.findall(r"<(\w+)", html)) <= {
            "div", "details", "summary", "table", "thead", "tbody", "tr", "th", "td", "span", "br", "p",
        }  # fmt: skip
        assert not re.search(r"<[^>]*\bon\w+=", html)
        assert "\x1b" not in html + repr(opened)
        assert len(html) < 600_000
    shown = str(tables(open_confusions(run, 40, 6)._repr_html_()))
    assert HOSTILE[0] in shown
    assert 'dir="auto">مرحبا 🙂</span>' in open_confusions(run, 40, 6)._repr_html_()


def test_a_run_without_errors_has_no_group():
    run = five_texts()
    right = run.select(np.array([0]))
    assert len(open_confusions(right)) == 0
    assert open_confusions(right)._repr_html_() == "<p>No text.</p>"
    assert len(open_confusions(right).frame()) == 0
    assert len(open_slices(right, slices(right))) == 0

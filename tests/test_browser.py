"""The error browser without a page, and by the messages of a page; `test_browser_page.py` drives it in JupyterLab."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from helpers import HOSTILE, hostile_pair, logits_of, memory_run, random_run
from test_errors import five_texts
from typer.testing import CliRunner

import cascade_lab.browser as browser_module
from cascade_lab import CascadeSpec, EvalSet, Run, browse
from cascade_lab.analysis import confusion, slices
from cascade_lab.cli import app
from cascade_lab.exceptions import CascadeLabError, EvalSetError, RunError

PAGE = Path(browser_module.__file__)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return random_run(tmp_path_factory.mktemp("runs") / "one", n=300, seed=4)


def sent(browser):
    """What the page got: the widget's state, through JSON."""
    return json.loads(json.dumps(browser.get_state(["_overview", "_slices", "_view", "_similar", "_status"])))


def ask(browser, do, **command):
    browser._command = {"do": do, "n": browser._command.get("n", 0) + 1, **command}
    return sent(browser)["_status"]


def test_five_texts_by_hand():
    browser = browse(five_texts())
    view = sent(browser)["_view"]
    assert (view["title"], view["n"], view["n_pages"], view["n_marks"]) == ("all texts", 5, 1, 0)
    browser.select(label="b", predicted="oos")
    assert browser.texts["example_id"].tolist() == ["t3", "t2"]
    row = sent(browser)["_view"]["rows"][0]
    shown = {key: row[key] for key in ("id", "texts", "label", "predicted", "right", "action")}
    assert shown == {
        "id": "t3", "texts": ["text 3"], "label": "b", "predicted": "oos", "right": False, "action": "",
    }  # fmt: skip
    assert plain(row["outcome"]) == "unrecoverable reject, fault of gate"
    assert [(name, plain(says), reached) for name, says, reached in row["stages"]] == [
        ("gate", "oos 0.80; in 0.20", True),
        ("intent", "c 0.60; b 0.30", False),
    ]
    assert plain(sent(browser)["_view"]["title"]) == "b → oos"
    assert repr(browser) == "<Browser: run random-0, 5 texts, 0 marked>"


def plain(text):
    return re.sub("[\u2068\u2069]", "", text)


def test_cells_of_the_page_are_those_of_the_matrix(run):
    browser = browse(run)
    overview = sent(browser)["_overview"]
    matrix = confusion(run)
    assert overview["labels"] == list(matrix.index)
    cells = [overview["cells"][k : k + 3] for k in range(0, len(overview["cells"]), 3)]
    assert {(i, j): n for i, j, n in cells} == {
        (i, j): n for i, row in enumerate(matrix.to_numpy().tolist()) for j, n in enumerate(row) if n
    }
    assert (
        sum(n for *_, n in overview["confusions"]) == (run.predictions["label"] != run.predictions["predicted"]).sum()
    )
    for band in overview["bands"]:
        browser.selection = band["conditions"]
        assert sent(browser)["_view"]["n"] == band["n"]


def test_pages_searches_and_orders_from_the_page(run):
    browser = browse(run)
    first = [row["id"] for row in sent(browser)["_view"]["rows"]]
    assert len(first) == browser_module.PAGE_SIZE
    browser.page = 1
    second = [row["id"] for row in sent(browser)["_view"]["rows"]]
    assert [*first, *second] == browser.texts["example_id"].tolist()[:50]
    browser.page = 10_000
    assert sent(browser)["_view"]["page"] == 11
    browser.search = "bill"
    assert browser.page == 0
    view = sent(browser)["_view"]
    assert view["n"] == run.examples["text"].str.contains("bill").sum() == len(browser.texts)
    browser.shown, browser.order = "errors", "shortest first"
    assert (browser.texts["label"] != browser.texts["predicted"]).all()
    assert browser.texts["text"].str.len().is_monotonic_increasing
    browser.search = "nothing has this"
    assert sent(browser)["_view"]["n"] == 0


def test_slices_are_computed_when_asked_for_and_select_their_texts(run):
    browser = browse(run)
    assert sent(browser)["_slices"] == []
    ask(browser, "slices")
    listed = sent(browser)["_slices"]
    assert listed
    for rule, _, n, n_errors in listed:
        browser.select(rule=rule)
        # find_slices measures on half of the texts
        assert sent(browser)["_view"]["n"] >= n
        assert (browser.texts["label"] != browser.texts["predicted"]).sum() >= n_errors
    own = slices(run, rules=["n_tokens > 5"])
    browser = browse(run, slices=own)
    ask(browser, "slices")
    assert [row[0] for row in sent(browser)["_slices"]] == ["n_tokens > 5"]


def test_similar_texts_are_sent_when_asked_for(run):
    browser = browse(run)
    ask(browser, "similar", ids=["7"])
    similar = sent(browser)["_similar"]
    expected = browser.similar("7")
    assert similar["id"] == "7"
    assert [row[0] for row in similar["rows"]] == expected["text"].tolist()
    assert similar["by"] == "characters"


def test_marks_are_written_and_correct_reads_them(run, tmp_path):
    """Through the command, as a person does it."""
    browser = browse(run)
    browser.shown = "errors"
    errors = browser.texts.head(4)
    a, b, c, d = errors["example_id"]
    assert ask(browser, "mark", ids=[a], action="relabel")["text"] == "marked 1 with relabel"
    other = next(label for label in run.spec.labels if label != errors["label"][1])
    ask(browser, "mark", ids=[b], action="relabel", corrected_label=other)
    ask(browser, "mark", ids=[c, d], action="augment")
    ask(browser, "unmark", ids=[d])
    assert browser.marks.to_numpy().tolist() == [
        [a, "relabel", errors["predicted"][0]], [b, "relabel", other], [c, "augment", ""],
    ]  # fmt: skip
    assert {row["id"]: row["action"] for row in sent(browser)["_view"]["rows"]}[c] == "augment"
    path = tmp_path / "new" / "marks.csv"
    assert ask(browser, "write", path=str(path))["text"] == f"wrote 3 marks: {path}"
    table = pd.read_csv(path, dtype=str, keep_default_na=False)
    assert table["action"].tolist() == ["relabel", "relabel", "augment"]
    assert table["stages_say"][0].startswith("gate0: ")

    output = tmp_path / "corrected.tsv"
    result = CliRunner().invoke(app, ["correct", str(run.directory), str(path), "--output", str(output)])
    assert result.exit_code == 0, result.output
    assert "2 of 300 labels corrected" in result.output
    corrected = EvalSet.read(output).examples.set_index("example_id")["label"]
    before = run.examples.set_index("example_id")["label"]
    assert corrected[corrected != before].to_dict() == {a: errors["predicted"][0], b: other}

    again = browse(run, marks=path)
    assert again.marks.equals(browser.marks)
    again.mark([d], "review")
    assert again.write(path) == path  # its own file
    assert len(browse(run, marks=path).marks) == 4


def test_what_cannot_be_done_is_said_and_changes_nothing(run, tmp_path):
    browser = browse(run)
    right = run.predictions[run.predictions["label"] == run.predictions["predicted"]].iloc[0]
    for command, message in [
        ({"do": "write", "path": str(tmp_path / "marks.csv")}, "no text is marked"),
        ({"do": "mark", "ids": [right["example_id"]], "action": "relabel"}, "already; give the label"),
        ({"do": "mark", "ids": ["1", "nobody"], "action": "review"}, "has no example 'nobody'"),
        ({"do": "mark", "ids": ["1"], "action": "relable"}, "did you mean 'relabel'"),
        ({"do": "mark", "ids": ["1"], "action": "relabel", "corrected_label": "labell1"}, "did you mean 'label1'"),
        ({"do": "mark", "ids": ["1"], "action": "review", "corrected_label": "label1"}, "takes no label"),
    ]:
        status = ask(browser, **command)
        assert status["wrong"], command
        assert message in status["text"]
    assert len(browser.marks) == 0
    browser.selection = {"label": "nobody"}
    assert "there is no label 'nobody'" in sent(browser)["_status"]["text"]
    for wrong in ({"label": "nobody"}, {"colour": "red"}, {"rule": "import os"}):
        with pytest.raises(RunError):
            browser.select(**wrong)

    browser.mark(["1"], "review")
    (tmp_path / "there.csv").write_text("mine")
    for name, message in [("there.csv", "exists already"), ("marks.tsv", r"ends in \.csv"), ("", r"ends in \.csv")]:
        with pytest.raises(CascadeLabError, match=message):
            browser.write(tmp_path / name)
    assert (tmp_path / "there.csv").read_text() == "mine"
    browser.write(tmp_path / "there.csv", overwrite=True)

    content = (tmp_path / "there.csv").read_text(encoding="utf-8-sig")
    for old, new, message in [
        ("action", "deed", "no column 'action'"),
        ("review", "revieww", "did you mean 'review'"),
        ('"1"', '"nobody"', "no example has the id 'nobody'"),
    ]:
        (tmp_path / "bad.csv").write_text(content.replace(old, new))
        with pytest.raises(EvalSetError, match=message):
            browse(run, marks=tmp_path / "bad.csv")
    with pytest.raises(RunError, match="no example has a label"):
        browse(Run.from_logits(run.spec, run.examples.assign(label=None), logits_of(run)))


def test_labels_texts_and_columns_that_would_do_something(tmp_path):
    """Nothing of a text is HTML: the page makes text nodes of strings, and the static page is escaped."""
    run = hostile_pair(tmp_path)[0].select(np.arange(36))
    browser = browse(run)
    assert sent(browser)["_overview"]["labels"][: len(HOSTILE)] == HOSTILE
    assert len(json.dumps(sent(browser))) < 400_000
    for label in set(run.examples["label"]) & set(HOSTILE):
        browser.select(label=label)
        assert (browser.texts["label"] == label).all()
        ids = browser.texts["example_id"].tolist()
        assert "\x1b" not in json.dumps(sent(browser)["_view"], ensure_ascii=False)
        ask(browser, "similar", ids=ids[:1])
        browser.mark(ids, "relabel", next(other for other in HOSTILE if other != label))
    path = browser.write(tmp_path / "marks.csv")
    assert all(cell[:1] not in "=+-@" for cell in pd.read_csv(path, dtype=str)["text"])
    assert browse(run, marks=path).marks.equals(browser.marks)
    html = browser._repr_mimebundle_()[0]["text/html"]
    assert "<script" not in html


def test_chinese_labels_and_texts():
    run = five_texts(
        texts=["我想查余额", "播放音乐", "余额是多少", "今天天气", "放一首歌"], labels=("a", "b", "b", "oos", "b")
    )
    spec = run.spec
    last = replace(spec.last, labels=("查余额", "放音乐", "天气"))
    names = dict(zip("abc", last.labels, strict=True))
    examples = run.examples.assign(label=run.examples["label"].replace(names))
    run = memory_run(CascadeSpec("中文", (spec.stages[0], last)), examples, logits_of(run))
    browser = browse(run)
    browser.select(label="放音乐", predicted="oos")
    assert sorted(browser.texts["text"]) == ["余额是多少", "播放音乐"]
    browser.search = "播放"
    assert browser.texts["text"].tolist() == ["播放音乐"]
    assert sent(browser)["_overview"]["shown_labels"] == ["查余额", "放音乐", "天气", "oos"]


def test_without_a_kernel_there_is_a_picture_and_a_table(run):
    bundle, _ = browse(run)._repr_mimebundle_()
    assert "application/vnd.jupyter.widget-view+json" in bundle
    assert bundle["image/png"].startswith("iVBOR")
    assert "<details>" in bundle["text/html"]
    assert bundle["text/plain"] == repr(browse(run))


def test_the_page_never_parses_a_text_as_html():
    script = PAGE.with_suffix(".js").read_text(encoding="utf-8")
    for word in (
        "innerHTML",
        "outerHTML",
        "insertAdjacentHTML",
        "document.write",
        "eval(",
        "Function(",
        "http",
        "import(",
    ):
        assert word not in script, word
    assert script.count('dir: "auto"') >= 2
    assert "url(" not in PAGE.with_suffix(".css").read_text(encoding="utf-8")

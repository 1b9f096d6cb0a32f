"""Tests that hostile strings reach neither the terminal nor a page: commands, objects and figures get them everywhere.

They are in texts, labels, columns, the names of cascades, files and folders, in a manifest and in `[tuned_on]`.
"""

from __future__ import annotations

import json
import re
import unicodedata
from dataclasses import replace
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
from helpers import logits_of, perturbed_run, random_run, write_run
from matplotlib.text import Text
from typer.testing import CliRunner

from cascade_lab import CascadeSpec, Run
from cascade_lab.analysis import compare, error_summary, run_summary, slices
from cascade_lab.bert import fast
from cascade_lab.cli import app
from cascade_lab.displays import (
    CascadeCalibrationDisplay,
    CascadeConfusionDisplay,
    ComparisonDisplay,
    CounterfactualMatrixDisplay,
    OracleLadderDisplay,
    OutcomeFlowDisplay,
    RiskCoverageDisplay,
    StageLatencyDisplay,
    ThresholdDisplay,
)
from cascade_lab.explorer import explore
from cascade_lab.text import visible
from cascade_lab.thresholds import Goal, tune

EVIL = (
    "\x1b[31m\x1b]8;;http:e.x\x1b\\L\x9b2J\x07\u202e\u2066\u200b\U000e0041[red]r[/red][link=http:e.x]k[/link][/oops]"
    ":smile:<img src=x onerror=x()>&#x202e;$x_1$ \\frac $"
)
"""Escape sequences, a link, directions, zero-width characters, rich's markup, HTML and a formula; no separator."""
NAME = EVIL.replace("/", "|")  # of files
MARKUP = "[red]r"


def is_seen(char: str) -> bool:
    """Return whether a terminal shows a character and does nothing else with it."""
    return char == "\n" or unicodedata.category(char) not in ("Cc", "Cf", "Cs", "Zl", "Zp")


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> tuple[Run, Run]:
    """Two runs whose every name and text is hostile."""
    folder = tmp_path_factory.mktemp("evil")
    made = random_run(folder / "made", n=60, n_labels=3, seed=7)
    gate, last = made.spec.stages
    gate = replace(gate, labels=(f"{EVIL}no", f"{EVIL}in"), pass_label=f"{EVIL}in")
    last = replace(last, labels=tuple(f"{EVIL}{i}" for i in range(3)), reject_label=f"{EVIL}no", min_probability=0.3)
    names = {"oos0": f"{EVIL}no"} | {f"label{i}": f"{EVIL}{i}" for i in range(3)}
    evalset = {"run_id": EVIL, "goal": EVIL, "evalset": {"n_examples": 60, "split": EVIL, "sha256": EVIL}}
    spec = CascadeSpec(EVIL, (gate, last), tuned_on={**evalset, "figures": {"accuracy": 0.5}})
    examples = made.examples.assign(
        text=[f"{EVIL}{i}" for i in range(60)], text_b=EVIL, label=made.examples["label"].replace(names)
    )
    examples[EVIL] = [f"{EVIL}{i % 2}" for i in range(60)]
    run = write_run(folder / f"a{NAME}", spec, examples, logits_of(made))
    path = run.directory / "manifest.json"
    manifest = json.loads(path.read_text(encoding="utf-8"))
    manifest |= {"run_id": EVIL, "processor": EVIL, "started": EVIL, "packages": {EVIL: EVIL}, "source": EVIL}
    path.write_text(json.dumps(manifest), encoding="utf-8")
    run = Run.read(run.directory)
    return run, perturbed_run(run, folder / f"b{NAME}")


def shown(*arguments: object, code: int = 0) -> str:
    """Call a command as on a terminal with colours; return what it prints, without colours, which are few."""
    environment = {"FORCE_COLOR": "1", "TERM": "xterm", "COLUMNS": "200"}
    result = CliRunner().invoke(app, [str(argument) for argument in arguments], env=environment)
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    assert result.exit_code == code, result.output
    output = result.stdout + result.stderr
    plain = re.sub(r"\x1b\[[0-9;]*m", "", output)
    assert all(map(is_seen, plain)), plain.encode("unicode_escape")
    assert not re.search(r"\x1b\[(31|[0-9;]*)m�?\]8", output)
    return plain


def test_commands_on_runs(runs, tmp_path):
    a, b = (run.directory for run in runs)
    assert MARKUP in shown("inspect", a)
    for command in (
        ["tune", a, "--maximize", "accuracy", "--by-label", "--write-anyway", "--output", tmp_path / f"{NAME}.toml"],
        ["calibrate", a, "--output", tmp_path / f"c{NAME}.toml"],
        ["compare", a, b, "--output", tmp_path / f"{NAME}.json", "--column", EVIL],
        ["audit", a, "--against", b, "--output", tmp_path / f"{NAME}.csv"],
        ["correct", a, tmp_path / f"{NAME}.csv", "--output", tmp_path / f"{NAME}.jsonl"],
    ):
        assert MARKUP in shown(*command), command[0]
        assert MARKUP in shown(command[0], *[NAME if part is a else part for part in command[1:]], code=2)
    np.save(tmp_path / f"{NAME}.npy", runs[0].scores("gate0").logits)
    np.save(tmp_path / "last.npy", runs[0].scores("last").logits)
    toml, rows = tmp_path / f"{NAME}.toml", tmp_path / f"{NAME}.jsonl"
    logits = ["--logits", f"gate0={tmp_path / NAME}.npy", "--logits", f"last={tmp_path / 'last.npy'}"]
    assert MARKUP in shown("import-logits", toml, rows, *logits, "--output", tmp_path / f"run{NAME}")
    for command in (
        ["report", a, "--notebook", EVIL],
        ["report", a, "-p", MARKUP + NAME.replace("=", "")],
        ["verify", tmp_path / f"{NAME}.json"],
    ):
        assert MARKUP in shown(*command, code=2)


def test_commands_on_files_that_cannot_be_used(tmp_path):
    """What a file holds is in the message that refuses it."""
    for number, content in enumerate(
        (f'name = """{quoted(EVIL)}"""', f'"{quoted(EVIL)}" = 1', f'[[stage]]\nname = "{quoted(EVIL)}"', f"x = {EVIL}")
    ):
        path = tmp_path / f"{number}{NAME}.toml"
        path.write_text(content, encoding="utf-8", newline="")
        assert MARKUP in shown("inspect", path, code=2)
    for ending, content in {
        "tsv": f"{EVIL}\tlabel\na\tb\n",
        "csv": f'text,label\n"{EVIL},b\n',
        "jsonl": json.dumps({"text": [EVIL], "label": EVIL}),
        "json": json.dumps({EVIL: EVIL}),
    }.items():
        path = tmp_path / f"{NAME}.{ending}"
        path.write_text(content, encoding="utf-8")
        shown("vocabulary", "--train", path, "--output", tmp_path / "v.txt", code=2)
    for option in ("--" + EVIL, "--split"):
        shown("vocabulary", option, code=2)
    shown(EVIL, code=2)


def quoted(text: str) -> str:
    """Return a text as TOML's basic strings have it."""
    return json.dumps(text)[1:-1].replace("\\u001b", "\\u001B")


def test_commands_that_load_a_cascade(tiny, tmp_path):
    spec = CascadeSpec.read(tiny)
    gate = replace(spec.stages[0], labels=(f"{EVIL}no", f"{EVIL}in"), pass_label=f"{EVIL}in")
    last = replace(spec.last, labels=tuple(f"{EVIL}{i}" for i in range(4)))
    toml = tmp_path / f"{NAME}.toml"
    CascadeSpec(EVIL, (gate, last)).write(toml)
    rows = tmp_path / f"{NAME}.jsonl"
    labels = [*gate.labels[:1], *last.labels]
    rows.write_text(
        "".join(json.dumps({"text": f"{EVIL}{i}", "label": labels[i % 5], EVIL: EVIL}) + "\n" for i in range(20)),
        encoding="utf-8",
    )
    run = tmp_path / f"run{NAME}"
    study = ["--batch-sizes", "1,4", "--repeats", 2, "--batches", 2, "--output", tmp_path / f"l{NAME}"]
    for command in (
        ["inspect", toml],
        ["predict", toml, EVIL, "pay"],
        ["attribute", toml, EVIL, "--n-steps", 1, "--output", tmp_path / f"{NAME}.html"],
        ["run", toml, rows, "--output", run, "--no-report"],
        ["latency", toml, rows, *study],
    ):
        assert MARKUP in shown(*command), command[0]
    shown("verify-precision", toml, rows, "--limit", 4, code=0 if fast.has_bfloat16() else 2)
    lines = shown("predict", toml, "--json", EVIL).splitlines()
    assert [json.loads(line)["text"] for line in lines] == [EVIL]
    page = (tmp_path / f"{NAME}.html").read_text(encoding="utf-8")
    assert all(map(is_seen, page))
    assert "<img" not in page


def test_pages_and_reprs(runs, tmp_path):
    run, other = runs
    tuning = tune(run, Goal(maximize="accuracy"))
    comparison = compare(run, other)
    explorer = explore(run)
    explorer.sliders["gate0"].value = explorer.sliders["gate0"].max
    for shown_object in (
        run,
        tuning,
        comparison,
        OutcomeFlowDisplay.from_run(run),
        run_summary(run),
        error_summary(run),
    ):
        assert all(map(is_seen, repr(shown_object))) or isinstance(shown_object, list), type(shown_object)
        assert all(map(is_seen, str(shown_object))), type(shown_object)
        for method in ("_repr_html_", "_repr_markdown_"):
            page = getattr(shown_object, method, str)()
            assert "<img" not in page
            assert all(map(is_seen, page)), (type(shown_object), method)
    page = explorer.html + explorer.status.value + explorer.children[0].children[0].value
    assert "<img" not in page
    assert all(map(is_seen, page))
    assert "<img" not in slices(run, [EVIL])._repr_html_()


@pytest.mark.filterwarnings("ignore:Glyph")  # a box stands for a character that the font lacks
def test_figures_show_hostile_texts_as_they_are(runs, tmp_path):
    run, other = runs
    displays = [
        CascadeCalibrationDisplay.from_run(run),
        CascadeCalibrationDisplay.from_run(run, stage="last"),
        CascadeConfusionDisplay.from_run(run),
        CascadeConfusionDisplay.from_run(run, stage="gate0"),
        CascadeConfusionDisplay.from_predictions(["$x", EVIL, "y"], [EVIL, "$x", "y"], title=EVIL),
        ComparisonDisplay.from_runs(run, other),
        CounterfactualMatrixDisplay.from_run(run),
        OracleLadderDisplay.from_run(run),
        OutcomeFlowDisplay.from_run(run),
        RiskCoverageDisplay.from_run(run),
        StageLatencyDisplay.from_run(run),
        ThresholdDisplay.from_run(run, stage="last"),
    ]
    for number, display in enumerate(displays):
        display.plot()
        display.figure_.savefig(tmp_path / f"{number}.svg")
        drawn = [text.get_text() for text in display.figure_.findobj(Text)]
        plt.close(display.figure_)
        for text in drawn:
            assert all(map(is_seen, text)), (type(display), text)
            assert "$" not in text.replace(r"\$", "") or re.fullmatch(r"\$\\mathdefault\{[^$]*\}\$", text), text
        assert all(map(is_seen, repr(display)))
        svg = Path(tmp_path / f"{number}.svg").read_text(encoding="utf-8")
        assert "<img" not in svg
        assert all(map(is_seen, svg.replace("\t", "")))


def test_what_cannot_be_seen_is_made_visible_in_a_report():
    assert all(map(is_seen, visible(EVIL)))
    assert visible("👩‍👩‍👧 می‌خواهم\ta\n") == "👩‍👩‍👧 می‌خواهم\ta\n"
    frame = pd.DataFrame({"text": [EVIL, "&rlm;", "&#8238", "&amp;#x202e;"]})
    from cascade_lab.reporting.html import sanitize

    for html in (frame.to_html(), frame.to_html(escape=False)):
        page = sanitize(html)
        assert all(map(is_seen, page))
        assert not re.search("<img|&rlm|&#x202e|&#8238", page)

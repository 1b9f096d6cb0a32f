"""Prints what commands show: tables, numbers, intervals, p-values, a run's metrics."""

from __future__ import annotations

import json
import math
import re
import shlex
import sys
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from rich.cells import cell_len
from rich.console import Console, ConsoleOptions, Group, RenderableType
from rich.measure import Measurement
from rich.padding import Padding
from rich.segment import Segment
from rich.table import Table
from rich.text import Text

from cascade_lab.text import printable, shorten

if TYPE_CHECKING:
    from pathlib import Path

    from cascade_lab.run import Run
    from cascade_lab.spec import CascadeSpec

UNDEFINED = "–"
MAX_CELL = 200  # characters of a text in a table
_FOLDED = (
    "text",
    "variable",
    "scheme",
    "cascade",
    "eval set",
    "tuned on",
)  # columns whose cells may take several lines


def table(*columns: str, fold_first: bool = False) -> Table:
    """Make a table without borders: the first column to the left, the others, which hold numbers, to the right.

    `fold_first` lets the cells of the first column take several lines on a narrow terminal. Numbers are never cut.
    """
    empty = Table(box=None, pad_edge=False, header_style="bold", padding=(0, 2, 0, 0))
    for i, column in enumerate(columns):
        is_folded = column in _FOLDED or (fold_first and i == 0)
        empty.add_column(cell(column), justify="left" if i == 0 else "right", no_wrap=not is_folded, overflow="fold")
    return empty


def show(*blocks: object) -> None:
    """Print tables and titles, one below the other; markup is not interpreted, control characters are replaced."""
    console = Console(highlight=False, markup=False, emoji=False)
    for block in blocks:
        console.print(_Printable(block))


class _Printable:
    """A renderable whose every piece of text is printable, wherever it comes from."""

    def __init__(self, block: Any):
        self.block = block

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> Iterator[Segment]:
        block = Text(self.block) if isinstance(self.block, str) else self.block
        for segment in console.render(block, options):
            if segment.control is None:
                text = "\n".join(printable(part) for part in segment.text.split("\n"))
                yield Segment(text, segment.style)

    def __rich_measure__(self, console: Console, options: ConsoleOptions) -> Measurement:
        return Measurement.get(console, options, self.block)


def line(text: str) -> None:
    """Print a text as one line, however long, so that it can be copied; control characters are replaced."""
    Console().print(printable(text), soft_wrap=True, markup=False, emoji=False, highlight=False)


def print_json(values: Mapping[str, Any]) -> None:
    """Print an object as JSON on one line; NaN is null, and what a terminal obeys or cannot print is escaped."""
    values = {key: None if isinstance(value, float) and math.isnan(value) else value for key, value in values.items()}
    text = json.dumps(values, ensure_ascii=False)
    text = "".join(char if char.isprintable() else json.dumps(char)[1:-1] for char in text)
    try:
        text.encode(sys.stdout.encoding or "utf-8")
    except UnicodeEncodeError:
        text = json.dumps(values)
    print(text)


def next_step(*words: object) -> None:
    """Print a command to try next, if standard output is a terminal. Words in capitals stand for the user's own."""
    if sys.stdout.isatty():
        line(f"next: cascade-lab {shlex.join(map(str, words))}")


def cell(text: str, max_length: int = MAX_CELL) -> Text:
    """Make a cell of a user's text: one line, control characters replaced, markup not interpreted."""
    return Text(shorten(printable(text), max_length))


def title(text: str, max_length: int = MAX_CELL) -> Text:
    """Make a title of a user's text."""
    bold = cell(text, max_length)
    bold.stylize("bold")
    return bold


def number(value: float | None, form: str = ".4f") -> str:
    """Return a number in the format `form`, or "–" where it is undefined.

    >>> number(0.25), number(0.25, ".0%"), number(0.25, "+.2f"), number(float("nan")), number(None)
    ('0.2500', '25%', '+0.25', '–', '–')
    """
    return UNDEFINED if value is None or math.isnan(value) else format(value, form)


def signed(value: float | None) -> str:
    """Return a difference with its sign.

    >>> signed(0.0125)
    '+0.0125'
    """
    return number(value, "+.4f")


def percent(value: float | None) -> str:
    """Return a fraction as whole percents.

    >>> percent(0.256)
    '26%'
    """
    return number(value, ".0%")


def interval(low: float | None, high: float | None, form: str = ".4f") -> str:
    """Return an interval, or "–" where it is undefined.

    >>> interval(0.1, 0.25), interval(-0.1, 0.25, "+.2f"), interval(float("nan"), float("nan"))
    ('0.1000 to 0.2500', '-0.10 to +0.25', '–')
    """
    ends = number(low, form), number(high, form)
    return UNDEFINED if UNDEFINED in ends else " to ".join(ends)


def p_value(value: float | None) -> str:
    """Return a p-value to four decimals.

    >>> p_value(0.04), p_value(1e-9)
    ('0.0400', '<0.0001')
    """
    return "<0.0001" if value is not None and value < 0.0001 else number(value)


METRICS = {
    "accuracy": "accuracy",
    "in_scope_accuracy": "in scope",
    "reject_recall": "recall",
    "reject_precision": "precision",
    "macro_f1": "macro F1",
    "coverage": "coverage",
    "risk": "risk",
}
"""The short names of metrics in tables of runs."""


def show_runs(runs: Mapping[str, Mapping[str, str]], numbers: Mapping[str, Sequence[str]]) -> None:
    """Print a table of runs: name, facts such as the cascade, and numbers.

    If the terminal is too narrow for a column for each fact, the facts of a run are below its name, and those that all
    runs share are below the table.

    Parameters
    ----------
    runs : mapping of str to mapping of str to str
        Name to the run's facts, by name of the fact; the same facts for each run.
    numbers : mapping of str to sequence of str
        Header to one number per run.
    """
    console = Console()
    facts = list(next(iter(runs.values())))
    rows = list(zip(*numbers.values(), strict=True))
    wide = table("run", *facts, *numbers)
    for column in wide.columns[: len(facts) + 1]:
        column.justify = "left"
    for (name, values), row in zip(runs.items(), rows, strict=True):
        wide.add_row(cell(name), *map(cell, values.values()), *row)
    if Measurement.get(console, console.options.update(max_width=10**6), wide).maximum <= console.width:
        show(wide)
        return
    narrow = table("run", *numbers, fold_first=True)
    width = console.width - sum(2 + max(map(len, (header, *column))) for header, column in numbers.items()) - 2
    shared = {fact: {values[fact] for values in runs.values()} for fact in facts}
    shared = {fact: values for fact, values in shared.items() if len(values) == 1 < len(runs)}
    for (name, values), row in zip(runs.items(), rows, strict=True):
        below = _facts({fact: value for fact, value in values.items() if fact not in shared})
        lines: list[RenderableType] = [fold_name(cell(name).plain, width)]
        lines += [Padding(Text(below, style="dim"), (0, 0, 0, 2))] if below else []
        narrow.add_row(Group(*lines), *row)
    show(narrow)
    of_all = _facts({fact: value for fact, (value,) in shared.items()})
    if of_all:
        line(f"all runs: {of_all}")


def _facts(values: Mapping[str, str]) -> str:
    return ", ".join(f"{fact} {value}" for fact, value in values.items() if value != UNDEFINED)


def fold_name(name: str, width: int) -> str:
    """Fold a long name after one of its slashes, hyphens, underscores, dots or blanks, if it has one.

    >>> fold_name("runs/larger_model-v2", 12)
    'runs/larger_\\nmodel-v2'
    """
    lines = [""]
    for part in re.findall(r"[^/\\\-_. ]*[/\\\-_. ]?", name):
        if lines[-1] and cell_len(lines[-1] + part) > width:
            lines.append("")
        lines[-1] += part
    return "\n".join(lines)


def tuned_on(run: Mapping[str, Any]) -> str:
    """Return where the thresholds of a run come from, from its `leaderboard.run_facts`."""
    return UNDEFINED if run["tuned_on"] is None else run["tuned_on"] + " (same texts)" * bool(run["same_texts"])


def print_run(run: Run) -> None:
    """Print a run's metrics, one row per stage and then the whole cascade, and where the run and its report are.

    Times are left out where nothing was timed, and metrics where no text has a label.
    """
    show(title(run.spec.name))
    if run.examples["label"].notna().any():
        _print_metrics(run)
    else:
        _print_decided(run)
    print_labelled(run)
    for stage in run.spec.stages:
        scores = run.scores(stage.name) if stage.precision == "mixed" else None
        if scores is not None and scores.rescored is not None:
            n_again, n_scored = int(scores.rescored.sum()), int(scores.scored.sum())
            line(f"{stage.name}: {n_again:,} of its {n_scored:,} kept scores are in float32, the others in bfloat16")
    if run.directory is None:
        return
    for name, path in (("run", run.directory), ("report", run.directory / "report.html")):
        if path.exists():
            line(f"{name}: {path}")


def print_dropped_bounds(before: CascadeSpec, after: CascadeSpec, output: Path) -> bool:
    """Print which stages have lost their bounds of mixed precision, and the command that measures them again.

    Returns whether there are such stages: nothing but that command can load the cascade.
    """
    names = [
        stage.name
        for stage, old in zip(after.stages, before.stages, strict=True)
        if stage.precision_bounds is None and old.precision_bounds is not None
    ]
    if names:
        command = shlex.join(["cascade-lab", "verify-precision", str(output), "EVALSET", "--calibrate"])
        line(f"{', '.join(names)}: the precision_bounds no longer fit, and were left out; measure them again:")
        line(f"{command} --output {shlex.quote(str(output))} --overwrite")
    return bool(names)


def print_labelled(run: Run) -> None:
    """Print how many texts have a label, if not all have one: metrics are of these texts."""
    from cascade_lab.label_files import has_unequal_weights

    is_labelled = run.examples["label"].notna()
    if not is_labelled.all():
        line(f"metrics: on the {is_labelled.sum():,} of {len(is_labelled):,} texts that have a label")
    if has_unequal_weights(run.examples):
        line("the labels have unequal weights, which these metrics leave out; `collect` and sampled_metrics use them")


def _print_metrics(run: Run) -> None:
    from cascade_lab.analysis.latency import is_timed, stage_latencies, timing_note

    latencies = stage_latencies(run) if is_timed(run) else {}
    times = ["ms/text p50", "p95", "p99", "share"] if latencies else []
    stages = table("stage", "reached", "accuracy", "AUROC", *times)
    for name, metrics in run.metrics["stages"].items():
        reached = f"{metrics['n_reached']:,} ({number(metrics['reach'], '.1%')})"
        row = [reached, number(metrics["accuracy"]), number(metrics.get("auroc"))]
        if latencies:
            row += [number(value, ".2f") for value in latencies[name].percentiles_ms.values()]
            row.append(percent(latencies[name].share))
        stages.add_row(name, *row)
    whole = table("end to end", "accuracy", "in scope", "reject recall", "reject precision", "macro F1")
    keys = ("accuracy", "in_scope_accuracy", "reject_recall", "reject_precision", "macro_f1")
    end_to_end = [number(run.metrics["end_to_end"][key]) for key in keys]
    whole.add_row(f"{run.metrics['n_examples']:,} texts", *end_to_end)
    show(stages, whole)
    if any(stage.is_gate for stage in run.spec.stages):
        line("AUROC: of a gate's confidence, with the texts to stop as positives")
    for name, metrics in run.metrics["stages"].items():
        if "answered" in metrics:
            answered = number(metrics["answered"], ".1%")
            line(f"{name} answers {answered} of the texts that reach it, and its accuracy is of these")
    for note in timing_note(run) if latencies else ():
        line(note)


def _print_decided(run: Run) -> None:
    """Print how many texts each stage decided, which needs no label."""
    decided = run.predictions["decided_by"].value_counts()
    stages = table("stage", "decided", "of all")
    for stage in run.spec.stages:
        n_decided = int(decided.get(stage.name, 0))
        stages.add_row(stage.name, f"{n_decided:,}", percent(n_decided / len(run.examples)))
    show(stages)

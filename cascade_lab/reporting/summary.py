"""Writes a run's summary: one page to print, for a reader who knows no cascade; no term in it needs explaining."""

from __future__ import annotations

import json
from collections.abc import Iterator
from html import escape
from pathlib import Path, PurePath
from typing import Any

import numpy as np
import pandas as pd

from cascade_lab.analysis.latency import is_timed, stage_latencies
from cascade_lab.analysis.outcomes import (
    ERRORS,
    FALSE_ACCEPT,
    FALSE_REJECT,
    OUTCOMES,
    RIGHT,
    RIGHT_REJECT,
    WRONG_CLASS,
    WRONG_REJECT,
    outcomes,
)
from cascade_lab.analysis.sentences import percent
from cascade_lab.analysis.tuned_on import is_tuning_set
from cascade_lab.analysis.verdict import WIDE, RunVerdict, run_verdict
from cascade_lab.displays.drawing import OUTCOME_STYLES
from cascade_lab.provenance import environment
from cascade_lab.reporting.capture import table_values
from cascade_lab.reporting.html import page_html
from cascade_lab.reporting.record import (
    SCHEMA_VERSION,
    check_unchanged,
    directory_of,
    record_text,
    run_identity,
    write_page,
)
from cascade_lab.run import Run
from cascade_lab.spec import CascadeSpec, StageSpec
from cascade_lab.text import shorten, visible

SUMMARY = "summary"
"""What the JSON of a summary names as its notebook; a summary has none."""

_WORDS = {
    RIGHT: "answered with the right label",
    RIGHT_REJECT: "rightly turned away: about something else",
    FALSE_REJECT: "turned away, but should have been answered",
    FALSE_ACCEPT: "answered, but should have been turned away",
    WRONG_CLASS: "answered with a wrong label",
    WRONG_REJECT: "turned away with a wrong label",
}
_MAX_EXAMPLE, _MAX_LABEL = 80, 40  # characters


def write_summary(run: Run, output: str | Path | None = None) -> Path:
    """Write one page about a run for a reader who knows no cascade, and its numbers as JSON beside it.

    The same run gives the same bytes; `verify_report` compares.

    Parameters
    ----------
    run : Run
        A run in a directory.
    output : path, optional
        The HTML file: by default `summary.html` in the run's directory.

    Raises
    ------
    RunError
        The run is only in memory, or was replaced meanwhile; a table of it differs from its digest in the manifest;
        another process is writing the page, or a file cannot be written.
    """
    output = directory_of(run) / f"{SUMMARY}.html" if output is None else Path(output)
    return write_page(output, lambda: build_summary(run))


def build_summary(run: Run) -> tuple[str, dict[str, Any]]:
    """Return the HTML page and the content of the JSON.

    Raises
    ------
    RunError
        As `write_summary` raises.
    """
    identity = run_identity(run)
    run.check()
    verdict = run_verdict(run)
    sections = {
        "What it does": _what_it_does(run.spec),
        "How often it is right": _how_often(run, verdict),
        "What it costs": _costs(run),
        "What to do next": _next(verdict),
        "Keep in mind": _limits(run, verdict),
    }
    check_unchanged(run)
    name = _escaped(run.spec.name, 60)
    parts = [f"<h1>{name}: how well does it work?</h1>"]
    parts += [f"<section><h2>{title}</h2>\n{html}</section>" for title, html in sections.items()]
    body = "\n".join(parts) + f"\n<footer>{_escaped(_origin(identity), 300)}</footer>"
    html = page_html(f"{name} – summary", f"<main>\n{body}\n</main>", kind="summary")
    counts = verdict.outcomes.rename(index=_WORDS).to_frame()
    record = {
        "schema_version": SCHEMA_VERSION,
        "notebook": SUMMARY,
        "notebook_sha256": "",
        "parameters": {},
        "runs": {"run_dir": identity},
        "files": {},
        "packages": environment()["packages"],
        "fonts": {},
        "outputs": [
            {"section": "How often it is right", **table_values(verdict.metrics)},
            {"section": "How often it is right", **table_values(counts)},
            {"section": "What to do next", "kind": "text", "lines": [each.plain for each in verdict.suggestions]},
        ],
    }
    return html, json.loads(record_text(record))


def _what_it_does(spec: CascadeSpec) -> str:
    labels = spec.in_scope_labels
    examples = ", ".join(f"“{_escaped(label)}”" for label in labels[:3])
    sentences = [f"It reads a text and answers with one of {len(labels):,} labels, such as {examples}."]
    if spec.reject_labels:
        answers = " or ".join(f"“{_escaped(label)}”" for label in spec.reject_labels[:3])
        sentences.append(f"A text about something else should be turned away: the answer is then {answers}.")
    n = len(spec.stages)
    if n > 1:
        sentences.append(f"A text goes through up to {n} steps; each is a program that has learned from examples.")
    steps = "".join(f"<li><b>{_escaped(stage.name)}</b> {_step(spec, stage)}</li>" for stage in spec.stages)
    return f"<p>{' '.join(sentences)}</p>\n" + (f"<ol>{steps}</ol>\n" if n > 1 else "")


def _step(spec: CascadeSpec, stage: StageSpec) -> str:
    """Return what one stage does, as the rest of a sentence that begins with its name."""
    rejects = " or ".join(f"“{_escaped(label)}”" for label in stage.reject_labels[:3])
    if stage.is_gate:
        return f"decides whether the system should answer at all. If not, the answer is {rejects}."
    if stage.is_deferral:
        return "answers if it is sure enough; if not, it leaves the text to the next step, which takes longer."
    unsure = f", or {rejects} if it is not sure enough" if stage.min_probability or stage.min_probabilities else ""
    return f"chooses the answer{unsure}."


def _how_often(run: Run, verdict: RunVerdict) -> str:
    if not verdict.n_labelled:
        rejected = percent(verdict.metrics.loc["rejected", "value"])
        return (
            "<p>Nobody has noted the right answers of these texts, so it is not known how often the system is right. "
            f"It turned {rejected} of the {verdict.n_texts:,} texts away.</p>\n"
        )
    value, low, high = verdict.metrics.loc["accuracy"]
    n, n_right = verdict.n_labelled, int(verdict.outcomes[[RIGHT, RIGHT_REJECT]].sum())
    sentence = (
        f"In a test with {n:,} texts whose right answer is known, <b>{n_right:,} answers were right: "
        f"{percent(value)}</b>."
    )
    if not np.isnan(low):
        sentence += (
            f" For many more texts of the same kind, expect between {percent(low)} and {percent(high)}; such a range "
            "holds in about 95 of 100 tests."
        )
    counts = verdict.outcomes[verdict.outcomes > 0]
    bar = "".join(
        f'<span class="{_class(kind)}" style="width: {100 * count / n:.4f}%"></span>' for kind, count in counts.items()
    )
    rows = "".join(_outcome_rows(run, counts))
    return (
        f'<p>{sentence}</p>\n<style>{_outcome_rules()}</style><div class="bar">{bar}</div>\n'
        "<table><thead><tr><th></th><th>texts</th><th>of 100</th><th>for example</th></tr></thead>"
        f"<tbody>{rows}</tbody></table>\n"
    )


def _outcome_rules() -> str:
    """Return style rules with the colours that outcomes have in all figures; errors are striped."""
    rules = []
    for kind in OUTCOMES:
        color = OUTCOME_STYLES[kind].color
        stripes = f"repeating-linear-gradient(135deg, {color} 0 4px, rgba(255, 255, 255, .55) 4px 5.5px), "
        fill = f"{stripes if kind in ERRORS else ''}linear-gradient({color}, {color})"
        rules.append(f".{_class(kind)} {{ background: {fill}; }}")
    return " ".join(rules)


def _class(kind: Any) -> str:
    return f"o-{str(kind).replace(' ', '-')}"


def _outcome_rows(run: Run, counts: pd.Series) -> Iterator[str]:
    """Yield one row of the table per outcome that occurs; errors come with the first such text of the run."""
    labelled = run.labelled
    predictions, texts = labelled.predictions, labelled.examples["text"]
    kinds = outcomes(run.spec, predictions["label"], predictions["predicted"])
    for kind, count in counts.items():
        example = ""
        if kind in ERRORS:
            row = int(np.flatnonzero(kinds == kind)[0])
            told, right = (_escaped(str(predictions[column].iloc[row])) for column in ("predicted", "label"))
            example = f"“{_escaped(str(texts.iloc[row]), _MAX_EXAMPLE)}” got {told}; right: {right}"
        share = 100 * count / counts.sum()
        of_100 = "under 0.1" if share < 0.05 else f"{share:.1f}"
        chip = f'<span class="chip {_class(kind)}"></span>'
        yield f"<tr><th>{chip}{_WORDS[str(kind)]}</th><td>{count:,}</td><td>{of_100}</td><td>{example}</td></tr>"


def _costs(run: Run) -> str:
    sentences = []
    last = run.scores(run.spec.last.name)
    reach = float((last.scored & ~last.shadow).mean())
    n = len(run.examples)
    if is_timed(run):
        passed = run.manifest.get("serial_seconds")
        total = sum(each.seconds for each in stage_latencies(run).values())
        seconds = float(passed) if isinstance(passed, int | float) and passed > 0 else total
        processor = run.manifest.get("processor")
        machine = f"the computer of the test ({_escaped(str(processor))})" if processor else "the computer of the test"
        if seconds > 0:
            sentences.append(
                f"On {machine}, the system answered {n / seconds:,.0f} texts in a second, given many texts at once."
            )
        sentences.append("A text that comes alone takes longer than its share of that time.")
    else:
        sentences.append("The time was not measured.")
    if len(run.spec.stages) > 1:
        sentences.append(f"{percent(reach)} of the texts went through to the last step.")
    if run.examples["label"].notna().any():
        predictions = run.labelled.predictions
        wrong = (predictions["label"] != predictions["predicted"]).mean()
        sentences.append(f"Of 1,000 texts, about {1000 * wrong:,.0f} get a wrong answer.")
    return f"<p>{' '.join(sentences)}</p>\n"


def _next(verdict: RunVerdict) -> str:
    if not verdict.suggestions:
        return "<p>Nothing stands out: these texts show no change that would clearly help.</p>\n"
    items = "".join(
        f"<li>{_escaped(each.plain, 400)}<br><small>For whoever runs the system: "
        f"<code>{_escaped(each.command, 200)}</code></small></li>"
        for each in verdict.suggestions
    )
    return f"<ul>{items}</ul>\n"


def _limits(run: Run, verdict: RunVerdict) -> str:
    items = ["These numbers hold for texts like those of the test. Other kinds of text can give other results."]
    if verdict.n_labelled and is_tuning_set(run):
        items.append(
            "<b>The system was adjusted with these same texts, so it looks better here than it is. Test it with other "
            "texts.</b>"
        )
    if 0 < verdict.n_labelled < verdict.n_texts:
        items.append(f"The right answer is known for {verdict.n_labelled:,} of {verdict.n_texts:,} texts only.")
    if verdict.n_labelled and verdict.metrics.loc["accuracy", "high"] - verdict.metrics.loc["accuracy", "low"] > WIDE:
        items.append("The test is small. More texts would show more exactly how often the system is right.")
    return f"<ul>{''.join(f'<li>{item}</li>' for item in items)}</ul>\n"


def _origin(identity: dict[str, Any]) -> str:
    evalset = identity["evalset"]
    source = PurePath(str(evalset.get("source") or evalset.get("path") or "a table")).name
    split = f", {evalset['split']}" if evalset.get("split") else ""
    started = f", {identity['started'][:10]}" if identity["started"] else ""
    return f"Run {identity['run_id']}{started}; texts: {source}{split}. Written by cascade-lab."


def _escaped(text: str, max_length: int = _MAX_LABEL) -> str:
    return escape(visible(shorten(text, max_length)))

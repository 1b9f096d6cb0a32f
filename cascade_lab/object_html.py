"""Shows objects in a notebook cell in one manner: a bold name, a few facts, small tables; every text is escaped."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from typing import TYPE_CHECKING, Any, TypeAlias

from cascade_lab.text import exact, printable, shorten

if TYPE_CHECKING:
    from cascade_lab.evalset import EvalSet
    from cascade_lab.run import Run
    from cascade_lab.spec import CascadeSpec, StageSpec
    from cascade_lab.thresholds.tuning import Tuning

Rows: TypeAlias = Sequence[Mapping[str, str]]
"""A table of texts: one mapping of column to cell per row, all with the same columns."""

MAX_CELL = 120  # characters of a text
N_TEXTS = 5  # rows of an eval set

_NUMBER = re.compile(r"[+-]?[\d,]+(\.\d+)?(e[+-]?\d+)?%?|–|")


def object_html(name: str, facts: Iterable[str], *tables: Rows) -> str:
    """Return the HTML of an object. It sets no colour, so it is readable on a light and on a dark page.

    Parameters
    ----------
    name : str
    facts : iterable of str
        Few words each, such as "1,451 texts".
    tables : rows
        A column of numbers is aligned to the right, another one as its script is read. A table without rows is left
        out.

    Examples
    --------
    >>> print(object_html("desk", ["a <b>", "付款"], [{"stage": "gate", "texts": "1,451"}]))
    <p><b><bdi>desk</bdi></b>: <bdi>a &lt;b&gt;</bdi>, <bdi>付款</bdi></p>
    <table>
    <thead>
    <tr>
    <th dir="auto" style="text-align: start">stage</th>
    <th dir="auto" style="text-align: right">texts</th>
    </tr>
    </thead>
    <tbody>
    <tr>
    <td dir="auto" style="text-align: start">gate</td>
    <td dir="auto" style="text-align: right">1,451</td>
    </tr>
    </tbody>
    </table>
    """
    described = ", ".join(f"<bdi>{_escaped(fact)}</bdi>" for fact in facts)
    first = f"<p><b><bdi>{_escaped(name)}</bdi></b>: {described}</p>"
    return "\n".join([first, *map(_table_html, filter(None, tables))])


def run_html(run: Run) -> str:
    """Return a run as HTML: its texts and their accuracy; one row per stage, with the texts that it decided."""
    decided = run.predictions["decided_by"].value_counts()
    is_labelled = run.predictions["label"].notna()
    n, n_labelled = len(run.examples), int(is_labelled.sum())
    facts = [run.name, f"{n:,} texts of {_evalset_name(run.manifest['evalset'])}"]
    facts += ["no labels"] if not n_labelled else [] if n_labelled == n else [f"{n_labelled:,} with a label"]
    if n_labelled:
        right = (run.predictions["label"] == run.predictions["predicted"])[is_labelled].mean()
        facts.append(f"accuracy {right:.4f}")
    n_reached, rows = n, []
    for row in _stage_rows(run.spec.stages):
        n_decided = int(decided.get(row["stage"], 0))
        rows.append({**row, "texts": f"{n_reached:,}", "decided": f"{n_decided:,}"})
        n_reached -= n_decided
    return object_html(run.spec.name, facts, rows)


def spec_html(spec: CascadeSpec) -> str:
    """Return a cascade's description as HTML: one row per stage."""
    facts = [f"cascade of {_count(len(spec.stages), 'stage')}", f"{len(spec.in_scope_labels):,} labels in scope"]
    facts.append(f"rejects with {', '.join(spec.reject_labels)}" if spec.reject_labels else "never rejects")
    if spec.tuned_on is not None:
        facts.append(f"tuned to {spec.tuned_on['goal']}")
    return object_html(spec.name, facts, _stage_rows(spec.stages))


def stage_html(stage: StageSpec) -> str:
    """Return a stage's description as HTML: one row, and which checkpoint it is."""
    checkpoint = stage.init_checkpoint
    facts = [f"{stage.role} stage", "scored elsewhere" if checkpoint is None else f"checkpoint {checkpoint}"]
    return object_html(stage.name, facts, _stage_rows([stage]))


def evalset_html(evalset: EvalSet) -> str:
    """Return an eval set as HTML: how many texts and labels, and the first rows."""
    first = evalset.examples.head(N_TEXTS).dropna(axis="columns", how="all")
    first = first.astype(object).where(first.notna(), "–")
    rows = [{str(column): str(value) for column, value in row.items()} for row in first.to_dict("records")]
    if len(evalset) > N_TEXTS:
        rows.append({column: "…" for column in rows[0]})
    return object_html(_evalset_name(evalset.origin), evalset_facts(evalset), rows)


def tuning_html(tuning: Tuning) -> str:
    """Return chosen thresholds as HTML, and the metrics with them beside those with the run's own."""
    thresholds = tuning.thresholds.map(exact).reset_index().to_dict("records")
    metrics = tuning.comparison.map("{:.4f}".format).replace("nan", "–").reset_index().to_dict("records")
    return object_html(tuning.run.spec.name, [f"thresholds to {tuning.goal}", tuning.run.name], thresholds, metrics)


def evalset_facts(evalset: EvalSet) -> list[str]:
    """Return how many texts and labels a set has, in a few words each."""
    labels = evalset.examples["label"]
    n_labelled, n_labels = int(labels.notna().sum()), labels.nunique()
    facts = [_count(len(evalset), "text") if evalset.texts_b is None else f"{len(evalset):,} texts, some in pairs"]
    if n_labelled < len(evalset):
        facts.append(f"{n_labelled:,} with a label" if n_labelled else "no labels")
    return [*facts, _count(n_labels, "label")] if n_labels else facts


def _evalset_name(origin: Any) -> str:
    """Return the file of an eval set and its split, from what a manifest records."""
    source = origin.get("source") or origin.get("path") or "a table"
    return f"{source}, {origin['split']}" if origin.get("split") else str(source)


def _stage_rows(stages: Sequence[StageSpec]) -> list[dict[str, str]]:
    """Return one row per stage; a column that would be empty is left out."""
    rows = [
        {
            "stage": stage.name,
            "role": stage.role,
            "labels": f"{len(stage.labels):,}: {', '.join(stage.labels[:5])}{', …' if len(stage.labels) > 5 else ''}",
            "passes": stage.pass_label or "",
            "rejects with": "" if stage.is_gate else ", ".join(stage.reject_labels),
            "threshold": exact(stage.min_probability if stage.role == "final" else stage.threshold),
            "settings": ", ".join(_settings(stage)),
        }
        for stage in stages
    ]
    filled = [column for column in rows[0] if any(row[column] for row in rows)]
    return [{column: row[column] for column in filled} for row in rows]


def _settings(stage: StageSpec) -> list[str]:
    """Return what of a stage's settings is not as by default, in a few words each."""
    found = {
        f"temperature {stage.temperature:.4g}": stage.temperature != 1,
        f"calibrator {stage.calibrator and stage.calibrator.method}": stage.calibrator is not None,
        f"rejector over {', '.join(stage.rejector.evidence) if stage.rejector else ''}": stage.rejector is not None,
        f"{_count(len(stage.min_probabilities), 'threshold')} of labels": len(stage.min_probabilities) > 0,
        f"engine {stage.engine}": stage.engine != "fast",
        stage.precision: stage.precision != "float32",
    }
    return [words for words, is_set in found.items() if is_set]


def _count(n: int, thing: str) -> str:
    return f"{n:,} {thing}" if n == 1 else f"{n:,} {thing}s"


def _table_html(rows: Rows) -> str:
    """Return a table as HTML, one cell per line."""
    aligned = {
        column: "right" if all(_NUMBER.fullmatch(row[column]) for row in rows) else "start" for column in rows[0]
    }

    def cells(tag: str, row: Mapping[str, str]) -> list[str]:
        return [
            f'<{tag} dir="auto" style="text-align: {aligned[c]}">{_escaped(text)}</{tag}>' for c, text in row.items()
        ]

    lines = ["<table>", "<thead>", "<tr>", *cells("th", {column: column for column in rows[0]}), "</tr>", "</thead>"]
    lines.append("<tbody>")
    for row in rows:
        lines += ["<tr>", *cells("td", row), "</tr>"]
    return "\n".join([*lines, "</tbody>", "</table>"])


def _escaped(text: str) -> str:
    return escape(printable(shorten(text, MAX_CELL)))

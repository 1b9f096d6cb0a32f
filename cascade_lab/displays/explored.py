"""The HTML below the sliders of the explorer: metrics, where texts end, the matrix, and the texts that change."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape

import numpy as np
import pandas as pd

from cascade_lab.analysis.bootstrap import Interval
from cascade_lab.analysis.outcomes import ERRORS, FRACTIONS, OUTCOMES
from cascade_lab.displays.confusion import CascadeConfusionDisplay
from cascade_lab.displays.drawing import OUTCOME_STYLES
from cascade_lab.text import printable, shorten

MAX_LABELS = 12


def page_html(html: str) -> str:
    """Return a piece of the page, on white whatever the page around it is."""
    return f'<div style="color:#111;background:#fff;padding:4px;font-size:13px;line-height:1.4">{html}</div>'


def metrics_html(now: Mapping[str, Interval], own: Mapping[str, Interval]) -> str:
    """Return the metrics now and at the run's own thresholds, as a table."""
    rows = []
    for name in FRACTIONS:
        value, low, high = now[name]
        change = value - own[name].value
        cells = tuple(
            "–" if "nan" in cell else cell
            for cell in (f"{value:.4f}", f"{low:.4f} to {high:.4f}", f"{own[name].value:.4f}", f"{change:+.4f}")
        )
        weight = "bold" if change and not np.isnan(change) else "normal"
        rows.append(
            f'<tr><th style="{_LEFT};font-weight:normal">{name.replace("_", " ")}</th>'
            f'<td style="{_RIGHT};font-weight:bold">{cells[0]}</td><td style="{_RIGHT}">{cells[1]}</td>'
            f'<td style="{_RIGHT}">{cells[2]}</td><td style="{_RIGHT};font-weight:{weight}">{cells[3]}</td></tr>'
        )
    heads = "".join(f'<th style="{_RIGHT}">{head}</th>' for head in ("now", "95% interval", "run's own", "change"))
    return f'<table style="{_TABLE}"><tr><th></th>{heads}</tr>{"".join(rows)}</table>'


def flow_html(stages: Sequence[str], decided_by: np.ndarray, outcomes: np.ndarray) -> str:
    """Return one bar per stage: how many texts reach it, and the outcomes of the texts that end there.

    Parameters
    ----------
    stages : sequence of str
    decided_by : ndarray of str, shape (n,)
    outcomes : ndarray of int, shape (n,)
        Indices into `OUTCOMES`.
    """
    n, reached, rows = len(decided_by), len(decided_by), []
    for stage in stages:
        counts = np.bincount(outcomes[decided_by == stage], minlength=len(OUTCOMES))
        parts = [_part(name, count, count / n) for name, count in zip(OUTCOMES, counts, strict=True) if count]
        onward = reached - counts.sum()
        if onward:
            parts.insert(0, _part("goes on", onward, onward / n))
        share = reached / n
        rows.append(
            f'<div style="margin-top:6px"><bdi><b>{escape(stage)}</b></bdi>: {reached:,} texts ({share:.1%})'
            f'</div><div style="display:flex;width:520px;height:26px">{"".join(parts)}</div>'
        )
        reached = onward
    totals = np.bincount(outcomes, minlength=len(OUTCOMES))
    key = "".join(
        f'<span style="white-space:nowrap;margin-right:14px"><span style="{_box(name)}"></span> {name} '
        f"<b>{count:,}</b></span>"
        for name, count in zip(OUTCOMES, totals, strict=True)
    )
    head, style = '<div style="margin-top:10px"><b>Where texts end</b></div>', "width:540px;margin-top:6px"
    return f'{head}{"".join(rows)}<div style="{style}">{key}</div>'


def matrix_html(labels: Sequence[str], y_true: np.ndarray, y_pred: np.ndarray) -> str:
    """Return the confusion matrix, or the part with its most confused labels where there are many.

    Parameters
    ----------
    labels : sequence of str
    y_true, y_pred : ndarray of int, shape (n,)
        Indices into `labels`.
    """
    n = len(labels)
    counts = np.bincount(y_true * n + y_pred, minlength=n * n).reshape(n, n)
    matrix = CascadeConfusionDisplay(counts, labels, title="Confusion, end to end")
    if n > MAX_LABELS:
        matrix = matrix.most_confused(MAX_LABELS)
    heads = "".join(f'<th style="{_HEAD}">{_label(label)}</th>' for label in matrix.display_labels)
    largest = max(int(matrix.confusion_matrix.max(initial=0)), 1)
    rows = []
    for i, (label, row) in enumerate(zip(matrix.display_labels, matrix.confusion_matrix, strict=True)):
        cells = "".join(_cell(int(value), largest, i == j) for j, value in enumerate(row))
        rows.append(f'<tr><th style="text-align:right;padding-right:6px">{_label(label)}</th>{cells}</tr>')
    return (
        f'<div style="margin-top:10px"><b>{escape(printable(matrix.title))}</b> (true labels in rows, predicted '
        "labels in columns)</div>"
        f'<table style="border-collapse:collapse;font-size:12px;color:#111"><tr><th></th>{heads}</tr>'
        f"{''.join(rows)}</table>"
    )


def changes_html(changes: pd.DataFrame, shown: pd.DataFrame) -> str:
    """Return how many answers differ from those at the run's own thresholds, and some of the texts.

    Parameters
    ----------
    changes, shown : DataFrame
        All texts whose answer differs, and those to list: `text`, `label`, `before`, `now`, `change`.
    """
    if not len(changes):
        return "No answer differs from those at the run's own thresholds."
    n_fixed, n_broken = (int((changes["change"] == change).sum()) for change in ("becomes right", "becomes wrong"))
    rows = ""
    for text in shown.itertuples():
        both = [text.text, *([text.text_b] if isinstance(getattr(text, "text_b", None), str) else [])]
        cells = ["<br>".join(_label(part, 120) for part in both)]
        cells += [_label(label) for label in (text.label, text.before, text.now)]
        rows += f"<tr>{''.join(f'<td style={_LEFT!r}>{cell}</td>' for cell in [*cells, escape(text.change)])}</tr>"
    names = ("text", "true label", "answer before", "answer now", "")
    heads = "".join(f"<th style={_LEFT!r}>{name}</th>" for name in names)
    return (
        f"<b>{len(changes):,} answers differ</b> from those at the run's own "
        f"thresholds: {n_fixed:,} become right, {n_broken:,} become wrong."
        f'<table style="font-size:12px;color:#111"><tr>{heads}</tr>{rows}</table>'
    )


_LEFT = "text-align:left;padding:1px 10px 1px 0"
_RIGHT = "text-align:right;padding:1px 10px 1px 0"
_HEAD = "writing-mode:vertical-rl;transform:rotate(180deg);text-align:left;font-weight:normal;padding:2px"
_TABLE = "font-variant-numeric:tabular-nums;font-size:13px;color:#111"


def _part(name: str, count: int, share: float) -> str:
    """Return a part of a bar, as wide as its share, with its number where there is room."""
    dark = name in ERRORS[1:]
    color = "white" if dark else "#111"
    hatch = "#fff3 0 2px,transparent 2px 6px" if name in ERRORS else "transparent 0 100%"
    number = f"{count:,}" if share > 0.06 else ""
    return (
        f'<div title="{name}: {count:,} ({share:.1%})" style="width:{100 * share:.3f}%;min-width:1px;overflow:hidden;'
        f"background:repeating-linear-gradient(45deg,{hatch}),{OUTCOME_STYLES[name].color};color:{color};"
        f'text-align:center;line-height:26px;font-size:12px">{number}</div>'
    )


def _box(name: str) -> str:
    return f"display:inline-block;width:11px;height:11px;border:1px solid #555;background:{OUTCOME_STYLES[name].color}"


def _cell(value: int, largest: int, right: bool) -> str:
    """Return a cell of the matrix: darker for larger numbers (log scale), framed on the diagonal."""
    strength = np.log1p(value) / np.log1p(largest)
    back = "#fff" if not value else f"rgba(8,48,107,{0.1 + 0.85 * strength:.2f})"
    frame = "2px solid #444" if right else "1px solid #ddd"
    color = "#fff" if strength > 0.5 else "#111"
    return (
        f'<td style="border:{frame};background:{back};color:{color};text-align:center;min-width:30px;height:22px">'
        f"{value if value else ''}</td>"
    )


def _label(text: str | None, max_length: int = 24) -> str:
    """Return a text as HTML: shortened, escaped, and isolated from the direction of the text around it."""
    whole = "" if text is None else printable(str(text)[:10_000])
    hint = f' title="{escape(whole[:400])}"' if len(whole) > max_length else ""
    return f"<bdi{hint}>{escape(shorten(whole, max_length))}</bdi>"

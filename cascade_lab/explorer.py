"""A notebook widget with a slider for each threshold of a run; metrics, flow and matrix follow at once.

The widget shows a few kilobytes of HTML instead of pictures, so that it follows a slider without a pause.
"""

from __future__ import annotations

from collections.abc import Mapping
from html import escape
from pathlib import Path

import ipywidgets as widgets
import numpy as np
import pandas as pd

from cascade_lab.analysis.bootstrap import Interval
from cascade_lab.analysis.duplicates import text_groups
from cascade_lab.analysis.intervals import outcome_intervals
from cascade_lab.analysis.outcomes import ERRORS, FRACTIONS, OUTCOMES, outcome_codes
from cascade_lab.atomic import refuse_existing
from cascade_lab.decisions import RoutingResult, require_scored, route
from cascade_lab.displays.confusion import CascadeConfusionDisplay
from cascade_lab.displays.drawing import OUTCOME_STYLES
from cascade_lab.exceptions import CascadeLabError
from cascade_lab.run import Run
from cascade_lab.text import printable, shorten
from cascade_lab.thresholds.grid import swept_stages
from cascade_lab.thresholds.search import Choice
from cascade_lab.thresholds.tuning import write_tuned

MAX_LABELS = 12
MAX_TEXTS = 6


def explore(run: Run) -> Explorer:
    """Return a widget that shows what the cascade of `run` does at any thresholds. Make it the last value of a cell.

    Raises
    ------
    RunError
        No example has a label, or the run cannot be read.
    """
    return Explorer(run.labelled)


class Explorer(widgets.VBox):
    """One slider for each stage that can reject, and what the cascade does at those thresholds.

    The sliders move in log-odds of the threshold, so that values near 0 and 1 can be reached. The box beside a slider
    takes a threshold as a number; the number in the box is the one that is used.

    Attributes
    ----------
    run : Run
    sliders : dict of str to FloatSlider
        By stage; the value is the log-odds of the threshold.
    boxes : dict of str to FloatText
        By stage; the value is the threshold.
    reset_button, write_button : Button
        Go back to the run's own thresholds; write the cascade at the present ones to `path_box.value`.
    path_box : Text
    thresholds : dict of str to float
        The present thresholds, as `Run.replay` takes them.
    predictions : DataFrame
        `predicted`, `decided_by`, `probability` and `confidence` at the present thresholds, one row per example.
    metrics : dict of str to Interval
        The metrics at the present thresholds, with 95% intervals.
    """

    def __init__(self, run: Run):
        self.run = run
        self.stages = swept_stages(run.spec)
        own = {name: run.spec.thresholds[name] or 0.0 for name in self.stages}
        self.own, self.thresholds = own, dict(own)
        self._labels = list(run.spec.labels)
        self._y_true = run.examples["label"].to_numpy(dtype=object)
        self._label_codes = pd.Index(self._labels).get_indexer(self._y_true)
        self.sliders, self.boxes = {}, {}
        rows = []
        for name in self.stages:
            low, high = _ends(run, name)
            self.sliders[name] = widgets.FloatSlider(
                _clip(_log_odds(own[name]), low, high), min=low, max=high, step=0.01, readout=False,
                layout=widgets.Layout(width="420px"),
            )  # fmt: skip
            self.boxes[name] = widgets.FloatText(own[name], layout=widgets.Layout(width="130px"), step=0.001)
            stage = run.spec.stage(name)
            pass_label = printable(shorten(stage.pass_label or "", 24))
            rules = {"gate": f"p({pass_label}) ≥", "deferral": "answers at p(best) ≥", "final": "p(best) ≥"}
            name_and_rule = widgets.HTML(f"<b><bdi>{escape(name)}</bdi></b>: <bdi>{escape(rules[stage.role])}</bdi>")
            name_and_rule.layout.width = "200px"
            rows.append(widgets.HBox([name_and_rule, self.sliders[name], self.boxes[name]]))
            self.sliders[name].observe(lambda change, name=name: self._on_slider(name), "value")
            self.boxes[name].observe(lambda change, name=name: self._on_box(name), "value")
        self.reset_button = widgets.Button(description="Reset", tooltip="The run's own thresholds")
        self.reset_button.on_click(lambda _: self.move(self.own))
        self.path_box = widgets.Text("explored.toml", layout=widgets.Layout(width="310px"), tooltip="The file to write")
        self.write_button = widgets.Button(
            description="Write cascade", tooltip="Write the cascade at these thresholds as a cascade.toml"
        )
        self.write_button.on_click(lambda _: self._write())
        self.status, self._shown = widgets.HTML(), widgets.HTML()
        self._moving = False
        buttons = widgets.HBox([self.reset_button, self.path_box, self.write_button])
        self._own_predictions = self._replay(own)
        self._own_outcomes, self._groups = self._codes(self._own_predictions), text_groups(self.run.examples)
        super().__init__([*rows, buttons, self.status, self._shown])
        self._show()

    @property
    def html(self) -> str:
        """The HTML below the sliders."""
        return self._shown.value

    def move(self, thresholds: Mapping[str, float]) -> None:
        """Set thresholds, move their sliders and boxes, and show what the cascade does there."""
        self._moving = True
        try:
            for name, value in thresholds.items():
                slider = self.sliders[name]
                self.thresholds[name] = float(value)
                self.boxes[name].value = float(value)
                slider.value = _clip(_log_odds(value), slider.min, slider.max)
        finally:
            self._moving = False
        self._show()

    def _on_slider(self, name: str) -> None:
        if not self._moving:
            slider = self.sliders[name]
            # The ends of a slider lie beyond every confidence: all texts pass, or none.
            value = (
                0.0
                if slider.value <= slider.min
                else 1.0
                if slider.value >= slider.max
                else _from_log_odds(slider.value)
            )
            self.move({name: value})

    def _on_box(self, name: str) -> None:
        if self._moving:
            return
        value = self.boxes[name].value
        if 0 <= value <= 1:
            self.move({name: value})
        else:
            self._show_status(f"{value:g} is not a threshold of {name}; give a number from 0 to 1", wrong=True)

    def _show(self) -> None:
        try:
            self.predictions = self._replay(self.thresholds)
        except CascadeLabError as error:
            self._show_status(str(error), wrong=True)
            return
        self._show_status("")
        self._outcomes = self._codes(self.predictions)
        self.counts = np.bincount(self._outcomes, minlength=len(OUTCOMES))
        self.metrics = outcome_intervals(self._outcomes, groups=self._groups)
        own = outcome_intervals(self._own_outcomes)
        left, right = _metrics_table(self.metrics, own) + self._flow(), self._matrix()
        self._shown.value = (
            '<div style="color:#111;background:#fff;padding:4px;font-size:13px;line-height:1.4">'
            f'<div style="display:flex;flex-wrap:wrap;gap:0 32px"><div>{left}</div><div>{right}</div></div>'
            f"{self._changed()}</div>"
        )

    def _replay(self, thresholds: Mapping[str, float]) -> pd.DataFrame:
        return self._route(thresholds).frame()

    def _route(self, thresholds: Mapping[str, float]) -> RoutingResult:
        spec = self.run.spec.with_thresholds(thresholds)
        decisions = {stage.name: self.run.decision(stage.name).with_threshold(stage) for stage in spec.stages}
        return require_scored(route(spec, decisions), self.run.name)

    def _codes(self, predictions: pd.DataFrame) -> np.ndarray:
        return outcome_codes(self.run.spec, self._y_true, predictions["predicted"].to_numpy())

    def _flow(self) -> str:
        """Return one bar per stage: how many texts reach it, and the outcomes of the texts that end there."""
        decided = self.predictions["decided_by"].to_numpy(dtype=object)
        n, reached, rows = len(decided), len(decided), []
        for stage in self.run.spec.stages:
            counts = np.bincount(self._outcomes[decided == stage.name], minlength=len(OUTCOMES))
            parts = [_part(name, count, count / n) for name, count in zip(OUTCOMES, counts, strict=True) if count]
            onward = reached - counts.sum()
            if onward:
                parts.insert(0, _part("goes on", onward, onward / n))
            share = reached / n
            rows.append(
                f'<div style="margin-top:6px"><bdi><b>{escape(stage.name)}</b></bdi>: {reached:,} texts ({share:.1%})'
                f'</div><div style="display:flex;width:520px;height:26px">{"".join(parts)}</div>'
            )
            reached = onward
        key = "".join(
            f'<span style="white-space:nowrap;margin-right:14px"><span style="{_box(name)}"></span> {name} '
            f"<b>{count:,}</b></span>"
            for name, count in zip(OUTCOMES, self.counts, strict=True)
        )
        head, style = '<div style="margin-top:10px"><b>Where texts end</b></div>', "width:540px;margin-top:6px"
        return f'{head}{"".join(rows)}<div style="{style}">{key}</div>'

    def _matrix(self) -> str:
        """Return the confusion matrix, or the part with its most confused labels where there are many."""
        n = len(self._labels)
        predicted = pd.Index(self._labels).get_indexer(self.predictions["predicted"])
        counts = np.bincount(self._label_codes * n + predicted, minlength=n * n).reshape(n, n)
        matrix = CascadeConfusionDisplay(counts, self._labels, title="Confusion, end to end")
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

    def _changed(self) -> str:
        """Return the texts whose answer differs from the one at the run's own thresholds."""
        now, own = (table["predicted"].to_numpy() for table in (self.predictions, self._own_predictions))
        changed = np.flatnonzero(now != own)
        if not len(changed):
            return '<div style="margin-top:10px">No answer differs from those at the run\'s own thresholds.</div>'
        n_fixed = int(((now == self._y_true) & (own != self._y_true)).sum())
        n_broken = int(((now != self._y_true) & (own == self._y_true)).sum())
        texts = self.run.examples["text"]
        rows = ""
        for row in changed[:MAX_TEXTS]:
            cells = [_label(texts.iat[row], 90), *(_label(labels[row]) for labels in (self._y_true, own, now))]
            rows += f"<tr>{''.join(f'<td style={_LEFT!r}>{cell}</td>' for cell in cells)}</tr>"
        names = ("text", "true label", "answer before", "answer now")
        heads = "".join(f"<th style={_LEFT!r}>{name}</th>" for name in names)
        return (
            f'<div style="margin-top:10px"><b>{len(changed):,} answers differ</b> from those at the run\'s own '
            f"thresholds: {n_fixed:,} become right, {n_broken:,} become wrong. The first of them:</div>"
            f'<table style="font-size:12px;color:#111"><tr>{heads}</tr>{rows}</table>'
        )

    def _write(self) -> None:
        output = Path(self.path_box.value)
        try:
            if not output.name:
                raise CascadeLabError("give the name of the file to write, such as explored.toml")
            refuse_existing(output, overwrite=False)
            metrics = {name: interval.value for name, interval in self.metrics.items()}
            choice = Choice(self.thresholds, self.counts, metrics)
            write_tuned(self.run, choice, "chosen by hand in the explorer", output)
            self._show_status(f"written: {output.resolve()}")
        except (CascadeLabError, OSError) as error:
            self._show_status(str(error), wrong=True)

    def _show_status(self, text: str, *, wrong: bool = False) -> None:
        style = "color:#b00020;font-weight:bold" if wrong else "color:#333"
        self.status.value = f'<span style="{style}">{escape(printable(text))}</span>' if text else ""


_LEFT = "text-align:left;padding:1px 10px 1px 0"
_RIGHT = "text-align:right;padding:1px 10px 1px 0"
_HEAD = "writing-mode:vertical-rl;transform:rotate(180deg);text-align:left;font-weight:normal;padding:2px"
_TABLE = "font-variant-numeric:tabular-nums;font-size:13px;color:#111"


def _metrics_table(now: Mapping[str, Interval], own: Mapping[str, Interval]) -> str:
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


def _ends(run: Run, name: str) -> tuple[float, float]:
    """Return a slider's ends: just beyond the log-odds of every confidence of the stage."""
    decision = run.decision(name)
    confidence = decision.confidence[decision.scored]
    low, high = np.ravel(_log_odds(np.quantile(confidence, [0, 1]))) if len(confidence) else (-1.0, 1.0)
    return float(np.floor(low * 10) / 10 - 0.1), float(np.ceil(high * 10) / 10 + 0.1)


def _log_odds(p: float | np.ndarray) -> float | np.ndarray:
    p = np.clip(p, 1e-9, 1 - 1e-9)
    return np.log(p) - np.log1p(-p)


def _from_log_odds(log_odds: float) -> float:
    """Return the probability, with four significant digits of it or, above 0.5, of its distance from 1."""
    rarer = float(f"{1 / (1 + np.exp(abs(log_odds))):.4g}")
    return rarer if log_odds < 0 else round(1 - rarer, 15)


def _clip(value: float | np.ndarray, low: float, high: float) -> float:
    return float(min(max(value, low), high))

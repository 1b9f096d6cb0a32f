"""Sliders for a run's thresholds in a notebook, with the figures, the flow and the matrix following at once.

Nothing is drawn by a plotting library here: HTML of a few kilobytes is what follows a slider without a pause.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from html import escape
from pathlib import Path
from typing import NamedTuple

import ipywidgets as widgets
import numpy as np
import pandas as pd

from cascade_lab.analysis.bootstrap import Interval
from cascade_lab.analysis.goals import FRACTIONS, Goal
from cascade_lab.analysis.outcomes import ERRORS, OUTCOMES, outcome_codes
from cascade_lab.analysis.quadrants import swept_stages
from cascade_lab.analysis.thresholds import Choice
from cascade_lab.analysis.tuning import intervals_of, write_tuned
from cascade_lab.displays.confusion import CascadeConfusionDisplay
from cascade_lab.errors import CascadeLabError, RunError
from cascade_lab.run import Run
from cascade_lab.serial import answer
from cascade_lab.spec import StageSpec

MAX_LABELS = 12
MAX_TEXTS = 6

# What is right is pale, what is wrong is dark: they part in grey too, and every part bears its name.
_COLORS = dict(zip(OUTCOMES, ("#9fd0bf", "#cfe8df", "#d98632", "#b0304f", "#5d4390", "#55595f"), strict=True))
_GOAL = Goal("accuracy")


def explore(run: Run) -> Explorer:
    """Return a widget that shows `run` at any thresholds: put it last in a notebook's cell.

    Raises
    ------
    RunError
        The run is not whole.
    """
    return Explorer(run)


class Explorer(widgets.VBox):
    """A slider for each stage that can reject, and what the cascade does there.

    Sliders are in log-odds of the threshold, so that values near 0 and 1 can be reached; the box beside one takes a
    number as it is, and is what counts.

    Attributes
    ----------
    run : Run
    sliders : dict of str to FloatSlider
        By stage; the value is the threshold's log-odds.
    boxes : dict of str to FloatText
        By stage; the value is the threshold.
    reset_button, write_button : Button
        Back to the run's own thresholds; write the cascade at the present ones to `path_box.value`.
    path_box : Text
    thresholds : dict of str to float
        The present thresholds, as `Run.replay` takes them.
    predictions : DataFrame
        The answers there, an example a row: `predicted` and `decided_by`, as `Run.replay` has them.
    figures : dict of str to Interval
        The figures there, with their 95% intervals.
    """

    def __init__(self, run: Run):
        self.run = run
        self.stages = swept_stages(run.spec)
        own = {name: run.spec.thresholds[name] or 0.0 for name in self.stages}
        self.own, self.thresholds = own, dict(own)
        self._labels = list(run.spec.labels)
        self._gold = run.examples["label"].to_numpy(dtype=object)
        self._gold_codes = pd.Index(self._labels).get_indexer(self._gold)
        self._said = {stage.name: _say_what(run, stage) for stage in run.spec.stages}
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
            what = f"p({_short(stage.pass_label)}) ≥" if stage.is_gate else "p(best) ≥"
            said = widgets.HTML(f"<b><bdi>{escape(name)}</bdi></b>: <bdi>{escape(what)}</bdi>")
            said.layout.width = "200px"
            rows.append(widgets.HBox([said, self.sliders[name], self.boxes[name]]))
            self.sliders[name].observe(lambda change, name=name: self._slid(name), "value")
            self.boxes[name].observe(lambda change, name=name: self._typed(name), "value")
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
        self._before = self._answers(own)
        self._counts_before = np.bincount(self._codes(self._before), minlength=len(OUTCOMES))
        super().__init__([*rows, buttons, self.status, self._shown])
        self._show()

    @property
    def html(self) -> str:
        """What is shown below the sliders."""
        return self._shown.value

    def move(self, thresholds: Mapping[str, float]) -> None:
        """Set thresholds, sliders and boxes with them, and show what the cascade does there."""
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

    def _slid(self, name: str) -> None:
        if not self._moving:
            slider = self.sliders[name]
            # The ends are beyond every probability: all pass, or none.
            value = 0.0 if slider.value <= slider.min else 1.0 if slider.value >= slider.max else _read(slider.value)
            self.move({name: value})

    def _typed(self, name: str) -> None:
        if self._moving:
            return
        value = self.boxes[name].value
        if 0 <= value <= 1:
            self.move({name: value})
        else:
            self._say(f"{value:g} is no threshold of {name}; give one from 0 to 1", wrong=True)

    def _show(self) -> None:
        try:
            self.predictions = self._answers(self.thresholds)
        except CascadeLabError as error:
            self._say(str(error), wrong=True)
            return
        self._say("")
        self._outcomes = self._codes(self.predictions)
        self.counts = np.bincount(self._outcomes, minlength=len(OUTCOMES))
        self.figures = intervals_of(self.counts, _GOAL)
        before = intervals_of(self._counts_before, _GOAL, n_resamples=1)
        left, right = _figures(self.figures, before) + self._flow(), self._matrix()
        self._shown.value = (
            '<div style="color:#111;background:#fff;padding:4px;font-size:13px;line-height:1.4">'
            f'<div style="display:flex;flex-wrap:wrap;gap:0 32px"><div>{left}</div><div>{right}</div></div>'
            f"{self._changed()}</div>"
        )

    def _answers(self, thresholds: Mapping[str, float]) -> pd.DataFrame:
        """Return what `Run.replay` does, from softmaxes that are computed already."""
        n = len(self._gold)
        predicted, decided_by, going = np.full(n, None, dtype=object), np.full(n, None, dtype=object), np.ones(n, bool)
        for stage in self.run.spec.stages:
            said = self._said[stage.name]
            missing = int((going & ~said.known).sum())
            if missing:
                raise RunError(
                    f"{missing} examples would reach stage '{stage.name}', which never scored them; run the cascade "
                    "again with shadow scores"
                )
            passes = said.decisive >= np.where(np.isnan(said.least), thresholds.get(stage.name, 0.0), said.least)
            ends = going if stage is self.run.spec.last else going & ~passes
            predicted[ends] = np.where(passes[ends], said.passed[ends], said.stopped[ends])
            decided_by[ends] = stage.name
            going = going & ~ends
        return pd.DataFrame({"predicted": predicted, "decided_by": decided_by})

    def _codes(self, predictions: pd.DataFrame) -> np.ndarray:
        return outcome_codes(self.run.spec, self._gold, predictions["predicted"].to_numpy())

    def _flow(self) -> str:
        """Show a row a stage: how many reach it, and what becomes of those that end there."""
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
        """Show the confusion matrix, or the cut-out of its most confused labels where there are many."""
        n = len(self._labels)
        answers = pd.Index(self._labels).get_indexer(self.predictions["predicted"])
        counts = np.bincount(self._gold_codes * n + answers, minlength=n * n).reshape(n, n)
        shown = CascadeConfusionDisplay(counts, self._labels, title="Confusion, end to end")
        if n > MAX_LABELS:
            shown = shown.most_confused(MAX_LABELS)
        heads = "".join(f'<th style="{_HEAD}">{_label(label)}</th>' for label in shown.display_labels)
        most = max(int(shown.confusion_matrix.max(initial=0)), 1)
        rows = []
        for i, (label, row) in enumerate(zip(shown.display_labels, shown.confusion_matrix, strict=True)):
            cells = "".join(_cell(int(value), most, i == j) for j, value in enumerate(row))
            rows.append(f'<tr><th style="text-align:right;padding-right:6px">{_label(label)}</th>{cells}</tr>')
        return (
            f'<div style="margin-top:10px"><b>{escape(shown.title)}</b> (gold in rows, answers in columns)</div>'
            f'<table style="border-collapse:collapse;font-size:12px;color:#111"><tr><th></th>{heads}</tr>'
            f"{''.join(rows)}</table>"
        )

    def _changed(self) -> str:
        """Show the texts whose answer differs from the one at the run's own thresholds."""
        now, before = (table["predicted"].to_numpy() for table in (self.predictions, self._before))
        moved = np.flatnonzero(now != before)
        if not len(moved):
            return '<div style="margin-top:10px">Every answer is that of the run\'s own thresholds.</div>'
        won = int(((now == self._gold) & (before != self._gold)).sum())
        lost = int(((now != self._gold) & (before == self._gold)).sum())
        texts = self.run.examples["text"]
        rows = ""
        for row in moved[:MAX_TEXTS]:
            cells = [_label(texts.iat[row], 90), *(_label(labels[row]) for labels in (self._gold, before, now))]
            rows += f"<tr>{''.join(f'<td style={_LEFT!r}>{cell}</td>' for cell in cells)}</tr>"
        heads = "".join(f"<th style={_LEFT!r}>{head}</th>" for head in ("text", "gold", "answered before", "now"))
        return (
            f'<div style="margin-top:10px"><b>{len(moved):,} answers differ</b> from the run\'s own: '
            f"{won:,} righted, {lost:,} spoilt. The first of them:</div>"
            f'<table style="font-size:12px;color:#111"><tr>{heads}</tr>{rows}</table>'
        )

    def _write(self) -> None:
        output = Path(self.path_box.value)
        try:
            if not output.name or output.exists():
                raise CascadeLabError(f"{output}: is there already; give the name of a new file")
            figures = {name: found.value for name, found in self.figures.items()}
            write_tuned(
                self.run, Choice(self.thresholds, self.counts, figures), "chosen by hand in the explorer", output
            )
            self._say(f"written: {output.resolve()}")
        except (CascadeLabError, OSError) as error:
            self._say(str(error), wrong=True)

    def _say(self, text: str, *, wrong: bool = False) -> None:
        style = "color:#b00020;font-weight:bold" if wrong else "color:#333"
        self.status.value = f'<span style="{style}">{escape(text)}</span>' if text else ""


class _Said(NamedTuple):
    """What a stage says of every example at any threshold; `least` is the threshold of a label that has its own."""

    known: np.ndarray
    decisive: np.ndarray
    least: np.ndarray
    stopped: np.ndarray
    passed: np.ndarray


def _say_what(run: Run, stage: StageSpec) -> _Said:
    n, scores = len(run.examples), run.scores(stage.name)
    said = answer(stage if stage.is_gate else replace(stage, min_probability=None, min_probabilities={}), scores.logits)
    known, decisive, least = np.zeros(n, dtype=bool), np.zeros(n), np.full(n, np.nan)
    predicted = np.full(n, None, dtype=object)
    known[scores.rows], decisive[scores.rows], predicted[scores.rows] = True, said.decisive, said.predicted
    if stage.is_gate:
        return _Said(known, decisive, least, predicted, predicted)
    for label, value in stage.min_probabilities.items():
        least[predicted == label] = value
    return _Said(known, decisive, least, np.full(n, stage.reject_label, dtype=object), predicted)


_LEFT = "text-align:left;padding:1px 10px 1px 0"
_RIGHT = "text-align:right;padding:1px 10px 1px 0"
_HEAD = "writing-mode:vertical-rl;transform:rotate(180deg);text-align:left;font-weight:normal;padding:2px"
_TABLE = "font-variant-numeric:tabular-nums;font-size:13px;color:#111"


def _figures(now: Mapping[str, Interval], before: Mapping[str, Interval]) -> str:
    rows = []
    for name in FRACTIONS:
        value, low, high = now[name]
        change = value - before[name].value
        cells = (_number(value), f"{_number(low)} to {_number(high)}", _number(before[name].value), f"{change:+.4f}")
        cells = tuple("–" if "nan" in cell else cell for cell in cells)
        weight = "bold" if change and not np.isnan(change) else "normal"
        rows.append(
            f'<tr><th style="{_LEFT};font-weight:normal">{name.replace("_", " ")}</th>'
            f'<td style="{_RIGHT};font-weight:bold">{cells[0]}</td><td style="{_RIGHT}">{cells[1]}</td>'
            f'<td style="{_RIGHT}">{cells[2]}</td><td style="{_RIGHT};font-weight:{weight}">{cells[3]}</td></tr>'
        )
    heads = "".join(f'<th style="{_RIGHT}">{head}</th>' for head in ("now", "95% interval", "run's own", "change"))
    return f'<table style="{_TABLE}"><tr><th></th>{heads}</tr>{"".join(rows)}</table>'


def _part(name: str, count: int, share: float) -> str:
    """Return a part of a bar, as wide as its share, with its number where that fits."""
    dark = name in ERRORS[1:]
    color = "white" if dark else "#111"
    hatch = "#fff3 0 2px,transparent 2px 6px" if name in ERRORS else "transparent 0 100%"
    said = f"{count:,}" if share > 0.06 else ""
    return (
        f'<div title="{name}: {count:,} ({share:.1%})" style="width:{100 * share:.3f}%;min-width:1px;overflow:hidden;'
        f"background:repeating-linear-gradient(45deg,{hatch}),{_COLORS.get(name, '#e8e8e8')};color:{color};"
        f'text-align:center;line-height:26px;font-size:12px">{said}</div>'
    )


def _box(name: str) -> str:
    return f"display:inline-block;width:11px;height:11px;border:1px solid #555;background:{_COLORS[name]}"


def _cell(value: int, most: int, right: bool) -> str:
    """Return a cell of the matrix: darker with the logarithm of its number, framed on the diagonal."""
    strength = np.log1p(value) / np.log1p(most)
    back = "#fff" if not value else f"rgba(8,48,107,{0.1 + 0.85 * strength:.2f})"
    frame = "2px solid #444" if right else "1px solid #ddd"
    color = "#fff" if strength > 0.5 else "#111"
    return (
        f'<td style="border:{frame};background:{back};color:{color};text-align:center;min-width:30px;height:22px">'
        f"{value if value else ''}</td>"
    )


def _label(text: str | None, most: int = 24) -> str:
    """Return a text as HTML: shortened, escaped, and kept from turning its neighbours' direction."""
    whole = "" if text is None else str(text)
    hint = f' title="{escape(whole[:400])}"' if len(whole) > most else ""
    return f"<bdi{hint}>{escape(_short(whole, most))}</bdi>"


def _short(text: str | None, most: int = 24) -> str:
    text = text or ""
    return text if len(text) <= most else text[: most - 1] + "…"


def _number(value: float) -> str:
    return f"{value:.4f}"


def _ends(run: Run, name: str) -> tuple[float, float]:
    """Return a slider's ends: just beyond the log-odds of every probability that the stage gave."""
    decisive = answer(run.spec.stage(name), run.scores(name).logits).decisive
    ends: Sequence[float] = (-1.0, 1.0) if not len(decisive) else _log_odds(np.quantile(decisive, [0, 1]))
    return float(np.floor(ends[0] * 10) / 10 - 0.1), float(np.ceil(ends[1] * 10) / 10 + 0.1)


def _log_odds(p: float | np.ndarray) -> float | np.ndarray:
    p = np.clip(p, 1e-9, 1 - 1e-9)
    return np.log(p) - np.log1p(-p)


def _read(log_odds: float) -> float:
    """Return the probability, as short as four digits of it, or of what it lacks to 1, allow."""
    rarer = float(f"{1 / (1 + np.exp(abs(log_odds))):.4g}")
    return rarer if log_odds < 0 else round(1 - rarer, 15)


def _clip(value: float, low: float, high: float) -> float:
    return float(min(max(value, low), high))

"""A notebook widget with a slider for each threshold of a run; metrics, flow and matrix follow at once.

The widget shows a few kilobytes of HTML instead of pictures, so that it follows a slider without a pause.
"""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from html import escape
from pathlib import Path
from typing import Any

import ipywidgets as widgets
import numpy as np
import pandas as pd

from cascade_lab.analysis.examples import with_texts
from cascade_lab.analysis.intervals import outcome_intervals
from cascade_lab.analysis.outcomes import OUTCOMES, outcome_codes
from cascade_lab.atomic import refuse_existing
from cascade_lab.decisions import RoutingResult, require_scored, route
from cascade_lab.displays.explored import changes_html, flow_html, matrix_html, metrics_html, page_html
from cascade_lab.displays.outcomes import OutcomeFlowDisplay
from cascade_lab.displays.static import picture
from cascade_lab.exceptions import CascadeLabError, RunError
from cascade_lab.run import Run
from cascade_lab.text import printable, shorten
from cascade_lab.thresholds.grid import swept_stages
from cascade_lab.thresholds.search import Choice
from cascade_lab.thresholds.tuning import write_tuned

PAGE_SIZE = 20
CHANGES = ("all changes", "becomes right", "becomes wrong", "stays wrong")


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
    changes : DataFrame
        Every text whose answer differs from the one at the run's own thresholds: `example_id`, `text` (and `text_b`),
        `label`, the answer `before` and `now`, `decided_by_before` and `decided_by_now`, and `change`: "becomes right",
        "becomes wrong" or "stays wrong".
    change_box : Dropdown
        Which changes are listed; `back_button` and `forward_button` turn the pages of the list.
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
        self.status, self._shown, self._listed = widgets.HTML(), widgets.HTML(), widgets.HTML()
        self.change_box = widgets.Dropdown(options=CHANGES, layout=widgets.Layout(width="170px"))
        self.change_box.observe(lambda _: self._turn(-self._page), "value")
        self.back_button, self.forward_button = (
            widgets.Button(description=arrow, tooltip=hint, layout=widgets.Layout(width="40px"))
            for arrow, hint in (("‹", "previous page"), ("›", "next page"))
        )
        self.back_button.on_click(lambda _: self._turn(-1))
        self.forward_button.on_click(lambda _: self._turn(1))
        self._page: int = 0
        self._page_label = widgets.Label()
        turning = [self.change_box, self.back_button, self._page_label, self.forward_button]
        self._change_row = widgets.HBox(turning)
        self._moving = False
        buttons = widgets.HBox([self.reset_button, self.path_box, self.write_button])
        self._own_predictions = self._replay(own)
        self._own_outcomes, self._groups = self._codes(self._own_predictions), self.run.text_groups
        super().__init__([*rows, buttons, self.status, self._shown, self._change_row, self._listed])
        self._show()

    @property
    def html(self) -> str:
        """The HTML below the sliders."""
        return self._shown.value + self._listed.value

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
        slider = self.sliders[name]
        at = _clip(_log_odds(self.thresholds[name]), slider.min, slider.max)
        # A page rounds a slider to its step and sends that back: the threshold in the box stays.
        if self._moving or abs(slider.value - at) <= slider.step / 2:
            return
        # The ends of a slider lie beyond every confidence: all texts pass, or none.
        value = (
            0.0 if slider.value <= slider.min else 1.0 if slider.value >= slider.max else _from_log_odds(slider.value)
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
        names, decided_by = [stage.name for stage in self.run.spec.stages], self.predictions["decided_by"]
        left = metrics_html(self.metrics, own) + flow_html(names, decided_by.to_numpy(dtype=object), self._outcomes)
        predicted = pd.Index(self._labels).get_indexer(self.predictions["predicted"])
        right = matrix_html(self._labels, self._label_codes, predicted)
        self._shown.value = page_html(
            f'<div style="display:flex;flex-wrap:wrap;gap:0 32px"><div>{left}</div><div>{right}</div></div>'
        )
        self.changes = self._changes()
        self._page = 0
        self._show_changes()

    def _changes(self) -> pd.DataFrame:
        now, own = self.predictions, self._own_predictions
        rows = np.flatnonzero(now["predicted"].to_numpy() != own["predicted"].to_numpy())
        table = with_texts(self.run, self.run.examples[["example_id", "label"]]).iloc[rows].reset_index(drop=True)
        for name, answers in (("before", own), ("now", now)):
            table[name] = answers["predicted"].to_numpy()[rows]
            table[f"decided_by_{name}"] = answers["decided_by"].to_numpy()[rows]
        is_right, was_right = table["now"] == table["label"], table["before"] == table["label"]
        table["change"] = np.select([is_right, was_right], CHANGES[1:3], CHANGES[3])
        return table

    def _show_changes(self) -> None:
        """Show one page of the texts whose answer differs from the one at the run's own thresholds."""
        table, kind = self.changes, self.change_box.value
        table = table if kind == CHANGES[0] else table[table["change"] == kind]
        n_pages = max(1, -(-len(table) // PAGE_SIZE))
        self._page = min(max(self._page, 0), n_pages - 1)
        self.back_button.disabled, self.forward_button.disabled = self._page == 0, self._page + 1 >= n_pages
        self._page_label.value = f"page {self._page + 1} of {n_pages}"
        self._change_row.layout.display = "" if len(self.changes) else "none"
        self._listed.value = page_html(changes_html(self.changes, table.iloc[self._page * PAGE_SIZE :][:PAGE_SIZE]))

    def _turn(self, step: int) -> None:
        self._page += step
        self._show_changes()

    def _repr_mimebundle_(self, **kwargs: Any) -> Any:
        """Return the widget; and for a page without a kernel the flow as a picture, and what is below the sliders."""
        bundle, metadata = super()._repr_mimebundle_(**kwargs), {}
        if isinstance(bundle, tuple):
            bundle, metadata = bundle
        static: dict[str, Any] = {"text/html": self.html, "text/plain": repr(self)}
        with contextlib.suppress(RunError):  # a run without shadow scores has no flow
            static |= picture(OutcomeFlowDisplay.from_run(self.run, thresholds=self.thresholds))
        return {**(bundle or {}), **static}, metadata

    def __repr__(self) -> str:
        values = ", ".join(f"{name} {value:g}" for name, value in self.thresholds.items())
        return f"<Explorer: {self.run.name}, {printable(values)}; {len(self.changes):,} answers differ>"

    def _replay(self, thresholds: Mapping[str, float]) -> pd.DataFrame:
        return self._route(thresholds).frame()

    def _route(self, thresholds: Mapping[str, float]) -> RoutingResult:
        spec = self.run.spec.with_thresholds(thresholds)
        decisions = {stage.name: self.run.decision(stage.name).with_threshold(stage) for stage in spec.stages}
        return require_scored(route(spec, decisions), self.run.name)

    def _codes(self, predictions: pd.DataFrame) -> np.ndarray:
        return outcome_codes(self.run.spec, self._y_true, predictions["predicted"].to_numpy())

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

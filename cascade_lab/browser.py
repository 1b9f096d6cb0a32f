"""A notebook widget that leads from a cell of the matrix, a band of the flow or a slice to its texts, and marks texts.

The Python side holds the state and works without a page; `browser.js` draws it and sends back what a person clicks.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import anywidget
import pandas as pd
import traitlets

from cascade_lab.analysis.neighbours import SimilarTexts
from cascade_lab.analysis.slicing import find_slices
from cascade_lab.analysis.slicing import slices as error_slices
from cascade_lab.analysis.text_table import ORDERS, SHOWN, TextTable
from cascade_lab.displays.confusion import MAX_LABELLED, CascadeConfusionDisplay
from cascade_lab.displays.drawing import OUTCOME_STYLES, text_color
from cascade_lab.displays.grouped_texts import open_confusions
from cascade_lab.displays.static import picture
from cascade_lab.exceptions import CascadeLabError
from cascade_lab.marks import ACTIONS, Marks
from cascade_lab.run import Run
from cascade_lab.text import printable, shorten, visible

PAGE_SIZE = 25
MAX_TEXT, MAX_LABEL, MAX_RULE = 2000, 60, 200
"""The characters of a text, a label and a rule that are sent to the page."""
MAX_PAIRS = 100
MAX_SLICES = 30


def browse(run: Run, *, slices: pd.DataFrame | None = None, marks: str | Path | None = None) -> Browser:
    """Return a widget that leads from the errors of a run to its texts. Make it the last value of a cell.

    Click a cell of the matrix, a band of the flow or a slice, and read its texts. Tick texts and mark them with an
    action; "Write" writes a csv file from which `cascade-lab correct` takes the corrected labels.

    Parameters
    ----------
    run : Run
    slices : DataFrame, optional
        What `slices` or `find_slices` returns; by default both are computed when the list of slices is opened.
    marks : path, optional
        A csv file of marks that was written before, to go on with.

    Raises
    ------
    RunError
        No example has a label, or the run cannot be read.
    EvalSetError
        The file of marks is not of this run.

    Examples
    --------
    The widget works without a page too:

    >>> from cascade_lab import CascadeSpec, StageSpec
    >>> gate = StageSpec("gate", ("oos", "in"), pass_label="in", threshold=0.5)
    >>> topic = StageSpec("topic", ("pay", "play"))
    >>> examples = pd.DataFrame({"text": ["a bill", "a song", "hello"], "label": ["pay", "play", "oos"]})
    >>> logits = {"gate": [[0, 2], [0, 1], [3, 0]], "topic": [[2, 0], [1, 0], [0, 0]]}
    >>> browser = browse(Run.from_logits(CascadeSpec("example", (gate, topic)), examples, logits))
    >>> browser.select(label="play", predicted="pay")
    >>> browser.texts[["text", "outcome"]].to_numpy().tolist()
    [['a song', 'wrong class']]
    >>> browser.mark([browser.texts["example_id"][0]], "review")
    >>> browser.marks["action"].tolist()
    ['review']
    """
    return Browser(run.labelled, slices=slices, marks=marks)


class Browser(anywidget.AnyWidget):
    """A run's texts behind its matrix, its flow and its slices; see `browse`.

    `selection`, `search`, `shown`, `order` and `page` are shared with the page: set one of them, and the page
    shows other texts.

    Attributes
    ----------
    run : Run
    table : TextTable
        Every text; `table.frame` is a DataFrame.
    selection : dict
        Which texts are selected: see `select`.
    search : str
        Words that the text, a label or the id must contain, in any case; all of them.
    shown : str
        "all", "errors", "right" or "marked".
    order : str
        "surest first", "least sure first", "order of the set", "shortest first" or "longest first".
    page : int
        From 0.
    """

    _esm = Path(__file__).with_name("browser.js")
    _css = Path(__file__).with_name("browser.css")

    selection = traitlets.Dict().tag(sync=True)
    search = traitlets.Unicode("").tag(sync=True)
    shown = traitlets.Enum(SHOWN, SHOWN[0]).tag(sync=True)
    order = traitlets.Enum(ORDERS, ORDERS[0]).tag(sync=True)
    page = traitlets.Int(0).tag(sync=True)
    # What Python sends to the page, and what the page asks for.
    _overview = traitlets.Dict().tag(sync=True)
    _slices: traitlets.List[list[Any]] = traitlets.List().tag(sync=True)
    _view = traitlets.Dict().tag(sync=True)
    _similar = traitlets.Dict().tag(sync=True)
    _status = traitlets.Dict().tag(sync=True)
    _command = traitlets.Dict().tag(sync=True)

    def __init__(self, run: Run, *, slices: pd.DataFrame | None = None, marks: str | Path | None = None):
        super().__init__()
        self.run = run.labelled
        self.table = TextTable(self.run)
        self._slice_table = slices
        self._marks = Marks(self.run)
        if marks is not None:
            self._marks.read(marks)
        self._overview = _overview(self.table)
        self._show()
        self.observe(self._on_other_texts, ["selection", "search", "shown", "order"])
        self.observe(lambda _: self._show(), ["page"])
        self.observe(self._on_command, ["_command"])

    @property
    def texts(self) -> pd.DataFrame:
        """The texts that are selected, on all pages, in their order; columns as in `TextTable.frame`."""
        return self.table.frame.iloc[self._rows()].reset_index(drop=True)

    @property
    def marks(self) -> pd.DataFrame:
        """The marks, in the order in which they were made: `example_id`, `action`, `corrected_label`."""
        return self._marks.frame()

    @property
    def slices(self) -> pd.DataFrame:
        """The slices that the page lists, as `slices` and `find_slices` return them."""
        if self._slice_table is None:
            tables = [error_slices(self.run).head(MAX_SLICES), find_slices(self.run).head(MAX_SLICES)]
            self._slice_table = pd.concat(tables).drop_duplicates("rule", ignore_index=True)
        return self._slice_table

    def select(self, **conditions: str | None) -> None:
        """Select the texts that meet every condition; without one, all texts.

        Parameters
        ----------
        **conditions : str, optional
            `label` and `predicted`; `stage`, where the text leaves the cascade; `outcome`, as in `flow`, where
            "goes on" means that the text leaves after `stage`; `fault`, the stage at fault; `rule`, a query over
            `features(run)`, such as the rule of a slice.

        Raises
        ------
        RunError
            No such condition, label, stage or outcome, or the rule cannot be applied.
        """
        selection = {name: value for name, value in conditions.items() if value is not None}
        self.table.mask(selection)
        self.selection = selection

    def mark(self, example_ids: Sequence[str], action: str, corrected_label: str | None = None) -> None:
        """Mark texts with "relabel", "augment" or "review".

        Parameters
        ----------
        example_ids : sequence of str
        action : str
        corrected_label : str, optional
            Of "relabel" alone: a label of the cascade; by default each text's predicted label.

        Raises
        ------
        RunError
            No such example, action or label; or "relabel" would leave a label as it is. No text is marked then.
        """
        self._marks.add(example_ids, action, corrected_label)
        self._show()

    def unmark(self, example_ids: Sequence[str]) -> None:
        """Remove the marks of texts, where they have any."""
        self._marks.remove(example_ids)
        self._show()

    def write(self, path: str | Path, *, overwrite: bool = False) -> Path:
        """Write the marks as a csv file, from which `cascade-lab correct` takes the corrected labels.

        A file that this browser has written or read before is replaced.

        Raises
        ------
        CascadeLabError
            No text is marked, the name does not end in .csv, or the file exists or cannot be written.
        """
        return self._marks.write(path, overwrite=overwrite)

    def similar(self, example_id: str, n: int = 5) -> pd.DataFrame:
        """Return the texts of the run that are most similar to a text; see `SimilarTexts.find`."""
        return self._finder.find([example_id], n)

    @cached_property
    def _finder(self) -> SimilarTexts:
        return SimilarTexts(self.run)

    def _rows(self) -> Any:
        return self.table.rows(
            self.selection, search=self.search, shown=self.shown, order=self.order, marked=self._marks.ids
        )

    def _on_other_texts(self, _: Any) -> None:
        if self.page:
            self.page = 0  # shows them
        else:
            self._show()

    def _show(self) -> None:
        """Send one page of texts."""
        try:
            rows = self._rows()
        except CascadeLabError as error:
            self._say(str(error), wrong=True)
            return
        n_pages = max(1, -(-len(rows) // PAGE_SIZE))
        page = min(max(self.page, 0), n_pages - 1)
        places = rows[page * PAGE_SIZE : (page + 1) * PAGE_SIZE]
        texts = self.table.frame.iloc[places].to_dict("records")
        self._view = {
            "title": _title(self.selection),
            "n": len(rows),
            "page": page,
            "n_pages": n_pages,
            "n_marks": len(self._marks),
            "rows": [self._row(text) for text in texts],
        }

    def _row(self, text: dict[str, Any]) -> dict[str, Any]:
        """Return what the page shows of a text."""
        mark, fault = self._marks.get(text["example_id"]), text["fault"]
        return {
            "id": text["example_id"],
            "texts": [_cut(text[c]) for c in ("text", "text_b") if isinstance(text.get(c), str)],
            "label": _short(text["label"]),
            "predicted": _short(text["predicted"]),
            "right": text["label"] == text["predicted"],
            "outcome": text["outcome"] + (f", fault of {_isolated(fault)}" if isinstance(fault, str) else ""),
            "color": OUTCOME_STYLES[text["outcome"]].color,
            "stages": [part for stage in self.run.spec.stages if (part := _stage(text, stage.name))],
            "action": mark.action if mark else "",
            "corrected_label": _short(mark.corrected_label) if mark else "",
        }

    def _on_command(self, change: Mapping[str, Any]) -> None:
        """Do what the page asks for."""
        command = change["new"]
        ids = [str(example_id) for example_id in command.get("ids", [])]
        try:
            match command.get("do"):
                case "mark":
                    self.mark(ids, command["action"], command.get("corrected_label") or None)
                    self._say(f"marked {len(ids):,} with {command['action']}", has_marked=True)
                case "unmark":
                    self.unmark(ids)
                    self._say(f"removed the marks of {len(ids):,}", has_marked=True)
                case "write":
                    path = self.write(command["path"], overwrite=bool(command.get("overwrite")))
                    self._say(f"wrote {len(self._marks):,} marks: {path.resolve()}")
                case "similar":
                    found = self.similar(ids[0]).itertuples()
                    rows = [[_cut(r.text), _short(r.label), _short(r.predicted), float(r.similarity)] for r in found]
                    self._similar = {"id": ids[0], "rows": rows, "by": self._finder.by}
                case "slices":
                    _ = self.table.features  # computed now, so that a click on a slice is quick
                    slices = self.slices[self.slices["n_examples"] > 0].itertuples()
                    self._slices = [
                        [s.rule, _short(s.rule, MAX_RULE), int(s.n_examples), int(s.n_errors)] for s in slices
                    ]
        except (CascadeLabError, OSError) as error:
            self._say(str(error), wrong=True)

    def _say(self, text: str, *, wrong: bool = False, has_marked: bool = False) -> None:
        number = self._status.get("n", 0) + 1  # the same words twice are sent twice
        self._status = {"text": printable(text), "wrong": wrong, "has_marked": has_marked, "n": number}

    def __repr__(self) -> str:
        return f"<Browser: {self.run.name}, {len(self.table.frame):,} texts, {len(self._marks):,} marked>"

    def _repr_mimebundle_(self, **kwargs: Any) -> Any:
        """Return the widget; and for a page without a kernel a picture of the matrix, and the confusions with texts."""
        bundle, metadata = super()._repr_mimebundle_(**kwargs) or ({}, {})
        matrix = CascadeConfusionDisplay.from_run(self.run)
        static = {
            **picture(matrix if len(matrix.display_labels) <= MAX_LABELLED else matrix.most_confused()),
            "text/html": open_confusions(self.run, n_similar=0)._repr_html_(),
            "text/plain": repr(self),
        }
        return {**bundle, **static}, metadata


def _overview(table: TextTable) -> dict[str, Any]:
    """Return what the page needs once: labels, the cells of the matrix that are not 0, confusions, bands, choices."""
    spec = table.run.spec
    labels = list(spec.labels)
    codes = {name: pd.Index(labels).get_indexer(table.frame[column]) for name, column in zip("ij", _PAIR, strict=True)}
    cells = (
        pd.DataFrame(codes).value_counts().reset_index().sort_values(["count", "i", "j"], ascending=[False, True, True])
    )
    in_scope = {*spec.in_scope_labels}
    bands = [
        {
            "conditions": {k: v for k, v in zip(_BAND, b[1:4], strict=True) if isinstance(v, str)},
            "stage": _short(b.stage),
            "text": b.outcome
            + (f", fault of {_isolated(b.fault)}" if isinstance(b.fault, str) and b.fault != b.stage else ""),
            "n": b.n_examples,
            "color": OUTCOME_STYLES[b.outcome].color,
            "ink": text_color(OUTCOME_STYLES[b.outcome].color),
            "is_error": OUTCOME_STYLES[b.outcome].hatch is not None,
        }
        for b in table.bands().itertuples()
    ]
    return {
        "name": _short(spec.name),
        "n": len(table.frame),
        "labels": labels,
        "shown_labels": [_short(label) for label in labels],
        "in_scope": [label in in_scope for label in labels],
        "cells": cells.to_numpy().ravel().tolist(),
        "confusions": cells[cells["i"] != cells["j"]].head(MAX_PAIRS).to_numpy().tolist(),
        "bands": bands,
        "actions": list(ACTIONS),
        "shown": list(SHOWN),
        "orders": list(ORDERS),
    }


_PAIR, _BAND = ("label", "predicted"), ("stage", "outcome", "fault")


def _title(selection: Mapping[str, Any]) -> str:
    """Return a selection in words."""
    parts = []
    if "label" in selection or "predicted" in selection:
        parts.append(" → ".join(_isolated(selection.get(name, "any label")) for name in _PAIR))
    if "outcome" in selection or "stage" in selection:
        at = f" at {_isolated(selection['stage'])}" if "stage" in selection else ""
        parts.append(f"{selection.get('outcome', 'texts that leave')}{at}")
    if "fault" in selection:
        parts.append(f"fault of {_isolated(selection['fault'])}")
    if "rule" in selection:
        parts.append(_isolated(selection["rule"], MAX_RULE))
    return "; ".join(parts) or "all texts"


def _stage(text: Mapping[str, Any], name: str) -> list[Any] | None:
    """Return a stage's name, what it says of a text, and whether the text reached it; None where it has no scores."""
    label, right = text[f"{name}_label"], text[f"{name}_true_label"]
    if not isinstance(label, str):
        return None
    says = f"{_isolated(label)} {text[f'{name}_probability']:.2f}"
    if isinstance(right, str) and right != label:
        says += f"; {_isolated(right)} {text[f'{name}_true_probability']:.2f}"
    return [_short(name), says, bool(text[f"{name}_reached"])]


def _short(text: Any, max_length: int = MAX_LABEL) -> str:
    return printable(shorten(str(text), max_length))


def _isolated(text: Any, max_length: int = MAX_LABEL) -> str:
    """Return a text between the characters that isolate its direction from that of the text around it."""
    return f"\u2068{_short(text, max_length)}\u2069"


def _cut(text: str) -> str:
    rest = f"… ({len(text):,} characters)" if len(text) > MAX_TEXT else ""
    return visible(text[:MAX_TEXT]) + rest

"""Marks that a person gives to texts of a run, kept in a csv file from which `cascade-lab correct` takes labels."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import pandas as pd

from cascade_lab.analysis.examples import stage_probabilities
from cascade_lab.analysis.label_audit import read_corrections, unescape_cell, write_audit
from cascade_lab.atomic import locked_file
from cascade_lab.evalset import EvalSet
from cascade_lab.exceptions import CascadeLabError, EvalSetError, RunError, did_you_mean
from cascade_lab.run import Run

ACTIONS = ("relabel", "augment", "review")
"""The label is wrong; more texts like this one are needed in training; somebody must look again."""


class Mark(NamedTuple):
    """An action, and for "relabel" the right label."""

    action: str
    corrected_label: str


class Marks:
    """The marks of a run's texts.

    Examples
    --------
    >>> from cascade_lab import CascadeSpec, StageSpec
    >>> spec = CascadeSpec("one", (StageSpec("topic", ("pay", "play")),))
    >>> examples = pd.DataFrame({"example_id": ["a"], "text": ["a song"], "label": ["pay"]})
    >>> marks = Marks(Run.from_logits(spec, examples, {"topic": [[0, 2]]}))
    >>> marks.add(["a"], "relabel")
    >>> marks.frame().to_dict("records")
    [{'example_id': 'a', 'action': 'relabel', 'corrected_label': 'play'}]
    """

    def __init__(self, run: Run):
        self.run = run
        self._row_of = {example_id: row for row, example_id in enumerate(run.examples["example_id"])}
        self._marks: dict[str, Mark] = {}
        self._paths: set[Path] = set()

    def __len__(self) -> int:
        return len(self._marks)

    @property
    def ids(self) -> list[str]:
        """The ids of the marked texts."""
        return list(self._marks)

    def get(self, example_id: str) -> Mark | None:
        """Return the mark of a text, None where it has none."""
        return self._marks.get(example_id)

    def frame(self) -> pd.DataFrame:
        """Return one row per mark, in the order in which they were made: `example_id`, `action`, `corrected_label`."""
        rows = [(example_id, *mark) for example_id, mark in self._marks.items()]
        return pd.DataFrame(rows, columns=["example_id", "action", "corrected_label"])

    def add(self, example_ids: Sequence[str], action: str, corrected_label: str | None = None) -> None:
        """Mark texts; a text that has a mark gets the new one.

        Parameters
        ----------
        example_ids : sequence of str
        action : str
            One of `ACTIONS`.
        corrected_label : str, optional
            Of "relabel" alone: a label of the cascade; by default each text's predicted label.

        Raises
        ------
        RunError
            No such example, action or label; or "relabel" would leave a label as it is. No text is marked then.
        """
        labels, predictions = list(self.run.spec.labels), self.run.predictions
        if action not in ACTIONS:
            raise RunError(f"there is no action '{action}'{did_you_mean(action, ACTIONS)}")
        if corrected_label is not None and action != "relabel":
            raise RunError(f"'{action}' takes no label; mark the text with 'relabel'")
        if corrected_label is not None and corrected_label not in labels:
            raise RunError(f"no answer of the cascade is '{corrected_label}'{did_you_mean(corrected_label, labels)}")
        new = {}
        for example_id in example_ids:
            if example_id not in self._row_of:
                raise RunError(f"{self.run.name}: has no example '{example_id}'")
            row, label = self._row_of[example_id], ""
            if action == "relabel":
                label = predictions["predicted"].iat[row] if corrected_label is None else corrected_label
                if label == predictions["label"].iat[row]:
                    raise RunError(
                        f"'{example_id}' has the label '{label}' already; give the label that it should have"
                    )
            new[example_id] = Mark(action, label)
        self._marks |= new

    def remove(self, example_ids: Sequence[str]) -> None:
        """Remove the marks of texts, where they have any."""
        for example_id in example_ids:
            self._marks.pop(example_id, None)

    def write(self, path: str | Path, *, overwrite: bool = False) -> Path:
        """Write the marks as a csv file; `cascade-lab correct` reads `corrected_label` from it.

        The columns are `example_id`, `text`, `text_b`, `label`, `predicted`, `corrected_label`, `action` and
        `stages_say`. A file that was written or read by these marks before is replaced.

        Raises
        ------
        RunError
            No text is marked, or the name does not end in .csv.
        CascadeLabError
            The file exists already, or cannot be written.
        """
        path = Path(path)
        if path.suffix.lower() != ".csv":
            raise RunError(f"{path}: marks are written as csv; give a name that ends in .csv")
        if not self._marks:
            raise RunError(f"{path}: no text is marked, so nothing was written; mark one first")
        rows = [self._row_of[example_id] for example_id in self._marks]
        marks, examples = self.frame(), self.run.examples.iloc[rows]
        table = examples[["example_id", "text", "text_b", "label"]].reset_index(drop=True)
        table["predicted"] = self.run.predictions["predicted"].to_numpy()[rows]
        table["corrected_label"], table["action"] = marks["corrected_label"], marks["action"]
        table["stages_say"] = self._stages_say(rows)
        with locked_file(path, overwrite=overwrite or path.resolve() in self._paths, what="file of marks"):
            write_audit(table, path)
        self._paths.add(path.resolve())
        return path

    def read(self, path: str | Path) -> None:
        """Add the marks of a csv file that `write` wrote, also if a person has changed it in a spreadsheet since.

        A row to relabel whose `corrected_label` is empty becomes one to review.

        Raises
        ------
        EvalSetError
            The file is not one of this run's marks, or has an unknown action or label.
        """
        table = EvalSet.read(path)
        if "action" not in table.examples:
            raise EvalSetError(f"{path}: no column 'action'; give a file that the error browser wrote")
        corrected = read_corrections(path, EvalSet.from_frame(self.run.examples), self.run.spec)
        new_label = dict(zip(corrected.examples["example_id"], corrected.examples["label"], strict=True))
        for where, example_id, action in zip(
            table.locations, table.examples["example_id"], table.examples["action"], strict=True
        ):
            example_id, action = unescape_cell(example_id), action.strip()
            label: str | None = new_label[example_id]
            if action == "relabel" and label == self.run.examples["label"].iat[self._row_of[example_id]]:
                action = "review"
            try:
                self.add([example_id], action, label if action == "relabel" else None)
            except CascadeLabError as error:
                raise EvalSetError(f"{where}: {error}") from None
        self._paths.add(Path(path).resolve())

    def _stages_say(self, rows: list[int]) -> list[str]:
        """Return each stage's most probable label and its probability, as an audit has them."""
        table, names = stage_probabilities(self.run, pd.Index(rows).to_numpy()), [s.name for s in self.run.spec.stages]
        return [
            "; ".join(
                f"{name}: {row[f'{name}_label']} {row[f'{name}_probability']:.2f}"
                for name in names
                if isinstance(row[f"{name}_label"], str)
            )
            for row in table.to_dict("records")
        ]

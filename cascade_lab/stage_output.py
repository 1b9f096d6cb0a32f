"""What one stage computes for texts: logits and, where asked for, features; for all texts or for some rows."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np

from cascade_lab.decisions import StageDecision, decide_in_cascade
from cascade_lab.rejector import feature_evidence
from cascade_lab.spec import CascadeSpec, StageSpec


class StageOutput(NamedTuple):
    """What a stage computes for texts.

    Attributes
    ----------
    logits : ndarray of float32, shape (n, n_labels)
    features : ndarray of float16, shape (n, hidden), or None
        The last layer's output at `[CLS]`, of a stage that was loaded with `features=True`.
    rescored : ndarray of bool, shape (n,), or None
        Of a stage with mixed precision: the text was scored again in float32. Otherwise None.
    """

    logits: np.ndarray
    features: np.ndarray | None
    rescored: np.ndarray | None = None

    def take(self, rows: np.ndarray | slice) -> StageOutput:
        """Return the outputs of some rows."""
        features = None if self.features is None else self.features[rows]
        return StageOutput(self.logits[rows], features, None if self.rescored is None else self.rescored[rows])

    def put(self, rows: np.ndarray, exact: StageOutput) -> None:
        """Replace the outputs of some rows, in place, by those of float32."""
        assert self.rescored is not None, "a stage of one precision has no other outputs"
        self.logits[rows], self.rescored[rows] = exact.logits, True
        if self.features is not None:
            self.features[rows] = exact.features


def concatenate(outputs: Sequence[StageOutput]) -> StageOutput:
    """Return the outputs of a stage for several sets of texts as one."""
    logits, features, rescored = zip(*outputs, strict=True)
    return StageOutput(
        np.concatenate(logits),
        None if features[0] is None else np.concatenate(features),
        None if rescored[0] is None else np.concatenate(rescored),
    )


class ScoredRows(NamedTuple):
    """What one stage scored: the rows of the texts in increasing order, and the output for them."""

    rows: np.ndarray
    output: StageOutput

    def at(self, rows: np.ndarray) -> StageOutput:
        """Return the output for some of the rows."""
        return self.output.take(np.searchsorted(self.rows, rows))

    def put(self, rows: np.ndarray, exact: StageOutput) -> None:
        """Replace the output for some of the rows, in place, by that of float32."""
        self.output.put(np.searchsorted(self.rows, rows), exact)


def merge(parts: Sequence[ScoredRows]) -> ScoredRows:
    """Return what one stage scored, from parts that have no row in common."""
    rows = np.concatenate([part.rows for part in parts])
    order = np.argsort(rows)
    return ScoredRows(rows[order], concatenate([part.output for part in parts]).take(order))


def decide_from_outputs(
    spec: CascadeSpec,
    stage: StageSpec,
    outputs: Mapping[str, StageOutput],
    arrays: Mapping[str, np.ndarray],
    known: Mapping[str, np.ndarray] | None = None,
) -> tuple[StageDecision, dict[str, np.ndarray]]:
    """Return what `stage` decides, and its rejector's scores of features.

    Parameters
    ----------
    spec : CascadeSpec
    stage : StageSpec
        One of its stages.
    outputs : mapping of str to StageOutput
        Stage name to its output, rows of the same texts: of this stage and of those before it.
    arrays : mapping of str to ndarray
        What `CascadeSpec.read_arrays` returns.
    known : mapping of str to ndarray, shape (n,), optional
        Scores of features that an earlier stage's rejector needed too. They are not computed again: a matrix product
        of other rows would round them differently.
    """
    known = known or {}
    names = [name for name in (stage.rejector.feature_evidence if stage.rejector else ()) if name not in known]
    features = {name: output.features for name, output in outputs.items() if output.features is not None}
    evidence = feature_evidence(names, features, arrays) | dict(known)
    logits = {name: output.logits for name, output in outputs.items()}
    return decide_in_cascade(spec, stage, logits, evidence), evidence

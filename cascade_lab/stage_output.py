"""What one stage computes for texts: logits and, where asked for, features; for all texts or for some rows."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np


class StageOutput(NamedTuple):
    """What a stage computes for texts.

    Attributes
    ----------
    logits : ndarray of float32, shape (n, n_labels)
    features : ndarray of float16, shape (n, hidden), or None
        The last layer's output at `[CLS]`, of a stage that was loaded with `features=True`.
    """

    logits: np.ndarray
    features: np.ndarray | None

    def take(self, rows: np.ndarray | slice) -> StageOutput:
        """Return the outputs of some rows."""
        return StageOutput(self.logits[rows], None if self.features is None else self.features[rows])


class ScoredRows(NamedTuple):
    """What one stage scored: the rows of the texts in increasing order, and the output for them."""

    rows: np.ndarray
    output: StageOutput

    def at(self, rows: np.ndarray) -> StageOutput:
        """Return the output for some of the rows."""
        return self.output.take(np.searchsorted(self.rows, rows))

"""What becomes of a text in a cascade: the six outcomes that every other instrument counts."""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd

from cascade_lab.spec import CascadeSpec

RIGHT, RIGHT_REJECT = "right", "right reject"
FALSE_REJECT, FALSE_ACCEPT, WRONG_CLASS, WRONG_REJECT = "false reject", "false accept", "wrong class", "wrong reject"
OUTCOMES = (RIGHT, RIGHT_REJECT, FALSE_REJECT, FALSE_ACCEPT, WRONG_CLASS, WRONG_REJECT)
ERRORS = OUTCOMES[2:]


def outcomes(spec: CascadeSpec, y_true: Any, y_pred: Any) -> np.ndarray:
    """Return the outcome of each example: an array of str, shape (n,), of `OUTCOMES`.

    In scope, a gold label of the last stage: *right*, *wrong class*, or *false reject*, rejected by any stage. Out of
    scope: *right reject*, *false accept* (a class is answered), or *wrong reject* (rejected, with the label of another
    stage).

    Parameters
    ----------
    spec : CascadeSpec
    y_true, y_pred : array-like of str, shape (n,)
        Gold labels and final answers.
    """
    return np.array(OUTCOMES, dtype=object)[outcome_codes(spec, y_true, y_pred)]


def outcome_codes(spec: CascadeSpec, y_true: Any, y_pred: Any) -> np.ndarray:
    """Return `outcomes` as places in `OUTCOMES`: int, shape (n,)."""
    # pandas looks labels up by hash, numpy by sorting: a tenth of the time on 100,000 texts.
    in_scope = pd.Index(y_true).isin(spec.in_scope_labels)
    rejected = pd.Index(y_pred).isin(spec.reject_labels)
    right = np.asarray(y_true, dtype=object) == np.asarray(y_pred, dtype=object)
    kinds = [in_scope & right, ~in_scope & right, in_scope & rejected, ~in_scope & ~rejected, in_scope & ~rejected]
    return np.select(kinds, range(5), 5)


def outcome_counts(spec: CascadeSpec, predictions: pd.DataFrame) -> pd.Series:
    """Return how many of `predictions` (with `label` and `predicted`) have each outcome: int, in `OUTCOMES`' order."""
    found = outcomes(spec, predictions["label"], predictions["predicted"])
    return pd.Series(found, dtype=object).value_counts().reindex(OUTCOMES, fill_value=0).rename("n_examples")

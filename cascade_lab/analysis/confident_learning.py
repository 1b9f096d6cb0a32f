"""Confident learning (Northcutt et al. 2021): which labels are probably wrong, from predicted probabilities."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pandas as pd

from cascade_lab.by_block import by_block
from cascade_lab.exceptions import RunError

_TOLERANCE = 1e-6  # two probabilities that differ by less are equal


def label_issues(y_true: Any, probabilities: Any, labels: Sequence[str]) -> np.ndarray:
    """Return which labels confident learning (Northcutt et al. 2021) considers wrong.

    The number of wrong labels is that of the off-diagonal elements of the confident joint, without the texts whose
    label is the most probable one; the labels with the lowest probability are taken. That is what
    `cleanlab.filter.find_label_issues` does with `filter_by="low_self_confidence"`.

    Parameters
    ----------
    y_true : array-like of str, shape (n,)
        The labels as they are. An example without a label (None), or with one that is not in `labels`, is no issue.
    probabilities : array-like of float, shape (n, n_labels)
    labels : sequence of str, length n_labels
        The labels of the columns.

    Returns
    -------
    ndarray of bool, shape (n,)

    Raises
    ------
    RunError
        Probabilities of another shape, or one that is not a number from 0 to 1.

    Examples
    --------
    >>> p = np.repeat([[0.9, 0.1], [0.1, 0.9]], 10, axis=0)
    >>> y_true = ["pay"] * 9 + ["play"] * 11  # the tenth is wrong
    >>> np.flatnonzero(label_issues(y_true, p, ["pay", "play"])).tolist()
    [9]
    """
    codes = pd.Index(labels).get_indexer(np.asarray(y_true, dtype=object))
    p = np.asarray(probabilities, dtype=np.float64)
    if p.shape != (len(codes), len(labels)):
        raise RunError(
            f"probabilities have the shape {p.shape}, but {len(codes)} examples and {len(labels)} labels need "
            f"{(len(codes), len(labels))}"
        )
    if not ((p >= 0) & (p <= 1)).all():
        raise RunError("a probability is not a number from 0 to 1; take the softmax of logits")
    return issues_by_block(codes, p.__getitem__, len(labels))


def issues_by_block(codes: np.ndarray, probabilities: Callable[[np.ndarray], np.ndarray], n_labels: int) -> np.ndarray:
    """Return `label_issues` from probabilities that are computed for some examples at a time, twice.

    Parameters
    ----------
    codes : ndarray of int, shape (n,)
        The column of each example's label; -1 where there is none.
    probabilities : function
        Takes rows, int of shape (n_rows,), and returns their probabilities, float64 of shape (n_rows, n_labels).
        Several threads call it at once, so it must only read.
    n_labels : int

    Returns
    -------
    ndarray of bool, shape (n,)
    """
    is_issue, known = np.zeros(len(codes), dtype=bool), np.flatnonzero(codes >= 0)
    codes = codes[known]
    counts = np.bincount(codes, minlength=n_labels)
    if (counts > 0).sum() < 2:
        return is_issue

    def of_label(rows: np.ndarray, codes: np.ndarray) -> tuple[np.ndarray]:
        return (probabilities(rows)[np.arange(len(rows)), codes],)

    def is_off_diagonal(rows: np.ndarray, codes: np.ndarray) -> tuple[np.ndarray]:
        p, each = probabilities(rows), np.arange(len(rows))
        is_confident, best = p >= thresholds - _TOLERANCE, p.argmax(axis=1)
        n_confident = is_confident.sum(axis=1)
        guess = np.where(n_confident > 1, best, is_confident.argmax(axis=1))
        is_most_probable = (best == codes) | (p[each, codes] + _TOLERANCE > p[each, best])
        return ((n_confident > 0) & (guess != codes) & ~is_most_probable,)

    (p_label,) = by_block(of_label, known, codes, n_columns=n_labels)
    # The mean probability of each label on the examples that have it. No example is counted for a label that none has.
    mean = np.bincount(codes, p_label, n_labels) / np.maximum(counts, 1)
    thresholds = np.where(counts > 0, np.maximum(mean, 2 * _TOLERANCE), 2.0)
    (off_diagonal,) = by_block(is_off_diagonal, known, codes, n_columns=n_labels)
    is_issue[known[np.argsort(p_label, kind="stable")[: off_diagonal.sum()]]] = True
    return is_issue

"""Confusion matrices, macro F1 and metrics of single labels, from true and predicted labels."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

import numpy as np
import pandas as pd

from cascade_lab.analysis.bootstrap import Interval, wilson
from cascade_lab.exceptions import RunError

Normalize = Literal["true", "pred", "all"]
MIN_TEXTS = 5
MAX_RARE_LABELS = 0.1
"""The largest fraction of labels with fewer than `MIN_TEXTS` texts with which macro metrics have an interval."""


def macro_f1(hits: np.ndarray, support: np.ndarray, predicted: np.ndarray) -> np.ndarray:
    """Return the macro F1: the mean F1 of the labels that occur as a true label.

    This is scikit-learn's `f1_score(labels=np.unique(y_true), average="macro", zero_division=0)`, from counts. A label
    that is only predicted lowers the F1 of the true labels of these texts, and has no F1 of its own in the mean.

    Parameters
    ----------
    hits, support, predicted : ndarray, shape (..., n_labels)
        Of each label: how many examples have it as both true and predicted label, as true label, and as predicted
        label.

    Returns
    -------
    ndarray, shape (...)
        NaN where no label occurs as a true label.

    Examples
    --------
    >>> float(macro_f1(np.array([2, 1, 0]), np.array([2, 2, 0]), np.array([2, 1, 1])).round(4))
    0.8333
    """
    support = np.asarray(support)
    return _macro_mean(2 * np.asarray(hits), support + np.asarray(predicted), support > 0)


def macro_f1_score(y_true: np.ndarray, y_pred: np.ndarray) -> float:
    """Return `macro_f1` of true and predicted labels: arrays of str, shape (n,)."""
    codes, labels = pd.factorize(np.concatenate([y_true, y_pred]))
    true, predicted = codes[: len(y_true)], codes[len(y_true) :]
    counts = (np.bincount(rows, minlength=len(labels)) for rows in (true[true == predicted], true, predicted))
    return float(macro_f1(*counts))


def too_few_texts(support: np.ndarray) -> str:
    """Return why macro metrics have no interval, or "" if they can have one.

    A label with one or two texts has an F1 of almost any value, and the texts themselves do not show how far it can be
    from the truth. So more than nine in ten of the labels that occur must have at least 5 texts.

    Parameters
    ----------
    support : ndarray of int, shape (n_labels,)
        How many texts have each true label.

    Examples
    --------
    >>> too_few_texts(np.array([40, 40, 2]))
    'Macro metrics have no interval: 1 of 3 labels has fewer than 5 texts.'
    """
    support = np.asarray(support)
    n_labels, n_few = int((support > 0).sum()), int(((support > 0) & (support < MIN_TEXTS)).sum())
    if n_few <= MAX_RARE_LABELS * n_labels:
        return ""
    have = "has" if n_few == 1 else "have"
    return f"Macro metrics have no interval: {n_few:,} of {n_labels:,} labels {have} fewer than {MIN_TEXTS} texts."


def confusion_metrics(
    rows: np.ndarray, columns: np.ndarray, n_labels: int, weights: np.ndarray
) -> dict[str, np.ndarray]:
    """Return `accuracy`, `macro_precision`, `macro_recall` and `macro_f1` of many confusion matrices at once.

    Parameters
    ----------
    rows, columns : ndarray of int, shape (n_cells,)
        The row (true label) and column (predicted label) of each cell that is not empty in every matrix.
    n_labels : int
    weights : ndarray of int, shape (n_matrices, n_cells)
        How many examples each cell has.

    Returns
    -------
    dict of str to ndarray, shape (n_matrices,)
        Macro metrics are means over the labels that occur as a true label in that matrix. 0/0 counts as 0, as with
        scikit-learn's `zero_division=0`.
    """
    # Floats are exact below 2**53, and numpy multiplies matrices of them much faster.
    weights = weights.astype(np.float64, copy=False)
    right = rows == columns
    in_row, in_column = np.eye(n_labels)[rows], np.eye(n_labels)[columns]
    support, predicted, hits = weights @ in_row, weights @ in_column, weights[:, right] @ in_row[right]
    occurs = support > 0
    with np.errstate(invalid="ignore", divide="ignore"):
        accuracy = hits.sum(axis=1) / support.sum(axis=1)
    return {
        "accuracy": accuracy,
        "macro_precision": _macro_mean(hits, predicted, occurs),
        "macro_recall": _macro_mean(hits, support, occurs),
        "macro_f1": macro_f1(hits, support, predicted),
    }


def confusion_matrix_frame(
    y_true: Any, y_pred: Any, labels: Sequence[str], *, normalize: Normalize | None = None
) -> pd.DataFrame:
    """Return a confusion matrix: true labels in rows, predicted labels in columns.

    Parameters
    ----------
    y_true, y_pred : array-like of str, shape (n,)
    labels : sequence of str
        The labels of the rows and columns, in order; it contains every label of `y_true` and `y_pred`.
    normalize : {"true", "pred", "all"}, optional
        Fractions of the examples with a true label, of those with a predicted label, or of all examples, instead of
        counts; NaN where there are none.

    Raises
    ------
    RunError
        Another `normalize`.

    Examples
    --------
    >>> matrix = confusion_matrix_frame(["pay", "pay", "play"], ["pay", "play", "play"], ["pay", "play"])
    >>> int(matrix.loc["pay", "play"])
    1
    """
    rows, columns = (pd.Index(labels).get_indexer(y) for y in (y_true, y_pred))
    n = len(labels)
    counts = np.bincount(rows * n + columns, minlength=n * n).reshape(n, n)
    totals = {
        None: 1,
        "true": counts.sum(axis=1, keepdims=True),
        "pred": counts.sum(axis=0, keepdims=True),
        "all": counts.sum(),
    }
    if normalize not in totals:
        raise RunError(f"normalize is {normalize!r}; it must be 'true', 'pred', 'all' or None")
    with np.errstate(invalid="ignore"):
        values = counts if normalize is None else counts / totals[normalize]
    true_labels, predicted_labels = (
        pd.Index(labels, name=f"{name} label", dtype=object) for name in ("true", "predicted")
    )
    return pd.DataFrame(values, index=true_labels, columns=predicted_labels)


def matrix_label_metrics(
    matrix: pd.DataFrame, *, shares: Mapping[str, np.ndarray] | None = None, level: float = 0.95
) -> pd.DataFrame:
    """Return precision, recall and F1 of every label of a confusion matrix of counts; see `label_metrics`.

    Parameters
    ----------
    matrix : DataFrame
    shares : mapping of str to ndarray, shape (n_labels,), optional
        For `precision`, `recall` and `f1`: the fraction of each label's texts that is new evidence, where texts repeat
        (`bootstrap.effective_shares`).
    level : float
    """
    counts = matrix.to_numpy()
    whole = {name: np.ones(len(counts)) for name in ("precision", "recall", "f1")}
    table = []
    for label, hits, support, predicted, *share in zip(
        matrix.index,
        np.diag(counts),
        counts.sum(axis=1),
        counts.sum(axis=0),
        *({**whole, **(shares or {})}[name] for name in whole),
        strict=True,
    ):
        overlap = wilson(hits * share[2], (support + predicted - hits) * share[2], level=level)
        metrics = {
            "precision": wilson(hits * share[0], predicted * share[0], level=level),
            "recall": wilson(hits * share[1], support * share[1], level=level),
            "f1": Interval(*(2 * fraction / (1 + fraction) for fraction in overlap)),
        }
        table += [(label, support, name, *values) for name, values in metrics.items()]
    return pd.DataFrame(table, columns=["label", "support", "metric", *Interval._fields])


def matrix_confused_pairs(matrix: pd.DataFrame, *, n: int | None = 20) -> pd.DataFrame:
    """Return the `n` largest cells off the diagonal of a confusion matrix of counts; see `confused_pairs`."""
    counts = matrix.to_numpy()
    rows, columns = np.nonzero(counts * (1 - np.eye(len(counts), dtype=np.int64)))
    table = pd.DataFrame(
        {
            "label": matrix.index[rows],
            "predicted": matrix.columns[columns],
            "n_examples": counts[rows, columns],
            "fraction_of_label": counts[rows, columns] / counts.sum(axis=1)[rows],
        }
    )
    by = ["n_examples", "fraction_of_label"]
    table = table.sort_values(by, ascending=False, kind="stable", ignore_index=True)
    return table if n is None else table.head(n)


def _macro_mean(part: np.ndarray, whole: np.ndarray, occurs: np.ndarray) -> np.ndarray:
    """Return the mean of `part / whole` over the labels that occur, with 0/0 as 0; NaN where no label occurs."""
    with np.errstate(invalid="ignore", divide="ignore"):
        return np.where(occurs & (whole > 0), part / whole, 0.0).sum(axis=-1) / occurs.sum(axis=-1)

"""The metrics of open-set classification: known labels are recognized, and texts with unknown labels rejected."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from cascade_lab.analysis.classification import macro_f1
from cascade_lab.analysis.ranking import ranking_metrics

OPEN_SET_METRICS = {
    "auroc": "AUROC",
    "known_f1": "known F1",
    "open_f1": "open F1",
    "harmonic_mean": "harmonic mean",
    "accuracy": "accuracy",
}
"""The metrics of `open_set_metrics`, and their names for people."""


def open_set_metrics(
    y_true: Sequence[str] | np.ndarray,
    y_pred: Sequence[str] | np.ndarray,
    confidence: Sequence[float] | np.ndarray,
    *,
    open_label: str,
) -> dict[str, float]:
    """Return the metrics of a classifier that answers texts of unknown labels with `open_label`.

    `known_f1`, `open_f1` and `accuracy` are those of Zhang et al. (2021, "Deep Open Intent Classification with Adaptive
    Decision Boundary"): all unknown labels count as one.

    Parameters
    ----------
    y_true, y_pred : array of str, shape (n,)
    confidence : array of float, shape (n,)
        Higher for texts whose label seems known.
    open_label : str

    Returns
    -------
    dict of str to float
        - `auroc`: how well the confidence ranks the texts with a known label above the others.
        - `known_f1`: the macro F1 of the known labels that occur as true labels.
        - `open_f1`: the F1 of `open_label`.
        - `harmonic_mean`: of `known_f1` and `open_f1`; 0 if both are 0.
        - `accuracy`: of all labels, the open one included.

        NaN where undefined: without texts of known labels, or without texts of unknown ones.

    Examples
    --------
    >>> y_true, y_pred = ["pay", "play", "oos", "oos"], ["pay", "oos", "oos", "play"]
    >>> metrics = open_set_metrics(y_true, y_pred, [0.9, 0.4, 0.3, 0.6], open_label="oos")
    >>> {name: round(value, 3) for name, value in metrics.items()}
    {'auroc': 0.75, 'known_f1': 0.5, 'open_f1': 0.5, 'harmonic_mean': 0.5, 'accuracy': 0.5}
    """
    true, predicted = np.asarray(y_true, dtype=str), np.asarray(y_pred, dtype=str)
    is_known = true != open_label
    auroc, _ = ranking_metrics(is_known, np.asarray(confidence, dtype=float), weights=np.ones((1, len(true))))
    labels = np.unique(true)
    counts = np.array(
        [[((true == label) & (predicted == label)).sum() for label in labels]]
        + [[(values == label).sum() for label in labels] for values in (true, predicted)]
    )
    is_known_label = labels != open_label
    known_f1, open_f1 = (_f1(counts[:, columns]) for columns in (is_known_label, ~is_known_label))
    total = known_f1 + open_f1
    return {
        "auroc": float(auroc[0]),
        "known_f1": known_f1,
        "open_f1": open_f1,
        "harmonic_mean": 2 * known_f1 * open_f1 / total if total else total,
        "accuracy": float((true == predicted).mean()) if len(true) else float("nan"),
    }


def _f1(counts: np.ndarray) -> float:
    """Return the macro F1 of columns of hits, support and predictions; NaN without columns."""
    return float(macro_f1(*counts)) if counts.shape[1] else float("nan")

"""Figures as scikit-learn has them, of many resamples at once: sums and products of arrays in place of calls."""

from __future__ import annotations

import numpy as np


def ranking_figures(positive: np.ndarray, score: np.ndarray, *, weights: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return AUROC and average precision as scikit-learn has them, for many weightings of the examples at once.

    Parameters
    ----------
    positive : ndarray of bool, shape (n,)
    score : ndarray, shape (n,)
    weights : ndarray, shape (n_resamples, n)
        How often each example counts.

    Returns
    -------
    tuple of two ndarrays, shape (n_resamples,)
        NaN where one of the two kinds is missing.
    """
    order = np.argsort(score, kind="stable")
    score, positive = score[order], positive[order]
    starts = np.flatnonzero(np.append(True, np.diff(score) > 0)[: len(score)])
    auroc, precision = np.full(len(weights), np.nan), np.full(len(weights), np.nan)
    if not len(score):
        return auroc, precision
    for block in blocks(len(weights), len(score)):
        drawn = weights[block][:, order].astype(np.float64)
        all_of = np.add.reduceat(drawn, starts, axis=1)
        hits = np.add.reduceat(drawn * positive, starts, axis=1)
        misses = all_of - hits
        n_hits, n_misses = hits.sum(axis=1), misses.sum(axis=1)
        with np.errstate(invalid="ignore", divide="ignore"):
            below = misses.cumsum(axis=1) - misses / 2
            auroc[block] = (hits * below).sum(axis=1) / (n_hits * n_misses)
            above, hits_above = (part[:, ::-1].cumsum(axis=1)[:, ::-1] for part in (all_of, hits))
            at_each = np.where(hits > 0, hits * hits_above / above, 0.0)
            precision[block] = np.where(n_misses > 0, at_each.sum(axis=1) / n_hits, np.nan)
    return auroc, precision


def blocks(n_resamples: int, n: int) -> list[slice]:
    """Return slices over resamples of `n` examples that keep a table of one below some 16 MB."""
    step = max(1, 2_000_000 // max(n, 1))
    return [slice(start, start + step) for start in range(0, n_resamples, step)]


def cell_figures(gold: np.ndarray, said: np.ndarray, n_labels: int, weights: np.ndarray) -> dict[str, np.ndarray]:
    """Return `accuracy`, `macro_precision`, `macro_recall` and `macro_f1` of many confusion matrices at once.

    Parameters
    ----------
    gold, said : ndarray of int, shape (n_cells,)
        The row and the column of each cell that is not empty in all of them.
    n_labels : int
    weights : ndarray of int, shape (n_resamples, n_cells)
        How many examples each cell has.

    Returns
    -------
    dict of str to ndarray, shape (n_resamples,)
        Macro figures are over the labels that occur in that resample, and a quotient of nothing counts 0, as in
        scikit-learn on the drawn texts.
    """
    weights = weights.astype(np.float64)  # counts below 2**53 are exact, and BLAS takes no integers
    right = gold == said
    rows, columns = np.eye(n_labels)[gold], np.eye(n_labels)[said]
    support, answered, hits = weights @ rows, weights @ columns, weights[:, right] @ rows[right]
    with np.errstate(invalid="ignore", divide="ignore"):
        n_occurring = (support + answered > 0).sum(axis=1)

        def macro(part: np.ndarray, whole: np.ndarray) -> np.ndarray:
            return np.where(whole > 0, part / whole, 0.0).sum(axis=1) / n_occurring

        return {
            "accuracy": hits.sum(axis=1) / support.sum(axis=1),
            "macro_precision": macro(hits, answered),
            "macro_recall": macro(hits, support),
            "macro_f1": macro(2 * hits, support + answered),
        }

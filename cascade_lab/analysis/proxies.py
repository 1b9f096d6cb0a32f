"""Find columns and groups of texts that only repeat what is known anyway: the label, the split, the prediction."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd

from cascade_lab.analysis.text_features import column_kind

NEARLY_ALL = 0.9
"""A column that removes this fraction of the errors of the best constant guess is a proxy."""
_N_BINS = 16


def proxy_columns(table: pd.DataFrame, columns: Sequence[str], known: Mapping[str, Any]) -> dict[str, str]:
    """Return the columns that determine something known, or nearly so, each with the name of what it determines.

    The measure is Goodman and Kruskal's lambda (1954): of the errors that the best constant guess makes, the fraction
    that disappears if the column's value is known. The guess for a row is the most frequent value among the *other*
    rows with the same value of the column, so that a column of unique ids determines nothing. A column of numbers is
    also tried in 16 parts of similar size.

    Parameters
    ----------
    table : DataFrame
    columns : sequence of str
        The columns to try.
    known : mapping of str to array-like, shape (n,)
        A name, such as "the label", to its value in each row.

    Examples
    --------
    >>> table = pd.DataFrame({"intent_number": [1, 1, 2, 2, 3, 3], "day": ["mo", "tu"] * 3})
    >>> proxy_columns(table, ["intent_number", "day"], {"the label": ["pay", "pay", "play", "play", "no", "no"]})
    {'intent_number': 'the label'}
    """
    targets = {name: _codes(values) for name, values in known.items()}
    found = {}
    for column in columns:
        codes = [_codes(table[column])]
        if column_kind(table[column]) == "number":
            codes.append(_binned(table[column]))
        for name, target in targets.items():
            if any(_goodman_kruskal(own, target) >= NEARLY_ALL for own in codes):
                found[column] = name
                break
    return found


def proxy_masks(masks: np.ndarray, known: Mapping[str, Any]) -> list[str]:
    """Return for each group of rows what it repeats: "" where it repeats nothing that is known.

    A group repeats a value of `known` if the group, or all rows outside it, are nearly the same rows as those that have
    the value: by the same measure as in `proxy_columns`.

    Parameters
    ----------
    masks : ndarray of bool, shape (n, n_groups)
    known : mapping of str to array-like, shape (n,)

    Examples
    --------
    >>> masks = np.array([[True, True], [True, False], [False, True], [False, False]])
    >>> proxy_masks(masks, {"the label": ["pay", "pay", "play", "play"]})
    ['the label', '']
    """
    found = [""] * masks.shape[1]
    n = len(masks)
    as_numbers = masks.astype(np.float32)
    for name, values in known.items():
        one_hot = np.equal.outer(codes := _codes(values), np.unique(codes)).astype(np.float32)
        sizes, n_with_value = as_numbers.sum(axis=0)[:, None], one_hot.sum(axis=0)[None, :]
        n_different = sizes + n_with_value - 2 * as_numbers.T @ one_hot
        n_errors = np.minimum(n_different, n - n_different)
        smaller = np.minimum(n_with_value, n - n_with_value)
        repeats = ((smaller > 0) & (n_errors <= (1 - NEARLY_ALL) * smaller)).any(axis=1)
        found = [before or (name if is_proxy else "") for before, is_proxy in zip(found, repeats, strict=True)]
    return found


def _goodman_kruskal(codes: np.ndarray, target: np.ndarray) -> float:
    """Return lambda of `target` given `codes`, with each row left out of the guess for itself; 0 for a constant."""
    n_values = int(target.max(initial=0)) + 1
    n_constant_errors = len(target) - int(np.bincount(target).max(initial=0))
    if not n_constant_errors:
        return 0.0
    pairs, counts = np.unique(codes * n_values + target, return_counts=True)
    order = np.lexsort((counts, pairs // n_values))
    group, count = (pairs // n_values)[order], counts[order]
    is_last = np.append(group[1:] != group[:-1], True)
    first = count[is_last]
    has_second = np.append(False, group[1:] == group[:-1])[is_last]
    second = np.where(has_second, np.append(0, count[:-1])[is_last], 0)
    n_right = int(first[first - 1 > second].sum())  # a row counts only if the others still agree without it
    return 1 - (len(target) - n_right) / n_constant_errors


def _codes(values: Any) -> np.ndarray:
    return pd.factorize(pd.Series(values).astype(object), use_na_sentinel=False)[0].astype(np.int64)


def _binned(values: pd.Series) -> np.ndarray:
    numbers = values.astype(float).to_numpy()
    finite = numbers[np.isfinite(numbers)]
    edges = np.unique(np.quantile(finite, np.arange(1, _N_BINS) / _N_BINS)) if len(finite) else np.array([])
    return np.where(np.isnan(numbers), len(edges) + 1, np.searchsorted(edges, numbers, side="left")).astype(np.int64)

"""Fit calibrators on plain arrays: Platt, beta and isotonic for a yes-no question, vector scaling for classes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from scipy.optimize import isotonic_regression, minimize
from scipy.special import expit, log_expit, logsumexp

from cascade_lab.analysis.temperature import fit_temperature
from cascade_lab.by_block import by_block
from cascade_lab.calibrator import Calibrator
from cascade_lab.exceptions import CalibrationError


def fit_platt(y_true: Any, log_odds: Any) -> Calibrator:
    """Return the logistic function of the log-odds with the lowest log loss (Platt 1999, without his changed targets).

    Parameters
    ----------
    y_true : array-like of bool, shape (n,)
        Whether the event came true: a gate should pass the text.
    log_odds : array-like of float, shape (n,)
        log(p / (1 - p)) of the event, by the logits.

    Raises
    ------
    CalibrationError
        The log loss has no minimum: the log-odds separate the texts, or do not rise with the event.

    Examples
    --------
    Log-odds of 2 mean 88%, but only 3 of 4 texts are right; log-odds of -2 mean 12%, and 1 of 4 is right.

    >>> fitted = fit_platt([1, 1, 1, 0, 0, 0, 0, 1], [2, 2, 2, 2, -2, -2, -2, -2])
    >>> round(fitted.parameters["weight"], 4), abs(round(fitted.parameters["bias"], 4))
    (0.5493, 0.0)
    """
    y, s = _events(y_true, log_odds)
    _check_overlap(y, s)
    weight, bias = _fit_logistic(y, s[:, None])
    _check_rising(weight)
    return Calibrator("platt", {"weight": weight, "bias": bias})


def fit_beta(y_true: Any, log_odds: Any) -> Calibrator:
    """Return the beta calibrator with the lowest log loss (Kull et al. 2017): a and b are at least 0.

    Parameters and errors are those of `fit_platt`.

    Examples
    --------
    With a = b = 1 and c = 0 the probabilities stay as they are. These are right already:

    >>> s = np.log([1 / 3, 1 / 3, 1 / 3, 1 / 3, 1, 1, 3, 3, 3, 3])
    >>> fitted = fit_beta([1, 0, 0, 0, 1, 0, 1, 1, 1, 0], s)
    >>> [round(value, 2) for value in fitted.parameters.values()]
    [1.0, 1.0, 0.0]
    """
    y, s = _events(y_true, log_odds)
    _check_overlap(y, s)
    a, b, c = _fit_logistic(y, np.column_stack([log_expit(s), -log_expit(-s)]))
    _check_rising(max(a, b))
    return Calibrator("beta", {"a": a, "b": b, "c": c})


def fit_isotonic(y_true: Any, log_odds: Any) -> Calibrator:
    """Return the rising step function with the lowest squared error (Zadrozny and Elkan 2002), interpolated linearly.

    The probabilities are kept from 1 / (n + 2) to (n + 1) / (n + 2), so that no text has an infinite log loss. Where
    the function is flat, texts have equal probabilities, and no threshold distinguishes them.

    Parameters and errors are those of `fit_platt`; log-odds that separate the texts can be fitted.

    Examples
    --------
    >>> fitted = fit_isotonic([0, 1, 0, 1, 1], [-2.0, -1.0, 0.0, 1.0, 2.0])
    >>> fitted.parameters["log_odds"]
    (-2.0, -1.0, 0.0, 1.0, 2.0)
    >>> [round(p, 3) for p in fitted.parameters["probabilities"]]
    [0.143, 0.5, 0.5, 0.857, 0.857]
    """
    y, s = _events(y_true, log_odds)
    values, place, counts = np.unique(s, return_inverse=True, return_counts=True)
    mean = np.bincount(place, y) / counts
    p = np.clip(isotonic_regression(mean, weights=counts).x, 1 / (len(y) + 2), (len(y) + 1) / (len(y) + 2))
    if p[0] == p[-1]:
        _check_rising(0.0)
    rises = np.diff(p) > 0
    is_end = np.r_[True, rises] | np.r_[rises, True]  # points inside a flat part are not needed
    return Calibrator(
        "isotonic", {"log_odds": tuple(values[is_end].tolist()), "probabilities": tuple(p[is_end].tolist())}
    )


def fit_vector(y_true: Any, logits: Any, *, penalty: float = 100.0) -> Calibrator:
    """Return a weight and a bias for each label's logit, with the lowest penalized log loss (Guo et al. 2017).

    The penalty draws all weights to 1 / T, where T is the best temperature, and all biases to 0: labels with few texts
    change little. It is penalty / 2 times the sum over the labels of (T · weight - 1)² + bias², added to the sum of the
    texts' log losses.

    Parameters
    ----------
    y_true : array-like of int, shape (n,)
        The column of the true class.
    logits : array-like of float, shape (n, n_classes)
    penalty : float
        The default changes little where a label has fewer than about 100 texts. With 20 texts for each of CLINC150's
        150 labels, lower penalties gave a higher log loss on the test texts than a temperature did. At 0 a label that
        some texts have, and that is separated from the others, has no best weight.

    Raises
    ------
    CalibrationError
        No temperature has the lowest log loss (see `fit_temperature`).
    """
    z, codes = np.asarray(logits), np.asarray(y_true)
    inverse = 1 / fit_temperature(codes, z)
    n, n_labels = z.shape

    def loss(x: np.ndarray) -> tuple[float, np.ndarray]:
        change, bias = x.reshape(2, n_labels)

        def sums_of_block(z: np.ndarray, codes: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
            scaled, of_truth = z * np.float64(inverse), (np.arange(len(z)), codes)
            new = scaled * (1 + change) + bias
            log_sum = logsumexp(new, axis=1, keepdims=True)
            value = (log_sum[:, 0] - new[of_truth]).sum()
            residual = np.exp(new - log_sum)
            residual[of_truth] -= 1
            return np.array([value]), np.concatenate([(residual * scaled).sum(axis=0), residual.sum(axis=0)])[None]

        values, slopes = by_block(sums_of_block, z, codes)
        value = values.sum() / n + penalty / (2 * n) * (x @ x)
        return float(value), slopes.sum(axis=0) / n + penalty / n * x

    change, bias = _minimize(loss, np.zeros(2 * n_labels)).reshape(2, n_labels)
    return Calibrator("vector", {"weights": tuple(((1 + change) * inverse).tolist()), "biases": tuple(bias.tolist())})


GATE_FITS: dict[str, Callable[[Any, Any], Calibrator]] = {
    "platt": fit_platt,
    "beta": fit_beta,
    "isotonic": fit_isotonic,
}
"""The methods that take `y_true` and the log-odds of a gate's pass label."""


def _fit_logistic(y: np.ndarray, x: np.ndarray) -> list[float]:
    """Return the weights, at least 0, and the bias with the lowest log loss."""
    scale = x.std(axis=0)
    scale[scale == 0] = 1.0
    x = np.column_stack([x / scale, np.ones(len(x))])

    def loss(weights: np.ndarray) -> tuple[float, np.ndarray]:
        z = x @ weights
        return float(-log_expit(np.where(y, z, -z)).mean()), (expit(z) - y) @ x / len(y)

    bounds = [(0, None)] * len(scale) + [(None, None)]
    weights = _minimize(loss, np.append(scale, 0.0), bounds)  # from the probabilities as they are
    return [float(value) for value in weights / np.append(scale, 1.0)]


def _minimize(loss: Callable[[np.ndarray], Any], start: np.ndarray, bounds: Any = None) -> np.ndarray:
    """Return the place of the minimum of a convex function, which returns its value and its slope."""
    options = {"ftol": 1e-13, "gtol": 1e-8, "maxiter": 2000, "maxcor": 20}
    return np.asarray(minimize(loss, start, jac=True, method="L-BFGS-B", bounds=bounds, options=options).x)


def _events(y_true: Any, log_odds: Any) -> tuple[np.ndarray, np.ndarray]:
    y, s = np.asarray(y_true, dtype=bool), np.asarray(log_odds, dtype=np.float64)
    if y.ndim != 1 or y.shape != s.shape:
        raise CalibrationError(f"y_true has shape {y.shape} and log_odds {s.shape}; give one value of each per text")
    if y.all() or not y.any():
        raise CalibrationError(
            f"all {len(y)} texts {'should' if y.all() else 'should not'} pass; give texts of both kinds"
        )
    return y, s


def _check_overlap(y: np.ndarray, s: np.ndarray) -> None:
    if s[y].min() >= s[~y].max():
        raise CalibrationError(
            f"the log-odds separate the {len(y)} texts, so no calibrator has the lowest log loss; fit on more texts"
        )


def _check_rising(weight: float) -> None:
    if weight <= 0:
        raise CalibrationError("the log-odds are not higher for the texts that should pass; check the pass_label")

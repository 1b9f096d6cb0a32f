"""Fit temperatures on kept logits (Guo et al. 2017)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import pandas as pd

from cascade_lab.analysis.bootstrap import N_RESAMPLES, interval, resamples
from cascade_lab.analysis.metrics import On, labelled_decisions
from cascade_lab.by_block import by_block
from cascade_lab.calibrator import calibrated_logits
from cascade_lab.exceptions import CalibrationError

if TYPE_CHECKING:
    from cascade_lab.run import Run
    from cascade_lab.spec import StageSpec

_INVERSE_RANGE = (0.01, 100.0)  # of 1 / temperature
_TOLERANCE = 1e-10  # of 1 / temperature


def fit_temperature(y_true: Any, logits: Any) -> float:
    """Return the temperature with the lowest log loss (Guo et al. 2017, section 4.2).

    Parameters
    ----------
    y_true : array-like of int, shape (n,)
        The column of the true class.
    logits : array-like of float, shape (n, n_classes)

    Raises
    ------
    CalibrationError
        The log loss has no minimum for temperatures from 0.01 to 100: the logits are right, or wrong, on every text.
        Another number of labels than of rows, or a logit that is not finite.

    Examples
    --------
    A logit difference of 2 means 88%, but only 3 of 4 texts are correct. At this temperature it means 75%.

    >>> round(fit_temperature([0, 0, 0, 1], [[1, -1]] * 4), 4)
    1.8205
    """
    z, codes = np.asarray(logits, dtype=np.float64), np.asarray(y_true)
    if len(z) != len(codes):
        raise CalibrationError(f"logits have {len(z)} rows, but there are {len(codes)} labels; give one label per row")
    if len(wrong := np.flatnonzero(~np.isfinite(z).all(axis=-1))):
        raise CalibrationError(f"logits row {wrong[0]} has a value that is not finite; leave the row out")
    return 1 / _fit_inverse(z, codes, "logits")


def fit_temperatures(
    run: Run,
    stages: Sequence[str] | None = None,
    *,
    on: On = "reached",
    level: float = 0.95,
    n_resamples: int = N_RESAMPLES,
    n_folds: int = 5,
    seed: int = 0,
) -> pd.DataFrame:
    """Fit the temperature of each stage on its kept logits: see `fit_temperature`.

    Parameters
    ----------
    run : Run
        A run of a tuning set, not of the set on which results are reported.
    stages : sequence of str, optional
        By default all.
    on : {"reached", "all"}
        The texts that reached the stage, or all texts, which needs shadow scores.
    level, n_resamples, seed
        Of the bootstrap.
    n_folds : int
        Of the cross-validation.

    Returns
    -------
    DataFrame
        One row per stage: `on`; `n_examples`, the texts that have a target at the stage; `n_out_of_scope` of them (0 at
        a last stage that has no label for them); the temperature as `value`, `low`, `high` (bootstrap over texts); the
        log loss on these texts at the temperature of the run (`before`) and at the new one (`after`); and the
        cross-validated log loss, on texts that the temperature was not fitted on (`held_out`). Resamples and folds are
        not fitted completely: each takes one Newton step from the temperature of all texts.

    Raises
    ------
    CalibrationError
        A stage has fewer texts than `n_folds`, or its log loss has no minimum.
    SpecError, RunError
        A stage is unknown; there are no shadow scores, or no labels.
    """
    run = run.labelled
    rows = {}
    for name in stages or [stage.name for stage in run.spec.stages]:
        spec = run.spec.stage(name)
        texts = texts_to_fit(run, name, on=on, n_folds=n_folds, seed=seed)
        logits, rows_of, codes, groups, fold, _ = texts
        inverse = _fit_inverse(logits, codes, f"{run.name}: stage '{name}'", rows=rows_of)
        derivatives = _derivatives(logits, codes, inverse, rows=rows_of)
        options: dict[str, Any] = {"rows": rows_of}
        both = np.stack(derivatives, axis=1)
        draws = resamples(len(codes), groups=groups, n_resamples=n_resamples, seed=seed)
        resampled = _newton_step(inverse, *np.reshape([weights @ both for weights in draws], (-1, 2)).T)
        without_fold = _newton_step(inverse, *((1.0 - np.eye(n_folds)[fold].T) @ both).T)
        rows[name] = {
            "on": on,
            "n_examples": len(codes),
            "n_out_of_scope": texts.n_out_of_scope,
            **interval(1 / inverse, 1 / resampled, level=level)._asdict(),
            "before": log_losses(logits, codes, spec.temperature, stage=spec, **options).mean(),
            "after": log_losses(logits, codes, 1 / inverse, **options).mean(),
            "held_out": log_losses(logits, codes, 1 / without_fold[fold], **options).mean(),
        }
    return pd.DataFrame.from_dict(rows, orient="index").rename_axis("stage")


class TextsToFit(NamedTuple):
    """The texts of a run that a stage's calibration is fitted on.

    Attributes
    ----------
    all_logits : ndarray of float32, shape (n_examples, n_labels)
        Those of all examples of the run, not copied.
    rows : ndarray of int, shape (n,)
        The places of the texts in it.
    codes : ndarray of int, shape (n,)
        The column of the true label.
    groups : ndarray of int, shape (n,)
        Equal texts have the same number, from 0.
    fold : ndarray of int, shape (n,)
        The fold of the cross-validation; equal texts are in one fold.
    n_out_of_scope : int
    """

    all_logits: np.ndarray
    rows: np.ndarray
    codes: np.ndarray
    groups: np.ndarray
    fold: np.ndarray
    n_out_of_scope: int

    @property
    def logits(self) -> np.ndarray:
        """The logits of these texts, a copy: float32, shape (n, n_labels)."""
        return self.all_logits[self.rows]


def texts_to_fit(run: Run, stage: str, *, on: On, n_folds: int, seed: int) -> TextsToFit:
    """Return the labelled texts that have a target at a stage; raises CalibrationError if they are fewer than folds."""
    decisions = labelled_decisions(run, stage, on=on)
    codes = pd.Index(run.spec.stage(stage).labels).get_indexer(decisions.y_true)
    own = codes >= 0  # a text that only a later stage has the label of has no probability here
    if own.sum() < n_folds:
        raise CalibrationError(
            f"{run.name}: {own.sum()} texts have a target at stage '{stage}', and fitting takes at least {n_folds}; "
            "use a run with more texts"
        )
    groups = np.unique(run.text_groups[decisions.rows[own]], return_inverse=True)[1]
    fold = np.random.default_rng(seed).permutation(int(groups.max()) + 1)[groups] % n_folds
    n_out_of_scope = int(decisions.out_of_scope[own].sum())
    return TextsToFit(decisions.all_logits, decisions.rows[own], codes[own], groups, fold, n_out_of_scope)


def _fit_inverse(logits: np.ndarray, codes: np.ndarray, where: str, *, rows: np.ndarray | None = None) -> float:
    """Return 1 / temperature with the lowest log loss. The log loss is convex in it: the minimum has slope 0.

    `rows` are the texts' places in `logits`, if these are not all.
    Newton's method finds it; where a step leaves the interval that has the minimum, the interval is halved.
    """

    def slope_and_curvature(inverse: float) -> tuple[float, float]:
        slopes, curvatures = _derivatives(logits, codes, inverse, rows=rows)
        return float(slopes.mean()), float(curvatures.mean())

    low, high = _INVERSE_RANGE
    if slope_and_curvature(low)[0] >= 0 or slope_and_curvature(high)[0] <= 0:
        raise CalibrationError(
            f"{where}: no temperature from {1 / high:g} to {1 / low:g} has the lowest log loss on its "
            f"{len(codes)} texts; fit on more texts, or leave the stage out"
        )
    inverse = 1.0
    while True:
        slope, curvature = slope_and_curvature(inverse)
        low, high = (inverse, high) if slope < 0 else (low, inverse)
        step = -slope / curvature if curvature > 0 else np.inf
        if abs(step) < _TOLERANCE or high - low < _TOLERANCE:
            return inverse
        inverse = inverse + step if low < inverse + step < high else (low + high) / 2


def _derivatives(
    logits: np.ndarray, codes: np.ndarray, inverse: float, *, rows: np.ndarray | None = None
) -> tuple[np.ndarray, ...]:
    """Return the first and second derivative of each text's log loss with respect to 1 / temperature: shapes (n,)."""

    def of_block(rows: np.ndarray, codes: np.ndarray) -> tuple[np.ndarray, ...]:
        # Logits below the highest one: the derivatives depend on differences only.
        own = logits[rows]
        z = own - own.max(axis=1, keepdims=True).astype(np.float64)
        p = np.exp(z * inverse)
        p /= p.sum(axis=1, keepdims=True)
        of_truth = z[np.arange(len(codes)), codes]
        mean = np.einsum("ij,ij->i", p, z)
        z -= mean[:, None]
        return mean - of_truth, np.einsum("ij,ij,ij->i", p, z, z)

    rows = np.arange(len(codes)) if rows is None else rows
    return by_block(of_block, rows, codes, n_columns=logits.shape[1])


def _newton_step(inverse: float, slopes: np.ndarray, curvatures: np.ndarray) -> np.ndarray:
    """Return 1 / temperature after one Newton step, from the summed derivatives of each weighting of the texts.

    NaN where the log loss of the weighted texts has no curvature.
    """
    with np.errstate(divide="ignore", invalid="ignore"):
        steps = np.where(curvatures > 0, slopes / curvatures, np.nan)
    return np.clip(inverse - steps, *_INVERSE_RANGE)


def log_losses(
    logits: np.ndarray,
    codes: np.ndarray,
    temperature: float | np.ndarray,
    *,
    stage: StageSpec | None = None,
    rows: np.ndarray | None = None,
) -> np.ndarray:
    """Return the log loss of each text at a temperature, or at one of its own: shape (n,).

    With a stage, its calibrator is applied to the logits first. `rows` are the texts' places in `logits`, if these are
    not all.
    """

    def of_block(rows: np.ndarray, codes: np.ndarray, temperature: np.ndarray) -> tuple[np.ndarray]:
        own = logits[rows] if stage is None else calibrated_logits(stage, logits[rows])
        below_highest = own - own.max(axis=1, keepdims=True).astype(np.float64)
        with np.errstate(over="ignore"):  # at a very small temperature the log loss of an error is infinite
            below_highest /= temperature[:, None]
        return (np.log(np.exp(below_highest).sum(axis=1)) - below_highest[np.arange(len(codes)), codes],)

    rows = np.arange(len(codes)) if rows is None else rows
    temperatures = np.broadcast_to(temperature, len(codes))
    (losses,) = by_block(of_block, rows, codes, temperatures, n_columns=logits.shape[1])
    return losses

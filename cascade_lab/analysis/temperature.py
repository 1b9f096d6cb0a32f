"""Fit temperatures on kept logits (Guo et al. 2017), and put them into a cascade."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import pandas as pd
from scipy.optimize import brentq
from scipy.special import expit, log_softmax, logit, softmax

from cascade_lab.analysis.bootstrap import N_RESAMPLES, Interval, interval, resample_counts
from cascade_lab.analysis.metrics import On, labelled_decisions
from cascade_lab.decisions import decide
from cascade_lab.exceptions import CalibrationError
from cascade_lab.spec import CascadeSpec, StageSpec

if TYPE_CHECKING:
    from cascade_lab.run import Run

_INVERSE_RANGE = (0.01, 100.0)  # of 1 / temperature


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

    Examples
    --------
    A logit difference of 2 means 88%, but only 3 of 4 texts are correct. At this temperature it means 75%.

    >>> round(fit_temperature([0, 0, 0, 1], [[1, -1]] * 4), 4)
    1.8205
    """
    return 1 / _fit_inverse(np.asarray(logits, dtype=np.float64), np.asarray(y_true), "logits")


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
        One row per stage: `on`, `n_examples`; the temperature as `value`, `low`, `high` (bootstrap over texts); the log
        loss on these texts at the temperature of the run (`before`) and at the new one (`after`); and the
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
        spec, decisions = run.spec.stage(name), labelled_decisions(run, name, on=on)
        if len(decisions.rows) < n_folds:
            raise CalibrationError(
                f"{run.name}: {len(decisions.rows)} texts have a target at stage '{name}', and fitting takes at least "
                f"{n_folds}; use a run with more texts"
            )
        logits = decisions.logits.astype(np.float64)
        codes = pd.Index(spec.labels).get_indexer(decisions.y_true)
        inverse = _fit_inverse(logits, codes, f"{run.name}: stage '{name}'")
        derivatives = _derivatives(logits, codes, inverse)
        weights = resample_counts(len(codes), n_resamples=n_resamples, seed=seed).astype(np.float64)
        resampled = _newton_step(inverse, *derivatives, weights)
        fold = np.random.default_rng(seed).permutation(len(codes)) % n_folds
        without_fold = _newton_step(inverse, *derivatives, 1.0 - np.eye(n_folds)[fold].T)
        rows[name] = {
            "on": on,
            "n_examples": len(codes),
            **interval(1 / inverse, 1 / resampled, level=level)._asdict(),
            "before": _log_losses(logits / spec.temperature, codes).mean(),
            "after": _log_losses(logits * inverse, codes).mean(),
            "held_out": _log_losses(logits * without_fold[fold][:, None], codes).mean(),
        }
    return pd.DataFrame.from_dict(rows, orient="index").rename_axis("stage")


class Calibrated(NamedTuple):
    """A cascade with other temperatures.

    Attributes
    ----------
    spec : CascadeSpec
    kept : tuple of str
        The stages whose decisions are exactly those from before.
    n_changed : int
        The number of texts of the run whose predicted label changes.
    """

    spec: CascadeSpec
    kept: tuple[str, ...]
    n_changed: int


def calibrated(run: Run, fitted: pd.DataFrame) -> Calibrated:
    """Return the cascade of a run at the temperatures of `fit_temperatures`; `calibrated_on` records their source.

    A threshold is a probability, and a temperature changes probabilities. A gate of two labels keeps its decisions: its
    threshold t at temperature T becomes the logistic function of logit(t) · T / T' at temperature T'. For a gate with
    more labels, and for a last stage with a `min_probability`, no threshold keeps the decision of every text. Their
    thresholds stay as they are; `n_changed` counts the effect, and such a cascade should be tuned again. If a predicted
    label changes, the new cascade has no `tuned_on`.

    Parameters
    ----------
    run : Run
    fitted : DataFrame
        What `fit_temperatures` returns.

    Raises
    ------
    CalibrationError
        Float64 cannot distinguish the probabilities of a gate at the new temperature.
    RunError
        A text would now reach a stage that never scored it.
    """
    stages = []
    for stage in run.spec.stages:
        if stage.name in fitted.index:
            new_stage = replace(stage, temperature=float(fitted.loc[stage.name, "value"]))
            if stage.is_gate and len(stage.labels) == 2:
                new_stage = replace(new_stage, threshold=_same_threshold(run, stage, new_stage))
            stage = new_stage
        stages.append(stage)
    spec = replace(run.spec, stages=tuple(stages))
    before, after = run.predictions, run.with_spec(spec).predictions
    n_changed = int((before["predicted"] != after["predicted"]).sum())
    calibrated_on = {
        name: {
            **{key: float(row[key]) for key in Interval._fields},
            "on": row["on"],
            "run_id": run.manifest["run_id"],
            "evalset": {key: value for key, value in run.manifest["evalset"].items() if value is not None},
        }
        for name, row in fitted.iterrows()
    }
    spec = replace(
        spec,
        tuned_on=None if n_changed else spec.tuned_on,
        calibrated_on={**(spec.calibrated_on or {}), **calibrated_on},
    )
    kept = tuple(stage.name for stage in spec.stages if stage.name not in fitted.index or _keeps_decisions(stage))
    return Calibrated(spec, kept, n_changed)


def _fit_inverse(logits: np.ndarray, codes: np.ndarray, where: str) -> float:
    """Return 1 / temperature with the lowest log loss. The log loss is convex in it: the minimum has slope 0."""

    def slope(inverse: float) -> float:
        return float(_derivatives(logits, codes, inverse)[0].mean())

    lowest, highest = _INVERSE_RANGE
    if slope(lowest) >= 0 or slope(highest) <= 0:
        raise CalibrationError(
            f"{where}: no temperature from {1 / highest:g} to {1 / lowest:g} has the lowest log loss on its "
            f"{len(codes)} texts; fit on more texts, or leave the stage out"
        )
    return float(brentq(slope, lowest, highest, xtol=1e-10))


def _derivatives(logits: np.ndarray, codes: np.ndarray, inverse: float) -> tuple[np.ndarray, np.ndarray]:
    """Return the first and second derivative of each text's log loss with respect to 1 / temperature: shapes (n,)."""
    p = softmax(logits * inverse, axis=1)
    mean = (p * logits).sum(axis=1)
    return mean - logits[np.arange(len(codes)), codes], (p * (logits - mean[:, None]) ** 2).sum(axis=1)


def _newton_step(inverse: float, slopes: np.ndarray, curvatures: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Return 1 / temperature after one Newton step, for each weighting of the texts: shape (n_weightings,)."""
    return np.clip(inverse - (weights @ slopes) / (weights @ curvatures), *_INVERSE_RANGE)


def _log_losses(logits: np.ndarray, codes: np.ndarray) -> np.ndarray:
    return -log_softmax(logits, axis=1)[np.arange(len(codes)), codes]


def _same_threshold(run: Run, before: StageSpec, after: StageSpec) -> float:
    """Return the threshold at which a gate of two labels decides at its new temperature as at the old one."""
    threshold = float(expit(logit(before.threshold) * before.temperature / after.temperature))
    # A threshold is often equal to the probability of a text. Rounding must not change the decision of that text.
    decision = run.decision(before.name)
    passed = decision.above[decision.scored]
    p = decide(after, run.scores(before.name).logits).confidence[decision.scored]
    lowest_above, highest_below = p[passed].min(initial=np.inf), p[~passed].max(initial=-np.inf)
    if highest_below >= min(lowest_above, 1.0):
        raise CalibrationError(
            f"{run.name}: at temperature {after.temperature:g} gate '{before.name}' gives the same probability to "
            "texts on both sides of its threshold; leave the stage out"
        )
    threshold = min(threshold, lowest_above)
    return threshold if threshold > highest_below else float(np.nextafter(highest_below, 1.0))


def _keeps_decisions(stage: StageSpec) -> bool:
    """Return whether a stage can decide the same at every temperature (with its threshold moved)."""
    if stage.is_gate:
        return len(stage.labels) == 2
    return max([stage.min_probability or 0.0, *stage.min_probabilities.values()]) <= 1 / len(stage.labels)

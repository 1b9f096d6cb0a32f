"""Temperatures fitted on kept logits (Guo et al. 2017), and the cascade that has them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
from scipy.optimize import brentq
from scipy.special import expit, log_softmax, logit, softmax

from cascade_lab.analysis.bootstrap import N_RESAMPLES, Interval, interval, resample_counts
from cascade_lab.analysis.metrics import On, judged, summarize
from cascade_lab.errors import CalibrationError
from cascade_lab.run import Run, Scores
from cascade_lab.serial import answer
from cascade_lab.spec import CascadeSpec, StageSpec

_RANGE = (0.01, 100.0)  # of 1 / temperature


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
    """Fit each stage's temperature on its kept logits: the one of least log loss (Guo et al. 2017, section 4.2).

    Parameters
    ----------
    run : Run
        Of a tuning set, not of the set that is reported on.
    stages : sequence of str, optional
        By default all.
    on : {"reached", "all"}
        What the stage was asked live, or everything, through shadow scores.

    Returns
    -------
    DataFrame
        A stage a row: `on`, `n_examples`; the temperature as `value`, `low`, `high` (bootstrap over texts); the log
        loss on these texts `before`, at the temperature that the run had, and `after`; and `held_out`, what it is by
        cross-validation on texts that the temperature was not fitted on. A resample or a fold is not fitted anew, but
        takes one Newton step from the fit.

    Raises
    ------
    CalibrationError
        A stage with too few texts, or one whose log loss has no least value: it is right, or wrong, on every text.
    SpecError, RunError
        No such stage; no shadow scores.
    """
    rows = {}
    for name in stages or [stage.name for stage in run.spec.stages]:
        spec, found = run.spec.stage(name), judged(run, name, on=on)
        if len(found.rows) < n_folds:
            raise CalibrationError(
                f"{run.directory}: {len(found.rows)} texts have a gold label at stage '{name}'; fit it on more"
            )
        logits = found.logits.astype(np.float64)
        codes = pd.Index(spec.labels).get_indexer(found.y_true)
        inverse = _fit(logits, codes, f"{run.directory}: stage '{name}'")
        slopes, curvatures = _derivatives(logits, codes, inverse)
        drawn = resample_counts(len(codes), n_resamples=n_resamples, seed=seed).astype(np.float64)
        fold = np.random.default_rng(seed).permutation(len(codes)) % n_folds
        # A Newton step from the fit, for each weighting of the texts.
        resampled, others = (
            np.clip(inverse - (weights @ slopes) / (weights @ curvatures), *_RANGE)
            for weights in (drawn, 1.0 - np.eye(n_folds)[fold].T)
        )
        left_out = _log_losses(logits * others[fold][:, None], codes)
        rows[name] = {
            "on": on,
            "n_examples": len(codes),
            **interval(1 / inverse, 1 / resampled, level=level)._asdict(),
            "before": _log_losses(logits / spec.temperature, codes).mean(),
            "after": _log_losses(logits * inverse, codes).mean(),
            "held_out": left_out.mean(),
        }
    return pd.DataFrame.from_dict(rows, orient="index").rename_axis("stage")


class Calibrated(NamedTuple):
    """A cascade with other temperatures.

    Attributes
    ----------
    spec : CascadeSpec
    kept : tuple of str
        Stages whose decisions are those from before, exactly.
    n_changed : int
        Answers of the run that differ from those before.
    """

    spec: CascadeSpec
    kept: tuple[str, ...]
    n_changed: int


def calibrated(run: Run, fitted: pd.DataFrame) -> Calibrated:
    """Return the run's cascade at the temperatures of `fit_temperatures`, their provenance in its `calibrated_on`.

    Thresholds are probabilities, and a temperature moves probabilities. A gate of two labels keeps its decisions: its
    threshold t, at temperature T, becomes the logistic function of logit(t) · T / T', at T'. For a gate of more labels
    and a last stage with a `min_probability` no threshold does the same on every text: theirs stay as they are, and
    `n_changed` says what that does here; tune such a cascade again. Where an answer changes, the new cascade no longer
    says what its thresholds were tuned on.

    Raises
    ------
    CalibrationError
        Float64 cannot tell the gate's probabilities apart at the new temperature.
    RunError
        Another answer is now given by a stage that never scored the text.
    """
    stages, kept = [], []
    for stage in run.spec.stages:
        if stage.name in fitted.index:
            cooler = replace(stage, temperature=float(fitted.loc[stage.name, "value"]))
            if stage.is_gate and len(stage.labels) == 2:
                cooler = replace(cooler, threshold=_same_threshold(run, stage, cooler))
            stage = cooler
        stages.append(stage)
    spec = replace(run.spec, stages=tuple(stages))
    before, after = run.predictions, rescored(run, spec).predictions
    n_changed = int((before["predicted"] != after["predicted"]).sum())
    kept = [stage.name for stage in spec.stages if stage.name not in fitted.index or _keeps(stage)]
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
    return Calibrated(spec, tuple(kept), n_changed)


def rescored(run: Run, spec: CascadeSpec) -> Run:
    """Return `run` as its cascade would have made it with the temperatures and thresholds of `spec`.

    Every function on a run takes it. Its times stay those of the live run.

    Raises
    ------
    RunError
        A text would reach a stage that never scored it.
    """
    made = _Rescored(run.directory)
    made.manifest = {
        **run.manifest,
        "cascade": spec.to_dict(),
        "thresholds": spec.thresholds,
        "tuned_on": spec.tuned_on,
    }
    made.examples = run.examples
    made.timings = run.timings
    names = [stage.name for stage in spec.stages]
    scores = {name: run.scores(name) for name in names}
    made._scores = dict(scores)
    made.predictions = made.replay()
    stopped_at = made.predictions["decided_by"].map(names.index).to_numpy()
    for place, name in enumerate(names):
        found = scores[name]
        made._scores[name] = Scores(found.rows, found.logits, stopped_at[found.rows] < place)
    return made


class _Rescored(Run):
    @cached_property
    def metrics(self) -> dict[str, Any]:
        return summarize(self)


def _fit(logits: np.ndarray, codes: np.ndarray, where: str) -> float:
    """Return 1 / temperature of least log loss, which is convex in it: where the slope is 0."""

    def slope(inverse: float) -> float:
        return float(_derivatives(logits, codes, inverse)[0].mean())

    if slope(_RANGE[0]) >= 0 or slope(_RANGE[1]) <= 0:
        raise CalibrationError(
            f"{where}: no temperature from {1 / _RANGE[1]:g} to {1 / _RANGE[0]:g} has the least log loss "
            f"on its {len(codes)} texts; fit on more, or leave the stage out"
        )
    return float(brentq(slope, *_RANGE, xtol=1e-10))


def _derivatives(logits: np.ndarray, codes: np.ndarray, inverse: float) -> tuple[np.ndarray, np.ndarray]:
    """Return the first and second derivative of each text's log loss by 1 / temperature, shapes (n,)."""
    p = softmax(logits * inverse, axis=1)
    mean = (p * logits).sum(axis=1)
    return mean - logits[np.arange(len(codes)), codes], (p * (logits - mean[:, None]) ** 2).sum(axis=1)


def _log_losses(logits: np.ndarray, codes: np.ndarray) -> np.ndarray:
    return -log_softmax(logits, axis=1)[np.arange(len(codes)), codes]


def _same_threshold(run: Run, before: StageSpec, after: StageSpec) -> float:
    """Return the threshold of a gate of two labels that decides at its new temperature as it did at the old one."""
    moved = float(expit(logit(before.threshold) * before.temperature / after.temperature))
    # Thresholds are often a probability that occurs, and the last digit must not stop that text.
    logits = run.scores(before.name).logits
    passed, p = answer(before, logits).passes, answer(after, logits).decisive
    above, below = p[passed].min(initial=np.inf), p[~passed].max(initial=-np.inf)
    if below >= min(above, 1.0):
        raise CalibrationError(
            f"{run.directory}: at temperature {after.temperature:g} gate '{before.name}' has one probability for texts "
            "that its threshold told apart; leave the stage out"
        )
    moved = min(moved, above)
    return moved if moved > below else float(np.nextafter(below, 1.0))


def _keeps(stage: StageSpec) -> bool:
    """Return whether a stage decides the same at every temperature, its threshold moved where that is possible."""
    if stage.is_gate:
        return len(stage.labels) == 2
    return max([stage.min_probability or 0.0, *stage.min_probabilities.values()]) <= 1 / len(stage.labels)

"""Compare calibrators of a run's stages by cross-validation, and put them or temperatures into its cascade."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import pandas as pd
from scipy.special import expit, logit

from cascade_lab.analysis.bootstrap import Interval
from cascade_lab.analysis.calibrator_fits import GATE_FITS, fit_vector
from cascade_lab.analysis.metrics import On
from cascade_lab.analysis.temperature import fit_temperature, log_losses, texts_to_fit
from cascade_lab.calibrator import METHODS, methods_of
from cascade_lab.decisions import decide
from cascade_lab.evidence import log_odds
from cascade_lab.exceptions import CalibrationError, did_you_mean
from cascade_lab.mixed_precision import without_stale_bounds
from cascade_lab.spec import CascadeSpec, StageSpec

if TYPE_CHECKING:
    from cascade_lab.run import Run


class CalibratorComparison(NamedTuple):
    """Methods of calibration for each stage, compared on texts that they were not fitted on.

    Attributes
    ----------
    table : DataFrame
        One row per `stage` and `method` (the index), `temperature` among them: `on`, `n_examples` and `n_out_of_scope`
        as for `fit_temperatures`; the mean log loss of all labels with the run's own settings (`before`), with the
        method fitted on these texts (`after`), and cross-validated (`held_out`); `gain`, the held-out log loss of the
        temperature minus that of the method, on the same texts; the `standard_error` of the gain; and `chosen`. NaN
        where the method cannot be fitted on the texts of a fold.
    chosen : dict of str to StageSpec
        Stage name to the stage with the method that was chosen, fitted on all texts. A stage whose row `temperature` is
        the chosen one is left out: `fit_temperatures` has more to say of it.
    """

    table: pd.DataFrame
    chosen: dict[str, StageSpec]


def compare_calibrators(
    run: Run,
    stages: Sequence[str] | None = None,
    *,
    method: str = "auto",
    on: On = "reached",
    n_folds: int = 5,
    seed: int = 0,
) -> CalibratorComparison:
    """Fit calibrators on a run's kept logits, and compare their held-out log loss with that of a temperature.

    Parameters
    ----------
    run : Run
        A run of a tuning set, not of the set on which results are reported.
    stages : sequence of str, optional
        By default all that the method is for.
    method : str
        A key of `calibrator.METHODS`, which is then chosen; or "auto": all that a stage can have. Then the one with the
        lowest held-out log loss is chosen among those whose `gain` is above its `standard_error`; if there is none, the
        temperature.
    on : {"reached", "all"}
        The texts that reached the stage, or all texts, which needs shadow scores.
    n_folds : int
        Of the cross-validation. Equal texts are in one fold.
    seed : int
        Of the folds.

    Raises
    ------
    CalibrationError
        The method is unknown, is for other stages, or cannot be fitted; a stage has fewer texts than `n_folds`, or no
        temperature fits it.
    SpecError, RunError
        A stage is unknown; there are no shadow scores, or no labels.
    """
    run = run.labelled
    rows, chosen = {}, {}
    for stage in _stages_for(run, stages, method):
        texts = texts_to_fit(run, stage.name, on=on, n_folds=n_folds, seed=seed)
        logits, codes, groups, fold = texts.logits, texts.codes, texts.groups, texts.fold
        if groups.max() + 1 < n_folds:
            raise CalibrationError(
                f"{run.name}: {groups.max() + 1} different texts have a target at stage '{stage.name}', and comparing "
                f"takes at least {n_folds}; use a run with more texts"
            )
        facts = {"on": on, "n_examples": len(codes), "n_out_of_scope": texts.n_out_of_scope}
        before = float(stage_log_losses(stage, logits, codes).mean())
        losses, fitted = {}, {}
        for name in ("temperature", *(methods_of(stage) if method == "auto" else [method])):
            try:
                fitted[name] = fit_stage(stage, name, logits, codes)
                losses[name] = _held_out_losses(stage, name, logits, codes, fold)
            except CalibrationError as error:
                if method != "auto" or name == "temperature":
                    raise CalibrationError(f"{run.name}: stage '{stage.name}': {name}: {error}") from error
                losses[name] = np.full(len(codes), np.nan)
            rows[stage.name, name] = {
                **facts,
                "before": before,
                "after": stage_log_losses(fitted[name], logits, codes).mean() if name in fitted else np.nan,
                "held_out": losses[name].mean(),
                "gain": (losses["temperature"] - losses[name]).mean(),
                "standard_error": _standard_error(losses["temperature"] - losses[name], groups),
            }
        best = _best(pd.DataFrame({name: rows[stage.name, name] for name in losses}).T) if method == "auto" else method
        for name in losses:
            rows[stage.name, name]["chosen"] = name == best
        if best != "temperature":
            chosen[stage.name] = fitted[best]
    index = pd.MultiIndex.from_tuples(list(rows), names=["stage", "method"])
    return CalibratorComparison(pd.DataFrame(list(rows.values()), index=index), chosen)


def fit_stage(stage: StageSpec, method: str, logits: np.ndarray, codes: np.ndarray) -> StageSpec:
    """Return a stage with a temperature or a calibrator that is fitted on logits and the columns of their true labels.

    Raises
    ------
    CalibrationError
        The method cannot be fitted on these texts.
    """
    if method == "temperature":
        return replace(stage, temperature=fit_temperature(codes, logits), calibrator=None)
    if method == "vector":
        return replace(stage, temperature=1.0, calibrator=fit_vector(codes, logits))
    column = stage.labels.index(str(stage.pass_label))
    calibrator = GATE_FITS[method](codes == column, log_odds(logits, column))
    return replace(stage, temperature=1.0, calibrator=calibrator)


class Calibrated(NamedTuple):
    """A cascade with other temperatures or calibrators.

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


def calibrated(run: Run, temperatures: pd.DataFrame, comparison: CalibratorComparison | None = None) -> Calibrated:
    """Return the cascade of a run with fitted temperatures and calibrators; `calibrated_on` records their source.

    A threshold is a probability, and calibration changes probabilities. A gate keeps its decisions where its old and
    its new probability both rise with the log-odds of its pass label: the threshold moves with them. That is so for
    every gate of two labels, and for calibrators of all gates, but not where isotonic regression gives texts on both
    sides of the threshold the same probability. A temperature of a gate with more labels, and any calibration of a last
    stage with a `min_probability`, has no threshold that keeps the decision of every text; their thresholds stay as
    they are. `vector` also changes which label is the most probable. `n_changed` counts the effect, and such a cascade
    should be tuned again. If a predicted label changes, the new cascade has no `tuned_on`. A stage whose probabilities
    change has no `precision_bounds` any longer.

    Parameters
    ----------
    run : Run
    temperatures : DataFrame
        What `fit_temperatures` returns, or an empty table.
    comparison : CalibratorComparison, optional
        What `compare_calibrators` returns. The stages in `chosen` get their calibrators, and no temperature.

    Raises
    ------
    RunError
        A text would now reach a stage that never scored it.
    """
    chosen = {} if comparison is None else comparison.chosen
    stages, kept, sources = [], [], {}
    for stage in run.spec.stages:
        if stage.name in chosen:
            assert comparison is not None
            new = chosen[stage.name]
            method = new.calibrator.method if new.calibrator is not None else "temperature"
            row = comparison.table.loc[(stage.name, method)]
            sources[stage.name] = {"method": method, "held_out": float(row["held_out"]), "on": row["on"]}
        elif stage.name in temperatures.index:
            row = temperatures.loc[stage.name]
            new = replace(stage, temperature=float(row["value"]), calibrator=None)
            sources[stage.name] = {**{key: float(row[key]) for key in Interval._fields}, "on": row["on"]}
        else:
            new = stage
        is_kept = _keeps_order(stage, new)
        if new is not stage and new.is_gate and is_kept:
            threshold, is_kept = _same_threshold(run, stage, new)
            new = replace(new, threshold=threshold)
        stages.append(new)
        if is_kept:
            kept.append(stage.name)
    spec = without_stale_bounds(run.spec, replace(run.spec, stages=tuple(stages)))
    before, after = run.predictions, run.with_spec(spec).predictions
    n_changed = int((before["predicted"] != after["predicted"]).sum())
    origin: dict[str, Any] = {
        "run_id": run.manifest["run_id"],
        "evalset": {key: value for key, value in run.manifest["evalset"].items() if value is not None},
    }
    calibrated_on = {name: {**source, **origin} for name, source in sources.items()}
    spec = replace(
        spec,
        tuned_on=None if n_changed else spec.tuned_on,
        calibrated_on={**(spec.calibrated_on or {}), **calibrated_on},
    )
    return Calibrated(spec, tuple(name for name in kept if _keeps_evidence(run.spec, spec, name)), n_changed)


def stage_log_losses(stage: StageSpec, logits: np.ndarray, codes: np.ndarray) -> np.ndarray:
    """Return the log loss of each text by a stage's probabilities: float64, shape (n,)."""
    return log_losses(logits, codes, stage.temperature, stage=stage)


def _stages_for(run: Run, stages: Sequence[str] | None, method: str) -> list[StageSpec]:
    """Return the stages to fit; raises where the method is unknown, or is for none of them."""
    if method not in ("auto", *METHODS):
        raise CalibrationError(f"no method is named '{method}'{did_you_mean(method, ['auto', *METHODS])}")
    fitting = [s for s in run.spec.stages if method == "auto" or method in methods_of(s)]
    named = [s for s in run.spec.stages if s in fitting] if not stages else [run.spec.stage(name) for name in stages]
    for stage in named:
        if stage not in fitting:
            known = ", ".join(["temperature", *methods_of(stage)])
            raise CalibrationError(f"{run.name}: '{method}' is not for stage '{stage.name}', which can have: {known}")
    if not named:
        raise CalibrationError(f"{run.name}: no stage can have '{method}'; take 'temperature'")
    return named


def _held_out_losses(
    stage: StageSpec, method: str, logits: np.ndarray, codes: np.ndarray, fold: np.ndarray
) -> np.ndarray:
    """Return each text's log loss with a method that was fitted on the other folds: shape (n,)."""
    losses = np.empty(len(codes))
    for k in np.unique(fold):
        inside = fold == k
        fitted = fit_stage(stage, method, logits[~inside], codes[~inside])
        losses[inside] = stage_log_losses(fitted, logits[inside], codes[inside])
    return losses


def _standard_error(differences: np.ndarray, groups: np.ndarray) -> float:
    """Return the standard error of the mean difference; equal texts count as one observation."""
    deviations = np.bincount(groups, differences - differences.mean())
    n_groups = len(deviations)
    return float(np.sqrt((deviations**2).sum() * n_groups / max(n_groups - 1, 1)) / len(differences))


def _best(table: pd.DataFrame) -> str:
    """Return the method with the lowest held-out log loss of those that are surely better than a temperature."""
    better = table[table["gain"] > table["standard_error"]]
    return "temperature" if better.empty else str(better["held_out"].astype(float).idxmin())


def _keeps_order(before: StageSpec, after: StageSpec) -> bool:
    """Return whether a stage can decide the same after calibration, with its threshold moved."""
    if before == after:
        return True
    if before.is_gate:  # does the probability rise with the log-odds of the pass label alone?
        return len(before.labels) == 2 or (before.temperature == 1 and after.temperature == 1)
    if before.calibrator is not None or after.calibrator is not None:
        return False
    thresholds = [before.threshold or 0.0, before.min_probability or 0.0, *before.min_probabilities.values()]
    return before.rejector is not None or max(thresholds) <= 1 / len(before.labels)


def _keeps_evidence(before: CascadeSpec, after: CascadeSpec, name: str) -> bool:
    """Return whether the evidence of a stage's rejector, which depends on temperatures, is that from before."""
    rejector = before.stage(name).rejector
    stages = () if rejector is None else rejector.stages
    return all(before.stage(s).temperature == after.stage(s).temperature for s in stages)


def _same_threshold(run: Run, before: StageSpec, after: StageSpec) -> tuple[float, bool]:
    """Return the threshold with which a gate decides as before, and whether it does so for all texts of the run."""
    threshold = _probability(after, _log_odds_at(before, float(before.threshold or 0.0)))
    # A threshold is often equal to the probability of a text. Rounding must not change the decision of that text.
    decision = run.decision(before.name)
    passed = decision.above[decision.scored]
    p = decide(after, run.scores(before.name).logits).confidence[decision.scored]
    lowest_above, highest_below = p[passed].min(initial=np.inf), p[~passed].max(initial=-np.inf)
    if highest_below >= min(lowest_above, 1.0):
        return threshold, False
    threshold = min(threshold, float(lowest_above))
    return (threshold if threshold > highest_below else float(np.nextafter(highest_below, 1.0))), True


def _log_odds_at(stage: StageSpec, probability: float) -> float:
    """Return the lowest log-odds of a gate's logits that give at least a probability; infinite where none does."""
    wanted = float(logit(probability))
    if stage.calibrator is None:
        return wanted * stage.temperature
    if stage.calibrator.method == "platt":
        return (wanted - stage.calibrator.parameters["bias"]) / stage.calibrator.parameters["weight"]
    low, high = -1e6, 1e6
    if float(stage.calibrator.log_odds(np.array(high))) < wanted:
        return np.inf
    if float(stage.calibrator.log_odds(np.array(low))) >= wanted:
        return -np.inf
    while (middle := (low + high) / 2) not in (low, high):
        if float(stage.calibrator.log_odds(np.array(middle))) >= wanted:
            high = middle
        else:
            low = middle
    return high


def _probability(stage: StageSpec, s: float) -> float:
    """Return a gate's probability of its pass label where its logits have the log-odds `s`, which may be infinite."""
    if np.isinf(s):
        return 1.0 if s > 0 else 0.0
    return float(expit(s / stage.temperature if stage.calibrator is None else stage.calibrator.log_odds(np.array(s))))

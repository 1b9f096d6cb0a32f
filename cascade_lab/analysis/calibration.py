"""Do probabilities mean what they say? Reliability, ECE, Brier and log loss, of a stage or of p(gate) · p(class).

What is looked at is one probability of one event a text:

- a gate: its probability of the pass label, and whether the text should pass;
- the last stage: its highest probability, and whether that label is right;
- the cascade (no stage is named): p(gate) · p(class) of the best class in scope, and whether that class is right.

A stage is judged where it has a gold label: on what the gates before it let pass, or on everything.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal, NamedTuple, get_args

import numpy as np
import pandas as pd
from scipy.special import log_softmax

from cascade_lab.analysis.bootstrap import N_RESAMPLES, Interval, interval, resample_counts
from cascade_lab.analysis.metrics import On, in_scope_answers, judged, wilson
from cascade_lab.analysis.resamples import blocks
from cascade_lab.errors import CalibrationError
from cascade_lab.run import Run

Bins = Literal["equal_mass", "equal_width"]
N_BINS = 15


class Claims(NamedTuple):
    """Probabilities and what came of them.

    Attributes
    ----------
    p : ndarray of float64, shape (n,)
        The probability that was claimed.
    came : ndarray of bool, shape (n,)
        The event came true.
    brier, log_loss : ndarray of float64, shape (n,)
        Each text's part: of the event or, for the last stage, of all its labels.
    """

    p: np.ndarray
    came: np.ndarray
    brier: np.ndarray
    log_loss: np.ndarray


def claims(run: Run, stage: str | None = None, *, on: On = "reached", fitted_here: bool = False) -> Claims:
    """Return what one stage claims or, without one, what the cascade does, as the module's first lines say.

    Brier is (p - y)² of the event, and for the last stage the sum of that over its labels; log loss is the natural
    logarithm. Probabilities of an event are kept off 0 and 1 by float64's epsilon in it, as in scikit-learn.

    Parameters
    ----------
    run : Run
    stage : str, optional
    on : {"reached", "all"}
        What the stage was asked live, or everything, through shadow scores; of the cascade: what reached its last
        stage, or everything.
    fitted_here : bool
        Say twice that calibration is to be reported on the eval set that its temperature was fitted on.

    Raises
    ------
    CalibrationError
        A temperature was fitted on this run's eval set, and `fitted_here` is not said.
    SpecError, RunError
        No such stage; no shadow scores.
    """
    if not fitted_here:
        check_unfitted(run, stage)
    if stage is None:
        found = in_scope_answers(run, on=on)
        return _of_event(found.p_gates * found.p_class, found.right)
    spec, said = run.spec.stage(stage), judged(run, stage, on=on)
    if spec.is_gate:
        return _of_event(said.decisive, said.y_true == spec.pass_label)
    logs = log_softmax(said.logits.astype(np.float64) / spec.temperature, axis=1)
    codes = pd.Index(spec.labels).get_indexer(said.y_true)
    gold = np.arange(len(codes)), codes
    p = np.exp(logs)
    brier = (p**2).sum(axis=1) - 2 * p[gold] + 1
    return Claims(said.decisive, p.argmax(axis=1) == codes, brier, -logs[gold])


def check_unfitted(run: Run, stage: str | None = None) -> None:
    """Raise CalibrationError if a temperature, of `stage` or of any, was fitted on the eval set of `run`."""
    fitted = run.spec.calibrated_on or {}
    own = run.manifest["evalset"]

    def is_own(evalset: Mapping[str, Any]) -> bool:
        return all(own.get(key) == evalset.get(key) for key in ("sha256", "split"))

    same = [name for name, said in fitted.items() if stage in (None, name) and is_own(said.get("evalset", {}))]
    if same:
        raise CalibrationError(
            f"{run.directory}: the temperature of {', '.join(same)} was fitted on this eval set, and calibration "
            "looks better there than it is; report on a run of another set, or say fitted_here=True"
        )


def reliability(
    run: Run,
    stage: str | None = None,
    *,
    on: On = "reached",
    n_bins: int = N_BINS,
    bins: Bins = "equal_mass",
    level: float = 0.95,
    fitted_here: bool = False,
) -> pd.DataFrame:
    """Return how often the event came true against how often it was claimed to, bin by bin.

    Parameters
    ----------
    run, stage, on, fitted_here
        As for `claims`.
    n_bins : int
        The most bins; one that would be empty is left out, and texts of one probability share a bin.
    bins : {"equal_mass", "equal_width"}
        As many texts in each, or the interval from 0 to 1 cut evenly.

    Returns
    -------
    DataFrame
        A bin a row: `from`, `to` (the least and the highest probability in it), `n_examples`, `claimed` (the mean
        probability), and `value`, the fraction that came true, with Wilson's interval, `low` and `high`.

    Raises
    ------
    CalibrationError, SpecError, RunError
        As `claims` does, and for bins that make no sense.
    """
    found = claims(run, stage, on=on, fitted_here=fitted_here)
    bin_of = assign_bins(found.p, n_bins=n_bins, bins=bins)
    table = pd.DataFrame({"p": found.p, "came": found.came}).groupby(bin_of)
    made = table["p"].agg(["min", "max", "size", "mean"]).set_axis(["from", "to", "n_examples", "claimed"], axis=1)
    hits = zip(table["came"].sum(), made["n_examples"], strict=True)
    made[list(Interval._fields)] = np.array([wilson(*pair, level=level) for pair in hits]).reshape(-1, 3)
    return made.rename_axis("bin")


def calibration_figures(
    run: Run,
    stage: str | None = None,
    *,
    on: On = "reached",
    n_bins: int = N_BINS,
    bins: Bins = "equal_mass",
    level: float = 0.95,
    n_resamples: int = N_RESAMPLES,
    seed: int = 0,
    fitted_here: bool = False,
) -> pd.DataFrame:
    """Return how well calibrated a stage is or, without one, the cascade, with bootstrap intervals over texts.

    Parameters
    ----------
    run, stage, on, n_bins, bins, fitted_here
        As for `reliability`.

    Returns
    -------
    DataFrame
        A figure a row: `value`, `low`, `high`.

        - `ece`: the expected calibration error (Naeini et al. 2015), the mean over texts of |came true - claimed| of
          their bin. Chance alone keeps it above 0, and resampling adds chance to chance, so that its interval is the
          bootstrap's turned around the value (the basic form; Efron and Tibshirani 1993), its low end moved once more
          by what resampling added, and 0 where the value is no more than `ece_if_calibrated` has it.
        - `ece_if_calibrated`: what `ece` would be if every probability were true, by simulation.
        - `overclaim`: the mean of claimed less came true; above 0 is overconfident.
        - `brier`, `log_loss`: as in `claims`.

        `attrs` has `n_examples`, `n_bins` (those that are not empty) and `bins`.

    Raises
    ------
    CalibrationError, SpecError, RunError
        As `reliability` does.
    """
    found = claims(run, stage, on=on, fitted_here=fitted_here)
    bin_of = assign_bins(found.p, n_bins=n_bins, bins=bins)
    n, gap = len(found.p), found.p - found.came
    result = pd.DataFrame(columns=list(Interval._fields), dtype=float).rename_axis("figure")
    result.attrs = {"n_examples": n, "n_bins": len(np.unique(bin_of)), "bins": bins}
    if not n:
        return result.reindex(["ece", "ece_if_calibrated", "overclaim", "brier", "log_loss"])
    parts = np.stack([gap, found.brier, found.log_loss], axis=1)
    member = np.eye(bin_of.max() + 1)[bin_of]
    rng = np.random.default_rng(seed)
    weights, drawn, eces, by_chance = resample_counts(n, n_resamples=n_resamples, seed=seed), [], [], []
    for rows in blocks(n_resamples, n):
        counts = weights[rows].astype(np.float64)
        drawn.append(counts @ parts / n)
        eces.append(np.abs((counts * gap) @ member).sum(axis=1) / n)
        came = rng.random(counts.shape) < found.p
        by_chance.append(np.abs((found.p - came) @ member).sum(axis=1) / n)
    ece = float(np.abs(gap @ member).sum() / n)
    chance = np.concatenate(by_chance)
    result.loc["ece"] = _turned(ece, np.concatenate(eces), chance, level)
    result.loc["ece_if_calibrated"] = interval(float(chance.mean()), chance, level=level)
    for name, value, resamples in zip(
        ("overclaim", "brier", "log_loss"), parts.mean(axis=0), np.concatenate(drawn).T, strict=True
    ):
        result.loc[name] = interval(float(value), resamples, level=level)
    return result


def assign_bins(p: np.ndarray, *, n_bins: int = N_BINS, bins: Bins = "equal_mass") -> np.ndarray:
    """Return the bin, from 0, of each probability: int, shape (n,). Equal probabilities share a bin.

    >>> assign_bins(np.array([0.1, 0.4, 0.8, 0.9]), n_bins=2).tolist()
    [0, 0, 1, 1]
    >>> assign_bins(np.array([0.1, 0.4, 0.8, 0.9]), n_bins=4, bins="equal_width").tolist()
    [0, 1, 3, 3]
    """
    if bins not in get_args(Bins) or n_bins < 1:
        raise CalibrationError(f"{n_bins} bins of '{bins}': bins are 'equal_mass' or 'equal_width', and at least one")
    if bins == "equal_width":
        return np.minimum((p * n_bins).astype(np.int64), n_bins - 1)
    # The bin of a probability is that of the middle of its ranks.
    ordered = np.sort(p)
    middle = (np.searchsorted(ordered, p, "left") + np.searchsorted(ordered, p, "right")) / 2
    return np.minimum((middle / max(len(p), 1) * n_bins).astype(np.int64), n_bins - 1)


def _of_event(p: np.ndarray, came: np.ndarray) -> Claims:
    kept = np.clip(p, np.finfo(np.float64).eps, 1 - np.finfo(np.float64).eps)
    return Claims(p, came, (p - came) ** 2, -np.log(np.where(came, kept, 1 - kept)))


def _turned(ece: float, drawn: np.ndarray, chance: np.ndarray, level: float) -> Interval:
    """Return ECE with the interval that `calibration_figures` describes."""
    _, low, high = interval(ece, 2 * ece - drawn, level=level)
    is_chance = ece <= interval(0.0, chance, level=level).high
    return Interval(ece, 0.0 if is_chance else max(low - (drawn.mean() - ece), 0.0), max(high, 0.0))

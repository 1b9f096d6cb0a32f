"""Measure whether confidences are true probabilities: reliability curve, ECE, Brier score and log loss.

Each text has one confidence, the predicted probability of one event:

- a gate: its probability of the pass label; the event is that the text should pass;
- the last stage: its highest probability; the event is that this label is correct;
- the cascade (no stage is named): p(gate) · p(class) of the most probable in-scope label; the event is that this label
  is correct.

A stage is measured on the texts that have a target at that stage: those that reached it, or all. A text out of scope
has one at a gate, and at a last stage that has a label for it; `n_out_of_scope` says how many of the texts are such.
The cascade is measured on all texts, and its event never comes true for a text out of scope.

`reliability_curve` and `calibration_error` take plain arrays; `reliability` and `calibration_metrics` take a run.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, get_args

import numpy as np
import pandas as pd
from scipy.sparse import csr_matrix
from scipy.special import log_softmax

from cascade_lab.analysis.bootstrap import (
    N_RESAMPLES,
    Interval,
    correlation,
    difference_interval,
    fraction_interval,
    interval,
    resample_blocks,
)
from cascade_lab.analysis.metrics import On, in_scope_predictions, labelled_decisions
from cascade_lab.by_block import by_block
from cascade_lab.calibrator import calibrated_logits
from cascade_lab.exceptions import CalibrationError

if TYPE_CHECKING:
    from cascade_lab.run import Run

Bins = Literal["equal_width", "equal_mass"]
N_BINS = 15
ECE: dict[Bins, str] = {"equal_width": "ece", "equal_mass": "adaptive_ece"}
"""The name of the calibration error with each kind of bins."""


class Confidences(NamedTuple):
    """The confidence of each text, and whether its event came true.

    Attributes
    ----------
    confidence : ndarray of float64, shape (n,)
    correct : ndarray of bool, shape (n,)
        The event came true: the label is correct, or the text should pass.
    brier, log_loss : ndarray of float64, shape (n,)
        The score of each text: of the event or, for the last stage, of the probabilities of all its labels.
    n_out_of_scope : int or None
        How many of the texts are out of scope; None where that is unknown.
    groups : ndarray of int, shape (n,), or None
        Equal texts have the same number (`duplicates.text_groups`), and count as one observation.
    """

    confidence: np.ndarray
    correct: np.ndarray
    brier: np.ndarray
    log_loss: np.ndarray
    n_out_of_scope: int | None = None
    groups: np.ndarray | None = None


def confidences(
    run: Run, stage: str | None = None, *, on: On = "reached", allow_fitted_set: bool = False
) -> Confidences:
    """Return the confidences of one stage or, without one, of the cascade, as the top of this module defines them.

    Parameters
    ----------
    run : Run
    stage : str, optional
    on : {"reached", "all"}
        The texts that reached the stage (for the cascade: its last stage), or all texts, which needs shadow scores.
    allow_fitted_set : bool
        Allow texts on which a temperature or calibrator was fitted. Calibration looks better there than elsewhere.

    Raises
    ------
    CalibrationError
        A temperature or calibrator was fitted on this eval set, and `allow_fitted_set` is False.
    SpecError, RunError
        The stage is unknown; there are no shadow scores, or no labels.
    """
    if not allow_fitted_set:
        check_unfitted(run, stage)
    run = run.labelled
    groups = run.text_groups
    if stage is None:
        best = in_scope_predictions(run, on=on)
        table = yes_no_confidences(best.correct, best.p_gates * best.p_class)
        return table._replace(n_out_of_scope=int(best.out_of_scope.sum()), groups=groups[best.rows])
    spec, decisions = run.spec.stage(stage), labelled_decisions(run, stage, on=on)
    facts = {"n_out_of_scope": int(decisions.out_of_scope.sum()), "groups": groups[decisions.rows]}
    if spec.is_gate:
        table = yes_no_confidences(decisions.y_true == spec.pass_label, decisions.confidence)
        return table._replace(**facts)
    codes = pd.Index(spec.labels).get_indexer(decisions.y_true)

    def scores(rows: np.ndarray, codes: np.ndarray) -> tuple[np.ndarray, ...]:
        return _class_scores(calibrated_logits(spec, decisions.all_logits[rows]), codes, spec.temperature)

    _, correct, brier, log_loss = by_block(scores, decisions.rows, codes, n_columns=len(spec.labels))
    return Confidences(decisions.confidence, correct, brier, log_loss)._replace(**facts)


def yes_no_confidences(correct: Any, confidence: Any) -> Confidences:
    """Return the scores of predicted probabilities of one event.

    The Brier score of a text is (confidence - correct)². The log loss is the natural logarithm; as in scikit-learn,
    float64's epsilon keeps probabilities away from 0 and 1 in it.

    Parameters
    ----------
    correct : array-like of bool, shape (n,)
    confidence : array-like of float, shape (n,)

    Raises
    ------
    CalibrationError
        The shapes differ, or a confidence is not in [0, 1].

    Examples
    --------
    >>> yes_no_confidences([True, False], [0.75, 0.5]).brier.tolist()
    [0.0625, 0.25]
    """
    correct, confidence = _checked(correct, confidence)
    epsilon = np.finfo(np.float64).eps
    clipped = np.clip(confidence, epsilon, 1 - epsilon)
    log_loss = -np.log(np.where(correct, clipped, 1 - clipped))
    return Confidences(confidence, correct, (confidence - correct) ** 2, log_loss)


def class_confidences(y_true: Any, logits: Any, *, temperature: float = 1.0) -> Confidences:
    """Return the confidence of each most probable class, and the scores of the probabilities of all classes.

    The Brier score of a text is the sum of (p - y)² over the classes, from 0 to 2.

    Parameters
    ----------
    y_true : array-like of int, shape (n,)
        The column of the true class.
    logits : array-like of float, shape (n, n_classes)
    temperature : float

    Examples
    --------
    >>> scores = class_confidences([0, 1], np.log([[0.8, 0.2], [0.6, 0.4]]))
    >>> scores.confidence.round(3).tolist(), scores.correct.tolist(), scores.brier.round(3).tolist()
    ([0.8, 0.6], [True, False], [0.08, 0.72])
    """
    of_block = partial(_class_scores, temperature=temperature)
    confidence, correct, brier, log_loss = by_block(of_block, np.asarray(logits), np.asarray(y_true))
    return Confidences(confidence, correct, brier, log_loss)


def _class_scores(logits: np.ndarray, y_true: np.ndarray, temperature: float) -> tuple[np.ndarray, ...]:
    """Return the columns of `Confidences` for some texts."""
    logits = np.asarray(logits, dtype=np.float64)
    with np.errstate(over="ignore", invalid="ignore"):  # the difference first: at most 0 at the smallest temperature
        log_p = log_softmax((logits - logits.max(axis=1, keepdims=True)) / temperature, axis=1)
    p, of_truth = np.exp(log_p), (np.arange(len(y_true)), y_true)
    brier = (p**2).sum(axis=1) - 2 * p[of_truth] + 1
    return p.max(axis=1), p.argmax(axis=1) == y_true, brier, -log_p[of_truth]


def check_unfitted(run: Run, stage: str | None = None) -> None:
    """Raise CalibrationError if the calibration of `stage`, or of any stage, was fitted on the eval set of `run`."""
    evalset = run.manifest["evalset"]

    def is_fitted_here(source: Mapping[str, Any]) -> bool:
        fitted_on = source.get("evalset", {})
        same_file = evalset.get("sha256") is not None and evalset["sha256"] == fitted_on.get("sha256")
        same_run = source.get("run_id") == run.manifest["run_id"]
        return same_run or (same_file and evalset.get("split") == fitted_on.get("split"))

    sources = run.spec.calibrated_on or {}
    fitted = [name for name, source in sources.items() if stage in (None, name) and is_fitted_here(source)]
    if fitted:
        raise CalibrationError(
            f"{run.name}: the calibration of {', '.join(fitted)} was fitted on this eval set, so it looks better here "
            "than it is; use a run of another set, or pass allow_fitted_set=True"
        )


def reliability(
    run: Run,
    stage: str | None = None,
    *,
    on: On = "reached",
    n_bins: int = N_BINS,
    bins: Bins = "equal_width",
    level: float = 0.95,
    allow_fitted_set: bool = False,
) -> pd.DataFrame:
    """Return the reliability curve of a stage or, without one, of the cascade: see `reliability_curve`.

    Parameters
    ----------
    run, stage, on, allow_fitted_set
        As for `confidences`.
    n_bins, bins, level
        As for `reliability_curve`.

    Raises
    ------
    CalibrationError, SpecError, RunError
        As for `confidences` and `assign_bins`.
    """
    table = confidences(run, stage, on=on, allow_fitted_set=allow_fitted_set)
    return reliability_curve(
        table.correct, table.confidence, groups=table.groups, n_bins=n_bins, bins=bins, level=level
    )


def reliability_curve(
    correct: Any,
    confidence: Any,
    *,
    groups: np.ndarray | None = None,
    n_bins: int = N_BINS,
    bins: Bins = "equal_width",
    level: float = 0.95,
) -> pd.DataFrame:
    """Return how often the event came true in each bin of confidences.

    Parameters
    ----------
    correct : array-like of bool, shape (n,)
        Whether the event came true.
    confidence : array-like of float, shape (n,)
        The predicted probability of the event.
    groups : ndarray of int, shape (n,), optional
        Equal texts have the same number (`duplicates.text_groups`), and count as one observation.
    n_bins, bins
        As for `assign_bins`. Empty bins are left out.
    level : float
        The level of the intervals.

    Returns
    -------
    DataFrame
        One row per bin: `from`, `to` (the lowest and the highest confidence in it), `n_examples`, `mean_confidence`,
        and the fraction of correct texts as `value`, with Wilson's interval as `low` and `high`.

    Raises
    ------
    CalibrationError
        The arrays or the bins are not usable.

    Examples
    --------
    >>> curve = reliability_curve([False, True, True, True], [0.2, 0.4, 0.8, 0.9], n_bins=2)
    >>> curve[["mean_confidence", "value"]].round(2).to_dict("list")
    {'mean_confidence': [0.3, 0.85], 'value': [0.5, 1.0]}
    """
    correct, confidence = _checked(correct, confidence)
    bin_of = assign_bins(confidence, n_bins=n_bins, bins=bins)
    curve = pd.Series(confidence).groupby(bin_of).agg(["min", "max", "size", "mean"])
    curve = curve.set_axis(["from", "to", "n_examples", "mean_confidence"], axis=1)
    intervals = [fraction_interval(correct, bin_of == i, groups=groups, level=level) for i in curve.index]
    curve[list(Interval._fields)] = np.array(intervals, dtype=float).reshape(-1, 3)
    return curve.rename_axis("bin")


def calibration_metrics(
    run: Run,
    stage: str | None = None,
    *,
    on: On = "reached",
    n_bins: int = N_BINS,
    bins: Bins = "equal_width",
    level: float = 0.95,
    n_resamples: int = N_RESAMPLES,
    seed: int = 0,
    allow_fitted_set: bool = False,
) -> pd.DataFrame:
    """Return how well a stage or, without one, the cascade is calibrated, with intervals: see `calibration_error`.

    Parameters
    ----------
    run, stage, on, allow_fitted_set
        As for `confidences`.
    n_bins, bins, level, n_resamples, seed
        As for `calibration_error`.

    Returns
    -------
    DataFrame
        As `calibration_error` returns it. The Brier score and the log loss of the last stage are those of the
        probabilities of all its labels. `attrs` also has `n_out_of_scope`, the number of texts out of scope among them.

    Raises
    ------
    CalibrationError, SpecError, RunError
        As for `confidences` and `assign_bins`.
    """
    table = confidences(run, stage, on=on, allow_fitted_set=allow_fitted_set)
    return _calibration_table(table, n_bins=n_bins, bins=bins, level=level, n_resamples=n_resamples, seed=seed)


def calibration_error(
    correct: Any,
    confidence: Any,
    *,
    groups: np.ndarray | None = None,
    n_bins: int = N_BINS,
    bins: Bins = "equal_width",
    level: float = 0.95,
    n_resamples: int = N_RESAMPLES,
    seed: int = 0,
) -> pd.DataFrame:
    """Return how well predicted probabilities of one event are calibrated, with bootstrap intervals over texts.

    Parameters
    ----------
    correct : array-like of bool, shape (n,)
        Whether the event came true.
    confidence : array-like of float, shape (n,)
        The predicted probability of the event.
    groups : ndarray of int, shape (n,), optional
        Equal texts have the same number (`duplicates.text_groups`), and are drawn together.
    n_bins, bins
        As for `assign_bins`.
    level, n_resamples, seed
        Of the bootstrap.

    Returns
    -------
    DataFrame
        One row per metric: `value`, `low`, `high`.

        - `ece`: the expected calibration error in bins of equal width (Naeini et al. 2015, Guo et al. 2017): the mean
          over texts of |fraction correct - mean confidence| of their bin. With bins of equal mass its name is
          `adaptive_ece` (Nixon et al. 2019). Chance keeps it above 0 even for perfect probabilities, and resampling
          adds more chance. So its interval is the basic bootstrap interval (Efron and Tibshirani 1993), with the low
          end reduced once more by what resampling added. The low end is 0 if `ece` is within the interval of
          `ece_if_calibrated`.
        - `ece_if_calibrated` (`adaptive_ece_if_calibrated`): what it would be if all confidences were true
          probabilities, by simulation.
        - `overconfidence`: mean confidence - fraction correct, with the interval of `difference_interval`. Above 0
          means overconfident.
        - `brier`, `log_loss`: as in `yes_no_confidences`.

        `attrs` has `n_examples`, `n_bins` (the number of bins that are not empty) and `bins`. All values are NaN if
        there are no texts.

    Raises
    ------
    CalibrationError
        The arrays or the bins are not usable.
    """
    table = yes_no_confidences(correct, confidence)._replace(groups=groups)
    return _calibration_table(table, n_bins=n_bins, bins=bins, level=level, n_resamples=n_resamples, seed=seed)


def assign_bins(confidence: np.ndarray, *, n_bins: int = N_BINS, bins: Bins = "equal_width") -> np.ndarray:
    """Return the bin of each confidence: int from 0, shape (n,). Equal confidences are in the same bin.

    Parameters
    ----------
    confidence : ndarray, shape (n,)
    n_bins : int
        The largest number of bins; some may be empty.
    bins : {"equal_width", "equal_mass"}
        Intervals of equal width, each with its upper end and, but for the first, without its lower end (Guo et al.
        2017); or bins with equally many texts.

    Raises
    ------
    CalibrationError
        `bins` is unknown, or `n_bins` is below 1.

    Examples
    --------
    >>> assign_bins(np.array([0.1, 0.4, 0.8, 0.9]), n_bins=2).tolist()
    [0, 0, 1, 1]
    >>> assign_bins(np.array([0.7, 0.8, 0.9, 1.0]), n_bins=2).tolist()
    [1, 1, 1, 1]
    >>> assign_bins(np.array([0.7, 0.8, 0.9, 1.0]), n_bins=2, bins="equal_mass").tolist()
    [0, 0, 1, 1]
    """
    if bins not in get_args(Bins):
        raise CalibrationError(f"bins '{bins}' are unknown; they are 'equal_width' or 'equal_mass'")
    if n_bins < 1:
        raise CalibrationError(f"n_bins is {n_bins}; give at least 1")
    if bins == "equal_width":
        return np.maximum(np.ceil(confidence * n_bins).astype(np.int64) - 1, 0)
    # The mean rank of equal confidences decides their bin.
    ordered = np.sort(confidence)
    rank = (np.searchsorted(ordered, confidence, "left") + np.searchsorted(ordered, confidence, "right")) / 2
    return np.minimum((rank / max(len(confidence), 1) * n_bins).astype(np.int64), n_bins - 1)


def _checked(correct: Any, confidence: Any) -> tuple[np.ndarray, np.ndarray]:
    correct, confidence = np.asarray(correct, dtype=bool), np.asarray(confidence, dtype=np.float64)
    if correct.ndim != 1 or correct.shape != confidence.shape:
        raise CalibrationError(
            f"correct has shape {correct.shape} and confidence {confidence.shape}; give one value of each per text"
        )
    if not ((confidence >= 0) & (confidence <= 1)).all():
        raise CalibrationError("a confidence is not in [0, 1]; give probabilities")
    return correct, confidence


def _calibration_table(
    table: Confidences, *, n_bins: int, bins: Bins, level: float, n_resamples: int, seed: int
) -> pd.DataFrame:
    """Return what `calibration_error` describes."""
    bin_of = assign_bins(table.confidence, n_bins=n_bins, bins=bins)
    n, gap = len(table.confidence), table.confidence - table.correct
    result = pd.DataFrame(columns=list(Interval._fields), dtype=float).rename_axis("metric")
    result.attrs = {"n_examples": n, "n_bins": len(np.unique(bin_of)), "bins": bins}
    if table.n_out_of_scope is not None:
        result.attrs["n_out_of_scope"] = table.n_out_of_scope
    if not n:
        return result.reindex([ECE[bins], f"{ECE[bins]}_if_calibrated", "overconfidence", "brier", "log_loss"])
    text_scores = np.stack([table.correct, table.confidence, table.brier, table.log_loss], axis=1)
    in_bin = csr_matrix((np.ones(n), bin_of, np.arange(n + 1)), shape=(n, int(bin_of.max()) + 1))
    rng = np.random.default_rng(seed)
    groups = np.arange(n) if table.groups is None else np.unique(table.groups, return_inverse=True)[1]
    score_blocks, ece_blocks, chance_blocks = [], [], []
    for weights in resample_blocks(n, groups=groups, n_resamples=n_resamples, seed=seed):
        counts = weights.astype(np.float64)
        n_drawn = counts.sum(axis=1)
        with np.errstate(invalid="ignore"):  # a log loss that is infinite has no interval
            score_blocks.append(counts @ text_scores / n_drawn[:, None])
        ece_blocks.append(np.abs((counts * gap) @ in_bin).sum(axis=1) / n_drawn)
        simulated = rng.random((len(counts), int(groups.max()) + 1))[:, groups] < table.confidence
        chance_blocks.append(np.abs((table.confidence - simulated) @ in_bin).sum(axis=1) / n)
    ece = float(np.abs(gap @ in_bin).sum() / n)
    by_chance = np.concatenate(chance_blocks)
    result.loc[ECE[bins]] = _ece_interval(ece, np.concatenate(ece_blocks), by_chance, level)
    result.loc[f"{ECE[bins]}_if_calibrated"] = interval(float(by_chance.mean()), by_chance, level=level)
    (_, mean_confidence, *scores), resampled = text_scores.mean(axis=0), np.concatenate(score_blocks).T
    accuracy = fraction_interval(table.correct, np.ones(n, dtype=bool), groups=groups, level=level)
    confidence = interval(float(mean_confidence), resampled[1], level=level)
    result.loc["overconfidence"] = difference_interval(accuracy, confidence, correlation(resampled[0], resampled[1]))
    for name, value, drawn in zip(("brier", "log_loss"), scores, resampled[2:], strict=True):
        result.loc[name] = interval(float(value), drawn, level=level)
    return result


def _ece_interval(ece: float, resampled: np.ndarray, by_chance: np.ndarray, level: float) -> Interval:
    """Return the ECE with the interval that `calibration_error` describes."""
    _, low, high = interval(ece, 2 * ece - resampled, level=level)
    is_chance = ece <= interval(0.0, by_chance, level=level).high
    return Interval(ece, 0.0 if is_chance else max(low - (resampled.mean() - ece), 0.0), max(high, 0.0))

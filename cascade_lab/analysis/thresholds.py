"""Thresholds chosen on kept logits: exact, nothing is refitted."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from cascade_lab.errors import InfeasibleError, RunError
from cascade_lab.run import Run
from cascade_lab.serial import answer


@dataclass(frozen=True)
class Surface:
    """What a cascade of one or two stages does at every pair of thresholds that makes a difference.

    Attributes
    ----------
    gate : ndarray, shape (n_gate,)
        Every distinct probability of the pass label, ascending; `[0.]` where there is no gate.
    min_probability : ndarray, shape (n_min,)
        0 and every distinct highest probability of the last stage, ascending.
    in_scope_accuracy, reject_recall, accuracy : ndarray, shape (n_gate, n_min)
        The figures of `metrics.end_to_end` at `gate[i]` and `min_probability[j]`.
    """

    gate: np.ndarray
    min_probability: np.ndarray
    in_scope_accuracy: np.ndarray
    reject_recall: np.ndarray
    accuracy: np.ndarray


def surface(run: Run) -> Surface:
    """Compute every figure at every pair of thresholds from counts of the texts that are answered.

    A text is answered, rather than rejected, if it passes the gate, the last stage's highest probability reaches
    `min_probability`, and the most probable label does not itself reject.

    Raises
    ------
    RunError
        More than two stages, more than one reject label, or a run without shadow scores.
    """
    stages, rejects = run.spec.stages, run.spec.reject_labels
    if len(stages) > 2 or len(rejects) != 1:
        raise RunError(f"{run.directory}: the surface is for one or two stages with one reject label between them")
    n = len(run.examples)
    if any(len(run.scores(stage.name).rows) < n for stage in stages):
        raise RunError(f"{run.directory}: has no shadow scores; run the cascade again with them")
    y_true = run.examples["label"].to_numpy(dtype=object)
    last = stages[-1]
    p, predicted = np.empty(n), np.empty(n, dtype=object)
    scores = run.scores(last.name)
    p[scores.rows] = answer(last, scores.logits).decisive
    predicted[scores.rows] = np.array(last.labels, dtype=object)[scores.logits.argmax(axis=1)]
    p_pass = np.zeros(n)
    if len(stages) == 2:
        scores = run.scores(stages[0].name)
        p_pass[scores.rows] = answer(stages[0], scores.logits).decisive
    gate, row = np.unique(p_pass, return_inverse=True)
    minimum, column = np.unique(np.append(p, 0.0), return_inverse=True)
    column = column[:-1]

    def answered(which: np.ndarray) -> np.ndarray:
        """Count those of `which` that are answered at each pair: at or above both thresholds."""
        counts = np.zeros((len(gate), len(minimum)), dtype=np.int32)
        np.add.at(counts, (row[which], column[which]), 1)
        return counts[::-1, ::-1].cumsum(axis=0).cumsum(axis=1)[::-1, ::-1]

    out = np.isin(y_true, rejects)
    offered = ~np.isin(predicted, rejects)
    right = answered(~out & (predicted == y_true))
    slipped = answered(out & offered)
    with np.errstate(invalid="ignore"):
        return Surface(
            gate=gate,
            min_probability=minimum,
            in_scope_accuracy=right / (~out).sum(),
            reject_recall=1 - slipped / out.sum(),
            accuracy=(right + out.sum() - slipped) / n,
        )


def choose(run: Run, *, maximize: str, at_least: dict[str, float] | None = None) -> dict[str, float]:
    """Return the thresholds of `run`'s stages that do best on it.

    Parameters
    ----------
    run : Run
        Of the set to choose on, not of the one to report on.
    maximize : {"in_scope_accuracy", "reject_recall", "accuracy"}
        Of equals, the one with the highest in-scope accuracy, then the lowest thresholds.
    at_least : mapping of str to float, optional
        The least value of other figures.

    Returns
    -------
    dict
        Stage name to threshold, as `Run.replay` takes it.

    Raises
    ------
    InfeasibleError
        No pair of thresholds satisfies `at_least`.
    """
    figures = surface(run)
    allowed = np.ones_like(figures.accuracy, dtype=bool)
    for name, least in (at_least or {}).items():
        allowed &= getattr(figures, name) >= least
    if not allowed.any():
        best = {name: float(getattr(figures, name).max()) for name in at_least or {}}
        raise InfeasibleError(
            f"{run.directory}: infeasible: no thresholds give at least {at_least}; the most are {best}"
        )
    value = np.where(allowed, getattr(figures, maximize), -1.0)
    ties = np.where(value == value.max(), figures.in_scope_accuracy, -1.0)
    i, j = np.unravel_index(int(ties.argmax()), ties.shape)
    chosen = {run.spec.last.name: float(figures.min_probability[j])}
    return chosen if len(run.spec.stages) == 1 else {run.spec.stages[0].name: float(figures.gate[i]), **chosen}

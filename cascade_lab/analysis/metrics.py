"""How good a run is, per stage and end to end; undefined figures are NaN."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pandas as pd
from sklearn.metrics import average_precision_score, f1_score, roc_auc_score

from cascade_lab.run import Run
from cascade_lab.serial import answer
from cascade_lab.spec import CascadeSpec


def summarize(run: Run) -> dict[str, Any]:
    """Return what `metrics.json` holds: `n_examples`, `end_to_end` and `stages`."""
    return {
        "n_examples": len(run.examples),
        "end_to_end": end_to_end(run),
        "stages": {stage.name: of_stage(run, stage.name) for stage in run.spec.stages},
    }


def end_to_end(run: Run) -> dict[str, float]:
    """Return the cascade's figures, over all examples, as `figures_of` has them."""
    return figures_of(run.spec, run.predictions)


def figures_of(spec: CascadeSpec, predictions: pd.DataFrame) -> dict[str, float]:
    """Return a cascade's figures on its live answers, or on those of a replay.

    Returns
    -------
    dict
        `accuracy`; `macro_f1` over the labels that occur in gold or answers; `in_scope_accuracy`: the
        fraction right of those whose gold label belongs to the last stage; `reject_recall`: the fraction of
        the others that are answered with their reject label; `reject_precision`: the fraction right of the
        answers that reject.
    """
    y_true = predictions["label"].to_numpy(dtype=object)
    y_pred = predictions["predicted"].to_numpy(dtype=object)
    right = y_true == y_pred
    in_scope = np.isin(y_true, spec.in_scope_labels)
    rejected = np.isin(y_pred, spec.reject_labels)
    return {
        "accuracy": _mean(right),
        "macro_f1": float(f1_score(y_true, y_pred, average="macro", zero_division=0.0)),
        "in_scope_accuracy": _mean(right[in_scope]),
        "reject_recall": _mean(right[~in_scope]),
        "reject_precision": _mean(right[rejected]),
    }


def of_stage(run: Run, stage: str) -> dict[str, float]:
    """Return one stage's figures, over the examples that reached it (shadow scores are left out).

    Returns
    -------
    dict
        `reach`: the fraction of all examples that arrive; `n_reached`; `n_gold`: how many of those have a
        gold label at this stage (an example that an earlier gate should have stopped has none); over these
        `accuracy` and `macro_f1` of the stage's decisions, and for a gate `auroc` and `average_precision` of
        the probability of its pass label.
    """
    spec = run.spec.stage(stage)
    scores = run.scores(stage)
    arrived = ~scores.shadow
    said = answer(spec, scores.logits[arrived])
    y_true = run.gold(stage)[scores.rows[arrived]]
    known = np.array([label is not None for label in y_true], dtype=bool)
    y_pred = np.where(said.passes, spec.pass_label, said.predicted)[known]
    y_true = y_true[known]
    figures: dict[str, float] = {
        "reach": float(arrived.sum() / len(run.examples)),
        "n_reached": int(arrived.sum()),
        "n_gold": int(known.sum()),
        "accuracy": _mean(y_true == y_pred),
        "macro_f1": (float(f1_score(y_true, y_pred, average="macro", zero_division=0.0)) if len(y_true) else math.nan),
    }
    if spec.is_gate:
        should_pass = y_true == spec.pass_label
        both = len(set(should_pass)) == 2
        p_pass = said.decisive[known]
        figures["auroc"] = float(roc_auc_score(should_pass, p_pass)) if both else math.nan
        figures["average_precision"] = float(average_precision_score(should_pass, p_pass)) if both else math.nan
    return figures


def _mean(right: np.ndarray) -> float:
    return float(np.mean(right)) if len(right) else math.nan

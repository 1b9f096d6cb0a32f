"""Confidences of a run whose rejectors were fitted on it: each text's from a fit without that text."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from cascade_lab.rejector import Rejector, logit_evidence, score_of
from cascade_lab.thresholds.deferral_rules import learned_targets
from cascade_lab.thresholds.rejector import is_in_scope, out_of_fold_confidence

if TYPE_CHECKING:
    from cascade_lab.run import Run


def fitted_on_itself(run: Run) -> list[str]:
    """Return the stages whose rejector was fitted on this run, or on a run of the same eval set."""
    origin = run.manifest["evalset"]
    stages = []
    for stage in run.spec.stages:
        fitted = {} if stage.rejector is None else stage.rejector.fitted_on
        same_file = fitted.get("sha256") is not None and all(
            fitted.get(key) == origin.get(key) for key in ("sha256", "split")
        )
        if same_file or fitted.get("run_id") == run.manifest["run_id"]:
            stages.append(stage.name)
    return stages


def out_of_fold_run(run: Run, *, seed: int = 0) -> Run:
    """Return the run with each text's confidence from a fit without that text, at the stages of `fitted_on_itself`.

    The scores are those of the run's own rejectors. The folds and what is predicted are those of `fit_rejector`, and of
    `compare_deferral_rules` at a deferral stage: there a text that does not reach the stage keeps its confidence.

    Raises
    ------
    RunError
        No shadow scores, or at a deferral stage too few texts of a kind.
    """
    run, stages = run.labelled, fitted_on_itself(run)
    groups, fitted = run.text_groups, run
    for stage in run.spec.stages:
        if stage.name not in stages or stage.rejector is None:
            continue
        values = _values(run, stage.rejector)
        if stage.is_deferral:
            rows, keep = learned_targets(run, stage.name)
            confidence = run.decision(stage.name).confidence.copy()
            confidence[rows] = out_of_fold_confidence(values[rows], keep, groups[rows], seed)
        else:
            confidence = out_of_fold_confidence(values, is_in_scope(run), groups, seed)
        fitted = fitted.with_confidence(run.spec, confidence, evidence=run.evidence(run.spec), stage=stage.name)
    return fitted


def _values(run: Run, rejector: Rejector) -> np.ndarray:
    """Return the evidence of a rejector: shape (n, n_scores)."""
    logits = {stage.name: run.scores(stage.name).logits for stage in run.spec.stages}
    of_logits = [name for name in rejector.evidence if not score_of(name).of_features]
    values = logit_evidence(run.spec.stages, of_logits, logits) | dict(run.evidence(run.spec))
    return np.column_stack([values[name] for name in rejector.evidence])

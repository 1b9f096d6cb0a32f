"""Counts what each deferral stage did: right and overconfident answers, useful and needless deferrals."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import pandas as pd

from cascade_lab.analysis.errors import RECOVERABLE_ANSWER, UNRECOVERABLE_ANSWER
from cascade_lab.analysis.examples import Thresholds
from cascade_lab.decisions import require_scored, route

if TYPE_CHECKING:
    from cascade_lab.run import Run

RIGHT_ANSWER = "right answer"
USEFUL, NEEDLESS, HARMFUL, VAIN = "useful deferral", "needless deferral", "harmful deferral", "vain deferral"
DEFERRAL_KINDS = (RIGHT_ANSWER, RECOVERABLE_ANSWER, UNRECOVERABLE_ANSWER, USEFUL, NEEDLESS, HARMFUL, VAIN)


def deferrals(run: Run, *, thresholds: Thresholds = None) -> pd.DataFrame:
    """Count what each deferral stage did with the labelled texts that reached it, and whether that was good.

    Texts that an earlier gate should have stopped are counted too; `blame` puts their errors down to the gate.

    Parameters
    ----------
    run : Run
        With shadow scores of the stages after a deferral stage.
    thresholds : mapping of str to float, optional
        As for `Run.replay`.

    Returns
    -------
    DataFrame
        Seven rows per deferral stage: `stage`; `kind`; `n_examples`; `fraction`, of the texts that reached the stage.
        The kinds of an answer are

        - *right answer*;
        - *recoverable overconfident answer*: wrong, and the stages after it would have been right;
        - *unrecoverable overconfident answer*: wrong, and they would have been wrong too.

        The kinds of a deferral are, from the stage's most probable label and the cascade's answer,

        - *useful deferral*: the label is wrong, and the answer right;
        - *needless deferral*: both are right. It costs time, and is no error;
        - *harmful deferral*: the label is right, and the answer wrong;
        - *vain deferral*: both are wrong.

    Raises
    ------
    RunError
        An answer of a deferral stage has no shadow scores of the stages after it.
    """
    run = run.labelled.with_thresholds(thresholds)
    y_true = run.examples["label"].to_numpy(dtype=object)
    decisions = {stage.name: run.decision(stage.name) for stage in run.spec.stages}
    routed = route(run.spec, decisions)
    rows: list[tuple[str, str, int, float]] = []
    for stage in run.spec.stages:
        if not stage.is_deferral:
            continue
        reached = np.flatnonzero(routed.reached[stage.name])
        own, label = decisions[stage.name].take(reached), y_true[reached]
        taken = {name: decision.take(reached) for name, decision in decisions.items()}
        deferred = require_scored(route(run.spec, taken, force={stage.name: False}), run.name)
        own_right, later_right = own.label_above == label, deferred.predicted == label
        of_answer = np.where(own_right, 0, np.where(later_right, 1, 2))
        of_deferral = np.where(later_right, np.where(own_right, 4, 3), np.where(own_right, 5, 6))
        codes = np.where(own.ends, of_answer, of_deferral)
        for kind, count in zip(DEFERRAL_KINDS, np.bincount(codes, minlength=len(DEFERRAL_KINDS)), strict=True):
            rows.append((stage.name, kind, int(count), count / len(reached) if len(reached) else np.nan))
    return pd.DataFrame(rows, columns=["stage", "kind", "n_examples", "fraction"])

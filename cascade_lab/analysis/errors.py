"""Which stage causes each error, and how much better the cascade would be if a stage made no mistakes.

Everything is computed from kept logits; no model runs. Every function takes `thresholds`, like `Run.replay`, to look at
the same run at other thresholds. What a stage should have decided follows from the final label of an example alone:
columns `<stage>_label` are not used here. Examples without a label are left out.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import pandas as pd

from cascade_lab.analysis.bootstrap import fraction_interval
from cascade_lab.analysis.classification import confusion_matrix_frame
from cascade_lab.analysis.examples import Thresholds, with_texts
from cascade_lab.analysis.outcomes import (
    FALSE_ACCEPT,
    FALSE_REJECT,
    RIGHT,
    RIGHT_REJECT,
    WRONG_CLASS,
    WRONG_REJECT,
    outcomes,
)
from cascade_lab.by_block import by_block
from cascade_lab.calibrator import calibrated_logits
from cascade_lab.decisions import StageDecision, missing_scores_error, require_scored, route, stage_targets
from cascade_lab.exceptions import RunError

if TYPE_CHECKING:
    from cascade_lab.run import Run
    from cascade_lab.spec import CascadeSpec, StageSpec

RECOVERABLE, UNRECOVERABLE = "recoverable reject", "unrecoverable reject"
RECOVERABLE_ANSWER, UNRECOVERABLE_ANSWER = "recoverable overconfident answer", "unrecoverable overconfident answer"
KINDS = (
    RECOVERABLE,
    UNRECOVERABLE,
    RECOVERABLE_ANSWER,
    UNRECOVERABLE_ANSWER,
    FALSE_ACCEPT,
    WRONG_CLASS,
    WRONG_REJECT,
)
GOES_ON = "goes on"
_RULE = "perfect rule of "


def blame(run: Run, *, thresholds: Thresholds = None) -> pd.DataFrame:
    """Return the errors of a run, each with the stage at fault: one row per error, in the order of the examples.

    The stage at fault is the first one that decided wrongly. A gate decides rightly if it stops a text whose label is
    one of its own reject labels, with that label, and passes every other text. A deferral stage decides wrongly if it
    answers wrongly; to defer is never a fault (`deferrals` counts what it costs).

    Parameters
    ----------
    run : Run
    thresholds : mapping of str to float, optional
        As for `Run.replay`.

    Returns
    -------
    DataFrame
        `example_id`, `text` (and `text_b`, if the run has any), `label`, `predicted`, `decided_by`, `probability`,
        `confidence`; `fault`, a stage; and `kind`, one of `KINDS`:

        - *recoverable reject*: in scope and rejected, and the last stage's most probable label is right: that is the
          answer if every threshold (and minimum probability) is 0. Or a deferral stage's most probable label is right;
        - *unrecoverable reject*: in scope and rejected, and these are wrong: no thresholds give the right answer;
        - *recoverable overconfident answer*: a deferral stage is at fault, and the stages after it would have been
          right;
        - *unrecoverable overconfident answer*: a deferral stage is at fault, and they would have been wrong too;
        - *false accept*: out of scope, but the cascade answered with a class;
        - *wrong class*: in scope, but the cascade answered with another class;
        - *wrong reject*: out of scope, but rejected with the label of another stage.

        `would_become` is the cascade's answer if the stage at fault had decided the other way: passed what it stopped,
        stopped what it passed, deferred what it answered, or (the last stage) answered with its next choice. The other
        stages decide as before, so it can be wrong for a recoverable reject, which a later stage rejects again.
        `missed_by` is the deciding stage where it is not at fault but could still have given the right answer;
        otherwise missing.

    Raises
    ------
    RunError
        No example has a label, or an error has no shadow scores.
    """
    run = run.labelled.with_thresholds(thresholds)
    spec, predictions = run.spec, run.predictions
    decisions = _decisions(run)
    y_true, predicted = (predictions[column].to_numpy(dtype=object) for column in ("label", "predicted"))
    names = np.array(list(decisions), dtype=object)
    decided_at = pd.Index(names).get_indexer(predictions["decided_by"])
    kind = outcomes(spec, y_true, predicted)
    wrong, fault = y_true != predicted, np.full(len(y_true), -1)
    missed_by, would_become = np.full((2, len(y_true)), None, dtype=object)
    for index, stage in enumerate(spec.stages):
        target = stage_targets(spec, stage.name, y_true, assume_reached=True)
        decision = decisions[stage.name]
        missed_by[wrong & (decided_at == index) & (fault >= 0) & (target == y_true)] = stage.name
        at_fault = wrong & (fault < 0) & (decided_at >= index) & (decision.label != target)
        if stage.is_deferral:
            at_fault &= decided_at == index
            rows = np.flatnonzero(at_fault)
            fault[rows] = index
            would_become[rows] = _answers_if(run, stage.name, decisions, rows, above=False)
            kind[rows] = np.where(would_become[rows] == y_true[rows], RECOVERABLE_ANSWER, UNRECOVERABLE_ANSWER)
            continue
        fault[at_fault] = index
        passed = at_fault & (decided_at > index)
        should_pass = at_fault & (decided_at == index) & stage.is_gate & (target == stage.pass_label)
        other_choice = at_fault & ~passed & ~should_pass
        would_become[passed] = decision.label_below[passed]
        would_become[should_pass] = _answers_if(run, stage.name, decisions, np.flatnonzero(should_pass), above=True)
        would_become[other_choice] = _next_choice(run, stage, np.flatnonzero(other_choice), predicted)
        if not stage.is_gate:
            would_become[other_choice & (kind == FALSE_ACCEPT)] = stage.reject_label
    # An answer in scope is the most probable label of the last stage or of a deferral stage, whatever the thresholds.
    is_recoverable = np.zeros(len(y_true), dtype=bool)
    for stage in spec.stages:
        if not stage.is_gate:
            unknown = (kind == FALSE_REJECT) & ~decisions[stage.name].scored
            if unknown.any():
                raise missing_scores_error(run.name, stage.name, int(unknown.sum()))
            is_recoverable |= decisions[stage.name].label_above == y_true
    kind = np.where(kind == FALSE_REJECT, np.where(is_recoverable, RECOVERABLE, UNRECOVERABLE), kind)
    columns = {"fault": names[fault], "kind": kind, "would_become": would_become, "missed_by": missed_by}
    return with_texts(run, predictions).assign(**columns)[wrong].reset_index(drop=True)


def blame_counts(run: Run, *, thresholds: Thresholds = None) -> pd.DataFrame:
    """Count the errors of `blame` by stage at fault and kind.

    Returns
    -------
    DataFrame
        Indexed by `fault` and `kind`, in the order of the cascade and of `KINDS`, without those that do not occur:
        `n_examples`, and the fractions `of_errors` and `of_all` (labelled) texts.
    """
    table = blame(run, thresholds=thresholds)
    order = {"fault": [stage.name for stage in run.spec.stages], "kind": KINDS}
    table = table.astype({column: pd.CategoricalDtype(values, ordered=True) for column, values in order.items()})
    counts = table.groupby(list(order), observed=True).size().rename("n_examples").to_frame()
    counts["of_errors"] = counts["n_examples"] / len(table)
    counts["of_all"] = counts["n_examples"] / len(run.labelled.examples)
    return counts


def flow(run: Run, *, thresholds: Thresholds = None) -> pd.DataFrame:
    """Return where the texts leave the cascade and with which outcome; `OutcomeFlowDisplay` draws it.

    Returns
    -------
    DataFrame
        One row for each way in which texts leave a stage, in the order of the cascade: `stage`; `outcome`, which is
        *goes on* (to the next stage), *right*, *right reject* or one of `KINDS`; `fault`, the stage at fault for an
        error, otherwise missing; `n_examples`; and `fraction`, of all (labelled) texts.
    """
    run = run.labelled.with_thresholds(thresholds)
    errors = blame(run)[["example_id", "fault", "kind"]]
    table = run.predictions.merge(errors, on="example_id", how="left", validate="one_to_one")
    outcome = outcomes(run.spec, table["label"], table["predicted"])
    table["outcome"] = table["kind"].where(table["kind"].notna(), outcome)
    names = [stage.name for stage in run.spec.stages]
    n_going = len(table)
    rows: list[tuple[str, str, str | None, int]] = []
    for name in names:
        ends = table[table["decided_by"] == name]
        n_going -= len(ends)
        if name != names[-1]:
            rows.append((name, GOES_ON, None, n_going))
        rows += [(name, right, None, int((ends["outcome"] == right).sum())) for right in (RIGHT, RIGHT_REJECT)]
        for kind in KINDS:
            faults = ends.loc[ends["outcome"] == kind, "fault"]
            rows += [(name, kind, fault, int((faults == fault).sum())) for fault in names]
    result = pd.DataFrame(rows, columns=["stage", "outcome", "fault", "n_examples"])
    result["fraction"] = result["n_examples"] / len(table)
    return result[(result["n_examples"] > 0) | (result["outcome"] == GOES_ON)].reset_index(drop=True)


def oracle_ladder(run: Run, *, thresholds: Thresholds = None, level: float = 0.95) -> pd.DataFrame:
    """Return how good the cascade would be if one stage, or every stage, made no mistake.

    A perfect stage decides about every text that arrives so that it can still get its true label: with the label
    itself, where the stage can answer with it (`reject_label` included); otherwise it passes or defers the text. A
    deferral stage with a *perfect rule* keeps its own labels, and answers exactly where its label is right. The other
    stages decide as before.

    Returns
    -------
    DataFrame
        One row per cascade: *as it is*; *perfect <stage>* for each stage; *perfect rule of <stage>* for each deferral
        stage; with several gates also *perfect gates*; and *all perfect*. `accuracy`, `in_scope_accuracy` and
        `reject_recall` as fractions, and `points`, the gain in accuracy in percentage points; each with `_low` and
        `_high`, its interval at `level` (Wilson).

    Raises
    ------
    RunError
        No example has a label, or a text that a perfect stage would pass or defer has no shadow scores.
    """
    run = run.labelled.with_thresholds(thresholds)
    spec = run.spec
    y_true = run.examples["label"].to_numpy(dtype=object)
    decisions = _decisions(run)
    perfect = {stage.name: _perfect(spec, stage, decisions[stage.name], y_true) for stage in spec.stages}
    gates = [stage.name for stage in spec.stages if stage.is_gate]
    rungs: dict[str, list[str]] = {"as it is": [], **{f"perfect {name}": [name] for name in decisions}}
    for stage in spec.stages:
        if stage.is_deferral:  # the same decisions, and another rule
            rule = _RULE + stage.name
            perfect[rule] = decisions[stage.name], decisions[stage.name].label_above == y_true
            rungs[rule] = [rule]
    if len(gates) > 1:
        rungs["perfect gates"] = gates
    if len(spec.stages) > 1:
        rungs["all perfect"] = list(decisions)
    groups = run.text_groups
    in_scope, everything = pd.Index(y_true).isin(spec.in_scope_labels), np.ones(len(y_true), dtype=bool)
    right_now = y_true == run.predictions["predicted"].to_numpy(dtype=object)
    rows = []
    for stages in rungs.values():
        routed = route(
            spec,
            decisions | {name.removeprefix(_RULE): perfect[name][0] for name in stages},
            force={name.removeprefix(_RULE): perfect[name][1] for name in stages},
        )
        right = require_scored(routed, run.name).predicted == y_true
        # A right answer stays right when a stage becomes perfect, so the gain is the newly right answers.
        fractions = {
            "accuracy": (right, everything, 1),
            "in_scope_accuracy": (right, in_scope, 1),
            "reject_recall": (right, ~in_scope, 1),
            "points": (right & ~right_now, everything, 100),
        }
        row: dict[str, float] = {}
        for name, (hits, of, unit) in fractions.items():
            value, low, high = fraction_interval(hits, of, groups=groups, level=level)
            row |= {name: unit * value, f"{name}_low": unit * low, f"{name}_high": unit * high}
        rows.append(row)
    return pd.DataFrame(rows, index=pd.Index(rungs, name="cascade"))


class CounterfactualMatrix(NamedTuple):
    """Two confusion matrices that add up to the matrix of the cascade with the gates in question open.

    Attributes
    ----------
    live : DataFrame of int, shape (n_labels, n_labels)
        The texts that these gates did not stop: true labels in rows, the cascade's answers in columns.
    counterfactual : DataFrame of int, shape (n_labels, n_labels)
        The texts that these gates stopped: true labels in rows; in columns the answers that the cascade would have
        given if the gates had passed them.
    """

    live: pd.DataFrame
    counterfactual: pd.DataFrame


def counterfactual_matrix(run: Run, stage: str | None = None, *, thresholds: Thresholds = None) -> CounterfactualMatrix:
    """Return what the cascade would have answered to the texts that its gates stopped, if it had passed them.

    Parameters
    ----------
    run : Run
    stage : str, optional
        The gate that passes every text, while the other gates decide as before; by default, every gate.
    thresholds : mapping of str to float, optional
        As for `Run.replay`.

    Raises
    ------
    RunError
        The stage is not a gate, no example has a label, or a stopped text has no shadow scores.
    SpecError
        No such stage.
    """
    spec = run.spec
    if stage is not None and not spec.stage(stage).is_gate:
        which = "defers texts" if spec.stage(stage).is_deferral else "is the last one"
        raise RunError(f"{run.name}: stage '{stage}' {which}, and stops no text; name a gate")
    gates = [s.name for s in spec.stages if s.is_gate] if stage is None else [stage]
    run = run.labelled.with_thresholds(thresholds)
    routed = require_scored(route(run.spec, _decisions(run), force=dict.fromkeys(gates, True)), run.name)
    y_true = run.examples["label"].to_numpy(dtype=object)
    stopped = run.predictions["decided_by"].isin(gates).to_numpy()
    live, counterfactual = (
        confusion_matrix_frame(y_true[rows], routed.predicted[rows], spec.labels) for rows in (~stopped, stopped)
    )
    return CounterfactualMatrix(live, counterfactual)


def _decisions(run: Run) -> dict[str, StageDecision]:
    return {stage.name: run.decision(stage.name) for stage in run.spec.stages}


def _perfect(
    spec: CascadeSpec, stage: StageSpec, decision: StageDecision, y_true: np.ndarray
) -> tuple[StageDecision, np.ndarray]:
    """Return a stage's decisions without mistakes, and whether each is above the threshold: bool, shape (n,).

    Where the stage has no right decision, it decides as before.
    """
    target = stage_targets(spec, stage.name, y_true, assume_reached=True)
    has_target = pd.notna(target)
    if stage.is_deferral:
        later = spec.stages[[s.name for s in spec.stages].index(stage.name) + 1 :]
        of_later = pd.Index(y_true).isin([label for s in later for label in (*s.labels, *s.reject_labels)])
        answer = np.where(has_target, target, decision.label_above)
        corrected = decision._replace(scored=decision.scored | has_target, label_above=answer)
        return corrected, np.where(has_target | of_later, has_target, decision.above)
    above = np.where(has_target & stage.is_gate, target == stage.pass_label, decision.above)
    answer = np.where(has_target & (target != stage.pass_label), target, decision.label_below)
    corrected = decision._replace(scored=decision.scored | has_target, label_below=answer)
    if not stage.is_gate:
        corrected = corrected._replace(label_above=np.where(has_target, target, decision.label_above))
    return corrected, above


def _answers_if(
    run: Run, stage: str, decisions: dict[str, StageDecision], rows: np.ndarray, *, above: bool
) -> np.ndarray:
    """Return the cascade's answers to the examples at `rows` if `stage` decided as above or as below its threshold."""
    if not len(rows):
        return np.empty(0, dtype=object)
    taken = {name: decision.take(rows) for name, decision in decisions.items()}
    return require_scored(route(run.spec, taken, force={stage: above}), run.name).predicted


def _next_choice(run: Run, stage: StageSpec, rows: np.ndarray, predicted: np.ndarray) -> np.ndarray:
    """Return the stage's most probable label for the examples at `rows`, other than its answer and its pass label."""
    own = pd.Index(stage.labels).get_indexer(predicted[rows])

    def of_block(rows: np.ndarray, own: np.ndarray) -> tuple[np.ndarray]:
        logits = calibrated_logits(stage, run.scores(stage.name).logits[rows])
        logits[np.flatnonzero(own >= 0), own[own >= 0]] = -np.inf
        if stage.is_gate:
            logits[:, stage.labels.index(str(stage.pass_label))] = -np.inf
        return (logits.argmax(axis=1),)

    (best,) = by_block(of_block, rows, own, n_columns=len(stage.labels))
    return np.array(stage.labels, dtype=object)[best]

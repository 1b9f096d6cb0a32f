"""Whose fault the errors are, and what mending each stage would be worth: counted on kept logits, never rerun.

Every function takes `thresholds`, as `Run.replay` does, to look at the same run under others. The truth is an example's
final label alone: what a stage should have said follows from it, and `<stage>_label` columns play no part here.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import numpy as np
import pandas as pd

from cascade_lab.analysis.bootstrap import N_RESAMPLES, fraction_interval
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
from cascade_lab.errors import RunError
from cascade_lab.run import Run
from cascade_lab.serial import answer
from cascade_lab.spec import CascadeSpec, StageSpec

RECOVERABLE, DOOMED = "recoverable reject", "doomed reject"
KINDS = (RECOVERABLE, DOOMED, FALSE_ACCEPT, WRONG_CLASS, WRONG_REJECT)
GOES_ON = "goes on"


def blame(run: Run, *, thresholds: Thresholds = None) -> pd.DataFrame:
    """Return the errors of a run, each with the stage at fault: an error a row, in the order of the examples.

    At fault is the first stage on a text's way that said something else than it should have. A gate should stop a
    text whose label is one of its own reject labels, with that label, and pass any other.

    Parameters
    ----------
    run : Run
    thresholds : mapping of str to float, optional
        As for `Run.replay`.

    Returns
    -------
    DataFrame
        `example_id`, `text` (and `text_b`, where there is any), `label`, `predicted`, `decided_by`, `probability`;
        `fault`, a stage; `kind`, of `KINDS`:

        - *recoverable reject*: in scope and rejected; the later stages, or the last one's most probable label, would
          have been right. *doomed reject*: they would have been wrong too;
        - *false accept*: out of scope, answered with a class; *wrong class*: in scope, answered with another;
        - *wrong reject*: out of scope, rejected with the label of another stage or class;

        `would_become`, the cascade's answer had the stage at fault decided the other way: passed on what it stopped,
        stopped what it passed on, or, where answering was its task, answered with its next choice; `missed_by`, the
        deciding stage, where it is not at fault but could still have answered rightly; missing otherwise.

    Raises
    ------
    RunError
        A text in question has no shadow scores.
    """
    spec, said, answers = _served(run, thresholds)
    y_true, predicted = (answers[key].to_numpy(dtype=object) for key in ("label", "predicted"))
    place = answers["decided_by"].map([stage.name for stage in spec.stages].index).to_numpy(dtype=int)
    kind = outcomes(spec, y_true, predicted)
    wrong, fault = y_true != predicted, np.full(len(answers), -1)
    missed, becomes = np.full((2, len(answers)), None, dtype=object)
    for k, stage in enumerate(spec.stages):
        should = should_say(spec, stage.name, y_true)
        did = np.where(place > k, stage.pass_label, predicted)
        here = wrong & (fault < 0) & (place >= k) & (did != should)
        missed[wrong & (place == k) & (fault >= 0) & (should == y_true)] = stage.name
        fault[here] = k
        stopped = here & (place == k) & stage.is_gate & (should == stage.pass_label)
        if stopped.any():
            onward = _walk(spec, said | {stage.name: said[stage.name]._replace(passes=np.ones_like(wrong))})
            _check_known(run, onward[stopped])
            becomes[stopped] = onward[stopped]
        passed = here & (place > k)
        becomes[passed] = said[stage.name].predicted[passed]
        chose = here & ~stopped & ~passed
        becomes[chose] = _next_choice(run, stage, chose, predicted)
        if not stage.is_gate:
            accepted = chose & (kind == FALSE_ACCEPT)
            becomes[accepted] = stage.reject_label
    kind = np.where(kind == FALSE_REJECT, np.where(becomes == y_true, RECOVERABLE, DOOMED), kind)
    names = np.array([stage.name for stage in spec.stages], dtype=object)
    table = with_texts(run, answers).assign(fault=names[fault], kind=kind, would_become=becomes, missed_by=missed)
    return table[wrong].reset_index(drop=True)


def blame_counts(run: Run, *, thresholds: Thresholds = None) -> pd.DataFrame:
    """Count `blame` by stage at fault and kind.

    Returns
    -------
    DataFrame
        Indexed by `fault` and `kind`, in the order of the cascade and of `KINDS`, without those that do not occur:
        `n_examples`, `of_errors` and `of_all`, as fractions.
    """
    table = blame(run, thresholds=thresholds)
    order = {"fault": [stage.name for stage in run.spec.stages], "kind": KINDS}
    table = table.astype({key: pd.CategoricalDtype(values, ordered=True) for key, values in order.items()})
    counts = table.groupby(list(order), observed=True).size().rename("n_examples").to_frame()
    counts["of_errors"] = counts["n_examples"] / len(table)
    counts["of_all"] = counts["n_examples"] / len(run.examples)
    return counts


def flow(run: Run, *, thresholds: Thresholds = None) -> pd.DataFrame:
    """Return what becomes of all texts, stage by stage: what `OutcomeFlowDisplay` draws.

    Returns
    -------
    DataFrame
        A row for each way that texts leave a stage, in the order of the cascade: `stage`; `outcome`, *goes on* (to the
        next stage), *right*, *right reject* or one of `KINDS`; `fault`, the stage whose fault an error is, missing
        otherwise; `n_examples`; `fraction`, of all texts.
    """
    answers = run.replay(thresholds)
    wrong = blame(run, thresholds=thresholds)[["example_id", "fault", "kind"]]
    table = answers.merge(wrong, on="example_id", how="left", validate="one_to_one")
    right = outcomes(run.spec, table["label"], table["predicted"])
    table["outcome"] = table["kind"].where(table["kind"].notna(), right)
    names = [stage.name for stage in run.spec.stages]
    going, rows = len(table), []
    for name in names:
        ends = table[table["decided_by"] == name]
        going -= len(ends)
        if name != names[-1]:
            rows.append((name, GOES_ON, None, going))
        for outcome in (RIGHT, RIGHT_REJECT, *KINDS):
            found = ends[ends["outcome"] == outcome]
            if outcome in KINDS:
                rows += [(name, outcome, fault, int((found["fault"] == fault).sum())) for fault in names]
            else:
                rows.append((name, outcome, None, len(found)))
    result = pd.DataFrame(rows, columns=["stage", "outcome", "fault", "n_examples"])
    result["fraction"] = result["n_examples"] / len(table)
    return result[(result["n_examples"] > 0) | (result["outcome"] == GOES_ON)].reset_index(drop=True)


def oracle_ladder(
    run: Run, *, thresholds: Thresholds = None, level: float = 0.95, n_resamples: int = N_RESAMPLES, seed: int = 0
) -> pd.DataFrame:
    """Return how good the cascade would be if one stage, or all, made no mistake, and the points that is worth.

    A perfect stage says to every text that arrives what can still lead to its label: the label itself, where it is an
    answer of that stage (`reject_label` included), or else the pass label. The others do as they did.

    Returns
    -------
    DataFrame
        A row a cascade: *as it is*; *perfect <stage>* for each stage; with several gates also *perfect gates*; and *all
        perfect*. `accuracy`, `in_scope_accuracy` and `reject_recall` as fractions, and `points`, what it gains in
        accuracy, in percentage points; each with `_low` and `_high`, its bootstrap interval at `level`.

    Raises
    ------
    RunError
        A text that a perfect gate would pass on has no shadow scores.
    """
    spec, said, answers = _served(run, thresholds)
    y_true = answers["label"].to_numpy(dtype=object)
    perfect = {s.name: said[s.name].saying(should_say(spec, s.name, y_true), s.pass_label) for s in spec.stages}
    gates = [stage.name for stage in spec.stages if stage.is_gate]
    rungs: dict[str, list[str]] = {"as it is": [], **{f"perfect {stage.name}": [stage.name] for stage in spec.stages}}
    if len(gates) > 1:
        rungs["perfect gates"] = gates
    if gates:
        rungs["all perfect"] = list(perfect)
    in_scope = np.isin(y_true, spec.in_scope_labels)
    every = np.ones(len(y_true), dtype=bool)
    real = y_true == answers["predicted"].to_numpy(dtype=object)
    rows = []
    for names in rungs.values():
        predicted = _walk(spec, said | {name: perfect[name] for name in names})
        _check_known(run, predicted)
        right = predicted == y_true
        # What is right already stays right, so that gains are all there is.
        hits = [("accuracy", right, every), ("in_scope_accuracy", right, in_scope), ("reject_recall", right, ~in_scope)]
        row = {}
        for name, hit, of, unit in [*((*h, 1) for h in hits), ("points", right & ~real, every, 100)]:
            found = fraction_interval(hit, of, level=level, n_resamples=n_resamples, seed=seed)
            row |= {name: unit * found.value, f"{name}_low": unit * found.low, f"{name}_high": unit * found.high}
        rows.append(row)
    return pd.DataFrame(rows, index=pd.Index(rungs, name="cascade"))


class Ghosts(NamedTuple):
    """Two matrices, gold labels in rows and answers in columns, which add up to that of the cascade with open gates.

    Attributes
    ----------
    live : DataFrame of int, shape (n_labels, n_labels)
        The texts that the gates in question did not stop, and their real answers.
    ghost : DataFrame of int, shape (n_labels, n_labels)
        The texts that they stopped, and the answers that these would have been given had they gone on.
    """

    live: pd.DataFrame
    ghost: pd.DataFrame


def ghost_matrix(run: Run, stage: str | None = None, *, thresholds: Thresholds = None) -> Ghosts:
    """Return what the rejected texts would have become, had they gone on.

    Parameters
    ----------
    run : Run
    stage : str, optional
        The gate that is to let its texts go on, the other gates doing as they do; by default, every gate.
    thresholds : mapping of str to float, optional
        As for `Run.replay`.

    Raises
    ------
    RunError
        The stage is no gate, or a text that was stopped has no shadow scores.
    SpecError
        No such stage.
    """
    spec = run.spec
    if stage is not None and not spec.stage(stage).is_gate:
        raise RunError(f"{run.directory}: stage '{stage}' is the last one, and stops nothing; name a gate")
    gates = [s.name for s in spec.stages if s.is_gate] if stage is None else [stage]
    answers = run.replay(thresholds)
    # Every probability reaches a threshold of 0.
    opened = run.replay({**(thresholds or {}), **dict.fromkeys(gates, 0.0)})
    stopped = answers["decided_by"].isin(gates)
    return Ghosts(_matrix(spec, opened[~stopped]), _matrix(spec, opened[stopped]))


def should_say(spec: CascadeSpec, stage: str, y_true: np.ndarray) -> np.ndarray:
    """Return what a stage should say to a text that has come to it: shape (n,), None where nothing can be right.

    Unlike `serial.gold`, it has a word for a text that an earlier gate should have stopped: the label, where this
    stage can still answer with it, or the pass label, where a later one can.
    """
    place = [s.name for s in spec.stages].index(stage)
    here = spec.stages[place]
    own = set(here.reject_labels if here.is_gate else (*here.labels, *here.reject_labels))
    later = {label for s in spec.stages[place + 1 :] for label in (*s.labels, *s.reject_labels)}
    words = {label: label if label in own else here.pass_label if label in later else None for label in set(y_true)}
    return np.array([words[label] for label in y_true], dtype=object)


class _Said(NamedTuple):
    """What a stage says of every example: whether it is known, whether it passes, the answer if it ends here."""

    known: np.ndarray
    passes: np.ndarray
    predicted: np.ndarray

    def saying(self, words: np.ndarray, pass_label: str | None) -> _Said:
        """Say `words`, where they are not None."""
        has = pd.notna(words)
        return _Said(
            self.known | has, np.where(has, words == pass_label, self.passes), np.where(has, words, self.predicted)
        )


def _served(run: Run, thresholds: Thresholds) -> tuple[CascadeSpec, dict[str, _Said], pd.DataFrame]:
    spec = run.spec.with_thresholds(thresholds or {})
    said = {}
    for stage in spec.stages:
        scores, n = run.scores(stage.name), len(run.examples)
        found = answer(stage, scores.logits)
        blank = _Said(np.zeros(n, dtype=bool), np.zeros(n, dtype=bool), np.full(n, None, dtype=object))
        blank.known[scores.rows], blank.passes[scores.rows] = True, found.passes
        blank.predicted[scores.rows] = found.predicted
        said[stage.name] = blank
    return spec, said, run.replay(thresholds)


def _walk(spec: CascadeSpec, said: Mapping[str, _Said]) -> np.ndarray:
    """Return the cascade's answers, shape (n,), None where a text comes to a stage that never scored it."""
    predicted = np.full(len(said[spec.last.name].passes), None, dtype=object)
    going = np.ones(len(predicted), dtype=bool)
    for stage in spec.stages:
        known, passes, words = said[stage.name]
        going = going & known
        ends = going & ~passes
        predicted[ends] = words[ends]
        going = going & passes
    return predicted


def _check_known(run: Run, predicted: np.ndarray) -> None:
    unknown = int(pd.isna(predicted).sum())
    if unknown:
        raise RunError(
            f"{run.directory}: {unknown} examples that a gate stopped would go on to a stage that never scored them; "
            "run the cascade again with shadow scores"
        )


def _next_choice(run: Run, stage: StageSpec, rows: np.ndarray, predicted: np.ndarray) -> np.ndarray:
    """Return the stage's most probable label for `rows` (bool, all scored), but for its answer and its pass label."""
    scores = run.scores(stage.name)
    order = np.flatnonzero(rows[scores.rows])
    logits = scores.logits[order].copy()
    for column, label in enumerate(stage.labels):
        logits[(predicted[scores.rows[order]] == label) | (label == stage.pass_label), column] = -np.inf
    found = np.full(len(rows), None, dtype=object)
    found[scores.rows[order]] = np.array(stage.labels, dtype=object)[logits.argmax(axis=1)]
    return found[rows]


def _matrix(spec: CascadeSpec, answers: pd.DataFrame) -> pd.DataFrame:
    labels = list(spec.labels)
    counts = pd.crosstab(answers["label"], answers["predicted"])
    return counts.reindex(index=labels, columns=labels, fill_value=0).rename_axis(index="gold", columns="answer")

"""The cascade as arithmetic: what each stage decides from its logits, and where each text leaves the cascade.

`route` is the only walk through the stages. Live runs, replay, latency measurements, error analysis, threshold search
and the explorer all call it, so they cannot disagree.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import NamedTuple

import numpy as np
import pandas as pd

from cascade_lab.by_block import by_block
from cascade_lab.calibrator import calibrated_logits
from cascade_lab.exceptions import EvalSetError, RunError
from cascade_lab.rejector import logit_evidence, score_of
from cascade_lab.spec import CascadeSpec, StageSpec


class Role(NamedTuple):
    """What happens to a text whose confidence is above (or equal to) a stage's threshold, and to one below it."""

    ends_above: bool
    ends_below: bool


ROLES = {
    "gate": Role(ends_above=False, ends_below=True),
    "deferral": Role(ends_above=True, ends_below=False),
    "final": Role(ends_above=True, ends_below=True),
}
"""The roles of a stage. A text that does not end at a stage goes on to the next one."""


class StageDecision(NamedTuple):
    """What one stage decides about `n` examples.

    Attributes
    ----------
    scored : ndarray of bool, shape (n,)
        The stage has logits for the example. Where it has none, the other values mean nothing.
    confidence : ndarray of float64, shape (n,)
        The number in [0, 1] that is compared with the threshold: a gate's probability of its pass label; of another
        stage the highest probability, or what its rejector computes. NaN where not scored.
    threshold : ndarray of float64, shape (n,)
        The threshold of each example; a tie counts as above.
    label_above, label_below : ndarray of str, shape (n,)
        The stage's label at or above the threshold, and below it. A gate: its pass label, and its most probable other
        label. A deferral stage: its most probable label, in both. The last stage: its most probable label, and its
        reject label (the same label if it cannot reject).
    probability : ndarray of float64, shape (n,)
        The probability reported with the stage's answer: of a gate's most probable other label; another stage's
        highest, also where it rejects.
    role : str
        A key of `ROLES`.
    """

    scored: np.ndarray
    confidence: np.ndarray
    threshold: np.ndarray
    label_above: np.ndarray
    label_below: np.ndarray
    probability: np.ndarray
    role: str

    @property
    def above(self) -> np.ndarray:
        """Whether the confidence reaches the threshold: bool, shape (n,)."""
        return self.confidence >= self.threshold

    @property
    def ends(self) -> np.ndarray:
        """Whether the example leaves the cascade at this stage: bool, shape (n,). False where not scored."""
        return np.where(self.above, *ROLES[self.role]) & self.scored

    @property
    def label(self) -> np.ndarray:
        """The stage's decision as one of its labels: shape (n,). A gate that passes a text on has its pass label."""
        return np.where(self.above, self.label_above, self.label_below)

    @property
    def stage_probability(self) -> np.ndarray:
        """The probability that a table shows for the stage: a gate's of its pass label, another stage's highest."""
        return self.confidence if self.role == "gate" else self.probability

    def take(self, rows: np.ndarray) -> StageDecision:
        """Return the decisions about some rows."""
        return StageDecision(
            self.scored[rows],
            self.confidence[rows],
            self.threshold[rows],
            self.label_above[rows],
            self.label_below[rows],
            self.probability[rows],
            self.role,
        )

    def with_threshold(self, stage: StageSpec) -> StageDecision:
        """Return the same stage's decisions at the thresholds of `stage`; its labels and temperature are unchanged."""
        threshold = _thresholds(stage, self.label_above)
        if stage.role != "final":
            return self._replace(threshold=threshold)
        below = self.label_above
        if stage.reject_label is not None:
            below = repeated(stage.reject_label, len(below))
        return self._replace(threshold=threshold, label_below=below)


class RoutingResult(NamedTuple):
    """The way of `n` examples through a cascade.

    Attributes
    ----------
    predicted, decided_by : ndarray of str, shape (n,)
        The cascade's answer, and the stage that gave it. None where the example reached a stage that never scored it.
    stage_index : ndarray of int, shape (n,)
        The place of the deciding stage in the cascade; -1 where it is unknown.
    probability, confidence : ndarray of float64, shape (n,)
        Those of the deciding stage, as `StageDecision` defines them; NaN where it is unknown.
    reached : dict of str to ndarray of bool, shape (n,)
        Stage name to the examples that reached it.
    """

    predicted: np.ndarray
    decided_by: np.ndarray
    stage_index: np.ndarray
    probability: np.ndarray
    confidence: np.ndarray
    reached: dict[str, np.ndarray]

    def frame(self) -> pd.DataFrame:
        """Return `predicted`, `decided_by`, `probability` and `confidence`, one row per example."""
        columns = ("predicted", "decided_by", "probability", "confidence")
        return pd.DataFrame({name: getattr(self, name) for name in columns})


Outputs = Mapping[str, StageDecision] | Callable[[StageSpec, np.ndarray], StageDecision]
"""The decisions of each stage about all examples; or a function that decides about the rows that reach a stage."""


def softmax(logits: np.ndarray, temperature: float = 1.0) -> np.ndarray:
    """Return the softmax of `logits / temperature`, shape (n, n_labels), in float64.

    A row with NaN or with positive infinity gives NaN.

    >>> softmax(np.array([[0.0, 0.0], [0.0, np.log(3.0)]]))
    array([[0.5 , 0.5 ],
           [0.25, 0.75]])
    """
    p = np.array(logits, dtype=np.float64)
    with np.errstate(over="ignore", invalid="ignore"):
        # In place: large runs need no further arrays of this size. The difference comes first, and is at most 0: at the
        # smallest temperature its quotient becomes minus infinity, of which the exponential is 0.
        p -= p.max(axis=1, keepdims=True)
        p /= temperature
        np.exp(p, out=p)
        p /= p.sum(axis=1, keepdims=True)
    return p


def probabilities(stage: StageSpec, logits: np.ndarray) -> np.ndarray:
    """Return a stage's probabilities of its labels, after its calibrator or temperature: float64, shape (n, n_labels).

    A row of NaN gives a row of NaN.

    >>> from cascade_lab.calibrator import Calibrator
    >>> platt = Calibrator("platt", {"weight": 1.0, "bias": float(np.log(3.0))})
    >>> gate = StageSpec("gate", ("oos", "in"), pass_label="in", threshold=0.5, calibrator=platt)
    >>> probabilities(gate, np.array([[0.0, 0.0]]))
    array([[0.25, 0.75]])
    """
    return softmax(calibrated_logits(stage, logits), stage.temperature)


def decide_in_cascade(
    spec: CascadeSpec,
    stage: StageSpec,
    logits: Mapping[str, np.ndarray],
    evidence: Mapping[str, np.ndarray] | None = None,
) -> StageDecision:
    """Return what `stage` decides, also where its rejector needs what other stages computed.

    Parameters
    ----------
    spec : CascadeSpec
    stage : StageSpec
        One of its stages.
    logits : mapping of str to ndarray, shape (n, n_labels)
        Stage name to its logits, rows of the same examples: of this stage, and of those that its rejector names.
    evidence : mapping of str to ndarray, shape (n,), optional
        The rejector's scores of features: `<stage>.<score>` to its values.

    Raises
    ------
    RunError
        The rejector needs a score of features that `evidence` lacks.
    """
    if stage.rejector is None:
        return decide(stage, logits[stage.name])
    evidence = evidence or {}
    for name in stage.rejector.feature_evidence:
        if name not in evidence:
            raise RunError(f"stage '{stage.name}': its rejector needs {name}; {FEATURES_ADVICE}")
    of_logits = [name for name in stage.rejector.evidence if not score_of(name).of_features]
    values = logit_evidence(spec.stages, of_logits, logits) | dict(evidence)
    return decide(stage, logits[stage.name], confidence=stage.rejector.confidence(values))


FEATURES_ADVICE = "run the cascade again with `cascade-lab run --keep-features`"


def decide(stage: StageSpec, logits: np.ndarray, *, confidence: np.ndarray | None = None) -> StageDecision:
    """Return what `stage` decides from its logits.

    Parameters
    ----------
    stage : StageSpec
    logits : ndarray, shape (n, n_labels)
        A row of NaN stands for an example that the stage did not score.
    confidence : ndarray, shape (n,), optional
        What the stage's rejector computes (see `decide_in_cascade`). NaN: not known, as if not scored.

    Examples
    --------
    >>> gate = StageSpec("gate", ("oos", "in"), pass_label="in", threshold=0.5)
    >>> decision = decide(gate, np.array([[0.0, 2.0], [2.0, 0.0]]))
    >>> decision.label.tolist(), decision.confidence.round(3).tolist()
    (['in', 'oos'], [0.881, 0.119])
    """
    if stage.rejector is not None and confidence is None:
        raise TypeError("the stage has a rejector, which decide_in_cascade computes")
    logits, labels = np.asarray(logits), np.array(stage.labels, dtype=object)
    column = stage.labels.index(stage.pass_label) if stage.pass_label is not None else None

    def of_block(logits: np.ndarray) -> tuple[np.ndarray, ...]:
        p = probabilities(stage, logits)
        scored, passes = ~np.isnan(p[:, 0]), p[:, column or 0].copy()
        if column is not None:
            p[:, column] = -1.0
        best = p.argmax(axis=1)
        return scored, passes, best, p[np.arange(len(p)), best]

    scored, passes, best, probability = by_block(of_block, logits)
    n = len(scored)
    if stage.is_gate:
        confidence = passes
        label_above, label_below = repeated(stage.pass_label, n), labels[best]
    else:
        confidence = probability if confidence is None else confidence
        scored = scored & ~np.isnan(confidence)
        label_above = label_below = labels[best]
    decision = StageDecision(scored, confidence, np.zeros(n), label_above, label_below, probability, role=stage.role)
    return decision.with_threshold(stage)


def repeated(label: str | None, n: int) -> np.ndarray:
    """Return one label `n` times: object, shape (n,). `np.full` would make `n` copies of the text."""
    return np.repeat(np.array([label], dtype=object), n)


def _thresholds(stage: StageSpec, label_above: np.ndarray) -> np.ndarray:
    """Return the threshold of each example: shape (n,)."""
    if stage.role != "final":
        return np.full(len(label_above), stage.threshold, dtype=np.float64)
    default = stage.min_probability or 0.0
    if stage.reject_label is None or not stage.min_probabilities:
        return np.full(len(label_above), 0.0 if stage.reject_label is None else default)
    minimums = np.array([stage.min_probabilities.get(label, default) for label in stage.labels])
    return minimums[pd.Index(stage.labels).get_indexer(label_above)]


def route(
    spec: CascadeSpec,
    outputs: Outputs,
    *,
    n_examples: int | None = None,
    force: Mapping[str, bool | np.ndarray] | None = None,
) -> RoutingResult:
    """Send examples through the cascade: each stage decides about the examples that reach it.

    Parameters
    ----------
    spec : CascadeSpec
    outputs : mapping or function
        Stage name to its decisions about all examples, or a function `(stage, rows)` that returns the decisions about
        the given rows. The function is called for each stage in order, with the rows that reach it, and not at all
        where no row does.
    n_examples : int, optional
        How many examples there are; needed with a function.
    force : mapping of str to bool or ndarray of bool, shape (n,), optional
        Stage name to a decision that replaces its comparison with the threshold: True is above, False below.

    Examples
    --------
    >>> gate = StageSpec("gate", ("oos", "in"), pass_label="in", threshold=0.5)
    >>> last = StageSpec("topic", ("pay", "play"))
    >>> spec = CascadeSpec("example", (gate, last))
    >>> outputs = {
    ...     "gate": decide(gate, np.array([[0.0, 2.0], [2.0, 0.0]])),
    ...     "topic": decide(last, np.array([[0.0, 1.0], [1.0, 0.0]])),
    ... }
    >>> route(spec, outputs).predicted.tolist()
    ['play', 'oos']
    >>> route(spec, outputs, force={"gate": True}).predicted.tolist()
    ['play', 'pay']
    """
    force = force or {}
    if isinstance(outputs, Mapping):
        n = len(next(iter(outputs.values())).scored)
    elif n_examples is None:
        raise TypeError("route needs n_examples where outputs is a function")
    else:
        n = n_examples
    result = RoutingResult(
        predicted=np.full(n, None, dtype=object),
        decided_by=np.full(n, None, dtype=object),
        stage_index=np.full(n, -1),
        probability=np.full(n, np.nan),
        confidence=np.full(n, np.nan),
        reached={stage.name: np.zeros(n, dtype=bool) for stage in spec.stages},
    )
    rows = np.arange(n)
    for index, stage in enumerate(spec.stages):
        if not len(rows):
            break
        result.reached[stage.name][rows] = True
        if isinstance(outputs, Mapping):
            decision = outputs[stage.name] if len(rows) == n else outputs[stage.name].take(rows)
        else:
            decision = outputs(stage, rows)
        above = np.broadcast_to(force[stage.name], n)[rows] if stage.name in force else decision.above
        ends = np.where(above, *ROLES[decision.role]) & decision.scored
        ended = rows[ends]
        result.predicted[ended] = np.where(above, decision.label_above, decision.label_below)[ends]
        result.decided_by[ended] = stage.name
        result.stage_index[ended] = index
        result.probability[ended] = decision.probability[ends]
        result.confidence[ended] = decision.confidence[ends]
        rows = rows[~ends & decision.scored]
    return result


def missing_scores_error(where: str, stage: str, n: int) -> RunError:
    """Return the error for `n` examples that reach, or should reach, a stage that never scored them."""
    return RunError(
        f"{where}: stage '{stage}' never scored {n:,} of the examples that this needs; run the cascade again with "
        "shadow scores (of a service's traffic: `cascade-lab collect --sample`)"
    )


def require_scored(routed: RoutingResult, where: str) -> RoutingResult:
    """Return `routed`; raise RunError if an example in it reached a stage that never scored it.

    `where` names the run, for the message.
    """
    unknown = routed.stage_index < 0
    if unknown.any():
        stage = [name for name, arrived in routed.reached.items() if arrived[unknown].any()][-1]
        raise missing_scores_error(where, stage, int(unknown.sum()))
    return routed


def stage_targets(
    spec: CascadeSpec,
    stage: str,
    y_true: Iterable[str | None],
    *,
    explicit: Sequence[str | None] | np.ndarray | None = None,
    assume_reached: bool = False,
) -> np.ndarray:
    """Return what a stage should decide about each example, as one of its labels: shape (n,).

    A label that the stage can answer with is its target: a gate's reject label, or a label of another stage. That is
    so even if an earlier gate should have rejected the example with the same label: this stage can still give it. A
    label of a later stage means that a gate should pass the example; a deferral stage has no label for that, and no
    target. None too where the stage has no right decision: no
    label, a label that the stage cannot lead to, or (unless `assume_reached`) a label with which only other stages
    reject, an earlier gate among them.

    Parameters
    ----------
    spec : CascadeSpec
    stage : str
    y_true : iterable of str or None, length n
        The true final labels.
    explicit : sequence of str or None, length n, optional
        Targets that the eval set states itself, in a column `<stage>_label`; they replace derived ones, but for empty
        ones.
    assume_reached : bool
        Take every example to have reached the stage, even if an earlier gate should have stopped it; the target is
        then what can still lead to the true label, a `reject_label` that is not one of `labels` included.

    Examples
    --------
    >>> gate = StageSpec("gate", ("oos", "in"), pass_label="in", threshold=0.5)
    >>> last = StageSpec("topic", ("pay", "play"), reject_label="oos")
    >>> spec = CascadeSpec("example", (gate, last))
    >>> stage_targets(spec, "gate", ["pay", "oos", None]).tolist()
    ['in', 'oos', None]
    >>> stage_targets(spec, "topic", ["pay", "oos", None]).tolist()
    ['pay', None, None]
    >>> stage_targets(spec, "topic", ["pay", "oos", None], assume_reached=True).tolist()
    ['pay', 'oos', None]
    """
    index = [s.name for s in spec.stages].index(spec.stage(stage).name)
    here = spec.stages[index]
    earlier = set() if assume_reached else {label for s in spec.stages[:index] for label in s.reject_labels}
    own = set(here.reject_labels if here.is_gate else here.labels)
    if assume_reached:
        own |= set(here.reject_labels)
    later = {label for s in spec.stages[index + 1 :] for label in (*s.labels, *s.reject_labels)}
    y_true = np.asarray(y_true, dtype=object)

    def target(label: str | None) -> str | None:
        if label in own:
            return label
        return here.pass_label if label in later and label not in earlier else None

    targets = {label: target(label) for label in pd.unique(y_true)}
    result = np.array([targets[label] for label in y_true], dtype=object)
    if explicit is not None:
        given = np.asarray(explicit, dtype=object)
        is_given = pd.notna(given) & (given != "")
        result[is_given] = given[is_given]
    return result


def has_right_decision(spec: CascadeSpec, stage: str, y_true: Iterable[str | None]) -> np.ndarray:
    """Return whether a stage can decide rightly about each example that reaches it: bool, shape (n,).

    It can answer with the true label, or leave it to a later stage that can; and no earlier gate should have rejected
    the example with a label that this stage lacks.
    """
    index = [s.name for s in spec.stages].index(spec.stage(stage).name)
    here = spec.stages[index]
    earlier = {label for s in spec.stages[:index] for label in s.reject_labels}
    later = {label for s in spec.stages[index + 1 :] for label in (*s.labels, *s.reject_labels)}
    own = set(here.reject_labels if here.is_gate else here.labels)
    return np.asarray(pd.Index(y_true).isin(own | (later - earlier)))


def check_labels(spec: CascadeSpec, examples: pd.DataFrame, locations: Sequence[str]) -> None:
    """Check that every label, where there is one, is an answer of the cascade.

    Raises
    ------
    EvalSetError
        Naming the first row with another label.
    """
    allowed = {"label": {*spec.labels, None}}
    for stage in spec.stages:
        if f"{stage.name}_label" in examples:
            allowed[f"{stage.name}_label"] = {*stage.labels, "", None}
    stages = "; ".join(
        f"{s.name}: {', '.join(s.labels) if len(s.labels) <= 5 else f'{len(s.labels)} labels'}" for s in spec.stages
    )
    for column, labels in allowed.items():
        values = examples[column].to_numpy(dtype=object)
        for location, label in zip(locations, np.where(pd.isna(values), None, values), strict=True):
            if label in labels:
                continue
            if any(s.pass_label == label for s in spec.stages) and column == "label":
                why = "is a gate's pass label, which is no final answer"
            else:
                why = "belongs to no stage" if column == "label" else f"in {column} is not a label of that stage"
            raise EvalSetError(f"{location}: label '{label}' {why} ({stages}); fix the row or the spec's labels")

"""The serial cascade as arithmetic: what each stage answers, given its logits, and what it should have answered.

The live run and the replay both decide with `answer`, so that they cannot drift apart.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
import pandas as pd

from cascade_lab.errors import EvalSetError
from cascade_lab.spec import CascadeSpec, StageSpec


class Answer(NamedTuple):
    """What one stage says of `n` examples.

    Attributes
    ----------
    passes : ndarray of bool, shape (n,)
        The example goes on to the next stage.
    predicted : ndarray of str, shape (n,)
        The answer, if it ends here.
    probability : ndarray of float64, shape (n,)
        The stage's probability of `predicted`; where the last stage rejects because no label reaches
        `min_probability`, the highest probability that a label did reach.
    decisive : ndarray of float64, shape (n,)
        What the threshold is compared with: a gate's probability of its pass label, the last stage's
        highest probability.
    """

    passes: np.ndarray
    predicted: np.ndarray
    probability: np.ndarray
    decisive: np.ndarray


def probabilities(logits: np.ndarray, temperature: float = 1.0) -> np.ndarray:
    """Return the softmax of `logits / temperature`, shape (n, n_labels), in float64.

    >>> probabilities(np.array([[0.0, 0.0], [0.0, np.log(3.0)]]))
    array([[0.5 , 0.5 ],
           [0.25, 0.75]])
    """
    shifted = np.asarray(logits, dtype=np.float64) / temperature
    shifted = np.exp(shifted - shifted.max(axis=1, keepdims=True))
    return shifted / shifted.sum(axis=1, keepdims=True)


def answer(stage: StageSpec, logits: np.ndarray) -> Answer:
    """Return what `stage` answers to `logits`, shape (n, n_labels); a tie at the threshold passes."""
    p = probabilities(logits, stage.temperature)
    labels = np.array(stage.labels, dtype=object)
    rows = np.arange(len(p))
    if stage.is_gate:
        column = stage.labels.index(stage.pass_label)
        others = p.copy()
        others[:, column] = -1.0
        best = others.argmax(axis=1)
        return Answer(p[:, column] >= stage.threshold, labels[best], p[rows, best], p[:, column])
    best = p.argmax(axis=1)
    highest = p[rows, best]
    predicted = labels[best]
    if stage.reject_label is not None:
        least = [stage.min_probabilities.get(label, stage.min_probability or 0.0) for label in stage.labels]
        predicted = np.where(highest >= np.array(least)[best], predicted, stage.reject_label)
    return Answer(np.zeros(len(p), dtype=bool), predicted, highest, highest)


def serve(spec: CascadeSpec, logits: Mapping[str, np.ndarray]) -> pd.DataFrame:
    """Send `n` examples through the cascade on logits that are known already.

    Parameters
    ----------
    spec : CascadeSpec
    logits : mapping of str to ndarray, shape (n, n_labels)
        Stage name to its logits; rows that the stage never scored are NaN.

    Returns
    -------
    DataFrame
        `n` rows: `predicted`, `decided_by` (stage), `probability`. Rows that reach a stage that never scored
        them have a missing answer.
    """
    n = len(next(iter(logits.values())))
    table = blank_answers(n)
    arrived = np.arange(n)
    for stage in spec.stages:
        arrived = arrived[~np.isnan(logits[stage.name][arrived]).any(axis=1)]
        said = answer(stage, logits[stage.name][arrived])
        settle(table, stage, arrived, said)
        arrived = arrived[said.passes]
    return pd.DataFrame(table)


def blank_answers(n: int) -> dict[str, np.ndarray]:
    """Return the columns of `n` answers, none of them given yet."""
    return {
        "predicted": np.full(n, None, dtype=object),
        "decided_by": np.full(n, None, dtype=object),
        "probability": np.full(n, np.nan),
    }


def settle(table: dict[str, np.ndarray], stage: StageSpec, rows: np.ndarray, said: Answer) -> None:
    """Write the answers that end at `stage` into the columns of `table`; `rows[i]` is the row of answer `i`."""
    ends = ~said.passes
    table["predicted"][rows[ends]] = said.predicted[ends]
    table["decided_by"][rows[ends]] = stage.name
    table["probability"][rows[ends]] = said.probability[ends]


def gold(spec: CascadeSpec, stage: StageSpec, examples: pd.DataFrame) -> np.ndarray:
    """Return what `stage` should say of each example: shape (n,), None where it should never have been asked.

    A final label that rejects at a gate is that gate's gold; a label of a later stage means that the gate
    should have passed the example. A column `<stage>_label` in `examples` overrides what is derived, where it
    is not empty.
    """
    place = [s.name for s in spec.stages].index(stage.name)
    earlier = {label for s in spec.stages[:place] for label in s.reject_labels}
    own = set(stage.reject_labels if stage.is_gate else stage.labels)
    later = {label for s in spec.stages[place + 1 :] for label in (*s.labels, *s.reject_labels)}

    def derive(label: str) -> str | None:
        if label in earlier:
            return None
        if label in own:
            return label
        return stage.pass_label if label in later else None

    derived = {label: derive(label) for label in examples["label"].unique()}
    result = np.array([derived[label] for label in examples["label"]], dtype=object)
    column = f"{stage.name}_label"
    if column in examples:
        given = examples[column].to_numpy(dtype=object)
        stated = pd.notna(given) & (given != "")
        result[stated] = given[stated]
    return result


def check_labels(spec: CascadeSpec, examples: pd.DataFrame, locations: Sequence[str]) -> None:
    """Check that every label is an answer of the cascade; raises EvalSetError naming the first row at fault."""
    allowed = {"label": set(spec.labels)}
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
                why = "is a gate's pass label, which no text ends with"
            else:
                why = "belongs to no stage" if column == "label" else f"in {column} is no label of that stage"
            raise EvalSetError(f"{location}: label '{label}' {why} ({stages}); fix the row or the spec's labels")

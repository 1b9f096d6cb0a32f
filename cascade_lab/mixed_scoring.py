"""Scores texts again in float32 where a stage with mixed precision could decide otherwise than in float32."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np

from cascade_lab.mixed_precision import could_differ, other_mixed_stages
from cascade_lab.spec import CascadeSpec
from cascade_lab.stage_output import ScoredRows, StageOutput, merge

if TYPE_CHECKING:
    from cascade_lab.bert.tokenization import Encoding
    from cascade_lab.cascade import Cascade
    from cascade_lab.stage import Batch, Stage


def score_again(
    cascade: Cascade,
    stage: Stage,
    encodings: Sequence[Encoding],
    outputs: Mapping[str, StageOutput],
    *,
    spec: CascadeSpec | None = None,
    batch_size: int | None = None,
) -> tuple[np.ndarray, list[Batch]]:
    """Score again in float32 what a stage with mixed precision could decide otherwise; replace the outputs in place.

    Parameters
    ----------
    cascade : Cascade
    stage : Stage
        One of its stages. Nothing happens where its precision is not mixed.
    encodings : sequence of Encoding
    outputs : mapping of str to StageOutput
        The stage's output for these texts, which is changed, and those of the stages whose scores its rejector uses.
    spec : CascadeSpec, optional
        The cascade at other thresholds; by default its own.
    batch_size : int, optional
        See `Stage.score`.

    Returns
    -------
    rows : ndarray of int
        Which texts were scored again.
    batches : list of Batch
    """
    rows, name = np.arange(0), stage.spec.name
    if stage.exact is None or not len(encodings):
        return rows, []
    own = (spec or cascade.spec).stage(name)
    decision, _ = cascade.decide(own, outputs, spec=spec)
    rows = np.flatnonzero(could_differ(own, outputs[name].logits, decision))
    if not len(rows):
        return rows, []
    exact, batches = stage.exact.score([encodings[row] for row in rows.tolist()], batch_size=batch_size)
    outputs[name].put(rows, exact)
    return rows, batches


def score_live_again(
    cascade: Cascade,
    stage: Stage,
    rows: np.ndarray,
    scored: Mapping[str, ScoredRows],
    evidence: Mapping[str, np.ndarray],
    probability: Mapping[str, np.ndarray],
    arrived: Sequence[Encoding],
    encode: Callable[[Stage, np.ndarray], Sequence[Encoding]],
    batch_size: int | None,
) -> list[Batch]:
    """Do what `score_again` does for texts that have reached a stage; for them also at the stages of its evidence.

    A rejector may use scores of earlier stages with mixed precision. Its decision about a text is float32's only if
    those scores are in float32 too. A text that an earlier stage would not pass on by its float32 scores keeps those of
    bfloat16 there, so that a replay of the kept scores decides as the cascade did: it is outside that stage's bounds.

    Parameters
    ----------
    cascade : Cascade
    stage : Stage
        With mixed precision.
    rows : ndarray of int
        The texts that reach it.
    scored : mapping of str to ScoredRows
        What each stage up to this one scored. It is changed in place.
    evidence, probability : mapping of str to ndarray
        As in `ChunkResult`; what depends on changed scores of earlier stages is changed in place.
    arrived : sequence of Encoding
        Of the texts in `rows`, for this stage.
    encode : callable
        Takes an earlier stage and rows; returns their encodings.
    batch_size : int or None
        See `Stage.score`.
    """
    spec, index = cascade.spec.stage(stage.spec.name), cascade.stages.index(stage)
    earlier = {one.spec.name: one for one in cascade.stages[:index]}
    outputs = {name: scored[name].at(rows) for name in earlier} | {spec.name: scored[spec.name].output}
    again, batches = score_again(cascade, stage, arrived, outputs, batch_size=batch_size)
    changed = other_mixed_stages(cascade.spec, spec)
    if not changed or not len(again):
        return batches
    rows = rows[again]
    outputs = {name: scored[name].at(rows) for name in earlier}
    for name in changed:
        one, output = earlier[name], outputs[name]
        assert one.exact is not None
        assert output.rescored is not None
        missing = np.flatnonzero(~output.rescored)
        exact, more = one.exact.score(encode(one, rows[missing]), batch_size=batch_size)
        output.put(missing, exact)
        batches += more
    decided = {name: cascade.decide(cascade.spec.stage(name), outputs) for name in earlier}
    passed = np.flatnonzero(np.all([~decision.ends for decision, _ in decided.values()], axis=0))
    rows = rows[passed]
    for name in changed:
        scored[name].put(rows, outputs[name].take(passed))
        at = np.searchsorted(scored[name].rows, rows)
        probability[name][at] = decided[name][0].stage_probability[passed]
    for _, of_features in decided.values():
        for name, values in of_features.items():
            if name.rpartition(".")[0] in changed:
                evidence[name][rows] = values[passed]
    return batches


def score_shadow(
    cascade: Cascade,
    stage: Stage,
    rows: np.ndarray,
    encodings: Sequence[Encoding],
    scored: Mapping[str, Sequence[ScoredRows]],
    *,
    spec: CascadeSpec | None = None,
    batch_size: int | None = None,
    done: Callable[[int], object] = lambda n: None,
) -> StageOutput:
    """Score texts with one stage, with mixed precision again in float32 where its decision could differ.

    Unlike `score_live_again`, the scores of other stages, which its rejector may use, stay as they are, also those in
    bfloat16.

    Parameters
    ----------
    cascade : Cascade
    stage : Stage
    rows : ndarray of int
    encodings : sequence of Encoding
        Of the texts in `rows`.
    scored : mapping of str to sequence of ScoredRows
        Stage name to the parts of what that stage scored. A text that another stage did not score, although the
        rejector uses its scores, is not scored again.
    spec, batch_size, done
        See `score_again` and `Stage.score`.
    """
    output, _ = stage.score(encodings, batch_size=batch_size, done=done)
    if stage.exact is None:
        return output
    name = stage.spec.name
    rejector = (spec or cascade.spec).stage(name).rejector
    others = {one: merge(scored[one]) for one in (rejector.stages if rejector is not None else ()) if one != name}
    known = np.flatnonzero(np.all([np.ones(len(rows)), *(np.isin(rows, one.rows) for one in others.values())], axis=0))
    outputs = {one: parts.at(rows[known]) for one, parts in others.items()} | {name: output.take(known)}
    again, _ = score_again(
        cascade, stage, [encodings[row] for row in known.tolist()], outputs, spec=spec, batch_size=batch_size
    )
    output.put(known[again], outputs[name].take(again))
    return output


def with_time_of(batches: Sequence[Batch], more: Sequence[Batch]) -> list[Batch]:
    """Return batches whose times include those of further ones for some of their texts, shared out by tokens."""
    seconds, n_tokens = sum(batch.run_seconds for batch in more), max(sum(batch.n_tokens for batch in batches), 1)
    return [batch._replace(run_seconds=batch.run_seconds + seconds * batch.n_tokens / n_tokens) for batch in batches]

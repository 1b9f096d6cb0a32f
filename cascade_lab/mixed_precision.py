"""Mixed precision: which decisions made in bfloat16 could differ in float32, and what measured bounds promise.

A stage with mixed precision scores a text in bfloat16. Float32 logits z' can lead to another decision than bfloat16
logits z only in two ways:

1. Another label is the most probable one. Then z' - z of the two labels differs by at least the margin of z.
2. The confidence is on the other side of the threshold. Then its log-odds differ by at least their distance to those of
   the threshold.

The stage scores a text again in float32 where one of them is within the measured bounds (`PrecisionBounds`).
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import chain, combinations
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from scipy.special import betaincinv, logit

from cascade_lab.calibrator import calibrated_logits
from cascade_lab.decisions import StageDecision
from cascade_lab.exceptions import CheckpointError
from cascade_lab.provenance import sha256
from cascade_lab.spec import CascadeSpec, StageSpec
from cascade_lab.stage_output import StageOutput, decide_from_outputs

SMALLEST = 1e-12
"""Log-odds are those of a confidence moved into [SMALLEST, 1 - SMALLEST], so that they are finite."""
_ROUNDING = 1e-9  # of float64, in log-odds: far more than occurs


class Differences(NamedTuple):
    """How far float32 moves what a stage decides with, for each text: float64, shape (n,).

    See `PrecisionBounds`, which holds the largest ones.
    """

    labels: np.ndarray
    confidence: np.ndarray


def is_mixed(stage: StageSpec) -> bool:
    """Return whether a stage scores in bfloat16, and again in float32 where that could change its decision."""
    return stage.precision == "mixed"


def in_float32(spec: CascadeSpec) -> CascadeSpec:
    """Return the cascade whose answers a cascade with mixed precision gives: its mixed stages in float32."""
    stages = (replace(stage, precision="float32") if is_mixed(stage) else stage for stage in spec.stages)
    return replace(spec, stages=tuple(stages))


def could_differ(stage: StageSpec, logits: np.ndarray, decision: StageDecision) -> np.ndarray:
    """Return which decisions could differ in float32, if float32 is within the stage's bounds: bool, shape (n,).

    Parameters
    ----------
    stage : StageSpec
        With `precision_bounds`.
    logits : ndarray, shape (n, n_labels)
        In bfloat16.
    decision : StageDecision
        What the stage decides from them.

    Examples
    --------
    >>> from cascade_lab.decisions import decide
    >>> from cascade_lab.precision_bounds import PrecisionBounds
    >>> last = StageSpec("topic", ("pay", "play"), precision_bounds=PrecisionBounds(0.2, 0.2, ""))
    >>> logits = np.array([[0.0, 0.1], [0.0, 0.3]])
    >>> could_differ(last, logits, decide(last, logits)).tolist()
    [True, False]
    """
    bounds = stage.precision_bounds
    assert bounds is not None, "a mixed stage is loaded only with bounds"
    distance = np.abs(_log_odds(decision.confidence) - _log_odds(decision.threshold))
    # Which label is the most probable one does not matter to a text that a gate passes or a deferral stage leaves to
    # others, nor to a rejected one, unless the threshold is the label's own.
    matters = ~decision.above if stage.is_gate else decision.above | bool(stage.min_probabilities)
    has_near_label = label_margins(stage, logits) <= bounds.labels + _ROUNDING
    return decision.scored & ((distance <= bounds.confidence + _ROUNDING) | (matters & has_near_label))


def label_margins(stage: StageSpec, logits: np.ndarray) -> np.ndarray:
    """Return by how much the most probable label's logit exceeds the next one's: float64, shape (n,).

    The logits are those after temperature or calibrator, of the labels that the stage chooses from. Infinite for a
    stage with one such label.
    """
    z = _of_choice(stage, logits)
    if z.shape[1] < 2:
        return np.full(len(z), np.inf)
    two = np.partition(z, -2, axis=1)[:, -2:]
    return np.asarray(two[:, 1] - two[:, 0])


def differences(
    spec: CascadeSpec,
    stage: StageSpec,
    lower: Mapping[str, StageOutput],
    exact: Mapping[str, StageOutput],
    arrays: Mapping[str, np.ndarray],
) -> Differences:
    """Return how far float32 moves what a stage decides with.

    A rejector that uses scores of other mixed stages gets them in bfloat16, or in float32 where those were scored
    again. The largest difference over all combinations counts.

    Parameters
    ----------
    spec : CascadeSpec
    stage : StageSpec
        One of its stages.
    lower, exact : mapping of str to StageOutput
        Stage name to its outputs for the same texts, with mixed stages in bfloat16 and in float32.
    arrays : mapping of str to ndarray
        What `CascadeSpec.read_arrays` returns.
    """
    choice = _of_choice(stage, exact[stage.name].logits) - _of_choice(stage, lower[stage.name].logits)
    labels = np.ptp(choice, axis=1) if choice.shape[1] > 1 else np.zeros(len(choice))
    target = _log_odds(decide_from_outputs(spec, stage, exact, arrays)[0].confidence)
    others = other_mixed_stages(spec, stage)
    confidence = np.zeros(len(labels))
    for again in chain.from_iterable(combinations(others, n) for n in range(len(others) + 1)):
        outputs = {name: exact[name] if name in again else lower[name] for name in lower}
        found = _log_odds(decide_from_outputs(spec, stage, outputs, arrays)[0].confidence)
        confidence = np.maximum(confidence, np.abs(target - found))
    return Differences(labels, confidence)


def other_mixed_stages(spec: CascadeSpec, stage: StageSpec) -> list[str]:
    """Return the other stages with mixed precision whose scores a stage's rejector uses."""
    names = stage.rejector.stages if stage.rejector is not None else ()
    return [name for name in names if name != stage.name and is_mixed(spec.stage(name))]


def n_bounds(spec: CascadeSpec) -> int:
    """Return the number of bounds that can be exceeded: two per mixed stage, one where it has one label to choose."""
    return sum(2 - (len(stage.labels) - stage.is_gate < 2) for stage in spec.stages if is_mixed(stage))


def outside_probability(n_texts: int, n_bounds: int, *, level: float = 0.95) -> float:
    """Return an upper limit of the probability that a new text exceeds a bound, each the largest of `n_texts` texts.

    The limit holds with probability `level`, whatever the distribution of the texts is, if they and the new one are
    independent and have the same distribution. It is a tolerance limit: the part of the distribution within k maxima is
    at least as large as the sum of n - k + 1 of n + 1 statistically equivalent blocks, which has the beta distribution
    with parameters n - k + 1 and k (Tukey 1947, "Non-parametric estimation II").

    >>> round(outside_probability(3100, 3), 5)
    0.00203
    """
    if n_texts < n_bounds:
        return 1.0
    return float(betaincinv(n_bounds, n_texts - n_bounds + 1, level)) if n_bounds else 0.0


def bounds_digest(spec: CascadeSpec, stage: StageSpec, files: Mapping[str, Sequence[Path]]) -> str:
    """Return a SHA-256 of what a stage's bounds depend on: files and keys of the stage, and of those its rejector uses.

    Parameters
    ----------
    spec : CascadeSpec
    stage : StageSpec
        One of its stages.
    files : mapping of str to sequence of path
        Stage name to the files that it loads.
    """
    names = dict.fromkeys([stage.name, *(stage.rejector.stages if stage.rejector is not None else ())])
    contents = [[sha256(path) for path in files[name]] for name in names]
    content = {"keys": _keys(spec, stage), "files": contents}
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def check_bounds(spec: CascadeSpec, files: Mapping[str, Sequence[Path]]) -> None:
    """Raise CheckpointError where a mixed stage has no bounds, or its files or settings are others than theirs.

    `files` is as in `bounds_digest`.
    """
    check_rejectors(spec)
    for stage in spec.stages:
        if not is_mixed(stage):
            continue
        check_has_bounds(stage)
        assert stage.precision_bounds is not None
        if stage.precision_bounds.digest != bounds_digest(spec, stage, files):
            raise CheckpointError(
                f"stage '{stage.name}': its precision_bounds were measured with other files or settings (such as a "
                f"temperature, calibrator or rejector); {_MEASURE}"
            )


def check_rejectors(spec: CascadeSpec) -> None:
    """Raise CheckpointError where a rejector uses scores of a mixed stage, and its own stage is not mixed.

    Its confidence would depend on bfloat16 scores, without a bound and without a second scoring.
    """
    for stage in spec.stages:
        if not is_mixed(stage) and (others := other_mixed_stages(spec, stage)):
            raise CheckpointError(
                f"stage '{stage.name}': its rejector uses scores of stage '{others[0]}', whose precision is mixed; set "
                'precision = "mixed" here too, or "float32" there'
            )


def check_has_bounds(stage: StageSpec) -> None:
    """Raise CheckpointError where a mixed stage has no bounds."""
    if is_mixed(stage) and stage.precision_bounds is None:
        raise CheckpointError(f"stage '{stage.name}': precision mixed needs precision_bounds; {_MEASURE}")


def without_stale_bounds(before: CascadeSpec, after: CascadeSpec) -> CascadeSpec:
    """Return `after` without the bounds of stages where something that they depend on differs from `before`.

    The files of both are the same.
    """
    stages = []
    for stage, old in zip(after.stages, before.stages, strict=True):
        is_stale = stage.precision_bounds is not None and _keys(after, stage) != _keys(before, old)
        stages.append(replace(stage, precision_bounds=None) if is_stale else stage)
    return replace(after, stages=tuple(stages))


_MEASURE = "measure them with `cascade-lab verify-precision CASCADE EVALSET --calibrate --output FILE`"


def _keys(spec: CascadeSpec, stage: StageSpec) -> list[Any]:
    """Return the settings that a stage's bounds depend on, as plain data."""
    rejector = stage.rejector
    if rejector is None:
        return [_own_keys(stage)]
    rule: list[Any] = [list(rejector.evidence), list(rejector.weights), rejector.bias, rejector.arrays_sha256]
    others = [_own_keys(spec.stage(name)) for name in rejector.stages if name != stage.name]
    return [_own_keys(stage), rule, stage.reject_label, *others]


def _own_keys(stage: StageSpec) -> list[Any]:
    calibrator = None if stage.calibrator is None else stage.calibrator.to_dict()
    return [
        *(list(stage.labels), stage.pass_label, stage.temperature, calibrator, stage.precision),
        *(stage.do_lower_case, stage.max_seq_length, stage.output_weights, stage.output_bias),
    ]


def _of_choice(stage: StageSpec, logits: np.ndarray) -> np.ndarray:
    """Return the logits of the labels that a stage chooses from, after temperature or calibrator: float64."""
    z = np.asarray(calibrated_logits(stage, logits), dtype=np.float64) / stage.temperature
    return np.delete(z, stage.labels.index(str(stage.pass_label)), axis=1) if stage.is_gate else z


def _log_odds(confidence: np.ndarray) -> np.ndarray:
    return np.asarray(logit(np.clip(confidence, SMALLEST, 1 - SMALLEST)))

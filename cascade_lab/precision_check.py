"""Compares a cascade's logits and answers with those in float32, and measures the bounds of mixed precision."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pandas as pd
from tqdm.auto import tqdm

from cascade_lab.analysis.alarms import upper_bound
from cascade_lab.bert.fast import has_bfloat16
from cascade_lab.cascade import CHUNK, Cascade
from cascade_lab.decisions import route
from cascade_lab.evalset import EvalSet
from cascade_lab.exceptions import CheckpointError, RunError
from cascade_lab.mixed_precision import (
    bounds_digest,
    check_rejectors,
    could_differ,
    differences,
    in_float32,
    is_mixed,
    n_bounds,
    outside_probability,
)
from cascade_lab.precision_bounds import PrecisionBounds
from cascade_lab.provenance import processor
from cascade_lab.spec import CascadeSpec
from cascade_lab.stage import Stage
from cascade_lab.stage_output import StageOutput, decide_from_outputs

LEVEL = 0.95
"""The confidence of the limits that are stated."""

Quiet = Callable[[str], AbstractContextManager[None]]


def _not_quiet(doing: str) -> AbstractContextManager[None]:
    return nullcontext()


class PrecisionCheck(NamedTuple):
    """A cascade in a lower precision against itself in float32; every stage scored every text.

    Attributes
    ----------
    stages : DataFrame
        One row per stage: `precision`; the root mean square, the 99th percentile and the maximum of the absolute
        differences of logits (`rms`, `p99`, `max`); and `n_changed`, how many of the stage's own decisions differ.
    changed : DataFrame
        The texts whose final answer differs: `text`, `label`, and the answers `float32` and `lower`.
    n_examples : int
    """

    stages: pd.DataFrame
    changed: pd.DataFrame
    n_examples: int


class MixedCheck(NamedTuple):
    """The answers of a cascade with mixed precision against those in float32.

    Attributes
    ----------
    stages : DataFrame
        One row per stage: `precision`, `n_scored` (the texts that reached it), and `n_rescored`, how many of these were
        scored again in float32.
    changed : DataFrame
        The texts whose answer differs: `text`, `label`, and the answers `float32` and `lower`.
    n_examples : int
    limit : float
        The upper limit, of confidence `LEVEL`, of the probability that the answer to a new text differs (Clopper and
        Pearson 1934), if the texts are independent. Repeated texts are counted once.
    """

    stages: pd.DataFrame
    changed: pd.DataFrame
    n_examples: int
    limit: float


class MeasuredBounds(NamedTuple):
    """A cascade with mixed precision, whose bounds were measured.

    Attributes
    ----------
    spec : CascadeSpec
    stages : DataFrame
        One row per mixed stage: the bounds `labels` and `confidence`, and `rescored`, which share of the texts that
        reach the stage is scored again in float32.
    n_texts : int
        How many different texts the bounds were measured on.
    outside_probability : float
        With confidence `LEVEL`, fewer than this share of texts of the same distribution exceed a bound; see
        `mixed_precision.outside_probability`.
    """

    spec: CascadeSpec
    stages: pd.DataFrame
    n_texts: int
    outside_probability: float


def verify_precision(
    spec: CascadeSpec, evalset: EvalSet, *, progress: bool = False, quiet: Quiet = _not_quiet
) -> PrecisionCheck:
    """Score an eval set in float32 and in the cascade's own precision, or in bfloat16 where that is float32.

    A stage with mixed precision is compared in bfloat16; `verify_mixed` compares its answers.

    Parameters
    ----------
    spec : CascadeSpec
    evalset : EvalSet
    progress : bool
        Show a progress bar.
    quiet : callable
        Returns a context manager in which a stage is loaded; takes a description of what is being done.

    Raises
    ------
    CheckpointError
        The processor cannot multiply bfloat16, or a stage's files are not usable.
    RunError
        A stage that is compared has the reference engine, which computes in float32 only.
    """
    is_exact = all(stage.precision == "float32" for stage in spec.stages)
    lower_precision = {s.name: "bfloat16" if is_exact or is_mixed(s) else s.precision for s in spec.stages}
    precisions = {name: (lower, "float32") for name, lower in lower_precision.items()}
    scores = _score_twice(spec, evalset, precisions, progress=progress, quiet=quiet)
    rows = []
    for stage in spec.stages:
        difference = np.abs(scores.lower[stage.name].logits - scores.exact[stage.name].logits)
        rms, p99 = np.sqrt(np.mean(difference**2)), np.quantile(difference, 0.99)
        rows.append((stage.name, lower_precision[stage.name], rms, p99, difference.max()))
    table = pd.DataFrame(rows, columns=["stage", "precision", "rms", "p99", "max"]).set_index("stage")
    arrays = spec.read_arrays()
    decisions = [
        {stage.name: decide_from_outputs(spec, stage, outputs, arrays)[0] for stage in spec.stages}
        for outputs in (scores.exact, scores.lower)
    ]
    table["n_changed"] = [int((decisions[0][name].label != decisions[1][name].label).sum()) for name in table.index]
    exact, lower = (route(spec, decided).predicted for decided in decisions)
    return PrecisionCheck(table, _changed(evalset, exact, lower), len(evalset))


def verify_mixed(
    spec: CascadeSpec, evalset: EvalSet, *, progress: bool = False, quiet: Quiet = _not_quiet
) -> MixedCheck:
    """Answer an eval set with a cascade that has mixed precision, and with the same cascade in float32.

    Parameters
    ----------
    spec : CascadeSpec
        Stages whose precision is not mixed keep it on both sides.
    evalset, progress, quiet
        As in `verify_precision`.

    Raises
    ------
    CheckpointError
        The bounds of a stage are missing or no longer fit, or it cannot be loaded.
    """
    n, rescored = len(evalset), dict.fromkeys((stage.name for stage in spec.stages), 0)
    scored, predicted = dict(rescored), []
    texts, texts_b = evalset.texts, evalset.texts_b
    with tqdm(total=2 * n, unit="text", disable=not progress) as bar:
        for of in (spec, in_float32(spec)):
            with quiet(f"loading {len(of.stages)} stages"):
                cascade = Cascade.load(of)
            with cascade:
                parts = []
                for start in range(0, n, CHUNK):
                    part = texts[start : start + CHUNK], texts_b and texts_b[start : start + CHUNK]
                    result = cascade.answer(cascade.stages[0].encode(*part), *part)
                    parts.append(result.routed.predicted)
                    for name, one in result.scored.items() if of is spec else ():
                        scored[name] += len(one.rows)
                        rescored[name] += 0 if one.output.rescored is None else int(one.output.rescored.sum())
                    bar.update(len(part[0]))
            predicted.append(np.concatenate(parts))
    precision = {stage.name: stage.precision for stage in spec.stages}
    table = pd.DataFrame({"precision": precision, "n_scored": scored, "n_rescored": rescored}).rename_axis("stage")
    changed = _changed(evalset, predicted[1], predicted[0])
    different = ~evalset.examples[["text", "text_b"]].duplicated()
    n_changed = int((different.to_numpy() & (predicted[0] != predicted[1])).sum())
    return MixedCheck(table, changed, n, upper_bound(n_changed, int(different.sum()), 1 - LEVEL))


def measure_bounds(
    spec: CascadeSpec, evalset: EvalSet, *, progress: bool = False, quiet: Quiet = _not_quiet
) -> MeasuredBounds:
    """Measure how far float32 moves what each stage decides with, and return the cascade with mixed precision.

    Every stage scores every text in bfloat16 and in float32; a bound is the largest difference. Take texts like those
    that will be scored, such as a validation set, and the processor that will score them.

    Parameters
    ----------
    spec : CascadeSpec
        Its stages with mixed precision are measured; where there are none, all stages are, and get mixed precision.
    evalset, progress, quiet
        As in `verify_precision`.

    Raises
    ------
    CheckpointError, RunError
        As `verify_precision`.
    """
    if not any(is_mixed(stage) for stage in spec.stages):
        spec = replace(spec, stages=tuple(replace(stage, precision="mixed") for stage in spec.stages))
    check_rejectors(spec)
    both = ("bfloat16", "float32")
    precisions = {s.name: both if is_mixed(s) else (s.precision, s.precision) for s in spec.stages}
    scores = _score_twice(spec, evalset, precisions, progress=progress, quiet=quiet)
    arrays = spec.read_arrays()
    n_texts = int((~evalset.examples[["text", "text_b"]].duplicated()).sum())
    probability = outside_probability(n_texts, n_bounds(spec), level=LEVEL)
    origin = {key: value for key, value in evalset.origin.items() if key != "n_examples" and value is not None}
    measured_on = {
        **origin,
        "processor": processor(),
        "n_texts": n_texts,
        "level": LEVEL,
        "outside_probability": probability,
    }
    stages = []
    for stage in spec.stages:
        if is_mixed(stage):
            found = differences(spec, stage, scores.lower, scores.exact, arrays)
            digest = bounds_digest(spec, stage, scores.files)
            bounds = PrecisionBounds(float(found.labels.max()), float(found.confidence.max()), digest, measured_on)
            stage = replace(stage, precision_bounds=bounds)
        stages.append(stage)
    spec = replace(spec, stages=tuple(stages))
    decisions = {stage.name: decide_from_outputs(spec, stage, scores.lower, arrays)[0] for stage in spec.stages}
    reached = route(spec, decisions).reached
    rows = {}
    for stage in spec.stages:
        if stage.precision_bounds is not None and is_mixed(stage):
            again = could_differ(stage, scores.lower[stage.name].logits, decisions[stage.name])[reached[stage.name]]
            bounds = stage.precision_bounds
            rows[stage.name] = (bounds.labels, bounds.confidence, again.mean() if len(again) else np.nan)
    table = pd.DataFrame.from_dict(rows, orient="index", columns=["labels", "confidence", "rescored"])
    return MeasuredBounds(spec, table.rename_axis("stage"), n_texts, probability)


class _Scores(NamedTuple):
    """Stage name to its outputs in two precisions, and to the files that it loaded."""

    lower: dict[str, StageOutput]
    exact: dict[str, StageOutput]
    files: dict[str, list[Path]]


def _score_twice(
    spec: CascadeSpec,
    evalset: EvalSet,
    precisions: Mapping[str, tuple[str, str]],
    *,
    progress: bool,
    quiet: Quiet,
) -> _Scores:
    """Score every text with every stage in two precisions: `precisions` has a pair for each stage."""
    lower = {name for name, pair in precisions.items() if set(pair) != {"float32"}}
    for stage in spec.stages:
        if stage.name in lower and stage.engine != "fast":
            raise RunError(f"stage '{stage.name}': the reference engine has float32 only; set engine = \"fast\"")
    if lower and not has_bfloat16():
        raise CheckpointError(
            "this processor has no bfloat16 instructions (avx512_bf16 or amx_bf16, under Linux); compare precisions on "
            "one that has"
        )
    scores, with_features = _Scores({}, {}, {}), spec.feature_stages
    n_scores = sum(len(set(pair)) for pair in precisions.values()) * len(evalset)
    with tqdm(total=n_scores, unit="score", disable=not progress) as bar:
        for stage in spec.stages:
            found = {}
            for precision in dict.fromkeys(precisions[stage.name]):
                bar.set_description(f"{stage.name} in {precision}")
                with quiet(f"loading {stage.name}"):
                    loaded = Stage(replace(stage, precision=precision), features=stage.name in with_features)
                with loaded:
                    encodings = loaded.encode(evalset.texts, evalset.texts_b)
                    found[precision] = loaded.score(encodings, done=bar.update)[0]
            scores.lower[stage.name], scores.exact[stage.name] = (found[one] for one in precisions[stage.name])
            scores.files[stage.name] = loaded.files
    return scores


def _changed(evalset: EvalSet, exact: np.ndarray, lower: np.ndarray) -> pd.DataFrame:
    """Return the texts whose answer differs: `text`, `label`, `float32` and `lower`."""
    rows = np.flatnonzero(exact != lower)
    texts = evalset.examples.iloc[rows][["text", "label"]].reset_index(drop=True)
    return texts.assign(float32=exact[rows], lower=lower[rows])

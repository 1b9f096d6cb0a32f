"""Measures how long a cascade takes to answer batches of several sizes at several thresholds."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import replace
from datetime import datetime, timezone
from pathlib import Path
from time import perf_counter
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import pandas as pd
from tqdm.auto import tqdm

from cascade_lab.analysis.same_cascade import check_same_files
from cascade_lab.analysis.serving_latency import LatencyStudy, incoming_batches
from cascade_lab.decisions import StageDecision, route
from cascade_lab.evalset import EvalSet
from cascade_lab.exceptions import CascadeLabError, CheckpointError, CheckpointWarning
from cascade_lab.mixed_scoring import score_shadow
from cascade_lab.provenance import environment, sha256
from cascade_lab.spec import CascadeSpec, StageSpec
from cascade_lab.stage_output import ScoredRows, StageOutput

if TYPE_CHECKING:
    from cascade_lab.bert.tokenization import Encoding
    from cascade_lab.cascade import Cascade
    from cascade_lab.run import Run

BATCH_SIZES = (1, 8, 32, 128)
REPEATS = 5
LIMIT = 512
BATCHES = 128
WARM = 32  # texts that are scored first, without keeping their times, at each batch size and threshold
CHECKED = (0.1, 0.3, 0.5, 0.7, 0.9)
"""The quantiles of the first gate's probability at which thresholds are checked."""


def serve_batch(
    cascade: Cascade, texts: Sequence[str], texts_b: Sequence[str | None] | None = None, *, spec: CascadeSpec
) -> tuple[pd.DataFrame, list[dict[str, Any]]]:
    """Run one batch through the stages as a server does: the texts that a stage passes on form the next stage's batch.

    `Cascade.run` has all texts at once and fills the later stages' batches with the survivors of many batches.
    `Cascade.predict` of very few texts starts all stages at once. This function does neither, so it measures each
    stage's own time, and what a threshold saves.

    Parameters
    ----------
    cascade : Cascade
    texts, texts_b : sequence of str
    spec : CascadeSpec
        The cascade's own, or the same cascade at other thresholds.

    Returns
    -------
    predictions : DataFrame
        One row per text: `predicted`, `decided_by`, `probability`, `confidence`.
    timings : list of dict
        One row per stage that was reached: `stage`, `n_examples`, `sequence_length`, `n_tokens`, `tokenize_seconds`
        (almost 0 where the stage before tokenizes alike), `run_seconds` (in the session; with mixed precision also the
        choice of what is scored again), `answer_seconds` (softmax and threshold). A rejector over several mixed stages
        gets the scores of the others as they are; `predict` scores these again too, and takes longer.
    """
    timings: list[dict[str, Any]] = []
    stages = dict(zip((stage.name for stage in spec.stages), cascade.stages, strict=True))
    tokenizer: Any = None  # the settings with which `encodings` were made
    encodings: dict[int, Encoding] = {}  # by row; a stage that tokenizes like the one before takes them as they are
    outputs: dict[str, ScoredRows] = {}
    started = perf_counter()

    def score_and_decide(stage_spec: StageSpec, rows: np.ndarray) -> StageDecision:
        nonlocal tokenizer, encodings, started
        if timings:  # the routing since the stage before belongs to that stage
            timings[-1]["answer_seconds"] += perf_counter() - started
        stage, started = stages[stage_spec.name], perf_counter()
        if stage.tokenizer.settings != tokenizer:
            second = None if texts_b is None else [texts_b[row] for row in rows]
            encodings = dict(zip(rows.tolist(), stage.encode([texts[row] for row in rows], second), strict=True))
            tokenizer = stage.tokenizer.settings
        arrived = [encodings[row] for row in rows.tolist()]
        tokenized = perf_counter()
        parts = {name: [one] for name, one in outputs.items()}
        outputs[stage_spec.name] = ScoredRows(rows, score_shadow(cascade, stage, rows, arrived, parts, spec=spec))
        scored = perf_counter()
        so_far = {name: earlier.at(rows) for name, earlier in outputs.items()}
        decision, _ = cascade.decide(stage_spec, so_far, spec=spec)
        lengths = [len(encoding.input_ids) for encoding in arrived]
        decided = perf_counter()
        timings.append(
            {
                "stage": stage_spec.name,
                "n_examples": len(lengths),
                "sequence_length": max(lengths),
                "n_tokens": sum(lengths),
                "tokenize_seconds": tokenized - started,
                "run_seconds": scored - tokenized,
                "answer_seconds": decided - scored,
            }
        )
        started = decided
        return decision

    routed = route(spec, score_and_decide, n_examples=len(texts))
    timings[-1]["answer_seconds"] += perf_counter() - started
    return routed.frame(), timings


def measure(
    cascade: Cascade,
    evalset: EvalSet,
    *,
    batch_sizes: Sequence[int] = BATCH_SIZES,
    repeats: int = REPEATS,
    limit: int | None = LIMIT,
    batches: int = BATCHES,
    seed: int = 0,
    progress: bool = False,
) -> LatencyStudy:
    """Measure an eval set at each batch size, at the cascade's own thresholds and at five others of its first stage.

    Every repeat takes the texts in a new random order (a server cannot sort them by length before they come), and goes
    through all batch sizes and thresholds in random order, so that a drift of the machine affects all alike. A repeat
    before the first one warms up and is not kept. The other thresholds are quantiles of the stage's confidence; each is
    measured with every `repeats`-th batch of every repeat.

    Parameters
    ----------
    cascade : Cascade
    evalset : EvalSet
        Its labels are not used.
    batch_sizes : sequence of int
    repeats : int
    limit : int, optional
        Use only this many texts, evenly spaced through the set.
    batches : int
        The largest number of batches of a repeat at one batch size and threshold.
    seed : int
    progress : bool
        Show a progress bar.

    Raises
    ------
    CascadeLabError
        A batch size below 1, given twice, or larger than the set.
    """
    evalset = evalset if limit is None else evalset.limit(limit)
    check_sizes(batch_sizes, len(evalset))
    started, clock = datetime.now(timezone.utc), perf_counter()
    texts, texts_b = evalset.texts, evalset.texts_b
    scored = _score_all(cascade, evalset)
    first = cascade.spec.stages[0]
    checked = _check_thresholds(scored[f"{first.name}_probability"]) if first.role != "final" else []
    specs = {t: cascade.spec.with_thresholds({first.name: t}) for t in checked}
    plan = _plan(len(texts), batch_sizes, repeats, batches, checked, seed)
    rows = []
    with tqdm(total=sum(len(batch.rows) for batch in plan), unit="text", disable=not progress) as bar:
        for batch in plan:
            spec = cascade.spec if batch.check_threshold is None else specs[batch.check_threshold]
            second = None if texts_b is None else [texts_b[row] for row in batch.rows]
            timings = serve_batch(cascade, [texts[row] for row in batch.rows], second, spec=spec)[1]
            columns = {
                "check": batch.check_threshold is not None,
                "threshold": spec.stages[0].threshold if first.role != "final" else np.nan,
                "repeat": batch.repeat,
                "batch_size": batch.batch_size,
                "batch": batch.number,
            }
            rows += [{**columns, **timing} for timing in timings if batch.is_kept]
            bar.update(len(batch.rows))
    settings = {
        "cascade": cascade.spec.to_dict(),
        "evalset": evalset.origin,
        "batch_sizes": list(batch_sizes),
        "repeats": repeats,
        "batches": batches,
        "seed": seed,
        "checked": checked,
        "inputs": {str(path): sha256(path) for stage in cascade.stages for path in stage.files},
        "stages": {stage.spec.name: stage.settings for stage in cascade.stages},
        "started": started.isoformat(timespec="seconds"),
        "wall_seconds": perf_counter() - clock,
        **environment(),
    }
    return LatencyStudy(settings, scored, pd.DataFrame(rows))


def measure_run(
    run: Run,
    *,
    batch_sizes: Sequence[int] = BATCH_SIZES,
    repeats: int = REPEATS,
    limit: int | None = LIMIT,
    progress: bool = False,
) -> LatencyStudy:
    """Measure the cascade that made a run, on the run's own texts: see `measure`.

    The checkpoints are those that the run's manifest names. Nothing is loaded unless they have the digests that they
    had when the run was made. Batch sizes larger than the number of texts are left out.

    Raises
    ------
    CheckpointError
        A file of the cascade is missing.
    RunError
        A file was changed or exchanged since the run; or the logits of the run were computed elsewhere.
    """
    texts = EvalSet.from_frame(run.examples[["example_id", "text", "text_b"]], unlabelled=True)
    origin = {key: run.manifest["evalset"].get(key) for key in ("source", "split", "sha256")}
    texts = replace(texts if limit is None else texts.limit(limit), **origin)
    check_same_files(run, stage_digests(run.spec), fault="its cascade was changed since")
    from cascade_lab.cascade import Cascade

    with Cascade.load(run.spec) as cascade:
        return measure(
            cascade,
            texts,
            batch_sizes=[size for size in batch_sizes if size <= len(texts)] or [len(texts)],
            repeats=repeats,
            limit=None,
            progress=progress,
        )


def stage_digests(spec: CascadeSpec) -> dict[str, str]:
    """Return the SHA-256 of each file that a cascade loads, by path, in the order of the stages.

    Raises
    ------
    CheckpointError
        A file is missing, or a stage was scored elsewhere and names none.
    """
    digests = {}
    for stage in spec.stages:
        for path in loaded_files(stage):
            if not path.is_file():
                raise CheckpointError(f"stage '{stage.name}': {path} is missing; put it back, or give a latency study")
            digests[str(path)] = sha256(path)
    return digests


def loaded_files(stage: StageSpec) -> list[Path]:
    """Return the files that a stage loads: config, vocabulary, and the files of the checkpoint.

    Raises
    ------
    CheckpointError
        There is no checkpoint, or the stage was scored elsewhere and names none.
    """
    from cascade_lab.bert.checkpoint import checkpoint_files, find_checkpoint, stage_files  # loads TensorFlow

    files = stage_files(stage)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", CheckpointWarning)  # loading gives the same warnings
        prefix = find_checkpoint(files.init_checkpoint)
    return [files.bert_config_file, files.vocab_file, *checkpoint_files(prefix)]


def check_sizes(batch_sizes: Sequence[int], n_texts: int) -> None:
    """Raise CascadeLabError where a batch size is below 1, given twice, or larger than the set."""
    if not batch_sizes or min(batch_sizes) < 1 or len(set(batch_sizes)) < len(batch_sizes):
        given = ",".join(str(size) for size in batch_sizes)
        raise CascadeLabError(
            f"batch sizes '{given}' must be different whole numbers, at least 1; give some, such as 1,32"
        )
    if max(batch_sizes) > n_texts:
        raise CascadeLabError(
            f"batch size {max(batch_sizes)} needs at least as many texts, but there are {n_texts}; give more texts, or "
            "smaller batches"
        )


class _PlannedBatch(NamedTuple):
    """One batch of the plan; `check_threshold` is None at the cascade's own threshold."""

    is_kept: bool
    check_threshold: float | None
    repeat: int
    batch_size: int
    number: int
    rows: np.ndarray


def _plan(
    n: int, batch_sizes: Sequence[int], repeats: int, batches: int, checked: Sequence[float], seed: int
) -> list[_PlannedBatch]:
    """Return every batch to measure, in order."""
    rng = np.random.default_rng(seed)
    spare = {size: incoming_batches(n, size, repeats, max_batches=batches, seed=seed) for size in batch_sizes}
    plan = []
    for repeat in (repeats, *range(repeats)):  # the repeat after the last comes first: it warms up
        cells: list[tuple[int, float | None, slice]] = [(size, None, slice(None)) for size in batch_sizes]
        cells += [
            (size, threshold, slice((repeat + index) % repeats, None, repeats))
            for index, threshold in enumerate(checked)
            for size in batch_sizes
        ]
        for cell in rng.permutation(len(cells)):
            size, threshold, part = cells[cell]
            key = (threshold, repeat, size)
            # After a change of batch size the caches are cold: the first small batches are not kept.
            warm = spare[size][: WARM // size]
            plan += [_PlannedBatch(False, *key, number, rows) for number, rows in enumerate(warm)]
            incoming = list(enumerate(incoming_batches(n, size, repeat, max_batches=batches, seed=seed)))
            plan += [_PlannedBatch(repeat < repeats, *key, number, rows) for number, rows in incoming[part]]
    return plan


def _score_all(cascade: Cascade, evalset: EvalSet) -> pd.DataFrame:
    """Return every stage's confidence in every text, whatever the stages decide, and how many tokens the text has."""
    table = evalset.examples[["example_id"]].copy()
    outputs: dict[str, StageOutput] = {}
    rows = np.arange(len(evalset))
    for stage in cascade.stages:
        encodings = stage.encode(evalset.texts, evalset.texts_b)
        parts = {name: [ScoredRows(rows, output)] for name, output in outputs.items()}
        outputs[stage.spec.name] = score_shadow(cascade, stage, rows, encodings, parts)
        table[f"{stage.spec.name}_probability"] = cascade.decide(stage.spec, outputs)[0].confidence
        table[f"{stage.spec.name}_tokens"] = [len(encoding.input_ids) for encoding in encodings]
    return table


def _check_thresholds(probabilities: pd.Series) -> list[float]:
    """Return thresholds that stop the fractions `CHECKED` of the texts, each midway between two probabilities.

    A text with a probability equal to a threshold would pass or not by the rounding of its batch.
    """
    values = np.unique(probabilities)
    index = np.searchsorted(values, np.quantile(probabilities, CHECKED, method="inverted_cdf"))
    return [float(t) for t in np.unique((values[index] + values[np.minimum(index + 1, len(values) - 1)]) / 2)]

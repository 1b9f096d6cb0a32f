"""Live serial runs at several batch sizes and thresholds, timed batch by batch: what a server's caller would wait."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime, timezone
from time import perf_counter
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import pandas as pd
from tqdm.auto import tqdm

from cascade_lab.analysis.live_latency import LatencyStudy, incoming_batches
from cascade_lab.errors import CascadeLabError
from cascade_lab.evalset import EvalSet
from cascade_lab.provenance import environment, sha256
from cascade_lab.serial import answer, blank_answers, settle
from cascade_lab.spec import CascadeSpec

if TYPE_CHECKING:
    from cascade_lab.cascade import Cascade

BATCH_SIZES = (1, 8, 32, 128)
REPEATS = 5
LIMIT = 512
BATCHES = 128
WARM = 32  # texts that are served anew before the times of a batch size and threshold are kept
CHECKED = (0.1, 0.3, 0.5, 0.7, 0.9)
"""The quantiles of the first gate's probability at which thresholds are checked."""


def serve_batch(
    cascade: Cascade, texts: Sequence[str], texts_b: Sequence[str | None] | None = None, *, spec: CascadeSpec
) -> tuple[pd.DataFrame, list[dict[str, Any]]]:
    """Serve one batch as it comes in: its survivors, and no others, go on to the next stage.

    Unlike `Cascade.run`, which fills the later stages' batches with the survivors of many, since it has all texts at
    once; and unlike `Cascade.predict` of very few texts, whose later stages begin before they know: so each stage's
    own time is seen here, and what a threshold saves.

    Parameters
    ----------
    cascade : Cascade
    texts, texts_b : sequence of str
    spec : CascadeSpec
        The cascade's own, or the same at other thresholds.

    Returns
    -------
    answers : DataFrame
        A row a text: `predicted`, `decided_by`, `probability`.
    timings : list of dict
        A row a stage that was reached: `stage`, `n_examples`, `sequence_length`, `n_tokens`, `tokenize_seconds` (next
        to nothing where the stage before tokenizes alike), `run_seconds` (in the session), `answer_seconds` (softmax
        and threshold).
    """
    answers, timings = blank_answers(len(texts)), []
    arrived = np.arange(len(texts))
    tokenizer, encodings = None, []  # a stage that tokenizes as the one before takes what that one's survivors have
    for stage, stage_spec in zip(cascade.stages, spec.stages, strict=True):
        if not len(arrived):
            break
        started = perf_counter()
        if stage.tokenizer.settings != tokenizer:
            here = [texts[row] for row in arrived]
            encodings = stage.encode(here, None if texts_b is None else [texts_b[row] for row in arrived])
            tokenizer = stage.tokenizer.settings
        tokenized = perf_counter()
        logits = stage.score(encodings)[0]
        ran = perf_counter()
        said = answer(stage_spec, logits)
        settle(answers, stage_spec, arrived, said)
        arrived = arrived[said.passes]
        lengths = [len(encoding.input_ids) for encoding in encodings]
        encodings = [encodings[row] for row in np.flatnonzero(said.passes)]
        answered = perf_counter()
        timings.append(
            {
                "stage": stage_spec.name,
                "n_examples": len(lengths),
                "sequence_length": max(lengths),
                "n_tokens": sum(lengths),
                "tokenize_seconds": tokenized - started,
                "run_seconds": ran - tokenized,
                "answer_seconds": answered - ran,
            }
        )
    return pd.DataFrame(answers), timings


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
    """Serve an eval set live, at each batch size, at the cascade's own and at five other thresholds of its first gate.

    Every repeat takes the texts in a new order, by chance (a server cannot sort them by length before they come), and
    goes through all batch sizes and thresholds in an order by chance, so that a drift of the machine hits all alike.
    A repeat before the first warms up and is not kept. The other thresholds are quantiles of the gate's probability;
    each is served every `repeats`-th batch of every repeat.

    Parameters
    ----------
    cascade : Cascade
    evalset : EvalSet
        Its labels are not looked at.
    batch_sizes : sequence of int
    repeats : int
    limit : int, optional
        Take only so many texts, evenly spaced through the set.
    batches : int
        The most batches of a repeat at one batch size and threshold.
    seed : int
    progress : bool
        Show a progress bar.

    Raises
    ------
    CascadeLabError
        A batch size that is none, or larger than the set.
    """
    evalset = evalset if limit is None else evalset.limit(limit)
    check_sizes(batch_sizes, len(evalset))
    started, clock = datetime.now(timezone.utc), perf_counter()
    texts, texts_b = evalset.texts, evalset.texts_b
    seen = _look(cascade, evalset)
    first = cascade.spec.stages[0]
    checked = _spread(seen[f"{first.name}_probability"]) if first.is_gate else []
    specs = {t: cascade.spec.with_thresholds({first.name: t}) for t in checked}
    plan = _plan(len(texts), batch_sizes, repeats, batches, checked, seed)
    rows = []
    with tqdm(total=sum(len(served.rows) for served in plan), unit="text", disable=not progress) as bar:
        for served in plan:
            spec = cascade.spec if served.checked is None else specs[served.checked]
            pairs = None if texts_b is None else [texts_b[row] for row in served.rows]
            timings = serve_batch(cascade, [texts[row] for row in served.rows], pairs, spec=spec)[1]
            kept = {
                "check": served.checked is not None,
                "threshold": spec.stages[0].threshold if first.is_gate else np.nan,
                "repeat": served.repeat,
                "batch_size": served.batch_size,
            }
            rows += [{**kept, "batch": served.batch, **timing} for timing in timings if served.kept]
            bar.update(len(served.rows))
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
    return LatencyStudy(settings, seen, pd.DataFrame(rows))


def check_sizes(batch_sizes: Sequence[int], n_texts: int) -> None:
    """Raise CascadeLabError where a batch size is none, stands twice, or is larger than the set."""
    if not batch_sizes or min(batch_sizes) < 1 or len(set(batch_sizes)) < len(batch_sizes):
        given = ",".join(str(size) for size in batch_sizes)
        raise CascadeLabError(f"batch sizes '{given}' must be different whole numbers from 1; give some, such as 1,32")
    if max(batch_sizes) > n_texts:
        raise CascadeLabError(
            f"batch size {max(batch_sizes)} needs as many texts, and there are {n_texts}; take more, or smaller batches"
        )


class _Served(NamedTuple):
    """One batch of the plan: at which threshold (None: the cascade's own), and whether its times are kept."""

    kept: bool
    checked: float | None
    repeat: int
    batch_size: int
    batch: int
    rows: np.ndarray


def _plan(
    n: int, batch_sizes: Sequence[int], repeats: int, batches: int, checked: Sequence[float], seed: int
) -> list[_Served]:
    """Return every batch to serve, in order."""
    rng = np.random.default_rng(seed)
    spare = {size: incoming_batches(n, size, repeats, most=batches, seed=seed) for size in batch_sizes}
    plan = []
    for repeat in (repeats, *range(repeats)):  # the one beyond the last warms up
        cells: list[tuple[int, float | None, slice]] = [(size, None, slice(None)) for size in batch_sizes]
        cells += [
            (size, threshold, slice((repeat + place) % repeats, None, repeats))
            for place, threshold in enumerate(checked)
            for size in batch_sizes
        ]
        for i in rng.permutation(len(cells)):
            size, threshold, part = cells[i]
            here = (threshold, repeat, size)
            # After a change of batch size the caches are cold: the first few small batches are not kept.
            plan += [_Served(False, *here, number, rows) for number, rows in enumerate(spare[size][: WARM // size])]
            incoming = enumerate(incoming_batches(n, size, repeat, most=batches, seed=seed))
            plan += [_Served(repeat < repeats, *here, number, rows) for number, rows in list(incoming)[part]]
    return plan


def _look(cascade: Cascade, evalset: EvalSet) -> pd.DataFrame:
    """Return what every stage says of every text, whatever its gate says, and how many tokens it has there."""
    seen = evalset.examples[["example_id"]].copy()
    for stage in cascade.stages:
        encodings = stage.encode(evalset.texts, evalset.texts_b)
        seen[f"{stage.spec.name}_probability"] = answer(stage.spec, stage.score(encodings)[0]).decisive
        seen[f"{stage.spec.name}_tokens"] = [len(encoding.input_ids) for encoding in encodings]
    return seen


def _spread(probabilities: pd.Series) -> list[float]:
    """Return thresholds that hold back the fractions `CHECKED` of the texts, each midway between two probabilities.

    A text that stood right at a threshold would pass or not by the rounding of its batch.
    """
    values = np.unique(probabilities)
    at = np.searchsorted(values, np.quantile(probabilities, CHECKED, method="inverted_cdf"))
    return [float(t) for t in np.unique((values[at] + values[np.minimum(at + 1, len(values) - 1)]) / 2)]

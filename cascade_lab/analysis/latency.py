"""How long a text takes at each stage, from the seconds that a run keeps."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from cascade_lab.run import Run

PERCENTILES = (50, 95, 99)


@dataclass(frozen=True)
class StageLatency:
    """Time a text at one stage: its batch's tokenization and run, divided by the batch's texts.

    A run scores several batches side by side where there are several processors, each in a time of its own.

    Attributes
    ----------
    text_ms : ndarray of float, shape (n_texts,)
        Milliseconds a text; every text of a batch has the batch's figure.
    percentiles_ms : dict of int to float
        The 50th, 95th and 99th percentile of `text_ms`.
    seconds : float
        What the stage took in all.
    share : float
        Its fraction of what all stages took.
    """

    text_ms: np.ndarray
    percentiles_ms: dict[int, float]
    seconds: float
    share: float


def stage_latencies(run: Run) -> dict[str, StageLatency]:
    """Return each stage's latency on the serial path (shadow scores are not timed)."""
    timings = run.timings
    seconds = (timings["tokenize_seconds"] + timings["run_seconds"]).to_numpy()
    n_examples = timings["n_examples"].to_numpy()
    stages = {}
    for stage in run.spec.stages:
        own = (timings["stage"] == stage.name).to_numpy()
        text_ms = np.repeat(1000 * seconds[own] / n_examples[own], n_examples[own])
        stages[stage.name] = StageLatency(
            text_ms=text_ms,
            percentiles_ms={p: _percentile(text_ms, p) for p in PERCENTILES},
            seconds=float(seconds[own].sum()),
            share=float(seconds[own].sum() / seconds.sum()),
        )
    return stages


def _percentile(values: np.ndarray, p: int) -> float:
    return float(np.percentile(values, p)) if len(values) else float("nan")


def predicted_latency(run: Run, reach: float | np.ndarray) -> dict[str, np.ndarray]:
    """Return what a text would take if a fraction `reach` of the texts got beyond the first stage.

    Stage 1 + reach × the later stages, from the times of this run: at its batch size, and with a text that is slow at
    one stage (a long one) as slow at the next.

    Parameters
    ----------
    run : Run
    reach : float or ndarray, shape (n,)

    Returns
    -------
    dict of str to ndarray, shape (n,)
        `mean_ms`, `p50_ms`, `p95_ms`, `p99_ms`; NaN where the run timed nothing.
    """
    reach = np.atleast_1d(np.asarray(reach, dtype=np.float64))
    first, later = _first_and_later(run)
    found = {"mean_ms": first.mean() + reach * later.mean()}
    ms = np.concatenate([first, first + later])
    order = np.argsort(ms, kind="stable")
    for p in PERCENTILES:
        weights = np.concatenate([np.outer(1 - reach, np.ones(len(first))), np.outer(reach, np.ones(len(first)))], 1)
        below = weights[:, order].cumsum(axis=1) / len(first)
        found[f"p{p}_ms"] = ms[order][np.minimum((below < p / 100 - 1e-12).sum(axis=1), len(ms) - 1)]
    return found


def reach_within(run: Run, name: str, limit: float) -> float:
    """Return the largest fraction of texts beyond the first stage at which latency `name` is at most `limit` ms.

    `name` is of `predicted_latency`; the result is below 0 where not even the first stage alone is so fast.
    """
    first, later = _first_and_later(run)
    if name == "mean_ms":
        room = limit - first.mean()
        return float(np.clip(room / later.mean(), -1, 1)) if later.mean() else float(np.sign(room) or 1)
    # Of the texts, (1 - reach) · alone + reach · both are within the limit.
    share = int(name[1:-3]) / 100
    alone, both = np.mean(first <= limit), np.mean(first + later <= limit)
    if both >= share:
        return 1.0
    return float((alone - share) / (alone - both)) if alone >= share else -1.0


def _first_and_later(run: Run) -> tuple[np.ndarray, np.ndarray]:
    """Return the percentiles of a text's milliseconds at the first stage, and at the later stages together."""
    stages = list(stage_latencies(run).values())
    ranks = (np.arange(1000) + 0.5) / 10
    first, *later = (np.percentile(s.text_ms, ranks) if len(s.text_ms) else np.zeros(1000) for s in stages)
    return first, np.sum(later, axis=0) if later else np.zeros(1000)

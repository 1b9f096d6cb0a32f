"""How long a text takes at each stage, from the seconds that a run keeps."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from cascade_lab.run import Run

PERCENTILES = (50, 95, 99)


@dataclass(frozen=True)
class StageLatency:
    """Time a text at one stage: its batch's tokenization and run, divided by the batch's texts.

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

"""The times of a run per stage, against a loop over its batches."""

from __future__ import annotations

import numpy as np
import pytest
from test_errors import five_texts

from cascade_lab import Run
from cascade_lab.analysis.latency import (
    amortized_ms,
    is_timed,
    latency_summary,
    predicted_latency,
    reach_within,
    stage_latencies,
)
from cascade_lab.exceptions import RunError


def test_latency_is_weighted_by_texts_and_shares_add_up_to_1(tiny_run):
    latencies = stage_latencies(tiny_run)
    timings = tiny_run.timings
    assert sum(latency.share for latency in latencies.values()) == pytest.approx(1)
    for name, latency in latencies.items():
        per_text = [
            1000 * (row.tokenize_seconds + row.run_seconds) / row.n_examples
            for row in timings[timings["stage"] == name].itertuples()
            for _ in range(row.n_examples)
        ]
        assert latency.percentiles_ms[95] == pytest.approx(np.percentile(per_text, 95))
        assert latency.seconds == pytest.approx(sum(per_text) / 1000)


def test_the_summary_names_the_stage_that_takes_the_most_time():
    """Both stages take 11 ms for their only batch: the gate 5 texts, the last stage 3."""
    sentences = latency_summary(five_texts())
    assert len(sentences) == 1
    assert sentences[0].startswith("Stage gate takes 50% of the time; half of its texts take 2.20 ms or less")
    assert amortized_ms(np.array([0.011]), np.array([5])).tolist() == pytest.approx([2.2] * 5)


def test_a_run_without_times_has_no_latency():
    run = five_texts()
    logits = {stage.name: run.scores(stage.name).logits for stage in run.spec.stages}
    untimed = Run.from_logits(run.spec, run.examples, logits)
    assert is_timed(run)
    assert not is_timed(untimed)
    assert latency_summary(untimed) == []
    for function in (
        stage_latencies,
        lambda run: predicted_latency(run, 0.5),
        lambda run: reach_within(run, "p95_ms", 1),
    ):
        with pytest.raises(RunError, match="was not timed"):
            function(untimed)

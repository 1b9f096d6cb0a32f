"""The times of a run per stage, against a loop over its batches."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
from helpers import memory_run, random_spec
from test_errors import five_texts

from cascade_lab import Run
from cascade_lab.analysis.latency import (
    amortized_ms,
    is_timed,
    latency_summary,
    predicted_latency,
    reach_within,
    stage_latencies,
    timing_note,
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
    assert sentences[0].startswith(
        "Stage gate takes 50% of the time of all batches; half of its texts take 2.20 ms or less"
    )
    assert amortized_ms(np.array([0.011]), np.array([5])).tolist() == pytest.approx([2.2] * 5)


def test_the_note_says_why_the_times_add_up_to_more_than_passed():
    """Both stages take 11 ms, on two threads, while 12 ms passed."""
    run = five_texts()
    assert timing_note(run)[-1] == "share: of 0.02 s, the times of all batches added up"
    run.manifest |= {"stages": {"gate": {"n_workers": 2}, "last": {"n_workers": 1}}, "serial_seconds": 0.012}
    assert timing_note(run) == [
        "ms/text: amortised milliseconds per text, the time of a batch divided by its texts",
        "share: of 0.02 s, the times of all batches added up; 2 threads score batches at the same time, so the run "
        "took 0.01 s",
    ]


def test_a_run_without_times_has_no_latency():
    run = five_texts()
    logits = {stage.name: run.scores(stage.name).logits for stage in run.spec.stages}
    untimed = Run.from_logits(run.spec, run.examples, logits)
    assert is_timed(run)
    assert not is_timed(untimed)
    assert latency_summary(untimed) == []
    for function in (
        stage_latencies,
        timing_note,
        lambda run: predicted_latency(run, 0.5),
        lambda run: reach_within(run, "p95_ms", 1),
    ):
        with pytest.raises(RunError, match="was not timed"):
            function(untimed)


def three_stages(seconds: dict[str, list[float]], n_examples: dict[str, list[int]]) -> Run:
    """Return a run of three stages with these batches."""
    timings = pd.DataFrame(
        [
            {"stage": stage, "batch": i, "n_examples": n, "tokenize_seconds": 0.0, "run_seconds": value}
            for stage in seconds
            for i, (value, n) in enumerate(zip(seconds[stage], n_examples[stage], strict=True))
        ]
    )
    run = memory_run(random_spec(n_gates=2), *random_examples(60, seed=1))
    scores = {stage.name: run.scores(stage.name) for stage in run.spec.stages}
    return Run(run.manifest, run.examples, scores, run.predictions, timings)


def random_examples(n, *, seed):
    rng, spec = np.random.default_rng(seed), random_spec(n_gates=2)
    examples = pd.DataFrame({"example_id": [str(i) for i in range(n)], "text": "t", "text_b": None, "label": "label0"})
    logits = {s.name: rng.normal(size=(n, len(s.labels))).astype(np.float32) for s in spec.stages}
    return examples, logits


def test_the_latency_of_three_stages_at_the_reach_of_the_run_is_that_of_the_run():
    """10 texts, of which 4 reach the second stage and 1 the third."""
    seconds = {"gate0": [0.006, 0.004], "gate1": [0.009, 0.011], "last": [0.05]}
    run = three_stages(seconds, {"gate0": [3, 7], "gate1": [2, 2], "last": [1]})
    predicted = predicted_latency(run, np.array([0.0, 0.4, 1.0]))
    all_ms = 1000 * sum(map(sum, seconds.values()))
    assert predicted["mean_ms"] == pytest.approx([1.0, all_ms / 10, 1.0 + 5.0 + 12.5], abs=0.01)
    # At the run's reach, 6 texts end at the first stage, 3 at the second and 1 at the third.
    assert predicted["p50_ms"][1] <= 2
    assert predicted["p95_ms"][1] > 54
    assert predicted["p99_ms"][1] > 54
    for limit in (1.5, 3.5, 6.0, 18.0):
        reach = reach_within(run, "mean_ms", limit)
        assert float(predicted_latency(run, reach)["mean_ms"][0]) == pytest.approx(limit)
    for limit in (6.0, 7.0, 50.6):
        reach = reach_within(run, "p95_ms", limit)
        assert float(predicted_latency(run, max(reach - 1e-6, 0))["p95_ms"][0]) <= limit
        if reach < 1:
            assert float(predicted_latency(run, reach + 0.01)["p95_ms"][0]) > limit

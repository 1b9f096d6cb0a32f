"""The latency study: its metrics, predictions and tables, on timings written by hand or from a known cost."""

from __future__ import annotations

import re
from dataclasses import replace

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
from helpers import memory_run
from test_displays import drawn_inside

from cascade_lab import Run
from cascade_lab.analysis.latency_intervals import quantile_interval, ratio_interval
from cascade_lab.analysis.same_cascade import check_same_cascade
from cascade_lab.analysis.serving_latency import (
    WHOLE,
    LatencyStudy,
    StageCost,
    by_length,
    checked_cost,
    incoming_batches,
    predicted_cost,
    serving_metrics,
)
from cascade_lab.analysis.serving_summary import (
    cost_and_quality,
    cost_checks,
    missing_intervals,
    summary,
    text_costs,
    waiting_times,
)
from cascade_lab.displays.latency import BatchLatencyDisplay, LengthLatencyDisplay, PredictedCostDisplay
from cascade_lab.exceptions import CascadeLabError, RunError, SpecError


def cost(index, lengths, overhead):
    """Return the seconds of a batch at a stage of the simulated machine, which pads to the longest text."""
    n = len(lengths)
    return (overhead + (0.5 + index) * n + 0.03 * n * max(lengths)) / 1000


def served(study, threshold, batch):
    """Serve one batch in the plainest way; return the lengths of the texts that reach each stage."""
    reached, rows = [], list(batch)
    for index, stage in enumerate(study.spec.stages):
        if not rows:
            break
        reached.append([int(study.texts[f"{stage.name}_tokens"][row]) for row in rows])
        stage_threshold = threshold if index == 0 else stage.threshold
        if stage.is_gate:
            rows = [row for row in rows if study.texts[f"{stage.name}_probability"][row] >= stage_threshold]
    return reached


def simulated(n_gates=1, n=300, *, seed=0, batch_sizes=(1, 4, 16, 64), repeats=2, name="simulated", overhead=0.0):
    """Return a study of a machine whose times are exactly `cost`."""
    rng = np.random.default_rng(seed)
    stages = [
        {"name": f"gate{i}", "labels": [f"oos{i}", "in"], "pass_label": "in", "threshold": 0.3} for i in range(n_gates)
    ]
    stages.append({"name": "last", "labels": ["a", "b", "c"]})
    texts = pd.DataFrame({"example_id": [str(i) for i in range(n)]})
    for stage in stages:
        texts[f"{stage['name']}_probability"] = rng.random(n)
        texts[f"{stage['name']}_tokens"] = rng.integers(3, 40, n)
    checked = [0.1, 0.5, 0.9] if n_gates else []
    settings = {
        "cascade": {"name": name, "stage": stages}, "evalset": {},
        "batch_sizes": list(batch_sizes), "repeats": repeats, "batches": 50, "seed": seed, "checked": checked,
    }  # fmt: skip
    study = LatencyStudy(settings, texts, pd.DataFrame())
    rows = []
    for threshold in [None, *checked]:
        for size in batch_sizes:
            for repeat in range(repeats):
                for number, batch in enumerate(study.batches(size, repeat)):
                    used = 0.3 if threshold is None else threshold
                    for index, lengths in enumerate(served(study, used, batch)):
                        rows.append(
                            {
                                "check": threshold is not None, "threshold": used, "repeat": repeat, "batch_size": size,
                                "stage": stages[index]["name"], "batch": number, "n_examples": len(lengths),
                                "sequence_length": max(lengths), "n_tokens": sum(lengths),
                                "tokenize_seconds": 0.25 * cost(index, lengths, overhead),
                                "run_seconds": 0.7 * cost(index, lengths, overhead),
                                "answer_seconds": 0.05 * cost(index, lengths, overhead),
                            }
                        )  # fmt: skip
    return LatencyStudy(settings, texts, pd.DataFrame(rows))


@pytest.fixture(scope="module")
def study():
    return simulated()


def test_metrics_by_hand():
    """Three batches of at most 2 texts. Of the second batch no text goes on; the last has only one text.

    batch   texts   gate    on   intent   whole
    0       2       10 ms   2    30 ms    40 ms
    1       2       20 ms   0    -        20 ms
    2       1       50 ms   1    10 ms    60 ms
    """
    rows = [("gate", 0, 2, 10), ("intent", 0, 2, 30), ("gate", 1, 2, 20), ("gate", 2, 1, 50), ("intent", 2, 1, 10)]
    timings = pd.DataFrame(rows, columns=["stage", "batch", "n_examples", "ms"])
    timings = timings.assign(
        repeat=0, batch_size=2, tokenize_seconds=timings["ms"] / 5000, run_seconds=0.7 * timings["ms"] / 1000,
        answer_seconds=0.1 * timings["ms"] / 1000,
    )  # fmt: skip
    metrics = serving_metrics(timings).loc[2, "value"]
    # The last batch is not full, so only two batches are waited for; of one of them no text goes on.
    assert metrics[WHOLE, "batch_p50_ms"] == pytest.approx(20)
    assert metrics[WHOLE, "batch_p95_ms"] == pytest.approx(40)
    assert metrics["gate", "batch_p50_ms"] == pytest.approx(10)
    assert metrics["intent", "batch_p50_ms"] == pytest.approx(30)
    assert metrics[WHOLE, "text_ms"] == pytest.approx(120 / 5)
    assert metrics[WHOLE, "texts_per_second"] == pytest.approx(5 / 0.120)
    assert metrics["intent", "text_ms"] == pytest.approx(40 / 3)
    assert metrics["gate", "share"] == pytest.approx(80 / 120)
    assert metrics["intent", "tokenize_share"] == pytest.approx(0.2)


@pytest.mark.parametrize("stage", ["gate0", "last", WHOLE])
def test_metrics_are_those_of_a_loop_over_the_batches(study, stage):
    timings = study.timings[~study.timings["check"] & (study.timings["batch_size"] == 16)]
    metrics = serving_metrics(timings).loc[16, stage]
    ms, texts, is_full = [], [], []
    for _, rows in timings.groupby(["repeat", "batch"]):
        own = rows[rows["stage"] == stage] if stage != WHOLE else rows
        if len(own):
            ms.append(1000 * own[["tokenize_seconds", "run_seconds", "answer_seconds"]].to_numpy().sum())
            texts.append(own["n_examples"].iloc[0])
            is_full.append(rows["n_examples"].max() == 16)
    waits = np.array(ms)[is_full]
    assert 0 < len(waits) < len(ms), "the last batch of a repeat is smaller"
    for p in (50, 95, 99):
        row = metrics.loc[f"batch_p{p}_ms"]
        assert row["value"] == pytest.approx(np.percentile(waits, p, method="inverted_cdf"))
        assert row[["low", "high"]].tolist() == pytest.approx(quantile_interval(waits, p / 100)[1:], nan_ok=True)
        assert row["n_batches"] == len(waits)
    for name, expected in (("text_ms", ratio_interval(ms, texts)), ("texts_per_second", ratio_interval(texts, ms))):
        scale = 1000 if name == "texts_per_second" else 1
        assert metrics.loc[name, ["value", "low", "high"]].tolist() == pytest.approx(np.multiply(expected, scale))


def test_too_few_batches_have_no_interval_and_the_note_says_how_many_are_needed(study):
    low = serving_metrics(study.own)["low"]
    assert np.isfinite(low[1, WHOLE, "batch_p95_ms"])  # 2 repeats of 50 batches
    assert np.isnan(low[1, WHOLE, "batch_p99_ms"])
    assert np.isnan(low[16, WHOLE, "batch_p95_ms"])  # 2 repeats of 18 full batches
    assert np.isfinite(low[16, WHOLE, "batch_p50_ms"])
    (note,) = missing_intervals(study)
    assert "(6 for p50, 59 for p95, 299 for p99, 15 for a cost per text)" in note
    assert "100 of 1, 100 of 4, 36 of 16, 8 of 64 texts" in note
    assert missing_intervals(simulated(0, n=300, batch_sizes=(1,), repeats=6)) == []


def test_one_batch_has_no_interval(study):
    metrics = serving_metrics(study.own[(study.own["repeat"] == 0) & (study.own["batch"] == 0)]).loc[64]
    assert metrics["value"].notna().all()
    assert metrics[["low", "high"]].isna().all(axis=None)


def test_a_repeat_serves_every_text_once_in_its_own_order():
    first, second = (np.concatenate(incoming_batches(50, 8, repeat, max_batches=99)) for repeat in (0, 1))
    assert sorted(first) == sorted(second) == list(range(50))
    assert (first != second).any()
    assert [len(batch) for batch in incoming_batches(50, 8, 0, max_batches=99)] == [8, 8, 8, 8, 8, 8, 2]
    assert np.concatenate(incoming_batches(50, 8, 0, max_batches=2)).tolist() == first[:16].tolist()


@pytest.mark.parametrize("padded", [True, False])
def test_a_cost_is_interpolated_over_texts_and_lengths(padded):
    def truth(n, longest, n_tokens):
        return 3 + 2 * n + 0.1 * (n * longest if padded else n_tokens)

    def draw(counts):
        n = rng.choice(counts, 600)
        lengths = [rng.integers(3, 60, k) for k in n]
        return n, np.array([k.max() for k in lengths]), np.array([k.sum() for k in lengths])

    rng = np.random.default_rng(1)
    seen, others = draw([1, 2, 8, 32]), draw([3, 5, 16, 21, 30])
    fitted = StageCost.fit(*seen, truth(*seen))
    assert fitted(*others) == pytest.approx(truth(*others), rel=1e-6)
    # Beyond the measured sizes, a text costs as much as at the largest one.
    edge, twice = (np.array([32]), np.array([40]), np.array([640])), (np.array([64]), np.array([40]), np.array([1280]))
    assert fitted(*twice) == pytest.approx(2 * fitted(*edge))


# With an overhead per batch, the cost of batches larger than the measured ones is predicted slightly too high.
@pytest.mark.parametrize(("overhead", "within"), [(0.0, 1e-6), (2.0, 0.02)])
@pytest.mark.parametrize(("n_gates", "seed"), [(0, 1), (1, 2), (2, 3), (3, 4)])
def test_the_predicted_cost_is_that_of_serving_batch_by_batch(n_gates, seed, overhead, within):
    study = simulated(n_gates, seed=seed, overhead=overhead)
    thresholds = [0.0, 0.2, 0.55, 0.8, 1.0] if n_gates else [0.0]
    predicted = predicted_cost(study, thresholds)
    assert len(predicted) == len(thresholds) * 4
    for row in predicted.itertuples():
        batches = [batch for repeat in range(2) for batch in study.batches(row.batch_size, repeat)]
        ways = [served(study, row.threshold, batch) for batch in batches]
        n = sum(len(batch) for batch in batches)
        seconds = sum(cost(index, lengths, overhead) for stages in ways for index, lengths in enumerate(stages))
        assert row.text_ms == pytest.approx(1000 * seconds / n, rel=within)
        second = [len(way[1]) for way in ways if len(way) > 1] if n_gates else [len(way[0]) for way in ways]
        if n_gates:
            assert row.reach == pytest.approx(sum(second) / n)
        assert row.surviving == pytest.approx(np.mean(second) if second else np.nan, nan_ok=True)


def test_the_check_compares_the_same_batches_and_predicts_from_none_of_them(study):
    checks = checked_cost(study)
    assert len(checks) == 3 * 4
    assert checks["error"].abs().max() < 1e-6
    slower = study.timings.copy()
    slower.loc[slower["check"], "run_seconds"] *= 3
    again = checked_cost(LatencyStudy(study.settings, study.texts, slower))
    assert again["predicted_ms"].equals(checks["predicted_ms"])
    assert again["measured_ms"].to_numpy() == pytest.approx(checks["measured_ms"] * (1 + 2 * 0.7))
    assert again["error"].to_numpy() == pytest.approx(1 / 2.4 - 1)


def test_the_cost_of_a_stage_that_was_never_reached_is_unknown(study):
    alone = study.timings[study.timings["stage"] == "gate0"]
    predicted = predicted_cost(LatencyStudy(study.settings, study.texts, alone), [0.5, 1.0], [16])
    assert np.isnan(predicted["text_ms"][0])
    assert predicted["text_ms"][1] > 0  # no text goes on


def test_lengths_are_in_groups_of_similar_size(study):
    own = study.own
    table = by_length(own, bins=4)
    assert table.groupby(["batch_size", "stage"])["n_batches"].sum().to_dict() == (
        own.groupby(["batch_size", "stage"]).size().to_dict()
    )
    singles = table[(table["batch_size"] == 1) & (table["stage"] == "gate0")]
    assert len(singles) == 4
    assert singles["text_p50_ms"].is_monotonic_increasing
    assert (table["text_p25_ms"] <= table["text_p50_ms"]).all()


def test_a_study_is_written_whole_and_read_back(study, tmp_path):
    study.write(tmp_path / "study")
    back = LatencyStudy.read(tmp_path / "study")
    pd.testing.assert_frame_equal(back.timings, study.timings)
    pd.testing.assert_frame_equal(back.texts, study.texts)
    assert back.settings == study.settings
    assert back.spec == study.spec
    with pytest.raises(RunError, match="exists already"):
        study.write(tmp_path / "study")
    study.write(tmp_path / "study", overwrite=True)


def test_another_directory_is_neither_read_nor_overwritten(study, tmp_path, small_disk):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "manifest.json").write_text("{}")
    with pytest.raises(RunError, match="not a latency study"):
        study.write(tmp_path / "run", overwrite=True)
    for directory in (tmp_path / "none", tmp_path / "run", tmp_path / "x.unfinished"):
        with pytest.raises(RunError, match="latency"):
            LatencyStudy.read(directory)
    big = LatencyStudy(study.settings, study.texts, pd.concat([study.timings] * 40).sample(frac=1, random_state=0))
    with pytest.raises(RunError, match="nothing was left behind"):
        big.write(small_disk / "study")
    assert not list(small_disk.iterdir())


def test_a_study_shows_itself_in_one_line(study):
    assert repr(study) == (
        "<LatencyStudy simulated: 300 texts, 2 repeats, batches of 1, 4, 16, 64, on an unknown processor>"
    )
    assert "&lt;b&gt;" in simulated(name="<b>")._repr_html_()


@pytest.mark.parametrize("n_gates", [0, 1, 2])
def test_tables_show_every_size_and_stage_in_order(n_gates):
    study = simulated(n_gates)
    stages = [*(stage.name for stage in study.spec.stages), WHOLE]
    metrics = serving_metrics(study.own)
    waits, costs = waiting_times(study), text_costs(study)
    rows = [(size, stage) for size in (1, 4, 16, 64) for stage in stages]
    assert waits.index.tolist() == costs.index.tolist() == rows
    value, low, high = metrics.loc[(1, WHOLE, "batch_p95_ms"), ["value", "low", "high"]]
    assert waits.loc[(1, WHOLE), "batch_p95_ms"] == f"{value:.2f} ({low:.2f} to {high:.2f})"
    assert waits.loc[(16, WHOLE), "batch_p99_ms"] == f"{metrics.loc[(16, WHOLE, 'batch_p99_ms'), 'value']:.2f}"
    assert costs.loc[(4, WHOLE), "share"] == "100%"
    assert costs.loc[(4, WHOLE), "tokenize_share"] == "25%"
    checks = cost_checks(study)
    assert len(checks) == (12 if n_gates else 0)
    assert set(checks["error"]) <= {"+0.0%", "-0.0%"}


def test_the_summary_gives_the_numbers_of_the_tables():
    study = simulated(overhead=2.0)
    metrics = serving_metrics(study.own)["value"]
    sentences = summary(study)
    for size, sentence in zip((1, 4, 16, 64), sentences, strict=False):
        assert f" batches of {size}, half were answered within " in sentence
        assert f"95% within {metrics[size, WHOLE, 'batch_p95_ms']:.1f} ms" in sentence
    text = " ".join(sentences)
    stopped, passed = predicted_cost(study, [1.0, 0.0], [64])["text_ms"]
    assert f"a threshold can save at most {1 - stopped / passed:.0%}" in text
    assert "in the median of 12 checks" in text
    assert sentences[-1].startswith("Advice: ")
    alone = " ".join(summary(simulated(0)))
    assert "threshold" not in alone
    assert "Stage last takes the most time" in alone


FILES = {"gate0/model": "aa", "gate0/vocab": "bb", "last/model": "cc"}  # path to digest


def study_and_run(n_gates=1, *, shadow=True):
    """Return a study and a run of one cascade, from files in different folders."""
    study = simulated(n_gates)
    examples = pd.DataFrame({"example_id": [str(i) for i in range(40)], "text": "t", "text_b": None, "label": "a"})
    rng = np.random.default_rng(0)
    logits = {s.name: rng.normal(size=(40, len(s.labels))).astype(np.float32) for s in study.spec.stages}
    run = memory_run(study.spec, examples, logits, shadow=shadow)
    run.manifest["inputs"] = {f"/then/{path}": digest for path, digest in FILES.items()}
    settings = {**study.settings, "inputs": {f"/now/{path}": digest for path, digest in FILES.items()}}
    return LatencyStudy(settings, study.texts, study.timings), run


def test_cost_and_quality_of_a_run_at_the_thresholds_of_the_study():
    study, run = study_and_run()
    table = cost_and_quality(study, run)
    assert table.index.tolist() == [0.1, 0.3, 0.5, 0.9]
    predictions = run.replay({"gate0": 0.9})
    right = predictions["label"] == predictions["predicted"]
    assert table.loc[0.9, "accuracy"] == right.mean()
    assert table.loc[0.9, "text_ms_batch_16"] == predicted_cost(study, [0.9], [16])["text_ms"][0]
    with pytest.raises(RunError, match="has no gate"):
        cost_and_quality(*study_and_run(0))


def test_costs_are_shown_where_labels_or_shadow_scores_are_missing():
    study, run = study_and_run(shadow=False)
    table = cost_and_quality(study, run)
    assert table["accuracy"].isna().tolist() == [True, False, False, False], "at 0.1 more texts would pass"
    unlabelled = Run(run.manifest, run.examples.assign(label=None), {}, run.predictions, run.timings)
    table = cost_and_quality(study, unlabelled)
    assert table["accuracy"].isna().all()
    assert table["text_ms_batch_16"].notna().all()


@pytest.mark.parametrize(
    ("change", "why"),
    [
        ({"threshold": 0.4}, "threshold of stage 'gate0' is 0.3 there and 0.4 in the run"),
        ({"temperature": 2.0}, "temperature of stage 'gate0'"),
        ({"precision": "bfloat16"}, "precision of stage 'gate0'"),
        ({"max_seq_length": 64}, "max_seq_length of stage 'gate0'"),
        ({"name": "other"}, "it has the stages gate0, last, and the run other, last"),
    ],
)
def test_a_study_of_a_cascade_with_other_settings_is_refused(change, why):
    study, run = study_and_run()
    first, last = run.spec.stages
    spec = replace(run.spec, stages=(replace(first, **change), last))
    scores = {stage.name: run.scores(own.name) for stage, own in zip(spec.stages, run.spec.stages, strict=True)}
    manifest = {**run.manifest, "cascade": spec.to_dict()}
    with pytest.raises(RunError, match=re.escape(why)) as raised:
        cost_and_quality(study, Run(manifest, run.examples, scores, run.predictions, run.timings))
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    ("inputs", "why"),
    [
        ({**FILES, "last/model": "dd"}, "study is of another cascade: /now/last/model has another SHA-256"),
        ({**FILES, "gate0/vocab": "dd"}, "/now/gate0/vocab has another"),
        ({"a": "cc", "b": "bb", "c": "aa"}, "the stages' files are exchanged"),
        ({**FILES, "more": "dd"}, "more is missing"),
        ({}, "has another"),
    ],
)
def test_a_study_of_a_cascade_with_other_files_is_refused(inputs, why):
    study, run = study_and_run()
    check_same_cascade(study, run)
    run.manifest["inputs"] = inputs
    with pytest.raises(RunError, match=why):
        check_same_cascade(study, run)


def test_logits_from_elsewhere_have_no_study():
    study, run = study_and_run()
    run.manifest |= {"source": "logits", "inputs": {}}
    with pytest.raises(RunError, match="computed elsewhere"):
        check_same_cascade(study, run)


@pytest.mark.parametrize("batch_sizes", [(1, 4, 16, 64), (8,)])
def test_displays_keep_what_they_draw(batch_sizes):
    study = simulated(batch_sizes=batch_sizes, name=r"$\frac a & co")
    batches = BatchLatencyDisplay.from_study(study).plot()
    assert sorted(batches.metrics.loc[:, WHOLE, "batch_p95_ms"].index) == list(batch_sizes)
    lengths = LengthLatencyDisplay.from_study(study, stage="last").plot()
    assert set(lengths.lengths["stage"]) == {"last"}
    predicted = PredictedCostDisplay.from_study(study).plot()
    assert (predicted.threshold, predicted.gate) == (0.3, "gate0")
    assert set(predicted.checks["threshold"]) == {0.1, 0.5, 0.9}
    for display in (batches, lengths, predicted):
        drawn_inside(display.figure_)
    figure, ax = plt.subplots()
    display = BatchLatencyDisplay.from_study(study, stage="last").plot(ax=ax)
    assert (display.ax_, display.figure_) == (ax, figure)


def test_displays_refuse_what_they_cannot_show(study):
    with pytest.raises(CascadeLabError, match="no gate"):
        PredictedCostDisplay.from_study(simulated(0))
    for display in (LengthLatencyDisplay, BatchLatencyDisplay):
        with pytest.raises(SpecError, match="gate0"):
            display.from_study(study, stage="gat0")

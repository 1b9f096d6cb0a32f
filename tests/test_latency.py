"""The latency study's arithmetic, on raw tables that are made by hand or by a known cost."""

from __future__ import annotations

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest

from cascade_lab.analysis.bootstrap import resample_counts
from cascade_lab.analysis.live_latency import (
    WHOLE,
    LatencyStudy,
    StageCost,
    by_length,
    checked_cost,
    incoming_batches,
    live_figures,
    predicted_cost,
)
from cascade_lab.displays.latency import BatchLatencyDisplay, LengthLatencyDisplay, PredictedCostDisplay
from cascade_lab.errors import CascadeLabError, RunError, SpecError


def cost(place, lengths, overhead):
    """Seconds of a batch at a stage: what the simulated machine takes, padded to the longest."""
    n = len(lengths)
    return (overhead + (0.5 + place) * n + 0.03 * n * max(lengths)) / 1000


def served(study, threshold, batch):
    """Serve one batch in the plainest way: the lengths that arrive at each stage."""
    arrived, rows = [], list(batch)
    for place, stage in enumerate(study.spec.stages):
        if not rows:
            break
        arrived.append([int(study.texts[f"{stage.name}_tokens"][row]) for row in rows])
        least = threshold if place == 0 else stage.threshold
        if stage.is_gate:
            rows = [row for row in rows if study.texts[f"{stage.name}_probability"][row] >= least]
    return arrived


def simulated(n_gates=1, n=300, *, seed=0, batch_sizes=(1, 4, 16, 64), repeats=2, name="simulated", overhead=0.0):
    """A study of a machine whose times are `cost`, without any noise."""
    rng = np.random.default_rng(seed)
    files = {"init_checkpoint": "none", "bert_config_file": "none", "vocab_file": "none"}
    stages = [
        {"name": f"gate{i}", "labels": [f"oos{i}", "in"], "pass_label": "in", "threshold": 0.3, **files}
        for i in range(n_gates)
    ]
    stages.append({"name": "last", "labels": ["a", "b", "c"], **files})
    texts = pd.DataFrame({"example_id": [str(i) for i in range(n)]})
    for stage in stages:
        texts[f"{stage['name']}_probability"] = rng.random(n)
        texts[f"{stage['name']}_tokens"] = rng.integers(3, 40, n)
    checked = [0.1, 0.5, 0.9] if n_gates else []
    settings = {
        "cascade": {"name": name, "stage": stages},
        "batch_sizes": list(batch_sizes), "repeats": repeats, "batches": 50, "seed": seed, "checked": checked,
    }  # fmt: skip
    study = LatencyStudy(settings, texts, pd.DataFrame())
    rows = []
    for threshold in [None, *checked]:
        for size in batch_sizes:
            for repeat in range(repeats):
                for number, batch in enumerate(study.batches(size, repeat)):
                    at = 0.3 if threshold is None else threshold
                    for place, lengths in enumerate(served(study, at, batch)):
                        rows.append(
                            {
                                "check": threshold is not None, "threshold": at, "repeat": repeat, "batch_size": size,
                                "stage": stages[place]["name"], "batch": number, "n_examples": len(lengths),
                                "sequence_length": max(lengths), "n_tokens": sum(lengths),
                                "tokenize_seconds": 0.25 * cost(place, lengths, overhead),
                                "run_seconds": 0.7 * cost(place, lengths, overhead),
                                "answer_seconds": 0.05 * cost(place, lengths, overhead),
                            }
                        )  # fmt: skip
    return LatencyStudy(settings, texts, pd.DataFrame(rows))


@pytest.fixture(scope="module")
def study():
    return simulated()


def test_figures_by_hand():
    """Three batches of at most 2 texts; of the second nothing goes on, of the last only one text.

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
    figures = live_figures(timings).loc[2, "value"]
    # Five texts wait 40, 40, 20, 20, 60: the third in order has waited 40.
    assert figures[WHOLE, "batch_p50_ms"] == pytest.approx(40)
    assert figures[WHOLE, "batch_p95_ms"] == pytest.approx(60)
    assert figures["gate", "batch_p50_ms"] == pytest.approx(20)
    assert figures["intent", "batch_p50_ms"] == pytest.approx(30)  # of the three that got there, two wait 30
    assert figures[WHOLE, "text_ms"] == pytest.approx(120 / 5)
    assert figures[WHOLE, "texts_per_second"] == pytest.approx(5 / 0.120)
    assert figures["intent", "text_ms"] == pytest.approx(40 / 3)
    assert figures["gate", "share"] == pytest.approx(80 / 120)
    assert figures["intent", "tokenize_share"] == pytest.approx(0.2)


@pytest.mark.parametrize("stage", ["gate0", WHOLE])
def test_figures_and_intervals_equal_those_of_texts_drawn_batch_by_batch(study, stage):
    timings = study.timings[~study.timings["check"] & (study.timings["batch_size"] == 16)]
    figures = live_figures(timings, n_resamples=200).loc[16, stage]
    ms, texts = [], []
    for _, rows in timings.groupby(["repeat", "batch"]):
        own = rows[rows["stage"] == stage] if stage != WHOLE else rows
        ms.append(1000 * own[["tokenize_seconds", "run_seconds", "answer_seconds"]].to_numpy().sum())
        texts.append(rows["n_examples"].iloc[0])
    ms, texts = np.array(ms), np.array(texts)

    def by_text(batches):
        waits = np.repeat(ms[batches], texts[batches])
        quantiles = [np.percentile(waits, p, method="inverted_cdf") for p in (50, 95, 99)]
        return [*quantiles, ms[batches].sum() / texts[batches].sum()]

    names = ["batch_p50_ms", "batch_p95_ms", "batch_p99_ms", "text_ms"]
    assert figures.loc[names, "value"].to_numpy() == pytest.approx(by_text(np.arange(len(ms))))
    drawn = [by_text(np.repeat(np.arange(len(ms)), c)) for c in resample_counts(len(ms), n_resamples=200)]
    low, high = np.quantile(drawn, [0.025, 0.975], axis=0)
    assert figures.loc[names, "low"].to_numpy() == pytest.approx(low)
    assert figures.loc[names, "high"].to_numpy() == pytest.approx(high)


def test_intervals_cover_the_truth_as_often_as_they_say():
    """Batches of 8 texts, log-normal times: its mean and median are known."""
    rng = np.random.default_rng(0)
    hits = []
    for _ in range(120):
        seconds = rng.lognormal(-4, 0.4, 60)
        timings = pd.DataFrame(
            {
                "stage": "only", "repeat": 0, "batch": range(60), "batch_size": 8, "n_examples": 8,
                "tokenize_seconds": 0.0, "run_seconds": seconds, "answer_seconds": 0.0,
            }
        )  # fmt: skip
        figures = live_figures(timings, n_resamples=250).loc[8, WHOLE]
        truth = {"batch_p50_ms": 1000 * np.exp(-4), "text_ms": 1000 * np.exp(-4 + 0.08) / 8}
        hits.append([figures.loc[name, "low"] <= value <= figures.loc[name, "high"] for name, value in truth.items()])
    assert (np.mean(hits, axis=0) > 0.88).all()
    assert (np.mean(hits, axis=0) < 0.995).all()


def test_one_batch_has_no_interval(study):
    figures = live_figures(study.own[(study.own["repeat"] == 0) & (study.own["batch"] == 0)]).loc[64]
    assert figures["value"].notna().all()
    assert figures[["low", "high"]].isna().all(axis=None)


def test_a_repeat_serves_every_text_once_in_an_order_of_its_own():
    one, other = (np.concatenate(incoming_batches(50, 8, repeat, most=99)) for repeat in (0, 1))
    assert sorted(one) == sorted(other) == list(range(50))
    assert (one != other).any()
    assert [len(batch) for batch in incoming_batches(50, 8, 0, most=99)] == [8, 8, 8, 8, 8, 8, 2]
    assert np.concatenate(incoming_batches(50, 8, 0, most=2)).tolist() == one[:16].tolist()


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
    # Beyond what was measured, a text costs what it costs at the edge.
    edge, twice = (np.array([32]), np.array([40]), np.array([640])), (np.array([64]), np.array([40]), np.array([1280]))
    assert fitted(*twice) == pytest.approx(2 * fitted(*edge))


# With an overhead a batch, batches larger than any that was measured are predicted a little too dear.
@pytest.mark.parametrize(("overhead", "within"), [(0.0, 1e-6), (2.0, 0.02)])
@pytest.mark.parametrize(("n_gates", "seed"), [(0, 1), (1, 2), (2, 3), (3, 4)])
def test_the_predicted_cost_is_that_of_serving_batch_by_batch(n_gates, seed, overhead, within):
    study = simulated(n_gates, seed=seed, overhead=overhead)
    thresholds = [0.0, 0.2, 0.55, 0.8, 1.0] if n_gates else [0.0]
    predicted = predicted_cost(study, thresholds)
    assert len(predicted) == len(thresholds) * 4
    for row in predicted.itertuples():
        batches = [batch for repeat in range(2) for batch in study.batches(row.batch_size, repeat)]
        walks = [served(study, row.threshold, batch) for batch in batches]
        n = sum(len(batch) for batch in batches)
        seconds = sum(cost(place, lengths, overhead) for walk in walks for place, lengths in enumerate(walk))
        assert row.text_ms == pytest.approx(1000 * seconds / n, rel=within)
        second = [len(walk[1]) for walk in walks if len(walk) > 1] if n_gates else [len(walk[0]) for walk in walks]
        if n_gates:
            assert row.reach == pytest.approx(sum(second) / n)
        assert row.surviving == pytest.approx(np.mean(second) if second else np.nan, nan_ok=True)


def test_the_check_compares_the_very_batches_and_predicts_from_none_of_them(study):
    checks = checked_cost(study)
    assert len(checks) == 3 * 4
    assert checks["error"].abs().max() < 1e-6
    slower = study.timings.copy()
    slower.loc[slower["check"], "run_seconds"] *= 3
    again = checked_cost(LatencyStudy(study.settings, study.texts, slower))
    assert again["predicted_ms"].equals(checks["predicted_ms"])
    assert again["measured_ms"].to_numpy() == pytest.approx(checks["measured_ms"] * (1 + 2 * 0.7))
    assert again["error"].to_numpy() == pytest.approx(1 / 2.4 - 1)


def test_a_stage_that_nothing_reached_leaves_the_cost_unknown(study):
    alone = study.timings[study.timings["stage"] == "gate0"]
    predicted = predicted_cost(LatencyStudy(study.settings, study.texts, alone), [0.5, 1.0], [16])
    assert np.isnan(predicted["text_ms"][0])
    assert predicted["text_ms"][1] > 0  # nobody goes on


def test_lengths_are_grouped_by_like_number(study):
    own = study.own
    found = by_length(own, bins=4)
    assert found.groupby(["batch_size", "stage"])["n_batches"].sum().to_dict() == (
        own.groupby(["batch_size", "stage"]).size().to_dict()
    )
    singles = found[(found["batch_size"] == 1) & (found["stage"] == "gate0")]
    assert len(singles) == 4
    assert singles["text_p50_ms"].is_monotonic_increasing
    assert (found["text_p25_ms"] <= found["text_p50_ms"]).all()


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


def test_what_is_no_study_is_neither_read_nor_overwritten(study, tmp_path, small_disk):
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


def drawn_inside(figure):
    figure.canvas.draw()
    box = figure.get_tightbbox(figure.canvas.get_renderer())
    width, height = figure.get_size_inches()
    assert min(box.x0, box.y0) >= 0
    assert box.x1 <= width
    assert box.y1 <= height
    plt.close(figure)


@pytest.mark.parametrize("batch_sizes", [(1, 4, 16, 64), (8,)])
def test_displays_keep_what_they_draw(batch_sizes):
    study = simulated(batch_sizes=batch_sizes, name=r"$\frac a & co")
    batches = BatchLatencyDisplay.from_study(study).plot()
    assert sorted(batches.figures.loc[:, WHOLE, "batch_p95_ms"].index) == list(batch_sizes)
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

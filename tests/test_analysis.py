"""Figures on a run against hand-worked counts and other formulas."""

from __future__ import annotations

import json
import math
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
from scipy.stats import mannwhitneyu

from cascade_lab.analysis.latency import stage_latencies
from cascade_lab.analysis.metrics import summarize
from cascade_lab.run import Scores
from cascade_lab.serial import gold, serve


def hand_made_run(spec, labels, logits):
    """A run in memory: what the functions on a run ask of it, from logits that are written out."""
    examples = pd.DataFrame({"example_id": [str(i) for i in range(len(labels))], "label": labels})
    predictions = pd.concat([examples, serve(spec, logits)], axis=1)
    reached = np.ones(len(labels), dtype=bool)
    scores = {}
    for stage in spec.stages:
        scores[stage.name] = Scores(np.arange(len(labels)), logits[stage.name], ~reached)
        reached = reached & (predictions["decided_by"] != stage.name).to_numpy()
    return SimpleNamespace(
        spec=spec,
        examples=examples,
        predictions=predictions,
        scores=scores.__getitem__,
        gold=lambda name: gold(spec, spec.stage(name), examples),
    )


def test_every_figure_of_a_run_of_six_texts_worked_by_hand(tiny):
    """
    gold | p(in) | class | answer    threshold 0.5
    0    | .9    | 0     | 0         right
    1    | .8    | 2     | 2         wrong class
    2    | .3    | 2     | oos       wrongly rejected (the classifier would have been right)
    oos  | .2    | 1     | oos       right
    oos  | .6    | 3     | 3         slipped through
    oos  | .1    | 0     | oos       right
    """
    from cascade_lab import CascadeSpec

    spec = CascadeSpec.read(tiny)
    p_in = np.array([0.9, 0.8, 0.3, 0.2, 0.6, 0.1])
    classes = np.eye(4)[[0, 2, 2, 1, 3, 0]] * 5
    logits = {"gate": np.log(np.stack([1 - p_in, p_in], axis=1)), "intent": classes}
    metrics = summarize(hand_made_run(spec, ["0", "1", "2", "oos", "oos", "oos"], logits))
    end, gate, intent = metrics["end_to_end"], metrics["stages"]["gate"], metrics["stages"]["intent"]
    assert metrics["n_examples"] == 6
    assert end["accuracy"] == pytest.approx(3 / 6)
    assert end["in_scope_accuracy"] == pytest.approx(1 / 3)
    assert end["reject_recall"] == pytest.approx(2 / 3)
    assert end["reject_precision"] == pytest.approx(2 / 3)
    # F1 of 0: 1; of 1: 0; of 2: 0; of 3: 0 (answered, never gold); of oos: 2/3
    assert end["macro_f1"] == pytest.approx((1 + 0 + 0 + 0 + 2 / 3) / 5)
    assert gate == {
        "reach": 1.0, "n_reached": 6, "n_gold": 6, "accuracy": pytest.approx(4 / 6),
        "macro_f1": pytest.approx(2 / 3), "auroc": pytest.approx(8 / 9),
        "average_precision": pytest.approx((1 / 1 + 2 / 2 + 3 / 4) / 3),
    }  # fmt: skip
    # AUROC is the Mann-Whitney statistic over the number of pairs.
    assert gate["auroc"] == pytest.approx(mannwhitneyu(p_in[:3], p_in[3:]).statistic / 9)
    assert (intent["reach"], intent["n_reached"], intent["n_gold"]) == (0.5, 3, 2)
    assert intent["accuracy"] == pytest.approx(1 / 2)


def test_what_is_undefined_is_nan_and_null_in_the_file(tiny, tmp_path):
    from cascade_lab import CascadeSpec
    from cascade_lab.run import write_json

    spec = CascadeSpec.read(tiny)
    logits = {"gate": np.array([[0.0, 1.0]]), "intent": np.eye(4)[[0]]}
    metrics = summarize(hand_made_run(spec, ["0"], logits))
    assert math.isnan(metrics["end_to_end"]["reject_recall"])
    assert math.isnan(metrics["stages"]["gate"]["auroc"])
    write_json(tmp_path / "metrics.json", metrics)
    read = json.loads((tmp_path / "metrics.json").read_text())
    assert read["end_to_end"]["reject_recall"] is None
    assert read["end_to_end"]["in_scope_accuracy"] == 1.0


def test_the_clinc150_cascade_does_what_the_independent_implementation_did(clinc150_run):
    """The figures for validation that its makers got with PyTorch, at three thresholds."""
    for threshold, expected in ((0.5, (0.9557, 0.540, 0.9423)), (0.9, (0.9470, 0.630, 0.9368)),
                                (0.99, (0.9157, 0.750, 0.9103))):  # fmt: skip
        answers = clinc150_run.replay({"gate": threshold})
        right = answers["predicted"] == answers["label"]
        oos = answers["label"] == "oos"
        got = (right[~oos].mean(), right[oos].mean(), right.mean())
        assert tuple(round(float(value), 4) for value in got) == pytest.approx(expected, abs=1e-4)
    assert clinc150_run.replay().equals(clinc150_run.predictions)


def test_latency_is_weighted_by_texts_and_shares_make_a_whole(tiny_run):
    latencies = stage_latencies(tiny_run)
    timings = tiny_run.timings
    assert sum(latency.share for latency in latencies.values()) == pytest.approx(1)
    for name, latency in latencies.items():
        own = timings[timings["stage"] == name]
        per_text = [
            1000 * (row.tokenize_seconds + row.run_seconds) / row.n_examples
            for row in own.itertuples()
            for _ in range(row.n_examples)
        ]
        assert latency.percentiles_ms[95] == pytest.approx(np.percentile(per_text, 95))
        assert latency.seconds == pytest.approx(sum(per_text) / 1000)

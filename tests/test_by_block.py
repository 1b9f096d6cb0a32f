"""Large runs are computed block by block, with the results of one block."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
from helpers import memory_run, random_run
from scipy.special import softmax

from cascade_lab import by_block as module
from cascade_lab.analysis import audit, calibration_metrics, metric_intervals, near_threshold
from cascade_lab.analysis.calibrators import compare_calibrators
from cascade_lab.analysis.examples import stage_probabilities
from cascade_lab.analysis.metrics import in_scope_predictions, summarize
from cascade_lab.analysis.temperature import fit_temperatures
from cascade_lab.by_block import by_block, row_blocks
from cascade_lab.decisions import decide

N_COLUMNS = 5


def test_blocks_are_put_together_in_order(monkeypatch):
    values, others = np.random.default_rng(0).normal(size=(1000, N_COLUMNS)), np.arange(1000)
    monkeypatch.setattr(module, "BLOCK_BYTES", 8 * N_COLUMNS * 7)
    assert len(row_blocks(1000, N_COLUMNS)) == 143
    sizes = []

    def function(values, others):
        sizes.append(len(values))
        return values.sum(axis=1), others * 2

    sums, doubled = by_block(function, values, others)
    np.testing.assert_array_equal(sums, values.sum(axis=1))
    np.testing.assert_array_equal(doubled, others * 2)
    assert (max(sizes), sum(sizes)) == (7, 1000)
    assert [part.shape for part in by_block(function, values[:0], others[:0])] == [(0,), (0,)]


def test_decisions_are_those_of_the_softmax_of_all_rows(tmp_path, monkeypatch):
    run = random_run(tmp_path / "run", n=300, seed=1)
    monkeypatch.setattr(module, "BLOCK_BYTES", 8 * N_COLUMNS * 7)
    for stage in run.spec.stages:
        logits = run.scores(stage.name).logits.copy()
        logits[::10] = np.nan
        p, decision = softmax(logits.astype(float), axis=1), decide(stage, logits)
        scored = np.arange(300) % 10 > 0
        np.testing.assert_array_equal(decision.scored, scored)
        p_others = np.delete(p, stage.labels.index(stage.pass_label), axis=1) if stage.is_gate else p
        np.testing.assert_allclose(decision.probability[scored], p_others.max(axis=1)[scored])
        best = p[:, stage.labels.index(stage.pass_label)] if stage.is_gate else p.max(axis=1)
        np.testing.assert_allclose(decision.confidence[scored], best[scored])
        assert np.isnan(decision.confidence[~scored]).all()


def analyses(run):
    """Return what each analysis that reads logits returns of a run, computed anew."""
    run = memory_run(run.spec, run.examples, {s.name: run.scores(s.name).logits for s in run.spec.stages})
    last = run.spec.last.name
    yield run.predictions
    yield pd.json_normalize(summarize(run))
    yield from (metric_intervals(run, stage.name, n_resamples=20) for stage in run.spec.stages)
    yield from (calibration_metrics(run, stage, n_resamples=20) for stage in (None, last))
    yield fit_temperatures(run, n_resamples=20)
    yield compare_calibrators(run, [last]).table
    yield pd.DataFrame(in_scope_predictions(run)._asdict())
    yield stage_probabilities(run)
    yield near_threshold(run, run.spec.stages[0].name)
    yield audit(run)


@pytest.mark.parametrize("n_gates", [1, 2])
def test_analyses_do_not_depend_on_blocks(tmp_path, n_gates, monkeypatch):
    run = random_run(tmp_path / "run", n=120, n_gates=n_gates, seed=n_gates, skill=1.5)
    whole = list(analyses(run))
    monkeypatch.setattr(module, "BLOCK_BYTES", 8 * N_COLUMNS * 7)
    for one, many in zip(whole, analyses(run), strict=True):
        pd.testing.assert_frame_equal(one, many, rtol=1e-7)

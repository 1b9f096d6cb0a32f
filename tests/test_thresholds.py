"""Thresholds chosen on kept logits, against replays at each of them."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from cascade_lab.analysis.metrics import figures_of
from cascade_lab.analysis.thresholds import choose, surface
from cascade_lab.errors import InfeasibleError
from cascade_lab.spec import CascadeSpec


@pytest.fixture(scope="module")
def rejecting_run(tiny, tiny_evalset, tmp_path_factory):
    """A run whose last stage may reject too."""
    from cascade_lab import Cascade, EvalSet

    content = CascadeSpec.read(tiny).to_dict()
    content["stage"][1]["reject_label"] = "oos"
    with Cascade.load(CascadeSpec.from_dict(content)) as cascade:
        return cascade.run(EvalSet.read(tiny_evalset), output=tmp_path_factory.mktemp("runs") / "rejecting")


def test_the_surface_equals_replays_at_random_pairs_of_thresholds(rejecting_run):
    figures = surface(rejecting_run)
    rng = np.random.default_rng(0)
    for i, j in zip(
        rng.integers(0, len(figures.gate), 50), rng.integers(0, len(figures.min_probability), 50), strict=True
    ):
        replayed = rejecting_run.replay({"gate": figures.gate[i], "intent": figures.min_probability[j]})
        expected = figures_of(rejecting_run.spec, replayed)
        for name in ("in_scope_accuracy", "reject_recall", "accuracy"):
            assert getattr(figures, name)[i, j] == pytest.approx(expected[name])


def test_the_chosen_pair_is_the_best_of_all_by_trying_every_one(rejecting_run):
    figures = surface(rejecting_run)
    for least in (0.0, 0.1, 0.2):
        chosen = choose(rejecting_run, maximize="reject_recall", at_least={"in_scope_accuracy": least})
        got = figures_of(rejecting_run.spec, rejecting_run.replay(chosen))
        assert got["in_scope_accuracy"] >= least
        pairs = itertools.product(range(len(figures.gate)), range(len(figures.min_probability)))
        best = max(figures.reject_recall[i, j] for i, j in pairs if figures.in_scope_accuracy[i, j] >= least)
        assert got["reject_recall"] == pytest.approx(best)


def test_what_no_thresholds_can_do_is_said(rejecting_run):
    with pytest.raises(InfeasibleError, match="infeasible: no thresholds give at least"):
        choose(rejecting_run, maximize="accuracy", at_least={"in_scope_accuracy": 0.999})

"""The pictures of a comparison are legible, with any number of labels and with hostile ones."""

from __future__ import annotations

import matplotlib.pyplot as plt
import pytest
from helpers import hostile_pair, one_stage_run, perturbed_run, random_run
from test_displays import drawn_inside

from cascade_lab import ComparisonDisplay


@pytest.fixture(autouse=True)
def _close_figures():
    yield
    plt.close("all")


def assert_inside(figure):
    """What is drawn lies inside the figure, the numbers at its right included."""
    figure.canvas.draw()
    for ax in figure.axes:
        for right in ax.child_axes:
            for label in right.get_yticklabels():
                assert label.get_window_extent().x1 <= figure.bbox.x1 + 1
        if ax.axison:
            drawn_inside(figure)


@pytest.mark.parametrize("n", [2, 41, 151])
def test_the_pictures_of_n_labels_are_legible(tmp_path, n):
    a = random_run(tmp_path / "a", n=100 + 20 * n, n_labels=n, seed=n, skill=4.0)
    display = ComparisonDisplay.from_runs(a, perturbed_run(a, tmp_path / "b", noise=0.6), n_resamples=100)
    for plot in (display.plot, display.plot_labels, display.plot_decomposition):
        assert plot() is display
        assert_inside(display.figure_)
        plt.close(display.figure_)
    display.plot_labels()
    bars = {bar.get_width() for container in display.ax_.containers for bar in container}
    assert max(bars) <= display.comparison.labels["wins"].max()
    assert min(bars) == -display.comparison.labels["losses"].max()


def test_hostile_labels_no_change_and_no_gate_can_be_drawn(tmp_path):
    hostile = hostile_pair(tmp_path / "hostile")
    a = random_run(tmp_path / "a", n_labels=3)
    for runs in (hostile, (hostile[0], hostile[0].with_thresholds({})), (a, one_stage_run(a, tmp_path / "b"))):
        display = ComparisonDisplay.from_runs(*runs)
        for plot in (display.plot, display.plot_labels, display.plot_decomposition):
            _, ax = plt.subplots(layout="constrained")
            assert plot(ax=ax).ax_ is ax
            assert_inside(display.figure_)

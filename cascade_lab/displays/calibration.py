"""Reliability diagrams: how often what was claimed came true."""

from __future__ import annotations

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.axes import Axes

from cascade_lab.analysis.calibration import N_BINS, Bins, calibration_figures, claims, reliability
from cascade_lab.analysis.metrics import On
from cascade_lab.displays.words import words
from cascade_lab.run import Run


class CascadeCalibrationDisplay:
    """A reliability diagram, with intervals, above the distribution of the probabilities that were claimed.

    Parameters
    ----------
    curve : DataFrame
        As `reliability` returns it.
    figures : DataFrame
        As `calibration_figures` returns it.
    p : ndarray, shape (n,)
        The probability that was claimed of each text.
    title : str
    event : str
        What was claimed, for the axes.

    Attributes
    ----------
    curve, figures, p, title, event
        As given.
    ax_, figure_ : Axes, Figure
        After `plot`.
    """

    def __init__(
        self, curve: pd.DataFrame, figures: pd.DataFrame, p: np.ndarray, *, title: str = "", event: str = "right"
    ):
        self.curve, self.figures, self.p = curve, figures, p
        self.title, self.event = title, event

    @classmethod
    def from_run(
        cls,
        run: Run,
        *,
        stage: str | None = None,
        on: On = "reached",
        n_bins: int = N_BINS,
        bins: Bins = "equal_mass",
        fitted_here: bool = False,
    ) -> CascadeCalibrationDisplay:
        """Compute for one stage or, without one, for p(gate) · p(class) of the best class in scope.

        Parameters
        ----------
        run, stage, on, n_bins, bins, fitted_here
            As for `cascade_lab.analysis.calibration.reliability`, which also says what it raises.
        """
        how = {"on": on, "fitted_here": fitted_here}
        binned = {"n_bins": n_bins, "bins": bins}
        asked = "on everything"
        if on == "reached":
            asked = f"on what reached {'it' if stage else run.spec.last.name}"
        event = "right"
        if stage is not None and run.spec.stage(stage).is_gate:
            event = run.spec.stage(stage).pass_label or ""
        name = f"stage {stage}" if stage else "p(gate) · p(class)"
        return cls(
            reliability(run, stage, **how, **binned),
            calibration_figures(run, stage, **how, **binned),
            claims(run, stage, **how).p,
            title=f"{name}, {asked}",
            event=event,
        )

    def plot(self, ax: Axes | None = None) -> CascadeCalibrationDisplay:
        """Draw the curve, the diagonal of perfect calibration, and how many texts claim what along the foot."""
        if ax is None:
            _, ax = plt.subplots(figsize=(5.2, 5.8), layout="constrained")
        self.ax_, self.figure_ = ax, ax.get_figure(root=True)
        ax.plot([0, 1], [0, 1], color="0.6", linewidth=1, linestyle="--", zorder=1)
        claimed, value = self.curve["claimed"].to_numpy(), self.curve["value"].to_numpy()
        error = np.maximum([value - self.curve["low"], self.curve["high"] - value], 0)
        ax.errorbar(
            claimed, value, error, color=_INK, marker="o", markersize=4.5, linewidth=1.2, elinewidth=1, capsize=0
        )
        heights, edges = np.histogram(self.p, bins=40, range=(0, 1))
        # The foot, a seventh of the height, is a place of its own: below 0, where the curve never is.
        foot = 1 / 6
        if heights.sum():
            ax.bar(
                edges[:-1],
                foot * 0.8 * heights / heights.max(),
                np.diff(edges),
                bottom=-foot,
                align="edge",
                color=_FILL,
                linewidth=0,
            )
        ax.axhline(0, color="0.8", linewidth=0.8, zorder=0)
        ax.set(xlim=(-0.02, 1.02), ylim=(-foot, 1.03), aspect="equal")
        ax.set_yticks([-foot / 2, *np.linspace(0, 1, 6)], ["texts", *(f"{v:.1f}" for v in np.linspace(0, 1, 6))])
        ax.tick_params(axis="y", length=0)
        event = words(self.event, 24)
        ax.set_xlabel(f"probability of {event}")
        ax.set_ylabel(f"fraction {event}")
        ax.set_title(words(self.title) + f"\n{self._said()}", fontsize=9.5, loc="left", linespacing=1.5)
        ax.spines[["top", "right"]].set_visible(False)
        return self

    def _said(self) -> str:
        attrs = self.figures.attrs
        if not attrs["n_examples"]:
            return "no texts"
        bins = f"{attrs['n_bins']} bins of {_BINS[attrs['bins']]}"
        ece, chance = self.figures.loc["ece"], self.figures.loc["ece_if_calibrated"]
        return (
            f"{attrs['n_examples']:,} texts, {bins}\n"
            f"ECE {ece['value']:.3f} ({ece['low']:.3f} to {ece['high']:.3f}); "
            f"{chance['low']:.3f} to {chance['high']:.3f} if calibrated"
        )


_INK, _FILL = "#123c69", "#a9c1dc"  # dark and pale in grey too
_BINS = {"equal_mass": "equal mass", "equal_width": "equal width"}

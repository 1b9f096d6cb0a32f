"""Draws reliability diagrams: how often predictions of each confidence are correct."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes

from cascade_lab.analysis.calibration import (
    ECE,
    N_BINS,
    Bins,
    calibration_error,
    calibration_metrics,
    confidences,
    reliability,
    reliability_curve,
)
from cascade_lab.analysis.metrics import On
from cascade_lab.displays.drawing import Display, Style, hide_spines, plain_text
from cascade_lab.run import Run

if TYPE_CHECKING:
    from typing_extensions import Self


class CascadeCalibrationDisplay(Display):
    """A reliability diagram with intervals, above a histogram of the confidences.

    Parameters
    ----------
    curve : DataFrame
        What `reliability` returns.
    metrics : DataFrame
        What `calibration_metrics` returns.
    confidence : ndarray, shape (n,)
        The predicted probability for each text.
    title : str
    event : str
        What the probability is of: "correct", or the pass label of a gate.

    Attributes
    ----------
    curve, metrics, confidence, title, event
        As given.
    ax_, figure_ : Axes, Figure
        After `plot`.
    """

    def __init__(
        self,
        curve: pd.DataFrame,
        metrics: pd.DataFrame,
        confidence: np.ndarray,
        *,
        title: str = "",
        event: str = "correct",
    ):
        self.curve, self.metrics, self.confidence = curve, metrics, confidence
        self.title, self.event = title, event

    @classmethod
    def from_run(
        cls,
        run: Run,
        *,
        stage: str | None = None,
        on: On = "reached",
        n_bins: int = N_BINS,
        bins: Bins = "equal_width",
        allow_fitted_set: bool = False,
    ) -> Self:
        """Compute the diagram of one stage or, without `stage`, of p(gate) · p(class) of the best in-scope label.

        Parameters
        ----------
        run, stage, on, n_bins, bins, allow_fitted_set
            As for `cascade_lab.analysis.calibration.reliability`, which also lists what is raised.
        """
        options: dict[str, Any] = {"stage": stage, "on": on, "allow_fitted_set": allow_fitted_set}
        binning: dict[str, Any] = {"n_bins": n_bins, "bins": bins}
        texts = "on all texts"
        if on == "reached":
            texts = f"on the texts that reached {'it' if stage else run.spec.last.name}"
            if stage is None and any(other.is_deferral for other in run.spec.stages):
                texts = "on the texts that no gate stopped"
        event, name = "correct", "p(gate) · p(class)"
        if stage is not None:
            spec = run.spec.stage(stage)
            name = f"stage {stage}"
            if spec.calibrator is not None:
                name += f" ({spec.calibrator.method})"
            elif spec.temperature != 1:
                name += f" (temperature {spec.temperature:.4g})"
            event = (spec.pass_label or "") if spec.is_gate else event
        return cls(
            reliability(run, **options, **binning),
            calibration_metrics(run, **options, **binning),
            confidences(run, **options).confidence,
            title=f"{name}, {texts}",
            event=event,
        )

    @classmethod
    def from_predictions(
        cls,
        correct: Any,
        confidence: Any,
        *,
        n_bins: int = N_BINS,
        bins: Bins = "equal_width",
        title: str = "",
        event: str = "correct",
    ) -> Self:
        """Compute the diagram of plain arrays.

        Parameters
        ----------
        correct : array-like of bool, shape (n,)
            Whether each prediction is correct.
        confidence : array-like of float, shape (n,)
            The predicted probability of that, between 0 and 1.
        n_bins, bins
            As for `from_run`.
        title, event : str
        """
        return cls(
            reliability_curve(correct, confidence, n_bins=n_bins, bins=bins),
            calibration_error(correct, confidence, n_bins=n_bins, bins=bins),
            np.asarray(confidence, dtype=np.float64),
            title=title,
            event=event,
        )

    def frame(self) -> pd.DataFrame:
        """Return the curve: one row per bin."""
        return self.curve

    def plot(self, ax: Axes | None = None, **kwargs: Any) -> Self:
        """Draw the curve, the diagonal of perfect calibration, and below them how many texts have each confidence.

        Parameters
        ----------
        ax : Axes, optional
        **kwargs
            Go to `Axes.errorbar`, which draws the curve.
        """
        ax = self._axes(ax, (5.2, 5.8))
        ax.plot([0, 1], [0, 1], color="0.6", linewidth=1, linestyle="--", zorder=1)
        value = self.curve["value"].to_numpy()
        error = np.maximum([value - self.curve["low"], self.curve["high"] - value], 0)
        style: Style = {
            "color": _DARK,
            "marker": "o",
            "markersize": 4.5,
            "linewidth": 1.2,
            "elinewidth": 1,
            "capsize": 0,
        }
        ax.errorbar(self.curve["mean_confidence"], value, error, **(style | kwargs))
        heights, edges = np.histogram(self.confidence, bins=40, range=(0, 1))
        # The histogram is below 0, where the curve never is. It takes a seventh of the height.
        foot = 1 / 6
        if heights.sum():
            tops = foot * 0.8 * heights / heights.max()
            ax.bar(edges[:-1], tops, np.diff(edges), bottom=-foot, align="edge", color=_PALE, linewidth=0)
        ax.axhline(0, color="0.8", linewidth=0.8, zorder=0)
        ax.set(xlim=(-0.02, 1.02), ylim=(-foot, 1.03), aspect="equal")
        ax.set_yticks([-foot / 2, *np.linspace(0, 1, 6)], ["texts", *(f"{v:.1f}" for v in np.linspace(0, 1, 6))])
        hide_spines(ax)
        ax.tick_params(axis="y", length=0)
        event = plain_text(self.event, 24)
        correct = event == "correct"
        ax.set_xlabel("confidence" if correct else f'confidence: probability of "{event}"')
        ax.set_ylabel(
            "fraction of texts that are correct" if correct else f'fraction of texts with true label "{event}"'
        )
        ax.set_title(plain_text(self.title) + f"\n{self._summary()}", fontsize=9.5, loc="left", linespacing=1.5)
        return self

    def _summary(self) -> str:
        attrs = self.metrics.attrs
        if not attrs["n_examples"]:
            return "no texts"
        bins = f"{attrs['n_bins']} bins of {attrs['bins'].replace('_', ' ')}"
        out_of_scope = f" ({attrs['n_out_of_scope']:,} out of scope)" if "n_out_of_scope" in attrs else ""
        name = ECE[attrs["bins"]]
        ece, chance = self.metrics.loc[name], self.metrics.loc[f"{name}_if_calibrated"]
        return (
            f"{attrs['n_examples']:,} texts{out_of_scope}, {bins}\n"
            f"{name.replace('_ece', ' ECE').replace('ece', 'ECE')} {ece['value']:.3f} "
            f"({ece['low']:.3f} to {ece['high']:.3f}); "
            f"if calibrated, {chance['low']:.3f} to {chance['high']:.3f}"
        )


_DARK, _PALE = "#123c69", "#a9c1dc"  # also dark and pale in a grey print

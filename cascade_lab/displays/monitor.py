"""Draws a cascade's traffic day by day: the reject rate or low confidences, and the rates that raise the alarm."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.ticker import PercentFormatter

from cascade_lab.analysis.monitoring import FEWER_REJECTS, LOW_CONFIDENCE, MORE_REJECTS, Monitoring, monitor
from cascade_lab.displays.drawing import Display, Style, hide_spines, plain_text
from cascade_lab.run import Run

if TYPE_CHECKING:
    from typing_extensions import Self

_MAX_DAYS_NAMED = 12
_ALARM = "#b0304f"


class MonitorDisplay(Display):
    """The rate of each day, the range of the reference, and the band that a day must leave to raise the alarm.

    The band depends on the days before; it ends where the alarm is raised.

    Parameters
    ----------
    monitoring : Monitoring
        What `analysis.monitor` returns.
    title : str
    low_confidence : bool
        Draw the texts with low confidence instead of the rejected ones.

    Attributes
    ----------
    monitoring, title, low_confidence
        As given.
    ax_, figure_ : Axes, Figure
        After `plot`.
    """

    def __init__(self, monitoring: Monitoring, *, title: str = "", low_confidence: bool = False):
        self.monitoring = monitoring
        n = len(monitoring.reference.examples)
        self.title = title or f"{monitoring.run.spec.name}: against {n:,} {'text' if n == 1 else 'texts'}"
        self.low_confidence = low_confidence

    @classmethod
    def from_run(cls, run: Run, against: Run, *, low_confidence: bool = False, **options: Any) -> Self:
        """Compute from a run and its reference, with `analysis.monitor` and its options.

        Raises
        ------
        RunError
            As `monitor`.
        """
        return cls(monitor(run, against, **options), low_confidence=low_confidence)

    def frame(self) -> pd.DataFrame:
        """Return the rows of `Monitoring.alarms` that are drawn, indexed by watch and day."""
        watches = [LOW_CONFIDENCE] if self.low_confidence else [MORE_REJECTS, FEWER_REJECTS]
        return self.monitoring.alarms.loc[watches]

    def plot(self, ax: Axes | None = None, **kwargs: Any) -> Self:
        """Draw the days from left to right.

        Parameters
        ----------
        ax : Axes, optional
        **kwargs
            Go to `Axes.plot`, which draws the rates.
        """
        ax = self._axes(ax, (7.2, 4.0))
        frame = self.frame()
        upper = frame.loc[LOW_CONFIDENCE if self.low_confidence else MORE_REJECTS]
        lower = None if self.low_confidence else frame.loc[FEWER_REJECTS]
        x, days = np.arange(len(upper)), [plain_text(str(day), 12) for day in upper.index]
        # Without a limit no rate raises the alarm on that day, so the band reaches to 0 and to 1.
        low = np.zeros(len(x)) if lower is None else lower["limit"].fillna(0.0).to_numpy()
        high = upper["limit"].fillna(1.0).to_numpy()
        is_over = frame["alarm"] & frame["limit"].isna()  # after an alarm there is no band
        high = np.where(is_over.groupby(level="day").any().loc[upper.index], np.nan, high)
        band: Style = {"color": "#123c69", "alpha": 0.13, "linewidth": 0, "label": "no alarm, given the days before"}
        ax.bar(x, high - low, bottom=low, width=1.0, **band)
        reference: Style = {"color": "0.35", "linestyle": "--", "linewidth": 1.0}
        ax.axhline(upper["bound"].iloc[0], label="range of the reference", **reference)
        if lower is not None:
            ax.axhline(lower["bound"].iloc[0], **reference)
        ax.plot(x, upper["rate"], **({"color": "#123c69", "marker": "o", "label": "rate of the day"} | kwargs))
        for table in (upper,) if lower is None else (upper, lower):
            if table["alarm"].any():
                first = int(table["alarm"].to_numpy().argmax())
                ax.plot(first, table["rate"].iloc[first], "o", markersize=13, fillstyle="none", color=_ALARM,
                        label=f"alarm, {days[first]}")  # fmt: skip
        shown = np.unique(np.linspace(0, len(x) - 1, min(len(x), _MAX_DAYS_NAMED)).round().astype(int))
        ax.set_xticks(shown, [days[i] for i in shown], rotation=30 if len(days[0]) > 4 else 0)
        ax.yaxis.set_major_formatter(PercentFormatter(1))
        rates = np.concatenate([upper["rate"].dropna(), frame["bound"], upper["limit"].dropna()])
        ax.set(
            xlabel="day" if len(days[0]) <= 4 else "",
            ylabel="texts with low confidence" if self.low_confidence else "rejected texts",
            ylim=(0, min(1.0, 1.15 * float(rates.max()) + 0.01)),
        )
        self._set_title(self.title, max_length=80)
        hide_spines(ax)
        ax.legend(frameon=False, fontsize=9, loc="upper left", bbox_to_anchor=(0, -0.22), ncols=2)
        return self

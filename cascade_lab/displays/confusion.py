"""Confusion matrices of a stage or of the whole cascade, legible from 2 to 151 classes and beyond."""

from __future__ import annotations

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import LinearSegmentedColormap, LogNorm
from matplotlib.ticker import FuncFormatter, NullFormatter

from cascade_lab.analysis.metrics import Normalize, On, confusion
from cascade_lab.displays.words import words
from cascade_lab.run import Run

MAX_NUMBERED = 12  # classes up to which every cell bears its number in type of the usual size
MAX_LABELLED = 50  # classes up to which every row and column bears its label
_LONGEST = 40  # characters of a label that are drawn


class CascadeConfusionDisplay:
    """A confusion matrix: gold labels in rows, answers in columns.

    Parameters
    ----------
    confusion_matrix : ndarray, shape (n_labels, n_labels)
        Counts, or fractions where `normalize` says of what.
    display_labels : sequence of str
        The labels of the rows and columns.
    title : str
    normalize : {"true", "pred", "all"}, optional
        The fractions are of a gold label's examples, of an answer's, or of all.

    Attributes
    ----------
    confusion_matrix, display_labels, title, normalize
        As given.
    ax_, figure_ : Axes, Figure
        After `plot`.
    """

    def __init__(
        self,
        confusion_matrix: np.ndarray,
        display_labels: list[str],
        *,
        title: str = "",
        normalize: Normalize | None = None,
    ):
        self.confusion_matrix = confusion_matrix
        self.display_labels = list(display_labels)
        self.title = title
        self.normalize = normalize

    @classmethod
    def from_run(
        cls, run: Run, *, stage: str | None = None, on: On = "reached", normalize: Normalize | None = None
    ) -> CascadeConfusionDisplay:
        """Compute the matrix of one stage, on what reached it or on all, or, without `stage`, end to end.

        End to end, the labels that reject stand last. A stage's matrix has its own labels, and leaves out
        examples without a gold label there (which an earlier gate should have stopped).

        Raises
        ------
        SpecError, RunError
            No such stage; no shadow scores.
        """
        matrix = confusion(run, stage, on=on, normalize=normalize)
        asked = "what reached it" if on == "reached" else "everything"
        title = f"{run.spec.name}, end to end" if stage is None else f"stage {stage}, on {asked}"
        return cls(matrix.to_numpy(), list(matrix.index), title=title, normalize=normalize)

    def most_confused(self, n_labels: int = 15) -> CascadeConfusionDisplay:
        """Cut out the `n_labels` labels with the most confusion among them, in their order here.

        They are gathered pair by pair, from the fullest off-diagonal cell down.
        """
        off = self.confusion_matrix.astype(float)
        np.fill_diagonal(off, 0.0)
        kept: dict[int, None] = {}
        for cell in np.argsort(-off, axis=None, kind="stable"):
            row, column = divmod(int(cell), len(off))
            if len(kept | {row: None, column: None}) > n_labels or off[row, column] == 0:
                break
            kept |= {row: None, column: None}
        rows = sorted(kept)
        return CascadeConfusionDisplay(
            self.confusion_matrix[np.ix_(rows, rows)],
            [self.display_labels[row] for row in rows],
            title=f"{self.title}: the {len(rows)} most confused of {len(self.display_labels)}",
            normalize=self.normalize,
        )

    def plot(self, ax: Axes | None = None) -> CascadeConfusionDisplay:
        """Draw the matrix; the figure's size follows the number of classes where `ax` is not given.

        Up to 50 classes every row and column is named; beyond, the axes are numbered and the picture is an
        overview (`most_confused` cuts out what matters).
        """
        n = len(self.display_labels)
        if ax is None:
            side = float(np.clip(1.6 + 0.3 * n, 3.4, 13 if n <= MAX_LABELLED else 8.5))
            longest = min(max(map(len, self.display_labels), default=0), _LONGEST) if n <= MAX_LABELLED else 0
            room = 0.08 * max(0, longest - 10)  # inches beyond what a short label takes
            _, ax = plt.subplots(figsize=(side + 1.4 + room, side + room), layout="constrained")
        self.ax_, self.figure_ = ax, ax.get_figure(root=True)
        # Zeros are left white and the rest is on a log scale: one confusion shows beside a full diagonal.
        values = np.ma.masked_where(~(self.confusion_matrix > 0), self.confusion_matrix)
        low, high = (values.min(), values.max()) if values.count() else (1, 1)
        norm = LogNorm(low if low < high else high / 10, high)
        if not n:
            ax.set_title(f"{words(self.title, 100)}: nothing is confused", fontsize=11, loc="left")
            ax.set_axis_off()
            return self
        image = ax.imshow(values, cmap=_COLORS, norm=norm, interpolation="nearest")
        plain = FuncFormatter(lambda value, _: f"{value:g}")
        bar = self.figure_.colorbar(image, ax=ax, fraction=0.046, pad=0.02, format=plain)
        bar.set_label(_UNITS[self.normalize])
        bar.ax.yaxis.set_minor_formatter(NullFormatter())
        if n <= MAX_LABELLED:
            size = 10 if n <= MAX_NUMBERED else 8
            labels = [words(label, _LONGEST) for label in self.display_labels]
            fits = n * max(map(len, labels), default=0) <= 24  # characters side by side
            ax.set_xticks(range(n), labels, fontsize=size, rotation=0 if fits else 90)
            ax.set_yticks(range(n), labels, fontsize=size)
            self._number(ax, size, norm)
        else:
            ax.grid(color="0.85", linewidth=0.5)
            ax.set_axisbelow(True)
        ax.set(xlabel="answer", ylabel="gold")
        ax.set_title(words(self.title, 100), fontsize=11, loc="left")
        return self

    def _number(self, ax: Axes, size: int, norm: LogNorm) -> None:
        """Write each cell's value into it; zeros stay empty where there are many."""
        n = len(self.display_labels)
        for row, column in np.ndindex(n, n):
            value = self.confusion_matrix[row, column]
            if np.isnan(value) or (value == 0 and n > MAX_NUMBERED):
                continue
            text = f"{value:,.0f}" if self.normalize is None else f"{value:.2f}".removeprefix("0")
            color = "white" if value > 0 and norm(value) > 0.55 else "black"
            ax.text(column, row, text, ha="center", va="center", color=color, fontsize=min(size, 10 - n // 12))


# Blues without its palest third, so that the smallest value stands out from white.
_COLORS = LinearSegmentedColormap.from_list("confusion", plt.get_cmap("Blues")(np.linspace(0.3, 1, 256)))
_UNITS = {
    None: "examples",
    "true": "fraction of the gold label",
    "pred": "fraction of the answer",
    "all": "fraction of all",
}

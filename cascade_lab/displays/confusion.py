"""Draws confusion matrices of a stage or of the whole cascade, readable from 2 to 151 labels and beyond."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.colors import LinearSegmentedColormap, LogNorm
from matplotlib.image import AxesImage
from matplotlib.ticker import FuncFormatter, NullFormatter

from cascade_lab.analysis.classification import Normalize, confusion_matrix_frame
from cascade_lab.analysis.metrics import On, confusion
from cascade_lab.displays.drawing import Display, Style, plain_text, text_color
from cascade_lab.run import Run

if TYPE_CHECKING:
    from typing_extensions import Self

MAX_NUMBERED = 12  # labels up to which every cell has its number in text of the usual size
MAX_LABELLED = 50  # labels up to which every row and column has its name

_MAX_CHARACTERS = 40  # of a label


class MatrixDisplay(Display):
    """A square matrix with true labels in rows and predicted labels in columns.

    Parameters
    ----------
    confusion_matrix : ndarray, shape (n_labels, n_labels)
        Counts, or fractions if `normalize` is given.
    display_labels : sequence of str
        The labels of the rows and columns.
    title : str
    normalize : {"true", "pred", "all"}, optional
        What the fractions are of: the texts with a true label, the texts with a predicted label, or all texts.

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
        display_labels: Sequence[str],
        *,
        title: str = "",
        normalize: Normalize | None = None,
    ):
        self.confusion_matrix = confusion_matrix
        self.display_labels = list(display_labels)
        self.title = title
        self.normalize = normalize

    def frame(self) -> pd.DataFrame:
        """Return the matrix: true labels as index, predicted labels as columns."""
        index, columns = (
            pd.Index(self.display_labels, name=name, dtype=object) for name in ("true label", "predicted label")
        )
        return pd.DataFrame(self.confusion_matrix, index=index, columns=columns)

    def most_confused(self, n_labels: int = 15) -> Self:
        """Return a display of only the `n_labels` labels that are confused most with each other, in their order here.

        The labels are collected in pairs, from the largest cell off the diagonal downwards.
        """
        off_diagonal = self.confusion_matrix.astype(float)
        np.fill_diagonal(off_diagonal, 0.0)
        selected: dict[int, None] = {}
        for cell in np.argsort(-off_diagonal, axis=None, kind="stable"):
            row, column = divmod(int(cell), len(off_diagonal))
            if len(selected | {row: None, column: None}) > n_labels or off_diagonal[row, column] == 0:
                break
            selected |= {row: None, column: None}
        rows = sorted(selected)
        return type(self)(
            self.confusion_matrix[np.ix_(rows, rows)],
            [self.display_labels[row] for row in rows],
            title=f"{self.title}:\nthe {len(rows)} most confused of {len(self.display_labels)} labels",
            normalize=self.normalize,
        )

    def plot(self, ax: Axes | None = None, **kwargs: Any) -> Self:
        """Draw the matrix; a new figure is as large as the number of labels needs.

        Up to 50 labels, every row and column has its name. With more, the axes are numbered and the picture is an
        overview; `most_confused` selects the labels that matter.

        Parameters
        ----------
        ax : Axes, optional
        **kwargs
            Go to `Axes.imshow`.
        """
        n = len(self.display_labels)
        side = float(np.clip(1.6 + 0.3 * n, 3.4, 13 if n <= MAX_LABELLED else 8.5))
        longest = min(max(map(len, self.display_labels), default=0), _MAX_CHARACTERS) if n <= MAX_LABELLED else 0
        cell = 72 * (side - 1.6) / max(n, 1)  # points
        size = 10 if n <= MAX_NUMBERED else min(11.0, 0.65 * cell)
        extra = 0.009 * size * max(0, longest - 10)  # inches, beyond what a short label takes
        ax = self._axes(ax, (side + 1.4 + extra, side + extra))
        if not n:
            self._set_title(*self.title.split("\n", 2), "no label is confused")
            ax.set_axis_off()
            return self
        # Zeros are left white and the other values are on a log scale: a single error shows beside a full diagonal.
        values = np.ma.masked_where(~(self.confusion_matrix > 0), self.confusion_matrix)
        low, high = (values.min(), values.max()) if values.count() else (1, 1)
        norm = LogNorm(low if low < high else high / 10, high)
        style: Style = {"cmap": _COLORS, "norm": norm, "interpolation": "nearest"}
        image = ax.imshow(values, **(style | kwargs))
        decimal = FuncFormatter(lambda value, _: f"{value:g}")
        bar = self.figure_.colorbar(image, ax=ax, fraction=0.046, pad=0.02, format=decimal)
        bar.set_label(_UNITS[self.normalize])
        bar.ax.yaxis.set_minor_formatter(NullFormatter())
        if n <= MAX_LABELLED:
            labels = [plain_text(label, _MAX_CHARACTERS) for label in self.display_labels]
            fits = n * max(map(len, labels), default=0) <= 24  # characters side by side
            ax.set_xticks(range(n), labels, fontsize=size, rotation=0 if fits else 90)
            ax.set_yticks(range(n), labels, fontsize=size)
            self._write_values(image, size, cell)
        else:
            ax.grid(color="0.85", linewidth=0.5)
            ax.set_axisbelow(True)
        ax.set(xlabel="predicted label", ylabel="true label")
        self._set_title(*self.title.split("\n", 2))
        return self

    def _write_values(self, image: AxesImage, size: float, cell: float) -> None:
        """Write each cell's value into it, in cells of `cell` points; zeros are left out if there are many."""
        n = len(self.display_labels)
        highest = np.nanmax(self.confusion_matrix, initial=0)
        n_characters = len(f"{highest:,.0f}") if self.normalize is None else 3
        size = min(size, 10, 1.4 * cell / max(n_characters, 2))
        for row, column in np.ndindex(n, n):
            value = self.confusion_matrix[row, column]
            if np.isnan(value) or (value == 0 and n > MAX_NUMBERED):
                continue
            text = f"{value:,.0f}" if self.normalize is None else f"{value:.2f}".removeprefix("0")
            color = text_color(image.cmap(image.norm(value))) if value > 0 else "black"
            self.ax_.text(column, row, text, ha="center", va="center", color=color, fontsize=size)


class CascadeConfusionDisplay(MatrixDisplay):
    """A confusion matrix of the cascade or of one stage."""

    @classmethod
    def from_run(
        cls, run: Run, *, stage: str | None = None, on: On = "reached", normalize: Normalize | None = None
    ) -> Self:
        """Compute the matrix of a run, with `cascade_lab.analysis.metrics.confusion`.

        Parameters
        ----------
        run : Run
        stage : str, optional
            By default the whole cascade, where the labels that reject come last. A stage's matrix has the stage's
            labels. It leaves out texts for which the stage has no correct label (an earlier gate should have stopped
            them).
        on : {"reached", "all"}
            For a stage: the texts that reached it, or all texts (this needs shadow scores).
        normalize : {"true", "pred", "all"}, optional

        Raises
        ------
        SpecError
            The cascade has no such stage.
        RunError
            The run has no shadow scores.
        """
        matrix = confusion(run, stage=stage, on=on, normalize=normalize)
        which = "the texts that reached it" if on == "reached" else "all texts"
        title = f"{run.spec.name}, end to end" if stage is None else f"stage {stage}, on {which}"
        return cls(matrix.to_numpy(), list(matrix.index), title=title, normalize=normalize)

    @classmethod
    def from_predictions(
        cls,
        y_true: Any,
        y_pred: Any,
        *,
        labels: Sequence[str] | None = None,
        normalize: Normalize | None = None,
        title: str = "",
    ) -> Self:
        """Compute the matrix of labels and predictions.

        Parameters
        ----------
        y_true, y_pred : array-like of str, shape (n,)
            True and predicted labels.
        labels : sequence of str, optional
            The labels of the rows and columns, in this order; by default those that occur, sorted.
        normalize : {"true", "pred", "all"}, optional
        title : str

        Examples
        --------
        >>> CascadeConfusionDisplay.from_predictions(["a", "a", "b"], ["a", "b", "b"]).frame().loc["a"]
        predicted label
        a    1
        b    1
        Name: a, dtype: int64
        """
        if labels is None:
            labels = sorted({*np.asarray(y_true, dtype=object), *np.asarray(y_pred, dtype=object)})
        matrix = confusion_matrix_frame(y_true, y_pred, labels, normalize=normalize)
        return cls(matrix.to_numpy(), list(labels), title=title, normalize=normalize)


# Blues without its palest third, so that the smallest value differs from white.
_COLORS = LinearSegmentedColormap.from_list("confusion", plt.get_cmap("Blues")(np.linspace(0.3, 1, 256)))
_UNITS = {
    None: "texts",
    "true": "fraction of the texts with this true label",
    "pred": "fraction of the texts with this predicted label",
    "all": "fraction of all texts",
}

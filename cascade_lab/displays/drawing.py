"""Gives all displays their base class, the colours of outcomes, and texts that matplotlib can draw.

Importing this module does not load matplotlib.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from functools import wraps
from typing import TYPE_CHECKING, Any, NamedTuple

import pandas as pd

from cascade_lab.analysis.errors import (
    GOES_ON,
    RECOVERABLE,
    RECOVERABLE_ANSWER,
    UNRECOVERABLE,
    UNRECOVERABLE_ANSWER,
)
from cascade_lab.analysis.outcomes import FALSE_ACCEPT, FALSE_REJECT, RIGHT, RIGHT_REJECT, WRONG_CLASS, WRONG_REJECT
from cascade_lab.displays.fonts import add_fonts
from cascade_lab.text import printable, shorten

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.axes._secondary_axes import SecondaryAxis
    from matplotlib.figure import Figure
    from typing_extensions import Self


Style = dict[str, Any]
"""Keyword arguments of a matplotlib artist."""


class OutcomeStyle(NamedTuple):
    """How an outcome is drawn: a colour, and a hatch of matplotlib's (None: plain)."""

    color: str
    hatch: str | None


# The correct outcomes are pale and plain; the errors are darker and hatched, so that a grey print shows them apart.
OUTCOME_STYLES = {
    GOES_ON: OutcomeStyle("#e4e4e4", None),
    RIGHT: OutcomeStyle("#8ec9b4", None),
    RIGHT_REJECT: OutcomeStyle("#c0e0d4", None),
    FALSE_REJECT: OutcomeStyle("#c76f2b", "////"),  # the sum of the two kinds of reject that follow
    RECOVERABLE: OutcomeStyle("#e08a3c", "////"),
    UNRECOVERABLE: OutcomeStyle("#a8521a", "xxxx"),
    RECOVERABLE_ANSWER: OutcomeStyle("#3f86b8", "////"),
    UNRECOVERABLE_ANSWER: OutcomeStyle("#1f4e79", "xxxx"),
    FALSE_ACCEPT: OutcomeStyle("#b0304f", "\\\\\\\\"),
    WRONG_CLASS: OutcomeStyle("#5d4390", "...."),
    WRONG_REJECT: OutcomeStyle("#55595f", "----"),
}


class Display(ABC):
    """A picture that keeps the numbers it shows.

    A notebook cell that ends in a display shows its picture once, whether or not `plot` was called. What `plot` draws
    has fonts for labels in any script, as far as this machine has them.

    Attributes
    ----------
    title : str
    ax_, figure_ : Axes, Figure
        After `plot`.
    """

    title: str = ""
    ax_: Axes
    figure_: Figure

    def __init_subclass__(cls, **keys: Any) -> None:
        """Let every method that draws, `plot` and `plot_…`, end with `add_fonts`."""
        super().__init_subclass__(**keys)
        for name, method in list(vars(cls).items()):
            if name.startswith("plot"):
                setattr(cls, name, _with_fonts(method))

    @abstractmethod
    def frame(self) -> pd.DataFrame:
        """Return the numbers that the picture shows."""

    @abstractmethod
    def plot(self, ax: Axes | None = None, **kwargs: Any) -> Self:
        """Draw the picture into `ax`, or into a new figure; `kwargs` go to the main artist. Return the display."""

    def __repr__(self) -> str:
        return f"<{type(self).__name__}: {printable(shorten(self.title, 80))}>"

    def _ipython_display_(self) -> None:
        """Show the picture in a notebook, after drawing it if that has not been done."""
        import matplotlib.pyplot as plt
        from IPython.display import display

        if not hasattr(self, "figure_"):
            self.plot()
        display(self.figure_)
        # At the end of a cell, the notebook's backend shows every figure that is still open: this one a second time.
        if "inline" in plt.get_backend():
            plt.close(self.figure_)

    def _axes(self, ax: Axes | None, figsize: tuple[float, float]) -> Axes:
        """Return `ax`, or the axes of a new figure of `figsize` inches; set `ax_` and `figure_`."""
        if ax is None:
            import matplotlib.pyplot as plt

            _, ax = plt.subplots(figsize=figsize, layout="constrained")
        figure = ax.get_figure(root=True)
        assert figure is not None, "axes that were removed from their figure"
        self.ax_, self.figure_ = ax, figure
        return ax

    def _set_title(self, *lines: str, max_length: int = 100) -> None:
        """Write a title above the axes at the left, each line of it cut to `max_length` characters."""
        texts = (plain_text(line, max_length) for line in lines if line)
        self.ax_.set_title("\n".join(texts), fontsize=11, loc="left")


def _with_fonts(plot: Callable[..., Any]) -> Callable[..., Any]:
    @wraps(plot)
    def plot_with_fonts(display: Any, *args: Any, **kwargs: Any) -> Any:
        result = plot(display, *args, **kwargs)
        add_fonts(display.ax_)
        return result

    return plot_with_fonts


def plain_text(text: str, max_length: int = 60) -> str:
    r"""Return a text that matplotlib draws as it is: on one line, cut to `max_length` characters, never a formula.

    >>> print(plain_text("$x_1$\nof \x07"), plain_text("a" * 99, max_length=4))
    \$x_1\$ of � aaa…
    """
    return printable(shorten(text, max_length)).replace("$", r"\$")


def percent(fraction: float) -> str:
    """Return a fraction as a percentage with one decimal; a dash where it is undefined.

    >>> percent(0.12345), percent(0.0001), percent(float("nan"))
    ('12.3%', '<0.1%', '–')
    """
    if fraction != fraction:
        return "–"
    return "<0.1%" if 0 < fraction < 0.0005 else f"{fraction:.1%}"


def metric_label(name: str) -> str:
    """Return the name of a metric as it stands on an axis or in a legend.

    >>> metric_label("macro_f1"), metric_label("in_scope_accuracy")
    ('macro F1', 'in-scope accuracy')
    """
    return name.replace("in_scope", "in-scope").replace("_", " ").replace("f1", "F1")


def text_color(background: Any) -> str:
    """Return the colour of a text that can be read on a background colour: white on dark, black on light.

    >>> text_color("#5d4390"), text_color("#e4e4e4")
    ('white', 'black')
    """
    from matplotlib.colors import to_rgb

    red, green, blue = to_rgb(background)
    return "white" if 0.299 * red + 0.587 * green + 0.114 * blue < 0.5 else "black"


def hide_spines(ax: Axes | SecondaryAxis, *sides: str) -> None:
    """Hide the lines of the frame at `sides` (default: top and right), and at the left also the ticks."""
    sides = sides or ("top", "right")
    ax.spines[list(sides)].set_visible(False)
    if "left" in sides:
        ax.tick_params(axis="y", length=0)

"""Draws texts whose words are coloured by how much they contribute to a stage's logit."""

from __future__ import annotations

import unicodedata
from collections.abc import Iterator, Sequence
from html import escape
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.patches import Rectangle

from cascade_lab.displays.drawing import Display, Style, plain_text
from cascade_lab.run import Run
from cascade_lab.text import printable, shorten

if TYPE_CHECKING:
    from typing_extensions import Self

    from cascade_lab.bert.attributions import Attribution, Method

MAX_WORD = 40  # characters of a word that are shown
MIN_SHARE = 0.1  # of the highest score; a word with a lower score has its colour but no number

_FOR, _AGAINST = (33, 102, 172), (217, 95, 2)


class TextAttributionDisplay(Display):
    """Texts in which each word has a background as strong as its score, a line below it, and the score.

    Words for the target are blue with a solid line; words against it are orange with a dashed line. A notebook cell
    that ends in the display shows it as HTML; `plot` draws the same as a picture.

    Parameters
    ----------
    attributions : sequence of Attribution
        What `cascade_lab.bert.attributions.attribute` returns.
    title : str

    Attributes
    ----------
    attributions, title
        As given.
    ax_, figure_ : Axes, Figure
        After `plot`.
    """

    def __init__(self, attributions: Sequence[Attribution], *, title: str = ""):
        self.attributions = list(attributions)
        self.title = title

    @classmethod
    def from_run(
        cls,
        run: Run,
        example_ids: Sequence[str],
        *,
        stage: str,
        method: Method = "integrated_gradients",
        target: str | None = None,
        n_steps: int = 64,
    ) -> Self:
        """Attribute a stage's logit for some examples of a run; this needs the checkpoint, and TensorFlow.

        Raises
        ------
        SpecError
            The cascade has no such stage, method or label.
        KeyError
            The run has no such example.
        CheckpointError
            The stage's files are missing.
        """
        from cascade_lab.bert.attributions import attribute

        rows = run.examples.set_index("example_id").loc[list(example_ids)]
        texts_b = [None if text is None or text != text else text for text in rows["text_b"]]
        attributions = attribute(
            run.spec.stage(stage), list(rows["text"]), texts_b, method=method, target=target, n_steps=n_steps
        )
        return cls(attributions, title=f"{run.spec.name}, stage {stage}")

    def frame(self) -> pd.DataFrame:
        """Return one row per word: `text` (its number, from 0), `word`, `score` and `target`."""
        parts = [
            pd.DataFrame({"text": i, "word": list(a.words), "score": a.scores, "target": a.target})
            for i, a in enumerate(self.attributions)
        ]
        return (
            pd.concat(parts, ignore_index=True) if parts else pd.DataFrame(columns=["text", "word", "score", "target"])
        )

    def to_html(self) -> str:
        """Return the texts as HTML, safe whatever they contain."""
        title = printable(shorten(self.title, 100))
        parts = [f"<p><b><bdi>{escape(title)}</bdi></b></p>"] if title else []
        for attribution in self.attributions:
            highest = _highest(attribution)
            words = "".join(
                _word_html(*pair, highest) for pair in zip(attribution.words, attribution.scores, strict=True)
            )
            caption = escape(printable(shorten(_caption(attribution), 400)))
            parts.append(
                f'<div style="margin:10px 0 16px"><div style="color:#444;font-size:12px">{caption}</div>'
                f"<div>{words}{_unread_html(attribution)}</div></div>"
            )
        return f'<div style="color:#111;background:#fff;font-family:sans-serif;max-width:60em">{"".join(parts)}</div>'

    def _ipython_display_(self) -> None:
        from IPython.display import HTML, display

        if hasattr(self, "figure_"):
            super()._ipython_display_()
        else:
            display(HTML(self.to_html()))

    def plot(self, ax: Axes | None = None, **kwargs: Any) -> Self:
        """Draw the texts as lines of words, with the score below each word whose score is high enough.

        Parameters
        ----------
        ax : Axes, optional
        **kwargs
            Go to `Axes.text`, which draws the words.
        """
        blocks = [_lines(attribution) for attribution in self.attributions]
        n_lines = sum(2 * len(lines) + 2 for lines in blocks)
        ax = self._axes(ax, (_WIDTH * _CHARACTER + 0.4, 0.21 * n_lines + 0.6))
        ax.set(xlim=(0, _WIDTH), ylim=(n_lines, 0))
        ax.set_axis_off()
        self._set_title(self.title)
        y = 0.0
        for attribution, lines in zip(self.attributions, blocks, strict=True):
            ax.text(0, y + 0.5, plain_text(_caption(attribution), 150), fontsize=7.5, color="0.3", va="center")
            y += 1.2
            for line in lines:
                for x, word, score in line:
                    _draw_word(ax, x, y, word, score, _highest(attribution), kwargs)
                y += 2
            y += 0.8
        return self


# The figure's width in characters of a monospaced font of 9 points, and the width of one in inches.
_WIDTH, _CHARACTER = 104, 9 * 0.602 / 72


def _highest(attribution: Attribution) -> float:
    return float(np.abs(attribution.scores).max(initial=0)) or 1.0


def _caption(attribution: Attribution) -> str:
    steps = f", {attribution.n_steps} steps" if attribution.n_steps > 1 else ""
    predicted = (
        "" if attribution.predicted == attribution.target else f" (predicted: {attribution.predicted[:MAX_WORD]})"
    )
    return (
        f"{attribution.target[:MAX_WORD]}: logit {attribution.logit:.2f}, baseline {attribution.baseline_logit:.2f}; "
        f"{attribution.method.replace('_', ' ')}{steps}, error {attribution.completeness_error:+.2g}{predicted}"
    )


def _word_html(word: str, score: float, highest: float) -> str:
    share = abs(score) / highest
    color = ",".join(map(str, _FOR if score > 0 else _AGAINST))
    line = "none" if share < MIN_SHARE / 2 else f"{1 + 3 * share:.1f}px {'solid' if score > 0 else 'dashed'} #111"
    number = f"{score:+.2f}" if share >= MIN_SHARE else "&nbsp;"
    style = f"background:rgba({color},{0.75 * share:.2f});border-bottom:{line}"
    return (
        '<span style="display:inline-block;line-height:1.3;text-align:center;vertical-align:top;margin:3px 2px">'
        f'<bdi style="display:inline-block;{style};padding:1px 3px">'
        f"{escape(printable(shorten(word, MAX_WORD)))}</bdi><br>"
        f'<span style="font-size:10px;color:#444">{number}</span></span>'
    )


def _unread_html(attribution: Attribution) -> str:
    if not attribution.n_unread:
        return ""
    return f'<i style="color:#666;line-height:2"> … and {attribution.n_unread:,} words that are not read</i>'


def _lines(attribution: Attribution) -> list[list[tuple[float, str, float]]]:
    """Arrange a text's words in lines: for each word its x, itself and its score (NaN if it has none)."""
    lines: list[list[tuple[float, str, float]]] = [[]]
    x = 0.0
    for word, score in _words(attribution):
        width = max(_width(word), 4)
        if x + width > _WIDTH and lines[-1]:
            lines.append([])
            x = 0.0
        lines[-1].append((x, word, score))
        x += width + 1.4
    return lines


def _words(attribution: Attribution) -> Iterator[tuple[str, float]]:
    for word, score in zip(attribution.words, attribution.scores, strict=True):
        yield printable(shorten(word, MAX_WORD)), float(score)
    if attribution.n_unread:
        yield f"… {attribution.n_unread:,} words not read", float("nan")


def _width(word: str) -> int:
    """Return how many columns a word takes in a monospaced font; Chinese, Japanese and Korean characters take two."""
    return sum(2 if unicodedata.east_asian_width(char) in "WF" else 1 for char in word)


def _draw_word(ax: Axes, x: float, y: float, word: str, score: float, highest: float, kwargs: Style) -> None:
    share = 0.0 if np.isnan(score) else abs(score) / highest
    width = _width(word)
    background = (*(part / 255 for part in (_FOR if score > 0 else _AGAINST)), 0.75 * share)
    ax.add_patch(Rectangle((x - 0.25, y), width + 0.5, 1, facecolor=background, linewidth=0))
    color = "0.4" if np.isnan(score) else "black"
    style: Style = {"fontsize": 9, "family": "monospace", "va": "center", "color": color}
    ax.text(x, y + 0.5, plain_text(word, MAX_WORD), **(style | kwargs))
    if share >= MIN_SHARE / 2:
        dash: Any = "-" if score > 0 else (0, (2, 1.2))
        ax.plot([x - 0.25, x + width + 0.25], [y + 1, y + 1], color="black", linewidth=0.6 + 2 * share, linestyle=dash)
    if share >= MIN_SHARE:
        ax.text(x + width / 2, y + 1.45, f"{score:+.2f}", fontsize=6.5, color="0.25", ha="center", va="center")

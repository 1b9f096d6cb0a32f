"""Texts whose words are coloured by what they add to a stage's answer."""

from __future__ import annotations

import unicodedata
from collections.abc import Sequence
from html import escape
from typing import TYPE_CHECKING

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes
from matplotlib.patches import Rectangle

from cascade_lab.displays.words import words
from cascade_lab.run import Run

if TYPE_CHECKING:
    from cascade_lab.bert.attributions import Attribution, Method

MAX_WORD = 40  # characters of a word that are shown
LEAST_SHARE = 0.1  # of the highest score; a lower one has its colour but no number

_FOR, _AGAINST = (33, 102, 172), (217, 95, 2)


class TextAttributionDisplay:
    """Texts with each word on a ground as deep as its score: blue and underlined for the target, orange and dashed
    against it, with its number.

    In a notebook the display shows itself as HTML; `plot` draws the same for a file.

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
        stage: str,
        example_ids: Sequence[str],
        *,
        method: Method = "integrated_gradients",
        target: str | None = None,
        n_steps: int = 64,
    ) -> TextAttributionDisplay:
        """Attribute a stage's logit on some examples of a run; this takes the checkpoint, and TensorFlow.

        Raises
        ------
        SpecError
            No such stage, method or label.
        KeyError
            No such example.
        CheckpointError
            The stage's files are not where they were.
        """
        from cascade_lab.bert.attributions import attribute

        rows = run.examples.set_index("example_id").loc[list(example_ids)]
        texts_b = [None if text is None or text != text else text for text in rows["text_b"]]
        made = attribute(
            run.spec.stage(stage), list(rows["text"]), texts_b, method=method, target=target, n_steps=n_steps
        )
        return cls(made, title=f"{run.spec.name}, stage {stage}")

    def _repr_html_(self) -> str:
        parts = [f"<p><b><bdi>{escape(_shown(self.title, 100))}</bdi></b></p>"] if self.title else []
        for found in self.attributions:
            highest = _highest(found)
            marked = "".join(_mark(*pair, highest) for pair in zip(found.words, found.scores, strict=True))
            said = escape(_shown(_said(found), 400))
            parts.append(
                f'<div style="margin:10px 0 16px"><div style="color:#444;font-size:12px">{said}</div>'
                f"<div>{marked}{_unread(found)}</div></div>"
            )
        return f'<div style="color:#111;background:#fff;font-family:sans-serif;max-width:60em">{"".join(parts)}</div>'

    def plot(self, ax: Axes | None = None) -> TextAttributionDisplay:
        """Draw the texts as lines of words, a number below each word that counts."""
        blocks = [_lines(found) for found in self.attributions]
        n_lines = sum(2 * len(lines) + 2 for lines in blocks)
        if ax is None:
            _, ax = plt.subplots(figsize=(_WIDTH * _LETTER + 0.4, 0.21 * n_lines + 0.6), layout="constrained")
        self.ax_, self.figure_ = ax, ax.get_figure(root=True)
        ax.set(xlim=(0, _WIDTH), ylim=(n_lines, 0))
        ax.set_axis_off()
        ax.set_title(words(self.title, 100), fontsize=11, loc="left")
        y = 0.0
        for found, lines in zip(self.attributions, blocks, strict=True):
            ax.text(0, y + 0.5, words(_said(found), 150), fontsize=7.5, color="0.3", va="center")
            y += 1.2
            for line in lines:
                for x, word, score in line:
                    _draw(ax, x, y, word, score, _highest(found))
                y += 2
            y += 0.8
        return self


# A line of the figure holds so many letters of a monospaced font of 9 points, each so many inches wide.
_WIDTH, _LETTER = 104, 9 * 0.602 / 72


def _highest(found: Attribution) -> float:
    return float(np.abs(found.scores).max(initial=0)) or 1.0


def _said(found: Attribution) -> str:
    steps = f", {found.n_steps} steps" if found.n_steps > 1 else ""
    answer = "" if found.answer == found.target else f" (the answer is {found.answer[:MAX_WORD]})"
    return (
        f"{found.target[:MAX_WORD]}: logit {found.logit:.2f}, of the baseline {found.baseline_logit:.2f}; "
        f"{found.method.replace('_', ' ')}{steps}, error {found.completeness_error:+.2g}{answer}"
    )


def _shown(text: str, most: int = MAX_WORD) -> str:
    """Return a text as it can stand in a line: short, and without characters that print nothing or steer."""
    text = "".join(char if char.isprintable() else "�" for char in text[: 2 * most])
    return text if len(text) <= most else text[: most - 1] + "…"


def _mark(word: str, score: float, highest: float) -> str:
    share = abs(score) / highest
    color = ",".join(map(str, _FOR if score > 0 else _AGAINST))
    line = "none" if share < LEAST_SHARE / 2 else f"{1 + 3 * share:.1f}px {'solid' if score > 0 else 'dashed'} #111"
    number = f"{score:+.2f}" if share >= LEAST_SHARE else "&nbsp;"
    ground = f"background:rgba({color},{0.75 * share:.2f});border-bottom:{line}"
    return (
        '<span style="display:inline-block;line-height:1.3;text-align:center;vertical-align:top;margin:3px 2px">'
        f'<bdi style="display:inline-block;{ground};padding:1px 3px">'
        f'{escape(_shown(word))}</bdi><br><span style="font-size:10px;color:#444">{number}</span></span>'
    )


def _unread(found: Attribution) -> str:
    return (
        f'<i style="color:#666;line-height:2"> … and {found.n_unread:,} words that are not read</i>'
        if found.n_unread
        else ""
    )


def _lines(found: Attribution) -> list[list[tuple[float, str, float]]]:
    """Set a text's words into lines: for each word its place, itself and its score (NaN where it has none)."""
    lines: list[list[tuple[float, str, float]]] = [[]]
    pairs = list(zip(found.words, found.scores, strict=True))
    if found.n_unread:
        pairs.append((f"… {found.n_unread:,} words not read", np.nan))
    at = 0.0
    for word, score in pairs:
        word = _shown(word)
        wide = max(sum(2 if unicodedata.east_asian_width(char) in "WF" else 1 for char in word), 4)
        if at + wide > _WIDTH and lines[-1]:
            lines.append([])
            at = 0.0
        lines[-1].append((at, word, float(score)))
        at += wide + 1.4
    return lines


def _draw(ax: Axes, x: float, y: float, word: str, score: float, highest: float) -> None:
    share = 0.0 if np.isnan(score) else abs(score) / highest
    wide = sum(2 if unicodedata.east_asian_width(char) in "WF" else 1 for char in word)
    ground = (*(part / 255 for part in (_FOR if score > 0 else _AGAINST)), 0.75 * share)
    ax.add_patch(Rectangle((x - 0.25, y), wide + 0.5, 1, facecolor=ground, linewidth=0))
    style = {"fontsize": 9, "family": "monospace", "va": "center"}
    ax.text(x, y + 0.5, words(word, MAX_WORD), color="0.4" if np.isnan(score) else "black", **style)
    if share >= LEAST_SHARE / 2:
        dash = "-" if score > 0 else (0, (2, 1.2))
        ax.plot([x - 0.25, x + wide + 0.25], [y + 1, y + 1], color="black", linewidth=0.6 + 2 * share, linestyle=dash)
    if share >= LEAST_SHARE:
        ax.text(x + wide / 2, y + 1.45, f"{score:+.2f}", fontsize=6.5, color="0.25", ha="center", va="center")

"""Plain sentences for people: a list that notebooks and terminals can show, and numbers in words."""

from __future__ import annotations

import numpy as np

from cascade_lab.text import escape_markdown, printable


class Summary(list[str]):
    """Plain sentences about a run, which may contain text of users.

    In a notebook cell they are shown as a list; `print` gives one line per sentence.

    >>> print(Summary(["All 20 texts are answered correctly."]))
    - All 20 texts are answered correctly.
    """

    def __str__(self) -> str:
        return "\n".join(f"- {printable(sentence)}" for sentence in self)

    def _repr_markdown_(self) -> str:
        return escape_markdown(str(self))


def percent(fraction: float) -> str:
    """Return a fraction as a percentage.

    >>> percent(0.9423), percent(float("nan"))
    ('94.2%', 'undefined')
    """
    return "undefined" if np.isnan(fraction) else f"{fraction:.1%}"


def percent_interval(value: float, low: float, high: float) -> str:
    """Return a fraction and its interval as percentages.

    >>> percent_interval(0.9423, 0.93, 0.95)
    '94.2% (93.0% to 95.0%)'
    """
    return percent(value) if np.isnan(low) else f"{percent(value)} ({percent(low)} to {percent(high)})"


def points(difference: float) -> str:
    """Return a difference of two fractions in percentage points, with its sign.

    >>> points(0.0052), points(-0.01)
    ('+0.52', '-1.00')
    """
    return f"{100 * difference:+.2f}"

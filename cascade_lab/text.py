"""Texts of users on one line: shortened, and safe to print."""

from __future__ import annotations

import unicodedata


def shorten(text: str, max_length: int) -> str:
    """Return a text on one line of at most `max_length` characters; "…" stands for what is cut.

    >>> shorten("pay my\\n  bill", 20), shorten("pay my bill", 7)
    ('pay my bill', 'pay my…')
    """
    line = " ".join(text[: 20 * max_length].split())
    return line if len(line) <= max_length else line[: max_length - 1] + "…"


def printable(text: str) -> str:
    """Return a text on one line that cannot change a terminal or a page.

    Each control character becomes "�", and every kind of blank becomes a space.

    >>> printable("pay\\nme\\x1b[31m now"), printable("付\\u3000款")
    ('pay me�[31m now', '付 款')
    """
    line = " ".join(text.splitlines())
    blanks = "".join(" " if unicodedata.category(char) == "Zs" else char for char in line)
    return "".join(char if char.isprintable() else "�" for char in blanks)

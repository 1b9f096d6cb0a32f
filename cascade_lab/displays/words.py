"""Texts and labels as a figure can bear them, whatever they are."""

from __future__ import annotations


def words(text: str, most: int = 60) -> str:
    """Return a text for matplotlib to draw as it stands: on one line, no formula, of at most so many characters.

    >>> print(words("$x_1$\\nof \\x07"), words("a" * 99, most=4))
    \\$x_1\\$ of � aaa…
    """
    text = "".join(char if char.isprintable() else "�" for char in " ".join(text[: 20 * most].split()))
    return (text if len(text) <= most else text[: most - 1] + "…").replace("$", r"\$")

"""Texts of users on one line: shortened, and safe to print."""

from __future__ import annotations

import re
import unicodedata

# Characters that are not seen but change how the text around them is shown: controls, directions, zero-width ones.
# The joiners U+200C and U+200D are left out: emoji and Persian words are written with them.
_UNSEEN = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f\u00ad\u061c\u180e\u200b\u200e\u200f\u2028-\u202e\u2060-\u206f\ufeff\ufff9-\ufffb"
    "\U000e0000-\U000e007f\ud800-\udfff]"
)

_SPECIAL = re.compile(r"([\\`*_{}\[\]<>#|$~&])")  # of Markdown


def shorten(text: str, max_length: int) -> str:
    """Return a text on one line of at most `max_length` characters; "…" stands for what is cut.

    >>> shorten("pay my\\n  bill", 20), shorten("pay my bill", 7)
    ('pay my bill', 'pay my…')
    """
    line = " ".join(text[: 20 * max_length].split())
    return line if len(line) <= max_length else line[: max_length - 1] + "…"


def exact(number: float | None) -> str:
    """Return the shortest decimal that is read back as the same number, or "–" for none: a threshold to type.

    >>> exact(0.30000000000000004), exact(0.5), exact(1.0), exact(None)
    ('0.30000000000000004', '0.5', '1', '–')
    """
    return "–" if number is None or number != number else f"{float(number)!r}".removesuffix(".0")


def printable(text: str) -> str:
    """Return a text on one line that cannot change a terminal or a page.

    Each control character becomes "�", and every kind of blank becomes a space.

    >>> printable("pay\\nme\\x1b[31m now"), printable("付\\u3000款")
    ('pay me�[31m now', '付 款')
    """
    line = " ".join(text.splitlines())
    blanks = "".join(" " if unicodedata.category(char) == "Zs" else char for char in line)
    return "".join(char if char.isprintable() else "�" for char in blanks)


def escape_markdown(text: str) -> str:
    """Return Markdown that shows a text as it is.

    >>> print(escape_markdown("label_1 <b>"))
    label\\_1 \\<b\\>
    """
    return _SPECIAL.sub(r"\\\1", text)


def visible(text: str) -> str:
    """Return a text of several lines for a page, with what cannot be seen made visible; tabs and line feeds stay.

    A control character becomes its Unicode picture; other unseen characters become "�".

    >>> visible("a\\x00b\\x7f\\u202ec")
    'a␀b␡�c'
    """
    return _UNSEEN.sub(_picture, text)


def _picture(found: re.Match[str]) -> str:
    code = ord(found[0])
    return chr(0x2400 + code) if code < 0x20 else "\u2421" if code == 0x7F else "�"

"""Gives each parameter its own type and default where a docstring documents several on one line (`a, b : int`)."""

from __future__ import annotations

import re
from typing import Any

import griffe

GROUP = re.compile(r"^(\w+(?:, \w+)+)( :.*)?$")


def with_single_names(docstring: str) -> str:
    """Return a numpy docstring whose groups of parameters are written out, one parameter after the other."""
    before, heading, rest = docstring.partition("\nParameters\n----------\n")
    lines = rest.split("\n")
    end = next((n for n, line in enumerate(lines[1:]) if lines[n] and line.startswith("---")), len(lines))
    written: list[str] = []
    n = 0
    while n < end:
        group = GROUP.match(lines[n])
        after = next((m for m in range(n + 1, end) if lines[m] and not lines[m].startswith(" ")), end)
        for name in group[1].split(", ") if group else ():
            written += [name + (group[2] or ""), *lines[n + 1 : after]]
        if not group:
            written += lines[n:after]
        n = after
    return before + heading + "\n".join(written + lines[end:]) if heading else docstring


class SingleNames(griffe.Extension):
    """Changes docstrings after they are collected."""

    def on_function(self, *, func: griffe.Function, **_: Any) -> None:
        """Write out the groups of a function's docstring."""
        if func.docstring:
            func.docstring.value = with_single_names(func.docstring.value)

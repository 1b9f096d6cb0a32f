"""Writes the map of the package into data/docs/map.md, from the first line of each module's docstring: `make map`."""

from __future__ import annotations

import ast
from pathlib import Path

ROOT = Path(__file__).parents[1]
MAP = ROOT / "data" / "docs" / "map.md"
BEGIN, END = "<!-- map: written by `make map` -->\n", "<!-- end of map -->\n"


def package_map() -> str:
    """Return the map as a Markdown table, one row per module: a folder's files below its own row."""
    lines = ["| module | what it does |", "|---|---|"]
    for path in sorted((ROOT / "cascade_lab").rglob("*.py"), key=_order):
        name = path.relative_to(ROOT / "cascade_lab").as_posix().removesuffix("__init__.py")
        if name:
            lines.append(f"| `{name}` | {_first_line(path)} |")
    return "\n".join(lines) + "\n"


def with_map(page: str) -> str:
    """Return the page's text with the present map in it."""
    before, _, rest = page.partition(BEGIN)
    return before + BEGIN + package_map() + END + rest.partition(END)[2]


def _order(path: Path) -> tuple[bool, str, bool, str]:
    """Sort a folder's own files after those of the package, each folder beginning with its `__init__.py`."""
    parts = path.relative_to(ROOT / "cascade_lab").parts
    return len(parts) > 1, parts[0] if len(parts) > 1 else "", parts[-1] != "__init__.py", path.as_posix()


def _first_line(path: Path) -> str:
    docstring = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8")))
    return (docstring or "").split("\n")[0].rstrip(".").replace("|", "\\|")


if __name__ == "__main__":
    MAP.write_text(with_map(MAP.read_text(encoding="utf-8")), encoding="utf-8")

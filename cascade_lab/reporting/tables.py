"""The tables of a page: aligned, scrolling where they are wide, and each as csv to download."""

from __future__ import annotations

import base64
import csv
import io
import re
from collections.abc import Iterable, Mapping, Sequence
from html import escape, unescape
from typing import Any

from cascade_lab.analysis.label_audit import escape_cell

_TABLE = re.compile(r"<table\b.*?</table>", re.DOTALL)
_CELL = re.compile(r"<t([dh])\b([^>]*)>(.*?)</t\1>", re.DOTALL)
_NUMBER = re.compile(r"[-+−]?[\d.,]+(e[-+]?\d+)?%?( \([^a-z]*( to )?[^a-z]*\))?|–|nan|", re.IGNORECASE)


def align(table: str) -> str:
    """Mark every cell of a table as number, words or text, so that the style sheet aligns numbers right, words left.

    A header is aligned as its column. The contents stay, except that NaN in a column of numbers is shown as –.
    """
    body = table.partition("<tbody>")[2]
    rows = [_CELL.findall(row) for row in body.split("</tr>")]
    columns = zip(*([content for tag, _, content in row if tag == "d"] for row in rows if row), strict=False)
    kinds = ["number" if all(_NUMBER.fullmatch(cell.strip()) for cell in column) else "words" for column in columns]

    def aligned_row(row: str) -> str:
        cells = _CELL.findall(row)
        has_spanning_header = any("colspan" in attributes for _, attributes, _ in cells)
        column_numbers = iter(range(len(kinds) - len(cells), len(kinds)))  # row headers come first: below 0

        def aligned_cell(cell: re.Match[str]) -> str:
            tag, attributes, content = cell.groups()
            column = next(column_numbers)
            kind = "words" if column < 0 or has_spanning_header else kinds[column]
            if kind == "number":
                content = "–" if tag == "d" and content.strip() == "NaN" else content
            elif "<" not in content:
                is_long = len(content) > 40 or any(len(word) > 40 for word in content.split())
                kind, content = "text" if is_long else "words", re.sub(r"_(?=\w)", "_<wbr>", content)
            return f'<t{tag}{attributes} data-kind="{kind}">{content}</t{tag}>'

        return _CELL.sub(aligned_cell, row)

    return "</tr>".join(aligned_row(row) for row in table.split("</tr>"))


def scrolling_tables(html: str) -> str:
    """Return HTML with every table aligned, in a box of its own that scrolls where the table is wider than the page."""
    return _TABLE.sub(lambda table: f'<div class="table" tabindex="0">{align(table[0])}</div>', html)


def tables_as_csv(html: str) -> list[str]:
    """Return the csv of every table in HTML, from its cells."""
    return [_csv(_cells(row) for row in table[0].split("</tr>") if "<t" in row) for table in _TABLE.finditer(html)]


def values_as_csv(values: Mapping[str, Any]) -> str:
    """Return the csv of a table's values (`capture.table_values`), with all their digits.

    >>> values_as_csv({"columns": ["a"], "index": ["x", "=1+1"], "rows": [[0.5], [None]]})
    ",a\\r\\nx,0.5\\r\\n'=1+1,\\r\\n"
    """
    rows = zip(values["index"], values["rows"], strict=True)
    return _csv([["", *values["columns"]], *([label, *row] for label, row in rows)])


def csv_link(text: str, name: str) -> str:
    """Return a link that saves a csv as `name`.csv; it holds the file, with the mark by which Excel knows UTF-8."""
    source = base64.b64encode(text.encode("utf-8-sig")).decode()
    return f'<a class="csv" download="{escape(name)}.csv" href="data:text/csv;base64,{source}">csv</a>\n'


def _cells(row: str) -> list[str]:
    contents = (re.sub(r"<br\b[^>]*>", "\n", content) for *_, content in _CELL.findall(row))
    return [unescape(re.sub("<[^>]*>", "", content)).strip() for content in contents]


def _csv(rows: Iterable[Sequence[Any]]) -> str:
    """Return rows as csv that no spreadsheet runs; numbers stay as they are."""
    content = io.StringIO(newline="")
    writer = csv.writer(content)
    for row in rows:
        writer.writerow([_harmless(value) if isinstance(value, str) else value for value in row])
    return content.getvalue()


def _harmless(cell: str) -> str:
    return cell if _NUMBER.fullmatch(cell) else escape_cell(cell.replace("\0", ""))

"""Reads the text formats of eval sets as rows: tsv, csv, JSON lines, json, and CLINC150's published json."""

from __future__ import annotations

import codecs
import csv
import io
import json
import re
import shlex
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from difflib import get_close_matches
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import pandas as pd

from cascade_lab.exceptions import EvalSetError
from cascade_lab.json_files import parse
from cascade_lab.text import shorten

Row = tuple[str, dict[str, Any]]
"""The location of a row ("line 17"), and its columns."""

Required: TypeAlias = Sequence[str] | Mapping[str, str]
"""The columns that a file must have; in a mapping, each with the option that names another column ("--text-column")."""

_OPTIONAL = ("text_b", "example_id", "label")
_OTHER_WORDS = {
    "text": ("sentence", "utterance", "utt", "query", "question", "content", "review"),
    "label": ("intent", "category", "class", "target", "gold"),
}
_FLOATS = (float, np.floating)
_BYTE_ORDER_MARKS = (
    (codecs.BOM_UTF32_LE, "utf-32"),  # before UTF-16's, which it begins with
    (codecs.BOM_UTF32_BE, "utf-32"),
    (codecs.BOM_UTF16_LE, "utf-16"),
    (codecs.BOM_UTF16_BE, "utf-16"),
)


def read_rows(
    content: bytes,
    path: str,
    *,
    split: str | None = None,
    required: Required = (),
    encoding: str | None = None,
    columns: Sequence[str] | None = None,
) -> Iterator[Row]:
    """Read the rows of a text file.

    Parameters
    ----------
    content : bytes
    path : str
        The file's name, for messages; its ending gives the format: .tsv, .csv, .jsonl or .json.
    split : str, optional
        Take only the rows whose column `split` has this value; in CLINC150's json, the splits `S` and `oos_S`.
    required : sequence of str, or mapping of str to str
        The columns that the file must have; see `Required`.
    encoding : str, optional
        The encoding of the file; by default UTF-8, or what its byte-order mark says.
    columns : sequence of str, optional
        The names of the columns of a tsv or csv that has no header.

    Raises
    ------
    EvalSetError
        The file cannot be read. The message names the file, and the row where there is one.
    """
    ending = Path(path).suffix.lower()
    if columns is not None:
        check_headerless(path)
    text = decode(content, path, encoding)
    if ending == ".json":
        value = _parse_whole(text, path)
        if _is_clinc150(value):
            return _clinc150(value, path, split)
        rows = _json(value, text, path)
    else:
        rows = _TEXT_READERS[ending](text, path, required, columns)
    return of_split(rows, split, path)


def check_headerless(path: str) -> None:
    """Raise EvalSetError if a file's format has names of columns in any case."""
    if Path(path).suffix.lower() not in (".tsv", ".csv"):
        raise EvalSetError(
            f"{path}: --columns (columns=) names the columns of a tsv or csv without a header; this format has names "
            "already, so omit it"
        )


def first_columns(rows: Iterator[Row]) -> dict[str, str]:
    """Return which columns of the first row are probably the texts and the labels, if none has the usual name.

    >>> first_columns(iter([("line 2", {"sentence": "pay my bill", "intent": "billing"})]))
    {'text': 'sentence', 'label': 'intent'}
    """
    _, row = next(rows, ("", {}))
    found = {}
    for key, words in _OTHER_WORDS.items():
        others = [name for name in row if str(name).casefold() in (key, *words)]
        found[key] = key if key in row or not others else others[0]
    return found


def is_missing(value: Any) -> bool:
    """Return whether a cell has no value: None, NaN, or pandas' NA or NaT."""
    if value is None or isinstance(value, str):
        return value is None
    if isinstance(value, _FLOATS):
        return bool(value != value)
    return value is pd.NA or value is pd.NaT


def decode(content: bytes, path: str, encoding: str | None = None) -> str:
    """Decode a text file without its byte-order mark; raises EvalSetError naming the line.

    >>> decode("pay".encode("utf-16"), "set.tsv")
    'pay'
    """
    if encoding is None:
        marked = (name for mark, name in _BYTE_ORDER_MARKS if content.startswith(mark))
        without_mark = "utf-16-be" if content[:1] == b"\0" else "utf-16-le" if content[1:2] == b"\0" else "utf-8-sig"
        encoding = next(marked, without_mark)
    try:
        return content.decode(encoding).removeprefix("\ufeff")
    except LookupError as error:
        raise EvalSetError(f"{path}: no encoding is named '{encoding}'; name it like utf-8 or cp1252") from error
    except UnicodeError as error:
        start = getattr(error, "start", 0)
        line = content.count(b"\n", 0, start) + 1
        name = "UTF-8" if encoding == "utf-8-sig" else encoding
        raise EvalSetError(
            f"{path} line {line}: byte {start} is not {name}; save it as UTF-8, or name its encoding, for example "
            "--encoding cp1252 (in Python encoding='cp1252')"
        ) from error


def check_columns(names: Sequence[str], required: Required, where: str) -> None:
    """Raise EvalSetError if a required column is missing, or if two columns have the same name."""
    for key in required:
        if key not in names:
            way_out = _way_out(key, names, "the columns in the first row", required)
            raise EvalSetError(f"{where}: no column '{key}'; it has {_listed(names)}{way_out}")
    if len(set(names)) < len(names):
        twice = next(name for i, name in enumerate(names) if name in names[:i])
        raise EvalSetError(
            f"{where}: two columns have the same name ('{shorten(str(twice), 40)}'); rename or delete one of them"
        )


def check_keys(rows: Sequence[Row], required: Required, path: str) -> None:
    """Refuse JSON in which no object has a required key. A single row without it is refused by its location."""
    for key in required:
        if rows and not any(key in row for _, row in rows):
            keys = list(dict.fromkeys(name for _, row in rows[:100] for name in row))
            way_out = _way_out(key, keys, f"a key '{key}'", required)
            raise EvalSetError(f"{path}: no row has '{key}'; its keys are {_listed(keys)}{way_out}")


def _listed(names: Sequence[str]) -> str:
    shown = [shorten(str(name), 40) for name in names[:20]]
    return ", ".join(shown) + (f" and {len(names) - 20} more" if len(names) > 20 else "")


def _way_out(key: str, names: Sequence[str], place: str, required: Required) -> str:
    option = required[key] if isinstance(required, Mapping) else ""
    meaning = option.removeprefix("--").removesuffix("-column") or key
    near = [name for name in names if str(name).strip().casefold() == key.casefold()]
    near = near or get_close_matches(key, [str(name) for name in names], n=1, cutoff=0.7)
    near = near or [name for name in names if str(name).casefold() in _OTHER_WORDS.get(meaning, ())]
    if near and option:
        name = shorten(str(near[0]), 40)
        return f"; did you mean '{name}'? Pass {option} {shlex.quote(name)} ({meaning}_column={name!r}), or rename it"
    if near:
        return f"; did you mean '{shorten(str(near[0]), 40)}'? Rename it to '{key}'"
    other = f", or name it with {option} ({meaning}_column=)" if option else ""
    if meaning == "label":
        return f"; add it{other}, or read unlabelled texts with unlabelled=True"
    is_header = option and place.startswith("the columns")
    header = "; if the first row is no header, name all columns with --columns (columns=)" if is_header else ""
    return f"; name {place}{other}{header}"


def of_split(rows: Iterator[Row], split: str | None, path: str) -> Iterator[Row]:
    """Return the rows whose column `split` has a value, or all for None; raises EvalSetError naming the values."""
    return rows if split is None else _of_split(rows, split, path)


def _of_split(rows: Iterator[Row], split: str, path: str) -> Iterator[Row]:
    splits = set()
    for where, row in rows:
        value = row.get("split")
        if not is_missing(value):
            splits.add(str(value))
            if str(value) == split:
                yield where, row
    if split not in splits:
        known = f"its splits are {', '.join(sorted(splits))}" if splits else "it has no column 'split'"
        raise EvalSetError(f"{path}: no row has split '{split}'; {known}")


def _table_rows(
    lines: Iterable[tuple[int, list[str]]], path: str, required: Required, columns: Sequence[str] | None
) -> Iterator[Row]:
    """Turn numbered lists of fields into rows; the first is the header, unless `columns` has the names."""
    lines = iter(lines)
    if columns is None:
        first, names = next(((number, fields) for number, fields in lines if any(fields)), (1, [""]))
    else:
        first, names = 1, list(columns)
    header = [name.strip() for name in names]
    if "" in header:
        numbered = list(lines)
        kept = _named_columns(header, numbered, f"{path} line {first}")
        header = [header[i] for i in kept]
        lines = ((n, [f[i] for i in kept if i < len(f)] + f[len(names) :]) for n, f in numbered)
    check_columns(header, required, f"{path} line {first}")
    n_columns, named_in = len(header), "the header has" if columns is None else "--columns (columns=) names"
    for number, values in lines:
        if not any(values):  # a blank line, also as a spreadsheet writes it: separators alone
            continue
        if len(values) > n_columns and any(values[n_columns:]):
            raise EvalSetError(
                f"{path} line {number}: has {len(values)} fields, but {named_in} {n_columns}; fix the row"
            )
        row = dict(zip(header, values, strict=False))
        # An empty text is a text. In these optional columns an empty field means that there is no value.
        yield f"line {number}", {k: v for k, v in row.items() if v or k not in _OPTIONAL}


def _named_columns(header: Sequence[str], lines: Sequence[tuple[int, list[str]]], where: str) -> list[int]:
    """Return the columns that have a name or values; refuse two columns that have values but no name."""
    nameless = [i for i, name in enumerate(header) if not name]
    filled = [i for i in nameless if any(i < len(fields) and fields[i].strip() for _, fields in lines)]
    if len(filled) > 1:  # one is what pandas writes for its row numbers
        columns = " and ".join(str(i + 1) for i in filled)
        raise EvalSetError(f"{where}: columns {columns} have values but no name; name them, or delete them")
    return [i for i, name in enumerate(header) if name or i in filled]


_SEP_LINE = re.compile(r'"?sep=(.)"?\r?(?:\n|\Z)', re.IGNORECASE)
_QUOTED = re.compile(r'"(?<![^\t\n]")([^"]*(?:""[^"]*)*)"(?=\t|\r?\n|\r?\Z)')


def _tsv(text: str, path: str, required: Required, columns: Sequence[str] | None) -> Iterator[Row]:
    if _SEP_LINE.match(text):
        raise EvalSetError(f"{path} line 1: '{text[:5]}' is a line that Excel reads in a csv; name the file .csv")
    _refuse_quoted(text, path)
    # Only a newline ends a row. str.splitlines would also split at form feeds and U+2028, which texts may contain.
    lines = text.removesuffix("\n").split("\n")
    fields = ((number, line.removesuffix("\r").split("\t")) for number, line in enumerate(lines, 1))
    return _table_rows(fields, path, required, columns)


def _refuse_quoted(text: str, path: str) -> None:
    """Refuse a tsv whose fields are quoted as in a csv: the quote marks would become part of the texts.

    Quote marks are ordinary characters in a tsv, so single ones prove nothing. What proves quoting: the names in the
    header are quoted; rows have equally many fields only if quoted tabs and line breaks are part of the fields; or
    every quote mark in the file quotes a field that a spreadsheet would quote.
    """
    if not (text.startswith('"') or '\t"' in text or '\n"' in text):
        return
    quoted = list(_QUOTED.finditer(text))
    if not quoted:
        return
    rest = _QUOTED.sub("", text)
    n_tabs = rest.partition("\n")[0].count("\t")
    across = next((field for field in quoted if "\n" in field[1] or "\t" in field[1]), None)
    inside = [field for field in quoted if "\n" not in field[1] and "\t" not in field[1]]
    doubled = next((field for field in inside if '""' in field[1]), None)
    comma = next((field for field in inside if "," in field[1]), None)
    evidence = None
    if not rest.partition("\n")[0].strip("\t\r"):
        evidence = quoted[0]
    elif across and _have_tabs(rest, n_tabs) and (n_tabs == 0 or not _have_tabs(text, n_tabs)):
        evidence = across if n_tabs or '"' not in rest else None
    elif '"' not in rest:
        evidence = doubled or (comma if "," not in rest else None)
    if evidence is None:
        return
    line = text.count("\n", 0, evidence.start()) + 1
    n_lines = evidence[0].count("\n")
    if n_lines:
        fault = f"opens a quote that line {line + n_lines} closes"
    else:
        fault = f"the field {shorten(evidence[0], 40)} is in quotes"
    raise EvalSetError(
        f"{path} line {line}: {fault}, as in a csv; the fields of a tsv are not quoted; name the file .csv"
    )


def _have_tabs(text: str, n: int) -> bool:
    return all(line.count("\t") == n for line in text.split("\n") if line.strip("\r"))


def _csv(text: str, path: str, required: Required, columns: Sequence[str] | None) -> Iterator[Row]:
    sep = _SEP_LINE.match(text)  # Excel's first line
    start_line = 1 if sep else 0
    body = text[sep.end() :] if sep else text
    header = re.sub(r'"[^"]*"', '""', re.split(r"[\r\n]", body.lstrip("\r\n"), maxsplit=1)[0])
    # In countries with a decimal comma, spreadsheets separate fields by semicolons.
    n_commas = None if columns is None else len(columns) - 1  # a text in the first row may contain some too
    delimiter = sep[1] if sep else max(",;\t", key=lambda char: (header.count(char) == n_commas, header.count(char)))
    after = header.split(delimiter)[1:]
    is_spaced = bool(after) and all(name.startswith(" ") for name in after)  # written with ", " between the fields

    reader = csv.reader(io.StringIO(body, newline=""), delimiter=delimiter, strict=True, skipinitialspace=is_spaced)

    def lines() -> Iterator[tuple[int, list[str]]]:
        end = start_line
        while True:
            limit = csv.field_size_limit(len(body) + 1)  # of the whole process: set back at once
            try:
                values = next(reader, None)
            except csv.Error as error:
                raise EvalSetError(f"{path} line {start_line + reader.line_num}: {error}; fix the row") from error
            finally:
                csv.field_size_limit(limit)
            if values is None:
                return
            start, end = end + 1, start_line + reader.line_num
            yield start, values

    return _table_rows(lines(), path, required, columns)


def _jsonl(text: str, path: str, *_: object) -> Iterator[Row]:
    for number, line in enumerate(text.split("\n"), 1):
        if not line.strip():
            continue
        where = f"{path} line {number}"
        try:
            row = parse(line)
        except (ValueError, RecursionError) as error:
            _refuse_array(text, path)
            raise EvalSetError(f"{where}: not JSON ({_reason(error)}); fix the line") from error
        if not isinstance(row, dict):
            _refuse_array(text, path)
            raise EvalSetError(f'{where}: not a JSON object; write {{"text": …, "label": …}}')
        yield f"line {number}", row


_TEXT_READERS: Mapping[str, Callable[[str, str, Required, Sequence[str] | None], Iterator[Row]]] = {
    ".tsv": _tsv,
    ".csv": _csv,
    ".jsonl": _jsonl,
}


def _refuse_array(text: str, path: str) -> None:
    try:
        value = parse(text)
    except (ValueError, RecursionError):
        return
    if isinstance(value, list) and value and all(isinstance(row, dict) for row in value):
        raise EvalSetError(f"{path}: is one JSON array, not one JSON object per line; name it .json")


def _reason(error: Exception) -> str:
    if isinstance(error, json.JSONDecodeError):
        return error.msg
    return "too deeply nested" if isinstance(error, RecursionError) else str(error).partition(";")[0]


_LINES = object()  # stands for the value of a file with several JSON values


def _parse_whole(text: str, path: str) -> Any:
    try:
        return [] if not text or text.isspace() else parse(text)
    except json.JSONDecodeError as error:
        if error.msg == "Extra data":
            return _LINES
        raise EvalSetError(f"{path} line {error.lineno}: not JSON ({error.msg}); fix the file") from error
    except (ValueError, RecursionError) as error:
        raise EvalSetError(f"{path}: not JSON ({_reason(error)}); fix the file") from error


def _json(value: Any, text: str, path: str) -> Iterator[Row]:
    """Read a json that is not CLINC150's: an array of objects, or JSON lines under another name."""
    if value is _LINES:
        yield from _jsonl(text, path)
    elif isinstance(value, list) and all(isinstance(row, dict) for row in value):
        for i, row in enumerate(value):
            yield f"[{i}]", row
    elif isinstance(value, dict) and not any(isinstance(part, list | dict) for part in value.values()):
        yield "line 1", value
    else:
        raise EvalSetError(
            f"{path}: not CLINC150's json, {{split: [[text, intent], …]}}, and not an array of objects; write one JSON "
            'object per line, {"text": …, "label": …}, and name the file .jsonl'
        )


def _is_clinc150(value: Any) -> bool:
    return (
        isinstance(value, dict)
        and bool(value)
        and all(isinstance(rows, list) and all(map(_is_pair, rows)) for rows in value.values())
    )


def _clinc150(splits: Mapping[str, Any], path: str, split: str | None) -> Iterator[Row]:
    """Read the json of Larson et al. (2019): it maps the name of a split to a list of [text, intent] pairs."""
    if split is None or split not in splits:
        known = ", ".join(name for name in splits if not name.startswith("oos_"))
        problem = "contains several splits" if split is None else f"has no split '{split}'"
        raise EvalSetError(f"{path}: {problem}; choose one with --split: {known}")
    for name in (split, f"oos_{split}"):
        for i, (text, label) in enumerate(splits.get(name, [])):
            yield f"{name}[{i}]", {"example_id": f"{name}-{i}", "text": text, "label": label, "split": name}


def _is_pair(row: Any) -> bool:
    return isinstance(row, list) and len(row) == 2 and all(isinstance(part, str) for part in row)

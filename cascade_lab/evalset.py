"""Eval sets: labelled texts in, validated (tsv, csv, jsonl, parquet, CLINC150's published json)."""

from __future__ import annotations

import csv
import hashlib
import io
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq

from cascade_lab.errors import EvalSetError

Row = tuple[str, dict[str, Any]]
"""Where a row stands ("line 17"), and its columns."""


@dataclass(frozen=True)
class EvalSet:
    """Labelled texts.

    Attributes
    ----------
    examples : DataFrame
        Columns `example_id` (unique), `text`, `text_b` (None where single), `label` (the final answer that is
        right), then whatever other columns the input has.
    locations : tuple of str
        Where each row came from, for messages: `"clinc.tsv line 17"`.
    source, split, sha256 : str or None
        The file, the split that was asked for, and the file's digest.
    """

    examples: pd.DataFrame
    locations: tuple[str, ...]
    source: str | None = None
    split: str | None = None
    sha256: str | None = None

    def __len__(self) -> int:
        return len(self.examples)

    @classmethod
    def read(cls, path: str | Path, *, split: str | None = None) -> EvalSet:
        """Read an eval set; the file's ending says its kind.

        Parameters
        ----------
        path : path
            `.tsv` (no quoting, as BERT's own files), `.csv`, `.jsonl`, `.parquet`, or CLINC150's `.json`.
        split : str, optional
            In CLINC150's json the splits `S` and `oos_S` together; elsewhere the rows whose column `split`
            says so.

        Raises
        ------
        EvalSetError
            Naming the file and the row.
        """
        path = Path(path)
        reader = _READERS.get(path.suffix.lower())
        if reader is None:
            kinds = ", ".join(_READERS)
            raise EvalSetError(f"{path}: unknown kind of eval set; give a file that ends in {kinds}")
        try:
            content = path.read_bytes()
        except OSError as error:
            raise EvalSetError(f"{path}: cannot be read ({error.strerror}); give an eval set") from error
        rows = [(f"{path} {where}", row) for where, row in reader(content, str(path), split)]
        if split is not None and path.suffix.lower() != ".json":
            rows = _of_split(rows, split, str(path))
        if not rows:
            raise EvalSetError(f"{path}: holds no example; give an eval set with at least one row")
        return replace(cls._from_rows(rows), source=str(path), split=split, sha256=hashlib.sha256(content).hexdigest())

    @classmethod
    def from_frame(cls, frame: pd.DataFrame) -> EvalSet:
        """Take an eval set from a table with columns `text`, `label` and optional ones, as a file has them."""
        if not len(frame):
            raise EvalSetError("the table holds no example; give at least one row")
        rows = [(f"row {i}", row) for i, row in enumerate(frame.to_dict("records"))]
        canonical = frame.to_json(orient="records", date_format="iso").encode()
        return replace(cls._from_rows(rows), sha256=hashlib.sha256(canonical).hexdigest())

    @property
    def texts(self) -> list[str]:
        return self.examples["text"].tolist()

    @property
    def texts_b(self) -> list[str | None] | None:
        """The second text of each pair; None where there is no pair at all."""
        second = [text if isinstance(text, str) else None for text in self.examples["text_b"]]
        return second if any(text is not None for text in second) else None

    @property
    def origin(self) -> dict[str, Any]:
        """What a manifest says of the set."""
        return {"source": self.source, "split": self.split, "sha256": self.sha256, "n_examples": len(self)}

    def column(self, name: str) -> list[str]:
        """Return a column of labels; raises EvalSetError where there is none, or a row without."""
        if name not in self.examples:
            known = ", ".join(self.examples.columns)
            raise EvalSetError(f"{self.source}: no column '{name}'; it has {known}")
        values = self.examples[name].tolist()
        for location, value in zip(self.locations, values, strict=True):
            if _missing(value) or value == "":
                raise EvalSetError(f"{location}: has no {name}; fill it in or drop the row")
        return [str(value) for value in values]

    def write(self, path: str | Path) -> Path:
        """Write the set to a file that `read` reads: `.tsv`, `.jsonl` or `.parquet`.

        Raises
        ------
        EvalSetError
            Another kind of file, a tab or a line's end in a cell of a tsv, or a file that cannot be written.
        """
        path = Path(path)
        writer = _WRITERS.get(path.suffix.lower())
        if writer is None:
            kinds = ", ".join(_WRITERS)
            raise EvalSetError(
                f"{path}: an eval set is not written as '{path.suffix}'; give a file that ends in {kinds}"
            )
        single = self.texts_b is None
        content = writer(self.examples.drop(columns="text_b") if single else self.examples, str(path))
        try:
            path.write_bytes(content)
        except OSError as error:
            raise EvalSetError(f"{path}: cannot be written ({error.strerror}); choose another output") from error
        return path

    def without(self, labels: Sequence[str], column: str = "label") -> EvalSet:
        """Return the set without the rows that bear one of `labels`."""
        return self._take([i for i, label in enumerate(self.column(column)) if label not in labels])

    def limit(self, n: int) -> EvalSet:
        """Return `n` examples, evenly spaced so that a file sorted by label keeps its mixture."""
        if n < 1:
            raise EvalSetError(f"the limit is {n}; take at least 1 example")
        if n >= len(self):
            return self
        return self._take(np.linspace(0, len(self) - 1, n).round().astype(int).tolist())

    def _take(self, rows: list[int]) -> EvalSet:
        return replace(
            self,
            examples=self.examples.iloc[rows].reset_index(drop=True),
            locations=tuple(self.locations[row] for row in rows),
        )

    @classmethod
    def _from_rows(cls, rows: list[Row]) -> EvalSet:
        seen: dict[str, str] = {}
        columns = list(dict.fromkeys(key for _, row in rows for key in row))
        for number, (where, row) in enumerate(rows):
            for key in ("text", "label"):
                if _missing(row.get(key)):
                    raise EvalSetError(f"{where}: has no {key}; fill in the column '{key}' or drop the row")
            row["label"] = str(row["label"])
            row["example_id"] = str(number if _missing(row.get("example_id")) else row["example_id"])
            row["text_b"] = None if _missing(row.get("text_b")) else row["text_b"]
            for key in ("text", "text_b"):
                _check_text(row[key], where, key)
            if row["example_id"] in seen:
                first = seen[row["example_id"]]
                raise EvalSetError(f"{where}: example_id '{row['example_id']}' stands at {first} too; rename one")
            seen[row["example_id"]] = where
        order = ["example_id", "text", "text_b", "label"]
        order += [column for column in columns if column not in order]
        examples = pd.DataFrame({column: [row.get(column) for _, row in rows] for column in order})
        examples["text_b"] = pd.Series([row["text_b"] for _, row in rows], dtype=object)
        for column in order[4:]:
            try:
                pa.array(examples[column], from_pandas=True)
            except (pa.ArrowInvalid, pa.ArrowTypeError, UnicodeEncodeError) as error:
                raise EvalSetError(f"column '{column}' mixes kinds of values; give it one kind") from error
        return cls(examples=examples, locations=tuple(where for where, _ in rows))


def _missing(value: Any) -> bool:
    return value is None or (isinstance(value, float) and np.isnan(value)) or value is pd.NA


def _check_text(text: Any, where: str, key: str) -> None:
    if text is None:
        return
    if not isinstance(text, str):
        raise EvalSetError(f"{where}: {key} is {text!r}; it must be a string")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise EvalSetError(f"{where}: {key} has half a surrogate pair at character {error.start}") from error


def _of_split(rows: list[Row], split: str, path: str) -> list[Row]:
    splits = sorted({str(row["split"]) for _, row in rows if not _missing(row.get("split"))})
    if split not in splits:
        known = f"it has {', '.join(splits)}" if splits else "it has no column 'split'"
        raise EvalSetError(f"{path}: no row of split '{split}'; {known}")
    return [(where, row) for where, row in rows if str(row.get("split")) == split]


def _decode(content: bytes, path: str) -> str:
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise EvalSetError(f"{path} line {line}: byte {error.start} is not UTF-8; save it as UTF-8") from error


def _table_rows(lines: Iterator[tuple[int, list[str]]], path: str) -> Iterator[Row]:
    """Turn numbered lists of fields, the first the header, into rows."""
    _, header = next(lines, (1, []))
    for key in ("text", "label"):
        if key not in header:
            raise EvalSetError(f"{path} line 1: no column '{key}'; the first line names the columns")
    if len(set(header)) < len(header):
        raise EvalSetError(f"{path} line 1: two columns have one name; rename one")
    for number, values in lines:
        if values in ([], [""]):  # a blank line
            continue
        if len(values) > len(header):
            raise EvalSetError(
                f"{path} line {number}: has {len(values)} fields, and the header {len(header)}; mend the row"
            )
        row = dict(zip(header, values, strict=False))
        # An empty text is a text; an empty optional column is none.
        yield (
            f"line {number}",
            {k: v for k, v in row.items() if v or k not in ("text_b", "example_id", "label")},
        )


def _tsv(content: bytes, path: str, split: str | None) -> Iterator[Row]:
    # Only a newline ends a row: str.splitlines would also cut at form feeds and U+2028, which texts may hold.
    lines = _decode(content, path).removesuffix("\n").split("\n")
    return _table_rows(((number, line.removesuffix("\r").split("\t")) for number, line in enumerate(lines, 1)), path)


def _csv(content: bytes, path: str, split: str | None) -> Iterator[Row]:
    text = _decode(content, path)
    # Spreadsheets put a semicolon where the comma is a decimal mark.
    delimiter = max(",;\t", key=text.partition("\n")[0].count)
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True)

    def lines() -> Iterator[tuple[int, list[str]]]:
        end = 0
        limit = csv.field_size_limit(len(content) + 1)
        try:
            for values in reader:
                start, end = end + 1, reader.line_num
                yield start, values
        except csv.Error as error:
            raise EvalSetError(f"{path} line {reader.line_num}: {error}; mend the row") from error
        finally:
            csv.field_size_limit(limit)

    return _table_rows(lines(), path)


def _jsonl(content: bytes, path: str, split: str | None) -> Iterator[Row]:
    for number, line in enumerate(_decode(content, path).split("\n"), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise EvalSetError(f"{path} line {number}: not JSON ({error.msg}); mend the line") from error
        if not isinstance(row, dict):
            raise EvalSetError(f'{path} line {number}: not an object; write {{"text": …, "label": …}}')
        yield f"line {number}", row


def _parquet(content: bytes, path: str, split: str | None) -> Iterator[Row]:
    try:
        table = pq.read_table(pa.BufferReader(content))
    except (pa.ArrowInvalid, OSError) as error:
        reason = str(error).splitlines()[0]
        raise EvalSetError(f"{path}: not a readable parquet file ({reason}); write it again") from error
    for key in ("text", "label"):
        if key not in table.column_names:
            raise EvalSetError(f"{path}: no column '{key}'; it has {', '.join(table.column_names)}")
    for number, row in enumerate(table.to_pylist(), 1):
        yield f"row {number}", row


def _clinc150(content: bytes, path: str, split: str | None) -> Iterator[Row]:
    """Read the json that Larson et al. (2019) publish: split name to [text, intent] pairs."""
    try:
        splits = json.loads(_decode(content, path))
    except json.JSONDecodeError as error:
        raise EvalSetError(f"{path} line {error.lineno}: not JSON ({error.msg}); mend it there") from error
    pairs = list(splits.values()) if isinstance(splits, dict) else [None]
    if not all(isinstance(rows, list) and all(map(_is_pair, rows)) for rows in pairs):
        raise EvalSetError(f"{path}: not CLINC150's json, {{split: [[text, intent], …]}}; one row a line is .jsonl")
    if split not in splits:
        known = ", ".join(name for name in splits if not name.startswith("oos_"))
        asked = "choose a split with --split" if split is None else f"has no split '{split}'"
        raise EvalSetError(f"{path}: {asked}: {known}")
    for name in (split, f"oos_{split}"):
        for i, (text, label) in enumerate(splits.get(name, [])):
            yield f"{name}[{i}]", {"example_id": f"{name}-{i}", "text": text, "label": label, "split": name}


def _is_pair(row: Any) -> bool:
    return isinstance(row, list) and len(row) == 2 and all(isinstance(part, str) for part in row)


_READERS: dict[str, Callable[[bytes, str, str | None], Iterator[Row]]] = {
    ".tsv": _tsv,
    ".csv": _csv,
    ".jsonl": _jsonl,
    ".parquet": _parquet,
    ".json": _clinc150,
}


def _to_tsv(examples: pd.DataFrame, path: str) -> bytes:
    lines = [list(examples.columns), *([_cell(value) for value in row] for row in examples.itertuples(index=False))]
    for number, cells in enumerate(lines, 1):
        for name, cell in zip(examples.columns, cells, strict=True):
            if any(char in cell for char in "\t\r\n"):
                raise EvalSetError(
                    f"{path} line {number}: {name} would hold a tab or a line's end, which a tsv cannot; write .jsonl"
                )
    return "".join("\t".join(cells) + "\n" for cells in lines).encode()


def _to_jsonl(examples: pd.DataFrame, path: str) -> bytes:
    rows = ({k: v for k, v in row.items() if not _missing(v)} for row in examples.to_dict("records"))
    return "".join(json.dumps(row, ensure_ascii=False, default=str) + "\n" for row in rows).encode()


def _to_parquet(examples: pd.DataFrame, path: str) -> bytes:
    content = io.BytesIO()
    pq.write_table(pa.Table.from_pandas(examples, preserve_index=False), content)
    return content.getvalue()


def _cell(value: Any) -> str:
    return "" if _missing(value) else str(value)


_WRITERS: dict[str, Callable[[pd.DataFrame, str], bytes]] = {
    ".tsv": _to_tsv,
    ".jsonl": _to_jsonl,
    ".parquet": _to_parquet,
}

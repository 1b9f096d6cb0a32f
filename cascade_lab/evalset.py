"""Reads and writes eval sets: labelled or unlabelled texts (tsv, csv, jsonl, parquet, CLINC150's published json)."""

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

from cascade_lab.atomic import write_file
from cascade_lab.exceptions import EvalSetError

Row = tuple[str, dict[str, Any]]
"""The location of a row ("line 17"), and its columns."""


@dataclass(frozen=True)
class EvalSet:
    """Texts to score, with their true labels where these are known.

    Attributes
    ----------
    examples : DataFrame
        Columns `example_id` (unique), `text`, `text_b` (None for a single text), `label` (the true label: what the
        cascade should predict; None if unknown), then all other columns of the input.
    locations : tuple of str
        Where each row was read, for messages: `"clinc.tsv line 17"`.
    source, split, sha256 : str or None
        The file, its split that was read, and the digest of the file.
    """

    examples: pd.DataFrame
    locations: tuple[str, ...]
    source: str | None = None
    split: str | None = None
    sha256: str | None = None

    def __len__(self) -> int:
        return len(self.examples)

    @classmethod
    def read(cls, path: str | Path, *, split: str | None = None, unlabelled: bool = False) -> EvalSet:
        """Read an eval set. The ending of the file's name gives its format.

        Parameters
        ----------
        path : path
            `.tsv` (without quoting, as in BERT's own files), `.csv`, `.jsonl`, `.parquet`, or CLINC150's `.json`.
        split : str, optional
            Take only the rows whose column `split` has this value. In CLINC150's json, take the splits `S` and `oos_S`.
        unlabelled : bool
            Accept texts without a label. If the column `label` is missing, or a label is empty, it becomes None.

        Raises
        ------
        EvalSetError
            The file cannot be read, or a row is not usable. The message names the file and the row.
        """
        path = Path(path)
        reader = _READERS.get(path.suffix.lower())
        if reader is None:
            endings = ", ".join(_READERS)
            raise EvalSetError(f"{path}: unknown format of an eval set; give a file that ends in {endings}")
        try:
            content = path.read_bytes()
        except OSError as error:
            raise EvalSetError(f"{path}: cannot be read ({error.strerror}); give an eval set") from error
        columns = ("text",) if unlabelled else ("text", "label")
        rows = [(f"{path} {where}", row) for where, row in reader(content, str(path), split, columns)]
        if split is not None and path.suffix.lower() != ".json":
            rows = _of_split(rows, split, str(path))
        if not rows:
            raise EvalSetError(f"{path}: contains no example; give an eval set with at least one row")
        evalset = cls._from_rows(rows, unlabelled=unlabelled)
        return replace(evalset, source=str(path), split=split, sha256=hashlib.sha256(content).hexdigest())

    @classmethod
    def from_frame(cls, frame: pd.DataFrame, *, unlabelled: bool = False) -> EvalSet:
        """Make an eval set from a table with the columns that a file has: `text`, `label` and optional ones.

        Parameters
        ----------
        frame : DataFrame
        unlabelled : bool
            Accept texts without a label. If the column `label` is missing, or a label is empty, it becomes None.

        Raises
        ------
        EvalSetError
            A row is not usable. The message names the row, counted from 0.

        Examples
        --------
        >>> texts = EvalSet.from_frame(pd.DataFrame({"text": ["pay my bill", "sing"]}), unlabelled=True)
        >>> texts.examples["label"].tolist()
        [None, None]
        """
        if not len(frame):
            raise EvalSetError("the table contains no example; give at least one row")
        rows = [(f"row {i}", row) for i, row in enumerate(frame.to_dict("records"))]
        canonical = frame.to_json(orient="records", date_format="iso").encode()
        return replace(cls._from_rows(rows, unlabelled=unlabelled), sha256=hashlib.sha256(canonical).hexdigest())

    @property
    def texts(self) -> list[str]:
        """The texts; of pairs, the first ones."""
        texts: list[str] = self.examples["text"].tolist()
        return texts

    @property
    def texts_b(self) -> list[str | None] | None:
        """The second text of each pair (None for a single text); None if no row has one."""
        second = [text if isinstance(text, str) else None for text in self.examples["text_b"]]
        return second if any(text is not None for text in second) else None

    @property
    def origin(self) -> dict[str, Any]:
        """What a manifest records about the set."""
        return {"source": self.source, "split": self.split, "sha256": self.sha256, "n_examples": len(self)}

    def column(self, name: str) -> list[str]:
        """Return a column of labels.

        Raises
        ------
        EvalSetError
            There is no such column, or a row has no value in it.
        """
        if name not in self.examples:
            known = ", ".join(self.examples.columns)
            raise EvalSetError(f"{self.source or 'the table'}: has no column '{name}'; its columns are {known}")
        values = self.examples[name].tolist()
        for location, value in zip(self.locations, values, strict=True):
            if _is_empty(value):
                raise EvalSetError(f"{location}: has no {name}; fill in the column '{name}' or drop the row")
        return [str(value) for value in values]

    def write(self, path: str | Path) -> Path:
        """Write the set to a file that `read` reads: `.tsv`, `.jsonl` or `.parquet`.

        Raises
        ------
        EvalSetError
            The format is another one, a cell of a tsv contains a tab or a line break, or the file cannot be written.
        """
        path = Path(path)
        writer = _WRITERS.get(path.suffix.lower())
        if writer is None:
            endings = ", ".join(_WRITERS)
            raise EvalSetError(
                f"{path}: an eval set cannot be written as '{path.suffix}'; give a file that ends in {endings}"
            )
        single = self.texts_b is None
        content = writer(self.examples.drop(columns="text_b") if single else self.examples, str(path))
        return write_file(path, lambda partial: partial.write_bytes(content), error=EvalSetError)

    def without(self, labels: Sequence[str], column: str = "label") -> EvalSet:
        """Return the set without the rows that have one of `labels`."""
        return self._take([i for i, label in enumerate(self.column(column)) if label not in labels])

    def limit(self, n: int) -> EvalSet:
        """Return `n` examples at equal distances, so that also a file sorted by label keeps its proportions."""
        if n < 1:
            raise EvalSetError(f"the limit is {n}; it must be at least 1")
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
    def _from_rows(cls, rows: list[Row], *, unlabelled: bool) -> EvalSet:
        seen: dict[str, str] = {}
        columns = list(dict.fromkeys(key for _, row in rows for key in row))
        for number, (where, row) in enumerate(rows):
            if _is_missing(row.get("text")):
                raise EvalSetError(f"{where}: has no text; fill in the column 'text' or drop the row")
            row["label"] = _label(row.get("label"), where, unlabelled)
            row["example_id"] = str(number if _is_missing(row.get("example_id")) else row["example_id"])
            row["text_b"] = None if _is_missing(row.get("text_b")) else row["text_b"]
            for key in ("text", "text_b"):
                _check_text(row[key], where, key)
            if row["example_id"] in seen:
                first = seen[row["example_id"]]
                raise EvalSetError(f"{where}: example_id '{row['example_id']}' is at {first} too; rename one of them")
            seen[row["example_id"]] = where
        order = ["example_id", "text", "text_b", "label"]
        order += [column for column in columns if column not in order]
        examples = pd.DataFrame({column: [row.get(column) for _, row in rows] for column in order})
        for column in ("text_b", "label"):
            examples[column] = pd.Series([row[column] for _, row in rows], dtype=object)
        for column in order[4:]:
            try:
                pa.array(examples[column], from_pandas=True)
            except (pa.ArrowInvalid, pa.ArrowTypeError, UnicodeEncodeError) as error:
                raise EvalSetError(
                    f"column '{column}' mixes types of values; convert its values to one type, or drop the column"
                ) from error
        return cls(examples=examples, locations=tuple(where for where, _ in rows))


def _is_missing(value: Any) -> bool:
    return value is None or (isinstance(value, float) and np.isnan(value)) or value is pd.NA


def _is_empty(value: Any) -> bool:
    return _is_missing(value) or value == ""


def _label(value: Any, where: str, unlabelled: bool) -> str | None:
    if not _is_empty(value):
        # pandas stores integers beside missing values as floats: 7 became 7.0.
        return str(int(value) if unlabelled and isinstance(value, float) and value.is_integer() else value)
    if unlabelled:
        return None
    raise EvalSetError(
        f"{where}: has no label; fill in the column 'label', drop the row, or read unlabelled texts with "
        "unlabelled=True"
    )


def _check_text(text: Any, where: str, key: str) -> None:
    if text is None:
        return
    if not isinstance(text, str):
        raise EvalSetError(f"{where}: {key} is {text!r}; it must be a string")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise EvalSetError(
            f"{where}: {key} has half a surrogate pair at character {error.start}; fix the text"
        ) from error


def _of_split(rows: list[Row], split: str, path: str) -> list[Row]:
    splits = sorted({str(row["split"]) for _, row in rows if not _is_missing(row.get("split"))})
    if split not in splits:
        known = f"its splits are {', '.join(splits)}" if splits else "it has no column 'split'"
        raise EvalSetError(f"{path}: no row has split '{split}'; {known}")
    return [(where, row) for where, row in rows if str(row.get("split")) == split]


def _decode(content: bytes, path: str) -> str:
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise EvalSetError(f"{path} line {line}: byte {error.start} is not UTF-8; save it as UTF-8") from error


def _check_columns(names: Sequence[str], required: Sequence[str], where: str) -> None:
    for key in required:
        if key not in names:
            way_out = "name the columns in the first row"
            if key == "label":
                way_out = "add it, or read unlabelled texts with unlabelled=True"
            raise EvalSetError(f"{where}: no column '{key}'; it has {', '.join(names)}; {way_out}")
    if len(set(names)) < len(names):
        raise EvalSetError(f"{where}: two columns have the same name; rename one of them")


def _table_rows(lines: Iterator[tuple[int, list[str]]], path: str, required: Sequence[str]) -> Iterator[Row]:
    """Turn numbered lists of fields, of which the first is the header, into rows."""
    _, header = next(lines, (1, []))
    _check_columns(header, required, f"{path} line 1")
    for number, values in lines:
        if values in ([], [""]):  # a blank line
            continue
        if len(values) > len(header):
            raise EvalSetError(
                f"{path} line {number}: has {len(values)} fields, but the header has {len(header)}; fix the row"
            )
        row = dict(zip(header, values, strict=False))
        # An empty text is a text. In these optional columns an empty field means that there is no value.
        yield f"line {number}", {k: v for k, v in row.items() if v or k not in ("text_b", "example_id", "label")}


def _tsv(content: bytes, path: str, split: str | None, required: Sequence[str]) -> Iterator[Row]:
    # Only a newline ends a row. str.splitlines would also split at form feeds and U+2028, which texts may contain.
    lines = _decode(content, path).removesuffix("\n").split("\n")
    fields = ((number, line.removesuffix("\r").split("\t")) for number, line in enumerate(lines, 1))
    return _table_rows(fields, path, required)


def _csv(content: bytes, path: str, split: str | None, required: Sequence[str]) -> Iterator[Row]:
    text = _decode(content, path)
    # In countries with a decimal comma, spreadsheets separate fields by semicolons.
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
            raise EvalSetError(f"{path} line {reader.line_num}: {error}; fix the row") from error
        finally:
            csv.field_size_limit(limit)

    return _table_rows(lines(), path, required)


def _jsonl(content: bytes, path: str, split: str | None, required: Sequence[str]) -> Iterator[Row]:
    for number, line in enumerate(_decode(content, path).split("\n"), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise EvalSetError(f"{path} line {number}: not JSON ({error.msg}); fix the line") from error
        if not isinstance(row, dict):
            raise EvalSetError(f'{path} line {number}: not a JSON object; write {{"text": …, "label": …}}')
        yield f"line {number}", row


def _parquet(content: bytes, path: str, split: str | None, required: Sequence[str]) -> Iterator[Row]:
    try:
        table = pq.read_table(pa.BufferReader(content))
    except (pa.ArrowInvalid, OSError) as error:
        reason = str(error).splitlines()[0]
        raise EvalSetError(f"{path}: not a readable parquet file ({reason}); write it again") from error
    _check_columns(table.column_names, required, path)
    for number, row in enumerate(table.to_pylist(), 1):
        yield f"row {number}", row


def _clinc150(content: bytes, path: str, split: str | None, required: Sequence[str]) -> Iterator[Row]:
    """Read the json of Larson et al. (2019): it maps the name of a split to a list of [text, intent] pairs."""
    try:
        splits = json.loads(_decode(content, path))
    except json.JSONDecodeError as error:
        raise EvalSetError(f"{path} line {error.lineno}: not JSON ({error.msg}); fix the file") from error
    pairs = list(splits.values()) if isinstance(splits, dict) else [None]
    if not all(isinstance(rows, list) and all(map(_is_pair, rows)) for rows in pairs):
        raise EvalSetError(
            f"{path}: not CLINC150's json, {{split: [[text, intent], …]}}; rename a file with one JSON object per line "
            "to .jsonl"
        )
    if split is None or split not in splits:
        known = ", ".join(name for name in splits if not name.startswith("oos_"))
        problem = "contains several splits" if split is None else f"has no split '{split}'"
        raise EvalSetError(f"{path}: {problem}; choose one with --split: {known}")
    for name in (split, f"oos_{split}"):
        for i, (text, label) in enumerate(splits.get(name, [])):
            yield f"{name}[{i}]", {"example_id": f"{name}-{i}", "text": text, "label": label, "split": name}


def _is_pair(row: Any) -> bool:
    return isinstance(row, list) and len(row) == 2 and all(isinstance(part, str) for part in row)


_READERS: dict[str, Callable[[bytes, str, str | None, Sequence[str]], Iterator[Row]]] = {
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
                    f"{path} line {number}: {name} contains a tab or a line break, which a tsv cannot contain; "
                    "write .jsonl"
                )
    return "".join("\t".join(cells) + "\n" for cells in lines).encode()


def _to_jsonl(examples: pd.DataFrame, path: str) -> bytes:
    rows = ({k: v for k, v in row.items() if not _is_missing(v)} for row in examples.to_dict("records"))
    return "".join(json.dumps(row, ensure_ascii=False, default=str) + "\n" for row in rows).encode()


def _to_parquet(examples: pd.DataFrame, path: str) -> bytes:
    content = io.BytesIO()
    pq.write_table(pa.Table.from_pandas(examples, preserve_index=False), content)
    return content.getvalue()


def _cell(value: Any) -> str:
    return "" if _is_missing(value) else str(value)


_WRITERS: dict[str, Callable[[pd.DataFrame, str], bytes]] = {
    ".tsv": _to_tsv,
    ".jsonl": _to_jsonl,
    ".parquet": _to_parquet,
}

"""Reads and writes eval sets: labelled or unlabelled texts (tsv, csv, jsonl, parquet, CLINC150's published json)."""

from __future__ import annotations

import hashlib
import io
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq

from cascade_lab.atomic import write_file
from cascade_lab.evalset_files import (
    Row,
    check_columns,
    check_headerless,
    check_keys,
    first_columns,
    is_missing,
    read_rows,
)
from cascade_lab.evalset_parquet import read_parquet
from cascade_lab.exceptions import EvalSetError, did_you_mean
from cascade_lab.object_html import evalset_facts, evalset_html
from cascade_lab.text import printable, shorten

ENDINGS = (".tsv", ".csv", ".jsonl", ".parquet", ".json")
MAX_CELLS = 20_000_000  # of a table with over MAX_COLUMNS columns: rows of JSON can each have another key
MAX_COLUMNS = 1000


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
    read_as : mapping of str to str or None
        The columns that were read as `text` and `label` and the digest of the map of labels, where any was named.
    """

    examples: pd.DataFrame
    locations: tuple[str, ...]
    source: str | None = None
    split: str | None = None
    sha256: str | None = None
    read_as: Mapping[str, str] | None = None

    def __len__(self) -> int:
        return len(self.examples)

    def __repr__(self) -> str:
        return printable(f"<EvalSet {self.source or 'a table'}: {', '.join(evalset_facts(self))}>")

    def _repr_html_(self) -> str:
        return evalset_html(self)

    @classmethod
    def read(
        cls,
        path: str | Path,
        *,
        split: str | None = None,
        unlabelled: bool = False,
        text_column: str = "text",
        label_column: str = "label",
        label_map: Mapping[str, str] | None = None,
        columns: Sequence[str] | None = None,
        encoding: str | None = None,
    ) -> EvalSet:
        """Read an eval set. The ending of the file's name gives its format.

        Parameters
        ----------
        path : path
            `.tsv` (without quoting, as in BERT's own files), `.csv`, `.jsonl`, `.parquet`, or `.json` (CLINC150's, an
            array of objects, or one object per line).
        split : str, optional
            Take only the rows whose column `split` has this value. In CLINC150's json, take the splits `S` and `oos_S`.
        unlabelled : bool
            Accept texts without a label. If the column `label` is missing, or a label is empty, it becomes None.
        text_column, label_column : str
            The columns that become `text` and `label`. A column of the file that has such a name already is left out.
        label_map : mapping of str to str, optional
            Label in the file to label of the cascade; a label that it lacks stays as it is.
        columns : sequence of str, optional
            The names of the columns of a tsv or csv that has no header.
        encoding : str, optional
            The encoding of a text file; by default UTF-8, or what its byte-order mark says.

        Raises
        ------
        EvalSetError
            The file cannot be read, or a row is not usable. The message names the file and the row.
        """
        path = Path(path)
        if path.suffix.lower() not in ENDINGS:
            raise EvalSetError(f"{path}: unknown format of an eval set; give a file that ends in {', '.join(ENDINGS)}")
        try:
            content = path.read_bytes()
        except (OSError, ValueError) as error:
            reason = getattr(error, "strerror", None) or error
            raise EvalSetError(f"{path}: cannot be read ({reason}); give an eval set") from error
        required = {text_column: "--text-column"}
        if not unlabelled or label_column != "label":
            required[label_column] = "--label-column"
        if path.suffix.lower() == ".parquet":
            if columns is not None:
                check_headerless(str(path))
            found = read_parquet(content, str(path), split=split, required=required)
        else:
            found = read_rows(content, str(path), split=split, required=required, encoding=encoding, columns=columns)
        rows = [(f"{path} {where}", row) for where, row in found]
        if path.suffix.lower() in (".json", ".jsonl"):
            check_keys(rows, required, str(path))
        if not rows:
            raise EvalSetError(f"{path}: contains no example; give an eval set with at least one row")
        rows, read_as = _renamed(rows, text_column, label_column, str(path))
        evalset = cls._from_rows(rows, unlabelled=unlabelled)
        if label_map is not None:
            evalset = evalset._with_labels(label_map, str(path))
            read_as["label_map_sha256"] = hashlib.sha256(json.dumps(dict(label_map)).encode()).hexdigest()
        digest = hashlib.sha256(content).hexdigest()
        return replace(evalset, source=str(path), split=split, sha256=digest, read_as=read_as or None)

    def _with_labels(self, label_map: Mapping[str, str], where: str) -> EvalSet:
        """Return the set with the labels that the map gives; refuse a map that has none of the set's labels."""
        labels = self.examples["label"]
        if not labels.isin(list(label_map)).any():
            shown = shorten(", ".join(map(str, dict.fromkeys(labels))), 80)
            raise EvalSetError(f"{where}: the map of labels has none of its labels ({shown}); fix the map")
        mapped = pd.Series([label_map.get(label, label) for label in labels], dtype=object)
        return replace(self, examples=self.examples.assign(label=mapped))

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
            A column is missing, or a row is not usable. The message names the row, counted from 0.

        Examples
        --------
        >>> texts = EvalSet.from_frame(pd.DataFrame({"text": ["pay my bill", "sing"]}), unlabelled=True)
        >>> texts.examples["label"].tolist()
        [None, None]
        """
        if not len(frame):
            raise EvalSetError("the table contains no example; give at least one row")
        check_columns(list(frame.columns), ("text",) if unlabelled else ("text", "label"), "the table")
        rows = [(f"row {i}", row) for i, row in enumerate(frame.to_dict("records"))]
        evalset = cls._from_rows(rows, unlabelled=unlabelled)
        try:
            canonical = frame.to_json(orient="records", date_format="iso").encode()
        except (OverflowError, ValueError):  # integers beyond 64 bits
            canonical = frame.astype(str).to_json(orient="records").encode()
        return replace(evalset, sha256=hashlib.sha256(canonical).hexdigest())

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
        origin = {"source": self.source, "split": self.split, "sha256": self.sha256, "n_examples": len(self)}
        return origin if self.read_as is None else {**origin, "read_as": dict(self.read_as)}

    def column(self, name: str) -> list[str]:
        """Return a column of labels.

        Raises
        ------
        EvalSetError
            There is no such column, a row has no value in it, or a value is a list or an object.
        """
        if name not in self.examples:
            known = ", ".join(self.examples.columns)
            near = did_you_mean(name, self.examples.columns).partition("; known")[0]
            raise EvalSetError(f"{self.source or 'the table'}: has no column '{name}'; its columns are {known}{near}")
        values = self.examples[name].tolist()
        for location, value in zip(self.locations, values, strict=True):
            if _is_empty(value):
                raise EvalSetError(f"{location}: has no {name}; fill in the column '{name}' or drop the row")
            _check_single(value, location, name)
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
        return self.take([i for i, label in enumerate(self.column(column)) if label not in labels])

    def limit(self, n: int) -> EvalSet:
        """Return `n` examples at equal distances, so that also a file sorted by label keeps its proportions."""
        if n < 1:
            raise EvalSetError(f"the limit is {n}; it must be at least 1")
        if n >= len(self):
            return self
        return self.take(np.linspace(0, len(self) - 1, n).round().astype(int).tolist())

    def take(self, rows: Sequence[int]) -> EvalSet:
        """Return the set with some rows: `rows` are their places in `examples`."""
        return replace(
            self,
            examples=self.examples.iloc[list(rows)].reset_index(drop=True),
            locations=tuple(self.locations[row] for row in rows),
        )

    @classmethod
    def _from_rows(cls, rows: list[Row], *, unlabelled: bool) -> EvalSet:
        seen: dict[str, str] = {}
        columns = list(dict.fromkeys(key for _, row in rows for key in row))
        if len(columns) > MAX_COLUMNS and len(columns) * len(rows) > MAX_CELLS:
            raise EvalSetError(
                f"{rows[0][0]}: the {len(rows):,} rows have {len(columns):,} different columns; drop columns"
            )
        for number, (where, row) in enumerate(rows):
            text, second, example_id = row.get("text"), row.get("text_b"), row.get("example_id")
            if not (isinstance(text, str) and text.isascii()):
                if is_missing(text):
                    raise EvalSetError(f"{where}: has no text; fill it in, or drop the row")
                _check_text(text, where, "text")
            label = row.get("label")
            if not (label and isinstance(label, str) and label.isascii()):
                row["label"] = _label(label, where, unlabelled)
            if second is not None:
                row["text_b"] = second = None if is_missing(second) else second
                if second is not None:
                    _check_text(second, where, "text_b")
            if not (isinstance(example_id, str) and example_id.isascii()):
                row["example_id"] = example_id = str(number) if is_missing(example_id) else _id(example_id, where)
            if example_id in seen:
                first = seen[example_id]
                raise EvalSetError(f"{where}: example_id '{example_id}' is at {first} too; rename one of them")
            seen[example_id] = where
        order = ["example_id", "text", "text_b", "label"]
        order += [column for column in columns if column not in order]
        examples = pd.DataFrame({column: [row.get(column) for _, row in rows] for column in order[:2]})
        for column in ("text_b", "label"):
            examples[column] = pd.Series([row.get(column) for _, row in rows], dtype=object)
        others = {column: _writable(column, [row.get(column) for _, row in rows]) for column in order[4:]}
        examples = pd.concat([examples, pd.DataFrame(others)], axis=1) if others else examples
        return cls(examples=examples, locations=tuple(where for where, _ in rows))


def guess_columns(
    path: str | Path, *, columns: Sequence[str] | None = None, encoding: str | None = None
) -> dict[str, str]:
    """Return which columns of a file are probably its texts and labels: `text` and `label` where nothing tells."""
    path = Path(path)
    try:
        content = path.read_bytes()
        if path.suffix.lower() == ".parquet":
            return first_columns(read_parquet(content, str(path)))
        return first_columns(read_rows(content, str(path), encoding=encoding, columns=columns))
    except (EvalSetError, OSError, ValueError, LookupError):  # `EvalSet.read` says what is wrong
        return {"text": "text", "label": "label"}


def _renamed(rows: list[Row], text_column: str, label_column: str, path: str) -> tuple[list[Row], dict[str, str]]:
    """Return the rows with their columns renamed to `text` and `label`, and which columns these were."""
    if text_column == label_column:
        raise EvalSetError(f"{path}: the texts and the labels are both column '{text_column}'; name two columns")
    names = {"text": text_column, "label": label_column}
    changed = {key: name for key, name in names.items() if key != name}
    if not changed:
        return rows, {}
    left_out = {*changed, *changed.values()}
    renamed: list[Row] = []
    for where, row in rows:
        moved = {key: row[name] for key, name in changed.items() if name in row}
        renamed.append((where, {**moved, **{name: value for name, value in row.items() if name not in left_out}}))
    return renamed, {f"{key}_column": name for key, name in changed.items()}


def _writable(name: str, cells: list[Any]) -> pd.Series:
    """Return a column that a run's tables can hold: integers beyond 64 bits become texts; other faults are refused."""
    try:
        values = pd.DataFrame({name: cells})[name]
        array = pa.array(values, from_pandas=True)
        table = pa.table({name: array})
        if not _is_plain(array.type):
            table.to_pandas()
        pq.write_table(table.slice(0, 0) if _is_plain(array.type) else table, io.BytesIO())
        return values
    except (pa.ArrowException, OverflowError, RecursionError, TypeError, ValueError) as error:
        shown = shorten(str(name), 40)
        if isinstance(error, UnicodeEncodeError):
            raise EvalSetError(f"column '{shown}' has half a surrogate pair; fix its name or its texts") from error
        whole = [isinstance(cell, int | np.integer) and not isinstance(cell, bool) for cell in cells]
        if any(whole) and all(number or is_missing(cell) for number, cell in zip(whole, cells, strict=True)):
            texts = [str(cell) if number else None for number, cell in zip(whole, cells, strict=True)]
            return pd.Series(texts, dtype=object)
        if "no child field" in str(error):
            raise EvalSetError(
                f"column '{shown}' has empty objects ({{}}), which a run cannot keep; drop the column"
            ) from error
        raise EvalSetError(
            f"column '{shown}' mixes types of values, or has a value that a run cannot keep; convert its values to one "
            "type, or drop the column"
        ) from error


def _is_plain(type_: pa.DataType) -> bool:
    types = pa.types
    return (
        types.is_string(type_)
        or types.is_large_string(type_)
        or types.is_integer(type_)
        or types.is_floating(type_)
        or types.is_boolean(type_)
        or types.is_null(type_)
    )


def _is_empty(value: Any) -> bool:
    return not value if isinstance(value, str) else is_missing(value)


def _check_single(value: Any, where: str, key: str) -> None:
    if isinstance(value, list | tuple | set | dict | bytes | np.ndarray):
        shown = shorten(str(value.tolist() if isinstance(value, np.ndarray) else value), 80)
        one = "" if key == "example_id" else f" (one {key} per text)"
        raise EvalSetError(f"{where}: {key} is {shown}; it must be a string or a number{one}")


def _label(value: Any, where: str, unlabelled: bool) -> str | None:
    if not _is_empty(value):
        if not isinstance(value, str):
            _check_single(value, where, "label")
            # pandas stores integers beside missing values as floats: 7 became 7.0.
            value = str(int(value) if unlabelled and isinstance(value, float) and value.is_integer() else value)
        _check_text(value, where, "label")
        return str(value)
    if unlabelled:
        return None
    raise EvalSetError(
        f"{where}: has no label; fill it in, drop the row, or read unlabelled texts with unlabelled=True"
    )


def _id(value: Any, where: str) -> str:
    _check_single(value, where, "example_id")
    example_id = str(value)
    _check_text(example_id, where, "example_id")
    return example_id


def _check_text(text: Any, where: str, key: str) -> None:
    if not isinstance(text, str):
        raise EvalSetError(f"{where}: {key} is {shorten(repr(text), 80)}; it must be a string")
    if text.isascii():
        return
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise EvalSetError(
            f"{where}: {key} has half a surrogate pair at character {error.start}; fix the text"
        ) from error


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
    rows = ({k: v for k, v in row.items() if not is_missing(v)} for row in examples.to_dict("records"))
    return "".join(json.dumps(row, ensure_ascii=False, default=str) + "\n" for row in rows).encode()


def _to_parquet(examples: pd.DataFrame, path: str) -> bytes:
    content = io.BytesIO()
    pq.write_table(pa.Table.from_pandas(examples, preserve_index=False), content)
    return content.getvalue()


def _cell(value: Any) -> str:
    return "" if is_missing(value) else str(value)


_WRITERS: dict[str, Callable[[pd.DataFrame, str], bytes]] = {
    ".tsv": _to_tsv,
    ".jsonl": _to_jsonl,
    ".parquet": _to_parquet,
}

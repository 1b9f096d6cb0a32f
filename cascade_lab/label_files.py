"""Labels that were given to some texts later: read from a file, and joined to texts by their ids."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd

from cascade_lab.decisions import check_labels
from cascade_lab.evalset import ENDINGS
from cascade_lab.evalset_files import check_keys, is_missing, read_rows
from cascade_lab.evalset_parquet import read_parquet
from cascade_lab.exceptions import EvalSetError
from cascade_lab.spec import CascadeSpec
from cascade_lab.text import shorten

WEIGHT = "label_weight"
"""The column of a run that has the weights of the labels; see `read_labels`."""


@dataclass(frozen=True)
class LabelFile:
    """Labels by id.

    Attributes
    ----------
    labels : DataFrame
        Columns `label`, `text` and `label_weight`, the last two only where the file has them, and
        `<stage>_label` columns; the index has the ids.
    locations : tuple of str
        Where each row was read, for messages.
    source : str
    """

    labels: pd.DataFrame
    locations: tuple[str, ...]
    source: str


def read_labels(path: str | Path, *, encoding: str | None = None) -> LabelFile:
    """Read a file of labels: tsv, csv, jsonl, json or parquet with the columns `example_id` and `label`.

    A row without a label is left out. A column `weight` says how the rows were drawn: the number of texts that a row
    stands for, which is 1 divided by the probability with which it was drawn. A column `text` has the texts, for a log
    without any.

    Raises
    ------
    EvalSetError
        The file cannot be read; an id is missing or occurs twice; a weight is missing or not above 0.
    """
    path = Path(path)
    ending, required = path.suffix.lower(), ("example_id", "label")
    if ending not in ENDINGS:
        raise EvalSetError(f"{path}: unknown format of labels; give a file that ends in {', '.join(ENDINGS)}")
    try:
        content = path.read_bytes()
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise EvalSetError(f"{path}: cannot be read ({reason}); give a file of labels") from error
    if ending == ".parquet":
        rows = list(read_parquet(content, str(path), required=required))
    else:
        rows = list(read_rows(content, str(path), required=required, encoding=encoding))
    if ending in (".json", ".jsonl"):
        check_keys(rows, required, str(path))
    has_weights = any("weight" in row for _, row in rows)
    seen: dict[str, str] = {}
    kept: list[tuple[str, dict[str, Any]]] = []
    for place, row in rows:
        where = f"{path} {place}"
        example_id = _string(row.get("example_id"))
        if not example_id:
            raise EvalSetError(f"{where}: has no example_id; fill it in, or drop the row")
        if example_id in seen:
            raise EvalSetError(
                f"{where}: example_id '{shorten(example_id, 80)}' is at {seen[example_id]} too; keep one of them"
            )
        seen[example_id] = where
        label = _string(row.get("label"))
        if label:
            own = {key: _string(value) for key, value in row.items() if key == "text" or key.endswith("_label")}
            weight = {WEIGHT: _weight(row.get("weight"), where)} if has_weights else {}
            kept.append((where, {"example_id": example_id, "label": label, **own, **weight}))
    if not kept:
        raise EvalSetError(f"{path}: has no label; fill in the column 'label'")
    frame = pd.DataFrame([row for _, row in kept]).set_index("example_id")
    return LabelFile(frame, tuple(where for where, _ in kept), str(path))


def read_label_map(path: str | Path, *, encoding: str | None = None) -> dict[str, str]:
    """Read which label of an eval set becomes which label of a cascade: a csv or tsv with the columns `from` and `to`.

    Raises
    ------
    EvalSetError
        The file cannot be read, a cell is empty, or a label is mapped twice.
    """
    path = Path(path)
    if path.suffix.lower() not in (".csv", ".tsv"):
        raise EvalSetError(f"{path}: unknown format of a map of labels; give a csv or tsv with the columns from and to")
    try:
        content = path.read_bytes()
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise EvalSetError(f"{path}: cannot be read ({reason}); give a csv with the columns from and to") from error
    mapped: dict[str, str] = {}
    for place, row in read_rows(content, str(path), required=("from", "to"), encoding=encoding):
        before, after = row.get("from"), row.get("to")
        if not before or not after:
            raise EvalSetError(f"{path} {place}: has no {'to' if before else 'from'}; fill it in, or drop the row")
        if mapped.get(before, after) != after:
            raise EvalSetError(f"{path} {place}: '{before}' becomes '{mapped[before]}' above; keep one of the rows")
        mapped[before] = after
    return mapped


def join_labels(examples: pd.DataFrame, given: LabelFile, spec: CascadeSpec) -> pd.DataFrame:
    """Return `examples` with the labels of a file, by `example_id`; a text without one keeps its own.

    Raises
    ------
    EvalSetError
        A label is no answer of the cascade, or no id of the file is one of the examples.
    """
    check_labels(spec, given.labels, given.locations)
    rows = pd.Index(examples["example_id"]).get_indexer(given.labels.index)
    found = given.labels[rows >= 0]
    rows = rows[rows >= 0]
    if not len(rows):
        raise EvalSetError(
            f"{given.source}: none of its {len(given.labels):,} ids is one of the {len(examples):,} texts; give the "
            "labels of these texts, or another time"
        )
    joined = examples.copy()
    for column in found:
        values = found[column].to_numpy()
        if column == WEIGHT:
            joined[column] = math.nan
        elif column not in joined:
            joined[column] = pd.Series([None] * len(joined), dtype=object)
        else:
            joined[column] = joined[column].astype(object)
        is_known = pd.notna(values)
        joined.iloc[rows[is_known], joined.columns.get_loc(column)] = values[is_known]
    return joined


def has_unequal_weights(examples: pd.DataFrame) -> bool:
    """Return whether labels were drawn with unequal probabilities, so that unweighted metrics are biased."""
    weights = examples[WEIGHT].dropna() if WEIGHT in examples else pd.Series(dtype=float)
    return bool(len(weights)) and not math.isclose(weights.min(), weights.max())


def _string(value: Any) -> str:
    """Return a cell as a string; "" for none. A whole number that became a float beside empty cells is whole again."""
    if is_missing(value):
        return ""
    return str(int(value) if isinstance(value, float) and value.is_integer() else value)


def _weight(value: Any, where: str) -> float:
    try:
        weight = float(value)
    except (TypeError, ValueError):
        weight = math.nan
    if not 0 < weight < math.inf:
        raise EvalSetError(
            f"{where}: weight is {shorten(repr(value), 40)}; it must be a number above 0: the number of texts that the "
            "row stands for"
        )
    return weight

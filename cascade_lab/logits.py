"""Logits that other software computed: read from npy, npz, parquet or csv, and checked."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from zipfile import BadZipFile

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv as pacsv
import pyarrow.parquet as pq

from cascade_lab.exceptions import RunError, did_you_mean
from cascade_lab.spec import StageSpec

ID, LIST = "example_id", "logits"  # columns of a table that are not named by a label


def read_logits(path: str | Path, stage: StageSpec, example_ids: Sequence[str]) -> np.ndarray:
    """Read the logits (or the probabilities) that a stage gives to the examples of an eval set.

    An array in a `.npy` or `.npz` file has one row per example and one column per label, in the order of `example_ids`
    and of the stage's labels. An `.npz` file holds one array, or one with the name of the stage.

    A table in a `.parquet` or `.csv` file has one column per label, in any order, or a list column `logits` (parquet).
    With a column `example_id` its rows are matched by id, and an example that is not in the table was not scored;
    without one, the table has one row per example, in order.

    Parameters
    ----------
    path : path
    stage : StageSpec
        Its labels name the columns.
    example_ids : sequence of str
        The examples, all different.

    Returns
    -------
    ndarray of float, shape (n_examples, n_labels)
        A row of NaN is an example that the stage did not score. The values are not checked:
        `check_logits` does that.

    Raises
    ------
    RunError
        The file cannot be read; it has another number of rows or columns; a label has no column, or a column no label;
        an id is unknown or occurs twice; a cell is not a number.

    Examples
    --------
    >>> from tempfile import TemporaryDirectory
    >>> gate = StageSpec("gate", ("oos", "in"), pass_label="in", threshold=0.5)
    >>> with TemporaryDirectory() as folder:
    ...     path = Path(folder) / "gate.csv"
    ...     _ = path.write_text("example_id,in,oos\\nb,2.5,-1\\n")
    ...     read_logits(path, gate, ["a", "b"])
    array([[ nan,  nan],
           [-1. ,  2.5]])
    """
    path = Path(path)
    reader = _READERS.get(path.suffix.lower())
    if reader is None:
        raise RunError(f"{path}: unknown kind of logits file; give a file that ends in {', '.join(_READERS)}")
    try:
        values, ids = reader(path, stage)
    except OSError as error:
        raise RunError(f"{path}: cannot be read ({error.strerror or error}); give a file of logits") from error
    n_labels = len(stage.labels)
    if values.ndim != 2 or values.shape[1] != n_labels:
        shape = " × ".join(map(str, values.shape)) or "a single number"
        raise RunError(
            f"{path}: the array is {shape}, but stage '{stage.name}' has {n_labels} labels; give one row per example "
            "and one column per label"
        )
    if ids is not None:
        return _matched(values, ids, example_ids, path)
    if len(values) != len(example_ids):
        raise RunError(
            f"{path}: has {len(values):,} rows, but there are {len(example_ids):,} examples; give one row per example, "
            f"in the same order, or a table with a column {ID}"
        )
    return values


Content = tuple[np.ndarray, Sequence[str] | None]
"""The values of a file, shape (n_rows, n_labels), and the ids of its rows if it has any."""


def check_logits(stage: StageSpec, given: np.ndarray, n: int, *, probabilities: bool = False) -> np.ndarray:
    """Return the logits of a stage as float32, if they can be logits.

    Parameters
    ----------
    stage : StageSpec
    given : array of numbers, shape (n, n_labels)
        A row of NaN, or one that a masked array masks, was not scored by the stage.
    n : int
        The number of examples.
    probabilities : bool
        The array holds probabilities; their natural logarithms are returned.

    Returns
    -------
    ndarray of float32, shape (n, n_labels)

    Raises
    ------
    RunError
        Another shape, NaN inside a row, infinity, or probabilities given as logits.
    """
    where = f"logits of stage '{stage.name}'"
    try:
        if isinstance(given, np.ma.MaskedArray):
            given = np.ma.filled(given.astype(np.float64), np.nan)
        logits = np.asarray(given, dtype=np.float64)
    except (TypeError, ValueError) as error:
        raise RunError(f"{where}: are not numbers ({error}); give an array of floats") from error
    if logits.ndim != 2 or logits.shape[0] != n:
        raise RunError(f"{where}: shape {logits.shape}, but there are {n:,} examples; give one row per example")
    if logits.shape[1] != len(stage.labels):
        raise RunError(
            f"{where}: {logits.shape[1]} columns, but the stage has {len(stage.labels)} labels; give one column each"
        )
    missing = np.isnan(logits)
    partly = missing.any(axis=1) & ~missing.all(axis=1)
    if partly.any():
        raise RunError(f"{where}: row {int(partly.argmax())} mixes NaN and numbers; fill it, or make it all NaN")
    with np.errstate(over="ignore"):
        is_infinite = np.isinf(logits.astype(np.float32))
    if is_infinite.any():
        row = int(is_infinite.any(axis=1).argmax())
        raise RunError(f"{where}: row {row} has a value that is infinite in float32; give finite numbers")
    scored = logits[~missing[:, 0]] if logits.shape[1] else logits
    within = ((scored >= 0) & (scored <= 1)).all(axis=1)
    sums_to_1 = within & (np.abs(scored.sum(axis=1) - 1) < 1e-3)
    if probabilities:
        if not sums_to_1.all():
            row = int(np.flatnonzero(~missing[:, 0])[~sums_to_1][0])
            raise RunError(f"{where}: row {row} is not a distribution; give numbers in [0, 1] that sum to 1")
        logits = np.log(np.maximum(logits, np.finfo(np.float32).tiny))
    elif len(scored) and sums_to_1.all():
        raise RunError(
            f"{where}: every row sums to 1, so these look like probabilities, not logits; pass --probabilities "
            "(probabilities=True), or give logits"
        )
    return logits.astype(np.float32)


def _array(path: Path, stage: StageSpec) -> Content:
    """Read npy or npz; numpy tells them apart by their first bytes."""
    try:
        content = np.load(path, allow_pickle=False)
        if isinstance(content, np.lib.npyio.NpzFile):
            with content as arrays:
                content = arrays[_array_name(list(arrays.files), path, stage)]
    except (ValueError, EOFError, BadZipFile, MemoryError) as error:
        raise RunError(
            f"{path}: is not a numpy file of numbers (pickled objects are not read, because a pickle can run code); "
            "write it with numpy.save(path, logits)"
        ) from error
    return _floating(content, f"{path}"), None


def _array_name(names: list[str], path: Path, stage: StageSpec) -> str:
    if len(names) == 1 or stage.name in names:
        return stage.name if stage.name in names else names[0]
    raise RunError(f"{path}: has no array named '{stage.name}'{did_you_mean(stage.name, names)}")


def _parquet(path: Path, stage: StageSpec) -> Content:
    try:
        table = pq.read_table(path)
    except pa.ArrowInvalid as error:
        raise RunError(f"{path}: is not a parquet file ({_first_line(error)}); write it again") from error
    if LIST in table.column_names and LIST not in stage.labels:
        return _list_column(table, path, stage), _ids(table, path, stage)
    return _label_columns(table, path, stage), _ids(table, path, stage)


def _csv(path: Path, stage: StageSpec) -> Content:
    """Read csv; the cells are separated as in the first line, with commas, semicolons or tabs."""
    with path.open(encoding="utf-8-sig", errors="replace") as file:
        header = file.readline()
    parse = pacsv.ParseOptions(delimiter=max(",;\t", key=header.count))
    types = {ID: pa.string()} | dict.fromkeys(stage.labels, pa.float64())
    convert = pacsv.ConvertOptions(column_types=types, null_values=["", "nan", "NaN"], strings_can_be_null=False)
    try:
        # One thread, so that a message has the number of the row.
        table = pacsv.read_csv(path, pacsv.ReadOptions(use_threads=False), parse_options=parse, convert_options=convert)
    except (pa.ArrowInvalid, pa.ArrowKeyError) as error:
        raise RunError(f"{path}: is not a csv file of numbers ({_first_line(error)}); fix it there") from error
    return _label_columns(table, path, stage), _ids(table, path, stage)


def _label_columns(table: pa.Table, path: Path, stage: StageSpec) -> np.ndarray:
    """Return the columns that are named by the stage's labels, in the order of the labels."""
    columns = table.column_names
    for name in columns:
        if columns.count(name) > 1:
            raise RunError(f"{path}: two columns are named '{name}'; rename one")
    others = [name for name in columns if name not in stage.labels and name != ID]
    for label in stage.labels:
        if label not in columns:
            near = did_you_mean(label, others) if others else ""
            raise RunError(f"{path}: no column is named by label '{label}' of stage '{stage.name}'{near}")
    if others:
        near = did_you_mean(others[0], stage.labels)
        raise RunError(f"{path}: column '{others[0]}' is not a label of stage '{stage.name}'{near}; drop the column")
    return np.column_stack([_numbers(table[label], f"{path}: column '{label}'") for label in stage.labels])


def _list_column(table: pa.Table, path: Path, stage: StageSpec) -> np.ndarray:
    """Return the lists of the column `logits` as rows; a null is a row of NaN."""
    column = table[LIST].combine_chunks()
    is_list = (pa.types.is_list, pa.types.is_large_list, pa.types.is_fixed_size_list)
    if not any(check(column.type) for check in is_list):
        raise RunError(f"{path}: column '{LIST}' is {column.type}, not a list of numbers; give one list per row")
    lengths = pc.list_value_length(column).to_numpy(zero_copy_only=False)
    scored = ~pd.isna(lengths)
    wrong = np.flatnonzero(scored & (lengths != len(stage.labels)))
    if len(wrong):
        raise RunError(
            f"{path} row {wrong[0] + 1}: has {lengths[wrong[0]]:g} logits, but stage '{stage.name}' has "
            f"{len(stage.labels)} labels; give one logit per label"
        )
    values = _numbers(column.drop_null().flatten(), f"{path}: column '{LIST}'")
    rows = np.full((len(column), len(stage.labels)), np.nan, dtype=values.dtype)
    rows[scored] = values.reshape(-1, len(stage.labels))
    return rows


def _ids(table: pa.Table, path: Path, stage: StageSpec) -> list[str] | None:
    if ID not in table.column_names or ID in stage.labels:
        return None
    ids = table[ID].to_pylist()
    if None in ids:
        raise RunError(f"{path} row {ids.index(None) + 1}: has no {ID}; fill it in")
    return [str(example_id) for example_id in ids]


def _matched(values: np.ndarray, ids: Sequence[str], example_ids: Sequence[str], path: Path) -> np.ndarray:
    """Put rows with ids in the order of the examples; an example without a row gets NaN."""
    index = pd.Index(ids)
    if not index.is_unique:
        repeated = index[index.duplicated()][0]
        raise RunError(f"{path}: {ID} '{repeated}' occurs twice; give one row per example")
    rows = pd.Index(example_ids).get_indexer(index)
    if (rows < 0).any():
        unknown = index[rows < 0][0]
        raise RunError(f"{path}: {ID} '{unknown}' is not in the eval set; give logits of the same texts")
    matched = np.full((len(example_ids), values.shape[1]), np.nan, dtype=values.dtype)
    matched[rows] = values
    return matched


def _numbers(column: pa.Array | pa.ChunkedArray, where: str) -> np.ndarray:
    """Return a column of numbers; a null is NaN."""
    if not (pa.types.is_integer(column.type) or pa.types.is_floating(column.type)):
        raise RunError(f"{where} is {column.type}, not a number; give logits")
    return _floating(np.asarray(column.to_numpy(zero_copy_only=False)), where)


def _floating(values: np.ndarray, where: str) -> np.ndarray:
    """Return numbers as floats, float32 as it is."""
    if values.dtype.kind not in "iuf":
        raise RunError(f"{where}: has values of type {values.dtype}; give numbers")
    return values if values.dtype == np.float32 else values.astype(np.float64)


def _first_line(error: Exception) -> str:
    return str(error).splitlines()[0]


_READERS: dict[str, Callable[[Path, StageSpec], Content]] = {
    ".npy": _array,
    ".npz": _array,
    ".parquet": _parquet,
    ".csv": _csv,
}

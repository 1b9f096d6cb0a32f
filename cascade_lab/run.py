"""The run directory: written whole or not at all, read lazily, replayed at other thresholds."""

from __future__ import annotations

import json
from collections.abc import Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq

from cascade_lab.errors import RunError
from cascade_lab.provenance import sha256
from cascade_lab.serial import gold, serve
from cascade_lab.spec import CascadeSpec
from cascade_lab.wholly import UNFINISHED, check_directory, whole_directory

SCHEMA_VERSION = 1


@dataclass(frozen=True)
class Scores:
    """What one stage said of the examples that it scored.

    Attributes
    ----------
    rows : ndarray of int, shape (n_scored,)
        Their rows in `Run.examples`.
    logits : ndarray of float32, shape (n_scored, n_labels)
    shadow : ndarray of bool, shape (n_scored,)
        Scored outside the serial path, since an earlier stage had stopped the example.
    """

    rows: np.ndarray
    logits: np.ndarray
    shadow: np.ndarray


class Run:
    """A run directory. Tables are read when they are first asked for.

    `Run.read` checks that the directory is a whole run; this constructor only takes its path.
    """

    def __init__(self, directory: str | Path):
        self.directory = Path(directory)
        self._scores: dict[str, Scores] = {}

    @classmethod
    def read(cls, directory: str | Path) -> Run:
        """Open a finished run.

        Raises
        ------
        RunError
            No such directory, not a run, an unfinished one, or one of another schema version.
        """
        run = cls(directory)
        if not run.directory.is_dir():
            raise RunError(f"{directory}: no such run directory; make one with `cascade-lab run`")
        if run.directory.name.endswith(UNFINISHED):
            raise RunError(f"{directory}: an unfinished run, left by a crash; delete it and run again")
        found = run.manifest.get("schema_version")
        if found != SCHEMA_VERSION:
            raise RunError(
                f"{directory}: has schema version {found}, and this package reads {SCHEMA_VERSION}; run again"
            )
        return run

    def __repr__(self) -> str:
        return f"Run({str(self.directory)!r})"

    def check(self) -> None:
        """Raise RunError where a table is missing, or is not the one that the manifest has the SHA-256 of."""
        for name, digest in self.manifest["contents"].items():
            try:
                same = sha256(self._path(name)) == digest
            except OSError as error:
                raise RunError(f"{self._path(name)}: cannot be read ({error.strerror}); run again") from error
            if not same:
                raise RunError(
                    f"{self._path(name)}: changed since the run (its SHA-256 is not the one in manifest.json); "
                    "put the file back, or run again"
                )

    @cached_property
    def manifest(self) -> dict[str, Any]:
        return self._json("manifest.json")

    @cached_property
    def metrics(self) -> dict[str, Any]:
        return self._json("metrics.json")

    @cached_property
    def spec(self) -> CascadeSpec:
        return CascadeSpec.from_dict(self.manifest["cascade"], where=str(self._path("manifest.json")))

    @cached_property
    def examples(self) -> pd.DataFrame:
        """An example a row: `example_id`, `text`, `text_b`, `label`, and the input's other columns."""
        return self._table("examples.parquet").to_pandas()

    @cached_property
    def predictions(self) -> pd.DataFrame:
        """The live answers, an example a row: `example_id`, `label`, `predicted`, `decided_by`, `probability`."""
        return self._table("predictions.parquet").to_pandas()

    @cached_property
    def timings(self) -> pd.DataFrame:
        """A batch of a stage a row; `tokenize_seconds` and `run_seconds` are for the whole batch."""
        return self._table("timings.parquet").to_pandas()

    def scores(self, stage: str) -> Scores:
        """Return what `stage` said of every example that it scored."""
        if stage not in self._scores:
            self.spec.stage(stage)
            table = self._table(f"scores/{stage}.parquet")
            logits = table["logits"].combine_chunks()
            self._scores[stage] = Scores(
                rows=self._rows(table["example_id"].to_pylist()),
                logits=logits.flatten().to_numpy().reshape(len(table), logits.type.list_size),
                shadow=table["shadow"].to_numpy(),
            )
        return self._scores[stage]

    def gold(self, stage: str) -> np.ndarray:
        """Return what `stage` should say of each example: shape (n,), None where it should not be asked."""
        return gold(self.spec, self.spec.stage(stage), self.examples)

    def replay(self, thresholds: Mapping[str, float] | None = None) -> pd.DataFrame:
        """Return the answers that the cascade would give at other thresholds, from the kept logits.

        Parameters
        ----------
        thresholds : mapping of str to float, optional
            Stage name to a gate's `threshold`, or to the last stage's `min_probability`. A stage that is not
            named keeps its own.

        Returns
        -------
        DataFrame
            The columns of `predictions`, in the order of `examples`.

        Raises
        ------
        SpecError
            A threshold that is no probability, or for no stage.
        RunError
            An example would reach a stage that never scored it (the run was made without shadow scores).
        """
        spec = self.spec.with_thresholds(thresholds or {})
        logits = {}
        for stage in spec.stages:
            scores = self.scores(stage.name)
            logits[stage.name] = np.full((len(self.examples), len(stage.labels)), np.nan, dtype=np.float32)
            logits[stage.name][scores.rows] = scores.logits
        answers = serve(spec, logits)
        unknown = int(answers["predicted"].isna().sum())
        if unknown:
            raise RunError(
                f"{self.directory}: {unknown} examples would reach a stage that never scored them at these "
                "thresholds; run the cascade again with shadow scores"
            )
        return predictions_table(self.examples, answers).to_pandas()

    def _rows(self, example_ids: list[str]) -> np.ndarray:
        rows = pd.Index(self.examples["example_id"]).get_indexer(example_ids)
        if (rows < 0).any():
            raise RunError(f"{self.directory}: scores for an example that is not in examples.parquet; run again")
        return rows

    def _path(self, name: str) -> Path:
        return self.directory / name

    def _json(self, name: str) -> dict[str, Any]:
        try:
            return json.loads(self._path(name).read_text(encoding="utf-8"))
        except FileNotFoundError as error:
            raise RunError(f"{self.directory}: not a run directory (it has no {name}); give one") from error
        except (OSError, ValueError) as error:
            raise RunError(f"{self._path(name)}: cannot be read ({error}); run again") from error

    def _table(self, name: str) -> pa.Table:
        try:
            return pq.read_table(self._path(name))
        except (OSError, pa.ArrowInvalid) as error:
            reason = str(error).splitlines()[0]
            raise RunError(f"{self._path(name)}: cannot be read ({reason}); run again") from error


_KIND: Any = {"sign": "manifest.json", "what": "run", "error": RunError}


def check_output(output: str | Path, *, overwrite: bool) -> None:
    """Raise RunError if a run cannot go to `output`: it exists, and is not a run that may be overwritten."""
    check_directory(output, overwrite=overwrite, **_KIND)


def unfinished(output: str | Path, *, overwrite: bool = False) -> AbstractContextManager[Path]:
    """Give a directory to fill, which becomes the run `output` whole or not at all: see `whole_directory`."""
    return whole_directory(output, overwrite=overwrite, **_KIND)


def write_json(path: Path, content: Any) -> None:
    """Write JSON for people and programs: undefined numbers (NaN) become null."""
    path.write_text(json.dumps(_nan_to_none(content), indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def write_tables(
    directory: Path,
    examples: pd.DataFrame,
    scores: Mapping[str, Scores],
    answers: pd.DataFrame,
    timings: pd.DataFrame,
) -> dict[str, str]:
    """Write a run's tables into `directory`; return the SHA-256 of each file, by its name there."""
    ids = pa.array(examples["example_id"].tolist(), pa.string())
    tables = {
        "examples.parquet": examples_table(examples),
        "predictions.parquet": predictions_table(examples, answers),
        "timings.parquet": pa.Table.from_pandas(timings, preserve_index=False),
    }
    for name, kept in scores.items():
        flat = pa.array(np.ascontiguousarray(kept.logits, dtype=np.float32).ravel())
        tables[f"scores/{name}.parquet"] = pa.table(
            {
                "example_id": ids.take(pa.array(kept.rows)),
                "logits": pa.FixedSizeListArray.from_arrays(flat, kept.logits.shape[1]),
                "shadow": kept.shadow,
            }
        )
    (directory / "scores").mkdir()
    for name, table in tables.items():
        pq.write_table(table, directory / name)
    return {name: sha256(directory / name) for name in sorted(tables)}


def examples_table(examples: pd.DataFrame) -> pa.Table:
    """Return `examples` as it is kept: the contract's columns as strings, the others as they are."""
    strings = {
        key: pa.array(examples[key].tolist(), pa.string(), from_pandas=True)
        for key in ("example_id", "text", "text_b", "label")
    }
    others = {key: pa.array(examples[key], from_pandas=True) for key in examples.columns if key not in strings}
    return pa.table(strings | others)


def predictions_table(examples: pd.DataFrame, answers: pd.DataFrame) -> pa.Table:
    """Return the answers beside the gold, as `predictions.parquet` has them."""
    columns = {key: examples[key] for key in ("example_id", "label")}
    columns |= {key: answers[key] for key in ("predicted", "decided_by")}
    strings = {key: pa.array(values.tolist(), pa.string()) for key, values in columns.items()}
    return pa.table(strings | {"probability": pa.array(answers["probability"].to_numpy())})


def _nan_to_none(content: Any) -> Any:
    if isinstance(content, Mapping):
        return {key: _nan_to_none(value) for key, value in content.items()}
    if isinstance(content, list | tuple):
        return [_nan_to_none(value) for value in content]
    if isinstance(content, float) and np.isnan(content):
        return None
    return content

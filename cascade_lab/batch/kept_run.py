"""Opens the scores that a scoring job kept as an unlabelled run; tables are read when they are first needed."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from cascade_lab.batch.plan_file import PLAN, plan_from_dict
from cascade_lab.batch.shards import PREDICTIONS, part_path, read_shard_manifest
from cascade_lab.exceptions import RunError, SpecError
from cascade_lab.json_files import check_keys, read_object
from cascade_lab.label_files import LabelFile, join_labels
from cascade_lab.parquet_files import DAMAGE
from cascade_lab.run import Run, StageScores
from cascade_lab.run_schema import SCHEMA_VERSION
from cascade_lab.run_tables import TIMING_COLUMNS
from cascade_lab.serving.shadow import is_chosen
from cascade_lab.spec import CascadeSpec, StageSpec
from cascade_lab.stage_files import stage_file
from cascade_lab.text import shorten

_PLAN = {"cascade": dict, "cascade_digest": str, "options": dict, "inputs": dict, "thresholds": dict, "planned": str}
_WAY_OUT = "run the same `cascade-lab score` again, or score into another folder"


def is_job(folder: Path) -> bool:
    """Return whether a folder is the output of `cascade-lab score`."""
    return (folder / PLAN).is_file()


def read_scores(folder: str | Path, *, labels: LabelFile | None = None) -> Run:
    """Open what `cascade-lab score --keep scores` kept as a run.

    Of a job that still runs, or was interrupted, the shards that are done are read.

    Parameters
    ----------
    folder : path
    labels : LabelFile, optional
        Labels to join by id; without them the run is unlabelled.

    Raises
    ------
    RunError
        No such job, it kept no scores, or no shard is done. A part that is damaged raises when it is needed.
    """
    folder = Path(folder)
    if not is_job(folder):
        raise RunError(f"{folder}: is not the output of `cascade-lab score`; give its folder")
    content = read_object(folder / PLAN, error=RunError, way_out=_WAY_OUT)
    check_keys(content, _PLAN, str(folder / PLAN), error=RunError, way_out=_WAY_OUT)
    options = content["options"]
    if "scores" not in options.get("keep", ()):
        raise RunError(f"{folder}: kept no scores; score into another folder with --keep scores")
    try:
        spec = CascadeSpec.from_dict(content["cascade"], where=f"{folder / PLAN}: cascade")
    except SpecError as error:
        raise RunError(f"{shorten(str(error), 500)}; {_WAY_OUT}") from error
    plan = plan_from_dict(content, folder / PLAN)
    manifests = {
        number: manifest
        for number in range(len(plan.shards))
        if (manifest := read_shard_manifest(folder, number, content["cascade_digest"])) is not None
    }
    if not manifests:
        raise RunError(f"{folder}: no shard is done yet; {_WAY_OUT}")
    parts = _Parts(folder, list(manifests))
    n_examples = parts.n_rows("examples")
    if not n_examples:
        raise RunError(f"{folder}: its --sample {options['sample']} has no text; score with a larger one")
    origin = "".join(file.sha256 for file in plan.files) + f" {options['sample']} {sorted(manifests)}"
    manifest = {
        "schema_version": SCHEMA_VERSION,
        "run_id": f"batch-{content['planned'].replace(':', '').replace('-', '')[:15]}Z",
        "source": "batch",
        **{key: content[key] for key in ("cascade", "thresholds", "inputs")},
        "tuned_on": content.get("tuned_on"),
        "digest": content["cascade_digest"],
        "evalset": {
            "source": str(folder),
            "split": None,
            "sha256": sha256(origin.encode()).hexdigest(),
            "n_examples": n_examples,
        },
        "contents": {},
        "stages": next(iter(manifests.values())).get("stages", {}),
        "batch_size": None,
        "shadow": bool(options.get("shadow")),
        "started": content["planned"],
        **{key: content.get(key) for key in ("git", "python", "platform", "processor", "packages")},
    }
    run: Run = Run(
        manifest,
        examples=parts.examples if labels is None else lambda: join_labels(parts.examples(), labels, spec),
        scores={stage.name: partial(parts.scores, stage) for stage in spec.stages},
        predictions=lambda: parts.predictions(options["sample"]).assign(label=run.examples["label"]),
        timings=pd.DataFrame(columns=list(TIMING_COLUMNS)).astype(TIMING_COLUMNS),
        features={stage.name: partial(parts.features, stage) for stage in spec.stages if "features" in options["keep"]},
        evidence=lambda: parts.evidence(spec),
        name=str(folder),
    )
    run.spec = spec
    return run


class _Parts:
    """The parts of the shards that are done; rows are in the order of the shards."""

    def __init__(self, folder: Path, numbers: list[int]):
        self._folder, self._numbers = folder, numbers

    def _open(self, table: str, number: int) -> pq.ParquetFile:
        path = part_path(self._folder, table, number)
        try:
            return pq.ParquetFile(path)
        except DAMAGE as error:
            reason = shorten(str(error).partition("\n")[0], 200)
            raise RunError(f"{path}: cannot be read ({reason}); {_WAY_OUT}") from error

    def _read(self, table: str, number: int) -> pa.Table:
        with self._open(table, number) as file:
            try:
                return file.read()
            except DAMAGE as error:
                reason = shorten(str(error).partition("\n")[0], 200)
                path = part_path(self._folder, table, number)
                raise RunError(f"{path}: cannot be read ({reason}); {_WAY_OUT}") from error

    def n_rows(self, table: str) -> int:
        return sum(self._n_rows(table, number) for number in self._numbers)

    def _n_rows(self, table: str, number: int) -> int:
        with self._open(table, number) as file:
            return int(file.metadata.num_rows)

    def examples(self) -> pd.DataFrame:
        table = pa.concat_tables([self._read("examples", number) for number in self._numbers])
        examples = table.to_pandas()
        examples["text_b"] = examples["text_b"].astype(object).where(examples["text_b"].notna(), None)
        examples.insert(3, "label", pd.Series([None] * len(examples), dtype=object))
        return examples

    def predictions(self, sample: float) -> pd.DataFrame:
        """Return the predictions of the kept texts, whose ids the same hash chooses again."""
        tables = []
        for number in self._numbers:
            table = self._read(PREDICTIONS, number)
            table = table.filter(pc.is_null(table["error"])).drop_columns("error")
            ids = table["example_id"].cast(pa.string())
            chosen = pa.array(is_chosen(ids.to_pylist(), sample))
            tables.append(table.set_column(0, "example_id", ids).filter(chosen))
        predictions = pa.concat_tables(tables).to_pandas()
        predictions.insert(1, "label", None)
        return predictions

    def scores(self, stage: StageSpec) -> StageScores:
        n, n_labels = self.n_rows("examples"), len(stage.labels)
        logits = np.full((n, n_labels), np.nan, dtype=np.float32)
        scored, shadow = np.zeros(n, dtype=bool), np.zeros(n, dtype=bool)
        rescored = np.zeros(n, dtype=bool) if stage.precision == "mixed" else None
        for number, rows, table in self._rows(f"scores/{stage_file(stage.name)}"):
            values = table["logits"].combine_chunks().flatten().to_numpy()
            if len(values) != len(table) * n_labels or not np.isfinite(values).all():
                path = part_path(self._folder, f"scores/{stage_file(stage.name)}", number)
                raise RunError(f"{path}: does not have {n_labels} finite logits per text; {_WAY_OUT}")
            logits[rows] = values.reshape(-1, n_labels)
            scored[rows], shadow[rows] = True, table["shadow"].to_numpy()
            if rescored is not None:
                rescored[rows] = table["rescored"].to_numpy()
        return StageScores(logits, scored, shadow, rescored)

    def features(self, stage: StageSpec) -> np.ndarray:
        features: np.ndarray | None = None
        for _, rows, table in self._rows(f"features/{stage_file(stage.name)}"):
            vectors = table["cls"].combine_chunks()
            size = vectors.type.list_size
            if features is None:
                features = np.full((self.n_rows("examples"), size), np.nan, dtype=np.float16)
            features[rows] = vectors.flatten().to_numpy().reshape(-1, size)
        assert features is not None  # there is at least one shard
        return features

    def evidence(self, spec: CascadeSpec) -> Mapping[str, np.ndarray]:
        columns: dict[str, list[Any]] = {name: [] for name in spec.feature_evidence}
        for number in self._numbers if columns else ():
            table = self._read("evidence", number)
            for name, values in columns.items():
                values.append(table[name].to_numpy().astype(np.float64))
        return {name: np.concatenate(values) for name, values in columns.items()}

    def _rows(self, table: str) -> Any:
        """Give each part with the rows of the run that it has."""
        start = 0
        for number in self._numbers:
            part = self._read(table, number)
            ids = self._read("examples", number)["example_id"]
            rows = pc.index_in(part["example_id"], value_set=ids.combine_chunks())
            if rows.null_count:
                raise RunError(f"{part_path(self._folder, table, number)}: has an id that was not kept; {_WAY_OUT}")
            yield number, start + rows.to_numpy(), part
            start += len(ids)

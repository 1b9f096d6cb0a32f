"""The scores, features and evidence of a sample of a block's texts, as tables with the columns of a run's."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import pyarrow as pa

from cascade_lab.batch.shards import Settings
from cascade_lab.cascade import Cascade
from cascade_lab.chunks import ChunkResult, dense_features, dense_scores
from cascade_lab.exceptions import CheckpointError
from cascade_lab.mixed_scoring import score_shadow
from cascade_lab.serving.shadow import is_chosen
from cascade_lab.stage import Stage
from cascade_lab.stage_files import stage_file
from cascade_lab.stage_output import ScoredRows, StageOutput, concatenate

if TYPE_CHECKING:
    from cascade_lab.batch.scoring import Block


def kept_tables(
    cascade: Cascade, block: Block, rows: np.ndarray, result: ChunkResult | None, settings: Settings
) -> dict[str, pa.Table]:
    """Return the tables of the rows that are in the sample: `examples`, `scores/<stage>`, and so on.

    Parameters
    ----------
    cascade : Cascade
    block : Block
    rows : ndarray of int
        The rows of the block that were scored.
    result : ChunkResult or None
        What was computed for them; None if there are none.
    settings : Settings
    """
    chosen = np.flatnonzero(is_chosen([str(block.ids[row]) for row in rows], settings.sample))
    own = [int(rows[row]) for row in chosen]
    texts = [block.texts[row] for row in own]
    second = None if block.texts_b is None else [block.texts_b[row] for row in own]
    scored, shadowed = {}, {}
    for stage in cascade.stages:
        name = stage.spec.name
        scored[name] = _of_rows(result.scored[name], chosen) if result is not None else _nothing(stage)
        shadowed[name] = _nothing(stage)
        missing = np.setdiff1d(np.arange(len(own)), scored[name].rows)
        if settings.shadow and len(missing):
            shadowed[name] = _shadow(cascade, stage, texts, second, missing, scored, shadowed)
    n, ids = len(own), pa.array([str(block.ids[row]) for row in own], pa.string())
    tables = {
        "examples": pa.table(
            {
                "example_id": ids,
                "text": pa.array(texts, pa.string()),
                "text_b": pa.array(second or [None] * n, pa.string()),
            }
        )
    }
    if "scores" in settings.keep:
        for name, dense in dense_scores(scored, shadowed, n).items():
            at = np.flatnonzero(dense.scored)
            of_stage = dense.take(at)
            columns = {"logits": _lists(of_stage.logits, np.float32), "shadow": of_stage.shadow}
            if of_stage.rescored is not None:
                columns["rescored"] = of_stage.rescored
            tables[f"scores/{stage_file(name)}"] = pa.table({"example_id": ids.take(pa.array(at)), **columns})
    if "features" in settings.keep:
        for name, vectors in dense_features(scored, shadowed, n).items():
            at = np.flatnonzero(~np.isnan(vectors[:, 0]))
            values = _lists(vectors[at], np.float16)
            tables[f"features/{stage_file(name)}"] = pa.table({"example_id": ids.take(pa.array(at)), "cls": values})
    if cascade.spec.feature_evidence:
        evidence = _evidence(cascade, scored, shadowed, chosen, result)
        columns = {name: pa.array(values, pa.float64(), from_pandas=True) for name, values in evidence.items()}
        tables["evidence"] = pa.table({"example_id": ids, **columns})
    return tables


def _of_rows(scored: ScoredRows, chosen: np.ndarray) -> ScoredRows:
    """Return what was scored of the chosen rows, counted among them."""
    is_own = np.isin(scored.rows, chosen)
    return ScoredRows(np.searchsorted(chosen, scored.rows[is_own]), scored.output.take(np.flatnonzero(is_own)))


def _nothing(stage: Stage) -> ScoredRows:
    return ScoredRows(np.arange(0), stage.score([])[0])


def _shadow(
    cascade: Cascade,
    stage: Stage,
    texts: list[str],
    second: list[str | None] | None,
    rows: np.ndarray,
    scored: dict[str, ScoredRows],
    shadowed: dict[str, ScoredRows],
) -> ScoredRows:
    """Score rows that no earlier stage passed on; those whose logits are not finite are left out."""
    encodings = stage.encode([texts[row] for row in rows], second and [second[row] for row in rows])
    earlier = {name: (scored[name], shadowed[name]) for name in shadowed}
    try:
        return ScoredRows(rows, score_shadow(cascade, stage, rows, encodings, earlier))
    except CheckpointError:
        if len(rows) == 1:
            return _nothing(stage)
        halves = np.array_split(rows, 2)
        parts = [_shadow(cascade, stage, texts, second, half, scored, shadowed) for half in halves]
        return ScoredRows(np.concatenate([part.rows for part in parts]), concatenate([part.output for part in parts]))


def _evidence(
    cascade: Cascade,
    scored: dict[str, ScoredRows],
    shadowed: dict[str, ScoredRows],
    chosen: np.ndarray,
    result: ChunkResult | None,
) -> dict[str, np.ndarray]:
    """Return the rejectors' scores of features of the chosen rows.

    The live values are kept as they are, so that a replay decides exactly alike; those of shadow scores are computed
    where every stage has scored the text.
    """
    n = len(chosen)
    evidence = {name: np.full(n, np.nan) for name in cascade.spec.feature_evidence}
    if result is not None:
        evidence |= {name: values[chosen] for name, values in result.evidence.items()}
    scores, features = dense_scores(scored, shadowed, n), dense_features(scored, shadowed, n)
    is_whole = np.all([one.scored for one in scores.values()], axis=0)
    rows = np.flatnonzero(is_whole & np.any([np.isnan(values) for values in evidence.values()], axis=0))
    if not len(rows):
        return evidence
    outputs = {
        name: StageOutput(one.logits[rows], features[name][rows] if name in features else None)
        for name, one in scores.items()
    }
    for stage in cascade.spec.stages:
        for name, values in cascade.decide(stage, outputs)[1].items():
            own = evidence[name]
            own[rows] = np.where(np.isnan(own[rows]), values, own[rows])
    return evidence


def _lists(values: np.ndarray, dtype: type) -> pa.Array:
    flat = pa.array(np.ascontiguousarray(values, dtype=dtype).ravel())
    return pa.FixedSizeListArray.from_arrays(flat, values.shape[1])

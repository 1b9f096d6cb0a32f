"""What a live cascade scores, chunk by chunk, and how the chunks become the tables of a run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import pandas as pd

from cascade_lab.decisions import RoutingResult
from cascade_lab.run import StageScores
from cascade_lab.run_tables import TIMING_COLUMNS
from cascade_lab.stage_output import ScoredRows, concatenate


class ChunkResult(NamedTuple):
    """What the serial path computed for one chunk of texts. Rows count from the first text of the chunk.

    Attributes
    ----------
    routed : RoutingResult
    scored : dict of str to ScoredRows
        Stage name to what it scored.
    probability : dict of str to ndarray of float64
        Stage name to the probability of the rows that it scored: a gate's of its pass label, another stage's highest.
    evidence : dict of str to ndarray of float64
        `<stage>.<score>` to a rejector's score of features, shape (n,); NaN where no stage needed it.
    timings : list of tuple
        One row of `timings.parquet` per batch, without the batch's number.
    """

    routed: RoutingResult
    scored: dict[str, ScoredRows]
    probability: dict[str, np.ndarray]
    evidence: dict[str, np.ndarray]
    timings: list[tuple[Any, ...]]

    def columns(self) -> dict[str, np.ndarray]:
        """Return the columns of the table that `Cascade.predict` returns, but for the texts: shape (n,) each."""
        of_text = ("predicted", "decided_by", "probability", "confidence")
        columns = {name: getattr(self.routed, name) for name in of_text}
        for name, scored in self.scored.items():
            probability = np.full(len(self.routed.predicted), np.nan)
            probability[scored.rows] = self.probability[name]
            columns[f"{name}_probability"] = probability
        return columns


def prediction_table(
    texts: Sequence[str], texts_b: Sequence[str | None] | None, columns: Mapping[str, Any]
) -> pd.DataFrame:
    """Return the table that `Cascade.predict` returns: the texts, and beside them the `columns` of `ChunkResult`."""
    given = {"text": texts} if texts_b is None else {"text": texts, "text_b": texts_b}
    # As objects: a string type takes no lone surrogate, which a text may have.
    return pd.DataFrame({**{name: pd.Series(values, dtype=object) for name, values in given.items()}, **columns})


class JoinedChunks(NamedTuple):
    """The chunks of a run put together: rows count from the first text of the run.

    Attributes
    ----------
    routed : DataFrame
        What `RoutingResult.frame` returns.
    scored : dict of str to ScoredRows
    evidence : dict of str to ndarray
        As in `ChunkResult`.
    timings : DataFrame
        The rows of `timings.parquet`, with each stage's batches numbered.
    """

    routed: pd.DataFrame
    scored: dict[str, ScoredRows]
    evidence: dict[str, np.ndarray]
    timings: pd.DataFrame


def join_chunks(results: Sequence[ChunkResult]) -> JoinedChunks:
    """Put the chunks of a run together."""
    sizes = [len(result.routed.predicted) for result in results]
    starts = np.cumsum(sizes) - sizes
    scored = {
        name: ScoredRows(
            np.concatenate([part.scored[name].rows + start for part, start in zip(results, starts, strict=True)]),
            concatenate([part.scored[name].output for part in results]),
        )
        for name in results[0].scored
    }
    names = {name: None for result in results for name in result.evidence}
    evidence = {
        name: np.concatenate(
            [part.evidence.get(name, np.full(size, np.nan)) for part, size in zip(results, sizes, strict=True)]
        )
        for name in names
    }
    routed = pd.concat([result.routed.frame() for result in results], ignore_index=True)
    columns = [name for name in TIMING_COLUMNS if name != "batch"]
    timings = pd.DataFrame([row for result in results for row in result.timings], columns=columns)
    timings.insert(1, "batch", timings.groupby("stage").cumcount())
    return JoinedChunks(routed, scored, evidence, timings)


def dense_scores(
    scored: Mapping[str, ScoredRows], shadowed: Mapping[str, ScoredRows], n: int
) -> dict[str, StageScores]:
    """Put each stage's live and shadow scores into the rows of the examples."""
    dense = {}
    for name, live in scored.items():
        shadow = shadowed[name]
        logits = np.full((n, live.output.logits.shape[1]), np.nan, dtype=np.float32)
        is_scored, is_shadow = np.zeros(n, dtype=bool), np.zeros(n, dtype=bool)
        logits[live.rows], logits[shadow.rows] = live.output.logits, shadow.output.logits
        is_scored[live.rows] = is_scored[shadow.rows] = is_shadow[shadow.rows] = True
        rescored = None if live.output.rescored is None else np.zeros(n, dtype=bool)
        if rescored is not None:
            rescored[live.rows], rescored[shadow.rows] = live.output.rescored, shadow.output.rescored
        dense[name] = StageScores(logits, is_scored, is_shadow, rescored)
    return dense


def dense_features(
    scored: Mapping[str, ScoredRows], shadowed: Mapping[str, ScoredRows], n: int
) -> dict[str, np.ndarray]:
    """Put each stage's features into the rows of the examples: float16, shape (n, hidden); NaN where not scored."""
    dense = {}
    for name, live in scored.items():
        if live.output.features is None:
            continue
        dense[name] = np.full((n, live.output.features.shape[1]), np.nan, dtype=np.float16)
        for part in (live, shadowed[name]):
            dense[name][part.rows] = part.output.features
    return dense

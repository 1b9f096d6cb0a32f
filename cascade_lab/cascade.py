"""Runs texts through the stages in series, each stage in its own graph and session."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import ExitStack
from datetime import datetime, timezone
from pathlib import Path
from time import perf_counter
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
from tqdm.auto import tqdm

from cascade_lab.bert.tokenization import Encoding
from cascade_lab.decisions import RoutingResult, StageDecision, check_labels, decide, route
from cascade_lab.evalset import EvalSet
from cascade_lab.evalset_files import check_columns
from cascade_lab.exceptions import EvalSetError
from cascade_lab.provenance import environment, sha256
from cascade_lab.run import SCHEMA_VERSION, Run, StageScores, new_run_id, unfinished_run
from cascade_lab.run_tables import TIMING_COLUMNS, predictions_frame
from cascade_lab.spec import CascadeSpec, StageSpec
from cascade_lab.stage import Batch, Stage
from cascade_lab.text import shorten

CHUNK = 8192  # texts whose token ids are held at the same time; the next chunk is tokenized meanwhile
SPECULATE_MAX_TOKENS = 128  # up to this size all stages score a batch at once: half of it would load the same weights


class ScoredRows(NamedTuple):
    """What one stage scored: the rows of the texts, and their logits (float32, shape (len(rows), n_labels))."""

    rows: np.ndarray
    logits: np.ndarray


class ChunkResult(NamedTuple):
    """What the serial path computed for one chunk of texts. Rows count from the first text of the chunk.

    Attributes
    ----------
    routed : RoutingResult
    scored : dict of str to ScoredRows
        Stage name to what it scored.
    confidence : dict of str to ndarray of float64
        Stage name to the confidence of the rows that it scored.
    timings : list of tuple
        One row of `timings.parquet` per batch, without the batch's number.
    """

    routed: RoutingResult
    scored: dict[str, ScoredRows]
    confidence: dict[str, np.ndarray]
    timings: list[tuple[Any, ...]]


class Cascade:
    """A loaded cascade. Make one with `Cascade.load`, and close it: its sessions hold the weights.

    Examples
    --------
    >>> with Cascade.load("cascade.toml") as cascade:               # doctest: +SKIP
    ...     cascade.predict(["what is my balance", "sing me a song"])
           predicted decided_by  probability  gate_probability  intent_probability
    0  balance           intent        0.991             0.998               0.991
    1  oos                 gate        0.970             0.030                 NaN
    """

    def __init__(self, spec: CascadeSpec, stages: Sequence[Stage], closing: ExitStack):
        self.spec = spec
        self.stages = tuple(stages)
        self._closing = closing

    @classmethod
    def load(cls, cascade: str | Path | CascadeSpec) -> Cascade:
        """Load every stage of a `cascade.toml` (or of a spec).

        Raises
        ------
        SpecError, CheckpointError
            A stage cannot be loaded; the stages loaded before it are closed again.
        """
        spec = cascade if isinstance(cascade, CascadeSpec) else CascadeSpec.read(cascade)
        with ExitStack() as closing:
            stages = [closing.enter_context(Stage(stage)) for stage in spec.stages]
            opened = closing.pop_all()
        return cls(spec, stages, opened)

    def __enter__(self) -> Cascade:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Close every session."""
        self._closing.close()

    def predict(
        self,
        texts: Sequence[str] | pd.Series | pd.DataFrame,
        texts_b: Sequence[str | None] | pd.Series | None = None,
        *,
        batch_size: int | None = None,
        progress: bool = False,
    ) -> pd.DataFrame:
        """Answer any number of texts.

        Small inputs run all stages at once in parallel; results that are not needed are discarded. This is done where
        the later stages are no larger than the first and tokenize alike.

        Parameters
        ----------
        texts : sequence of str, or DataFrame
            Of a table, the columns `text` and (where there is one) `text_b`.
        texts_b : sequence of str or None, optional
            The second text of each pair.
        batch_size : int, optional
            The most texts in one batch of a stage; by default as many as are scored fastest.
        progress : bool
            Show a progress bar.

        Raises
        ------
        EvalSetError
            A text is missing or is no string, naming its place (counted from 0), or a table has no column `text`.

        Returns
        -------
        DataFrame
            One row per text, in order: `predicted`, `decided_by` (stage), `probability` (of the answer), and
            `<stage>_probability`: a gate's probability of its pass label, the last stage's highest probability; NaN
            where the text did not reach the stage.
        """
        texts, texts_b = _check_texts(texts, texts_b)
        columns: dict[str, list[np.ndarray]] = {name: [] for name in ("predicted", "decided_by", "probability")}
        columns |= {f"{stage.name}_probability": [] for stage in self.spec.stages}
        with _bar(len(texts) * len(self.stages), progress) as bar:
            for result in self._chunks(texts, texts_b, batch_size, bar, shadow=False, speculate=True):
                for name in ("predicted", "decided_by", "probability"):
                    columns[name].append(getattr(result.routed, name))
                for stage in self.spec.stages:
                    confidence = np.full(len(result.routed.predicted), np.nan)
                    confidence[result.scored[stage.name].rows] = result.confidence[stage.name]
                    columns[f"{stage.name}_probability"].append(confidence)
        return pd.DataFrame({name: np.concatenate(parts) for name, parts in columns.items()})

    def run(
        self,
        evalset: EvalSet,
        *,
        output: str | Path,
        shadow: bool = True,
        batch_size: int | None = None,
        overwrite: bool = False,
        progress: bool = False,
    ) -> Run:
        """Run the cascade over an eval set and keep everything in a run directory.

        Parameters
        ----------
        evalset : EvalSet
        output : path
            The run directory; it appears when the run is whole.
        shadow : bool
            Afterwards let the later stages score what a gate stopped, so that lower thresholds can be replayed.
        batch_size : int, optional
            The most texts in one batch of a stage; by default as many as are scored fastest.
        overwrite : bool
            Replace a run that is at `output` already, once this one is whole.
        progress : bool
            Show a progress bar.

        Raises
        ------
        EvalSetError
            A label that is not an answer of the cascade, naming the row.
        RunError
            `output` exists, or cannot be written.
        """
        check_labels(self.spec, evalset.examples, evalset.locations)
        texts, texts_b = evalset.texts, evalset.texts_b
        with unfinished_run(output, overwrite=overwrite) as directory:
            started, clock = datetime.now(timezone.utc), perf_counter()
            with _bar(len(texts) * len(self.stages), progress) as bar:
                results = list(self._chunks(texts, texts_b, batch_size, bar, shadow=shadow))
                routed, scored, timings = _join(results)
                serial_seconds = perf_counter() - clock
                shadowed = self._shadow(texts, texts_b, scored, batch_size, bar) if shadow else {}
            manifest = {
                "schema_version": SCHEMA_VERSION,
                "run_id": new_run_id(started),
                "source": "evaluation",
                "cascade": self.spec.to_dict(),
                "thresholds": self.spec.thresholds,
                "tuned_on": self.spec.tuned_on,
                "evalset": evalset.origin,
                "inputs": {str(path): sha256(path) for stage in self.stages for path in stage.files},
                "stages": {stage.spec.name: stage.settings for stage in self.stages},
                "batch_size": batch_size,
                "shadow": shadow,
                "seed": None,  # a run draws no random numbers
                "started": started.isoformat(timespec="seconds"),
                "serial_seconds": serial_seconds,
                "wall_seconds": perf_counter() - clock,
                **environment(),
            }
            predictions = predictions_frame(evalset.examples, routed)
            run = Run(manifest, evalset.examples, _dense(scored, shadowed, len(texts)), predictions, timings)
            run.write_into(directory)
        return Run.read(output)

    def _chunks(
        self,
        texts: Sequence[str],
        texts_b: Sequence[str | None] | None,
        batch_size: int | None,
        bar: tqdm,
        *,
        shadow: bool,
        speculate: bool = False,
    ) -> Iterator[ChunkResult]:
        """Send texts down the serial path, chunk by chunk. While one chunk is scored, the next one is tokenized."""
        chunks = [slice(start, start + CHUNK) for start in range(0, max(len(texts), 1), CHUNK)]

        def encode(chunk: slice) -> tuple[list[Encoding], float]:
            start = perf_counter()
            encodings = self.stages[0].encode(texts[chunk], None if texts_b is None else texts_b[chunk])
            return encodings, perf_counter() - start

        with ThreadPoolExecutor(1) as tokenizer_thread:
            encodings, seconds = encode(chunks[0])
            for number, chunk in enumerate(chunks):
                following = tokenizer_thread.submit(encode, chunks[number + 1]) if number + 1 < len(chunks) else None
                part = texts[chunk], None if texts_b is None else texts_b[chunk]
                speculated = self._speculate(encodings, batch_size) if speculate else {}
                try:
                    yield self._run_chunk(*part, encodings, seconds, speculated, batch_size, bar, shadow=shadow)
                finally:
                    wait(speculated.values())  # the caller may close the sessions next
                if following is not None:
                    encodings, seconds = following.result()

    def _run_chunk(
        self,
        texts: Sequence[str],
        texts_b: Sequence[str | None] | None,
        encodings: list[Encoding],
        seconds: float,
        speculated: Mapping[str, Future[np.ndarray]],
        batch_size: int | None,
        bar: tqdm,
        *,
        shadow: bool,
    ) -> ChunkResult:
        """Let each stage score, in full batches, the texts that the stage before passed on.

        `encodings` are the texts as the first stage tokenized them, in `seconds`; a later stage that tokenizes alike
        takes them as they are. `speculated` holds the logits of stages that did not wait for one another.
        """
        first = self.stages[0]
        n_labels = {stage.spec.name: len(stage.spec.labels) for stage in self.stages}
        no_rows = np.arange(0)
        scored = {name: ScoredRows(no_rows, np.empty((0, n), np.float32)) for name, n in n_labels.items()}
        confidence = {name: np.empty(0) for name in scored}
        timings: list[tuple[Any, ...]] = []
        stages = {stage.spec.name: (index, stage) for index, stage in enumerate(self.stages)}

        def score_and_decide(spec: StageSpec, rows: np.ndarray) -> StageDecision:
            index, stage = stages[spec.name]
            bar.set_description(spec.name)
            encode_seconds = 0.0
            batches: list[Batch] = []
            if spec.name in speculated:
                logits = speculated[spec.name].result()[rows]
                bar.update(len(rows))
            else:
                if stage.tokenizer.settings == first.tokenizer.settings:
                    arrived, encode_seconds = [encodings[row] for row in rows], 0.0 if index else seconds
                else:
                    start = perf_counter()
                    arrived = stage.encode(*_take(rows, texts, texts_b))
                    encode_seconds = perf_counter() - start
                logits, batches = stage.score(arrived, batch_size=batch_size, done=bar.update)
            decision = decide(spec, logits)
            scored[spec.name], confidence[spec.name] = ScoredRows(rows, logits), decision.confidence
            # All texts are tokenized before they are sorted into batches; a batch's part is its part of the tokens.
            n_tokens = max(sum(batch.n_tokens for batch in batches), 1)
            timings.extend(
                (spec.name, *batch[:3], encode_seconds * batch.n_tokens / n_tokens, batch.run_seconds)
                for batch in batches
            )
            if not shadow:  # the later stages will not score what ends here
                n_ended = int((~decision.above).sum()) if spec.is_gate else len(rows)
                bar.total -= n_ended * (len(self.stages) - 1 - index)
            return decision

        routed = route(self.spec, score_and_decide, n_examples=len(texts))
        return ChunkResult(routed, scored, confidence, timings)

    def _speculate(self, encodings: list[Encoding], batch_size: int | None) -> dict[str, Future[np.ndarray]]:
        """Let stages score texts that are one small batch in parallel; return their logits as futures."""
        first, n_tokens = self.stages[0], sum(len(encoding.input_ids) for encoding in encodings)
        is_small = len(encodings) == 1 or 0 < n_tokens <= SPECULATE_MAX_TOKENS
        if not is_small or len(encodings) > (batch_size or len(encodings)):
            return {}
        alike = [
            stage
            for stage in self.stages[: first.n_workers]
            if stage.tokenizer.settings == first.tokenizer.settings and stage.work <= first.work
        ]
        return {stage.spec.name: stage.speculate(encodings) for stage in alike} if len(alike) > 1 else {}

    def _shadow(
        self,
        texts: Sequence[str],
        texts_b: Sequence[str | None] | None,
        scored: Mapping[str, ScoredRows],
        batch_size: int | None,
        bar: tqdm,
    ) -> dict[str, ScoredRows]:
        """Score what no earlier stage let through. Nobody waits for these scores, so they are not timed."""
        shadowed = {}
        for stage in self.stages:
            rows = np.setdiff1d(np.arange(len(texts)), scored[stage.spec.name].rows)
            bar.set_description(f"{stage.spec.name} (shadow)")
            encodings = stage.encode(*_take(rows, texts, texts_b))
            logits = stage.score(encodings, batch_size=batch_size, done=bar.update)[0]
            shadowed[stage.spec.name] = ScoredRows(rows, logits)
        return shadowed


def _check_texts(texts: Any, texts_b: Any) -> tuple[list[str], list[str | None] | None]:
    """Return the texts to predict as lists; refuse what is no text, naming its place."""
    if isinstance(texts, pd.DataFrame):
        check_columns(list(texts.columns), ["text"], "the table")
        if texts_b is None and "text_b" in texts:
            second = texts["text_b"]
            texts_b = None if second.isna().all() else second.astype(object).where(second.notna(), None)
        texts = texts["text"]
    if isinstance(texts, str | bytes | Mapping):
        kind = "one str" if isinstance(texts, str) else type(texts).__name__
        raise TypeError(f"texts must be a sequence of texts, not {kind}; put it in a list")
    texts = list(texts)
    texts_b = None if texts_b is None else list(texts_b)
    for i, text in enumerate(texts):
        if not isinstance(text, str):
            raise EvalSetError(f"texts[{i}] is {shorten(repr(text), 80)}; it must be a string: drop it, or give ''")
    for i, text in enumerate(texts_b or ()):
        if not (text is None or isinstance(text, str)):
            raise EvalSetError(
                f"texts_b[{i}] is {shorten(repr(text), 80)}; it must be a string, or None for a single text"
            )
    if texts_b is not None and len(texts_b) != len(texts):
        raise EvalSetError(
            f"there are {len(texts)} texts, but {len(texts_b)} second texts; give one for each (or None)"
        )
    return texts, texts_b


def _take(
    rows: np.ndarray, texts: Sequence[str], texts_b: Sequence[str | None] | None
) -> tuple[list[str], list[str | None] | None]:
    return [texts[row] for row in rows], None if texts_b is None else [texts_b[row] for row in rows]


def _join(results: Sequence[ChunkResult]) -> tuple[pd.DataFrame, dict[str, ScoredRows], pd.DataFrame]:
    """Put the chunks of a run together: predictions, scores, and the timings with each stage's batches numbered."""
    sizes = [len(result.routed.predicted) for result in results]
    starts = np.cumsum(sizes) - sizes
    scored = {
        name: ScoredRows(
            np.concatenate([part.scored[name].rows + start for part, start in zip(results, starts, strict=True)]),
            np.concatenate([part.scored[name].logits for part in results]),
        )
        for name in results[0].scored
    }
    routed = pd.concat([result.routed.frame() for result in results], ignore_index=True)
    columns = [name for name in TIMING_COLUMNS if name != "batch"]
    timings = pd.DataFrame([row for result in results for row in result.timings], columns=columns)
    timings.insert(1, "batch", timings.groupby("stage").cumcount())
    return routed, scored, timings


def _dense(scored: Mapping[str, ScoredRows], shadowed: Mapping[str, ScoredRows], n: int) -> dict[str, StageScores]:
    """Put each stage's live and shadow scores into the rows of the examples."""
    dense = {}
    for name, live in scored.items():
        logits = np.full((n, live.logits.shape[1]), np.nan, dtype=np.float32)
        is_scored, is_shadow = np.zeros(n, dtype=bool), np.zeros(n, dtype=bool)
        logits[live.rows], is_scored[live.rows] = live.logits, True
        if name in shadowed:
            rows = shadowed[name].rows
            logits[rows], is_scored[rows], is_shadow[rows] = shadowed[name].logits, True, True
        dense[name] = StageScores(logits, is_scored, is_shadow)
    return dense


def _bar(total: int, progress: bool) -> tqdm:
    return tqdm(total=total, unit="score", disable=not progress)

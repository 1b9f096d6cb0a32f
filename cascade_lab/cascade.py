"""Runs texts through the stages in series, each stage in its own graph and session."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import ExitStack
from datetime import datetime, timezone
from pathlib import Path
from time import perf_counter
from typing import Any

import numpy as np
import pandas as pd
from tqdm.auto import tqdm

from cascade_lab.bert.tokenization import Encoding
from cascade_lab.chunks import (
    ChunkResult,
    JoinedChunks,
    dense_features,
    dense_scores,
    join_chunks,
    prediction_table,
)
from cascade_lab.decisions import StageDecision, check_labels, route
from cascade_lab.evalset import EvalSet
from cascade_lab.evalset_files import check_columns
from cascade_lab.exceptions import EvalSetError
from cascade_lab.mixed_precision import check_bounds, check_has_bounds
from cascade_lab.mixed_scoring import score_live_again, score_shadow, with_time_of
from cascade_lab.object_html import spec_html
from cascade_lab.provenance import environment, sha256
from cascade_lab.rejector import feature_evidence
from cascade_lab.run import Run
from cascade_lab.run_directory import new_run_id, unfinished_run
from cascade_lab.run_schema import SCHEMA_VERSION
from cascade_lab.run_tables import predictions_frame
from cascade_lab.spec import CascadeSpec, StageSpec
from cascade_lab.stage import Batch, Stage
from cascade_lab.stage_output import ScoredRows, StageOutput, decide_from_outputs
from cascade_lab.text import printable, shorten

CHUNK = 8192  # texts whose token ids are held at the same time; the next chunk is tokenized meanwhile
SPECULATE_MAX_TOKENS = 128  # up to this size all stages score a batch at once: half of it would load the same weights


class Cascade:
    """A loaded cascade. Make one with `Cascade.load`, and close it: its sessions hold the weights.

    Examples
    --------
    >>> with Cascade.load("cascade.toml") as cascade:               # doctest: +SKIP
    ...     cascade.predict(["what is my balance", "sing me a song"])
                     text predicted decided_by  probability  confidence  gate_probability  intent_probability
    0  what is my balance   balance     intent        0.991       0.991             0.998               0.991
    1      sing me a song       oos       gate        0.970       0.030             0.030                 NaN
    """

    def __init__(
        self,
        spec: CascadeSpec,
        stages: Sequence[Stage],
        closing: ExitStack,
        *,
        keep_features: bool,
        arrays: Mapping[str, np.ndarray],
    ):
        self.spec = spec
        self.stages = tuple(stages)
        self._closing = closing
        self._keep_features, self._arrays = keep_features, arrays
        self._no_rows = {stage.spec.name: ScoredRows(np.arange(0), stage.score([])[0]) for stage in self.stages}
        check_bounds(spec, {stage.spec.name: stage.files for stage in self.stages})

    @classmethod
    def load(
        cls, cascade: str | Path | CascadeSpec, *, keep_features: bool = False, n_workers: int | None = None
    ) -> Cascade:
        """Load every stage of a `cascade.toml` (or of a spec).

        Parameters
        ----------
        cascade : path or CascadeSpec
        keep_features : bool
            Let `run` keep each stage's features: the last layer's output at `[CLS]`.
        n_workers : int, optional
            The number of threads that score; by default one per core. See `Stage`.

        Raises
        ------
        SpecError, CheckpointError
            A stage cannot be loaded, or its precision is mixed and its bounds are missing or no longer fit; the stages
            loaded before it are closed again.
        """
        spec = cascade if isinstance(cascade, CascadeSpec) else CascadeSpec.read(cascade)
        for stage in spec.stages:
            check_has_bounds(stage)
        arrays, with_features = spec.read_arrays(), spec.feature_stages
        with ExitStack() as closing:
            stages = [
                closing.enter_context(
                    Stage(stage, features=keep_features or stage.name in with_features, n_workers=n_workers)
                )
                for stage in spec.stages
            ]
            loaded = cls(spec, stages, closing, keep_features=keep_features, arrays=arrays)
            loaded._closing = closing.pop_all()
        return loaded

    def __repr__(self) -> str:
        return printable(f"<Cascade {self.spec.name}: stages {', '.join(stage.spec.name for stage in self.stages)}>")

    def _repr_html_(self) -> str:
        return spec_html(self.spec)

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
        the later stages are no larger than the first and tokenize alike, and no stage defers.

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
            One row per text, in order: `text` (and `text_b`, if second texts are given), `predicted`, `decided_by`
            (stage), `probability` (of the answer), `confidence` (what the stage compared with its threshold), and
            `<stage>_probability`: a gate's probability of its pass label, another stage's highest probability; NaN
            where the text did not reach the stage.
        """
        texts, texts_b = _check_texts(texts, texts_b)
        with _bar(len(texts) * len(self.stages), progress) as bar:
            answers = [
                result.columns()
                for result in self._chunks(texts, texts_b, batch_size, bar, shadow=False, speculate=True)
            ]
        joined = {name: np.concatenate([columns[name] for columns in answers]) for name in answers[0]}
        return prediction_table(texts, texts_b, joined)

    def answer(self, encodings: list[Encoding], texts: list[str], texts_b: list[str | None] | None) -> ChunkResult:
        """Answer one batch as `predict` does, and return everything that was computed. A service calls this.

        Parameters
        ----------
        encodings : list of Encoding
            What `stages[0].encode(texts, texts_b)` returns. One batch: all of it is held in memory.
        texts, texts_b
            Checked by the caller; later stages that tokenize differently read them.
        """
        speculated = self._speculate(encodings, None)
        try:
            return self._run_chunk(texts, texts_b, encodings, 0.0, speculated, None, _bar(0, False), shadow=False)
        finally:
            wait(speculated.values())

    def with_spec(self, spec: CascadeSpec) -> Cascade:
        """Return this cascade with another spec of the same loaded stages: other thresholds, temperatures, rejector.

        Both share the sessions: close one of them. The caller checks that the files are the same.
        """
        return Cascade(spec, self.stages, self._closing, keep_features=self._keep_features, arrays=spec.read_arrays())

    def decide(
        self,
        stage: StageSpec,
        outputs: Mapping[str, StageOutput],
        *,
        spec: CascadeSpec | None = None,
        known: Mapping[str, np.ndarray] | None = None,
    ) -> tuple[StageDecision, dict[str, np.ndarray]]:
        """Return what `stage` decides, and its rejector's scores of features, from the outputs of all stages so far.

        Parameters
        ----------
        stage : StageSpec
        outputs : mapping of str to StageOutput
            Stage name to its output, rows of the same texts.
        spec : CascadeSpec, optional
            The cascade at other thresholds; by default this one.
        known : mapping of str to ndarray, optional
            See `decide_from_outputs`.
        """
        return decide_from_outputs(spec or self.spec, stage, outputs, self._arrays, known)

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
            Afterwards let the later stages score what ended before them, so that other thresholds can be replayed.
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
                joined = join_chunks(results)
                serial_seconds = perf_counter() - clock
                shadowed = self._shadow(texts, texts_b, joined.scored, batch_size, bar) if shadow else self._no_rows
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
            run = Run(
                manifest,
                evalset.examples,
                dense_scores(joined.scored, shadowed, len(texts)),
                predictions_frame(evalset.examples, joined.routed),
                joined.timings,
                features=dense_features(joined.scored, shadowed, len(texts)) if self._keep_features else {},
                evidence=self._evidence(joined, shadowed, len(texts)),
            )
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
        speculated: Mapping[str, Future[StageOutput]],
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
        scored = dict(self._no_rows)
        probability = {name: np.empty(0) for name in scored}
        evidence: dict[str, np.ndarray] = {}
        timings: list[tuple[Any, ...]] = []
        stages = {stage.spec.name: (index, stage) for index, stage in enumerate(self.stages)}

        def encode(stage: Stage, rows: np.ndarray) -> list[Encoding]:
            if stage.tokenizer.settings == first.tokenizer.settings:
                return [encodings[row] for row in rows]
            return stage.encode(*_take(rows, texts, texts_b))

        def score_and_decide(spec: StageSpec, rows: np.ndarray) -> StageDecision:
            index, stage = stages[spec.name]
            bar.set_description(spec.name)
            start = perf_counter()
            arrived = encode(stage, rows)
            encode_seconds = perf_counter() - start if index else seconds
            batches: list[Batch] = []
            if speculated and (index == 0 or spec.name in speculated):
                output = speculated[spec.name].result().take(rows) if index else stage.outputs(encodings)
                stage.check_finite(output.logits, arrived)
                bar.update(len(rows))
            else:
                output, batches = stage.score(arrived, batch_size=batch_size, done=bar.update)
            scored[spec.name] = ScoredRows(rows, output)
            if stage.exact is not None:
                more = score_live_again(self, stage, rows, scored, evidence, probability, arrived, encode, batch_size)
                batches = with_time_of(batches, more)
            so_far = {name: scored[name].at(rows) for name in list(scored)[: index + 1]}
            decision, values = self.decide(spec, so_far, known={name: known[rows] for name, known in evidence.items()})
            for name in values.keys() - evidence.keys():
                evidence[name] = np.full(len(texts), np.nan)
                evidence[name][rows] = values[name]
            probability[spec.name] = decision.stage_probability
            # All texts are tokenized before they are sorted into batches; a batch's part is its part of the tokens.
            n_tokens = max(sum(batch.n_tokens for batch in batches), 1)
            timings.extend(
                (spec.name, *batch[:3], encode_seconds * batch.n_tokens / n_tokens, batch.run_seconds)
                for batch in batches
            )
            if not shadow:  # the later stages will not score what ends here
                bar.total -= int(decision.ends.sum()) * (len(self.stages) - 1 - index)
            return decision

        routed = route(self.spec, score_and_decide, n_examples=len(texts))
        return ChunkResult(routed, scored, probability, evidence, timings)

    def _speculate(self, encodings: list[Encoding], batch_size: int | None) -> dict[str, Future[StageOutput]]:
        """Let later stages score texts that are one small batch, while the first one does; return them as futures.

        The first stage scores in the calling thread, which runs already: it takes time to wake a thread for it, and the
        system may put that thread on the core of another one. Not in a cascade with a deferral stage, which is there so
        that few texts are scored by the stages after it.
        """
        first, n_tokens = self.stages[0], sum(len(encoding.input_ids) for encoding in encodings)
        is_small = len(encodings) == 1 or 0 < n_tokens <= SPECULATE_MAX_TOKENS
        if not is_small or len(encodings) > (batch_size or len(encodings)):
            return {}
        if any(stage.is_deferral for stage in self.spec.stages):
            return {}
        return {
            stage.spec.name: stage.speculate(encodings)
            for stage in self.stages[1 : first.n_workers]
            if stage.tokenizer.settings == first.tokenizer.settings and stage.work <= first.work
        }

    def _evidence(self, joined: JoinedChunks, shadowed: Mapping[str, ScoredRows], n: int) -> dict[str, np.ndarray]:
        """Return the rejectors' scores of features for all texts: by name, shape (n,).

        The live values are kept as they are, so that a replay decides exactly alike: a matrix product of other rows
        would round them differently.
        """
        evidence = {name: np.full(n, np.nan) for name in self.spec.feature_evidence} | joined.evidence
        features = dense_features(joined.scored, shadowed, n) if evidence else {}
        for name, values in evidence.items():
            stage = name.rpartition(".")[0]
            missing = np.flatnonzero(np.isnan(values) & ~np.isnan(features[stage][:, 0]))
            values[missing] = feature_evidence([name], {stage: features[stage][missing]}, self._arrays)[name]
        return evidence

    def _shadow(
        self,
        texts: Sequence[str],
        texts_b: Sequence[str | None] | None,
        scored: Mapping[str, ScoredRows],
        batch_size: int | None,
        bar: tqdm,
    ) -> dict[str, ScoredRows]:
        """Score what no earlier stage let through. Nobody waits for these scores, so they are not timed."""
        shadowed: dict[str, ScoredRows] = {}
        for stage in self.stages:
            rows = np.setdiff1d(np.arange(len(texts)), scored[stage.spec.name].rows)
            bar.set_description(f"{stage.spec.name} (shadow)")
            encodings = stage.encode(*_take(rows, texts, texts_b))
            parts = {name: (scored[name], shadow) for name, shadow in shadowed.items()}
            output = score_shadow(self, stage, rows, encodings, parts, batch_size=batch_size, done=bar.update)
            shadowed[stage.spec.name] = ScoredRows(rows, output)
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


def _bar(total: int, progress: bool) -> tqdm:
    return tqdm(total=total, unit="score", disable=not progress)

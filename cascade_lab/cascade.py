"""The serial run: texts through every stage, each in its own graph and session."""

from __future__ import annotations

import secrets
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

from cascade_lab.analysis.metrics import summarize
from cascade_lab.bert.tokenization import Encoding
from cascade_lab.evalset import EvalSet
from cascade_lab.provenance import environment, sha256
from cascade_lab.run import SCHEMA_VERSION, Run, Scores, unfinished, write_json, write_tables
from cascade_lab.serial import answer, blank_answers, check_labels, settle
from cascade_lab.spec import CascadeSpec
from cascade_lab.stage import Stage

CHUNK = 8192  # texts that are held as token ids at one time, while the next are tokenized
AHEAD_TOKENS = 128  # up to which texts are one batch for all stages at once: a part takes as long to load the weights

Scored = dict[str, tuple[np.ndarray, np.ndarray]]
"""Stage name to the rows that it scored, and their logits."""


class Served(NamedTuple):
    """What the serial path made of some texts; rows count from the first of them.

    Attributes
    ----------
    answers : dict of str to ndarray
        The columns `predicted`, `decided_by`, `probability`.
    scored : Scored
    decisive : dict of str to ndarray
        What each stage's threshold was compared with, of the rows that it scored.
    timings : list of tuple
        A row of `timings.parquet` for each batch, but for its number.
    """

    answers: dict[str, np.ndarray]
    scored: Scored
    decisive: dict[str, np.ndarray]
    timings: list[tuple[Any, ...]]


class Cascade:
    """Stages in series, loaded. Make one with `Cascade.load`, and close it: its sessions hold the weights.

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
            Before any text is scored; what was opened by then is closed again.
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
        texts: Sequence[str],
        texts_b: Sequence[str | None] | None = None,
        *,
        batch_size: int | None = None,
        progress: bool = False,
    ) -> pd.DataFrame:
        """Answer any number of texts.

        Texts too few to be divided well among the processors do not wait for the first stage: the next ones, where
        they are no larger and tokenize alike, begin on other processors at once, and what they say of a text that is
        stopped before them goes unread.

        Parameters
        ----------
        texts : sequence of str
        texts_b : sequence of str or None, optional
            The second text of each pair.
        batch_size : int, optional
            The most texts in one batch of a stage; by default as many as are scored fastest.
        progress : bool
            Show a progress bar.

        Returns
        -------
        DataFrame
            A row a text, in order: `predicted`, `decided_by` (stage), `probability` (of the answer), and
            `<stage>_probability`: a gate's of its pass label, the last stage's highest; NaN where the text
            did not get that far.
        """
        if isinstance(texts, str):
            raise TypeError("texts must be a sequence of texts, not one str; put it in a list")
        texts = list(texts)
        texts_b = None if texts_b is None else list(texts_b)
        names = ["predicted", "decided_by", "probability"]
        parts: dict[str, list[np.ndarray]] = {name: [] for name in names}
        parts |= {f"{stage.name}_probability": [] for stage in self.spec.stages}
        with _bar(len(texts) * len(self.stages), progress) as bar:
            for served in self._serve(texts, texts_b, batch_size, bar, shadow=False, ahead=True):
                for name in names:
                    parts[name].append(served.answers[name])
                for stage in self.spec.stages:
                    column = np.full(len(served.answers["predicted"]), np.nan)
                    column[served.scored[stage.name][0]] = served.decisive[stage.name]
                    parts[f"{stage.name}_probability"].append(column)
        return pd.DataFrame({name: np.concatenate(columns) for name, columns in parts.items()})

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
            A label that is no answer of the cascade, naming the row.
        RunError
            `output` exists, or cannot be written.
        """
        check_labels(self.spec, evalset.examples, evalset.locations)
        examples = evalset.examples
        texts, texts_b = evalset.texts, evalset.texts_b
        with unfinished(output, overwrite=overwrite) as directory:
            started, clock = datetime.now(timezone.utc), perf_counter()
            with _bar(len(texts) * len(self.stages), progress) as bar:
                served = list(self._serve(texts, texts_b, batch_size, bar, shadow=shadow))
                answers, scored, timings = _join(served)
                serial_seconds = perf_counter() - clock
                shadowed = self._shadow(texts, texts_b, scored, batch_size, bar) if shadow else {}
            contents = write_tables(directory, examples, _merge(scored, shadowed), answers, timings)
            write_json(
                directory / "manifest.json",
                {
                    "schema_version": SCHEMA_VERSION,
                    "run_id": f"{started:%Y%m%dT%H%M%SZ}-{secrets.token_hex(3)}",
                    "cascade": self.spec.to_dict(),
                    "thresholds": self.spec.thresholds,
                    "tuned_on": self.spec.tuned_on,
                    "evalset": evalset.origin,
                    "inputs": {str(path): sha256(path) for stage in self.stages for path in stage.files},
                    "contents": contents,
                    "stages": {stage.spec.name: stage.settings for stage in self.stages},
                    "batch_size": batch_size,
                    "shadow": shadow,
                    "seed": None,  # nothing in a run is drawn by chance
                    "started": started.isoformat(timespec="seconds"),
                    "serial_seconds": serial_seconds,
                    "wall_seconds": perf_counter() - clock,
                    **environment(),
                },
            )
            write_json(directory / "metrics.json", summarize(Run(directory)))
        return Run.read(output)

    def _serve(
        self,
        texts: Sequence[str],
        texts_b: Sequence[str | None] | None,
        batch_size: int | None,
        bar: tqdm,
        *,
        shadow: bool,
        ahead: bool = False,
    ) -> Iterator[Served]:
        """Send texts down the serial path, chunk by chunk; while one is scored, the next is tokenized."""
        chunks = [slice(start, start + CHUNK) for start in range(0, max(len(texts), 1), CHUNK)]

        def encode(chunk: slice) -> tuple[list[Encoding], float]:
            start = perf_counter()
            found = self.stages[0].encode(texts[chunk], None if texts_b is None else texts_b[chunk])
            return found, perf_counter() - start

        with ThreadPoolExecutor(1) as aside:
            encoded, seconds = encode(chunks[0])
            for number, chunk in enumerate(chunks):
                following = aside.submit(encode, chunks[number + 1]) if number + 1 < len(chunks) else None
                part = texts[chunk], None if texts_b is None else texts_b[chunk]
                begun = self._begun(encoded, batch_size) if ahead else {}
                try:
                    yield self._serve_chunk(*part, encoded, seconds, begun, batch_size, bar, shadow=shadow)
                finally:
                    wait(begun.values())  # a session may be closed next
                if following is not None:
                    encoded, seconds = following.result()

    def _serve_chunk(
        self,
        texts: Sequence[str],
        texts_b: Sequence[str | None] | None,
        encoded: list[Encoding],
        seconds: float,
        begun: Mapping[str, Future[np.ndarray]],
        batch_size: int | None,
        bar: tqdm,
        *,
        shadow: bool,
    ) -> Served:
        """Let each stage score, in full batches, what the one before passed.

        `encoded` are the texts as the first stage tokenized them, in `seconds`; a later stage that would tokenize
        alike takes them as they are. `begun` are the logits of stages that did not wait for one another.
        """
        answers = blank_answers(len(texts))
        scored: Scored = {}
        decisive: dict[str, np.ndarray] = {}
        timings: list[tuple[Any, ...]] = []
        arrived = np.arange(len(texts))
        for place, stage in enumerate(self.stages, 1):
            bar.set_description(stage.spec.name)
            encode_seconds, ran = 0.0, []
            if stage.spec.name in begun:
                logits = begun[stage.spec.name].result()[arrived]
                bar.update(len(arrived))
            else:
                if stage.tokenizer.settings == self.stages[0].tokenizer.settings:
                    encodings, encode_seconds = [encoded[row] for row in arrived], seconds if place == 1 else 0.0
                else:
                    start = perf_counter()
                    encodings = stage.encode(*_taken(arrived, texts, texts_b))
                    encode_seconds = perf_counter() - start
                logits, ran = stage.score(encodings, batch_size=batch_size, done=bar.update)
            scored[stage.spec.name] = arrived, logits
            # All texts are tokenized at once, before they can be sorted; a batch's share is its share of the tokens.
            n_tokens = max(sum(batch.n_tokens for batch in ran), 1)
            timings += [
                (stage.spec.name, *batch[:3], encode_seconds * batch.n_tokens / n_tokens, batch.run_seconds)
                for batch in ran
            ]
            said = answer(stage.spec, logits)
            decisive[stage.spec.name] = said.decisive
            settle(answers, stage.spec, arrived, said)
            arrived = arrived[said.passes]
            if not shadow:  # the later stages will not see those that stopped here
                bar.total -= int((~said.passes).sum()) * (len(self.stages) - place)
        return Served(answers, scored, decisive, timings)

    def _begun(self, encoded: list[Encoding], batch_size: int | None) -> dict[str, Future[np.ndarray]]:
        """Let stages begin side by side on texts that are one small batch; return their logits, still to come."""
        first, n_tokens = self.stages[0], sum(len(encoding.input_ids) for encoding in encoded)
        is_small = len(encoded) == 1 or 0 < n_tokens <= AHEAD_TOKENS
        if not is_small or len(encoded) > (batch_size or len(encoded)):
            return {}
        alike = [
            stage
            for stage in self.stages[: first.callers]
            if stage.tokenizer.settings == first.tokenizer.settings and stage.work <= first.work
        ]
        return {stage.spec.name: stage.ahead(encoded) for stage in alike} if len(alike) > 1 else {}

    def _shadow(
        self,
        texts: Sequence[str],
        texts_b: Sequence[str | None] | None,
        scored: Scored,
        batch_size: int | None,
        bar: tqdm,
    ) -> Scored:
        """Score what no earlier stage let through; nobody waits for these, so they are not timed."""
        shadowed: Scored = {}
        for stage in self.stages:
            rows = np.setdiff1d(np.arange(len(texts)), scored[stage.spec.name][0])
            bar.set_description(f"{stage.spec.name} (shadow)")
            encodings = stage.encode(*_taken(rows, texts, texts_b))
            shadowed[stage.spec.name] = rows, stage.score(encodings, batch_size=batch_size, done=bar.update)[0]
        return shadowed


_TIMING_COLUMNS = ["stage", "n_examples", "sequence_length", "n_tokens", "tokenize_seconds", "run_seconds"]


def _taken(
    rows: np.ndarray, texts: Sequence[str], texts_b: Sequence[str | None] | None
) -> tuple[list[str], list[str | None] | None]:
    return [texts[row] for row in rows], None if texts_b is None else [texts_b[row] for row in rows]


def _join(served: Sequence[Served]) -> tuple[pd.DataFrame, Scored, pd.DataFrame]:
    """Put the chunks of a run together: answers, scores, and the table of timings, each stage's batches numbered."""
    sizes = [len(part.answers["predicted"]) for part in served]
    starts = np.cumsum(sizes) - sizes
    scored = {
        name: (
            np.concatenate([part.scored[name][0] + start for part, start in zip(served, starts, strict=True)]),
            np.concatenate([part.scored[name][1] for part in served]),
        )
        for name in served[0].scored
    }
    answers = {name: np.concatenate([part.answers[name] for part in served]) for name in served[0].answers}
    timings = pd.DataFrame([row for part in served for row in part.timings], columns=_TIMING_COLUMNS)
    timings.insert(1, "batch", timings.groupby("stage").cumcount())
    return pd.DataFrame(answers), scored, timings


def _merge(scored: Scored, shadowed: Scored) -> dict[str, Scores]:
    """Join each stage's live and shadow scores, in the order of the examples."""
    merged = {}
    for name, (rows, logits) in scored.items():
        shadow_rows, shadow_logits = shadowed.get(name, (rows[:0], logits[:0]))
        every = np.concatenate([rows, shadow_rows])
        order = np.argsort(every)
        is_shadow = np.arange(len(every)) >= len(rows)
        merged[name] = Scores(every[order], np.concatenate([logits, shadow_logits])[order], is_shadow[order])
    return merged


def _bar(total: int, progress: bool) -> tqdm:
    return tqdm(total=total, unit="score", disable=not progress)

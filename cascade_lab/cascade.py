"""The serial run: texts through every stage, each in its own graph and session."""

from __future__ import annotations

import secrets
from collections.abc import Sequence
from contextlib import ExitStack
from datetime import datetime, timezone
from pathlib import Path
from time import perf_counter
from typing import Any

import numpy as np
import pandas as pd
from tqdm.auto import tqdm

from cascade_lab.analysis.metrics import summarize
from cascade_lab.evalset import EvalSet
from cascade_lab.provenance import environment, sha256
from cascade_lab.run import SCHEMA_VERSION, Run, Scores, unfinished, write_json, write_tables
from cascade_lab.serial import answer, blank_answers, check_labels, settle
from cascade_lab.spec import CascadeSpec
from cascade_lab.stage import Stage

BATCH_SIZE = 32
CHUNK = 16_384  # texts that `predict` holds as token ids at one time: a million texts fit in little memory

Scored = dict[str, tuple[np.ndarray, np.ndarray]]
"""Stage name to the rows that it scored, and their logits."""


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
        batch_size: int = BATCH_SIZE,
        progress: bool = False,
    ) -> pd.DataFrame:
        """Answer any number of texts.

        Parameters
        ----------
        texts : sequence of str
        texts_b : sequence of str or None, optional
            The second text of each pair.
        batch_size : int
            The most texts in one batch of a stage.
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
        parts = []
        with _bar(len(texts) * len(self.stages), progress) as bar:
            for start in range(0, max(len(texts), 1), CHUNK):
                part = slice(start, start + CHUNK)
                pairs = None if texts_b is None else texts_b[part]
                answers, scored, _ = self._serve(texts[part], pairs, batch_size, bar, shadow=False)
                for stage in self.spec.stages:
                    rows, logits = scored[stage.name]
                    column = np.full(len(answers), np.nan)
                    column[rows] = answer(stage, logits).decisive
                    answers[f"{stage.name}_probability"] = column
                parts.append(answers)
        return pd.concat(parts, ignore_index=True)

    def run(
        self,
        evalset: EvalSet,
        *,
        output: str | Path,
        shadow: bool = True,
        batch_size: int = BATCH_SIZE,
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
        batch_size : int
            The most texts in one batch of a stage.
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
                answers, scored, timings = self._serve(texts, texts_b, batch_size, bar, shadow=shadow)
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
        batch_size: int,
        bar: tqdm,
        *,
        shadow: bool,
    ) -> tuple[pd.DataFrame, Scored, pd.DataFrame]:
        """Send texts down the serial path: each stage scores, in full batches, what the one before passed."""
        table = blank_answers(len(texts))
        scored: Scored = {}
        timings = []
        arrived = np.arange(len(texts))
        for place, stage in enumerate(self.stages, 1):
            bar.set_description(stage.spec.name)
            logits, batches = _score(stage, arrived, texts, texts_b, batch_size, bar)
            scored[stage.spec.name] = arrived, logits
            timings += batches
            said = answer(stage.spec, logits)
            settle(table, stage.spec, arrived, said)
            arrived = arrived[said.passes]
            if not shadow:  # the later stages will not see those that stopped here
                bar.total -= int((~said.passes).sum()) * (len(self.stages) - place)
        return pd.DataFrame(table), scored, pd.DataFrame(timings, columns=_TIMING_COLUMNS)

    def _shadow(
        self,
        texts: Sequence[str],
        texts_b: Sequence[str | None] | None,
        scored: Scored,
        batch_size: int,
        bar: tqdm,
    ) -> Scored:
        """Score what no earlier stage let through; nobody waits for these, so they are not timed."""
        shadowed: Scored = {}
        for stage in self.stages:
            rows = np.setdiff1d(np.arange(len(texts)), scored[stage.spec.name][0])
            bar.set_description(f"{stage.spec.name} (shadow)")
            shadowed[stage.spec.name] = rows, _score(stage, rows, texts, texts_b, batch_size, bar)[0]
        return shadowed


_TIMING_COLUMNS = [
    "stage",
    "batch",
    "n_examples",
    "sequence_length",
    "n_tokens",
    "tokenize_seconds",
    "run_seconds",
]


def _score(
    stage: Stage,
    rows: np.ndarray,
    texts: Sequence[str],
    texts_b: Sequence[str | None] | None,
    batch_size: int,
    bar: tqdm,
) -> tuple[np.ndarray, list[tuple[Any, ...]]]:
    """Score `texts[rows]` in batches of like length.

    Returns
    -------
    logits : ndarray of float32, shape (len(rows), n_labels)
        In the order of `rows`.
    timings : list of tuple
        A row of `timings.parquet` for each batch. All texts are tokenized at once, before they can be sorted;
        a batch's share of that time is its share of the tokens.
    """
    start = perf_counter()
    encodings = stage.encode([texts[row] for row in rows], None if texts_b is None else [texts_b[row] for row in rows])
    tokenize_seconds = perf_counter() - start
    lengths = np.array([len(encoding.input_ids) for encoding in encodings], dtype=int)
    # Longest first: the batch that needs most memory is the first to ask for it.
    order = np.argsort(-lengths, kind="stable")
    logits = np.empty((len(rows), len(stage.spec.labels)), dtype=np.float32)
    timings = []
    for number, first in enumerate(range(0, len(order), batch_size)):
        batch = order[first : first + batch_size]
        start = perf_counter()
        logits[batch] = stage.logits([encodings[i] for i in batch])
        run_seconds = perf_counter() - start
        n_tokens = int(lengths[batch].sum())
        share = n_tokens / lengths.sum()
        timings.append(
            (
                stage.spec.name,
                number,
                len(batch),
                int(lengths[batch].max()),
                n_tokens,
                tokenize_seconds * share,
                run_seconds,
            )
        )
        bar.update(len(batch))
    return logits, timings


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

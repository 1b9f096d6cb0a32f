"""Scores a sample of the input, and says how long the whole job would take and how large its output would be."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from pathlib import Path
from time import perf_counter
from typing import Any, NamedTuple

import numpy as np

from cascade_lab.batch.inputs import find_files
from cascade_lab.batch.job import job_options, planned, shards_of
from cascade_lab.batch.plan import Unreadable
from cascade_lab.batch.reading import Piece
from cascade_lab.batch.shards import Settings
from cascade_lab.by_block import n_cores
from cascade_lab.spec import CascadeSpec

N_TEXTS = 1000
N_PLACES = 10
"""The sample consists of this number of parts, at equal distances."""


class Estimate(NamedTuple):
    """What a job would take on this machine.

    Attributes
    ----------
    n_texts, n_files, n_shards : int
        Of the input.
    unreadable : tuple of Unreadable
    n_measured : int
        The texts that were scored.
    n_errors : int
        Those of them that cannot be scored.
    texts_per_second : float
    seconds : float
        Of the whole input, at this rate.
    n_bytes : int
        Of the whole output.
    """

    n_texts: int
    n_files: int
    n_shards: int
    unreadable: tuple[Unreadable, ...]
    n_measured: int
    n_errors: int
    texts_per_second: float
    seconds: float
    n_bytes: int


def dry_run(
    cascade: str | Path,
    inputs: Sequence[str | Path],
    *,
    workers: int | None = None,
    threads: int | None = None,
    progress: bool = False,
    **options: Any,
) -> Estimate:
    """Measure a thousand texts, with as many threads as the job would have; nothing stays on the disk.

    The texts are scored twice, and the second time counts: at first TensorFlow prepares each shape of a batch.

    Parameters
    ----------
    cascade, inputs, workers, threads, progress
        As `job.score` has them.
    **options
        Those of `job.score` about columns, what is kept, and shards.
    """
    from cascade_lab.batch.scoring import load_for_scoring, score_shard
    from cascade_lab.serving.live_cascade import cascade_digest

    spec, checked = CascadeSpec.read(cascade), job_options(**options)
    n_threads = (workers or max(1, n_cores() // (threads or 1))) * (threads or 1)
    with tempfile.TemporaryDirectory(prefix="cascade-lab-") as folder:
        plan = planned(find_files(inputs), Path(folder), checked, workers=n_threads, progress=progress)
        settings = Settings(
            str(Path(cascade).resolve()),
            cascade_digest(spec),
            tuple(checked["keep"]),
            checked["sample"],
            checked["shadow"],
            folder,
        )
        shards = shards_of(plan)
        places = np.unique(np.linspace(0, len(shards) - 1, min(N_PLACES, len(shards))).round().astype(int))
        n_each = -(-N_TEXTS // len(places))
        samples = [_first_rows(shards[i].pieces, n_each) for i in places]
        files = {path: None for i in places for path in zip(shards[i].files, shards[i].sha256, strict=True)}
        known = list(files)
        pieces = [
            piece._replace(file=known.index((shards[i].files[piece.file], shards[i].sha256[piece.file])))
            for i, own in zip(places, samples, strict=True)
            for piece in own
        ]
        sample = shards[0]._replace(
            pieces=tuple(pieces), files=tuple(file for file, _ in known), sha256=tuple(one for _, one in known)
        )
        block = max(1, -(-sample.n_rows // n_threads))
        with load_for_scoring(settings) as loaded:
            for _ in range(2):
                start = perf_counter()
                manifest = score_shard(loaded, sample, settings, threads=n_threads, block=block)
                seconds = perf_counter() - start
        n_measured = manifest["n_texts"]
        n_bytes = sum(part["n_bytes"] for part in manifest["parts"].values())
    rate = n_measured / seconds
    return Estimate(
        plan.n_rows,
        len(plan.files),
        len(shards),
        plan.unreadable,
        n_measured,
        manifest["n_errors"],
        rate,
        plan.n_rows / rate,
        round(n_bytes / n_measured * plan.n_rows),
    )


def _first_rows(pieces: Sequence[Piece], n: int) -> list[Piece]:
    taken: list[Piece] = []
    for piece in pieces:
        if n <= 0:
            break
        taken.append(piece._replace(stop=min(piece.stop, piece.start + n)))
        n -= taken[-1].stop - taken[-1].start
    return taken

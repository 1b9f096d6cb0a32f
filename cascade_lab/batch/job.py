"""A scoring job: its plan in a folder, the shards that are still to be scored, and what it says at the end."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path
from time import perf_counter
from typing import Any

from tqdm.auto import tqdm

from cascade_lab.atomic import write_json
from cascade_lab.batch.inputs import InputFile, digest, find_files
from cascade_lab.batch.plan import Plan, Unreadable, make_plan
from cascade_lab.batch.plan_file import PLAN, plan_from_dict, plan_to_dict
from cascade_lab.batch.shards import Settings, Shard, read_shard_manifest
from cascade_lab.batch.summary import Counts
from cascade_lab.by_block import n_cores
from cascade_lab.exceptions import CascadeLabError, RunError
from cascade_lab.json_files import read_object
from cascade_lab.locks import lock
from cascade_lab.provenance import environment
from cascade_lab.spec import CascadeSpec

MANIFEST = "manifest.json"
KEPT = ("scores", "features")
MAX_NAMED = 3
"""How many files a note names."""


@dataclass(frozen=True)
class ScoringResult:
    """What a job scored, and what is missing.

    Attributes
    ----------
    folder : Path
    counts : Counts
        Of all shards that are done.
    n_planned : int
        The rows of the input.
    n_new : int
        The rows that this call scored.
    seconds : float
        How long this call took from the first shard on.
    unreadable : tuple of Unreadable
        Files that could not be read when the job was planned; they are left out.
    failed : dict of int to str
        Shards that could not be scored, and why; the same command tries them again.
    notes : tuple of str
    """

    folder: Path
    counts: Counts
    n_planned: int
    n_new: int
    seconds: float
    unreadable: tuple[Unreadable, ...]
    failed: dict[int, str]
    notes: tuple[str, ...]

    @property
    def is_whole(self) -> bool:
        """Whether every row of every file was scored or has its error."""
        return not self.unreadable and not self.failed


def score(
    cascade: str | Path,
    inputs: Sequence[str | Path],
    output: str | Path,
    *,
    text_column: str = "text",
    id_column: str | None = None,
    make_ids: bool = False,
    keep: Sequence[str] = (),
    sample: float = 1.0,
    shadow: bool = True,
    shard_rows: int | None = None,
    workers: int | None = None,
    threads: int | None = None,
    ray: str | None = None,
    progress: bool = False,
) -> ScoringResult:
    """Score files of texts of any size; a job that was interrupted goes on where it was.

    In a script, call this under `if __name__ == "__main__":`, since it starts processes.

    Parameters
    ----------
    cascade : path
        A `cascade.toml`.
    inputs : sequence of str or path
        Files (parquet, csv, tsv, JSON lines) or folders of them, as paths or URIs; see `find_files`.
    output : path
        A new folder, or that of an earlier call with the same arguments.
    text_column, id_column, make_ids, shard_rows
        See `make_plan`.
    keep : sequence of str
        Keep "scores" and "features" of the texts, for `Run.read_scores`.
    sample : float
        Keep them of this share of the texts only, which a hash of the id chooses.
    shadow : bool
        Let every stage score the kept texts, so that other thresholds can be replayed.
    workers, threads : int, optional
        The number of processes (or of Ray's actors), and the threads of each. By default one process with one thread
        per core. The output does not depend on them.
    ray : str, optional
        The address of a Ray cluster, or "local"; without it the processes run on this machine.
    progress : bool
        Show a progress bar.

    Raises
    ------
    CascadeLabError
        An input or the output cannot be used, or the job in `output` is of another cascade or of other inputs.
    """
    spec, options = (
        CascadeSpec.read(cascade),
        job_options(text_column, id_column, make_ids, keep, sample, shadow, shard_rows),
    )
    if ray is not None:
        from cascade_lab.batch.ray_engine import check_ray, check_reachable

        check_ray()
        check_reachable(ray)
    folder = Path(os.path.abspath(output))
    _check_folder(folder)
    with lock(folder, "scoring job", RunError):
        from cascade_lab.serving.live_cascade import cascade_digest  # loads TensorFlow

        digest_ = cascade_digest(spec)
        found = find_files(inputs)
        if (folder / PLAN).exists():
            plan, content = _resumed(folder, cascade, digest_, options, found)
        else:
            plan, content = _planned(
                folder, cascade, spec, digest_, options, found, min(workers or n_cores(), n_cores()), progress
            )
        settings = Settings(
            str(Path(cascade).resolve()), digest_, tuple(options["keep"]), sample, options["shadow"], str(folder)
        )
        known = {file.file.path for file in plan.files} | {file.path for file in plan.unreadable}
        late = [file.name for file in found if file.path not in known]
        shards = shards_of(plan)
        done = [shard for shard in shards if read_shard_manifest(folder, shard.number, digest_) is not None]
        numbers = {shard.number for shard in done}
        todo = [shard for shard in shards if shard.number not in numbers]
        clock, n_new, failed = perf_counter(), 0, dict[int, str]()
        if todo:
            with _Bar(plan.n_rows, sum(shard.n_rows for shard in done), progress) as bar:
                failed = _engine(ray, workers, threads)(todo, settings, bar.add)
                n_new = bar.n_new
        seconds = perf_counter() - clock
        late += [file.name for file in find_files(inputs) if file.path not in known and file.name not in late]
        counts = _sum(folder, [shard for shard in shards if shard.number not in failed], digest_)
        notes = tuple(_notes(late, counts))
        result = ScoringResult(folder, counts, plan.n_rows, n_new, seconds, plan.unreadable, failed, notes)
        if not failed:
            _write_manifest(folder, content, result)
        return result


def _engine(
    ray: str | None, workers: int | None, threads: int | None
) -> Callable[[list[Shard], Settings, Callable[[int, int], object]], dict[int, str]]:
    if ray is not None:
        from cascade_lab.batch.ray_engine import score_on_ray

        return lambda shards, settings, done: score_on_ray(
            shards, settings, address=ray, workers=workers, threads=threads or 1, done=done
        )
    from cascade_lab.batch.local import score_locally

    n_workers = workers or max(1, n_cores() // (threads or 1))
    n_threads = threads or max(1, n_cores() // n_workers)
    return lambda shards, settings, done: score_locally(
        shards, settings, workers=n_workers, threads=n_threads, done=done
    )


def job_options(
    text_column: str,
    id_column: str | None,
    make_ids: bool,
    keep: Sequence[str],
    sample: float,
    shadow: bool,
    shard_rows: int | None,
) -> dict[str, Any]:
    for name in keep:
        if name not in KEPT:
            raise CascadeLabError(f"--keep {name}: is not kept; give {' or '.join(KEPT)}, or both with a comma")
    if "features" in keep and "scores" not in keep:
        raise CascadeLabError("--keep features: a run needs the scores too; give --keep scores,features")
    if not 0 < sample <= 1:
        raise CascadeLabError(f"--sample {sample}: must be above 0 and at most 1")
    if sample < 1 and not keep:
        raise CascadeLabError("--sample: says of how many texts scores are kept; add --keep scores")
    if make_ids and id_column is not None:
        raise CascadeLabError("--make-ids and --id-column exclude each other; omit one of them")
    return {
        "text_column": text_column,
        "id_column": id_column,
        "make_ids": make_ids,
        "keep": [name for name in KEPT if name in keep],
        "sample": sample,
        "shadow": bool(keep) and shadow,
        "shard_rows": shard_rows,
    }


def _check_folder(folder: Path) -> None:
    """Raise RunError where the output is something else than a new folder or a job's."""
    if not os.path.lexists(folder):
        return
    if not folder.is_dir():
        raise RunError(f"{folder}: exists and is no folder; choose another --output")
    left = [path.name for path in folder.iterdir() if not path.name.startswith(".planning-")]
    if left and PLAN not in left:
        raise RunError(f"{folder}: exists and is not the output of a scoring job; choose another --output")


def _planned(
    folder: Path,
    cascade: str | Path,
    spec: CascadeSpec,
    digest_: str,
    options: dict[str, Any],
    found: list[InputFile],
    workers: int,
    progress: bool,
) -> tuple[Plan, dict[str, Any]]:
    from cascade_lab.latency_benchmark import stage_digests

    folder.mkdir(parents=True, exist_ok=True)
    for left in folder.glob(".planning-*"):
        shutil.rmtree(left)
    try:
        plan = planned(found, folder, options, workers=workers, progress=progress)
        content = {
            "schema_version": 1,
            "cascade_file": str(Path(cascade).resolve()),
            "cascade_digest": digest_,
            "cascade": spec.to_dict(),
            "thresholds": spec.thresholds,
            "tuned_on": spec.tuned_on,
            "inputs": stage_digests(spec),
            "options": options,
            "planned": datetime.now(timezone.utc).isoformat(timespec="seconds"),
            **plan_to_dict(plan),
            **environment(),
        }
        write_json(folder / PLAN, content, error=RunError)
    except BaseException:
        if not any(folder.iterdir()):
            folder.rmdir()
        raise
    return plan, content


def planned(found: list[InputFile], folder: Path, options: dict[str, Any], *, workers: int, progress: bool) -> Plan:
    """Make the plan of a job; `folder` takes the hashes of the ids meanwhile."""
    n_bytes = sum(file.size for file in found)
    with (
        tempfile.TemporaryDirectory(prefix=".planning-", dir=folder) as hashes,
        tqdm(total=n_bytes, unit="B", unit_scale=True, desc="reading", disable=not progress, leave=False) as bar,
    ):
        return make_plan(
            found,
            Path(hashes),
            text_column=options["text_column"],
            id_column=options["id_column"],
            make_ids=options["make_ids"],
            shard_rows=options["shard_rows"],
            workers=workers,
            done=bar.update,
        )


def _resumed(
    folder: Path, cascade: str | Path, digest_: str, options: dict[str, Any], found: list[InputFile]
) -> tuple[Plan, dict[str, Any]]:
    """Read the plan of a job that is to go on; refuse where the cascade, an option or an input is another."""
    content = read_object(folder / PLAN, error=RunError, way_out="choose another --output")
    plan = plan_from_dict(content, folder / PLAN)
    other = "choose another --output"
    if content["cascade_digest"] != digest_:
        raise RunError(f"{folder}: was begun with another cascade than {cascade} is now; put it back, or {other}")
    for key, value in options.items():
        if content["options"].get(key) != value:
            option = key.replace("_", "-")
            raise RunError(f"{folder}: was begun with {option} {content['options'].get(key)}, not {value}; {other}")
    now = {file.path: file for file in found}
    if not now.keys() & {file.file.path for file in plan.files}:
        raise RunError(f"{folder}: was begun with other inputs; give the same ones, or {other}")
    files = []
    for scanned in plan.files:
        file = now.get(scanned.file.path)
        if file is None:
            raise RunError(f"{scanned.file.name}: was an input when the job began and is gone; put it back, or {other}")
        if file[2:] != scanned.file[2:] and (file.size != scanned.file.size or digest(file) != scanned.sha256):
            raise RunError(f"{scanned.file.name}: was changed since the job began; put it back, or {other}")
        files.append(scanned._replace(file=scanned.file._replace(modified_ns=file.modified_ns)))
    return Plan(tuple(files), plan.unreadable, plan.columns, plan.id_type, plan.shards), content


def shards_of(plan: Plan) -> list[Shard]:
    shards = []
    for number, pieces in enumerate(plan.shards):
        own = list(dict.fromkeys(piece.file for piece in pieces))
        files = [plan.files[i] for i in own]
        moved = tuple(piece._replace(file=own.index(piece.file)) for piece in pieces)
        shards.append(
            Shard(
                number,
                moved,
                tuple(file.file for file in files),
                tuple(file.sha256 for file in files),
                plan.columns,
                plan.id_type,
            )
        )
    return shards


def _sum(folder: Path, shards: Sequence[Shard], digest_: str) -> Counts:
    counts = Counts.empty([])
    for shard in shards:
        manifest = read_shard_manifest(folder, shard.number, digest_)
        if manifest is None:
            raise RunError(f"{folder}: shard {shard.number} has no manifest; run the same command again")
        counts.add(Counts.from_dict(manifest))
    return counts


def _notes(late: Sequence[str], counts: Counts) -> Sequence[str]:
    notes = []
    if late:
        shown = ", ".join(late[:MAX_NAMED]) + (f" and {len(late) - MAX_NAMED:,} more" if len(late) > MAX_NAMED else "")
        notes.append(
            f"{len(late):,} files came after the job was planned, and are left out: {shown}; score them into another "
            "--output"
        )
    if counts.n_errors:
        common = "; ".join(f"{reason}: {n:,}" for reason, n in counts.errors.most_common(MAX_NAMED))
        notes.append(f"{counts.n_errors:,} rows could not be scored ({common}); see the column error of predictions")
    return notes


def _write_manifest(folder: Path, content: dict[str, Any], result: ScoringResult) -> None:
    """Write what the whole job scored. The rate is that of the call that ended it."""
    kept = ("schema_version", "cascade", "cascade_digest", "thresholds", "tuned_on", "inputs", "options", "planned")
    manifest = {
        **{key: content[key] for key in kept},
        "finished": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "n_files": len(content["files"]),
        "n_shards": len(content["shards"]),
        "unreadable": content["unreadable"],
        "texts_per_second": result.n_new / result.seconds if result.n_new else None,
        **result.counts.to_dict(),
        **environment(),
    }
    path = folder / MANIFEST
    if not path.exists() or result.n_new:
        write_json(path, manifest, error=RunError)


class _Bar:
    """A progress bar in texts, with errors."""

    def __init__(self, total: int, done: int, progress: bool):
        self._bar = tqdm(total=total, initial=done, unit=" texts", desc="scoring", disable=not progress, smoothing=0.1)
        self.n_new = self._n_errors = 0

    def add(self, n_texts: int, n_errors: int) -> None:
        self.n_new += n_texts
        self._n_errors += n_errors
        if self._n_errors:
            self._bar.set_postfix(errors=self._n_errors, refresh=False)
        self._bar.update(n_texts)

    def __enter__(self) -> _Bar:
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.close()

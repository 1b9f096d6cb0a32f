"""The engine on a Ray cluster: Ray Data hands shards to actors; each writes its shard's files and returns counts."""

from __future__ import annotations

import logging
import pickle
import socket
from collections.abc import Callable, Sequence
from contextlib import suppress
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np

from cascade_lab.batch.shards import Settings, Shard, read_shard_manifest
from cascade_lab.exceptions import CascadeLabError, EvalSetError, RunError
from cascade_lab.text import shorten


def check_ray() -> None:
    """Raise CascadeLabError where Ray is not installed."""
    if find_spec("ray") is None:
        raise CascadeLabError("--ray needs Ray; install it: pip install 'cascade-lab[ray]'")


def check_reachable(address: str) -> None:
    """Raise RunError where nobody answers at HOST:PORT. Ray itself would wait for a minute and end the process."""
    host, colon, port = address.rpartition(":")
    if address in ("auto", "local"):
        return
    if not colon or not port.isdigit() or "/" in host:
        raise RunError(f"--ray {address}: is no address of a cluster; give auto, HOST:PORT, or local")
    try:
        socket.create_connection((host, int(port)), timeout=10).close()
    except (OSError, OverflowError) as error:
        raise RunError(
            f"--ray {address}: cannot be reached ({error}); start Ray there, or give another address"
        ) from error


def score_on_ray(
    shards: Sequence[Shard],
    settings: Settings,
    *,
    address: str,
    workers: int | None,
    threads: int,
    done: Callable[[int, int], object] = lambda n_texts, n_errors: None,
) -> dict[int, str]:
    """Score shards on a Ray cluster, of which every node sees the same paths.

    Ray begins the task of a lost actor or node again. A shard whose manifest is there is not scored twice.

    Parameters
    ----------
    shards, settings, done
        As `local.score_locally` has them.
    address : str
        "auto" or "HOST:PORT"; "local" starts Ray on this machine.
    workers : int, optional
        The number of actors; by default as many as the cluster has processors for.
    threads : int
        The processors of an actor, and its threads that score.

    Raises
    ------
    CascadeLabError
        The cluster cannot be reached, the cascade cannot be loaded, or the output cannot be written.
    """
    import ray

    failed: dict[int, str] = {}
    try:
        ray.init(
            address=None if address == "local" else address,
            ignore_reinit_error=True,
            log_to_driver=False,
            logging_level=logging.ERROR,
        )
    except Exception as error:  # Ray has no class of its own for a cluster that does not answer in time
        raise RunError(
            f"--ray {address}: cannot be reached ({_cause(error)}); start it, or give another address"
        ) from error
    try:
        if workers is None:
            workers = max(1, int(ray.cluster_resources().get("CPU", 1)) // threads)
        context = ray.data.DataContext.get_current()
        context.max_errored_blocks = 0  # a shard that is left out silently would be a hole in the output
        context.enable_progress_bars = False
        logging.getLogger("ray.data").setLevel(logging.ERROR)
        rows = [{"shard": pickle.dumps(shard)} for shard in shards]
        scored = ray.data.from_items(rows, override_num_blocks=len(rows)).map_batches(
            ShardScorer,
            batch_size=1,
            compute=ray.data.ActorPoolStrategy(min_size=1, max_size=min(workers, len(rows))),
            num_cpus=threads,
            fn_constructor_args=(settings, threads),
        )
        for row in scored.iter_rows():
            if row["reason"]:
                failed[int(row["shard"])] = str(row["reason"])
            else:
                done(int(row["n_texts"]), int(row["n_errors"]))
    except (ray.exceptions.RayError, ConnectionError, RuntimeError) as error:
        raise RunError(f"Ray: {_cause(error)}; the same command goes on where it was") from error
    finally:
        with suppress(Exception):
            ray.shutdown()
    return failed


class ShardScorer:
    """An actor: loads the cascade once, and scores one shard per call."""

    def __init__(self, settings: Settings, threads: int):
        from cascade_lab.batch.scoring import load_for_scoring

        self._settings, self._threads = settings, threads
        self._cascade = load_for_scoring(settings)

    def __call__(self, batch: dict[str, np.ndarray]) -> dict[str, Any]:
        """Score the shards of a batch; return what is counted."""
        from cascade_lab.batch.scoring import score_shard

        columns: dict[str, list[Any]] = {"shard": [], "n_texts": [], "n_errors": [], "reason": []}
        for pickled in batch["shard"]:
            shard: Shard = pickle.loads(pickled)
            counts, reason = {"n_texts": 0, "n_errors": 0}, ""
            try:
                done = read_shard_manifest(Path(self._settings.folder), shard.number, self._settings.digest)
                counts = done or score_shard(self._cascade, shard, self._settings, threads=self._threads)
            except EvalSetError as error:
                reason = str(error)
            row = (shard.number, counts["n_texts"], counts["n_errors"], reason)
            for column, value in zip(columns.values(), row, strict=True):
                column.append(value)
        return columns


def _cause(error: BaseException) -> str:
    """Return the message of the package's own error inside one of Ray's, or the last line of another."""
    inner: BaseException | None = error
    while inner is not None:
        cause = getattr(inner, "cause", None) or inner.__cause__
        if isinstance(inner, CascadeLabError) and not isinstance(inner, RunError):
            return str(inner)
        inner = cause if isinstance(cause, BaseException) and cause is not inner else None
    lines = [line for line in str(error).splitlines() if line.strip()]
    return shorten(lines[-1] if lines else type(error).__name__, 300)

"""The embedded engine: processes on this machine, each with the cascade loaded once, take shards from a queue."""

from __future__ import annotations

import os
import signal
import threading
from collections import Counter, deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from multiprocessing import connection, get_context, parent_process
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from typing import Any

from tqdm import tqdm

from cascade_lab.batch.shards import Settings, Shard
from cascade_lab.exceptions import CascadeLabError, EvalSetError, RunError

MAX_ATTEMPTS = 3
"""How often a shard is tried whose worker was killed, or whose input could not be read, before it is left out."""

SECONDS_TO_END = 30


@dataclass
class _Worker:
    process: BaseProcess
    connection: Connection
    shard: Shard | None = None
    is_loaded: bool = False
    n_texts: int = 0  # of the present shard that are scored
    n_errors: int = 0


def score_locally(
    shards: Sequence[Shard],
    settings: Settings,
    *,
    workers: int,
    threads: int,
    done: Callable[[int, int], object] = lambda n_texts, n_errors: None,
) -> dict[int, str]:
    """Score shards in processes of this machine. A killed process is replaced, and its shard is begun again.

    Parameters
    ----------
    shards : sequence of Shard
    settings : Settings
    workers : int
        The number of processes.
    threads : int
        The number of threads of each that score.
    done : callable
        Called with numbers of rows, and of those that cannot be scored; negative ones where a shard begins again.

    Returns
    -------
    dict of int to str
        The shards that could not be scored, and why.

    Raises
    ------
    CascadeLabError
        The cascade cannot be loaded, or the output cannot be written.
    """
    waiting, failed = deque(shards), dict[int, str]()
    attempts: Counter[int] = Counter()
    running: dict[Connection, _Worker] = {}
    n_dead_at_start = 0

    def again(worker: _Worker, reason: str) -> None:
        """Put the shard of a worker back, or leave it out."""
        shard = worker.shard
        if shard is None:
            return
        attempts[shard.number] += 1
        done(-worker.n_texts, -worker.n_errors)
        worker.shard, worker.n_texts, worker.n_errors = None, 0, 0
        if attempts[shard.number] < MAX_ATTEMPTS:
            waiting.append(shard)
        else:
            failed[shard.number] = reason

    try:
        while waiting or any(worker.shard for worker in running.values()):
            n_idle = sum(worker.shard is None for worker in running.values())
            for _ in range(min(workers - len(running), len(waiting) - n_idle)):
                worker = _start(settings, threads)
                running[worker.connection] = worker
            for ready in connection.wait(list(running)):
                worker = running[ready]  # type: ignore[index]
                try:
                    kind, *values = worker.connection.recv()
                except (EOFError, OSError):
                    worker.process.join()
                    del running[worker.connection]
                    n_dead_at_start = 0 if worker.is_loaded else n_dead_at_start + 1
                    ended = _ended(worker.process)
                    if n_dead_at_start >= MAX_ATTEMPTS:
                        raise RunError(
                            f"a worker {ended} while it loaded the cascade, {MAX_ATTEMPTS} times; give fewer --workers "
                            "if memory is short"
                        ) from None
                    again(worker, f"its worker {ended}, {MAX_ATTEMPTS} times; run the same command again")
                    continue
                if kind == "scored":
                    worker.n_texts += values[0]
                    worker.n_errors += values[1]
                    done(*values)
                    continue
                if kind == "stop":
                    raise values[0]
                if kind == "unreadable":
                    again(worker, values[0])
                worker.is_loaded = True
                worker.shard, worker.n_texts, worker.n_errors = None, 0, 0
                if waiting:
                    worker.shard = waiting.popleft()
                    worker.connection.send(worker.shard)
        for worker in running.values():
            worker.connection.close()  # it ends by itself
        for worker in running.values():
            worker.process.join(SECONDS_TO_END)
    finally:
        for worker in running.values():
            worker.process.kill()  # what is half written is not yet at its name
            worker.process.join()
    return failed


def _start(settings: Settings, threads: int) -> _Worker:
    context = get_context("spawn")
    own, other = context.Pipe()
    process = context.Process(target=_work, args=(other, settings, threads), daemon=True, name="cascade-lab score")
    process.start()
    other.close()
    return _Worker(process, own)


def _ended(process: BaseProcess) -> str:
    code = process.exitcode
    return f"was ended by signal {-code}" if code is not None and code < 0 else f"ended with exit code {code}"


def _work(pipe: Connection, settings: Settings, threads: int) -> None:
    """Score the shards that come through a pipe, until it is closed."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches all processes; the first one ends the others
    threading.Thread(target=_end_with_parent, daemon=True).start()
    os.environ.setdefault("RAYON_NUM_THREADS", str(threads))  # of the tokenizer
    tqdm.set_lock(threading.RLock())  # its own lock is a semaphore of the system, which a killed process leaves behind

    def send(*values: Any) -> None:
        pipe.send(values)

    try:
        from cascade_lab.batch.scoring import load_for_scoring, score_shard

        with load_for_scoring(settings) as cascade:
            send("ready")
            while True:
                shard = pipe.recv()
                try:
                    score_shard(cascade, shard, settings, threads=threads, done=lambda n, m: send("scored", n, m))
                except EvalSetError as error:
                    send("unreadable", str(error))
                else:
                    send("done")
    except (EOFError, BrokenPipeError):
        return
    except CascadeLabError as error:
        send("stop", error)


def _end_with_parent() -> None:
    """End this process when the first one has ended, however that ended."""
    parent = parent_process()
    if parent is not None:
        connection.wait([parent.sentinel])
        os._exit(1)

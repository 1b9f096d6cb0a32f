"""The service under load over loopback: every answer right, none lost, none doubled, whatever happens meanwhile."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import numpy as np
import psutil
import pytest
from helpers import texts
from http_client import Connection, predict_body

from cascade_lab import Cascade
from cascade_lab.serving.collect import collect
from cascade_lab.serving.server import TRIM_SECONDS
from cascade_lab.spec import CascadeSpec

pytestmark = pytest.mark.slow
N_REQUESTS = int(os.environ.get("SERVING_REQUESTS", "100000"))
COMMAND = [sys.executable, "-c", "from cascade_lab.cli import main; main()"]
POOL = texts(500, seed=11)
SIZES, SHARES = [1, 2, 5, 20, 100], [0.6, 0.2, 0.1, 0.08, 0.02]


@contextmanager
def serving(cascade: Path, *options: object) -> Iterator[tuple[subprocess.Popen, int]]:
    """Run `cascade-lab serve` in a process of its own; yield the process and its port."""
    with open(cascade.parent / "serve.log", "w") as log:
        command = [*COMMAND, "serve", cascade, "--port", "0", *options]
        process = subprocess.Popen(list(map(str, command)), stdout=subprocess.PIPE, stderr=log, text=True)
        try:
            line = process.stdout.readline()
            yield process, int(line.split()[1].rpartition(":")[2])
        finally:
            process.kill()
            process.wait()


def cascades(spec: CascadeSpec) -> dict[str, CascadeSpec]:
    """Return a cascade, the same at another threshold, and one whose models are loaded anew."""
    short = tuple(replace(stage, max_seq_length=12) for stage in spec.stages)
    return {"given": spec, "strict": spec.with_thresholds({"gate": 0.9}), "short": replace(spec, stages=short)}


@pytest.fixture(scope="module")
def answers(tiny) -> dict[str, list[dict]]:
    """What each of `cascades` predicts for `POOL`, row by row."""
    found = {}
    for name, spec in cascades(CascadeSpec.read(tiny)).items():
        with Cascade.load(spec) as loaded:
            found[name] = loaded.predict(POOL).to_dict("records")
    return found


class Load:
    """Sends requests of mixed sizes from several connections, and checks each answer against `predict`'s."""

    def __init__(self, answers: dict[str, list[dict]]):
        self.answers = answers
        self.statuses: dict[int, int] = {}
        self.answered: list[str] = []
        self.seconds: list[float] = []
        self.n_cut_off = 0

    def check(self, rows: list[int], ids: list[str], content: bytes, names: tuple[str, ...]) -> None:
        """Check that one of the cascades gave all answers of a request."""
        answers = json.loads(content)["answers"]
        assert [answer["id"] for answer in answers] == ids
        for name in names:
            expected = [self.answers[name][row] for row in rows]
            if all(
                (answer["predicted"], answer["decided_by"]) == (row["predicted"], row["decided_by"])
                and abs(answer["probability"] - row["probability"]) < 1e-5
                and abs(answer["confidence"] - row["confidence"]) < 1e-5
                for answer, row in zip(answers, expected, strict=True)
            ):
                return
        raise AssertionError(f"no cascade gives {answers} for {rows}")

    async def client(self, port: int, number: int, n: int, names: tuple[str, ...]) -> None:
        rng = np.random.default_rng(number)
        async with Connection(port) as connection:
            for request in range(n):
                rows = rng.integers(0, len(POOL), rng.choice(SIZES, p=SHARES)).tolist()
                ids = [f"{number}.{request}.{i}" for i in range(len(rows))]
                started = time.perf_counter()
                try:
                    status, content = await connection.post(predict_body([POOL[row] for row in rows], ids))
                except (ConnectionError, asyncio.IncompleteReadError):
                    self.n_cut_off += 1
                    return
                self.seconds.append(time.perf_counter() - started)
                self.statuses[status] = self.statuses.get(status, 0) + 1
                if status == 200:
                    self.check(rows, ids, content, names)
                    self.answered += ids

    def run(self, port: int, *, n: int, connections: int = 32, names: tuple[str, ...] = ("given",)) -> None:
        async def clients() -> None:
            await asyncio.gather(*[self.client(port, number, n // connections, names) for number in range(connections)])

        asyncio.run(clients())


@contextmanager
def every(seconds: float, action: Callable[[int], object]) -> Iterator[None]:
    """Call `action` with 0, 1, 2, … in a thread meanwhile."""
    stop = threading.Event()

    def act() -> None:
        number = 0
        while not stop.wait(seconds):
            action(number)
            number += 1

    thread = threading.Thread(target=act)
    thread.start()
    yield
    stop.set()
    thread.join()


def settled_memory(process: subprocess.Popen) -> int:
    """Return the resident size, in bytes, after the service has returned what it no longer uses."""
    time.sleep(TRIM_SECONDS + 1)
    return psutil.Process(process.pid).memory_info().rss


def test_every_answer_equals_predict_none_is_lost_none_doubled(tiny, answers):
    load, n_first = Load(answers), N_REQUESTS * 2 // 5  # TensorFlow keeps a program for each shape that it has run
    with serving(tiny) as (process, port):
        load.run(port, n=n_first)
        memory = settled_memory(process)
        load.run(port, n=N_REQUESTS)
        grown = settled_memory(process) / memory
    assert load.statuses == {200: N_REQUESTS // 32 * 32 + n_first // 32 * 32}
    assert load.n_cut_off == 0
    print(f"{len(load.answered)} texts; memory {grown:.3f}; p50 {np.median(load.seconds) * 1000:.1f} ms")
    assert grown < 1.06  # 1.03 was measured: rare shapes are still seen for the first time; equal texts add nothing


def test_reloads_every_second_drop_nothing(tiny, answers, tmp_path):
    spec, path = CascadeSpec.read(tiny), tmp_path / "cascade.toml"
    spec.write(path)
    load, variants = Load(answers), list(cascades(spec).values())
    with serving(path) as (process, port):

        def reload(number: int) -> None:
            if number % 4 == 3:
                path.write_text("name = ")  # refused
            else:
                variants[number % 4].write(path)
            process.send_signal(signal.SIGHUP)

        with every(1.0, reload):
            load.run(port, n=N_REQUESTS // 4, names=("given", "strict", "short"))
    assert set(load.statuses) == {200}
    assert load.n_cut_off == 0
    assert len(set(load.answered)) == len(load.answered)


def test_sigterm_in_the_middle_answers_what_was_accepted(tiny, answers, tmp_path):
    for round_number in range(5):
        folder = tmp_path / f"log{round_number}"
        load = Load(answers)
        with serving(tiny, "--log", folder) as (process, port):
            threading.Timer(1 + 0.3 * round_number, process.send_signal, [signal.SIGTERM]).start()
            load.run(port, n=10**6)
            assert process.wait(60) == 0
        assert set(load.statuses) <= {200, 503}
        logged = collect(folder).run.examples["example_id"].tolist()
        assert len(set(logged)) == len(logged)
        assert set(logged) == set(load.answered), "accepted, answered and logged are the same texts"


def test_a_full_queue_refuses_and_the_rest_is_right(tiny, answers):
    load = Load(answers)
    with serving(tiny, "--max-waiting-texts", 40) as (_, port):
        load.run(port, n=N_REQUESTS // 10, connections=64)
    assert set(load.statuses) == {200, 429}
    assert load.n_cut_off == 0
    assert load.statuses[200] > load.statuses[429] / 100  # a refused client asks again at once


def test_a_full_log_disk_stops_the_log_and_not_the_service(tiny, answers, small_disk):
    load = Load(answers)
    with serving(tiny, "--log", small_disk) as (_, port):
        load.run(port, n=max(N_REQUESTS // 20, 2000))
    assert set(load.statuses) == {200}
    assert load.n_cut_off == 0

"""Measure `cascade-lab serve` over loopback against `Cascade.predict`, and against LitServe and Ray Serve.

    python tests/benchmarks/serve.py --clinc150 ../shared/clinc150 --folder runs/benchmarks [--quick]

`Cascade.predict` runs in a process of its own, on the same texts. All take turns, round by round, so that a drift of
the machine affects all of them; the median round counts. The load generator runs on the same cores. Besides the time
that passed, the processor's time of all processes is kept: it tells the same where other programs disturb the clock.
LitServe and Ray Serve serve the same two models through OpenVINO. A short qualifying round finds the best setting of
each. They are started for each round anew, since their processes use the processor while they wait.
`serving.json` in the folder has every round.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from importlib.metadata import version
from itertools import cycle, product
from pathlib import Path
from time import perf_counter, process_time, sleep
from typing import Any

import numpy as np
import psutil

sys.path.insert(0, str(Path(__file__).parents[1]))
from http_client import Connection, predict_body
from run import HINTS

from cascade_lab import EvalSet
from cascade_lab.provenance import environment
from cascade_lab.serving.server import TRIM_SECONDS

HERE = Path(__file__).parent
COMMAND = [sys.executable, "-c", "from cascade_lab.cli import main; main()"]
MANY, LARGE, LONE = "one text, 64 connections", "32 texts, 8 connections", "one text, one connection"
LOADS = {LARGE: (32, 8), MANY: (1, 64), LONE: (1, 1)}
CALLS_32, CALLS_1, HALF = "predict, calls of 32", "predict, calls of 1", "one text, half of the saturating load"
HOSTILE = "one text, one connection, beside hostile clients"

# The settings that each peer has to choose among: how long a batch waits, and how OpenVINO uses the cores. LitServe's
# `fast_queue` was no faster in the three pairs that were tried.
SETTINGS = [{"batch": 64, "wait": wait, "openvino": hint} for wait, hint in product((0.001, 0.005), HINTS)]
PEERS: dict[str, list[dict[str, Any]]] = {"litserve": SETTINGS, "ray": SETTINGS}


class Baseline:
    """`Cascade.predict` in calls of a size, in a process of its own."""

    def __init__(self, cascade: Path, evalset: Path):
        command = [sys.executable, __file__, "--baseline", str(cascade), str(evalset)]
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        self.process.stdout.readline()

    def measure(self, size: int, n_texts: int) -> dict[str, Any]:
        self.process.stdin.write(f"{size} {n_texts}\n")
        self.process.stdin.flush()
        return json.loads(self.process.stdout.readline())


def baseline(cascade: Path, evalset: Path) -> None:
    from cascade_lab import Cascade

    texts = shuffled(evalset)
    with Cascade.load(cascade) as loaded:
        for size in (1, 32):
            loaded.predict(texts[:size])
        print("ready", flush=True)
        for line in sys.stdin:
            size, n_texts = map(int, line.split())
            seconds, processor = [], process_time()
            for first in range(0, n_texts, size):
                start = perf_counter()
                loaded.predict(texts[first : first + size])
                seconds.append(perf_counter() - start)
            print(json.dumps(summary(seconds, sum(seconds), n_texts, process_time() - processor)), flush=True)


def summary(seconds: list[float], total: float, n_texts: int, processor: float) -> dict[str, Any]:
    p50, p99 = np.quantile(seconds, [0.5, 0.99])
    return {
        "texts_per_second": n_texts / total,
        "texts_per_processor_second": n_texts / processor,
        "p50_ms": 1000 * p50,
        "p99_ms": 1000 * p99,
    }


class Service:
    """A service on a port of this machine, and all its processes."""

    def __init__(self, process: subprocess.Popen, port: int):
        self.process, self.port = process, port
        self.about = psutil.Process(process.pid)

    def processes(self) -> list[psutil.Process]:
        with suppress(psutil.NoSuchProcess):
            return [self.about, *self.about.children(recursive=True)]
        return []

    def processor_seconds(self) -> float:
        """Return the processor's time of the service and of this process, which makes the load."""
        times = [process.cpu_times() for process in self.processes()]
        return sum(time.user + time.system for time in times) + process_time()

    def measure(self, texts: list[str], size: int, connections: int) -> dict[str, Any]:
        """Send requests of `size` texts, one after another on each connection."""
        bodies = iter([predict_body(texts[first : first + size]) for first in range(0, len(texts), size)])
        seconds: list[float] = []

        async def client() -> None:
            async with Connection(self.port) as connection:
                for body in bodies:
                    start = perf_counter()
                    status, _ = await connection.post(body)
                    assert status == 200, status
                    seconds.append(perf_counter() - start)

        async def clients() -> None:
            await asyncio.gather(*[client() for _ in range(connections)])

        start, processor = perf_counter(), self.processor_seconds()
        asyncio.run(clients())
        return summary(seconds, perf_counter() - start, len(texts), self.processor_seconds() - processor)

    def measure_open(self, texts: list[str], rate: float, seed: int) -> dict[str, Any]:
        """Send single texts at random times, `rate` a second, whatever the service does; times count from then on."""
        rng = np.random.default_rng(seed)
        times = np.cumsum(rng.exponential(1 / rate, len(texts)))
        seconds: list[float] = []
        free: list[Connection] = []

        async def send(text: str, due: float) -> None:
            connection = free.pop() if free else await Connection(self.port).__aenter__()
            status, _ = await connection.post(predict_body([text]))
            assert status == 200, status
            seconds.append(perf_counter() - due)
            free.append(connection)

        async def clients() -> None:
            start, tasks = perf_counter(), []
            for text, time in zip(texts, times, strict=True):
                await asyncio.sleep(max(0.0, start + time - perf_counter()))
                tasks.append(asyncio.create_task(send(text, start + time)))
            await asyncio.gather(*tasks)

        start, processor = perf_counter(), self.processor_seconds()
        asyncio.run(clients())
        return summary(seconds, perf_counter() - start, len(texts), self.processor_seconds() - processor)

    def answers(self, texts: list[str]) -> list[str]:
        async def ask() -> bytes:
            async with Connection(self.port) as connection:
                return (await connection.post(predict_body(texts)))[1]

        return [answer["predicted"] for answer in json.loads(asyncio.run(ask()))["answers"]]

    def memory_mb(self) -> float:
        return self.about.memory_info().rss / 2**20

    def stop(self) -> None:
        processes = self.processes()
        self.process.terminate()
        psutil.wait_procs(processes, timeout=3)
        for process in processes:
            with suppress(psutil.NoSuchProcess):
                process.kill()
        self.process.wait()


def ours(cascade: Path, log: Path) -> Service:
    """Start `cascade-lab serve`."""
    command = [*COMMAND, "serve", str(cascade), "--port", "0"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=log.open("w"), text=True)
    return Service(process, int(process.stdout.readline().split()[1].rpartition(":")[2]))


@contextmanager
def peer(kind: str, folder: Path, settings: dict[str, Any]) -> Iterator[Service]:
    """Start a peer, and wait until it answers."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    command = [sys.executable, str(HERE / f"serve_{kind}.py"), str(folder), str(port), json.dumps(settings)]
    with (folder / f"{kind}.log").open("w") as log:
        service = Service(subprocess.Popen(command, stdout=log, stderr=log), port)
    try:
        for _ in range(600):
            with suppress(ConnectionError, asyncio.IncompleteReadError, KeyError, ValueError):
                service.answers(["what is my balance"])
                break
            if service.process.poll() is not None:
                raise SystemExit(f"{kind} ended; see {folder / f'{kind}.log'}")
            sleep(0.2)
        yield service
    finally:
        service.stop()


def hostile(port: int) -> None:
    """Send what no good client sends, from seven connections at a time, until this process is stopped.

    It has the lowest priority, since it shares the cores: what it costs the service counts, not its own work.
    """
    os.nice(19)
    head = b"POST /predict HTTP/1.1\r\nHost: a\r\n"
    good = predict_body(["what is my balance"])
    bodies = {
        "deep": b"[" * 200_000,
        "deep texts": b'{"texts": [' + b"[" * 200_000,
        "NUL": b"\x00" * 1000,
        "surrogate": b'{"texts": ["\\ud800"]}',
        "50 MB": b"x" * 50_000_000,
    }
    contents = {name: [head + b"Content-Length: %d\r\n\r\n" % len(body), body] for name, body in bodies.items()}
    contents["slow"] = [b"%c" % byte for byte in head]
    contents["pipelined"] = [(head + b"Content-Length: %d\r\n\r\n" % len(good) + good) * 50]

    async def repeat(parts: list[bytes], pause: float) -> None:
        while True:
            with suppress(ConnectionError, asyncio.IncompleteReadError, asyncio.TimeoutError):
                reader, writer = await asyncio.open_connection("127.0.0.1", port)
                for part in parts:
                    writer.write(part)
                    await asyncio.sleep(pause)
                await asyncio.wait_for(reader.read(2**20), 15)
                writer.close()
            await asyncio.sleep(0.05)

    async def all_of_them() -> None:
        await asyncio.gather(*[repeat(parts, 0.3 if name == "slow" else 0) for name, parts in contents.items()])

    asyncio.run(all_of_them())


def shuffled(evalset: Path) -> list[str]:
    texts = EvalSet.read(evalset, split="test").texts
    return [texts[row] for row in np.random.default_rng(0).permutation(len(texts))]


def measure(clinc150: Path, folder: Path, *, rounds: int, n_texts: int, n_requests: tuple[int, int]) -> dict[str, Any]:
    cascade, evalset, log = clinc150 / "cascade.toml", clinc150 / "data_full.json", folder / "serve.log"
    texts, prepared = shuffled(evalset), folder / "clinc150"
    results: dict[str, list[dict[str, Any]]] = {}

    def keep(name: str, result: dict[str, Any]) -> dict[str, Any]:
        results.setdefault(name, []).append(result)
        print(f"{name}: {result}", file=sys.stderr, flush=True)
        return result

    best, equal = _best_settings(prepared, texts, cascade, log)
    reference, service = Baseline(cascade, evalset), ours(cascade, log)
    try:
        service.measure(texts[:256], 32, 8)
        for number in range(rounds):
            keep(CALLS_32, reference.measure(32, n_texts))
            for name, (size, connections) in LOADS.items():
                keep(name, service.measure(texts[: n_texts if connections > 1 else 200], size, connections))
            keep(CALLS_1, reference.measure(1, 200))
            rate = results[MANY][-1]["texts_per_second"] / 2
            keep(HALF, service.measure_open(texts[: n_texts // 2], rate, number))
            for kind, settings in best.items():
                with peer(kind, prepared, settings) as other:
                    other.measure(texts[:256], 1, 64)
                    keep(f"{kind}: {MANY}", other.measure(texts[: n_texts // 2], 1, 64))
        for _ in range(rounds):
            keep("alone", service.measure(texts[: n_texts // 4], 1, 1))
            attack = subprocess.Popen([sys.executable, __file__, "--hostile", str(service.port)])
            sleep(1)
            keep(HOSTILE, service.measure(texts[: n_texts // 4], 1, 1))
            attack.kill()
            attack.wait()
        many, memory = cycle(texts), []
        for n in n_requests:
            service.measure([next(many) for _ in range(n)], 1, 64)
            sleep(TRIM_SECONDS + 1)  # until the service has returned what it no longer uses
            memory.append(service.memory_mb())
    finally:
        service.stop()
        reference.process.terminate()
    medians = {
        name: {key: float(np.median([row[key] for row in rows])) for key in rows[0]} for name, rows in results.items()
    }
    return {
        "ratios": _ratios(medians) | {f"memory after {n_requests[1]:,} / {n_requests[0]:,}": memory[1] / memory[0]},
        "medians": medians,
        "rounds": results,
        "peers": {kind: {"version": version(kind), "settings": best[kind], "equal": equal[kind]} for kind in best},
        "memory_mb": memory,
        "environment": environment(),
    }


def _best_settings(
    prepared: Path, texts: list[str], cascade: Path, log: Path
) -> tuple[dict[str, dict[str, Any]], dict[str, float]]:
    """Return the setting of each peer with the most texts a second, and the share of answers that are as ours."""
    best, equal = {}, {}
    service = ours(cascade, log)
    expected = service.answers(texts[:320])
    service.stop()
    for kind, choices in PEERS.items():
        rates = []
        for settings in choices:
            with peer(kind, prepared, settings) as other:
                equal[kind] = float(
                    np.mean([a == b for a, b in zip(other.answers(texts[:320]), expected, strict=True)])
                )
                other.measure(texts[:128], 1, 64)
                rates.append(other.measure(texts[:640], 1, 64)["texts_per_second"])
            print(kind, settings, rates[-1], file=sys.stderr, flush=True)
        best[kind] = choices[int(np.argmax(rates))]
    return best, equal


def _ratios(medians: dict[str, dict[str, float]]) -> dict[str, float]:
    calls, lone = medians[CALLS_32], medians[LONE]
    ratios = {
        f"{name} / {CALLS_32} ({key})": medians[name][key] / calls[key]
        for name in (LARGE, MANY)
        for key in ("texts_per_second", "texts_per_processor_second")
    }
    for key in ("texts_per_second", "texts_per_processor_second"):
        theirs = max(medians[f"{kind}: {MANY}"][key] for kind in PEERS)
        ratios[f"{MANY} / the better peer ({key})"] = medians[MANY][key] / theirs
    ratios["one text, one connection: p50 ms above predict's"] = lone["p50_ms"] - medians[CALLS_1]["p50_ms"]
    ratios["half of the saturating load: p99 / p50 of one text alone"] = medians[HALF]["p99_ms"] / lone["p50_ms"]
    ratios["p99 beside hostile clients / alone"] = medians[HOSTILE]["p99_ms"] / medians["alone"]["p99_ms"]
    return ratios


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--baseline", nargs=2, type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--hostile", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--clinc150", type=Path)
    parser.add_argument("--folder", type=Path)
    parser.add_argument("--quick", action="store_true", help="few texts and one round: to see that it works")
    arguments = parser.parse_args()
    if arguments.baseline:
        return baseline(*arguments.baseline)
    if arguments.hostile:
        return hostile(arguments.hostile)
    amount: dict[str, Any] = {"rounds": 5, "n_texts": 3840, "n_requests": (2_000, 200_000)}
    if arguments.quick:
        amount = {"rounds": 1, "n_texts": 320, "n_requests": (100, 200)}
    if not (arguments.folder / "clinc150" / "onnx").is_dir():
        prepare = [sys.executable, str(HERE / "prepare.py"), arguments.clinc150, arguments.folder, "--without-base"]
        subprocess.run(list(map(str, prepare)), check=True, stdout=subprocess.DEVNULL)
    results = measure(arguments.clinc150, arguments.folder, **amount)
    (arguments.folder / "serving.json").write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    print(json.dumps(results["ratios"], indent=1))
    return None


if __name__ == "__main__":
    main()

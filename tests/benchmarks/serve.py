"""Measure `cascade-lab serve` over loopback against `Cascade.predict` in a process of its own, on the same texts.

    python tests/benchmarks/serve.py --clinc150 ../shared/clinc150 --output tests/benchmarks/serving.json [--quick]

The two take turns, round by round, so that a drift of the machine affects both; the median round counts. The load
generator runs on the same cores. Besides the time that passed, the processor's time of each process is kept: it tells
the same where other programs disturb the clock.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import subprocess
import sys
from itertools import cycle
from pathlib import Path
from time import perf_counter, process_time
from typing import Any

import numpy as np
import psutil

sys.path.insert(0, str(Path(__file__).parents[1]))
from http_client import Connection, predict_body

from cascade_lab import EvalSet
from cascade_lab.provenance import environment

COMMAND = [sys.executable, "-c", "from cascade_lab.cli import main; main()"]
LOADS = {"32 texts, 8 connections": (32, 8), "one text, 64 connections": (1, 64), "one text, one connection": (1, 1)}


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
    """`cascade-lab serve` in a process of its own."""

    def __init__(self, cascade: Path, log: Path):
        command = [*COMMAND, "serve", str(cascade), "--port", "0"]
        self.process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=log.open("w"), text=True)
        self.port = int(self.process.stdout.readline().split()[1].rpartition(":")[2])
        self.about = psutil.Process(self.process.pid)

    def processor_seconds(self) -> float:
        times = self.about.cpu_times()
        return times.user + times.system + process_time()

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

    def memory_mb(self) -> float:
        return self.about.memory_info().rss / 2**20


def shuffled(evalset: Path) -> list[str]:
    texts = EvalSet.read(evalset, split="test").texts
    return [texts[row] for row in np.random.default_rng(0).permutation(len(texts))]


def measure(cascade: Path, evalset: Path, *, rounds: int, n_texts: int, n_requests: tuple[int, int], log: Path) -> Any:
    texts = shuffled(evalset)
    reference, service = Baseline(cascade, evalset), Service(cascade, log)
    results: dict[str, list[dict[str, Any]]] = {}

    def keep(name: str, result: dict[str, Any]) -> dict[str, Any]:
        results.setdefault(name, []).append(result)
        print(f"{name}: {result}", file=sys.stderr, flush=True)
        return result

    try:
        service.measure(texts[:256], 32, 8)
        for number in range(rounds):
            keep("predict, calls of 32", reference.measure(32, n_texts))
            for name, (size, connections) in LOADS.items():
                saturated = keep(name, service.measure(texts[: n_texts if connections > 1 else 200], size, connections))
                if connections == 64:
                    rate = saturated["texts_per_second"] / 2
            keep("predict, calls of 1", reference.measure(1, 200))
            keep("one text, half of the saturating load", service.measure_open(texts[: n_texts // 2], rate, number))
        many, memory = cycle(texts), []
        for n in n_requests:
            service.measure([next(many) for _ in range(n)], 1, 64)
            memory.append(service.memory_mb())
    finally:
        for process in (service.process, reference.process):
            process.terminate()
            process.wait()
    middle = {
        name: {key: float(np.median([row[key] for row in rows])) for key in rows[0]} for name, rows in results.items()
    }
    calls, one, lone = (middle[name] for name in ("predict, calls of 32", "predict, calls of 1", list(LOADS)[2]))
    ratios = {
        f"{name} / predict, calls of 32 ({key})": middle[name][key] / calls[key]
        for name in list(LOADS)[:2]
        for key in ("texts_per_second", "texts_per_processor_second")
    }
    ratios["one text, one connection: p50 ms above predict's"] = lone["p50_ms"] - one["p50_ms"]
    half = middle["one text, half of the saturating load"]
    ratios["half of the saturating load: p99 / p50 of one text alone"] = half["p99_ms"] / lone["p50_ms"]
    ratios[f"memory after {n_requests[1]:,} requests / after {n_requests[0]:,}"] = memory[1] / memory[0]
    return {"ratios": ratios, "medians": middle, "rounds": results, "memory_mb": memory, "environment": environment()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--baseline", nargs=2, type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--clinc150", type=Path)
    parser.add_argument("--output", type=Path)
    parser.add_argument("--quick", action="store_true", help="few texts and one round: to see that it works")
    arguments = parser.parse_args()
    if arguments.baseline:
        baseline(*arguments.baseline)
        return
    amount: dict[str, Any] = {"rounds": 5, "n_texts": 3840, "n_requests": (2_000, 200_000)}
    if arguments.quick:
        amount = {"rounds": 1, "n_texts": 320, "n_requests": (100, 200)}
    folder = arguments.clinc150
    log = arguments.output.with_suffix(".log")
    results = measure(folder / "cascade.toml", folder / "data_full.json", log=log, **amount)
    arguments.output.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    print(json.dumps(results["ratios"], indent=1))


if __name__ == "__main__":
    main()

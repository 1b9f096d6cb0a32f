"""Kills processes that write a traffic log, at random moments, and looks at what `collect` reads.

A process with other threads should not fork, so this is a script: `python tests/killed_services.py FOLDER N SECONDS`.
It prints one JSON object per kill: how many texts were logged, how many of them `collect` finds, and the age in seconds
of the oldest one that it does not find, at the moment of the kill.
"""

from __future__ import annotations

import json
import os
import random
import signal
import struct
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
from helpers import answered_batches, mixed_run

from cascade_lab.exceptions import RunError
from cascade_lab.serving.collect import collect
from cascade_lab.serving.traffic_log import TrafficLog


def serve(folder: Path, number: int, report: int) -> None:
    """Log texts until the process is killed; report the time of each batch before it is logged, and its ids."""
    batches = answered_batches(mixed_run(0), max_size=5)
    log = TrafficLog(folder, keep_texts=True, shadow=0.1, max_bytes=30_000)
    count = 0
    while True:
        for batch in batches:
            ids = [f"{number}-{count + i}" for i in range(len(batch.ids))]
            count += len(ids)
            now = time.time()
            log.add(replace(batch, ids=ids, times=np.full(len(ids), now)))
            os.write(report, struct.pack("<dq", now, count))
            time.sleep(0.002)


def main(folder: Path, n_kills: int, seconds: float) -> None:
    rng = random.Random(0)
    for number in range(n_kills):
        log = folder / f"log-{number // 5}"  # a folder has several killed services
        reader, writer = os.pipe()
        pid = os.fork()
        if pid == 0:
            serve(log, number, writer)
        os.close(writer)
        content = os.read(reader, 16)  # it has begun
        time.sleep(rng.uniform(0, seconds))
        killed = time.time()
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        while part := os.read(reader, 65536):
            content += part
        os.close(reader)
        try:
            examples = collect(log).run.examples
            found = {one for one in examples["example_id"] if one.startswith(f"{number}-")}
        except RunError:  # the first process of a folder may be killed before it has written anything
            if number % 5 or killed - struct.unpack("<dq", content[:16])[0] > 1:
                raise
            found = set()
        lost, before = [], 0
        for when, count in struct.iter_unpack("<dq", content[: len(content) // 16 * 16]):
            lost += [when for i in range(before, count) if f"{number}-{i}" not in found]
            before = count
        result = {"n": before, "n_found": len(found), "oldest": killed - min(lost) if lost else 0.0}
        print(json.dumps(result), flush=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), float(sys.argv[3]))

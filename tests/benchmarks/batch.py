"""Measure `cascade-lab score` against `Cascade.predict`, its memory, Ray, and the commands that read kept scores.

    python tests/benchmarks/batch.py --folder runs/benchmarks [--parts rates,large,ids,kept] [--rates 200000 --rounds 3]

`rates`: `predict` in one call, two processes of the embedded engine and two actors of a local Ray cluster score the
same texts, in turns; the median round counts, and the start of processes counts too. `large`: the embedded engine's
memory (the proportional set size of all its processes, looked at twice a second) for a tenth of the texts and for all.
`ids`: how long the search for ids that occur twice takes. `kept`: time and memory of what reads a run of 150 labels,
of a tenth of the texts and of all; the runs stay in the folder for the next time.
Texts are those of the demo with a number behind each, so that no two are equal. `batch.json` has every round.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
import threading
from contextlib import suppress
from importlib.util import find_spec
from pathlib import Path
from statistics import median
from time import perf_counter, sleep
from typing import Any

import numpy as np
import pandas as pd
import psutil
import pyarrow as pa
import pyarrow.parquet as pq

from cascade_lab import CascadeSpec, EvalSet, Run
from cascade_lab.provenance import environment

DATA = Path(__file__).parents[2] / "data"
COMMAND = [sys.executable, "-m", "cascade_lab"]
PARTS = ("rates", "large", "ids", "kept")
PREDICT = """
import sys, time, pyarrow.parquet as pq
from cascade_lab import Cascade
texts = pq.read_table(sys.argv[2])["text"].to_pylist()
with Cascade.load(sys.argv[1]) as cascade:
    cascade.predict(texts[:2000])
    start = time.perf_counter()
    cascade.predict(texts)
    print(time.perf_counter() - start)
"""
GIB = 2**30


def numbered(n: int, path: Path) -> Path:
    """Write `n` different texts as parquet."""
    if not path.exists():
        texts = EvalSet.read(DATA / "test.tsv").texts
        order = np.random.default_rng(0).permutation(n) % len(texts)
        table = pa.table({"id": pa.array(range(n)), "text": [f"{texts[row]} {i}" for i, row in enumerate(order)]})
        pq.write_table(table, path, row_group_size=100_000)
    return path


def run(command: list[str], *, sum_memory: bool = True) -> tuple[float, float, str]:
    """Run a command; return seconds, its peak memory in bytes, and what it printed.

    `sum_memory` adds the proportional set sizes of it and its children; otherwise the resident size of it alone counts.
    """
    start, peak = perf_counter(), 0
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    watched = psutil.Process(process.pid)

    def watch() -> None:
        nonlocal peak
        while process.poll() is None:
            total = 0
            with suppress(psutil.Error, OSError):
                for one in [watched, *(watched.children(recursive=True) if sum_memory else ())]:
                    with suppress(psutil.Error, OSError):
                        total += one.memory_full_info().pss if sum_memory else one.memory_info().rss
            peak = max(peak, total)
            sleep(0.5 if sum_memory else 0.05)

    thread = threading.Thread(target=watch)
    thread.start()
    output = process.communicate()[0]
    thread.join()
    if process.returncode:
        raise SystemExit(f"{' '.join(command)}: exit code {process.returncode}\n{output[-3000:]}")
    return perf_counter() - start, peak, output


def score(cascade: Path, texts: Path, folder: Path, *options: str) -> tuple[float, float]:
    """Score a file; return the seconds from the start of its engine on, and the peak memory."""
    shutil.rmtree(folder, ignore_errors=True)
    n = pq.ParquetFile(texts).metadata.num_rows
    _, peak, _ = run([*COMMAND, "score", str(cascade), str(texts), "--output", str(folder), *options])
    rate = json.loads((folder / "manifest.json").read_text())["texts_per_second"]
    return n / rate, peak


def rates(folder: Path, n: int, rounds: int) -> dict[str, Any]:
    texts, cascade = numbered(n, folder / f"texts-{n}.parquet"), DATA / "cascade.toml"
    seconds: dict[str, list[float]] = {"predict": [], "embedded": [], "ray": []}
    for number in range(1, rounds + 1):
        print(f"rates: round {number} of {rounds}", flush=True)
        seconds["predict"].append(float(run([sys.executable, "-c", PREDICT, str(cascade), str(texts)])[2].split()[-1]))
        seconds["embedded"].append(score(cascade, texts, folder / "scored", "--workers", "2")[0])
        if find_spec("ray"):
            options = ("--workers", "2", "--ray", "local")
            seconds["ray"].append(score(cascade, texts, folder / "scored-ray", *options)[0])
    rate = {name: n / median(values) for name, values in seconds.items() if values}
    result: dict[str, Any] = {"n_texts": n, "seconds": seconds, "texts_per_second": rate}
    result["embedded_against_predict"] = rate["embedded"] / rate["predict"]
    if "ray" in rate:
        result["ray_against_embedded"] = rate["ray"] / rate["embedded"]
    return result


def large(folder: Path, n: int) -> dict[str, Any]:
    rows = []
    for size in (n // 10, n):
        print(f"large: {size:,} texts", flush=True)
        texts = numbered(size, folder / f"texts-{size}.parquet")
        seconds, peak = score(DATA / "cascade.toml", texts, folder / "scored", "--workers", "2")
        rows.append({"n_texts": size, "seconds": seconds, "texts_per_second": size / seconds, "peak_bytes": peak})
    return {"runs": rows, "memory_against_a_tenth": rows[1]["peak_bytes"] / rows[0]["peak_bytes"]}


def ids(folder: Path, n: int) -> dict[str, Any]:
    from cascade_lab.batch.inputs import find_files
    from cascade_lab.batch.plan import make_plan

    files = find_files([numbered(n, folder / f"texts-{n}.parquet")])
    seconds = {}
    for name, make_ids in (("reading", True), ("reading and ids", False)):
        with tempfile.TemporaryDirectory() as hashes:
            start = perf_counter()
            make_plan(files, Path(hashes), make_ids=make_ids)
            seconds[name] = perf_counter() - start
    return {"n_texts": n, "seconds": seconds}


def kept_runs(folder: Path, n: int, n_labels: int) -> list[str]:
    """Return two runs of `n` texts with random logits of two stages, labelled; made where they are not there yet."""
    paths = [folder / f"kept-{name}-{n}" for name in ("a", "b")]
    if all(path.exists() for path in paths):
        return [str(path) for path in paths]
    rng, labels = np.random.default_rng(0), [f"label {i}" for i in range(n_labels)]
    stages = [
        {"name": "gate", "labels": ["oos", "in"], "pass_label": "in", "threshold": 0.5},
        {"name": "intent", "labels": labels, "reject_label": "oos"},
    ]
    spec = CascadeSpec.from_dict({"name": "kept", "stage": stages})
    truth = rng.integers(-n_labels // 10, n_labels, n).clip(-1)
    y_true = np.array([*labels, "oos"], dtype=object)[truth]
    for path in paths:
        logits = rng.normal(size=(n, n_labels)).astype(np.float32)
        is_in = truth >= 0
        logits[np.flatnonzero(is_in), truth[is_in]] += 4
        gate = rng.normal(size=(n, 2)).astype(np.float32)
        gate[np.arange(n), is_in.astype(int)] += 2.5
        examples = pd.DataFrame({"text": [f"text {i}" for i in range(n)], "label": y_true})
        made = Run.from_logits(spec, examples, {"gate": gate, "intent": logits})
        made.write(path, overwrite=True)
        del made, logits, gate, examples
    return [str(path) for path in paths]


def kept(folder: Path, n: int, n_labels: int = 150) -> dict[str, Any]:
    """Time each command on runs of `n` texts: seconds, and the peak memory as a ratio to the logits of its runs."""
    print(f"kept: {n:,} texts, {n_labels} labels", flush=True)
    a, b = kept_runs(folder, n, n_labels)
    read = f"from cascade_lab import Run; Run.read({a!r}).replay({{'gate': 0.7}})"
    (folder / "tuned.toml").unlink(missing_ok=True)
    commands = {
        "Run.read and replay": [sys.executable, "-c", read],
        "tune": [
            *COMMAND,
            "tune",
            a,
            "--maximize",
            "accuracy",
            "--output",
            str(folder / "tuned.toml"),
            "--write-anyway",
        ],
        "report": [*COMMAND, "report", a],
        "compare": [*COMMAND, "compare", a, b],
        "calibrate": [*COMMAND, "calibrate", a, "--output", str(folder / "calibrated.toml"), "--overwrite"],
        "audit": [*COMMAND, "audit", a, "--output", str(folder / "audit.csv"), "--overwrite"],
    }
    scores = 4 * n * (n_labels + 2)
    rows = {}
    for name, command in commands.items():
        n_runs = 2 if name == "compare" else 1
        seconds, peak, _ = run(command, sum_memory=name == "report")
        beyond, ratio = (peak - n_runs * scores) / GIB, peak / (n_runs * scores)
        rows[name] = {"seconds": seconds, "peak_bytes": peak, "gib_beyond_scores": beyond, "peak_against_scores": ratio}
        print(f"{name}: {seconds:.1f} s, {beyond:.2f} GiB beyond the scores, {ratio:.2f} times the scores", flush=True)
    return {"n_texts": n, "n_labels": n_labels, "scores_bytes": scores, "commands": rows}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--parts", default=",".join(PARTS), help="some of " + ", ".join(PARTS))
    parser.add_argument("--rates", type=int, default=200_000)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--large", type=int, default=2_000_000)
    parser.add_argument("--ids", type=int, default=2_000_000)
    parser.add_argument("--kept", type=int, default=1_000_000)
    arguments = parser.parse_args()
    folder = arguments.folder / "batch"
    folder.mkdir(parents=True, exist_ok=True)
    path = arguments.folder / "batch.json"
    report = json.loads(path.read_text()) if path.exists() else {}  # parts may be measured one after the other
    measures = {
        "rates": lambda: rates(folder, arguments.rates, arguments.rounds),
        "large": lambda: large(folder, arguments.large),
        "ids": lambda: ids(folder, arguments.ids),
        "kept": lambda: {"runs": [kept(folder, n) for n in (arguments.kept // 10, arguments.kept)]},
    }
    for part in arguments.parts.split(","):
        report[part] = {**measures[part](), "machine": {**environment(), "cores": psutil.cpu_count()}}
        path.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    print(json.dumps({part: {k: v for k, v in report[part].items() if k != "machine"} for part in report}, indent=1))


if __name__ == "__main__":
    main()

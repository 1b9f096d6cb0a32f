"""Measure this package against its peers: same weights, same texts, same answers, in one run on one machine.

    python tests/benchmarks/run.py --clinc150 ../shared/clinc150 --folder runs/benchmarks [--quick]

Every contender and setting runs in a process of its own. A short qualifying round finds each contender's best
setting for each measurement; those then take turns, round by round, and the median round counts. `results.json` keeps
every repetition, in one section for each processor: a run replaces that of its own. `results.py` makes the tables and
the picture of it.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
from datetime import datetime, timezone
from itertools import product
from pathlib import Path
from statistics import median
from time import perf_counter, sleep
from typing import Any

import numpy as np
import results

from cascade_lab.provenance import environment, package_version

HERE = Path(__file__).parent
CORES = os.cpu_count() or 1
CALLERS = [{"callers": 1, "threads": CORES}, {"callers": CORES, "threads": 1}]
HINTS = [{**CALLERS[0], "hint": "LATENCY"}, {**CALLERS[1], "hint": "THROUGHPUT"}]
GROUPINGS = [{"grouping": grouping} for grouping in ("sorted", "exact")]

# What runs: the function in `contenders.py`, the settings that it has to choose among, each in a process of its own,
# and the options of a call. The package chooses its threads and its grouping itself; batch None is its own choice too.
# "int8 dynamic" measures the range of activations while it runs, "int8 static" has it from the validation split.
OURS = {"contender": "cascade_lab", "settings": [{}], "options": [{"batch": None}]}
THEIRS = {
    "settings": CALLERS,
    "options": [{"batch": batch, **grouping} for batch, grouping in product((32, 128), GROUPINGS)],
}
CONTENDERS = [
    {**OURS, "precision": "float32"},
    {**OURS, "precision": "bfloat16"},
    {**THEIRS, "contender": "pytorch", "precision": "float32"},
    {**THEIRS, "contender": "pytorch", "precision": "bfloat16"},
    {**THEIRS, "contender": "zentorch", "precision": "float32"},
    {**THEIRS, "contender": "zentorch", "precision": "bfloat16"},
    {**THEIRS, "contender": "onnx_runtime", "precision": "float32"},
    {**THEIRS, "contender": "openvino", "precision": "float32", "settings": HINTS},
    {**THEIRS, "contender": "openvino", "precision": "bfloat16", "settings": HINTS},
    {**THEIRS, "contender": "ctranslate2", "precision": "float32"},
]
# These need texts like the measured ones, and answers that mean something: there are none for BERT-base here.
FITTED = [
    {**OURS, "precision": "mixed"},
    {**THEIRS, "contender": "onnx_runtime", "precision": "int8 dynamic"},
    {**THEIRS, "contender": "openvino", "precision": "int8 dynamic", "settings": HINTS},
    {**THEIRS, "contender": "openvino", "precision": "int8 static", "settings": HINTS},
    {**THEIRS, "contender": "ctranslate2", "precision": "int8 dynamic"},
]
SCRIPT = {"contender": "script", "precision": "float32", "settings": [{}]}

# What is measured: the first `n` texts of a set (of those, `qualify` in the qualifying round), `size` in a call.
TEST = {"folder": "clinc150", "texts": "test"}
MANY = {
    "eval set": {**TEST, "n": 5500, "size": 5500, "qualify": 440},
    "calls of 128": {**TEST, "n": 512, "size": 128, "qualify": 256},
}
FEW = {
    "calls of 1": {**TEST, "n": 150, "size": 1, "qualify": 50},
    "calls of 32": {**TEST, "n": 320, "size": 32, "qualify": 160},
}
BASE = {
    f"BERT-base, {length} tokens": {
        "folder": "base",
        "texts": f"length_{length}",
        "n": n,
        "size": n,
        "qualify": n,
        "largest_batch": n // 2,
    }
    for length, n in ((16, 64), (64, 32), (128, 32))
}
# The script takes seconds for what the others do in one: fewer texts tell its rate, which no length of text changes.
SLOW = {
    "script, batch 32": {**TEST, "n": 128, "size": 128, "qualify": 32, "options": [{"batch": 32}]},
    "script, batch 1": {**TEST, "n": 32, "size": 32, "qualify": 4, "options": [{"batch": 1}]},
}
PRODUCTS = ("tensorflow_products", "pytorch_products")
FEWER_ROUNDS = 3  # for BERT-base, and for a contender that takes over 1.5 times as long as the fastest


class WorkerError(SystemExit):
    """A contender failed; in the qualifying round it is then absent, later the benchmark ends."""


class Worker:
    """A contender's process; `ask` has it measure something."""

    def __init__(self, folder: Path, setting: dict[str, Any]):
        command = [sys.executable, str(HERE / "worker.py"), str(folder), json.dumps(setting)]
        # PyTorch's callers are threads of Python, which OpenMP would give threads of its own.
        env = os.environ | ({"OMP_NUM_THREADS": str(setting["threads"])} if "threads" in setting else {})
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, env=env
        )

    def heard(self) -> dict[str, Any]:
        line = self.process.stdout.readline()
        return json.loads(line) if line else {"error": f"ended with exit code {self.process.wait()}"}

    def ask(self, **order: Any) -> dict[str, Any]:
        sleep(0.25)  # other processes' threads may spin for a while after their last call
        print(json.dumps(order), file=self.process.stdin, flush=True)
        reply = self.heard()
        if "error" in reply:
            raise WorkerError(f"{order}: {reply['error']}")
        return reply

    def close(self) -> None:
        self.process.stdin.close()
        self.process.wait()
        self.process.stdout.close()


class Entry:
    """One contender for one measurement, at its best setting."""

    def __init__(self, name: str, measure: dict[str, Any], spec: dict[str, Any], tried: list[tuple], best: tuple):
        self.measure, self.replies = measure, []
        self.worker, self.options, _ = best
        self.facts = {
            "measure": name,
            "contender": spec["contender"],
            "precision": spec["precision"],
            "n_texts": measure["n"],
            "setting": best[-1]["setting"],
            "qualifying": [row[-1] for row in tried],
        }
        self.seconds_a_text = best[-1]["seconds_a_text"]

    def go(self) -> None:
        self.replies.append(ask(self.worker, self.measure, self.measure["n"], self.options))

    def result(self) -> dict[str, Any]:
        seconds = [reply["seconds"] for reply in self.replies]
        rates = [self.measure["n"] / sum(each) for each in seconds]
        return self.facts | {
            "texts_per_second": median(rates),
            "p50_ms": median(float(np.median(each)) * 1e3 for each in seconds),
            "rounds": [
                {"texts_per_second": rate, **{f"p{q}_ms": float(np.percentile(each, q)) * 1e3 for q in (50, 95)}}
                for rate, each in zip(rates, seconds, strict=True)
            ],
            "peak_mb": self.replies[-1]["peak_mb"],
        }


def ask(worker: Worker, measure: dict[str, Any], n: int, options: dict[str, Any]) -> dict[str, Any]:
    return worker.ask(texts=measure["texts"], n=n, size=min(measure["size"], n), **options)


def main() -> None:
    parser = argparse.ArgumentParser(description="Measure this package against its peers.")
    parser.add_argument("--clinc150", type=Path, required=True, help="folder with CLINC150 and its checkpoints")
    parser.add_argument("--folder", type=Path, required=True, help="where everything is made")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--quick", action="store_true", help="a tenth of the texts, two rounds: does everything work?")
    parser.add_argument("--without-base", action="store_true", help="leave out BERT-base: half the time")
    arguments = parser.parse_args()
    started, folder = perf_counter(), arguments.folder
    rounds = 2 if arguments.quick else arguments.rounds

    def progress(text: str) -> None:
        print(f"[{perf_counter() - started:6.0f} s] {text}", file=sys.stderr, flush=True)

    progress("the same weights in every format")
    if not (arguments.quick and (folder / "base" / "texts.json").exists()):
        for made in ("clinc150", "base"):
            shutil.rmtree(folder / made, ignore_errors=True)
        prepare = [sys.executable, str(HERE / "prepare.py"), str(arguments.clinc150), str(folder)]
        done = subprocess.run(prepare, capture_output=True, text=True, check=False)
        if done.returncode:
            raise SystemExit(done.stderr)
    report: dict[str, Any] = {
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "quick": arguments.quick,
        "machine": machine(),
        "absent": {},
    }
    # Two parts: few texts and many need different settings, and the models for both do not fit into memory at once.
    many = [(name, measure, spec) for name, measure in MANY.items() for spec in CONTENDERS + FITTED]
    few = [(name, measure, spec) for name, measure in FEW.items() for spec in CONTENDERS + FITTED]
    scripts = [(name, measure, SCRIPT) for name, measure in SLOW.items()]
    base = [(name, measure, spec) for name, measure in BASE.items() for spec in CONTENDERS]
    products = [(Worker(folder / "clinc150", {"contender": p, **s}), p, s) for p, s in product(PRODUCTS, CALLERS)]
    for worker, *_ in products:
        worker.heard()
    report["products"] = [
        {"library": name.removesuffix("_products"), "precision": precision, **setting, "rounds": []}
        for _, name, setting in products
        for precision in ("float32", "bfloat16")
    ]
    report["results"] = []
    for part in (many + scripts, few, *([] if arguments.without_base else [base])):
        entries = qualify(part, folder, arguments.quick, report["absent"], progress)
        for number in range(1, rounds + 1 if part is not base else min(rounds, FEWER_ROUNDS) + 1):
            progress(f"round {number}")
            for (worker, *_), row in zip([p for p in products for _ in "ab"], report["products"], strict=True):
                row["rounds"].append(worker.ask(precision=row["precision"])["rate"])
            for entry in entries:
                if number <= (FEWER_ROUNDS if slow(entry, entries) else rounds):
                    entry.go()
        for worker in {entry.worker for entry in entries}:
            worker.close()
        report["results"] += checked(entries, folder)
    for worker, *_ in products:
        worker.close()
    precisions = [p for p in ("float32", "bfloat16") if f"cascade_lab {p}" not in report["absent"]]
    mixed = [] if "cascade_lab mixed" in report["absent"] else ["mixed"]
    progress("memory, load and growth")
    report["memory"] = [
        {"weights": where, "precision": precision, **job(folder / where, "memory", precision=precision)}
        for where in ["base"] + ["clinc150"] * (1 if arguments.quick else 3)
        for precision in precisions + (mixed if where == "clinc150" else [])
    ]
    counts = [200, 2000] if arguments.quick else [5_000, 50_000]
    grown = job(folder / "clinc150", "growth", precision=precisions[-1], counts=counts)
    report["growth"] = {"precision": precisions[-1], **grown}
    report["wall_seconds"] = perf_counter() - started
    path = folder / "results.json"
    results.write(path, HERE / "results.json", report)
    progress(f"{path}")
    results.main(path)


def qualify(part: list[tuple], folder: Path, quick: bool, absent: dict[str, str], progress: Any) -> list[Entry]:
    """Let each contender try its settings on few texts; return its best for each measurement."""
    entries = {}
    # Contender by contender, so that no more than one's settings are held in memory beside the chosen ones.
    for spec in unique([spec for *_, spec in part]):
        label = f"{spec['contender']} {spec['precision']}"
        if label in absent:
            continue
        mine = [row for row in part if row[2] == spec]
        home = folder / mine[0][1]["folder"]
        not_made = home / "absent.json"
        reasons = json.loads(not_made.read_text(encoding="utf-8")) if not_made.exists() else {}
        progress(f"qualifying {label}")
        about = {key: spec[key] for key in ("contender", "precision")}
        settings = [] if label in reasons else spec["settings"]
        workers = [(Worker(home, {**about, **setting}), setting) for setting in settings]
        heard = [worker.heard() for worker, _ in workers]
        errors = [reasons[label]] if label in reasons else [reply["error"] for reply in heard if "error" in reply]
        tried_for = {}
        try:
            for name, measure, _ in [] if errors else mine:
                measure = {**measure, **({"n": max(measure["n"] // 10, 8)} if quick else {})}
                n = max(measure["qualify"] // (10 if quick else 1), 1)
                tried = []
                for (worker, setting), options in product(workers, tries(spec, measure)):
                    reply = ask(worker, measure, n, options)
                    row = {"setting": setting | options, "seconds_a_text": sum(reply["seconds"]) / n}
                    tried.append((worker, options, row))
                tried_for[name] = measure, tried
        except WorkerError as error:
            errors, tried_for = [str(error)], {}
        if errors:
            absent[label] = errors[0]
            progress(f"{label} is absent: {errors[0]}")
        candidates = [worker for worker, _ in workers]
        if home.name == "base" and tried_for:  # one process for all lengths: two of each would fill the memory
            rows = [[quickest(tried, [worker]) for _, tried in tried_for.values()] for worker in candidates]
            candidates = [min(rows, key=lambda row: sum(best[-1]["seconds_a_text"] for best in row))[0][0]]
        for name, (measure, tried) in tried_for.items():
            entries[name, label] = Entry(name, measure, spec, tried, quickest(tried, candidates))
        chosen = {entry.worker for entry in entries.values()}
        for worker, _ in workers:
            if worker not in chosen:
                worker.close()
    return [
        entries[key] for name, _, spec in part if (key := (name, f"{spec['contender']} {spec['precision']}")) in entries
    ]


def quickest(tried: list[tuple], workers: list[Worker]) -> tuple:
    return min((row for row in tried if row[0] in workers), key=lambda row: row[-1]["seconds_a_text"])


def slow(entry: Entry, entries: list[Entry]) -> bool:
    rivals = [other for other in entries if other.facts["measure"] == entry.facts["measure"]]
    return entry.seconds_a_text > 1.5 * min(other.seconds_a_text for other in rivals)


def tries(spec: dict[str, Any], measure: dict[str, Any]) -> list[dict[str, Any]]:
    """Return the options that differ for this measurement: a call bounds its batches, and may hold one length only."""
    options = [dict(option) for option in measure.get("options") or spec["options"]]
    one_length = measure["size"] == 1 or measure["folder"] == "base"
    for option in options:
        if option["batch"] is not None:
            option["batch"] = min(option["batch"], measure.get("largest_batch", measure["size"]))
        if one_length and "grouping" in option:
            option["grouping"] = "exact"
    return unique(options)


def unique(values: list[Any]) -> list[Any]:
    return [value for i, value in enumerate(values) if value not in values[:i]]


def checked(entries: list[Entry], folder: Path) -> list[dict[str, Any]]:
    """Return each entry's result, with what its answers differ in from this package's in float32, and its FLOPs."""
    ours = {}
    for entry in entries:
        if (entry.facts["contender"], entry.facts["precision"]) == ("cascade_lab", "float32"):
            ours.setdefault(entry.measure["texts"], []).append(entry.replies[0])
    rows = []
    for entry in entries:
        expected = max(ours[entry.measure["texts"]], key=lambda reply: len(reply["answers"]))
        n = entry.measure["n"]
        same = np.array([np.array(r["answers"]) == np.array(expected["answers"][:n]) for r in entry.replies])
        sure = np.array([reply["probabilities"] for reply in entry.replies])
        difference = np.abs(sure - np.array(expected["probabilities"][:n]))[same]
        rows.append(
            entry.result()
            | {
                "changed_answers": int((~same).sum(axis=1).max()),
                "max_probability_difference": float(difference.max(initial=0)),
                **flops(folder / entry.measure["folder"], entry.measure["texts"], expected["answers"][:n]),
            }
        )
    return rows


def flops(folder: Path, texts: str, answers: list[str]) -> dict[str, float]:
    """Count the floating-point operations that the texts take: of the whole network, and of what can be had with less.

    A dense layer of n tokens takes 2 n times its weights, attention 4 n² times the hidden size (scores, then the
    weighted sum). Only [CLS] is read after the last layer, which therefore needs keys and values of every token and
    the rest of [CLS] alone: `least`.
    """
    n_tokens = np.array(json.loads((folder / "texts.json").read_text())[texts]["n_tokens"][: len(answers)])
    stages = json.loads((folder / "hf" / "export.json").read_text())["stages"]
    total = least = 0.0
    arrived = np.ones(len(answers), dtype=bool)
    for stage in stages:
        config = json.loads((folder / "hf" / stage["name"] / "config.json").read_text())
        hidden, inner, layers = (config[key] for key in ("hidden_size", "intermediate_size", "num_hidden_layers"))
        n = n_tokens[arrived].astype(float)
        head = 2 * hidden * (hidden + len(stage["labels"])) * len(n)
        layer = (2 * n * (4 * hidden**2 + 2 * hidden * inner) + 4 * n**2 * hidden).sum()
        of_cls = (2 * n * 2 * hidden**2 + 2 * (2 * hidden**2 + 2 * hidden * inner) + 4 * n * hidden).sum()
        total += layers * layer + head
        least += (layers - 1) * layer + of_cls + head
        if stage["pass_label"] is not None:
            arrived &= np.array([answer not in stage["labels"] for answer in answers])
    return {"gflop": total / 1e9, "least_gflop": least / 1e9}


def job(folder: Path, contender: str, **setting: Any) -> dict[str, Any]:
    worker = Worker(folder, {"contender": contender, **setting})
    reply = worker.heard()
    worker.close()
    if "error" in reply:
        raise SystemExit(f"{contender} {setting}: {reply['error']}")
    return reply


def machine() -> dict[str, Any]:
    """Return what the results depend on: processor, cores, features, versions."""
    peers = ("torch", "transformers", "zentorch", "onnx", "onnxruntime", "openvino", "nncf", "ctranslate2")
    where = environment()
    about = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
    known = ("avx2", "avx512f", "avx512_vnni", "avx512_bf16", "amx_bf16", "amx_int8")
    features = [name for name in known if name in about.split()]
    family = re.search(r"^cpu family\s*: (\d+)$", about, re.MULTILINE)
    zen = "AuthenticAMD" in about and {"25": "Zen 4" if "avx512f" in features else "Zen 3", "26": "Zen 5"}.get(
        family[1]
    )
    return {
        "processor": where["processor"] + (f" ({zen})" if zen else ""),
        **{key: where[key] for key in ("platform", "python", "git")},
        "cores": CORES,
        "features": features,
        "packages": where["packages"] | {name: package_version(name) for name in peers},
    }


if __name__ == "__main__":
    main()

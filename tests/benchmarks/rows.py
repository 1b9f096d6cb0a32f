"""What the tables, the aims and the picture read from a section of `results.json`: one row for each result."""

from __future__ import annotations

from statistics import median
from typing import Any

NAMES = {
    "cascade_lab": "cascade_lab",
    "pytorch": "PyTorch + transformers",
    "zentorch": "PyTorch + zentorch",
    "onnx_runtime": "ONNX Runtime",
    "openvino": "OpenVINO",
    "ctranslate2": "CTranslate2",
    "script": "hand-written script",
}
PRECISIONS = ("float32", "bfloat16", "mixed", "int8 dynamic", "int8 static")
# More than this share of other answers, and a contender computes something else.
MOST_CHANGED = {"float32": 0.001, "bfloat16": 0.01, "mixed": 0.001, "int8 dynamic": 0.05, "int8 static": 0.05}
BAR = 0.001  # of the aims: a contender that changes more of the test split's answers is not compared in "any precision"


def find(report: dict[str, Any], measure: str, contender: str, precision: str) -> dict[str, Any] | None:
    key = (measure, contender, precision)
    found = [row for row in report["results"] if (row["measure"], row["contender"], row["precision"]) == key]
    return found[0] if found else None


def at_the_bar(report: dict[str, Any], row: dict[str, Any]) -> bool:
    """Return whether a contender changes at most `BAR` of the test split's answers in this precision."""
    of_set = find(report, "eval set", row["contender"], row["precision"])
    return of_set is not None and of_set["changed_answers"] <= BAR * of_set["n_texts"]


def allowed(row: dict[str, Any]) -> bool:
    """Return whether rounding can explain the changed answers: in bfloat16 on random weights, any number of them."""
    if row["precision"] == "bfloat16" and row["measure"].startswith("BERT-base"):
        return True
    return row["changed_answers"] <= max(1, MOST_CHANGED[row["precision"]] * row["n_texts"])


def product_rate(report: dict[str, Any], precision: str) -> float:
    """Return the machine's rate on large products: one caller per core, each with one thread; of the faster library."""
    return max(
        median(row["rounds"])
        for row in report["products"]
        if row["precision"] == precision and row["callers"] == report["machine"]["cores"]
    )


def shares(report: dict[str, Any], row: dict[str, Any]) -> tuple[float, float]:
    """Return a result's share of the product rate: by the whole network's arithmetic, and by the least that does."""
    rate = product_rate(report, row["precision"]) * row["n_texts"] / row["texts_per_second"]
    return row["gflop"] / rate, row["least_gflop"] / rate


def changed(row: dict[str, Any]) -> str:
    return f"{row['changed_answers']} of {row['n_texts']:,}"


def name(row: dict[str, Any]) -> str:
    return f"{NAMES[row['contender']]} {row['precision']}"


def short(report: dict[str, Any]) -> str:
    """Return what tells the processors apart: AMX, the generation in brackets, or else the whole name."""
    machine = report["machine"]
    if "amx_bf16" in machine["features"]:
        return "AMX"
    _, _, generation = machine["processor"].rstrip(")").rpartition("(")
    return generation


def three_digits(value: float) -> str:
    """Return a number with at most three digits."""
    return f"{value:.0f}" if value >= 100 else f"{value:.3g}"

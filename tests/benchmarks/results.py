"""The benchmark's tables and its picture, from `results.json`.

    python tests/benchmarks/results.py runs/benchmarks/results.json

prints the tables (Markdown) with the aims beside what was measured, and draws `results.png` next to the file.
"""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Iterable
from itertools import product
from pathlib import Path
from statistics import median
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

NAMES = {
    "cascade_lab": "cascade_lab",
    "pytorch": "PyTorch + transformers",
    "onnx_runtime": "ONNX Runtime",
    "openvino": "OpenVINO",
    "script": "hand-written script",
}
PRECISIONS = ("float32", "bfloat16")
# More than this share of other answers, and a contender computes something else.
MOST_CHANGED = {"float32": 0.001, "bfloat16": 0.01}


def main(path: Path) -> None:
    """Print the tables and draw the picture; exit code 1 if a contender computed something else."""
    report = json.loads(path.read_text(encoding="utf-8"))
    print("\n\n".join(tables(report)))
    picture = path.with_suffix(".png")
    draw(report).savefig(picture, dpi=150)
    print(f"\n{picture}")
    faults = [row for row in report["results"] if row["changed_answers"] > allowed(row)]
    if faults:
        raise SystemExit("not the same answers: " + ", ".join(f"{name(row)}, {row['measure']}" for row in faults))


def tables(report: dict[str, Any]) -> list[str]:
    machine = report["machine"]
    versions = ", ".join(f"{package} {number}" for package, number in machine["packages"].items())
    lines = [
        f"{report['date'][:10]}, {machine['processor']}, {machine['cores']} cores ({', '.join(machine['features'])}), "
        f"Python {machine['python']}, {versions}; {report['wall_seconds'] / 60:.0f} minutes"
        + ("; a quick run: its figures mean nothing" if report["quick"] else ""),
        summary(report),
        table(["aim", "at least", "measured", ""], aims(report)),
        *(
            table([measure, "texts/s", "p50 ms", "share", "changed", "setting"], measured(report, measure))
            for measure in dict.fromkeys(row["measure"] for row in report["results"])
        ),
        table(["large products, GFLOP/s", "callers × threads", *PRECISIONS], products(report)),
    ]
    lines += [f"absent: {who}: {why}" for who, why in report["absent"].items()]
    return lines


def summary(report: dict[str, Any]) -> str:
    """Return the table of the README: a contender a row, its best setting for each measurement."""
    columns = [(m, p) for m in ("eval set", "calls of 128", "calls of 1") for p in PRECISIONS]
    first = {"eval set": "all at once", "calls of 128": "calls of 128", "calls of 1": "one text, ms"}
    rows = []
    for contender, title in NAMES.items():
        found = [find(report, measure, contender, precision) for measure, precision in columns]
        values = [
            row and (figure(row["p50_ms"]) if row["measure"] == "calls of 1" else f"{row['texts_per_second']:,.0f}")
            for row in found
        ]
        if any(found):
            rows.append([title, *(value or "–" for value in values)])
    rows.sort(key=lambda row: -float(row[1].replace(",", "")))
    rows[0][0] = f"**{rows[0][0]}**"
    for row in report["results"]:
        if row["contender"] == "script":
            rows.append([row["measure"].replace("script", "the script"), f"{row['texts_per_second']:,.0f}", *["–"] * 5])
    return table(["texts a second", *(f"{first[m]}, {p}" for m, p in columns)], rows)


def table(header: list[str], rows: Iterable[list[Any]]) -> str:
    cells = [[str(cell) for cell in row] for row in [header, *rows]]
    widths = [max(len(row[column]) for row in cells) for column in range(len(header))]
    lines = [
        "| " + " | ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) + " |" for row in cells
    ]
    return "\n".join([lines[0], "|" + "|".join("-" * (width + 2) for width in widths) + "|", *lines[1:]])


def measured(report: dict[str, Any], measure: str) -> list[list[Any]]:
    rows = sorted((row for row in report["results"] if row["measure"] == measure), key=lambda r: -r["texts_per_second"])
    return [
        [
            name(row),
            figure(row["texts_per_second"]),
            figure(row["p50_ms"]),
            share_text(report, row),
            f"{row['changed_answers']} of {row['n_texts']}",
            ", ".join(f"{key} {'by itself' if value is None else value}" for key, value in row["setting"].items()),
        ]
        for row in rows
    ]


def products(report: dict[str, Any]) -> list[list[Any]]:
    rows = {}
    for row in report["products"]:
        key = (row["library"], f"{row['callers']} × {row['threads']}")
        rows.setdefault(key, {})[row["precision"]] = figure(median(row["rounds"]))
    return [
        [{"tensorflow": "TensorFlow", "pytorch": "PyTorch"}[library], how, *found.values()]
        for (library, how), found in rows.items()
    ]


def aims(report: dict[str, Any]) -> list[list[str]]:
    """Return issue 5's aims: what, how much, measured, and whether it was met."""
    f32, bf16 = (find(report, "eval set", "cascade_lab", precision) for precision in PRECISIONS)
    peers = [row for row in report["results"] if row["contender"] not in ("cascade_lab", "script")]
    of_eval = [row for row in peers if row["measure"] == "eval set"]
    script = find(report, "script, batch 32", "script", "float32")
    ones = [row for row in report["results"] if row["measure"] == "calls of 1"]
    mine = [row for row in ones if row["contender"] == "cascade_lab"]
    theirs = [row for row in ones if row["contender"] != "cascade_lab"]
    rows = []

    def aim(what: str, bound: float, value: float, *, most: bool = False, note: str = "") -> None:
        unknown = math.isnan(value)
        met = value <= bound if most else value >= bound
        rows.append(
            [
                what,
                f"at most {bound:g}" if most else f"{bound:g}",
                "–" if unknown else f"{value:.2f}{note}",
                "not measured" if unknown else "met" if met else "missed",
            ]
        )

    def rate(row: dict[str, Any] | None) -> float:
        return math.nan if row is None else row["texts_per_second"]

    fastest = max((row for row in of_eval if row["precision"] == "float32"), key=rate, default=None)
    aim("eval set, float32, against the fastest float32 peer", 1.15, rate(f32) / rate(fastest), note=against(fastest))
    fastest = max(of_eval, key=rate, default=None)
    aim("eval set, bfloat16, against the fastest peer", 1.30, rate(bf16) / rate(fastest), note=against(fastest))
    aim("eval set, float32, against the script (batch 32)", 20, rate(f32) / rate(script))
    aim("eval set, bfloat16, against the script (batch 32)", 40, rate(bf16) / rate(script))
    for which in (PRECISIONS, PRECISIONS[:1]):
        quickest = [
            min((row for row in rows_ if row["precision"] in which), key=lambda row: row["p50_ms"], default=None)
            for rows_ in (mine, theirs)
        ]
        p50 = [math.nan if row is None else row["p50_ms"] for row in quickest]
        what = "one text, p50, time against the fastest peer" + (", float32" if which != PRECISIONS else "")
        aim(what, 1.0, p50[0] / p50[1], most=True, note=against(quickest[1]))
    for precision, measure in product(PRECISIONS, ("calls of 128", "eval set")):
        row = find(report, measure, "cascade_lab", precision)
        whole, least = (math.nan, math.nan) if row is None else shares(report, row)
        aim(
            f"{measure}, {precision}: share of the machine's product rate",
            0.85,
            whole,
            note=f" ({least:.2f} counting the last layer for [CLS] only)",
        )
    few, many = report["growth"]["rows"]
    times = many["n_texts"] / few["n_texts"]
    what = f"{many['n_texts']:,} texts against {few['n_texts']:,} ({report['growth']['precision']})"
    aim(f"{what}, time", 1.05 * times, many["seconds"] / few["seconds"], most=True)
    aim(f"{what}, peak memory", 1.05, many["peak_mb"] / few["peak_mb"], most=True)
    for precision in PRECISIONS:
        found = [row for row in report["memory"] if row["weights"] == "clinc150" and row["precision"] == precision]
        over = [row["over_mb"] / row["weights_mb"] for row in found]
        aim(f"memory over TensorFlow's, times the weights, {precision}", 2.2, median(over or [math.nan]), most=True)
    for precision in PRECISIONS:
        found = [row for row in report["memory"] if row["weights"] == "base" and row["precision"] == precision]
        seconds = [row["load_seconds"] for row in found]
        rows += (
            [[f"load of a BERT-base stage, {precision}, seconds", "", f"{median(seconds):.1f}", ""]] if found else []
        )
    return rows


def against(row: dict[str, Any] | None) -> str:
    return "" if row is None else f" ({name(row)})"


def find(report: dict[str, Any], measure: str, contender: str, precision: str) -> dict[str, Any] | None:
    key = (measure, contender, precision)
    found = [row for row in report["results"] if (row["measure"], row["contender"], row["precision"]) == key]
    return found[0] if found else None


def product_rate(report: dict[str, Any], precision: str) -> float:
    """Return the machine's rate on large products: one caller a core, each of one thread; the quicker library's."""
    return max(
        median(row["rounds"])
        for row in report["products"]
        if row["precision"] == precision and row["callers"] == report["machine"]["cores"]
    )


def shares(report: dict[str, Any], row: dict[str, Any]) -> tuple[float, float]:
    """Return a result's share of the product rate: by the whole network's arithmetic, and by the least that does."""
    rate = product_rate(report, row["precision"]) * row["n_texts"] / row["texts_per_second"]
    return row["gflop"] / rate, row["least_gflop"] / rate


def share_text(report: dict[str, Any], row: dict[str, Any]) -> str:
    return "–" if row["contender"] == "script" else f"{shares(report, row)[0]:.2f}"


def allowed(row: dict[str, Any]) -> float:
    """Return how many other answers are rounding's: on random weights, where nothing is sure, any in bfloat16."""
    if row["precision"] == "bfloat16" and row["measure"].startswith("BERT-base"):
        return row["n_texts"]
    return max(1, MOST_CHANGED[row["precision"]] * row["n_texts"])


def name(row: dict[str, Any]) -> str:
    return f"{NAMES[row['contender']]} {row['precision']}"


def figure(value: float) -> str:
    """Three digits, no more."""
    return f"{value:.0f}" if value >= 100 else f"{value:.3g}"


def draw(report: dict[str, Any]) -> Any:
    """Draw a panel of bars for each measurement: texts a second, or milliseconds of one text."""
    measures = [m for m in dict.fromkeys(row["measure"] for row in report["results"]) if not m.startswith("script")]
    figure_, axes = plt.subplots(math.ceil(len(measures) / 2), 2, figsize=(12, 2.6 * math.ceil(len(measures) / 2)))
    for ax in axes.flat[len(measures) :]:
        ax.set_axis_off()
    for ax, measure in zip(axes.flat, measures, strict=False):
        rows = [row for row in report["results"] if row["measure"] == measure]
        if measure == "eval set":
            rows += [row for row in report["results"] if row["contender"] == "script"]
        in_ms = measure == "calls of 1"
        column = "p50_ms" if in_ms else "texts_per_second"
        rows.sort(key=lambda row: row[column], reverse=in_ms)
        labels = [
            name(row) + (row["measure"].removeprefix("script") if row["contender"] == "script" else "") for row in rows
        ]
        bars = ax.barh(
            labels,
            [row[column] for row in rows],
            color=["#1f4e79" if row["contender"] == "cascade_lab" else "#a9b7c4" for row in rows],
            hatch=["///" if row["precision"] == "bfloat16" else "" for row in rows],
            edgecolor="white",
        )
        for bar, row in zip(bars, rows, strict=True):
            spread = [each["p50_ms" if in_ms else "texts_per_second"] for each in row["rounds"]]
            ax.plot([min(spread), max(spread)], [bar.get_y() + bar.get_height() / 2] * 2, color="black", linewidth=1)
            ax.text(
                max(spread), bar.get_y() + bar.get_height() / 2, f"  {figure(row[column])}", va="center", fontsize=8
            )
        ax.margins(x=0.15)
        ax.set_title(
            measure + (", ms (median; less is better)" if in_ms else ", texts a second"), fontsize=10, loc="left"
        )
        ax.tick_params(labelsize=8)
        ax.spines[["top", "right"]].set_visible(False)
    machine = report["machine"]
    figure_.suptitle(
        f"{machine['processor']}, {machine['cores']} cores, {report['date'][:10]}; hatched: bfloat16; "
        "lines: slowest to fastest round" + ("; quick run" if report["quick"] else ""),
        fontsize=9,
    )
    figure_.tight_layout()
    return figure_


if __name__ == "__main__":
    main(Path(sys.argv[1]))

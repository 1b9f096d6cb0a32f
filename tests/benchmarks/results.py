"""The benchmark's tables and its picture, from `results.json`.

    python tests/benchmarks/results.py runs/benchmarks/results.json

prints the tables (Markdown), the processors side by side, with the aims beside what was measured; draws `results.png`
next to the file.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from statistics import median
from typing import Any

from aims import aims
from picture import draw
from rows import PRECISIONS, allowed, changed, find, name, shares, short, three_digits

Rows = dict[str, tuple[float, list[str]]]
"""The rows of one processor: for each title what to sort by, largest first, and the cells."""

NOTE = (
    "changed: how many answers differ from cascade_lab's in float32. int8 dynamic: ranges of activations are measured "
    "while it runs; int8 static: NNCF measured them on 300 texts of the validation split. OpenVINO in int8 chooses the "
    "precision of the rest itself. CTranslate2 has no bfloat16 on a processor. BERT-base has random weights: no int8."
)


def main(path: Path) -> None:
    """Print the tables and draw the picture; exit code 1 if a contender computed something else."""
    reports = list(json.loads(path.read_text(encoding="utf-8")).values())
    print("\n\n".join(tables(reports)))
    picture = path.with_suffix(".png")
    draw(reports).savefig(picture, dpi=150)
    print(f"\n{picture}")
    faults = [f"{name(row)}, {row['measure']}" for report in reports for row in report["results"] if not allowed(row)]
    if faults:
        raise SystemExit("not the same answers: " + "; ".join(faults))


def write(path: Path, kept: Path, report: dict[str, Any]) -> None:
    """Write the sections of `kept`, with `report` for its own processor, to `path`."""
    sections = json.loads(kept.read_text(encoding="utf-8")) | {report["machine"]["processor"]: report}
    path.write_text(json.dumps(sections, indent=1) + "\n", encoding="utf-8")


def tables(reports: list[dict[str, Any]]) -> list[str]:
    measures = dict.fromkeys(row["measure"] for report in reports for row in report["results"])
    return [
        *map(heading, reports),
        joined("texts a second", ["all at once", "calls of 128", "one text, ms", "changed"], reports, summary),
        NOTE,
        joined("aim", ["at least", "measured", "verdict"], reports, aims),
        *(
            joined(
                measure,
                ["texts/s", "p50 ms", "share", "changed", "setting"],
                reports,
                lambda report, measure=measure: measured(report, measure),
            )
            for measure in measures
        ),
        joined("large products, GFLOP/s (callers × threads)", ["float32", "bfloat16"], reports, products),
        joined("growth and memory", ["times"], reports, growth_and_memory),
        *(f"absent, {short(report)}: {who}: {why}" for report in reports for who, why in report["absent"].items()),
    ]


def heading(report: dict[str, Any]) -> str:
    machine = report["machine"]
    versions = ", ".join(f"{package} {number}" for package, number in machine["packages"].items() if number)
    return (
        f"{short(report)}: {machine['processor']}, {machine['cores']} cores ({', '.join(machine['features'])}), "
        f"{report['date'][:10]}, Python {machine['python']}, {versions}; {report['wall_seconds'] / 60:.0f} minutes"
        + ("; a quick run: its numbers mean nothing" if report["quick"] else "")
    )


def joined(
    title: str, columns: list[str], reports: list[dict[str, Any]], rows_of: Callable[[dict[str, Any]], Rows]
) -> str:
    """Return a table with the columns of every processor, side by side where the rows have the same title."""
    parts = [rows_of(report) for report in reports]
    ranks: dict[str, float] = {}
    for part in parts:
        largest = max((rank for rank, _ in part.values()), default=1) or 1
        for key, (rank, _) in part.items():
            ranks[key] = max(ranks.get(key, 0), rank / largest)
    ordered = sorted(ranks, key=lambda key: -ranks[key])
    absent = (0, ["–"] * len(columns))
    of = [f"{short(report)}: " if len(reports) > 1 else "" for report in reports]
    return table(
        [title, *(which + column for which in of for column in columns)],
        ([key, *(cell for part in parts for cell in part.get(key, absent)[1])] for key in ordered),
    )


def table(header: list[str], rows: Iterable[list[str]]) -> str:
    lines = [header, *rows]
    widths = [max(len(row[column]) for row in lines) for column in range(len(header))]
    padded = [
        "| " + " | ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) + " |" for row in lines
    ]
    return "\n".join([padded[0], "|" + "|".join("-" * (width + 2) for width in widths) + "|", *padded[1:]])


def summary(report: dict[str, Any]) -> Rows:
    """Return the rows of data/docs/speed.md: a contender in one precision, at its best setting for each measurement."""
    rows = {}
    for row in report["results"]:
        if row["measure"] == "eval set":
            calls, one = (find(report, m, row["contender"], row["precision"]) for m in ("calls of 128", "calls of 1"))
            title = f"**{name(row)}**" if row["contender"] == "cascade_lab" else name(row)
            in_calls = f"{calls['texts_per_second']:,.0f}" if calls else "–"
            cells = [f"{row['texts_per_second']:,.0f}", in_calls, three_digits(one["p50_ms"]) if one else "–"]
            rows[title] = row["texts_per_second"], [*cells, changed(row)]
        elif row["contender"] == "script":
            title = row["measure"].replace("script", "the script")
            rows[title] = row["texts_per_second"], [f"{row['texts_per_second']:,.0f}", "–", "–", changed(row)]
    return rows


def measured(report: dict[str, Any], measure: str) -> Rows:
    return {
        name(row): (
            row["texts_per_second"],
            [
                three_digits(row["texts_per_second"]),
                three_digits(row["p50_ms"]),
                share(report, row),
                changed(row),
                setting(row["setting"]),
            ],
        )
        for row in report["results"]
        if row["measure"] == measure
    }


def setting(chosen: dict[str, Any]) -> str:
    """Return a setting in few words: callers × threads, the rest as it is."""
    parts = [f"{chosen['callers']} × {chosen['threads']}"] if "callers" in chosen else []
    parts += [chosen["hint"]] if "hint" in chosen else []
    parts.append("batch by itself" if chosen["batch"] is None else f"batch {chosen['batch']}")
    return ", ".join(parts + ([chosen["grouping"]] if "grouping" in chosen else []))


def share(report: dict[str, Any], row: dict[str, Any]) -> str:
    """Return a result's share of the machine's rate on large products; in mixed and int8 there is no such rate."""
    if row["contender"] == "script" or row["precision"] not in PRECISIONS[:2]:
        return "–"
    whole, least = shares(report, row)
    return f"{whole:.2f}" + (f" ({least:.2f})" if row["contender"] == "cascade_lab" else "")


def products(report: dict[str, Any]) -> Rows:
    rows: Rows = {}
    for row in report["products"]:
        library = {"tensorflow": "TensorFlow", "pytorch": "PyTorch"}[row["library"]]
        key = f"{library}, {row['callers']} × {row['threads']}"
        rows.setdefault(key, (1, []))[1].append(three_digits(median(row["rounds"])))
    return rows


def growth_and_memory(report: dict[str, Any]) -> Rows:
    """Return how time and memory grow with the texts, and what loading takes over TensorFlow alone."""
    few, many = report["growth"]["rows"]
    values = {
        f"time of {many['n_texts']:,} texts against {few['n_texts']:,}": many["seconds"] / few["seconds"],
        f"peak memory of {many['n_texts']:,} texts against {few['n_texts']:,}": many["peak_mb"] / few["peak_mb"],
    }
    for weights in ("clinc150", "base"):
        for precision in PRECISIONS:
            found = [row for row in report["memory"] if (row["weights"], row["precision"]) == (weights, precision)]
            if found:
                title = f"memory over TensorFlow's against the weights, {weights}, {precision}"
                values[title] = median(row["over_mb"] / row["weights_mb"] for row in found)
    return {title: (1, [f"{value:.2f}"]) for title, value in values.items()}


if __name__ == "__main__":
    main(Path(sys.argv[1]))

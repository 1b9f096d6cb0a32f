"""The benchmark's picture: a row of panels for each measurement, a column for each processor."""

from __future__ import annotations

from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from rows import BAR, at_the_bar, name, short, three_digits

HATCHES = {"float32": "", "bfloat16": "///", "mixed": "...", "int8 dynamic": "xxx", "int8 static": "+++"}


def draw(reports: list[dict[str, Any]]) -> Any:
    """Draw bars of texts a second, or of milliseconds of one text; the best is on top."""
    results = [row for report in reports for row in report["results"]]
    measures = [m for m in dict.fromkeys(row["measure"] for row in results) if not m.startswith("script")]
    parts = [[shown(report, measure) for report in reports] for measure in measures]
    heights = [max(map(len, row)) + 3 for row in parts]
    figure_, axes = plt.subplots(
        len(measures),
        len(reports),
        figsize=(8 * len(reports), 0.21 * sum(heights)),
        height_ratios=heights,
        squeeze=False,
        layout="constrained",
    )
    for measure, line, found in zip(measures, axes, parts, strict=True):
        for ax, report, rows in zip(line, reports, found, strict=True):
            _panel(ax, measure, report, rows)
    about = "; ".join(
        f"{short(report)}: {report['machine']['processor']}, {report['machine']['cores']} cores, {report['date'][:10]}"
        + (", quick run" if report["quick"] else "")
        for report in reports
    )
    note = f"lines: slowest to fastest round; pale: more than {BAR:.1%} of the test split's answers changed"
    figure_.suptitle(f"{about}\n{note}", fontsize=9)
    return figure_


def shown(report: dict[str, Any], measure: str) -> list[dict[str, Any]]:
    """Return the bars of a panel, the best last; the hand-written script stands beside the eval set."""
    rows = [row for row in report["results"] if row["measure"] == measure]
    if measure == "eval set":
        rows += [row for row in report["results"] if row["contender"] == "script"]
    in_ms = measure == "calls of 1"
    return sorted(rows, key=lambda row: row["p50_ms" if in_ms else "texts_per_second"], reverse=in_ms)


def _panel(ax: Any, measure: str, report: dict[str, Any], rows: list[dict[str, Any]]) -> None:
    in_ms = measure == "calls of 1"
    column = "p50_ms" if in_ms else "texts_per_second"
    labels = [name(row) + row["measure"].removeprefix("script") * (row["contender"] == "script") for row in rows]
    bars = ax.barh(
        labels,
        [row[column] for row in rows],
        color=["#1f4e79" if row["contender"] == "cascade_lab" else "#a9b7c4" for row in rows],
        hatch=[HATCHES[row["precision"]] for row in rows],
        edgecolor="white",
    )
    for bar, row in zip(bars, rows, strict=True):
        if row["contender"] != "script" and not at_the_bar(report, row):
            bar.set_alpha(0.45)
        spread = [each[column] for each in row["rounds"]]
        middle = bar.get_y() + bar.get_height() / 2
        ax.plot([min(spread), max(spread)], [middle] * 2, color="black", linewidth=1)
        changes = f" ({row['changed_answers']:,} changed)" if row["changed_answers"] else ""
        ax.text(max(spread), middle, f"  {three_digits(row[column])}{changes}", va="center", fontsize=7)
    ax.margins(x=0.2, y=0.02)
    unit = "ms (median; less is better)" if in_ms else "texts a second"
    ax.set_title(f"{short(report)}: {measure}, {unit}", fontsize=9, loc="left")
    ax.tick_params(labelsize=7)
    ax.spines[["top", "right"]].set_visible(False)

"""The aims of issue 19 for `make bench`, beside what was measured."""

from __future__ import annotations

from typing import Any

from rows import at_the_bar, find, name

FLOAT32 = ("float32",)
FLOATS = ("float32", "bfloat16")


def aims(report: dict[str, Any]) -> dict[str, tuple[float, list[str]]]:
    """Return for each aim how much it asks of this processor (AMX, else Zen 5), what was measured, whether it is met.

    Ratios are of texts a second against the fastest peer, or of the median time of one text. In "any precision" a
    contender counts only if it changes at most 0.1% of the answers; the rows "whatever changes" have them all.
    """
    amx = "amx_bf16" in report["machine"]["features"]
    base = "BERT-base, 128 tokens"
    compared = [
        ("all at once, float32", 1.35 if amx else 1.25, ratio(report, "eval set", FLOAT32, FLOAT32)),
        ("all at once, bfloat16", 1.5 if amx else 1.4, ratio(report, "eval set", ("bfloat16",), FLOATS)),
        ("all at once, mixed against our float32, no answer changed", 2.5 if amx else 1.6, mixed(report)),
        ("all at once, any precision", 1.4, ratio(report, "eval set", bar=True)),
        ("all at once, any precision, whatever changes", 1.4, ratio(report, "eval set")),
        ("one text, float32, time", 0.9, ratio(report, "calls of 1", FLOAT32, FLOAT32)),
        ("one text, any precision, time", 0.8, ratio(report, "calls of 1", bar=True)),
        ("one text, any precision, whatever changes, time", 0.8, ratio(report, "calls of 1")),
        (f"{base}, float32", 1.1, ratio(report, base, FLOAT32, FLOAT32)),
        (f"{base}, bfloat16", 1.2, ratio(report, base, ("bfloat16",), FLOATS)),
    ]
    rows = {}
    for what, bound, found in compared:
        value, against, changes = found or (None, "", 0)
        in_time = what.endswith("time")
        met = value is not None and not changes and (value <= bound if in_time else value >= bound)
        cells = [
            f"at most {bound:g}" if in_time else f"{bound:g}",
            "–" if value is None else f"{value:.2f} ({against})",
            "not measured" if value is None else "met" if met else "missed",
        ]
        rows[what] = 1.0, cells
    return rows


def ratio(
    report: dict[str, Any],
    measure: str,
    ours: tuple[str, ...] | None = None,
    theirs: tuple[str, ...] | None = None,
    *,
    bar: bool = False,
) -> tuple[float, str, int] | None:
    """Compare the fastest of ours with the fastest peer, in these precisions (None: any).

    Returns
    -------
    tuple of float, str and int, or None
        The ratio, what is compared with what, and 0; None where one of the two was not measured.
    """
    in_time = measure == "calls of 1"
    rows = [row for row in report["results"] if row["measure"] == measure and (not bar or at_the_bar(report, row))]
    column, best = ("p50_ms", min) if in_time else ("texts_per_second", max)
    mine, peers = (
        [r for r in rows if (r["contender"] == "cascade_lab") is is_ours and (not which or r["precision"] in which)]
        for is_ours, which in ((True, ours), (False, theirs))
    )
    if not mine or not peers:
        return None
    first, second = (best(found, key=lambda row: row[column]) for found in (mine, peers))
    what = name(second) if ours and len(ours) == 1 else f"{first['precision']} against {name(second)}"
    return first[column] / second[column], what, 0


def mixed(report: dict[str, Any]) -> tuple[float, str, int] | None:
    """Compare mixed with our float32; the last value is how many answers it changes."""
    rows = [find(report, "eval set", "cascade_lab", precision) for precision in ("mixed", "float32")]
    if None in rows:
        return None
    changes = rows[0]["changed_answers"]
    return rows[0]["texts_per_second"] / rows[1]["texts_per_second"], f"{changes} answers changed", changes

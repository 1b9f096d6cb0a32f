"""`cascade-lab compare` shows whether one run is better than another, or which of several is."""

from __future__ import annotations

from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.padding import Padding
from rich.table import Table

from cascade_lab.cli.options import OVERWRITE, SHOWN_TEXTS
from cascade_lab.cli.printing import (
    MAX_CELL,
    METRICS,
    UNDEFINED,
    cell,
    interval,
    line,
    next_step,
    number,
    p_value,
    show,
    show_runs,
    table,
    title,
    tuned_on,
)
from cascade_lab.text import shorten

if TYPE_CHECKING:
    import pandas as pd

    from cascade_lab.analysis.comparison import Comparison
    from cascade_lab.analysis.many_runs import Comparisons

MAX_GROUPS = 8  # labels, and slices, that are shown
MAX_NAME = 40  # characters of a label or a slice
MAX_SENTENCE = 400
MAX_VERDICT = 2000  # it may name a dozen runs
EFFECTS = {
    "gate": "stages before the last: B's instead of A's",
    "classifier": "last stage: B's instead of A's",
    "interaction": "both, beyond the sum of the two",
}


def compare(
    runs: Annotated[
        list[Path],
        typer.Argument(
            metavar="RUN_A RUN_B...",
            help="The run to improve on, then one or more runs that may be better.",
            show_default=False,
        ),
    ],
    output: Annotated[
        Path | None, typer.Option(help="A JSON file to write: all numbers, and every text that changed.")
    ] = None,
    picture: Annotated[
        Path | None, typer.Option(help="A PNG file to write: how much each run differs from the first, with intervals.")
    ] = None,
    texts: SHOWN_TEXTS = 3,
    column: Annotated[
        list[str] | None,
        typer.Option(
            metavar="COLUMN", help="Slice by this column of the examples [default: columns of at most 50 values]."
        ),
    ] = None,
    overwrite: OVERWRITE = False,
) -> None:
    """Show whether run B is better than run A: by how much, for which labels and slices, and because of which stage.

    More than two runs give a leaderboard: each run against the first one. The runs are joined on example_id. Their
    cascades may have different stages, but the true labels must be the same.

    Example: cascade-lab compare runs/demo runs/demo-tuned
    """
    from cascade_lab.analysis.many_runs import compare_many
    from cascade_lab.atomic import locked_file, write_file, write_json
    from cascade_lab.run import Run

    with ExitStack() as locks:
        for path, what in ((output, "comparison"), (picture, "picture")):
            if path is not None:
                locks.enter_context(locked_file(path, overwrite=overwrite, what=what))
        comparisons = compare_many([Run.read(run) for run in runs], columns=column or None)
        if output is not None:
            write_json(output, comparisons.to_dict())
        if picture is not None:
            from cascade_lab.displays import LeaderboardDisplay

            figure = LeaderboardDisplay(comparisons).plot().figure_
            write_file(picture, partial(figure.savefig, dpi=150, format="png"))
    if len(runs) == 2:
        _print_comparison(comparisons.comparison(), n_texts=texts)
    else:
        _print_leaderboard(comparisons)
    for path, what in ((output, "comparison"), (picture, "picture")):
        if path is not None:
            line(f"{what}: {path}")
    if len(runs) == 2:
        next_step("report", runs[0], "--notebook", "06_compare_runs", "-p", f"other_runs={runs[1]}")
    else:
        best = comparisons.comparisons.index(comparisons.comparison())
        next_step("compare", runs[0], runs[1 + best])


def _print_leaderboard(comparisons: Comparisons) -> None:
    from cascade_lab.analysis.comparison_notes import thresholds_text
    from cascade_lab.analysis.many_runs import MULTIPLICITY

    first, *others = comparisons.names
    show(title(comparisons.verdict, MAX_VERDICT), "")
    line(f"{len(others)} runs against {first}, on the {comparisons.n_examples:,} texts that all of them have")
    for note in comparisons.notes:
        line(note)
    show("")
    board, facts = comparisons.leaderboard(), comparisons.runs
    runs = {
        name: {
            "cascade": shorten(facts[name]["cascade"], MAX_NAME),
            "thresholds": thresholds_text(facts[name]) or UNDEFINED,
            "tuned on": tuned_on(facts[name]),
        }
        for name in board.index
    }
    level = f"{comparisons.level:.0%} interval"
    numbers = {
        "accuracy": [number(value, ".2%") for value in board["accuracy"]],
        "difference": [_points(value) for value in board["difference"]],
        level: [_points_interval(low, high) for low, high in board[["low", "high"]].to_numpy()],
        "p (Holm)": [p_value(value) for value in board["p_holm"]],
    }
    show_runs(runs, numbers)
    show("")
    values = comparisons.values().drop(columns="accuracy")
    percents = {METRICS[metric]: [number(value, ".2%") for value in values[metric]] for metric in values}
    show_runs({name: {} for name in values.index}, percents)
    show("")
    show(f"difference: to {first}, in percentage points. {MULTIPLICITY}")


def _print_comparison(comparison: Comparison, *, n_texts: int) -> None:
    from cascade_lab.analysis.comparison import CHANGES
    from cascade_lab.analysis.comparison_notes import same_texts_notes

    show(title(comparison.verdict), cell(comparison.difference, MAX_SENTENCE), *comparison.repeats, "")
    for note in (*comparison.scope_notes, *same_texts_notes(dict(zip("AB", comparison.runs, strict=True)))):
        line(note)
    _print_runs(comparison)
    show("", _metrics(comparison))
    show(
        "A, B in percent; B - A in percentage points; p: McNemar's exact test, which decides: there is a difference if "
        "p < 0.05. A metric without p is not a fraction of the same texts in A and B; it has only an interval."
    )
    counts = comparison.pairs["change"].value_counts()
    wins, losses, otherwise = (int(counts.get(change, 0)) for change in CHANGES)
    line(f"wins, B right where A is wrong: {wins:,}; losses: {losses:,}; wrong in another way: {otherwise:,}")
    show("")
    _print_decomposition(comparison)
    _print_groups("true label", comparison.labels)
    _print_groups("slice", comparison.slices)
    _print_latency(comparison)
    for change, meaning in CHANGES.items():
        _print_texts(comparison.changes(change), meaning, n_texts)


def _print_runs(comparison: Comparison) -> None:
    from cascade_lab.analysis.comparison_notes import thresholds_text

    for letter, run in zip("AB", comparison.runs, strict=True):
        facts = [shorten(run["cascade"], MAX_CELL), thresholds_text(run)]
        line(f"{letter}: {run['name']} ({'; '.join(filter(None, facts))})")
    only = ", ".join(f"{run['n_alone']:,} only in {letter}" for letter, run in zip("AB", comparison.runs, strict=True))
    line(f"{len(comparison.pairs):,} texts in both, {only}")


def _metrics(comparison: Comparison) -> Table:
    shown = table("metric", "A", "B", "B - A", f"{comparison.level:.0%} interval", "p", fold_first=True)
    for name, row in comparison.metrics.iterrows():
        between = _points_interval(row["low"], row["high"])
        values = [number(row["a"], ".2%"), number(row["b"], ".2%"), _points(row["difference"])]
        shown.add_row(str(name), *values, between, p_value(row["p_value"]))
    return shown


def _points(difference: float) -> str:
    """Return a difference of fractions in percentage points.

    >>> _points(0.0125)
    '+1.25'
    """
    return number(100 * difference, "+.2f")


def _points_interval(low: float, high: float) -> str:
    return interval(100 * low, 100 * high, "+.2f")


def _print_decomposition(comparison: Comparison) -> None:
    if comparison.decomposition is None:
        line(f"the difference cannot be split by stage: {comparison.not_decomposed}")
        show("")
        return
    accuracies = comparison.decomposition.accuracies
    columns = ["parts of the difference", "percentage points", f"{comparison.level:.0%} interval"]
    shown = table(*columns, fold_first=True)
    for name, effect in comparison.decomposition.effects.items():
        shown.add_row(EFFECTS[name], _points(effect.value), _points_interval(effect.low, effect.high))
    shown.add_row("together", _points(accuracies["BB"] - accuracies["AA"]), "")
    show(shown, "")


def _print_groups(name: str, groups: pd.DataFrame) -> None:
    """Print the groups with the strongest evidence of a change, if any text changed."""
    changed = groups[groups["wins"] + groups["losses"] > 0]
    if changed.empty:
        return
    shown = table(name, "texts", "A", "B", "wins", "losses", "p", "p (Holm)", fold_first=True)
    for key, row in changed.head(MAX_GROUPS).iterrows():
        group = key if isinstance(key, str) else f"{key[0]}: {key[1]}"
        counts = [f"{int(row[column]):,}" for column in ("wins", "losses")]
        accuracies = [number(row[column], ".2%") for column in ("accuracy_a", "accuracy_b")]
        p = [p_value(row["p_value"]), p_value(row["p_holm"])]
        shown.add_row(cell(group, MAX_NAME), f"{int(row['n_examples']):,}", *accuracies, *counts, *p)
    show(shown)
    line(f"p (Holm): corrected for {len(groups):,} tests")
    if name == "slice":
        line("tokens: words, punctuation marks, and the letters of scripts without blanks, such as Chinese")
    show("")


def _print_latency(comparison: Comparison) -> None:
    if comparison.latency is None:
        return
    shown = table("ms/text", "texts", "p50", "p95", "p99", "sum / all texts", fold_first=True)
    for (letter, stage), row in comparison.latency.iterrows():
        ms = [number(row[column], ".2f") for column in ("p50_ms", "p95_ms", "p99_ms", "mean_ms")]
        shown.add_row(f"{letter} {stage}", f"{int(row['n_texts']):,}", *ms)
    show(shown)
    show("ms/text: amortised, the time of a batch divided by its texts; sum: the times of all batches on all threads")
    keys = ("batch_size", "processor")
    differing = [key.replace("_", " ") for key in keys if len({run[key] for run in comparison.runs}) > 1]
    other = f" with different {' and '.join(differing)}" if differing else ""
    line(f"from separate runs{other}: other work on the machines is part of the difference")
    show("")


def _print_texts(pairs: pd.DataFrame, meaning: str, n_texts: int) -> None:
    """Print texts with their true label and the wrong answers."""
    if not n_texts or pairs.empty:
        return
    of = f" (the {n_texts} most confident of {len(pairs):,})" if len(pairs) > n_texts else ""
    show(title(f"{meaning}{of}"))
    for row in pairs.head(n_texts).itertuples():
        facts = [f"true label {row.label}"]
        facts += [f"A {row.a} ({row.decided_by_a} {row.probability_a:.2f})"] if row.a != row.label else []
        facts += [f"B {row.b} ({row.decided_by_b} {row.probability_b:.2f})"] if row.b != row.label else []
        text = f"{row.text} | {row.text_b}" if isinstance(row.text_b, str) else row.text
        dim = cell("; ".join(facts))
        dim.stylize("dim")
        show(Padding(cell(text), (0, 0, 0, 2)), Padding(dim, (0, 0, 0, 4)))
    show("")

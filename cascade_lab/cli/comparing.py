"""`cascade-lab compare`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from cascade_lab.cli.console import figure, line, printable, table
from cascade_lab.errors import CascadeLabError

if TYPE_CHECKING:
    import pandas as pd

    from cascade_lab.analysis.comparison import Comparison

ROWS = 8  # classes, and slices, that are shown


def compare(
    run_a: Annotated[Path, typer.Argument(metavar="RUN_A", help="The run to beat.", show_default=False)],
    run_b: Annotated[Path, typer.Argument(metavar="RUN_B", help="The run that may be better.", show_default=False)],
    output: Annotated[Path | None, typer.Option(help="Write all of it as JSON, with every text that changed.")] = None,
    texts: Annotated[int, typer.Option(min=0, help="How many texts of each kind of change to show.")] = 3,
    column: Annotated[
        list[str],
        typer.Option(
            metavar="COLUMN", help="Slice by this column of the examples [default: those of at most 50 values]."
        ),
    ] = [],  # noqa: B006 - typer takes lists as they are
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the file at the output.")] = False,
) -> None:
    """Say whether run B is better than run A, by how much, where, and which stage's doing it is.

    The runs are joined on example_id; their cascades may have other stages, as long as the gold labels are the same.

    Example: cascade-lab compare runs/demo runs/demo-tuned
    """
    from cascade_lab.analysis.comparison import compare as compare_runs
    from cascade_lab.run import Run, write_json

    if output is not None and output.exists() and not overwrite:
        raise CascadeLabError(f"{output} exists already; choose another output, or ask to overwrite it")
    found = compare_runs(Run.read(run_a), Run.read(run_b), columns=column or None)
    if output is not None:
        partial = output.with_name(f"{output.name}.unfinished")
        try:
            write_json(partial, found.to_dict())
            partial.replace(output)
        except OSError as error:
            raise CascadeLabError(f"{output}: cannot be written ({error.strerror}); choose another place") from error
    print_comparison(found, n_texts=texts)
    if output is not None:
        line(f"comparison: {output}")


def print_comparison(found: Comparison, *, n_texts: int) -> None:
    """Print a comparison: figures, changes, whose doing they are, classes, slices, latency, texts."""
    console = Console(highlight=False)
    for letter, run in zip("AB", found.runs, strict=True):
        thresholds = ", ".join(f"{name} {value:g}" for name, value in run["thresholds"].items() if value is not None)
        line(f"{letter}: {run['directory']} ({printable(run['cascade'])}{f'; {thresholds}' if thresholds else ''})")
    alone = ", ".join(f"{run['n_alone']:,} only in {k}" for k, run in zip("AB", found.runs, strict=True))
    line(f"{len(found.pairs):,} texts in both, {alone}")
    counts = found.pairs["change"].value_counts()
    wins, losses, otherwise = (int(counts.get(kind, 0)) for kind in ("win", "loss", "wrong otherwise"))
    console.print()
    console.print(_figures(found.figures))
    console.print()
    console.print(Text(found.verdict, style="bold"))
    line(f"wins, B right where A is wrong: {wins:,}; losses: {losses:,}; wrong in another way: {otherwise:,}")
    console.print()
    _print_decomposition(console, found)
    for name, rows in (("gold label", found.classes), ("slice", found.slices)):
        _print_groups(console, name, rows)
    if found.latency is not None:
        _print_latency(console, found)
    titles = {"win": "B is right, A was wrong", "loss": "B is wrong, A was right", "wrong otherwise": "both are wrong"}
    for kind, title in titles.items():
        rows = found.changes(kind)
        if not n_texts or rows.empty:
            continue
        of = f" (the {n_texts} most confident of {len(rows):,})" if len(rows) > n_texts else ""
        console.print(Text(f"{title}{of}", style="bold"))
        for row in rows.head(n_texts).itertuples():
            said = [f"gold {row.label}"]
            said += [f"A {row.a} ({row.decided_by_a} {row.probability_a:.2f})"] if kind != "loss" else []
            said += [f"B {row.b} ({row.decided_by_b} {row.probability_b:.2f})"] if kind != "win" else []
            whole = row.text if row.text_b is None or row.text_b != row.text_b else f"{row.text} | {row.text_b}"
            console.print(Padding(Text(printable(whole)), (0, 0, 0, 2)))
            console.print(Padding(Text(printable("; ".join(said)), style="dim"), (0, 0, 0, 4)))
        console.print()


def _figures(figures: pd.DataFrame) -> Table:
    shown = _table("figure", "A", "B", "B - A", "95% interval", "McNemar p")
    for name, row in figures.iterrows():
        between = "–" if row["low"] != row["low"] else f"{row['low']:+.4f} to {row['high']:+.4f}"
        values = [figure(row["a"], 4), figure(row["b"], 4), _signed(row["difference"])]
        shown.add_row(str(name), *values, between, _p(row["p_value"]))
    return shown


def _print_decomposition(console: Console, found: Comparison) -> None:
    if found.decomposition is None:
        line(f"whose doing it is cannot be said: {found.not_decomposed}")
        console.print()
        return
    accuracies = found.decomposition.accuracies
    shown = _table("of the difference in accuracy", "points", "95% interval")
    names = {
        "gate": "gate: B's for A's",
        "classifier": "classifier: B's for A's",
        "interaction": "both, beyond the sum of the two",
    }
    for name, effect in found.decomposition.effects.items():
        shown.add_row(names[name], _signed(effect.value), f"{effect.low:+.4f} to {effect.high:+.4f}")
    shown.add_row("together", _signed(accuracies["BB"] - accuracies["AA"]), "")
    console.print(shown)
    console.print()


def _print_groups(console: Console, name: str, groups: pd.DataFrame) -> None:
    """Print the strongest of `paired_tests`, if anything changed in one."""
    changed = groups[groups["wins"] + groups["losses"] > 0]
    if changed.empty:
        return
    shown = _table(name, "texts", "A", "B", "wins", "losses", "p", "p (Holm)")
    for key, row in changed.head(ROWS).iterrows():
        said = printable(key if isinstance(key, str) else f"{key[0]}: {key[1]}")
        counts = [f"{int(row[k]):,}" for k in ("wins", "losses")]
        accuracies = [figure(row[k], 4) for k in ("accuracy_a", "accuracy_b")]
        short = said if len(said) <= 40 else said[:39] + "…"
        n = f"{int(row['n_examples']):,}"
        shown.add_row(Text(short), n, *accuracies, *counts, _p(row["p_value"]), _p(row["p_holm"]))
    console.print(shown)
    line(f"p (Holm): corrected for looking at {len(groups):,}")
    console.print()


def _print_latency(console: Console, found: Comparison) -> None:
    shown = _table("time a text", "texts", "p50 ms", "p95 ms", "p99 ms", "mean ms, all texts")
    for (letter, stage), row in found.latency.iterrows():
        ms = [figure(row[name], 2) for name in ("p50_ms", "p95_ms", "p99_ms", "mean_ms")]
        shown.add_row(f"{letter} {stage}", f"{int(row['n_texts']):,}", *ms)
    console.print(shown)
    keys = ("batch_size", "processor")
    differs = [key.replace("_", " ") for key in keys if len({run[key] for run in found.runs}) > 1]
    other = f", of another {' and '.join(differs)}" if differs else ""
    line(f"from separate runs{other}: what else their machines did is part of the difference")
    console.print()


def _table(*columns: str) -> Table:
    """Make a table whose names are folded on a narrow terminal, and whose numbers are never cut."""
    shown = table(*columns)
    shown.columns[0].no_wrap = False
    return shown


def _signed(value: float) -> str:
    return "–" if value != value else f"{value:+.4f}"


def _p(value: float) -> str:
    return "–" if value != value else "<0.0001" if value < 0.0001 else f"{value:.4f}"

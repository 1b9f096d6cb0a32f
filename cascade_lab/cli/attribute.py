"""`cascade-lab attribute` shows which words of a text raise or lower a logit."""

from __future__ import annotations

from contextlib import nullcontext
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from cascade_lab.cli.console import spinner
from cascade_lab.cli.options import CASCADE, OVERWRITE
from cascade_lab.cli.printing import cell, line, next_step, show, table
from cascade_lab.text import printable

if TYPE_CHECKING:
    from cascade_lab.bert.attributions import Attribution

MAX_BAR = 12  # characters of the bar of the highest score


def attribute(
    cascade: CASCADE,
    texts: Annotated[list[str], typer.Argument(metavar="TEXT...", help="Texts to explain.", show_default=False)],
    stage: Annotated[str | None, typer.Option(help="The stage to explain [default: the last].")] = None,
    method: Annotated[
        Literal["integrated_gradients", "gradient_x_input"], typer.Option(help="How gradients become scores.")
    ] = "integrated_gradients",
    target: Annotated[
        str | None,
        typer.Option(help="The label to explain [default: a gate's pass label, or the predicted label]."),
    ] = None,
    n_steps: Annotated[int, typer.Option(min=1, help="Points at which gradients are taken.")] = 64,
    output: Annotated[Path | None, typer.Option(help="An HTML page to write as well.")] = None,
    overwrite: OVERWRITE = False,
) -> None:
    """Show which words of a text raise or lower a stage's logit of a label.

    Example: cascade-lab attribute cascade.toml "what is my balance" --stage gate
    """
    from cascade_lab.atomic import locked_file
    from cascade_lab.spec import CascadeSpec

    spec = CascadeSpec.read(cascade)
    explained = spec.last if stage is None else spec.stage(stage)
    lock = nullcontext() if output is None else locked_file(output, overwrite=overwrite, what="page")
    with lock:
        with spinner("attributing"):
            from cascade_lab.bert import attributions

            results = attributions.attribute(explained, texts, method=method, target=target, n_steps=n_steps)
        if output is not None:
            _write_page(results, f"{spec.name}, stage {explained.name}", output)
    for result in results:
        _print_attribution(result, explained.name)
    if output is not None:
        line(f"page: {output}")
    next_step("run", cascade, "EVALSET", "--output", "RUN")


def _print_attribution(result: Attribution, stage: str) -> None:
    highest = max(abs(result.scores).max(), 1e-12)
    shown = table("word", "score", "")
    shown.columns[2].justify = "left"
    for word, score in zip(result.words, result.scores, strict=True):
        bar = ("█" if score > 0 else "░") * round(MAX_BAR * abs(score) / highest)
        shown.add_row(cell(word), f"{score:+.3f}", bar)
    show(shown)
    unread = f"; {result.n_unread:,} words do not fit in max_seq_length" if result.n_unread else ""
    line(
        f"{stage}, {result.target}: logit {result.logit:.3f}, of the baseline {result.baseline_logit:.3f}; "
        f"completeness error {result.completeness_error:+.2g}{unread}"
    )


def _write_page(results: list[Attribution], title: str, output: Path) -> None:
    from cascade_lab.atomic import write_text
    from cascade_lab.displays.text import TextAttributionDisplay

    body = TextAttributionDisplay(results, title=title).to_html()
    title = escape(printable(title))
    head = f'<!DOCTYPE html>\n<html lang="en"><meta charset="utf-8"><title>{title}</title>'
    write_text(output, f"{head}{body}</html>\n")

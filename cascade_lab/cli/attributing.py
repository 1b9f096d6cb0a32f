"""`cascade-lab attribute`."""

from __future__ import annotations

from html import escape
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.text import Text

from cascade_lab.cli.console import line, printable, table, tensorflow
from cascade_lab.errors import CascadeLabError

_BAR = 12  # letters of a bar, at the highest score


def attribute(
    path: Annotated[Path, typer.Argument(metavar="CASCADE", help="A cascade.toml.", show_default=False)],
    texts: Annotated[list[str], typer.Argument(metavar="TEXT...", help="Texts to explain.", show_default=False)],
    stage: Annotated[str | None, typer.Option(help="The stage to ask [default: the last].")] = None,
    method: Annotated[str, typer.Option(help="integrated_gradients or gradient_x_input.")] = "integrated_gradients",
    target: Annotated[
        str | None, typer.Option(help="The label to explain [default: a gate's pass label, or the answer].")
    ] = None,
    n_steps: Annotated[int, typer.Option(min=1, help="Points of the integral.")] = 64,
    output: Annotated[Path | None, typer.Option(help="An HTML page to write as well.")] = None,
) -> None:
    """Show which words of a text a stage's answer rests on.

    Example: cascade-lab attribute cascade.toml "what is my balance" --stage gate
    """
    from cascade_lab.displays.text import TextAttributionDisplay
    from cascade_lab.spec import CascadeSpec

    spec = CascadeSpec.read(path)
    asked = spec.last if stage is None else spec.stage(stage)
    with tensorflow("attributing"):
        from cascade_lab.bert import attributions

        found = attributions.attribute(asked, texts, method=method, target=target, n_steps=n_steps)
    for one in found:
        highest = max(abs(one.scores).max(), 1e-12)
        shown = table("word", "score", "")
        shown.columns[2].justify = "left"
        for word, score in zip(one.words, one.scores, strict=True):
            bar = ("█" if score > 0 else "░") * round(_BAR * abs(score) / highest)
            shown.add_row(Text(printable(word)), f"{score:+.3f}", bar)
        Console().print(shown)
        unread = f"; {one.n_unread:,} words are not read" if one.n_unread else ""
        line(
            f"{asked.name}, {one.target}: logit {one.logit:.3f}, of the baseline {one.baseline_logit:.3f}; "
            f"completeness error {one.completeness_error:+.2g}{unread}"
        )
    if output is not None:
        title = f"{spec.name}, stage {asked.name}"
        body = TextAttributionDisplay(found, title=title)._repr_html_()
        page = f'<!DOCTYPE html>\n<html lang="en"><meta charset="utf-8"><title>{escape(title)}</title>{body}</html>\n'
        try:
            output.parent.mkdir(parents=True, exist_ok=True)
            output.write_text(page, encoding="utf-8")
        except OSError as error:
            raise CascadeLabError(f"{output}: cannot be written ({error.strerror}); choose another place") from error
        line(f"page: {output}")

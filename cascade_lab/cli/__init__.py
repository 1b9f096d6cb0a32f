"""`cascade-lab`: a thin skin over the package. What a command needs is imported when it runs."""

from __future__ import annotations

from typing import Annotated

import typer

from cascade_lab.cli import (
    attributing,
    auditing,
    calibrating,
    checking,
    checkpoints,
    comparing,
    inspecting,
    reporting,
    runs,
    timing,
    tuning,
)
from cascade_lab.cli.console import Group

app = typer.Typer(
    cls=Group,
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",
    context_settings={"help_option_names": ["-h", "--help"]},
)


@app.callback()
def options(
    debug: Annotated[bool, typer.Option("--debug", help="Show where in the code an error arose.")] = False,
) -> None:
    """The lab bench for cascades of BERT classifiers.

    A cascade is two or more fine-tuned BERT checkpoints in series, named in a cascade.toml. **run** pushes an
    eval set through it once and keeps every stage's logits in a run directory; everything after that is
    arithmetic on those.

    A first look:

    * cascade-lab inspect cascade.toml

    * cascade-lab predict cascade.toml "what is my balance"

    * cascade-lab run cascade.toml test.tsv --output runs/first
    """


app.command()(runs.run)
app.command()(runs.predict)
app.command()(inspecting.inspect)
app.command()(reporting.report)
app.command()(reporting.verify)
app.command()(tuning.tune)
app.command()(attributing.attribute)
app.command()(calibrating.calibrate)
app.command()(comparing.compare)
app.command()(timing.latency)
app.command("verify-precision")(checking.verify_precision)
app.command()(auditing.audit)
app.command()(auditing.correct)
app.command()(checkpoints.finetune)
app.command()(checkpoints.vocabulary)
app.command("import-hf")(checkpoints.import_hf)
app.command()(checkpoints.export)
app.command()(checkpoints.study)


def main() -> None:
    """The `cascade-lab` command."""
    app()

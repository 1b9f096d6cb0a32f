"""Collects the commands of `cascade-lab`; each imports what it needs only when it runs."""

from __future__ import annotations

from typing import Annotated

import typer

from cascade_lab.cli.attribute import attribute
from cascade_lab.cli.audit import audit
from cascade_lab.cli.calibrate import calibrate
from cascade_lab.cli.collect import collect
from cascade_lab.cli.compare import compare
from cascade_lab.cli.console import Command, Group
from cascade_lab.cli.correct import correct
from cascade_lab.cli.export import export
from cascade_lab.cli.finetune import finetune
from cascade_lab.cli.fit_rejector import fit_rejector
from cascade_lab.cli.import_hf import import_hf
from cascade_lab.cli.import_logits import import_logits
from cascade_lab.cli.init import init
from cascade_lab.cli.inspect import inspect
from cascade_lab.cli.latency import latency
from cascade_lab.cli.log import log
from cascade_lab.cli.monitor import monitor
from cascade_lab.cli.predict import predict
from cascade_lab.cli.report import report
from cascade_lab.cli.run import run
from cascade_lab.cli.runs import runs
from cascade_lab.cli.score import score
from cascade_lab.cli.serve import serve
from cascade_lab.cli.study import study
from cascade_lab.cli.tune import tune
from cascade_lab.cli.verify import verify
from cascade_lab.cli.verify_precision import verify_precision
from cascade_lab.cli.vocabulary import vocabulary

app = typer.Typer(
    cls=Group,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",
    context_settings={"help_option_names": ["-h", "--help"]},
)

COMMANDS = (
    init,
    run,
    import_logits,
    collect,
    predict,
    score,
    inspect,
    runs,
    report,
    verify,
    tune,
    fit_rejector,
    attribute,
    calibrate,
    compare,
    log,
    latency,
    serve,
    monitor,
    verify_precision,
    audit,
    correct,
    finetune,
    vocabulary,
    import_hf,
    export,
    study,
)


def _print_version(value: bool) -> None:
    if value:
        from cascade_lab.provenance import package_version

        typer.echo(f"cascade-lab {package_version('cascade-lab')}")
        raise typer.Exit


@app.callback()
def root(
    debug: Annotated[
        bool, typer.Option("--debug", help="Show the traceback of an error, and TensorFlow's messages.")
    ] = False,
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Show the version and exit.")
    ] = False,
) -> None:
    """The lab bench for cascades of BERT classifiers.

    A cascade is two or more fine-tuned BERT checkpoints in series, described in a cascade.toml. **run** scores an eval
    set with it once and keeps the logits of every stage in a run directory. The commands after that compute from the
    kept logits.

    A first look:

    * cascade-lab init GATE INTENT test.csv --output cascade.toml

    * cascade-lab inspect cascade.toml

    * cascade-lab predict cascade.toml "what is my balance"

    * cascade-lab run cascade.toml test.tsv --output runs/first
    """


for command in COMMANDS:
    app.command(command.__name__.replace("_", "-"), cls=Command)(command)


def main() -> None:
    """Run the command `cascade-lab`."""
    app(prog_name="cascade-lab")

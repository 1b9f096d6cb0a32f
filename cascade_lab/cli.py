"""`cascade-lab`: a thin skin over the package. What a command needs is imported when it runs."""

from __future__ import annotations

import json
import math
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text
from typer.core import TyperGroup

from cascade_lab.errors import CascadeLabError

if TYPE_CHECKING:
    from cascade_lab.run import Run
    from cascade_lab.spec import CascadeSpec

BATCH_SIZE = 32


class _Group(TyperGroup):
    """Shows an error that a person can mend as one line, exit code 2."""

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except CascadeLabError as error:
            if ctx.params.get("debug"):
                raise
            typer.echo("error: " + str(error).replace("\n", " "), err=True)
            raise typer.Exit(2) from error


app = typer.Typer(
    cls=_Group,
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",
    context_settings={"help_option_names": ["-h", "--help"]},
)

CascadeFile = Annotated[Path, typer.Argument(metavar="CASCADE", help="A cascade.toml.", show_default=False)]
BatchSize = Annotated[int, typer.Option(min=1, help="The most texts in one batch of a stage.")]


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


@app.command()
def run(
    cascade: CascadeFile,
    evalset: Annotated[
        Path,
        typer.Argument(
            metavar="EVALSET",
            help="Labelled texts: tsv, csv, jsonl or parquet with columns text and label (optional: text_b, "
            "example_id, STAGE_label, any others), or CLINC150's json.",
            show_default=False,
        ),
    ],
    split: Annotated[
        str | None, typer.Option(help="Take only this split (of CLINC150's json, or of a column 'split').")
    ] = None,
    output: Annotated[Path | None, typer.Option(help="The run directory to make [default: runs/NAME-TIME].")] = None,
    limit: Annotated[
        int | None, typer.Option(min=1, help="Take only so many examples, evenly spaced through the set.")
    ] = None,
    shadow: Annotated[
        bool,
        typer.Option(
            "--shadow/--no-shadow",
            help="Afterwards let the later stages score what a gate stopped, so that other thresholds can be replayed.",
        ),
    ] = True,
    batch_size: BatchSize = BATCH_SIZE,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the run at the output.")] = False,
    report: Annotated[bool, typer.Option("--report/--no-report", help="Draw figures and write report.html.")] = True,
) -> None:
    """Run a cascade over an eval set: a run directory, figures, report.html, and a table.

    Example: cascade-lab run cascade.toml data_full.json --split test --output runs/clinc150
    """
    from cascade_lab.evalset import EvalSet
    from cascade_lab.run import check_output
    from cascade_lab.serial import check_labels
    from cascade_lab.spec import CascadeSpec

    # All that can be refused cheaply is, before TensorFlow is loaded.
    spec = CascadeSpec.read(cascade)
    examples = EvalSet.read(evalset, split=split)
    check_labels(spec, examples.examples, examples.locations)
    if limit is not None:
        examples = examples.limit(limit)
    output = output or Path("runs") / f"{spec.name}-{datetime.now():%Y%m%d-%H%M%S}"
    check_output(output, overwrite=overwrite)
    with _load(spec) as loaded:
        made = loaded.run(
            examples,
            output=output,
            shadow=shadow,
            batch_size=batch_size,
            overwrite=overwrite,
            progress=sys.stderr.isatty(),
        )
    if report:
        _report(made, None)
    _print_run(made)


@app.command()
def predict(
    cascade: CascadeFile,
    texts: Annotated[
        list[str],
        typer.Argument(metavar="TEXT...", help="Texts, or - for one a line on standard input.", show_default=False),
    ],
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object a line instead of a table.")] = False,
    batch_size: BatchSize = BATCH_SIZE,
) -> None:
    """Answer texts that have no label.

    Example: cascade-lab predict cascade.toml - --json < texts.txt > answers.jsonl
    """
    from cascade_lab.spec import CascadeSpec

    spec = CascadeSpec.read(cascade)
    if texts == ["-"]:
        texts = _lines(sys.stdin.buffer.read())
    with _load(spec) as loaded:
        table = loaded.predict(texts, batch_size=batch_size, progress=len(texts) > 500 and sys.stderr.isatty())
    if as_json:
        for text, row in zip(texts, table.to_dict("records"), strict=True):
            row = {k: None if isinstance(v, float) and math.isnan(v) else v for k, v in row.items()}
            print(json.dumps({"text": text, **row}, ensure_ascii=False))
        return
    shown = _table("text", "predicted", "decided by", *[f"p({_asked(stage)})" for stage in spec.stages])
    for text, row in zip(texts, table.itertuples(index=False), strict=True):
        probabilities = [_figure(p, 3) for p in row[3:]]
        shown.add_row(Text(_printable(text)), Text(row.predicted), row.decided_by, *probabilities)
    Console().print(shown)


@app.command()
def inspect(
    path: Annotated[
        Path,
        typer.Argument(
            metavar="PATH",
            help="A cascade.toml, a checkpoint (directory or prefix), or a run.",
            show_default=False,
        ),
    ],
) -> None:
    """Show what a cascade, a checkpoint or a run holds, and whether it is sound.

    Example: cascade-lab inspect cascade.toml
    """
    if path.suffix == ".toml":
        _print_cascade(path)
    elif (path / "manifest.json").is_file():
        from cascade_lab.run import Run

        _print_run(Run.read(path))
    else:
        _print_checkpoint(path)


@app.command()
def report(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="A run directory.", show_default=False)],
    output: Annotated[
        Path | None, typer.Option(help="The HTML file to write [default: report.html in the run].")
    ] = None,
) -> None:
    """Draw a run's figures and write its report.html again, from what it keeps.

    Example: cascade-lab report runs/clinc150
    """
    from cascade_lab.run import Run

    made = _report(Run.read(run), output)
    Console().print(f"report: {made}", soft_wrap=True, markup=False, highlight=False)


def main() -> None:
    """The `cascade-lab` command."""
    app()


def _load(spec: CascadeSpec) -> Any:
    with _tensorflow(f"loading {len(spec.stages)} stages"):
        from cascade_lab.cascade import Cascade

        return Cascade.load(spec)


@contextmanager
def _tensorflow(doing: str) -> Iterator[None]:
    """Say what goes on while TensorFlow loads, and keep its start-up chatter off the screen.

    It writes that to file descriptor 2 itself, before it reads any setting of how much to write.
    """
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    sys.stderr.flush()
    kept = os.dup(2)
    with open(kept, "w", encoding="utf-8") as screen, open(os.devnull, "w") as nowhere:
        os.dup2(nowhere.fileno(), 2)
        try:
            with Console(file=screen).status(doing):
                yield
        finally:
            os.dup2(kept, 2)


def _report(run: Run, output: Path | None) -> Path:
    from cascade_lab.report import write_figures, write_report

    with Console(stderr=True).status("drawing figures"):
        write_figures(run)
    return write_report(run, output, progress=sys.stderr.isatty())


def _lines(content: bytes) -> list[str]:
    lines = content.removesuffix(b"\n").split(b"\n") if content else []
    texts = []
    for number, line in enumerate(lines, 1):
        try:
            texts.append(line.removesuffix(b"\r").decode())
        except UnicodeDecodeError as error:
            raise CascadeLabError(
                f"standard input line {number}: byte {error.start} is not UTF-8; send UTF-8"
            ) from error
    return texts


def _print_run(run: Run) -> None:
    """Print a run's figures: a row a stage, then the whole."""
    from cascade_lab.analysis.latency import stage_latencies

    console = Console()
    metrics, latencies = run.metrics, stage_latencies(run)
    table = _table("stage", "reached", "accuracy", "AUROC", "p50 ms", "p95 ms", "p99 ms", "share")
    for name, figures in metrics["stages"].items():
        latency = latencies[name]
        table.add_row(
            name,
            f"{figures['n_reached']:,} ({figures['reach']:.1%})",
            _figure(figures["accuracy"], 4),
            _figure(figures.get("auroc"), 4),
            *[_figure(value, 2) for value in latency.percentiles_ms.values()],
            _percent(latency.share),
        )
    whole = _table("end to end", "accuracy", "in scope", "reject recall", "reject precision", "macro F1")
    end = metrics["end_to_end"]
    keys = ("accuracy", "in_scope_accuracy", "reject_recall", "reject_precision", "macro_f1")
    whole.add_row(f"{metrics['n_examples']:,} texts", *[_figure(end[key], 4) for key in keys])
    console.print(Text(run.spec.name, style="bold"), table, whole)
    for name in ("", "report.html"):
        if (run.directory / name).exists():
            console.print(
                f"{'report' if name else 'run'}: {run.directory / name}",
                soft_wrap=True,
                markup=False,
                highlight=False,
            )


def _print_cascade(path: Path) -> None:
    from cascade_lab.spec import CascadeSpec

    spec = CascadeSpec.read(path)
    with _tensorflow("reading checkpoints"):
        from cascade_lab.bert.checkpoint import read_checkpoint

        checkpoints = [read_checkpoint(stage) for stage in spec.stages]
    table = _table("stage", "labels", "goes on if", "size", "weights", "tokens", "length", "case")
    for stage, checkpoint in zip(spec.stages, checkpoints, strict=True):
        config = checkpoint.config
        rule = f"p({stage.pass_label}) ≥ {stage.threshold:g}" if stage.is_gate else "last"
        table.add_row(
            stage.name,
            Text(", ".join(stage.labels) if len(stage.labels) <= 3 else f"{len(stage.labels)}"),
            Text(rule),
            f"{config['num_hidden_layers']} × {config['hidden_size']}",
            f"{sum(weight.size for weight in checkpoint.weights.values()):,}",
            f"{len(checkpoint.vocab):,}",
            str(stage.max_seq_length),
            "lowered" if stage.do_lower_case else "kept",
        )
    console = Console()
    console.print(Text(spec.name, style="bold"), table)
    for stage, checkpoint in zip(spec.stages, checkpoints, strict=True):
        console.print(f"{stage.name}: {checkpoint.prefix}", soft_wrap=True, markup=False, highlight=False)


def _print_checkpoint(path: Path) -> None:
    with _tensorflow("reading the checkpoint"):
        from cascade_lab.bert.checkpoint import find_checkpoint, list_variables

        prefix = find_checkpoint(path)
        variables = list_variables(prefix)
    table = _table("variable", "shape", "type", "numbers")
    slots = [name for name in variables if name.endswith(("/adam_m", "/adam_v"))]
    for name, (shape, kind) in variables.items():
        if name not in slots:
            table.add_row(Text(name), " × ".join(map(str, shape)) or "scalar", kind, f"{math.prod(shape):,}")
    numbers = sum(math.prod(shape) for name, (shape, _) in variables.items() if name not in slots)
    console = Console()
    console.print(table)
    console.print(
        f"{prefix}: {len(variables) - len(slots)} variables, {numbers:,} numbers; {len(slots)} Adam slots not shown",
        soft_wrap=True,
        markup=False,
        highlight=False,
    )


def _table(*columns: str) -> Table:
    table = Table(box=None, pad_edge=False, header_style="bold", padding=(0, 2, 0, 0))
    for i, column in enumerate(columns):
        table.add_column(
            Text(column),
            justify="left" if i == 0 else "right",
            no_wrap=column not in ("text", "variable"),
            overflow="fold",
        )
    return table


def _asked(stage: Any) -> str:
    return stage.pass_label if stage.is_gate else stage.name


def _figure(value: float | None, digits: int) -> str:
    return "–" if value is None or math.isnan(value) else f"{value:.{digits}f}"


def _percent(value: float) -> str:
    return "–" if math.isnan(value) else f"{value:.0%}"


def _printable(text: str) -> str:
    """Keep a text on one line of a terminal, its control characters harmless."""
    shown = "".join(char if char.isprintable() else "�" for char in text.replace("\n", " "))
    return shown if len(shown) <= 200 else shown[:199] + "…"

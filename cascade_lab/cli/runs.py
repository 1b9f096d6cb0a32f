"""`cascade-lab run` and `predict`."""

from __future__ import annotations

import json
import math
import sys
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.text import Text

from cascade_lab.cli.console import figure, line, percent, printable, table, tensorflow
from cascade_lab.cli.reporting import make_report
from cascade_lab.errors import CascadeLabError

if TYPE_CHECKING:
    from cascade_lab.run import Run
    from cascade_lab.spec import CascadeSpec

CascadeFile = Annotated[Path, typer.Argument(metavar="CASCADE", help="A cascade.toml.", show_default=False)]
BatchSize = Annotated[
    int | None, typer.Option(min=1, help="The most texts in one batch of a stage [default: what is fastest].")
]


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
    batch_size: BatchSize = None,
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
        make_report(made)
    print_run(made)


def predict(
    cascade: CascadeFile,
    texts: Annotated[
        list[str],
        typer.Argument(metavar="TEXT...", help="Texts, or - for one a line on standard input.", show_default=False),
    ],
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object a line instead of a table.")] = False,
    batch_size: BatchSize = None,
) -> None:
    """Answer texts that have no label.

    Example: cascade-lab predict cascade.toml - --json < texts.txt > answers.jsonl
    """
    from cascade_lab.spec import CascadeSpec

    spec = CascadeSpec.read(cascade)
    if texts == ["-"]:
        texts = _lines(sys.stdin.buffer.read())
    with _load(spec) as loaded:
        answers = loaded.predict(texts, batch_size=batch_size, progress=len(texts) > 500 and sys.stderr.isatty())
    if as_json:
        for text, row in zip(texts, answers.to_dict("records"), strict=True):
            row = {k: None if isinstance(v, float) and math.isnan(v) else v for k, v in row.items()}
            print(json.dumps({"text": text, **row}, ensure_ascii=False))
        return
    shown = table("text", "predicted", "decided by", *[f"p({_asked(stage)})" for stage in spec.stages])
    for text, row in zip(texts, answers.itertuples(index=False), strict=True):
        probabilities = [figure(p, 3) for p in row[3:]]
        shown.add_row(Text(printable(text)), Text(row.predicted), row.decided_by, *probabilities)
    Console().print(shown)


def _load(spec: CascadeSpec) -> Any:
    with tensorflow(f"loading {len(spec.stages)} stages"):
        from cascade_lab.cascade import Cascade

        return Cascade.load(spec)


def _lines(content: bytes) -> list[str]:
    lines = content.removesuffix(b"\n").split(b"\n") if content else []
    texts = []
    for number, text in enumerate(lines, 1):
        try:
            texts.append(text.removesuffix(b"\r").decode())
        except UnicodeDecodeError as error:
            raise CascadeLabError(
                f"standard input line {number}: byte {error.start} is not UTF-8; send UTF-8"
            ) from error
    return texts


def print_run(run: Run) -> None:
    """Print a run's figures: a row a stage, then the whole."""
    from cascade_lab.analysis.latency import stage_latencies

    console = Console()
    metrics, latencies = run.metrics, stage_latencies(run)
    stages = table("stage", "reached", "accuracy", "AUROC", "p50 ms", "p95 ms", "p99 ms", "share")
    for name, figures in metrics["stages"].items():
        latency = latencies[name]
        stages.add_row(
            name,
            f"{figures['n_reached']:,} ({figures['reach']:.1%})",
            figure(figures["accuracy"], 4),
            figure(figures.get("auroc"), 4),
            *[figure(value, 2) for value in latency.percentiles_ms.values()],
            percent(latency.share),
        )
    whole = table("end to end", "accuracy", "in scope", "reject recall", "reject precision", "macro F1")
    end = metrics["end_to_end"]
    keys = ("accuracy", "in_scope_accuracy", "reject_recall", "reject_precision", "macro_f1")
    whole.add_row(f"{metrics['n_examples']:,} texts", *[figure(end[key], 4) for key in keys])
    console.print(Text(run.spec.name, style="bold"), stages, whole)
    for name, path in (("run", run.directory), ("report", run.directory / "report.html")):
        if path.exists():
            line(f"{name}: {path}")


def _asked(stage: Any) -> str:
    return stage.pass_label if stage.is_gate else stage.name

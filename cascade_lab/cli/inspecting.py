"""`cascade-lab inspect`."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.text import Text

from cascade_lab.cli.console import line, table, tensorflow
from cascade_lab.cli.runs import print_run


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

        print_run(Run.read(path))
    else:
        _print_checkpoint(path)


def _print_cascade(path: Path) -> None:
    from cascade_lab.spec import CascadeSpec

    spec = CascadeSpec.read(path)
    with tensorflow("reading checkpoints"):
        from cascade_lab.bert.checkpoint import read_checkpoint

        checkpoints = [read_checkpoint(stage) for stage in spec.stages]
    shown = table("stage", "labels", "goes on if", "size", "weights", "tokens", "length", "case")
    for stage, checkpoint in zip(spec.stages, checkpoints, strict=True):
        config = checkpoint.config
        rule = f"p({stage.pass_label}) ≥ {stage.threshold:g}" if stage.is_gate else "last"
        shown.add_row(
            stage.name,
            Text(", ".join(stage.labels) if len(stage.labels) <= 3 else f"{len(stage.labels)}"),
            Text(rule),
            f"{config['num_hidden_layers']} × {config['hidden_size']}",
            f"{sum(weight.size for weight in checkpoint.weights.values()):,}",
            f"{len(checkpoint.vocab):,}",
            str(stage.max_seq_length),
            "lowered" if stage.do_lower_case else "kept",
        )
    Console().print(Text(spec.name, style="bold"), shown)
    for stage, checkpoint in zip(spec.stages, checkpoints, strict=True):
        line(f"{stage.name}: {checkpoint.prefix}")


def _print_checkpoint(path: Path) -> None:
    with tensorflow("reading the checkpoint"):
        from cascade_lab.bert.checkpoint import find_checkpoint, list_variables

        prefix = find_checkpoint(path)
        variables = list_variables(prefix)
    shown = table("variable", "shape", "type", "numbers")
    slots = [name for name in variables if name.endswith(("/adam_m", "/adam_v"))]
    for name, (shape, kind) in variables.items():
        if name not in slots:
            shown.add_row(Text(name), " × ".join(map(str, shape)) or "scalar", kind, f"{math.prod(shape):,}")
    numbers = sum(math.prod(shape) for name, (shape, _) in variables.items() if name not in slots)
    Console().print(shown)
    line(f"{prefix}: {len(variables) - len(slots)} variables, {numbers:,} numbers; {len(slots)} Adam slots not shown")

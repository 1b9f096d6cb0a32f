"""`cascade-lab inspect` shows what a cascade, a checkpoint or a run contains."""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from cascade_lab.cli.console import spinner
from cascade_lab.cli.printing import cell, line, next_step, print_run, show, table, title

if TYPE_CHECKING:
    from cascade_lab.spec import StageSpec

MAX_LABELS = 3  # labels of a stage that are named; of more, only their number is shown


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
    """Show what a cascade, a checkpoint or a run contains, and check it.

    Example: cascade-lab inspect cascade.toml
    """
    if path.suffix == ".toml":
        _print_cascade(path)
        next_step("run", path, "EVALSET", "--output", "RUN")
    elif (path / "manifest.json").is_file():
        from cascade_lab.run import Run

        print_run(Run.read(path))
        next_step("report", path, "--notebook", "03_analyse_errors")
    else:
        _print_checkpoint(path)
        next_step("init", "GATE", "INTENT", "EVALSET", "--output", "cascade.toml")


def _print_cascade(path: Path) -> None:
    from cascade_lab.spec import CascadeSpec

    spec = CascadeSpec.read(path)
    with spinner("reading checkpoints"):
        from cascade_lab.bert.checkpoint import read_checkpoint

        checkpoints = [read_checkpoint(stage) for stage in spec.stages]
    shown = table("stage", "labels", "goes on if", "size", "weights", "tokens", "length", "case")
    for stage, checkpoint in zip(spec.stages, checkpoints, strict=True):
        config = checkpoint.config
        shown.add_row(
            stage.name,
            cell(", ".join(stage.labels) if len(stage.labels) <= MAX_LABELS else f"{len(stage.labels)}"),
            cell(_rule(stage)),
            f"{config['num_hidden_layers']} × {config['hidden_size']}",
            f"{sum(weight.size for weight in checkpoint.weights.values()):,}",
            _n_tokens(len(checkpoint.vocab), config["vocab_size"]),
            str(stage.max_seq_length),
            "lower" if stage.do_lower_case else "kept",
        )
    show(title(spec.name), shown)
    for stage, checkpoint in zip(spec.stages, checkpoints, strict=True):
        line(f"{stage.name}: {checkpoint.prefix}")
        if stage.precision != "float32":
            line(f"{stage.name}: {_precision(stage)}")


def _precision(stage: StageSpec) -> str:
    """Return a stage's precision in words; of mixed precision also its bounds and what they were measured on."""
    bounds = stage.precision_bounds
    if stage.precision != "mixed":
        return f"precision {stage.precision}"
    if bounds is None:
        return "precision mixed, without precision_bounds: `cascade-lab verify-precision --calibrate` measures them"
    n_texts = bounds.measured_on.get("n_texts")
    of_texts = f", measured on {n_texts:,} texts" if isinstance(n_texts, int) else ""
    return (
        f"precision mixed; bounds: {bounds.labels:.4g} for labels, {bounds.confidence:.4g} for the confidence{of_texts}"
    )


def _n_tokens(n_tokens: int, n_rows: int) -> str:
    """Return the number of tokens, and of the embedding's rows where it has more."""
    return f"{n_tokens:,}" if n_tokens == n_rows else f"{n_tokens:,} of {n_rows:,}"


def _rule(stage: StageSpec) -> str:
    if stage.is_deferral:
        return f"answers at confidence ≥ {stage.threshold:g}"
    return f"p({stage.pass_label}) ≥ {stage.threshold:g}" if stage.is_gate else "last"


def _print_checkpoint(path: Path) -> None:
    with spinner("reading the checkpoint"):
        from cascade_lab.bert.checkpoint import find_checkpoint, list_variables

        prefix = find_checkpoint(path)
        variables = list_variables(prefix)
    shown = table("variable", "shape", "type", "numbers")
    slots = [name for name in variables if name.endswith(("/adam_m", "/adam_v"))]
    n_numbers = 0
    for name, (shape, dtype) in variables.items():
        if name not in slots:
            n_numbers += math.prod(shape)
            shown.add_row(cell(name), " × ".join(map(str, shape)) or "scalar", dtype, f"{math.prod(shape):,}")
    show(shown)
    n_variables = len(variables) - len(slots)
    line(f"{prefix}: {n_variables} variables, {n_numbers:,} numbers; {len(slots)} Adam slots not shown")

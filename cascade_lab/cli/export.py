"""`cascade-lab export` writes the stages of a cascade in formats of other software."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from cascade_lab.cli.console import spinner
from cascade_lab.cli.options import CASCADE, NEW_DIRECTORY, OVERWRITE
from cascade_lab.cli.printing import line, next_step


def export(
    cascade: CASCADE,
    output: NEW_DIRECTORY,
    format: Annotated[
        Literal["saved_model", "hf"],
        typer.Option(help="A SavedModel for TensorFlow Serving, or a Hugging Face directory."),
    ] = "saved_model",
    run: Annotated[
        Path | None,
        typer.Option(metavar="RUN", help="A run of this cascade; its metrics go into the model cards (--format hf)."),
    ] = None,
    overwrite: OVERWRITE = False,
) -> None:
    """Write each stage of a cascade in a format that other software loads.

    With --format hf each stage and the cascade get a model card.

    Example: cascade-lab export cascade.toml --format hf --run runs/first --output exported
    """
    from cascade_lab.atomic import check_directory
    from cascade_lab.run import Run
    from cascade_lab.spec import CascadeSpec

    spec = CascadeSpec.read(cascade)
    evaluation = None if run is None else Run.read(run)
    check_directory(output, overwrite=overwrite, marker="export.json", what="cascade's export")
    with spinner(f"exporting {len(spec.stages)} stages"):
        from cascade_lab.export import export_cascade

        export_cascade(spec, output, format=format, run=evaluation, overwrite=overwrite)
    line(f"{output}: {', '.join(stage.name for stage in spec.stages)}")
    next_step("serve", cascade)

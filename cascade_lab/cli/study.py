"""`cascade-lab study` fine-tunes the models of a study and compares cascades of them."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from cascade_lab.cli.console import quiet_tensorflow, shows_progress
from cascade_lab.cli.options import NEW_DIRECTORY
from cascade_lab.cli.printing import cell, line, number, show, table


def study(
    recipe: Annotated[Path, typer.Argument(metavar="STUDY", help="The TOML file of a study.", show_default=False)],
    data: Annotated[Path, typer.Option(help="The folder with the data files.", show_default=False)],
    init: Annotated[str, typer.Option(help="The checkpoint that every model starts from.", show_default=False)],
    output: NEW_DIRECTORY,
) -> None:
    """Fine-tune the models of a study, build cascades of them, and compare the cascades in one table.

    The output gets the models, the runs and results.json. After an interruption, the same command resumes the study.

    Example: cascade-lab study data/clinc150/study.toml --data clinc150 --init minilm --output runs/study
    """
    with quiet_tensorflow("loading TensorFlow"):
        from cascade_lab.study import run_study
    results = run_study(recipe, data=data, init=init, output=output, progress=shows_progress())
    shown = table("scheme", "seed", "in scope", "reject recall", "paper: in scope", "reject recall")
    for row in results["rows"]:
        sides = (row["test"], row["paper"] or {})
        metrics = [side.get(metric) for side in sides for metric in ("in_scope_accuracy", "reject_recall")]
        shown.add_row(cell(row["scheme"]), str(row["seed"]), *[number(value, ".3f") for value in metrics])
    show(shown)
    line(f"results: {output / 'results.json'}")

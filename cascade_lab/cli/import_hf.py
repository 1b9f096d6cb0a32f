"""`cascade-lab import-hf` converts a Hugging Face directory to a TensorFlow 1 checkpoint."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from cascade_lab.cli.console import spinner
from cascade_lab.cli.options import NEW_DIRECTORY, OVERWRITE
from cascade_lab.cli.printing import line, next_step

CASE = {True: "lower case", False: "case kept", None: "case not specified"}


def import_hf(
    source: Annotated[Path, typer.Argument(metavar="DIR", help="A Hugging Face model directory.", show_default=False)],
    output: NEW_DIRECTORY,
    overwrite: OVERWRITE = False,
) -> None:
    """Convert a Hugging Face BERT directory to a TensorFlow 1 checkpoint; PyTorch is not needed.

    Example: cascade-lab import-hf downloads/my-classifier --output intent
    """
    from cascade_lab.atomic import check_directory

    check_directory(output, overwrite=overwrite, marker="import.json", what="converted checkpoint")
    with spinner("importing"):
        from cascade_lab.bert.huggingface import import_directory

        import_directory(source, output, overwrite=overwrite)
    origin = json.loads((output / "import.json").read_text(encoding="utf-8"))
    case = CASE[origin["do_lower_case"]]
    n_rows = origin["n_rows_without_token"]
    unused = f", {n_rows} rows of the embedding have no token" if n_rows else ""
    line(f"{output}: {origin['architecture']}, activation {origin['hidden_act']}, {case}{unused}")
    next_step("init", "GATE", "INTENT", "EVALSET", "--output", "cascade.toml")

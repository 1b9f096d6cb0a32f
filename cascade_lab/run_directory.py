"""The directory of a run: whether one can be written, how it appears whole or not at all, and the id of a new run."""

from __future__ import annotations

import secrets
from contextlib import AbstractContextManager
from datetime import datetime
from pathlib import Path
from typing import Any

from cascade_lab.atomic import check_directory, whole_directory
from cascade_lab.exceptions import RunError

_DIRECTORY: Any = {"marker": "manifest.json", "what": "run", "error": RunError}


def check_run_output(output: str | Path, *, overwrite: bool) -> None:
    """Raise RunError if a run cannot be written to `output`: something is there that may not be replaced."""
    check_directory(output, overwrite=overwrite, **_DIRECTORY)


def unfinished_run(output: str | Path, *, overwrite: bool = False) -> AbstractContextManager[Path]:
    """Give a directory to fill, which becomes the run `output` whole or not at all: see `whole_directory`."""
    return whole_directory(output, overwrite=overwrite, **_DIRECTORY)


def new_run_id(started: datetime) -> str:
    """Return a new run id: the time, and some random letters."""
    return f"{started:%Y%m%dT%H%M%SZ}-{secrets.token_hex(3)}"

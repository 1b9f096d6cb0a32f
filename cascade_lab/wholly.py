"""A directory that appears whole or not at all."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from cascade_lab.errors import CascadeLabError

UNFINISHED = ".unfinished"


def check_directory(
    output: str | Path,
    *,
    overwrite: bool,
    sign: str,
    what: str,
    error: type[CascadeLabError] = CascadeLabError,
) -> None:
    """Raise `error` if a directory cannot go to `output`: it exists, and is not one that may be overwritten.

    The parameters are those of `whole_directory`.
    """
    output = Path(output)
    for path in (output, unfinished_path(output)):
        if not (path.exists() or path.is_symlink()):
            continue
        if not overwrite:
            state = "exists already" if path == output else f"is an unfinished {what}, of a crash or still going on"
            raise error(f"{path} {state}; choose another output, or ask to overwrite it")
        if path == output and not (path / sign).is_file():
            raise error(f"{path} exists and is not a {what}, so it is not overwritten; choose another output")


@contextmanager
def whole_directory(
    output: str | Path,
    *,
    overwrite: bool = False,
    sign: str,
    what: str,
    error: type[CascadeLabError] = CascadeLabError,
) -> Iterator[Path]:
    """Give a directory to fill, which becomes `output` when the block ends well and goes away when it does not.

    Until then it is named `<output>.unfinished`, so a crash leaves no directory that looks whole.

    Parameters
    ----------
    output : path
    overwrite : bool
        Replace what is at `output`, but only if it has the `sign`.
    sign : str
        The file in a directory that shows it to be of this kind.
    what : str
        What the directory is, for messages: "run".
    error : type
        What to raise.

    Raises
    ------
    error
        `output` exists already, or the disk does not take it.
    """
    output = Path(output)
    check_directory(output, overwrite=overwrite, sign=sign, what=what, error=error)
    partial = unfinished_path(output)
    try:
        if partial.exists():
            shutil.rmtree(partial)
        partial.mkdir(parents=True)
        try:
            yield partial
            _sync(partial)
            _put_in_place(partial, output)
        except BaseException:
            shutil.rmtree(partial, ignore_errors=True)
            raise
    except OSError as problem:
        raise error(
            f"{output}: the {what} cannot be written ({problem.strerror or problem}); nothing was left behind, choose "
            "another output"
        ) from problem


def unfinished_path(output: Path) -> Path:
    """Return where `output` is while it is being filled."""
    return output.with_name(output.name + UNFINISHED)


def _sync(directory: Path) -> None:
    """Make sure the bytes are on the disk before the name says that the directory is whole."""
    for path in directory.rglob("*"):
        if path.is_file():
            with open(path, "rb") as file:
                os.fsync(file.fileno())


def _put_in_place(partial: Path, output: Path) -> None:
    old = output.with_name(f"{output.name}.old-{os.getpid()}")
    if output.exists():
        output.rename(old)
    try:
        partial.rename(output)
    except OSError:
        if old.exists():
            old.rename(output)
        raise
    shutil.rmtree(old, ignore_errors=True)

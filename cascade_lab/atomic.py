"""Files and directories that appear whole or not at all."""

from __future__ import annotations

import json
import math
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from cascade_lab.exceptions import CascadeLabError

UNFINISHED = ".unfinished"


def refuse_existing(output: str | Path, *, overwrite: bool, error: type[CascadeLabError] = CascadeLabError) -> None:
    """Raise `error` if there is something at `output` already and it may not be replaced."""
    output = Path(output)
    if (output.exists() or output.is_symlink()) and not overwrite:
        raise error(f"{output} exists already; choose another output, or pass --overwrite (overwrite=True)")


def write_file(
    path: str | Path,
    write: Callable[[Path], object],
    *,
    error: type[CascadeLabError] = CascadeLabError,
) -> Path:
    """Write one file so that it appears whole or not at all.

    Parameters
    ----------
    path : path
        The file. Folders that are missing are made.
    write : callable
        Writes the content to the temporary path that it is given. That path has the suffix of `path`.
    error : type
        What to raise.

    Raises
    ------
    error
        The file cannot be written; what was at `path` is still there.
    """
    path = Path(path)
    partial = path.with_name(f".{path.stem}{UNFINISHED}{path.suffix}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            write(partial)
            os.replace(partial, path)
        finally:
            partial.unlink(missing_ok=True)
    except OSError as problem:
        raise error(f"{path}: cannot be written ({problem.strerror or problem}); choose another output") from problem
    return path


def write_text(path: str | Path, text: str, *, error: type[CascadeLabError] = CascadeLabError) -> Path:
    """Write a UTF-8 text file that appears whole or not at all; see `write_file`."""
    return write_file(path, lambda partial: partial.write_text(text, encoding="utf-8"), error=error)


def write_json(path: str | Path, content: Any, *, error: type[CascadeLabError] = CascadeLabError) -> Path:
    """Write JSON that appears whole or not at all; NaN and infinity, which JSON lacks, become null."""
    return write_text(path, to_json(content), error=error)


def to_json(content: Any) -> str:
    """Return indented JSON text; NaN and infinity become null.

    >>> print(to_json({"accuracy": float("nan")}), end="")
    {
      "accuracy": null
    }
    """
    return json.dumps(_finite(content), indent=2, ensure_ascii=False, allow_nan=False) + "\n"


def _finite(content: Any) -> Any:
    if isinstance(content, Mapping):
        return {key: _finite(value) for key, value in content.items()}
    if isinstance(content, list | tuple):
        return [_finite(value) for value in content]
    if isinstance(content, float) and not math.isfinite(content):
        return None
    return content


def check_directory(
    output: str | Path,
    *,
    overwrite: bool,
    marker: str,
    what: str,
    error: type[CascadeLabError] = CascadeLabError,
) -> None:
    """Raise `error` if a directory cannot be written to `output`: see `whole_directory` for the parameters."""
    output = Path(output)
    refuse_existing(output, overwrite=overwrite, error=error)
    partial = unfinished_path(output)
    if (partial.exists() or partial.is_symlink()) and not overwrite:
        raise error(
            f"{partial} is an unfinished {what}: another process is writing it, or one crashed; choose another output, "
            "or pass --overwrite (overwrite=True)"
        )
    if (output.exists() or output.is_symlink()) and not (output / marker).is_file():
        raise error(f"{output} exists and is not a {what}, so it is not overwritten; choose another output")


@contextmanager
def whole_directory(
    output: str | Path,
    *,
    overwrite: bool = False,
    marker: str,
    what: str,
    error: type[CascadeLabError] = CascadeLabError,
) -> Iterator[Path]:
    """Give a directory to fill. It becomes `output` when the block ends well, and is removed when it does not.

    Until then it is named `<output>.unfinished`, so that a crash leaves no directory that looks whole.

    Parameters
    ----------
    output : path
    overwrite : bool
        Replace what is at `output`, but only if it contains the file `marker`.
    marker : str
        A file that every directory of this kind contains.
    what : str
        The kind of directory, for messages: "run".
    error : type
        What to raise.

    Raises
    ------
    error
        `output` exists already, or the directory cannot be written.
    """
    output = Path(output)
    check_directory(output, overwrite=overwrite, marker=marker, what=what, error=error)
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
    """Return the name of the directory `output` while it is being filled."""
    return output.with_name(output.name + UNFINISHED)


def _sync(directory: Path) -> None:
    """Flush every file to the disk before the directory gets the name that says that it is whole."""
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

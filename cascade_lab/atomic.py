"""Files and directories that appear whole or not at all."""

from __future__ import annotations

import ctypes
import errno
import json
import math
import os
import re
import secrets
import shutil
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

from cascade_lab.exceptions import CascadeLabError
from cascade_lab.locks import MAY_LOCK, Lock, is_alive, lock, lock_path, made_parents, remove, try_lock

UNFINISHED = ".unfinished"

_temporary_names: set[str] = set()
"""The temporary files that this process is writing now."""


def refuse_existing(output: str | Path, *, overwrite: bool, error: type[CascadeLabError] = CascadeLabError) -> None:
    """Raise `error` if there is something at `output` already and it may not be replaced, or if it is no name."""
    output = _named(output, error)
    if os.path.islink(output):
        raise error(
            f"{output} is a symbolic link, which is not replaced; give the path that it points to, or delete it"
        )
    if os.path.lexists(output) and not overwrite:
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
        The file. Folders that are missing are made. Only a regular file is replaced.
    write : callable
        Writes the content to the temporary path that it is given. That path has the suffix of `path`, and no other
        process has the same one.
    error : type
        What to raise.

    Raises
    ------
    error
        The file cannot be written; what was at `path` is still there.
    """
    path = _file(path, overwrite=True, error=error)
    try:
        with made_parents(path), _temporary(path) as partial:
            write(partial)
            _flush(partial)
            os.replace(partial, path)
    except OSError as problem:
        raise _not_written(path, problem, error) from problem
    return path


def write_files(files: Mapping[Path, bytes], *, error: type[CascadeLabError] = CascadeLabError) -> None:
    """Write files of one folder that belong together; if one of them cannot be written, all are as they were.

    Each file appears whole or not at all. A process that is killed between two of them leaves the first ones new and
    the others old.

    Raises
    ------
    error
        A file cannot be written.
    """
    path = next(iter(files))
    try:
        with ExitStack() as stack:
            for path in files:
                stack.enter_context(made_parents(_file(path, overwrite=True, error=error)))
            partials = {path: stack.enter_context(_temporary(path)) for path in files}
            copies = {path: stack.enter_context(_temporary(path)) for path in files if path.exists()}
            for path, content in files.items():
                partials[path].write_bytes(content)
                _flush(partials[path])
            for path, copy in copies.items():
                shutil.copyfile(path, copy)
            begun = []
            try:
                for path in files:
                    begun.append(path)
                    os.replace(partials[path], path)
            except BaseException:
                for path in begun:
                    os.replace(copies[path], path) if path in copies else path.unlink(missing_ok=True)
                raise
    except OSError as problem:
        raise _not_written(path, problem, error) from problem


@contextmanager
def locked_file(
    path: str | Path, *, overwrite: bool, what: str, error: type[CascadeLabError] = CascadeLabError
) -> Iterator[None]:
    """Hold the lock of a file while its content is computed, so that no other process writes it; see `lock`.

    Parameters
    ----------
    path : path
    overwrite : bool
        A file that is there may be replaced.
    what : str
        The kind of file, for messages: "comparison".
    error : type
        What to raise.

    Raises
    ------
    error
        There is a file already and it may not be replaced, another process is writing it, or it cannot be written.
    """
    path = _named(path, error)
    with ExitStack() as stack:
        try:
            stack.enter_context(lock(path, what, error))
        except OSError as problem:
            raise _not_written(path, problem, error) from problem
        _file(path, overwrite=overwrite, error=error)
        yield


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
    continues: bool = False,
    marker: str,
    what: str,
    error: type[CascadeLabError] = CascadeLabError,
) -> None:
    """Raise `error` if a directory cannot be written to `output`: see `locked_output` for the parameters.

    First it restores or removes what a killed process left, as `locked_output` does.
    """
    output = _named(output, error)
    try:
        if os.path.lexists(lock_path(output)) or _replaced(output):
            with lock(output, what, error) as held:
                _recover(output, held, continues, marker, what, error)
        _check(output, overwrite=overwrite, continues=continues, marker=marker, what=what, error=error)
    except OSError as problem:
        raise error(
            f"{output}: the {what} cannot be written ({problem.strerror or problem}); choose another output"
        ) from problem


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

    Until then it is named `<output>.unfinished`, so that a crash leaves no directory that looks whole. Other processes
    cannot write the same output meanwhile: see `locked_output`.

    Parameters
    ----------
    output : path
    overwrite : bool
        Replace what is at `output`, but only if it contains the file `marker`. Where the system can exchange two
        directories, there is always one of both at `output`, even if the process is killed.
    marker : str
        A file that every directory of this kind contains.
    what : str
        The kind of directory, for messages: "run".
    error : type
        What to raise.

    Raises
    ------
    error
        `output` exists already, another process is writing it, or the directory cannot be written.
    """
    output = _named(output, error)
    partial = unfinished_path(output)
    try:
        with locked_output(output, overwrite=overwrite, marker=marker, what=what, error=error):
            if partial.exists():
                shutil.rmtree(partial)
            partial.mkdir()
            try:
                yield partial
                put_in_place(partial, output)
            except BaseException:
                _delete(partial)
                raise
    except OSError as problem:
        raise error(
            f"{output}: the {what} cannot be written ({problem.strerror or problem}); nothing was left behind, choose "
            "another output"
        ) from problem


@contextmanager
def locked_output(
    output: str | Path,
    *,
    overwrite: bool = False,
    continues: bool = False,
    marker: str,
    what: str,
    error: type[CascadeLabError] = CascadeLabError,
) -> Iterator[None]:
    """Hold the lock of `output`, so that no other process writes it; see `whole_directory` for the parameters.

    What a killed process left is handled first. A directory that it was replacing gets its name back if nothing has
    this name, and is removed otherwise. Its `<output>.unfinished` is removed, or is continued.

    Parameters
    ----------
    continues : bool
        A `<output>.unfinished` that is there is continued, and is neither removed nor refused.

    Raises
    ------
    error
        `output` exists already, or another process is writing it.
    OSError
        The lock cannot be written.
    """
    output = _named(output, error)
    with lock(output, what, error) as held:
        _recover(output, held, continues, marker, what, error)
        _check(output, overwrite=overwrite, continues=continues, marker=marker, what=what, error=error)
        yield


def unfinished_path(output: Path) -> Path:
    """Return the name of the directory `output` while it is being filled."""
    return output.with_name(output.name + UNFINISHED)


def put_in_place(directory: Path, output: Path) -> None:
    """Give the name `output` to a directory that is whole, and delete what had this name. Hold the lock of `output`.

    Raises
    ------
    OSError
        It cannot be renamed; what was at `output` is still there.
    """
    _sync(directory)
    if not os.path.lexists(output):
        directory.rename(output)
    elif _exchange(directory, output):
        _delete(directory)
    else:
        old = output.with_name(f"{output.name}.old-{os.getpid()}")
        try:
            output.rename(old)
            directory.rename(output)
        except BaseException:
            if not os.path.lexists(output):
                old.rename(output)
            raise
        _delete(old)


def _named(output: str | Path, error: type[CascadeLabError]) -> Path:
    path = Path(output)
    try:
        usable = path.name not in ("", "..") and b"\0" not in os.fsencode(path)
    except UnicodeEncodeError:
        usable = False
    if not usable:
        raise error(f"{str(output)!r}: not a name to write to; give the name of a new file or directory")
    return path


def _file(path: str | Path, *, overwrite: bool, error: type[CascadeLabError]) -> Path:
    """Raise `error` if a file cannot be written to `path`, as far as its name and what is there tell."""
    path = _named(path, error)
    refuse_existing(path, overwrite=overwrite, error=error)
    if os.path.lexists(path) and not path.is_file():
        kind = "a directory" if path.is_dir() else "not a regular file"
        raise error(f"{path} is {kind}, so it is not overwritten; give the name of a file")
    return path


def _not_written(path: Path, problem: OSError, error: type[CascadeLabError]) -> CascadeLabError:
    return error(f"{path}: cannot be written ({problem.strerror or problem}); choose another output")


def _check(
    output: Path, *, overwrite: bool, continues: bool, marker: str, what: str, error: type[CascadeLabError]
) -> None:
    refuse_existing(output, overwrite=overwrite, error=error)
    partial = unfinished_path(output)
    if partial.is_symlink() or (partial.exists() and not partial.is_dir()):
        raise error(
            f"{partial} is in the way: it is not a directory, so it is no unfinished {what}; delete it, or choose "
            "another output"
        )
    if partial.exists() and not overwrite and not continues:
        cause = "left by a crash" if MAY_LOCK else "another process is writing it, or one crashed"
        raise error(
            f"{partial} is an unfinished {what}: {cause}; choose another output, or pass --overwrite (overwrite=True)"
        )
    if os.path.lexists(output) and not (output / marker).is_file():
        raise error(f"{output} exists and is not a {what}, so it is not overwritten; choose another output")


def _sync(directory: Path) -> None:
    """Flush every file to the disk before the directory gets the name that says that it is whole."""
    for path in directory.rglob("*"):
        if path.is_file():
            _flush(path)


def _flush(path: Path) -> None:
    with open(path, "rb") as file:
        os.fsync(file.fileno())


def _delete(directory: Path) -> None:
    """Delete a directory wholly, also where an interrupt by the user comes in the middle."""
    try:
        shutil.rmtree(directory, ignore_errors=True)
    except BaseException:
        shutil.rmtree(directory, ignore_errors=True)
        raise


def _exchange(one: Path, other: Path) -> bool:
    """Exchange the names of two directories in one step; return False, with nothing done, where that is impossible."""
    if sys.platform != "linux":
        return False
    try:
        renameat2 = ctypes.CDLL(None, use_errno=True).renameat2
    except (OSError, AttributeError):
        return False
    sys.audit("cascade_lab.exchange", str(one), str(other))
    at_cwd, exchange = -100, 2  # AT_FDCWD, RENAME_EXCHANGE
    if renameat2(at_cwd, os.fsencode(one), at_cwd, os.fsencode(other), exchange) == 0:
        return True
    code = ctypes.get_errno()
    if code in (errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP, errno.EPERM):  # the file system, the kernel or a sandbox
        return False
    raise OSError(code, os.strerror(code), str(other))


def _replaced(output: Path) -> list[tuple[Path, int]]:
    """Return the directories that are named as a replaced `output` is, and the process id in each name."""
    found = _siblings(output, re.escape(output.name) + r"\.old-([1-9]\d{0,9})")
    return [(path, pid) for path, pid in found if path.is_dir() and not path.is_symlink()]


def _siblings(path: Path, pattern: str) -> list[tuple[Path, int]]:
    """Return the paths beside `path` whose names match `pattern`, and the process id that is the pattern's group."""
    try:
        matches = [re.fullmatch(pattern, name) for name in os.listdir(path.parent)]
    except (FileNotFoundError, NotADirectoryError, PermissionError):  # a folder may be writable and not readable
        return []
    return [(path.with_name(match[0]), int(match[1])) for match in matches if match]


def _recover(output: Path, held: Lock, continues: bool, marker: str, what: str, error: type[CascadeLabError]) -> None:
    """Restore or remove what killed processes left when they wrote `output`, whose lock is held.

    Somebody may have given such a name to a directory by hand. So a directory is renamed or removed only if its
    process is in the lock's file, or if the new directory still waits, whole, to get the missing name. And
    `<output>.unfinished` is removed only if all of these processes wrote the same kind of directory.
    """
    pids = [writer.pid for writer in held.killed]
    for old, pid in _replaced(output):
        missing = not os.path.lexists(output)
        if pid in pids and not missing:
            shutil.rmtree(old)
        elif pid in pids or (missing and not is_alive(pid) and (unfinished_path(output) / marker).is_file()):
            old.rename(output)
        elif pid != os.getpid() and is_alive(pid) and (old / marker).is_file():
            raise error(
                f"{old} is a {what} that process {pid} is replacing; wait until the process has ended, or rename the "
                "directory if it is yours"
            )
    partial = unfinished_path(output)
    is_left = held.is_real and {writer.what for writer in held.killed} == {what}
    if is_left and not continues and partial.is_dir() and not partial.is_symlink():
        shutil.rmtree(partial)


@contextmanager
def _temporary(path: Path) -> Iterator[Path]:
    """Give a path beside `path` that no other process uses, and remove those that killed processes left.

    The file is locked while its process lives: process ids alone are not unique between containers.
    """
    start, end = f".{path.stem}{UNFINISHED}-", path.suffix
    for left, pid in _siblings(path, re.escape(start) + r"(\d{1,10})-[0-9a-f]{8}" + re.escape(end)):
        if pid == os.getpid() or not is_alive(pid):
            _remove_unlocked(left)
    partial = path.with_name(f"{start}{os.getpid()}-{secrets.token_hex(4)}{end}")
    _temporary_names.add(partial.name)
    descriptor = None
    try:
        if MAY_LOCK:
            descriptor = os.open(partial, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o666)
            try_lock(descriptor)
        yield partial
    finally:
        if os.path.lexists(partial):
            remove(partial)
        if descriptor is not None:
            os.close(descriptor)
        _temporary_names.discard(partial.name)


def _remove_unlocked(path: Path) -> None:
    if path.name in _temporary_names:
        return
    with suppress(OSError):
        descriptor = os.open(path, os.O_RDWR | getattr(os, "O_NOFOLLOW", 0))
        try:
            if try_lock(descriptor) is not False and MAY_LOCK:
                path.unlink()
        finally:
            os.close(descriptor)

"""The lock of an output: one process writes it, and the next one knows which processes were killed meanwhile."""

from __future__ import annotations

import errno
import os
import re
import stat
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import NamedTuple

from cascade_lab.exceptions import CascadeLabError

try:
    import fcntl
except ImportError:  # Windows has no such locks
    fcntl = None  # type: ignore[assignment]

MAY_LOCK = fcntl is not None

_LINE = re.compile(rb"(\d{1,10})(?: ([^\r\n]*))?\r?\n?")


class Writer(NamedTuple):
    """A process that held a lock, and what it wrote: "run", "training"."""

    pid: int
    what: str


class Lock(NamedTuple):
    """A lock that this process holds.

    Attributes
    ----------
    killed : list of Writer
        Those that were killed while they held the lock, and whose leavings nobody has handled since.
    is_real : bool
        No other process can hold it. False where the system or the file system has no locks.
    """

    killed: list[Writer]
    is_real: bool


def lock_path(output: Path) -> Path:
    """Return the file that is the lock of `output`.

    >>> lock_path(Path("runs/first")).as_posix()
    'runs/.first.lock'
    """
    return output.with_name(f".{output.name}.lock")


@contextmanager
def lock(output: Path, what: str, error: type[CascadeLabError]) -> Iterator[Lock]:
    """Hold the lock of `output`, so that no other process writes it.

    The lock is the file `.<name>.lock` beside `output`. It contains one line per writer: the process id and `what`. The
    system frees the lock when the process ends, however it ends. The file is removed at the end. So a file that can
    be locked is the lock only if it still has the lock's name. Without `fcntl`, and on a file system without locks,
    nothing is locked.

    Folders that are missing are made, and are removed if they are still empty at the end.

    Raises
    ------
    error
        Another process holds the lock, or a file that is no lock has its name.
    OSError
        The lock cannot be written.
    """
    path = lock_path(output)
    with made_parents(output):
        descriptor, held = _open(path, output, what, error)
        try:
            # The killed ones stay in the file until all that they left is handled: this process may be killed too.
            os.lseek(descriptor, 0, os.SEEK_END)
            os.write(descriptor, f"{os.getpid()} {what}\n".encode())
            yield held
        finally:
            if fcntl is None:  # Windows removes no open file
                os.close(descriptor)
            with suppress(OSError):
                remove(path)
            if fcntl is not None:
                os.close(descriptor)


@contextmanager
def made_parents(path: Path) -> Iterator[None]:
    """Make the folders above `path` that are missing; at the end, remove those of them that are empty."""
    made = [folder for folder in path.parents if not folder.exists()]
    try:
        if made:
            path.parent.mkdir(parents=True, exist_ok=True)
        yield
    finally:
        for folder in made:
            with suppress(OSError):
                folder.rmdir()


def remove(path: Path) -> None:
    """Delete a file if it is there, also where an interrupt by the user comes in the middle."""
    try:
        path.unlink(missing_ok=True)
    except BaseException:
        path.unlink(missing_ok=True)
        raise


def try_lock(descriptor: int) -> bool | None:
    """Lock an open file without waiting; return False if another process has locked it, None if there are no locks."""
    if fcntl is None:
        return None
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as problem:
        # Any other error: this file system has no locks, and then the file is not locked by anybody.
        return False if problem.errno in (errno.EAGAIN, errno.EACCES) else None
    return True


def is_alive(pid: int) -> bool:
    """Return whether a process runs; False where the system cannot tell."""
    if os.name != "posix":
        return False
    try:
        os.kill(pid, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except PermissionError:
        pass
    return True


def _open(path: Path, output: Path, what: str, error: type[CascadeLabError]) -> tuple[int, Lock]:
    """Open the file of a lock and lock it; return its descriptor and the lock."""
    for _ in range(10):
        # A check or the end of another process holds the lock for a moment only: try again for 0.1 seconds.
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | getattr(os, "O_NOFOLLOW", 0), 0o666)
        try:
            if _read(descriptor) is None:
                raise error(f"{path} is in the way: it is no lock of this package; move it, or choose another output")
            locked = try_lock(descriptor)
            writers = _read(descriptor) or []
            if locked is not False and _is_at(path, descriptor):
                return descriptor, Lock(writers, bool(locked))
        except BaseException:
            os.close(descriptor)
            raise
        os.close(descriptor)
        time.sleep(0.01)
    owner = f"process {writers[-1].pid}" if writers else "another process"
    written = (writers[-1].what if writers else "") or what
    raise error(f"{output}: {owner} is writing this {written}; wait until it has ended, or choose another output")


def _read(descriptor: int) -> list[Writer] | None:
    """Return the writers in the file of a lock, or None if it is another file."""
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        return None
    os.lseek(descriptor, 0, os.SEEK_SET)
    lines = [_LINE.fullmatch(line) for line in os.read(descriptor, 100_000).splitlines(keepends=True)]
    if None in lines:
        return None
    return [Writer(int(line[1]), (line[2] or b"").decode(errors="replace")) for line in lines if line]


def _is_at(path: Path, descriptor: int) -> bool:
    try:
        return os.path.samestat(os.stat(path), os.fstat(descriptor))
    except FileNotFoundError:
        return False

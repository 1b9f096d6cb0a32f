"""Executes a notebook in a kernel of its own, and leaves no kernel behind, whatever ends it."""

from __future__ import annotations

import asyncio
import logging
import os
import signal
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jupyter_client.kernelspec import KernelSpecManager
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError
from nbclient.util import run_sync
from traitlets.config import Config

from cascade_lab.exceptions import RunError

if TYPE_CHECKING:
    from nbformat import NotebookNode

# A kernel listens on sockets of this user, not on TCP ports that others on the machine can reach.
_KERNEL = Config({"ConnectionFileMixin": {"transport": "ipc"}} if os.name == "posix" else {})
_SIGNALS = (signal.SIGINT, signal.SIGTERM)


def execute(
    notebook: NotebookNode, folder: Path, settings: Mapping[str, str], *, where: str, on_cell: Callable[[], object]
) -> None:
    """Execute the cells of a notebook, whose first cell is not the user's, in `folder / "notebooks"`.

    SIGINT or SIGTERM ends the kernel at once; only then does the signal do what it does elsewhere in this process.

    Parameters
    ----------
    notebook : NotebookNode
        Gets the outputs.
    folder : Path
        An empty folder's `notebooks` is where the kernel starts; its sockets are in the folder too.
    settings : mapping of str to str
        Environment variables of the kernel, besides those of this process.
    where : str
        The run, for messages.
    on_cell : callable
        Called before each cell.

    Raises
    ------
    RunError
        A cell failed, the kernel died, or a signal came that does not end this process.
    """
    started: list[int] = []

    def on_cell_start(cell_index: int, **_: Any) -> None:
        started.append(cell_index)
        on_cell()

    log = logging.Logger(__name__)
    log.addHandler(logging.NullHandler())  # what nbclient logs becomes an error of one line here
    client = _Client(
        notebook,
        timeout=None,
        kernel_name="python3",
        config=_KERNEL,
        coalesce_streams=True,
        resources={"metadata": {"path": str(folder / "notebooks")}},
        on_cell_start=on_cell_start,
        log=log,
    )
    client.ignored = frozenset(number for number in _SIGNALS if signal.getsignal(number) == signal.SIG_IGN)
    kernel: Any = client.create_kernel_manager()
    kernel.kernel_spec_manager = KernelSpecManager(kernel_dirs=[])  # the kernel runs in this Python environment
    if kernel.transport == "ipc":
        kernel.ip = str(folder / "socket")
    try:
        with _restored_signals():
            try:
                client.execute(env={**os.environ, **settings})
            finally:
                if kernel.has_kernel:  # nbclient does not end a kernel that was still starting
                    run_sync(kernel.shutdown_kernel)(now=True)
    except CellExecutionError as error:
        message = next(iter(str(error.evalue).strip().splitlines()), "")
        raise RunError(f"{where}: the report's notebook failed: {error.ename}: {message}") from error
    except (RuntimeError, asyncio.CancelledError) as error:
        if client.stopped_by is None:
            if isinstance(error, asyncio.CancelledError):
                raise
            if "died" not in str(error):
                raise RunError(
                    f"{where}: the report's notebook failed: its kernel does not answer ({error})"
                ) from error
            number = _cell_number(notebook, started)
            place = f"in cell {number}" if number else "before the first cell"
            raise RunError(
                f"{where}: the report's notebook failed: its kernel died {place} (out of memory?)"
            ) from error
    if client.stopped_by is not None:
        signal.raise_signal(client.stopped_by)
        raise RunError(f"{where}: the report's notebook was stopped by {signal.Signals(client.stopped_by).name}")


class _Client(NotebookClient):
    """A client of nbclient that ends its kernel, and itself, at once when a signal comes."""

    stopped_by: int | None = None
    ignored: frozenset[int] = frozenset()

    async def async_start_new_kernel(self, **keys: Any) -> None:
        loop, task = asyncio.get_running_loop(), asyncio.current_task()

        def stop(number: int) -> None:
            if self.stopped_by is None and task is not None and number not in self.ignored:
                self.stopped_by, self.shutdown_kernel = number, "immediate"
                task.cancel()

        # These replace nbclient's own handlers, after which it would wait for ever or end with a traceback.
        with suppress(RuntimeError, NotImplementedError, ValueError):  # not in the main thread; Windows
            for number in _SIGNALS:
                loop.add_signal_handler(number, stop, number)
        await super().async_start_new_kernel(**keys)


@contextmanager
def _restored_signals() -> Iterator[None]:
    """Put the handlers of signals back at the end; nbclient leaves the default ones."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    handlers = {number: signal.getsignal(number) for number in _SIGNALS}
    try:
        yield
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)


def _cell_number(notebook: NotebookNode, started: list[int]) -> int:
    """Return the number of the cell that was started last, as the notebook's author counts: from 1, 0 for none."""
    cells = notebook.cells[1 : started[-1] + 1] if started else []
    return sum("injected-parameters" not in cell["metadata"].get("tags", []) for cell in cells)

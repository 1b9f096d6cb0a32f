"""Shows errors as one line, and decides whether to show progress."""

from __future__ import annotations

import errno
import io
import os
import signal
import sys
import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import typer
from rich.console import Console
from rich.live import Live
from rich.spinner import Spinner
from typer.core import TyperCommand, TyperGroup

from cascade_lab.exceptions import CascadeLabError, CheckpointWarning, FontWarning
from cascade_lab.text import printable

_USAGE_ERROR: Any = typer.BadParameter.__mro__[1]  # UsageError of click, or of the copy of click in typer
_NOTICES = (CheckpointWarning, FontWarning)  # each is one line for people


class Command(TyperCommand):
    """A command whose help shows a flag without a type: it takes no value."""

    def get_params(self, ctx: Any) -> Any:
        return _without_bool(super().get_params(ctx))


class Group(TyperGroup):
    """A group of commands that shows an error of the user as one line on stderr, with exit code 2.

    SIGINT and SIGTERM end a command like an exception, so that it removes what it has not finished: one line, and exit
    code 130 or 143. A character that the output's encoding lacks is printed as "?".
    """

    def get_params(self, ctx: Any) -> Any:
        return _without_bool(super().get_params(ctx))

    def main(self, *args: Any, **kwargs: Any) -> Any:
        for stream in (sys.stdout, sys.stderr):
            if isinstance(stream, io.TextIOWrapper) and stream.errors in ("strict", "surrogateescape"):
                stream.reconfigure(errors="replace")
        return super().main(*args, **kwargs)

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        with _printable_usage_errors():
            return super().parse_args(ctx, args)

    def invoke(self, ctx: Any) -> Any:
        if ctx.params.get("debug"):
            os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "0")  # see bert.quiet_tensorflow
        try:
            with _raised_sigterm(), _printable_usage_errors(), _notices():
                result = super().invoke(ctx)
                sys.stdout.flush()
                return result
        except CascadeLabError as error:
            if ctx.params.get("debug"):
                raise
            typer.echo(f"error: {_without_middle(printable(str(error)))}", err=True)
            raise typer.Exit(2) from error
        except OSError as error:
            # Only standard output has no name: it is redirected to a full disk. A closed pipe ends a command quietly.
            if ctx.params.get("debug") or error.filename is not None or error.errno == errno.EPIPE:
                raise
            sys.stdout = open(os.devnull, "w")  # noqa: SIM115  # at the end Python would write the rest, and fail again
            typer.echo(f"error: standard output: cannot be written ({error.strerror}); free some space", err=True)
            raise typer.Exit(2) from error
        except (KeyboardInterrupt, _Terminated) as stop:
            number = signal.SIGINT if isinstance(stop, KeyboardInterrupt) else signal.SIGTERM
            typer.echo(f"error: stopped by {number.name}", err=True)
            raise typer.Exit(128 + number) from stop


def _without_bool(params: Any) -> Any:
    """Give every flag an empty name for its value, which the help would show as `<bool>`."""
    for param in params:
        if getattr(param, "is_bool_flag", False):
            param.metavar = ""
    return params


def _without_middle(message: str, max_length: int = 1500) -> str:
    """Return a message without its middle if it repeats a long text of a file: its place and its way out stay."""
    half = max_length // 2
    return message if len(message) <= max_length else f"{message[:half]} … {message[-half:]}"


@contextmanager
def _printable_usage_errors() -> Iterator[None]:
    """Make the message of an unknown option or a wrong value, which repeats what was typed, printable."""
    try:
        yield
    except _USAGE_ERROR as error:
        error.message = printable(error.message)
        raise


@contextmanager
def _notices() -> Iterator[None]:
    """Print every warning of `_NOTICES` once, as one line on stderr; other warnings are shown as always."""
    shown: set[str] = set()
    show = warnings.showwarning

    def note(message: Any, category: type[Warning], *args: Any, **keys: Any) -> None:
        if not issubclass(category, _NOTICES):
            show(message, category, *args, **keys)
        elif str(message) not in shown:
            shown.add(str(message))
            over_spinner = "\r\x1b[2K" if sys.stderr.isatty() else ""
            typer.echo(f"{over_spinner}note: {_without_middle(printable(str(message)))}", err=True)

    with warnings.catch_warnings():
        for category in _NOTICES:
            warnings.simplefilter("always", category)
        warnings.showwarning = note
        yield


class _Terminated(BaseException):
    """SIGTERM came."""


@contextmanager
def _raised_sigterm() -> Iterator[None]:
    """Make SIGTERM raise `_Terminated`, unless somebody handles it already."""

    def terminate(*_: object) -> None:
        raise _Terminated

    is_main_thread = threading.current_thread() is threading.main_thread()
    if not is_main_thread or signal.getsignal(signal.SIGTERM) != signal.SIG_DFL:
        yield
        return
    signal.signal(signal.SIGTERM, terminate)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)


@contextmanager
def spinner(activity: str) -> Iterator[None]:
    """Show `activity` on stderr meanwhile, if it is a terminal.

    It is shown through a copy of file descriptor 2, which is redirected while TensorFlow is imported.
    """
    with (
        open(os.dup(2), "w", encoding="utf-8") as screen,
        # Without the last two options, rich replaces sys.stderr meanwhile; TensorFlow's log would keep that stream, and
        # write to it after it is closed.
        Live(
            Spinner("dots", activity, style="status.spinner"),
            console=Console(file=screen),
            refresh_per_second=12.5,
            transient=True,
            redirect_stdout=False,
            redirect_stderr=False,
        ),
    ):
        yield


def shows_progress() -> bool:
    """Return whether stderr is a terminal, where a progress bar can be seen."""
    return sys.stderr.isatty()

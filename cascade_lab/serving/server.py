"""Runs the service with uvicorn in this process: signals, and limits on connections that the application cannot see."""

from __future__ import annotations

import asyncio
import ctypes
import logging
import os
import signal
import socket
import threading
from asyncio import TimerHandle, Transport
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import partial
from types import FrameType
from typing import Any

import uvicorn
from starlette.applications import Starlette
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from cascade_lab.exceptions import CascadeLabError
from cascade_lab.serving.protocol import Problem

MAX_HEADER_BYTES = 32_768
MAX_CONNECTIONS = 4096
TRIM_SECONDS = 10  # how often freed memory is returned to the system

logger = logging.getLogger(__name__)
_SILENT = logging.getLogger(f"{__name__}.silent")
_SILENT.disabled = True


def listen(host: str, port: int) -> socket.socket:
    """Return a socket that is bound to an address; nothing is accepted yet.

    Raises
    ------
    CascadeLabError
        The address is not usable.
    """
    where = f"{host}:{port}"
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        found = socket.socket(family, kind, protocol)
    except (OSError, UnicodeError) as error:
        raise CascadeLabError(f"--host {host}: is not an address ({error}); give one, such as 127.0.0.1") from error
    try:
        found.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        found.bind(address)
    except OSError as error:
        found.close()
        raise CascadeLabError(f"{where}: cannot be used ({error.strerror}); give another --host or --port") from error
    return found


def make_server(app: Starlette, *, drain_seconds: float) -> uvicorn.Server:
    """Return a server; `server.run(sockets=[listener])` serves until SIGTERM or SIGINT.

    Then it accepts nothing more, answers what was accepted, and returns. SIGINT while it does that ends the process at
    once, as SIGKILL would: what is not answered by then is lost. SIGHUP reads the cascade again. In another thread than
    the main one, where signals do not come, set `server.should_exit` to end it.

    Parameters
    ----------
    app : Starlette
        What `create_app` returns.
    drain_seconds : float
        After that many seconds, requests that are still not answered are given up.
    """
    limits = app.state.service.limits
    max_bytes = MAX_HEADER_BYTES + 8 * limits.max_body_bytes  # chunks of one byte have seven more
    _allow_connections()
    config = uvicorn.Config(
        app,
        http=partial(_Protocol, seconds=limits.receive_seconds, max_bytes=max_bytes),  # type: ignore[arg-type]
        ws="none",
        lifespan="on",
        log_config=None,
        access_log=False,
        server_header=False,
        timeout_keep_alive=30,
        callback_notify=return_free_memory,
        timeout_notify=TRIM_SECONDS,
        timeout_graceful_shutdown=max(1, round(drain_seconds)),
    )
    return _Server(config, app)


def _allow_connections() -> None:
    """Let this process open as many files as it takes connections, as far as the system permits it."""
    with suppress(ImportError, OSError, ValueError):
        import resource

        soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        wanted = MAX_CONNECTIONS + 512
        if soft != resource.RLIM_INFINITY and soft < wanted:
            most = wanted if hard == resource.RLIM_INFINITY else min(wanted, hard)
            resource.setrlimit(resource.RLIMIT_NOFILE, (most, hard))


async def return_free_memory() -> None:
    """Return freed memory to the system, where the C library can.

    Batches of many shapes leave gaps between blocks that are in use, which would stay part of the process.
    """
    with suppress(AttributeError, OSError):
        await asyncio.to_thread(ctypes.CDLL(None).malloc_trim, 0)


class _Server(uvicorn.Server):
    """uvicorn's server, which also handles SIGHUP, and which SIGTERM ends without an error."""

    def __init__(self, config: uvicorn.Config, app: Starlette):
        super().__init__(config)
        self._app = app
        self._reload: asyncio.Task[None] | None = None

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        loop = asyncio.get_running_loop()
        handlers: dict[int, Any] = {
            signal.SIGTERM: self.handle_exit,
            signal.SIGINT: self.handle_exit,
        }
        if hasattr(signal, "SIGHUP"):
            handlers[signal.SIGHUP] = lambda *_: loop.call_soon_threadsafe(self._start_reload)
        before = {number: signal.signal(number, handler) for number, handler in handlers.items()}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        if self.should_exit and sig == signal.SIGINT:
            n_texts = self._app.state.service.batcher.n_waiting_texts
            with suppress(OSError):  # nobody may read it any more
                os.write(2, f"error: stopped by SIGINT; {n_texts} accepted texts were not answered\n".encode())
            os._exit(128 + sig)  # threads that score cannot be ended in another way
        super().handle_exit(sig, frame)

    def _start_reload(self) -> None:
        async def reload() -> None:
            with suppress(Exception):  # it is logged
                await self._app.state.service.reload()

        self._reload = asyncio.create_task(reload())


class _Protocol(HttpToolsProtocol):
    """HTTP of uvicorn, with limits on connections, on the time and size of a request, and on clients that read slowly.

    `_timer` runs while a request is received: `seconds` for its headers, and three times that for its body, so that
    the application can answer before. It also runs while the client does not read its answer.

    A client that sends a request before it has the answer to the one before (HTTP pipelining) gets that answer, and
    then the connection ends: it may send the others again (RFC 9112, section 9.3.2). Otherwise it would always have a
    text in progress, for which the texts of other clients wait.
    """

    def __init__(self, *args: Any, seconds: float, max_bytes: int, **options: Any):
        super().__init__(*args, **options)
        self._seconds, self._max_bytes = seconds, max_bytes
        self._timer: TimerHandle | None = None
        self._write_timer: TimerHandle | None = None
        self._in_headers, self._n_begun, self._n_bytes = True, 0, 0
        self._is_pipelined = False

    def connection_made(self, transport: Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        about = transport.get_extra_info("socket")
        if about is not None and hasattr(socket, "TCP_USER_TIMEOUT"):  # what a client never reads is given up
            with suppress(OSError):
                about.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, round(3000 * self._seconds))
        self._start_timer(self._seconds)

    def connection_lost(self, exc: Exception | None) -> None:
        self._stop_timer()
        self.resume_writing()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        if self._is_pipelined:  # read and discarded: the answer could be lost if unread bytes were left
            return
        n_begun = self._n_begun
        super().data_received(data)
        if self.transport.is_closing():
            return
        # A request that begins in these bytes is counted from the next ones on.
        if self._timer is not None and self._n_begun == n_begun:
            self._n_bytes += len(data)
            if self._in_headers and self._n_bytes > MAX_HEADER_BYTES:
                self.send_400_response("The headers are too large.")
            elif self._n_bytes > self._max_bytes:
                self.transport.abort()
        is_idle = self._timer is None and (self.cycle is None or self.cycle.response_complete)
        if is_idle and self.timeout_keep_alive_task is None:
            self.timeout_keep_alive_task = self.loop.call_later(
                self.timeout_keep_alive, self.timeout_keep_alive_handler
            )

    def on_message_begin(self) -> None:
        if self.cycle is not None and not self.cycle.response_complete:
            self._is_pipelined, self.cycle.keep_alive = True, False
            self.logger = _SILENT  # uvicorn would log that the request is invalid
            raise ValueError("the answer to the request before is not sent")  # ends the parser
        super().on_message_begin()
        self._in_headers, self._n_bytes = True, 0
        self._n_begun += 1
        self._start_timer(self._seconds)

    def on_header(self, name: bytes, value: bytes) -> None:
        if self._in_headers:  # what follows a body in chunks is not a header
            super().on_header(name, value)

    def on_headers_complete(self) -> None:
        self._in_headers, self._n_bytes = False, 0
        self._start_timer(3 * self._seconds)
        if len(self.connections) > MAX_CONNECTIONS:
            headers = {"Connection": "close", "Retry-After": "1"}
            self.app = Problem(503, "too many connections; try again", headers=headers).response()
        super().on_headers_complete()

    def on_message_complete(self) -> None:
        self._stop_timer()
        super().on_message_complete()

    def on_response_complete(self) -> None:
        if self._timer is not None:  # the answer came before the whole body, and reading may have paused
            self._start_timer(3 * self._seconds)
        super().on_response_complete()

    def pause_writing(self) -> None:
        super().pause_writing()
        self._write_timer = self.loop.call_later(3 * self._seconds, self.transport.abort)

    def resume_writing(self) -> None:
        if self._write_timer is not None:
            self._write_timer.cancel()
            self._write_timer = None
        super().resume_writing()

    def send_400_response(self, msg: str) -> None:
        """Answer what is not HTTP, and close the connection."""
        if self._is_pipelined:
            return
        response = Problem(400, msg, headers={"Connection": "close"}).response()
        headers = [b"%s: %s\r\n" % header for header in response.raw_headers]
        self.transport.write(b"".join([b"HTTP/1.1 400 Bad Request\r\n", *headers, b"\r\n", response.body]))
        self.transport.close()

    def _start_timer(self, seconds: float) -> None:
        self._stop_timer()
        self._timer = self.loop.call_later(seconds, self.transport.abort)

    def _stop_timer(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

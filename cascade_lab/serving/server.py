"""Runs the service with uvicorn in this process: signals, and limits on connections that the application cannot see."""

from __future__ import annotations

import asyncio
import logging
import signal
import socket
import threading
from asyncio import TimerHandle, Transport
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import partial
from typing import Any

import uvicorn
from starlette.applications import Starlette
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from cascade_lab.exceptions import CascadeLabError
from cascade_lab.serving.protocol import Problem

MAX_HEADER_BYTES = 32_768
MAX_CONNECTIONS = 4096

logger = logging.getLogger(__name__)


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
        raise CascadeLabError(f"--host {host}: is no address ({error}); give one, such as 127.0.0.1") from error
    try:
        found.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        found.bind(address)
    except OSError as error:
        found.close()
        raise CascadeLabError(f"{where}: cannot be used ({error.strerror}); give another --host or --port") from error
    return found


def make_server(app: Starlette, *, drain_seconds: float) -> uvicorn.Server:
    """Return a server; `server.run(sockets=[listener])` serves until SIGTERM or SIGINT.

    Then it accepts nothing more, answers what was accepted, and returns. SIGHUP reads the cascade again. In another
    thread than the main one, where signals do not come, set `server.should_exit` to end it.

    Parameters
    ----------
    app : Starlette
        What `create_app` returns.
    drain_seconds : float
        After that many seconds, requests that are still not answered are given up.
    """
    config = uvicorn.Config(
        app,
        http=partial(_Protocol, header_seconds=app.state.service.limits.receive_seconds),  # type: ignore[arg-type]
        ws="none",
        lifespan="on",
        log_config=None,
        access_log=False,
        server_header=False,
        timeout_keep_alive=30,
        timeout_graceful_shutdown=max(1, round(drain_seconds)),
    )
    return _Server(config, app)


class _Server(uvicorn.Server):
    """uvicorn's server, with a second signal that it knows not: SIGHUP; and a SIGTERM that ends it without an error."""

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

    def _start_reload(self) -> None:
        async def reload() -> None:
            with suppress(Exception):  # it is logged
                await self._app.state.service.reload()

        self._reload = asyncio.create_task(reload())


class _Protocol(HttpToolsProtocol):
    """uvicorn's HTTP, with limits: of connections, and of the size and the time of a request's headers."""

    def __init__(self, *args: Any, header_seconds: float, **options: Any):
        super().__init__(*args, **options)
        self._header_seconds = header_seconds
        self._timer: TimerHandle | None = None
        self._n_header_bytes = 0

    def connection_made(self, transport: Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._start_timer()

    def connection_lost(self, exc: Exception | None) -> None:
        self._stop_timer()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        if self._timer is not None:  # the headers are not complete
            self._n_header_bytes += len(data)
            if self._n_header_bytes > MAX_HEADER_BYTES:
                self.send_400_response("The headers are too large.")

    def on_message_begin(self) -> None:
        super().on_message_begin()
        self._n_header_bytes = 0
        self._start_timer()

    def on_headers_complete(self) -> None:
        self._stop_timer()
        if len(self.connections) > MAX_CONNECTIONS:
            headers = {"Connection": "close", "Retry-After": "1"}
            self.app = Problem(503, "too many connections; try again", headers=headers).response()
        super().on_headers_complete()

    def send_400_response(self, msg: str) -> None:
        """Answer what is not HTTP, and close the connection."""
        response = Problem(400, msg, headers={"Connection": "close"}).response()
        headers = [b"%s: %s\r\n" % header for header in response.raw_headers]
        self.transport.write(b"".join([b"HTTP/1.1 400 Bad Request\r\n", *headers, b"\r\n", response.body]))
        self.transport.close()

    def _start_timer(self) -> None:
        self._stop_timer()
        self._timer = self.loop.call_later(self._header_seconds, self.transport.close)

    def _stop_timer(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

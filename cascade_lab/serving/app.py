"""The ASGI application of a cascade: `POST /predict`, the Open Inference Protocol, metrics, and reloads."""

from __future__ import annotations

import asyncio
import hmac
import logging
import math
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from time import perf_counter
from typing import Any

import msgspec
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import HTMLResponse, Response
from starlette.routing import Route

from cascade_lab.cascade import Cascade
from cascade_lab.exceptions import CascadeLabError
from cascade_lab.serving import metrics as prometheus
from cascade_lab.serving import open_inference
from cascade_lab.serving.api_key import read_api_key
from cascade_lab.serving.batching import Batcher, ClosedError, QueueFullError
from cascade_lab.serving.live_cascade import LiveCascade
from cascade_lab.serving.metrics import Metrics
from cascade_lab.serving.openapi import description, page
from cascade_lab.serving.pending import Answers
from cascade_lab.serving.protocol import MIN_TIMEOUT, Limits, Problem, predict_response, read_predict
from cascade_lab.serving.traffic_log import TrafficLog

logger = logging.getLogger(__name__)

JSON = "application/json"
TIMEOUT_HEADER = "x-request-timeout"
UNSCORED = "the texts could not be scored; the service's log says more"
MAX_BODIES = 32  # all bodies that are being received may have this many times the bytes of the largest one
Endpoint = Callable[[Request], Awaitable[Response]]


class Service:
    """What the endpoints share: the batcher, the limits, the API key and the metrics.

    Parameters
    ----------
    cascade : Cascade or LiveCascade
    limits : Limits
    api_key_file : path, optional
    log : TrafficLog, optional
    spec_file : path, optional
        The `cascade.toml` that a reload reads.
    """

    def __init__(
        self,
        cascade: Cascade | LiveCascade,
        limits: Limits,
        api_key_file: Path | None,
        log: TrafficLog | None,
        spec_file: Path | None,
    ):
        self.limits, self._api_key_file, self.spec_file = limits, api_key_file, spec_file
        self._api_key = None if api_key_file is None else read_api_key(api_key_file)
        self._reloading = asyncio.Lock()
        self._n_received = 0  # bytes of the bodies that are being received
        self.batcher = Batcher(
            cascade,
            max_waiting_texts=limits.max_waiting_texts,
            log=None if log is None else log.add,
            observe=lambda batch: self.metrics.count_batch(batch),
            idle=None if log is None else log.score_shadow,
        )
        self.metrics = Metrics(lambda: self.batcher.n_waiting_texts, lambda: self.batcher.current)
        if log is not None:
            prometheus.log_metrics(self.metrics, log)

    @property
    def has_key(self) -> bool:
        """Whether requests need an API key."""
        return self._api_key is not None

    def check_key(self, request: Request) -> None:
        """Raise Problem (401) unless the request has the API key, or none is needed."""
        if self._api_key is None:
            return
        scheme, _, given = request.headers.get("authorization", "").partition(" ")
        if scheme.lower() != "bearer" or not hmac.compare_digest(given.encode(), self._api_key):
            raise Problem(
                401,
                "the API key is missing or wrong; send the header Authorization: Bearer KEY",
                headers={"WWW-Authenticate": "Bearer"},
            )

    async def read_body(self, request: Request) -> bytes:
        """Return the body; raise Problem (413, 408, 503) beyond the limits of size, time and memory."""
        limit = self.limits.max_body_bytes
        too_large = Problem(413, f"the request body has more than {limit} bytes", headers={"Connection": "close"})
        length = request.headers.get("content-length", "")
        if length.isdecimal() and (len(length) > 20 or int(length) > limit):
            raise too_large

        async def receive() -> bytes:
            parts, size = [], 0
            try:
                async for part in request.stream():
                    size += len(part)
                    self._n_received += len(part)
                    if size > limit:
                        raise too_large
                    if self._n_received > MAX_BODIES * limit:
                        raise Problem(503, "too many large requests at once; try again", headers={"Retry-After": "1"})
                    parts.append(part)
                return b"".join(parts)
            finally:
                self._n_received -= size

        try:
            return await asyncio.wait_for(receive(), self.limits.receive_seconds)
        except asyncio.TimeoutError as error:
            raise Problem(
                408,
                f"the request was not complete after {self.limits.receive_seconds:g} seconds",
                headers={"Connection": "close"},
            ) from error

    async def answer(
        self, request: Request, texts: list[str], texts_b: list[str | None] | None, ids: list[str] | None
    ) -> Answers:
        """Return the answers; raise Problem (429, 503, 504) where there are none."""
        seconds = self._timeout(request)
        try:
            return await asyncio.wait_for(self.batcher.submit(texts, texts_b, ids=ids), seconds)
        except QueueFullError as error:
            headers = {"Retry-After": str(max(1, math.ceil(error.retry_after)))}
            raise Problem(429, str(error), headers=headers) from error
        except ClosedError as error:
            raise Problem(503, str(error), headers={"Connection": "close"}) from error
        except asyncio.TimeoutError as error:
            raise Problem(504, f"no answer within {seconds:g} seconds; what was not scored is dropped") from error
        except Exception:  # the batcher has logged it; its message may quote a text, so it is not logged again
            raise Problem(500, UNSCORED) from None

    def _timeout(self, request: Request) -> float:
        given = request.headers.get(TIMEOUT_HEADER)
        if given is None:
            return self.limits.timeout_seconds
        try:
            seconds = float(given)
        except ValueError:
            seconds = math.nan
        if not MIN_TIMEOUT <= seconds < math.inf:
            raise Problem(422, f"the header {TIMEOUT_HEADER} must be seconds, such as 0.5, at least {MIN_TIMEOUT}")
        return min(seconds, self.limits.timeout_seconds)

    async def reload(self) -> LiveCascade:
        """Read `cascade.toml` and the API key again; raise CascadeLabError, and serve on as before, if that fails."""
        if self.spec_file is None:
            raise CascadeLabError("this service was not started from a file; replace the cascade with Batcher.replace")
        async with self._reloading:
            before = self.batcher.current
            try:
                key = None if self._api_key_file is None else read_api_key(self._api_key_file)
                live = await asyncio.to_thread(before.reload, self.spec_file)
                self.batcher.replace(live)
                self._api_key = key
            except Exception as error:
                self.metrics.count_reload("refused")
                unforeseen = not isinstance(error, CascadeLabError)
                logger.error("reload refused, serving on as before: %s", error, exc_info=unforeseen)
                raise
            kind = "thresholds" if live.cascade.stages is before.cascade.stages else "models"
            self.metrics.count_reload(kind)
            logger.info("reloaded (%s): digest %s", kind, live.served.digest)
            return live


def create_app(
    cascade: Cascade | LiveCascade,
    *,
    limits: Limits | None = None,
    api_key_file: str | Path | None = None,
    log: TrafficLog | None = None,
    spec_file: str | Path | None = None,
) -> Starlette:
    """Return the service as an ASGI application, to be run by a server or mounted into another application.

    Parameters
    ----------
    cascade : Cascade or LiveCascade
        A `Cascade` is closed by the caller; a `LiveCascade`, and those that replace it, by the application.
    limits : Limits, optional
    api_key_file : path, optional
        A file with the key that requests must send as `Authorization: Bearer KEY`.
    log : TrafficLog, optional
        Logs the traffic. The caller closes it, after the application.
    spec_file : path, optional
        The `cascade.toml` that a reload reads. Without it there is no reload.

    Raises
    ------
    CascadeLabError
        The API key cannot be read.

    Returns
    -------
    Starlette
        `app.state.service` is the `Service`. Its `batcher` is closed when the application shuts down; where the
        application is mounted into another one, call `app.state.service.batcher.close()`.

    Examples
    --------
    >>> with Cascade.load("cascade.toml") as cascade:            # doctest: +SKIP
    ...     uvicorn.run(create_app(cascade))
    """
    service = Service(
        cascade,
        limits or Limits(),
        None if api_key_file is None else Path(api_key_file),
        log,
        None if spec_file is None else Path(spec_file),
    )

    @asynccontextmanager
    async def lifespan(app: Starlette) -> AsyncIterator[None]:
        yield
        await asyncio.to_thread(service.batcher.close)

    async def predict(request: Request) -> Response:
        body = read_predict(await service.read_body(request), service.limits)
        answers = await service.answer(request, body.texts, body.texts_b, body.ids)
        return Response(predict_response(answers), media_type=JSON)

    async def reload(request: Request) -> Response:
        if not service.has_key:
            raise Problem(403, "a reload over HTTP needs an API key; send the process SIGHUP, or set --api-key-file")
        try:
            live = await service.reload()
        except ClosedError as error:
            raise Problem(503, str(error)) from error
        except CascadeLabError as error:
            raise Problem(409, f"serving on as before: {error}") from error
        name = live.served.manifest["cascade"]["name"]
        return Response(msgspec.json.encode({"cascade": name, "digest": live.served.digest}), media_type=JSON)

    async def show_metrics(request: Request) -> Response:
        return Response(service.metrics.page(), headers={"Content-Type": prometheus.CONTENT_TYPE})

    def openapi() -> dict[str, Any]:
        return description(service.limits, service.batcher.current.cascade.spec.name)

    async def show_openapi(request: Request) -> Response:
        return Response(msgspec.json.encode(openapi()), media_type=JSON)

    async def show_docs(request: Request) -> Response:
        return HTMLResponse(page(openapi()))

    def route(
        path: str, endpoint: Endpoint, method: str = "GET", *, protocol: str | None = None, is_open: bool = False
    ) -> Route:
        return Route(path, _guarded(service, endpoint, protocol, is_open), methods=[method])

    app = Starlette(
        routes=[
            route("/predict", predict, "POST", protocol="predict"),
            route("/reload", reload, "POST"),
            route("/metrics", show_metrics),
            route("/openapi.json", show_openapi, is_open=True),
            route("/docs", show_docs, is_open=True),
            *open_inference.routes(service, route),
        ],
        exception_handlers={Problem: _show_problem, HTTPException: _show_problem, Exception: _show_fault},
        lifespan=lifespan,
    )
    app.state.service = service
    return app


def _guarded(service: Service, endpoint: Endpoint, protocol: str | None, is_open: bool) -> Endpoint:
    """Return an endpoint that checks the API key first, and counts its requests if it has a protocol."""

    async def checked(request: Request) -> Response:
        if not is_open:
            service.check_key(request)
        return await endpoint(request)

    if protocol is None:
        return checked

    async def counted(request: Request) -> Response:
        started, status = perf_counter(), 500
        try:
            response = await checked(request)
            status = response.status_code
            return response
        except Problem as problem:
            status = problem.status
            raise
        except ClientDisconnect:
            status = 499  # the client left while it sent; nothing can be answered
            return Response(status_code=400)
        finally:
            service.metrics.count_request(protocol, status, perf_counter() - started)

    return counted


async def _show_problem(request: Request, error: Exception) -> Response:
    """Answer an error of a request as problem+json; under /v2 it also has the member `error` of that protocol."""
    if isinstance(error, HTTPException):
        detail = f"{request.method} {request.url.path[:200]}: {error.detail}; see /docs"
        error = Problem(error.status_code, detail, headers=dict(error.headers or {}))
    assert isinstance(error, Problem)
    is_v2 = request.url.path.startswith(f"{request.scope.get('root_path', '')}/v2")
    return error.response(**({"error": error.detail} if is_v2 else {}))


async def _show_fault(request: Request, error: Exception) -> Response:
    return await _show_problem(request, Problem(500, UNSCORED))

"""`cascade-lab serve` answers texts over HTTP."""

from __future__ import annotations

import logging
import signal
import sys
from contextlib import ExitStack
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from cascade_lab.cli.console import spinner
from cascade_lab.cli.options import CASCADE
from cascade_lab.cli.printing import next_step
from cascade_lab.exceptions import CascadeLabError

if TYPE_CHECKING:
    from cascade_lab.serving.live_cascade import LiveCascade

EXTRA = ("starlette", "uvicorn", "httptools", "msgspec", "prometheus_client")


def serve(
    cascade: CASCADE,
    host: Annotated[str, typer.Option(help="The address to listen on; 0.0.0.0 for all.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="The port; 0 for any free one.")] = 8000,
    api_key_file: Annotated[
        Path | None, typer.Option(help="A file with the key that requests must send as Authorization: Bearer KEY.")
    ] = None,
    log: Annotated[
        Path | None, typer.Option(metavar="FOLDER", help="Log the traffic there, for `collect`: scores, no texts.")
    ] = None,
    log_texts: Annotated[bool, typer.Option("--log-texts", help="Log the texts too. They are personal data.")] = False,
    shadow: Annotated[
        float, typer.Option(min=0, max=1, help="The share of texts that later stages score too, when idle.")
    ] = 0.0,
    max_texts: Annotated[int, typer.Option(min=1, help="The most texts of one request.")] = 1024,
    max_characters: Annotated[int, typer.Option(min=1, help="The most characters of one text.")] = 20_000,
    max_body_bytes: Annotated[int, typer.Option(min=1024, help="The most bytes of a request's body.")] = 8 * 2**20,
    max_waiting_texts: Annotated[int, typer.Option(min=1, help="The most texts that wait; more get 429.")] = 4096,
    timeout: Annotated[float, typer.Option(min=0.01, help="Seconds until a request gets 504.")] = 10.0,
    drain: Annotated[float, typer.Option(min=1, help="The most seconds from SIGTERM to the end.")] = 30.0,
) -> None:
    """Answer texts over HTTP, in this process.

    POST /predict takes {"texts": ["what is my balance"]}; /docs shows everything else. SIGTERM answers what was
    accepted, and ends. SIGHUP reads cascade.toml again: thresholds change at once, and models without a pause; a file
    that cannot be used is refused.

    Example: cascade-lab serve cascade.toml --port 8000 --log traffic
    """
    from cascade_lab.spec import CascadeSpec

    missing = [name for name in EXTRA if find_spec(name) is None]
    if missing:
        raise CascadeLabError(f"serving needs {', '.join(missing)}; install them: pip install 'cascade-lab[serve]'")
    if log is None and (log_texts or shadow):
        raise CascadeLabError("--log-texts and --shadow need the traffic log; give --log FOLDER")
    CascadeSpec.read(cascade)  # before TensorFlow is loaded
    from cascade_lab.serving.api_key import read_api_key
    from cascade_lab.serving.protocol import Limits
    from cascade_lab.serving.server import listen, make_server

    if api_key_file is not None:
        read_api_key(api_key_file)

    limits = Limits(
        max_body_bytes=max_body_bytes,
        max_texts=max_texts,
        max_characters=max_characters,
        max_waiting_texts=max_waiting_texts,
        timeout_seconds=timeout,
    )
    with ExitStack() as closing:
        if hasattr(signal, "SIGHUP"):  # until the server handles it, it must not end the process
            closing.callback(signal.signal, signal.SIGHUP, signal.signal(signal.SIGHUP, signal.SIG_IGN))
        listener = closing.enter_context(listen(host, port))
        traffic_log = None
        if log is not None:
            from cascade_lab.serving.traffic_log import TrafficLog

            traffic_log = closing.enter_context(TrafficLog(log, keep_texts=log_texts, shadow=shadow))
        from cascade_lab.serving.app import create_app

        app = create_app(_load(cascade), limits=limits, api_key_file=api_key_file, log=traffic_log, spec_file=cascade)
        closing.callback(app.state.service.batcher.close)
        logging.basicConfig(stream=sys.stderr, level=logging.INFO, format="%(asctime)s %(levelname)s %(message)s")
        listener.listen(1024)  # from here on a client can connect
        shown = f"[{host}]" if ":" in host else host
        print(f"ready: http://{shown}:{listener.getsockname()[1]}  (page: /docs)", flush=True)
        make_server(app, drain_seconds=drain).run(sockets=[listener])
        closing.callback(signal.signal, signal.SIGTERM, signal.signal(signal.SIGTERM, signal.SIG_IGN))  # it is ending
    if log is not None:
        next_step("collect", log, "--output", "RUN")


def _load(cascade: Path) -> LiveCascade:
    with spinner("loading"):
        from cascade_lab.serving.live_cascade import LiveCascade

        return LiveCascade.load(cascade)

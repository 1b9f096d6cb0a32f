"""The service over HTTP on loopback: answers, limits, protocols, reloads, and a drained end."""

from __future__ import annotations

import asyncio
import ctypes
import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, suppress
from functools import partial
from pathlib import Path

import httpx
import numpy as np
import pandas as pd
import psutil
import pytest
from helpers import texts, without_texts
from prometheus_client.parser import text_string_to_metric_families
from typer.testing import CliRunner

from cascade_lab import Cascade
from cascade_lab.cli import app
from cascade_lab.exceptions import CascadeLabError, CheckpointError
from cascade_lab.serving.api_key import read_api_key
from cascade_lab.serving.app import create_app
from cascade_lab.serving.protocol import Limits
from cascade_lab.serving.server import listen, make_server, return_free_memory
from cascade_lab.spec import CascadeSpec

COMMAND = [sys.executable, "-c", "from cascade_lab.cli import main; main()"]
KEY = "0123456789abcdef0123456789abcdef"


class Running:
    """A service in a thread of this process, on a free port of loopback."""

    def __init__(self, app, *, drain_seconds: float = 20):
        self.service, self.listener = app.state.service, listen("127.0.0.1", 0)
        self.port = self.listener.getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}"
        self.server = make_server(app, drain_seconds=drain_seconds)
        self.thread = threading.Thread(target=lambda: self.server.run(sockets=[self.listener]), daemon=True)

    def __enter__(self) -> Running:
        self.thread.start()
        while not self.server.started:
            time.sleep(0.005)
        return self

    def __exit__(self, *_: object) -> None:
        self.server.should_exit = True
        self.thread.join(60)
        assert not self.thread.is_alive()

    def post(self, content: object, path: str = "/predict", **options) -> httpx.Response:
        body = {"content": content} if isinstance(content, bytes) else {"json": content}
        return httpx.post(f"{self.url}{path}", **body, timeout=60, **options)

    def get(self, path: str, **options) -> httpx.Response:
        return httpx.get(f"{self.url}{path}", timeout=60, **options)

    def raw(self, content: bytes, *, seconds: float = 60) -> bytes:
        """Send bytes, and return all that comes until the service closes the connection, which it must."""
        with socket.create_connection(("127.0.0.1", self.port)) as connection:
            connection.settimeout(seconds)
            received = b""
            with suppress(ConnectionError):
                connection.sendall(content)
            with suppress(ConnectionError):
                while part := connection.recv(65536):
                    received += part
            return received


@pytest.fixture(scope="module")
def loaded(tiny):
    with Cascade.load(tiny) as cascade:
        yield cascade


@pytest.fixture(scope="module")
def running(loaded):
    limits = Limits(max_body_bytes=50_000, max_texts=40, max_characters=500, receive_seconds=1.0)
    with Running(create_app(loaded, limits=limits)) as running:
        yield running


def frame(response: httpx.Response) -> pd.DataFrame:
    """Return the answers as the table that `Cascade.predict` returns."""
    assert response.status_code == 200, response.text
    rows = response.json()["answers"]
    probabilities = pd.DataFrame([row["probabilities"] for row in rows], dtype=float).add_suffix("_probability")
    return pd.concat([pd.DataFrame(rows).drop(columns=["id", "probabilities"]), probabilities], axis=1)


def assert_same(answers: pd.DataFrame, expected: pd.DataFrame) -> None:
    pd.testing.assert_frame_equal(
        answers.reset_index(drop=True),
        without_texts(expected).reset_index(drop=True),
        atol=1e-5,
        check_dtype=False,
    )


def test_predict_answers_as_the_cascade_does(running, loaded):
    pool = texts(30)
    response = running.post({"texts": pool})
    assert_same(frame(response), loaded.predict(pool))
    assert response.json()["cascade"] == "tiny"
    assert re.fullmatch("[0-9a-f]{64}", response.json()["digest"])
    assert len({answer["id"] for answer in response.json()["answers"]}) == 30
    second = [None if i % 2 else text for i, text in enumerate(texts(30, seed=4))]
    named = running.post({"texts": pool, "texts_b": second, "ids": [f"mail {i}" for i in range(30)]})
    assert_same(frame(named), loaded.predict(pool, second))
    assert [answer["id"] for answer in named.json()["answers"]] == [f"mail {i}" for i in range(30)]


def test_one_answer_written_out(running, loaded):
    answer = running.post({"texts": ["pay my bill"], "ids": ["a"]}).json()["answers"][0]
    row = loaded.predict(["pay my bill"]).iloc[0]
    assert set(answer) == {"id", "predicted", "decided_by", "probability", "confidence", "probabilities"}
    assert answer["predicted"] == row.predicted
    assert set(answer["probabilities"]) == {"gate", "intent"}
    assert answer["probabilities"]["gate"] == pytest.approx(row.gate_probability)


@pytest.mark.parametrize(
    ("content", "status", "says"),
    [
        (b"", 400, "not JSON"),
        (b"{", 400, "not JSON"),
        (b'{"texts": ["\xff"]}', 400, "not JSON"),
        (b'{"texts": ["\\ud800 a"]}', 400, "not JSON"),
        (b'{"texts": ["\\udc00"]}', 400, "not JSON"),
        (b"[" * 40_000, 422, "object"),
        (b'{"texts": [' + b"[" * 40_000, 422, "texts"),
        (b'{"other": ' + b"[" * 20_000 + b"]" * 20_000 + b"}", 422, "other"),
        ({"texts": "pay"}, 422, "texts"),
        ({"texts": [1]}, 422, "texts"),
        ({"texts": [None]}, 422, "texts"),
        ({"text": ["pay"]}, 422, "text"),
        ({}, 422, "texts"),
        ({"texts": []}, 422, "at least one"),
        ({"texts": ["pay"] * 41}, 422, "40"),
        ({"texts": ["pay", "x" * 501]}, 422, "texts[1] has 501 characters"),
        ({"texts": ["pay"], "texts_b": []}, 422, "second texts"),
        ({"texts": ["pay"], "texts_b": ["x" * 501]}, 422, "texts_b[0]"),
        ({"texts": ["pay"], "ids": []}, 422, "0 ids"),
        ({"texts": ["pay"], "ids": [""]}, 422, "ids[0]"),
        ({"texts": ["a", "b"], "ids": ["x", "x"]}, 422, "twice"),
        ({"texts": ["x" * 400] * 200}, 413, "50000 bytes"),
    ],
)
def test_a_bad_body_gets_one_problem(running, content, status, says):
    response = running.post(content)
    problem = response.json()
    assert (response.status_code, problem["status"]) == (status, status)
    assert response.headers["content-type"] == "application/problem+json"
    assert says in problem["detail"]
    assert "\n" not in problem["detail"]
    assert set(problem) == {"type", "title", "status", "detail"}


@pytest.mark.parametrize("text", ["", "\x00", "a\x00b", "\u202e", "😀" * 200, "ﷺ" * 300, "\x1b[31m", "a\u0301" * 200])
def test_strange_texts_are_answered_as_predict_answers_them(running, loaded, text):
    assert_same(frame(running.post({"texts": [text]})), loaded.predict([text]))


def test_other_paths_and_methods_get_a_problem(running):
    for response, status in (
        (running.get("/predict"), 405),
        (running.get("/nothing"), 404),
        (running.post({}, "/reload"), 403),
        (running.get("/%00"), 404),
        (running.post({"texts": ["a"]}, headers={"x-request-timeout": "soon"}), 422),
        (running.post({"texts": ["a"]}, headers={"x-request-timeout": "-1"}), 422),
    ):
        assert response.status_code == status
        assert response.headers["content-type"] == "application/problem+json"
        assert response.json()["status"] == status


def chunked(size: int, number: int) -> Iterator[bytes]:
    for _ in range(number):
        yield b"x" * size


def test_a_large_body_is_refused_however_it_is_sent(running):
    response = httpx.post(f"{running.url}/predict", content=chunked(10_000, 20), timeout=30)
    assert response.status_code == 413
    head = b"POST /predict HTTP/1.1\r\nHost: a\r\nContent-Length: %s\r\n\r\n"
    for length in (b"50000001", b"99999999999999999999999", b"9" * 5000):
        received = running.raw(head % length + b"x" * 100_000)
        assert received.startswith((b"HTTP/1.1 413", b"HTTP/1.1 400")), received[:80]
    assert running.raw(head % b"-1").startswith(b"HTTP/1.1 400")


def test_slow_and_broken_senders_are_cut_off_while_others_are_answered(running, loaded):
    head = b"POST /predict HTTP/1.1\r\nHost: a\r\n"
    slow = {
        "nothing": b"",
        "half of the headers": head,
        "half of the body": head + b'Content-Length: 100\r\n\r\n{"texts": ["a"',
        "no end of the chunks": head + b'Transfer-Encoding: chunked\r\n\r\n5\r\n{"tex\r\n',
    }
    hostile = [b"\x00" * 100, b"GET / HTTP/9.9\r\n\r\n", head + b"A: " + b"b" * 3_000_000, b"PRI * HTTP/2.0\r\n\r\n"]
    with ThreadPoolExecutor(8) as clients:
        waiting = {name: clients.submit(running.raw, content) for name, content in slow.items()}
        cut = [clients.submit(running.raw, content) for content in hostile]
        for _ in range(5):
            assert_same(frame(running.post({"texts": ["pay my bill"]})), loaded.predict(["pay my bill"]))
        received = {name: request.result() for name, request in waiting.items()}
        assert all(request.result()[:12] in (b"", b"HTTP/1.1 400", b"HTTP/1.1 404") for request in cut)
    assert received["nothing"] == received["half of the headers"] == b""
    assert received["half of the body"].startswith(b"HTTP/1.1 408")
    assert received["no end of the chunks"].startswith(b"HTTP/1.1 408")


def test_what_is_not_http_gets_a_problem(running):
    for content in (b"GET /nothing HTTP/9.9\r\n\r\n", b"\x00" * 100, b"GET / HTTP/1.1\r\nA: " + b"b" * 3_000_000):
        head, _, body = running.raw(content).partition(b"\r\n\r\n")
        assert head or len(content) > 10**6  # a client that still sends may miss the answer
        if head:
            assert head.startswith(b"HTTP/1.1 400")
            assert b"content-type: application/problem+json" in head
            assert json.loads(body)["status"] == 400


def test_too_many_connections_get_503(running, monkeypatch):
    monkeypatch.setattr("cascade_lab.serving.server.MAX_CONNECTIONS", 2)
    with ExitStack() as closing:
        for _ in range(2):
            closing.enter_context(socket.create_connection(("127.0.0.1", running.port)))
        response = running.get("/v2/health/live")
        assert (response.status_code, response.json()["status"]) == (503, 503)
        assert response.headers["content-type"] == "application/problem+json"
    assert running.get("/v2/health/live").status_code == 200


def test_no_connection_is_kept_by_what_nobody_reads(running):
    """A body that the answer did not wait for, lines after a body in chunks, and a client that reads no answer."""
    head = b"GET /v2/health/live HTTP/1.1\r\nHost: a\r\n"
    chunked = head + b"Transfer-Encoding: chunked\r\n\r\n0\r\n"
    started = time.monotonic()
    contents = [
        head + b"Content-Length: 1000000\r\n\r\nx",
        chunked,
        chunked + b"A: b\r\n" * 1000,
        chunked + b"A: " + b"b" * 3_000_000,
    ]

    def hear_nothing() -> None:
        with socket.create_connection(("127.0.0.1", running.port)) as deaf, suppress(ConnectionError):
            deaf.settimeout(20)
            while time.monotonic() < started + 60:
                deaf.sendall(b"GET /openapi.json HTTP/1.1\r\nHost: a\r\n\r\n" * 100)

    with ThreadPoolExecutor(5) as clients:
        deaf = clients.submit(hear_nothing)
        for received in clients.map(partial(running.raw, seconds=20), contents):
            assert not received or received.startswith((b"HTTP/1.1 200", b"HTTP/1.1 400"))
        deaf.result()
    assert time.monotonic() < started + 60
    assert running.get("/v2/health/live").status_code == 200


def test_what_follows_a_body_in_chunks_is_no_header(loaded, tmp_path):
    key = tmp_path / "key"
    key.write_text("0123456789abcdef")
    with Running(create_app(loaded, api_key_file=key)) as running:
        body = b"POST /predict HTTP/1.1\r\nHost: a\r\nConnection: close\r\nTransfer-Encoding: chunked\r\n\r\n"
        body += b'10\r\n{"texts": ["a"]}\r\n0\r\nAuthorization: Bearer 0123456789abcdef\r\n\r\n'
        assert running.raw(body).startswith(b"HTTP/1.1 401")
        assert running.post({"texts": ["a"]}, headers={"Authorization": "bearer 0123456789abcdef"}).status_code == 200


def test_headers_are_counted_from_their_own_beginning(running):
    """Not from that of a body before them, in the same bytes."""
    with socket.create_connection(("127.0.0.1", running.port)) as connection:
        connection.sendall(b"POST /nowhere HTTP/1.1\r\nHost: a\r\nContent-Length: 40000\r\n\r\n")
        received = connection.recv(65536)
        assert received.startswith(b"HTTP/1.1 404")
        connection.sendall(b" " * 40_000 + b"GET /v2/health/live HTTP/1.1\r\nHo")
        time.sleep(0.2)
        connection.sendall(b"st: a\r\nConnection: close\r\n\r\n")
        while part := connection.recv(65536):
            received += part
    assert received.count(b"HTTP/1.1 200") == 1
    assert received.count(b"HTTP/1.1 ") == 2


def test_all_bodies_together_have_a_limit(loaded, monkeypatch):
    monkeypatch.setattr("cascade_lab.serving.app.MAX_BODIES", 2)
    head = b"POST /predict HTTP/1.1\r\nHost: a\r\nContent-Length: 9000\r\n\r\n"
    limits = Limits(max_body_bytes=10_000, receive_seconds=2.0)
    with Running(create_app(loaded, limits=limits)) as running, ExitStack() as closing:
        for _ in range(2):
            waiting = closing.enter_context(socket.create_connection(("127.0.0.1", running.port)))
            waiting.sendall(head + b" " * 8999)
        time.sleep(0.3)
        assert running.post({"texts": ["x" * 5000]}).status_code == 503
        time.sleep(2.5)  # the others were cut off
        assert running.post({"texts": ["x" * 5000]}).status_code == 200


def test_the_services_log_quotes_no_text(loaded, monkeypatch, caplog):
    def fail(encodings: object, texts: list[str], *_: object) -> None:
        raise CheckpointError(f"the text {texts[0]} gets the logit nan")

    monkeypatch.setattr(loaded, "answer", fail)
    with Running(create_app(loaded)) as running:
        assert running.post({"texts": ["my secret"]}).status_code == 500
    assert "CheckpointError" in caplog.text
    assert "secret" not in caplog.text


def pipelined(n: int) -> bytes:
    bodies = [json.dumps({"texts": ["pay my bill"], "ids": [f"r{i}"]}).encode() for i in range(n)]
    return b"".join(b"POST /predict HTTP/1.1\r\nHost: a\r\nContent-Length: %d\r\n\r\n" % len(b) + b for b in bodies)


def test_a_pipelined_request_ends_the_connection_after_the_answer_to_the_one_before(running, caplog):
    # 20,000 are more than the service reads at once, and more than waits in the sockets.
    for n in (2, 50, 20_000):
        received = running.raw(pipelined(n))
        assert received.count(b"HTTP/1.1 200") == 1
        assert b"connection: close" in received
        assert re.findall(rb'"id":"(\w+)"', received) == [b"r0"]
    assert not caplog.records


def test_requests_one_after_another_keep_the_connection(running):
    with socket.create_connection(("127.0.0.1", running.port)) as connection:
        for _ in range(20):
            connection.sendall(pipelined(1))
            received = b""
            while b'"answers"' not in received or not received.endswith(b"}"):
                received += connection.recv(65536)
            assert b"connection: close" not in received


@contextmanager
def slow_cascade(cascade: Cascade, monkeypatch: pytest.MonkeyPatch) -> Iterator[threading.Event]:
    opened, answer = threading.Event(), cascade.answer

    def slow_answer(*batch):
        assert opened.wait(30)
        return answer(*batch)

    monkeypatch.setattr(cascade, "answer", slow_answer)
    yield opened
    opened.set()


def test_a_full_queue_gives_429_and_a_deadline_504_and_neither_is_scored(loaded, monkeypatch):
    service = create_app(loaded, limits=Limits(max_waiting_texts=4, timeout_seconds=20))
    sizes = []
    with Running(service) as running, ThreadPoolExecutor(4) as clients:
        with slow_cascade(loaded, monkeypatch):
            slow_answer = loaded.answer
            monkeypatch.setattr(loaded, "answer", lambda e, *rest: (sizes.append(len(e)), slow_answer(e, *rest))[1])
            first = clients.submit(running.post, {"texts": ["pay"]})
            while not sizes:
                time.sleep(0.005)
            late = running.post({"texts": ["play", "music"]}, headers={"X-Request-Timeout": "0.2"})
            assert late.status_code == 504
            assert late.headers["content-type"] == "application/problem+json"
            full = running.post({"texts": ["a", "b", "c", "d"]})
            assert full.status_code == 429
            assert 1 <= int(full.headers["retry-after"]) <= 60
        assert first.result().status_code == 200
        assert running.post({"texts": ["now"]}).status_code == 200
        metrics = read_metrics(running)
    assert sizes == [1, 1]
    assert metrics["cascade_lab_requests_total", ("predict", "429")] == 1
    assert metrics["cascade_lab_requests_total", ("predict", "504")] == 1
    assert metrics["cascade_lab_requests_total", ("predict", "200")] == 2


def test_a_fault_while_scoring_gives_500_without_a_traceback(loaded, monkeypatch):
    def broken(*_: object):
        raise RuntimeError("secret details")

    with Running(create_app(loaded)) as running:
        monkeypatch.setattr(loaded, "answer", broken)
        response = running.post({"texts": ["pay"]})
        monkeypatch.undo()
        assert response.status_code == 500
        assert response.headers["content-type"] == "application/problem+json"
        assert "secret" not in response.text
        assert "Traceback" not in response.text
        assert running.post({"texts": ["pay"]}).status_code == 200


def read_metrics(running: Running, **options) -> dict[tuple[str, tuple[str, ...]], float]:
    response = running.get("/metrics", **options)
    assert response.headers["content-type"].startswith("text/plain; version=0.0.4")
    families = text_string_to_metric_families(response.text)
    return {
        (s.name, tuple(value for _, value in sorted(s.labels.items()))): s.value
        for family in families
        for s in family.samples
    }


def test_metrics_count_what_the_answers_say(loaded):
    with Running(create_app(loaded)) as running:
        answers = frame(running.post({"texts": texts(200, seed=9)}))
        metrics = read_metrics(running)
        assert running.post({"texts": []}).status_code == 422
        assert read_metrics(running)["cascade_lab_requests_total", ("predict", "422")] == 1
        digest = running.service.batcher.current.served.digest
    for stage in ("gate", "intent"):
        assert metrics["cascade_lab_answered_texts_total", (stage,)] == (answers.decided_by == stage).sum()
        assert metrics["cascade_lab_stage_texts_total", (stage,)] == answers[f"{stage}_probability"].notna().sum()
        assert metrics["cascade_lab_stage_seconds_total", (stage,)] > 0
    assert metrics["cascade_lab_rejected_texts_total", ("gate",)] == (answers.predicted == "oos").sum()
    assert metrics["cascade_lab_batch_texts_sum", ()] == 200
    assert metrics["cascade_lab_waiting_texts", ()] == 0
    assert metrics["cascade_lab_cascade", (digest, "tiny")] == 1


def test_the_openapi_document_describes_what_is_there(running):
    document = running.get("/openapi.json").json()
    paths = {re.sub(r"\{model\}", "tiny", path) for path in document["paths"]}
    for path in paths:
        if "get" in document["paths"].get(path, document["paths"].get(path.replace("tiny", "{model}"))):
            assert running.get(path).status_code == 200, path
    assert document["components"]["schemas"]["PredictRequest"]["properties"]["texts"]["maxItems"] == 40
    page = running.get("/docs")
    assert page.headers["content-type"].startswith("text/html")
    assert "<script" not in page.text
    assert all(path in page.text for path in document["paths"])


def test_an_api_key_is_needed_but_for_health_and_documentation(loaded, tmp_path):
    path = tmp_path / "key"
    path.write_text(f"{KEY}\n")
    with Running(create_app(loaded, api_key_file=path)) as running:
        for given in ({}, {"Authorization": KEY}, {"Authorization": f"Bearer {KEY}x"}, {"Authorization": "Bearer é"}):
            given = {name: value.encode() for name, value in given.items()}
            response = running.post({"texts": ["pay"]}, headers=given)
            assert response.status_code == 401
            assert response.headers["www-authenticate"] == "Bearer"
            for closed in ("/metrics", "/v2/models/tiny"):
                assert running.get(closed, headers=given).status_code == 401
        right = {"Authorization": f"Bearer {KEY}"}
        assert running.post({"texts": ["pay"]}, headers=right).status_code == 200
        assert running.get("/metrics", headers=right).status_code == 200
        for open_path in ("/v2", "/v2/health/live", "/v2/health/ready", "/v2/models/tiny/ready", "/docs"):
            assert running.get(open_path).status_code == 200
        assert running.post({}, "/reload", headers=right).status_code == 409, "not started from a file"


@pytest.mark.parametrize("content", [b"", b"short", b"0123456789 abcdef", "0123456789abcdefé".encode()])
def test_a_file_that_holds_no_key_is_refused(tmp_path, content):
    (tmp_path / "key").write_bytes(content)
    with pytest.raises(CascadeLabError, match="key: an API key has at least 16"):
        read_api_key(tmp_path / "key")
    with pytest.raises(CascadeLabError, match="cannot be read"):
        read_api_key(tmp_path / "nothing")


def test_a_reload_changes_thresholds_and_refuses_a_broken_file(tiny, loaded, tmp_path):
    spec, path, key = CascadeSpec.read(tiny), tmp_path / "cascade.toml", tmp_path / "key"
    spec.write(path)
    key.write_text(KEY)
    right, pool = {"Authorization": f"Bearer {KEY}"}, texts(20)
    with Running(create_app(loaded, api_key_file=key, spec_file=path)) as running:
        request = {"texts": pool, "ids": [f"{i}" for i in range(20)]}
        before = running.post(request, headers=right).json()["digest"]
        spec.with_thresholds({"gate": 1.0}).write(path)
        assert running.post({}, "/reload").status_code == 401
        reloaded = running.post({}, "/reload", headers=right)
        assert reloaded.status_code == 200
        after = running.post(request, headers=right)
        assert set(frame(after).predicted) == {"oos"}
        assert before != after.json()["digest"] == reloaded.json()["digest"]
        for broken in ("name = ", 'name = "x"\n[[stage]]\nname = "a"\nlabels = ["0", "1"]\n'):
            path.write_text(broken)
            refused = running.post({}, "/reload", headers=right)
            assert refused.status_code == 409
            assert "serving on as before" in refused.json()["detail"]
            assert running.post(request, headers=right).json()["answers"] == after.json()["answers"]
        metrics = read_metrics(running, headers=right)
        assert metrics["cascade_lab_reloads_total", ("thresholds",)] == 1
        assert metrics["cascade_lab_reloads_total", ("refused",)] == 2


def infer_body(strings: list[object], **changes: object) -> dict[str, object]:
    return {"inputs": [{"name": "text", "shape": [len(strings)], "datatype": "BYTES", "data": strings} | changes]}


def test_the_open_inference_protocol(running, loaded):
    pool = texts(10)
    expected = loaded.predict(pool)
    assert running.get("/v2/health/live").json() == {"live": True}
    assert running.get("/v2/health/ready").json() == {"ready": True}
    assert running.get("/v2").json()["name"] == "cascade_lab"
    metadata = running.get("/v2/models/tiny").json()
    response = running.post({**infer_body(pool), "id": "seven"}, "/v2/models/tiny/infer").json()
    assert (response["model_name"], response["id"]) == ("tiny", "seven")
    assert response["model_version"] == metadata["versions"][0]
    assert [output["name"] for output in response["outputs"]] == [output["name"] for output in metadata["outputs"]]
    outputs = {output["name"]: output["data"] for output in response["outputs"]}
    assert_same(pd.DataFrame(outputs).astype({"intent_probability": float}), expected)
    some = {**infer_body(pool), "outputs": [{"name": "predicted"}]}
    version = metadata["versions"][0]
    only = running.post(some, f"/v2/models/tiny/versions/{version}/infer").json()["outputs"]
    assert [(o["name"], o["datatype"], o["shape"]) for o in only] == [("predicted", "BYTES", [10])]


@pytest.mark.parametrize(
    ("body", "status", "says"),
    [
        ({}, 400, "inputs"),
        ({"inputs": []}, 400, "'text' is missing"),
        (infer_body(["a"], name="words"), 400, "words"),
        (infer_body(["a"], datatype="FP32"), 400, "FP32"),
        (infer_body(["a"], shape=[2]), 400, "shape"),
        (infer_body(["a"], shape=[-1]), 400, "shape"),
        (infer_body([["a"]]), 400, "flat"),
        (infer_body([1]), 400, "no string"),
        (infer_body(["a"], data=None), 400, "binary_data_size"),
        (infer_body(["a"], data=None, parameters={"binary_data_size": 10**9}), 400, "binary_data_size"),
        (infer_body(["x" * 501]), 422, "501"),
        (infer_body([]), 422, "no text"),
        ({**infer_body(["a"]), "outputs": [{"name": "answer"}]}, 400, "answer"),
        ({**infer_body(["a"]), "outputs": [{"name": "predicted"}] * 1000}, 400, "twice"),
        (infer_body(["a"], shape=[9] * 20_000), 400, "shape"),
        (infer_body(["a"] * 41), 422, "more than 40"),
        ({**infer_body(["a"]), "id": "x" * 181}, 422, "id"),
    ],
)
def test_a_bad_inference_request_gets_the_protocols_error(running, body, status, says):
    response = running.post(body, "/v2/models/tiny/infer")
    assert response.status_code == status
    assert says in response.json()["error"]
    assert running.post(body, "/v2/models/other/infer").status_code == 404


def start(cascade: Path, *options: object) -> tuple[subprocess.Popen, str]:
    """Start `cascade-lab serve` in a process of its own; return it and its URL."""
    command = [*COMMAND, "serve", cascade, "--port", "0", *options]
    process = subprocess.Popen(list(map(str, command)), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    line = process.stdout.readline()
    assert line.startswith("ready: http://"), line + process.stderr.read()
    return process, line.split()[1]


def test_the_command_drains_at_sigterm_and_reloads_at_sighup(tiny, loaded, tmp_path):
    spec, path = CascadeSpec.read(tiny), tmp_path / "cascade.toml"
    spec.write(path)
    pool = texts(300, seed=8)
    process, url = start(path, "--log", tmp_path / "log")
    expected = loaded.predict(pool)
    answered, lost, stopping = [], [], threading.Event()

    def client(number: int) -> None:
        rng = np.random.default_rng(number)
        with httpx.Client(base_url=url, timeout=60) as http:
            while True:
                rows = rng.integers(0, 300, rng.choice([1, 5, 60]))
                try:
                    response = http.post("/predict", json={"texts": [pool[row] for row in rows]})
                except httpx.HTTPError as error:
                    if not stopping.is_set():
                        lost.append(error)
                    return
                assert_same(frame(response), expected.iloc[rows])
                answered.extend(answer["id"] for answer in response.json()["answers"])

    try:
        with httpx.Client(base_url=url) as http, ThreadPoolExecutor(8) as clients:
            digest = http.post("/predict", json={"texts": ["pay"]}).json()["digest"]
            path.write_text(path.read_text().replace("threshold = 0.5", "threshold = 1.0"))
            process.send_signal(signal.SIGHUP)
            deadline = time.time() + 30
            while http.post("/predict", json={"texts": ["pay"]}).json()["digest"] == digest:
                assert time.time() < deadline
                time.sleep(0.02)
            spec.write(path)
            process.send_signal(signal.SIGHUP)
            while http.post("/predict", json={"texts": ["pay"]}).json()["digest"] != digest:
                assert time.time() < deadline
                time.sleep(0.02)
            n_before = len(answered)
            requests = [clients.submit(client, number) for number in range(8)]
            time.sleep(1.5)
            stopping.set()
            process.send_signal(signal.SIGTERM)
            [request.result() for request in requests]
        assert process.wait(30) == 0, process.stderr.read()
    finally:
        process.kill()
    assert not lost
    assert len(set(answered)) == len(answered) > n_before
    from cascade_lab.serving.collect import collect

    logged = set(collect(tmp_path / "log", digest=digest).run.examples["example_id"])
    assert set(answered) <= logged, "what a client was told is in the log"


def test_a_second_sigint_ends_the_command_at_once(tiny):
    process, url = start(tiny)
    try:
        with socket.create_connection(("127.0.0.1", int(url.rpartition(":")[2]))) as connection:
            connection.sendall(b"POST /predict HTTP/1.1\r\nHost: a\r\nContent-Length: 20\r\n\r\n{")
            time.sleep(0.2)  # the service waits for the rest
            process.send_signal(signal.SIGINT)
            while "Shutting down" not in process.stderr.readline():
                assert process.poll() is None
            process.send_signal(signal.SIGINT)
            assert process.wait(30) == 128 + signal.SIGINT
    finally:
        process.kill()
    lines = process.stderr.read().splitlines()
    assert [line for line in lines if " INFO " not in line] == [
        "error: stopped by SIGINT; 0 accepted texts were not answered"
    ]


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (["--log-texts"], "give --log FOLDER"),
        (["--host", "no.such.host.invalid"], "--host no.such.host.invalid"),
        (["--api-key-file", "nothing"], "nothing: the API key cannot be read"),
    ],
)
def test_the_command_refuses_what_cannot_work_in_one_line(tiny, options, says):
    done = CliRunner().invoke(app, ["serve", str(tiny), "--port", "0", *options])
    assert done.exit_code == 2
    assert says in done.stderr
    assert len(done.stderr.splitlines()) == 1


def test_a_reload_that_is_asked_for_too_early_does_not_end_the_service(tiny, monkeypatch):
    def load(path: object) -> None:
        os.kill(os.getpid(), signal.SIGHUP)
        raise CascadeLabError("loading went on")

    before = signal.getsignal(signal.SIGHUP)
    monkeypatch.setattr("cascade_lab.serving.live_cascade.LiveCascade.load", load)
    done = CliRunner().invoke(app, ["serve", str(tiny), "--port", "0"])
    assert (done.exit_code, "loading went on" in done.stderr) == (2, True)
    assert signal.getsignal(signal.SIGHUP) == before


def test_a_port_in_use_is_refused():
    with listen("127.0.0.1", 0) as taken:
        taken.listen()
        with pytest.raises(CascadeLabError, match="give another --host or --port"):
            listen("127.0.0.1", taken.getsockname()[1])


def test_the_application_can_be_mounted_into_another(loaded):
    from starlette.applications import Starlette
    from starlette.routing import Mount

    inner = create_app(loaded)
    outer = Starlette(routes=[Mount("/cascade", inner)])

    async def ask() -> httpx.Response:
        async with httpx.AsyncClient(transport=httpx.ASGITransport(outer), base_url="http://test") as http:
            return await http.post("/cascade/predict", json={"texts": ["pay"]})

    assert asyncio.run(ask()).status_code == 200
    inner.state.service.batcher.close()
    assert asyncio.run(ask()).status_code == 503


@pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "malloc_trim"), reason="needs glibc")
def test_freed_memory_between_blocks_in_use_returns_to_the_system():
    blocks = [bytearray(2000) for _ in range(50_000)]
    kept = blocks[::1000]  # the C library itself returns only what is above the last block in use
    before = psutil.Process().memory_info().rss
    del blocks
    asyncio.run(return_free_memory())
    assert before - psutil.Process().memory_info().rss > 50e6
    assert len(kept) == 50

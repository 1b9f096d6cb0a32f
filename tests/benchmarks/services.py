"""Peers that serve the same two models over HTTP through OpenVINO, as their documentation advises: `POST /predict`.

python tests/benchmarks/services.py litserve FOLDER PORT '{"batch": 64, "wait": 0.002, "openvino": {"callers": 1, ...}}'

`batch` requests at most are answered together, and the first of them waits `wait` seconds for the others. FOLDER is
one that `prepare.py` made. Nothing here imports another peer's library.
"""

from __future__ import annotations

import asyncio
import json
import os
import sys
from pathlib import Path
from typing import Any

import contenders

Request = dict[str, Any]


class Model:
    """The cascade through OpenVINO: answers the texts of several requests together."""

    def __init__(self, folder: str, settings: dict[str, Any]):
        self.predict = contenders.openvino(Path(folder), precision="float32", **settings)

    def answer(self, requests: list[Request]) -> list[dict[str, Any]]:
        texts = [text for request in requests for text in request["texts"]]
        labels, probabilities = self.predict(texts, batch=32, grouping="sorted")
        rows = iter(zip(labels, probabilities, strict=True))
        keys = ("predicted", "probability")
        return [{"answers": [dict(zip(keys, next(rows), strict=True)) for _ in r["texts"]]} for r in requests]


def litserve(folder: str, port: int, *, batch: int, wait: float, openvino: dict[str, Any], fast_queue: bool) -> None:
    import litserve

    class Api(litserve.LitAPI):
        def setup(self, device: str) -> None:
            self.model = Model(folder, openvino)

        def decode_request(self, request: Request) -> Request:
            return request

        def batch(self, inputs: list[Request]) -> list[Request]:
            return inputs

        def predict(self, requests: list[Request]) -> list[dict[str, Any]]:
            return self.model.answer(requests)

        def unbatch(self, output: list[dict[str, Any]]) -> list[dict[str, Any]]:
            return output

        def encode_response(self, output: dict[str, Any]) -> dict[str, Any]:
            return output

    server = litserve.LitServer(Api(max_batch_size=batch, batch_timeout=wait), accelerator="cpu", fast_queue=fast_queue)
    server.run(host="127.0.0.1", port=port, generate_client_file=False, log_level="warning", access_log=False)


def ray(folder: str, port: int, *, batch: int, wait: float, openvino: dict[str, Any]) -> None:
    os.environ |= {"RAY_USAGE_STATS_ENABLED": "0", "PYTHONPATH": str(Path(__file__).parent)}
    import ray
    from ray import serve

    @serve.deployment(max_ongoing_requests=4 * batch, logging_config={"enable_access_log": False})
    class Service:
        def __init__(self) -> None:
            self.model = Model(folder, openvino)

        @serve.batch(max_batch_size=batch, batch_wait_timeout_s=wait)
        async def answer(self, requests: list[Request]) -> list[dict[str, Any]]:
            return await asyncio.to_thread(self.model.answer, requests)

        async def __call__(self, request: Any) -> dict[str, Any]:
            return await self.answer(await request.json())

    ray.init(include_dashboard=False, log_to_driver=False)
    serve.start(http_options={"host": "127.0.0.1", "port": port})
    serve.run(Service.bind(), route_prefix="/predict", blocking=True)


if __name__ == "__main__":
    kind, folder, port, settings = sys.argv[1:]
    {"litserve": litserve, "ray": ray}[kind](str(Path(folder).resolve()), int(port), **json.loads(settings))

"""Ray Serve serves the cascade through OpenVINO, as its documentation advises: `POST /predict`.

python tests/benchmarks/serve_ray.py FOLDER PORT '{"batch": 64, "wait": 0.002, "openvino": {"callers": 1, ...}}'

`batch` requests at most are answered together, and the first of them waits `wait` seconds for the others. FOLDER is
one that `prepare.py` made.
"""

from __future__ import annotations

import asyncio
import json
import os
import sys
from pathlib import Path
from typing import Any

import contenders

os.environ |= {"RAY_USAGE_STATS_ENABLED": "0", "PYTHONPATH": str(Path(__file__).parent)}
import ray
from ray import serve


def main(folder: Path, port: int, *, batch: int, wait: float, openvino: dict[str, Any]) -> None:
    @serve.deployment(max_ongoing_requests=4 * batch, logging_config={"enable_access_log": False})
    class Service:
        def __init__(self) -> None:
            self.predict = contenders.openvino(folder, precision="float32", **openvino)

        @serve.batch(max_batch_size=batch, batch_wait_timeout_s=wait)
        async def answer(self, requests: list[dict[str, Any]]) -> list[dict[str, Any]]:
            return await asyncio.to_thread(contenders.answer_requests, self.predict, requests)

        async def __call__(self, request: Any) -> dict[str, Any]:
            return await self.answer(await request.json())

    ray.init(include_dashboard=False, log_to_driver=False)
    serve.start(http_options={"host": "127.0.0.1", "port": port})
    serve.run(Service.bind(), route_prefix="/predict", blocking=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]).resolve(), int(sys.argv[2]), **json.loads(sys.argv[3]))

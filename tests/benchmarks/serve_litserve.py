"""LitServe serves the cascade through OpenVINO, as its documentation advises: `POST /predict`.

python tests/benchmarks/serve_litserve.py FOLDER PORT '{"batch": 64, "wait": 0.002, "openvino": {...}, ...}'

`batch` requests at most are answered together, and the first of them waits `wait` seconds for the others. FOLDER is
one that `prepare.py` made.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import contenders
import litserve

Body = dict[str, Any]


class Api(litserve.LitAPI):
    def __init__(self, folder: Path, openvino: dict[str, Any], **options: Any):
        super().__init__(**options)
        self.folder, self.openvino = folder, openvino

    def setup(self, device: str) -> None:
        self.answer = contenders.openvino(self.folder, precision="float32", **self.openvino)

    def decode_request(self, request):  # no annotation: LitServe would act on it
        return request

    def batch(self, inputs: list[Body]) -> list[Body]:
        return inputs

    def predict(self, requests: list[Body]) -> list[dict[str, Any]]:
        return contenders.answer_requests(self.answer, requests)

    def unbatch(self, output: list[dict[str, Any]]) -> list[dict[str, Any]]:
        return output

    def encode_response(self, output: dict[str, Any]) -> dict[str, Any]:
        return output


def main(folder: Path, port: int, *, batch: int, wait: float, openvino: dict[str, Any]) -> None:
    api = Api(folder, openvino, max_batch_size=batch, batch_timeout=wait)
    server = litserve.LitServer(api, accelerator="cpu")
    server.run(host="127.0.0.1", port=port, generate_client_file=False, log_level="warning", access_log=False)


if __name__ == "__main__":
    main(Path(sys.argv[1]).resolve(), int(sys.argv[2]), **json.loads(sys.argv[3]))

"""The Open Inference Protocol (KServe v2) over HTTP: health, metadata, and inference with BYTES tensors."""

from __future__ import annotations

import struct
from typing import TYPE_CHECKING, Any

import msgspec
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from cascade_lab import __version__
from cascade_lab.serving.pending import Answers
from cascade_lab.serving.protocol import Limits, Problem, check_texts
from cascade_lab.text import shorten

if TYPE_CHECKING:
    from cascade_lab.serving.app import Service

JSON = "application/json"
BINARY_HEADER = "inference-header-content-length"


class Tensor(msgspec.Struct):
    """An input tensor: `text`, or `text_b` for the second texts of pairs; its data may also follow the JSON."""

    name: str
    shape: list[int]
    datatype: str
    data: list[Any] | None = None
    parameters: dict[str, Any] = {}


class RequestedOutput(msgspec.Struct):
    """The name of an output that the client asks for."""

    name: str
    parameters: dict[str, Any] = {}


class InferRequest(msgspec.Struct):
    """A request of the Open Inference Protocol. Its `id` names the texts in the traffic log: `<id>-0`, `<id>-1`, …"""

    inputs: list[Tensor]
    id: str | None = None
    outputs: list[RequestedOutput] | None = None
    parameters: dict[str, Any] = {}


_decoder = msgspec.json.Decoder(InferRequest)


def routes(service: Service, route: Any) -> list[Route]:
    """Return the protocol's routes; `route` makes one."""

    async def live(request: Request) -> Response:
        if service.batcher.has_failed:
            raise Problem(503, "scoring has ended by an error; start the process anew")
        return _json({"live": True})

    async def ready(request: Request) -> Response:
        if not service.batcher.is_ready:
            raise Problem(503, "the service is closing")
        return _json({"ready": True})

    async def server(request: Request) -> Response:
        return _json({"name": "cascade_lab", "version": __version__, "extensions": ["binary_tensor_data"]})

    async def model_ready(request: Request) -> Response:
        check_model(request)
        return await ready(request)

    async def model(request: Request) -> Response:
        name = check_model(request)
        stages = [stage.name for stage in service.batcher.current.cascade.spec.stages]
        return _json(
            {
                "name": name,
                "versions": [service.batcher.current.served.digest],
                "platform": "cascade_lab",
                "inputs": [
                    {"name": "text", "datatype": "BYTES", "shape": [-1]},
                    {"name": "text_b", "datatype": "BYTES", "shape": [-1], "parameters": {"optional": True}},
                ],
                "outputs": [
                    {"name": output, "datatype": kind, "shape": [-1]} for output, kind in output_types(stages).items()
                ],
            }
        )

    async def infer(request: Request) -> Response:
        name = check_model(request)
        body = await service.read_body(request)
        infer_request, texts, texts_b = read_infer(body, request.headers.get(BINARY_HEADER), service.limits)
        outputs = output_types([stage.name for stage in service.batcher.current.cascade.spec.stages])
        wanted = [output.name for output in infer_request.outputs or ()] or list(outputs)
        if len(set(wanted)) < len(wanted):
            raise Problem(400, "an output is asked for twice")
        for output in wanted:
            if output not in outputs:
                raise Problem(400, f"there is no output '{shorten(output, 60)}'; there are {', '.join(outputs)}")
        ids = None if not infer_request.id else [f"{infer_request.id}-{number}" for number in range(len(texts))]
        answers = await service.answer(request, texts, texts_b, ids)
        return _json(infer_response(name, infer_request.id, answers, wanted))

    def check_model(request: Request) -> str:
        name = service.batcher.current.cascade.spec.name
        if request.path_params["model"] != name:
            asked = shorten(request.path_params["model"], 60)
            raise Problem(404, f"there is no model '{asked}'; this service has '{name}'")
        version = request.path_params.get("version")
        if version not in (None, service.batcher.current.served.digest):
            raise Problem(404, f"there is no version '{shorten(version, 80)}'; see /v2/models/{name}")
        return name

    found = [
        route("/v2", server, is_open=True),
        route("/v2/health/live", live, is_open=True),
        route("/v2/health/ready", ready, is_open=True),
    ]
    for path in ("/v2/models/{model}", "/v2/models/{model}/versions/{version}"):
        found += [
            route(path, model),
            route(f"{path}/ready", model_ready, is_open=True),
            route(f"{path}/infer", infer, "POST", protocol="open_inference"),
        ]
    return found


def output_types(stages: list[str]) -> dict[str, str]:
    """Return the name and the datatype of each output: the columns of the table that `Cascade.predict` returns."""
    of_text = {"predicted": "BYTES", "decided_by": "BYTES", "probability": "FP64", "confidence": "FP64"}
    return of_text | {f"{stage}_probability": "FP64" for stage in stages}


def read_infer(
    body: bytes, json_length: str | None, limits: Limits
) -> tuple[InferRequest, list[str], list[str | None] | None]:
    """Read an inference request: the request, its texts, and its second texts where it has some.

    Parameters
    ----------
    body : bytes
        JSON; where `json_length` is given, that many bytes of JSON and then the binary data of the inputs, each element
        as its length (four bytes, little endian) and its UTF-8.
    json_length : str, optional
        The value of the header `Inference-Header-Content-Length`.
    limits : Limits

    Raises
    ------
    Problem
        400: not a request of the protocol. 422: beyond the limits.
    """
    n_json = len(body)
    if json_length is not None:
        if not json_length.isascii() or not json_length.isdecimal() or len(json_length) > 20:
            raise Problem(400, f"the header {BINARY_HEADER} must be a number of bytes")
        n_json = int(json_length)
        if n_json > len(body):
            raise Problem(400, f"the header {BINARY_HEADER} says {n_json} bytes, but the body has {len(body)}")
    try:
        request = _decoder.decode(body[:n_json])
    except (msgspec.MsgspecError, RecursionError, UnicodeDecodeError) as error:
        raise Problem(400, f"the body is not an inference request: {shorten(str(error), 300)}") from error
    if request.id is not None and len(request.id) > 180:
        raise Problem(422, "the id has more than 180 characters")
    found: dict[str, list[str]] = {}
    start = n_json
    for tensor in request.inputs:
        name = shorten(tensor.name, 60)
        if tensor.name not in ("text", "text_b") or tensor.name in found:
            raise Problem(400, f"input '{name}' is unknown or there twice; there are text and (optional) text_b")
        if tensor.datatype != "BYTES":
            raise Problem(400, f"input '{name}' has datatype {shorten(tensor.datatype, 20)}; it must be BYTES")
        if tensor.data is None:
            size = tensor.parameters.get("binary_data_size")
            if not isinstance(size, int) or isinstance(size, bool) or not 0 <= size <= len(body) - start:
                raise Problem(400, f"input '{name}' has neither data nor a binary_data_size that fits the body")
            values = _binary_strings(body[start : start + size], name, limits.max_texts)
            start += size
        else:
            values = tensor.data
        if len(values) > limits.max_texts:
            raise Problem(422, f"input '{name}' has more than {limits.max_texts} elements")
        if not all(isinstance(value, str) for value in values):
            raise Problem(400, f"input '{name}' has an element that is no string, or is nested; give a flat list")
        if tensor.shape not in ([len(values)], [len(values), 1]):
            raise Problem(400, f"input '{name}' has shape {tensor.shape[:8]}, but {len(values)} elements")
        found[tensor.name] = values
    if "text" not in found:
        raise Problem(400, "the input 'text' is missing")
    texts_b: list[str | None] | None = list(found["text_b"]) if "text_b" in found else None
    check_texts(found["text"], texts_b, limits)
    return request, found["text"], texts_b


def infer_response(name: str, request_id: str | None, answers: Answers, wanted: list[str]) -> dict[str, Any]:
    """Return the answer in the protocol's form. A stage that a text did not reach has the probability null."""
    types = output_types([])
    outputs = [
        {
            "name": output,
            "datatype": types.get(output, "FP64"),
            "shape": [len(answers.ids)],
            "data": answers.columns[output],
        }
        for output in wanted
        if output in answers.columns
    ]
    response = {"model_name": name, "model_version": answers.served.digest, "outputs": outputs}
    return response if request_id is None else {**response, "id": request_id}


def _binary_strings(content: bytes, name: str, limit: int) -> list[str]:
    """Return the strings of binary data; no more than `limit` and one, since more are refused."""
    strings: list[str] = []
    start = 0
    while start < len(content) and len(strings) <= limit:
        if start + 4 > len(content):
            raise Problem(400, f"input '{name}': its binary data end in the middle of a length")
        (size,) = struct.unpack_from("<I", content, start)
        start += 4
        if start + size > len(content):
            raise Problem(400, f"input '{name}': its binary data end in the middle of an element")
        try:
            strings.append(content[start : start + size].decode())
        except UnicodeDecodeError as error:
            raise Problem(400, f"input '{name}': element {len(strings)} is not UTF-8") from error
        start += size
    return strings


def _json(value: dict[str, Any]) -> Response:
    return Response(msgspec.json.encode(value), media_type=JSON)

"""The OpenAPI description of the service, and a page that shows it without scripts."""

from __future__ import annotations

from html import escape
from typing import Any

import msgspec

from cascade_lab import __version__
from cascade_lab.serving.open_inference import InferRequest
from cascade_lab.serving.protocol import MAX_ID, MIN_TIMEOUT, Limits, PredictRequest, PredictResponse, ProblemBody

_REFUSALS = {
    "400": "The body cannot be read.",
    "401": "The API key is missing or wrong.",
    "408": "The request was not complete in time.",
    "413": "The body is too large.",
    "422": "The texts are not usable, or beyond the limits.",
    "429": "Too many texts are waiting; the header Retry-After says when to try again.",
    "503": "The service is closing, or has too much to do.",
    "504": "No answer in time.",
}


def description(limits: Limits, cascade: str) -> dict[str, Any]:
    """Return the OpenAPI 3.1 document of a service with these limits, for the cascade of that name."""
    _, schemas = msgspec.json.schema_components(
        [PredictRequest, PredictResponse, ProblemBody, InferRequest], ref_template="#/components/schemas/{name}"
    )
    bounds: dict[str, Any] = {"minItems": 1, "maxItems": limits.max_texts}
    properties = schemas["PredictRequest"]["properties"]
    properties["texts"] |= {**bounds, "items": {"type": "string", "maxLength": limits.max_characters}}
    properties["ids"]["anyOf"][0] |= {**bounds, "items": {"type": "string", "minLength": 1, "maxLength": MAX_ID}}
    model = [{"name": "model", "in": "path", "required": True, "schema": {"enum": [cascade]}}]
    timeout = {
        "name": "X-Request-Timeout",
        "in": "header",
        "description": f"Seconds to wait for the answer, at most {limits.timeout_seconds:g}.",
        "schema": {"type": "number", "minimum": MIN_TIMEOUT},
    }
    predict_refusals = tuple(_REFUSALS)
    tensor = {"name": "text", "datatype": "BYTES", "shape": [2], "data": ["what is my balance", "play some music"]}
    paths = {
        "/predict": {
            "post": _operation(
                "Answer texts",
                "PredictResponse",
                predict_refusals,
                body=("PredictRequest", {"texts": ["what is my balance", "play some music"]}),
                parameters=[timeout],
            )
        },
        "/reload": {
            "post": _operation(
                "Read cascade.toml again",
                None,
                ("401", "503"),
                more={"403": "No API key is set.", "409": "cascade.toml cannot be used; the service is as before."},
            )
        },
        "/metrics": {"get": _operation("Show Prometheus metrics", None, ("401",), media="text/plain")},
        "/v2": {"get": _operation("Describe the server", None, ())},
        "/v2/health/live": {"get": _operation("Say whether the process lives", None, ("503",))},
        "/v2/health/ready": {"get": _operation("Say whether requests are accepted", None, ("503",))},
        "/v2/models/{model}": {
            "get": _operation("Describe the cascade", None, ("401",), parameters=model, more=_NO_MODEL)
        },
        "/v2/models/{model}/ready": {
            "get": _operation("Say whether the cascade answers", None, ("503",), parameters=model, more=_NO_MODEL)
        },
        "/v2/models/{model}/infer": {
            "post": _operation(
                "Answer texts in the Open Inference Protocol",
                None,
                predict_refusals,
                body=("InferRequest", {"inputs": [tensor]}),
                parameters=[*model, timeout],
                more=_NO_MODEL,
            )
        },
    }
    key = {"type": "http", "scheme": "bearer"}
    return {
        "openapi": "3.1.0",
        "info": {"title": "cascade_lab", "version": __version__, "summary": "Answers of a cascade of classifiers"},
        "paths": paths,
        "components": {"schemas": schemas, "securitySchemes": {"api_key": key}},
        "security": [{}, {"api_key": []}],
    }


def page(document: dict[str, Any]) -> str:
    """Return an OpenAPI document as HTML: every operation with its parameters, its body and its answers."""
    parts = []
    for path, operations in document["paths"].items():
        for method, operation in operations.items():
            parts.append(f"<h2><code>{method.upper()} {escape(path)}</code></h2><p>{escape(operation['summary'])}</p>")
            for parameter in operation.get("parameters", ()):
                about = parameter.get("description", f"in the {parameter['in']}")
                parts.append(f"<p><code>{escape(parameter['name'])}</code> – {escape(about)}</p>")
            for content in operation.get("requestBody", {}).get("content", {}).values():
                example = msgspec.json.format(msgspec.json.encode(content["example"]), indent=2).decode()
                parts.append(f"<p>For example:</p><pre>{escape(example)}</pre>")
            answers = {code: escape(answer["description"]) for code, answer in operation["responses"].items()}
            rows = "".join(f"<tr><td>{code}</td><td>{text}</td></tr>" for code, text in answers.items())
            parts.append(f"<table>{rows}</table>")
    for name, schema in document["components"]["schemas"].items():
        text = msgspec.json.format(msgspec.json.encode(schema), indent=2).decode()
        parts.append(f"<h2>{escape(name)}</h2><p>{escape(schema.get('description', ''))}</p><pre>{escape(text)}</pre>")
    title = escape(f"{document['info']['title']} {document['info']['version']}")
    style = "body{font-family:sans-serif;max-width:50em;margin:2em auto}td{padding-right:1em}pre{background:#f4f4f4}"
    return (
        f'<!doctype html><html lang="en"><meta charset="utf-8"><title>{title}</title><style>{style}</style>'
        f'<h1>{title}</h1><p>The same as JSON: <a href="openapi.json">openapi.json</a></p>{"".join(parts)}</html>'
    )


_NO_MODEL = {"404": "There is no such model."}


def _operation(
    summary: str,
    answer: str | None,
    refusals: tuple[str, ...],
    *,
    body: tuple[str, Any] | None = None,
    parameters: list[dict[str, Any]] | None = None,
    more: dict[str, str] | None = None,
    media: str = "application/json",
) -> dict[str, Any]:
    schema = {"$ref": f"#/components/schemas/{answer}"} if answer else {}
    responses: dict[str, Any] = {"200": {"description": "Done.", "content": {media: {"schema": schema}}}}
    refused = {code: _REFUSALS[code] for code in refusals} | (more or {})
    responses |= {code: _problem(text) for code, text in sorted(refused.items())}
    operation: dict[str, Any] = {"summary": summary, "responses": responses}
    if parameters:
        operation["parameters"] = parameters
    if body:
        name, example = body
        content = {"application/json": {"schema": {"$ref": f"#/components/schemas/{name}"}, "example": example}}
        operation["requestBody"] = {"required": True, "content": content}
    return operation


def _problem(text: str) -> dict[str, Any]:
    schema = {"$ref": "#/components/schemas/ProblemBody"}
    return {"description": text, "content": {"application/problem+json": {"schema": schema}}}

"""The bodies of `POST /predict`: what a request may hold, within the limits, and what an answer looks like."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from http import HTTPStatus
from typing import TYPE_CHECKING, Any

import msgspec
from starlette.responses import Response

from cascade_lab.text import shorten

if TYPE_CHECKING:
    from cascade_lab.serving.pending import Answers

MAX_ID = 200  # characters
MIN_TIMEOUT = 0.001  # seconds


@dataclass(frozen=True)
class Limits:
    """What one request may cost.

    Attributes
    ----------
    max_body_bytes : int
    max_texts : int
        Texts of one request.
    max_characters : int
        Characters of one text.
    max_waiting_texts : int
        Texts of all requests that wait; a request beyond that is refused with 429.
    timeout_seconds : float
        After that a request is answered with 504, and what is left of it is not scored.
    receive_seconds : float
        A client that has not sent its whole request by then is answered with 408, or cut off.
    """

    max_body_bytes: int = 8 * 2**20
    max_texts: int = 1024
    max_characters: int = 20_000
    max_waiting_texts: int = 4096
    timeout_seconds: float = 10.0
    receive_seconds: float = 10.0


class Problem(Exception):
    """An error of a request, answered as RFC 9457's problem+json."""

    def __init__(self, status: int, detail: str, *, headers: dict[str, str] | None = None):
        super().__init__(detail)
        self.status, self.detail, self.headers = status, detail, headers or {}

    def response(self, **members: Any) -> Response:
        """Return the answer, with further members."""
        title = HTTPStatus(self.status).phrase
        body = {"type": "about:blank", "title": title, "status": self.status, "detail": self.detail, **members}
        return Response(msgspec.json.encode(body), self.status, self.headers, "application/problem+json")


class PredictRequest(msgspec.Struct, forbid_unknown_fields=True):
    """Texts to answer.

    `texts_b` has the second text of each pair (null where there is none). `ids` name the texts in the answer and in the
    traffic log.
    """

    texts: list[str]
    texts_b: list[str | None] | None = None
    ids: list[str] | None = None


class Answer(msgspec.Struct):
    """The answer to one text.

    `probability` is that of the answer, `confidence` the number that the deciding stage compared with its threshold.
    `probabilities` holds, for each stage, a gate's probability of its pass label or another stage's highest
    probability; null for a stage that the text did not reach.
    """

    id: str
    predicted: str
    decided_by: str
    probability: float
    confidence: float
    probabilities: dict[str, float | None]


class PredictResponse(msgspec.Struct):
    """One answer per text, in order, and the cascade that gave them. `digest` changes whenever answers can change."""

    cascade: str
    digest: str
    answers: list[Answer]


class ProblemBody(msgspec.Struct):
    """What went wrong, as RFC 9457 defines it."""

    title: str
    status: int
    detail: str
    type: str = "about:blank"


_request_decoder = msgspec.json.Decoder(PredictRequest)


def read_predict(body: bytes, limits: Limits) -> PredictRequest:
    """Read and check the body of `POST /predict`.

    Raises
    ------
    Problem
        400: not JSON. 422: not a request for answers, or beyond the limits.
    """
    try:
        request = _request_decoder.decode(body)
    except msgspec.ValidationError as error:
        raise Problem(422, f"the request body is not usable: {shorten(str(error), 300)}") from error
    except (msgspec.DecodeError, RecursionError, UnicodeDecodeError) as error:
        raise Problem(400, f"the request body is not JSON: {shorten(str(error), 300)}") from error
    check_texts(request.texts, request.texts_b, limits)
    if request.ids is not None:
        if len(request.ids) != len(request.texts):
            raise Problem(422, f"there are {len(request.texts)} texts, but {len(request.ids)} ids; give one for each")
        for number, name in enumerate(request.ids):
            if not 0 < len(name) <= MAX_ID:
                raise Problem(422, f"ids[{number}] has {len(name)} characters; an id has 1 to {MAX_ID}")
        if len(set(request.ids)) < len(request.ids):
            raise Problem(422, "an id is given twice; each text needs its own")
    return request


def check_texts(texts: Sequence[str], texts_b: Sequence[str | None] | None, limits: Limits) -> None:
    """Raise Problem (422) unless the texts of a request are within the limits."""
    if not texts:
        raise Problem(422, "there is no text; send at least one")
    if len(texts) > limits.max_texts:
        raise Problem(
            422, f"there are {len(texts)} texts; a request may have {limits.max_texts}: send several requests"
        )
    if texts_b is not None and len(texts_b) != len(texts):
        raise Problem(422, f"there are {len(texts)} texts, but {len(texts_b)} second texts; give one for each, or null")
    for key, values in (("texts", texts), ("texts_b", texts_b or ())):
        for number, text in enumerate(values):
            if text is None:
                continue
            if len(text) > limits.max_characters:
                raise Problem(
                    422, f"{key}[{number}] has {len(text)} characters; a text may have {limits.max_characters}"
                )


def predict_response(answers: Answers) -> bytes:
    """Return the body of an answer to `POST /predict`."""
    columns = answers.columns
    names = [name.removesuffix("_probability") for name in columns if name not in _OF_TEXT]
    by_stage = zip(*[columns[f"{name}_probability"] for name in names], strict=True)
    probabilities = [dict(zip(names, values, strict=True)) for values in by_stage]
    rows = [
        {
            "id": i,
            "predicted": p,
            "decided_by": d,
            "probability": q,
            "confidence": c,
            "probabilities": s,
        }
        for i, p, d, q, c, s in zip(answers.ids, *[columns[name] for name in _OF_TEXT], probabilities, strict=True)
    ]
    served = answers.served
    body: dict[str, Any] = {"cascade": served.manifest["cascade"]["name"], "digest": served.digest, "answers": rows}
    return msgspec.json.encode(body)


_OF_TEXT = ("predicted", "decided_by", "probability", "confidence")

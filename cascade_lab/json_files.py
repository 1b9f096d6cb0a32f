"""Reads JSON that may be damaged or come from somebody else: bounded, no key twice, and one line if unusable."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from cascade_lab.exceptions import CascadeLabError
from cascade_lab.text import shorten

MAX_BYTES = 2**28
_MAX_DEPTH = 64  # of objects and lists; what this package writes needs less than 20
_MAX_SHOWN = 80  # characters of a value in a message


def parse(text: str | bytes, *, parse_constant: Callable[[str], Any] | None = None) -> Any:
    """Parse JSON in which no object has a key twice; `json.loads` would silently take the last of the two values.

    Parameters
    ----------
    text : str or bytes
    parse_constant : callable, optional
        As in `json.loads`: it is called with `NaN` or `Infinity`, which are not JSON.

    Raises
    ------
    ValueError
        Not JSON, an integer of thousands of digits, or a key that is there twice.
    RecursionError
        Too deeply nested.

    Examples
    --------
    >>> parse('{"text": "pay", "label": "a", "label": "b"}')
    Traceback (most recent call last):
    ValueError: the key 'label' is there twice
    """
    return json.loads(text, object_pairs_hook=_object, parse_constant=parse_constant)


def read_object(path: Path, *, error: type[CascadeLabError], way_out: str) -> dict[str, Any]:
    """Read a file that holds one JSON object.

    Parameters
    ----------
    path : Path
    error : class of CascadeLabError
        What is raised.
    way_out : str
        The end of each message: what the user can do.

    Raises
    ------
    CascadeLabError
        The file is no regular file, is larger than `MAX_BYTES`, is not UTF-8 or not JSON, or is not an object; it has a
        key twice, is nested more than 64 deep, or has a number that is infinite, or an integer beyond 64 bits.
    """
    try:
        if not path.is_file():
            reason = "it is not a file" if path.exists() else "no such file"
            raise error(f"{path}: cannot be read ({reason}); {way_out}")
        with path.open("rb") as file:
            content = file.read(MAX_BYTES + 1)
        if len(content) > MAX_BYTES:
            raise error(f"{path}: is larger than {MAX_BYTES // 2**20} MiB; {way_out}")
        value = parse(content.decode("utf-8-sig"), parse_constant=_refuse_constant)
    except RecursionError as cause:
        raise error(f"{path}: is nested too deeply; {way_out}") from cause
    except OSError as cause:
        raise error(f"{path}: cannot be read ({cause.strerror or cause}); {way_out}") from cause
    except UnicodeDecodeError as cause:
        raise error(f"{path}: byte {cause.start} is not UTF-8; {way_out}") from cause
    except ValueError as cause:  # not JSON, an integer of thousands of digits, a key twice, or a NUL in the name
        raise error(f"{path}: is not JSON ({str(cause).partition(';')[0]}); {way_out}") from cause
    if not isinstance(value, dict):
        raise error(f"{path}: is not a JSON object; {way_out}")
    _check_values(value, path, error, way_out)
    return value


def check_keys(
    content: Mapping[str, Any], kinds: Mapping[str, Any], where: str, *, error: type[CascadeLabError], way_out: str
) -> None:
    """Check the types of an object's values.

    Parameters
    ----------
    content : mapping
    kinds : mapping
        Key to a type, or to a union of types. A key may be missing if None is one of them.
    where : str
        What the object is, for the message.
    error, way_out
        As in `read_object`.

    Examples
    --------
    >>> kinds = {"name": str, "started": str | None}
    >>> check_keys({"name": 1}, kinds, "a.json", error=CascadeLabError, way_out="write it again")
    Traceback (most recent call last):
    cascade_lab.exceptions.CascadeLabError: a.json: name must be a string, not 1; write it again
    """
    for key, kind in kinds.items():
        types = getattr(kind, "__args__", (kind,))
        value = content.get(key)
        if key not in content and type(None) not in types:
            raise error(f"{where}: has no {key}; {way_out}")
        if not isinstance(value, kind) or (isinstance(value, bool) and bool not in types):  # True is no whole number
            names = " or ".join(_NAMES[one] for one in types)
            name, shown = (shorten(text, _MAX_SHOWN) for text in (key, repr(value)))
            raise error(f"{where}: {name} must be {names}, not {shown}; {way_out}")


_NAMES = {str: "a string", int: "a whole number", float: "a number", bool: "true or false", dict: "an object"}
_NAMES |= {list: "a list", type(None): "null"}


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    content = dict(pairs)
    if len(content) < len(pairs):
        counts = Counter(key for key, _ in pairs)
        key = next(key for key, n in counts.items() if n > 1)
        raise ValueError(f"the key {shorten(repr(key), _MAX_SHOWN)} is there twice")
    return content


def _refuse_constant(name: str) -> float:
    raise ValueError(f"{name} is no number of JSON")


def _check_values(content: Any, path: Path, error: type[CascadeLabError], way_out: str) -> None:
    values = [(content, 1)]
    while values:
        value, depth = values.pop()
        if depth > _MAX_DEPTH:
            raise error(f"{path}: is nested more than {_MAX_DEPTH} deep; {way_out}")
        if isinstance(value, dict | list):
            parts = (*value, *value.values()) if isinstance(value, dict) else value
            values.extend((part, depth + 1) for part in parts)
        elif isinstance(value, int) and not -(2**63) <= value < 2**63:
            raise error(f"{path}: an integer has more than 64 bits; {way_out}")
        elif isinstance(value, float) and not math.isfinite(value):
            raise error(f"{path}: a number is too large; {way_out}")
        elif isinstance(value, str) and not value.isascii() and _is_half_pair(value):
            raise error(f"{path}: a string has half a surrogate pair; {way_out}")


def _is_half_pair(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return True
    return False

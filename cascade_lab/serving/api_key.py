"""Reads the key that requests must send, from a file."""

from __future__ import annotations

from pathlib import Path

from cascade_lab.exceptions import CascadeLabError


def read_api_key(path: Path) -> bytes:
    """Return the key in a file, without blanks around it.

    Raises
    ------
    CascadeLabError
        The file cannot be read, or holds no key of at least 16 visible ASCII characters.
    """
    try:
        key = path.read_bytes()[:10_000].strip()
    except OSError as error:
        raise CascadeLabError(f"{path}: the API key cannot be read ({error.strerror or error})") from error
    if len(key) < 16 or not all(33 <= byte <= 126 for byte in key):
        raise CascadeLabError(
            f"{path}: an API key has at least 16 letters, digits or signs, and no blank; write one, such as "
            "`openssl rand -hex 32` prints"
        )
    return key

"""Names the files of a stage's tables: unique and safe on every system, whatever script the stage's name is in."""

from __future__ import annotations

import re
from collections.abc import Container
from hashlib import sha256

_PLAIN = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]*")
_MAX_LENGTH = 100
# Windows opens a device by these names, with any ending.
_DEVICE = re.compile(r"(?:con|prn|aux|nul|com[0-9]|lpt[0-9])", re.IGNORECASE)


def stage_file(name: str) -> str:
    """Return the name of a stage's files, without their ending.

    A name of ASCII letters, digits, "-" and "_" is used as it is. From any other name come its ASCII letters and a
    digest, so that two different names have two different files. A plain name contains no dot, so it is never equal to
    the name of a file that was derived.

    >>> stage_file("gate"), stage_file("闸门"), stage_file("../a b"), stage_file("CON")
    ('gate', 'stage.ac44daeddf17', 'stage.a_b.2c2c791a0618', 'stage.CON.a3dbc4b644a9')
    """
    if _PLAIN.fullmatch(name) and len(name) <= _MAX_LENGTH and not _DEVICE.fullmatch(name):
        return name
    letters = re.sub(r"[^A-Za-z0-9]+", "_", name).strip("_")[:30]
    digest = sha256(name.encode("utf-8", "surrogatepass")).hexdigest()[:12]
    return ".".join(part for part in ("stage", letters, digest) if part)


def stage_table(folder: str, stage: str, contents: Container[str]) -> str:
    """Return a stage's table in a run directory, such as `scores/gate.parquet`.

    Parameters
    ----------
    folder : str
        `scores` or `features`.
    stage : str
    contents : container of str
        The tables of the run. Those of older runs have the plain name of the stage at any length.

    >>> stage_table("scores", "con", []), stage_table("scores", "con", ["scores/con.parquet"])
    ('scores/stage.con.1143da2bc54c.parquet', 'scores/con.parquet')
    """
    old = f"{folder}/{stage}.parquet"
    return old if _PLAIN.fullmatch(stage) and old in contents else f"{folder}/{stage_file(stage)}.parquet"

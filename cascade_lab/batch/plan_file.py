"""The plan of a job in its folder, as JSON."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from cascade_lab.batch.inputs import InputFile
from cascade_lab.batch.plan import Plan, ScannedFile, Unreadable
from cascade_lab.batch.reading import Columns, Piece
from cascade_lab.exceptions import RunError

PLAN = "job.json"


def plan_to_dict(plan: Plan) -> dict[str, Any]:
    """Return a plan as plain data. The units are left out: the shards say what is needed of them."""
    return {
        "columns": plan.columns._asdict(),
        "id_type": plan.id_type,
        "n_rows": plan.n_rows,
        "files": [
            {**scanned.file._asdict(), "sha256": scanned.sha256, "n_rows": scanned.n_rows} for scanned in plan.files
        ],
        "unreadable": [file._asdict() for file in plan.unreadable],
        "shards": [[list(piece) for piece in shard] for shard in plan.shards],
    }


def plan_from_dict(content: dict[str, Any], path: Path) -> Plan:
    """Read what `plan_to_dict` returns; raises RunError where it is damaged."""
    try:
        files = tuple(
            ScannedFile(
                InputFile(one["name"], one["path"], int(one["size"]), int(one["modified_ns"])),
                one["sha256"],
                int(one["n_rows"]),
                [],
                content["id_type"] == "int64",
            )
            for one in content["files"]
        )
        shards = tuple(tuple(Piece(*map(int, piece)) for piece in shard) for shard in content["shards"])
        if any(not 0 <= piece.file < len(files) for shard in shards for piece in shard):
            raise LookupError("a shard names no file")
        return Plan(
            files,
            tuple(Unreadable(**one) for one in content["unreadable"]),
            Columns(**content["columns"]),
            content["id_type"],
            shards,
        )
    except (LookupError, TypeError, ValueError) as error:
        raise RunError(f"{path}: is damaged ({error}); choose another --output") from error

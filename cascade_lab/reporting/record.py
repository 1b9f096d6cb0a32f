"""The JSON of a report: written beside the page, and read and checked, because it may come from somebody else."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from hashlib import sha256 as new_sha256
from pathlib import Path
from typing import Any

from cascade_lab.atomic import locked_file, write_files
from cascade_lab.exceptions import RunError
from cascade_lab.json_files import read_object
from cascade_lab.provenance import sha256
from cascade_lab.run import Run
from cascade_lab.text import shorten

SCHEMA_VERSION = 3
_RECORD = {
    "notebook": str,
    "notebook_sha256": str,
    "parameters": dict,
    "runs": dict,
    "files": dict,
    "packages": dict,
    "fonts": dict,
    "outputs": list,
}


def write_page(output: Path, build: Callable[[], tuple[str, dict[str, Any]]]) -> Path:
    """Write a page and its JSON, both or none; `build` returns the HTML and the content of the JSON.

    Raises
    ------
    RunError
        Another process is writing the page, `output` is a file of another kind, or a file cannot be written.
    """
    with locked_file(output, overwrite=True, what="report", error=RunError):
        check_report_output(output)
        html, record = build()
        page = html.encode()
        # The JSON goes first, with the page's digest: so `verify_report` notices where a process was killed in between.
        text = record_text({"page_sha256": new_sha256(page).hexdigest(), **record})
        write_files({output.with_suffix(".json"): text.encode(), output: page}, error=RunError)
    return output


def directory_of(run: Run) -> Path:
    """Return the directory of a run; raises RunError where the run, or a change of it, is only in memory."""
    if run.directory is None:
        raise RunError(f"{run.name} is only in memory; write the run first: run.write(path)")
    return run.directory


def check_unchanged(run: Run) -> None:
    """Raise RunError where another process has replaced a run while its report was made."""
    read = Run.read(directory_of(run))
    if any(read.manifest[key] != run.manifest[key] for key in ("run_id", "contents")):
        raise RunError(f"{run.name}: the run was replaced while its report was made; make the report again")


def run_identity(run: Run) -> dict[str, Any]:
    """Return what identifies a run: ids, digests, thresholds. What a manifest lacks is empty or None."""
    manifest = run.manifest
    return {
        "name": run.spec.name,
        "n_examples": len(run.examples),
        "manifest_sha256": sha256(directory_of(run) / "manifest.json"),
        **{key: manifest.get(key) for key in ("run_id", "source", "started", "processor", "tuned_on")},
        **{key: manifest.get(key) or {} for key in ("packages", "evalset", "inputs", "contents")},
        "thresholds": run.spec.thresholds,
    }


def record_text(record: Mapping[str, Any]) -> str:
    """Return the record as JSON with one line for each output."""
    lines = ",\n".join(f"  {json.dumps(output, ensure_ascii=False, allow_nan=False)}" for output in record["outputs"])
    head = json.dumps({**record, "outputs": []}, indent=1, ensure_ascii=False, allow_nan=False)
    return head.removesuffix("[]\n}") + f"[\n{lines}\n ]\n}}\n"


def read_record(path: Path) -> dict[str, Any]:
    """Read the JSON of a report, and check that its parts are there; raises RunError."""
    record = _read_json(path)
    if record.get("schema_version") != SCHEMA_VERSION:
        raise RunError(
            f"{path}: has schema version {shorten(str(record.get('schema_version')), 20)}, and this package reads "
            f"{SCHEMA_VERSION}; write the report again with `cascade-lab report`"
        )
    is_whole = all(isinstance(record.get(key), kind) for key, kind in _RECORD.items())
    if not is_whole or not all(isinstance(run, dict) and "run_id" in run for run in record["runs"].values()):
        raise not_a_record(path)
    return record


def not_a_record(path: Path) -> RunError:
    """Return the error for a file that is not the JSON of a report."""
    return RunError(f"{path}: not the JSON of a report; give one that `cascade-lab report` wrote")


def _read_json(path: Path) -> dict[str, Any]:
    """Read the JSON of a report of any schema version; raises RunError."""
    record = read_object(path, error=RunError, way_out="give a report, with its JSON beside it")
    if "notebook_sha256" not in record or not record.get("runs"):
        raise not_a_record(path)
    return record


def check_report_output(output: Path) -> None:
    """Raise RunError where a report's JSON would replace another file, such as a manifest."""
    path = output.with_suffix(".json")
    if output.suffix != ".html":
        raise RunError(f"{output}: a report is an HTML file with a JSON beside it; give a name that ends in .html")
    if output.exists() and not path.exists():
        raise RunError(
            f"{output}: exists, and has no JSON of a report beside it, so it is not overwritten; delete it, or choose "
            "another output"
        )
    if path.exists():
        try:
            _read_json(path)
        except RunError as error:
            raise RunError(f"{path}: exists, and is not the JSON of a report; choose another output") from error

"""A report, made again: whether it is what it was, or which of its numbers moved."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from itertools import count
from pathlib import Path
from typing import Any, NamedTuple

from cascade_lab.errors import RunError
from cascade_lab.report import make, notebook_path, read_record, versions
from cascade_lab.run import Run


class Verdict(NamedTuple):
    """What came of making a report again.

    Attributes
    ----------
    moved : list of tuple
        Numbers and words that are not as they were: name, was, is.
    page : str
        "" where the HTML is the same; else what differs in it, though no number did: "pictures" or "words".
    packages : dict of str to tuple
        Versions that differ: was, is.
    """

    moved: list[tuple[str, Any, Any]]
    page: str
    packages: dict[str, tuple[str | None, str | None]]

    @property
    def holds(self) -> bool:
        """No number and no word moved; pictures may, with another version of a package."""
        return not self.moved and (not self.page or (self.page == "pictures" and bool(self.packages)))


def verify_report(
    report: str | Path,
    run: Run | None = None,
    *,
    notebook: str | Path | None = None,
    parameters: Mapping[str, Any] | None = None,
    progress: bool = False,
) -> Verdict:
    """Make a report again and compare it with what it was, number by number and byte by byte.

    Parameters
    ----------
    report : path
        Its HTML or its JSON.
    run : Run, optional
        By default the run directory that the report lies in.
    notebook : path, optional
        Where the report was made of a notebook of one's own.
    parameters : mapping, optional
        The other runs and files that it was made with; the rest it knows.

    Raises
    ------
    RunError
        It is no report, or of another run or notebook; or as `write_report` does.
    """
    html_path, json_path = (Path(report).with_suffix(suffix) for suffix in (".html", ".json"))
    was = read_record(json_path)
    try:
        html = html_path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise RunError(f"{html_path}: cannot be read ({error}); give a report, with its JSON beside it") from error
    run = run or Run.read(html_path.resolve().parent)
    for name in [*list(was["runs"])[1:], *was["files"]]:
        if name not in (parameters or {}):
            raise RunError(f"{report}: its notebook read another run or file as {name}; give it: -p {name}=PATH")
    first = next(iter(was["runs"].values()))
    if run.manifest["run_id"] != first["run_id"]:
        raise RunError(f"{report}: is of run {first['run_id']}, and {run.directory} is run {run.manifest['run_id']}")
    again, record = make(
        run, notebook_path(notebook or was["notebook"]), {**was["parameters"], **(parameters or {})}, progress=progress
    )
    before, after = _named(was), _named(record)
    moved = [(name, before.get(name), after.get(name)) for name in {**before, **after}]
    moved = [(name, old, new) for name, old, new in moved if old != new or (name in before) != (name in after)]
    packages = {
        name: (was["packages"].get(name), record["packages"].get(name))
        for name in {**was["packages"], **record["packages"]}
        if was["packages"].get(name) != record["packages"].get(name)
    }
    # The page says the versions: make it say the old ones, to see what else differs.
    again = again.replace(versions(record), versions(was))
    words = [re.sub(r'"data:image/[^"]*"( width="\d+")?', '""', text) for text in (html, again)]
    return Verdict(moved, "" if html == again else "words" if words[0] != words[1] else "pictures", packages)


def _named(record: Mapping[str, Any]) -> dict[str, Any]:
    """Return every value of a record by a name of its own; the packages' versions are left out."""
    named: dict[str, Any] = {}
    for name, value in _flat({key: value for key, value in record.items() if key != "packages"}):
        unique = name
        for number in count(2):
            if unique not in named:
                break
            unique = f"{name} ({number})"
        named[unique] = value
    return named


def _flat(content: Any, name: str = "") -> Iterator[tuple[str, Any]]:
    """Give each value in a record by a name for people: section, kind, and labels or places counted from 1."""
    if isinstance(content, Mapping) and content.get("kind") == "table":
        for label, row in zip(content["index"], content["rows"], strict=True):
            yield from ((f"{name} › {label} › {key}", v) for key, v in zip(content["columns"], row, strict=True))
    elif isinstance(content, Mapping) and "images" in content:
        rest = {key: value for key, value in content.items() if key != "images"}
        rows, columns = content.get("y_labels", []), content.get("x_labels", [])
        for image in content["images"]:
            for i, row in enumerate(image):
                for j, value in enumerate(row if isinstance(row, list) else [row]):
                    at = f"{rows[i] if len(rows) == len(image) else f'row {i + 1}'} › "
                    yield f"{name} › {at}{columns[j] if len(columns) == len(row) else f'column {j + 1}'}", value
        yield from _flat(rest, name)
    elif isinstance(content, Mapping) and "shown" in content:
        yield from _flat({key: value for key, value in content.items() if key != "shown"}, name)
        counts: dict[tuple[str, str], int] = {}
        for one in content["shown"]:
            place = (one["section"], one["kind"])
            counts[place] = counts.get(place, 0) + 1
            rest = {key: value for key, value in one.items() if key not in ("section", "kind")}
            kept = one if one["kind"] == "table" else rest
            yield from _flat(kept, f"{one['section']} › {one['kind']} {counts[place]}")
    elif isinstance(content, Mapping):
        for key, value in content.items():
            yield from _flat(value, f"{name} › {key}".removeprefix(" › "))
    elif isinstance(content, list):
        for number, value in enumerate(content, 1):
            yield from _flat(value, f"{name} {number}")
    else:
        yield name, content

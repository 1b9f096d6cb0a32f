"""Rebuilds a report and compares it with the saved one, number by number and byte by byte."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from hashlib import sha256
from itertools import count
from pathlib import Path
from typing import Any, NamedTuple

from cascade_lab.exceptions import RunError
from cascade_lab.reporting.html import package_list, versions
from cascade_lab.reporting.record import not_a_record, read_record
from cascade_lab.reporting.report import NOTEBOOKS, build_report, notebook_path
from cascade_lab.reporting.summary import SUMMARY, build_summary
from cascade_lab.run import Run
from cascade_lab.text import shorten

_MAX_SHOWN = 80  # characters of a name or a value from the JSON in a message


class Verdict(NamedTuple):
    """How a rebuilt report differs from the saved one.

    Attributes
    ----------
    changed_values : list of tuple
        Numbers and words that differ: name, saved value, new value. None stands for a value that is missing.
    page_difference : str
        What differs in the HTML: "" (nothing), "pictures" or "words"; "other page" if it is not the page that was
        written with the JSON.
    changed_packages : dict of str to tuple
        Packages of which another version is installed, and fonts (`font NAME`) with other bytes: saved version or
        digest, new one. None stands for a package or a font that is missing.
    """

    changed_values: list[tuple[str, Any, Any]]
    page_difference: str
    changed_packages: dict[str, tuple[str | None, str | None]]

    @property
    def holds(self) -> bool:
        """No number and no word differs; pictures may differ if the version of a package or a font does."""
        pictures_may_differ = self.page_difference == "pictures" and bool(self.changed_packages)
        return not self.changed_values and (not self.page_difference or pictures_may_differ)


def verify_report(
    report: str | Path,
    run: Run | None = None,
    *,
    notebook: str | Path | None = None,
    parameters: Mapping[str, Any] | None = None,
    progress: bool = False,
) -> Verdict:
    """Rebuild a report and compare it with the saved one.

    Parameters
    ----------
    report : path
        Its HTML or its JSON.
    run : Run, optional
        By default the run directory that the report is in.
    notebook : path, optional
        The notebook, if the report is of your own notebook. It is executed only if it is the one that the report was
        made with. Without this, only a notebook of this package is executed, whatever the report's JSON names.
    parameters : mapping, optional
        The other runs and files that the notebook reads. The report has its other parameters.
    progress : bool
        Show on stderr how many cells are done.

    Returns
    -------
    Verdict

    Raises
    ------
    RunError
        Not a report, or a report of another run, or of a notebook that is neither given nor of this package; a file
        that the notebook reads is not given; or as `write_report` raises.
    """
    html_path, json_path = (Path(report).with_suffix(suffix) for suffix in (".html", ".json"))
    saved = read_record(json_path)
    old_values = _saved_values(saved, json_path)
    try:
        saved_page = html_path.read_bytes()
        saved_html, page_sha256 = saved_page.decode(), sha256(saved_page).hexdigest()
    except (OSError, UnicodeDecodeError) as error:
        raise RunError(f"{html_path}: cannot be read ({error}); give a report, with its JSON beside it") from error
    given = parameters or {}
    _check_given(report, saved, given, notebook)
    folder = html_path.resolve().parent
    if run is None and not (folder / "manifest.json").is_file():
        raise RunError(f"{report}: is not in the directory of its run; give the run: --run RUN (run=Run.read(RUN))")
    run = run or Run.read(folder)
    saved_run_id = next(iter(saved["runs"].values()))["run_id"]
    if run.manifest["run_id"] != saved_run_id:
        raise RunError(f"{report}: is of run {_shown(saved_run_id)}, and {run.name} is run {run.manifest['run_id']}")
    if saved["notebook"] == SUMMARY and notebook is None:
        new_html, new = build_summary(run)
    else:
        new_html, new = build_report(
            run,
            notebook_path(saved["notebook"] if notebook is None else notebook),
            given,
            saved_values=saved["parameters"],
            notebook_sha256=None if notebook is None else saved["notebook_sha256"],
            progress=progress,
        )
    before, after = versions(saved), versions(new)
    return Verdict(
        changed_values=_changed_values(old_values, _named_values(new)),
        # The page shows the versions of packages and fonts: put the saved ones in, to see what else differs.
        page_difference=(
            "other page"
            if saved.get("page_sha256", page_sha256) != page_sha256
            else _page_difference(saved_html, new_html.replace(package_list(new), package_list(saved)))
        ),
        changed_packages={
            name: (before.get(name), after.get(name))
            for name in {**before, **after}
            if before.get(name) != after.get(name)
        },
    )


def _check_given(
    report: str | Path, saved: Mapping[str, Any], given: Mapping[str, Any], notebook: str | Path | None
) -> None:
    """Raise RunError where the record names a notebook, a run or a file that the user must give.

    The JSON may come from somebody else. So it decides neither which code is executed nor which files are read.
    """
    if notebook is None and saved["notebook"] not in (*NOTEBOOKS, SUMMARY):
        raise RunError(
            f"{report}: its notebook '{_shown(saved['notebook'])}' is not one of this package, so it is not executed; "
            "if you trust it, give it: --notebook PATH (notebook=PATH)"
        )
    if saved["notebook"] == "05_study_latency" and "latency_dir" not in saved["files"]:
        raise RunError(
            f"{report}: its times were measured when it was written, and no second measurement gives the same; to "
            "verify times, write the report of a saved study: -p latency_dir=STUDY"
        )
    lists = {name: value for name, value in saved["parameters"].items() if isinstance(value, list)}
    listed = {f"{name}_{number}": name for name, value in lists.items() for number in range(1, len(value) + 1)}
    for name in (listed.get(name, name) for name in [*list(saved["runs"])[1:], *saved["files"]]):
        if name not in given:
            raise RunError(
                f"{report}: its notebook read another run or file as {_shown(name)}; give it: -p {_shown(name)}=PATH"
            )
    for name, value in saved["parameters"].items():
        if name not in given and _may_name_a_file(value):
            raise RunError(
                f"{report}: its parameter {_shown(name)} = {_shown(repr(value))} may name a file, so it is used only "
                f"if you give it: -p {_shown(name)}=VALUE"
            )


def _shown(value: Any) -> str:
    return shorten(str(value), _MAX_SHOWN)


def _saved_values(saved: Mapping[str, Any], path: Path) -> dict[str, Any]:
    """Return the named values of a record that was read from a file; raises RunError where it is damaged."""
    try:
        return _named_values(saved)
    except (AttributeError, KeyError, RecursionError, TypeError, ValueError) as error:
        raise not_a_record(path) from error


def _may_name_a_file(value: Any) -> bool:
    r"""Return whether a notebook could open a file with a parameter's value, or with a part of it.

    A name without a folder cannot: the notebook is executed in a new, empty folder.

    >>> [_may_name_a_file(value) for value in ("../x", "~", [{"C:x": 1}], "two words", 0.5, None)]
    [True, True, True, False, False, False]
    """
    if isinstance(value, Mapping):
        return any(map(_may_name_a_file, (*value, *value.values())))
    if isinstance(value, list):
        return any(map(_may_name_a_file, value))
    return isinstance(value, str) and re.search(r"[/\\]|^~|^\.{1,2}$|^[A-Za-z]:", value) is not None


def _changed_values(old_values: Mapping[str, Any], new_values: Mapping[str, Any]) -> list[tuple[str, Any, Any]]:
    """Return the values of two records that differ: name, saved value, new value."""
    return [
        (name, old_values.get(name), new_values.get(name))
        for name in {**old_values, **new_values}
        if old_values.get(name) != new_values.get(name) or (name in old_values) != (name in new_values)
    ]


def _page_difference(saved_html: str, new_html: str) -> str:
    if saved_html == new_html:
        return ""
    saved_words, new_words = (
        re.sub(r'"data:image/[^"]*"( width="\d+")?', '""', html) for html in (saved_html, new_html)
    )
    return "pictures" if saved_words == new_words else "words"


def _named_values(record: Mapping[str, Any]) -> dict[str, Any]:
    """Return the values of a record by names that occur once, without packages, fonts and the page's digest."""
    named: dict[str, Any] = {}
    for name, value in _flatten(
        {key: value for key, value in record.items() if key not in ("packages", "fonts", "page_sha256")}
    ):
        unique = name
        for number in count(2):
            if unique not in named:
                break
            unique = f"{name} ({number})"
        named[unique] = value
    return named


def _flatten(content: Any, name: str = "") -> Iterator[tuple[str, Any]]:
    """Yield each value in a record with a name for people: section, kind, then labels or numbers that start at 1."""
    if isinstance(content, Mapping) and content.get("kind") == "table":
        yield from _flatten_table(content, name)
    elif isinstance(content, Mapping) and "images" in content:
        for image in content["images"]:
            yield from _flatten_image(image, content, name)
        yield from _flatten({key: value for key, value in content.items() if key != "images"}, name)
    elif isinstance(content, Mapping) and "outputs" in content:
        yield from _flatten({key: value for key, value in content.items() if key != "outputs"}, name)
        yield from _flatten_outputs(content["outputs"])
    elif isinstance(content, Mapping):
        for key, value in content.items():
            yield from _flatten(value, f"{name} › {key}".removeprefix(" › "))
    elif isinstance(content, list):
        for number, value in enumerate(content, 1):
            yield from _flatten(value, f"{name} {number}")
    else:
        yield name, content


def _flatten_outputs(outputs: list[Mapping[str, Any]]) -> Iterator[tuple[str, Any]]:
    """Yield the values of the outputs; outputs of one kind are numbered within their section."""
    counts: dict[tuple[str, str], int] = {}
    for output in outputs:
        section, kind = output["section"], output["kind"]
        number = counts[section, kind] = counts.get((section, kind), 0) + 1
        content = output if kind == "table" else {k: v for k, v in output.items() if k not in ("section", "kind")}
        yield from _flatten(content, f"{section} › {kind} {number}")


def _flatten_table(table: Mapping[str, Any], name: str) -> Iterator[tuple[str, Any]]:
    for label, row in zip(table["index"], table["rows"], strict=True):
        for column, value in zip(table["columns"], row, strict=True):
            yield f"{name} › {label} › {column}", value


def _flatten_image(image: list[Any], axes: Mapping[str, Any], name: str) -> Iterator[tuple[str, Any]]:
    """Yield the cells of an image by the labels of its axes, or by number where the axes do not label every cell."""
    row_labels, column_labels = axes.get("y_labels", []), axes.get("x_labels", [])
    for i, row in enumerate(image):
        cells = row if isinstance(row, list) else [row]
        row_name = row_labels[i] if len(row_labels) == len(image) else f"row {i + 1}"
        for j, value in enumerate(cells):
            column_name = column_labels[j] if len(column_labels) == len(cells) else f"column {j + 1}"
            yield f"{name} › {row_name} › {column_name}", value

"""Writes a run's report: executes a notebook on the run, then writes one HTML file and its numbers as JSON."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator, Mapping
from functools import partial
from hashlib import sha256 as new_sha256
from pathlib import Path, PurePath
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any, NamedTuple

import matplotlib.pyplot as plt
from tqdm import tqdm

from cascade_lab.analysis.latency import is_timed
from cascade_lab.atomic import write_file
from cascade_lab.displays import CascadeConfusionDisplay, StageLatencyDisplay
from cascade_lab.displays.confusion import MAX_LABELLED
from cascade_lab.displays.fonts import font_digests, warn_of_missing
from cascade_lab.exceptions import RunError, did_you_mean
from cascade_lab.provenance import environment, package_version, sha256
from cascade_lab.reporting.capture import VALUES_MIME, plain_value
from cascade_lab.reporting.html import render_page, without_addresses
from cascade_lab.reporting.record import (
    SCHEMA_VERSION,
    check_unchanged,
    directory_of,
    record_text,
    run_identity,
    write_page,
)
from cascade_lab.run import Run
from cascade_lab.stage_files import stage_file

if TYPE_CHECKING:
    from nbformat import NotebookNode

NOTEBOOKS = (
    "01_run_cascade",
    "02_study_clinc150",
    "03_analyse_errors",
    "04_tune_thresholds",
    "05_study_latency",
    "06_compare_runs",
    "07_choose_rejector",
    "08_chinese",
    "09_watch_traffic",
)
"""The notebooks of this package. A report's JSON can name one of these; `verify_report` executes no other by name."""
NOTEBOOK = NOTEBOOKS[0]

_PACKAGE = Path(__file__).parents[1]
# The kernel executes this before the notebook's cells. It undoes the settings of the user's matplotlibrc.
_SETUP = """import matplotlib
from cascade_lab.reporting.capture import record_outputs
matplotlib.rcdefaults()
record_outputs(get_ipython())"""


def write_figures(run: Run, folder: str | Path | None = None) -> list[Path]:
    """Draw a run's confusion matrices and its latency as PNG files.

    A run without a label has no confusion matrix, and a run without timings has no latency picture.

    Parameters
    ----------
    run : Run
    folder : path, optional
        By default `figures/` in the run's directory.

    Returns
    -------
    list of Path
        The files.

    Raises
    ------
    RunError
        The run is only in memory and `folder` is not given; a file cannot be written.
    """
    folder = directory_of(run) / "figures" if folder is None else Path(folder)
    displays: dict[str, CascadeConfusionDisplay | StageLatencyDisplay] = {}
    if is_timed(run):
        displays["latency"] = StageLatencyDisplay.from_run(run)
    if run.examples["label"].notna().any():
        for stage in (None, *(stage.name for stage in run.spec.stages)):
            name = "confusion-end-to-end" if stage is None else f"confusion-{stage_file(stage)}"
            matrix = CascadeConfusionDisplay.from_run(run, stage=stage)
            displays[name] = matrix
            if len(matrix.display_labels) > MAX_LABELLED:
                displays[f"{name}-most-confused"] = matrix.most_confused()
    paths = []
    for name, display in displays.items():
        figure = display.plot().figure_
        paths.append(write_file(folder / f"{name}.png", partial(figure.savefig, dpi=150), error=RunError))
        plt.close(figure)
    return paths


def write_report(
    run: Run,
    output: str | Path | None = None,
    *,
    notebook: str | Path = NOTEBOOK,
    parameters: Mapping[str, Any] | None = None,
    progress: bool = False,
) -> Path:
    """Execute a notebook on a run; write what it shows as HTML, and the numbers as JSON beside the HTML.

    The same run gives the same bytes, because the notebook reads the run as `../runs/<parameter>`, wherever it is.

    Parameters
    ----------
    run : Run
        A run in a directory. Its path becomes the value of the notebook's parameter `run_dir`, or else of the first
        parameter whose name starts with `run`.
    output : path, optional
        The HTML file: by default `report.html` in the run's directory, or `<notebook>.html` there.
    notebook : str or path
        The name of a notebook of this package, or the path of your own `.ipynb`.
    parameters : mapping, optional
        The notebook's other parameters. The notebook gets a path as it gets the run's.
    progress : bool
        Show on stderr how many cells are done.

    Returns
    -------
    Path
        The HTML file.

    Raises
    ------
    RunError
        The run is only in memory, or was replaced meanwhile; a table of a run differs from its digest in the manifest;
        the notebook failed; another process is writing the report, or a file cannot be written.
    """
    path = notebook_path(notebook)
    name = "report.html" if path.stem == NOTEBOOK else f"{path.stem}.html"
    output = directory_of(run) / name if output is None else Path(output)
    return write_page(output, lambda: build_report(run, path, parameters or {}, progress=progress))


def notebook_path(name: str | Path) -> Path:
    """Return the file of a notebook: `name` itself if it ends in `.ipynb`, else the package's notebook of that name.

    In a checkout the package's notebooks are beside the package; in an installation they are inside it.

    Raises
    ------
    RunError
        There is no such notebook.
    """
    if str(name).endswith(".ipynb"):
        if Path(name).is_file():
            return Path(name)
        raise RunError(f"{name}: no such notebook; give the path of an .ipynb, or a name such as {NOTEBOOK}")
    if str(name) not in NOTEBOOKS:
        raise RunError(f"no notebook is named '{name}'{did_you_mean(str(name), NOTEBOOKS)}")
    for folder in (_PACKAGE / "notebooks", _PACKAGE.parent / "notebooks"):
        path = folder / f"{name}.ipynb"
        if path.is_file():
            return path
    raise RunError(f"notebook {name}.ipynb is missing from the package; install cascade-lab again")


def build_report(
    run: Run,
    path: Path,
    given: Mapping[str, Any],
    *,
    saved_values: Mapping[str, Any] | None = None,
    notebook_sha256: str | None = None,
    progress: bool = False,
) -> tuple[str, dict[str, Any]]:
    """Execute the notebook at `path`; return the HTML page and the content of the JSON.

    Parameters
    ----------
    run : Run
    path : Path
        The notebook.
    given : mapping
        The notebook's parameters. A path among them is read.
    saved_values : mapping, optional
        Parameters from the JSON of a report, for those that `given` lacks. They are never read as paths.
    notebook_sha256 : str, optional
        Execute nothing unless this is the digest of the notebook.
    progress : bool

    Raises
    ------
    RunError
        The notebook has another digest; or as `write_report` raises.
    """
    notebook = _read_notebook(path)
    sources = [(cell["cell_type"], cell["source"]) for cell in notebook.cells]
    digest = new_sha256(json.dumps(sources).encode()).hexdigest()
    if notebook_sha256 not in (None, digest):
        raise RunError(
            f"{path}: is not the notebook of the report, or was changed since; nothing was executed: give the one that "
            "the report was made with, or write the report again with `cascade-lab report`"
        )
    defaults = _default_parameters(notebook)
    parameters = _sort_parameters(run, path, defaults, given, saved_values or {})
    links = {f"runs/{name}": directory_of(each_run) for name, each_run in parameters.runs.items()}
    for each_run in parameters.runs.values():
        each_run.check()
    links |= {f"files/{name}{file.suffix}": file for name, file in parameters.files.items()}
    values = parameters.values | {
        name: f"../{link}" for link in links for name in [PurePath(link).stem] if name in defaults
    }
    data = path.resolve().parent.parent / "data"  # the default parameters name files in it
    cells = _execute(notebook, run, links | ({"data": data} if data.is_dir() else {}), values, progress)
    for each_run in parameters.runs.values():
        check_unchanged(each_run)
    outputs = list(_outputs(cells))
    figure_text = "".join(_texts([output for output in outputs if output["kind"] == "figure"]))
    warn_of_missing(figure_text)  # the kernel's own warning is not shown
    record = {
        "schema_version": SCHEMA_VERSION,
        "notebook": path.stem,
        "notebook_sha256": digest,
        "parameters": plain_value(parameters.values),
        "runs": {name: run_identity(each_run) for name, each_run in parameters.runs.items()},
        "files": {name: _digests(file) for name, file in parameters.files.items()},
        "packages": environment()["packages"] | {name: package_version(name) for name in ("scipy", "matplotlib")},
        "fonts": font_digests(figure_text),
        "outputs": outputs,
    }
    record = json.loads(record_text(record))  # as `verify_report` reads it
    return render_page(cells, record), record


def _read_notebook(path: Path) -> NotebookNode:
    from papermill.iorw import load_notebook_node

    try:
        return load_notebook_node(str(path))
    except Exception as error:  # each kind of broken file raises its own class
        raise RunError(f"{path}: not a notebook ({str(error).splitlines()[0]}); give an .ipynb") from error


def _default_parameters(notebook: NotebookNode) -> dict[str, str]:
    """Return the parameters of a notebook and their defaults, as source code, from its cell tagged `parameters`."""
    from papermill.translators import papermill_translators

    python = papermill_translators.find_translator("python3", "python")
    cells = [cell for cell in notebook.cells if "parameters" in cell["metadata"].get("tags", [])]
    return {parameter.name: parameter.default for cell in cells[:1] for parameter in python.inspect(cell)}


class _Parameters(NamedTuple):
    """A notebook's parameters by kind: runs (that of the report first), other files and folders, other values."""

    runs: dict[str, Run]
    files: dict[str, Path]
    values: dict[str, Any]


def _sort_parameters(
    run: Run, path: Path, defaults: Mapping[str, str], given: Mapping[str, Any], saved_values: Mapping[str, Any]
) -> _Parameters:
    run_parameter = "run_dir" if "run_dir" in defaults else next((n for n in defaults if n.startswith("run")), None)
    if run_parameter is None:
        raise RunError(f"{path}: no parameter takes a run; name one run_dir, in the cell tagged parameters")
    for name in (*given, *saved_values):
        if name not in defaults:
            raise RunError(f"{path}: has no parameter '{name}'{did_you_mean(name, list(defaults))}")
    saved_values = {name: value for name, value in saved_values.items() if name not in (*given, run_parameter)}
    sorted_parameters = _Parameters({run_parameter: run}, {}, saved_values)
    for name, value in given.items():
        several = value if isinstance(value, list) else [value]
        if defaults[name].startswith("[") and several and all(map(_is_run, several)):
            runs = {f"{name}_{number}": Run.read(path) for number, path in enumerate(several, 1)}
            sorted_parameters.runs.update(runs)
            sorted_parameters.values[name] = [f"../runs/{name_of_run}" for name_of_run in runs]
        elif _is_run(value):
            sorted_parameters.runs[name] = Run.read(value)
        elif _is_path(value) and Path(value).exists():
            sorted_parameters.files[name] = Path(value)
        else:
            sorted_parameters.values[name] = value
    for name, default in defaults.items():
        # A default names a run of `make demo`, which has nothing to do with this run.
        names_a_run = default.strip("'\"[").startswith("../runs/") and not name.startswith("output")
        if names_a_run and name != run_parameter and name not in (*given, *saved_values):
            raise RunError(f"{path.stem}: {name} is another run that it reads; give it: -p {name}=RUN")
    return sorted_parameters


def _is_path(value: Any) -> bool:
    return isinstance(value, os.PathLike) or (isinstance(value, str) and len(value) < 1000)


def _is_run(value: Any) -> bool:
    return _is_path(value) and (Path(value) / "manifest.json").is_file()


def _execute(
    notebook: NotebookNode, run: Run, links: Mapping[str, Path], parameters: Mapping[str, Any], progress: bool
) -> list[Mapping[str, Any]]:
    """Execute the notebook, and return its cells with their outputs.

    The kernel starts in a new folder, which has a link to each file and folder that the notebook needs. It reads no
    settings of the user.
    """
    from nbformat.v4 import new_code_cell
    from papermill.parameterize import parameterize_notebook

    from cascade_lab.reporting.kernel import execute

    notebook = parameterize_notebook(notebook, parameters, kernel_name="python3", language="python")
    notebook.cells.insert(0, new_code_cell(_SETUP))
    try:
        with (
            TemporaryDirectory() as temporary,
            tqdm(total=len(notebook.cells), desc="report", unit="cell", disable=not progress, leave=False) as bar,
        ):
            folder = Path(temporary)
            for name in ("notebooks", "runs", "files", "settings"):
                (folder / name).mkdir()
            for name, target in links.items():
                (folder / name).symlink_to(target.resolve(), target_is_directory=target.is_dir())
            settings = {"PYTHONHASHSEED": "0", "TZ": "UTC", "IPYTHONDIR": str(folder / "settings")}
            settings["MPLBACKEND"] = "module://matplotlib_inline.backend_inline"  # with Agg, cells show no picture
            execute(notebook, folder, settings, where=run.name, on_cell=bar.update)
    except OSError as error:
        raise RunError(
            f"{run.name}: the report's notebook cannot be executed ({error.strerror or error}); free some space in "
            "the folder for temporary files, or set TMPDIR to another"
        ) from error
    return list(notebook.cells[1:])


def _outputs(cells: list[Mapping[str, Any]]) -> Iterator[dict[str, Any]]:
    """Yield every output of the cells as plain values, with the heading of the section that it is in."""
    section = ""
    for cell in cells:
        if cell["cell_type"] == "markdown":
            section = next(iter(re.findall(r"^#+ +(.+)$", cell["source"], flags=re.MULTILINE)), section)
        for output in cell.get("outputs", []):
            data = output.get("data", {})
            text = data.get("text/markdown") or data.get("text/html") or data.get("text/plain")
            if VALUES_MIME in data:
                yield {"section": section, **data[VALUES_MIME]}
            elif output["output_type"] == "stream" and output["name"] == "stdout":
                yield {"section": section, "kind": "text", "lines": output["text"].splitlines()}
            elif text and not any("widget" in mime for mime in data):
                if "text/html" in data:
                    text = re.sub(r"<style.*?</style>|<[^>]*>", "", text, flags=re.DOTALL)
                lines = [line for line in without_addresses(text).splitlines() if line.strip()]
                yield {"section": section, "kind": "text", "lines": lines}


def _texts(content: Any) -> Iterator[str]:
    """Yield every text in the plain values of outputs."""
    if isinstance(content, str):
        yield content
    elif isinstance(content, Mapping):
        yield from _texts(list(content.values()))
    elif isinstance(content, list):
        for part in content:
            yield from _texts(part)


def _digests(path: Path) -> dict[str, str]:
    """Return the SHA-256 of a file, or of every file in a folder, by name."""
    if path.is_file():
        return {path.name: sha256(path)}
    return {str(file.relative_to(path)): sha256(file) for file in sorted(path.rglob("*")) if file.is_file()}

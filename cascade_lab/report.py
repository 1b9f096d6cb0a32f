"""A run as figures, and as one self-contained HTML file with the numbers beside it, made by executing a notebook."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Iterator, Mapping
from hashlib import sha256 as sha256_of
from pathlib import Path, PurePath
from tempfile import TemporaryDirectory
from typing import Any

import matplotlib.pyplot as plt
from tqdm import tqdm
from traitlets.config import Config

from cascade_lab.displays import CascadeConfusionDisplay, StageLatencyDisplay
from cascade_lab.displays.confusion import MAX_LABELLED
from cascade_lab.errors import RunError, did_you_mean
from cascade_lab.page import page, without_addresses
from cascade_lab.provenance import environment, sha256
from cascade_lab.recorder import MIME, plain
from cascade_lab.run import Run

NOTEBOOK = "01_run_cascade"
SCHEMA_VERSION = 1

# A kernel on sockets of this user's own, not on TCP ports that the machine's others can listen to.
_KERNEL = Config({"ConnectionFileMixin": {"transport": "ipc"}} if os.name == "posix" else {})
# What the kernel executes before the notebook's own cells; whatever the user's matplotlibrc says.
_SETUP = """import matplotlib
from cascade_lab import recorder
matplotlib.rcdefaults()
recorder.start(get_ipython())"""


def write_figures(run: Run, folder: str | Path | None = None) -> list[Path]:
    """Draw a run's matrices and latency into `folder` (`figures/` of the run); return the PNG files."""
    folder = run.directory / "figures" if folder is None else Path(folder)
    displays: dict[str, CascadeConfusionDisplay | StageLatencyDisplay] = {"latency": StageLatencyDisplay.from_run(run)}
    for stage in (None, *(stage.name for stage in run.spec.stages)):
        name = "confusion-end-to-end" if stage is None else f"confusion-{stage}"
        displays[name] = matrix = CascadeConfusionDisplay.from_run(run, stage=stage)
        if len(matrix.display_labels) > MAX_LABELLED:
            displays[f"{name}-most-confused"] = matrix.most_confused()
    paths = []
    for name, display in displays.items():
        figure = display.plot().figure_
        paths.append(_write(folder / f"{name}.png", lambda path, fig=figure: fig.savefig(path, dpi=150)))
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
    """Execute a notebook on a run; write what it shows as HTML, and the numbers of it as JSON beside.

    The same run gives the same bytes: the kernel sees it as `../runs/<parameter>`, wherever it is.

    Parameters
    ----------
    run : Run
        Goes to the notebook's parameter `run_dir`, or else to the first whose name starts with `run`.
    output : path, optional
        The HTML file: by default `report.html` of the run, or `<notebook>.html` there.
    notebook : str or path
        The name of one that comes with the package, or an `.ipynb` of one's own.
    parameters : mapping, optional
        The notebook's other parameters. One that names a run, or another file or folder, is treated as the run is.
    progress : bool
        Count cells on stderr.

    Returns
    -------
    Path
        The HTML file.

    Raises
    ------
    RunError
        A run's files are not those of its manifest; the notebook failed; a file cannot be written.
    """
    path = notebook_path(notebook)
    name = "report.html" if path.stem == NOTEBOOK else f"{path.stem}.html"
    output = run.directory / name if output is None else Path(output)
    _check_json_place(output)
    html, record = make(run, path, parameters or {}, progress=progress)
    _write(output.with_suffix(".json"), lambda place: place.write_text(_json(record), encoding="utf-8"))
    return _write(output, lambda place: place.write_text(html, encoding="utf-8"))


def notebook_path(name: str | Path) -> Path:
    """Return the file of a notebook: its own if it ends in `.ipynb`, else the one with the package.

    Those are beside the package in a checkout, inside it when installed.
    """
    if str(name).endswith(".ipynb"):
        if Path(name).is_file():
            return Path(name)
        raise RunError(f"{name}: no such notebook; give the path of an .ipynb, or a name such as {NOTEBOOK}")
    package = Path(__file__).parent
    folders = (package / "notebooks", package.parent / "notebooks")
    for folder in folders:
        path = folder / f"{name}.ipynb"
        if path.is_file():
            return path
    known = sorted(path.stem for folder in folders for path in folder.glob("*.ipynb"))
    if not known:
        raise RunError(f"notebook {name}.ipynb is not with the package; install cascade-lab again")
    raise RunError(f"no notebook is named '{name}'{did_you_mean(str(name), known)}")


def make(run: Run, path: Path, given: Mapping[str, Any], *, progress: bool = False) -> tuple[str, dict[str, Any]]:
    """Execute the notebook at `path`; return the page and the record, which is its JSON; raises as `write_report`."""
    from papermill.iorw import load_notebook_node

    try:
        notebook = load_notebook_node(str(path))
    except Exception as error:  # each broken file has a class of its own
        raise RunError(f"{path}: not a notebook ({str(error).splitlines()[0]}); give an .ipynb") from error
    sources = [(cell["cell_type"], cell["source"]) for cell in notebook.cells]
    runs, files, others = _sort_parameters(run, path, _defaults(notebook), given)
    for one in runs.values():
        one.check()
    links = {f"runs/{name}": one.directory for name, one in runs.items()}
    links |= {f"files/{name}{file.suffix}": file for name, file in files.items()}
    parameters = others | {PurePath(link).stem: f"../{link}" for link in links}
    data = path.resolve().parents[1] / "data"  # what the notebooks' defaults name
    cells = _execute(notebook, run, links | ({"data": data} if data.is_dir() else {}), parameters, progress)
    packages = environment()["packages"] | {name: _version(name) for name in ("scipy", "matplotlib")}
    record = {
        "schema_version": SCHEMA_VERSION,
        "notebook": path.stem,
        "notebook_sha256": sha256_of(json.dumps(sources).encode()).hexdigest(),
        "parameters": plain(others),
        "runs": {parameter: _origin_of(one) for parameter, one in runs.items()},
        "files": {parameter: _digests(file) for parameter, file in files.items()},
        "packages": packages,
        "shown": list(_shown(cells)),
    }
    record = json.loads(_json(record))  # as `verify` will read it
    return page(cells, record), record


def _defaults(notebook: Any) -> dict[str, str]:
    """Return the parameters of a notebook and their defaults, as its cell tagged `parameters` writes them."""
    from papermill.translators import papermill_translators

    python = papermill_translators.find_translator("python3", "python")
    cells = [cell for cell in notebook.cells if "parameters" in cell["metadata"].get("tags", [])]
    return {found.name: found.default for cell in cells[:1] for found in python.inspect(cell)}


def _sort_parameters(
    run: Run, path: Path, known: Mapping[str, str], given: Mapping[str, Any]
) -> tuple[dict[str, Run], dict[str, Path], dict[str, Any]]:
    """Return the parameters that are runs, `run` itself first, those that are other files or folders, and the rest."""
    first = "run_dir" if "run_dir" in known else next((name for name in known if name.startswith("run")), None)
    if first is None:
        raise RunError(f"{path}: no parameter takes a run; name one run_dir, in the cell tagged parameters")
    for name in given:
        if name not in known:
            raise RunError(f"{path}: has no parameter '{name}'{did_you_mean(name, list(known))}")
    runs, files, others = {first: run}, {}, {}
    for name, value in given.items():
        is_path = isinstance(value, os.PathLike) or (isinstance(value, str) and len(value) < 1000)
        if is_path and (Path(value) / "manifest.json").is_file():
            runs[name] = Run.read(value)
        elif is_path and Path(value).exists():
            files[name] = Path(value)
        else:
            others[name] = value
    for name, default in known.items():
        # A run that `make demo` has left says nothing about this one.
        if (
            default.strip("'\"").startswith("../runs/")
            and not name.startswith("output")
            and name not in {**runs, **files, **others}
        ):
            raise RunError(f"{path.stem}: {name} is another run that it reads; give it: -p {name}=RUN")
    return runs, files, others


def _execute(
    notebook: Any, run: Run, links: Mapping[str, Path], parameters: Mapping[str, Any], progress: bool
) -> list[Mapping[str, Any]]:
    """Execute the notebook in a kernel that knows neither where files are, but for links, nor the user's settings."""
    from jupyter_client.kernelspec import KernelSpecManager
    from nbclient import NotebookClient
    from nbclient.exceptions import CellExecutionError
    from nbformat.v4 import new_code_cell
    from papermill.parameterize import parameterize_notebook

    notebook = parameterize_notebook(notebook, parameters, kernel_name="python3", language="python")
    notebook.cells.insert(0, new_code_cell(_SETUP))
    with (
        TemporaryDirectory() as folder,
        tqdm(total=len(notebook.cells), desc="report", unit="cell", disable=not progress, leave=False) as bar,
    ):
        for name in ("notebooks", "runs", "files", "settings"):
            (Path(folder) / name).mkdir()
        for name, target in links.items():
            (Path(folder) / name).symlink_to(target.resolve(), target_is_directory=target.is_dir())
        client = NotebookClient(
            notebook,
            timeout=None,
            kernel_name="python3",
            config=_KERNEL,
            coalesce_streams=True,
            resources={"metadata": {"path": str(Path(folder) / "notebooks")}},
            on_cell_start=lambda **_: bar.update(),
        )
        kernel = client.create_kernel_manager()
        kernel.kernel_spec_manager = KernelSpecManager(kernel_dirs=[])  # this Python, not another of the same name
        if kernel.transport == "ipc":
            kernel.ip = str(Path(folder) / "socket")
        settings = {"PYTHONHASHSEED": "0", "TZ": "UTC", "IPYTHONDIR": str(Path(folder) / "settings")}
        try:
            client.execute(env={**os.environ, **settings})
        except CellExecutionError as error:
            said = str(error.evalue).strip().splitlines() or [""]
            raise RunError(f"{run.directory}: the report's notebook failed: {error.ename}: {said[0]}") from error
    return notebook.cells[1:]


def _shown(cells: list[Mapping[str, Any]]) -> Iterator[dict[str, Any]]:
    """Give everything that the cells show, as plain values, under the heading that it stands under."""
    section = ""
    for cell in cells:
        if cell["cell_type"] == "markdown":
            section = next(iter(re.findall(r"^#+ +(.+)$", cell["source"], flags=re.MULTILINE)), section)
        for output in cell.get("outputs", []):
            data = output.get("data", {})
            text = data.get("text/markdown") or data.get("text/html") or data.get("text/plain")
            if MIME in data:
                yield {"section": section, **data[MIME]}
            elif output["output_type"] == "stream" and output["name"] == "stdout":
                yield {"section": section, "kind": "text", "lines": output["text"].splitlines()}
            elif text and not any("widget" in kind for kind in data):
                words = re.sub(r"<style.*?</style>|<[^>]*>", "", text, flags=re.DOTALL) if "text/html" in data else text
                lines = [line for line in without_addresses(words).splitlines() if line.strip()]
                yield {"section": section, "kind": "text", "lines": lines}


def _origin_of(run: Run) -> dict[str, Any]:
    """Return what identifies a run: ids, digests, thresholds."""
    manifest = run.manifest
    kept = ("run_id", "started", "processor", "packages", "evalset", "thresholds", "tuned_on", "inputs", "contents")
    return {
        "name": run.spec.name,
        "n_examples": len(run.examples),
        "manifest_sha256": sha256(run.directory / "manifest.json"),
        **{key: manifest.get(key) or ({} if key in ("packages", "inputs") else None) for key in kept},
    }


def _digests(path: Path) -> dict[str, str]:
    """Return the SHA-256 of a file, or of all in a folder, by name."""
    if path.is_file():
        return {path.name: sha256(path)}
    return {str(one.relative_to(path)): sha256(one) for one in sorted(path.rglob("*")) if one.is_file()}


def _version(name: str) -> str:
    from importlib.metadata import version

    return version(name)


def versions(record: Mapping[str, Any]) -> str:
    """Return the versions of packages in a record, as the page says them."""
    return ", ".join(f"{name} {version}" for name, version in record["packages"].items())


def _json(record: Mapping[str, Any]) -> str:
    """Return the record as JSON with a line for each thing that is shown."""
    lines = ",\n".join(f"  {json.dumps(one, ensure_ascii=False, allow_nan=False)}" for one in record["shown"])
    head = json.dumps({**record, "shown": []}, indent=1, ensure_ascii=False, allow_nan=False)
    return head.removesuffix("[]\n}") + f"[\n{lines}\n ]\n}}\n"


def read_record(path: Path) -> dict[str, Any]:
    """Read the JSON of a report; raises RunError."""
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise RunError(f"{path}: cannot be read ({error}); give a report, with its JSON beside it") from error
    if not isinstance(record, dict) or "notebook_sha256" not in record or not record.get("runs"):
        raise RunError(f"{path}: not the JSON of a report; give one that `cascade-lab report` made")
    if record["schema_version"] != SCHEMA_VERSION:
        raise RunError(
            f"{path}: has schema version {record['schema_version']}, and this package reads {SCHEMA_VERSION}"
        )
    return record


def _check_json_place(output: Path) -> None:
    """Raise RunError where a report's JSON would take the place of something else, such as a manifest."""
    path = output.with_suffix(".json")
    if output.suffix != ".html":
        raise RunError(f"{output}: a report is HTML with a JSON beside it; name it something.html")
    if path.exists():
        try:
            read_record(path)
        except RunError as error:
            raise RunError(f"{path}: exists, and is no report's; choose another name for the report") from error


def _write(path: Path, write: Callable[[Path], object]) -> Path:
    """Write a file under another name first, so that a failure leaves no half of it."""
    partial = path.with_name(f".{path.stem}.unfinished{path.suffix}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            write(partial)
            os.replace(partial, path)
        finally:
            partial.unlink(missing_ok=True)
    except OSError as error:
        raise RunError(f"{path}: cannot be written ({error.strerror or error}); choose another place") from error
    return path

"""A run as figures and as one self-contained HTML file, made by executing a notebook on it."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory

import matplotlib.pyplot as plt
from traitlets.config import Config

from cascade_lab.displays import CascadeConfusionDisplay, StageLatencyDisplay
from cascade_lab.displays.confusion import MAX_LABELLED
from cascade_lab.errors import RunError
from cascade_lab.run import Run

NOTEBOOK = "01_run_cascade"

# A kernel on sockets of this user's own, not on TCP ports that the machine's others can listen to.
_KERNEL = Config({"ConnectionFileMixin": {"transport": "ipc"}} if os.name == "posix" else {})


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


def write_report(run: Run, output: str | Path | None = None, *, progress: bool = False) -> Path:
    """Execute the notebook on a run and write what it shows as HTML (`report.html` of the run).

    Raises
    ------
    RunError
        The notebook failed, or the file cannot be written.
    """
    import papermill
    from nbconvert import HTMLExporter
    from papermill.exceptions import PapermillExecutionError

    output = run.directory / "report.html" if output is None else Path(output)
    with TemporaryDirectory() as folder:
        executed = Path(folder) / f"{NOTEBOOK}.ipynb"
        try:
            papermill.execute_notebook(
                notebook_path(NOTEBOOK),
                executed,
                parameters={"run_dir": str(run.directory.resolve())},
                kernel_name="python3",
                progress_bar=progress and {"file": sys.stderr, "desc": "report"},
                config=_KERNEL,
            )
        except PapermillExecutionError as error:
            raise RunError(f"{run.directory}: the report's notebook failed: {error.ename}: {error.evalue}") from error
        exporter = HTMLExporter(exclude_input=True, exclude_input_prompt=True, exclude_output_prompt=True)
        for script in ("mathjax_url", "require_js_url", "jquery_url", "mermaid_js_url"):
            setattr(exporter, script, "")  # the report is read offline, and has nothing for them to do
        html, _ = exporter.from_filename(str(executed), resources={"metadata": {"name": run.spec.name}})
    return _write(output, lambda path: path.write_text(html, encoding="utf-8"))


def notebook_path(name: str) -> Path:
    """Return the notebook of that name: beside the package in a checkout, inside it when installed."""
    package = Path(__file__).parent
    for folder in (package / "notebooks", package.parent / "notebooks"):
        path = folder / f"{name}.ipynb"
        if path.is_file():
            return path
    raise RunError(f"notebook {name}.ipynb is not with the package; install cascade-lab again")


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

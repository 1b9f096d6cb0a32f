"""The notebook, opened both ways, and the HTML made of it."""

from __future__ import annotations

import re

import nbformat
import papermill
import pytest

from cascade_lab import Run
from cascade_lab.errors import RunError
from cascade_lab.report import NOTEBOOK, notebook_path, write_figures, write_report


def outputs(notebook):
    return [output for cell in notebook.cells if cell.cell_type == "code" for output in cell.outputs]


def test_the_notebook_drives_the_package_on_checkpoints(tiny, tiny_evalset, tmp_path):
    parameters = {"cascade_file": str(tiny), "evalset_file": str(tiny_evalset), "split": None}
    parameters["output_dir"] = str(tmp_path / "run")
    executed = papermill.execute_notebook(
        notebook_path(NOTEBOOK), tmp_path / "executed.ipynb", parameters=parameters, kernel_name="python3",
        progress_bar=False,
    )  # fmt: skip
    run = Run.read(tmp_path / "run")
    assert len(run.examples) == 200
    pictures = [output for output in outputs(executed) if "image/png" in output.get("data", {})]
    assert len(pictures) == 4  # gate, intent, end to end, latency
    nbformat.validate(executed)


@pytest.mark.parametrize("path", sorted(notebook_path(NOTEBOOK).parent.glob("*.ipynb")), ids=lambda path: path.stem)
def test_every_notebook_runs_as_it_stands(path, tmp_path, monkeypatch):
    """As a newcomer runs it: from notebooks/, its parameters untouched but for where a run goes."""
    parameters = {"output_dir": str(tmp_path / "run")} if path.stem == NOTEBOOK else {}
    executed = papermill.execute_notebook(
        path, tmp_path / path.name, parameters=parameters, cwd=path.parent, kernel_name="python3", progress_bar=False
    )
    assert outputs(executed)
    assert not [output for output in outputs(executed) if output.output_type == "error"]


def test_a_report_is_one_file_that_asks_the_network_for_nothing(clinc150_run):
    html = (clinc150_run.directory / "report.html").read_text(encoding="utf-8")
    assert not re.findall(r'(?:src|href)\s*=\s*["\'](?!data:|#)[^"\']', html)
    assert "@import" not in html
    assert (
        len(re.findall(r'<img[^>]*src="data:image/png;base64', html)) == 6
    )  # gate, intent twice, end to end twice, latency
    accuracy = clinc150_run.metrics["end_to_end"]["accuracy"]
    assert f"{accuracy:.1%} of all texts" in html
    assert "Traceback" not in html
    assert "stderr" not in re.findall(r'data-mime-type="application/vnd.jupyter.(\w+)"', html)


def test_figures_are_beside_the_report(clinc150_run):
    assert sorted(path.name for path in (clinc150_run.directory / "figures").iterdir()) == [
        "confusion-end-to-end-most-confused.png", "confusion-end-to-end.png", "confusion-gate.png",
        "confusion-intent-most-confused.png", "confusion-intent.png", "latency.png",
    ]  # fmt: skip


def test_a_report_goes_where_it_is_told_and_says_where_it_cannot(tiny_run, tmp_path):
    assert write_report(tiny_run, tmp_path / "here.html").read_text(encoding="utf-8").startswith("<!DOCTYPE html>")
    (tmp_path / "file").write_text("")
    with pytest.raises(RunError, match=r"cannot be written \(.*; choose another place"):
        write_figures(tiny_run, tmp_path / "file" / "figures")
    assert not list(tmp_path.glob(".*"))

"""Running all cells of a notebook twice in one kernel works, and shows the same numbers twice."""

from __future__ import annotations

import ast
import copy
import re
from pathlib import Path

import papermill
import pytest
from helpers import random_run
from nbclient import NotebookClient
from nbformat import NotebookNode
from papermill.iorw import load_notebook_node
from papermill.parameterize import parameterize_notebook
from test_report import DATA, FOLDER, demo  # noqa: F401  # a fixture

NOTEBOOKS = sorted(FOLDER.glob("*.ipynb"))
MEASURED = ("01_run_cascade", "05_study_latency", "08_chinese")  # they show times, which differ


def execute_twice(path: Path, parameters: dict[str, object]) -> tuple[list[str], list[str]]:
    """Execute the cells of a notebook, then the same cells again; return what each pass shows as text."""
    notebook = parameterize_notebook(load_notebook_node(str(path)), parameters, kernel_name="python3")
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    again = copy.deepcopy(code)
    for cell in again:
        cell.id = f"{cell.id}-again"
    notebook.cells = code + again
    NotebookClient(notebook, kernel_name="python3", resources={"metadata": {"path": str(path.parent)}}).execute()
    return shown(code), shown(again)


def shown(cells: list[NotebookNode]) -> list[str]:
    data = [output.data for cell in cells for output in cell.outputs if "data" in output]
    texts = [one.get("text/html") or one.get("text/markdown") or one.get("text/plain", "") for one in data]
    return [re.sub(r"T_[0-9a-f]{5}|0x[0-9a-f]+", "", text) for text in texts if "widget" not in text.lower()]


def given_parameters(path: Path, runs: Path, output: Path) -> dict[str, object]:
    """Return a notebook's parameters: runs that its defaults name are taken from `runs`, its output is `output`."""
    given: dict[str, object] = {}
    for name, found in papermill.inspect_notebook(str(path)).items():
        default = ast.literal_eval(found["default"])
        if name == "output_dir":
            given[name] = str(output)
        elif "../runs/" in str(default):
            places = [str(runs / Path(one).name) for one in ([default] if isinstance(default, str) else default)]
            given[name] = places[0] if isinstance(default, str) else places
    return given


def test_a_notebook_runs_twice(tmp_path):
    """One that reads a run and sets options of pandas; `make test-slow` has all of them."""
    random_run(tmp_path / "demo", n=200, seed=3)
    path = FOLDER / "03_analyse_errors.ipynb"
    first, second = execute_twice(path, given_parameters(path, tmp_path, tmp_path / "out"))
    assert len(first) > 5
    assert first == second


@pytest.mark.slow
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_every_notebook_runs_twice(path, demo, tmp_path):  # noqa: F811
    parameters = given_parameters(path, demo, tmp_path / "out")
    if path.stem == "04_tune_thresholds":
        parameters |= {"output": str(tmp_path / "tuned.toml"), "write_anyway": True}
    if path.stem == "08_chinese":
        parameters |= {"data_dir": str(DATA / "chinese"), "n_epochs_intent": 1, "n_epochs_gate": 1}
    first, second = execute_twice(path, parameters)
    assert len(first) == len(second) > 2
    if path.stem not in MEASURED:
        assert first == second

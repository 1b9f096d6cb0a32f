"""The structure of the package: who imports whom, what `import cascade_lab` costs, the map, the notebooks."""

from __future__ import annotations

import ast
import json
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import package_map
import pytest

import cascade_lab

PACKAGE = Path(cascade_lab.__file__).parent
MODULES = {
    path.relative_to(PACKAGE.parent).with_suffix("").as_posix().replace("/", ".").removesuffix(".__init__"): path
    for path in PACKAGE.rglob("*.py")
}


def imports(path: Path, *, lazy: bool) -> set[str]:
    """Return the names of the modules that a file imports, those of a type checker's imports left out.

    With `lazy` imports inside functions count too.
    """
    names = set()
    for node in _nodes(ast.parse(path.read_text(encoding="utf-8")), lazy):
        if isinstance(node, ast.ImportFrom) and node.module:
            inner = {f"{node.module}.{alias.name}" for alias in node.names}
            names |= {name if name in MODULES else node.module for name in inner}
        elif isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
    return names


def _nodes(node: ast.AST, lazy: bool) -> Iterator[ast.AST]:
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.If) and ast.unparse(child.test) == "TYPE_CHECKING":
            children = child.orelse
        elif isinstance(child, ast.FunctionDef) and not lazy:
            continue
        else:
            children = [child]
        for one in children:
            yield one
            yield from _nodes(one, lazy)


def test_no_import_goes_round_in_a_circle():
    graph = {name: imports(path, lazy=False) & MODULES.keys() for name, path in MODULES.items()}
    done, open_ = set(), []

    def visit(name: str) -> None:
        assert name not in open_, f"circle: {' -> '.join([*open_[open_.index(name) :], name])}"
        if name not in done:
            open_.append(name)
            for other in sorted(graph[name] - {name}):
                visit(other)
            open_.pop()
            done.add(name)

    for name in graph:
        visit(name)


def is_in(name: str, *packages: str) -> bool:
    return any(name == f"cascade_lab.{package}" or name.startswith(f"cascade_lab.{package}.") for package in packages)


@pytest.mark.parametrize(
    ("imported", "allowed"),
    [
        (("cli",), ("cli", "__main__")),
        (("displays", "reporting"), ("displays", "reporting", "explorer", "browser", "cli")),
        (("bert", "stage", "cascade"), (
            "bert", "stage", "cascade", "latency_benchmark", "precision_check", "study", "held_out_labels", "export",
            "draft", "cli", "serving", "batch",
            "displays.text",  # runs a stage for its gradients
        )),
    ],
)  # fmt: skip
def test_modules_that_few_others_may_import(imported, allowed):
    for name, path in MODULES.items():
        if name != "cascade_lab" and not is_in(name, *allowed):
            wrong = {other for other in imports(path, lazy=True) if is_in(other, *imported)}
            assert not wrong, f"{name} imports {wrong}"


@pytest.mark.parametrize(
    ("library", "allowed"),
    [
        ("tensorflow", ("bert", "stage")),
        ("matplotlib", ("displays", "reporting")),
        ("rich", ("cli",)),
        ("typer", ("cli",)),
    ],
)
def test_libraries_that_few_modules_import(library, allowed):
    for name, path in MODULES.items():
        roots = {other.split(".")[0] for other in imports(path, lazy=True)}
        assert library not in roots or is_in(name, *allowed), name


def test_importing_the_package_is_quick_and_what_reads_runs_loads_no_tensorflow():
    code = """
import json, sys, time
start = time.process_time()
import cascade_lab
seconds = time.process_time() - start
heavy = [name for name in ("tensorflow", "pandas", "numpy", "matplotlib", "sklearn") if name in sys.modules]
from cascade_lab import *
from cascade_lab.analysis import *
from cascade_lab.thresholds import *
import cascade_lab.reporting.report, cascade_lab.reporting.verify, cascade_lab.cli, cascade_lab.explorer
print(json.dumps([seconds, heavy, "tensorflow" in sys.modules]))
"""
    names = [name for name in cascade_lab.__all__ if name not in ("Cascade", "Stage")]
    code = code.replace("from cascade_lab import *", f"from cascade_lab import {', '.join(names)}")
    process = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    seconds, heavy, tensorflow = json.loads(process.stdout)
    assert seconds < 0.3
    assert heavy == []
    assert not tensorflow, "reading and showing a run must not load TensorFlow"


@pytest.mark.parametrize("package", ["cascade_lab", "cascade_lab.analysis", "cascade_lab.thresholds"])
def test_a_package_has_every_name_that_it_lists(package):
    module = __import__(package, fromlist=["__all__"])
    for name in module.__all__:
        assert callable(getattr(module, name)), name


def test_private_attributes_of_a_run_stay_in_its_module():
    for name, path in MODULES.items():
        if name != "cascade_lab.run":
            assert not re.search(r"\.(_scores|_decisions|_given)\b", path.read_text(encoding="utf-8")), name
    for path in Path(__file__).parent.glob("test_*.py"):
        if path != Path(__file__):
            assert "._scores" not in path.read_text(encoding="utf-8"), path.name


def test_the_map_is_the_one_that_the_modules_write():
    page = package_map.MAP.read_text(encoding="utf-8")
    assert package_map.with_map(page) == page, "run `make map`"


def test_notebooks_are_committed_without_outputs_and_with_a_parameters_cell():
    notebooks = sorted((PACKAGE.parent / "notebooks").glob("*.ipynb"))
    assert notebooks
    for path in notebooks:
        cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
        code = [cell for cell in cells if cell["cell_type"] == "code"]
        assert not any(cell["outputs"] or cell["execution_count"] for cell in code), path.name
        assert sum("parameters" in cell["metadata"].get("tags", []) for cell in code) == 1, path.name
        assert cells[0]["cell_type"] == "markdown", f"{path.name} must open with why"

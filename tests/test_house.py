"""The house itself: who imports whom, and what `import cascade_lab` costs."""

from __future__ import annotations

import ast
import json
import subprocess
import sys
from pathlib import Path

import cascade_lab

PACKAGE = Path(cascade_lab.__file__).parent

# A file imports only from files on lower floors.
FLOORS = [
    ["errors", "recorder", "displays.words"],
    ["provenance", "page", "spec", "evalset", "wholly", "bert.reference", "bert.writing"],
    ["serial", "bert.checkpoint", "bert.tokenization", "bert.vocabulary", "bert.resume", "bert.batching"],
    ["bert.graph", "bert.fast"],
    ["stage", "run", "bert.finetune", "bert.huggingface", "bert.serving"],
    ["analysis.bootstrap", "analysis.resamples", "analysis.outcomes", "bert.attributions"],
    ["analysis.latency", "analysis.examples", "analysis.goals", "analysis.quadrants", "export"],
    ["analysis.paired", "analysis.metrics", "analysis.duplicates"],
    ["analysis.calibration", "analysis.coverage", "analysis.temperature", "analysis.live_latency"],
    ["analysis.thresholds", "analysis.errors", "analysis.slices", "analysis.audit", "analysis.comparison"],
    ["cascade", "analysis.tuning", "displays.confusion", "displays.latency"],
    ["displays.calibration", "displays.coverage", "displays.outcomes"],
    ["analysis.per_class", "displays.thresholds", "displays.text", "displays.comparison"],
    ["displays"],
    ["explorer", "timing", "precision"],
    ["report", "study"],
    ["verification"],
    ["cli.console"],
    ["cli.reporting"],
    [
        "cli.runs",
        "cli.checkpoints",
        "cli.tuning",
        "cli.attributing",
        "cli.auditing",
        "cli.calibrating",
        "cli.checking",
        "cli.comparing",
        "cli.timing",
    ],
    ["cli.inspecting"],
    ["cli"],
]
FLOOR = {name: floor for floor, names in enumerate(FLOORS) for name in names}


def module_name(path: Path) -> str:
    name = ".".join(path.relative_to(PACKAGE).with_suffix("").parts)
    return name.removesuffix(".__init__")


def imported_rooms(path: Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("cascade_lab"):
            module = node.module.removeprefix("cascade_lab").removeprefix(".")
            for alias in node.names:
                inner = f"{module}.{alias.name}".strip(".")
                found.add(inner if inner in FLOOR else module)
        elif isinstance(node, ast.Import):
            found |= {a.name.removeprefix("cascade_lab.") for a in node.names if a.name.startswith("cascade_lab")}
    return found


def test_every_import_goes_down():
    faults = []
    for path in PACKAGE.rglob("*.py"):
        name = module_name(path)
        if name in ("__init__", "bert", "analysis"):
            continue
        assert name in FLOOR, f"{name} has no floor yet: add it to FLOORS"
        faults += [f"{name} -> {other}" for other in imported_rooms(path) if FLOOR[other] >= FLOOR[name]]
    assert not faults


def test_only_the_tensorflow_rooms_import_tensorflow_and_only_displays_import_matplotlib():
    for path in PACKAGE.rglob("*.py"):
        name = module_name(path)
        roots = set()
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                roots |= {alias.name.split(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and node.module:
                roots.add(node.module.split(".")[0])
        assert "tensorflow" not in roots or name.startswith("bert.") or name == "stage", name
        assert "matplotlib" not in roots or name.startswith("displays.") or name == "report", name


def test_importing_the_package_is_quick_and_loads_no_tensorflow():
    code = """
import json, sys, time
start = time.process_time()
import cascade_lab
seconds = time.process_time() - start
heavy = [name for name in ("tensorflow", "pandas", "numpy", "matplotlib", "sklearn") if name in sys.modules]
from cascade_lab import Run, EvalSet, CascadeConfusionDisplay, StageLatencyDisplay, CascadeSpec
import cascade_lab.report, cascade_lab.cli, cascade_lab.analysis.metrics
print(json.dumps([seconds, heavy, "tensorflow" in sys.modules]))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    seconds, heavy, tensorflow = json.loads(done.stdout)
    assert seconds < 0.3
    assert heavy == []
    assert not tensorflow, "reading and showing a run must not load TensorFlow"


def test_the_package_hands_on_every_name_it_lists():
    for name in cascade_lab.__all__:
        assert getattr(cascade_lab, name).__name__ == name


def test_notebooks_are_committed_without_outputs_and_with_a_parameters_cell():
    notebooks = sorted((PACKAGE.parent / "notebooks").glob("*.ipynb"))
    assert notebooks
    for path in notebooks:
        cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
        code = [cell for cell in cells if cell["cell_type"] == "code"]
        assert not any(cell["outputs"] or cell["execution_count"] for cell in code), path.name
        assert sum("parameters" in cell["metadata"].get("tags", []) for cell in code) == 1, path.name
        assert cells[0]["cell_type"] == "markdown", f"{path.name} must open with why"

"""Tests that a typed script of a user passes mypy and runs, and that mypy reports the mistakes of a user."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from typed_user_script import main

import cascade_lab

ROOT = Path(__file__).parents[1]
MISTAKES = {
    "from cascade_lab import Runn": "attr-defined",
    "from cascade_lab.analysis import blames": "attr-defined",
    "from cascade_lab import Run; Run.read(3)": "arg-type",
    "from cascade_lab import Run; Run.read('a').reply({})": "attr-defined",
    "from cascade_lab import StageSpec; StageSpec('a', ('b', 'c'), tempreture=2.0)": "call-arg",
    "from cascade_lab.thresholds import Goal; Goal(maximise='accuracy')": "call-arg",
    "from cascade_lab import CascadeConfusionDisplay as D; D.from_run('a')": "arg-type",
}


def test_the_users_script_runs(tmp_path):
    results = main(tmp_path)
    assert results["n_rungs"] > 1
    assert 0 < results["accuracy"] < 1
    assert (tmp_path / "confusion.png").is_file()


def test_mypy_reports_a_users_mistakes(tmp_path):
    """Each line has one mistake. Without types, or with a `__getattr__` that mypy sees, mypy would report none."""
    assert (Path(cascade_lab.__file__).parent / "py.typed").is_file()
    script = tmp_path / "mistakes.py"
    script.write_text("\n".join(MISTAKES) + "\n", encoding="utf-8")
    command = [sys.executable, "-m", "mypy", "--config-file", str(ROOT / "pyproject.toml"), str(script)]
    output = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False).stdout
    for number, (line, code) in enumerate(MISTAKES.items(), 1):
        reported = [error for error in output.splitlines() if f"mistakes.py:{number}: error" in error]
        assert len(reported) == 1, (line, output)
        assert reported[0].endswith(f"[{code}]"), reported

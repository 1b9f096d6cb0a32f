"""The wheel holds the package and its notebooks as they are in git, and nothing that lies beside them."""

from __future__ import annotations

import importlib.util
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from cascade_lab.reporting.report import NOTEBOOKS

ROOT = Path(__file__).parents[1]


def tracked(*paths: str) -> list[str]:
    """The files of the repository that are in git, or are going to be."""
    command = ["git", "ls-files", "-z", "--cached", "--", *paths]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    if result.returncode:
        pytest.skip("needs a git checkout")
    return [name for name in result.stdout.split("\0") if name and (ROOT / name).is_file()]


def build(source: Path, output: Path) -> Path:
    """Build a wheel; pip fetches hatchling where it is not installed."""
    if importlib.util.find_spec("hatchling"):
        command = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(output)]
    else:
        command = [sys.executable, "-m", "pip", "wheel", "--no-deps", "-q", "-w", str(output), str(source)]
    result = subprocess.run(command, cwd=source, capture_output=True, text=True, check=False)
    if result.returncode and "hatchling" in result.stderr and "No matching distribution" in result.stderr:
        pytest.skip("needs hatchling, or a package index to fetch it from")
    assert result.returncode == 0, result.stderr
    (wheel,) = output.glob("*.whl")
    return wheel


def test_a_wheel_holds_what_is_in_git_and_no_scratch_file(tmp_path):
    source = tmp_path / "source"
    files = tracked("cascade_lab", "notebooks", "pyproject.toml", "README.md", "LICENSE", ".gitignore")
    for name in files:
        (source / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, source / name)
    scratch = (
        "notebooks/Untitled.ipynb",
        "notebooks/07_mine.ipynb",
        "notebooks/.ipynb_checkpoints/01_run_cascade-checkpoint.ipynb",
        "notebooks/secrets.tsv",
        "cascade_lab/Untitled.ipynb",
        "cascade_lab/notebooks/Untitled.ipynb",
        "cascade_lab/.ipynb_checkpoints/run-checkpoint.py",
        "cascade_lab/reporting/page.css.orig",
        "cascade_lab/notes.txt",
    )
    for name in scratch:
        (source / name).parent.mkdir(parents=True, exist_ok=True)
        (source / name).write_text("{}")
    with zipfile.ZipFile(build(source, tmp_path / "wheels")) as wheel:
        names = {name for name in wheel.namelist() if ".dist-info/" not in name}
    expected = {name for name in files if name.startswith("cascade_lab/")}
    expected |= {f"cascade_lab/{name}" for name in files if name.startswith("notebooks/")}
    assert names == expected


def test_the_notebooks_that_reports_can_name_are_those_in_git():
    assert [Path(name).stem for name in tracked("notebooks")] == list(NOTEBOOKS)

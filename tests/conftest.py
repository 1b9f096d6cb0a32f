"""Fixtures: a small random cascade, its run, and the run of CLINC150 where its files are available."""

from __future__ import annotations

import os

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import subprocess
from pathlib import Path

import matplotlib
import numpy as np
import pandas as pd
import pytest
from helpers import texts, write_cascade

matplotlib.use("Agg")

collect_ignore = ["benchmarks"]  # scripts of an environment of their own

CLINC150 = Path(__file__).parents[2] / "shared" / "clinc150"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Run the tests of one file in one process, and all tests of the costly fixture in one process."""
    for item in items:
        group = "clinc150_run" if "clinc150_run" in getattr(item, "fixturenames", ()) else item.path.name
        item.add_marker(pytest.mark.xdist_group(group))


@pytest.fixture(scope="session")
def clinc150() -> Path:
    """The folder with CLINC150's files and the two checkpoints that were trained on them."""
    if not (CLINC150 / "cascade.toml").is_file():
        pytest.skip(f"CLINC150 and its checkpoints are not at {CLINC150}")
    return CLINC150


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A cascade.toml whose two small random checkpoints are shared by the session: read it, do not change it."""
    return write_cascade(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="session")
def tiny_evalset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """200 texts with random labels of the tiny cascade, as tsv."""
    path = tmp_path_factory.mktemp("evalset") / "texts.tsv"
    labels = np.random.default_rng(3).choice(["oos", "0", "1", "2", "3"], 200)
    pd.DataFrame({"text": texts(200), "label": labels}).to_csv(path, sep="\t", index=False)
    return path


@pytest.fixture(scope="session")
def tiny_run(tiny: Path, tiny_evalset: Path, tmp_path_factory: pytest.TempPathFactory):
    """A finished run of the tiny cascade on the 200 texts."""
    from cascade_lab import Cascade, EvalSet

    with Cascade.load(tiny) as cascade:
        return cascade.run(EvalSet.read(tiny_evalset), output=tmp_path_factory.mktemp("runs") / "tiny", batch_size=16)


@pytest.fixture(scope="session")
def clinc150_run(clinc150: Path, tmp_path_factory: pytest.TempPathFactory):
    """A finished run of CLINC150's cascade on its validation split, figures and report included, by the command."""
    from typer.testing import CliRunner

    from cascade_lab import Run
    from cascade_lab.cli import app

    output = tmp_path_factory.mktemp("runs") / "clinc150"
    arguments = ["run", str(clinc150 / "cascade.toml"), str(clinc150 / "data_full.json"), "--split", "val"]
    result = CliRunner().invoke(app, [*arguments, "--output", str(output)])
    assert result.exit_code == 0, result.output
    assert "3,100 (100.0%)" in result.output
    return Run.read(output)


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 64 KiB, where this user may mount one."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(folder)]
    if os.name != "posix" or os.geteuid() != 0 or subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("needs the right to mount a small file system")
    yield folder
    subprocess.run(["umount", "-l", str(folder)], check=True)

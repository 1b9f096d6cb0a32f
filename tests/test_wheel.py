"""The wheel holds the package and its notebooks as they are in git, and nothing else; installed, it runs everything."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path
from urllib.request import Request, urlopen

import numpy as np
import pandas as pd
import pytest
from typer.main import get_command

from cascade_lab.cli import app
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


# Each command as a user types it, in a folder with the demo's data; later ones need what earlier ones write.
COMMANDS = """
--version
--help
export cascade.toml --format hf --output huggingface
init huggingface/gate huggingface/intent mine.csv --output mine.toml
run mine.toml mine.csv --text-column sentence --label-column intent --output runs/mine
report runs/mine
report runs/mine --summary
inspect mine.toml
run cascade.toml dev.tsv --output runs/dev --no-report --keep-features
run cascade.toml test.tsv --output runs/test
tune runs/dev --maximize accuracy --output tuned.toml --write-anyway
run tuned.toml test.tsv --output runs/tuned --no-report
runs runs
compare runs/test runs/tuned
fit-rejector runs/dev --output rejector.toml
calibrate runs/dev --output calibrated.toml
audit runs/test --against runs/dev --output audit.csv
correct runs/test audit.csv --output corrected.tsv
monitor runs/test --against runs/dev
predict cascade.toml "my screen is broken" "what is the capital of France"
attribute cascade.toml "my screen is broken"
score cascade.toml mine.csv --text-column sentence --make-ids --output scored
latency cascade.toml dev.tsv --output latency --batch-sizes 1,8 --repeats 2 --limit 64
verify-precision cascade.toml dev.tsv --limit 64
import-logits logits.toml few.tsv --logits gate=gate.csv --logits intent=intent.csv --output runs/logits
import-hf huggingface/gate --output imported
vocabulary --train train.tsv --output vocabulary.txt --size 500
finetune --init gate --train few.tsv --eval few.tsv --label-column scope --output again --max-seq-length 32
study study.toml --known-ratio 0.5 --seeds 0 --init intent --output study
export cascade.toml --output saved
log runs/test --to mlflow --tracking-uri sqlite:///mlflow.db
report runs/test --notebook 03_analyse_errors
report runs/dev --notebook 04_tune_thresholds -p test_dir=runs/test
report runs/test --notebook 05_study_latency -p latency_dir=latency
report runs/test --notebook 06_compare_runs -p other_runs=runs/tuned
report runs/dev --notebook 07_choose_rejector
report runs/test --notebook 09_watch_traffic -p against_dir=runs/dev
verify runs/test/03_analyse_errors.html
"""

STUDY = """
evaluate = "few.tsv"
out_of_scope = "oos"

[finetune]
max_seq_length = 32
num_train_epochs = 1
"""


@pytest.mark.slow
def test_an_installed_wheel_runs_every_command_and_notebook_in_another_folder(tmp_path):
    """An empty environment, the wheel with its dependencies, and a folder that holds a user's files only."""
    (tmp_path / "work").mkdir()
    subprocess.run([sys.executable, "-m", "venv", tmp_path / "venv"], check=True)
    scripts = tmp_path / "venv" / ("Scripts" if sys.platform == "win32" else "bin")
    wheel = build(ROOT, tmp_path / "wheels")
    pip = [scripts / "python", "-m", "pip", "install", "--quiet", "--constraint", ROOT / "requirements.lock"]
    subprocess.run([*pip, f"{wheel}[serve,mlflow]"], check=True)

    folder = tmp_path / "work"
    for name in ("cascade.toml", "train.tsv", "dev.tsv", "test.tsv"):
        shutil.copy(ROOT / "data" / name, folder / name)
    for name in ("gate", "intent"):
        shutil.copytree(ROOT / "data" / name, folder / name)
    test = pd.read_csv(folder / "test.tsv", sep="\t", quoting=3)
    test.rename(columns={"text": "sentence", "label": "intent"})[["sentence", "intent"]].to_csv(
        folder / "mine.csv", index=False
    )
    few = test.groupby("label").head(6)
    few.to_csv(folder / "few.tsv", sep="\t", quoting=3, index=False)
    for stage in ("gate", "intent"):
        labels = (folder / stage / "labels.txt").read_text().split()
        rng = np.random.default_rng(0)
        pd.DataFrame(rng.normal(size=(len(few), len(labels))), columns=labels).to_csv(
            folder / f"{stage}.csv", index=False
        )
    keys = ("init_checkpoint", "bert_config_file", "vocab_file")
    lines = (folder / "cascade.toml").read_text().splitlines()
    (folder / "logits.toml").write_text("\n".join(line for line in lines if not line.startswith(keys)) + "\n")

    (folder / "study.toml").write_text(STUDY)

    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}

    def run(program: str, *arguments: str) -> str:
        command = [scripts / program, *arguments]
        result = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)
        assert result.returncode == 0, f"{arguments}\n{result.stdout}{result.stderr}"
        assert "Traceback" not in result.stderr
        return result.stdout

    commands = [shlex.split(line) for line in COMMANDS.strip().splitlines()]
    for arguments in commands:
        run("cascade-lab", *arguments)

    with subprocess.Popen(
        [scripts / "cascade-lab", "serve", "cascade.toml", "--port", "0", "--log", "traffic", "--log-texts"],
        cwd=folder,
        env=environment,
        stdout=subprocess.PIPE,
        text=True,
    ) as service:
        address = re.search(r"http://\S+", service.stdout.readline()).group()
        body = json.dumps({"texts": ["my screen is broken"]}).encode()
        with urlopen(Request(f"{address}/predict", data=body), timeout=30) as response:
            assert len(json.load(response)["answers"]) == 1
        service.terminate()
        assert service.wait(60) == 0
    assert "run: runs/traffic" in run("cascade-lab", "collect", "traffic", "--output", "runs/traffic")

    (notebooks,) = (tmp_path / "venv").rglob("cascade_lab/notebooks")  # two notebooks read no run, and are no reports
    parameters = {
        "02_study_clinc150": ["-y", f"results_files: ['{(ROOT / 'data' / 'clinc150' / 'results.json').as_posix()}']"],
        "08_chinese": ["-p", "data_dir", (ROOT / "data" / "chinese").as_posix(), "-p", "output_dir", "runs/chinese"],
    }
    for name, values in parameters.items():
        run("papermill", f"{notebooks / name}.ipynb", f"{name}.ipynb", *values)

    used = {arguments[0] for arguments in commands} | {"serve", "collect"}
    assert set(get_command(app).commands) - used == set(), "commands that are not run here"
    reported = {path.stem for path in folder.glob("runs/*/*.html")} | {"01_run_cascade", *parameters}
    assert reported >= set(NOTEBOOKS)

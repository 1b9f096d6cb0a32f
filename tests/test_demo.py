"""The embedded demo: its texts are as described in the README, and its checkpoints work."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from cascade_lab import Cascade, EvalSet

DATA = Path(__file__).parents[1] / "data"


@pytest.fixture(scope="module")
def splits():
    return {name: pd.read_csv(DATA / f"{name}.tsv", sep="\t", quoting=3) for name in ("train", "dev", "test")}


def test_forty_intents_of_at_least_25_phrasings_and_4_000_texts(splits):
    every = pd.concat(splits.values())
    assert len(every) >= 4000
    assert every["text"].is_unique
    assert set(every["scope"]) == {"in", "oos"}
    phrasings = every.groupby("label")["phrasing"].nunique()
    assert len(phrasings) == 41
    assert phrasings.min() >= 25
    for label, path in ((path.stem, path) for path in (DATA / "phrasings").glob("*.txt")):
        lines = path.read_text(encoding="utf-8").splitlines()
        assert len(lines) == len(set(lines)) >= 25, label


def test_no_phrasing_is_in_two_splits(splits):
    phrasings = [set(frame["phrasing"]) for frame in splits.values()]
    assert not phrasings[0] & phrasings[1]
    assert not phrasings[0] & phrasings[2]
    assert not phrasings[1] & phrasings[2]
    for frame in splits.values():
        assert frame["label"].nunique() == 41


def test_the_script_makes_the_committed_files(tmp_path):
    (tmp_path / "phrasings").mkdir()
    for path in [*(DATA / "phrasings").glob("*.txt"), DATA / "make_demo.py"]:
        (tmp_path / path.relative_to(DATA)).write_bytes(path.read_bytes())
    subprocess.run([sys.executable, str(tmp_path / "make_demo.py")], check=True, capture_output=True)
    for name in ("train", "dev", "test"):
        assert (tmp_path / f"{name}.tsv").read_bytes() == (DATA / f"{name}.tsv").read_bytes(), name


def test_the_checkpoints_are_small_and_good_and_not_too_good(tmp_path):
    size = sum(path.stat().st_size for name in ("gate", "intent") for path in (DATA / name).iterdir())
    assert size <= 12e6
    with Cascade.load(DATA / "cascade.toml") as cascade:
        run = cascade.run(EvalSet.read(DATA / "test.tsv"), output=tmp_path / "demo")
    scores = run.scores("intent")
    y_true = run.examples["label"].to_numpy(dtype=object)
    y_pred = np.array(run.spec.last.labels, dtype=object)[scores.logits.argmax(axis=1)]
    assert scores.scored.all()
    accuracy = (y_true == y_pred)[y_true != "oos"].mean()
    assert 0.85 <= accuracy <= 0.98
    assert run.metrics["stages"]["gate"]["auroc"] >= 0.93

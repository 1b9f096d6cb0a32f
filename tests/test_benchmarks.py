"""The benchmark's own parts, where they can run without the peers."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from helpers import texts

BENCHMARKS = Path(__file__).parent / "benchmarks"


@pytest.fixture(autouse=True)
def _benchmarks_on_the_path(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(BENCHMARKS))


@pytest.mark.parametrize("grouping", ["sorted", "exact"])
def test_every_row_is_in_one_batch(grouping: str):
    from contenders import cut

    lengths = np.random.default_rng(0).integers(3, 9, 200)
    batches = list(cut(lengths, 16, grouping))
    assert sorted(np.concatenate(batches)) == list(range(200))
    assert max(len(batch) for batch in batches) == 16
    if grouping == "exact":
        assert all(len(set(lengths[batch])) == 1 for batch in batches)


@pytest.mark.slow
def test_the_package_and_the_hand_written_script_give_the_same_answers_from_processes_of_their_own(
    tiny: Path, tmp_path: Path
):
    for name in ("gate", "intent"):
        shutil.copytree(tiny.parent / name, tmp_path / name)
    shutil.copy(tiny, tmp_path / "cascade-float32.toml")
    short = [text for text in texts(60) if len(text.split()) < 20][:20]
    (tmp_path / "texts.json").write_text(json.dumps({"test": {"texts": short}}))
    results = {}
    for contender, more in {"cascade_lab": {}, "script": {"max_seq_length": 48}}.items():
        setting = json.dumps({"contender": contender, "precision": "float32", **more})
        command = [sys.executable, BENCHMARKS / "worker.py", tmp_path, setting]
        order = json.dumps({"texts": "test", "n": 20, "size": 8, "batch": 8})
        process = subprocess.run(command, input=order, capture_output=True, text=True, check=True)
        loaded, results[contender] = map(json.loads, process.stdout.splitlines())
        assert loaded["load_seconds"] > 0
        assert len(results[contender]["seconds"]) == 3
    ours, script = results.values()
    assert len(set(ours["answers"])) > 1
    assert ours["answers"] == script["answers"]
    np.testing.assert_allclose(ours["probabilities"], script["probabilities"], atol=1e-5)

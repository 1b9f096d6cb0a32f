"""The benchmark's own parts, where they can run without the peers."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

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


def _report(processor: str, rates: dict[tuple[str, str], tuple[float, int]], *features: str) -> dict[str, Any]:
    """Return a section with an eval set of 5,500 texts: contender and precision to texts a second, answers changed."""
    results = [
        {
            "measure": measure,
            "contender": contender,
            "precision": precision,
            "n_texts": 5500,
            "texts_per_second": rate,
            "p50_ms": 1000 / rate,
            "changed_answers": changes,
        }
        for (contender, precision), (rate, changes) in rates.items()
        for measure in ("eval set", "calls of 1", "calls of 128")
    ]
    return {"machine": {"processor": processor, "features": list(features)}, "results": results}


def test_a_peer_that_changes_answers_does_not_count_where_the_aim_has_a_bar():
    """By hand: 1,200 against 600 at the bar; 1,200 against 2,000 whatever changes; 6 answers are over 0.1% of 5,500."""
    from aims import aims

    report = _report(
        "AMD EPYC (Zen 5)",
        {
            ("cascade_lab", "float32"): (500, 0),
            ("cascade_lab", "bfloat16"): (1200, 5),
            ("cascade_lab", "mixed"): (900, 0),
            ("openvino", "float32"): (400, 0),
            ("ctranslate2", "int8 dynamic"): (600, 5),
            ("openvino", "int8 static"): (2000, 6),
        },
    )
    found = {what: cells for what, (_, cells) in aims(report).items()}
    assert found["all at once, any precision"] == ["1.4", "2.00 (bfloat16 against CTranslate2 int8 dynamic)", "met"]
    assert found["all at once, any precision, whatever changes"][1:] == [
        "0.60 (bfloat16 against OpenVINO int8 static)",
        "missed",
    ]
    assert found["all at once, float32"] == ["1.25", "1.25 (OpenVINO float32)", "met"]
    assert found["one text, any precision, time"] == [
        "at most 0.8",
        "0.50 (bfloat16 against CTranslate2 int8 dynamic)",
        "met",
    ]
    assert found["BERT-base, 128 tokens, float32"][1:] == ["–", "not measured"]
    mixed = "all at once, mixed against our float32, no answer changed"
    assert found[mixed] == ["1.6", "1.80 (0 answers changed)", "met"]
    report["results"][6]["changed_answers"] = 1
    assert aims(report)[mixed][1][2] == "missed"
    report["machine"]["features"] = ["amx_bf16"]
    assert aims(report)["all at once, float32"][1][0] == "1.35"


def test_rows_of_two_processors_stand_side_by_side():
    from results import joined, summary

    both = {("cascade_lab", "float32"): (500, 0), ("openvino", "float32"): (400, 0)}
    reports = [
        _report("Intel(R) Xeon(R) Processor", {**both, ("openvino", "bfloat16"): (900, 12)}, "amx_bf16"),
        _report("AMD EPYC (Zen 5)", {**both, ("zentorch", "float32"): (300, 0)}),
    ]
    lines = joined("texts a second", ["all at once", "128", "ms", "changed"], reports, summary).splitlines()
    rows = {cells[0]: cells[1:] for line in lines for cells in [[cell.strip() for cell in line.split("|")[1:-1]]]}
    assert rows["texts a second"][::4] == ["AMX: all at once", "Zen 5: all at once"]
    assert rows["**cascade_lab float32**"] == ["500", "500", "2", "0 of 5,500"] * 2
    assert rows["OpenVINO bfloat16"] == ["900", "900", "1.11", "12 of 5,500", *["–"] * 4]
    assert rows["PyTorch + zentorch float32"][:4] == ["–"] * 4


def test_a_run_replaces_only_the_section_of_its_own_processor(tmp_path: Path):
    import results

    kept = tmp_path / "kept.json"
    kept.write_text(json.dumps({"Xeon": {"date": "1"}, "EPYC": {"date": "2"}}))
    results.write(tmp_path / "results.json", kept, {"machine": {"processor": "EPYC"}, "date": "3"})
    sections = json.loads((tmp_path / "results.json").read_text())
    assert {name: section["date"] for name, section in sections.items()} == {"Xeon": "1", "EPYC": "3"}


def test_the_landed_results_have_tables_and_the_same_answers():
    import results
    from rows import allowed

    sections = json.loads((BENCHMARKS / "results.json").read_text(encoding="utf-8"))
    assert all(section["machine"]["processor"] == name for name, section in sections.items())
    text = "\n".join(results.tables(list(sections.values())))
    assert "nan" not in text
    rows = [row for section in sections.values() for row in section["results"]]
    assert [row for row in rows if not allowed(row)] == []
    assert not allowed({**rows[0], "changed_answers": 6, "n_texts": 5500, "precision": "float32"})


def test_what_cannot_be_made_for_a_peer_is_noted_with_the_reason(tmp_path: Path):
    from prepare import attempt

    made = []
    attempt(tmp_path, ["a int8"], lambda value: made.append(value), 1)
    assert (made, list(tmp_path.iterdir())) == ([1], [])
    attempt(tmp_path, ["b float32", "b int8"], lambda: int("x"))
    attempt(tmp_path, ["c int8"], lambda: [][0])
    noted = json.loads((tmp_path / "absent.json").read_text())
    assert noted["b float32"] == noted["b int8"] == "ValueError: invalid literal for int() with base 10: 'x'"
    assert set(noted) == {"b float32", "b int8", "c int8"}


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

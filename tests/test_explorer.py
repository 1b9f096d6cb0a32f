"""The explorer, moved as a person moves it, compared with replays of the run."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pandas as pd
import pyarrow.parquet as pq
import pytest
from helpers import logits_of, memory_run, random_run, rewrite_table, write_run
from sklearn.metrics import confusion_matrix

from cascade_lab.analysis.outcomes import OUTCOMES, outcome_counts
from cascade_lab.explorer import PAGE_SIZE, explore
from cascade_lab.run import Run
from cascade_lab.spec import CascadeSpec


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return random_run(tmp_path_factory.mktemp("runs") / "one", n=200, seed=4)


def plain(html):
    return re.sub(r"\s+", " ", re.sub(r"<[^>]+>", " ", html))


def matrix_cells(html):
    """The numbers of the table that is the matrix, empty cells as 0."""
    table = html[html.index("border-collapse") :].split("</table>")[0]
    rows = [re.findall(r"<td[^>]*>(\d*)</td>", row) for row in table.split("<tr>")[2:]]
    return np.array([[int(cell or 0) for cell in row] for row in rows])


@pytest.mark.parametrize("n_gates", [1, 2, 3])
def test_sliders_show_what_a_replay_gives(tmp_path, n_gates):
    run = random_run(tmp_path / "run", n=150, n_gates=n_gates, seed=n_gates)
    explorer = explore(run)
    rng = np.random.default_rng(n_gates)
    assert list(explorer.sliders) == [stage.name for stage in run.spec.stages]
    for _ in range(15):
        name = rng.choice(list(explorer.sliders))
        slider = explorer.sliders[name]
        slider.value = rng.uniform(slider.min, slider.max)
        assert explorer.thresholds[name] == explorer.boxes[name].value
        odds = explorer.thresholds[name] / (1 - explorer.thresholds[name])
        assert np.log(odds) == pytest.approx(slider.value, abs=1e-3)
        replayed = run.replay(explorer.thresholds)
        assert explorer.predictions["predicted"].tolist() == replayed["predicted"].tolist()
        assert explorer.predictions["decided_by"].tolist() == replayed["decided_by"].tolist()
        counts = outcome_counts(run.spec, replayed)
        shown = plain(explorer.html)
        for outcome in OUTCOMES:
            assert f" {outcome} {counts[outcome]:,} " in shown
        accuracy = (replayed["label"] == replayed["predicted"]).mean()
        assert f" accuracy {accuracy:.4f} {explorer.metrics['accuracy'].low:.4f} to " in shown
        expected = confusion_matrix(replayed["label"], replayed["predicted"], labels=list(run.spec.labels))
        assert (matrix_cells(explorer.html) == expected).all()


def test_ends_pass_all_or_nothing_and_reset_comes_back(run):
    explorer = explore(run)
    first = explorer.html
    assert "No answer differs from those at the run's own thresholds" in first
    slider = explorer.sliders["gate0"]
    slider.value = slider.max
    assert (explorer.predictions["predicted"] == "oos0").all()
    assert "answers differ" in explorer.html
    slider.value = slider.min
    assert explorer.thresholds == {"gate0": 0.0, "last": 0.0}
    assert (explorer.predictions["decided_by"] == "last").all()
    explorer.sliders["last"].value = 1.0
    explorer.reset_button.click()
    assert explorer.thresholds == {"gate0": 0.5, "last": 0.0}
    assert explorer.html == first


def test_a_typed_threshold_counts_to_the_last_digit_and_nonsense_is_refused(run):
    explorer = explore(run)
    p = float(np.sort(run.replay({"gate0": 1.0})["probability"])[-1])
    reached = np.nextafter(1 - p, 0), np.nextafter(1 - p, 1)
    for value in reached:
        explorer.boxes["gate0"].value = value
        assert explorer.thresholds["gate0"] == value
        assert explorer.predictions["predicted"].tolist() == run.replay({"gate0": value})["predicted"].tolist()
    slider = explorer.sliders["gate0"]
    slider.value = round(slider.value, 2)  # what a page sends, which rounds to the slider's step
    assert explorer.thresholds["gate0"] == explorer.boxes["gate0"].value == reached[1]
    before = explorer.html
    explorer.boxes["gate0"].value = 1.5
    assert "1.5 is not a threshold of gate0" in explorer.status.value
    assert explorer.html == before
    assert explorer.thresholds["gate0"] == reached[1]


def test_it_writes_the_cascade_that_it_shows(run, tmp_path):
    explorer = explore(run)
    explorer.sliders["gate0"].value = 1.25
    explorer.path_box.value = str(tmp_path / "new" / "explored.toml")
    explorer.write_button.click()
    assert "written:" in explorer.status.value
    spec = CascadeSpec.read(tmp_path / "new" / "explored.toml")
    assert spec.thresholds == explorer.thresholds
    assert spec.tuned_on["run_id"] == run.manifest["run_id"]
    assert spec.tuned_on["goal"] == "chosen by hand in the explorer"
    assert spec.tuned_on["figures"]["accuracy"] == explorer.metrics["accuracy"].value
    explorer.write_button.click()
    assert "exists already" in explorer.status.value


def test_labels_of_their_own_keep_their_thresholds_and_missing_scores_are_said(tmp_path):
    made = random_run(tmp_path / "run", n=150, seed=3)
    path = made.directory / "manifest.json"
    manifest = json.loads(path.read_text())
    manifest["cascade"]["stage"][-1] |= {"min_probability": 0.3, "min_probabilities": {"label1": 0.6}}
    path.write_text(json.dumps(manifest))
    run = Run.read(made.directory)
    explorer = explore(run)
    for value in (-1.0, 0.5):
        explorer.sliders["last"].value = value
        replayed = run.replay(explorer.thresholds)
        assert explorer.predictions["predicted"].tolist() == replayed["predicted"].tolist()

    table = pq.read_table(made.directory / "scores" / "last.parquet")
    rewrite_table(made.directory, "scores/last.parquet", table.filter(~table["shadow"].to_numpy()))
    bare = explore(Run.read(made.directory))
    shown = bare.html
    bare.sliders["gate0"].value = bare.sliders["gate0"].min
    assert "run the cascade again with shadow scores" in bare.status.value
    assert bare.html == shown
    bare.reset_button.click()
    assert bare.status.value == ""


def test_texts_and_labels_cannot_do_anything(tmp_path):
    evil = "<script>alert(1)</script><img src=x onerror=alert(1)>\"'&"
    made = random_run(tmp_path / "run", n=60, n_labels=3, seed=1)
    gate, last = made.spec.stages
    gate = replace(gate, labels=("oos0", f"{evil}in"), pass_label=f"{evil}in")
    spec = CascadeSpec("evil", (gate, replace(last, labels=(evil, *last.labels[1:]))))
    examples = made.examples.assign(
        text=[evil, "‮right to left", "🙂", "x" * 50_000, "=HYPERLINK(1)", "$x_1$"] * 10,
        label=made.examples["label"].replace({"label0": evil}),
    )
    run = write_run(tmp_path / "evil", spec, examples, logits_of(made))
    explorer = explore(run)
    explorer.sliders["gate0"].value = explorer.sliders["gate0"].max
    whole = explorer.html + "".join(widget.value for widget in (explorer.children[0].children[0], explorer.status))
    assert "<script" not in whole
    assert "<img" not in whole
    assert "&lt;script&gt;alert(1)" in whole
    assert len(whole) < 60_000
    assert "xxxx…</bdi>" in whole


def test_many_labels_are_cut_to_the_most_confused(tmp_path):
    run = random_run(tmp_path / "run", n=400, n_labels=40, seed=1)
    shown = explore(run).html
    assert re.search(r"the 1[12] most confused of 41", plain(shown))
    assert max(matrix_cells(shown).shape) <= 12


def test_every_text_that_changes_is_listed_page_by_page(run):
    explorer = explore(run)
    assert len(explorer.changes) == 0
    explorer.move({"gate0": 0.9, "last": 0.4})
    before, now = run.predictions, run.replay(explorer.thresholds)
    differs = before["predicted"] != now["predicted"]
    expected = pd.DataFrame({"example_id": now["example_id"], "before": before["predicted"], "now": now["predicted"]})
    assert explorer.changes[["example_id", "before", "now"]].equals(expected[differs].reset_index(drop=True))
    fixed = (now["predicted"] == now["label"])[differs].to_numpy()
    broken = (before["predicted"] == now["label"])[differs].to_numpy()
    assert ((explorer.changes["change"] == "becomes right") == fixed).all()
    assert ((explorer.changes["change"] == "becomes wrong") == broken).all()
    assert f"{len(expected[differs])} answers differ" in plain(explorer.html)

    listed = []
    while True:
        listed += re.findall(r"<bdi>([^<]* \d+)</bdi>", explorer.html.split("answers differ")[1])
        if explorer.forward_button.disabled:
            break
        explorer.forward_button.click()
    assert listed == explorer.changes["text"].tolist()
    assert len(listed) > 2 * PAGE_SIZE
    explorer.change_box.value = "becomes wrong"  # begins at its first page
    assert explorer.html.count("<bdi>") < len(listed) * 4
    assert plain(explorer.html).count(" becomes wrong ") == min(PAGE_SIZE, int(broken.sum()))
    assert explorer.back_button.disabled


def test_without_a_kernel_there_is_a_picture_of_the_flow_at_the_present_thresholds(run):
    explorer = explore(run)
    bundle, _ = explorer._repr_mimebundle_()
    explorer.move({"gate0": 0.9})
    moved, _ = explorer._repr_mimebundle_()
    for each in (bundle, moved):
        assert "application/vnd.jupyter.widget-view+json" in each
        assert each["image/png"].startswith("iVBOR")
    assert moved["image/png"] != bundle["image/png"]
    assert moved["text/html"] == explorer.html
    assert moved["text/plain"].startswith("<Explorer: ")
    assert "gate0 0.9" in moved["text/plain"]
    bare = explore(memory_run(run.spec, run.examples, logits_of(run), shadow=False))
    assert "image/png" not in bare._repr_mimebundle_()[0]


def test_it_needs_no_tensorflow(run, tmp_path):
    shutil.copytree(run.directory, tmp_path / "run")
    code = (
        "import sys; from cascade_lab import Run; from cascade_lab.explorer import PAGE_SIZE, explore; "
        f"explore(Run.read({str(tmp_path / 'run')!r})); print('tensorflow' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"

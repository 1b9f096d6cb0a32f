"""Exports: another process loads SavedModels without this package; whole cascades are exported in both formats."""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from helpers import texts
from safetensors.numpy import load_file

from cascade_lab import CascadeLabError, CascadeSpec, Stage
from cascade_lab.bert import saved_model
from cascade_lab.bert.huggingface import import_directory
from cascade_lab.bert.saved_model import export_saved_model
from cascade_lab.calibrator import Calibrator
from cascade_lab.decisions import probabilities
from cascade_lab.exceptions import CheckpointError
from cascade_lab.export import export_cascade

# Runs in another directory and isolated (-I), so that it cannot import the package.
LOADER = """
import json, os, sys
os.environ["TF_CPP_MIN_LOG_LEVEL"] = "3"
import numpy as np, tensorflow as tf
folder, batch, result = sys.argv[1:]
arrays = np.load(batch)
serve = tf.saved_model.load(folder, tags=["serve"]).signatures["serving_default"]
outputs = serve(**{name: tf.constant(arrays[name]) for name in ("input_ids", "input_mask", "segment_ids")})
np.savez(result, **{name: value.numpy() for name, value in outputs.items()})
inputs = serve.structured_input_signature[1]
print(json.dumps({
    "inputs": {name: [spec.dtype.name, spec.shape.as_list()] for name, spec in sorted(inputs.items())},
    "outputs": {name: [spec.dtype.name, spec.shape.as_list()] for name, spec in serve.structured_outputs.items()},
    "imported": sorted(name for name in sys.modules if name.split(".")[0] in ("cascade_lab", "bert")),
}))
"""


INPUTS = ("input_ids", "input_mask", "segment_ids")


def padded_arrays(encodings) -> dict[str, np.ndarray]:
    length = max(len(encoding.input_ids) for encoding in encodings)
    arrays = {name: np.zeros((len(encodings), length), np.int32) for name in INPUTS}
    for row, (ids, n_first) in enumerate(encodings):
        arrays["input_ids"][row, : len(ids)] = ids
        arrays["input_mask"][row, : len(ids)] = 1
        arrays["segment_ids"][row, n_first : len(ids)] = 1
    return arrays


def loaded_elsewhere(folder: Path, encodings, tmp_path: Path) -> tuple[dict, dict[str, np.ndarray]]:
    """Load a SavedModel in a process without cascade_lab; return its description of the model, and the outputs."""
    np.savez(tmp_path / "batch.npz", **padded_arrays(encodings))
    command = [sys.executable, "-I", "-c", LOADER, str(folder), "batch.npz", "result.npz"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout), dict(np.load(tmp_path / "result.npz"))


@pytest.mark.parametrize("name", ["gate", "intent"])
def test_a_saved_model_gives_the_stages_logits_without_this_package(name, tiny, tmp_path):
    spec = CascadeSpec.read(tiny).stage(name)
    if spec.is_gate:
        spec = replace(spec, calibrator=Calibrator("platt", {"weight": 0.6, "bias": 0.4}))
    with Stage(spec) as stage:
        encodings = stage.encode([*texts(30), "pay"], [*[None] * 30, "the bill now"])
        expected = stage.logits(encodings)
    folder = export_saved_model(spec, tmp_path / "served")
    description, outputs = loaded_elsewhere(folder / "1", encodings, tmp_path)
    assert description["imported"] == []
    assert description["inputs"] == {name: ["int32", [None, None]] for name in INPUTS}
    n_labels = len(spec.labels)
    assert description["outputs"] == {name: ["float32", [None, n_labels]] for name in ("logits", "probabilities")}
    np.testing.assert_allclose(outputs["logits"], expected, atol=1e-5, rtol=0)
    np.testing.assert_allclose(outputs["probabilities"], probabilities(spec, outputs["logits"]), atol=1e-6)

    extra = folder / "1" / "assets.extra"
    assert sorted(path.name for path in extra.iterdir()) == ["bert_config.json", "labels.txt", "vocab.txt"]
    assert extra.joinpath("labels.txt").read_text().splitlines() == list(spec.labels)
    assert extra.joinpath("vocab.txt").read_text() == spec.vocab_file.read_text()
    assert json.loads(extra.joinpath("bert_config.json").read_text()) == json.loads(spec.bert_config_file.read_text())


@pytest.mark.parametrize("format", ["saved_model", "hf"])
def test_a_cascade_is_exported_with_all_that_connects_its_stages(format, tiny, tmp_path):
    spec = CascadeSpec.read(tiny)
    assert export_cascade(spec, tmp_path / "out", format=format) == tmp_path / "out"
    card = ["README.md"] if format == "hf" else []
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [*card, "export.json", "gate", "intent"]
    text = (tmp_path / "out" / "export.json").read_text()
    assert str(tiny.parent) not in text, "an export contains no path of this machine"
    content = json.loads(text)
    assert (content["name"], content["format"]) == ("tiny", format)
    assert content["packages"]["tensorflow"].startswith("2.")
    gate, intent = content["stages"]
    assert (gate["name"], gate["labels"], gate["pass_label"], gate["threshold"]) == ("gate", ["oos", "in"], "in", 0.5)
    assert (intent["labels"], intent["threshold"], intent["max_seq_length"]) == (["0", "1", "2", "3"], None, 24)
    assert sorted(gate["inputs"]) == [
        "bert_config.json", "model.ckpt-7.data-00000-of-00001", "model.ckpt-7.index", "vocab.txt",
    ]  # fmt: skip
    for name, digest in gate["inputs"].items():
        assert hashlib.sha256((tiny.parent / "gate" / name).read_bytes()).hexdigest() == digest
    if format == "hf":
        tensors = load_file(tmp_path / "out" / "intent" / "model.safetensors")
        assert tensors["classifier.weight"].shape == (4, 32)
    else:
        with Stage(spec.last) as stage:
            encodings = stage.encode(texts(5))
            expected = stage.logits(encodings)
        _, outputs = loaded_elsewhere(tmp_path / "out" / "intent" / "1", encodings, tmp_path)
        np.testing.assert_allclose(outputs["logits"], expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("format", ["saved_model", "hf"])
def test_a_stage_that_fails_leaves_no_half_of_an_export(format, tiny, tmp_path):
    spec = CascadeSpec.read(tiny)
    broken = replace(spec, stages=(spec.stages[0], replace(spec.last, labels=("0", "1"))))
    with pytest.raises(CheckpointError, match=r"stage 'intent'.*give its 4 labels"):
        export_cascade(broken, tmp_path / "out", format=format)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("format", ["saved_model", "hf"])
def test_a_full_disk_leaves_nothing(format, tiny, small_disk):
    with pytest.raises(CascadeLabError, match=r"cannot be written \(No space left on device\); nothing") as caught:
        export_cascade(CascadeSpec.read(tiny), small_disk / "out", format=format)
    assert "\n" not in str(caught.value)
    assert not list(small_disk.iterdir())


def test_a_full_disk_during_an_import_leaves_nothing(small_disk):
    (small_disk / "ballast").write_bytes(bytes(40_000))
    with pytest.raises(CascadeLabError, match=r"cannot be written \(No space left on device\); nothing was left"):
        import_directory(Path(__file__).parent / "data" / "huggingface" / "gelu", small_disk / "imported")
    assert [path.name for path in small_disk.iterdir()] == ["ballast"]


def test_a_failure_leaves_the_old_export_as_it_was(tiny, tmp_path, monkeypatch):
    spec = CascadeSpec.read(tiny)
    export_cascade(spec, tmp_path / "out", format="hf")
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}

    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(saved_model.tf1.saved_model.Builder, "save", interrupted)
    with pytest.raises(KeyboardInterrupt):
        export_cascade(spec, tmp_path / "out", format="saved_model", overwrite=True)
    assert before == {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_only_an_earlier_export_is_overwritten(tiny, tmp_path):
    spec = CascadeSpec.read(tiny)
    with pytest.raises(CascadeLabError, match="unknown format 'savedmodel'; did you mean 'saved_model'"):
        export_cascade(spec, tmp_path / "out", format="savedmodel")
    export_cascade(spec, tmp_path / "out", format="hf")
    with pytest.raises(CascadeLabError, match="out exists already; choose another output, or pass --overwrite"):
        export_cascade(spec, tmp_path / "out", format="saved_model")
    export_cascade(spec, tmp_path / "out", format="saved_model", overwrite=True)
    assert (tmp_path / "out" / "gate" / "1" / "saved_model.pb").is_file()
    assert not list((tmp_path / "out").rglob("config.json"))
    with pytest.raises(CascadeLabError, match="exists and is not a SavedModel, so it is not overwritten"):
        export_saved_model(spec.last, tiny.parent / "intent", overwrite=True)
    (tmp_path / "thesis").mkdir()
    with pytest.raises(CascadeLabError, match="thesis exists and is not a cascade's export"):
        export_cascade(spec, tmp_path / "thesis", format="hf", overwrite=True)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "thesis"]

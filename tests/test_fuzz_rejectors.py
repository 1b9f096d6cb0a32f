"""Fuzzers of rejectors and calibrators: their tables in `cascade.toml`, and the .npz file of a rejector's distances."""

from __future__ import annotations

import io
import zipfile
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import tomli_w
from helpers import random_run
from test_fuzz_files import changed_bytes, changed_value, report, rounds, tried

from cascade_lab import CascadeSpec
from cascade_lab.evidence import SCORES, fit_arrays
from cascade_lab.exceptions import SpecError
from cascade_lab.provenance import sha256
from cascade_lab.rejector import Rejector, feature_evidence

DISTANCES = tuple(f"last.{name}" for name, score in SCORES.items() if score.of_features)
HIDDEN = 6


@rounds
def test_tables_of_rejectors_and_calibrators(n, tmp_path):
    """A spec that is read is written, read again as it was, and decides about the texts of a run."""
    run = random_run(tmp_path / "run", n=20)
    rejector = {"evidence": ["gate0.log_odds", "last.energy"], "weights": [0.5, -2.0], "bias": 1}
    rejector["fitted_on"] = {"run_id": "x", "n_in_scope": 9}
    calibrators = [
        {"method": "platt", "weight": 1.5, "bias": 0.1},
        {"method": "beta", "a": 1.0, "b": 0.5, "c": 0.1},
        {"method": "isotonic", "log_odds": [-1.0, 0.0, 2.0], "probabilities": [0.1, 0.4, 0.9]},
    ]
    rng, outcomes = np.random.default_rng(8), Counter()
    path = tmp_path / "cascade.toml"

    def read() -> None:
        spec = CascadeSpec.read(path)
        spec.write(tmp_path / "copy.toml")
        assert CascadeSpec.read(tmp_path / "copy.toml").to_dict() == spec.to_dict()
        if [(s.name, s.labels, s.role) for s in spec.stages] == [(s.name, s.labels, s.role) for s in run.spec.stages]:
            assert len(run.with_spec(spec).predictions) == 20

    for number in range(n):
        content = run.spec.to_dict()
        content["stage"][0]["calibrator"] = calibrators[number % 3]
        content["stage"][1] |= {"rejector": rejector, "min_probability": 0.5}
        if number % 2:
            content["stage"][1]["calibrator"] = {"method": "vector", "weights": [1.0] * 4, "biases": [0.0] * 4}
        if number:
            stage = content["stage"][number % 4 // 2]
            key = rng.choice([key for key in ("rejector", "calibrator") if key in stage])
            stage[key] = changed_value(stage[key], rng)
        try:
            good = tomli_w.dumps(content).encode()
        except (TypeError, UnicodeEncodeError):  # null, or half a surrogate pair: not to be written as TOML
            continue
        path.write_bytes(changed_bytes(good, rng) if number and rng.random() < 0.3 else good)
        outcomes[tried(read, f"{number}: {path.read_bytes()!r}")] += 1
        assert number or outcomes["accepted"] == 1
    report("tables of rejectors and calibrators", outcomes)


def good_arrays() -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    names = {name for score in SCORES.values() for name in score.arrays}
    fitted = fit_arrays(rng.normal(size=(30, HIDDEN)), np.repeat(["a", "b", "c"], 10), names)
    return {f"last.{name}": values for name, values in fitted.items()}


def npz(arrays: dict[str, np.ndarray]) -> bytes:
    buffer = io.BytesIO()
    np.savez(buffer, **arrays)
    return buffer.getvalue()


def changed_array(values: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    filled = np.full_like(values, rng.choice([0, np.nan, np.inf, 6e4]))
    others = [
        values.astype(np.float64), values.astype(np.int32), values.astype(complex), values.astype(str), values[:0],
        values.ravel(), values[None], values[:, :2], values[:2], values.T, filled, np.array(1.5), np.array([{}]),
        np.zeros((0, 0)), np.zeros((HIDDEN, HIDDEN + 1), np.float32), values.astype([("x", "f4")]),
    ]  # fmt: skip
    return others[rng.integers(len(others))]


@rounds
def test_files_of_distances(n, tmp_path):
    """The digest is made right, so that each file is read; distances are computed from what is accepted."""
    path = tmp_path / "rejector.npz"
    arrays = good_arrays()
    features = np.random.default_rng(1).normal(size=(4, HIDDEN)).astype(np.float16)
    rng, outcomes = np.random.default_rng(9), Counter()

    def read() -> None:
        rejector = Rejector(DISTANCES, (1.0,) * len(DISTANCES), 0.0, path, sha256(path))
        values = feature_evidence(DISTANCES, {"last": features}, rejector.read_arrays())
        rejector.confidence(values)

    for number in range(n):
        if number % 2:
            content = changed_bytes(npz(arrays), rng)
        else:
            name = list(arrays)[rng.integers(len(arrays))]
            altered = {**arrays, name: changed_array(arrays[name], rng)} if number else arrays
            content = npz({key: altered[key] for key in altered if key != name or rng.random() < 0.9 or not number})
        path.write_bytes(content)
        outcomes[tried(read, f"{number}: {content[:300]!r}")] += 1
        assert number or outcomes["accepted"] == 1
    report("files of distances", outcomes)


def test_a_file_of_distances_is_refused_by_what_is_wrong(tmp_path):
    path = tmp_path / "rejector.npz"
    rejector = Rejector(DISTANCES, (1.0,) * len(DISTANCES), 0.0, path, "")

    def refused(message: str, **changed: object) -> None:
        with pytest.raises(SpecError, match=f"{message}.*; put the file there that `cascade-lab fit-rejector` wrote"):
            replace(rejector, **changed).read_arrays()

    refused("is no file")
    path.mkdir()
    refused("is no file")
    refused("is no file", arrays=Path("/dev/zero"))
    path.rmdir()
    path.write_bytes(b"PK")
    refused("is not the file that the rejector was fitted with")
    refused("cannot be read", arrays_sha256=sha256(path))
    arrays = good_arrays()
    path.write_bytes(npz({name: values for name, values in arrays.items() if name != "last.neighbours"}))
    refused("last.neighbours", arrays_sha256=sha256(path))
    path.write_bytes(npz({**arrays, "last.whitening": arrays["last.whitening"][:3]}))
    refused("last.whitening is not the table of numbers", arrays_sha256=sha256(path))
    path.write_bytes(npz({**arrays, "last.class_means": np.array([{}])}))  # pickled
    refused("cannot be read .*allow_pickle=False", arrays_sha256=sha256(path))


def test_a_small_file_of_distances_cannot_fill_the_memory(tmp_path, monkeypatch):
    monkeypatch.setattr("cascade_lab.rejector._MAX_BYTES", 2**20)
    path = tmp_path / "rejector.npz"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as file:
        file.writestr("last.neighbours.npy", bytes(2**22))
    assert path.stat().st_size < 2**14
    with pytest.raises(SpecError, match="its arrays take more than"):
        Rejector(("last.knn",), (1.0,), 0.0, path, sha256(path)).read_arrays()


def test_distances_of_another_stages_features_are_refused(tmp_path):
    path = tmp_path / "rejector.npz"
    path.write_bytes(npz(good_arrays()))
    arrays = Rejector(DISTANCES, (1.0,) * len(DISTANCES), 0.0, path, sha256(path)).read_arrays()
    with pytest.raises(SpecError, match=r"fitted with features of 6 numbers, but those of stage 'last' have 9; fit"):
        feature_evidence(DISTANCES, {"last": np.ones((3, 9), np.float16)}, arrays)

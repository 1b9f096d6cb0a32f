"""A rejector: a logistic regression over scores of the stages, whose output replaces the highest probability."""

from __future__ import annotations

import zipfile
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from scipy.special import expit

from cascade_lab.by_block import by_block
from cascade_lab.evidence import SCORES, log_odds
from cascade_lab.exceptions import SpecError, did_you_mean
from cascade_lab.provenance import sha256
from cascade_lab.text import shorten

_LARGEST = 1e100  # of a weight, so that no product with a score overflows
_MAX_BYTES = 2**33  # of the arrays; a small file could declare more than fits into memory
_WAY_OUT = "put the file there that `cascade-lab fit-rejector` wrote, or fit the rejector again"
# What zipfile and NumPy raise at a damaged file; a RuntimeError is an encrypted one.
_OF_NUMPY = (OSError, ValueError, LookupError, TypeError, EOFError, MemoryError, OverflowError, RuntimeError)
_DAMAGE = (*_OF_NUMPY, zipfile.BadZipFile, zlib.error)


@dataclass(frozen=True)
class Rejector:
    """The rule of the last stage or of a deferral stage: `confidence = sigmoid(bias + sum of weight * evidence)`.

    Attributes
    ----------
    evidence : tuple of str
        The scores, each as `<stage>.<score>`, such as `gate.log_odds` or `intent.energy`; see `evidence.SCORES`.
    weights : tuple of float
        One weight per score.
    bias : float
    arrays : path, optional
        An .npz file with the means, covariances and neighbours that scores of features need.
    arrays_sha256 : str, optional
        The SHA-256 of that file.
    fitted_on : mapping
        What the weights were fitted on, for the reader.
    """

    evidence: tuple[str, ...]
    weights: tuple[float, ...]
    bias: float
    arrays: Path | None = None
    arrays_sha256: str | None = None
    fitted_on: Mapping[str, Any] = field(default_factory=dict)

    @property
    def feature_evidence(self) -> tuple[str, ...]:
        """The scores that are computed from features."""
        return tuple(name for name in self.evidence if score_of(name).of_features)

    @property
    def stages(self) -> tuple[str, ...]:
        """The stages whose outputs are needed."""
        return tuple(dict.fromkeys(name.rpartition(".")[0] for name in self.evidence))

    @property
    def feature_stages(self) -> tuple[str, ...]:
        """The stages whose features are needed."""
        return tuple(dict.fromkeys(name.rpartition(".")[0] for name in self.feature_evidence))

    def confidence(self, evidence: Mapping[str, np.ndarray]) -> np.ndarray:
        """Return the confidence, shape (n,), from each score's values, shape (n,).

        >>> Rejector(("intent.energy",), (2.0,), -1.0).confidence({"intent.energy": np.array([0.5])}).tolist()
        [0.5]
        """
        total = np.full(len(evidence[self.evidence[0]]), self.bias)
        for name, weight in zip(self.evidence, self.weights, strict=True):
            total = total + weight * np.asarray(evidence[name], dtype=np.float64)
        return np.asarray(expit(total))

    @classmethod
    def from_dict(cls, content: Any, *, where: str, folder: Path = Path()) -> Rejector:
        """Take the table `[stage.rejector]` of a `cascade.toml`; `folder` anchors the path in it.

        Raises
        ------
        SpecError
            Naming the key at fault.
        """
        if not isinstance(content, Mapping):
            raise SpecError(f"{where}: rejector must be a table, not {_short(content)}")
        known = list(cls.__dataclass_fields__)
        for key in content:
            if key not in known:
                raise SpecError(f"{where}: unknown key 'rejector.{key}'{did_you_mean(key, known)}")
        names, weights, bias = (content.get(key) for key in ("evidence", "weights", "bias"))
        if not isinstance(names, list | tuple) or not names or not all(isinstance(name, str) for name in names):
            raise SpecError(f"{where}: rejector.evidence must be a list of scores such as 'gate.log_odds'")
        if len(set(names)) != len(names):
            raise SpecError(f"{where}: rejector.evidence names a score twice; name each once")
        for name in names:
            if name.rpartition(".")[2] not in SCORES or not name.rpartition(".")[0]:
                near = did_you_mean(name.rpartition(".")[2], list(SCORES))
                raise SpecError(f"{where}: rejector.evidence has '{name}', which is no <stage>.<score>{near}")
        if not isinstance(weights, list | tuple) or len(weights) != len(names) or not all(map(_is_number, weights)):
            raise SpecError(
                f"{where}: rejector.weights must be {len(names)} numbers (at most {_LARGEST:g}), one for each score"
            )
        if bias is None or not _is_number(bias):
            raise SpecError(f"{where}: rejector.bias must be a number (at most {_LARGEST:g}), not {_short(bias)}")
        arrays, digest, fitted_on = (content.get(key) for key in ("arrays", "arrays_sha256", "fitted_on"))
        for key, value in (("arrays", arrays), ("arrays_sha256", digest)):
            if not isinstance(value, str | None):
                raise SpecError(f"{where}: rejector.{key} must be a string, not {_short(value)}")
            if "\0" in (value or ""):
                raise SpecError(f"{where}: rejector.{key} has a NUL character; give the name of a file")
        if not isinstance(fitted_on, Mapping | None):
            raise SpecError(f"{where}: rejector.fitted_on must be a table, not {_short(fitted_on)}")
        path = None if arrays is None else folder / arrays
        rejector = cls(tuple(names), tuple(map(float, weights)), float(bias), path, digest, fitted_on or {})
        if rejector.feature_evidence and (path is None or digest is None):
            raise SpecError(
                f"{where}: rejector.arrays and rejector.arrays_sha256 are missing, and {rejector.feature_evidence[0]} "
                "needs them; write the file with `cascade-lab fit-rejector`"
            )
        return rejector

    def to_dict(self) -> dict[str, Any]:
        """Return plain data with an absolute path, as `from_dict` takes."""
        content = {"evidence": list(self.evidence), "weights": list(self.weights), "bias": self.bias}
        if self.arrays is not None:
            content |= {"arrays": str(self.arrays.resolve()), "arrays_sha256": self.arrays_sha256}
        return content | ({"fitted_on": dict(self.fitted_on)} if self.fitted_on else {})

    def read_arrays(self) -> dict[str, np.ndarray]:
        """Read the .npz file, after a check of its SHA-256; an empty dict where no score needs it.

        Raises
        ------
        SpecError
            The file is missing or damaged, is another file, or lacks an array that a score needs.
        """
        if not self.feature_evidence or self.arrays is None:
            return {}
        needed = sorted({name for score in self.feature_evidence for name in array_names(score)})
        try:
            if not self.arrays.is_file():
                raise SpecError(f"{self.arrays}: is no file; {_WAY_OUT}")
            if sha256(self.arrays) != self.arrays_sha256:
                raise SpecError(
                    f"{self.arrays}: is not the file that the rejector was fitted with (another SHA-256); {_WAY_OUT}"
                )
            with zipfile.ZipFile(self.arrays) as archive:
                n_bytes = sum(part.file_size for part in archive.infolist())
            if n_bytes > _MAX_BYTES:
                raise SpecError(f"{self.arrays}: its arrays take more than {_MAX_BYTES // 2**30} GiB; {_WAY_OUT}")
            with np.load(self.arrays, allow_pickle=False) as file:
                arrays = {name: file[name] for name in needed}
        except _DAMAGE as error:
            raise SpecError(f"{self.arrays}: cannot be read ({shorten(str(error), 200)}); {_WAY_OUT}") from error
        for name, values in arrays.items():
            is_table = values.dtype.kind == "f" and values.ndim == 2 and values.size and np.isfinite(values).all()
            if not is_table or (name.endswith("whitening") and len(values) != values.shape[1]):
                raise SpecError(f"{self.arrays}: {name} is not the table of numbers that its score needs; {_WAY_OUT}")
        return arrays


def score_of(name: str) -> Any:
    """Return the `Score` of `<stage>.<score>`."""
    return SCORES[name.rpartition(".")[2]]


def array_names(name: str) -> list[str]:
    """Return the names in the .npz file of the arrays that `<stage>.<score>` needs: `<stage>.<array>`."""
    return [f"{name.rpartition('.')[0]}.{array}" for array in score_of(name).arrays]


def logit_evidence(stages: Sequence[Any], names: Sequence[str], logits: Mapping[str, np.ndarray]) -> dict[str, Any]:
    """Return the scores `names` that need logits only: score name to values, shape (n,).

    Parameters
    ----------
    stages : sequence of StageSpec
    names : sequence of str
        `<stage>.<score>`.
    logits : mapping of str to ndarray, shape (n, n_labels)
        Stage name to its logits, rows of the same texts. They are divided by the stage's temperature here. A stage's
        calibrator does not change them: it is for probabilities, and the rejector's weights fit these logits.
    """
    values = {}
    for name in names:
        stage = next(stage for stage in stages if stage.name == name.rpartition(".")[0])
        (values[name],) = by_block(partial(_logit_score, stage, name), np.asarray(logits[stage.name]))
    return values


def _logit_score(stage: Any, name: str, logits: np.ndarray) -> tuple[np.ndarray]:
    """Return one score of `logit_evidence` for some texts."""
    z = np.asarray(logits, dtype=np.float64) / stage.temperature
    if score_of(name).function is log_odds and stage.is_gate:
        return (log_odds(z, stage.labels.index(stage.pass_label)),)
    if score_of(name).function is log_odds and stage.reject_label in stage.labels:
        return (-log_odds(z, stage.labels.index(stage.reject_label)),)
    return (score_of(name).function(z),)


def feature_evidence(
    names: Sequence[str], features: Mapping[str, np.ndarray], arrays: Mapping[str, np.ndarray]
) -> dict[str, np.ndarray]:
    """Return the scores `names` of features: score name to values, shape (n,).

    Parameters
    ----------
    names : sequence of str
        `<stage>.<score>`.
    features : mapping of str to ndarray of float16, shape (n, hidden)
        Stage name to the last layer's [CLS] vectors.
    arrays : mapping of str to ndarray
        As `Rejector.read_arrays` returns them.

    Raises
    ------
    SpecError
        The arrays are those of another stage's features.
    """
    values = {}
    for name in names:
        stage = name.rpartition(".")[0]
        own = {array: arrays[f"{stage}.{array}"] for array in score_of(name).arrays}
        for array in own.values():
            if array.shape[1] != features[stage].shape[1]:
                raise SpecError(
                    f"{name}: the rejector was fitted with features of {array.shape[1]} numbers, but those of stage "
                    f"'{stage}' have {features[stage].shape[1]}; fit the rejector again"
                )
        values[name] = score_of(name).function(features[stage], own)
    return values


def _short(value: Any) -> str:
    return shorten(repr(value), 80)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) <= _LARGEST  # NaN is not

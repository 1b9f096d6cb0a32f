"""A loaded cascade with its digest; loads one from a `cascade.toml`, and loads it again after the file has changed."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cascade_lab.cascade import Cascade
from cascade_lab.exceptions import CheckpointError
from cascade_lab.latency_benchmark import loaded_files, stage_digests
from cascade_lab.provenance import environment
from cascade_lab.serving.answered import ServedCascade
from cascade_lab.spec import CascadeSpec

LOADED_KEYS = (
    *("name", "labels", "do_lower_case", "max_seq_length", "engine", "precision"),
    *("output_weights", "output_bias"),
)
"""The keys of a stage that need its model to be loaded again if they change; so do the contents of its files. All other
keys are read at each decision."""

WARM_UP_SIZES = (1, 1, 2, 4, 8, 16, 32, 64, 128)


@dataclass(frozen=True, eq=False)
class LiveCascade:
    """A loaded cascade that serves.

    Attributes
    ----------
    cascade : Cascade
    served : ServedCascade
        Its digest, and what a manifest says of it.
    contents : list of list of str
        The SHA-256 of the files of each stage, in the order of `loaded_files`.
    """

    cascade: Cascade
    served: ServedCascade
    contents: list[list[str]]

    @classmethod
    def of(cls, cascade: Cascade) -> LiveCascade:
        """Describe a loaded cascade. The files on disk must still be those that it was loaded from."""
        return cls._describe(cascade, _digests(cascade.spec))

    @classmethod
    def load(cls, path: str | Path | CascadeSpec) -> LiveCascade:
        """Load a `cascade.toml` and score texts of several lengths, so that the first request is not slow.

        Raises
        ------
        SpecError, CheckpointError
        """
        spec = path if isinstance(path, CascadeSpec) else CascadeSpec.read(path)
        before = _digests(spec)
        cascade = Cascade.load(spec)
        try:
            if _digests(spec) != before:
                raise CheckpointError(f"cascade '{spec.name}': a file changed while it was loaded; load it again")
            warm_up(cascade)
            return cls._describe(cascade, before)
        except BaseException:
            cascade.close()
            raise

    def reload(self, path: str | Path) -> LiveCascade:
        """Read a `cascade.toml` again. Models are loaded only if a file of a stage, or a key about it, has changed.

        The sessions are shared with this cascade where no model is loaded.

        Raises
        ------
        SpecError, CheckpointError
            The file cannot be used. This cascade is as before.
        """
        spec = CascadeSpec.read(path)
        digests = _digests(spec)
        if not self._has_models_of(spec, digests):
            return LiveCascade.load(spec)
        return LiveCascade._describe(self.cascade.with_spec(spec), digests)

    def _has_models_of(self, spec: CascadeSpec, digests: dict[str, str]) -> bool:
        """Return whether the loaded models are those of another spec, and return the features that it needs."""
        own = self.cascade.spec
        keys = [[[getattr(stage, key) for key in LOADED_KEYS] for stage in s.stages] for s in (own, spec)]
        needs, has = _feature_stages(spec), _feature_stages(own)
        return keys[0] == keys[1] and self.contents == _contents(spec, digests) and needs <= has

    @classmethod
    def _describe(cls, cascade: Cascade, digests: dict[str, str]) -> LiveCascade:
        contents = _contents(cascade.spec, digests)
        return cls(cascade, _served(cascade, digests, contents), contents)


def warm_up(cascade: Cascade) -> None:
    """Score texts in batches of several sizes: TensorFlow prepares each shape when it first sees it."""
    for size in WARM_UP_SIZES:
        cascade.predict(["a b c d e f g h i j k l"[: 2 * (number % 12) + 1] for number in range(size)])


def _feature_stages(spec: CascadeSpec) -> set[str]:
    return {name for stage in spec.stages if stage.rejector for name in stage.rejector.feature_stages}


def _digests(spec: CascadeSpec) -> dict[str, str]:
    """Return the SHA-256 of each file, by path; nothing where one is missing, which loading reports better."""
    try:
        return stage_digests(spec)
    except CheckpointError:
        return {}


def _contents(spec: CascadeSpec, digests: dict[str, str]) -> list[list[str]]:
    """Return what the files of each stage contain, wherever they are; nothing where a file is missing."""
    if not digests:
        return []
    return [[digests[str(path)] for path in loaded_files(stage)] for stage in spec.stages]


def _served(cascade: Cascade, digests: dict[str, str], contents: list[list[str]]) -> ServedCascade:
    spec = cascade.spec.to_dict()
    manifest = {
        "cascade": spec,
        "thresholds": cascade.spec.thresholds,
        "tuned_on": cascade.spec.tuned_on,
        "inputs": digests,
        "stages": {stage.spec.name: stage.settings for stage in cascade.stages},
        **environment(),
    }
    return ServedCascade(_digest(spec, contents), manifest)


def cascade_digest(spec: CascadeSpec) -> str:
    """Return the digest that `ServedCascade` has, without loading the cascade.

    Raises
    ------
    CheckpointError
        A file is missing, or a stage was scored elsewhere and names none.
    """
    return _digest(spec.to_dict(), _contents(spec, stage_digests(spec)))


def _digest(spec: dict[str, Any], contents: list[list[str]]) -> str:
    content = {"cascade": _without_paths(spec), "files": contents}
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def _without_paths(value: Any) -> Any:
    """Return a spec's plain data without the keys that name files: their digests count."""
    paths = ("init_checkpoint", "bert_config_file", "vocab_file", "arrays")
    if isinstance(value, dict):
        return {key: _without_paths(inner) for key, inner in value.items() if key not in paths}
    return [_without_paths(inner) for inner in value] if isinstance(value, list) else value

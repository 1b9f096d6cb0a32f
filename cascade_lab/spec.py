"""Reads, checks and writes `cascade.toml`: the stages of a cascade as frozen data."""

from __future__ import annotations

import math
import os
import re
import sys
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import tomli_w

from cascade_lab.atomic import write_text
from cascade_lab.calibrator import Calibrator, check_calibrator
from cascade_lab.exceptions import SpecError, did_you_mean
from cascade_lab.object_html import spec_html, stage_html
from cascade_lab.origin_tables import check_calibrated_on, check_tuned_on
from cascade_lab.precision_bounds import PrecisionBounds
from cascade_lab.rejector import Rejector
from cascade_lab.spec_order import OF_LAST, check_order, check_stage_name
from cascade_lab.text import exact, printable, shorten

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib


@dataclass(frozen=True)
class StageSpec:
    """One stage: a fine-tuned BERT classifier and its role in the cascade.

    A stage with a `pass_label` is a gate. It passes a text on to the next stage if `probability(pass_label) >=
    threshold`; otherwise it answers with its most probable other label. A stage with the `role` "deferral" answers
    with its most probable label if its confidence is at least `threshold`; otherwise the text goes on to the next
    stage. The last stage answers with its most probable label or, where its confidence is below `min_probability`,
    with `reject_label`. The confidence is that label's probability, or what the `rejector` computes.
    `min_probabilities` gives single labels a minimum of their own. Probabilities are the softmax of the logits divided
    by `temperature`, or of the logits that the `calibrator` gives.

    `engine` is "fast", or "reference" for bert-tensorflow's own graph; `precision` is "float32" or, for the fast
    engine, "bfloat16" or "mixed": bfloat16, and again float32 for the texts whose decision could differ (see
    `precision_bounds`). A stage without `init_checkpoint` was scored elsewhere: its logits are known
    (`Run.from_logits`), and it cannot be loaded.
    """

    name: str
    labels: tuple[str, ...]
    init_checkpoint: Path | None = None
    bert_config_file: Path | None = None
    vocab_file: Path | None = None
    do_lower_case: bool = True
    max_seq_length: int = 128
    role: str = ""
    pass_label: str | None = None
    threshold: float | None = None
    min_probability: float | None = None
    min_probabilities: Mapping[str, float] = field(default_factory=dict)
    reject_label: str | None = None
    rejector: Rejector | None = None
    temperature: float = 1.0
    calibrator: Calibrator | None = None
    engine: str = "fast"
    precision: str = "float32"
    precision_bounds: PrecisionBounds | None = None
    output_weights: str = "output_weights"
    output_bias: str = "output_bias"

    def __post_init__(self) -> None:
        """Set the role that follows from `pass_label` where none is given: a key of `decisions.ROLES`."""
        if not self.role:
            object.__setattr__(self, "role", "final" if self.pass_label is None else "gate")

    def __repr__(self) -> str:
        threshold = exact(self.min_probability if self.role == "final" else self.threshold)
        return printable(f"<StageSpec {self.name}: {self.role}, {len(self.labels)} labels, threshold {threshold}>")

    def _repr_html_(self) -> str:
        return stage_html(self)

    @property
    def is_gate(self) -> bool:
        return self.role == "gate"

    @property
    def is_deferral(self) -> bool:
        return self.role == "deferral"

    @property
    def reject_labels(self) -> tuple[str, ...]:
        """The labels with which this stage itself rejects; none of a deferral stage, whose labels are answers."""
        if self.is_gate:
            return tuple(label for label in self.labels if label != self.pass_label)
        return () if self.reject_label is None else (self.reject_label,)


@dataclass(frozen=True)
class CascadeSpec:
    """A cascade: stages in series. Every stage but the last is a gate or a deferral stage.

    `tuned_on` records what the thresholds were tuned on, and `calibrated_on` what each stage's temperature or
    calibrator was fitted on: the tables `[tuned_on]` and `[calibrated_on.<stage>]` of the file.
    """

    name: str
    stages: tuple[StageSpec, ...]
    tuned_on: Mapping[str, Any] | None = None
    calibrated_on: Mapping[str, Mapping[str, Any]] | None = None

    def __repr__(self) -> str:
        stages = ", ".join(f"{name} {exact(value)}" for name, value in self.thresholds.items())
        return printable(f"<CascadeSpec {self.name}: stages and thresholds {stages}>")

    def _repr_html_(self) -> str:
        return spec_html(self)

    @classmethod
    def read(cls, path: str | Path) -> CascadeSpec:
        """Read and validate a `cascade.toml`; paths in it are relative to the file.

        Raises
        ------
        SpecError
            Naming the file, the stage and the key at fault.
        """
        path = Path(path)
        try:
            text = _read_text(path)
        except OSError as error:
            raise SpecError(f"{path}: cannot be read ({error.strerror}); give a cascade.toml") from error
        except UnicodeDecodeError as error:
            raise SpecError(f"{path}: byte {error.start} is not UTF-8; save the file as UTF-8") from error
        if _DEEP_KEY.search(text):
            raise SpecError(f"{path}: not TOML of a cascade: a key has more than {_MAX_DEPTH} parts; fix it there")
        try:
            content = tomllib.loads(text)
        except tomllib.TOMLDecodeError as error:
            raise SpecError(f"{path}: not TOML: {error}; fix it there") from error
        except RecursionError as error:
            raise SpecError(f"{path}: not TOML of a cascade: too deeply nested; fix it there") from error
        except (ValueError, OverflowError) as error:  # an integer of thousands of digits, a date that does not exist
            raise SpecError(f"{path}: not TOML: {str(error).partition(';')[0]}; fix it there") from error
        _check_values(content, str(path))
        return cls.from_dict(content, where=str(path), folder=path.parent)

    @classmethod
    def from_dict(cls, content: Mapping[str, Any], *, where: str = "cascade", folder: Path = Path()) -> CascadeSpec:
        """Build a spec from what a `cascade.toml` holds (or from `to_dict`); `folder` anchors its paths."""
        known = [field.name for field in fields(StageSpec)]
        common = {key: value for key, value in content.items() if key not in _TOP}
        _refuse_unknown(common, [key for key in known if key not in ("name", "role")] + [*_TOP], where)
        name = content.get("name", folder.resolve().name)
        if not isinstance(name, str):
            raise SpecError(f"{where}: name must be a string, not {name!r}")
        tuned_on, calibrated_on = content.get("tuned_on"), content.get("calibrated_on")
        check_tuned_on(tuned_on, where)
        check_calibrated_on(calibrated_on, where)
        tables = content.get("stage", [])
        if not isinstance(tables, list) or not tables or not all(isinstance(t, Mapping) for t in tables):
            raise SpecError(f"{where}: has no stage; add one [[stage]] table for each")
        stages = []
        for number, table in enumerate(tables, 1):
            here = f"{where}: stage '{shorten(printable(str(table.get('name', number))), 80)}'"
            _refuse_unknown(table, known, here)
            # Keys at the top go to every stage that can have them: a gate's keys not to the last stage, and vice versa.
            role = "final" if number == len(tables) else str(table.get("role", "gate"))
            shared = {key: value for key, value in common.items() if _fits(key, role)}
            stages.append(_stage({**shared, **table}, here, folder))
        check_order(stages, where)
        return cls(name=name, stages=tuple(stages), tuned_on=tuned_on, calibrated_on=calibrated_on)

    def to_dict(self) -> dict[str, Any]:
        """Return plain data with absolute paths, as `from_dict` takes and a manifest keeps."""
        stages = [
            {
                key: str(value.resolve()) if isinstance(value, Path) else value
                for key, value in asdict(stage).items()
                if value is not None and value != {}
            }
            for stage in self.stages
        ]
        for stage, spec in zip(stages, self.stages, strict=True):
            stage["labels"] = list(stage["labels"])
            if not spec.is_deferral:  # the other roles follow from pass_label
                del stage["role"]
            if spec.rejector is not None:
                stage["rejector"] = spec.rejector.to_dict()
            if spec.calibrator is not None:
                stage["calibrator"] = spec.calibrator.to_dict()
            if spec.precision_bounds is not None:
                stage["precision_bounds"] = spec.precision_bounds.to_dict()
        sources = {"tuned_on": self.tuned_on, "calibrated_on": self.calibrated_on}
        known = {key: dict(source) for key, source in sources.items() if source is not None}
        return {"name": self.name, **known, "stage": stages}

    def write(self, path: str | Path) -> None:
        """Write a `cascade.toml` that `read` takes. Paths in it are relative to its folder.

        Raises
        ------
        SpecError
            The file cannot be written; what was there before is still there.
        """
        path, content = Path(path), self.to_dict()
        content["stage"] = [{key: s[key] for key in (*_FIRST, *s) if key in s} for s in content["stage"]]
        for stage in content["stage"]:
            for key in (*_PATHS, "arrays"):
                for table in (stage, stage.get("rejector", {})):
                    if key in table:
                        table[key] = Path(os.path.relpath(table[key], path.parent.resolve())).as_posix()
        write_text(path, tomli_w.dumps(_without_null(content), multiline_strings=False), error=SpecError)

    @property
    def last(self) -> StageSpec:
        return self.stages[-1]

    @property
    def rejector(self) -> Rejector | None:
        """The last stage's rejector."""
        return self.last.rejector

    @property
    def feature_evidence(self) -> tuple[str, ...]:
        """The scores of features, `<stage>.<score>`, that the rejectors of all stages need."""
        rejectors = [stage.rejector for stage in self.stages if stage.rejector is not None]
        return tuple(dict.fromkeys(name for rejector in rejectors for name in rejector.feature_evidence))

    @property
    def feature_stages(self) -> tuple[str, ...]:
        """The stages whose features the rejectors of all stages need."""
        return tuple(dict.fromkeys(name.rpartition(".")[0] for name in self.feature_evidence))

    @property
    def arrays_sha256(self) -> str | None:
        """The SHA-256 of the file of arrays that all rejectors with scores of features share."""
        digests = (stage.rejector.arrays_sha256 for stage in self.stages if stage.rejector is not None)
        return next((digest for digest in digests if digest is not None), None)

    def read_arrays(self) -> dict[str, np.ndarray]:
        """Read what the rejectors' scores of features need; see `Rejector.read_arrays`."""
        rejectors = [stage.rejector for stage in self.stages if stage.rejector is not None]
        return {name: values for rejector in rejectors for name, values in rejector.read_arrays().items()}

    @property
    def reject_labels(self) -> tuple[str, ...]:
        """Every label with which some stage rejects, in the order of the stages."""
        return tuple(dict.fromkeys(label for stage in self.stages for label in stage.reject_labels))

    @property
    def in_scope_labels(self) -> tuple[str, ...]:
        """The last stage's labels, without those that reject."""
        rejects = set(self.reject_labels)
        return tuple(label for label in self.last.labels if label not in rejects)

    @property
    def labels(self) -> tuple[str, ...]:
        """Every label that the cascade can answer: the labels in scope, then those that reject."""
        return self.in_scope_labels + self.reject_labels

    def stage(self, name: str) -> StageSpec:
        """Return the stage of that name; raises SpecError naming the nearest."""
        for stage in self.stages:
            if stage.name == name:
                return stage
        raise SpecError(f"no stage is named '{name}'{did_you_mean(name, [s.name for s in self.stages])}")

    @property
    def thresholds(self) -> dict[str, float | None]:
        """Each stage's `threshold`, or the last stage's `min_probability`; None where it has none."""
        return {s.name: s.min_probability if s.role == "final" else s.threshold for s in self.stages}

    def with_thresholds(self, thresholds: Mapping[str, float]) -> CascadeSpec:
        """Return this cascade at other thresholds. A stage that is not named keeps its own.

        Parameters
        ----------
        thresholds : mapping of str to float
            Stage name to its `threshold`, or to the last stage's `min_probability`, in [0, 1].

        Raises
        ------
        SpecError
            An unknown stage, a number outside [0, 1], or a `min_probability` without a `reject_label`.
        """
        for name in thresholds:
            self.stage(name)
        stages = []
        for stage in self.stages:
            if stage.name in thresholds:
                key = "min_probability" if stage.role == "final" else "threshold"
                value = _number(thresholds[stage.name], f"stage '{stage.name}'", key)
                changed: dict[str, Any] = {key: value}
                stage = replace(stage, **changed)
            stages.append(stage)
        check_order(stages, self.name)
        return replace(self, stages=tuple(stages))


# In a written file these come before the labels, which may be many lines.
_FIRST = ("name", "role", "pass_label", "threshold", "min_probability", "reject_label", "temperature")
_TOP = ("name", "tuned_on", "calibrated_on", "stage")
_PATHS = ("init_checkpoint", "bert_config_file", "vocab_file")
_TYPES = {"do_lower_case": bool, "max_seq_length": int}
_CHOICES = {
    "engine": ("fast", "reference"),
    "precision": ("float32", "bfloat16", "mixed"),
    "role": ("gate", "deferral", "final"),
}
_MAX_DEPTH = 32  # of tables and keys; a cascade.toml needs 3
_MAX_BYTES = 8 * 2**20
_KEY_PART = r"""(?:[A-Za-z0-9_-]+|"(?:[^"\\\n]|\\.)*"|'[^'\n]*')[ \t]*"""
_DEEP_KEY = re.compile(rf"(?:^|[{{,\[])[ \t]*(?:{_KEY_PART}\.[ \t]*){{{_MAX_DEPTH}}}", re.MULTILINE)


def _fits(key: str, role: str) -> bool:
    """Return whether a stage of that role can take a key that stands at the top of the file."""
    other = {"final": ("pass_label", "threshold"), "deferral": ("pass_label", *OF_LAST)}
    return key not in other.get(role, OF_LAST)


def _refuse_unknown(table: Mapping[str, Any], known: list[str], where: str) -> None:
    for key in table:
        if key not in known:
            raise SpecError(f"{where}: unknown key '{key}'{did_you_mean(key, known)}")


def _stage(table: Mapping[str, Any], where: str, folder: Path) -> StageSpec:
    required = ("name", "labels", *(_PATHS if "init_checkpoint" in table else ()))
    for key in required:
        if key not in table:
            raise SpecError(f"{where}: {key} is missing; add it to the stage, or once at the top of the file")
    values: dict[str, Any] = {}
    for key, value in table.items():
        if key in ("threshold", "min_probability"):
            values[key] = _number(value, where, key)
        elif key == "min_probabilities":
            if not isinstance(value, Mapping):
                raise SpecError(f"{where}: min_probabilities must be a table of label to number, not {value!r}")
            values[key] = {
                label: _number(minimum, where, f"min_probabilities.{label}") for label, minimum in value.items()
            }
        elif key == "temperature":
            if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < math.inf:
                raise SpecError(f"{where}: temperature is {value!r}; it must be a number above 0")
            values[key] = float(value)
        elif key == "labels":
            values[key] = _labels(value, where, folder)
        elif key == "rejector":
            values[key] = Rejector.from_dict(value, where=where, folder=folder)
        elif key == "calibrator":
            values[key] = Calibrator.from_dict(value, where=where)
        elif key == "precision_bounds":
            values[key] = PrecisionBounds.from_dict(value, where=where)
        elif type(value) is not _TYPES.get(key, str):
            expected = {bool: "true or false", int: "a whole number", str: "a string"}[_TYPES.get(key, str)]
            raise SpecError(f"{where}: {key} must be {expected}, not {value!r}")
        else:
            values[key] = _path(value, f"{where}: {key}", folder) if key in _PATHS else value
        if key in _CHOICES and value not in _CHOICES[key]:
            raise SpecError(f"{where}: {key} is {value!r}; it is one of {', '.join(_CHOICES[key])}")
    stage = StageSpec(**values)
    if stage.engine == "reference" and stage.precision != "float32":
        raise SpecError(
            f'{where}: precision is "{stage.precision}", but the reference engine computes in float32 only; set '
            'engine = "fast", or precision = "float32"'
        )
    check_stage_name(stage.name, where)
    if stage.max_seq_length < 3:
        raise SpecError(f"{where}: max_seq_length is {stage.max_seq_length}; [CLS], a token and [SEP] take 3")
    if stage.pass_label is not None and stage.pass_label not in stage.labels:
        near = did_you_mean(stage.pass_label, list(stage.labels))
        raise SpecError(f"{where}: pass_label '{stage.pass_label}' is not one of its labels{near}")
    for label in stage.min_probabilities:
        if label not in stage.labels:
            near = did_you_mean(label, list(stage.labels))
            raise SpecError(f"{where}: min_probabilities names '{label}', which is not one of its labels{near}")
    check_calibrator(stage, where)
    return stage


def _number(value: Any, where: str, key: str) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value <= 1:
        raise SpecError(f"{where}: {key} is {value!r}; it must be a number from 0 to 1")
    return float(value)


def _read_text(path: Path) -> str:
    """Read a small UTF-8 file, without its byte-order mark, and with \\n as its only line break."""
    try:
        with path.open("rb") as file:
            content = file.read(_MAX_BYTES + 1)
    except ValueError as error:  # a NUL in the name
        raise SpecError(f"{str(path)!r}: cannot be read ({error}); give the name of a file") from error
    if len(content) > _MAX_BYTES:
        raise SpecError(f"{path}: is larger than {_MAX_BYTES // 2**20} MiB; give a smaller file")
    return content.decode("utf-8-sig").replace("\r\n", "\n").replace("\r", "\n")


def _check_values(content: Any, where: str) -> None:
    """Refuse what TOML does not promise: integers beyond 64 bits, and nesting that exhausts Python's stack."""
    values = [(content, 0)]
    while values:
        value, depth = values.pop()
        if depth > _MAX_DEPTH:
            raise SpecError(f"{where}: is nested more than {_MAX_DEPTH} deep; fix it there")
        if isinstance(value, dict | list):
            values.extend((one, depth + 1) for one in (value.values() if isinstance(value, dict) else value))
        elif isinstance(value, int) and not -(2**63) <= value < 2**63:
            raise SpecError(f"{where}: an integer has more than 64 bits; fix it there")


def _path(value: Any, where: str, folder: Path) -> Path:
    """Return a path of the file; `~` is a user's home."""
    if "\0" in str(value):
        raise SpecError(f"{where} is {value!r}; the name of a file contains no NUL character")
    try:
        return folder / Path(str(value)).expanduser()
    except RuntimeError as error:
        raise SpecError(f"{where} is '{value}', but there is no such user; write the whole path") from error


def _labels(value: Any, where: str, folder: Path) -> tuple[str, ...]:
    """Take the labels from a list, or from a file with one label per line."""
    if isinstance(value, str):
        path = _path(value, f"{where}: labels", folder)
        try:
            # Only a line break ends a label: str.splitlines would also split at form feeds and U+2028.
            labels = [line.strip() for line in _read_text(path).rstrip().split("\n")]
        except OSError as error:
            raise SpecError(f"{where}: labels file {path} cannot be read ({error.strerror})") from error
        except UnicodeDecodeError as error:
            raise SpecError(f"{where}: labels file {path}: byte {error.start} is not UTF-8") from error
    elif isinstance(value, list) and all(isinstance(label, str) for label in value):
        labels = value
    else:
        raise SpecError(f"{where}: labels must be a list of strings, or the name of a file with one label per line")
    seen: set[str] = set()
    for number, label in enumerate(labels, 1):
        if not label:
            raise SpecError(f"{where}: label {number} is empty; give every class a name")
        if label in seen:
            raise SpecError(f"{where}: label '{label}' occurs twice; give every class its own name")
        seen.add(label)
    if len(labels) < 2:
        raise SpecError(f"{where}: a classifier needs at least 2 labels, not {len(labels)}")
    return tuple(labels)


def _without_null(value: Any) -> Any:
    """Leave out what is None, in tables of tables too: TOML has no null."""
    if isinstance(value, Mapping):
        return {key: _without_null(part) for key, part in value.items() if part is not None}
    if isinstance(value, list | tuple):
        return [_without_null(part) for part in value if part is not None]
    return value

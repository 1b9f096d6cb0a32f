"""A run: examples, logits and predictions as tables, in memory or in a directory, replayed at other thresholds."""

from __future__ import annotations

import json
import secrets
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from datetime import datetime, timezone
from functools import cached_property, partial
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias, TypeVar

import numpy as np
import pandas as pd

from cascade_lab.atomic import UNFINISHED, check_directory, whole_directory, write_json
from cascade_lab.decisions import StageDecision, check_labels, decide, require_scored, route, stage_targets
from cascade_lab.evalset import EvalSet
from cascade_lab.exceptions import RunError, did_you_mean
from cascade_lab.logits import check_logits
from cascade_lab.provenance import environment, sha256
from cascade_lab.run_tables import (
    TIMING_COLUMNS,
    examples_frame,
    predictions_frame,
    read_examples,
    read_frame,
    read_scores,
    upgrade_manifest,
    write_tables,
)
from cascade_lab.spec import CascadeSpec

SCHEMA_VERSION = 2
SOURCES = ("evaluation", "service", "batch", "logits")

T = TypeVar("T")
Lazy: TypeAlias = T | Callable[[], T]
"""A value, or a function that returns it, which is called when the value is first needed."""


class StageScores(NamedTuple):
    """What one stage computed for the examples of a run.

    Attributes
    ----------
    logits : ndarray of float32, shape (n_examples, n_labels)
        A row of NaN where the stage did not score the example.
    scored : ndarray of bool, shape (n_examples,)
    shadow : ndarray of bool, shape (n_examples,)
        Scored outside the serial path, because an earlier stage had stopped the example.
    """

    logits: np.ndarray
    scored: np.ndarray
    shadow: np.ndarray


class Run:
    """What a cascade computed for some examples, and where that comes from.

    Make one with `Cascade.run`, `Run.read` or `Run.from_logits`. Each argument but `manifest` may be a function without
    arguments that returns the value; it is called when the value is first needed.

    Parameters
    ----------
    manifest : mapping
        The content of `manifest.json`: `run_id`, `source`, `cascade` (the whole spec), `evalset`, digests, versions.
    examples : DataFrame
        One row per example: `example_id`, `text`, `text_b`, `label` (None where unknown), and further columns of the
        input.
    scores : mapping of str to StageScores
        Stage name to what the stage computed, rows as in `examples`.
    predictions : DataFrame
        One row per example: `example_id`, `label`, `predicted`, `decided_by` (stage), `probability`, `confidence`.
    timings : DataFrame
        One row per batch of a stage; `tokenize_seconds` and `run_seconds` are for the whole batch. Empty where nothing
        was timed.
    directory : path, optional
        Where the run was read from; None for a run in memory.
    name : str, optional
        For titles and messages; by default the directory, or the run id.
    """

    def __init__(
        self,
        manifest: Mapping[str, Any],
        examples: Lazy[pd.DataFrame],
        scores: Mapping[str, Lazy[StageScores]],
        predictions: Lazy[pd.DataFrame],
        timings: Lazy[pd.DataFrame],
        *,
        directory: Path | None = None,
        name: str | None = None,
    ):
        self.manifest = dict(manifest)
        self.directory = directory
        self.name = name or (str(directory) if directory else f"run {self.manifest['run_id']}")
        self._given = {"examples": examples, "predictions": predictions, "timings": timings}
        self._scores = dict(scores)
        self._decisions: dict[str, StageDecision] = {}

    @classmethod
    def read(cls, directory: str | Path) -> Run:
        """Open a run directory. Its tables are read when they are first needed.

        Raises
        ------
        RunError
            No such directory, not a run, an unfinished one, or one of an unknown schema version.
        """
        path = Path(directory)
        if not path.is_dir():
            raise RunError(f"{directory}: no such run directory; make one with `cascade-lab run`")
        if path.name.endswith(UNFINISHED):
            raise RunError(f"{directory}: an unfinished run, left by a crash; delete it and run again")
        manifest = _read_json(path / "manifest.json", path)
        version = manifest.get("schema_version")
        if version not in (1, SCHEMA_VERSION):
            raise RunError(
                f"{directory}: has schema version {version}, and this package reads 1 and {SCHEMA_VERSION}; run again"
            )
        if version == 1:
            manifest = upgrade_manifest(manifest)
        names = [stage["name"] for stage in manifest["cascade"]["stage"]]
        run: Run = cls(
            manifest,
            examples=lambda: read_examples(path),
            scores={
                name: partial(lambda stage: StageScores(*read_scores(path, stage, run.examples, run.spec)), name)
                for name in names
            },
            predictions=lambda: _with_confidence(read_frame(path / "predictions.parquet"), run),
            timings=lambda: read_frame(path / "timings.parquet"),
            directory=path,
        )
        return run

    @classmethod
    def from_logits(
        cls,
        cascade: CascadeSpec | str | Path,
        examples: pd.DataFrame | EvalSet,
        logits: Mapping[str, np.ndarray],
        *,
        probabilities: bool = False,
        inputs: Mapping[str, str] | None = None,
    ) -> Run:
        """Make a run from logits that were computed elsewhere; nothing is scored here.

        Parameters
        ----------
        cascade : CascadeSpec or path
            Its stages may lack `init_checkpoint`, `bert_config_file` and `vocab_file`.
        examples : DataFrame or EvalSet
            With a column `text`, and `label` where labels are known (None where not).
        logits : mapping of str to array, shape (n_examples, n_labels)
            Stage name to its logits; rows as in `examples`, columns as the stage's labels. A row of NaN, or one that a
            masked array masks, was not scored by the stage.
        probabilities : bool
            The arrays hold probabilities; their natural logarithms are kept as logits.
        inputs : mapping of str to str, optional
            File name to SHA-256, for the manifest.

        Raises
        ------
        RunError
            An unknown or missing stage, another number of rows or columns, NaN inside a row, infinity, probabilities
            given as logits, or an example that reaches a stage that did not score it.
        EvalSetError
            A label that is not an answer of the cascade.

        Examples
        --------
        >>> from cascade_lab import StageSpec
        >>> gate = StageSpec("gate", ("oos", "in"), pass_label="in", threshold=0.5)
        >>> topic = StageSpec("topic", ("pay", "play"))
        >>> examples = pd.DataFrame({"text": ["a bill", "a song", "hello"], "label": ["pay", "play", "oos"]})
        >>> logits = {"gate": [[0, 2], [0, 1], [3, 0]], "topic": [[2, 0], [1, 0], [np.nan, np.nan]]}
        >>> run = Run.from_logits(CascadeSpec("example", (gate, topic)), examples, logits)
        >>> run.predictions["predicted"].tolist()
        ['pay', 'pay', 'oos']
        """
        spec = cascade if isinstance(cascade, CascadeSpec) else CascadeSpec.read(cascade)
        evalset = examples if isinstance(examples, EvalSet) else EvalSet.from_frame(examples, unlabelled=True)
        check_labels(spec, evalset.examples, evalset.locations)
        names = [stage.name for stage in spec.stages]
        for name in logits:
            if name not in names:
                raise RunError(f"logits of stage '{name}': the cascade has no such stage{did_you_mean(name, names)}")
        scores = {}
        for stage in spec.stages:
            if stage.name not in logits:
                raise RunError(f"stage '{stage.name}' has no logits; give an array for it (rows of NaN: not scored)")
            checked = check_logits(stage, logits[stage.name], len(evalset), probabilities=probabilities)
            scored = ~np.isnan(checked[:, 0])
            scores[stage.name] = StageScores(checked, scored, np.zeros(len(checked), dtype=bool))
        started = datetime.now(timezone.utc)
        manifest = {
            "schema_version": SCHEMA_VERSION,
            "run_id": new_run_id(started),
            "source": "logits",
            "cascade": spec.to_dict(),
            "evalset": evalset.origin,
            "inputs": dict(inputs or {}),
            "contents": {},
            "stages": {},
            "started": started.isoformat(timespec="seconds"),
            **environment(),
        }
        empty = pd.DataFrame(columns=list(TIMING_COLUMNS)).astype(TIMING_COLUMNS)
        run = cls(manifest, examples_frame(evalset.examples), scores, pd.DataFrame(), empty)
        return run.with_spec(spec)

    def __repr__(self) -> str:
        stages = ", ".join(stage.name for stage in self.spec.stages)
        return f"<Run {self.name}: {len(self.examples):,} examples, stages {stages}>"

    @cached_property
    def spec(self) -> CascadeSpec:
        return CascadeSpec.from_dict(self.manifest["cascade"], where=f"{self.name} manifest.json")

    @cached_property
    def examples(self) -> pd.DataFrame:
        """One row per example: `example_id`, `text`, `text_b`, `label`, and the input's other columns."""
        return _value(self._given["examples"])

    @cached_property
    def predictions(self) -> pd.DataFrame:
        """One row per example: `example_id`, `label`, `predicted`, `decided_by`, `probability`, `confidence`."""
        return _value(self._given["predictions"])

    @cached_property
    def timings(self) -> pd.DataFrame:
        """One row per batch of a stage; `tokenize_seconds` and `run_seconds` are for the whole batch."""
        return _value(self._given["timings"])

    @cached_property
    def metrics(self) -> dict[str, Any]:
        """The content of `metrics.json`: metrics per stage and end to end, on the labelled examples."""
        from cascade_lab.analysis.metrics import summarize  # analysis computes on runs: not at import time

        return summarize(self)

    @cached_property
    def labelled(self) -> Run:
        """The same run with the labelled examples only; itself where all of them are labelled.

        Raises
        ------
        RunError
            No example has a label.
        """
        is_labelled = self.examples["label"].notna().to_numpy()
        if is_labelled.all() and len(is_labelled):
            return self
        if not is_labelled.any():
            raise RunError(f"{self.name}: no example has a label, and this needs some; add a column 'label'")
        return self.select(np.flatnonzero(is_labelled))

    def scores(self, stage: str) -> StageScores:
        """Return the logits of `stage`, and which examples it scored."""
        if stage not in self._scores:
            self.spec.stage(stage)  # names the nearest stage
        scores = self._scores[stage] = _value(self._scores[stage])
        return scores

    def decision(self, stage: str) -> StageDecision:
        """Return what `stage` decides about every example that it scored, at the run's own thresholds."""
        if stage not in self._decisions:
            self._decisions[stage] = decide(self.spec.stage(stage), self.scores(stage).logits)
        return self._decisions[stage]

    def targets(self, stage: str) -> np.ndarray:
        """Return what `stage` should decide about each example: shape (n,), see `decisions.stage_targets`."""
        explicit = self.examples.get(f"{stage}_label")
        return stage_targets(self.spec, stage, self.examples["label"], explicit=explicit)

    def replay(self, thresholds: Mapping[str, float] | None = None) -> pd.DataFrame:
        """Return what the cascade would answer at other thresholds, from the kept logits.

        Parameters
        ----------
        thresholds : mapping of str to float, optional
            Stage name to a gate's `threshold`, or to the last stage's `min_probability`. A stage that is not
            named keeps its own.

        Returns
        -------
        DataFrame
            The columns of `predictions`, in the order of `examples`.

        Raises
        ------
        SpecError
            A threshold outside [0, 1], or for no stage.
        RunError
            An example would reach a stage that never scored it (the run was made without shadow scores).
        """
        return self.with_thresholds(thresholds).predictions

    def with_thresholds(self, thresholds: Mapping[str, float] | None) -> Run:
        """Return this run as its cascade would have made it at other thresholds; see `replay`."""
        return self.with_spec(self.spec.with_thresholds(thresholds or {}))

    def with_spec(self, spec: CascadeSpec) -> Run:
        """Return this run as the cascade `spec` would have made it, from the kept logits.

        `spec` has the same stages with the same labels; thresholds, reject labels and temperatures may differ.
        Timings stay those of the live run.

        Raises
        ------
        RunError
            An example would reach a stage that never scored it.
        """
        decisions = {}
        for stage, own in zip(spec.stages, self.spec.stages, strict=True):
            same_scores = (stage.temperature, stage.labels, stage.role) == (own.temperature, own.labels, own.role)
            decisions[stage.name] = (
                self.decision(stage.name).with_threshold(stage)
                if same_scores and stage.pass_label == own.pass_label
                else decide(stage, self.scores(stage.name).logits)
            )
        routed = require_scored(route(spec, decisions), self.name)
        predictions = predictions_frame(self.examples, routed.frame())
        scores = {
            name: scores._replace(shadow=scores.scored & ~routed.reached[name])
            for name, scores in ((name, self.scores(name)) for name in decisions)
        }
        manifest = {
            **self.manifest,
            "cascade": spec.to_dict(),
            "thresholds": spec.thresholds,
            "tuned_on": spec.tuned_on,
        }
        run = Run(manifest, self.examples, scores, predictions, lambda: self.timings, name=self.name)
        run.spec = spec
        run._decisions = decisions
        return run

    def select(self, rows: np.ndarray) -> Run:
        """Return a run of some examples: `rows` are their places in `examples`. Timings stay those of the whole run."""
        scores: dict[str, Lazy[StageScores]] = {
            stage.name: partial(lambda name: StageScores(*(values[rows] for values in self.scores(name))), stage.name)
            for stage in self.spec.stages
        }
        run = Run(
            self.manifest,
            lambda: self.examples.iloc[rows].reset_index(drop=True),
            scores,
            lambda: self.predictions.iloc[rows].reset_index(drop=True),
            lambda: self.timings,
            name=self.name,
        )
        run.spec = self.spec
        run._decisions = {name: decision.take(rows) for name, decision in self._decisions.items()}
        return run

    def write(self, output: str | Path, *, overwrite: bool = False) -> Run:
        """Write the run directory `output`, whole or not at all, and return it opened.

        Raises
        ------
        RunError
            `output` exists already, or cannot be written.
        """
        with unfinished_run(output, overwrite=overwrite) as directory:
            self.write_into(directory)
        return Run.read(output)

    def write_into(self, directory: Path) -> None:
        """Write the tables, the manifest and the metrics into an empty directory (that of `unfinished_run`)."""
        scores = {stage.name: self.scores(stage.name) for stage in self.spec.stages}
        contents = write_tables(directory, self.examples, scores, self.predictions, self.timings)
        write_json(directory / "manifest.json", {**self.manifest, "contents": contents}, error=RunError)
        if self.examples["label"].notna().any():
            write_json(directory / "metrics.json", self.metrics, error=RunError)

    def check(self) -> None:
        """Raise RunError where a table of the directory is missing, or differs from its SHA-256 in the manifest."""
        for name, digest in self.manifest["contents"].items():
            path = Path(self.directory or "") / name
            try:
                same = sha256(path) == digest
            except OSError as error:
                raise RunError(f"{path}: cannot be read ({error.strerror}); run again") from error
            if not same:
                raise RunError(
                    f"{path}: changed since the run (its SHA-256 is not the one in manifest.json); "
                    "put the file back, or run again"
                )


_DIRECTORY: Any = {"marker": "manifest.json", "what": "run", "error": RunError}


def check_run_output(output: str | Path, *, overwrite: bool) -> None:
    """Raise RunError if a run cannot be written to `output`: something is there that may not be replaced."""
    check_directory(output, overwrite=overwrite, **_DIRECTORY)


def unfinished_run(output: str | Path, *, overwrite: bool = False) -> AbstractContextManager[Path]:
    """Give a directory to fill, which becomes the run `output` whole or not at all: see `whole_directory`."""
    return whole_directory(output, overwrite=overwrite, **_DIRECTORY)


def new_run_id(started: datetime) -> str:
    """Return a new run id: the time, and some random letters."""
    return f"{started:%Y%m%dT%H%M%SZ}-{secrets.token_hex(3)}"


def _value(lazy: Lazy[T]) -> T:
    return lazy() if callable(lazy) else lazy


def _read_json(path: Path, directory: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise RunError(f"{directory}: not a run directory (it has no {path.name}); give one") from error
    except (OSError, ValueError) as error:
        raise RunError(f"{path}: cannot be read ({error}); run again") from error
    if not isinstance(content, dict):
        raise RunError(f"{path}: is not a JSON object; run again")
    return content


def _with_confidence(predictions: pd.DataFrame, run: Run) -> pd.DataFrame:
    """Return predictions with the column `confidence`, which schema version 1 lacks."""
    if "confidence" in predictions:
        return predictions
    confidence = np.full(len(predictions), np.nan)
    for stage in run.spec.stages:
        ends = (predictions["decided_by"] == stage.name).to_numpy()
        confidence[ends] = run.decision(stage.name).confidence[ends]
    return predictions.assign(confidence=confidence)

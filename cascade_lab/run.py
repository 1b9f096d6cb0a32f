"""A run: examples, logits and predictions as tables, in memory or in a directory, replayed at other thresholds."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from datetime import datetime, timezone
from functools import cached_property, partial
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias, TypeVar

import numpy as np
import pandas as pd

from cascade_lab.atomic import UNFINISHED, write_json
from cascade_lab.decisions import (
    FEATURES_ADVICE,
    StageDecision,
    check_labels,
    decide,
    decide_in_cascade,
    require_scored,
    route,
    stage_targets,
)
from cascade_lab.evalset import EvalSet
from cascade_lab.exceptions import RunError, did_you_mean
from cascade_lab.logits import check_logits
from cascade_lab.object_html import run_html
from cascade_lab.provenance import environment
from cascade_lab.rejector import feature_evidence
from cascade_lab.run_directory import new_run_id, unfinished_run
from cascade_lab.run_schema import SCHEMA_VERSION, check_digest, read_manifest
from cascade_lab.run_tables import (
    TIMING_COLUMNS,
    examples_frame,
    predictions_frame,
    read_evidence,
    read_examples,
    read_features,
    read_predictions,
    read_scores,
    read_timings,
    write_tables,
)
from cascade_lab.spec import CascadeSpec, StageSpec
from cascade_lab.stage_files import stage_table
from cascade_lab.text import printable

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
    rescored : ndarray of bool, shape (n_examples,), or None
        Of a stage with mixed precision. True: the logits are in float32; false: in bfloat16. At the run's own
        thresholds the decisions are those of float32, as far as the stage's `precision_bounds` hold. At other
        thresholds, a text near the new one may have bfloat16 logits only: its replayed decision is then that of
        bfloat16. None: the stage has one precision, or the run does not say.
    """

    logits: np.ndarray
    scored: np.ndarray
    shadow: np.ndarray
    rescored: np.ndarray | None = None

    def take(self, rows: np.ndarray) -> StageScores:
        """Return what the stage computed for some examples."""
        rescored = None if self.rescored is None else self.rescored[rows]
        return StageScores(self.logits[rows], self.scored[rows], self.shadow[rows], rescored)


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
    features : mapping of str to ndarray of float16, shape (n_examples, hidden), optional
        Stage name to its features, where they were kept; a row of NaN where the stage did not score the example.
    evidence : mapping of str to ndarray of float64, shape (n_examples,), optional
        The rejectors' scores of features, by `<stage>.<score>`.
    directory : path, optional
        Where the run was read from; None for a run in memory.
    name : str, optional
        For titles and messages; by default the directory, or the run id.

    Attributes
    ----------
    manifest, directory, name
        As given.
    spec : CascadeSpec
        The cascade, with its thresholds.
    examples, predictions, timings : DataFrame
        As described above. With `replay(thresholds)` the predictions are those at other thresholds.
    metrics : dict
        The content of `metrics.json`: metrics per stage and end to end, on the labelled examples.
    labelled : Run
        The same run with the labelled examples only.
    text_groups : ndarray of int, shape (n_examples,)
        The same number for equal texts.
    has_features : bool
        Whether the run kept the features of its stages.

    What each stage computed is returned by the methods `scores(stage)`, `decision(stage)`, `targets(stage)` and
    `features(stage)`.

    Examples
    --------
    >>> run = Run.read("runs/demo")                                  # doctest: +SKIP
    >>> run.predictions.query("label != predicted")                  # doctest: +SKIP
    >>> run.scores("gate").logits[:3]                                # doctest: +SKIP
    """

    def __init__(
        self,
        manifest: Mapping[str, Any],
        examples: Lazy[pd.DataFrame],
        scores: Mapping[str, Lazy[StageScores]],
        predictions: Lazy[pd.DataFrame],
        timings: Lazy[pd.DataFrame],
        *,
        features: Mapping[str, Lazy[np.ndarray]] | None = None,
        evidence: Lazy[Mapping[str, np.ndarray]] | None = None,
        directory: Path | None = None,
        name: str | None = None,
    ):
        self.manifest = dict(manifest)
        self.directory = directory
        self.name = printable(name or (str(directory) if directory else f"run {self.manifest['run_id']}"))
        self._given = {"examples": examples, "predictions": predictions, "timings": timings}
        self._scores = dict(scores)
        self._features = dict(features or {})
        self._evidence = evidence or {}
        self._decisions: dict[str, StageDecision] = {}
        self._targets: dict[str, np.ndarray] = {}

    @classmethod
    def read(cls, directory: str | Path) -> Run:
        """Open a run directory. Its tables are read when they are first needed.

        Raises
        ------
        RunError
            No such directory, not a run, an unfinished or damaged one, or one of an unknown schema version. A table
            that is damaged, or that is not the one in the manifest, raises when it is needed.
        """
        path = Path(directory)
        if not path.is_dir():
            raise RunError(f"{directory}: no such run directory; make one with `cascade-lab run`")
        if path.name.endswith(UNFINISHED):
            raise RunError(f"{directory}: an unfinished run, left by a crash; delete it and run again")
        manifest, spec = read_manifest(path)
        digests = manifest["contents"]
        run: Run = cls(
            manifest,
            examples=lambda: read_examples(path, digests, spec),
            scores={
                stage.name: partial(
                    lambda name: StageScores(*read_scores(path, name, digests, spec, run.examples)), stage.name
                )
                for stage in spec.stages
            },
            predictions=lambda: _with_confidence(read_predictions(path, digests, spec, run.examples), run),
            timings=lambda: read_timings(path, digests, spec, len(run.examples)),
            features={
                stage.name: partial(
                    lambda name: read_features(path, name, digests, spec, run.examples, run.scores(name).scored),
                    stage.name,
                )
                for stage in spec.stages
                if stage_table("features", stage.name, digests) in digests
            },
            evidence=lambda: read_evidence(path, digests, spec, run.examples, run.scores(spec.last.name).scored),
            directory=path,
        )
        run.spec = spec
        return run

    @classmethod
    def read_scores(cls, folder: str | Path) -> Run:
        """Open what `cascade-lab score --keep scores` kept as a run without labels. Tables are read when needed.

        Raises
        ------
        RunError
            No such job, it kept no scores, or no shard is done. A damaged part raises when it is needed.
        """
        from cascade_lab.batch.kept_run import read_scores  # it makes runs: not at import time

        return read_scores(folder)

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
        return printable(f"<Run {self.name}: {len(self.examples):,} examples, stages {stages}>")

    def _repr_html_(self) -> str:
        return run_html(self)

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
    def text_groups(self) -> np.ndarray:
        """A number for each example, the same for equal texts: int, shape (n,); see `duplicates.text_groups`."""
        from cascade_lab.analysis.duplicates import text_groups  # analysis computes on runs: not at import time

        return text_groups(self.examples)

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
            way_out = "collect with --labels" if self.manifest.get("source") == "service" else "add a column 'label'"
            raise RunError(f"{self.name}: no example has a label, and this needs some; {way_out}")
        return self.select(np.flatnonzero(is_labelled))

    def scores(self, stage: str) -> StageScores:
        """Return the logits of `stage`, and which examples it scored."""
        if stage not in self._scores:
            self.spec.stage(stage)  # names the nearest stage
        scores = self._scores[stage] = _value(self._scores[stage])
        return scores

    @property
    def has_features(self) -> bool:
        """Whether the run kept the features of its stages."""
        return bool(self._features)

    def features(self, stage: str) -> np.ndarray:
        """Return the last layer's output at `[CLS]`: float16, shape (n_examples, hidden); NaN where not scored.

        Raises
        ------
        RunError
            The run did not keep the features.
        """
        if stage not in self._features:
            self.spec.stage(stage)  # names the nearest stage
            raise RunError(f"{self.name}: has no features of stage '{stage}'; {FEATURES_ADVICE}")
        features = self._features[stage] = _value(self._features[stage])
        return features

    def evidence(self, spec: CascadeSpec) -> Mapping[str, np.ndarray]:
        """Return the scores of features of a cascade's rejectors: those that were kept, else from the features.

        Parameters
        ----------
        spec : CascadeSpec
            The same cascade, maybe with other rejectors.

        Returns
        -------
        mapping of str to ndarray of float64, shape (n_examples,)
            By `<stage>.<score>`.

        Raises
        ------
        RunError
            They were not kept, and neither were the features.
        """
        names = spec.feature_evidence
        if not names:
            return {}
        if self.spec.arrays_sha256 == spec.arrays_sha256:
            self._evidence = _value(self._evidence)
            if all(name in self._evidence for name in names):
                return self._evidence
        if all(stage.rejector is own.rejector for stage, own in zip(spec.stages, self.spec.stages, strict=True)):
            # A file is not read because a manifest names it.
            raise RunError(f"{self.name}: lacks {names[0]} of its rejector; run again")
        features = {stage: self.features(stage) for stage in spec.feature_stages}
        return feature_evidence(names, features, spec.read_arrays())

    def decision(self, stage: str) -> StageDecision:
        """Return what `stage` decides about every example that it scored, at the run's own thresholds."""
        if stage not in self._decisions:
            self._decisions[stage] = self._decide(self.spec, self.spec.stage(stage))
        return self._decisions[stage]

    def _decide(self, spec: CascadeSpec, stage: StageSpec, evidence: Mapping[str, np.ndarray] | None = None) -> Any:
        """Return what a stage of `spec` decides about every example that it scored."""
        if evidence is None:
            evidence = self.evidence(spec) if stage.rejector else {}
        needed = {stage.name, *(stage.rejector.stages if stage.rejector else ())}
        return decide_in_cascade(spec, stage, {name: self.scores(name).logits for name in needed}, evidence)

    def targets(self, stage: str) -> np.ndarray:
        """Return what `stage` should decide about each example: shape (n,), see `decisions.stage_targets`."""
        if stage not in self._targets:
            explicit = self.examples.get(f"{stage}_label")
            self._targets[stage] = stage_targets(self.spec, stage, self.examples["label"], explicit=explicit)
        return self._targets[stage]

    def replay(self, thresholds: Mapping[str, float] | None = None) -> pd.DataFrame:
        """Return what the cascade would answer at other thresholds, from the kept logits.

        Parameters
        ----------
        thresholds : mapping of str to float, optional
            Stage name to its `threshold`, or to the last stage's `min_probability`. A stage that is not named keeps
            its own.

        Returns
        -------
        DataFrame
            The columns of `predictions`, and after `example_id` the `text` (and `text_b`, where an example has one), in
            the order of `examples`.

        Raises
        ------
        SpecError
            A threshold outside [0, 1], or for no stage.
        RunError
            An example would reach a stage that never scored it (the run was made without shadow scores).
        """
        from cascade_lab.analysis.examples import with_texts  # analysis computes on runs: not at import time

        return with_texts(self, self.with_thresholds(thresholds or {}).predictions)

    def with_thresholds(self, thresholds: Mapping[str, float] | None) -> Run:
        """Return this run as its cascade would have made it at other thresholds (see `replay`); None: itself."""
        return self if thresholds is None else self.with_spec(self.spec.with_thresholds(thresholds))

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
        evidence = self.evidence(spec)
        for stage in spec.stages:
            is_same = _before_threshold(spec, stage.name) == _before_threshold(self.spec, stage.name)
            decisions[stage.name] = (
                self.decision(stage.name).with_threshold(stage) if is_same else self._decide(spec, stage, evidence)
            )
        return self._routed(spec, decisions, evidence)

    def with_confidence(
        self,
        spec: CascadeSpec,
        confidence: np.ndarray,
        *,
        evidence: Mapping[str, np.ndarray],
        stage: str | None = None,
    ) -> Run:
        """Return this run as `spec` would have made it with other confidences of one stage.

        Parameters
        ----------
        spec : CascadeSpec
            The same cascade, with another rejector and other thresholds.
        confidence : ndarray, shape (n_examples,)
            Such as what a rejector gives that was fitted without the text.
        evidence : mapping of str to ndarray
            As `Run` has it.
        stage : str, optional
            The last stage, by default, or a deferral stage.
        """
        changed = spec.last if stage is None else spec.stage(stage)
        others = [own for own in spec.stages if own is not changed]
        decisions = {own.name: self.decision(own.name).with_threshold(own) for own in others}
        decisions[changed.name] = decide(changed, self.scores(changed.name).logits, confidence=confidence)
        return self._routed(spec, decisions, evidence)

    def _routed(
        self, spec: CascadeSpec, decisions: dict[str, StageDecision], evidence: Mapping[str, np.ndarray]
    ) -> Run:
        """Return this run with the predictions of `spec`, from the decisions of its stages."""
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
        run = Run(
            manifest,
            self.examples,
            scores,
            predictions,
            lambda: self.timings,
            features=self._features,
            evidence=evidence,
            name=self.name,
        )
        run.spec = spec
        run._decisions = decisions
        return run

    def select(self, rows: np.ndarray) -> Run:
        """Return a run of some examples: `rows` are their places in `examples`. Timings stay those of the whole run."""
        scores: dict[str, Lazy[StageScores]] = {
            stage.name: partial(lambda name: self.scores(name).take(rows), stage.name) for stage in self.spec.stages
        }
        run = Run(
            self.manifest,
            lambda: self.examples.iloc[rows].reset_index(drop=True),
            scores,
            lambda: self.predictions.iloc[rows].reset_index(drop=True),
            lambda: self.timings,
            features={name: partial(lambda stage: self.features(stage)[rows], name) for name in self._features},
            evidence=lambda: {name: values[rows] for name, values in self.evidence(self.spec).items()},
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
            The run has no example, or `output` exists already or cannot be written.
        """
        if not len(self.examples):
            raise RunError(f"{self.name}: has no example, and such a run cannot be read; nothing was written")
        with unfinished_run(output, overwrite=overwrite) as directory:
            self.write_into(directory)
        return Run.read(output)

    def write_into(self, directory: Path) -> None:
        """Write the tables, the manifest and the metrics into an empty directory (that of `unfinished_run`)."""
        scores = {stage.name: self.scores(stage.name) for stage in self.spec.stages}
        contents = write_tables(
            directory,
            self.examples,
            scores,
            self.predictions,
            self.timings,
            features={name: self.features(name) for name in self._features},
            evidence=_value(self._evidence),
        )
        write_json(directory / "manifest.json", {**self.manifest, "contents": contents}, error=RunError)
        if self.examples["label"].notna().any():
            write_json(directory / "metrics.json", self.metrics, error=RunError)

    def check(self) -> None:
        """Read every table; raise RunError where one is missing or damaged, or differs from its digest."""
        if self.directory is None:
            return
        read = Run.read(self.directory)
        directory, digests, spec = self.directory, read.manifest["contents"], read.spec
        examples = read_examples(directory, digests, spec)
        for stage in spec.stages:  # nothing keeps the tables, so that one at a time is in memory
            read_scores(directory, stage.name, digests, spec, examples)
        read_predictions(directory, digests, spec, examples)
        read_timings(directory, digests, spec, len(examples))
        known = {"examples.parquet", "predictions.parquet", "timings.parquet"}
        known |= {stage_table("scores", stage.name, digests) for stage in spec.stages}
        for name, digest in digests.items():
            if name not in known:
                check_digest(directory, name, digest)


def _before_threshold(spec: CascadeSpec, name: str) -> tuple[Any, ...]:
    """Return what determines a stage's decision before its confidence is compared with a threshold."""
    stage = spec.stage(name)
    temperatures = tuple(s.temperature for s in spec.stages) if stage.rejector else ()
    of_stage = (stage.labels, stage.role, stage.pass_label, stage.temperature, stage.calibrator)
    return *of_stage, stage.rejector, stage.rejector and stage.reject_label, temperatures


def _value(lazy: Lazy[T]) -> T:
    return lazy() if callable(lazy) else lazy


def _with_confidence(predictions: pd.DataFrame, run: Run) -> pd.DataFrame:
    """Return predictions with the column `confidence`, which schema version 1 lacks."""
    if "confidence" in predictions:
        return predictions
    confidence = np.full(len(predictions), np.nan)
    for stage in run.spec.stages:
        ends = (predictions["decided_by"] == stage.name).to_numpy()
        confidence[ends] = run.decision(stage.name).confidence[ends]
    return predictions.assign(confidence=confidence)

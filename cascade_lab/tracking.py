"""Logs a run to MLflow or Weights & Biases: settings, metrics with intervals, digests, report and tables."""

from __future__ import annotations

import logging
import math
import os
import re
import shutil
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path, PurePath
from secrets import token_hex
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

from cascade_lab.analysis.latency import is_timed, stage_latencies
from cascade_lab.analysis.metrics import metric_intervals
from cascade_lab.analysis.summary import run_summary
from cascade_lab.exceptions import CascadeLabError, RunError, did_you_mean
from cascade_lab.provenance import package_version, sha256
from cascade_lab.stage_files import stage_file
from cascade_lab.text import printable, shorten

if TYPE_CHECKING:
    from cascade_lab.run import Run
    from cascade_lab.spec import StageSpec

T = TypeVar("T")

DIGEST = "cascade_lab.manifest_sha256"
"""The tag that says which run was logged: its manifest has the digests of everything else."""

_PLAIN_NAME = re.compile(r"\w[\w-]*")  # of a stage, in any script: both trackers take it in the name of a metric
_MAX_VALUE = 500  # characters; MLflow refuses more than 6000, and older servers more than 500
_WAYS_OUT = {
    "mlflow": "check --tracking-uri, such as http://localhost:5000 or sqlite:///mlflow.db",
    "wandb": "check --experiment, `wandb login`, or set WANDB_MODE=offline",
}
_MAX_WANDB_TAG = 64
_MLFLOW_BATCH = 100  # of parameters, of tags or of metrics in one request
_SETTINGS = (
    "role", "pass_label", "reject_label", "threshold", "min_probability", "temperature", "max_seq_length",
    "do_lower_case", "engine", "precision",
)  # fmt: skip


@dataclass(frozen=True)
class RunRecord:
    """What is logged of a run, by any tracker.

    Attributes
    ----------
    name : str
        The run's folder, or its id.
    cascade : str
    parameters : dict of str to str, int, float or bool
        Of the run, and as `<stage>/<key>` of its stages.
    metrics : dict of str to float
        Those of `metrics.json`, and the 95% intervals as `<metric>_low` and `<metric>_high`; those of a stage as
        `<stage>/<metric>`; a stage's amortised milliseconds per text as `<stage>/p50_ms`. Undefined ones are left out.
    tags : dict of str to str
        `cascade_lab.*`: the run's id and the digests of the manifest and of the eval set; `sha256/*`: the digest of
        every input and of every table.
    summary : str
        The run in a few sentences, as Markdown.
    files : dict of str to Path
        Name to file: the manifest and the metrics, the tables, the reports and the figures.
    """

    name: str
    cascade: str
    parameters: dict[str, Any]
    metrics: dict[str, float]
    tags: dict[str, str]
    summary: str
    files: dict[str, Path]

    @property
    def n_bytes(self) -> int:
        """The size of the files."""
        return sum(path.stat().st_size for path in self.files.values())


class Logged(NamedTuple):
    """Where a run was logged.

    Attributes
    ----------
    experiment, name, run_id : str
        As the tracker has them.
    place : str
        The address of the server, or where the store is.
    """

    experiment: str
    name: str
    run_id: str
    place: str


def run_record(run: Run, *, tables: bool = True) -> RunRecord:
    """Return what is logged of a run directory.

    Parameters
    ----------
    run : Run
    tables : bool
        The files include the tables: texts, logits, predictions.

    Raises
    ------
    RunError
        The run is only in memory, or a file of it is missing or damaged.
    """
    if run.directory is None:
        raise RunError(f"{run.name} is only in memory; write the run first: run.write(path)")
    run.check()
    manifest, is_labelled = run.manifest, bool(run.examples["label"].notna().any())
    return RunRecord(
        name=run.directory.resolve().name,
        cascade=run.spec.name,
        parameters=_parameters(run),
        metrics=dict(_metrics(run, is_labelled)),
        tags={
            "cascade_lab.run_id": manifest["run_id"],
            DIGEST: sha256(run.directory / "manifest.json"),
            "cascade_lab.evalset_sha256": str(manifest["evalset"].get("sha256") or ""),
            "cascade_lab.version": str(package_version("cascade-lab")),
            **dict(_digests(run)),
        },
        summary=run_summary(run)._repr_markdown_() if is_labelled else "No text has a label.",
        files=dict(_files(run.directory, manifest["contents"] if tables else ())),
    )


def log_run(
    run: Run,
    to: str,
    *,
    experiment: str | None = None,
    name: str | None = None,
    tracking_uri: str | None = None,
    again: bool = False,
    tables: bool = True,
) -> tuple[Logged, RunRecord]:
    """Log a run directory to a tracker. Nothing of the run changes.

    Parameters
    ----------
    run : Run
    to : {"mlflow", "wandb"}
    experiment : str, optional
        MLflow's experiment, or the project of Weights & Biases; by default the name of the cascade.
    name : str, optional
        The run's name there; by default the name of the run's folder.
    tracking_uri : str, optional
        The server or the store; by default what the tracker's own settings say, such as MLFLOW_TRACKING_URI.
    again : bool
        Log a run that the experiment has already a second time. Otherwise that is refused.
    tables : bool
        Upload the tables too: texts, logits, predictions.

    Raises
    ------
    RunError
        The tracker is unknown, is not installed or cannot be reached; the run is logged already; or as `run_record`.
    """
    if to not in TRACKERS:
        raise RunError(f"unknown tracker '{to}'{did_you_mean(to, TRACKERS)}")
    record = run_record(run, tables=tables)
    experiment = experiment or printable(record.cascade)
    with _one_line(to):
        return TRACKERS[to](record, experiment, name or printable(record.name), tracking_uri, again), record


def _parameters(run: Run) -> dict[str, Any]:
    manifest, spec = run.manifest, run.spec
    evalset, tuned_on = manifest["evalset"], spec.tuned_on or {}
    values = {
        "cascade": spec.name,
        "source": manifest.get("source"),
        "evalset": PurePath(str(evalset.get("source") or evalset.get("path") or "a table")).name,
        "split": evalset.get("split"),
        "n_examples": len(run.examples),
        "n_labelled": int(run.examples["label"].notna().sum()),
        "batch_size": manifest.get("batch_size"),
        "tuned_to": tuned_on.get("goal"),
        "tuned_on_run": tuned_on.get("run_id"),
        "processor": manifest.get("processor"),
    }
    for stage in spec.stages:
        values |= {f"{_stage_name(stage)}/{key}": getattr(stage, key) for key in _SETTINGS}
        values[f"{_stage_name(stage)}/n_labels"] = len(stage.labels)
        values[f"{_stage_name(stage)}/calibrator"] = stage.calibrator and stage.calibrator.method
        values[f"{_stage_name(stage)}/rejector"] = stage.rejector and " + ".join(stage.rejector.evidence)
    return {key: _value(value) for key, value in values.items() if value is not None}


def _value(value: Any) -> Any:
    return shorten(printable(value), _MAX_VALUE) if isinstance(value, str) else value


def _metrics(run: Run, is_labelled: bool) -> Iterator[tuple[str, float]]:
    tables: dict[str, Mapping[str, float]] = {}
    if is_labelled:
        for stage in (None, *run.spec.stages):
            kept = run.metrics["end_to_end"] if stage is None else run.metrics["stages"][stage.name]
            intervals = metric_intervals(run, None if stage is None else stage.name)
            ends = {f"{name}_{end}": intervals.at[name, end] for name in intervals.index for end in ("low", "high")}
            prefix = "" if stage is None else f"{_stage_name(stage)}/"
            tables[prefix] = {**intervals["value"].to_dict(), **ends, **kept}
    for prefix, metrics in tables.items():
        yield from ((f"{prefix}{name}", float(value)) for name, value in metrics.items() if math.isfinite(value))
    decided = run.predictions["decided_by"].value_counts(normalize=True)
    latencies = stage_latencies(run) if is_timed(run) else {}
    for stage in run.spec.stages:
        yield f"{_stage_name(stage)}/decided", float(decided.get(stage.name, 0))
        if stage.name in latencies:
            for percentile, ms in latencies[stage.name].percentiles_ms.items():
                if math.isfinite(ms):
                    yield f"{_stage_name(stage)}/p{percentile}_ms", ms


def _digests(run: Run) -> Iterator[tuple[str, str]]:
    for path, digest in (*run.manifest["inputs"].items(), *run.manifest["contents"].items()):
        name = "/".join(re.sub(r"[^\w.-]", "_", part) for part in PurePath(path).parts[-2:])
        yield f"sha256/{name}", digest


def _files(directory: Path, tables: Sequence[str] | Mapping[str, str]) -> Iterator[tuple[str, Path]]:
    reports = [path for path in sorted(directory.glob("*.html")) if path.with_suffix(".json").is_file()]
    names = ["manifest.json", "metrics.json", *tables]
    names += [name for path in reports for name in (path.name, path.with_suffix(".json").name)]
    names += [f"figures/{path.name}" for path in sorted(directory.glob("figures/*.png"))]
    for name in names:
        path = directory / name
        if path.is_file() and not path.is_symlink():  # a link may name a file that is not the run's
            yield name, path


def _stage_name(stage: StageSpec) -> str:
    """Return a stage's name as a part of the name of a parameter or of a metric."""
    return stage.name if _PLAIN_NAME.fullmatch(stage.name) else stage_file(stage.name)


def _log_mlflow(record: RunRecord, experiment: str, name: str, uri: str | None, again: bool) -> Logged:
    mlflow = _import("mlflow")
    logging.getLogger("mlflow").setLevel(logging.WARNING)  # it tells each step of a new database
    client = mlflow.tracking.MlflowClient(tracking_uri=uri)
    found = client.get_experiment_by_name(experiment)
    experiment_id = client.create_experiment(experiment) if found is None else found.experiment_id
    same = f"tags.`{DIGEST}` = '{record.tags[DIGEST]}' and attributes.status = 'FINISHED'"
    earlier = client.search_runs([experiment_id], same, max_results=1)
    if earlier and not again:
        info = earlier[0].info
        raise _logged_already(record, f"'{info.run_name}' ({info.run_id}) of experiment '{experiment}'")
    tags = {**record.tags, "mlflow.note.content": record.summary}
    run_id = client.create_run(experiment_id, run_name=name, tags=tags).info.run_id
    entities, now, status = mlflow.entities, int(time.time() * 1000), "FAILED"
    try:
        for part in _parts([entities.Param(key, str(value)) for key, value in record.parameters.items()]):
            client.log_batch(run_id, params=part)
        for part in _parts([entities.Metric(key, value, now, 0) for key, value in record.metrics.items()]):
            client.log_batch(run_id, metrics=part)
        for file, path in record.files.items():
            client.log_artifact(run_id, str(path), str(PurePath(file).parent) if "/" in file else None)
        status = "FINISHED"
    finally:
        client.set_terminated(run_id, status)
    return Logged(experiment, name, run_id, client.tracking_uri)


def _log_wandb(record: RunRecord, experiment: str, name: str, uri: str | None, again: bool) -> Logged:
    wandb = _import("wandb")
    # The same run has the same id, and W&B itself refuses an id that it has already.
    digest = record.tags[DIGEST]
    run_id = f"{digest[:12]}-{token_hex(4)}" if again else digest[:12]
    settings = wandb.Settings(silent=True, console="off", **({} if uri is None else {"base_url": uri}))
    kept = sorted(Path(wandb.setup().settings.wandb_dir).glob(f"offline-run-*-{digest[:12]}"))
    if kept and not again:
        raise _logged_already(record, str(kept[0]))
    logged = wandb.init(
        project=experiment,
        name=name,
        id=run_id,
        resume="never",
        config={**record.parameters, "digests": record.tags},
        notes=record.summary,
        tags=[f"{key}:{record.tags[key]}"[:_MAX_WANDB_TAG] for key in ("cascade_lab.run_id", DIGEST)],
        settings=settings,
    )
    exit_code = 1
    try:
        logged.summary.update(record.metrics)
        artifact = wandb.Artifact(f"run-{digest[:12]}", type="run", metadata=record.tags)
        for file, path in record.files.items():
            artifact.add_file(str(path), name=file)
        logged.log_artifact(artifact)
        exit_code = 0
    finally:
        logged.finish(exit_code=exit_code)
        if exit_code and logged.offline:  # otherwise the next attempt would take it for logged
            shutil.rmtree(Path(logged.dir).parent, ignore_errors=True)
    return Logged(experiment, name, run_id, str(Path(logged.dir).parent) if logged.offline else str(logged.url))


TRACKERS: dict[str, Callable[[RunRecord, str, str, str | None, bool], Logged]] = {
    "mlflow": _log_mlflow,
    "wandb": _log_wandb,
}


@contextmanager
def _one_line(to: str) -> Iterator[None]:
    """Raise what a tracker raises as RunError of one line, and let MLflow try a server twice, not for minutes."""
    key = "MLFLOW_HTTP_REQUEST_MAX_RETRIES"
    is_set = key in os.environ
    os.environ.setdefault(key, "1")
    try:
        yield
    except CascadeLabError:
        raise
    except Exception as error:  # each tracker raises classes of its own, of its libraries and of Python
        reason = shorten(printable(str(error)), 200).rstrip(".") or type(error).__name__
        raise RunError(f"{to}: the run was not logged: {reason}; {_WAYS_OUT[to]}") from error
    finally:
        if not is_set:
            del os.environ[key]


def _import(name: str) -> Any:
    try:
        return import_module(name)
    except ImportError as error:
        raise RunError(f"{name} is not installed; install it with: pip install 'cascade-lab[{name}]'") from error


def _logged_already(record: RunRecord, where: str) -> RunError:
    return RunError(
        f"{record.name}: is logged already, as {printable(where)}; log it a second time with --again (again=True)"
    )


def _parts(items: list[T]) -> Iterator[list[T]]:
    """Yield a list in parts of the size that MLflow takes in one request."""
    yield from (items[start : start + _MLFLOW_BATCH] for start in range(0, len(items), _MLFLOW_BATCH))

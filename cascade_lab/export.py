"""Exports all stages of a cascade, as SavedModels for TensorFlow Serving or as directories for Hugging Face."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tqdm.auto import tqdm

from cascade_lab.analysis.same_cascade import check_run_of
from cascade_lab.atomic import to_json, whole_directory
from cascade_lab.bert.checkpoint import checkpoint_files, find_checkpoint, stage_files
from cascade_lab.bert.huggingface import export_directory
from cascade_lab.bert.saved_model import export_saved_model
from cascade_lab.exceptions import CascadeLabError, did_you_mean
from cascade_lab.model_card import cascade_card, stage_card
from cascade_lab.provenance import environment, sha256
from cascade_lab.spec import CascadeSpec, StageSpec
from cascade_lab.stage_files import stage_file

if TYPE_CHECKING:
    from cascade_lab.run import Run

FORMATS = {"saved_model": export_saved_model, "hf": export_directory}


def export_cascade(
    spec: CascadeSpec,
    output: str | Path,
    *,
    format: str,
    run: Run | None = None,
    overwrite: bool = False,
    progress: bool = False,
) -> Path:
    """Write every stage of a cascade to its own directory, and what connects the stages to `export.json`.

    For Hugging Face each stage and the whole cascade get a model card, `README.md`.

    Parameters
    ----------
    spec : CascadeSpec
    output : path
        The new directory, with one directory per stage: `output/<stage>/`; the directory of a stage whose name is not
        plain ASCII is called as its tables in a run (`stage_files.stage_file`). It appears whole or not at all.
    format : {"saved_model", "hf"}
        The format of the stages: see `export_saved_model` and `export_directory`.
    run : Run, optional
        For "hf": a run of this cascade, whose metrics the model cards give.
    overwrite : bool
        Replace an earlier export at `output`.
    progress : bool
        Show a progress bar.

    Returns
    -------
    Path
        `output`.

    Raises
    ------
    CheckpointError
        A stage's files are missing or not usable.
    RunError
        The run is of another cascade, or none of its texts has a label.
    CascadeLabError
        The format is unknown, or has no model card for the run; a rejector needs features; `output` exists already, or
        cannot be written.
    """
    output = Path(output)
    if format not in FORMATS:
        raise CascadeLabError(f"{output}: unknown format '{format}'{did_you_mean(format, FORMATS)}")
    if run is not None and format != "hf":
        raise CascadeLabError(
            f"format '{format}' has no model card for the run's metrics; leave out the run, or use hf"
        )
    for stage in spec.stages:
        if stage.rejector is not None and stage.rejector.feature_evidence:
            raise CascadeLabError(
                f"stage '{stage.name}': its rejector needs {stage.rejector.feature_evidence[0]}, and an exported stage "
                "gives no features; fit a rejector without it"
            )
    digests = [_digests(stage) for stage in spec.stages]
    if run is not None:
        check_run_of(run, spec, {str(path): digest for files in digests for path, digest in files.items()})
        run = run.labelled
    with whole_directory(output, overwrite=overwrite, marker="export.json", what="cascade's export") as directory:
        for stage in tqdm(spec.stages, desc="export", unit="stage", disable=not progress, leave=False):
            FORMATS[format](stage, directory / stage_file(stage.name))
            if format == "hf":
                card = stage_card(spec, stage, run)
                (directory / stage_file(stage.name) / "README.md").write_text(card, encoding="utf-8")
        if format == "hf":
            (directory / "README.md").write_text(cascade_card(spec, run), encoding="utf-8")
        content = {
            "name": spec.name,
            "format": format,
            "stages": [_description(stage, files) for stage, files in zip(spec.stages, digests, strict=True)],
            "packages": environment()["packages"],
        }
        (directory / "export.json").write_text(to_json(content), encoding="utf-8")
    return output


def _digests(stage: StageSpec) -> dict[Path, str]:
    """Return the SHA-256 of each file of a stage, in the order in which a run's manifest has them."""
    paths = stage_files(stage)
    files = [paths.bert_config_file, paths.vocab_file, *checkpoint_files(find_checkpoint(paths.init_checkpoint))]
    return {path: sha256(path) for path in files}


def _description(stage: StageSpec, digests: Mapping[Path, str]) -> dict[str, Any]:
    """Return what a server of this stage needs besides the weights, and the digests of the stage's files."""
    rejector = stage.rejector
    return {
        "name": stage.name,
        "directory": stage_file(stage.name),
        "labels": list(stage.labels),
        "role": stage.role,
        "pass_label": stage.pass_label,
        "threshold": stage.threshold,
        "min_probability": stage.min_probability,
        "min_probabilities": dict(stage.min_probabilities),
        "reject_label": stage.reject_label,
        "temperature": stage.temperature,
        "calibrator": None if stage.calibrator is None else stage.calibrator.to_dict(),
        "rejector": rejector and {key: getattr(rejector, key) for key in ("evidence", "weights", "bias")},
        "do_lower_case": stage.do_lower_case,
        "max_seq_length": stage.max_seq_length,
        "inputs": {path.name: digest for path, digest in digests.items()},
    }

"""Exports all stages of a cascade, as SavedModels for TensorFlow Serving or as directories for Hugging Face."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tqdm.auto import tqdm

from cascade_lab.atomic import to_json, whole_directory
from cascade_lab.bert.checkpoint import checkpoint_files, find_checkpoint, stage_files
from cascade_lab.bert.huggingface import export_directory
from cascade_lab.bert.saved_model import export_saved_model
from cascade_lab.exceptions import CascadeLabError, did_you_mean
from cascade_lab.provenance import environment, sha256
from cascade_lab.spec import CascadeSpec, StageSpec

FORMATS = {"saved_model": export_saved_model, "hf": export_directory}


def export_cascade(
    spec: CascadeSpec, output: str | Path, *, format: str, overwrite: bool = False, progress: bool = False
) -> Path:
    """Write every stage of a cascade to its own directory, and what connects the stages to `export.json`.

    Parameters
    ----------
    spec : CascadeSpec
    output : path
        The new directory, with one directory per stage: `output/<stage>/`. It appears whole or not at all.
    format : {"saved_model", "hf"}
        The format of the stages: see `export_saved_model` and `export_directory`.
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
    CascadeLabError
        The format is unknown; a rejector needs features; `output` exists already, or cannot be written.
    """
    output = Path(output)
    if format not in FORMATS:
        raise CascadeLabError(f"{output}: unknown format '{format}'{did_you_mean(format, FORMATS)}")
    for stage in spec.stages:
        if stage.rejector is not None and stage.rejector.feature_evidence:
            raise CascadeLabError(
                f"stage '{stage.name}': its rejector needs {stage.rejector.feature_evidence[0]}, and an exported stage "
                "gives no features; fit a rejector without it"
            )
    with whole_directory(output, overwrite=overwrite, marker="export.json", what="cascade's export") as directory:
        for stage in tqdm(spec.stages, desc="export", unit="stage", disable=not progress, leave=False):
            FORMATS[format](stage, directory / stage.name)
        content = {
            "name": spec.name,
            "format": format,
            "stages": [_description(stage) for stage in spec.stages],
            "packages": environment()["packages"],
        }
        (directory / "export.json").write_text(to_json(content), encoding="utf-8")
    return output


def _description(stage: StageSpec) -> dict[str, Any]:
    """Return what a server of this stage needs besides the weights, and the digests of the stage's files."""
    paths, rejector = stage_files(stage), stage.rejector
    files = [*checkpoint_files(find_checkpoint(paths.init_checkpoint)), paths.bert_config_file, paths.vocab_file]
    return {
        "name": stage.name,
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
        "inputs": {path.name: sha256(path) for path in files},
    }

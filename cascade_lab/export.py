"""A cascade in the formats that others load: SavedModels for TensorFlow Serving, directories for Hugging Face."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tqdm.auto import tqdm

from cascade_lab.bert.checkpoint import checkpoint_files, find_checkpoint
from cascade_lab.bert.huggingface import export_directory
from cascade_lab.bert.serving import export_saved_model
from cascade_lab.errors import CascadeLabError, did_you_mean
from cascade_lab.provenance import environment, sha256
from cascade_lab.run import write_json
from cascade_lab.spec import CascadeSpec, StageSpec
from cascade_lab.wholly import whole_directory

FORMATS = {"saved_model": export_saved_model, "hf": export_directory}


def export_cascade(
    spec: CascadeSpec, output: str | Path, *, format: str, overwrite: bool = False, progress: bool = False
) -> Path:
    """Write every stage of a cascade to a directory of its own, and what binds them to `export.json`.

    Parameters
    ----------
    spec : CascadeSpec
    output : path
        The directory to make; a stage lies in `output/<stage>/`. It appears whole or not at all.
    format : {"saved_model", "hf"}
        What `export_saved_model` writes, or what `export_directory` does.
    overwrite : bool
        Replace what an earlier export left there.
    progress : bool
        Show a progress bar.

    Returns
    -------
    Path
        `output`.

    Raises
    ------
    CheckpointError
        A stage's files are not usable.
    CascadeLabError
        An unknown format; `output` exists already, or cannot be written.
    """
    output = Path(output)
    if format not in FORMATS:
        raise CascadeLabError(f"{output}: unknown format '{format}'{did_you_mean(format, list(FORMATS))}")
    with whole_directory(output, overwrite=overwrite, sign="export.json", what="cascade's export") as made:
        for stage in tqdm(spec.stages, desc="export", unit="stage", disable=not progress, leave=False):
            FORMATS[format](stage, made / stage.name)
        content = {
            "name": spec.name,
            "format": format,
            "stages": [_facts(stage) for stage in spec.stages],
            "packages": environment()["packages"],
        }
        write_json(made / "export.json", content)
    return output


def _facts(stage: StageSpec) -> dict[str, Any]:
    """Return what a server of this stage has to know beside its weights, and which files it is made of."""
    files = [*checkpoint_files(find_checkpoint(stage.init_checkpoint)), stage.bert_config_file, stage.vocab_file]
    return {
        "name": stage.name,
        "labels": list(stage.labels),
        "pass_label": stage.pass_label,
        "threshold": stage.threshold,
        "min_probability": stage.min_probability,
        "reject_label": stage.reject_label,
        "do_lower_case": stage.do_lower_case,
        "max_seq_length": stage.max_seq_length,
        "inputs": {path.name: sha256(path) for path in files},
    }

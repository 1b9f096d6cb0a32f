"""Check that files, or a latency study, belong to the cascade that made a run: same digests, same settings."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from typing import TYPE_CHECKING

from cascade_lab.analysis.serving_latency import LatencyStudy
from cascade_lab.exceptions import RunError
from cascade_lab.spec import CascadeSpec, StageSpec
from cascade_lab.text import shorten

if TYPE_CHECKING:
    from cascade_lab.run import Run

_PATHS = ("init_checkpoint", "bert_config_file", "vocab_file")  # where files are may differ: their digests count


def check_same_files(run: Run, digests: Mapping[str, str], *, fault: str) -> None:
    """Raise RunError unless files are those of every stage of the cascade that made a run.

    Parameters
    ----------
    run : Run
    digests : mapping of str to str
        Path to SHA-256 of each stage's config, vocabulary and checkpoint, in the order of the stages.
    fault : str
        What it means if they are not, for the message.
    """
    if run.manifest.get("source") == "logits":
        raise RunError(f"{run.name}: its logits were computed elsewhere, so it has no times; time the cascade there")
    inputs = run.manifest.get("inputs") or {}
    expected, found = (list(dict.fromkeys(files.values())) for files in (inputs, digests))
    if found == expected:  # stages may share a file, or have a copy each
        return
    other = next((path for path, digest in digests.items() if digest not in expected), None)
    missing = next((path for path, digest in inputs.items() if digest not in found), None)
    if other is not None:
        differs = f"{shorten(str(other), 200)} has another SHA-256 than the run's manifest.json says"
    else:
        differs = "the stages' files are exchanged" if missing is None else f"{shorten(missing, 200)} is missing"
    raise RunError(
        f"{run.name}: {fault}: {differs}; put the run's files back, or run this cascade again and give that run"
    )


def check_same_cascade(study: LatencyStudy, run: Run) -> None:
    """Raise RunError unless a latency study is of the cascade that made a run, at the same thresholds."""
    difference = _difference(run.spec, study.spec)
    if difference:
        raise RunError(
            f"{run.name}: the latency study is of another cascade: {difference}; measure this one with `cascade-lab "
            "latency`, or give a run of that one"
        )
    check_same_files(run, study.settings.get("inputs") or {}, fault="the latency study is of another cascade")


def check_run_of(run: Run, spec: CascadeSpec, digests: Mapping[str, str]) -> None:
    """Raise RunError unless a run was made by a cascade with these settings and these files, as `check_same_files`."""
    if run.manifest.get("source") == "logits":
        raise RunError(
            f"{run.name}: its logits were computed elsewhere, so nothing says that these checkpoints gave them; give a "
            "run of `cascade-lab run`"
        )
    difference = _difference(run.spec, spec)
    if difference:
        raise RunError(
            f"{run.name}: is a run of another cascade: {difference.replace('there and', 'here and')}; give a run of "
            "this one"
        )
    check_same_files(run, digests, fault="it is a run of another cascade")


def _difference(of_run: CascadeSpec, of_study: CascadeSpec) -> str:
    """Return the first setting that differs between two cascades, as words; "" if none does."""
    names = [", ".join(stage.name for stage in spec.stages) for spec in (of_run, of_study)]
    if names[0] != names[1]:
        return f"it has the stages {shorten(names[1], 80)}, and the run {shorten(names[0], 80)}"
    for own, other in zip(of_run.stages, of_study.stages, strict=True):
        for key in (field.name for field in fields(StageSpec) if field.name not in _PATHS):
            value, other_value = getattr(own, key), getattr(other, key)
            if value != other_value:
                shown = f"{shorten(repr(other_value), 60)} there and {shorten(repr(value), 60)} in the run"
                return f"{key} of stage '{own.name}' is {shown}"
    return ""

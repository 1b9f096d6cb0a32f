"""Checks the stages of a cascade together: their names and roles, and the keys that each role has."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING
from unicodedata import normalize

from cascade_lab.exceptions import SpecError, did_you_mean
from cascade_lab.text import visible

if TYPE_CHECKING:
    from cascade_lab.spec import StageSpec

OF_LAST = ("min_probability", "min_probabilities", "reject_label", "rejector")
"""The keys that only the last stage has; a deferral stage can have a rejector too."""


def check_stage_name(name: str, where: str) -> None:
    """Check that a name can be shown on a line and typed in a command; it may be in any script."""
    if not name or name != visible(name).strip() or "\n" in name or "\t" in name or "=" in name:
        raise SpecError(
            f"{where}: name is {name!r}; give a name without '=', line breaks and control characters, and without a "
            "blank at its ends"
        )


def check_order(stages: Sequence[StageSpec], where: str) -> None:
    """Check the stages together: unique names, and every stage but the last a gate or a deferral stage."""
    names = [stage.name for stage in stages]
    answers = {label for stage in stages if not stage.is_deferral for label in stage.reject_labels}
    answers.update(stages[-1].labels)
    for index, stage in enumerate(stages):
        here = f"{where}: stage '{stage.name}'"
        # Such names look alike, and a file system may take them for the same.
        if [_folded(name) for name in names].count(_folded(stage.name)) > 1:
            raise SpecError(f"{here}: two stages have that name, capital letters or not; give each its own")
        if stage is stages[-1]:
            if stage.role != "final" or stage.pass_label is not None or stage.threshold is not None:
                raise SpecError(
                    f"{here}: pass_label, threshold and a role belong to gates and deferral stages; no stage follows "
                    "this one"
                )
            if (stage.min_probability is not None or stage.min_probabilities) and stage.reject_label is None:
                raise SpecError(f"{here}: min_probability needs a reject_label to answer with")
        elif stage.is_deferral:
            _check_deferral(stage, answers, here)
        else:
            for key in ("pass_label", "threshold"):
                if getattr(stage, key) is None:
                    raise SpecError(
                        f'{here}: {key} is missing; every stage but the last is a gate, or has role = "deferral"'
                    )
            if not stage.is_gate:
                raise SpecError(f'{here}: role is "{stage.role}", which only the last stage has; leave it out')
            for key in OF_LAST:
                if getattr(stage, key):
                    raise SpecError(f"{here}: {key} belongs to the last stage; a gate has a threshold")
        for score in stage.rejector.evidence if stage.rejector is not None else ():
            if score.rpartition(".")[0] not in names[: index + 1]:
                near = did_you_mean(score.rpartition(".")[0], names[: index + 1])
                which = "no stage has that name" if index + 1 == len(names) else "no stage up to this one has that name"
                raise SpecError(f"{here}: rejector.evidence names '{score}', and {which}{near}")
    with_arrays = [stage for stage in stages if stage.rejector is not None and stage.rejector.feature_evidence]
    for stage in with_arrays[1:]:
        if stage.rejector and stage.rejector.arrays_sha256 != getattr(with_arrays[0].rejector, "arrays_sha256", None):
            raise SpecError(
                f"{where}: stage '{stage.name}': rejector.arrays is another file than that of stage "
                f"'{with_arrays[0].name}'; all rejectors of a cascade share one: fit both with one --train-run"
            )


def _folded(name: str) -> str:
    """Return a name without the differences that cannot be seen or typed: case, width, and Unicode's forms."""
    return normalize("NFKC", normalize("NFKC", name).casefold())


def _check_deferral(stage: StageSpec, answers: set[str], where: str) -> None:
    """Check a deferral stage: its keys, and that its labels are answers of the cascade."""
    if stage.threshold is None:
        raise SpecError(f"{where}: threshold is missing; a deferral stage answers where its confidence reaches it")
    for key in ("pass_label", "min_probability", "min_probabilities", "reject_label"):
        if getattr(stage, key) not in (None, {}):
            raise SpecError(f"{where}: {key} does not belong to a deferral stage, which has a threshold; leave it out")
    for label in stage.labels:
        if label not in answers:
            near = did_you_mean(label, sorted(answers))
            raise SpecError(f"{where}: its label '{label}' is no answer of a gate or of the last stage{near}")

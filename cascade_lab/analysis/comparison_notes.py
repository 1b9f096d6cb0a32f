"""Say what a comparison of runs must say beside its numbers: other scopes, tuned thresholds, corrected p-values."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from cascade_lab.exceptions import RunError

if TYPE_CHECKING:
    from cascade_lab.run import Run


def refuse_same_runs(runs: Sequence[Run]) -> None:
    """Raise RunError where a run is there twice: nothing can differ between a run and itself."""
    seen: list[object] = []
    for run in runs:
        identity = id(run) if run.directory is None else run.directory.resolve()
        if identity in seen:
            raise RunError(f"{run.name}: is given twice; give another run to compare it with")
        seen.append(identity)


def thresholds_text(facts: Mapping[str, Any]) -> str:
    """Return the thresholds of a run, from its facts; empty where it has none.

    >>> thresholds_text({"thresholds": {"gate": 0.5, "intent": None}})
    'gate 0.5'
    """
    return ", ".join(f"{name} {value:g}" for name, value in facts["thresholds"].items() if value is not None)


def correction(n_compared: int) -> str:
    """Return what a p-value is corrected for, if `n_compared` runs are compared with one; empty for a single run.

    >>> correction(4), correction(1)
    (" after Holm's correction for 4 runs", '')
    """
    return f" after Holm's correction for {n_compared} runs" if n_compared > 1 else ""


def scope_notes(runs: Mapping[str, Run]) -> list[str]:
    """Return a sentence for each run, by name, that counts as a class in its own metrics what another rejects with."""
    rejecting = {label: name for name, run in reversed(list(runs.items())) for label in run.spec.reject_labels}
    notes = []
    for name, run in runs.items():
        label = next((label for label in run.spec.in_scope_labels if label in rejecting), None)
        if label is not None:
            notes.append(
                f"{name}'s own metrics count the label {label} as a class; here it rejects, as in {rejecting[label]}. "
                f'Add reject_label = "{label}" to the last stage of {name} to have the same metrics everywhere.'
            )
    return notes


def same_texts_notes(runs: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """Return a warning for each run, by name, whose thresholds were chosen on the texts of the run.

    Each run is given as the facts that `leaderboard.run_facts` returns.
    """
    return [
        f"Warning: the thresholds of {name} were chosen on these same texts, so its metrics are too high. Compare the "
        "runs on other texts."
        for name, facts in runs.items()
        if facts["same_texts"]
    ]

"""What goes wrong for reasons a person can mend: each message is one line with where, what, and the way out."""

from __future__ import annotations

from difflib import get_close_matches


class CascadeLabError(Exception):
    """Base of the errors that this package raises on bad input; its text is one line for people."""


class SpecError(CascadeLabError):
    """A `cascade.toml`, or a threshold given for one, is not usable."""


class CheckpointError(CascadeLabError):
    """A checkpoint, its config or its vocabulary is not usable."""


class CalibrationError(CascadeLabError):
    """Probabilities cannot be calibrated, or a report of how calibrated they are would not be honest."""


class EvalSetError(CascadeLabError):
    """An eval set is not usable."""


class GoalError(CascadeLabError):
    """What thresholds are asked to achieve makes no sense."""


class InfeasibleError(CascadeLabError):
    """No thresholds satisfy what was asked."""


class TrainingError(CascadeLabError):
    """A fine-tuning cannot start, or cannot go on."""


class RunError(CascadeLabError):
    """A run directory cannot be read, written or replayed."""


def did_you_mean(word: str, known: list[str]) -> str:
    """Return `"; did you mean 'x'?"` for the nearest of `known`, or the list of them where none is near.

    >>> did_you_mean("treshold", ["threshold", "labels"])
    "; did you mean 'threshold'?"
    """
    nearest = get_close_matches(word, known, n=1)
    return f"; did you mean '{nearest[0]}'?" if nearest else f"; known: {', '.join(known)}"

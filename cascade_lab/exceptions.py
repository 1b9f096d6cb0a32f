"""Errors that a user can fix: each message is one line with where, what, and the way out."""

from __future__ import annotations

from collections.abc import Iterable
from difflib import get_close_matches


class CascadeLabError(Exception):
    """Base class of the errors that this package raises on bad input. Its text is one line for people."""


class SpecError(CascadeLabError):
    """A `cascade.toml`, or a threshold given for one, is not usable."""


class CheckpointError(CascadeLabError):
    """A checkpoint, its config or its vocabulary is not usable."""


class CalibrationError(CascadeLabError):
    """Probabilities cannot be calibrated, or reporting their calibration on this set would be misleading."""


class EvalSetError(CascadeLabError):
    """An eval set is not usable."""


class GoalError(CascadeLabError):
    """A goal for thresholds is contradictory or unknown."""


class InfeasibleError(CascadeLabError):
    """No thresholds satisfy the goal."""


class TrainingError(CascadeLabError):
    """A fine-tuning cannot start or cannot continue."""


class RunError(CascadeLabError):
    """A run cannot be read, written, replayed or analysed."""


class CheckpointWarning(UserWarning):
    """What a user should know about a checkpoint, although there is no error: one line for people."""


class FontWarning(UserWarning):
    """Figures show boxes, because no font has some characters of the labels: one line for people."""


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """Return `"; did you mean 'x'?"` for the nearest known word, or the list of known words if none is near.

    >>> did_you_mean("treshold", ["threshold", "labels"])
    "; did you mean 'threshold'?"
    """
    known = list(known)
    nearest = get_close_matches(word, known, n=1)
    return f"; did you mean '{nearest[0]}'?" if nearest else f"; known: {', '.join(known)}"

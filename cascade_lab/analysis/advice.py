"""What to try next: advice for each kind of error, and gains that cross-validation on a run's texts shows."""

from __future__ import annotations

import shlex
import warnings
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from cascade_lab.analysis.errors import RECOVERABLE_ANSWER, UNRECOVERABLE_ANSWER
from cascade_lab.analysis.outcomes import FALSE_ACCEPT, FALSE_REJECT, WRONG_CLASS, WRONG_REJECT
from cascade_lab.exceptions import CascadeLabError
from cascade_lab.text import exact

if TYPE_CHECKING:
    from cascade_lab.run import Run

MAX_TEXTS = 10_000
"""Of more texts, this number is tried, evenly spaced: enough to show a gain of half a point."""
N_RESAMPLES = 200


class Suggestion(NamedTuple):
    """Something to try.

    Attributes
    ----------
    text : str
        What to try and why, in the words of the glossary.
    plain : str
        The same for a reader who knows no cascade.
    command : str
        To type; words in capitals stand for paths, `RUN` for the run's directory.
    points_low : float
        The lower end of the 95% interval of the gain, in percentage points of accuracy (for a stage: if it were
        perfect); NaN where it is not known.
    """

    text: str
    plain: str
    command: str
    points_low: float = np.nan


class _Advice(NamedTuple):
    """Advice for the errors of one kind at a stage."""

    errors: str
    text: str
    plain: str
    command: str


_READ = "cascade-lab report RUN --notebook 03_analyse_errors"
STAGE_ADVICE = {
    FALSE_REJECT: _Advice(
        "texts in scope that are rejected",
        "Read the texts that stage {stage} wrongly rejects, and train it with more texts in scope that are like them.",
        "Read the texts that {step} wrongly turned away, and give it more examples like them to learn from.",
        _READ,
    ),
    FALSE_ACCEPT: _Advice(
        "texts out of scope that are answered with a class",
        "Read the texts out of scope that stage {stage} lets through, and train it with more texts that are like them.",
        "Read the texts that {step} should have turned away, and give it more examples like them to learn from.",
        _READ,
    ),
    WRONG_CLASS: _Advice(
        "texts in scope that get another class",
        "Check the labels of the texts that stage {stage} confuses, and train it with more texts of these labels.",
        "Read the texts that got a wrong answer from {step}: the expected answers may be noted wrongly, or it needs "
        "more examples to learn from.",
        "cascade-lab audit RUN --output audit.csv",
    ),
    WRONG_REJECT: _Advice(
        "texts out of scope that are rejected with the wrong label",
        "Check whether the reject labels of stage {stage} overlap with those of the other stages.",
        "Check whether the answers that mean “not for me” can be told apart at {step}.",
        _READ,
    ),
    RECOVERABLE_ANSWER: _Advice(
        "answers that the later stages would have corrected",
        "Compare higher thresholds of stage {stage}: they pass more of these texts on, which costs time.",
        "Let {step} pass more texts on to the next step, which is slower and more often right.",
        "cascade-lab report RUN --notebook 04_tune_thresholds -p test_dir=null",
    ),
    UNRECOVERABLE_ANSWER: _Advice(
        "answers that the later stages would not have corrected",
        "Read the texts that stage {stage} answers wrongly, and train all stages with more texts that are like them.",
        "Read the texts that {step} answered wrongly, and give every step more examples like them to learn from.",
        _READ,
    ),
}
"""Kind of error (an outcome, or a kind of overconfident answer) to what it is called and what to do about it."""


def step_name(run: Run, stage: str) -> str:
    """Return how a reader who knows no cascade calls a stage."""
    number = [each.name for each in run.spec.stages].index(stage) + 1
    return f"step {number} ({stage})" if len(run.spec.stages) > 1 else "the model"


def threshold_suggestion(run: Run) -> Suggestion | None:
    """Return the suggestion to tune the threshold of one stage; None where cross-validation shows no gain in accuracy.

    Each stage that has a threshold, or can have one, is tried alone: all together would take seconds.
    """
    trial = _trial(run)
    names = [stage.name for stage in run.spec.stages if stage is not run.spec.last or stage.reject_label]
    found = filter(None, (_threshold_of(trial, name) for name in names))
    return max(found, key=lambda each: each.points_low, default=None)


def _threshold_of(run: Run, stage: str) -> Suggestion | None:
    from cascade_lab.thresholds import Goal, tune
    from cascade_lab.thresholds.gain import CROSS_VALIDATION

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            tuning = tune(run, Goal(maximize="accuracy"), stages=[stage], n_resamples=N_RESAMPLES, n_repeats=1)
    except CascadeLabError:  # a stage did not score every text
        return None
    gain = 100 * tuning.comparison.loc[(CROSS_VALIDATION, "accuracy"), ["difference", "low", "high"]]
    if not (tuning.verdict.improves and gain["low"] > 0):
        return None
    chosen, own = tuning.thresholds.loc[stage, "chosen"], run.spec.thresholds[stage]
    cost = ", which defers more texts and so costs time" if run.spec.stage(stage).is_deferral and chosen > own else ""
    between = f"{gain['difference']:.1f} points ({gain['low']:.1f} to {gain['high']:.1f})"
    return Suggestion(
        f"Tune the threshold of stage {stage}: in cross-validation on these texts, the accuracy rises by {between}, "
        f"with {exact(chosen)}{cost}. Then report on other texts.",
        f"Change how sure {step_name(run, stage)} must be before it decides. In a trial, that gave about "
        f"{10 * gain['difference']:.0f} more correct answers in 1,000 texts.",
        shlex.join(
            ["cascade-lab", "tune", "RUN", "--maximize", "accuracy", "--stage", stage, "--output", "tuned.toml"]
        ),
        float(gain["low"]),
    )


def rejector_suggestion(run: Run) -> Suggestion | None:
    """Return the suggestion to fit a rejector; None where cross-validation does not show that it rejects more."""
    from cascade_lab.thresholds import compare_rejectors
    from cascade_lab.thresholds.rejector_comparison import NOW

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            found = compare_rejectors(_trial(run), n_resamples=N_RESAMPLES)
    except CascadeLabError:  # the last stage cannot reject, a kind of text is missing, or a stage scored too little
        return None
    row = found.table.loc[found.proposed]
    if not row["recall_low"] > 0:
        return None
    now = found.table.loc[NOW, "recall"]
    low, high = (100 * row[key] for key in ("recall_low", "recall_high"))
    return Suggestion(
        f"Fit a rejector ({found.proposed}): in cross-validation on these texts, it rejects {row['recall']:.0%} of the "
        f"texts out of scope instead of {now:.0%} (+{low:.1f} to +{high:.1f} points), at the same in-scope accuracy.",
        f"Let all steps decide together which texts to turn away. In a trial, {row['recall']:.0%} of the texts that "
        f"should be turned away were, instead of {now:.0%}, with as many correct answers to the others.",
        f"cascade-lab fit-rejector RUN --evidence {found.proposed.replace(' + ', ',')} --output rejector.toml",
        float(low * (~found.in_scope).mean()),
    )


def _trial(run: Run) -> Run:
    """Return the run, or some of its texts, evenly spaced."""
    n = len(run.examples)
    return run if n <= MAX_TEXTS else run.select(np.linspace(0, n - 1, MAX_TEXTS).astype(int))

"""Watch a cascade without labels: compare a run of traffic with a labelled run, or with earlier traffic."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from cascade_lab.analysis.alarms import ALPHA, watch
from cascade_lab.analysis.prevalence import (
    ESTIMATES,
    N_RESAMPLES,
    Labelled,
    Unlabelled,
    atc_note,
    estimate_notes,
    estimate_shift,
    fits_prevalence_shift,
)
from cascade_lab.analysis.sentences import Summary, percent, percent_interval, points
from cascade_lab.analysis.shift import fraction_change, label_change, label_changes, score_change, with_holm
from cascade_lab.exceptions import RunError
from cascade_lab.label_files import has_unequal_weights

if TYPE_CHECKING:
    from cascade_lab.run import Run

MORE_REJECTS, FEWER_REJECTS, LOW_CONFIDENCE = "more rejects", "fewer rejects", "low confidence"
WATCHES = (MORE_REJECTS, FEWER_REJECTS, LOW_CONFIDENCE)
"""What raises alarms. Low confidence: the probability of the answer is below the reference's lowest tenth."""
LOWEST = 0.1
SIGNIFICANT = 0.05


@dataclass(frozen=True, eq=False, repr=False)
class Monitoring:
    """A run of traffic compared with a reference; `monitor` makes one.

    Attributes
    ----------
    run, reference : Run
        The reference as the cascade of `run` would have made it.
    changes : DataFrame
        One row per quantity: the fields of `shift.Change`, `n_then` and `n_now` (texts), and `p_holm`, corrected for
        the number of quantities.
    labels : DataFrame
        One row per predicted label: see `shift.label_changes`.
    alarms : DataFrame
        Indexed by `watch` (of `WATCHES`) and `day`: see `alarms.watch`. `began` is the day on which the change most
        probably began, None without an alarm. Each has a third of `alpha`.
    alpha : float
        The probability of any alarm, ever, if nothing changes.
    has_days : bool
        Whether the texts have days; otherwise all are one.
    estimates : DataFrame or None
        Prevalence and accuracy: see `prevalence.estimate_shift`. None if the reference has no labels.
    fit_p_value : float
        Of the test that another prevalence alone explains the scores: see `prevalence.fits_prevalence_shift`.
    notes : tuple of str
        Why estimates or intervals are undefined, and which texts are left out: see `prevalence.estimate_notes`.
    """

    run: Run
    reference: Run
    changes: pd.DataFrame
    labels: pd.DataFrame
    alarms: pd.DataFrame
    alpha: float
    has_days: bool
    estimates: pd.DataFrame | None
    fit_p_value: float
    notes: tuple[str, ...] = ()

    @property
    def raised(self) -> pd.DataFrame:
        """One row per raised alarm: `watch`, `day`, `began`, `rate` of that day, and the reference's `bound`."""
        alarms = self.alarms[self.alarms["alarm"]].reset_index()
        return alarms.drop_duplicates("watch")[["watch", "day", "began", "rate", "bound"]].reset_index(drop=True)

    @property
    def only_prevalence(self) -> bool | None:
        """Whether another prevalence alone can explain the scores; None where that is not known."""
        return None if np.isnan(self.fit_p_value) else self.fit_p_value >= SIGNIFICANT

    def summary(self) -> Summary:
        """Return the result in a few sentences, with advice."""
        return Summary(_sentences(self))

    def __repr__(self) -> str:
        return f"<Monitoring {self.run.name} against {self.reference.name}: {len(self.raised)} alarms>"

    def _repr_html_(self) -> str:
        return self.changes.to_html(na_rep="–", float_format="{:.4f}".format)


def monitor(
    run: Run,
    against: Run,
    *,
    alpha: float = ALPHA,
    days: Sequence[Any] | np.ndarray | None = None,
    n_resamples: int = N_RESAMPLES,
    level: float = 0.95,
    seed: int = 0,
) -> Monitoring:
    """Compare a run of traffic, which needs no labels, with a reference.

    The tests and the alarms take the texts of each run as independent draws. If the traffic has a rhythm, such as
    another mix on weekends, or if one sender repeats a text many times, an alarm says that, and not that the cascade is
    worse.

    Parameters
    ----------
    run : Run
        Such as `collect` makes; a column `time` gives the days (in UTC).
    against : Run
        The reference: earlier traffic, or the labelled run that the cascade was tuned on. Prevalence and accuracy need
        its labels, which count equally: weights are left out. Where its thresholds differ, it is replayed at those of
        `run`.
    alpha : float
        The probability of any alarm, ever, if nothing changes and each run has all days since the watch began.
    days : array-like, shape (n_examples,), optional
        The day of each text of `run`, instead of the column `time`; anything that can be sorted.
    n_resamples, seed : int
        Of the bootstrap.
    level : float
        Of the intervals.

    Raises
    ------
    RunError
        The runs have other stages or labels, a run is empty, `days` has another length; or a text of `against` would
        reach a stage that never scored it.

    Examples
    --------
    >>> from cascade_lab import Run
    >>> monitor(Run.read("runs/tuesday"), Run.read("runs/val")).summary()  # doctest: +SKIP
    """
    _check(run, against, alpha)
    reference = against if against.spec == run.spec else against.with_spec(run.spec)
    by_day, has_days = _days(run, days)
    estimates, fit_p_value, notes = _estimate(run, reference, n_resamples=n_resamples, level=level, seed=seed)
    return Monitoring(
        run=run,
        reference=reference,
        changes=_changes(run, reference, level=level, seed=seed),
        labels=label_changes(reference.predictions["predicted"], run.predictions["predicted"], level=level),
        alarms=_alarms(run, reference, by_day, alpha),
        alpha=alpha,
        has_days=has_days,
        estimates=estimates,
        fit_p_value=fit_p_value,
        notes=notes,
    )


def _check(run: Run, against: Run, alpha: float) -> None:
    for each in (run, against):
        if not len(each.examples):
            raise RunError(f"{each.name}: has no texts; give a run that has some")
    if [(s.name, s.labels) for s in run.spec.stages] != [(s.name, s.labels) for s in against.spec.stages]:
        raise RunError(
            f"{against.name}: its stages or their labels are not those of {run.name}; give a run of the same cascade "
            "on earlier or on labelled texts"
        )
    if not 0 < alpha < 1:
        raise RunError(f"alpha is {alpha!r}; it must lie between 0 and 1")


def _days(run: Run, days: Sequence[Any] | np.ndarray | None) -> tuple[np.ndarray, bool]:
    """Return the day of each text, and whether it is known."""
    n = len(run.examples)
    if days is not None:
        if len(days) != n:
            raise RunError(f"{run.name}: has {n:,} texts, and {len(days):,} days are given; give one day per text")
        return np.asarray(days), True
    time = run.examples.get("time")
    if time is None or not pd.api.types.is_datetime64_any_dtype(time) or time.isna().any():
        return np.full(n, "all"), False
    return (time.dt.tz_convert("UTC") if time.dt.tz is not None else time).dt.strftime("%Y-%m-%d").to_numpy(), True


def _rejected(run: Run) -> np.ndarray:
    return run.predictions["predicted"].isin(run.spec.reject_labels).to_numpy()


def _arrived(run: Run, stage: str) -> np.ndarray:
    scores = run.scores(stage)
    return scores.scored & ~scores.shadow


def _changes(run: Run, reference: Run, *, level: float, seed: int) -> pd.DataFrame:
    pair = (reference, run)
    rows: dict[str, list[Any]] = {}

    def add(name: str, compare: Any, then: Any, now: Any, **options: Any) -> None:
        rows[name] = [*compare(then, now, **options), len(then), len(now)]

    add("reject rate", fraction_change, *map(_rejected, pair), level=level)
    for stage in run.spec.stages[1:]:
        add(f"reach of {stage.name}", fraction_change, *(_arrived(each, stage.name) for each in pair), level=level)
    probabilities = (each.predictions["probability"].to_numpy() for each in pair)
    add("probability of the answer", score_change, *probabilities, level=level)
    for stage in run.spec.stages:
        confidences = (each.decision(stage.name).confidence[_arrived(each, stage.name)] for each in pair)
        add(f"confidence of {stage.name}", score_change, *confidences, level=level)
    add("predicted labels", label_change, *(each.predictions["predicted"] for each in pair), seed=seed)
    columns = ["then", "now", "difference", "low", "high", "psi", "p_value", "test", "n_then", "n_now"]
    return with_holm(pd.DataFrame.from_dict(rows, orient="index", columns=columns).rename_axis("quantity"))


def _alarms(run: Run, reference: Run, days: np.ndarray, alpha: float) -> pd.DataFrame:
    names, day_of = np.unique(days, return_inverse=True)
    counts = np.bincount(day_of)
    probability = reference.predictions["probability"].to_numpy()
    # Below the k-th lowest of n lies a fraction of all texts whose distribution `upper_bound` of k - 1 hits has.
    k = int(np.ceil(LOWEST * len(probability)))
    low = np.sort(probability)[k - 1]
    watched = {
        MORE_REJECTS: (int(_rejected(reference).sum()), _rejected(run), False),
        FEWER_REJECTS: (int(_rejected(reference).sum()), _rejected(run), True),
        LOW_CONFIDENCE: (k - 1, run.predictions["probability"].to_numpy() < low, False),
    }
    tables = {}
    for name, (then_hits, is_hit, fewer) in watched.items():
        hits = np.bincount(day_of, weights=is_hit).astype(int)
        table = watch(then_hits, len(probability), hits, counts, delta=alpha / len(WATCHES), fewer=fewer)
        began = [names[row] if row >= 0 else None for row in table["since"]]
        table = table.drop(columns="since").assign(began=pd.Series(began, dtype=object))
        tables[name] = table.set_index(pd.Index(names, name="day"))
    return pd.concat(tables, names=["watch"])


def _estimate(
    run: Run, reference: Run, *, n_resamples: int, level: float, seed: int
) -> tuple[pd.DataFrame | None, float, tuple[str, ...]]:
    """Return the estimates, the p-value of their assumption, and notes; None, NaN and no notes without labels."""
    if not reference.examples["label"].notna().any():
        return None, np.nan, ()
    reference = reference.labelled
    label = reference.examples["label"]
    labelled = Labelled(
        *_sample(reference),
        ~label.isin(reference.spec.in_scope_labels).to_numpy(),
        (label == reference.predictions["predicted"]).to_numpy(),
    )
    unlabelled = _sample(run)
    estimates = estimate_shift(labelled, unlabelled, n_resamples=n_resamples, level=level, seed=seed)
    fit_p_value = fits_prevalence_shift(labelled, unlabelled, seed=seed)
    notes = [atc_note(estimates), *estimate_notes(labelled, unlabelled)]
    return estimates, fit_p_value, tuple(note for note in notes if note)


def _sample(run: Run) -> Unlabelled:
    """Return what the estimates need of each text; the evidence is what the stages that it reached say of it."""
    columns = []
    for i, stage in enumerate(run.spec.stages):
        arrived = _arrived(run, stage.name)
        p = np.clip(run.decision(stage.name).confidence, 1e-9, 1 - 1e-9)
        columns += [np.where(arrived, np.log(p) - np.log1p(-p), 0.0)] + ([arrived.astype(float)] if i else [])
    names = [stage.name for stage in run.spec.stages]
    stage_of = pd.Index(names).get_indexer(run.predictions["decided_by"])
    return Unlabelled(np.column_stack(columns), _rejected(run), stage_of, run.predictions["probability"].to_numpy())


def _sentences(found: Monitoring) -> list[str]:
    n = len(found.run.examples)
    texts = f"{n:,} {'text' if n == 1 else 'texts'} against {len(found.reference.examples):,}"
    sentences = []
    for row in found.raised.itertuples():
        day = f" on {row.day}; the change began about {row.began}" if found.has_days else ""
        bound = f"{percent(row.rate)} {'on that day' if found.has_days else 'of the texts'}"
        limit = "at least" if row.watch == FEWER_REJECTS else "at most"
        sentences.append(f"Alarm, {row.watch}{day}: {bound}; the reference has {limit} {percent(row.bound)}.")
    if not sentences:
        sentences.append(f"No alarm ({texts}; if nothing changes, at most {percent(found.alpha)} ever see one).")
    changed = found.changes[found.changes["p_holm"] < SIGNIFICANT]
    for name, row in changed.dropna(subset=["then"]).iterrows():
        values = f"{percent(row['then'])} then, {percent(row['now'])} now" if row["test"] == "Fisher" else (
            f"mean {row['then']:.3f} then, {row['now']:.3f} now"
        )  # fmt: skip
        sentences.append(f"Changed: {name}, {values}.")
    labels = found.labels[found.labels["p_holm"] < SIGNIFICANT]
    if len(labels):
        shown = (f"{label} ({points(row.difference)} points)" for label, row in list(labels.iterrows())[:3])
        more = f" and {len(labels) - 3} more" if len(labels) > 3 else ""
        sentences.append(f"Predicted more or less often: {', '.join(shown)}{more}.")
    elif "predicted labels" in changed.index:
        distance = found.changes.loc["predicted labels", "difference"]
        sentences.append(
            f"Changed: predicted labels (total variation distance {distance:.3f}), but no single label differs by more "
            "than chance."
        )
    if not len(changed):
        sentences.append("No quantity differs by more than chance (Holm's correction, p < 0.05).")
    sides = {"the reference": found.reference, "the run": found.run}
    weighted = [side for side, run in sides.items() if has_unequal_weights(run.examples)]
    if weighted:
        sentences.append(
            f"The labels of {' and of '.join(weighted)} have unequal weights, which are left out here: every text "
            "counts equally, so the results can be biased. cascade-lab collect and sampled_metrics use the weights."
        )
    return sentences + _estimate_sentences(found)


def _estimate_sentences(found: Monitoring) -> list[str]:
    if found.estimates is None:
        return ["The reference has no labels, so prevalence and accuracy are not estimated; give a labelled run."]
    em, _, reweighted, atc = (found.estimates.loc[name] for name in ESTIMATES)
    if np.isnan(em["now"]):
        shown = percent_interval(atc["now"], atc["low"], atc["high"])
        by_confidence = [] if np.isnan(atc["now"]) else [f"Accuracy by confidence alone: {shown}."]
        return [*by_confidence, *found.notes]
    values = (percent_interval(row["now"], row["low"], row["high"]) for row in (em, reweighted, atc))
    sentences = [
        "Out of scope: {}, and {} in the reference.".format(next(values), percent(em["then"])),
        "Accuracy, estimated without labels: {} if only the share out of scope has changed; {} by confidence.".format(
            *values
        ),
    ]
    if not found.only_prevalence:
        sentences.append(
            f"These estimates do not hold: another share out of scope does not explain the scores (p = "
            f"{found.fit_p_value:.3f}). Texts in scope, or out of scope, look different now. Label a sample of the "
            "traffic."
        )
    return sentences + list(found.notes)

"""A run's verdict: how good it is, which stage to improve, and what to try next, as far as intervals support it."""

from __future__ import annotations

import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from html import escape
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd

from cascade_lab.analysis.advice import STAGE_ADVICE, Suggestion, rejector_suggestion, step_name, threshold_suggestion
from cascade_lab.analysis.bootstrap import Interval, fraction_interval
from cascade_lab.analysis.errors import RECOVERABLE, UNRECOVERABLE, blame, oracle_ladder
from cascade_lab.analysis.latency import is_timed, stage_latencies
from cascade_lab.analysis.metrics import confused_pairs, metric_intervals
from cascade_lab.analysis.outcomes import FALSE_REJECT, OUTCOMES, WRONG_CLASS, outcome_counts
from cascade_lab.analysis.sentences import percent, percent_interval
from cascade_lab.analysis.tuned_on import WARNING, is_tuning_set
from cascade_lab.exceptions import RunError
from cascade_lab.text import printable, shorten

if TYPE_CHECKING:
    from cascade_lab.run import Run

MIN_POINTS = 0.5
"""The percentage points of accuracy that a perfect stage must gain at least, for a suggestion to improve it."""
WIDE = 0.1
"""The width of the accuracy's interval above which the verdict asks for more texts."""
KEY_METRICS = ("accuracy", "in_scope_accuracy", "reject_recall", "reject_precision")
_FAULTS = ["n_errors", "share", "low", "high", "points", "points_low", "points_high"]


@dataclass(frozen=True, eq=False, repr=False)
class RunVerdict:
    """What is most worth knowing of a run; `run_verdict` makes one.

    Attributes
    ----------
    name : str
        The cascade's.
    n_texts, n_labelled : int
    sentences : tuple of str
        The verdict in plain words, a warning first if there is one.
    suggestions : tuple of Suggestion
        At most two, computed from the run.
    metrics : DataFrame
        `value`, `low` and `high` of the key metrics that are defined: those of `KEY_METRICS`; without labels `rejected`
        and `reach`, the fractions of texts that are rejected and that reach the last stage.
    outcomes : Series of int
        The number of labelled texts with each of `OUTCOMES`.
    faults : DataFrame
        One row per stage: `n_errors` that it is at fault for; `share` of all errors with its interval, `low` and
        `high`; `points` of accuracy that a perfect stage would gain, with `points_low` and `points_high`. Empty where
        there is no error, no label, or where the later stages did not score an error.
    ms_per_text : float
        Amortised milliseconds per text, over all stages; NaN where nothing was timed.
    """

    name: str
    n_texts: int
    n_labelled: int
    sentences: tuple[str, ...]
    suggestions: tuple[Suggestion, ...]
    metrics: pd.DataFrame
    outcomes: pd.Series
    faults: pd.DataFrame
    ms_per_text: float

    def __repr__(self) -> str:
        return f"<RunVerdict of {printable(shorten(self.name, 40))}: {printable(' '.join(self.sentences[:2]))}>"

    def __str__(self) -> str:
        tries = (f"Try: {each.text} `{each.command}`" for each in self.suggestions)
        return "\n".join(f"- {printable(line)}" for line in (*self.sentences, *tries))

    def _repr_html_(self) -> str:
        inline = 'style="display: inline-block; margin: 0 1.5em 0 0"'
        tiles = "".join(
            f"<div {inline}><b>{escape(value)}</b> <span>{escape(name)}</span> <i>{escape(between)}</i></div>\n"
            for name, value, between in self._tiles()
        )
        findings = "".join(f"<p>{escape(printable(sentence))}</p>\n" for sentence in self.sentences)
        note = " <i>(RUN: the directory of this run)</i>"
        tries = "".join(
            f"<p><b>Try.</b> {escape(printable(each.text))}<br>\n<code>{escape(printable(each.command))}</code>"
            f"{note if each is self.suggestions[-1] and ' RUN ' in each.command else ''}</p>\n"
            for each in self.suggestions
        )
        parts = {"tiles": tiles, "findings": findings, "tries": tries}
        inner = "".join(f'<div class="{name}">{part}</div>' for name, part in parts.items() if part)
        return f'<div class="verdict">{inner}</div>'

    def _tiles(self) -> Iterator[tuple[str, str, str]]:
        """Yield name, value and interval of each key number, as texts."""
        for name, row in self.metrics.iterrows():
            between = "" if np.isnan(row["low"]) else f"{percent(row['low'])} to {percent(row['high'])}"
            yield str(name).replace("in_scope", "in-scope").replace("_", " "), percent(row["value"]), between
        if not np.isnan(self.ms_per_text):
            yield "ms/text", f"{self.ms_per_text:.2f}", "amortised, all stages"


def run_verdict(run: Run) -> RunVerdict:
    """Return what is most worth knowing of a run, with at most two suggestions of what to try.

    A stage is suggested for improvement only if a perfect one would gain at least `MIN_POINTS` points of accuracy, and
    more than any other stage, at the 95% level. Other thresholds and a rejector are suggested only if cross-validation
    on these texts shows a gain (`thresholds.tune`, `thresholds.compare_rejectors`). Works without labels, without
    shadow scores and for any number of stages; then there are fewer sentences.

    Raises
    ------
    RunError
        The run has no example.

    Examples
    --------
    >>> from cascade_lab import CascadeSpec, Run, StageSpec
    >>> spec = CascadeSpec("topics", (StageSpec("topic", ("pay", "play")),))
    >>> examples = pd.DataFrame({"text": ["a bill", "a song"], "label": ["pay", "play"]})
    >>> print(run_verdict(Run.from_logits(spec, examples, {"topic": [[2, 0], [0, 1]]})))
    - All 2 texts are answered correctly; on other texts of this kind, the accuracy is at least 34.2%.
    - So few texts leave the accuracy uncertain: its interval is 66 points wide. Use more texts.
    """
    n, n_labelled = len(run.examples), int(run.examples["label"].notna().sum())
    if not n:
        raise RunError(f"{run.name}: has no example, so there is nothing to say of it; run the cascade on some texts")
    reach = float(np.mean(run.scores(run.spec.last.name).scored & ~run.scores(run.spec.last.name).shadow))
    ms_per_text = sum(each.seconds for each in stage_latencies(run).values()) * 1000 / n if is_timed(run) else np.nan
    counts = pd.Series(0, index=pd.Index(OUTCOMES), name="n_examples")
    faults, suggestions = pd.DataFrame(columns=_FAULTS, dtype=float), []
    if not n_labelled:
        metrics = _metrics_without_labels(run)
        sentences = [
            "No text has a label, so it is not known how many answers are correct.",
            f"{percent_interval(*metrics.loc['rejected'])} of the {n:,} texts are rejected (95% interval).",
        ][: 1 + bool(run.spec.reject_labels)]
        if len(run.spec.stages) > 1:
            sentences.append(f"{percent(reach)} of the texts reach the last stage, {run.spec.last.name}.")
        suggestions.append(_labelling(run))
    else:
        labelled = run.labelled
        metrics = metric_intervals(run, n_resamples=2).loc[list(KEY_METRICS)].dropna(subset="value")
        counts = outcome_counts(run.spec, labelled.predictions)
        sentences = [WARNING] if is_tuning_set(run) else []
        if n_labelled < n:
            sentences.append(f"{n_labelled:,} of {n:,} texts have a label; the metrics are of these.")
        sentences += _accuracy_sentences(metrics.loc["accuracy"], n_labelled)
        if metrics.loc["accuracy", "value"] < 1:
            try:
                errors = blame(labelled)
                faults = _faults(labelled, errors)
                findings, advice = _stage_to_improve(labelled, errors, faults)
                sentences += findings
                cheap = sorted(_cheap_suggestions(labelled), key=lambda each: -each.points_low)
                suggestions += [*cheap[: 2 - len(advice)], *advice]
            except RunError:
                kind = str(counts[list(OUTCOMES[2:])].idxmax())
                sentences.append(
                    f"{counts[kind] / counts[list(OUTCOMES[2:])].sum():.0%} of the errors are "
                    f"{STAGE_ADVICE[kind].errors}. What other thresholds would do is not known: the later stages did "
                    "not score the texts that ended before them."
                )
                suggestions.append(_shadow(run))
    return RunVerdict(
        run.spec.name, n, n_labelled, tuple(sentences), tuple(suggestions), metrics, counts, faults, ms_per_text
    )


def _accuracy_sentences(accuracy: pd.Series, n: int) -> list[str]:
    width = accuracy["high"] - accuracy["low"]
    if accuracy["value"] == 1:
        first = (
            f"All {n:,} texts are answered correctly; on other texts of this kind, the accuracy is at least "
            f"{percent(accuracy['low'])}."
        )
    else:
        first = f"{percent_interval(*accuracy)} of the {n:,} texts are answered correctly (95% interval)."
    few = f"So few texts leave the accuracy uncertain: its interval is {100 * width:.0f} points wide. Use more texts."
    return [first, few] if width > WIDE else [first]


def _metrics_without_labels(run: Run) -> pd.DataFrame:
    """Return the fractions of texts that are rejected, and that reach the last stage, with intervals."""
    everything, groups = np.ones(len(run.examples), dtype=bool), run.text_groups
    last = run.scores(run.spec.last.name)
    hits = {"rejected": run.predictions["predicted"].isin(run.spec.reject_labels).to_numpy()}
    hits |= {"reach": last.scored & ~last.shadow} if len(run.spec.stages) > 1 else {}
    rows = {name: fraction_interval(hit, everything, groups=groups) for name, hit in hits.items()}
    return pd.DataFrame.from_dict(rows, orient="index", columns=Interval._fields).rename_axis("metric")


def _faults(run: Run, errors: pd.DataFrame) -> pd.DataFrame:
    """Return one row per stage: how many errors it causes, and what a perfect one would gain."""
    groups = _error_groups(run, errors)
    everything = np.ones(len(errors), dtype=bool)
    ladder, rows = oracle_ladder(run), {}
    for stage in run.spec.stages:
        at_fault = (errors["fault"] == stage.name).to_numpy()
        share = fraction_interval(at_fault, everything, groups=groups)
        gain = ladder.loc[f"perfect {stage.name}", ["points", "points_low", "points_high"]]
        rows[stage.name] = [int(at_fault.sum()), *share, *gain]
    return pd.DataFrame.from_dict(rows, orient="index", columns=_FAULTS).rename_axis("stage")


def _error_groups(run: Run, errors: pd.DataFrame) -> np.ndarray:
    groups = pd.Series(run.text_groups, index=run.examples["example_id"])
    return groups[errors["example_id"]].to_numpy()


def _stage_to_improve(run: Run, errors: pd.DataFrame, faults: pd.DataFrame) -> tuple[list[str], list[Suggestion]]:
    """Return which stage causes most errors, in sentences, and the suggestion to improve it if intervals support it."""
    n_errors, ranked = len(errors), faults.sort_values(["n_errors", "points"], ascending=False, kind="stable")
    best = ranked.iloc[0]
    stage = str(best.name)
    between = f"({best['low']:.0%} to {best['high']:.0%})"
    sentences = [
        f"Stage {stage} causes {best['share']:.0%} of the {n_errors:,} errors {between}. Without its mistakes, the "
        f"accuracy would be {best['points']:.1f} points higher ({best['points_low']:.1f} to {best['points_high']:.1f})."
    ]
    if len(faults) == 1:
        sentences = [f"There is one stage, {stage}, so it causes all {n_errors:,} errors."] if n_errors > 1 else []
    elif not _leads(errors, ranked, _error_groups(run, errors)):
        counts = ", ".join(f"{name} {int(count):,}" for name, count in ranked["n_errors"].items())
        return [f"Which stage to improve first is not clear from these errors: {counts}."], []
    kinds = errors.loc[errors["fault"] == stage, "kind"].replace(
        dict.fromkeys((RECOVERABLE, UNRECOVERABLE), FALSE_REJECT)
    )
    kind, n_of_kind = str(kinds.mode().iloc[0]), int((kinds == kinds.mode().iloc[0]).sum())
    words = STAGE_ADVICE[kind]
    if len(kinds) > 1:
        share = "All" if n_of_kind == len(kinds) else f"{n_of_kind / len(kinds):.0%}"
        sentences.append(f"{share} of its errors are {words.errors}.")
    if best["points_low"] < MIN_POINTS:
        return sentences, []
    text, plain = (each.format(stage=stage, step=step_name(run, stage)) for each in (words.text, words.plain))
    if kind == WRONG_CLASS:
        pair = confused_pairs(run, stage, n=1).iloc[0]
        names = [f"“{shorten(pair[column], 40)}”" for column in ("label", "predicted")]
        times = f"{pair['n_examples']:,} times" if pair["n_examples"] > 1 else "once"
        text += f" {names[0]} is taken for {names[1]} most often ({times})."
        plain += f" Start with {names[0]}, which it took for {names[1]} most often ({times})."
    return sentences, [Suggestion(text, plain, words.command, best["points_low"])]


def _leads(errors: pd.DataFrame, ranked: pd.DataFrame, groups: np.ndarray) -> bool:
    """Return whether the first stage causes more errors than the second one, at the 95% level."""
    first, second = ((errors["fault"] == name).to_numpy() for name in ranked.index[:2])
    is_also_worth_most = ranked["points"].iloc[0] == ranked["points"].max()
    return bool(fraction_interval(first, first | second, groups=groups).low > 0.5 and is_also_worth_most)


def _cheap_suggestions(run: Run) -> list[Suggestion]:
    """Return what can be had without training a model, and gains in cross-validation: thresholds, a rejector."""
    return [each for each in (threshold_suggestion(run), rejector_suggestion(run)) if each is not None]


def _shadow(run: Run) -> Suggestion:
    evalset = run.manifest["evalset"]
    words = ["cascade-lab", "run", "CASCADE", str(evalset.get("source") or "EVALSET")]
    words += ["--split", evalset["split"]] if evalset.get("split") else []
    return Suggestion(
        "Run the cascade again with shadow scores (without --no-shadow): they show which stage to improve, and what "
        "other thresholds would do.",
        "Let every step look at every text once more, so that the next report can say which step to improve.",
        shlex.join([*words, "--output", "NEW_RUN"]),
    )


def _labelling(run: Run) -> Suggestion:
    command = "cascade-lab run CASCADE LABELLED_TEXTS --output NEW_RUN"
    if run.manifest.get("source") == "service":
        command = "cascade-lab collect LOG --labels LABELS --output NEW_RUN"
    return Suggestion(
        "Label some hundred of these texts, chosen at random, and make a run with the labels.",
        "Let a person write down the right answer for some hundred of these texts, chosen at random.",
        command,
    )

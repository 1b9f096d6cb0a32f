"""Present a latency study for people: tables with formatted numbers, and a summary in sentences."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import pandas as pd

from cascade_lab.analysis.latency import PERCENTILES
from cascade_lab.analysis.latency_intervals import MIN_BATCHES, n_for_quantile
from cascade_lab.analysis.metrics import prediction_metrics
from cascade_lab.analysis.same_cascade import check_same_cascade
from cascade_lab.analysis.sentences import Summary
from cascade_lab.analysis.serving_latency import WHOLE, LatencyStudy, checked_cost, predicted_cost, serving_metrics
from cascade_lab.exceptions import RunError

if TYPE_CHECKING:
    from cascade_lab.run import Run


def waiting_times(study: LatencyStudy) -> pd.DataFrame:
    """Return how long a caller waits for a whole batch, as text with 95% intervals: see `missing_intervals`.

    Returns
    -------
    DataFrame of str
        Indexed by `batch_size` and `stage`, in the order of the cascade; columns `batch_p50_ms`, `batch_p95_ms`,
        `batch_p99_ms` of `serving_metrics`.
    """
    return _with_intervals(_metrics(study))[["batch_p50_ms", "batch_p95_ms", "batch_p99_ms"]]


def text_costs(study: LatencyStudy) -> pd.DataFrame:
    """Return the amortised cost per text, as text with 95% intervals.

    Returns
    -------
    DataFrame of str
        Indexed as `waiting_times`; columns `text_ms`, `texts_per_second`, `tokenize_share`, `share` of
        `serving_metrics`.
    """
    metrics = _metrics(study)
    shares = metrics["value"].unstack("metric")[["tokenize_share", "share"]].map("{:.0%}".format)
    return _with_intervals(metrics)[["text_ms", "texts_per_second"]].join(shares)


def missing_intervals(study: LatencyStudy) -> Summary:
    """Return why some percentiles or costs per text have no interval, as one sentence; no sentence if all have one.

    >>> print(missing_intervals(study)[0])                                                       # doctest: +SKIP
    An interval needs enough batches (6 for p50, 59 for p95, 299 for p99, 15 for a cost per text); measured were 256 of
    1, 8 of 32 texts.
    """
    metrics = serving_metrics(study.own)
    waits = metrics[metrics.index.get_level_values("metric").isin([f"batch_p{p}_ms" for p in PERCENTILES])]
    if waits["low"].notna().all():
        return Summary()
    needed = ", ".join(f"{n_for_quantile(p / 100)} for p{p}" for p in PERCENTILES)
    n_batches = waits["n_batches"].xs((WHOLE, f"batch_p{PERCENTILES[0]}_ms"), level=("stage", "metric"))
    measured = ", ".join(f"{n:,} of {size}" for size, n in n_batches.items())
    needed += f", {MIN_BATCHES} for a cost per text"
    return Summary([f"An interval needs enough batches ({needed}); measured were {measured} texts."])


def cost_checks(study: LatencyStudy) -> pd.DataFrame:
    """Return the predicted and the measured cost at other thresholds, as text; the columns are those of `checked_cost`.

    `measured_ms` contains its 95% interval. There are no rows if the first stage is not a gate.
    """
    checks = checked_cost(study)
    intervals = [
        _number_with_interval(*values)
        for values in checks[["measured_ms", "measured_low_ms", "measured_high_ms"]].itertuples(index=False)
    ]
    return pd.DataFrame(
        {
            "threshold": checks["threshold"].map("{:.6g}".format),
            "batch_size": checks["batch_size"],
            "reach": checks["reach"].map("{:.1%}".format),
            "surviving": checks["surviving"].map("{:.1f}".format),
            "predicted_ms": checks["predicted_ms"].map("{:.2f}".format),
            "measured_ms": intervals,
            "error": checks["error"].map("{:+.1%}".format),
        }
    )


def cost_and_quality(study: LatencyStudy, run: Run) -> pd.DataFrame:
    """Return what thresholds of the first gate do to the answers of a run, and to the predicted cost per text.

    Parameters
    ----------
    study : LatencyStudy
    run : Run
        A run of the same cascade (same files, settings and thresholds), with shadow scores. Unlabelled texts are left
        out.

    Returns
    -------
    DataFrame
        Indexed by `threshold`: the cascade's own and those of the study's checks. Columns: `accuracy`,
        `in_scope_accuracy`, `reject_recall` (NaN without labels, and where a text would reach a stage that never scored
        it), and for each batch size `text_ms_batch_<size>`, the predicted amortised milliseconds per text.

    Raises
    ------
    RunError
        The run is of another cascade, or its only stage has no threshold.
    """
    check_same_cascade(study, run)
    gate = study.spec.stages[0]
    if gate.role == "final":
        raise RunError(f"{run.name}: has no gate, so there is no threshold to change; give a run of a cascade")
    thresholds = sorted({gate.threshold, *study.settings["checked"]})
    quality = pd.DataFrame(
        [_quality(run, {gate.name: threshold}) for threshold in thresholds],
        index=pd.Index(thresholds, name="threshold"),
        columns=["accuracy", "in_scope_accuracy", "reject_recall"],
        dtype=np.float64,
    )
    costs = predicted_cost(study, thresholds).pivot(index="threshold", columns="batch_size", values="text_ms")
    return quality.join(costs.add_prefix("text_ms_batch_"))


def _quality(run: Run, thresholds: dict[str, float]) -> dict[str, float]:
    """Return the metrics of a run at other thresholds; nothing where its labels or scores do not suffice."""
    if not run.examples["label"].notna().any():
        return {}
    scored = [run.scores(stage.name) for stage in run.spec.stages]  # a damaged table raises here
    try:
        return prediction_metrics(run.spec, run.labelled.replay(thresholds))
    except RunError:
        if all(scores.scored.all() for scores in scored):
            raise
        return {}


def summary(study: LatencyStudy) -> Summary:
    """Return the results of a latency study in plain sentences, with advice: waiting times, and what a gate saves."""
    sizes, gate = study.settings["batch_sizes"], study.spec.stages[0]
    metrics = serving_metrics(study.own)
    values, n_batches = metrics["value"], metrics["n_batches"]
    sentences = [
        f"Of {n_batches[size, WHOLE, 'batch_p50_ms']:,} batches of {size}, half were answered within "
        f"{values[size, WHOLE, 'batch_p50_ms']:.1f} ms and 95% within {values[size, WHOLE, 'batch_p95_ms']:.1f} ms; "
        f"the cascade answered {values[size, WHOLE, 'texts_per_second']:,.0f} texts per second."
        for size in sizes
    ]
    share = values.xs("share", level="metric").loc[sizes[0]].drop(WHOLE)
    slowest = share.idxmax()
    sentences.append(f"Stage {slowest} takes the most time with batches of {sizes[0]}: {share[slowest]:.0%}.")
    fastest = values.xs("texts_per_second", level="metric").xs(WHOLE, level="stage").idxmax()
    if gate.role != "final":
        sentences += _threshold_sentences(study, fastest)
    if fastest != min(sizes):
        sentences.append(
            f"Advice: use batches of {fastest} for the most texts per second, and batches of {min(sizes)} for the "
            "shortest wait."
        )
    return Summary(sentences)


def _threshold_sentences(study: LatencyStudy, fastest: int) -> list[str]:
    """Return what a threshold of the first stage can save at batch size `fastest`, and how exact the prediction is."""
    first, sentences = study.spec.stages[0], []
    extremes, does = ([0.0, 1.0], "answers") if first.is_deferral else ([1.0, 0.0], "stops")
    all_ended, none_ended = predicted_cost(study, extremes, [fastest])["text_ms"]
    sentences.append(
        f"With batches of {fastest}, a text costs {all_ended:.2f} ms if {first.name} {does} (nearly) all texts, and "
        f"{none_ended:.2f} ms if it {does} none: a threshold can save at most {1 - all_ended / none_ended:.0%}."
    )
    checks = checked_cost(study).dropna(subset=["error"])
    if len(checks):
        error = checks["error"].abs()
        sentences.append(
            f"The predicted cost differs from the measured cost by {error.median():.1%} in the median of {len(checks)} "
            f"checks, and by at most {error.max():.1%} (batches of {checks.loc[error.idxmax(), 'batch_size']})."
        )
    return sentences


def _metrics(study: LatencyStudy) -> pd.DataFrame:
    """Return the metrics at the cascade's own thresholds, in the order of the batch sizes and stages."""
    metrics = serving_metrics(study.own)
    measured = metrics.index.droplevel("metric")
    stages = [*(stage.name for stage in study.spec.stages), WHOLE]
    keys = [(size, stage) for size in study.settings["batch_sizes"] for stage in stages if (size, stage) in measured]
    return pd.concat({key: metrics.loc[key] for key in keys}, names=["batch_size", "stage"])


def _with_intervals(metrics: pd.DataFrame) -> pd.DataFrame:
    """Return one row per batch size and stage, one column per metric, and numbers with intervals as text."""
    rows = metrics[["value", "low", "high"]].itertuples(index=False)
    cells = pd.Series([_number_with_interval(*row) for row in rows], index=metrics.index)
    return cells.unstack("metric").loc[metrics.index.droplevel("metric").unique()]


def _number_with_interval(value: float, low: float, high: float) -> str:
    """Return a number with two decimals and its interval.

    >>> _number_with_interval(1.5, 1.25, 2.0), _number_with_interval(1.5, float("nan"), float("nan"))
    ('1.50 (1.25 to 2.00)', '1.50')
    """
    return f"{value:.2f}" + ("" if np.isnan(low) else f" ({low:.2f} to {high:.2f})")

"""Present a latency study for people: tables with formatted numbers, and a summary in sentences."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import pandas as pd

from cascade_lab.analysis.metrics import prediction_metrics
from cascade_lab.analysis.sentences import Summary
from cascade_lab.analysis.serving_latency import WHOLE, LatencyStudy, checked_cost, predicted_cost, serving_metrics
from cascade_lab.exceptions import RunError

if TYPE_CHECKING:
    from cascade_lab.run import Run


def waiting_times(study: LatencyStudy) -> pd.DataFrame:
    """Return how long a caller waits for a whole batch, as text with 95% intervals.

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
        A run of the same cascade, with shadow scores. Unlabelled texts are left out.

    Returns
    -------
    DataFrame
        Indexed by `threshold`: the cascade's own and those of the study's checks. Columns: `accuracy`,
        `in_scope_accuracy`, `reject_recall`, and for each batch size `text_ms_batch_<size>`.

    Raises
    ------
    RunError
        The first stage is not a gate of the run too; or a text would reach a stage that never scored it.
    """
    gate = study.spec.stages[0]
    if not gate.is_gate or gate.name != run.spec.stages[0].name:
        raise RunError(f"{run.name}: its first stage is not the gate '{gate.name}' of the study; give another run")
    run = run.labelled
    thresholds = sorted({gate.threshold, *study.settings["checked"]})
    quality = pd.DataFrame(
        [prediction_metrics(run.spec, run.replay({gate.name: threshold})) for threshold in thresholds],
        index=pd.Index(thresholds, name="threshold"),
    )[["accuracy", "in_scope_accuracy", "reject_recall"]]
    costs = predicted_cost(study, thresholds).pivot(index="threshold", columns="batch_size", values="text_ms")
    return quality.join(costs.add_prefix("text_ms_batch_"))


def summary(study: LatencyStudy) -> Summary:
    """Return the results of a latency study in plain sentences, with advice: waiting times, and what a gate saves."""
    sizes, gate = study.settings["batch_sizes"], study.spec.stages[0]
    values = serving_metrics(study.own)["value"]
    sentences = [
        f"With batches of {size}, half of the texts have an answer within {values[size, WHOLE, 'batch_p50_ms']:.1f} ms "
        f"and 95% within {values[size, WHOLE, 'batch_p95_ms']:.1f} ms; the cascade answers "
        f"{values[size, WHOLE, 'texts_per_second']:,.0f} texts per second."
        for size in sizes
    ]
    share = values.xs("share", level="metric").loc[sizes[0]].drop(WHOLE)
    slowest = share.idxmax()
    sentences.append(f"Stage {slowest} takes the most time with batches of {sizes[0]}: {share[slowest]:.0%}.")
    fastest = values.xs("texts_per_second", level="metric").xs(WHOLE, level="stage").idxmax()
    if gate.is_gate:
        sentences += _threshold_sentences(study, fastest)
    if fastest != min(sizes):
        sentences.append(
            f"Advice: use batches of {fastest} for the most texts per second, and batches of {min(sizes)} for the "
            "shortest wait."
        )
    return Summary(sentences)


def _threshold_sentences(study: LatencyStudy, fastest: int) -> list[str]:
    """Return what a threshold of the first gate can save at batch size `fastest`, and how exact the prediction is."""
    gate, sentences = study.spec.stages[0], []
    all_stopped, none_stopped = predicted_cost(study, [1.0, 0.0], [fastest])["text_ms"]
    sentences.append(
        f"With batches of {fastest}, a text costs {all_stopped:.2f} ms if {gate.name} stops (nearly) all texts, and "
        f"{none_stopped:.2f} ms if it stops none: a threshold can save at most {1 - all_stopped / none_stopped:.0%}."
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
    cells = pd.Series([_number_with_interval(*row) for row in metrics.itertuples(index=False)], index=metrics.index)
    return cells.unstack("metric").loc[metrics.index.droplevel("metric").unique()]


def _number_with_interval(value: float, low: float, high: float) -> str:
    """Return a number with two decimals and its interval.

    >>> _number_with_interval(1.5, 1.25, 2.0), _number_with_interval(1.5, float("nan"), float("nan"))
    ('1.50 (1.25 to 2.00)', '1.50')
    """
    return f"{value:.2f}" + ("" if np.isnan(low) else f" ({low:.2f} to {high:.2f})")

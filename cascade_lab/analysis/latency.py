"""Compute how long texts take at each stage, from the times of a run.

A run measures whole batches. The *amortised* time per text is the time of its batch divided by the number of texts in
the batch; no caller waits for exactly that time. Where several threads score batches at the same time, each batch has
its own time, so the times of all batches add up to more than the time that passed.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from cascade_lab.analysis.sentences import Summary
from cascade_lab.exceptions import RunError

if TYPE_CHECKING:
    from cascade_lab.run import Run

PERCENTILES = (50, 95, 99)


@dataclass(frozen=True)
class StageLatency:
    """The amortised milliseconds per text at one stage.

    Attributes
    ----------
    text_ms : ndarray of float, shape (n_texts,)
        Amortised milliseconds per text: every text of a batch has the same value.
    percentiles_ms : dict of int to float
        The 50th, 95th and 99th percentile of `text_ms`; NaN where no text reached the stage.
    seconds : float
        The times of the stage's batches added up; of several threads together, more than the time that passed.
    share : float
        `seconds` as a fraction of the `seconds` of all stages.
    """

    text_ms: np.ndarray
    percentiles_ms: dict[int, float]
    seconds: float
    share: float


def is_timed(run: Run) -> bool:
    """Return whether a run has times. A run from logits has none."""
    return len(run.timings) > 0


def amortized_ms(seconds: np.ndarray, n_examples: np.ndarray) -> np.ndarray:
    """Return the milliseconds per text of every text, from the seconds and the sizes of the batches.

    Parameters
    ----------
    seconds : ndarray, shape (n_batches,)
    n_examples : ndarray of int, shape (n_batches,)

    Returns
    -------
    ndarray of float, shape (n_texts,)

    Examples
    --------
    >>> amortized_ms(np.array([0.010, 0.006]), np.array([2, 1])).tolist()
    [5.0, 5.0, 6.0]
    """
    return np.repeat(1000 * np.asarray(seconds) / np.maximum(n_examples, 1), n_examples)  # 0 texts: nothing repeats


def stage_latencies(run: Run) -> dict[str, StageLatency]:
    """Return the latency of each stage on the serial path. Shadow scores are not timed.

    Raises
    ------
    RunError
        The run was not timed.
    """
    _check_timed(run)
    timings = run.timings
    seconds = (timings["tokenize_seconds"] + timings["run_seconds"]).to_numpy()
    n_examples = timings["n_examples"].to_numpy()
    latencies = {}
    for stage in run.spec.stages:
        of_stage = (timings["stage"] == stage.name).to_numpy()
        text_ms = amortized_ms(seconds[of_stage], n_examples[of_stage])
        latencies[stage.name] = StageLatency(
            text_ms=text_ms,
            percentiles_ms={p: float(np.percentile(text_ms, p)) if len(text_ms) else np.nan for p in PERCENTILES},
            seconds=float(seconds[of_stage].sum()),
            share=float(seconds[of_stage].sum() / seconds.sum()) if seconds.sum() else np.nan,
        )
    return latencies


def latency_summary(run: Run) -> Summary:
    """Return plain sentences about the times of a run, for people; no sentence if the run was not timed."""
    if not is_timed(run):
        return Summary()
    latencies = stage_latencies(run)
    slowest = max(latencies, key=lambda name: latencies[name].seconds)
    share, p50_ms = latencies[slowest].share, latencies[slowest].percentiles_ms[50]
    if np.isnan(share):  # the clock was too coarse for the batches
        return Summary()
    sentence = (
        f"Stage {slowest} takes {share:.0%} of the time of all batches; half of its texts take {p50_ms:.2f} ms or less "
        "(amortised: the time of a batch divided by its texts)."
    )
    return Summary([sentence])


def timing_note(run: Run) -> Summary:
    """Return what the times of a run are, for people: what is divided by what, and why they add up to more than passed.

    Raises
    ------
    RunError
        The run was not timed.
    """
    seconds = sum(latency.seconds for latency in stage_latencies(run).values())
    stages = (run.manifest.get("stages") or {}).values()
    n_threads = max((n for n in (stage.get("n_workers") for stage in stages) if isinstance(n, int)), default=1)
    passed = run.manifest.get("serial_seconds")
    note = f"share: of {seconds:.2f} s, the times of all batches added up"
    if n_threads > 1:
        note += f"; {n_threads} threads score batches at the same time"
        note += f", so the run took {passed:.2f} s" if isinstance(passed, float) else ""
    return Summary(["ms/text: amortised milliseconds per text, the time of a batch divided by its texts", note])


def predicted_latency(run: Run, reach: float | np.ndarray) -> dict[str, np.ndarray]:
    """Return the latency per text if a fraction `reach` of the texts went beyond the first stage.

    The latency of a text is the sum of the amortised times of the stages that it reaches; no client waits exactly that
    long. Of the texts beyond the first
    stage, each later stage gets the same fraction as in this run. The latency is valid at the batch size of the run. A
    text that is slow at one stage (a long text) is taken to be equally slow at the next stages.

    Parameters
    ----------
    run : Run
    reach : float or ndarray, shape (n,)

    Returns
    -------
    dict of str to ndarray, shape (n,)
        `mean_ms`, `p50_ms`, `p95_ms`, `p99_ms`.

    Raises
    ------
    RunError
        The run was not timed.
    """
    reach = np.atleast_1d(np.asarray(reach, dtype=np.float64))
    first, later, shares = _paths(run)
    latency = {"mean_ms": first.mean() + reach * (shares @ later.mean(axis=1) - first.mean())}
    ms = np.concatenate([first, later.ravel()])
    order = np.argsort(ms, kind="stable")
    path_weights = np.column_stack([1 - reach, np.outer(reach, shares)])
    below = np.repeat(path_weights, len(first), axis=1)[:, order].cumsum(axis=1) / len(first)
    for p in PERCENTILES:
        latency[f"p{p}_ms"] = ms[order][np.minimum((below < p / 100 - 1e-12).sum(axis=1), len(ms) - 1)]
    return latency


def reach_within(run: Run, name: str, limit: float) -> float:
    """Return the largest fraction of texts beyond the first stage at which a latency is at most `limit` milliseconds.

    Parameters
    ----------
    run : Run
    name : str
        A key of `predicted_latency`.
    limit : float

    Returns
    -------
    float
        Below 0 if even the first stage alone takes longer than `limit`.

    Raises
    ------
    RunError
        The run was not timed.
    """
    first, later, shares = _paths(run)
    if name == "mean_ms":
        remaining, more_ms = limit - first.mean(), shares @ later.mean(axis=1) - first.mean()
        return float(np.clip(remaining / more_ms, -1, 1)) if more_ms > 0 else float(np.sign(remaining) or 1)
    # Within the limit is the fraction (1 - reach) · first_only + reach · beyond of the texts.
    fraction = int(name[1:-3]) / 100
    first_only, beyond = np.mean(first <= limit), shares @ np.mean(later <= limit, axis=1)
    if beyond >= fraction:
        return 1.0
    return float((first_only - fraction) / (first_only - beyond)) if first_only >= fraction else -1.0


def _check_timed(run: Run) -> None:
    if not is_timed(run):
        raise RunError(f"{run.name}: was not timed; latencies need a run that `cascade-lab run` made")


def _paths(run: Run) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return 1,000 quantiles of the milliseconds of the texts that end at each stage.

    Returns
    -------
    tuple of three ndarrays
        Of the texts that end at the first stage, shape (1000,). Of those that end at each later stage, shape
        (n_later, 1000), the time of the earlier stages included. Of the texts that go beyond the first stage, the
        fraction that ends at each later stage, shape (n_later,). Without a later stage, the two are as if a stage that
        takes no time followed.
    """
    text_ms = [latency.text_ms for latency in stage_latencies(run).values()]
    ranks = (np.arange(1000) + 0.5) / 10
    # Each quantile is a time that occurs: interpolated ones of a few batches have another mean.
    quantiles = [np.percentile(ms, ranks, method="inverted_cdf") if len(ms) else np.zeros(1000) for ms in text_ms]
    ends = np.cumsum(quantiles, axis=0)
    if len(ends) == 1:
        return ends[0], ends, np.ones(1)
    n_reached = np.minimum.accumulate([len(ms) for ms in text_ms[1:]])
    if not n_reached[0]:  # nothing is known of the later stages; a text passes through all of them
        return ends[0], ends[1:], np.eye(len(n_reached))[-1]
    return ends[0], ends[1:], -np.diff(np.append(n_reached, 0)) / n_reached[0]

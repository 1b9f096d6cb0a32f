"""What a cascade costs when it serves live, and what a threshold does to that, from the seconds of a latency study."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from scipy.optimize import nnls

from cascade_lab.analysis.bootstrap import interval, resample_counts
from cascade_lab.analysis.latency import PERCENTILES
from cascade_lab.errors import RunError
from cascade_lab.run import write_json
from cascade_lab.spec import CascadeSpec
from cascade_lab.wholly import UNFINISHED, whole_directory

LATENCY_DIRECTORY: Any = {"sign": "latency.json", "what": "latency study", "error": RunError}
WHOLE = "end to end"


@dataclass(frozen=True)
class LatencyStudy:
    """Live serial runs of a cascade, as `cascade-lab latency` keeps them: raw seconds, every percentile derived later.

    Attributes
    ----------
    settings : dict
        `latency.json`: the cascade, the eval set, `batch_sizes`, `repeats`, `batches` (the most of a repeat at one
        batch size), `seed`, `checked` (thresholds of the first gate), versions, processor.
    texts : DataFrame
        A text a row: `example_id`, and for each stage `<stage>_probability` (what a threshold is compared with) and
        `<stage>_tokens`.
    timings : DataFrame
        A batch of a stage a row: `check` (served to check a prediction, at another threshold than the cascade's own),
        `threshold` (of the first gate), `repeat`, `batch_size` (texts that came in), `stage`, `batch`, `n_examples`
        (that reached the stage), `sequence_length` (of the longest), `n_tokens`, `tokenize_seconds`, `run_seconds`,
        `answer_seconds`.
    """

    settings: dict[str, Any]
    texts: pd.DataFrame
    timings: pd.DataFrame

    @classmethod
    def read(cls, directory: str | Path) -> LatencyStudy:
        """Read a latency directory; raises RunError where it is none, or unfinished."""
        directory = Path(directory)
        if directory.name.endswith(UNFINISHED):
            raise RunError(f"{directory}: an unfinished latency study, left by a crash; delete it, measure again")
        try:
            settings = json.loads((directory / "latency.json").read_text(encoding="utf-8"))
            tables = [pd.read_parquet(directory / f"{name}.parquet") for name in ("texts", "timings")]
        except (OSError, ValueError) as error:  # pyarrow's errors are of these kinds
            raise RunError(f"{directory}: no latency directory; make one with `cascade-lab latency`") from error
        return cls(settings, *tables)

    def write(self, output: str | Path, *, overwrite: bool = False) -> None:
        """Write the directory `output`, whole or not at all; raises RunError where it exists or cannot be written."""
        with whole_directory(output, overwrite=overwrite, **LATENCY_DIRECTORY) as directory:
            self.texts.to_parquet(directory / "texts.parquet", index=False)
            self.timings.to_parquet(directory / "timings.parquet", index=False)
            write_json(directory / "latency.json", self.settings)

    @cached_property
    def spec(self) -> CascadeSpec:
        return CascadeSpec.from_dict(self.settings["cascade"], where="latency.json")

    @property
    def own(self) -> pd.DataFrame:
        """The timings at the cascade's own thresholds."""
        return self.timings[~self.timings["check"]]

    @property
    def checks(self) -> pd.DataFrame:
        """The timings at other thresholds, which check predictions."""
        return self.timings[self.timings["check"]]

    def batches(self, batch_size: int, repeat: int) -> list[np.ndarray]:
        """Return the rows of `texts` in each batch that came in."""
        most, seed = self.settings["batches"], self.settings["seed"]
        return incoming_batches(len(self.texts), batch_size, repeat, most=most, seed=seed)


def incoming_batches(n: int, batch_size: int, repeat: int, *, most: int, seed: int = 0) -> list[np.ndarray]:
    """Return the rows of each batch of a repeat: `n` texts in a new order, cut into at most `most` batches.

    A server cannot sort the texts by length before they come, so they are not.

    >>> [batch.tolist() for batch in incoming_batches(5, 2, 0, most=9)]
    [[2, 4], [3, 0], [1]]
    """
    order = np.random.default_rng([seed, repeat]).permutation(n)[: batch_size * most]
    return np.split(order, range(batch_size, len(order), batch_size))


def live_figures(timings: pd.DataFrame, *, level: float = 0.95, n_resamples: int = 1000, seed: int = 0) -> pd.DataFrame:
    """Return what each batch size costs, at each stage and end to end, with bootstrap intervals over whole batches.

    The latency *of a batch* is what one caller waits for all its texts; the time *a text* is the batch's seconds
    divided among its texts, the inverse of texts a second, which nobody waits.

    Parameters
    ----------
    timings : DataFrame
        Of a `LatencyStudy`, at one threshold.

    Returns
    -------
    DataFrame
        Indexed by `batch_size`, `stage` ("end to end" for the whole) and `figure`; columns `value`, `low`, `high` (NaN
        where only one batch came in).
        The figures: `batch_p50_ms`, `batch_p95_ms`, `batch_p99_ms` (over the texts that were there, each with its
        batch's time: the smallest time within which that fraction had its answer), `text_ms`, `texts_per_second`,
        `tokenize_share` (of the stage's time), `share` (the stage's, of the whole's time).
    """
    rows = []
    for batch_size, own in timings.groupby("batch_size"):
        incoming = pd.MultiIndex.from_frame(own[["repeat", "batch"]]).unique()
        n_texts, seconds, tokenize = (_by_batch(own, incoming, column) for column in ("n_examples", "all", "tokenize"))
        # A batch comes in with the texts that its first stage sees, and is answered when its last stage has run.
        n_texts[WHOLE] = n_texts.iloc[:, 0]
        seconds[WHOLE], tokenize[WHOLE] = seconds.sum(axis=1), tokenize.sum(axis=1)
        # The first row counts every batch once: the figure itself.
        drawn = resample_counts(len(incoming), n_resamples=n_resamples, seed=seed)
        counts = np.vstack([np.ones((1, len(incoming))), drawn])
        whole = counts @ seconds[WHOLE].to_numpy()
        for stage in seconds:
            n, own_seconds = n_texts[stage].to_numpy(), seconds[stage].to_numpy()
            spent = counts @ own_seconds
            figures = {
                f"batch_p{p}_ms": 1000 * _weighted_percentile(own_seconds, counts * n, p / 100) for p in PERCENTILES
            }
            with np.errstate(divide="ignore", invalid="ignore"):
                figures["text_ms"] = 1000 * spent / (counts @ n)
                figures["texts_per_second"] = counts @ n / spent
                figures["tokenize_share"] = counts @ tokenize[stage].to_numpy() / spent
                figures["share"] = spent / whole
            kept = slice(1, None if len(incoming) > 1 else 1)  # one batch alone says nothing of others
            rows += [
                (batch_size, stage, name, *interval(values[0], values[kept], level=level))
                for name, values in figures.items()
            ]
    keys = ["batch_size", "stage", "figure"]
    return pd.DataFrame(rows, columns=[*keys, "value", "low", "high"]).set_index(keys).sort_index()


def by_length(timings: pd.DataFrame, *, bins: int = 8) -> pd.DataFrame:
    """Return the time a text by the length of its batch, in up to `bins` groups of like size, of at least 8 batches.

    Returns
    -------
    DataFrame
        `batch_size`, `stage`, `sequence_length` (the group's mean), `n_batches`, and the quartiles of the time a text:
        `text_p25_ms`, `text_p50_ms`, `text_p75_ms`.
    """
    rows = []
    in_order = timings.sort_values("batch_size", kind="stable")
    for (batch_size, stage), own in in_order.groupby(["batch_size", "stage"], sort=False):
        text_ms = 1000 * _seconds(own) / own["n_examples"]
        ranks = own["sequence_length"].rank(method="min", pct=True)  # batches of one length stay together
        groups = np.ceil(ranks * np.clip(len(own) // 8, 1, bins))
        for _, group in text_ms.groupby(groups):
            length = own.loc[group.index, "sequence_length"].mean()
            rows.append((batch_size, stage, length, len(group), *np.quantile(group, [0.25, 0.5, 0.75])))
    quartiles = ["text_p25_ms", "text_p50_ms", "text_p75_ms"]
    return pd.DataFrame(rows, columns=["batch_size", "stage", "sequence_length", "n_batches", *quartiles])


@dataclass(frozen=True)
class StageCost:
    """What a batch costs at one stage, interpolated over its number of texts and their length.

    Between two of the `knots` (numbers of texts that were measured often, at most one from 2^k to 2^(k+1)) the seconds
    go linearly; beyond the first and last the seconds a text stay as they are there. At each knot they are linear in
    the batch's longest text and in its mean length: the first counts where batches are padded, the second where they
    are not.
    """

    knots: np.ndarray
    weights: np.ndarray

    @classmethod
    def fit(cls, n_examples: np.ndarray, longest: np.ndarray, n_tokens: np.ndarray, seconds: np.ndarray) -> StageCost:
        """Fit to measured batches by least squares of the seconds a text; more texts or tokens never cost less."""
        octave = np.log2(n_examples).astype(int)
        often = [k for k, n in enumerate(np.bincount(octave)) if n >= 8] or np.unique(octave)
        knots = np.array([np.quantile(n_examples[octave == k], 0.5, method="inverted_cdf") for k in often])
        basis = cls(knots, np.empty(0))._basis(n_examples, longest, n_tokens)
        return cls(knots, nnls(basis / n_examples[:, None], seconds / n_examples)[0])

    def __call__(self, n_examples: np.ndarray, longest: np.ndarray, n_tokens: np.ndarray) -> np.ndarray:
        """Return the seconds of batches of `n_examples` texts, `n_tokens` in all, `longest` in the longest."""
        return self._basis(n_examples, longest, n_tokens) @ self.weights

    def _basis(self, n_examples: np.ndarray, longest: np.ndarray, n_tokens: np.ndarray) -> np.ndarray:
        inside = np.clip(n_examples, self.knots[0], self.knots[-1])
        hats = [np.interp(inside, self.knots, hat) for hat in np.eye(len(self.knots))]
        scale = np.array([np.ones(len(n_examples)), longest, n_tokens / n_examples]) * (n_examples / inside)
        return np.concatenate([hat * scale for hat in hats]).T


def stage_costs(study: LatencyStudy) -> dict[str, StageCost]:
    """Fit the cost of each stage that something reached to what was measured at the cascade's own thresholds."""
    return {
        str(stage): StageCost.fit(
            *(rows[column].to_numpy() for column in ("n_examples", "sequence_length", "n_tokens")),
            _seconds(rows).to_numpy(),
        )
        for stage, rows in study.own.groupby("stage")
    }


def predicted_cost(
    study: LatencyStudy, thresholds: Sequence[float] | np.ndarray, batch_sizes: Sequence[int] | None = None
) -> pd.DataFrame:
    """Return what the cascade would cost at other thresholds of its first gate, from runs at its own.

    Of each batch that came in, the texts whose probability is at least the threshold go on, in a smaller batch, whose
    cost is interpolated over its number of texts and their length: stage 1 + reach × stage 2 at the batch size that
    survives. What it does not know: a first stage that runs many times on end, since nothing goes on, finds its weights
    in the processor's cache, and so costs less than predicted; a number of texts that a stage never had costs more.

    Returns
    -------
    DataFrame
        `threshold`, `batch_size`, `reach` (fraction beyond the first gate), `surviving` (mean size of the batches that
        the second stage sees), `text_ms` (mean); NaN where a stage would be reached that never was.
    """
    costs = stage_costs(study)
    rows = []
    for batch_size in batch_sizes or study.settings["batch_sizes"]:
        batches = [batch for repeat in range(study.settings["repeats"]) for batch in study.batches(batch_size, repeat)]
        rows += [(t, batch_size, *_predict(study, costs, t, batches)) for t in thresholds]
    return pd.DataFrame(rows, columns=["threshold", "batch_size", "reach", "surviving", "text_ms"])


def checked_cost(study: LatencyStudy) -> pd.DataFrame:
    """Return the predicted beside the measured cost, at each threshold and batch size that was served to check it.

    The prediction is for the very batches that were served, from none of their times.

    Returns
    -------
    DataFrame
        `threshold`, `batch_size`, `reach`, `surviving`, `predicted_ms`, `measured_ms` (a text, mean), its interval
        `measured_low_ms` and `measured_high_ms`, and `error`: (predicted - measured) / measured.
    """
    costs = stage_costs(study)
    rows = []
    for (threshold, batch_size), own in study.checks.groupby(["threshold", "batch_size"]):
        served = own[["repeat", "batch"]].drop_duplicates().itertuples(index=False)
        batches = [study.batches(batch_size, repeat)[batch] for repeat, batch in served]
        measured = live_figures(own).loc[(batch_size, WHOLE, "text_ms")]
        reach, surviving, predicted = _predict(study, costs, threshold, batches)
        error = predicted / measured["value"] - 1
        rows.append((threshold, batch_size, reach, surviving, predicted, *measured, error))
    columns = ["threshold", "batch_size", "reach", "surviving", "predicted_ms"]
    return pd.DataFrame(rows, columns=[*columns, "measured_ms", "measured_low_ms", "measured_high_ms", "error"])


def _predict(
    study: LatencyStudy, costs: dict[str, StageCost], threshold: float, batches: list[np.ndarray]
) -> tuple[float, float, float]:
    """Return reach, mean surviving batch and predicted milliseconds a text of batches of rows of `study.texts`."""
    rows = np.concatenate(batches)
    batch = np.repeat(np.arange(len(batches)), [len(b) for b in batches])
    n_texts, seconds, arrived = len(rows), 0.0, [len(rows)]
    sizes = []
    for place, stage in enumerate(study.spec.stages):
        n = np.bincount(batch)
        n, there = n[n > 0], np.unique(batch, return_inverse=True)[1]
        sizes.append(n.mean() if len(n) else np.nan)
        if len(rows):
            tokens = study.texts[f"{stage.name}_tokens"].to_numpy()[rows]
            longest = np.zeros(len(n), dtype=int)
            np.maximum.at(longest, there, tokens)
            cost = costs.get(stage.name)
            seconds += cost(n, longest, np.bincount(there, tokens)).sum() if cost else np.nan
        if stage.is_gate:
            least = threshold if place == 0 else stage.threshold
            passes = study.texts[f"{stage.name}_probability"].to_numpy()[rows] >= least
            rows, batch = rows[passes], batch[passes]
        arrived.append(len(rows))
    return arrived[1] / n_texts, sizes[min(1, len(sizes) - 1)], 1000 * seconds / n_texts


def _seconds(timings: pd.DataFrame) -> pd.Series:
    return timings[["tokenize_seconds", "run_seconds", "answer_seconds"]].sum(axis=1)


def _by_batch(timings: pd.DataFrame, incoming: pd.MultiIndex, column: str) -> pd.DataFrame:
    """Return a row for each batch that came in and a column a stage, 0 where nothing reached the stage."""
    values = {"all": _seconds(timings), "tokenize": timings["tokenize_seconds"]}.get(column)
    table = timings.assign(value=timings[column] if values is None else values)
    table = table.pivot(index=["repeat", "batch"], columns="stage", values="value")
    return table.reindex(index=incoming, columns=timings["stage"].unique()).fillna(0)


def _weighted_percentile(values: np.ndarray, weights: np.ndarray, fraction: float) -> np.ndarray:
    """Return, for each row of `weights`, the smallest value at or below which that fraction of the weight lies."""
    order = np.argsort(values, kind="stable")
    below = weights[:, order].cumsum(axis=1)
    at = (below < fraction * below[:, -1:] - 1e-9).sum(axis=1)
    return np.where(below[:, -1] > 0, values[order][np.minimum(at, len(values) - 1)], np.nan)

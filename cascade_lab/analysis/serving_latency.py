"""Compute what live serving costs at each batch size and threshold, from the raw times of a latency study."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from html import escape
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from scipy.optimize import nnls

from cascade_lab.analysis.latency import PERCENTILES
from cascade_lab.analysis.latency_intervals import quantile_interval, ratio_interval
from cascade_lab.atomic import UNFINISHED, whole_directory, write_json
from cascade_lab.decisions import StageDecision, route
from cascade_lab.exceptions import RunError
from cascade_lab.latency_schema import read_latency
from cascade_lab.spec import CascadeSpec
from cascade_lab.text import printable

LATENCY_DIRECTORY: Any = {"marker": "latency.json", "what": "latency study", "error": RunError}
WHOLE = "end to end"


@dataclass(frozen=True, repr=False)
class LatencyStudy:
    """Timed live serial runs of a cascade, as `cascade-lab latency` writes them. It keeps raw seconds.

    Attributes
    ----------
    settings : dict
        The content of `latency.json`: the cascade, the eval set, `batch_sizes`, `repeats`, `batches` (the most batches
        per repeat and batch size), `seed`, `checked` (thresholds of the first gate), versions, processor.
    texts : DataFrame
        One row per text: `example_id`, and for each stage `<stage>_probability` (the number that is compared with the
        threshold) and `<stage>_tokens`.
    timings : DataFrame
        One row per batch of a stage: `check` (served at another threshold than the cascade's own, to check a
        prediction), `threshold` (of the first gate), `repeat`, `batch_size` (the number of texts that arrived
        together), `stage`, `batch`, `n_examples` (the texts that reached the stage), `sequence_length` (of the longest
        text), `n_tokens`, `tokenize_seconds`, `run_seconds`, `answer_seconds`.
    """

    settings: dict[str, Any]
    texts: pd.DataFrame
    timings: pd.DataFrame

    @classmethod
    def read(cls, directory: str | Path) -> LatencyStudy:
        """Read a latency directory; raises RunError if it is not one, or is unfinished."""
        directory = Path(directory)
        if directory.name.endswith(UNFINISHED):
            raise RunError(f"{directory}: an unfinished latency study, left by a crash; delete it and measure again")
        if not (directory / "latency.json").is_file():
            raise RunError(f"{directory}: not a latency directory; make one with `cascade-lab latency`")
        return cls(*read_latency(directory))

    def write(self, output: str | Path, *, overwrite: bool = False) -> None:
        """Write the directory `output`, whole or not at all; raises RunError if it exists or cannot be written."""
        with whole_directory(output, overwrite=overwrite, **LATENCY_DIRECTORY) as directory:
            self.write_into(directory)

    def write_into(self, directory: Path) -> None:
        """Write the tables and the settings into an empty directory (that of `whole_directory`)."""
        self.texts.to_parquet(directory / "texts.parquet", index=False)
        self.timings.to_parquet(directory / "timings.parquet", index=False)
        write_json(directory / "latency.json", self.settings, error=RunError)

    def __repr__(self) -> str:
        return printable(f"<LatencyStudy {self.spec.name}: {self._described()}>")

    def _repr_html_(self) -> str:
        name, described = (escape(printable(text)) for text in (self.spec.name, self._described()))
        return f"<p><b>{name}</b>: {described}</p>"

    def _described(self) -> str:
        sizes = ", ".join(f"{size}" for size in self.settings["batch_sizes"])
        processor = self.settings.get("processor", "an unknown processor")
        return f"{len(self.texts):,} texts, {self.settings['repeats']} repeats, batches of {sizes}, on {processor}"

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
        """Return the rows of `texts` in each batch that arrived."""
        max_batches, seed = self.settings["batches"], self.settings["seed"]
        return incoming_batches(len(self.texts), batch_size, repeat, max_batches=max_batches, seed=seed)


def incoming_batches(n: int, batch_size: int, repeat: int, *, max_batches: int, seed: int = 0) -> list[np.ndarray]:
    """Return the rows of each batch of a repeat: `n` texts in a new random order, in at most `max_batches` batches.

    A server cannot sort texts by length before they arrive, so they are not sorted here.

    >>> [batch.tolist() for batch in incoming_batches(5, 2, 0, max_batches=9)]
    [[2, 4], [3, 0], [1]]
    """
    order = np.random.default_rng([seed, repeat]).permutation(n)[: batch_size * max_batches]
    return np.split(order, range(batch_size, len(order), batch_size))


def serving_metrics(timings: pd.DataFrame, *, level: float = 0.95) -> pd.DataFrame:
    """Return the cost of each batch size, at each stage and end to end, with intervals.

    The latency *of a batch* is the time that one caller waits for all texts of the batch. The *amortised* time per text
    is the time of the batch divided by its texts: the inverse of texts per second. No caller waits for exactly that.

    Parameters
    ----------
    timings : DataFrame
        Of a `LatencyStudy`, at one threshold.
    level : float
        Of the intervals. They are of more measurements of these texts on this machine: see
        `cascade_lab.analysis.latency_intervals`.

    Returns
    -------
    DataFrame
        Indexed by `batch_size`, `stage` ("end to end" for the whole cascade) and `metric`; columns `value`, `low`,
        `high` (both NaN where there are too few batches) and `n_batches` (those that the metric is computed from). The
        metrics:

        - `batch_p50_ms`, `batch_p95_ms`, `batch_p99_ms`: the smallest time within which that fraction of the batches
          had an answer, of the batches of which a text reached the stage. The last batch of a repeat is left out if it
          has fewer texts than `batch_size`. The intervals are exact (`quantile_interval`).
        - `text_ms`: the amortised milliseconds per text.
        - `texts_per_second`.
        - `tokenize_share`: the fraction of the stage's time before its session runs.
        - `share`: the stage's fraction of the time end to end.
    """
    rows = []
    for batch_size, of_size in timings.groupby("batch_size"):
        incoming = pd.MultiIndex.from_frame(of_size[["repeat", "batch"]]).unique()
        n_texts = _by_batch(of_size, incoming, of_size["n_examples"])
        seconds = _by_batch(of_size, incoming, _seconds(of_size))
        tokenize = _by_batch(of_size, incoming, of_size["tokenize_seconds"])
        # All texts of a batch reach the first stage. The batch is answered when its last stage has run.
        n_texts[WHOLE] = n_texts.iloc[:, 0]
        seconds[WHOLE], tokenize[WHOLE] = seconds.sum(axis=1), tokenize.sum(axis=1)
        is_full = n_texts[WHOLE] == batch_size
        for stage in seconds:
            reached = n_texts[stage] > 0
            waits_ms = 1000 * seconds.loc[reached & is_full, stage]
            for p in PERCENTILES:
                wait = quantile_interval(waits_ms, p / 100, level=level)
                rows.append((batch_size, stage, f"batch_p{p}_ms", *wait, len(waits_ms)))
            n, of_stage = n_texts.loc[reached, stage], seconds.loc[reached, stage]
            ratios = {
                "text_ms": ratio_interval(1000 * of_stage, n, level=level),
                "texts_per_second": ratio_interval(n, of_stage, level=level),
                "tokenize_share": ratio_interval(tokenize.loc[reached, stage], of_stage, level=level),
                "share": ratio_interval(seconds[stage], seconds[WHOLE], level=level),
            }
            rows += [(batch_size, stage, name, *ratio, int(reached.sum())) for name, ratio in ratios.items()]
    keys = ["batch_size", "stage", "metric"]
    return pd.DataFrame(rows, columns=[*keys, "value", "low", "high", "n_batches"]).set_index(keys).sort_index()


def by_length(timings: pd.DataFrame, *, bins: int = 8) -> pd.DataFrame:
    """Return the amortised time per text by the length of its batch.

    Parameters
    ----------
    timings : DataFrame
        Of a `LatencyStudy`, at one threshold.
    bins : int
        The most groups per batch size and stage. The groups have similar sizes, of at least 8 batches.

    Returns
    -------
    DataFrame
        One row per group: `batch_size`, `stage`, `sequence_length` (the mean of the group), `n_batches`, and the
        quartiles of the amortised milliseconds per text: `text_p25_ms`, `text_p50_ms`, `text_p75_ms`.
    """
    rows = []
    in_order = timings.sort_values("batch_size", kind="stable")
    for (batch_size, stage), batches in in_order.groupby(["batch_size", "stage"], sort=False):
        text_ms = 1000 * _seconds(batches) / batches["n_examples"]
        ranks = batches["sequence_length"].rank(method="min", pct=True)  # batches of equal length stay together
        groups = np.ceil(ranks * np.clip(len(batches) // 8, 1, bins))
        for _, group in text_ms.groupby(groups):
            length = batches.loc[group.index, "sequence_length"].mean()
            rows.append((batch_size, stage, length, len(group), *np.quantile(group, [0.25, 0.5, 0.75])))
    quartiles = ["text_p25_ms", "text_p50_ms", "text_p75_ms"]
    return pd.DataFrame(rows, columns=["batch_size", "stage", "sequence_length", "n_batches", *quartiles])


@dataclass(frozen=True)
class StageCost:
    """The time of a batch at one stage, interpolated over its number of texts and their lengths.

    The `knots` are numbers of texts that were measured often: at most one from 2^k to 2^(k+1). Between two knots the
    seconds are linear in the number of texts; below the first knot and above the last, the seconds per text are
    constant. At each knot the seconds are linear in the length of the longest text and in the mean length: the first
    matters where batches are padded, the second where they are not.
    """

    knots: np.ndarray
    weights: np.ndarray

    @classmethod
    def fit(cls, n_examples: np.ndarray, longest: np.ndarray, n_tokens: np.ndarray, seconds: np.ndarray) -> StageCost:
        """Fit to measured batches by least squares of the seconds per text. More texts or tokens never cost less."""
        octave = np.log2(n_examples).astype(int)
        octaves = [k for k, n in enumerate(np.bincount(octave)) if n >= 8] or np.unique(octave)
        knots = np.array([np.quantile(n_examples[octave == k], 0.5, method="inverted_cdf") for k in octaves])
        basis = cls(knots, np.empty(0))._basis(n_examples, longest, n_tokens)
        return cls(knots, nnls(basis / n_examples[:, None], seconds / n_examples)[0])

    def __call__(self, n_examples: np.ndarray, longest: np.ndarray, n_tokens: np.ndarray) -> np.ndarray:
        """Return the seconds of batches of `n_examples` texts with `n_tokens` in all and `longest` in the longest."""
        return self._basis(n_examples, longest, n_tokens) @ self.weights

    def _basis(self, n_examples: np.ndarray, longest: np.ndarray, n_tokens: np.ndarray) -> np.ndarray:
        inside = np.clip(n_examples, self.knots[0], self.knots[-1])
        hats = [np.interp(inside, self.knots, hat) for hat in np.eye(len(self.knots))]
        scale = np.array([np.ones(len(n_examples)), longest, n_tokens / n_examples]) * (n_examples / inside)
        return np.concatenate([hat * scale for hat in hats]).T


def stage_costs(study: LatencyStudy) -> dict[str, StageCost]:
    """Fit the cost of each stage to the timings at the cascade's own thresholds. A stage without timings is missing."""
    return {
        str(stage): StageCost.fit(
            rows["n_examples"].to_numpy(),
            rows["sequence_length"].to_numpy(),
            rows["n_tokens"].to_numpy(),
            _seconds(rows).to_numpy(),
        )
        for stage, rows in study.own.groupby("stage")
    }


def predicted_cost(
    study: LatencyStudy, thresholds: Sequence[float] | np.ndarray, batch_sizes: Sequence[int] | None = None
) -> pd.DataFrame:
    """Predict the cost of the cascade at other thresholds of its first stage, from timings at its own.

    The texts of a batch that the first stage passes on (a gate those at or above its threshold, a deferral stage those
    below it) go to the next stage, in a smaller batch. The
    cost of that batch is interpolated over its number of texts and their lengths. Two effects are not predicted. Where
    hardly any text goes on, the first stage runs many times in a row with its weights in the processor's cache, and
    costs less than predicted. A number of texts that a stage never had costs more.

    Parameters
    ----------
    study : LatencyStudy
    thresholds : sequence of float
    batch_sizes : sequence of int, optional
        By default those of the study.

    Returns
    -------
    DataFrame
        One row per threshold and batch size: `threshold`, `batch_size`, `reach` (the fraction of texts beyond the first
        stage), `surviving` (the mean size of the batches at the second stage), `text_ms` (the mean amortised
        milliseconds per text; NaN if texts reach a stage that was never timed).
    """
    costs = stage_costs(study)
    arrivals = {threshold: _arrivals(study, threshold) for threshold in thresholds}
    rows = []
    for batch_size in batch_sizes or study.settings["batch_sizes"]:
        batches = [batch for repeat in range(study.settings["repeats"]) for batch in study.batches(batch_size, repeat)]
        rows += [(t, batch_size, *_predict(study, costs, arrivals[t], batches)) for t in thresholds]
    return pd.DataFrame(rows, columns=["threshold", "batch_size", "reach", "surviving", "text_ms"])


def checked_cost(study: LatencyStudy) -> pd.DataFrame:
    """Return the predicted and the measured cost, for each threshold and batch size that was served as a check.

    The prediction is for exactly the batches that were served, and uses none of their times.

    Returns
    -------
    DataFrame
        `threshold`, `batch_size`, `reach`, `surviving`, `predicted_ms`, `measured_ms` (the mean amortised milliseconds
        per text), its interval `measured_low_ms` and `measured_high_ms`, and `error`: (predicted - measured) /
        measured.
    """
    costs = stage_costs(study)
    rows = []
    for (threshold, batch_size), timings in study.checks.groupby(["threshold", "batch_size"]):
        served = timings[["repeat", "batch"]].drop_duplicates().itertuples(index=False)
        batches = [study.batches(batch_size, repeat)[batch] for repeat, batch in served]
        measured = serving_metrics(timings).loc[(batch_size, WHOLE, "text_ms"), ["value", "low", "high"]]
        reach, surviving, predicted = _predict(study, costs, _arrivals(study, threshold), batches)
        error = predicted / measured["value"] - 1
        rows.append((threshold, batch_size, reach, surviving, predicted, *measured, error))
    columns = ["threshold", "batch_size", "reach", "surviving", "predicted_ms"]
    return pd.DataFrame(rows, columns=[*columns, "measured_ms", "measured_low_ms", "measured_high_ms", "error"])


def _predict(
    study: LatencyStudy, costs: dict[str, StageCost], arrivals: dict[str, np.ndarray], batches: list[np.ndarray]
) -> tuple[float, float, float]:
    """Return the reach, the mean surviving batch and the predicted milliseconds per text of batches of rows.

    `arrivals` has the texts that reach each stage: see `_arrivals`.
    """
    rows = np.concatenate(batches)
    batch = np.repeat(np.arange(len(batches)), [len(rows_of_batch) for rows_of_batch in batches])
    seconds, reached, mean_sizes = 0.0, [], []
    for name, arrived in arrivals.items():
        goes_on = arrived[rows]
        stage_rows, stage_batch = rows[goes_on], batch[goes_on]
        n = np.bincount(stage_batch)
        n, index = n[n > 0], np.unique(stage_batch, return_inverse=True)[1]
        reached.append(len(stage_rows))
        mean_sizes.append(n.mean() if len(n) else np.nan)
        if len(stage_rows):
            tokens = study.texts[f"{name}_tokens"].to_numpy()[stage_rows]
            longest = np.zeros(len(n), dtype=int)
            np.maximum.at(longest, index, tokens)
            cost = costs.get(name)
            seconds += cost(n, longest, np.bincount(index, tokens)).sum() if cost else np.nan
    second = min(1, len(reached) - 1)
    return reached[second] / len(rows), mean_sizes[second], 1000 * seconds / len(rows)


def _arrivals(study: LatencyStudy, threshold: float) -> dict[str, np.ndarray]:
    """Return which texts reach each stage at a threshold of the first stage: stage name to bool, shape (n_texts,)."""
    first, n = study.spec.stages[0], len(study.texts)
    spec = study.spec.with_thresholds({first.name: threshold}) if first.role != "final" else study.spec
    unknown = np.full(n, None, dtype=object)  # the study does not keep labels, and the way of a text needs none
    decisions = {}
    for stage in spec.stages:
        confidence = study.texts[f"{stage.name}_probability"].to_numpy(dtype=np.float64)
        decisions[stage.name] = StageDecision(
            scored=np.ones(n, dtype=bool),
            confidence=confidence,
            threshold=np.full(n, 0.0 if stage.role == "final" else stage.threshold),
            label_above=unknown,
            label_below=unknown,
            probability=confidence,
            role=stage.role,
        )
    return route(spec, decisions).reached


def _seconds(timings: pd.DataFrame) -> pd.Series:
    return timings[["tokenize_seconds", "run_seconds", "answer_seconds"]].sum(axis=1)


def _by_batch(timings: pd.DataFrame, incoming: pd.MultiIndex, values: pd.Series) -> pd.DataFrame:
    """Return one row per batch that arrived and one column per stage; 0 where no text reached the stage."""
    table = timings.assign(value=values).pivot(index=["repeat", "batch"], columns="stage", values="value")
    return table.reindex(index=incoming, columns=timings["stage"].unique()).fillna(0)

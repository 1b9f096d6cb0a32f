"""Two runs of the same texts: whether B is better than A, by how much, where, and which stage's doing it is."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import numpy as np
import pandas as pd

from cascade_lab.analysis.bootstrap import N_RESAMPLES, Interval, interval
from cascade_lab.analysis.latency import stage_latencies
from cascade_lab.analysis.paired import paired_figures, paired_tests, sorted_with_holm, with_resamples
from cascade_lab.errors import RunError, did_you_mean
from cascade_lab.run import Run
from cascade_lab.serial import serve
from cascade_lab.spec import CascadeSpec

WIN, LOSS, OTHERWISE_WRONG = "win", "loss", "wrong otherwise"
MAX_VALUES = 50  # a column with more values than that makes no slices of its own accord


class Decomposition(NamedTuple):
    """Whose doing the difference of two accuracies is: a 2×2 factorial design, gates by last stages.

    With `acc(g, c)` the accuracy of the gates of run g before the last stage of run c, *gate* is
    acc(B, A) - acc(A, A), *classifier* acc(A, B) - acc(A, A), and *interaction* what the two changes do together
    beyond their sum, acc(B, B) - acc(B, A) - acc(A, B) + acc(A, A). The three add up to acc(B, B) - acc(A, A).

    Attributes
    ----------
    accuracies : dict of str to float
        Of `AA`, `BA`, `AB` and `BB`: the first letter is whose gates, the second whose last stage.
    effects : dict of str to Interval
        `gate`, `classifier` and `interaction`, with paired bootstrap intervals.
    """

    accuracies: dict[str, float]
    effects: dict[str, Interval]


@dataclass(frozen=True)
class Comparison:
    """What `compare` finds; A is the run to beat.

    Attributes
    ----------
    runs : tuple of two dicts
        Of A and of B: `directory`, `run_id`, `cascade`, `thresholds`, `batch_size`, `processor`, and `n_alone`, how
        many of its texts the other run lacks.
    figures : DataFrame
        See `paired_figures`.
    pairs : DataFrame
        A text of both runs a row, in A's order: `example_id`, `text`, `text_b`, `label`, `a` and `b` (the answers),
        `decided_by_a`, `decided_by_b`, `probability_a`, `probability_b`, and `change`: `win` (A wrong, B right),
        `loss`, `wrong otherwise` (both wrong, with different answers) or None.
    classes, slices : DataFrame
        A gold label, and a value of a column, a row: see `paired_tests`.
    latency : DataFrame or None
        See `latencies`; None where a run timed nothing. The runs were made apart, on whatever else the machine did.
    decomposition : Decomposition or None
    not_decomposed : str
        Why there is no decomposition.
    """

    runs: tuple[dict[str, Any], dict[str, Any]]
    figures: pd.DataFrame
    pairs: pd.DataFrame
    classes: pd.DataFrame
    slices: pd.DataFrame
    latency: pd.DataFrame | None
    decomposition: Decomposition | None
    not_decomposed: str = ""

    @property
    def verdict(self) -> str:
        """Whether B is more often right than A, in a sentence; told by McNemar's test at 0.05."""
        found = self.figures.loc["accuracy"]
        size = f"{100 * found['difference']:+.2f} points of accuracy, {100 * found['low']:+.2f} to "
        size += f"{100 * found['high']:+.2f}, p = {found['p_value']:.2g}"
        if found["p_value"] >= 0.05:
            return f"Which is more often right cannot be told from these texts ({size})"
        return f"B is {'more' if found['difference'] > 0 else 'less'} often right than A ({size})"

    def changes(self, kind: str) -> pd.DataFrame:
        """Return the `pairs` of one kind of change, the most confident wrong answer first."""
        found = self.pairs[self.pairs["change"] == kind]
        wrong = {WIN: found["probability_a"], LOSS: found["probability_b"]}
        confidence = wrong.get(kind, found[["probability_a", "probability_b"]].max(axis=1))
        return found.iloc[np.lexsort((found["example_id"], -confidence))]

    def to_dict(self) -> dict[str, Any]:
        """Return all of it as plain data, with the texts that changed."""
        changed = pd.concat([self.changes(kind) for kind in (WIN, LOSS, OTHERWISE_WRONG)])
        split = self.decomposition
        return {
            "a": self.runs[0],
            "b": self.runs[1],
            "n_examples": len(self.pairs),
            "figures": self.figures.reset_index().to_dict("records"),
            "decomposition": None
            if split is None
            else {"accuracies": split.accuracies, "effects": {k: v._asdict() for k, v in split.effects.items()}},
            "not_decomposed": self.not_decomposed or None,
            "classes": self.classes.reset_index().to_dict("records"),
            "slices": self.slices.reset_index().to_dict("records"),
            "latency": None if self.latency is None else self.latency.reset_index().to_dict("records"),
            "changes": changed.astype({"text_b": object}).where(changed.notna(), None).to_dict("records"),
        }


def compare(
    run_a: Run,
    run_b: Run,
    *,
    columns: Sequence[str] | None = None,
    level: float = 0.95,
    n_resamples: int = N_RESAMPLES,
    seed: int = 0,
) -> Comparison:
    """Compare two runs on the texts that both have, joined on `example_id`.

    The cascades may have other stages and other labels; only the gold labels must be the same. A label rejects if it
    does in either cascade, so that a gate's `oos` and a class `oos` of one large stage are one thing.

    Parameters
    ----------
    run_a, run_b : Run
    columns : sequence of str, optional
        Columns of the examples to slice by, besides the length of the text; by default those with 2 to 50 values, or
        with numbers, which are cut at their quartiles.
    level : float
        Of the intervals.
    n_resamples, seed : int
        Of the bootstrap.

    Raises
    ------
    RunError
        No common `example_id`, one with another text or label in each run, or no such column.
    """
    ids, rows = _join(run_a, run_b)
    examples = run_a.examples.iloc[rows[0]].reset_index(drop=True)
    answers = [_answers(run, ids) for run in (run_a, run_b)]
    pairs = examples[["example_id", "text", "text_b", "label"]].copy()
    for key, column in (("", "predicted"), ("decided_by_", "decided_by"), ("probability_", "probability")):
        for side, said in zip("ab", answers, strict=True):
            pairs[key + side] = said[column].to_numpy()
    right_a, right_b = ((pairs[side] == pairs["label"]).to_numpy() for side in "ab")
    kinds = [right_b & ~right_a, right_a & ~right_b, ~right_a & ~right_b & (pairs["a"] != pairs["b"]).to_numpy()]
    pairs["change"] = np.select(kinds, np.array([WIN, LOSS, OTHERWISE_WRONG], dtype=object), None)
    others = run_b.examples.iloc[rows[1]].reset_index(drop=True)
    examples = examples.join(others[others.columns.difference(examples.columns)])
    slices = [
        paired_tests(values, right_a, right_b, name=name) for name, values in _slices(examples, columns, run_a).items()
    ]
    options: dict[str, Any] = {"level": level, "n_resamples": n_resamples, "seed": seed}
    split, reason = None, ""
    try:
        split = decompose(run_a, run_b, **options)
    except RunError as error:
        reason = str(error)
    rejects = {*run_a.spec.reject_labels, *run_b.spec.reject_labels}
    return Comparison(
        runs=(_described(run_a, len(ids)), _described(run_b, len(ids))),
        figures=paired_figures(pairs["label"], pairs["a"], pairs["b"], rejects, **options),
        pairs=pairs,
        classes=paired_tests(pairs["label"], right_a, right_b).droplevel("column").rename_axis("label"),
        slices=sorted_with_holm(pd.concat(slices)),
        latency=latencies(run_a, run_b),
        decomposition=split,
        not_decomposed=reason,
    )


def decompose(
    run_a: Run, run_b: Run, *, level: float = 0.95, n_resamples: int = N_RESAMPLES, seed: int = 0
) -> Decomposition:
    """Split the difference of two runs' accuracies into their gates', their last stages' and what both do together.

    The gates of each run are set before the last stage of the other, on kept logits.

    Raises
    ------
    RunError
        No common texts; a cascade without a gate; last stages that answer with other labels; or a run without the
        shadow scores that the other's gates ask for.
    """
    _, (rows_a, rows_b) = _join(run_a, run_b)
    for run in (run_a, run_b):
        if len(run.spec.stages) < 2:
            raise RunError(f"{run.directory}: has no gate, so gates and last stages cannot be swapped with another run")
    rejects = {*run_a.spec.reject_labels, *run_b.spec.reject_labels}
    ours, theirs = (set(run.spec.last.labels) - rejects for run in (run_a, run_b))
    if ours != theirs:
        odd = min(ours ^ theirs)
        raise RunError(
            f"{run_a.directory} and {run_b.directory}: only one's last stage answers {odd!r}, so the two cannot be "
            "swapped; compare them as wholes"
        )
    a, b = (run_a, rows_a), (run_b, rows_b)
    answers = {"AA": _mixed(a, a), "BA": _mixed(b, a), "AB": _mixed(a, b), "BB": _mixed(b, b)}
    y_true = run_a.examples["label"].to_numpy(dtype=object)[rows_a]
    right = np.array([predicted == y_true for predicted in answers.values()]).T
    patterns, counts = np.unique(right, axis=0, return_counts=True)
    hits = with_resamples(counts, n_resamples, seed) @ patterns  # right answers of the four cascades, per resample
    aa, ba, ab, bb = hits.T
    effects = {"gate": ba - aa, "classifier": ab - aa, "interaction": bb - ba - ab + aa}
    n = len(y_true)
    return Decomposition(
        {name: float(k) / n for name, k in zip(answers, hits[0], strict=True)},
        {name: interval(float(e[0]) / n, e[1:] / n, level=level) for name, e in effects.items()},
    )


def latencies(run_a: Run, run_b: Run) -> pd.DataFrame | None:
    """Return what a text takes in each run, or None where one of them timed nothing.

    Returns
    -------
    DataFrame
        Indexed by `run` (`A`, `B`) and `stage`, the last of which is `all stages`: `n_texts` that reached it, `p50_ms`,
        `p95_ms`, `p99_ms` a text there (NaN for all), and `mean_ms`, its seconds divided by all texts of the run.
        Of two runs made apart: what else their machines did is part of the difference.
    """
    rows = {}
    for letter, run in zip("AB", (run_a, run_b), strict=True):
        if not (run.timings["n_examples"].sum() and len(run.examples)):
            return None
        n, total = len(run.examples), 0.0
        for name, found in stage_latencies(run).items():
            ms = [found.percentiles_ms[p] for p in (50, 95, 99)]
            rows[letter, name] = [len(found.text_ms), *ms, 1000 * found.seconds / n]
            total += found.seconds
        rows[letter, "all stages"] = [n, np.nan, np.nan, np.nan, 1000 * total / n]
    columns = ["n_texts", "p50_ms", "p95_ms", "p99_ms", "mean_ms"]
    index = pd.MultiIndex.from_tuples(rows, names=["run", "stage"])
    return pd.DataFrame(list(rows.values()), index=index, columns=columns)


def _join(run_a: Run, run_b: Run) -> tuple[pd.Index, tuple[np.ndarray, np.ndarray]]:
    """Return the common ids in A's order, and their rows in A and in B; check that they stand for the same texts."""
    rows_a = np.arange(len(run_a.examples))
    ids = pd.Index(run_a.examples["example_id"])
    rows_b = pd.Index(run_b.examples["example_id"]).get_indexer(ids)
    rows_a, ids, rows_b = rows_a[rows_b >= 0], ids[rows_b >= 0], rows_b[rows_b >= 0]
    both = f"{run_a.directory} and {run_b.directory}"
    if not len(ids):
        raise RunError(f"{both}: no example_id in common; compare runs of one eval set")
    for column in ("text", "text_b", "label"):
        ours = run_a.examples[column].fillna("").to_numpy(dtype=object)[rows_a]
        theirs = run_b.examples[column].fillna("").to_numpy(dtype=object)[rows_b]
        if (ours != theirs).any():
            first = str(ids[ours != theirs][0])
            raise RunError(f"{both}: example_id {first!r} has another {column} in each; compare runs of one eval set")
    return ids, (rows_a, rows_b)


def _answers(run: Run, ids: pd.Index) -> pd.DataFrame:
    rows = pd.Index(run.predictions["example_id"]).get_indexer(ids)
    if (rows < 0).any():
        raise RunError(f"{run.directory}: predictions.parquet lacks {str(ids[rows < 0][0])!r}; run again")
    return run.predictions.iloc[rows]


def _described(run: Run, n_common: int) -> dict[str, Any]:
    return {
        "directory": str(run.directory),
        "run_id": run.manifest["run_id"],
        "cascade": run.spec.name,
        "thresholds": run.spec.thresholds,
        "batch_size": run.manifest.get("batch_size"),
        "processor": run.manifest.get("processor"),
        "n_alone": len(run.examples) - n_common,
    }


def _mixed(gates: tuple[Run, np.ndarray], last: tuple[Run, np.ndarray]) -> np.ndarray:
    """Return the answers of one run's gates before the other's last stage, to the texts at the given rows of each."""
    parts = [(*gates, stage) for stage in gates[0].spec.stages[:-1]] + [(*last, last[0].spec.last)]
    stages, logits = [], {}
    for place, (run, rows, stage) in enumerate(parts):
        # The two runs may use one name for two stages.
        stages.append(replace(stage, name=str(place)))
        scores = run.scores(stage.name)
        known = np.full((len(run.examples), len(stage.labels)), np.nan, dtype=np.float32)
        known[scores.rows] = scores.logits
        logits[str(place)] = known[rows]
    predicted = serve(CascadeSpec("mixed", tuple(stages)), logits)["predicted"]
    unknown = int(predicted.isna().sum())
    if unknown:
        raise RunError(
            f"{last[0].directory}: {unknown} examples would reach its last stage, which never scored them; run the "
            "cascade again with shadow scores"
        )
    return predicted.to_numpy(dtype=object)


def _slices(examples: pd.DataFrame, columns: Sequence[str] | None, run: Run) -> dict[str, pd.Series]:
    """Return the groups of texts to look at: by words, and by columns of the examples."""
    own = [name for name in examples.columns if name not in ("example_id", "text", "text_b", "label")]
    for name in columns or ():
        if name not in own:
            raise RunError(f"{run.directory}: the examples have no column '{name}'{did_you_mean(name, own)}")
    words = (examples["text"] + " " + examples["text_b"].fillna("")).str.split().str.len()
    found = {"words": _bands(words)}
    for name in own if columns is None else columns:
        values = examples[name]
        numbers = pd.api.types.is_numeric_dtype(values) and not pd.api.types.is_bool_dtype(values)
        said = _bands(values) if numbers else values.astype(object).where(values.notna(), "missing").astype(str)
        if columns is not None or 2 <= said.nunique() <= MAX_VALUES:
            found[name] = said
    return found


def _bands(values: pd.Series) -> pd.Series:
    """Cut numbers at their quartiles, and name each band by the least and the greatest number in it."""
    cuts = np.unique(values.quantile([0.25, 0.5, 0.75]))
    band = np.searchsorted(cuts, values)
    ends = values.groupby(band).agg(["min", "max"])
    names = {k: f"{low:g}" if low == high else f"{low:g} to {high:g}" for k, low, high in ends.itertuples()}
    return pd.Series(band).map(names).where(values.notna(), "missing")

"""Compare two runs on the same texts: whether B is better than A, by how much, where, and because of which stage."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from cascade_lab.analysis.bootstrap import N_RESAMPLES
from cascade_lab.analysis.comparison_notes import (
    correction,
    refuse_same_runs,
    same_texts_notes,
    scope_notes,
    thresholds_text,
)
from cascade_lab.analysis.decomposition import Decomposition, common_rows, decompose
from cascade_lab.analysis.duplicates import repeats_sentences, text_groups
from cascade_lab.analysis.latency import PERCENTILES, is_timed, stage_latencies
from cascade_lab.analysis.paired import holm_over_runs, paired_metrics, paired_tests, sorted_with_holm, wins_and_losses
from cascade_lab.analysis.sentences import Summary, percent, points
from cascade_lab.analysis.text_tokens import split_tokens
from cascade_lab.exceptions import RunError, did_you_mean
from cascade_lab.leaderboard import run_facts

if TYPE_CHECKING:
    from cascade_lab.run import Run

WIN, LOSS, BOTH_WRONG = "win", "loss", "both wrong, differently"
CHANGES = {
    WIN: "B is right, A is wrong",
    LOSS: "A is right, B is wrong",
    BOTH_WRONG: "both are wrong, with different answers",
}
"""The kinds of change from A to B, and what each means."""
MAX_VALUES = 50  # a column with more different values is not used for slices, unless it is named
ALPHA = 0.05  # of McNemar's tests, in sentences


@dataclass(frozen=True)
class Comparison:
    """The result of `compare`: run B beside run A, on the texts of both.

    Attributes
    ----------
    runs : tuple of two dicts
        Of A and of B: `name`, `directory` (None in memory), `run_id`, `thresholds`, `batch_size`, `processor`, what
        `leaderboard.run_facts` says, and `n_alone`, how many of its labelled texts another run lacks.
    metrics : DataFrame
        See `paired_metrics`; and `p_holm`, the p-value corrected for the number of runs that are compared with A.
    pairs : DataFrame
        One row per text, in A's order: `example_id`, `text`, `text_b`, `label`, `a` and `b` (the labels that A and B
        predict), `decided_by_a`, `decided_by_b`, `probability_a`, `probability_b`, and `change`, one of `CHANGES` or
        None.
    labels, slices : DataFrame
        One row per true label, and one per value of a column: see `paired_tests`.
    latency : DataFrame or None
        See `latencies`; None where a run was not timed.
    decomposition : Decomposition or None
    not_decomposed : str
        Why there is no decomposition.
    scope_notes : tuple of str
        A sentence for each run whose own metrics count a label as a class that rejects in the other run.
    level : float
        Of the intervals.
    n_compared : int
        How many runs are compared with A, B being one of them.
    """

    runs: tuple[dict[str, Any], dict[str, Any]]
    metrics: pd.DataFrame
    pairs: pd.DataFrame
    labels: pd.DataFrame
    slices: pd.DataFrame
    latency: pd.DataFrame | None
    decomposition: Decomposition | None
    not_decomposed: str = ""
    scope_notes: tuple[str, ...] = ()
    level: float = 0.95
    n_compared: int = 1

    def __repr__(self) -> str:
        a, b = (run["name"] for run in self.runs)
        return f"<Comparison of {a} (A) and {b} (B): {len(self.pairs):,} texts. {self.verdict}>"

    @property
    def is_decided(self) -> bool:
        """Whether one run is right more often than the other. McNemar's exact test at 0.05 decides, no interval does.

        The interval of the difference is an approximation: with few texts that changed, it can exclude zero where the
        exact test shows that chance explains the change. If several runs are compared with A, the p-value is corrected
        for their number.
        """
        return bool(self.metrics.loc["accuracy", "p_holm"] < ALPHA)

    @property
    def verdict(self) -> str:
        """Whether B is right more often than A, as a sentence."""
        row = self.metrics.loc["accuracy"]
        gains = (self.pairs["change"] == WIN).to_numpy().astype(int) - (self.pairs["change"] == LOSS).to_numpy()
        wins, losses = wins_and_losses(gains, text_groups(self.pairs))
        different = "different texts" if self.repeats else "texts"
        texts = f"B alone is right on {wins:,} of the {different}, A alone on {losses:,}; McNemar's exact test"
        p = f"p = {row['p_holm']:.2g}{correction(self.n_compared)}"
        if not self.is_decided:
            return f"These texts do not show which run is right more often ({texts}: {p}, not below {ALPHA:g})."
        more = "more" if row["difference"] > 0 else "less"
        return f"B is right {more} often than A ({texts}: {p}, below {ALPHA:g})."

    @property
    def repeats(self) -> list[str]:
        """How many texts repeat another one, as a sentence; no sentence if none does."""
        return repeats_sentences(text_groups(self.pairs))

    @property
    def difference(self) -> str:
        """How large the difference in accuracy is, as a sentence; the interval does not decide the verdict."""
        row = self.metrics.loc["accuracy"]
        sentence = f"The difference B - A is {points(row['difference'])} percentage points of accuracy"
        if np.isnan(row["low"]):
            return f"{sentence}."
        return (
            f"{sentence}, with a {self.level:.0%} interval of {points(row['low'])} to {points(row['high'])}: it shows "
            "how large the difference may be, and the test decides whether there is one."
        )

    def runs_table(self) -> pd.DataFrame:
        """Return `runs` as a table, one row per run: `name`, `cascade`, `thresholds`, `batch_size`, `n_alone`."""
        columns = ["name", "cascade", "thresholds", "batch_size", "n_alone"]
        table = pd.DataFrame(list(self.runs), index=pd.Index(["A", "B"], name="run"))[columns]
        return table.assign(thresholds=[thresholds_text(run) for run in self.runs])

    def changed_labels(self, n: int | None = None) -> pd.DataFrame:
        """Return the first `n` rows of `labels` (None: all) in which a text was won or lost."""
        changed = self.labels[self.labels["wins"] + self.labels["losses"] > 0]
        return changed if n is None else changed.head(n)

    def changes(self, kind: str, n: int | None = None) -> pd.DataFrame:
        """Return the first `n` of `pairs` (None: all) with one kind of change, the most probable wrong answer first."""
        changed = self.pairs[self.pairs["change"] == kind]
        of_wrong = {WIN: changed["probability_a"], LOSS: changed["probability_b"]}
        probability = of_wrong.get(kind, changed[["probability_a", "probability_b"]].max(axis=1))
        changed = changed.iloc[np.lexsort((changed["example_id"], -probability))]
        return changed if n is None else changed.head(n)

    def summary(self) -> Summary:
        """Return the result in a few sentences, the verdict first and the advice last."""
        (in_a, in_b), (out_a, out_b) = self.metrics.loc[["in_scope_accuracy", "reject_recall"], ["a", "b"]].to_numpy()
        n_differing = int((self.labels["p_holm"] < ALPHA).sum())
        sentences = [
            self.verdict,
            self.difference,
            *self.repeats,
            f"Of the texts in scope, A answers {percent(in_a)} correctly and B {percent(in_b)}. "
            f"Of the other texts, A rejects {percent(out_a)} and B {percent(out_b)}.",
            *self.scope_notes,
            *same_texts_notes(dict(zip("AB", self.runs, strict=True))),
            f"For {n_differing:,} of {len(self.labels):,} true labels one run is right more often (McNemar's exact "
            f"test, p < {ALPHA:g} after Holm's correction).",
        ]
        if self.decomposition is not None:
            effects = self.decomposition.effects
            largest = max(effects, key=lambda name: abs(effects[name].value))
            if effects[largest].value:
                sentences.append(
                    f"The largest part of the difference is the {largest}: {points(effects[largest].value)} percentage "
                    "points of accuracy."
                )
        if self.latency is not None:
            a_ms, b_ms = (self.latency.loc[(run, "all stages"), "mean_ms"] for run in "AB")
            sentences.append(
                f"The times of all batches added up, divided by all texts, are {a_ms:.2f} ms per text in A and "
                f"{b_ms:.2f} ms in B."
            )
        return Summary([*sentences, self._advice()])

    def _advice(self) -> str:
        if self.is_decided:
            better, other = "BA" if self.metrics.loc["accuracy", "difference"] > 0 else "AB"
            return f"Advice: prefer {better} to {other}, unless errors of one kind cost much more than others."
        return (
            "Advice: accuracy does not decide between A and B. Compare them on more texts, or keep the one that costs "
            "less."
        )

    def to_dict(self) -> dict[str, Any]:
        """Return everything as plain data; of the texts only those that changed."""
        changed = pd.concat([self.changes(kind) for kind in CHANGES])
        split = self.decomposition
        return {
            "a": self.runs[0],
            "b": self.runs[1],
            "n_examples": len(self.pairs),
            "n_compared": self.n_compared,
            "metrics": self.metrics.reset_index().to_dict("records"),
            "decomposition": None
            if split is None
            else {"accuracies": split.accuracies, "effects": {k: v._asdict() for k, v in split.effects.items()}},
            "not_decomposed": self.not_decomposed or None,
            "labels": self.labels.reset_index().to_dict("records"),
            "slices": self.slices.reset_index().to_dict("records"),
            "latency": None if self.latency is None else self.latency.reset_index().to_dict("records"),
            "changes": changed.astype({"text_b": object}).where(changed.notna(), None).to_dict("records"),
        }


def compare(
    run_a: Run,
    run_b: Run,
    *,
    columns: Sequence[str] | None = None,
    example_ids: Collection[str] | None = None,
    reject_labels: Collection[str] = (),
    level: float = 0.95,
    n_resamples: int = N_RESAMPLES,
    seed: int = 0,
) -> Comparison:
    """Compare two runs on the labelled texts that both have, joined on `example_id`.

    The cascades may have different stages and labels; only the true labels must be the same. A label that rejects in
    either cascade rejects in both here, so that a gate's `oos` and a class `oos` of one large stage count as the same.

    Parameters
    ----------
    run_a, run_b : Run
    columns : sequence of str, optional
        Columns of the examples to slice by, besides the length of the text; by default those with 2 to 50 different
        values. Numbers are cut at their quartiles.
    example_ids : collection of str, optional
        The texts to compare the runs on, by default all that both have.
    reject_labels : collection of str
        Labels that reject, besides those of both cascades.
    level : float
        Of the intervals.
    n_resamples, seed : int
        Of the bootstrap.

    Raises
    ------
    RunError
        The same run twice, no common `example_id`, a common one with another text or label in each run, or no such
        column.
    """
    refuse_same_runs([run_a, run_b])
    a, b = run_a.labelled, run_b.labelled
    rows_a, rows_b = common_rows(a, b, example_ids)
    examples = a.examples.iloc[rows_a].reset_index(drop=True)
    predictions = [run.predictions.iloc[rows] for run, rows in ((a, rows_a), (b, rows_b))]
    pairs = examples[["example_id", "text", "text_b", "label"]].copy()
    for prefix, column in (("", "predicted"), ("decided_by_", "decided_by"), ("probability_", "probability")):
        for side, table in zip("ab", predictions, strict=True):
            pairs[prefix + side] = table[column].to_numpy()
    right_a, right_b = ((pairs[side] == pairs["label"]).to_numpy() for side in "ab")
    kinds = [right_b & ~right_a, right_a & ~right_b, ~right_a & ~right_b & (pairs["a"] != pairs["b"]).to_numpy()]
    pairs["change"] = np.array([*CHANGES, None], dtype=object)[np.select(kinds, range(3), 3)]
    others = b.examples.iloc[rows_b].reset_index(drop=True)
    examples = examples.join(others[others.columns.difference(examples.columns)])
    same_text = text_groups(examples)
    groups = _groups(examples, columns, run_a)
    slices = [paired_tests(values, right_a, right_b, groups=same_text, name=name) for name, values in groups.items()]
    options: dict[str, Any] = {"level": level, "n_resamples": n_resamples, "seed": seed}
    split, reason = None, ""
    try:
        split = decompose(run_a, run_b, example_ids=example_ids, level=level)
    except RunError as error:
        reason = str(error)
    reject_labels = {*run_a.spec.reject_labels, *run_b.spec.reject_labels, *reject_labels}
    metrics = paired_metrics(pairs["label"], pairs["a"], pairs["b"], reject_labels, groups=same_text, **options)
    return Comparison(
        runs=(_facts(run_a, len(a.examples) - len(pairs)), _facts(run_b, len(b.examples) - len(pairs))),
        metrics=holm_over_runs([metrics])[0],
        pairs=pairs,
        labels=paired_tests(pairs["label"], right_a, right_b, groups=same_text)
        .droplevel("column")
        .rename_axis("label"),
        slices=sorted_with_holm(pd.concat(slices)),
        latency=latencies(run_a, run_b),
        decomposition=split,
        not_decomposed=reason,
        scope_notes=tuple(scope_notes({"A": run_a, "B": run_b})),
        level=level,
    )


def latencies(run_a: Run, run_b: Run) -> pd.DataFrame | None:
    """Return the amortised milliseconds per text in each run; None where one of them was not timed.

    The two runs were made at different times: other work on their machines is part of the difference.

    Returns
    -------
    DataFrame
        Indexed by `run` (`A`, `B`) and `stage`, the last of which is `all stages`: `n_texts` that reached the stage;
        `p50_ms`, `p95_ms`, `p99_ms`, amortised, per text there (NaN for all stages); and `mean_ms`, the times of the
        stage's batches added up and divided by the number of all texts of the run.
    """
    if not (is_timed(run_a) and is_timed(run_b)):
        return None
    rows = {}
    for letter, run in (("A", run_a), ("B", run_b)):
        n, total = len(run.examples), 0.0
        for name, latency in stage_latencies(run).items():
            percentiles = [latency.percentiles_ms[p] for p in PERCENTILES]
            rows[letter, name] = [len(latency.text_ms), *percentiles, 1000 * latency.seconds / n]
            total += latency.seconds
        rows[letter, "all stages"] = [n, np.nan, np.nan, np.nan, 1000 * total / n]
    columns = ["n_texts", *(f"p{p}_ms" for p in PERCENTILES), "mean_ms"]
    index = pd.MultiIndex.from_tuples(rows, names=["run", "stage"])
    return pd.DataFrame(list(rows.values()), index=index, columns=columns)


def _facts(run: Run, n_alone: int) -> dict[str, Any]:
    return {
        "name": run.name,
        "directory": None if run.directory is None else str(run.directory),
        "run_id": run.manifest["run_id"],
        **run_facts(run),
        "thresholds": run.spec.thresholds,
        "batch_size": run.manifest.get("batch_size"),
        "processor": run.manifest.get("processor"),
        "n_alone": n_alone,
    }


def _groups(examples: pd.DataFrame, columns: Sequence[str] | None, run: Run) -> dict[str, pd.Series]:
    """Return the group of each text by its number of tokens (`split_tokens`), and by each column of the examples."""
    known = [name for name in examples.columns if name not in ("example_id", "text", "text_b", "label")]
    for name in columns or ():
        if name not in known:
            raise RunError(f"{run.name}: the examples have no column '{name}'{did_you_mean(name, known)}")
    n_tokens = (examples["text"] + " " + examples["text_b"].fillna("")).map(lambda text: len(split_tokens(text)))
    groups = {"tokens": _quartile_groups(n_tokens)}
    for name in known if columns is None else columns:
        values = examples[name]
        is_number = pd.api.types.is_numeric_dtype(values) and not pd.api.types.is_bool_dtype(values)
        text = values.astype(object).where(values.notna(), "missing").astype(str)
        group = _quartile_groups(values) if is_number else text
        if columns is not None or 2 <= group.nunique() <= MAX_VALUES:
            groups[name] = group
    return groups


def _quartile_groups(values: pd.Series) -> pd.Series:
    """Cut numbers at their quartiles, and name each group by its lowest and highest number."""
    cuts = np.unique(values.quantile([0.25, 0.5, 0.75]))
    group = np.searchsorted(cuts, values)
    extremes = values.groupby(group).agg(["min", "max"])
    names = {k: f"{low:g}" if low == high else f"{low:g} to {high:g}" for k, low, high in extremes.itertuples()}
    return pd.Series(group).map(names).where(values.notna(), "missing")

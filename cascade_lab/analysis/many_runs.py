"""Compare several runs with the first one: a leaderboard with paired intervals, corrected for the number of runs."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import PurePath
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from cascade_lab.analysis.bootstrap import N_RESAMPLES
from cascade_lab.analysis.comparison import ALPHA, Comparison, compare
from cascade_lab.analysis.comparison_notes import (
    correction,
    refuse_same_runs,
    same_texts_notes,
    scope_notes,
    thresholds_text,
)
from cascade_lab.analysis.decomposition import common_rows
from cascade_lab.analysis.paired import holm_over_runs
from cascade_lab.analysis.sentences import Summary, percent, points
from cascade_lab.exceptions import RunError, did_you_mean

if TYPE_CHECKING:
    from cascade_lab.run import Run

FIRST, HIGHER, LOWER, NOT_DECIDED, NO_TEST = "first", "higher", "lower", "not decided", "no test"
MULTIPLICITY = (
    "p (Holm): McNemar's exact test, corrected for the number of runs that are compared with the first one. The "
    "intervals are not corrected: each one holds for its run alone. The runs after the first are not tested against "
    "each other."
)
"""What is corrected where several runs are compared, and what is not."""


@dataclass(frozen=True)
class Comparisons:
    """The result of `compare_many`: each run beside the first one, on the texts that all of them have.

    Attributes
    ----------
    names : tuple of str
        Short, distinct names of the runs; the first run's first.
    comparisons : tuple of Comparison
        One for each run after the first: it is B, and the first run is A. Their p-values are corrected for the number
        of runs (`p_holm`).
    scope_notes : tuple of str
        A sentence for each run whose own metrics count a label as a class that rejects in another run.
    """

    names: tuple[str, ...]
    comparisons: tuple[Comparison, ...]
    scope_notes: tuple[str, ...] = ()

    def __repr__(self) -> str:
        return f"<Comparisons of {self.names[0]} with {', '.join(self.names[1:])}: {self.verdict}>"

    @property
    def runs(self) -> dict[str, dict[str, Any]]:
        """Name to facts of each run, as `Comparison.runs` has them."""
        facts = [self.comparisons[0].runs[0], *(comparison.runs[1] for comparison in self.comparisons)]
        return dict(zip(self.names, facts, strict=True))

    def runs_table(self) -> pd.DataFrame:
        """Return what tells the runs apart, one row per run in the order given.

        Columns `cascade`, `thresholds`, `evalset`, `date`, `tuned_on`, and `n_alone`, how many labelled texts are left
        out because another run lacks them.
        """
        columns = ["cascade", "thresholds", "evalset", "date", "tuned_on", "n_alone"]
        table = pd.DataFrame(list(self.runs.values()), index=pd.Index(self.names, name="run"))
        thresholds = [thresholds_text(facts) for facts in self.runs.values()]
        return table[columns].assign(thresholds=thresholds, tuned_on=table["tuned_on"].fillna("–"))

    @property
    def n_examples(self) -> int:
        """The number of texts that the runs are compared on."""
        return len(self.comparisons[0].pairs)

    @property
    def level(self) -> float:
        """Of the intervals."""
        return self.comparisons[0].level

    @cached_property
    def metrics(self) -> pd.DataFrame:
        """The metrics of each run after the first, indexed by `run` and `metric`, as `Comparison.metrics` has them.

        `a` is the value of the first run, and `b` that of the run.
        """
        tables = {name: one.metrics for name, one in zip(self.names[1:], self.comparisons, strict=True)}
        return pd.concat(tables, names=["run", "metric"])

    def leaderboard(self, metric: str = "accuracy") -> pd.DataFrame:
        """Return the runs, those with the best value of a metric first: the highest, but the lowest risk.

        Returns
        -------
        DataFrame
            Indexed by `run`: the metric; `difference` to the first run with its interval, `low` and `high`; `p_value`
            of McNemar's exact test; `p_holm`, corrected for the number of runs; and `decision`, one of `HIGHER` and
            `LOWER` (p_holm < 0.05), `NOT_DECIDED`, `NO_TEST` (the metric is not a fraction of the same texts in all
            runs, so there is only the interval) and `FIRST`. The first run has NaN but for its value.

        Raises
        ------
        RunError
            No such metric.
        """
        known = self.comparisons[0].metrics.index.tolist()
        if metric not in known:
            raise RunError(f"runs are not compared by '{metric}'{did_you_mean(metric, known)}")
        table = self.metrics.xs(metric, level="metric").rename(columns={"b": metric})
        table["decision"] = np.select(
            [table["p_holm"].isna(), table["p_holm"] >= ALPHA, table["difference"] > 0],
            [NO_TEST, NOT_DECIDED, HIGHER],
            LOWER,
        )
        first = pd.DataFrame({metric: table["a"].iloc[0], "decision": FIRST}, index=[self.names[0]])
        columns = [metric, "difference", "low", "high", "p_value", "p_holm", "decision"]
        table = pd.concat([first, table]).reindex(columns=columns).rename_axis("run")
        return table.sort_values(metric, ascending=metric == "risk", kind="stable", na_position="last")

    def values(self) -> pd.DataFrame:
        """Return all metrics, one row per run in the order of `leaderboard`, one column per metric."""
        values = pd.concat([self.comparisons[0].metrics["a"], *(one.metrics["b"] for one in self.comparisons)], axis=1)
        table = values.set_axis(list(self.names), axis=1).T.rename_axis("run").rename_axis(None, axis=1)
        return table.loc[self.leaderboard().index]

    def comparison(self, name: str | None = None) -> Comparison:
        """Return the comparison of one run with the first, by default of the run with the highest accuracy of them.

        Raises
        ------
        RunError
            No run after the first has this name.
        """
        others = self.names[1:]
        if name is None:
            name = next(run for run in self.leaderboard().index if run in others)
        if name not in others:
            raise RunError(
                f"no run that is compared with {self.names[0]} is named '{name}'{did_you_mean(name, others)}"
            )
        return self.comparisons[others.index(name)]

    @property
    def verdict(self) -> str:
        """Which runs are right more often than the first one, and which less often, as a sentence."""
        if len(self.comparisons) == 1:
            return self.comparisons[0].verdict
        table, n = self.leaderboard(), len(self.comparisons)
        named = {kind: table.index[table["decision"] == kind].tolist() for kind in (HIGHER, LOWER, NOT_DECIDED)}
        test = f"McNemar's exact test, p < {ALPHA:g}{correction(n)}"
        parts = [
            f"{_listed(named[kind])} {'is' if len(named[kind]) == 1 else 'are'} right {word} often than {self.names[0]}"
            for kind, word in ((HIGHER, "more"), (LOWER, "less"))
            if named[kind]
        ]
        if not parts:
            lowest = table["p_holm"].min()
            return (
                f"These texts do not show that any of the {n} runs is right more or less often than {self.names[0]} "
                f"(McNemar's exact test: the lowest p is {lowest:.2g}{correction(n)}, not below {ALPHA:g})."
            )
        undecided = f" These texts do not decide about {_listed(named[NOT_DECIDED])}." if named[NOT_DECIDED] else ""
        return f"{'; '.join(parts)} ({test}).{undecided}"

    @property
    def notes(self) -> list[str]:
        """What to know of the runs before trusting the numbers, as sentences."""
        left_out = [f"{facts['n_alone']:,} of {name}" for name, facts in self.runs.items() if facts["n_alone"]]
        missing = f"Texts that are not in all runs are left out: {', '.join(left_out)}." if left_out else ""
        repeats = self.comparisons[0].repeats
        return [*filter(None, [missing]), *repeats, *self.scope_notes, *same_texts_notes(self.runs)]

    def summary(self) -> Summary:
        """Return the result in a few sentences, the verdict first and the advice last.

        For two runs it is that of their comparison.
        """
        if len(self.comparisons) == 1:
            return self.comparisons[0].summary()
        table = self.leaderboard()
        name, best, first = table.index[0], table.iloc[0], table.loc[self.names[0], "accuracy"]
        if name == self.names[0]:
            highest = f"The first run, {name}, has the highest accuracy: {percent(first)}."
        else:
            highest = (
                f"{name} has the highest accuracy, {percent(best['accuracy'])}; {self.names[0]} has {percent(first)}. "
                f"The difference is {points(best['difference'])} percentage points, with a {self.level:.0%} interval "
                f"of {points(best['low'])} to {points(best['high'])}."
            )
        return Summary([self.verdict, highest, *self.notes, MULTIPLICITY, self._advice(table)])

    def _advice(self, table: pd.DataFrame) -> str:
        better = table.index[table["decision"] == HIGHER]
        if len(better):
            return (
                f"Advice: prefer {better[0]} to {self.names[0]}, unless errors of one kind cost much more than others. "
                "The best of several runs looks better on the texts that it was chosen on than on others: measure it "
                "on other texts."
            )
        return (
            f"Advice: accuracy gives no reason to replace {self.names[0]} by another of these runs. Compare them on "
            "more texts, or keep the one that costs least."
        )

    def to_dict(self) -> dict[str, Any]:
        """Return everything as plain data; of the texts only those that changed."""
        board = pd.concat([self.leaderboard(), self.values().drop(columns="accuracy")], axis=1)
        return {
            "n_examples": self.n_examples,
            "level": self.level,
            "runs": [{"short_name": name, **facts} for name, facts in self.runs.items()],
            "verdict": self.verdict,
            "notes": self.notes,
            "leaderboard": board.reset_index().to_dict("records"),
            "comparisons": [comparison.to_dict() for comparison in self.comparisons],
        }


def compare_many(
    runs: Sequence[Run],
    *,
    columns: Sequence[str] | None = None,
    level: float = 0.95,
    n_resamples: int = N_RESAMPLES,
    seed: int = 0,
) -> Comparisons:
    """Compare runs with the first of them on the labelled texts that all have, joined on `example_id`.

    With two runs this is `compare`. With more, the p-values are corrected for the number of runs by Holm's method, each
    metric by itself; tests of labels and of slices are corrected within one comparison only. The intervals are paired,
    and not corrected. A label that rejects in one of the cascades rejects in all of them here.

    Parameters
    ----------
    runs : sequence of Run
        Two or more; the first is the one to improve on.
    columns, level, n_resamples, seed
        As for `compare`.

    Raises
    ------
    RunError
        Fewer than two runs, or a run twice; or as `compare` raises.
    """
    if len(runs) < 2:
        raise RunError("a comparison needs two runs or more; give another run")
    refuse_same_runs(runs)
    labelled = [run.labelled for run in runs]
    ids = set.intersection(*(set(run.examples["example_id"]) for run in labelled))
    if not ids:
        for run in labelled[1:]:
            common_rows(labelled[0], run)  # says which run has no text of the first one
        raise RunError(f"no labelled example_id is in all {len(runs)} runs; compare runs of one eval set")
    reject_labels = {label for run in runs for label in run.spec.reject_labels}
    options: dict[str, Any] = {"columns": columns, "level": level, "n_resamples": n_resamples, "seed": seed}
    compared = [compare(runs[0], run, example_ids=ids, reject_labels=reject_labels, **options) for run in runs[1:]]
    tables = holm_over_runs([comparison.metrics for comparison in compared])
    names = short_names([run.name for run in runs])
    return Comparisons(
        names=tuple(names),
        comparisons=tuple(
            replace(comparison, metrics=metrics, n_compared=len(compared))
            for comparison, metrics in zip(compared, tables, strict=True)
        ),
        scope_notes=tuple(scope_notes(dict(zip(names, runs, strict=True)))),
    )


def _listed(names: Sequence[str], n_most: int = 5) -> str:
    """Return names as they stand in a sentence.

    >>> _listed(["a"]), _listed(["a", "b", "c"]), _listed(list("abcdefgh"), n_most=3)
    ('a', 'a, b and c', 'a, b, c and 5 more')
    """
    shown = list(names) if len(names) <= n_most + 1 else [*names[:n_most], f"{len(names) - n_most} more"]
    return shown[0] if len(shown) == 1 else f"{', '.join(shown[:-1])} and {shown[-1]}"


def short_names(names: Sequence[str]) -> list[str]:
    """Return names that differ: of each path as many of its last parts as it takes; equal names get a number.

    >>> short_names(["runs/a/first", "runs/b/first", "runs/c", "runs/c"])
    ['a/first', 'b/first', 'c', 'c (2)']
    """
    paths = [PurePath(name).parts for name in names]
    short, seen = [], Counter[str]()
    for own in paths:
        others = [other for other in paths if other != own]
        n = next((n for n in range(1, len(own)) if all(own[-n:] != other[-n:] for other in others)), len(own))
        name = str(PurePath(*own[-n:]))
        seen[name] += 1
        short.append(f"{name} ({seen[name]})" if seen[name] > 1 else name)
    return short

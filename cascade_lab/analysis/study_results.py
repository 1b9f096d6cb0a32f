"""Reads the results of a study: every scheme's metrics over its seeds, beside those of a paper."""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import pandas as pd

from cascade_lab.analysis.sentences import Summary, percent
from cascade_lab.exceptions import RunError

METRICS = {"in scope": "in_scope_accuracy", "reject recall": "reject_recall"}


@dataclass(frozen=True)
class StudyResults:
    """The results of `cascade-lab study`.

    Attributes
    ----------
    content : dict
        `results.json`: `rows` (one per scheme and seed), `models` (each with its learning `curve`), versions.
    """

    content: dict[str, Any]

    @classmethod
    def read(cls, path: str | Path) -> StudyResults:
        """Read `results.json`; raises RunError if it cannot be read."""
        try:
            content = json.loads(Path(path).read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise RunError(f"{path}: cannot be read ({error}); give the results.json of `cascade-lab study`") from error
        return cls(content)

    @cached_property
    def rows(self) -> pd.DataFrame:
        """One row per scheme and seed; columns such as `scheme`, `seed`, `test.reject_recall`."""
        rows = pd.json_normalize(self.content["rows"])
        rows["scheme"] = pd.Categorical(rows["scheme"], rows["scheme"].unique())
        return rows

    def table(self) -> pd.DataFrame:
        """Return one row per scheme, in percent: mean and range over the seeds on each split, and the paper's metric.

        `infeasible` counts the seeds for which no thresholds satisfied the goal on validation; those have the
        thresholds 0.5 and 0.
        """
        by_scheme = self.rows.groupby("scheme", observed=True)
        table = pd.DataFrame({"seeds": by_scheme.size()})
        for split in ("test", "validation"):
            for name, metric in METRICS.items():
                table[f"{split}: {name}"] = by_scheme[f"{split}.{metric}"].agg(_mean_and_range)
        for name, metric in METRICS.items():
            values = by_scheme[f"paper.{metric}"].first()
            table[f"paper: {name}"] = ["–" if pd.isna(value) else f"{100 * value:.1f}" for value in values]
        return table.assign(infeasible=by_scheme["infeasible"].count())

    def curves(self) -> pd.DataFrame:
        """Return the accuracy on the development set: one row per trained model, one column per epoch."""
        curves = {
            name: pd.DataFrame(model["curve"]).set_index("epoch") for name, model in self.content["models"].items()
        }
        return pd.DataFrame({name: curve["dev_accuracy"] for name, curve in curves.items()}).T.rename_axis("model")

    def summary(self, *, min_in_scope: float = 0.95, best_in_paper: float) -> Summary:
        """Return the result in a few sentences.

        Parameters
        ----------
        min_in_scope : float
            Schemes with a lower in-scope accuracy on test (mean over seeds) are left out.
        best_in_paper : float
            The best reject recall of the paper, as a fraction.
        """
        content, rows = self.content, self.rows
        feasible = rows[rows["infeasible"].isna()].groupby("scheme", observed=True)
        means = feasible[["test.in_scope_accuracy", "test.reject_recall"]].mean()
        means = means[means["test.in_scope_accuracy"] >= min_in_scope]
        sentences = [
            f"{len(rows)} trainings of {rows['scheme'].nunique()} schemes (TensorFlow "
            f"{content['packages']['tensorflow']}, {content['processor']})."
        ]
        if means.empty:
            sentences.append(f"No scheme has an in-scope accuracy of {percent(min_in_scope)} or more on test.")
        else:
            name = str(means["test.reject_recall"].idxmax())
            in_scope, recall = means.loc[name]
            sentences.append(
                f"Of the schemes with an in-scope accuracy of {percent(min_in_scope)} or more on test, {name} has the "
                f"highest reject recall: {percent(recall)}, at {percent(in_scope)} in scope."
            )
            side = "above" if recall > best_in_paper else "not above"
            sentences.append(f"This is {side} the best reject recall in the paper, {percent(best_in_paper)}.")
        sentences.append(
            "Advice: thresholds were chosen on a validation set with few texts out of scope; expect other values on "
            "other texts."
        )
        return Summary(sentences)


def _mean_and_range(values: pd.Series) -> str:
    """Return the mean in percent and, of several values, the range."""
    spread = f" ({100 * values.min():.1f} to {100 * values.max():.1f})" if len(values) > 1 else ""
    return f"{100 * values.mean():.1f}{spread}"

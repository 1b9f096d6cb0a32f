"""Reads the results of a study: the metrics of every scheme, or of every rule with held-out labels, over seeds."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import pandas as pd

from cascade_lab.analysis.open_set import OPEN_SET_METRICS
from cascade_lab.analysis.sentences import Summary, percent
from cascade_lab.exceptions import RunError
from cascade_lab.json_files import check_keys, read_object

_WAY_OUT = "give the results.json of `cascade-lab study`"
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
    def read(cls, *paths: str | Path) -> StudyResults:
        """Read the `results.json` of one study, or those of several as one.

        Raises RunError if one cannot be read, or lacks a part of a study's results.
        """
        contents = {str(path): cls._read(path) for path in paths}
        if len(contents) == 1:
            return cls(*contents.values())
        return cls(
            {
                "rows": [row for content in contents.values() for row in content["rows"]],
                "models": {
                    f"{path}: {name}": model
                    for path, content in contents.items()
                    for name, model in content["models"].items()
                },
                "packages": {"tensorflow": _joined(content["packages"]["tensorflow"] for content in contents.values())},
                "processor": _joined(content["processor"] for content in contents.values()),
            }
        )

    @staticmethod
    def _read(path: str | Path) -> dict[str, Any]:
        content = _read(path)
        options: Any = {"error": RunError, "way_out": _WAY_OUT}
        kinds = {"scheme": str, "seed": int, "infeasible": str | None, "paper": dict | None}
        for number, row in enumerate(content["rows"], 1):
            where = f"{path}: row {number}"
            if isinstance(row, dict) and "known_ratio" in row:
                raise RunError(f"{path}: is of a study with held-out labels; read it with HeldOutResults")
            check_keys({"row": row}, {"row": dict}, where, **options)
            check_keys(row, {**kinds, "without_rejection": dict | None}, where, **options)
            reachable = row.get("without_rejection") or {}
            check_keys(reachable, dict.fromkeys(reachable, float | int), f"{where}: without_rejection", **options)
            for split in ("test", "validation", "paper"):
                values = row.get(split) or {}
                kind = float | int | None if split == "paper" else float | int
                check_keys({split: values}, {split: dict}, where, **options)
                check_keys(values, dict.fromkeys(METRICS.values(), kind), f"{where}: {split}", **options)
                if not all(0 <= value <= 1 for value in map(values.get, METRICS.values()) if value is not None):
                    raise RunError(f"{where}: {split}: a metric is not a fraction from 0 to 1; {_WAY_OUT}")
        return content

    @cached_property
    def rows(self) -> pd.DataFrame:
        """One row per scheme and seed; columns such as `scheme`, `seed`, `test.reject_recall`."""
        rows = pd.json_normalize(self.content["rows"])
        rows["scheme"] = pd.Categorical(rows["scheme"], rows["scheme"].unique())
        return rows

    def table(self) -> pd.DataFrame:
        """Return one row per scheme, in percent: mean and range over the seeds on each split, and the paper's metric.

        `test: without rejection` is the in-scope accuracy that the last stage has if it answers every text: no
        thresholds give more. `infeasible` counts the seeds for which no thresholds satisfied the goal on validation;
        those have the thresholds 0.5 and 0.
        """
        by_scheme = self.rows.groupby("scheme", observed=True)
        table = pd.DataFrame({"seeds": by_scheme.size()})
        for split in ("test", "validation"):
            for name, metric in METRICS.items():
                table[f"{split}: {name}"] = by_scheme[f"{split}.{metric}"].agg(_mean_and_range)
            if f"without_rejection.{split}" in self.rows:
                reachable = by_scheme[f"without_rejection.{split}"]
                table[f"{split}: without rejection"] = reachable.agg(_mean_and_range)
        for name, metric in METRICS.items():
            values = by_scheme[f"paper.{metric}"].first()
            table[f"paper: {name}"] = ["–" if pd.isna(value) else f"{100 * value:.1f}" for value in values]
        return table.assign(infeasible=by_scheme["infeasible"].count())

    def curves(self) -> pd.DataFrame:
        """Return the accuracy on the development set: one row per trained model, one column per epoch."""
        return _curves(self.content)

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


@dataclass(frozen=True)
class HeldOutResults:
    """The results of `cascade-lab study --known-ratio`.

    Attributes
    ----------
    content : dict
        `results.json`: `rows` (one per known ratio, seed and rule), `models` (each with its learning `curve`).
    """

    content: dict[str, Any]

    @classmethod
    def read(cls, path: str | Path) -> HeldOutResults:
        """Read `results.json`; raises RunError if it cannot be read, or lacks a part of such a study's results."""
        content = _read(path)
        options: Any = {"error": RunError, "way_out": _WAY_OUT}
        check_keys(content, {"accept": float | int}, str(path), **options)
        for number, row in enumerate(content["rows"], 1):
            where = f"{path}: row {number}"
            if isinstance(row, dict) and "scheme" in row:
                raise RunError(f"{path}: is of a study of schemes; read it with StudyResults")
            check_keys({"row": row}, {"row": dict}, where, **options)
            check_keys(row, {"known_ratio": float | int, "seed": int, "rule": str, "test": dict}, where, **options)
            kinds = dict.fromkeys((*OPEN_SET_METRICS, "known_accepted"), float | int)
            check_keys(row["test"], kinds, f"{where}: test", **options)
            fractions = {"known_ratio": row["known_ratio"], **{f"test: {name}": row["test"][name] for name in kinds}}
            for name, value in {"accept": content["accept"], **fractions}.items():
                if not 0 <= value <= 1:
                    raise RunError(f"{where}: {name} is {value:g}; it must be from 0 to 1; {_WAY_OUT}")
        return cls(content)

    @cached_property
    def rows(self) -> pd.DataFrame:
        """One row per known ratio, seed and rule; columns such as `known_ratio`, `rule`, `test.open_f1`."""
        return pd.json_normalize(self.content["rows"])

    def metrics(self) -> pd.DataFrame:
        """Return the metrics on test over the seeds, as fractions.

        Columns `known_ratio`, `rule`, `metric` (a key of `OPEN_SET_METRICS`), `n_seeds`, `mean`, `low`, `high`; the
        last two are the lowest and the highest of the seeds.
        """
        metrics = {f"test.{metric}": metric for metric in OPEN_SET_METRICS}
        rows = self.rows.rename(columns=metrics).melt(["known_ratio", "rule"], list(metrics.values()), "metric")
        groups = rows.groupby(["known_ratio", "rule", "metric"], sort=False)["value"]
        return groups.agg(n_seeds="size", mean="mean", low="min", high="max").reset_index()

    def table(self) -> pd.DataFrame:
        """Return one row per known ratio and rule, in percent: mean and range over the seeds, on test.

        `known accepted` is the fraction of the texts with known labels that are not rejected; the rules were fixed so
        that it is `accept` on validation.
        """
        groups = self.rows.groupby(["known_ratio", "rule"], sort=False)
        table = pd.DataFrame({"seeds": groups.size()})
        for metric, name in {**OPEN_SET_METRICS, "known_accepted": "known accepted"}.items():
            table[name] = groups[f"test.{metric}"].agg(_mean_and_range)
        return table.rename_axis(["known ratio", "rule"])

    def curves(self) -> pd.DataFrame:
        """Return the accuracy on known validation texts: one row per trained model, one column per epoch."""
        return _curves(self.content)

    def summary(self) -> Summary:
        """Return the result in a few sentences: the rule with the highest harmonic mean at each known ratio."""
        rows = self.rows
        sentences = [
            f"Each rule accepts {percent(self.content['accept'])} of the known validation texts; no text with a held-"
            "out label had a part in choosing it."
        ]
        for ratio, part in rows.groupby("known_ratio"):
            means = part.groupby("rule", sort=False)[["test.harmonic_mean", "test.auroc"]].mean()
            rule = str(means["test.harmonic_mean"].idxmax())
            harmonic_mean, auroc = means.loc[rule]
            sentences.append(
                f"With {percent(ratio)} of the labels known, {rule} has the highest harmonic mean of known F1 and open "
                f"F1: {percent(harmonic_mean)}, with an AUROC of {auroc:.4f} (mean of {part['seed'].nunique()} seeds)."
            )
        return Summary(sentences)


def _read(path: str | Path) -> dict[str, Any]:
    """Read `results.json` and check what both kinds of studies have: versions, and models with their curves."""
    content = read_object(Path(path), error=RunError, way_out=_WAY_OUT)
    options: Any = {"error": RunError, "way_out": _WAY_OUT}
    check_keys(content, {"rows": list, "models": dict, "packages": dict, "processor": str}, str(path), **options)
    check_keys(content["packages"], {"tensorflow": str}, f"{path}: packages", **options)
    if not content["rows"] or not content["models"]:
        raise RunError(f"{path}: has no row or no model; {_WAY_OUT}")
    for name, model in content["models"].items():
        where = f"{path}: model {name}"
        check_keys({"model": model}, {"model": dict}, where, **options)
        check_keys(model, {"curve": list}, where, **options)
        if not model["curve"]:
            raise RunError(f"{where}: curve is empty; {_WAY_OUT}")
        for point in model["curve"]:
            check_keys({"point": point}, {"point": dict}, where, **options)
            check_keys(point, {"epoch": int, "dev_accuracy": float | int}, where, **options)
        epochs = [point["epoch"] for point in model["curve"]]
        if len(set(epochs)) < len(epochs):
            raise RunError(f"{where}: curve has an epoch twice; {_WAY_OUT}")
    return content


def _joined(values: Iterable[str]) -> str:
    return " and ".join(dict.fromkeys(values))


def _curves(content: dict[str, Any]) -> pd.DataFrame:
    curves = {name: pd.DataFrame(model["curve"]).set_index("epoch") for name, model in content["models"].items()}
    return pd.DataFrame({name: curve["dev_accuracy"] for name, curve in curves.items()}).T.rename_axis("model")


def _mean_and_range(values: pd.Series) -> str:
    """Return the mean in percent and, of several values, the range."""
    spread = f" ({100 * values.min():.1f} to {100 * values.max():.1f})" if len(values) > 1 else ""
    return f"{100 * values.mean():.1f}{spread}"

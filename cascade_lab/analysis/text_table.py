"""Every text of a run in one table, and which of them meet conditions: what the error browser shows."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from functools import cached_property
from typing import Any

import numpy as np
import pandas as pd

from cascade_lab.analysis.errors import GOES_ON, KINDS, blame
from cascade_lab.analysis.examples import stage_probabilities, surest_first, with_texts
from cascade_lab.analysis.outcomes import OUTCOMES, outcomes
from cascade_lab.analysis.slicing_rules import apply_rule
from cascade_lab.analysis.text_features import features
from cascade_lab.exceptions import RunError, did_you_mean
from cascade_lab.run import Run

SHOWN = ("all", "errors", "right", "marked")
ORDERS = ("surest first", "least sure first", "order of the set", "shortest first", "longest first")
CONDITIONS = ("label", "predicted", "stage", "outcome", "fault", "rule")


class TextTable:
    """The texts of a run with what every stage computed for them.

    Parameters
    ----------
    run : Run
        Unlabelled texts are left out.

    Attributes
    ----------
    run : Run
    frame : DataFrame
        One row per text: `example_id`, `text` (and `text_b`), `label`, `predicted`, `decided_by`, `probability`,
        `confidence`, `outcome` and `fault` as in `flow` (without shadow scores the outcome is one of `OUTCOMES`, and
        `fault` is missing), and the columns of `stage_probabilities`.
    """

    def __init__(self, run: Run):
        self.run = run.labelled
        table = with_texts(self.run, self.run.predictions)
        table["outcome"] = outcomes(self.run.spec, table["label"], table["predicted"])
        table["fault"] = None
        if all(self.run.scores(stage.name).scored.all() for stage in self.run.spec.stages):
            errors = blame(self.run)
            rows = pd.Index(table["example_id"]).get_indexer(errors["example_id"])
            for column, values in (("outcome", errors["kind"]), ("fault", errors["fault"])):
                filled = table[column].to_numpy(dtype=object).copy()
                filled[rows] = values
                table[column] = filled
        self.frame = table.merge(stage_probabilities(self.run), on="example_id", validate="one_to_one")

    def bands(self) -> pd.DataFrame:
        """Return the ways in which texts leave each stage, as `flow` does: `stage`, `outcome`, `fault`, `n_examples`.

        In the order of the cascade: the texts that go on first, then the outcomes in their usual order.
        """
        order = [*dict.fromkeys([*OUTCOMES[:2], *KINDS, *OUTCOMES])]
        counts = self.frame.groupby(["decided_by", "outcome", "fault"], dropna=False).size()
        left = len(self.frame)
        rows: list[tuple[str, str, str | None, int]] = []
        for stage in self.run.spec.stages:
            ends = [(name, fault, n) for (at, name, fault), n in counts.items() if at == stage.name]
            left -= sum(n for *_, n in ends)
            if stage is not self.run.spec.last:
                rows.append((stage.name, GOES_ON, None, left))
            ends.sort(key=lambda end: order.index(end[0]))
            rows += [(stage.name, name, fault if isinstance(fault, str) else None, int(n)) for name, fault, n in ends]
        return pd.DataFrame(rows, columns=["stage", "outcome", "fault", "n_examples"])

    def mask(self, conditions: Mapping[str, Any]) -> np.ndarray:
        """Return which texts meet every condition: bool, shape (n,).

        Parameters
        ----------
        conditions : mapping
            Some of `CONDITIONS`: `label` and `predicted`; `stage`, where the text leaves the cascade; `outcome`, where
            "goes on" means that the text leaves after `stage`; `fault`, the stage at fault; `rule`, a query over
            `features(run)`.

        Raises
        ------
        RunError
            No such condition, label, stage or outcome, or the rule cannot be applied.
        """
        run, frame = self.run, self.frame
        names = [stage.name for stage in run.spec.stages]
        known: dict[str, Sequence[str]] = {
            "label": run.spec.labels,
            "predicted": run.spec.labels,
            "stage": names,
            "outcome": [GOES_ON, *dict.fromkeys([*OUTCOMES, *KINDS])],
            "fault": names,
        }
        mask = np.ones(len(frame), dtype=bool)
        for name, value in conditions.items():
            if name == "rule":
                mask &= apply_rule(self.features, str(value), str(value))
                continue
            if name not in known:
                raise RunError(f"texts are not selected by '{name}'{did_you_mean(name, CONDITIONS)}")
            if value not in known[name]:
                raise RunError(f"{run.name}: there is no {name} '{value}'{did_you_mean(str(value), known[name])}")
            if name in ("label", "predicted", "fault"):
                mask &= (frame[name] == value).to_numpy()
            elif name == "stage":
                decided_at, here = pd.Index(names).get_indexer(frame["decided_by"]), names.index(value)
                mask &= decided_at > here if conditions.get("outcome") == GOES_ON else decided_at == here
            elif value != GOES_ON:
                mask &= (frame["outcome"] == value).to_numpy()
        return mask

    def rows(
        self,
        conditions: Mapping[str, Any],
        *,
        search: str = "",
        shown: str = "all",
        order: str = ORDERS[0],
        marked: Collection[str] = (),
    ) -> np.ndarray:
        """Return the places of texts in `frame`, in an order: int.

        Parameters
        ----------
        conditions : mapping
            As for `mask`.
        search : str
            Words that the text, a label or the id must contain, in any case; all of them.
        shown : str
            One of `SHOWN`.
        order : str
            One of `ORDERS`; how sure the cascade is of a prediction is as in `surest_first`.
        marked : collection of str
            The ids of the texts that count as marked.
        """
        mask, frame = self.mask(conditions), self.frame
        if shown == "marked":
            mask &= frame["example_id"].isin(list(marked)).to_numpy()
        elif shown != "all":
            mask &= ((frame["label"] == frame["predicted"]) == (shown == "right")).to_numpy()
        for word in search.casefold().split():
            mask &= self._searched.str.contains(word, regex=False).to_numpy()
        rows = np.flatnonzero(mask)
        if order == "order of the set":
            return rows
        keys = self._sureness if order in ("surest first", "least sure first") else self._lengths
        falls = order in ("least sure first", "longest first")
        return rows[np.argsort(-keys[rows] if falls else keys[rows], kind="stable")]

    @cached_property
    def features(self) -> pd.DataFrame:
        """What rules are queries over: `text_features.features`."""
        return features(self.run)

    @cached_property
    def _searched(self) -> pd.Series:
        """What a search looks into."""
        columns = [c for c in ("example_id", "text", "text_b", "label", "predicted") if c in self.frame]
        parts = [self.frame[column].fillna("").astype(str).tolist() for column in columns]
        return pd.Series(["\n".join(words).casefold() for words in zip(*parts, strict=True)], dtype=object)

    @cached_property
    def _sureness(self) -> np.ndarray:
        """The place of each text if the surest prediction comes first."""
        places = np.empty(len(self.frame), dtype=int)
        places[surest_first(self.run, self.run.predictions).index] = np.arange(len(places))
        return places

    @cached_property
    def _lengths(self) -> np.ndarray:
        return self.frame["text"].str.len().to_numpy()

"""Lists confusions and slices that open to their texts, as HTML without script, for notebooks and reports."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from typing import TYPE_CHECKING, Any

import pandas as pd

from cascade_lab.analysis.examples import (
    confident_errors,
    confused_texts,
    stage_probabilities,
    with_texts,
)
from cascade_lab.analysis.neighbours import COLUMNS, SimilarTexts
from cascade_lab.analysis.slicing_rules import apply_rule
from cascade_lab.analysis.text_features import features
from cascade_lab.reporting.capture import table_values
from cascade_lab.text import printable, shorten, visible

if TYPE_CHECKING:
    from collections.abc import Mapping

    from cascade_lab.run import Run

MAX_TEXT, MAX_LABEL, MAX_RULE = 240, 60, 200
"""The characters of a text, a label and a rule that are shown."""


def open_confusions(
    run: Run,
    n: int = 10,
    n_texts: int = 6,
    *,
    outcome: str | Sequence[str] | None = None,
    n_similar: int = 2,
    thresholds: Mapping[str, float] | None = None,
) -> GroupedTexts:
    """Return the most frequent confusions; each opens to its texts, of which the cascade was surest first.

    Parameters
    ----------
    run : Run
    n, n_texts : int
        The pairs of true and predicted label, and the most texts of each.
    outcome : str or sequence of str, optional
        As for `confused_texts`: only these errors, such as "wrong class".
    n_similar : int
        The most similar texts of the run that are shown beside each text; 0 for none.
    thresholds : mapping of str to float, optional
        As for `Run.replay`.

    Raises
    ------
    RunError
        No example has a label, or `outcome` is not the name of an error.
    """
    run = run.labelled.with_thresholds(thresholds)
    table = confused_texts(run, n, n_texts, outcome=outcome)
    columns = ["label", "predicted", "n_examples", "of_label"]
    groups = table[columns].drop_duplicates(["label", "predicted"], ignore_index=True)
    titles = [
        f"{_html(g.label, MAX_LABEL)} → {_html(g.predicted, MAX_LABEL)}: {_number_of(g.n_examples, 'text')}, "
        f"{g.of_label:.1%} of this true label"
        for g in groups.itertuples()
    ]
    table = table.assign(group=table.groupby(["label", "predicted"], sort=False).ngroup())
    what = f"{_number_of(len(groups), 'confusion')} of {shorten(run.spec.name, 40)}"
    return GroupedTexts.from_run(run, groups, titles, table[["group", "example_id"]], n_similar=n_similar, what=what)


def open_slices(
    run: Run,
    slices: pd.DataFrame,
    n: int = 8,
    n_texts: int = 6,
    *,
    n_similar: int = 2,
) -> GroupedTexts:
    """Return slices that open to their errors, of which the cascade was surest first.

    Parameters
    ----------
    run : Run
    slices : DataFrame
        What `slices` or `find_slices` returns. Each `rule` must be a query over `features(run)`.
    n, n_texts : int
        The first `n` slices that have an error, and the most texts of each.
    n_similar : int
        The most similar texts of the run that are shown beside each text; 0 for none.

    Raises
    ------
    RunError
        No example has a label, or a rule is not a query over `features(run)`.
    """
    run = run.labelled
    groups = slices[slices["n_errors"] > 0].head(n).reset_index(drop=True)
    table, errors = features(run), confident_errors(run, None)
    parts, titles = [], []
    for place, group in enumerate(groups.itertuples()):
        ids = table["example_id"][apply_rule(table, str(group.rule), str(group.rule))]
        found = errors[errors["example_id"].isin(ids)]
        parts.append(found[["example_id"]].head(n_texts).assign(group=place))
        titles.append(
            f"{_html(group.rule, MAX_RULE)}: {group.n_errors:,} of {_number_of(group.n_examples, 'text')} wrong "
            f"({group.error_rate:.1%}, {group.lift:.1f} times the rate of all)"
        )
    members = pd.concat(parts, ignore_index=True) if parts else pd.DataFrame(columns=["example_id", "group"])
    what = f"{_number_of(len(groups), 'slice')} of {shorten(run.spec.name, 40)}"
    return GroupedTexts.from_run(run, groups, titles, members, n_similar=n_similar, what=what)


class GroupedTexts:
    """Groups of texts (confusions, slices). In a notebook and in a report, each opens to a table of its texts.

    Make one with `open_confusions` or `open_slices`.

    Parameters
    ----------
    groups : DataFrame
        One row per group.
    titles : sequence of str
        The line of each group, as HTML.
    texts : DataFrame
        One row per text: `group` (the place in `groups`), `example_id`, `text` (and `text_b`), `label`, `predicted`,
        `decided_by`, and the columns of `stage_probabilities`.
    similar : DataFrame
        What `SimilarTexts.find` returns for these texts.
    stages : sequence of str
    what : str
        For the repr.
    similar_by : str
        What the similarity is computed from.

    Attributes
    ----------
    groups, texts, similar, stages
        As given.
    """

    def __init__(
        self,
        groups: pd.DataFrame,
        titles: Sequence[str],
        texts: pd.DataFrame,
        similar: pd.DataFrame,
        stages: Sequence[str],
        *,
        what: str,
        similar_by: str = "",
    ):
        self.groups = groups
        self.texts = texts
        self.similar = similar
        self.stages = list(stages)
        self._titles, self._what, self._similar_by = list(titles), what, similar_by

    @classmethod
    def from_run(
        cls,
        run: Run,
        groups: pd.DataFrame,
        titles: Sequence[str],
        members: pd.DataFrame,
        *,
        n_similar: int,
        what: str,
    ) -> GroupedTexts:
        """Look up the texts of `members` (`group`, `example_id`) in a run, with probabilities and similar texts."""
        ids = list(dict.fromkeys(members["example_id"]))
        rows = pd.Index(run.examples["example_id"]).get_indexer(ids)
        columns = ["example_id", "label", "predicted", "decided_by", "probability", "confidence"]
        known = with_texts(run, run.predictions[columns]).iloc[rows]
        known = known.merge(stage_probabilities(run, rows), on="example_id", validate="one_to_one")
        texts = members[["group", "example_id"]].merge(known, on="example_id", how="left")
        stages = [stage.name for stage in run.spec.stages]
        if not n_similar:
            return cls(groups, titles, texts, pd.DataFrame(columns=COLUMNS), stages, what=what)
        finder = SimilarTexts(run)
        return cls(groups, titles, texts, finder.find(ids, n_similar), stages, what=what, similar_by=finder.by)

    def frame(self) -> pd.DataFrame:
        """Return one row per text: the columns of `groups`, those of `texts`, and its most similar other text.

        The last three are `similar_id`, `similar_text` and `similarity`.
        """
        nearest = self.similar.drop_duplicates("example_id").rename(columns={"text": "similar_text"})
        nearest = nearest[["example_id", "similar_id", "similar_text", "similarity"]]
        others = self.groups.drop(columns=[c for c in ("label", "predicted") if c in self.groups])
        table = self.texts.join(others, on="group").merge(nearest, on="example_id", how="left")
        front = [c for c in self.groups if c in table]
        return table[[*front, *table.columns.difference(["group", *front], sort=False)]]

    def __len__(self) -> int:
        return len(self.groups)

    def __repr__(self) -> str:
        return f"<GroupedTexts: {printable(self._what)}, {_number_of(len(self.texts), 'text')}>"

    def _cascade_lab_values_(self) -> dict[str, Any]:
        return table_values(self.frame())

    def _repr_html_(self) -> str:
        if not len(self.groups):
            return "<p>No text.</p>"
        similar = {i: list(rows.itertuples()) for i, rows in self.similar.groupby("example_id", sort=False)}
        parts = []
        for place, title in enumerate(self._titles):
            texts = self.texts[self.texts["group"] == place].to_dict("records")
            rows = "".join(self._row(text, similar.get(text["example_id"], [])) for text in texts)
            parts.append(
                f"<details><summary>{title}</summary><table><thead><tr>{self._heads(bool(similar))}</tr></thead>"
                f"<tbody>{rows}</tbody></table></details>"
            )
        return f'<div class="groups">{"".join(parts)}{self._key(bool(similar))}</div>'

    @property
    def _same_labels(self) -> bool:
        """Whether all texts of a group have the labels that its line names."""
        return {"label", "predicted"} <= set(self.groups)

    def _heads(self, has_similar: bool) -> str:
        labels = [] if self._same_labels else ["true label", "predicted label"]
        names = ["text", *labels, *self.stages, *(["similar texts"] if has_similar else [])]
        return "".join(f'<th {_LEFT} scope="col">{_html(name, MAX_LABEL)}</th>' for name in names)

    def _row(self, text: dict[str, Any], similar: list[Any]) -> str:
        both = [text["text"], *([text["text_b"]] if isinstance(text.get("text_b"), str) else [])]
        # A cell with one text has no tag in it, so that a report can break its line at underscores.
        one, words = f'<td dir="auto" {_LEFT}>', _plain(both[0], MAX_TEXT)
        row = f"{one}{words}</td>" if len(both) == 1 else _cell("<br>".join(_html(part, MAX_TEXT) for part in both))
        if not self._same_labels:
            row += "".join(f"{one}{_plain(text[column], MAX_LABEL)}</td>" for column in ("label", "predicted"))
        row += "".join(_cell(_stage_html(text, stage)) for stage in self.stages)
        if len(self.similar):
            row += _cell("<br>".join(_similar_html(other) for other in similar))
        return f"<tr>{row}</tr>"

    def _key(self, has_similar: bool) -> str:
        key = (
            "The column of a stage has its most probable label with the probability, and the probability of the right "
            "label where that is another. In brackets: scored, but an earlier stage had decided already."
        )
        if has_similar:
            by = "the last stage's features" if self._similar_by == "features" else "n-grams of characters"
            key += f" Similar texts: of this run, with the cosine of {by}, and their true label."
        return f'<p style="font-size:12px">{key}</p>'


_LEFT = 'style="text-align:left;vertical-align:top"'


def _stage_html(text: Mapping[str, Any], stage: str) -> str:
    label, right = text[f"{stage}_label"], text[f"{stage}_true_label"]
    if not isinstance(label, str):
        return "–"
    cell = f"{_html(label, MAX_LABEL)} {text[f'{stage}_probability']:.2f}"
    if isinstance(right, str) and right != label:
        cell += f"; {_html(right, MAX_LABEL)} {text[f'{stage}_true_probability']:.2f}"
    return cell if text[f"{stage}_reached"] else f"({cell})"


def _similar_html(other: Any) -> str:
    label = f"{_html(other.label, MAX_LABEL)}, " if isinstance(other.label, str) else ""
    return f"{_html(other.text, MAX_TEXT // 2)} ({label}{other.similarity:.2f})"


def _html(text: Any, max_length: int) -> str:
    """Return a text as HTML on one line: shortened, escaped, and isolated from the direction of the text around it."""
    return f'<span dir="auto">{_plain(text, max_length)}</span>'


def _plain(text: Any, max_length: int) -> str:
    """Return a text as HTML on one line: shortened and escaped."""
    return escape(visible(shorten(str(text), max_length)))


def _cell(html: str) -> str:
    return f"<td {_LEFT}>{html}</td>"


def _number_of(n: int, noun: str) -> str:
    return f"{n:,} {noun}{'' if n == 1 else 's'}"

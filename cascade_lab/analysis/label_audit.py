"""List labels that may be wrong, as a csv file that a person corrects, and read the corrections back."""

from __future__ import annotations

import csv
import io
import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
from cleanlab.filter import find_label_issues

from cascade_lab.analysis.duplicates import SIMILARITY, duplicates
from cascade_lab.atomic import write_file
from cascade_lab.decisions import missing_scores_error, probabilities
from cascade_lab.evalset import EvalSet
from cascade_lab.exceptions import EvalSetError, did_you_mean
from cascade_lab.spec import CascadeSpec

if TYPE_CHECKING:
    from cascade_lab.run import Run

COLUMNS = [
    "example_id",
    "text",
    "text_b",
    "label",
    "suggested_label",
    "corrected_label",
    "reason",
    "score",
    "stages_say",
    "duplicate_id",
    "duplicate_label",
    "duplicate_text",
    "similarity",
]
_COLUMNS_READ = ("example_id", "text", "label", "corrected_label")


def label_issues(y_true: Any, probabilities: Any, labels: Sequence[str]) -> np.ndarray:
    """Return which labels confident learning (Northcutt et al. 2021) considers wrong.

    The confident joint gives the number of wrong labels; the labels with the lowest probability are taken.

    Parameters
    ----------
    y_true : array-like of str, shape (n,)
        The labels as they are. An example without a label (None), or with one that is not in `labels`, is no issue.
    probabilities : array-like of float, shape (n, n_labels)
    labels : sequence of str, length n_labels
        The labels of the columns.

    Returns
    -------
    ndarray of bool, shape (n,)

    Examples
    --------
    >>> p = np.repeat([[0.9, 0.1], [0.1, 0.9]], 10, axis=0)
    >>> y_true = ["pay"] * 9 + ["play"] * 11  # the tenth is wrong
    >>> np.flatnonzero(label_issues(y_true, p, ["pay", "play"])).tolist()
    [9]
    """
    codes = pd.Index(labels).get_indexer(np.asarray(y_true, dtype=object))
    probabilities = np.asarray(probabilities, dtype=np.float64)
    is_issue, is_known = np.zeros(len(codes), dtype=bool), codes >= 0
    if len(np.unique(codes[is_known])) >= 2:
        is_issue[is_known] = find_label_issues(
            codes[is_known], probabilities[is_known], filter_by="low_self_confidence", n_jobs=1
        )
    return is_issue


def doubtful_labels(run: Run) -> pd.DataFrame:
    """Return the examples whose label the stages and confident learning consider wrong.

    A label is doubtful if all of these hold:

    - no stage predicts it;
    - the cascade as a whole (the product of its stages' probabilities, without thresholds) prefers another label, at
      least as confidently as it is on average on the texts with that other label;
    - confident learning on these products considers the label wrong: see `label_issues`;
    - confident learning on the probabilities of at least one stage does too, over the texts with a target there.

    Parameters
    ----------
    run : Run
        With shadow scores. Unlabelled texts are left out.

    Returns
    -------
    DataFrame
        One row per doubtful label, the most doubtful first: `example_id`, `label`, `suggested_label` (the cascade's
        most probable label), `score` (the cascade's probability of the label as it is), `doubted_by` (the stages on
        whose probabilities confident learning considers the label wrong, separated by commas) and `stages_say` (each
        stage's most probable label and its probability). A label that no stage has (one that only `min_probability`
        gives) is never doubtful.

    Raises
    ------
    RunError
        There are no shadow scores, or no labels.
    """
    table = _assess(run.labelled)
    return table[table["doubtful"]].sort_values("score", kind="stable", ignore_index=True).drop(columns="doubtful")


def audit(
    run: Run,
    against: Run | EvalSet | None = None,
    *,
    similarity: float = SIMILARITY,
    progress: bool = False,
) -> pd.DataFrame:
    """Return the examples to look at again: those with a doubtful label, and duplicates.

    Parameters
    ----------
    run : Run
        With shadow scores. Unlabelled texts are left out.
    against : Run or EvalSet, optional
        Another set in which to look for the run's texts, such as the training set.
    similarity, progress
        As for `duplicates`.

    Returns
    -------
    DataFrame
        One row per example, with `COLUMNS`: the example; `suggested_label`, empty if nothing suggests another label;
        `corrected_label`, empty, for the person who looks; `reason`, all reasons; `score`, the cascade's probability of
        the label as it is; `stages_say`, as in `doubtful_labels`; and the id, label, text and similarity of its most
        important duplicate. Doubtful labels come first, the most doubtful at the top; then duplicates with another
        label; then other duplicates.

    Raises
    ------
    RunError
        There are no shadow scores, or no labels.
    """
    run = run.labelled
    table = _assess(run).set_index("example_id", drop=False)
    reasons = pd.Series([[] for _ in range(len(table))], index=table.index, dtype=object)
    for example_id, stages in table.loc[table["doubtful"], "doubted_by"].items():
        reasons[example_id].append(f"label doubted by {stages}")
    pairs = _duplicate_pairs(run.examples, against, similarity, progress)
    for pair in pairs.sort_values(["conflict", "exact", "where"], ascending=[False, False, True]).itertuples():
        kind = "exact duplicate" if pair.exact else "near duplicate"
        reason = kind + (" with another label" if pair.conflict else "") + pair.where
        if reason not in reasons[pair.example_id]:
            reasons[pair.example_id].append(reason)
    most_important = pairs.drop_duplicates("example_id").set_index("example_id")
    for column in ("duplicate_id", "duplicate_label", "duplicate_text", "similarity", "conflict"):
        table[column] = most_important[column].reindex(table.index)
    conflict = table["conflict"].eq(True)
    duplicate_agrees = conflict & (table["suggested_label"] == table["duplicate_label"])
    table["suggested_label"] = table["suggested_label"].where(table["doubtful"] | duplicate_agrees, "")
    table["reason"] = reasons.map("; ".join)
    table["corrected_label"] = ""
    texts = run.examples.set_index("example_id")[["text", "text_b"]]
    table[["text", "text_b"]] = texts.reindex(table.index)
    table["rank"] = np.select([table["doubtful"], conflict], [0, 1], 2)
    table = table[table["reason"] != ""].sort_values(["rank", "score"], kind="stable")
    return table[COLUMNS].reset_index(drop=True)


def write_audit(table: pd.DataFrame, path: str | Path) -> Path:
    """Write what `audit` returns as a csv file for a spreadsheet.

    A person fills in `corrected_label`; `read_corrections` reads the file back. A spreadsheet runs no cell as a
    formula: `escape_cell` puts an apostrophe before it, and `read_corrections` removes the apostrophe.

    Raises
    ------
    CascadeLabError
        The file cannot be written.
    """
    content = io.StringIO(newline="")
    writer = csv.writer(content, quoting=csv.QUOTE_ALL)
    writer.writerow(table.columns)
    for row in table.itertuples(index=False):
        writer.writerow([escape_cell(_cell(value)) for value in row])
    # The byte order mark tells Excel that the file is UTF-8.
    return write_file(path, lambda partial: partial.write_bytes(content.getvalue().encode("utf-8-sig")))


def read_corrections(path: str | Path, evalset: EvalSet, spec: CascadeSpec, *, encoding: str | None = None) -> EvalSet:
    """Return an eval set with the labels that a person wrote into the column `corrected_label` of an audit.

    Rows may be sorted, missing, or without a correction. Only the columns `example_id`, `text`, `label` and
    `corrected_label` are read. The columns `<stage>_label` of a corrected example are emptied, because they belong to
    the wrong label.

    Parameters
    ----------
    path : path
        The csv file, with commas, semicolons or tabs between its cells, as spreadsheets write it.
    evalset : EvalSet
        The set that was audited.
    spec : CascadeSpec
        A correction must be one of its labels.
    encoding : str, optional
        The encoding of the file; by default UTF-8, or what its byte-order mark says.

    Raises
    ------
    EvalSetError
        Names the row: an unknown example, a text or label that differs from the eval set, a correction that the cascade
        cannot predict, or a second row for an example.
    """
    table = EvalSet.read(path, encoding=encoding)
    if "corrected_label" not in table.examples:
        raise EvalSetError(f"{path}: no column 'corrected_label'; give what `cascade-lab audit` wrote")
    examples = evalset.examples.copy()
    row_of = {example_id: row for row, example_id in enumerate(examples["example_id"])}
    for where, cells in zip(table.locations, table.examples.to_dict("records"), strict=True):
        example_id, text, label, correction = (unescape_cell(_cell(cells[name])) for name in _COLUMNS_READ)
        if example_id not in row_of:
            raise EvalSetError(f"{where}: no example has the id '{example_id}'; give the eval set that was audited")
        row = row_of[example_id]
        original = evalset.examples.iloc[row]
        if not _is_same_text(text, original["text"]):
            raise EvalSetError(f"{where}: the text of '{example_id}' is not the eval set's; leave texts as they are")
        original_label = original["label"] if isinstance(original["label"], str) else ""
        if not _is_same_text(label, original_label):
            raise EvalSetError(
                f"{where}: the label of '{example_id}' has changed; write the right one into corrected_label"
            )
        correction = correction if correction in spec.labels else correction.strip()
        if not correction or correction == original_label:
            continue
        if correction not in spec.labels:
            near = did_you_mean(correction, list(spec.labels))
            raise EvalSetError(f"{where}: corrected_label '{correction}' is no answer of the cascade{near}")
        examples.loc[row, "label"] = correction
        examples.loc[row, [f"{s.name}_label" for s in spec.stages if f"{s.name}_label" in examples]] = ""
    is_partly_labelled = bool(examples["label"].isna().any())
    return replace(EvalSet.from_frame(examples, unlabelled=is_partly_labelled), locations=evalset.locations)


# A spreadsheet that splits at semicolons or tabs sees cells begin inside our cells, also after quotes. An apostrophe is
# put before every = + - @ (also full-width) at the beginning of a cell. If there are apostrophes already, one more is
# added, so that removing one gives the original cell.
_BEGINNING = '((?:^|[;\t\r\n])"*)'
_FORMULA = "('*[=+\\-@＝＋－＠])"
_BLANK = "('*[\t\r\n])"


def escape_cell(cell: str) -> str:
    """Return a cell that no spreadsheet runs as a formula.

    >>> [escape_cell(cell) for cell in ("=1+1", "'=1+1", "'tis", "a;-1", "\\tx")]
    ["'=1+1", "''=1+1", "'tis", "a;'-1", "'\\tx"]
    """
    return re.sub(f"^{_BLANK}", r"'\1", re.sub(_BEGINNING + _FORMULA, r"\1'\2", cell))


def unescape_cell(cell: str) -> str:
    """Return the cell from which `escape_cell` made `cell`."""
    return re.sub(f"{_BEGINNING}'{_FORMULA}", r"\1\2", re.sub(f"^'{_BLANK}", r"\1", cell))


def _cell(value: object) -> str:
    if isinstance(value, float):
        return "" if np.isnan(value) else f"{value:.4g}"
    # Python 3.10 cannot read a csv file with a NUL in it.
    return "" if value is None or value is pd.NA else str(value).replace("\0", "")


_CUT = 16_000  # Excel cuts a cell at 32,767 units of UTF-16


def _is_same_text(cell: str, original: str) -> bool:
    """Return whether two texts are equal after what spreadsheets do: drop control characters and apostrophes, cut."""
    cell, original = ("".join(filter(str.isprintable, text)).lstrip("'") for text in (cell, original))
    return cell == original or (len(cell) >= _CUT and original.startswith(cell))


def _cascade_probabilities(run: Run) -> tuple[list[str], np.ndarray]:
    """Return the final labels that a stage has, and the cascade's probability of each: shape (n, n_labels)."""
    n = len(run.examples)
    columns: dict[str, np.ndarray] = {}
    p_reached = np.ones(n)
    for stage in run.spec.stages:
        p = _stage_probabilities(run, stage.name)
        # A deferral stage has a say about the texts that it answers alone; these go no further.
        p_decided = p_reached * run.decision(stage.name).above if stage.is_deferral else p_reached
        for k, label in enumerate(stage.labels):
            if label != stage.pass_label:
                columns[label] = columns.get(label, np.zeros(n)) + p_decided * p[:, k]
        if stage.is_deferral:
            p_reached = p_reached - p_decided
        if stage.is_gate:
            p_reached = p_reached * p[:, stage.labels.index(str(stage.pass_label))]
    return list(columns), np.column_stack(list(columns.values()))


def _stage_probabilities(run: Run, name: str) -> np.ndarray:
    scores = run.scores(name)
    if not scores.scored.all():
        raise missing_scores_error(run.name, name, int((~scores.scored).sum()))
    return probabilities(run.spec.stage(name), scores.logits)


def _assess(run: Run) -> pd.DataFrame:
    """Return the columns of `doubtful_labels` for every example in the run's order, and whether it is `doubtful`."""
    n = len(run.examples)
    label = run.examples["label"].to_numpy(dtype=object)
    labels, p = _cascade_probabilities(run)
    codes = pd.Index(labels).get_indexer(label)
    best, has_code = p.argmax(axis=1), codes >= 0
    p_best, p_label = p[np.arange(n), best], np.where(has_code, p[np.arange(n), codes], np.nan)
    # The mean probability of each label on the texts that have it; of a label that no text has, the mean of all texts.
    mean_p = pd.Series(p_label).groupby(codes).mean().reindex(range(len(labels)))
    mean_p = mean_p.fillna(np.nanmean(p_label)).to_numpy()
    doubtful = has_code & (best != codes) & (p_best >= mean_p[best]) & label_issues(label, p, labels)
    doubted_by: list[list[str]] = [[] for _ in range(n)]
    stages_say: list[list[str]] = [[] for _ in range(n)]
    for stage in run.spec.stages:
        p_stage = _stage_probabilities(run, stage.name)
        is_issue = label_issues(run.targets(stage.name), p_stage, stage.labels)
        most_probable = p_stage.argmax(axis=1)
        doubtful &= np.array(stage.labels, dtype=object)[most_probable] != label
        for i, k in enumerate(most_probable):
            stages_say[i].append(f"{stage.name}: {stage.labels[k]} {p_stage[i, k]:.2f}")
            if is_issue[i]:
                doubted_by[i].append(stage.name)
    return pd.DataFrame(
        {
            "example_id": run.examples["example_id"].to_numpy(dtype=object),
            "label": label,
            "suggested_label": np.array(labels, dtype=object)[best],
            "score": p_label,
            "doubted_by": [", ".join(names) for names in doubted_by],
            "stages_say": ["; ".join(parts) for parts in stages_say],
            "doubtful": doubtful & np.array([bool(names) for names in doubted_by], dtype=bool),
        }
    )


def _duplicate_pairs(
    examples: pd.DataFrame, against: Run | EvalSet | None, similarity: float, progress: bool
) -> pd.DataFrame:
    """Return the duplicates of each example of the run, the most important first; pairs in the run both ways."""
    within = duplicates(examples, similarity=similarity, progress=progress)
    swapped = {"example_id": "duplicate_id", "duplicate_id": "example_id"}
    swapped |= {"label": "duplicate_label", "duplicate_label": "label"}
    tables = [(examples, "", pd.concat([within, within.rename(columns=swapped)]))]
    if against is not None:
        others = duplicates(examples, against.examples, similarity=similarity, progress=progress)
        tables.append((against.examples, " in the other set", others))
    pairs = []
    for other, where, table in tables:
        texts = other.set_index("example_id")["text"].reindex(table["duplicate_id"]).to_numpy(dtype=object)
        pairs.append(table.assign(where=where, duplicate_text=texts))
    return pd.concat(pairs).sort_values(["conflict", "exact", "similarity"], ascending=False, kind="stable")

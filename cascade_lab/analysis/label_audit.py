"""List labels that may be wrong, as a csv file that a person corrects, and read the corrections back."""

from __future__ import annotations

import csv
import io
import re
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from cascade_lab.analysis.confident_learning import issues_by_block
from cascade_lab.analysis.duplicates import SIMILARITY, duplicates
from cascade_lab.atomic import write_file
from cascade_lab.by_block import by_block
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
    run = run.labelled
    table = _assess(run)
    table = table[table["doubtful"]].sort_values("score", kind="stable").drop(columns="doubtful")
    return table.assign(stages_say=_stages_say(run, table.index.to_numpy())).reset_index(drop=True)


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
    table = _assess(run)
    pairs = _duplicate_pairs(run.examples, against, similarity, progress)
    table["reason"] = _reasons(table, pairs)
    most_important = pairs.drop_duplicates("row").set_index("row")
    for column in ("duplicate_id", "duplicate_label", "duplicate_text", "similarity", "conflict"):
        table[column] = most_important[column].reindex(table.index)
    table = table[table["reason"] != ""].copy()
    conflict = table["conflict"].eq(True)
    duplicate_agrees = conflict & (table["suggested_label"] == table["duplicate_label"])
    table["suggested_label"] = table["suggested_label"].where(table["doubtful"] | duplicate_agrees, "")
    table["corrected_label"] = ""
    table[["text", "text_b"]] = run.examples.loc[table.index, ["text", "text_b"]]
    table["stages_say"] = _stages_say(run, table.index.to_numpy())
    table["rank"] = np.select([table["doubtful"], conflict], [0, 1], 2)
    return table.sort_values(["rank", "score"], kind="stable")[COLUMNS].reset_index(drop=True)


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
_PLAIN = re.compile(r"(?:\w[^;\t\r\n]*)?")


def escape_cell(cell: str) -> str:
    """Return a cell that no spreadsheet runs as a formula.

    >>> [escape_cell(cell) for cell in ("=1+1", "'=1+1", "'tis", "a;-1", "\\tx")]
    ["'=1+1", "''=1+1", "'tis", "a;'-1", "'\\tx"]
    """
    if _PLAIN.fullmatch(cell):  # most cells, and much faster
        return cell
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


def _cascade_probabilities(run: Run, rows: np.ndarray | slice = slice(None)) -> tuple[list[str], np.ndarray]:
    """Return the final labels that a stage has, and the cascade's probability of each: shape (n, n_labels)."""
    columns: dict[str, np.ndarray] = {}
    p_reached: Any = 1.0
    for stage in run.spec.stages:
        p = _stage_probabilities(run, stage.name, rows)
        # A deferral stage has a say about the texts that it answers alone; these go no further.
        p_decided = p_reached * run.decision(stage.name).above[rows] if stage.is_deferral else p_reached
        for k, label in enumerate(stage.labels):
            if label != stage.pass_label:
                columns[label] = columns.get(label, 0.0) + p_decided * p[:, k]
        if stage.is_deferral:
            p_reached = p_reached - p_decided
        if stage.is_gate:
            p_reached = p_reached * p[:, stage.labels.index(str(stage.pass_label))]
    return list(columns), np.column_stack(list(columns.values()))


def _stage_probabilities(run: Run, name: str, rows: np.ndarray | slice = slice(None)) -> np.ndarray:
    return probabilities(run.spec.stage(name), run.scores(name).logits[rows])


def _most_probable(run: Run, name: str, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the column of a stage's most probable label for some examples, and its probability."""

    def of_block(rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        p = _stage_probabilities(run, name, rows)
        return p.argmax(axis=1), p.max(axis=1)

    best, p_best = by_block(of_block, rows, n_columns=len(run.spec.stage(name).labels))
    return best, p_best


def _assess(run: Run) -> pd.DataFrame:
    """Return what `doubtful_labels` says of every example in the run's order, and whether it is `doubtful`."""
    for stage in run.spec.stages:
        is_scored = run.scores(stage.name).scored
        if not is_scored.all():
            raise missing_scores_error(run.name, stage.name, int((~is_scored).sum()))
        run.decision(stage.name)  # the threads below only read
    rows, label = np.arange(len(run.examples)), run.examples["label"].to_numpy(dtype=object)
    labels, _ = _cascade_probabilities(run, rows[:1])
    codes, n_columns = pd.Index(labels).get_indexer(label), sum(len(stage.labels) for stage in run.spec.stages)

    def of_cascade(rows: np.ndarray, codes: np.ndarray) -> tuple[np.ndarray, ...]:
        _, p = _cascade_probabilities(run, rows)
        return p.argmax(axis=1), p.max(axis=1), p[np.arange(len(rows)), codes]

    best, p_best, p_code = by_block(of_cascade, rows, codes, n_columns=n_columns)
    has_code = codes >= 0
    p_label = np.where(has_code, p_code, np.nan)
    # The mean probability of each label on the texts that have it; of a label that no text has, the mean of all texts.
    mean_p = pd.Series(p_label).groupby(codes).mean().reindex(range(len(labels)))
    mean_p = mean_p.fillna(np.nanmean(p_label)).to_numpy()
    doubtful = has_code & (best != codes) & (p_best >= mean_p[best])
    doubtful &= issues_by_block(codes, lambda rows: _cascade_probabilities(run, rows)[1], len(labels))
    doubted_by, is_doubted = np.full(len(rows), "", dtype=object), np.zeros(len(rows), dtype=bool)
    for stage in run.spec.stages:
        own = pd.Index(stage.labels).get_indexer(run.targets(stage.name))
        is_issue = issues_by_block(own, partial(_stage_probabilities, run, stage.name), len(stage.labels))
        doubtful &= np.array(stage.labels, dtype=object)[_most_probable(run, stage.name, rows)[0]] != label
        doubted_by[is_issue] += np.where(is_doubted[is_issue], ", ", "").astype(object) + stage.name
        is_doubted |= is_issue
    return pd.DataFrame(
        {
            "example_id": run.examples["example_id"].to_numpy(dtype=object),
            "label": label,
            "suggested_label": np.array(labels, dtype=object)[best],
            "score": p_label,
            "doubted_by": doubted_by,
            "doubtful": doubtful & is_doubted,
        }
    )


def _stages_say(run: Run, rows: np.ndarray) -> list[str]:
    """Return each stage's most probable label of some examples, and its probability, in one text per example."""
    parts = []
    for stage in run.spec.stages:
        best, p_best = _most_probable(run, stage.name, rows)
        parts.append([f"{stage.name}: {stage.labels[k]} {p:.2f}" for k, p in zip(best, p_best, strict=True)])
    return list(map("; ".join, zip(*parts, strict=True)))


def _reasons(table: pd.DataFrame, pairs: pd.DataFrame) -> list[str]:
    """Return why each example of the run is to be looked at again, the most important reason first; "" if it is not."""
    reasons = np.where(table["doubtful"], "label doubted by " + table["doubted_by"], "").astype(object)
    kinds = ["conflict", "exact", "where"]
    for (conflict, exact, where), of_kind in sorted(
        pairs.groupby(kinds)["row"], key=lambda group: (not group[0][0], not group[0][1], group[0][2])
    ):
        rows = of_kind.unique()
        kind = "exact duplicate" if exact else "near duplicate"
        reason = kind + (" with another label" if conflict else "") + where
        reasons[rows] += np.where(reasons[rows] == "", "", "; ").astype(object) + reason
    return list(reasons)


def _duplicate_pairs(
    examples: pd.DataFrame, against: Run | EvalSet | None, similarity: float, progress: bool
) -> pd.DataFrame:
    """Return the duplicates of each example of the run, the most important first; pairs in the run both ways.

    `row` is the example's place in the run.
    """
    within = duplicates(examples, similarity=similarity, progress=progress)
    swapped = {"example_id": "duplicate_id", "duplicate_id": "example_id"}
    swapped |= {"label": "duplicate_label", "duplicate_label": "label"}
    tables = [(examples, "", pd.concat([within, within.rename(columns=swapped)]))]
    if against is not None:
        others = duplicates(examples, against.examples, similarity=similarity, progress=progress)
        tables.append((against.examples, " in the other set", others))
    pairs = []
    for other, where, table in tables:
        rows = pd.Index(other["example_id"]).get_indexer(table["duplicate_id"])
        texts = other["text"].to_numpy(dtype=object)[rows]
        pairs.append(table.assign(where=where, duplicate_text=texts))
    both = pd.concat(pairs).sort_values(["conflict", "exact", "similarity"], ascending=False, kind="stable")
    return both.assign(row=pd.Index(examples["example_id"]).get_indexer(both["example_id"]))

"""Label audit: which gold labels to look at again, as a csv that a person corrects and that is read back."""

from __future__ import annotations

import csv
import io
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
from cleanlab.filter import find_label_issues

from cascade_lab.analysis.duplicates import SIMILARITY, duplicates
from cascade_lab.errors import CascadeLabError, EvalSetError, RunError, did_you_mean
from cascade_lab.evalset import EvalSet
from cascade_lab.run import Run
from cascade_lab.serial import probabilities
from cascade_lab.spec import CascadeSpec

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
_READ = ("example_id", "text", "label", "corrected_label")


def doubtful_labels(run: Run) -> pd.DataFrame:
    """Return the examples whose gold label the stages and confident learning (Northcutt et al. 2021) hold wrong.

    A label is doubtful if no stage gives it; if the cascade as a whole (the product of its stages' probabilities,
    without thresholds) gives another one, as sure of it as it is on average of the texts that bear it; if confident
    learning on those products picks the label out; and if it does so too on the probabilities of one stage at least,
    over the texts that have a gold label there.

    Returns
    -------
    DataFrame
        A row a doubtful label, the most doubtful first: `example_id`, `label`, `suggested_label` (the cascade's most
        probable answer), `score` (the probability of the label as it is), `doubted_by` (the stages whose probabilities
        speak against it, comma-separated) and `stages_say` (each stage's most probable label and its probability). An
        example whose label no stage scores (one that only `min_probability` gives) is never among them.

    Raises
    ------
    RunError
        The run has no shadow scores, so not every stage has seen every text.
    """
    views = _views(run)
    return views[views["doubtful"]].sort_values("score", kind="stable", ignore_index=True).drop(columns="doubtful")


def audit(
    run: Run,
    against: Run | EvalSet | None = None,
    *,
    similarity: float = SIMILARITY,
    progress: bool = False,
) -> pd.DataFrame:
    """Return the examples of a run to look at again: doubtful labels and duplicates, an example a row.

    Parameters
    ----------
    run : Run
        With shadow scores.
    against : Run or EvalSet, optional
        Another split, to find the run's texts in (the training set, say).
    similarity, progress :
        As `duplicates` has them.

    Returns
    -------
    DataFrame
        `COLUMNS`: the example; `suggested_label`, empty where nothing speaks for another; `corrected_label`, empty, for
        the person who looks; `reason`, every one there is; `score`, the probability that the cascade gives to the label
        as it is; `stages_say`; and of the duplicate that is most worth a look its id, label, text and similarity. First
        the doubtful labels, the most doubtful first, then duplicates whose labels differ, then other duplicates.
    """
    table = _views(run).set_index("example_id", drop=False)
    reasons = pd.Series([[] for _ in range(len(table))], index=table.index, dtype=object)
    for key, stages in table.loc[table["doubtful"], "doubted_by"].items():
        reasons[key].append(f"label doubted by {stages}")
    pairs = _pairs(run.examples, against, similarity, progress)
    for pair in pairs.sort_values(["conflict", "exact", "where"], ascending=[False, False, True]).itertuples():
        kind = "exact duplicate" if pair.exact else "near duplicate"
        reason = kind + (" with another label" if pair.conflict else "") + pair.where
        if reason not in reasons[pair.example_id]:
            reasons[pair.example_id].append(reason)
    best = pairs.drop_duplicates("example_id").set_index("example_id")
    for column in ("duplicate_id", "duplicate_label", "duplicate_text", "similarity", "conflict"):
        table[column] = best[column].reindex(table.index)
    conflict = table["conflict"].eq(True)
    backed = conflict & (table["suggested_label"] == table["duplicate_label"])
    table["suggested_label"] = table["suggested_label"].where(table["doubtful"] | backed, "")
    table["reason"] = reasons.map("; ".join)
    table["corrected_label"] = ""
    texts = run.examples.set_index("example_id")[["text", "text_b"]]
    table[["text", "text_b"]] = texts.reindex(table.index)
    table["rank"] = np.select([table["doubtful"], conflict], [0, 1], 2)
    table = table[table["reason"] != ""].sort_values(["rank", "score"], kind="stable")
    return table[COLUMNS].reset_index(drop=True)


def write_audit(table: pd.DataFrame, path: str | Path) -> Path:
    """Write what `audit` returns as a csv for a spreadsheet; fill in its `corrected_label`, and read it back.

    No cell runs as a formula: where a spreadsheet could take one to begin, an apostrophe stands before it, which
    `read_corrections` takes away again.

    Raises
    ------
    CascadeLabError
        The file cannot be written.
    """
    content = io.StringIO(newline="")
    writer = csv.writer(content, quoting=csv.QUOTE_ALL)
    writer.writerow(table.columns)
    for row in table.itertuples(index=False):
        writer.writerow([_harmless(_cell(value)) for value in row])
    try:
        # The byte order mark tells Excel that it is UTF-8.
        Path(path).write_bytes(content.getvalue().encode("utf-8-sig"))
    except OSError as error:
        raise CascadeLabError(f"{path}: cannot be written ({error.strerror}); choose another output") from error
    return Path(path)


def read_corrections(path: str | Path, evalset: EvalSet, spec: CascadeSpec) -> EvalSet:
    """Return an eval set with the labels that a person gave in the column `corrected_label` of an audit.

    Rows may be sorted, left out, or without a correction; columns other than `example_id`, `text`, `label` and
    `corrected_label` are not looked at. Of a corrected example the columns `<stage>_label` are emptied: they belong to
    the label that was wrong.

    Parameters
    ----------
    path : path
        The csv, with commas, semicolons or tabs between its cells, as spreadsheets write it.
    evalset : EvalSet
        What was audited.
    spec : CascadeSpec
        Its labels are the ones that may be given.

    Raises
    ------
    EvalSetError
        Naming the row: an unknown example, another text or label than the eval set's, a label that is no answer of the
        cascade, two rows for one example.
    """
    table = EvalSet.read(path)
    if "corrected_label" not in table.examples:
        raise EvalSetError(f"{path}: no column 'corrected_label'; give what `cascade-lab audit` wrote")
    examples = evalset.examples.copy()
    rows = {key: row for row, key in enumerate(examples["example_id"])}
    for where, cells in zip(table.locations, table.examples.to_dict("records"), strict=True):
        key, text, label, given = (_as_it_was(_cell(cells[name])) for name in _READ)
        if key not in rows:
            raise EvalSetError(f"{where}: no example has the id '{key}'; give the eval set that was audited")
        known = examples.iloc[rows[key]]
        if not _same_text(text, known["text"]):
            raise EvalSetError(f"{where}: the text of '{key}' is not the eval set's; leave texts as they are")
        if not _same_text(label, evalset.examples["label"].iloc[rows[key]]):
            raise EvalSetError(f"{where}: the label of '{key}' has changed; write the right one into corrected_label")
        given = given if given in spec.labels else given.strip()
        if not given or given == known["label"]:
            continue
        if given not in spec.labels:
            near = did_you_mean(given, list(spec.labels))
            raise EvalSetError(f"{where}: corrected_label '{given}' is no answer of the cascade{near}")
        examples.loc[rows[key], "label"] = given
        examples.loc[rows[key], [f"{s.name}_label" for s in spec.stages if f"{s.name}_label" in examples]] = ""
    return replace(EvalSet.from_frame(examples), locations=evalset.locations)


def _product(run: Run) -> tuple[list[str], np.ndarray]:
    """Return the final answers that a stage scores, and the probability of each, shape (n, n_answers)."""
    n = len(run.examples)
    columns: dict[str, np.ndarray] = {}
    reach = np.ones(n)
    for stage in run.spec.stages:
        p = _of_stage(run, stage.name)
        for k, label in enumerate(stage.labels):
            if label != stage.pass_label:
                columns[label] = columns.get(label, np.zeros(n)) + reach * p[:, k]
        if stage.is_gate:
            reach = reach * p[:, stage.labels.index(stage.pass_label)]
    return list(columns), np.column_stack(list(columns.values()))


def _of_stage(run: Run, name: str) -> np.ndarray:
    scores, stage = run.scores(name), run.spec.stage(name)
    missing = len(run.examples) - len(scores.rows)
    if missing:
        raise RunError(
            f"{run.directory}: stage '{name}' never scored {missing} examples; run the cascade again with shadow scores"
        )
    p = np.empty(scores.logits.shape)
    p[scores.rows] = probabilities(scores.logits, stage.temperature)
    return p


def _views(run: Run) -> pd.DataFrame:
    """Return what `doubtful_labels` does, of every example in the run's order, and whether it is `doubtful`."""
    n = len(run.examples)
    label = run.examples["label"].to_numpy(dtype=object)
    labels, p = _product(run)
    codes = pd.Index(labels).get_indexer(label)
    best, scored = p.argmax(axis=1), codes >= 0
    p_best, p_label = p[np.arange(n), best], np.where(scored, p[np.arange(n), codes], np.nan)
    # How sure the cascade is, on average, of the texts that bear a label; of one that none bears, of them all.
    sure = pd.Series(p_label).groupby(codes).mean().reindex(range(len(labels))).fillna(np.nanmean(p_label)).to_numpy()
    doubtful = scored & (best != codes) & (p_best >= sure[best]) & _picked_out(codes, p)
    doubting: list[list[str]] = [[] for _ in range(n)]
    says: list[list[str]] = [[] for _ in range(n)]
    for stage in run.spec.stages:
        own = _of_stage(run, stage.name)
        picked = _picked_out(pd.Index(stage.labels).get_indexer(run.gold(stage.name)), own)
        doubtful &= np.array(stage.labels, dtype=object)[own.argmax(axis=1)] != label
        for i, k in enumerate(own.argmax(axis=1)):
            says[i].append(f"{stage.name}: {stage.labels[k]} {own[i, k]:.2f}")
            if picked[i]:
                doubting[i].append(stage.name)
    return pd.DataFrame(
        {
            "example_id": run.examples["example_id"].to_numpy(dtype=object),
            "label": label,
            "suggested_label": np.array(labels, dtype=object)[best],
            "score": p_label,
            "doubted_by": [", ".join(names) for names in doubting],
            "stages_say": ["; ".join(words) for words in says],
            "doubtful": doubtful & np.array([bool(names) for names in doubting], dtype=bool),
        }
    )


def _picked_out(codes: np.ndarray, p: np.ndarray) -> np.ndarray:
    """Return which labels confident learning holds wrong: of the places `codes` in the columns of `p`, -1 for none."""
    picked, known = np.zeros(len(codes), dtype=bool), codes >= 0
    if len(np.unique(codes[known])) >= 2:
        # It counts how many are wrong by the confident joint, and takes so many of the lowest probability.
        picked[known] = find_label_issues(codes[known], p[known], filter_by="low_self_confidence", n_jobs=1)
    return picked


def _pairs(examples: pd.DataFrame, against: Run | EvalSet | None, similarity: float, progress: bool) -> pd.DataFrame:
    """Return duplicates seen from each example of the run: within it both ways, those most worth a look first."""
    within = duplicates(examples, similarity=similarity, progress=progress)
    swapped = {"example_id": "duplicate_id", "duplicate_id": "example_id"}
    swapped |= {"label": "duplicate_label", "duplicate_label": "label"}
    found = [(examples, "", pd.concat([within, within.rename(columns=swapped)]))]
    if against is not None:
        others = duplicates(examples, against.examples, similarity=similarity, progress=progress)
        found.append((against.examples, " in the other set", others))
    pairs = []
    for other, where, table in found:
        texts = other.set_index("example_id")["text"].reindex(table["duplicate_id"]).to_numpy(dtype=object)
        pairs.append(table.assign(where=where, duplicate_text=texts))
    return pd.concat(pairs).sort_values(["conflict", "exact", "similarity"], ascending=False, kind="stable")


def _cell(value: object) -> str:
    if isinstance(value, float):
        return "" if np.isnan(value) else f"{value:.4g}"
    # Python 3.10 reads no csv with a NUL in it.
    return "" if value is None or value is pd.NA else str(value).replace("\0", "")


# A spreadsheet that splits at semicolons or tabs sees cells begin inside of ours, after quotes too. An apostrophe goes
# before every = + - @ (full-width ones too) with which a cell begins, or one more where there are some already, so that
# taking one away gives back what was.
_BEGINS = '((?:^|[;\t\r\n])"*)'
_FORMULA = "('*[=+\\-@＝＋－＠])"
_BLANK = "('*[\t\r\n])"


def _harmless(cell: str) -> str:
    """Return a cell that no spreadsheet takes for a formula.

    >>> [_harmless(cell) for cell in ("=1+1", "'=1+1", "'tis", "a;-1", "\\tx")]
    ["'=1+1", "''=1+1", "'tis", "a;'-1", "'\\tx"]
    """
    return re.sub(f"^{_BLANK}", r"'\1", re.sub(_BEGINS + _FORMULA, r"\1'\2", cell))


def _as_it_was(cell: str) -> str:
    """Return the cell of which `_harmless` made `cell`."""
    return re.sub(f"{_BEGINS}'{_FORMULA}", r"\1\2", re.sub(f"^'{_BLANK}", r"\1", cell))


def _same_text(given: str, known: str) -> bool:
    """Whether two texts are the same but for what spreadsheets do: drop control characters and apostrophes, cut."""
    given, known = ("".join(filter(str.isprintable, text)).lstrip("'") for text in (given, known))
    return given == known or (len(given) >= _CUT and known.startswith(given))


_CUT = 16_000  # Excel cuts a cell at 32,767 units of UTF-16

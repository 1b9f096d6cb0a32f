"""Slices of a run: texts that have something in common, how often they go wrong, and whether that is more than chance.

A slice is a rule over the table that `features` returns, written as pandas writes a query, so that
`features(run).query(rule)` gives its texts.
"""

from __future__ import annotations

import itertools
import keyword
import re
import unicodedata
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
from pandas.api.types import is_bool_dtype, is_numeric_dtype
from scipy.stats import beta, fisher_exact
from sklearn.tree import DecisionTreeClassifier
from tokenizers.implementations import BertWordPieceTokenizer

from cascade_lab.analysis.outcomes import OUTCOMES, RIGHT, outcomes
from cascade_lab.analysis.paired import holm
from cascade_lab.errors import RunError, did_you_mean
from cascade_lab.provenance import sha256
from cascade_lab.run import Run
from cascade_lab.serial import answer

Rule = str | Callable[[pd.DataFrame], Any]
"""A pandas query, or a function, over the table of `features`."""

RARE = 2
"""A wordpiece that so many texts of the run have, or fewer, is rare."""
MIN_SIZE = 20
MOST_WORDS = 300
_TEXTS = ("example_id", "text", "text_b")
_WORD = re.compile(r"\w+")


def features(run: Run) -> pd.DataFrame:
    """Return the examples of a run, with what there is to say of each text.

    Returns
    -------
    DataFrame
        The columns of `run.examples` (those whose every value is a number as numbers), and beside them, counted over
        `text` and `text_b`: `n_words`; `n_wordpieces`, `n_unknown` (`[UNK]`) and `n_rare` (wordpieces of at most
        `RARE` texts of the run), by the last stage's vocabulary; and a bool `has_<word>` for each of the `MOST_WORDS`
        most common words that at least `MIN_SIZE` texts have. A column of one's own keeps its name. Where the
        vocabulary is gone or has changed, a warning says so, and the columns by wordpieces are not there.
    """
    examples = run.examples.copy()
    for column in examples.columns.difference([*_TEXTS, "label"]):
        examples[column] = _as_numbers(examples[column])
    second = [text if isinstance(text, str) else "" for text in examples["text_b"]]
    both = [f"{a} {b}" if b else a for a, b in zip(examples["text"], second, strict=True)]
    found: dict[str, Any] = {"n_words": [len(text.split()) for text in both]}
    pieces = _wordpieces(run, both)
    if pieces is not None:
        texts_with = Counter(piece for row in pieces for piece in set(row))
        found["n_wordpieces"] = [len(row) for row in pieces]
        found["n_unknown"] = [row.count("[UNK]") for row in pieces]
        found["n_rare"] = [sum(texts_with[piece] <= RARE and piece != "[UNK]" for piece in row) for row in pieces]
    words = [set(_WORD.findall(text.lower())) for text in both]
    count = Counter(word for row in words for word in row)
    common = [w for w, n in sorted(count.items(), key=lambda item: (-item[1], item[0])) if n >= MIN_SIZE]
    for word in common[:MOST_WORDS]:
        # Python reads a name in its NFKC form, so a word that has another form could not be asked for.
        if f"has_{word}".isidentifier() and unicodedata.normalize("NFKC", word) == word:
            found[f"has_{word}"] = [word in row for row in words]
    added = pd.DataFrame({name: values for name, values in found.items() if name not in examples}, index=examples.index)
    return pd.concat([examples, added], axis=1)


def slices(
    run: Run,
    by: Sequence[str] | str | None = None,
    *,
    rules: Mapping[str, Rule] | Sequence[str] = (),
    of: str = "error",
    min_size: int = MIN_SIZE,
    level: float = 0.95,
) -> pd.DataFrame:
    """Return how often each slice of a run goes wrong: a row a slice, the surest first.

    Parameters
    ----------
    run : Run
    by : str or sequence of str, optional
        Columns of `features(run)`: numbers are divided at their quartiles, and of anything else each value is a slice.
        Without `by` and without `rules`, all of them but `has_<word>`.
    rules : mapping of str to rule, or sequence of str, optional
        Slices of one's own: pandas queries (`"n_words > 20 and topic == 'money'"`), or names with a query or a function
        that takes the table and returns a bool for each row. None is left out.
    of : str
        What counts as an error: `"error"`, the final answer is wrong; an outcome such as `"false reject"`, among the
        texts that can have it (in scope, or out of it); or a stage, its own errors among the texts that reached it
        and have a gold label there.
    min_size : int
        Smaller slices of `by` are left out.
    level : float
        Of the interval.

    Returns
    -------
    DataFrame
        `slice` (the column, or a rule's name), `rule`, `n_examples`, `n_errors`, `error_rate`, `lift` (the error rate
        over that of all), `low` and `high` (Clopper and Pearson 1934, for the error rate), `p_value` (Fisher's exact
        test of the slice against the rest, two-sided) and `p_holm`, corrected for looking at every row (Holm 1979): the
        chance that any slice which is no worse and no better than the rest has `p_holm` below α is at most α.

    Raises
    ------
    RunError
        An unknown column, outcome or stage, or a rule that cannot be applied.
    """
    table = features(run)
    rows, wrong = _errors(run, of)
    table = table.iloc[rows].reset_index(drop=True)
    if by is None:
        # What nothing is known of cannot be sliced: a column of dates, say.
        by = [] if rules else [c for c in table if c not in _TEXTS and not c.startswith("has_") and _kind(table[c])]
    found = [
        (column, rule, mask)
        for column in ([by] if isinstance(by, str) else by)
        for rule, mask in _of_column(table, column, min_size)
    ]
    named = rules if isinstance(rules, Mapping) else {rule: rule for rule in rules}
    for name, rule in named.items():
        found.append((name, rule if isinstance(rule, str) else name, _mask(table, name, rule)))
    return _measured(found, wrong, level)


def find_slices(
    run: Run,
    *,
    of: str = "error",
    columns: Sequence[str] | None = None,
    max_depth: int = 3,
    min_size: int = MIN_SIZE,
    seed: int = 0,
    level: float = 0.95,
) -> pd.DataFrame:
    """Return slices that a shallow decision tree finds to go wrong more often than the rest.

    The tree is grown on one half of the texts, drawn by chance, and what it finds is measured on the other half, so
    that the figures are not flattered by the search. (Texts that are much alike can still stand in both halves.)

    Parameters
    ----------
    run, of, level :
        As `slices` has them.
    columns : sequence of str, optional
        The columns of `features(run)` to search; without, all of them.
    max_depth : int
        The most conditions of a rule.
    min_size : int
        The fewest texts of a slice, in the half that the tree is grown on.
    seed : int
        Divides the texts; the same seed gives the same slices.

    Returns
    -------
    DataFrame
        The columns of `slices` without `slice`, over the held-out half: a row for every node of the tree with more
        errors, in the other half, than there are in all of it. `p_holm` is corrected for these rows.
    """
    table = features(run)
    rows, wrong = _errors(run, of)
    table = table.iloc[rows].reset_index(drop=True)
    if columns is None:
        columns = [c for c in table if c not in _TEXTS and _kind(table[c])]
    conditions = [one for column in columns for one in _conditions(table, column, min_size)]
    half = np.random.default_rng(seed).permutation(len(table)) < len(table) // 2
    found = []
    if conditions and wrong[half].any() and not wrong[half].all():
        holds = np.column_stack([condition.holds for condition in conditions])
        tree = DecisionTreeClassifier(
            criterion="log_loss", max_depth=max_depth, min_samples_leaf=min_size, random_state=seed
        ).fit(holds[half], wrong[half])
        for path in _paths(tree):
            mask = np.logical_and.reduce([holds[:, i] == wanted for i, wanted in path])
            if wrong[mask & half].mean() > wrong[half].mean():
                found.append(("", _rule([(conditions[i], wanted) for i, wanted in path]), mask[~half]))
    return _measured(found, wrong[~half], level).drop(columns="slice")


def _errors(run: Run, of: str) -> tuple[np.ndarray, np.ndarray]:
    """Return the rows of the examples that `of` is about, and whether each of them is an error."""
    spec, predictions = run.spec, run.predictions
    if of == "error":
        return np.arange(len(predictions)), (predictions["label"] != predictions["predicted"]).to_numpy()
    if of in OUTCOMES:
        in_scope = predictions["label"].isin(spec.in_scope_labels).to_numpy()
        rows = np.flatnonzero(in_scope == (of in (RIGHT, "false reject", "wrong class")))
        return rows, (outcomes(spec, predictions["label"], predictions["predicted"]) == of)[rows]
    names = [stage.name for stage in spec.stages]
    if of not in names:
        raise RunError(f"{run.directory}: no error is named '{of}'{did_you_mean(of, ['error', *OUTCOMES, *names])}")
    scores, stage = run.scores(of), spec.stage(of)
    y_true = run.gold(of)[scores.rows]
    asked = ~scores.shadow & np.array([label is not None for label in y_true], dtype=bool)
    said = answer(stage, scores.logits)
    wrong = np.where(said.passes, stage.pass_label, said.predicted) != y_true
    order = np.argsort(scores.rows[asked])
    return scores.rows[asked][order], wrong[asked][order]


def _measured(found: list[tuple[str, str, np.ndarray]], wrong: np.ndarray, level: float) -> pd.DataFrame:
    n, n_wrong = len(wrong), int(wrong.sum())
    table = pd.DataFrame([(name, rule) for name, rule, _ in found], columns=["slice", "rule"])
    table["n_examples"] = size = np.array([mask.sum() for _, _, mask in found], dtype=int)
    table["n_errors"] = errors = np.array([wrong[mask].sum() for _, _, mask in found], dtype=int)
    table["error_rate"] = rate = np.divide(errors, size, out=np.full(len(size), np.nan), where=size > 0)
    table["lift"] = rate / (n_wrong / n) if n_wrong else np.nan
    beyond = (1 - level) / 2
    table["low"] = np.where(errors > 0, beta.ppf(beyond, errors, size - errors + 1), rate)
    table["high"] = np.where(errors < size, beta.ppf(1 - beyond, errors + 1, size - errors), rate)
    table["p_value"] = [
        float(fisher_exact([[k, of - k], [n_wrong - k, (n - of) - (n_wrong - k)]]).pvalue)
        for k, of in zip(errors.tolist(), size.tolist(), strict=True)
    ]
    table["p_holm"] = holm(table["p_value"].to_numpy(dtype=float))
    return table.sort_values(["p_holm", "p_value", "lift"], ascending=[True, True, False], ignore_index=True)


def _of_column(table: pd.DataFrame, column: str, min_size: int) -> Iterator[tuple[str, np.ndarray]]:
    """Yield the slices of a column, as rules and what they hold; all the texts, or too few, are none."""
    values, name = _values(table, column), _name(column)
    kind = _kind(values)
    if kind is None:
        raise RunError(f"column '{column}' holds neither texts, numbers nor truth values; give a rule for it")
    made: list[tuple[str, Any]] = []
    if kind == "number":
        edges = _edges(values, 4)
        made = [
            *[(f"{name} <= {edge!r}", values <= edge) for edge in edges[:1]],
            *[(f"{a!r} < {name} <= {b!r}", values.gt(a) & values.le(b)) for a, b in itertools.pairwise(edges)],
            *[(f"{name} > {edge!r}", values > edge) for edge in edges[-1:]],
        ]
    elif kind == "truth":
        made = [(name, values), (f"not {name}", ~values)]
    else:
        made = [(f"{name} == {value!r}", values == value) for value in _common(values, min_size)]
    if kind != "truth":
        made.append((f"{name}.isna()", values.isna()))
    for rule, mask in made:
        if min_size <= mask.sum() < len(table):
            yield rule, mask.to_numpy(dtype=bool)


class _Condition(NamedTuple):
    """What a node of the tree asks of a text."""

    column: str
    kind: str
    value: Any
    holds: np.ndarray
    has_missing: bool


def _conditions(table: pd.DataFrame, column: str, min_size: int) -> Iterator[_Condition]:
    values = _values(table, column)
    kind = _kind(values)
    missing = bool(values.isna().any())
    asked: list[tuple[str, Any, Any]] = [("missing", None, values.isna())] if missing else []
    if kind == "number":
        asked += [("at most", edge, values <= edge) for edge in _edges(values, 16)]
    elif kind == "truth":
        asked += [("truth", None, values)]
    elif kind == "text":
        asked += [("equal", value, values == value) for value in _common(values, min_size)]
    for what, value, holds in asked:
        yield _Condition(column, what, value, holds.to_numpy(dtype=bool), missing)


def _paths(tree: DecisionTreeClassifier) -> Iterator[list[tuple[int, bool]]]:
    """Yield the way to every node but the root: which conditions are asked, and whether they hold."""
    grown = tree.tree_
    waiting: list[tuple[int, list[tuple[int, bool]]]] = [(0, [])]
    while waiting:
        node, path = waiting.pop()
        if path:
            yield path
        if grown.children_left[node] >= 0:
            feature = int(grown.feature[node])
            waiting.append((int(grown.children_left[node]), [*path, (feature, False)]))
            waiting.append((int(grown.children_right[node]), [*path, (feature, True)]))


def _rule(path: list[tuple[_Condition, bool]]) -> str:
    """Return the conditions on a path as a query, without those that others make needless."""
    equal = {one.column for one, wanted in path if one.kind == "equal" and wanted}
    tightest: dict[tuple[str, bool], Any] = {}
    for one, wanted in path:
        if one.kind == "at most":
            key, tighter = (one.column, wanted), min if wanted else max
            tightest[key] = tighter(tightest.get(key, one.value), one.value)
    parts = []
    for one, wanted in path:
        name = _name(one.column)
        if one.kind == "at most":
            if one.value != tightest[one.column, wanted]:
                continue
            # A missing number is not at most 5, and not above 5 either.
            above = f"not {name} <= {one.value!r}" if one.has_missing else f"{name} > {one.value!r}"
            parts.append(f"{name} <= {one.value!r}" if wanted else above)
        elif one.kind == "equal" and (wanted or one.column not in equal):
            parts.append(f"{name} {'==' if wanted else '!='} {one.value!r}")
        elif one.kind in ("truth", "missing"):
            asked = name if one.kind == "truth" else f"{name}.isna()"
            if one.kind == "truth" or one.column not in equal:
                parts.append(asked if wanted else f"not {asked}")
    return " and ".join(parts)


def _mask(table: pd.DataFrame, name: str, rule: Rule) -> np.ndarray:
    """Return which rows a rule of one's own holds."""
    try:
        said = table.eval(rule, engine="python") if isinstance(rule, str) else rule(table)
        values = np.asarray(pd.Series(said).fillna(False))
    except Exception as error:  # whatever a rule of somebody's own may raise
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise RunError(f"rule '{name}' cannot be applied ({reason}); use the columns of features(run)") from error
    if values.shape != (len(table),) or values.dtype != bool:
        raise RunError(f"rule '{name}' must say true or false of each of {len(table)} texts; write a comparison")
    return values


def _values(table: pd.DataFrame, column: str) -> pd.Series:
    if column not in table:
        known = [name for name in table if column.startswith("has_") or not name.startswith("has_")]
        raise RunError(f"no column '{column}'{did_you_mean(column, known)}")
    return table[column]


def _kind(values: pd.Series) -> str | None:
    """Return what a column holds: "truth", "number", "text", or None if it is nothing that is sliced."""
    if is_bool_dtype(values.dtype):
        return "truth"
    if is_numeric_dtype(values.dtype):
        return "number"
    return "text" if all(isinstance(value, str) for value in values.dropna()) else None


def _as_numbers(values: pd.Series) -> pd.Series:
    """Return a column of texts that are all numbers as numbers (a tsv has no others), any other as it is."""
    if _kind(values) != "text":
        return values
    given = values.where(values != "")
    numbers = pd.to_numeric(given, errors="coerce")
    return numbers if given.notna().any() and numbers.notna().equals(given.notna()) else values


def _edges(values: pd.Series, n: int) -> list[Any]:
    """Return where a column of numbers is divided into at most `n` parts of like size: values that occur in it."""
    known = values[np.isfinite(values.astype(float))].to_numpy()
    if not len(known):
        return []
    edges = np.quantile(known, np.arange(1, n) / n, method="inverted_cdf")
    return [edge.item() for edge in np.unique(edges) if edge < known.max()]


def _common(values: pd.Series, min_size: int) -> list[str]:
    count = values.value_counts()
    return sorted(count[count >= min_size].index)


def _name(column: str) -> str:
    """Return a column as a query names it."""
    plain = column.isidentifier() and not keyword.iskeyword(column)
    return column if plain else f"`{column}`"


def _wordpieces(run: Run, texts: list[str]) -> list[list[str]] | None:
    """Return the wordpieces of each text as the last stage has them; warn and return None if its vocabulary is gone."""
    stage = run.spec.last
    try:
        digest = sha256(stage.vocab_file)
        tokenizer = BertWordPieceTokenizer(
            str(stage.vocab_file), lowercase=stage.do_lower_case, strip_accents=stage.do_lower_case
        )
    except Exception as error:  # the tokenizer raises a bare Exception
        reason = getattr(error, "strerror", None) or error
        return _no_vocabulary(run, f"cannot be read ({reason})")
    if digest not in run.manifest["inputs"].values():
        return _no_vocabulary(run, "is no longer the one of the run")
    return [encoding.tokens for encoding in tokenizer.encode_batch(texts, add_special_tokens=False)]


def _no_vocabulary(run: Run, why: str) -> None:
    warnings.warn(f"{run.directory}: {run.spec.last.vocab_file} {why}; slices by wordpieces are left out", stacklevel=4)

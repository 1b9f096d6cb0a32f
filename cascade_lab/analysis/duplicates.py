"""Find texts that are equal or nearly equal, in one set or in two, and compare their labels."""

from __future__ import annotations

import unicodedata
from collections import defaultdict
from itertools import chain, islice
from typing import NamedTuple

import numpy as np
import pandas as pd
from scipy.sparse import csr_matrix
from tqdm.auto import tqdm

SIMILARITY = 0.85
MAX_DUPLICATES = 5
N_GRAM = 4
MAX_SIMILARITIES = 4_000_000
"""The most similarities that are computed at once: about 50 MB."""


def duplicates(
    examples: pd.DataFrame,
    others: pd.DataFrame | None = None,
    *,
    similarity: float = SIMILARITY,
    max_duplicates: int = MAX_DUPLICATES,
    progress: bool = False,
) -> pd.DataFrame:
    """Return pairs of duplicate texts: within one set, or between two sets.

    Two texts are *exact* duplicates if they differ at most in case, punctuation, white space and Unicode form. They are
    *near* duplicates if the cosine of their TF-IDF vectors over 4-grams of characters is at least `similarity`. If an
    example has a second text, both of its texts are compared.

    Parameters
    ----------
    examples, others : DataFrame
        With columns `example_id`, `text`, `text_b` and `label` (None where unknown), as `Run.examples` and
        `EvalSet.examples` have them. Without `others`, `examples` is searched for duplicates of itself.
    similarity : float
        In (0, 1]. At 1 hardly any near duplicates are found.
    max_duplicates : int
        The most duplicates of each kind that are returned for one example. Duplicates with another label come first,
        then the most similar.
    progress : bool
        Show a progress bar if the search takes more than two seconds.

    Returns
    -------
    DataFrame
        One row per pair: `example_id`, `label`, `duplicate_id`, `duplicate_label`, `similarity` (1 for exact
        duplicates), `exact`, `conflict` (both labels are known and differ). Conflicts come first, then the most similar
        pairs. A pair within one set has one row.

    Examples
    --------
    >>> examples = pd.DataFrame(
    ...     {"example_id": ["a", "b", "c"], "text": ["Pay my bill!", "pay my bill", "play a song"], "text_b": None,
    ...      "label": ["pay", "bill", "play"]}
    ... )
    >>> duplicates(examples)[["example_id", "duplicate_id", "exact", "conflict"]].to_dict("records")
    [{'example_id': 'a', 'duplicate_id': 'b', 'exact': True, 'conflict': True}]
    """
    is_same_set = others is None
    first = _Texts.from_examples(examples)
    second = first if others is None else _Texts.from_examples(others)
    pairs = pd.DataFrame(
        [
            *_exact_pairs(first, second, max_duplicates, is_same_set),
            *_near_pairs(first, second, similarity, max_duplicates, progress),
        ],
        columns=list(_Pair._fields),
    )
    if is_same_set:
        # Each text of a pair may have found the other.
        pairs[["row", "other_row"]] = np.sort(pairs[["row", "other_row"]].to_numpy(dtype=int), axis=1)
        pairs = pairs.drop_duplicates(["row", "other_row"])
    rows, other_rows = pairs["row"].to_numpy(dtype=int), pairs["other_row"].to_numpy(dtype=int)
    labels, other_labels = first.labels[rows], second.labels[other_rows]
    table = pd.DataFrame(
        {
            "example_id": first.ids[rows],
            "label": labels,
            "duplicate_id": second.ids[other_rows],
            "duplicate_label": other_labels,
            "similarity": pairs["similarity"].to_numpy(dtype=float),
            "exact": pairs["exact"].to_numpy(dtype=bool),
            "conflict": _labels_conflict(labels, other_labels),
        }
    )
    return table.sort_values(["conflict", "exact", "similarity"], ascending=False, kind="stable", ignore_index=True)


def text_groups(examples: pd.DataFrame) -> np.ndarray:
    """Return a number for each example, the same for equal texts: int, shape (n,), from 0.

    White space and case are ignored: most checkpoints see such texts as equal. Two examples with a second text are
    equal if both of their texts are. A repeated text is no new evidence, so it is counted and resampled as a whole.

    Parameters
    ----------
    examples : DataFrame
        With columns `text` and `text_b`.

    Examples
    --------
    >>> text_groups(pd.DataFrame({"text": ["Pay", "play", "pay "], "text_b": None})).tolist()
    [0, 1, 0]
    """
    keys = [" ".join(text.split()).casefold() for text in examples["text"]]
    if examples["text_b"].notna().any():
        second = (" ".join(text.split()).casefold() if isinstance(text, str) else None for text in examples["text_b"])
        keys = list(zip(keys, second, strict=True))  # type: ignore[arg-type]
    return pd.factorize(pd.Series(keys, dtype=object))[0].astype(np.int64)


def repeats_sentences(groups: np.ndarray) -> list[str]:
    """Return one sentence about texts that repeat, or none where all texts are distinct.

    >>> repeats_sentences(np.array([0, 1, 0, 2]))
    ['1 of 4 texts repeats an earlier one; the intervals count each of the 3 different texts as one observation.']
    """
    n, n_different = len(groups), len(np.unique(groups))
    if n == n_different:
        return []
    repeats = f"{n - n_different:,} of {n:,} texts {'repeats' if n - n_different == 1 else 'repeat'} an earlier one"
    return [f"{repeats}; the intervals count each of the {n_different:,} different texts as one observation."]


def normalized(text: str) -> str:
    """Return a text without the differences that exact duplicates may have.

    >>> normalized("  What's  my BALANCE?")
    'whats my balance'
    >>> normalized("?!")
    '?!'
    """
    folded = unicodedata.normalize("NFKC", text).casefold()
    characters = [" " if unicodedata.category(char)[0] == "P" else char for char in folded if char not in "'’`"]
    return " ".join("".join(characters).split()) or " ".join(folded.split())


class _Texts(NamedTuple):
    """The ids, normalized texts and labels of a set."""

    ids: np.ndarray
    texts: list[str]
    labels: np.ndarray

    @classmethod
    def from_examples(cls, examples: pd.DataFrame) -> _Texts:
        texts = [
            f"{normalized(text)}\n{normalized(text_b)}" if isinstance(text_b, str) else normalized(text)
            for text, text_b in zip(examples["text"], examples["text_b"], strict=True)
        ]
        return cls(examples["example_id"].to_numpy(dtype=object), texts, examples["label"].to_numpy(dtype=object))


class _Pair(NamedTuple):
    """A duplicate: its row in each set."""

    row: int
    other_row: int
    similarity: float
    exact: bool


def _labels_conflict(labels: np.ndarray, other_labels: np.ndarray) -> np.ndarray:
    """Return whether both labels are known and differ."""
    return (labels != other_labels) & pd.notna(labels) & pd.notna(other_labels)


def _exact_pairs(first: _Texts, second: _Texts, max_duplicates: int, is_same_set: bool) -> list[_Pair]:
    rows_of: dict[str, dict[str, list[int]]] = defaultdict(lambda: defaultdict(list))
    for row, text in enumerate(second.texts):
        rows_of[text][second.labels[row]].append(row)
    pairs = []
    for row, text in enumerate(first.texts):
        rows_by_label = rows_of.get(text, {})
        other_labels = (rows for label, rows in rows_by_label.items() if label != first.labels[row])
        in_order = chain(*other_labels, rows_by_label.get(first.labels[row], []))
        other_rows = (other_row for other_row in in_order if not (is_same_set and other_row == row))
        pairs += [_Pair(row, other_row, 1.0, True) for other_row in islice(other_rows, max_duplicates)]
    return pairs


def _near_pairs(first: _Texts, second: _Texts, similarity: float, max_duplicates: int, progress: bool) -> list[_Pair]:
    distinct = pd.unique(np.array([*first.texts, *second.texts], dtype=object))
    if not any(len(text) + 2 >= N_GRAM for text in distinct):
        return []
    from sklearn.feature_extraction.text import TfidfVectorizer  # slow to import, and `text_groups` does not need it

    # With a space at both ends, the ends of a text count, and very short texts have an n-gram.
    vectorizer = TfidfVectorizer(
        analyzer="char", ngram_range=(N_GRAM, N_GRAM), lowercase=False, sublinear_tf=True, dtype=np.float32
    ).fit(f" {text} " for text in distinct)
    vectors = vectorizer.transform(f" {text} " for text in first.texts)
    other_vectors = vectorizer.transform(f" {text} " for text in second.texts).T.tocsr()
    index = pd.Index(distinct)
    codes, other_codes = index.get_indexer(first.texts), index.get_indexer(second.texts)
    pairs = []
    n_texts = len(first.texts)
    step = max(1, MAX_SIMILARITIES // len(second.texts))
    bar = tqdm(total=n_texts, desc="near duplicates", unit="text", delay=2, disable=not progress, leave=False)
    with bar:
        for start in range(0, n_texts, step):
            block = csr_matrix(vectors[start : start + step] @ other_vectors)
            rows = np.repeat(np.arange(block.shape[0]), np.diff(block.indptr)) + start
            # Equal texts are exact duplicates, or the example itself.
            is_near = (block.data >= similarity) & (codes[rows] != other_codes[block.indices])
            rows, other_rows, cosines = rows[is_near], block.indices[is_near], block.data[is_near]
            agrees = first.labels[rows] == second.labels[other_rows]
            order = np.lexsort((-cosines, agrees, rows))
            rank = np.arange(len(order)) - np.searchsorted(rows[order], rows[order])
            for i in order[rank < max_duplicates]:
                pairs.append(_Pair(int(rows[i]), int(other_rows[i]), min(1.0, float(cosines[i])), False))
            bar.update(block.shape[0])
    return pairs

"""Duplicates: texts of one set, or of two, that are the same or nearly so, and whether their labels are."""

from __future__ import annotations

import unicodedata
from collections import defaultdict
from itertools import chain, islice

import numpy as np
import pandas as pd
from scipy.sparse import csr_matrix
from sklearn.feature_extraction.text import TfidfVectorizer
from tqdm.auto import tqdm

SIMILARITY = 0.85
MOST = 5
N_GRAM = 4
_BLOCK = 4_000_000  # similarities held at once: some 50 MB


def duplicates(
    examples: pd.DataFrame,
    others: pd.DataFrame | None = None,
    *,
    similarity: float = SIMILARITY,
    most: int = MOST,
    progress: bool = False,
) -> pd.DataFrame:
    """Return the duplicates within a set, or those that a set has in another.

    Two texts are *exact* duplicates if they differ in case, punctuation, white space and forms of Unicode at most, and
    *near* ones if the cosine of their TF-IDF vectors over 4-grams of characters reaches `similarity`. In a pair, both
    texts count.

    Parameters
    ----------
    examples, others : DataFrame
        With `example_id`, `text`, `text_b` and `label`, as `Run.examples` and `EvalSet.examples` are.
    similarity : float
        In (0, 1]; at 1, next to none but exact duplicates are left.
    most : int
        The most duplicates that are looked up for one example: first those with another label, then the most similar.
    progress : bool
        Show a progress bar, if it takes over two seconds.

    Returns
    -------
    DataFrame
        A row a pair, in a set once: `example_id`, `label`, `duplicate_id`, `duplicate_label`, `similarity` (1 for an
        exact one), `exact`, `conflict` (their labels differ); conflicts first, then the most similar.
    """
    within = others is None
    other = examples if others is None else others
    texts, other_texts = _normal(examples), _normal(other)
    labels, other_labels = (t["label"].to_numpy(dtype=object) for t in (examples, other))
    found = [
        *_exact(texts, labels, other_texts, other_labels, most, within),
        *_near(texts, labels, other_texts, other_labels, similarity, most, progress),
    ]
    table = pd.DataFrame(found, columns=["row", "other", "similarity", "exact"])
    if within:
        # Each of a pair may have found the other.
        table[["row", "other"]] = np.sort(table[["row", "other"]].to_numpy(dtype=int), axis=1)
        table = table.drop_duplicates(["row", "other"])
    rows, columns = table["row"].to_numpy(dtype=int), table["other"].to_numpy(dtype=int)
    pairs = pd.DataFrame(
        {
            "example_id": examples["example_id"].to_numpy(dtype=object)[rows],
            "label": labels[rows],
            "duplicate_id": other["example_id"].to_numpy(dtype=object)[columns],
            "duplicate_label": other_labels[columns],
            "similarity": table["similarity"].to_numpy(dtype=float),
            "exact": table["exact"].to_numpy(dtype=bool),
            "conflict": labels[rows] != other_labels[columns],
        }
    )
    return pairs.sort_values(["conflict", "exact", "similarity"], ascending=False, kind="stable", ignore_index=True)


def normalized(text: str) -> str:
    """Return a text without what exact duplicates may differ in.

    >>> normalized("  What's  my BALANCE?")
    'whats my balance'
    >>> normalized("?!")
    '?!'
    """
    folded = unicodedata.normalize("NFKC", text).casefold()
    kept = [" " if unicodedata.category(char)[0] == "P" else char for char in folded if char not in "'’`"]
    return " ".join("".join(kept).split()) or " ".join(folded.split())


def _normal(examples: pd.DataFrame) -> list[str]:
    second = [text if isinstance(text, str) else None for text in examples["text_b"]]
    both = zip(examples["text"], second, strict=True)
    return [normalized(a) if b is None else f"{normalized(a)}\n{normalized(b)}" for a, b in both]


def _exact(
    texts: list[str], labels: np.ndarray, other_texts: list[str], other_labels: np.ndarray, most: int, within: bool
) -> list[tuple[int, int, float, bool]]:
    by_text: dict[str, dict[str, list[int]]] = defaultdict(lambda: defaultdict(list))
    for column, text in enumerate(other_texts):
        by_text[text][other_labels[column]].append(column)
    found = []
    for row, text in enumerate(texts):
        same = by_text.get(text, {})
        conflicting = (columns for label, columns in same.items() if label != labels[row])
        in_order = chain(*conflicting, same.get(labels[row], []))
        columns = (column for column in in_order if not (within and column == row))
        found += [(row, column, 1.0, True) for column in islice(columns, most)]
    return found


def _near(
    texts: list[str],
    labels: np.ndarray,
    other_texts: list[str],
    other_labels: np.ndarray,
    similarity: float,
    most: int,
    progress: bool,
) -> list[tuple[int, int, float, bool]]:
    distinct = pd.unique(np.array([*texts, *other_texts], dtype=object))
    if not any(len(text) + 2 >= N_GRAM for text in distinct):
        return []
    # A space at either end lets the ends of a text count, and lets very short ones have an n-gram at all.
    vectorizer = TfidfVectorizer(
        analyzer="char", ngram_range=(N_GRAM, N_GRAM), lowercase=False, sublinear_tf=True, dtype=np.float32
    ).fit(f" {text} " for text in distinct)
    vectors = vectorizer.transform(f" {text} " for text in texts)
    other_vectors = vectorizer.transform(f" {text} " for text in other_texts).T.tocsr()
    place = pd.Index(distinct)
    codes, other_codes = place.get_indexer(texts), place.get_indexer(other_texts)
    found = []
    step = max(1, _BLOCK // len(other_texts))
    bar = tqdm(total=len(texts), desc="near duplicates", unit="text", delay=2, disable=not progress, leave=False)
    with bar:
        for start in range(0, len(texts), step):
            block = csr_matrix(vectors[start : start + step] @ other_vectors)
            rows = np.repeat(np.arange(block.shape[0]), np.diff(block.indptr)) + start
            # The same text is an exact duplicate, or the example itself.
            hits = (block.data >= similarity) & (codes[rows] != other_codes[block.indices])
            rows, columns, cosines = rows[hits], block.indices[hits], block.data[hits]
            agrees = labels[rows] == other_labels[columns]
            order = np.lexsort((-cosines, agrees, rows))
            rank = np.arange(len(order)) - np.searchsorted(rows[order], rows[order])
            for i in order[rank < most]:
                found.append((int(rows[i]), int(columns[i]), min(1.0, float(cosines[i])), False))
            bar.update(block.shape[0])
    return found

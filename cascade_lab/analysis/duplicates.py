"""Find texts that are equal or nearly equal, in one set or in two, and compare their labels."""

from __future__ import annotations

import unicodedata
from typing import NamedTuple

import numpy as np
import pandas as pd
from tqdm.auto import tqdm

from cascade_lab.analysis.similar_rows import similar_rows

SIMILARITY = 0.85
MAX_DUPLICATES = 5
N_GRAM = 4


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
    sets, distinct = _numbered(*([examples] if others is None else [examples, others]))
    first, second = sets[0], sets[-1]
    exact = _exact_pairs(first, second, len(distinct), max_duplicates)
    near = _near_pairs(first, second, distinct, similarity, max_duplicates, progress)
    rows, other_rows, cosines = (np.concatenate(parts) for parts in zip(exact, near, strict=True))
    is_exact = np.arange(len(rows)) < len(exact.rows)
    if first is second:
        # Each text of a pair may have found the other.
        rows, other_rows = np.minimum(rows, other_rows), np.maximum(rows, other_rows)
        once = ~pd.MultiIndex.from_arrays([rows, other_rows]).duplicated()
        rows, other_rows, cosines, is_exact = (values[once] for values in (rows, other_rows, cosines, is_exact))
    labels, other_labels = first.labels[rows], second.labels[other_rows]
    table = pd.DataFrame(
        {
            "example_id": first.ids[rows],
            "label": labels,
            "duplicate_id": second.ids[other_rows],
            "duplicate_label": other_labels,
            "similarity": cosines,
            "exact": is_exact,
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
    keys = [" ".join(text.split()).casefold() for text in examples["text"].tolist()]
    if examples["text_b"].notna().any():
        second = (" ".join(text.split()).casefold() if isinstance(text, str) else None for text in examples["text_b"])
        keys = [key if text is None else f"{key}\n{text}" for key, text in zip(keys, second, strict=True)]
    return pd.factorize(np.array(keys, dtype=object))[0].astype(np.int64)


def n_different(groups: np.ndarray) -> int:
    """Return how many numbers of `text_groups` occur: the number of different texts.

    >>> n_different(np.array([0, 3, 0]))
    2
    """
    return int(np.count_nonzero(np.bincount(groups)))  # of a million numbers, np.unique takes a second


def repeats_sentences(groups: np.ndarray) -> list[str]:
    """Return one sentence about texts that repeat, or none where all texts are distinct.

    >>> repeats_sentences(np.array([0, 1, 0, 2]))
    ['1 of 4 texts repeats an earlier one; the intervals count each of the 3 different texts as one observation.']
    """
    n, n_texts = len(groups), n_different(groups)
    if n == n_texts:
        return []
    repeats = f"{n - n_texts:,} of {n:,} texts {'repeats' if n - n_texts == 1 else 'repeat'} an earlier one"
    return [f"{repeats}; the intervals count each of the {n_texts:,} different texts as one observation."]


def normalized(text: str) -> str:
    """Return a text without the differences that exact duplicates may have.

    >>> normalized("  What's  my BALANCE?")
    'whats my balance'
    >>> normalized("?!")
    '?!'
    """
    if text.isascii():
        folded = text.lower()
        return " ".join(folded.translate(_ASCII).split()) or " ".join(folded.split())
    folded = unicodedata.normalize("NFKC", text).casefold()
    return " ".join("".join(map(_without_punctuation, folded)).split()) or " ".join(folded.split())


def _without_punctuation(char: str) -> str:
    if char in "'’`":
        return ""
    return " " if unicodedata.category(char)[0] == "P" else char


_ASCII = {code: _without_punctuation(chr(code)) for code in range(128)}  # for most texts, and much faster


class _Texts(NamedTuple):
    """The ids, labels and texts of a set; equal texts, here or in another set, have the same number in `codes`."""

    ids: np.ndarray
    labels: np.ndarray
    codes: np.ndarray


def _numbered(*sets: pd.DataFrame) -> tuple[list[_Texts], np.ndarray]:
    """Return the texts of one or two sets, numbered together, and the normalized text of each number."""
    texts = [
        f"{normalized(text)}\n{normalized(text_b)}" if isinstance(text_b, str) else normalized(text)
        for examples in sets
        for text, text_b in zip(examples["text"].tolist(), examples["text_b"].tolist(), strict=True)
    ]
    codes, distinct = pd.factorize(np.array(texts, dtype=object))
    ends = np.cumsum([len(examples) for examples in sets])[:-1]
    numbered = [
        _Texts(examples["example_id"].to_numpy(dtype=object), examples["label"].to_numpy(dtype=object), own)
        for examples, own in zip(sets, np.split(codes, ends), strict=True)
    ]
    return numbered, distinct


class _Pairs(NamedTuple):
    """Pairs of duplicates: their rows in each set, and how similar they are."""

    rows: np.ndarray
    other_rows: np.ndarray
    similarity: np.ndarray


def _labels_conflict(labels: np.ndarray, other_labels: np.ndarray) -> np.ndarray:
    """Return whether both labels are known and differ."""
    return (labels != other_labels) & pd.notna(labels) & pd.notna(other_labels)


class _Copies(NamedTuple):
    """The rows of the texts of a set by the number of their text: those of number `c` are `rows[starts[c]:ends[c]]`.

    Of each number and label there are no more rows than one text can have duplicates.
    """

    rows: np.ndarray
    starts: np.ndarray
    ends: np.ndarray

    @classmethod
    def of(cls, texts: _Texts, n_texts: int, most: int | None = None) -> _Copies:
        rows = np.arange(len(texts.codes))
        if most is not None:
            kinds = texts.codes.astype(np.int64) * (len(texts.labels) + 1) + pd.factorize(texts.labels)[0]
            rows = rows[pd.Series(kinds).groupby(kinds).cumcount().to_numpy() < most]
        rows = rows[np.argsort(texts.codes[rows], kind="stable")]
        starts, ends = (np.searchsorted(texts.codes[rows], np.arange(n_texts), side) for side in ("left", "right"))
        return cls(rows, starts, ends)

    def expand(self, codes: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return the rows of all copies of some numbers, and for each of them its place in `codes`."""
        n_copies = self.ends[codes] - self.starts[codes]
        place = np.repeat(np.arange(len(codes)), n_copies)
        offset = np.arange(len(place)) - np.repeat(n_copies.cumsum() - n_copies, n_copies)
        return self.rows[self.starts[codes][place] + offset], place


def _most_important(first: _Texts, second: _Texts, pairs: _Pairs, max_duplicates: int) -> _Pairs:
    """Return for each row at most some of its pairs: those with another label first, then the most similar."""
    agrees = ~_labels_conflict(first.labels[pairs.rows], second.labels[pairs.other_rows])
    order = np.lexsort((-pairs.similarity, agrees, pairs.rows))
    rows = pairs.rows[order]
    rank = np.arange(len(order)) - np.searchsorted(rows, rows)
    return _Pairs(*(values[order[rank < max_duplicates]] for values in pairs))


def _exact_pairs(first: _Texts, second: _Texts, n_texts: int, max_duplicates: int) -> _Pairs:
    # A text of the same set may find itself, which is no duplicate.
    copies = _Copies.of(second, n_texts, max_duplicates + (first is second))
    has_copy = copies.ends - copies.starts > (first is second)
    rows = np.flatnonzero(has_copy[first.codes])
    other_rows, place = copies.expand(first.codes[rows])
    is_other = np.ones(len(place), dtype=bool) if first is not second else other_rows != rows[place]
    pairs = _Pairs(rows[place][is_other], other_rows[is_other], np.ones(int(is_other.sum())))
    return _most_important(first, second, pairs, max_duplicates)


def _near_pairs(
    first: _Texts, second: _Texts, distinct: np.ndarray, similarity: float, max_duplicates: int, progress: bool
) -> _Pairs:
    nothing = _Pairs(np.empty(0, dtype=int), np.empty(0, dtype=int), np.empty(0))
    if not any(len(text) + 2 >= N_GRAM for text in distinct):
        return nothing
    from sklearn.feature_extraction.text import TfidfVectorizer  # slow to import, and `text_groups` does not need it

    # With a space at both ends, the ends of a text count, and very short texts have an n-gram.
    vectorizer = TfidfVectorizer(
        analyzer="char", ngram_range=(N_GRAM, N_GRAM), lowercase=False, sublinear_tf=True, dtype=np.float32
    )
    vectors = vectorizer.fit_transform(f" {text} " for text in distinct)
    own, others = (np.flatnonzero(np.bincount(texts.codes)) for texts in (first, second))
    of_own = vectors[own]
    of_others = of_own if first is second else vectors[others]
    copies = _Copies.of(first, len(distinct)), _Copies.of(second, len(distinct), max_duplicates)
    parts = [nothing]
    bar = tqdm(total=len(own), desc="near duplicates", unit="text", delay=2, disable=not progress, leave=False)
    with bar:
        for n_texts, (rows, other_rows, cosines) in similar_rows(of_own, of_others, similarity):
            codes, other_codes = own[rows], others[other_rows]
            is_near = codes != other_codes  # equal texts are exact duplicates, or the example itself
            found, place = copies[0].expand(codes[is_near])
            others_found, again = copies[1].expand(other_codes[is_near][place])
            pairs = _Pairs(found[again], others_found, np.minimum(cosines[is_near][place][again], 1).astype(float))
            parts.append(_most_important(first, second, pairs, max_duplicates))
            bar.update(n_texts)
    return _Pairs(*map(np.concatenate, zip(*parts, strict=True)))

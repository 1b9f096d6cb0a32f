"""Describe each text of a run in columns: its length, its rare wordpieces, and the words in it."""

from __future__ import annotations

import unicodedata
import warnings
from collections import Counter, defaultdict
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
from pandas.api.types import is_bool_dtype, is_numeric_dtype
from tokenizers.implementations.bert_wordpiece import BertWordPieceTokenizer

from cascade_lab.analysis.text_tokens import split_tokens, split_words
from cascade_lab.provenance import sha256

if TYPE_CHECKING:
    from cascade_lab.run import Run

RARE = 2
"""A wordpiece is rare if at most this number of texts of the run contain it."""
MIN_SIZE = 20
MAX_WORDS = 300
TEXT_COLUMNS = ("example_id", "text", "text_b")


def features(run: Run) -> pd.DataFrame:
    """Return the examples of a run, with columns that describe each text.

    Returns
    -------
    DataFrame
        The columns of `run.examples`; a column whose values are all numbers becomes numeric. Added columns, counted
        over `text` and `text_b`:

        - `n_tokens`: words, punctuation marks, and the letters of scripts that write no blanks between words; see
          `split_tokens`;
        - `n_wordpieces`, `n_unknown` (`[UNK]`) and `n_rare` (wordpieces that at most `RARE` texts of the run contain),
          with the last stage's vocabulary;
        - a bool `has_<word>` for each of the `MAX_WORDS` most common words that at least `MIN_SIZE` texts contain; see
          `split_words`, also for scripts without blanks.

        If the input has a column with one of these names, the input's column stays. If the vocabulary is missing or has
        changed, a warning says so, and the wordpiece columns are left out.
    """
    examples = run.examples.copy()
    for column in examples.columns.difference([*TEXT_COLUMNS, "label"]):
        examples[column] = _as_numbers(examples[column])
    texts = [
        f"{text} {text_b}" if isinstance(text_b, str) and text_b else text
        for text, text_b in zip(examples["text"].tolist(), examples["text_b"].tolist(), strict=True)
    ]
    columns: dict[str, Any] = {"n_tokens": [len(split_tokens(text)) for text in texts]}
    wordpieces = _wordpieces(run, texts)
    if wordpieces is not None:
        n_texts_with = Counter(piece for pieces in wordpieces for piece in set(pieces))
        columns["n_wordpieces"] = [len(pieces) for pieces in wordpieces]
        columns["n_unknown"] = [pieces.count("[UNK]") for pieces in wordpieces]
        columns["n_rare"] = [
            sum(n_texts_with[piece] <= RARE and piece != "[UNK]" for piece in pieces) for pieces in wordpieces
        ]
    words = [set(split_words(text)) for text in texts]
    rows_with = defaultdict(list)
    for row, words_of_text in enumerate(words):
        for word in words_of_text:
            rows_with[word].append(row)
    in_order = sorted(rows_with.items(), key=lambda item: (-len(item[1]), item[0]))
    for word, rows in [(word, rows) for word, rows in in_order if len(rows) >= MIN_SIZE][:MAX_WORDS]:
        # Python normalizes names to NFKC, so a query could not name a column with a word in another form.
        if f"has_{word}".isidentifier() and unicodedata.normalize("NFKC", word) == word:
            columns[f"has_{word}"] = has_word = np.zeros(len(texts), dtype=bool)
            has_word[rows] = True
    new_columns = {name: values for name, values in columns.items() if name not in examples}
    return pd.concat([examples, pd.DataFrame(new_columns, index=examples.index)], axis=1)


def column_kind(values: pd.Series) -> str | None:
    """Return the kind of a column: "bool", "number" or "text"; None for anything else."""
    if is_bool_dtype(values.dtype):
        return "bool"
    if is_numeric_dtype(values.dtype):
        return "number"
    return "text" if all(isinstance(value, str) for value in values.dropna()) else None


def _as_numbers(values: pd.Series) -> pd.Series:
    """Return a text column whose values are all numbers as numbers (a tsv has only texts); others are unchanged."""
    if column_kind(values) != "text":
        return values
    filled = values.where(values != "")
    numbers = pd.to_numeric(filled, errors="coerce")
    return numbers if filled.notna().any() and numbers.notna().equals(filled.notna()) else values


def _wordpieces(run: Run, texts: list[str]) -> list[list[str]] | None:
    """Return the wordpieces of each text by the last stage's vocabulary; warn and return None if it is not usable."""
    stage = run.spec.last
    problem, digest, tokenizer = "", "", None
    if stage.vocab_file is None:
        problem = f"stage '{stage.name}' has no vocab_file, because it was scored elsewhere"
    else:
        try:
            digest = sha256(stage.vocab_file)
            tokenizer = BertWordPieceTokenizer(
                str(stage.vocab_file), lowercase=stage.do_lower_case, strip_accents=stage.do_lower_case
            )
        except Exception as error:  # the tokenizer raises a bare Exception
            problem = f"{stage.vocab_file} cannot be read ({getattr(error, 'strerror', None) or error})"
    # A run from logits does not know the digest of its vocabulary.
    if tokenizer and run.manifest.get("source") != "logits" and digest not in run.manifest["inputs"].values():
        problem = f"{stage.vocab_file} has changed since the run"
    if tokenizer is None or problem:
        warnings.warn(f"{run.name}: {problem}; slices by wordpieces are left out", stacklevel=3)
        return None
    return [encoding.tokens for encoding in tokenizer.encode_batch(texts, add_special_tokens=False)]

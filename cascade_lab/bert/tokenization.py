"""Texts to token ids, equal to bert-tensorflow's `FullTokenizer`, with the Rust tokenizer doing most of the work.

The two differ on some characters: private use, unassigned, capital sigma at a word's end, whatever one side's
Unicode tables know and the other's do not. A text goes to the fast side only if it has no character on which
they were seen to differ; each character is tried once, when it first appears.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from tokenizers import Tokenizer as RustTokenizer
from tokenizers import models, normalizers, pre_tokenizers

from cascade_lab.bert import reference
from cascade_lab.provenance import sha256

MAX_CHARS_PER_WORD = 200  # FullTokenizer's; a longer word is [UNK]


class Encoding(NamedTuple):
    """One text, or pair of texts, as BERT takes it: `[CLS] a [SEP]` or `[CLS] a [SEP] b [SEP]`.

    Attributes
    ----------
    input_ids : list of int
        At most `max_seq_length` of them.
    n_first : int
        How many of them are of segment 0; the rest are of segment 1.
    """

    input_ids: list[int]
    n_first: int


class Tokenizer:
    """Turns texts into token ids exactly as bert-tensorflow does.

    Parameters
    ----------
    vocab_file : path
        One token a line, checked by `read_vocab`.
    do_lower_case : bool
        Lower the case and strip accents, as uncased models want.
    max_seq_length : int
        The most tokens of a text, `[CLS]` and `[SEP]` included.

    Attributes
    ----------
    settings : tuple
        All that its encodings depend on: tokenizers of equal settings encode alike.
    """

    def __init__(self, vocab_file: str | Path, *, do_lower_case: bool, max_seq_length: int):
        self._full = reference.load("tokenization").FullTokenizer(str(vocab_file), do_lower_case)
        self._vocab = dict(self._full.vocab)
        self.settings = (sha256(vocab_file), do_lower_case, max_seq_length)
        self._max_seq_length = max_seq_length
        self._fast = RustTokenizer(
            models.WordPiece(self._vocab, unk_token="[UNK]", max_input_chars_per_word=MAX_CHARS_PER_WORD)
        )
        self._fast.normalizer = normalizers.BertNormalizer(
            clean_text=True,
            handle_chinese_chars=True,
            strip_accents=do_lower_case,
            lowercase=do_lower_case,
        )
        self._fast.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
        self._agreed: set[str] = set()
        self._differing: set[str] = set()

    def encode(self, texts: Sequence[str], texts_b: Sequence[str | None] | None = None) -> list[Encoding]:
        """Return the encoding of each text, paired with its `texts_b` where that is not None."""
        first = self.ids(texts)
        if texts_b is None:
            return [self._single(ids) for ids in first]
        paired = [i for i, text in enumerate(texts_b) if text is not None]
        second = dict(zip(paired, self.ids([texts_b[i] for i in paired]), strict=True))
        return [self._pair(ids, second[i]) if i in second else self._single(ids) for i, ids in enumerate(first)]

    def ids(self, texts: Sequence[str]) -> list[list[int]]:
        """Return the ids of each text's wordpieces, without `[CLS]` and `[SEP]`, however many."""
        fast = [self._agrees_on(text) for text in texts]
        encoded = iter(
            self._fast.encode_batch_fast(
                [text for text, ok in zip(texts, fast, strict=True) if ok], add_special_tokens=False
            )
        )
        return [
            next(encoded).ids if ok else self._full.convert_tokens_to_ids(self._full.tokenize(text))
            for text, ok in zip(texts, fast, strict=True)
        ]

    def _single(self, ids: list[int]) -> Encoding:
        kept = ids[: self._max_seq_length - 2]
        return Encoding([self._vocab["[CLS]"], *kept, self._vocab["[SEP]"]], len(kept) + 2)

    def _pair(self, first: list[int], second: list[int]) -> Encoding:
        n_first, n_second = truncated_lengths(len(first), len(second), self._max_seq_length - 3)
        cls, sep = self._vocab["[CLS]"], self._vocab["[SEP]"]
        return Encoding([cls, *first[:n_first], sep, *second[:n_second], sep], n_first + 2)

    def _agrees_on(self, text: str) -> bool:
        characters = set(text)
        for char in characters - self._agreed - self._differing:
            (self._agreed if self._agrees_on_character(char) else self._differing).add(char)
        return self._differing.isdisjoint(characters)

    def _agrees_on_character(self, char: str) -> bool:
        """Whether both sides cut `char` alike: alone, inside a word, at its end, and among punctuation."""
        category = unicodedata.category(char)
        # A surrogate is no text to Rust. A mark that is kept can change places with its neighbours (canonical
        # ordering), which no trial of one character shows.
        if category == "Cs" or (unicodedata.combining(char) and category != "Mn"):
            return False
        trial = f"{char} a{char}b A{char} {char}{char} -{char}."
        words = [
            word for word, _ in self._fast.pre_tokenizer.pre_tokenize_str(self._fast.normalizer.normalize_str(trial))
        ]
        return words == self._full.basic_tokenizer.tokenize(trial)


def truncated_lengths(n_first: int, n_second: int, most: int) -> tuple[int, int]:
    """Return how much of a pair BERT keeps: it takes tokens off the longer one, of equals off the second.

    >>> truncated_lengths(10, 3, 8)
    (5, 3)
    >>> truncated_lengths(10, 10, 9)
    (5, 4)
    """
    n_first, n_second = min(n_first, max(most - n_second, (most + 1) // 2)), n_second
    return n_first, min(n_second, most - n_first)

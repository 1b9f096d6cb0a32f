"""Turns texts into token ids, equal to those of bert-tensorflow's `FullTokenizer`, mostly with a Rust tokenizer.

The two tokenizers treat some characters differently: private use, unassigned, capital sigma at the end of a word, and
whatever only one side's Unicode tables contain. Each character is tried on both when it first appears. A text is
tokenized in Rust only if the two agree on all of its characters.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from tokenizers import Tokenizer as RustTokenizer
from tokenizers import models, normalizers, pre_tokenizers

from cascade_lab.bert import reference
from cascade_lab.bert.checkpoint import read_vocab
from cascade_lab.provenance import sha256

MAX_CHARS_PER_WORD = 200  # as in FullTokenizer; a longer word becomes [UNK]


class Encoding(NamedTuple):
    """The token ids of one text or pair of texts: `[CLS] a [SEP]` or `[CLS] a [SEP] b [SEP]`.

    Attributes
    ----------
    input_ids : list of int
        At most `max_seq_length` ids.
    n_first : int
        The number of ids in segment 0. The rest are in segment 1.
    """

    input_ids: list[int]
    n_first: int


class Tokenizer:
    """Turns texts into token ids exactly as bert-tensorflow does.

    Parameters
    ----------
    vocab_file : path
        One token per line, checked by `read_vocab`.
    do_lower_case : bool
        Convert to lower case and remove accents, as uncased models need it.
    max_seq_length : int
        The most tokens of a text, `[CLS]` and `[SEP]` included.

    Attributes
    ----------
    settings : tuple
        Everything that the encodings depend on. Two tokenizers with equal settings return equal encodings.
    """

    def __init__(self, vocab_file: str | Path, *, do_lower_case: bool, max_seq_length: int):
        self._reference = full_tokenizer(vocab_file, do_lower_case=do_lower_case)
        self._vocab: dict[str, int] = self._reference.vocab
        self.settings = (sha256(vocab_file), do_lower_case, max_seq_length)
        self._max_seq_length = max_seq_length
        self._rust = RustTokenizer(
            models.WordPiece(self._vocab, unk_token="[UNK]", max_input_chars_per_word=MAX_CHARS_PER_WORD)
        )
        self._rust.normalizer = normalizers.BertNormalizer(
            clean_text=True,
            handle_chinese_chars=True,
            strip_accents=do_lower_case,
            lowercase=do_lower_case,
        )
        self._rust.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
        self._agreeing: set[str] = set()
        self._differing: set[str] = set()

    def encode(self, texts: Sequence[str], texts_b: Sequence[str | None] | None = None) -> list[Encoding]:
        """Return the encoding of each text, or of each pair where `texts_b` has a second text (not None)."""
        first = self.ids(texts)
        if texts_b is None:
            return [self._single(ids) for ids in first]
        second_texts = {row: text for row, text in enumerate(texts_b) if text is not None}
        second = dict(zip(second_texts, self.ids(list(second_texts.values())), strict=True))
        return [self._pair(ids, second[row]) if row in second else self._single(ids) for row, ids in enumerate(first)]

    def ids(self, texts: Sequence[str]) -> list[list[int]]:
        """Return the ids of all wordpieces of each text, without `[CLS]` and `[SEP]`, and without truncation."""
        in_rust = [self._agrees_on(text) for text in texts]
        encoded = iter(
            self._rust.encode_batch_fast(
                [text for text, agrees in zip(texts, in_rust, strict=True) if agrees], add_special_tokens=False
            )
        )
        return [
            next(encoded).ids if agrees else self._reference.convert_tokens_to_ids(self._reference.tokenize(text))
            for text, agrees in zip(texts, in_rust, strict=True)
        ]

    def text(self, encoding: Encoding) -> str:
        """Return the wordpieces of a text joined to words, for messages: without its capitals and what was cut off."""
        pieces = self._reference.convert_ids_to_tokens(encoding.input_ids[1:-1])
        return " ".join(pieces).replace(" ##", "").replace(" [SEP] ", " / ")

    def _single(self, ids: list[int]) -> Encoding:
        ids = ids[: self._max_seq_length - 2]
        return Encoding([self._vocab["[CLS]"], *ids, self._vocab["[SEP]"]], len(ids) + 2)

    def _pair(self, first: list[int], second: list[int]) -> Encoding:
        n_first, n_second = truncated_lengths(len(first), len(second), self._max_seq_length - 3)
        cls, sep = self._vocab["[CLS]"], self._vocab["[SEP]"]
        return Encoding([cls, *first[:n_first], sep, *second[:n_second], sep], n_first + 2)

    def _agrees_on(self, text: str) -> bool:
        """Return whether the two tokenizers agree on every character of `text`."""
        characters = set(text)
        for char in characters - self._agreeing - self._differing:
            (self._agreeing if self._agrees_on_character(char) else self._differing).add(char)
        return self._differing.isdisjoint(characters)

    def _agrees_on_character(self, char: str) -> bool:
        """Return whether both tokenizers split a trial text alike.

        In the trial text `char` is a word, inside a word, at its end, and among punctuation.
        """
        category = unicodedata.category(char)
        # Rust cannot hold a surrogate. A combining mark that the tokenizer keeps can change places with its neighbours
        # (canonical ordering), which a trial of one character does not show.
        if category == "Cs" or (unicodedata.combining(char) and category != "Mn"):
            return False
        trial = f"{char} a{char}b A{char} {char}{char} -{char}."
        normalized = self._rust.normalizer.normalize_str(trial)
        rust_words = [word for word, _ in self._rust.pre_tokenizer.pre_tokenize_str(normalized)]
        return bool(rust_words == self._reference.basic_tokenizer.tokenize(trial))


def full_tokenizer(vocab_file: str | Path, *, do_lower_case: bool) -> Any:
    """Return bert-tensorflow's `FullTokenizer` with the vocabulary that `read_vocab` reads.

    Its own reader takes a byte-order mark for a part of the first token, and blank last lines for a token.
    """
    tokenizer = reference.load("tokenization").FullTokenizer(str(vocab_file), do_lower_case)
    vocab = read_vocab(Path(vocab_file))
    tokenizer.vocab = tokenizer.basic_tokenizer.vocab = tokenizer.wordpiece_tokenizer.vocab = vocab
    tokenizer.inv_vocab = {number: token for token, number in vocab.items()}
    return tokenizer


def truncated_lengths(n_first: int, n_second: int, max_length: int) -> tuple[int, int]:
    """Return how many tokens BERT keeps of each text of a pair.

    BERT removes tokens one by one from the longer text, or from the second if both are equally long.

    >>> truncated_lengths(10, 3, 8)
    (5, 3)
    >>> truncated_lengths(10, 10, 9)
    (5, 4)
    """
    n_first = min(n_first, max(max_length - n_second, (max_length + 1) // 2))
    return n_first, min(n_second, max_length - n_first)

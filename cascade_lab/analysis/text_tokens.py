"""Split texts of any script into tokens and words, without a vocabulary."""

from __future__ import annotations

import re
from itertools import pairwise

from tokenizers import Regex, normalizers, pre_tokenizers

# A letter, with the marks above and below it, of a script that writes no blanks between words.
_LETTER = r"[\p{Han}\p{Hiragana}\p{Katakana}ー\p{Thai}\p{Lao}\p{Khmer}\p{Myanmar}]\p{M}*"
_NORMALIZER = normalizers.BertNormalizer(
    clean_text=True, handle_chinese_chars=False, strip_accents=False, lowercase=False
)
_PIECES = pre_tokenizers.Sequence(
    [pre_tokenizers.BertPreTokenizer(), pre_tokenizers.Split(Regex(f"(?:{_LETTER})+"), "isolated")]
)
_LETTERS = pre_tokenizers.Split(Regex(_LETTER), "isolated")
_ASCII_PIECES = re.compile(r"[A-Za-z0-9]+|[^A-Za-z0-9 ]")  # the same pieces of printable ASCII, and much faster


def split_tokens(text: str) -> list[str]:
    """Split a text as BERT's basic tokenizer does: at blanks, with each punctuation mark and Chinese character alone.

    In Japanese, Thai, Lao, Khmer and Burmese, which write no blanks between words either, each letter is a token too. A
    text then has about as many tokens as wordpieces, whatever its script.

    >>> split_tokens("I'd pay"), split_tokens("我要续借GPS"), split_tokens("ไทย")
    (['I', "'", 'd', 'pay'], ['我', '要', '续', '借', 'GPS'], ['ไ', 'ท', 'ย'])
    """
    if text.isascii() and text.isprintable():
        return _ASCII_PIECES.findall(text)
    return [token for piece in _pieces(text) for token in _letters(piece)]


def split_words(text: str) -> list[str]:
    """Return the words of a text in lower case, without punctuation.

    Where a script writes no blanks, two letters side by side count as a word: most Chinese words have two.

    >>> split_words("I'd pay"), split_words("我要续借！")
    (['i', 'd', 'pay'], ['我要', '要续', '续借'])
    """
    words: list[str] = []
    if text.isascii() and text.isprintable():
        return [piece for piece in _ASCII_PIECES.findall(text.lower()) if piece.isalnum()]
    for piece in _pieces(text.lower()):
        letters = _letters(piece)
        words += [first + second for first, second in pairwise(letters)] or [piece]
    return [word for word in words if any(character.isalnum() for character in word)]


def _pieces(text: str) -> list[str]:
    whole = text.encode("utf-8", "replace").decode("utf-8")  # Rust cannot hold half a surrogate pair
    return [piece for piece, _ in _PIECES.pre_tokenize_str(_NORMALIZER.normalize_str(whole))]


def _letters(piece: str) -> list[str]:
    return [letter for letter, _ in _LETTERS.pre_tokenize_str(piece)]

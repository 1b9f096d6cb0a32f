"""Trains a new WordPiece vocabulary, in the format of BERT's `vocab.txt`."""

from __future__ import annotations

from collections.abc import Sequence

from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, trainers

SPECIAL_TOKENS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]


def train_vocabulary(texts: Sequence[str], *, size: int, do_lower_case: bool = True) -> list[str]:
    """Train a WordPiece vocabulary on `texts` and return its tokens: at most `size`, special tokens first.

    Examples
    --------
    >>> train_vocabulary(["to be or not to be"] * 3, size=20)[:8]
    ['[PAD]', '[UNK]', '[CLS]', '[SEP]', '[MASK]', 'b', 'e', 'n']
    """
    alphabet = _train(texts, 0, SPECIAL_TOKENS, do_lower_case)[len(SPECIAL_TOKENS) :]
    # The trainer itself numbers the `##x` in a random order, by which it then chooses among equally frequent pairs.
    alphabet.sort(key=lambda token: (len(token), token))
    return _train(texts, size, SPECIAL_TOKENS + alphabet, do_lower_case)


def _train(texts: Sequence[str], size: int, first_tokens: list[str], do_lower_case: bool) -> list[str]:
    tokenizer = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=do_lower_case, strip_accents=do_lower_case)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    trainer = trainers.WordPieceTrainer(vocab_size=size, special_tokens=first_tokens, show_progress=False)
    tokenizer.train_from_iterator(texts, trainer)
    vocab = tokenizer.get_vocab()
    return sorted(vocab, key=vocab.__getitem__)

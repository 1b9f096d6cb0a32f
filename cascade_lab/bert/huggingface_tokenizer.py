"""Reads the tokenizer of a Hugging Face directory and checks that bert-tensorflow's tokenizer splits texts alike."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from cascade_lab.bert.checkpoint import REQUIRED_TOKENS, check_vocab_size, read_json, read_vocab
from cascade_lab.exceptions import CheckpointError

TOKENIZER_FILES = (
    "vocab.txt",
    "tokenizer.json",
    "tokenizer_config.json",
    "added_tokens.json",
    "special_tokens_map.json",
)
"""The files of a Hugging Face directory that say how texts are tokenized."""

_SPECIAL_TOKENS = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
_TOKENIZERS = ("BertTokenizer", "BertTokenizerFast", "PreTrainedTokenizerFast", "TokenizersBackend")


def read_tokenizer(source: Path, vocab_size: int) -> tuple[list[str], bool | None]:
    """Return the tokens in the order of their ids, and whether texts are lower-cased (None: no file records it)."""
    vocab_txt, tokenizer_json, settings, added, special = (source / name for name in TOKENIZER_FILES)
    vocabs: dict[Path, list[str]] = {}
    lowers: dict[Path, bool | None] = {}
    if added.is_file():
        _check_added_tokens(added, read_json(added))
    if special.is_file():
        _check_added_tokens(special, _contents(read_json(special).get("additional_special_tokens")))
    if vocab_txt.is_file():
        vocabs[vocab_txt] = list(read_vocab(vocab_txt))
    if tokenizer_json.is_file():
        vocabs[tokenizer_json], lowers[tokenizer_json] = _read_tokenizer_json(tokenizer_json)
    if settings.is_file():
        content = read_json(settings)
        kind = content.get("tokenizer_class")
        if kind not in (*_TOKENIZERS, None):
            raise CheckpointError(
                f"{settings}: tokenizer_class is {kind!r}; it must be one of {', '.join(_TOKENIZERS)}"
            )
        lower = content.get("do_lower_case")
        _check_added_tokens(settings, _contents(content.get("added_tokens_decoder")))
        _check_added_tokens(settings, _contents(content.get("additional_special_tokens")))
        if content.get("do_basic_tokenize", True) is not True:
            raise CheckpointError(
                f"{settings}: do_basic_tokenize is {content['do_basic_tokenize']!r}, but bert-tensorflow always splits "
                "texts at spaces and punctuation first; take a model with do_basic_tokenize true"
            )
        if content.get("never_split"):
            raise CheckpointError(
                f"{settings}: never_split is {content['never_split']!r}, but bert-tensorflow's tokenizer splits every "
                "word; take a model without never_split"
            )
        _check_splitting(settings, lower, content.get("strip_accents"), content.get("tokenize_chinese_chars", True))
        if lower is not None:
            lowers[settings] = lower
    if not vocabs:
        raise CheckpointError(f"{source}: has no vocabulary; add its vocab.txt or tokenizer.json")
    if len(set(lowers.values())) > 1:
        raise CheckpointError(
            f"{source}: {tokenizer_json.name} and {settings.name} disagree on lower-casing; fix one of them"
        )
    if len({tuple(token.strip() for token in tokens) for tokens in vocabs.values()}) == 2:
        raise CheckpointError(
            f"{source}: {vocab_txt.name} and {tokenizer_json.name} have different tokens; delete the wrong file"
        )
    path, tokens = next(iter(vocabs.items()))
    check_vocab_size(f"{path}:", len(tokens), "config.json", vocab_size)
    return tokens, next(iter(lowers.values()), None)


def _read_tokenizer_json(path: Path) -> tuple[list[str], bool | None]:
    """Return the tokens of a `tokenizer.json` in the order of their ids, and whether it lower-cases texts."""
    content = read_json(path)
    _check_added_tokens(path, _contents(content.get("added_tokens")))
    model, normalizer, splitter = (content.get(key) or {} for key in ("model", "normalizer", "pre_tokenizer"))
    # Old versions of tokenizers wrote no type; a prefix of later subwords is WordPiece's alone.
    kind = model.get("type", "WordPiece" if "continuing_subword_prefix" in model else None)
    settings = (
        ("model", kind, "WordPiece"),
        ("model's continuing_subword_prefix", model.get("continuing_subword_prefix"), "##"),
        ("model's unk_token", model.get("unk_token"), "[UNK]"),
        ("normalizer", normalizer.get("type"), "BertNormalizer"),
        ("normalizer's clean_text", normalizer.get("clean_text"), True),
        ("pre_tokenizer", splitter.get("type"), "BertPreTokenizer"),
    )
    for what, value, bert_value in settings:
        if value != bert_value:
            raise CheckpointError(
                f"{path}: its {what} is {value!r}, but BERT's is {bert_value!r}; give a tokenizer of BERT"
            )
    lower = normalizer.get("lowercase")
    _check_splitting(path, lower, normalizer.get("strip_accents"), normalizer.get("handle_chinese_chars"))
    vocab = model.get("vocab")
    if not isinstance(vocab, dict) or not all(type(number) is int for number in vocab.values()):
        raise CheckpointError(f"{path}: its model's vocab must give each token a whole number; copy it again")
    by_id: dict[int, str] = {}
    stripped: dict[str, str] = {}
    for token, number in vocab.items():
        if number in by_id:
            raise CheckpointError(
                f"{path}: tokens {by_id[number]!r} and {token!r} both have id {number}; fix this file"
            )
        # bert-tensorflow removes the blanks around a token; the Chinese vocabulary has U+2028 as a token.
        short = token.strip()
        if "\n" in token or short in stripped:
            same = f" beside {stripped[short]!r}" if short in stripped else ""
            raise CheckpointError(
                f"{path}: token {token!r} cannot be written to vocab.txt{same}, which has one token per line, without "
                "blanks around it; rename it"
            )
        by_id[number], stripped[short] = token, token
    missing = next((number for number in range(len(by_id)) if number not in by_id), None)
    if missing is not None:
        raise CheckpointError(f"{path}: no token has id {missing}, or a token occurs twice; fix the vocabulary")
    for token in REQUIRED_TOKENS:
        if token not in vocab:
            raise CheckpointError(f"{path}: has no token {token}; give a BERT vocabulary")
    return [by_id[number] for number in range(len(by_id))], lower


def _check_splitting(path: Path, lower: Any, strip_accents: Any, chinese: Any) -> None:
    """Raise CheckpointError if bert-tensorflow's tokenizer cannot split texts in this way."""
    if strip_accents is not None and strip_accents != lower:
        raise CheckpointError(
            f"{path}: accents are {'removed' if strip_accents else 'kept'} while lower-casing is {lower!r}, which "
            "bert-tensorflow's tokenizer cannot do; take a model whose strip_accents is null"
        )
    if chinese is not True:
        raise CheckpointError(
            f"{path}: Chinese characters are not split, but bert-tensorflow's tokenizer always splits them; take "
            "another model"
        )


def _contents(tokens: Any) -> list[str]:
    """Return the texts of added tokens, which are listed as texts, as objects with a `content`, or by id."""
    if isinstance(tokens, dict):
        tokens = list(tokens.values())
    if not isinstance(tokens, list):
        return []
    return [str(token.get("content") if isinstance(token, dict) else token) for token in tokens]


def _check_added_tokens(path: Path, tokens: Iterable[str]) -> None:
    """Raise CheckpointError if there are added tokens, which transformers keeps whole wherever they stand in a text."""
    added = [token for token in tokens if token not in _SPECIAL_TOKENS]
    if added:
        shown = ", ".join(repr(token) for token in added[:3]) + (", …" if len(added) > 3 else "")
        raise CheckpointError(
            f"{path}: has {len(added)} added tokens ({shown}), which bert-tensorflow's tokenizer would split; take a "
            "model without added tokens, or train this one again with them as words of its vocabulary"
        )

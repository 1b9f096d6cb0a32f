"""Reads the tokenizer of a Hugging Face directory and checks that bert-tensorflow's tokenizer splits texts alike."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from cascade_lab.bert.checkpoint import REQUIRED_TOKENS, read_vocab
from cascade_lab.exceptions import CheckpointError

_TOKENIZERS = ("BertTokenizer", "BertTokenizerFast", "PreTrainedTokenizerFast", "TokenizersBackend")


def read_tokenizer(source: Path, vocab_size: int) -> tuple[list[str], bool | None]:
    """Return the tokens in the order of their ids, and whether texts are lower-cased (None: no file records it)."""
    names = ("vocab.txt", "tokenizer.json", "tokenizer_config.json")
    vocab_txt, tokenizer_json, settings = (source / name for name in names)
    vocabs: dict[Path, list[str]] = {}
    lowers: dict[Path, bool | None] = {}
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
        _check_splitting(settings, lower, content.get("strip_accents"), content.get("tokenize_chinese_chars", True))
        if lower is not None:
            lowers[settings] = lower
    if not vocabs:
        raise CheckpointError(f"{source}: has no vocabulary; add its vocab.txt or tokenizer.json")
    if len(set(lowers.values())) > 1:
        raise CheckpointError(
            f"{source}: {tokenizer_json.name} and {settings.name} disagree on lower-casing; fix one of them"
        )
    if len(vocabs) == 2 and vocabs[vocab_txt] != vocabs[tokenizer_json]:
        raise CheckpointError(
            f"{source}: {vocab_txt.name} and {tokenizer_json.name} have different tokens; delete the wrong file"
        )
    path, tokens = next(iter(vocabs.items()))
    if len(tokens) != vocab_size:
        raise CheckpointError(
            f"{path}: has {len(tokens)} tokens, but vocab_size in config.json is {vocab_size}; give the vocabulary "
            "that the model was trained with"
        )
    return tokens, next(iter(lowers.values()), None)


def _read_tokenizer_json(path: Path) -> tuple[list[str], bool | None]:
    """Return the tokens of a `tokenizer.json` in the order of their ids, and whether it lower-cases texts."""
    content = read_json(path)
    model, normalizer, splitter = (content.get(key) or {} for key in ("model", "normalizer", "pre_tokenizer"))
    settings = (
        ("model", model.get("type"), "WordPiece"),
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
    vocab = model.get("vocab", {})
    by_id: dict[int, str] = {}
    for token, number in vocab.items():
        if number in by_id:
            raise CheckpointError(
                f"{path}: tokens {by_id[number]!r} and {token!r} both have id {number}; fix this file"
            )
        if token.strip() != token or "\n" in token:
            raise CheckpointError(
                f"{path}: token {token!r} cannot be written to vocab.txt, which has one token per line; rename it"
            )
        by_id[number] = token
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


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object; raises CheckpointError if the file has none."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path}: cannot be read ({error}); copy it again") from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{path}: is not a JSON object; copy it again")
    return content

"""Recognises a checkpoint's model by the names of its variables, and finds BERT's variables in any scope."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence

from cascade_lab.exceptions import CheckpointError

OBJECT_GRAPH = "_CHECKPOINTABLE_OBJECT_GRAPH"

# The first pattern that some name matches gives the kind. The names are TensorFlow's (`/`) or PyTorch's (`.`).
_OTHER_MODELS = (
    (r"embeddings[/.]word_embeddings_2$|[/.]layer_shared[/.]|embedding_hidden_mapping_in", "ALBERT"),
    (r"(^|[/.])electra[/.](embeddings|encoder)|embeddings_project[/.]", "ELECTRA"),
    (r"embedding_transformation[/.]", "MobileBERT"),
    (r"(^|[/.])distilbert[/.](embeddings|transformer)|[/.]attention[/.]q_lin[/.]", "DistilBERT"),
    (r"(^|[/.])mpnet[/.](embeddings|encoder)|relative_attention_bias", "MPNet"),
    (r"(^|[/.])deberta[/.](embeddings|encoder)|rel_embeddings", "DeBERTa"),
    (r"(^|[/.])(xlm_)?roberta[/.](embeddings|encoder)", "RoBERTa"),
    (r"embeddings[/.]tok_embeddings|[/.]Wqkv[/.]", "ModernBERT"),
)
_WAY_OUT = "this package reads BERT only; give a checkpoint of BERT"


def other_model(names: Iterable[str]) -> str | None:
    """Return the name of a model that is not BERT, if the names of its variables show it.

    >>> other_model(["bert/embeddings/word_embeddings_2", "bert/encoder/layer_shared/output/dense/bias"])
    'ALBERT'
    >>> other_model(["distilbert.embeddings.word_embeddings.weight"])
    'DistilBERT'
    >>> other_model(["bert/embeddings/word_embeddings"]) is None
    True
    """
    text = "\n".join(names)
    return next((model for pattern, model in _OTHER_MODELS if re.search(pattern, text, re.MULTILINE)), None)


def check_kind(where: str, names: Sequence[str]) -> None:
    """Raise CheckpointError if a TensorFlow checkpoint does not contain a BERT with a pooler.

    `names` are its variables. The check comes before all sizes: with another model a wrong size says nothing.
    """
    model = other_model(names)
    if model is not None:
        raise CheckpointError(f"{where}: is a checkpoint of {model}; {_WAY_OUT}")
    if not any(name.endswith("embeddings/word_embeddings") for name in names):
        if OBJECT_GRAPH in names:
            raise CheckpointError(
                f"{where}: is a TensorFlow 2 object-based checkpoint (it has {OBJECT_GRAPH}), whose variables do not "
                "have BERT's names; load it in its own program and save it there with tf.compat.v1.train.Saver"
            )
        shown = ", ".join(sorted(names)[:3]) or "none"
        raise CheckpointError(
            f"{where}: has no variable bert/embeddings/word_embeddings in any scope (it has {shown}); {_WAY_OUT}"
        )
    scope = bert_scope(where, names)
    if not any(name.startswith(f"{scope}pooler/dense/") for name in names):
        raise CheckpointError(
            f"{where}: has no pooler ({scope}pooler/dense/kernel), which a classifier needs: the model was saved "
            "without it; give a checkpoint that was saved with its pooler"
        )


def bert_scope(where: str, names: Iterable[str]) -> str:
    """Return what precedes `embeddings/word_embeddings`: `bert/` in BERT's own checkpoints.

    >>> bert_scope("model.ckpt", ["module/bert/embeddings/word_embeddings", "global_step"])
    'module/bert/'

    Raises
    ------
    CheckpointError
        There are several, none of them `bert/`.
    """
    return _only_scope(where, names, "embeddings/word_embeddings", "bert/")


def torch_scope(where: str, names: Iterable[str]) -> str:
    """Return what precedes `embeddings.word_embeddings.weight` in the names of a PyTorch model.

    >>> torch_scope("model.safetensors", ["module.bert.embeddings.word_embeddings.weight"])
    'module.bert.'
    """
    return _only_scope(where, names, "embeddings.word_embeddings.weight", "bert.")


def _only_scope(where: str, names: Iterable[str], ending: str, usual: str) -> str:
    # The character before the ending separates names, so that `my_embeddings/…` does not count.
    matches = (re.fullmatch(rf"(|.*{re.escape(usual[-1])}){re.escape(ending)}", name) for name in names)
    scopes = sorted({match[1] for match in matches if match})
    if len(scopes) > 1 and usual not in scopes:
        raise CheckpointError(f"{where}: contains several models ({', '.join(scopes)}); save the one that you need")
    return usual if not scopes or usual in scopes else scopes[0]


def find_name(name: str, names: Iterable[str], scope: str, separator: str) -> str:
    """Return under which name a variable of the head is saved: `name`, or `name` inside one of BERT's outer scopes.

    >>> find_name("output_bias", {"module/output_bias", "global_step"}, "module/bert/", "/")
    'module/output_bias'
    """
    names = set(names)
    parts = scope.split(separator)[:-1]
    candidates = [separator.join([*parts[:n], name]) for n in range(len(parts), 0, -1)]
    return next((candidate for candidate in (name, *candidates) if candidate in names), name)

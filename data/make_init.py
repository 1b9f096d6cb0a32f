"""Make the small BERT that the demo's checkpoints start from: `python data/make_init.py MINILM OUTPUT`.

MINILM is all-MiniLM-L6-v2 (Apache-2.0), converted by `cascade-lab import-hf`. Of its 30,522 wordpieces this keeps the
5,000 that the demo's training texts use or that are most frequent in English; of their 384 dimensions it keeps the 128
principal components. The two layers above start with random weights. A word that is not in the training texts then gets
an embedding near those of similar words that are.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import tensorflow as tf

from cascade_lab import EvalSet
from cascade_lab.bert.checkpoint import find_checkpoint, read_vocab, variable_shapes
from cascade_lab.bert.tokenization import Tokenizer

N_TOKENS = 5000
FREQUENT = 1996  # BERT's vocabulary has its words from here on, the most frequent first
CONFIG = {
    "attention_probs_dropout_prob": 0.1,
    "hidden_act": "gelu",
    "hidden_dropout_prob": 0.1,
    "hidden_size": 128,
    "initializer_range": 0.02,
    "intermediate_size": 512,
    "max_position_embeddings": 96,
    "num_attention_heads": 4,
    "num_hidden_layers": 2,
    "type_vocab_size": 2,
    "vocab_size": N_TOKENS,
}


def kept_tokens(vocab: dict[str, int], vocab_file: Path) -> list[int]:
    """Return the ids that are kept: special tokens, letters, what the training texts use, what is frequent."""
    special = [vocab[token] for token in ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")]
    plain = {token: i for token, i in vocab.items() if token.removeprefix("##").isascii()}
    letters = [i for token, i in plain.items() if len(token.removeprefix("##")) == 1]
    texts = EvalSet.read(Path(__file__).parent / "train.tsv").texts
    used = {i for ids in Tokenizer(vocab_file, do_lower_case=True, max_seq_length=96).ids(texts) for i in ids}
    frequent = [i for token, i in plain.items() if i >= FREQUENT and token.removeprefix("##").isalnum()]
    return list(dict.fromkeys([*special, *letters, *sorted(used), *frequent]))[:N_TOKENS]


def principal_components(embeddings: np.ndarray, n: int) -> np.ndarray:
    centered = embeddings - embeddings.mean(axis=0)
    _, _, directions = np.linalg.svd(centered.astype(np.float64), full_matrices=False)
    projected = centered @ directions[:n].T
    return 0.05 * projected / projected.std()


def main(minilm: Path, output: Path) -> None:
    vocab = read_vocab(minilm / "vocab.txt")
    kept = kept_tokens(vocab, minilm / "vocab.txt")
    embeddings = tf.train.load_checkpoint(find_checkpoint(minilm)).get_tensor("bert/embeddings/word_embeddings")
    rng = np.random.default_rng(0)
    output.mkdir(parents=True)
    tokens = sorted(vocab, key=vocab.__getitem__)
    (output / "vocab.txt").write_text("".join(f"{tokens[i]}\n" for i in kept), encoding="utf-8")
    (output / "bert_config.json").write_text(json.dumps(CONFIG, indent=2) + "\n", encoding="utf-8")
    tf1 = tf.compat.v1
    with tf.Graph().as_default(), tf1.Session() as session:
        for name, shape in variable_shapes(CONFIG, 2).items():
            if name.endswith("word_embeddings"):
                value = principal_components(embeddings[kept], CONFIG["hidden_size"])
            elif name.endswith("embeddings"):
                value = rng.normal(0, 0.005, shape)
            elif name.endswith("kernel"):
                value = rng.normal(0, 0.7 / np.sqrt(shape[0]), shape)
            else:
                value = np.full(shape, float(name.endswith("gamma")))
            if name.startswith("bert/"):
                tf1.get_variable(name, initializer=np.float32(value))
        session.run(tf1.global_variables_initializer())
        tf1.train.Saver().save(session, str(output / "model.ckpt"), write_meta_graph=False)


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:]))

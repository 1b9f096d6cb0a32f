"""Makes the Hugging Face directories beside this file, with transformers and PyTorch themselves.

Not run by the tests. To make them again, in an environment of its own:

    pip install torch transformers safetensors
    python tests/data/huggingface/make.py

Last run with Python 3.11, torch 2.13.0, transformers 5.23.0, safetensors 0.8.0.
"""

from __future__ import annotations

import shutil
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

# In the functions, not here: pytest imports this file in search of doctests, where PyTorch need not be.
if TYPE_CHECKING:
    import torch
    from transformers import BertConfig

WORDS = ["pay", "bill", "card", "lost", "play", "music", "weather", "what", "is", "my", "the", "a", "sing", "song"]
WORDS += ["please", "now", "naive"]
PIECES = ["##s", "##ing", "##ed", *[f"##{letter}" for letter in "abcdefghijklm"]]
TOKENS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS, *"bcdefghijklmnopqrst.?!", *PIECES]
TEXTS = [
    "what is my bill",
    "pay",
    "please play the song now!",
    "is the weather naïve? pay my lost card, sing a song, and play music playing plays played",
    "",
    "lost my card now",
]
LABELS = ["billing", "music", "weather"]
# Activation: epsilon of the LayerNorms, whether texts are lower-cased, where the vocabulary stands.
KINDS = {
    "gelu": (1e-12, True, "tokenizer.json"),
    "gelu_new": (1e-5, True, "vocab.txt"),
    "gelu_pytorch_tanh": (1e-12, False, "tokenizer.json"),
    "relu": (1e-5, True, "both"),
}


def config(hidden_act: str, epsilon: float) -> BertConfig:
    from transformers import BertConfig

    return BertConfig(
        vocab_size=len(TOKENS),
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=32,
        max_position_embeddings=32,
        hidden_act=hidden_act,
        layer_norm_eps=epsilon,
        id2label=dict(enumerate(LABELS)),
        label2id={label: number for number, label in enumerate(LABELS)},
    )


def make_random(model: torch.nn.Module, seed: int) -> torch.nn.Module:
    """Give a model weights at which activations and epsilon matter.

    Hidden states of a small spread make a LayerNorm's epsilon of 1e-5 show; dense layers of a large one take the
    activations to where their forms differ.
    """
    import torch

    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            scale = 0.004 if "embeddings.weight" in name else 0.5
            weight.copy_(scale * torch.randn(weight.shape, generator=generator))
            if name.endswith("LayerNorm.weight"):
                weight.add_(1)
    return model.eval()


def write_tokenizer(folder: Path, do_lower_case: bool, kept: str) -> None:
    from transformers import BertTokenizer

    tokens = folder / "vocab.txt"
    tokens.write_text("\n".join(TOKENS) + "\n")
    tokenizer = BertTokenizer(vocab=str(tokens), do_lower_case=do_lower_case, model_max_length=32)
    tokenizer.save_pretrained(folder)
    if kept == "tokenizer.json":
        tokens.unlink()
    elif kept == "vocab.txt":
        (folder / "tokenizer.json").unlink()


def main(root: Path) -> None:
    """Write one directory an activation, with PyTorch's logits, and one of a bare model."""
    import torch
    from transformers import AutoTokenizer, BertForSequenceClassification, BertModel

    for seed, (hidden_act, (epsilon, do_lower_case, kept)) in enumerate(KINDS.items()):
        folder = root / hidden_act
        shutil.rmtree(folder, ignore_errors=True)
        model = make_random(BertForSequenceClassification(config(hidden_act, epsilon)), seed)
        model.save_pretrained(folder)
        write_tokenizer(folder, do_lower_case, kept)
        pairs = [("what is my bill", "pay now"), ("sing", "the song is a song")]
        texts, seconds = [*TEXTS, *(a for a, _ in pairs)], [*[None] * len(TEXTS), *(b for _, b in pairs)]
        tokenizer = AutoTokenizer.from_pretrained(folder)
        encoded = [tokenizer(a, b) if b else tokenizer(a) for a, b in zip(texts, seconds, strict=True)]
        batch = tokenizer.pad(encoded, return_tensors="pt")
        with torch.no_grad():
            logits = model(**batch).logits
        arrays = {key: batch[key].numpy().astype(np.int32) for key in ("input_ids", "attention_mask", "token_type_ids")}
        np.savez_compressed(folder / "expected.npz", text=TEXTS, logits=logits.numpy(), **arrays)
    folder = root / "base"
    shutil.rmtree(folder, ignore_errors=True)
    make_random(BertModel(config("gelu", 1e-12)), 9).save_pretrained(folder)
    write_tokenizer(folder, True, "tokenizer.json")


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).parent)

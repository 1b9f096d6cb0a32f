"""What the contenders load, made once: the same weights in every format, and the texts.

    python tests/benchmarks/prepare.py CLINC150 FOLDER [--without-base]

makes `FOLDER/clinc150` (both stages of the CLINC150 cascade) and `FOLDER/base` (one stage of BERT-base's shape with
random weights), each with `cascade-float32.toml`, `cascade-bfloat16.toml`, `hf/`, `onnx/`, `ctranslate2/` and
`texts.json`. `clinc150` also has `cascade-mixed.toml` and the models in int8, both made with the validation split, and
for the growth of time with texts `grown.json`. What a contender needs but could not be made is in `absent.json`, with
the reason. `--without-base` also leaves out the mixed cascade and int8, which the service's benchmark does not need.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import peer_formats
from tokenizers import BertWordPieceTokenizer

from cascade_lab.bert.checkpoint import variable_shapes
from cascade_lab.bert.writing import save_checkpoint
from cascade_lab.evalset import EvalSet
from cascade_lab.export import export_cascade
from cascade_lab.spec import CascadeSpec

BASE = {
    "hidden_size": 768,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "intermediate_size": 3072,
    "hidden_act": "gelu",
    "max_position_embeddings": 512,
    "type_vocab_size": 2,
}
BASE_LENGTHS = {"length_16": 16, "length_64": 64, "length_128": 128}
N_LABELS = 150
N_GROWN = 220_000  # texts for the measurement of how time grows with their number


def main(clinc150: Path, folder: Path, *, with_base: bool) -> None:
    spec = CascadeSpec.read(clinc150 / "cascade.toml")
    texts = EvalSet.read(clinc150 / "data_full.json", split="test").texts
    # A fixed order that is not the file's, so that any first n of them are a fair sample.
    texts = [texts[i] for i in np.random.default_rng(0).permutation(len(texts))]
    vocab = spec.stages[0].vocab_file
    _formats(spec, folder / "clinc150")
    _write_texts(folder / "clinc150", {"test": texts}, vocab)
    (folder / "clinc150" / "grown.json").write_text(json.dumps(_grown(texts)), encoding="utf-8")
    if not with_base:
        return
    _lower_precisions(spec, clinc150 / "data_full.json", folder / "clinc150")
    base = _base(folder / "base", vocab)
    _formats(base, folder / "base")
    _write_texts(folder / "base", {name: _of_length(length, vocab) for name, length in BASE_LENGTHS.items()}, vocab)


def _formats(spec: CascadeSpec, folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for precision in ("float32", "bfloat16"):
        stages = tuple(replace(stage, engine="fast", precision=precision) for stage in spec.stages)
        replace(spec, stages=stages).write(folder / f"cascade-{precision}.toml")
    export_cascade(spec, folder / "hf", format="hf", overwrite=True)
    stages = [folder / "hf" / stage.name for stage in spec.stages]
    for stage in stages:
        peer_formats.onnx(stage, folder / "onnx")
    peers = ["ctranslate2 float32", "ctranslate2 int8 dynamic"]
    for stage in stages:
        attempt(folder, peers, peer_formats.ctranslate2, stage, folder / "ctranslate2")


def _lower_precisions(spec: CascadeSpec, data: Path, folder: Path) -> None:
    """Make what is measured on the validation split: the mixed cascade, and the peers' models in int8."""
    texts = EvalSet.read(data, split="val").texts
    texts = [texts[i] for i in np.random.default_rng(0).permutation(len(texts))[: peer_formats.N_CALIBRATION]]
    attempt(folder, ["cascade_lab mixed"], _mixed, folder, data)
    for stage in spec.stages:
        tokenizer = BertWordPieceTokenizer(str(stage.vocab_file), lowercase=stage.do_lower_case)
        tokenizer.enable_truncation(stage.max_seq_length)
        ids = [encoding.ids for encoding in tokenizer.encode_batch(texts)]
        source, onnx = folder / "hf" / stage.name, folder / "onnx"
        attempt(folder, ["onnx_runtime int8 dynamic"], peer_formats.onnx_dynamic, source, onnx)
        attempt(folder, ["openvino int8 dynamic"], peer_formats.openvino_dynamic, source, onnx)
        attempt(folder, ["openvino int8 static"], peer_formats.openvino_static, source, onnx, ids)


def _mixed(folder: Path, data: Path) -> None:
    """Measure the bounds of the mixed precision on the validation split."""
    command = [sys.executable, "-m", "cascade_lab", "verify-precision", folder / "cascade-bfloat16.toml", data]
    options = ["--split", "val", "--calibrate", "--output", folder / "cascade-mixed.toml"]
    done = subprocess.run([*command, *options], capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(done.stderr.strip().splitlines()[-1])


def attempt(folder: Path, contenders: list[str], make: Callable[..., None], *inputs: Any) -> None:
    """Make what these contenders load; where that fails, they are absent, for the reason in `absent.json`."""
    try:
        make(*inputs)
    except Exception as error:
        reason = f"{type(error).__name__}: {error}".splitlines()[0]
        path = folder / "absent.json"
        absent = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
        path.write_text(json.dumps(absent | dict.fromkeys(contenders, reason)), encoding="utf-8")


def _base(folder: Path, vocab: Path) -> CascadeSpec:
    """Write a checkpoint of BERT-base's shape with random weights; return the cascade of that one stage."""
    made = folder / "checkpoint"
    made.mkdir(parents=True)
    config = {**BASE, "vocab_size": len(vocab.read_text(encoding="utf-8").splitlines())}
    (made / "bert_config.json").write_text(json.dumps(config))
    shutil.copyfile(vocab, made / "vocab.txt")
    rng = np.random.default_rng(0)
    weights = {
        name: np.float32(1 + 0.02 * rng.standard_normal(shape))
        if name.endswith("gamma")
        else 0.02 * rng.standard_normal(shape, dtype=np.float32)
        for name, shape in variable_shapes(config, N_LABELS).items()
    }
    save_checkpoint(weights, made / "model.ckpt")
    stage = {
        "name": "base",
        "init_checkpoint": "checkpoint",
        "bert_config_file": "checkpoint/bert_config.json",
        "vocab_file": "checkpoint/vocab.txt",
        "labels": [f"label_{number}" for number in range(N_LABELS)],
        "max_seq_length": 128,
    }
    return CascadeSpec.from_dict({"name": "base", "stage": [stage]}, folder=folder)


def _of_length(length: int, vocab: Path, n: int = 256) -> list[str]:
    """Return texts of exactly that number of tokens, [CLS] and [SEP] included."""
    words = [word for word in vocab.read_text(encoding="utf-8").splitlines() if word.isascii() and word.isalpha()]
    rng = np.random.default_rng(length)
    return [" ".join(rng.choice(words, length - 2)) for _ in range(n)]


def _grown(texts: list[str]) -> list[str]:
    """Return many distinct texts with the words and the lengths of `texts`."""
    rng = np.random.default_rng(1)
    lengths = [len(text.split()) for text in texts]
    words = np.array(" ".join(texts).split())
    made: dict[str, None] = {}
    while len(made) < N_GROWN:
        made[" ".join(rng.choice(words, rng.choice(lengths)))] = None
    return list(made)


def _write_texts(folder: Path, sets: dict[str, list[str]], vocab: Path) -> None:
    """Write the sets of texts, and each text's count of tokens."""
    tokenizer = BertWordPieceTokenizer(str(vocab), lowercase=True)
    tokenizer.enable_truncation(128)
    counted = {
        name: {"texts": texts, "n_tokens": [len(encoding.ids) for encoding in tokenizer.encode_batch(texts)]}
        for name, texts in sets.items()
    }
    (folder / "texts.json").write_text(json.dumps(counted), encoding="utf-8")


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), with_base="--without-base" not in sys.argv)

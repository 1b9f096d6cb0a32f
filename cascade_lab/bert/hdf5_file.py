"""Reads the tensors of a `tf_model.h5` by PyTorch's names, in a process of its own: a damaged file could end it.

The library that reads HDF5 is written in C and is known to crash on some damaged files. The child process copies the
tensors into a safetensors file, which the parent reads.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tempfile
from importlib.util import find_spec
from pathlib import Path

import numpy as np
from safetensors.numpy import load_file, save_file

from cascade_lab.exceptions import CheckpointError

WAY_OUT = "load it with from_pretrained(…, from_tf=True) of transformers 4 and save_pretrained it again"
_CHILD = "import sys; from cascade_lab.bert.hdf5_file import convert; convert(sys.argv[1], sys.argv[2])"


def read_hdf5(path: Path) -> dict[str, np.ndarray]:
    """Return the tensors of a `tf_model.h5`, with PyTorch's names and axes.

    Raises
    ------
    CheckpointError
        h5py is not installed, or the file is damaged or contains no BERT.
    """
    if find_spec("h5py") is None:
        raise CheckpointError(f"{path}: is not read without h5py; install h5py, or {WAY_OUT}")
    with tempfile.TemporaryDirectory(prefix="cascade-lab-") as folder:
        output = Path(folder) / "model.safetensors"
        command = [sys.executable, "-c", _CHILD, str(path.resolve()), str(output)]
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path)), "PYTHONIOENCODING": "utf-8"}
        done = subprocess.run(command, capture_output=True, encoding="utf-8", errors="replace", env=environment)
        if done.returncode or not output.is_file():
            reason = (done.stderr.strip().splitlines() or [f"its reader ended with {done.returncode}"])[-1]
            raise CheckpointError(
                f"{path}: cannot be read ({reason[:160]}): it is not usable; copy it again, or {WAY_OUT}"
            )
        # Copied into memory: the temporary file is deleted.
        return {name: tensor.copy() for name, tensor in load_file(output).items()}


def convert(source: str, output: str) -> None:
    """Copy the datasets of an HDF5 file that are BERT's to a safetensors file. This is what the child process does."""
    import h5py

    tensors: dict[str, np.ndarray] = {}

    def visit(path: str, item: object) -> None:
        if not isinstance(item, h5py.Dataset):
            return
        name, is_turned = torch_name_of(path)
        if name in tensors:
            raise ValueError(f"several models: {name} occurs twice")
        # An external or virtual dataset has its numbers in other files, which the model's folder does not contain.
        if item.external or item.is_virtual or item.dtype.kind not in "fiu":
            raise ValueError(f"{path} is not a tensor of this file")
        value = item[()]
        tensors[name] = np.ascontiguousarray(value.T if is_turned else value)

    with h5py.File(source, "r") as file:
        file.visititems(visit)  # it follows no links
    save_file(tensors, output)


def torch_name_of(path: str) -> tuple[str, bool]:
    """Return PyTorch's name for a weight of transformers' TensorFlow models, and whether its axes change places.

    >>> torch_name_of("bert/tf_bert_model/bert/encoder/layer_._3/output/dense/kernel:0")
    ('bert.encoder.layer.3.output.dense.weight', True)
    >>> torch_name_of("bert/tf_bert_model/bert/embeddings/position_embeddings/embeddings:0")
    ('bert.embeddings.position_embeddings.weight', False)
    >>> torch_name_of("classifier/tf_bert_for_sequence_classification/classifier/bias:0")
    ('classifier.bias', False)
    """
    name = re.sub(r":\d+$", "", path)
    inner = re.search(r"(?:^|/)(bert/(?:embeddings|encoder|pooler)/.*|classifier/(?:kernel|bias))$", name)
    name = re.sub(r"/layer_\._(\d+)/", r"/layer/\1/", inner[1] if inner else name)
    is_turned = name.endswith("/kernel")
    name = re.sub(r"/(kernel|gamma|embeddings)$", "/weight", name)
    return re.sub(r"/beta$", "/bias", name).replace("/", "."), is_turned

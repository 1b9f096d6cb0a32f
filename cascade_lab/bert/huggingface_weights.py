"""Reads the weights of a Hugging Face directory, whatever wrapper they were saved in, by their TensorFlow names."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load_file

from cascade_lab.bert.checkpoint import read_json
from cascade_lab.bert.checkpoint_reader import finite_float32
from cascade_lab.bert.hdf5_file import read_hdf5
from cascade_lab.bert.quiet_tensorflow import tf
from cascade_lab.bert.torch_file import read_torch_file
from cascade_lab.bert.variable_names import find_name, other_model, torch_scope
from cascade_lab.exceptions import CheckpointError

HEAD = {"output_weights": "classifier.weight", "output_bias": "classifier.bias"}
"""The names of the head's variables in Hugging Face's models, by their names in the graph."""

INDEXES = {"model.safetensors.index.json": "model.safetensors", "pytorch_model.bin.index.json": "pytorch_model.bin"}
"""The files that list the shards of a model's weights, and the file that they stand for."""

_FLAX = "load it with from_pretrained(…, from_flax=True) of transformers 4 and save_pretrained it again"


class Tensors(NamedTuple):
    """The tensors of a model, and where BERT and its head are among them.

    Attributes
    ----------
    files : list of Path
    by_name : dict of str to (Path, ndarray)
        Each tensor with the file that it comes from.
    scope : str
        What precedes `embeddings.word_embeddings.weight`, such as `bert.`.
    head : dict of str to str
        The tensors' names of `output_weights` and `output_bias`.
    """

    files: list[Path]
    by_name: dict[str, tuple[Path, np.ndarray]]
    scope: str
    head: dict[str, str]

    @property
    def head_shape(self) -> tuple[int, ...] | None:
        """The shape of the head's weights, (n_labels, hidden); None if there is no head."""
        entry = self.by_name.get(self.head["output_weights"])
        return None if entry is None else entry[1].shape


def read_tensors(source: Path) -> Tensors:
    """Read all tensors of a Hugging Face directory.

    Raises
    ------
    CheckpointError
        There are no weights in a format that is read, a file is damaged, or the tensors are not those of a BERT.
    """
    files = _weight_files(source)
    by_name: dict[str, tuple[Path, np.ndarray]] = {}
    for path in files:
        if not path.is_file():
            raise CheckpointError(f"{path}: is missing, but the index names it; copy it too")
        by_name |= {_modern_name(name): (path, tensor) for name, tensor in _read_file(path).items()}
    where = str(files[0] if len(files) == 1 else source)
    model = other_model(by_name)
    if model is not None:
        raise CheckpointError(f"{where}: contains a {model}; only BERT can be imported")
    scope = torch_scope(where, by_name)
    if not any(name.startswith(scope) for name in by_name):
        scope = ""
    return Tensors(files, by_name, scope, {key: find_name(name, by_name, scope, ".") for key, name in HEAD.items()})


def convert(tensors: Tensors, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, np.ndarray]:
    """Return the variables in `shapes`, float32, by their TensorFlow names; other tensors are ignored.

    Raises
    ------
    CheckpointError
        A tensor is missing, has another shape, is not of floats, or holds NaN or infinity.
    """
    weights = {}
    for variable, shape in shapes.items():
        name = tensors.head.get(variable) or tensors.scope + torch_name(variable).removeprefix("bert.")
        if name not in tensors.by_name:
            where = tensors.files[0] if len(tensors.files) == 1 else tensors.files[0].parent
            pooler = " (the model was saved without its pooler, which a classifier needs)" if "pooler" in name else ""
            raise CheckpointError(f"{where}: has no tensor {name}{pooler}; save the whole model again")
        path, tensor = tensors.by_name[name]
        torch_shape = shape[::-1] if variable.endswith("/kernel") else shape
        if tensor.shape != torch_shape:
            raise CheckpointError(
                f"{path}: {name} has shape {list(tensor.shape)}, but by config.json it has {list(torch_shape)}; give "
                "the config that the model was trained with"
            )
        if tensor.dtype.kind != "f" and tensor.dtype != tf.bfloat16.as_numpy_dtype:
            raise CheckpointError(f"{path}: {name} has type {tensor.dtype.name}, not float; save it as float32")
        weights[variable] = transposed(variable, finite_float32(tensor, f"{path}: {name}"))
    return weights


def torch_name(name: str) -> str:
    """Return the name of a variable in Hugging Face's models.

    >>> torch_name("bert/encoder/layer_3/attention/self/query/kernel")
    'bert.encoder.layer.3.attention.self.query.weight'
    """
    if name in HEAD:
        return HEAD[name]
    name = re.sub(r"/layer_(\d+)/", r"/layer/\1/", name)
    name = re.sub(r"/(kernel|gamma)$", "/weight", name)
    name = re.sub(r"/beta$", "/bias", name)
    return re.sub(r"_embeddings$", "_embeddings/weight", name).replace("/", ".")


def transposed(name: str, weight: np.ndarray) -> np.ndarray:
    """Swap the axes of a dense layer's weights: the outputs come first in PyTorch, the inputs in TensorFlow."""
    return weight.T if name.endswith("/kernel") else weight


def _read_file(path: Path) -> dict[str, np.ndarray]:
    if path.suffix == ".bin":
        return read_torch_file(path)
    if path.suffix == ".h5":
        return read_hdf5(path)
    try:
        return load_file(path)
    except (SafetensorError, OSError, TypeError) as error:
        raise CheckpointError(f"{path}: cannot be read ({error}): it is truncated or damaged; copy it again") from error


def _weight_files(source: Path) -> list[Path]:
    """Return the files with the weights: one, or the shards that an index lists. safetensors are preferred."""
    for index, single in INDEXES.items():
        if (source / single).is_file():
            return [source / single]
        if (source / index).is_file():
            names = read_json(source / index).get("weight_map")
            if not isinstance(names, dict) or not all(_is_shard(name, single) for name in names.values()):
                raise CheckpointError(
                    f"{source / index}: its weight_map must name files of the same directory; copy it again"
                )
            return [source / name for name in sorted(set(names.values()))]
    if (source / "tf_model.h5").is_file():
        return [source / "tf_model.h5"]
    others = sorted(path.name for path in source.iterdir() if path.name.endswith((".bin", ".h5", ".msgpack")))
    if others:
        way_out = _FLAX if others[0].endswith(".msgpack") else "give model.safetensors or pytorch_model.bin"
        raise CheckpointError(f"{source}: has no model.safetensors, and {others[0]} is not read; {way_out}")
    raise CheckpointError(f"{source}: has no model.safetensors; give a Hugging Face model directory")


def _is_shard(name: object, single: str) -> bool:
    return isinstance(name, str) and Path(name).name == name and Path(name).suffix == Path(single).suffix


def _modern_name(name: str) -> str:
    """Return a tensor's present name.

    In the oldest models a LayerNorm has `gamma` and `beta`. torch.compile puts `_orig_mod.` before what it compiled,
    which may be the whole model or a layer.
    """
    name = name.replace("_orig_mod.", "")
    return name.replace("LayerNorm.gamma", "LayerNorm.weight").replace("LayerNorm.beta", "LayerNorm.bias")

"""Weights in `pytorch_model.bin` and `tf_model.h5` are those of safetensors; what is pickled is never executed."""

from __future__ import annotations

import io
import json
import os
import pickle
import sys
import zipfile
from collections import OrderedDict
from pathlib import Path
from types import ModuleType

import h5py
import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file
from test_huggingface import DATA, altered, refused
from test_huggingface_kinds import data_of

from cascade_lab.bert import hdf5_file
from cascade_lab.bert.checkpoint import find_checkpoint
from cascade_lab.bert.huggingface import import_directory
from cascade_lab.bert.huggingface_weights import read_tensors
from cascade_lab.bert.torch_file import read_torch_file
from cascade_lab.exceptions import CheckpointError

STORAGES = {
    "float64": "DoubleStorage",
    "float32": "FloatStorage",
    "float16": "HalfStorage",
    "bfloat16": "BFloat16Storage",
    "int64": "LongStorage",
    "uint8": "ByteStorage",
}


class View:
    """A tensor as torch.save writes it: a view of a storage, which other views may share."""

    def __init__(self, storage: np.ndarray, shape, strides, offset: int = 0, *, parameter: bool = False):
        self.storage, self.shape, self.strides, self.offset = storage, tuple(shape), tuple(strides), offset
        self.parameter = parameter


def contiguous(array: np.ndarray, **keys) -> View:
    array = np.array(array, order="C")
    return View(array.reshape(-1), array.shape, [stride // array.itemsize for stride in array.strides], **keys)


@pytest.fixture
def torch(monkeypatch):
    """Modules with the names that a file of torch.save contains, so that pickle can write these names."""
    modules = {name: ModuleType(name) for name in ("torch", "torch._utils")}
    for name in ("_rebuild_tensor_v2", "_rebuild_parameter"):
        function = type(name, (), {"__module__": "torch._utils", "__qualname__": name})
        setattr(modules["torch._utils"], name, function)
    for name in STORAGES.values():
        setattr(modules["torch"], name, type(name, (), {"__module__": "torch", "__qualname__": name}))
    for name, module in modules.items():
        monkeypatch.setitem(sys.modules, name, module)
    return modules


class Pickler(pickle.Pickler):
    """Pickles as torch.save does: protocol 2; a storage is a persistent id."""

    def __init__(self, file, modules, *, legacy: bool):
        super().__init__(file, protocol=2)
        self.modules, self.legacy = modules, legacy
        self.storages: dict[str, np.ndarray] = {}

    def persistent_id(self, item):
        if not isinstance(item, np.ndarray):
            return None
        known = [key for key, storage in self.storages.items() if storage is item]
        key = known[0] if known else str(len(self.storages) + (94_000 if self.legacy else 0))
        self.storages[key] = item
        kind = getattr(self.modules["torch"], STORAGES[item.dtype.name])
        return ("storage", kind, key, "cuda:0", item.size, *([None] if self.legacy else []))

    def reducer_override(self, item):
        if not isinstance(item, View):
            return NotImplemented
        utils = self.modules["torch._utils"]
        arguments = (item.storage, item.offset, item.shape, item.strides, False, OrderedDict())
        if item.parameter:
            plain = View(item.storage, item.shape, item.strides, item.offset)
            return utils._rebuild_parameter, (plain, True, OrderedDict())
        return utils._rebuild_tensor_v2, arguments


def save_zip(path: Path, content: object, modules, *, compression: int = zipfile.ZIP_STORED) -> None:
    file = io.BytesIO()
    pickler = Pickler(file, modules, legacy=False)
    pickler.dump(content)
    with zipfile.ZipFile(path, "w", compression) as archive:
        archive.writestr("archive/data.pkl", file.getvalue())
        archive.writestr("archive/byteorder", "little")
        for key, storage in pickler.storages.items():
            archive.writestr(f"archive/data/{key}", storage.tobytes())
        archive.writestr("archive/version", "3\n")


def save_legacy(path: Path, content: object, modules) -> None:
    with path.open("wb") as file:
        pickle.dump(0x1950A86A20F9469CFC6C, file, protocol=2)
        pickle.dump(1001, file, protocol=2)
        pickle.dump({"protocol_version": 1001, "little_endian": True, "type_sizes": {"int": 4}}, file, protocol=2)
        pickler = Pickler(file, modules, legacy=True)
        pickler.dump(content)
        pickle.dump(sorted(pickler.storages), file, protocol=2)
        for _, storage in sorted(pickler.storages.items()):
            file.write(storage.size.to_bytes(8, "little") + storage.tobytes())


SAVERS = {"zip": save_zip, "legacy": save_legacy}


def state_dict(tensors: dict[str, np.ndarray], **keys) -> OrderedDict:
    """Return a state_dict with the attribute that torch.save writes beside the tensors."""
    content = OrderedDict((name, contiguous(tensor, **keys)) for name, tensor in tensors.items())
    content["bert.embeddings.position_ids"] = contiguous(np.arange(8).reshape(1, 8))
    content._metadata = OrderedDict({"": {"version": 1}})
    return content


def equal(source: Path, tensors: dict[str, np.ndarray]) -> None:
    """Compare the weights of a Hugging Face directory with tensors."""
    found = read_tensors(source).by_name
    for name, tensor in tensors.items():
        assert found[name][1].dtype == tensor.dtype
        np.testing.assert_array_equal(found[name][1], tensor, err_msg=name)


def without_weights(folder: Path) -> tuple[Path, dict[str, np.ndarray]]:
    source = altered(folder, "gelu")
    tensors = load_file(source / "model.safetensors")
    (source / "model.safetensors").unlink()
    return source, tensors


@pytest.mark.parametrize("form", SAVERS)
def test_weights_of_torch_save_are_those_of_safetensors(form, tmp_path, torch):
    source, tensors = without_weights(tmp_path)
    SAVERS[form](source / "pytorch_model.bin", state_dict(tensors), torch)
    equal(source, tensors)


def test_an_import_of_torchs_file_has_the_same_bytes(tmp_path, torch):
    expected = data_of(import_directory(DATA / "gelu", tmp_path / "expected"))
    source, tensors = without_weights(tmp_path)
    save_zip(source / "pytorch_model.bin", state_dict(tensors), torch)
    folder = import_directory(source, tmp_path / "converted")
    assert data_of(folder) == expected
    assert "pytorch_model.bin" in json.loads((folder / "import.json").read_text())["files"]


@pytest.mark.parametrize("form", SAVERS)
@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float64"])
def test_other_floats(form, dtype, tmp_path, torch):
    dtype = np.dtype(getattr(ml_dtypes, dtype, dtype))
    values = {"a": np.linspace(-3, 3, 12).reshape(3, 4).astype(dtype), "b": np.array(2.5).astype(dtype)}
    SAVERS[form](tmp_path / "x.bin", state_dict(values, parameter=True), torch)
    tensors = read_torch_file(tmp_path / "x.bin")
    for name, value in values.items():
        assert tensors[name].dtype == dtype
        np.testing.assert_array_equal(tensors[name], value)


@pytest.mark.parametrize("form", SAVERS)
def test_views_of_one_storage(form, tmp_path, torch):
    """Transposed tensors, parts, and two names for the same numbers, as with tied embeddings."""
    flat = np.arange(24, dtype=np.float32)
    content = {
        "whole": View(flat, (4, 6), (6, 1)),
        "turned": View(flat, (6, 4), (1, 6)),
        "part": View(flat, (2, 3), (6, 1), 7),
        "none": View(flat, (0, 3), (3, 1), 24),
        "step": 7,
    }
    SAVERS[form](tmp_path / "x.bin", content, torch)
    tensors = read_torch_file(tmp_path / "x.bin")
    whole = flat.reshape(4, 6)
    expected = {"whole": whole, "turned": whole.T, "part": whole[1:3, 1:4], "none": np.empty((0, 3))}
    assert tensors.keys() == expected.keys()
    for name, value in expected.items():
        np.testing.assert_array_equal(tensors[name], value)


def test_shards_of_torch_save(tmp_path, torch):
    source, tensors = without_weights(tmp_path)
    names = list(tensors)
    parts = {"pytorch_model-00001-of-00002.bin": names[::2], "pytorch_model-00002-of-00002.bin": names[1::2]}
    for name, part in parts.items():
        save_zip(source / name, state_dict({key: tensors[key] for key in part}), torch)
    index = {"weight_map": {key: name for name, part in parts.items() for key in part}}
    (source / "pytorch_model.bin.index.json").write_text(json.dumps(index))
    equal(source, tensors)
    index["weight_map"][names[0]] = "../pytorch_model.bin"
    (source / "pytorch_model.bin.index.json").write_text(json.dumps(index))
    refused(source, tmp_path, "its weight_map must name files of the same directory")


class Payload:
    def __init__(self, function, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


HOSTILE = [
    (lambda mark: Payload(os.system, f"touch {mark}"), "posix.system"),
    (lambda mark: Payload(exec, f"open({str(mark)!r}, 'w')"), "builtins.exec"),
    (lambda mark: Payload(eval, f"open({str(mark)!r}, 'w')"), "builtins.eval"),
    (lambda mark: Payload(getattr, os, "system"), "builtins.getattr"),
    (lambda mark: Path(mark), "pathlib."),
]


@pytest.mark.parametrize("form", SAVERS)
@pytest.mark.parametrize(("payload", "name"), HOSTILE[:3] + HOSTILE[4:])
def test_what_is_pickled_is_not_executed(form, payload, name, tmp_path, torch):
    source, tensors = without_weights(tmp_path)
    mark = tmp_path / "executed"
    content = state_dict(tensors)
    content["payload"] = payload(mark)
    path = source / "pytorch_model.bin"
    SAVERS[form](path, content, torch)
    refused(
        source, tmp_path, f"{path}: its pickle names {name.replace('builtins', '__builtin__')}", "nothing of it was"
    )
    assert not mark.exists()


@pytest.mark.parametrize(
    ("pickled", "message"),
    [
        (b"cos\nsystem\n(S'touch executed'\ntR.", "its pickle names os.system"),
        (b"(S'touch executed'\nios\nsystem\n.", "its pickle names os.system"),
        (b"(cos\nsystem\nS'touch executed'\no.", "its pickle names os.system"),
        (b"\x80\x04\x8c\x02os\x8c\x06system\x93\x8c\x0etouch executed\x85R.", "its pickle names os.system"),
        (b"\x80\x02ccollections\nOrderedDict\n)\x81.", "its pickle has the operation NEWOBJ"),
        (b"\x80\x02\x82\x01.", "its pickle has the operation EXT1"),
        (b"Pstorage\n.", "its pickle has the operation PERSID"),
        (b"]r\xff\xff\xff\xff.", "has a list, not tensors by name; save the model's state_dict()"),
        (b"}.", "has no tensors by name"),
        (b"K\x01)R.", "its pickle calls what is no function"),
        (b"N", "is truncated or damaged"),
        (b"h\x05.", "is truncated or damaged"),
        (b"\xff.", "is truncated or damaged"),
        (b"(" * 1000, "is truncated or damaged"),
    ],
)
def test_crafted_pickles_are_refused(pickled, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with zipfile.ZipFile("x.bin", "w") as archive:
        archive.writestr("archive/data.pkl", pickled)
    with pytest.raises(CheckpointError) as caught:
        read_torch_file(Path("x.bin"))
    assert message in str(caught.value)
    assert not Path("executed").exists()


@pytest.mark.parametrize(
    "view",
    [
        View(np.ones(4, np.float32), (2, 3), (3, 1)),
        View(np.ones(4, np.float32), (2, 2), (2, 1), 1),
        View(np.ones(4, np.float32), (2, 2), (-2, 1), 2),
        View(np.ones(4, np.float32), (2, -2), (2, 1)),
        View(np.ones(4, np.float32), (4,), (1,), -1),
        View(np.ones(4, np.float32), (1 << 40, 1 << 40), (0, 0)),
        View(np.ones(4, np.float32), (2,), (1 << 70,)),
        View(np.ones(4, np.float32), (1.5,), (1,)),
        View(np.ones(4, np.float32), (2, 2), (2,)),
    ],
)
@pytest.mark.parametrize("form", SAVERS)
def test_tensors_outside_their_numbers_are_refused(form, view, tmp_path, torch):
    SAVERS[form](tmp_path / "x.bin", {"w": view}, torch)
    with pytest.raises(CheckpointError, match=r"x.bin: .*(damaged|copy)"):
        read_torch_file(tmp_path / "x.bin")


@pytest.mark.parametrize("form", SAVERS)
def test_damaged_files_of_torch_save_are_refused_or_unchanged(form, tmp_path, torch):
    """Of the zip, zipfile's checksums cover every number. The format before has none: only its numbers may change."""
    rng = np.random.default_rng(0)
    values = {"a": rng.normal(size=(3, 4)).astype(np.float32), "b": np.arange(3, dtype=np.float32)}
    path = tmp_path / "x.bin"
    SAVERS[form](path, state_dict(values), torch)
    content = path.read_bytes()
    n_refused = 0
    for _ in range(300):
        changed = bytearray(content)
        at = int(rng.integers(len(changed)))
        changed[at] = rng.integers(256)
        path.write_bytes(changed if rng.random() < 0.8 else changed[:at])
        tensors, message = {}, ""
        try:
            tensors = read_torch_file(path)
        except CheckpointError as error:
            n_refused, message = n_refused + 1, str(error)
        assert len(message.splitlines()) < 2
        if form == "zip":
            for name in values.keys() & tensors.keys():
                assert tensors[name].shape != values[name].shape or np.array_equal(tensors[name], values[name])
    assert n_refused > 100


def test_archives_of_others_are_refused(tmp_path, torch):
    path = tmp_path / "x.bin"
    save_zip(path, {"w": contiguous(np.ones(3, np.float32))}, torch, compression=zipfile.ZIP_DEFLATED)
    with pytest.raises(CheckpointError, match="is a compressed archive"):
        read_torch_file(path)
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("word/document.xml", "x")
    with pytest.raises(CheckpointError, match=r"not one of torch.save \(data.pkl is missing\)"):
        read_torch_file(path)
    path.write_text("version https://git-lfs.github.com/spec/v1\n")
    with pytest.raises(CheckpointError, match=r"is not a file of torch\.save"):
        read_torch_file(path)


def save_hdf5(path: Path, tensors: dict[str, np.ndarray], model: str = "tf_bert_for_sequence_classification") -> None:
    """Write PyTorch's tensors as save_pretrained of transformers' TensorFlow models does."""
    with h5py.File(path, "w") as file:
        file.attrs["backend"] = b"tensorflow"
        file.create_group("dropout_37")
        for name, tensor in tensors.items():
            layer = name.replace("layer.", "layer_,_").split(".")
            kind, matrix = layer.pop(), tensor.ndim == 2
            if "LayerNorm" in layer:
                kind = {"weight": "gamma", "bias": "beta"}[kind]
            elif layer[-1] == "word_embeddings":
                kind = "weight"
            elif layer[-1].endswith("_embeddings"):
                kind = "embeddings"
            elif matrix:
                kind, tensor = "kernel", tensor.T
            file["/".join([layer[0], model, *layer, f"{kind}:0"]).replace(",", ".")] = tensor


def test_weights_of_tensorflow_are_those_of_safetensors(tmp_path):
    source, tensors = without_weights(tmp_path)
    save_hdf5(source / "tf_model.h5", tensors)
    with h5py.File(source / "tf_model.h5") as file:
        name = "bert/tf_bert_for_sequence_classification/bert/encoder/layer_._0/attention/self/query/kernel:0"
        assert name in file
    equal(source, tensors)


def test_hdf5_files_that_cannot_be_read_are_refused(tmp_path, monkeypatch):
    source, tensors = without_weights(tmp_path)
    path = source / "tf_model.h5"
    save_hdf5(path, tensors)
    content = path.read_bytes()
    path.write_bytes(content[: len(content) // 2])
    refused(source, tmp_path, f"{path}: cannot be read (", "truncated file", "from_tf=True")
    path.unlink()
    (tmp_path / "numbers").write_bytes(bytes(64))
    with h5py.File(path, "w") as file:
        file.create_dataset("bert/x", (16,), np.float32, external=[(str(tmp_path / "numbers"), 0, 64)])
    refused(source, tmp_path, "bert/x is not a tensor of this file")
    monkeypatch.setattr(hdf5_file, "_CHILD", "import os; os.abort()")
    refused(source, tmp_path, f"{path}: cannot be read (its reader ended with -6)")
    monkeypatch.setattr(hdf5_file, "find_spec", lambda name: None)
    refused(source, tmp_path, f"{path}: is not read without h5py")


def test_safetensors_are_preferred(tmp_path):
    source = altered(tmp_path, "gelu")
    (source / "pytorch_model.bin").write_bytes(b"hostile")
    (source / "tf_model.h5").write_bytes(b"hostile")
    equal(source, load_file(source / "model.safetensors"))


def test_a_hugging_face_directory_as_a_checkpoint_is_named(tmp_path, torch):
    source, tensors = without_weights(tmp_path)
    save_zip(source / "pytorch_model.bin", state_dict(tensors), torch)
    with pytest.raises(CheckpointError, match="is a Hugging Face directory; convert it with cascade-lab import-hf"):
        find_checkpoint(source)

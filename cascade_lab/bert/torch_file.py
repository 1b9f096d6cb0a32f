"""Reads the tensors of a `pytorch_model.bin` without PyTorch, and without executing what is pickled in it.

Such a file is a pickle: a program that may call any function. Here its operations are followed one by one, and the only
calls are those that rebuild a tensor or an OrderedDict. They are done here, by their names; nothing is imported, and
any other name is refused. Formats: `torch.save` since 1.6 (a zip archive) and before (pickles, then the numbers).
"""

from __future__ import annotations

import math
import pickletools
import zipfile
import zlib
from collections.abc import Callable
from io import BytesIO
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np

from cascade_lab.bert.quiet_tensorflow import tf
from cascade_lab.exceptions import CheckpointError
from cascade_lab.text import printable

_DTYPES = {
    "DoubleStorage": np.float64,
    "FloatStorage": np.float32,
    "HalfStorage": np.float16,
    "BFloat16Storage": tf.bfloat16.as_numpy_dtype,
    "LongStorage": np.int64,
    "IntStorage": np.int32,
    "ShortStorage": np.int16,
    "CharStorage": np.int8,
    "ByteStorage": np.uint8,
    "BoolStorage": np.bool_,
}
_CONTAINERS = {"collections OrderedDict", "builtins dict", "__builtin__ dict"}
_TENSOR = "torch._utils _rebuild_tensor_v2"
_OLD_TENSOR = "torch._utils _rebuild_tensor"
_PARAMETER = "torch._utils _rebuild_parameter"
_ALLOWED = {*_CONTAINERS, _TENSOR, _OLD_TENSOR, _PARAMETER, *(f"torch {name}" for name in _DTYPES)}

_LEGACY_MAGIC, _LEGACY_PROTOCOL = 0x1950A86A20F9469CFC6C, 1001


class _Fault(ValueError):
    """The file is damaged, or is not what torch.save writes for tensors."""


class _Global(NamedTuple):
    """A name that a pickle would import: "module name"."""

    name: str


class _Storage(NamedTuple):
    """Numbers that are stored under a key; tensors are views of them."""

    key: str
    dtype: Any
    n: int


class _Tensor(NamedTuple):
    storage: _Storage
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]


def read_torch_file(path: Path) -> dict[str, np.ndarray]:
    """Return the tensors of a file of `torch.save` by name.

    Raises
    ------
    CheckpointError
        The file is damaged, has anything else than tensors by name, or names a function that is not needed for them.
    """
    try:
        if zipfile.is_zipfile(path):
            tensors = _read_zip(path)
        else:
            with path.open("rb") as file:
                tensors = _read_legacy(file)
    except _Fault as fault:
        raise CheckpointError(f"{path}: {fault}") from fault
    except (
        OSError, EOFError, ValueError, KeyError, IndexError, TypeError, AttributeError, OverflowError, MemoryError,
        NotImplementedError, RuntimeError, zipfile.BadZipFile, zlib.error,
    ) as error:  # fmt: skip
        raise CheckpointError(f"{path}: is truncated or damaged ({type(error).__name__}); copy it again") from error
    if not tensors:
        raise CheckpointError(f"{path}: has no tensors by name; save the model's state_dict()")
    return tensors


def _read_zip(path: Path) -> dict[str, np.ndarray]:
    with zipfile.ZipFile(path) as archive:
        names = archive.namelist()
        (pickled,) = [name for name in names if name.endswith("/data.pkl") and name.count("/") == 1][:1] or [""]
        if not pickled:
            raise _Fault("is an archive, but not one of torch.save (data.pkl is missing); give a pytorch_model.bin")
        if any(info.compress_type != zipfile.ZIP_STORED for info in archive.infolist()):
            raise _Fault("is a compressed archive, which torch.save does not write; save the model again")
        root = pickled.removesuffix("data.pkl")
        if f"{root}byteorder" in names and archive.read(f"{root}byteorder") != b"little":
            raise _Fault("has big-endian numbers; save the model again on another machine")
        content = _unpickle(BytesIO(archive.read(pickled)))
        return _tensors(content, lambda storage: archive.read(f"{root}data/{storage.key}"))


def _read_legacy(file: BinaryIO) -> dict[str, np.ndarray]:
    """Read the format before PyTorch 1.6: five pickles, then each storage as its length and its numbers."""
    try:
        magic = _unpickle(file)
    except (_Fault, ValueError):
        magic = None
    if magic != _LEGACY_MAGIC:
        raise _Fault("is not a file of torch.save; give a pytorch_model.bin, or model.safetensors")
    if _unpickle(file) != _LEGACY_PROTOCOL or _unpickle(file).get("little_endian") is not True:
        raise _Fault("was written by an unknown version of torch.save, or is big-endian; save the model again")
    content = _unpickle(file)
    keys = _unpickle(file) if _named(content) else []
    start, end = file.tell(), file.seek(0, 2)
    dtypes = {tensor.storage.key: np.dtype(tensor.storage.dtype) for tensor in _named(content).values()}
    places: dict[str, tuple[int, int]] = {}
    for key in keys:
        file.seek(start)
        n_bytes = int.from_bytes(file.read(8), "little", signed=True) * dtypes[key].itemsize
        if n_bytes < 0 or start + 8 + n_bytes > end:
            raise _Fault("is truncated or damaged; copy it again")
        places[key] = start + 8, n_bytes
        start += 8 + n_bytes

    def numbers(storage: _Storage) -> bytes:
        at, n_bytes = places[storage.key]
        file.seek(at)
        return file.read(n_bytes)

    return _tensors(content, numbers)


def _named(content: Any) -> dict[str, _Tensor]:
    """Return the tensors of a dict by name; its other values, such as counters, are ignored."""
    if not isinstance(content, dict):
        raise _Fault(f"has a {type(content).__name__}, not tensors by name; save the model's state_dict()")
    return {name: value for name, value in content.items() if isinstance(name, str) and isinstance(value, _Tensor)}


def _tensors(content: Any, numbers: Callable[[_Storage], bytes]) -> dict[str, np.ndarray]:
    """Read the numbers of all tensors. Tensors of one storage share its memory."""
    storages: dict[str, np.ndarray] = {}
    tensors = {}
    for name, (storage, offset, shape, strides) in _named(content).items():
        where = f"tensor '{printable(name)[:80]}'"
        if storage.key not in storages:
            storages[storage.key] = np.frombuffer(numbers(storage), np.dtype(storage.dtype))
        flat = storages[storage.key]
        last = offset + sum((size - 1) * stride for size, stride in zip(shape, strides, strict=True))
        if flat.dtype != storage.dtype or min(*shape, *strides, offset, 0) < 0:
            raise _Fault(f"{where} is damaged; copy the file again")
        n = math.prod(shape)
        if n > len(flat) or (n and last >= len(flat)):
            raise _Fault(f"{where} is larger than its numbers: the file is truncated or damaged; copy it again")
        bytes_per_step = [stride * flat.itemsize for stride in strides]
        tensors[name] = np.lib.stride_tricks.as_strided(flat[offset:], shape, bytes_per_step, writeable=False)
    return tensors


def _unpickle(file: BinaryIO) -> Any:
    """Follow the operations of one pickle and return what it makes; calls are done by `_called` alone."""
    stack: list[Any] = []
    marks: list[int] = []
    memo: dict[int, Any] = {}

    def after_mark() -> list[Any]:
        start = marks.pop()
        items = stack[start:]
        del stack[start:]
        return items

    argument: Any
    for operation, argument, _ in pickletools.genops(file):
        name = operation.name
        if name in ("PROTO", "FRAME"):
            pass
        elif name == "STOP":
            return stack.pop()
        elif name in _LITERALS or name in _CONSTANTS:
            stack.append(_CONSTANTS.get(name, argument))
        elif name == "MARK":
            marks.append(len(stack))
        elif name in ("TUPLE", "LIST", "DICT"):
            items = after_mark()
            pairs = zip(items[::2], items[1::2], strict=True)
            stack.append(tuple(items) if name == "TUPLE" else items if name == "LIST" else dict(pairs))
        elif name in ("EMPTY_TUPLE", "EMPTY_LIST", "EMPTY_DICT"):
            stack.append({"EMPTY_TUPLE": (), "EMPTY_LIST": [], "EMPTY_DICT": {}}[name])
        elif name in ("TUPLE1", "TUPLE2", "TUPLE3"):
            n = int(name[-1])
            stack[-n:] = [tuple(stack[-n:])]
        elif name in ("APPEND", "APPENDS"):
            items = after_mark() if name == "APPENDS" else [stack.pop()]
            stack[-1].extend(items)
        elif name in ("SETITEM", "SETITEMS"):
            value = [] if name == "SETITEMS" else [stack.pop(-2), stack.pop()]
            items = after_mark() if name == "SETITEMS" else value
            stack[-1].update(zip(items[::2], items[1::2], strict=True))
        elif name in ("PUT", "BINPUT", "LONG_BINPUT", "MEMOIZE"):
            memo[len(memo) if name == "MEMOIZE" else argument] = stack[-1]
        elif name in ("GET", "BINGET", "LONG_BINGET"):
            stack.append(memo[argument])
        elif name in ("GLOBAL", "STACK_GLOBAL", "INST"):
            if name == "STACK_GLOBAL":
                argument = f"{stack.pop(-2)} {stack.pop()}"
            stack.append(_allowed(str(argument)))
        elif name == "BINPERSID":
            stack.append(_storage(stack.pop()))
        elif name == "REDUCE":
            arguments, function = stack.pop(), stack.pop()
            stack.append(_called(function, arguments))
        elif name == "BUILD":
            stack.pop()  # attributes of an OrderedDict, such as _metadata, or of a tensor: not needed
        else:
            raise _Fault(
                f"its pickle has the operation {name}, which tensors do not need; save the model's state_dict() with a "
                "current version of transformers"
            )
    raise _Fault("is truncated or damaged; copy it again")


_LITERALS = {
    "INT", "BININT", "BININT1", "BININT2", "LONG", "LONG1", "LONG4", "FLOAT", "BINFLOAT", "UNICODE",
    "SHORT_BINUNICODE", "BINUNICODE", "BINUNICODE8", "STRING", "BINSTRING", "SHORT_BINSTRING", "BINBYTES",
    "SHORT_BINBYTES",
}  # fmt: skip
_CONSTANTS = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False}


def _allowed(name: str) -> _Global:
    if name not in _ALLOWED:
        dotted = printable(name.replace(" ", "."))[:80]
        raise _Fault(
            f"its pickle names {dotted}, which tensors do not need and which could execute code; nothing of it was "
            "executed; save the model's state_dict() alone, or as model.safetensors"
        )
    return _Global(name)


def _storage(identity: Any) -> _Storage:
    """Return the storage that a persistent id names: ("storage", its type, its key, its device, how many numbers)."""
    kind, storage_type, key, _, n = identity[:5]
    dtype = _DTYPES.get(storage_type.name.removeprefix("torch ")) if isinstance(storage_type, _Global) else None
    if kind != "storage" or dtype is None or not isinstance(key, str) or type(n) is not int:
        raise _Fault("has a storage of an unknown kind; save the model again")
    if any(part is not None for part in identity[5:]):
        raise _Fault("has a storage that is a view of another one; save the model again")
    return _Storage(key, dtype, n)


def _called(function: Any, arguments: tuple[Any, ...]) -> Any:
    """Do what a pickle asks for, if it is one of the calls that rebuild tensors."""
    name = function.name if isinstance(function, _Global) else None
    if name in _CONTAINERS:
        return dict(*arguments)
    if name in (_TENSOR, _OLD_TENSOR):
        storage, offset, shape, strides = arguments[:4]
        if not isinstance(storage, _Storage) or any(type(n) is not int for n in (offset, *shape, *strides)):
            raise _Fault("has a damaged tensor; copy it again")
        return _Tensor(storage, offset, tuple(shape), tuple(strides))
    if name == _PARAMETER and isinstance(arguments[0], _Tensor):
        return arguments[0]
    raise _Fault("its pickle calls what is no function; copy it again")

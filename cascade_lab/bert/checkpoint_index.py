"""Parses a checkpoint's `.index` and checks it against the data files, before TensorFlow reads either of them.

TensorFlow's reader trusts the index: with some indexes it ends the process. What is parsed here cannot do that. The
tensors are read by TensorFlow, which compares each with the checksum in the index.

An index is a sorted table as of LevelDB: blocks of keys and values, each with a checksum, and a footer that says where
the block of the blocks is. The first key is empty and has the header; the others are the variables' names.
Formats: github.com/google/leveldb, doc/table_format.md; tensorflow/core/protobuf/tensor_bundle.proto.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from google.protobuf.message import DecodeError

from cascade_lab.bert.quiet_tensorflow import BundleEntryProto, BundleHeaderProto, tf

MAX_BYTES = 1 << 24
"""The largest index that is read. That of BERT-base with Adam's slots has 25 kB."""

_MAGIC = 0xDB4775248B80FB57.to_bytes(8, "little")
_FOOTER, _TRAILER = 48, 5  # bytes at the end of the file; after each block: its compression and its checksum
_REFERENCES = 100  # from here on the numbers of types are those of references, which no file contains
_SLICE_KEY = b"\0"  # how the keys begin under which the parts of a partitioned variable are stored


class IndexFault(ValueError):
    """An index is damaged, or does not belong to the data files."""


class Variable(NamedTuple):
    """The shape and type of a variable."""

    shape: tuple[int, ...]
    dtype: tf.DType


def read_index(prefix: str) -> dict[str, Variable]:
    """Return every variable of the checkpoint at `prefix` by its name.

    Raises
    ------
    IndexFault
        The index is damaged, or a tensor is not where the index says.
    OSError
        The index cannot be read.
    """
    path = Path(f"{prefix}.index")
    if path.stat().st_size > MAX_BYTES:
        raise IndexFault(f"it is larger than {MAX_BYTES >> 20} MB")
    try:
        return _variables(prefix, list(_table(path.read_bytes())))
    except (IndexError, DecodeError, UnicodeDecodeError, OverflowError) as error:
        raise IndexFault("it is truncated or damaged") from error


def _table(content: bytes) -> Iterator[tuple[bytes, bytes]]:
    """Yield the keys and values of a table in order."""
    if content[-8:] != _MAGIC or len(content) < _FOOTER:
        raise IndexFault("it is not the index of a TensorFlow checkpoint, or truncated")
    footer, limit = content[-_FOOTER:], len(content) - _FOOTER
    offset, size, at = _handle(footer, 0)
    list(_entries(_block(content, offset, size, limit)))  # of filters, which checkpoints do not have
    index_offset, index_size, _ = _handle(footer, at)
    last, end = None, 0
    for separator, value in _entries(_block(content, index_offset, index_size, limit)):
        offset, size, _ = _handle(value, 0)
        if offset < end:
            raise IndexFault("its blocks overlap")
        end = offset + size
        for key, entry in _entries(_block(content, offset, size, limit)):
            if last is not None and key <= last:
                raise IndexFault("its keys are not sorted")
            last = key
            yield key, entry
        if last is None or separator < last:
            raise IndexFault("its keys are not sorted")
        last = separator if separator > last else last


def _block(content: bytes, offset: int, size: int, limit: int) -> bytes:
    """Return a block of the table, if it is inside the file and has its checksum."""
    end = offset + size + _TRAILER
    if end > limit:
        raise IndexFault("a block is outside the file")
    block, trailer = content[offset : offset + size], content[offset + size : end]
    if trailer[0]:
        raise IndexFault("it is compressed, which TensorFlow's checkpoints are not")
    crc = crc32c(block + trailer[:1])
    masked = ((crc >> 15 | crc << 17) + 0xA282EAD8) & 0xFFFFFFFF
    if masked != int.from_bytes(trailer[1:], "little"):
        raise IndexFault("a checksum is wrong")
    return block


def _entries(block: bytes) -> Iterator[tuple[bytes, bytes]]:
    """Yield the keys and values of a block. A key is stored without what it has in common with the key before."""
    n_restarts = int.from_bytes(block[-4:], "little")
    end = len(block) - 4 - 4 * n_restarts
    if len(block) < 4 or end < 0 or not n_restarts:
        raise IndexFault("a block is damaged")
    restarts = [int.from_bytes(block[i : i + 4], "little") for i in range(end, len(block) - 4, 4)]
    at, key, whole_keys = 0, b"", {0}
    while at < end:
        start = at
        n_shared, at = _varint(block, at)
        n_own, at = _varint(block, at)
        n_value, at = _varint(block, at)
        if n_shared > len(key) or at + n_own + n_value > end:
            raise IndexFault("a block is damaged")
        if not n_shared:
            whole_keys.add(start)
        key = key[:n_shared] + block[at : at + n_own]
        at += n_own + n_value
        yield key, block[at - n_value : at]
    if restarts[0] != 0 or sorted(set(restarts)) != restarts or not whole_keys.issuperset(restarts):
        raise IndexFault("a block is damaged")


def _handle(content: bytes, at: int) -> tuple[int, int, int]:
    """Return the offset and the size of a block, and where the next number begins."""
    offset, at = _varint(content, at)
    size, at = _varint(content, at)
    return offset, size, at


def _varint(content: bytes, at: int) -> tuple[int, int]:
    """Return a number, of which each byte has seven bits, the lowest first; and where the next one begins."""
    value = 0
    for shift in range(0, 64, 7):
        byte = content[at]
        at += 1
        value |= (byte & 127) << shift
        if byte < 128:
            return value, at
    raise IndexFault("a number in it is too long")


def _variables(prefix: str, table: list[tuple[bytes, bytes]]) -> dict[str, Variable]:
    """Check every entry of the table; return the variables."""
    if not table or table[0][0]:
        raise IndexFault("it has no header")
    header = BundleHeaderProto.FromString(table[0][1])
    if header.endianness != BundleHeaderProto.LITTLE:
        raise IndexFault("its numbers are big-endian")
    variables: dict[str, Variable] = {}
    extents: list[tuple[int, int, int]] = []  # shard, first byte, byte after the last
    for key, value in table[1:]:
        entry = BundleEntryProto.FromString(value)
        is_slice = key.startswith(_SLICE_KEY)
        name = repr(key) if is_slice else key.decode()
        variable = _variable(name, entry)
        if entry.slices:
            _check_slices(name, entry, variable.shape)
        else:
            if not 0 <= entry.shard_id < header.num_shards:
                raise IndexFault(f"{name} is in shard {entry.shard_id} of {header.num_shards}")
            n_bytes = math.prod(variable.shape) * variable.dtype.size
            if entry.offset < 0 or entry.size < 0 or (_has_fixed_size(variable.dtype) and entry.size != n_bytes):
                raise IndexFault(f"{name} has {entry.size} bytes, but its shape and type need {n_bytes}")
            extents.append((entry.shard_id, entry.offset, entry.offset + entry.size))
        if not is_slice:
            variables[name] = variable
    _check_extents(prefix, header.num_shards, sorted(extents))
    return variables


def _variable(name: str, entry: BundleEntryProto) -> Variable:
    if entry.shape.unknown_rank or len(entry.shape.dim) > 254:
        raise IndexFault(f"{name} has no usable shape")
    shape = tuple(dim.size for dim in entry.shape.dim)
    if min(shape, default=0) < 0 or math.prod(size or 1 for size in shape) >= 1 << 60:
        raise IndexFault(f"{name} has shape {list(shape)[:8]}")
    try:
        return Variable(shape, tf.as_dtype(entry.dtype if entry.dtype < _REFERENCES else -1))
    except TypeError as error:
        raise IndexFault(f"{name} has the unknown type {entry.dtype}") from error


def _has_fixed_size(dtype: tf.DType) -> bool:
    return dtype not in (tf.string, tf.variant, tf.resource)


def _check_slices(name: str, entry: BundleEntryProto, shape: tuple[int, ...]) -> None:
    """Check where the parts of a partitioned variable begin and end."""
    slices = set()
    for part in entry.slices:
        if len(part.extent) != len(shape):
            raise IndexFault(f"a part of {name} has {len(part.extent)} axes, but the variable has {len(shape)}")
        for extent, size in zip(part.extent, shape, strict=True):
            # Without a length, the part has the whole axis.
            length = extent.length if extent.HasField("length") else size
            whole = not extent.HasField("length")
            if extent.start < 0 or (whole and extent.start) or length < 0 or extent.start + length > size:
                raise IndexFault(f"a part of {name} is outside the variable")
        slices.add(tuple((extent.start, extent.length) for extent in part.extent))
    if len(slices) < len(entry.slices):
        raise IndexFault(f"a part of {name} occurs twice")


def _check_extents(prefix: str, n_shards: int, extents: list[tuple[int, int, int]]) -> None:
    """Check that every tensor is inside a data file, and that no two overlap."""
    shard, end, n_bytes, path = -1, 0, 0, Path()
    for number, start, after in extents:
        if number != shard:
            path = Path(f"{prefix}.data-{number:05d}-of-{n_shards:05d}")
            if not path.is_file():
                raise IndexFault(f"{path.name} is missing")
            shard, end, n_bytes = number, 0, path.stat().st_size
        if start < end:
            raise IndexFault("two tensors overlap")
        if after > n_bytes:
            raise IndexFault(
                f"{path.name} has {n_bytes:,} bytes, but a tensor ends at byte {after:,}: it is truncated or damaged"
            )
        end = max(end, after)


def crc32c(content: bytes) -> int:
    """Return the CRC-32C (Castagnoli) of `content`.

    >>> hex(crc32c(b"123456789"))
    '0xe3069283'
    """
    crc = 0xFFFFFFFF
    for byte in content:
        crc = crc >> 8 ^ _CRC_TABLE[(crc ^ byte) & 255]
    return crc ^ 0xFFFFFFFF


def _crc_of_byte(byte: int) -> int:
    for _ in range(8):
        byte = byte >> 1 ^ (0x82F63B78 if byte & 1 else 0)
    return byte


_CRC_TABLE = [_crc_of_byte(byte) for byte in range(256)]

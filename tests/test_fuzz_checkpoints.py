"""Damaged and hostile checkpoints: no alteration ends the process, and none changes a weight without an error.

`make test-fuzz` runs it. The files are altered and read in a child process, so that the end of that process is seen.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

TESTS = Path(__file__).parent
N = 300
NAMES = {"index": "model.ckpt-7.index", "data": "model.ckpt-7.data-00000-of-00001"}


@pytest.mark.fuzz
@pytest.mark.parametrize("checksums", ["kept", "corrected"])
@pytest.mark.parametrize("file", ["index", "data"])
def test_no_alteration_of_a_checkpoint_crashes_or_goes_unnoticed(file, checksums, tmp_path):
    command = [sys.executable, __file__, str(tmp_path), file, checksums]
    done = subprocess.run(command, capture_output=True, text=True, cwd=TESTS, timeout=900)
    assert done.returncode == 0, f"{done.stdout[-300:]}{done.stderr[-3000:]}"
    outcomes = Counter(json.loads(done.stdout.splitlines()[-1]))
    print(f"\n.{file}, checksums {checksums}: tried {outcomes.total()}, {dict(outcomes)}")
    assert outcomes.total() == N
    assert not outcomes["changed"]
    assert not outcomes["refused in several lines"]
    assert outcomes["refused"] or checksums == "corrected"


def altered_bytes(content: bytes, rng: np.random.Generator) -> bytes:
    """Change, delete, insert or repeat some bytes, or cut the end off."""
    changed, kind = bytearray(content), rng.integers(6)
    at = int(rng.integers(len(changed)))
    n = int(rng.integers(1, 9))
    if kind <= 1:
        for _ in range(n):
            changed[rng.integers(len(changed))] = rng.integers(256)
    elif kind == 2:
        changed[at] ^= 1 << int(rng.integers(8))
    elif kind == 3:
        del changed[at : at + n]
    elif kind == 4:
        changed[at:at] = rng.bytes(n) if n < 5 else changed[at : at + n]
    else:
        del changed[at:]
    return bytes(changed)


def masked_crc(block: bytes) -> bytes:
    from cascade_lab.bert.checkpoint_index import crc32c

    crc = crc32c(block)
    return (((crc >> 15 | crc << 17) + 0xA282EAD8) & 0xFFFFFFFF).to_bytes(4, "little")


def varint(value: int) -> bytes:
    value &= (1 << 64) - 1
    parts = []
    while value > 127:
        parts.append(value & 127 | 128)
        value >>= 7
    return bytes([*parts, value])


def block_of(entries: list[tuple[bytes, bytes]]) -> bytes:
    """Return a block of a table, with every key whole, and its compression and checksum."""
    content, restarts = b"", []
    for key, value in entries:
        restarts.append(len(content).to_bytes(4, "little"))
        content += varint(0) + varint(len(key)) + varint(len(value)) + key + value
    content += b"".join(restarts or [bytes(4)]) + max(len(restarts), 1).to_bytes(4, "little") + b"\0"
    return content + masked_crc(content)


def index_of(entries: list[tuple[bytes, bytes]]) -> bytes:
    """Return an `.index` with these entries in one block."""
    data, meta = block_of(entries), block_of([])
    handle = varint(0) + varint(len(data) - 5)
    blocks = block_of([(entries[-1][0] if entries else b"", handle)])
    footer = varint(len(data)) + varint(len(meta) - 5) + varint(len(data) + len(meta)) + varint(len(blocks) - 5)
    return data + meta + blocks + footer.ljust(40, b"\0") + bytes.fromhex("57fb808b247547db")


def altered_index(content: bytes, rng: np.random.Generator) -> bytes:
    """Alter a block and correct its checksum, or write the whole table again with altered entries."""
    from tensorflow.core.protobuf.tensor_bundle_pb2 import BundleEntryProto, BundleHeaderProto

    from cascade_lab.bert import checkpoint_index

    if rng.random() < 0.4:
        footer = content[-48:]
        *meta, at = checkpoint_index._handle(footer, 0)
        *blocks, _ = checkpoint_index._handle(footer, at)
        offset, size = [(0, meta[0] - 5), (0, meta[0] - 5), meta, blocks][rng.integers(4)]
        block = bytearray(content[offset : offset + size + 1])
        for _ in range(rng.integers(1, 4)):
            block[rng.integers(len(block))] = rng.integers(256) if rng.random() < 0.5 else rng.integers(6)
        return content[:offset] + bytes(block) + masked_crc(bytes(block)) + content[offset + size + 5 :]
    entries = list(checkpoint_index._table(content))
    at = int(rng.integers(0 if rng.random() < 0.2 else 1, len(entries)))
    key, value = entries[at]
    wild = int(rng.choice([-1, 0, 1, 2, 3, 7, 31, 33, 64, 100, 1 << 31, (1 << 62) + 1, (1 << 63) - 1, -(1 << 63)]))
    small = int(np.int32(wild & 0x7FFFFFFF))
    kind = int(rng.integers(9))
    if at == 0:
        header = BundleHeaderProto.FromString(value)
        header.num_shards, header.version.producer = small, small
        if kind < 4:
            header.version.min_consumer = small
        value = header.SerializeToString()
    elif kind == 0:
        value = altered_bytes(value, rng) if value else b"\xff"
    else:
        entry = BundleEntryProto.FromString(value)
        if kind == 1:
            entry.dtype = int(rng.integers(200))
        elif kind == 2 and entry.shape.dim:
            entry.shape.dim[0].size = wild
        elif kind == 3:
            entry.shape.dim.add(size=wild)
        elif kind == 4:
            entry.offset = wild
        elif kind == 5:
            entry.size = wild
        elif kind == 6:
            entry.shard_id = small
        elif kind == 7:
            for dim in entry.shape.dim:
                entry.slices.add().extent.add(start=wild, length=max(wild, 1)) if rng.random() < 0.5 else None
                entry.slices.add().extent.add(start=0, length=dim.size)
        else:
            entry.crc32c = int(rng.integers(1 << 32))
        value = entry.SerializeToString()
    if rng.random() < 0.15:
        key = altered_bytes(key or b"x", rng)
    entries[at] = key, value
    if rng.random() < 0.1:
        entries.insert(at, entries[int(rng.integers(len(entries)))])
    return index_of(entries)


def altered_pair(index: bytes, data: bytes, rng: np.random.Generator) -> tuple[bytes, bytes]:
    """Change bytes of the data, and write their checksums into the index."""
    from tensorflow.core.protobuf.tensor_bundle_pb2 import BundleEntryProto

    from cascade_lab.bert.checkpoint_index import _table

    changed = bytearray(data)
    for _ in range(rng.integers(1, 5)):
        changed[rng.integers(len(changed))] = rng.integers(256)
    entries = []
    for key, value in _table(index):
        if key:
            entry = BundleEntryProto.FromString(value)
            part = slice(entry.offset, entry.offset + entry.size)
            if changed[part] != data[part]:
                entry.crc32c = int.from_bytes(masked_crc(bytes(changed[part])), "little")
                value = entry.SerializeToString()
        entries.append((key, value))
    return index_of(entries), bytes(changed)


def expected_weights(index: bytes, data: bytes, names: list[str]) -> dict[str, np.ndarray]:
    """Return float32 variables as they are in the data, without TensorFlow's reader."""
    from tensorflow.core.protobuf.tensor_bundle_pb2 import BundleEntryProto

    from cascade_lab.bert.checkpoint_index import _table

    weights = {}
    for key, value in _table(index):
        if key.decode() in names:
            entry = BundleEntryProto.FromString(value)
            weight = np.frombuffer(data, np.float32, entry.size // 4, entry.offset)
            weights[key.decode()] = weight.reshape([dim.size for dim in entry.shape.dim])
    return weights


def outcome(folder: Path, expected: dict[str, np.ndarray]) -> str:
    from test_checkpoint_reader import stage_in

    from cascade_lab.bert.checkpoint import list_variables, read_checkpoint
    from cascade_lab.exceptions import CheckpointError

    try:
        list_variables(str(folder / "model.ckpt-7"))
        weights = read_checkpoint(stage_in(folder)).weights
    except CheckpointError as error:
        return "refused" if len(str(error).splitlines()) == 1 else "refused in several lines"
    assert weights.keys() == expected.keys()
    return "same" if all(np.array_equal(weights[name], expected[name]) for name in weights) else "changed"


def main(folder: Path, file: str, checksums: str) -> None:
    from helpers import write_checkpoint
    from test_checkpoint_reader import stage_in

    from cascade_lab.bert.checkpoint import read_checkpoint

    write_checkpoint(folder, 2, seed=1)
    index, data = ((folder / NAMES[name]).read_bytes() for name in ("index", "data"))
    names = list(read_checkpoint(stage_in(folder)).weights)
    rng = np.random.default_rng([ord(file[0]), ord(checksums[0])])
    outcomes: Counter[str] = Counter()
    for number in range(N):
        print(number, flush=True)
        changed_index, changed_data = index, data
        if checksums == "kept":
            changed_index = altered_bytes(index, rng) if file == "index" else index
            changed_data = altered_bytes(data, rng) if file == "data" else data
        elif file == "index":
            changed_index = altered_index(index, rng)
        else:
            changed_index, changed_data = altered_pair(index, data, rng)
        (folder / NAMES["index"]).write_bytes(changed_index)
        (folder / NAMES["data"]).write_bytes(changed_data)
        is_other_checkpoint = file == "data" and checksums == "corrected"
        expected = expected_weights(index, changed_data if is_other_checkpoint else data, names)
        outcomes[outcome(folder, expected)] += 1
    print(json.dumps(outcomes))


if __name__ == "__main__":
    main(Path(sys.argv[1]), *sys.argv[2:])

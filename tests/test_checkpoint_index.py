"""Indexes that would end TensorFlow's process, or show other values, are refused in one line."""

from __future__ import annotations

import numpy as np
import pytest
from helpers import write_checkpoint
from tensorflow.core.protobuf.tensor_bundle_pb2 import BundleEntryProto, BundleHeaderProto
from test_checkpoint_reader import refused, stage_in
from test_fuzz_checkpoints import NAMES, block_of, index_of

from cascade_lab.bert.checkpoint import list_variables, read_checkpoint
from cascade_lab.bert.checkpoint_index import MAX_BYTES, _table, read_index
from cascade_lab.bert.checkpoint_reader import CheckpointReader


@pytest.fixture(scope="module")
def original(tmp_path_factory):
    folder = tmp_path_factory.mktemp("original")
    write_checkpoint(folder, 2, seed=1)
    return folder


@pytest.fixture
def folder(original, tmp_path):
    for path in original.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    return tmp_path


def entries_of(folder):
    return dict(_table((folder / NAMES["index"]).read_bytes()))


def write(folder, entries) -> None:
    (folder / NAMES["index"]).write_bytes(index_of(list(entries.items() if isinstance(entries, dict) else entries)))


def change(folder, *, name=b"output_weights", **fields) -> None:
    """Change fields of one variable's entry; all checksums of the index stay right."""
    entries = entries_of(folder)
    entry = BundleEntryProto.FromString(entries[name])
    for field, value in fields.items():
        if field == "shape":
            del entry.shape.dim[:]
            for size in value:
                entry.shape.dim.add(size=size)
        elif field == "slices":
            for part in value:
                added = entry.slices.add()
                for start, length in part:
                    added.extent.add(start=start, length=length)
        else:
            setattr(entry, field, value)
    entries[name] = entry.SerializeToString()
    write(folder, entries)


def test_a_rewritten_index_is_read(folder):
    expected = read_checkpoint(stage_in(folder)).weights
    write(folder, entries_of(folder))
    for name, weight in read_checkpoint(stage_in(folder)).weights.items():
        np.testing.assert_array_equal(weight, expected[name])


def test_shapes_and_types_are_those_of_tensorflow(folder):
    import tensorflow as tf

    reader = tf.train.load_checkpoint(str(folder / "model.ckpt-7"))
    variables = read_index(str(folder / "model.ckpt-7"))
    assert {name: list(variable.shape) for name, variable in variables.items()} == reader.get_variable_to_shape_map()
    assert {name: variable.dtype for name, variable in variables.items()} == reader.get_variable_to_dtype_map()


def test_partitioned_variables_texts_and_shards_are_read(tmp_path):
    import tensorflow as tf

    tf1 = tf.compat.v1
    value = np.arange(30, dtype=np.float32).reshape(10, 3)
    with tf.Graph().as_default(), tf1.Session() as session:
        partitioner = tf1.fixed_size_partitioner(3)
        with tf1.variable_scope("", partitioner=partitioner):
            tf1.get_variable("w", [10, 3], initializer=lambda shape, **_: tf.constant(value)[: shape[0]] * 0 + 2)
        tf1.get_variable("text", initializer="abc")
        session.run(tf1.global_variables_initializer())
        tf1.train.Saver(sharded=True).save(session, str(tmp_path / "model.ckpt"))
    reader = CheckpointReader(str(tmp_path / "model.ckpt"))
    assert {name: variable.shape for name, variable in reader.variables.items()} == {"w": (10, 3), "text": ()}
    np.testing.assert_array_equal(reader.read("w"), np.full((10, 3), 2))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"shape": [-1, 32]}, "output_weights has shape [-1, 32]"),
        ({"shape": [1 << 62, 32]}, "output_weights has shape ["),
        ({"shape": [1 << 62, 0, 4]}, "output_weights has shape ["),
        ({"shape": [1] * 255}, "output_weights has no usable shape"),
        ({"shape": [3, 32]}, "output_weights has 256 bytes, but its shape and type need 384"),
        ({"shape": [32, 2]}, None),
        ({"size": 252}, "output_weights has 252 bytes, but its shape and type need 256"),
        ({"size": -256}, "output_weights has -256 bytes"),
        ({"dtype": 99}, "output_weights has the unknown type 99"),
        ({"dtype": 101}, "output_weights has the unknown type 101"),
        ({"dtype": 0}, "output_weights has the unknown type 0"),
        ({"dtype": 2}, "output_weights has 256 bytes, but its shape and type need 512"),
        ({"dtype": 3}, "output_weights has type int32, not float"),
        ({"shard_id": 7}, "output_weights is in shard 7 of 1"),
        ({"shard_id": -1}, "output_weights is in shard -1 of 1"),
        ({"offset": 1 << 62}, "it is truncated or damaged"),
        ({"offset": -8}, "output_weights has 256 bytes"),
        ({"offset": 0}, "two tensors overlap"),
        ({"crc32c": 1}, "Checksum does not match"),
        ({"slices": [[(0, 2)]]}, "a part of output_weights has 1 axes, but the variable has 2"),
        ({"slices": [[(-1, 2), (0, 32)]]}, "a part of output_weights is outside the variable"),
        ({"slices": [[(0, 3), (0, 32)]]}, "a part of output_weights is outside the variable"),
        ({"slices": [[(0, 1), (0, 32)]] * 2}, "a part of output_weights occurs twice"),
        ({"slices": [[(0, 2), (0, 32)]]}, "output_weights cannot be read"),
    ],
)
def test_entries_that_cannot_be_right_are_refused(folder, fields, message):
    change(folder, **fields)
    if message is None:
        # A head may be saved turned: this index says so, and only its own checksum could tell.
        assert list_variables(str(folder / "model.ckpt-7"))["output_weights"][0] == [32, 2]
    else:
        refused(lambda: read_checkpoint(stage_in(folder)), "model.ckpt-7", message)


def header(**fields) -> bytes:
    content = BundleHeaderProto(**{"num_shards": 1, **fields})
    content.version.producer = 1
    return content.SerializeToString()


@pytest.mark.parametrize(
    ("alter", "message"),
    [
        (lambda e: {k: v for k, v in e.items() if k}, "it has no header"),
        (lambda e: {}, "its keys are not sorted"),
        (lambda e: {**e, b"": b"\xff\xff"}, "it is truncated or damaged"),
        (lambda e: {**e, b"": header(endianness=1)}, "its numbers are big-endian"),
        (lambda e: {**e, b"": header(num_shards=0)}, "in shard 0 of 0"),
        (lambda e: {**e, b"": header(num_shards=2)}, "model.ckpt-7.data-00000-of-00002 is missing"),
        (lambda e: {**e, b"output_weights": b"\xff"}, "it is truncated or damaged"),
        (lambda e: {**e, b"z\xff": e[b"output_bias"]}, "it is truncated or damaged"),
        (lambda e: list(reversed(e.items())), "its keys are not sorted"),
        (lambda e: [*e.items(), list(e.items())[-1]], "its keys are not sorted"),
        (lambda e: {**e, b"z": e[b"output_bias"]}, "two tensors overlap"),
    ],
)
def test_tables_that_cannot_be_right_are_refused(folder, alter, message):
    write(folder, alter(entries_of(folder)))
    refused(lambda: read_checkpoint(stage_in(folder)), "model.ckpt-7.index: cannot be read (", message, "copy it again")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "it is not the index of a TensorFlow checkpoint"),
        (bytes(48), "it is not the index of a TensorFlow checkpoint"),
        (bytes.fromhex("57fb808b247547db"), "it is not the index of a TensorFlow checkpoint"),
        (b"\xff" * 40 + bytes.fromhex("57fb808b247547db"), "a number in it is too long"),
        (bytes(MAX_BYTES + 1), "it is larger than 16 MB"),
        (block_of([]) + bytes(40) + bytes.fromhex("57fb808b247547db"), "a checksum is wrong"),
    ],
)
def test_files_that_are_no_index_are_refused(folder, content, message):
    (folder / NAMES["index"]).write_bytes(content)
    refused(lambda: read_checkpoint(stage_in(folder)), "model.ckpt-7.index: cannot be read (", message)


def test_a_compressed_index_is_named(folder):
    content = bytearray((folder / NAMES["index"]).read_bytes())
    position = content.index(b"\0\0\0\0\x01\0\0\0\0", len(content) // 2) + 8  # the empty block's compression
    content[position] = 1
    (folder / NAMES["index"]).write_bytes(content)
    refused(lambda: read_checkpoint(stage_in(folder)), "it is compressed, which TensorFlow's checkpoints are not")


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"\xff\xfe",
        b"model_checkpoint_path: 3",
        b"{" * 100_000,
        b'model_checkpoint_path: "\\377\\000"',
        b'model_checkpoint_path: "' + b"x" * 5000 + b'"',
    ],
)
def test_a_damaged_file_checkpoint_is_refused(folder, content):
    (folder / "checkpoint").write_bytes(content)
    refused(lambda: read_checkpoint(stage_in(folder)), f"{folder / 'checkpoint'}: names no checkpoint (")


def test_a_file_checkpoint_with_a_byte_order_mark_and_escapes(folder):
    for name in NAMES.values():
        (folder / name).rename(folder / name.replace("model", "mödel"))
    (folder / "checkpoint").write_bytes(b'\xef\xbb\xbfmodel_checkpoint_path: "m\\303\\266del.ckpt-7"\n')
    assert read_checkpoint(stage_in(folder)).prefix == str(folder / "mödel.ckpt-7")

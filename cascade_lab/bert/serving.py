"""A stage as a SavedModel: what TensorFlow Serving, or any TensorFlow, loads without this package."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import tensorflow as tf

from cascade_lab.bert.checkpoint import read_checkpoint
from cascade_lab.bert.graph import classifier_graph
from cascade_lab.bert.writing import disk_errors, write_json, write_lines
from cascade_lab.spec import StageSpec
from cascade_lab.wholly import whole_directory

tf1 = tf.compat.v1

VERSION = "1"


def export_saved_model(stage: StageSpec, output: str | Path, *, overwrite: bool = False) -> Path:
    """Write a stage's graph and weights as a SavedModel.

    Its signature `serving_default` takes `input_ids`, `input_mask` and `segment_ids`, int32 of shape (n, length),
    and gives `logits` and `probabilities`, float32 of shape (n, num_labels).

    Parameters
    ----------
    stage : StageSpec
    output : path
        The directory to make, as TensorFlow Serving wants a model: version 1 lies in `output/1/`, and in its
        `assets.extra/` are `vocab.txt`, `labels.txt` and `bert_config.json`. It appears whole or not at all.
    overwrite : bool
        Replace the SavedModel that is there.

    Returns
    -------
    Path
        `output`.

    Raises
    ------
    CheckpointError
        The stage's files are not usable.
    CascadeLabError
        `output` exists already, or cannot be written.
    """
    output = Path(output)
    checkpoint = read_checkpoint(stage)
    ends = classifier_graph(
        checkpoint.config, len(stage.labels), output_weights=stage.output_weights, output_bias=stage.output_bias
    )
    inputs = {input_t.op.name: input_t for input_t in ends.inputs}
    sign = f"{VERSION}/saved_model.pb"
    with whole_directory(output, overwrite=overwrite, sign=sign, what="SavedModel") as made:
        with ends.graph.as_default(), tf1.Session(graph=ends.graph) as session:
            outputs = {"logits": ends.logits_t, "probabilities": tf.nn.softmax(ends.logits_t, name="probabilities")}
            ends.saver.restore(session, checkpoint.prefix)
            signature = tf1.saved_model.build_signature_def(
                {name: _info(end_t) for name, end_t in inputs.items()},
                {name: _info(end_t) for name, end_t in outputs.items()},
                tf1.saved_model.signature_constants.PREDICT_METHOD_NAME,
            )
            builder = tf1.saved_model.Builder(str(made / VERSION))
            with disk_errors():
                builder.add_meta_graph_and_variables(
                    session,
                    [tf1.saved_model.tag_constants.SERVING],
                    {tf1.saved_model.signature_constants.DEFAULT_SERVING_SIGNATURE_DEF_KEY: signature},
                    saver=ends.saver,
                    clear_devices=True,
                    strip_default_attrs=True,  # so that an older TensorFlow takes it
                )
                builder.save()
        extra = made / VERSION / "assets.extra"
        extra.mkdir()
        write_json(extra / "bert_config.json", checkpoint.config)
        write_lines(extra / "vocab.txt", checkpoint.vocab)
        write_lines(extra / "labels.txt", stage.labels)
    return output


def _info(end_t: tf.Tensor) -> Any:
    return tf1.TensorInfo(name=end_t.name, dtype=end_t.dtype.as_datatype_enum, tensor_shape=end_t.shape.as_proto())

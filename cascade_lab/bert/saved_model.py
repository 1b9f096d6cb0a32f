"""Writes a stage as a SavedModel, which TensorFlow Serving or any TensorFlow loads without this package."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from cascade_lab.atomic import to_json, whole_directory
from cascade_lab.bert.checkpoint import read_checkpoint
from cascade_lab.bert.graph import classifier_graph, set_weights
from cascade_lab.bert.quiet_tensorflow import tf
from cascade_lab.bert.writing import disk_errors, write_lines
from cascade_lab.spec import StageSpec

tf1 = tf.compat.v1

VERSION = "1"


def export_saved_model(stage: StageSpec, output: str | Path, *, overwrite: bool = False) -> Path:
    """Write a stage's graph and weights as a SavedModel.

    Its signature `serving_default` takes `input_ids`, `input_mask` and `segment_ids`, int32 of shape (n, length),
    and returns `logits` and `probabilities`, float32 of shape (n, num_labels). The probabilities are those of the
    stage, with its temperature or calibrator.

    Parameters
    ----------
    stage : StageSpec
    output : path
        The new directory, in the layout of TensorFlow Serving: version 1 is in `output/1/`. Its folder `assets.extra/`
        contains `vocab.txt`, `labels.txt` and `bert_config.json`. The directory appears whole or not at all.
    overwrite : bool
        Replace an existing SavedModel at `output`.

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
    classifier = classifier_graph(
        checkpoint.config, len(stage.labels), output_weights=stage.output_weights, output_bias=stage.output_bias
    )
    inputs = {input_t.op.name: input_t for input_t in classifier.inputs}
    marker = f"{VERSION}/saved_model.pb"
    with whole_directory(output, overwrite=overwrite, marker=marker, what="SavedModel") as directory:
        with classifier.graph.as_default(), tf1.Session(graph=classifier.graph) as session:
            logits_t = classifier.logits_t
            outputs = {"logits": logits_t, "probabilities": probabilities_t(stage, logits_t)}
            set_weights(session, checkpoint.weights)
            signature = tf1.saved_model.build_signature_def(
                {name: _tensor_info(input_t) for name, input_t in inputs.items()},
                {name: _tensor_info(output_t) for name, output_t in outputs.items()},
                tf1.saved_model.signature_constants.PREDICT_METHOD_NAME,
            )
            builder = tf1.saved_model.Builder(str(directory / VERSION))
            with disk_errors():
                builder.add_meta_graph_and_variables(
                    session,
                    [tf1.saved_model.tag_constants.SERVING],
                    {tf1.saved_model.signature_constants.DEFAULT_SERVING_SIGNATURE_DEF_KEY: signature},
                    saver=classifier.saver,
                    clear_devices=True,
                    strip_default_attrs=True,  # so that older versions of TensorFlow can load it
                )
                builder.save()
        extra = directory / VERSION / "assets.extra"
        extra.mkdir()
        (extra / "bert_config.json").write_text(to_json(checkpoint.config), encoding="utf-8")
        write_lines(extra / "vocab.txt", checkpoint.vocab)
        write_lines(extra / "labels.txt", stage.labels)
    return output


def probabilities_t(stage: StageSpec, logits_t: tf.Tensor) -> tf.Tensor:
    """Return what `decisions.probabilities` computes: in float64, and rounded to float32."""
    if stage.calibrator is None and stage.temperature == 1:
        return tf.nn.softmax(logits_t, name="probabilities")
    z_t = tf.cast(logits_t, tf.float64)
    if stage.calibrator is None:
        z_t = (z_t - tf.reduce_max(z_t, axis=1, keepdims=True)) / stage.temperature
    elif stage.is_gate:
        z_t = _calibrated_gate_t(stage, z_t)
    else:
        values = stage.calibrator.parameters
        z_t = z_t * tf.constant(values["weights"], tf.float64) + tf.constant(values["biases"], tf.float64)
    return tf.cast(tf.nn.softmax(z_t), tf.float32, name="probabilities")


def _calibrated_gate_t(stage: StageSpec, z_t: tf.Tensor) -> tf.Tensor:
    """Return the logits that a gate's calibrator gives, as `calibrator.calibrated_logits` does."""
    assert stage.calibrator is not None
    column, n_labels = stage.labels.index(str(stage.pass_label)), len(stage.labels)
    is_pass = [i == column for i in range(n_labels)]
    others_t = tf.boolean_mask(z_t, [not passes for passes in is_pass], axis=1)
    log_sum_t = tf.reduce_logsumexp(others_t, axis=1, keepdims=True)
    s_t = z_t[:, column : column + 1] - log_sum_t
    method, values = stage.calibrator.method, stage.calibrator.parameters
    if method == "platt":
        passes_t = values["weight"] * s_t + values["bias"]
    elif method == "beta":
        passes_t = -values["a"] * tf.nn.softplus(-s_t) + values["b"] * tf.nn.softplus(s_t) + values["c"]
    else:  # isotonic: the sum of the rises of the segments before s
        x, p = (tf.constant(values[key], tf.float64) for key in ("log_odds", "probabilities"))
        rises_t = tf.clip_by_value((s_t - x[:-1]) / (x[1:] - x[:-1]), 0.0, 1.0) * (p[1:] - p[:-1])
        p_t = p[0] + tf.reduce_sum(rises_t, axis=1, keepdims=True)
        passes_t = tf.math.log(p_t) - tf.math.log1p(-p_t)
    return tf.where(tf.constant([is_pass]), passes_t, z_t - log_sum_t)


def _tensor_info(tensor_t: tf.Tensor) -> Any:
    return tf1.TensorInfo(
        name=tensor_t.name, dtype=tensor_t.dtype.as_datatype_enum, tensor_shape=tensor_t.shape.as_proto()
    )

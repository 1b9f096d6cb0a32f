"""bert-tensorflow's own `modeling` and `tokenization`, running under TensorFlow 2.

Written for TensorFlow 1, they import `tensorflow.contrib`, call a Keras 2 layer, and define a process-wide
absl flag. Each is executed here as a private module whose few outdated imports are answered by stand-ins, so
that `sys.modules`, the environment, absl's flags and the caller's TensorFlow stay as they were.
"""

from __future__ import annotations

import builtins
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import tensorflow as tf

tf1 = tf.compat.v1


def _layer_norm(inputs: Any, begin_norm_axis: int, begin_params_axis: int, scope: str | None) -> Any:
    """Stand in for `tf.contrib.layers.layer_norm` over the last axis (its epsilon was 1e-12)."""
    with tf1.variable_scope(scope, default_name="LayerNorm"):
        size = inputs.shape[-1:]
        gamma = tf1.get_variable("gamma", size, initializer=tf1.ones_initializer())
        beta = tf1.get_variable("beta", size, initializer=tf1.zeros_initializer())
        mean, variance = tf.nn.moments(inputs, axes=[-1], keepdims=True)
        return tf.nn.batch_normalization(inputs, mean, variance, beta, gamma, variance_epsilon=1e-12)


def _dense(inputs: Any, units: int, activation: Any, kernel_initializer: Any) -> Any:
    """Stand in for `tf.layers.dense` on a matrix, which TensorFlow 2 has only with Keras 2."""
    with tf1.variable_scope(None, default_name="dense"):
        kernel = tf1.get_variable("kernel", [inputs.shape[-1], units], initializer=kernel_initializer)
        bias = tf1.get_variable("bias", [units], initializer=tf1.zeros_initializer())
        return activation(tf.matmul(inputs, kernel) + bias)


class _TensorFlow1:
    """`tf.compat.v1` with `layers.dense` replaced."""

    layers = SimpleNamespace(dense=_dense)

    def __getattr__(self, name: str) -> Any:
        return getattr(tf1, name)


# What `import a.b.c as x` and `from a import x` find, by the name that is imported.
_STAND_INS = {
    "tensorflow.compat.v1": SimpleNamespace(compat=SimpleNamespace(v1=_TensorFlow1())),
    "tensorflow.contrib": SimpleNamespace(layers=SimpleNamespace(layer_norm=_layer_norm)),
    "absl": SimpleNamespace(
        flags=SimpleNamespace(FLAGS=SimpleNamespace(preserve_unused_tokens=False), DEFINE_bool=lambda *args: None)
    ),
}


def _import(name: str, *args: Any, **kwargs: Any) -> Any:
    return _STAND_INS.get(name) or builtins.__import__(name, *args, **kwargs)


@cache
def load(name: str) -> ModuleType:
    """Return a private copy of bert-tensorflow's module `name`: `"modeling"` or `"tokenization"`."""
    package = find_spec("bert")
    path = Path(package.submodule_search_locations[0]) / f"{name}.py"
    module = ModuleType(f"{__name__}.{name}")
    module.__dict__["__builtins__"] = {**vars(builtins), "__import__": _import}
    exec(compile(path.read_text(encoding="utf-8"), str(path), "exec"), module.__dict__)
    return module

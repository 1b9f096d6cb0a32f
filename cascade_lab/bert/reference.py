"""Loads bert-tensorflow's own `modeling` and `tokenization` so that they run under TensorFlow 2.

They were written for TensorFlow 1: they import `tensorflow.contrib`, call a layer of Keras 2, and define a process-wide
absl flag. Here each is executed as a private module, and its few outdated imports get stand-ins. So `sys.modules`, the
environment, absl's flags and the TensorFlow of the caller do not change.
"""

from __future__ import annotations

import builtins
from collections.abc import Callable
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

from cascade_lab.bert.quiet_tensorflow import tf

tf1 = tf.compat.v1


def _layer_norm(epsilon: float) -> Callable[..., Any]:
    """Return a stand-in for `tf.contrib.layers.layer_norm` over the last axis (whose epsilon was always 1e-12)."""

    def layer_norm(inputs: Any, begin_norm_axis: int, begin_params_axis: int, scope: str | None) -> Any:
        with tf1.variable_scope(scope, default_name="LayerNorm"):
            size = inputs.shape[-1:]
            gamma = tf1.get_variable("gamma", size, initializer=tf1.ones_initializer())
            beta = tf1.get_variable("beta", size, initializer=tf1.zeros_initializer())
            mean, variance = tf.nn.moments(inputs, axes=[-1], keepdims=True)
            return tf.nn.batch_normalization(inputs, mean, variance, beta, gamma, variance_epsilon=epsilon)

    return layer_norm


def _dense(inputs: Any, units: int, activation: Any, kernel_initializer: Any) -> Any:
    """Stand in for `tf.layers.dense` on a matrix; TensorFlow 2 has that only together with Keras 2."""
    with tf1.variable_scope(None, default_name="dense"):
        kernel = tf1.get_variable("kernel", [inputs.shape[-1], units], initializer=kernel_initializer)
        bias = tf1.get_variable("bias", [units], initializer=tf1.zeros_initializer())
        return activation(tf.matmul(inputs, kernel) + bias)


DROPOUT_SEED = "cascade_lab/dropout_seed"
"""The collection in which a training graph keeps its dropout seed, an int32 tensor of shape (2,)."""


def _dropout(inputs: Any, rate: float) -> Any:
    """Stand in for `tf.nn.dropout`, with masks that depend only on the seed that the graph is fed.

    The original draws from a generator whose state ends with the session: a resumed training would get other masks than
    an uninterrupted one.
    """
    graph = tf1.get_default_graph()
    (seed_t,) = graph.get_collection(DROPOUT_SEED)
    graph.add_to_collection(f"{DROPOUT_SEED}/uses", None)
    layer = len(graph.get_collection(f"{DROPOUT_SEED}/uses"))  # every dropout of the graph gets its own masks
    return tf.nn.experimental.stateless_dropout(inputs, rate, seed=seed_t + tf.constant([layer << 20, 0]))


class _Proxy:
    """A module in which some names are replaced."""

    def __init__(self, module: Any, **replaced: Any):
        self._module = module
        self.__dict__.update(replaced)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._module, name)


_TENSORFLOW_1 = _Proxy(tf1, layers=SimpleNamespace(dense=_dense), nn=_Proxy(tf1.nn, dropout=_dropout))
_FLAGS = SimpleNamespace(preserve_unused_tokens=False)


@cache
def load(name: str, *, layer_norm_eps: float = 1e-12) -> ModuleType:
    """Return a private copy of bert-tensorflow's module `name`, such as `modeling`."""
    # Maps the name in an import statement to what the statement gets (`import a.b.c as x`, `from a import x`).
    stand_ins = {
        "tensorflow.compat.v1": SimpleNamespace(compat=SimpleNamespace(v1=_TENSORFLOW_1)),
        "tensorflow.contrib": SimpleNamespace(layers=SimpleNamespace(layer_norm=_layer_norm(layer_norm_eps))),
        "absl": SimpleNamespace(flags=SimpleNamespace(FLAGS=_FLAGS, DEFINE_bool=lambda *args: None)),
    }

    def import_(name: str, *args: Any, **kwargs: Any) -> Any:
        return stand_ins.get(name) or builtins.__import__(name, *args, **kwargs)

    package = find_spec("bert")
    if package is None or not package.submodule_search_locations:
        raise ModuleNotFoundError("bert-tensorflow is not installed; install bert-tensorflow==1.0.4")
    path = Path(package.submodule_search_locations[0]) / f"{name}.py"
    module = ModuleType(f"{__name__}.{name}")
    module.__dict__["__builtins__"] = {**vars(builtins), "__import__": import_}
    exec(compile(path.read_text(encoding="utf-8"), str(path), "exec"), module.__dict__)
    return module

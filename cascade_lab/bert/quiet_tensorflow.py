"""Imports TensorFlow without its messages on stderr; every other module takes it from here.

TensorFlow writes to file descriptor 2 while it is imported, before it reads any setting that would silence it. So the
descriptor itself is redirected meanwhile. Afterwards TensorFlow's log shows errors only. Set `TF_CPP_MIN_LOG_LEVEL` to
a number below 3 to see everything, as `--debug` does.
"""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager

_LEVEL = "TF_CPP_MIN_LOG_LEVEL"


@contextmanager
def _quiet() -> Iterator[None]:
    """Send file descriptor 2 nowhere meanwhile, and let TensorFlow read that it shall log errors only."""
    level = os.environ.get(_LEVEL)
    if level is not None and level < "3":
        yield
        return
    logging.getLogger("tensorflow").setLevel(logging.ERROR)  # its warnings are about functions that it deprecates
    try:
        stderr_copy = os.dup(2)
    except OSError:  # closed, as in a process without a console
        yield
        return
    if sys.stderr is not None:
        sys.stderr.flush()
    os.environ[_LEVEL] = "3"
    with open(os.devnull, "w") as devnull:
        os.dup2(devnull.fileno(), 2)
        try:
            yield
        finally:
            # In a notebook's kernel the import itself has set the level to INFO, and the target to stdout.
            logging.getLogger("tensorflow").setLevel(logging.ERROR)
            os.dup2(stderr_copy, 2)
            os.close(stderr_copy)
            if level is None:
                del os.environ[_LEVEL]  # it has been read, and is the caller's


with _quiet():
    import tensorflow as tf
    from tensorflow.core.framework.attr_value_pb2 import AttrValue
    from tensorflow.core.protobuf.config_pb2 import CallableOptions
    from tensorflow.core.protobuf.tensor_bundle_pb2 import BundleEntryProto, BundleHeaderProto
    from tensorflow.python.framework import kernels

__all__ = ["AttrValue", "BundleEntryProto", "BundleHeaderProto", "CallableOptions", "kernels", "tf"]

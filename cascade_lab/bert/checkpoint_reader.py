"""Finds a TensorFlow checkpoint in a directory and reads its variables, whatever letters its path has."""

from __future__ import annotations

import re
import tempfile
import warnings
from glob import escape
from pathlib import Path

import numpy as np
import tensorflow as tf

from cascade_lab.exceptions import CheckpointError


class CheckpointWarning(UserWarning):
    """A checkpoint is read, but from another place than one of its files names."""


def checkpoint_in(folder: Path) -> str:
    """Return the prefix of the checkpoint in a directory; see `find_checkpoint`."""
    # latest_checkpoint would take letters of the path as a pattern.
    state = tf.train.get_checkpoint_state(str(folder))
    named = Path(state.model_checkpoint_path) if state is not None and state.model_checkpoint_path else None
    if named is not None:
        is_inside = named.resolve().is_relative_to(folder.resolve())
        for prefix in [named] if is_inside else [folder / named.name, named]:
            if Path(f"{prefix}.index").is_file():
                if not is_inside:
                    warnings.warn(
                        f"{folder / 'checkpoint'} names a checkpoint in another directory ({named}); read was {prefix}",
                        CheckpointWarning,
                        stacklevel=4,
                    )
                return str(prefix)
    prefixes = sorted(str(index.with_suffix("")) for index in folder.iterdir() if index.name.endswith(".index"))
    if named is None and len(prefixes) == 1:
        return prefixes[0]
    if not prefixes and (folder / "model.safetensors").exists():
        raise CheckpointError(f"{folder}: is a Hugging Face directory; convert it with cascade-lab import-hf")
    problem = "is missing" if named is None else f"names {named}, which does not exist"
    way_out = "give a directory with a checkpoint, or a prefix such as model.ckpt-1000"
    if prefixes:
        way_out = f"give the prefix that you mean, such as {prefixes[-1]}"
    raise CheckpointError(f"{folder}: contains no checkpoint: its file 'checkpoint' {problem}; {way_out}")


class CheckpointReader:
    """Reads the variables of a checkpoint. Its methods are those of TensorFlow's reader.

    Parameters
    ----------
    prefix : str
        TensorFlow's reader takes the letters `*?[]\\` for a pattern, so a path with one of them is read through
        symbolic links in a temporary directory, which is deleted together with this object.

    Raises
    ------
    CheckpointError
        The checkpoint cannot be read.
    """

    def __init__(self, prefix: str):
        self.prefix = prefix
        try:
            readable = self._linked(prefix) if re.search(r"[*?\[\]\\]", prefix) else prefix
            reader = tf.train.load_checkpoint(readable)
        except OSError as error:
            raise CheckpointError(
                f"{prefix}: cannot be linked to a path without *, ?, [, ] and \\ ({error.strerror}), which TensorFlow "
                "takes for a pattern; rename the directory"
            ) from error
        except (tf.errors.OpError, ValueError, IndexError) as error:
            raise CheckpointError(f"{prefix}.index: cannot be read ({_first_line(error)}); copy it again") from error
        self.get_variable_to_shape_map = reader.get_variable_to_shape_map
        self.get_variable_to_dtype_map = reader.get_variable_to_dtype_map
        self.get_tensor = reader.get_tensor

    def read_float32(self, name: str, *, where: str = "") -> np.ndarray:
        """Return a variable as float32. `where` is the beginning of an error's message.

        Raises
        ------
        CheckpointError
            The variable is not of floats, cannot be read, or holds NaN or infinity.
        """
        where = f"{where}{self.prefix}: {name}"
        dtype = self.get_variable_to_dtype_map()[name]
        if not dtype.is_floating:
            raise CheckpointError(f"{where} has type {dtype.name}, not float; save it as float32")
        try:
            tensor = self.get_tensor(name)
        except (tf.errors.OpError, ValueError, IndexError) as error:
            raise CheckpointError(
                f"{where} cannot be read ({_first_line(error)}): the file is truncated or damaged; copy it again"
            ) from error
        return finite_float32(tensor, where)

    def _linked(self, prefix: str) -> str:
        self._links = tempfile.TemporaryDirectory(prefix="cascade-lab-")
        for path in sorted(Path(prefix).parent.glob(f"{escape(Path(prefix).name)}.[di]*")):
            ending = path.name.removeprefix(Path(prefix).name)
            (Path(self._links.name) / f"model.ckpt{ending}").symlink_to(path.resolve())
        return str(Path(self._links.name) / "model.ckpt")


def finite_float32(tensor: np.ndarray, where: str) -> np.ndarray:
    """Return a tensor as float32; raise CheckpointError if it holds NaN or infinity, or what float32 cannot hold."""
    with np.errstate(over="ignore", invalid="ignore"):
        weight = tensor.astype(np.float32, copy=False)
    is_finite = np.isfinite(weight)
    if not is_finite.all():
        n_bad = int((~is_finite).sum())
        raise CheckpointError(
            f"{where} holds NaN or infinity in {n_bad} of {weight.size} places: the training diverged; take an earlier "
            "checkpoint"
        )
    return weight


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0][:160]

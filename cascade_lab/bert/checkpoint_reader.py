"""Finds a TensorFlow checkpoint in a directory and reads its variables, whatever letters its path has."""

from __future__ import annotations

import re
import tempfile
import warnings
from collections.abc import Sequence
from glob import escape
from pathlib import Path

import numpy as np
from google.protobuf.text_encoding import CUnescape

from cascade_lab.bert.checkpoint_index import IndexFault, read_index
from cascade_lab.bert.quiet_tensorflow import tf
from cascade_lab.exceptions import CheckpointError, CheckpointWarning

_HUGGING_FACE = ("model.safetensors", "model.safetensors.index.json", "pytorch_model.bin", "tf_model.h5")


def checkpoint_in(folder: Path) -> str:
    """Return the prefix of the checkpoint in a directory; see `find_checkpoint`."""
    named = _named_checkpoint(folder)
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
    if not prefixes and any((folder / name).exists() for name in _HUGGING_FACE):
        raise CheckpointError(f"{folder}: is a Hugging Face directory; convert it with cascade-lab import-hf")
    problem = "is missing" if named is None else f"names {named}, which does not exist"
    raise CheckpointError(f"{folder}: contains no checkpoint: its file 'checkpoint' {problem}; {_way_out(prefixes)}")


def _way_out(prefixes: Sequence[str]) -> str:
    if prefixes:
        return f"give the prefix that you mean, such as {prefixes[-1]}"
    return "give a directory with a checkpoint, or a prefix such as model.ckpt-1000"


def _named_checkpoint(folder: Path) -> Path | None:
    """Return the path in a directory's file `checkpoint`; None if there is no such file.

    TensorFlow's own function raises other errors for a damaged file, or takes it as missing.
    """
    path = folder / "checkpoint"
    if not path.exists():
        return None
    try:
        text = path.read_bytes().decode("utf-8-sig")
        (quoted,) = re.findall(r'^\s*model_checkpoint_path\s*:\s*"((?:[^"\\\n]|\\.)*)"', text, re.MULTILINE)[:1]
        name = CUnescape(quoted).decode()
        Path(f"{folder / name}.index").is_file()  # raises where no path can have this name
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is empty or damaged"
        raise CheckpointError(
            f"{path}: names no checkpoint ({reason}); write it again, or give the prefix of a checkpoint"
        ) from error
    return folder / name


class CheckpointReader:
    """Reads the variables of a checkpoint.

    The index is parsed and checked first: TensorFlow's reader would end the process on some damaged ones.

    Parameters
    ----------
    prefix : str
        TensorFlow's reader takes the letters `*?[]\\` for a pattern, so a path with one of them is read through
        symbolic links in a temporary directory, which is deleted together with this object.

    Attributes
    ----------
    variables : dict of str to Variable
        The shape and the type of every variable, by name.

    Raises
    ------
    CheckpointError
        The checkpoint cannot be read.
    """

    def __init__(self, prefix: str):
        self.prefix = prefix
        try:
            self.variables = read_index(prefix)
            readable = self._linked(prefix) if re.search(r"[*?\[\]\\]", prefix) else prefix
            self._reader = tf.train.load_checkpoint(readable)
        except (IndexFault, OSError, tf.errors.OpError, ValueError, IndexError) as error:
            reason = error.strerror if isinstance(error, OSError) else _first_line(error)
            raise CheckpointError(f"{prefix}.index: cannot be read ({reason}); copy it again") from error

    def read(self, name: str, *, where: str = "") -> np.ndarray:
        """Return a variable. `where` is the beginning of an error's message.

        Raises
        ------
        CheckpointError
            The checkpoint lacks it, or it cannot be read.
        """
        try:
            tensor: np.ndarray = self._reader.get_tensor(name)
        except (tf.errors.OpError, ValueError, IndexError) as error:
            raise CheckpointError(
                f"{where}{self.prefix}: {name} cannot be read ({_first_line(error)}): the file is truncated or "
                "damaged; copy it again"
            ) from error
        return tensor

    def read_float32(self, name: str, *, where: str = "") -> np.ndarray:
        """Return a variable as float32. `where` is the beginning of an error's message.

        Raises
        ------
        CheckpointError
            The variable is not of floats, cannot be read, or holds NaN or infinity.
        """
        dtype = self.variables[name].dtype
        if not dtype.is_floating:
            raise CheckpointError(f"{where}{self.prefix}: {name} has type {dtype.name}, not float; save it as float32")
        return finite_float32(self.read(name, where=where), f"{where}{self.prefix}: {name}")

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

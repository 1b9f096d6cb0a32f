"""Saves an unfinished training, so that it continues after an interruption."""

from __future__ import annotations

import json
import re
import shutil
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from cascade_lab.atomic import locked_output, put_in_place, to_json, unfinished_path, write_text
from cascade_lab.bert.checkpoint import checkpoint_files, find_checkpoint
from cascade_lab.bert.checkpoint_reader import CheckpointReader
from cascade_lab.bert.graph import set_weights
from cascade_lab.bert.quiet_tensorflow import tf
from cascade_lab.bert.writing import disk_errors, write_lines
from cascade_lab.exceptions import CheckpointError, CheckpointWarning, TrainingError
from cascade_lab.json_files import check_keys, read_object
from cascade_lab.provenance import sha256

tf1 = tf.compat.v1

TRAINING_DIRECTORY: Any = {"marker": "training.json", "what": "training", "error": TrainingError}
"""What `whole_directory` and the functions beside it need to know about a training's directory."""

_FINISHED = "finished"
_PARTS = {"steps", "best", "final", _FINISHED}
_STATE = {"curve": list, "losses": list, "best_epoch": int | None, "best_step": int | None}
_EPOCH = {"epoch": int, "step": int, "train_loss": float, "dev_loss": float, "dev_accuracy": float, "seconds": float}


class UnfinishedTraining:
    """The directory of an unfinished training: checkpoints with optimizer slots, and the state at each checkpoint.

    Parameters
    ----------
    folder : path
        The directory. It is created, or it is that of an interrupted training, which then continues.
    identity : dict
        Everything that the result depends on (flags, labels, data, initial weights).

    Raises
    ------
    TrainingError
        `folder` contains an interrupted training with another identity, one that is damaged, or something that is no
        training.
    """

    def __init__(self, folder: Path, identity: dict[str, Any]):
        self.folder = folder
        self._way_out = f"delete {folder}, and the same command trains from the start"
        path = folder / "identity.json"
        self._is_continued = path.exists()
        if self._is_continued:
            saved = read_object(path, error=TrainingError, way_out=self._way_out)
            for key in identity:
                if saved.get(key) != identity[key]:
                    raise TrainingError(
                        f"{folder} is an interrupted training with other {key}; give the same {key} to continue it, or "
                        "delete it"
                    )
        else:
            self._clear()
            _write(path, json.dumps(identity, ensure_ascii=False))

    def restore(
        self, session: Any, weights: Sequence[Any], initial_weights: Mapping[str, np.ndarray] | None
    ) -> tuple[int, dict[str, Any]]:
        """Set the weights in `session`. Call it while the session's graph is the default graph.

        The weights are those of the last checkpoint in this directory. If there is none, BERT's weights are
        `initial_weights`, and all others are random.

        Returns
        -------
        step : int
            How many steps are done.
        state : dict
            The state that was saved at that step.

        Raises
        ------
        TrainingError
            A file of the interrupted training is missing or damaged.
        """
        self._step_saver = tf1.train.Saver(max_to_keep=2)
        # Two are kept: a crash before the next save of `steps` goes back to the epoch before, and to its best epoch.
        self._best_saver = tf1.train.Saver(weights, max_to_keep=2)
        session.run(tf1.global_variables_initializer())
        latest = self._latest_checkpoint("steps")
        if latest is not None:
            state = self._read_state(latest)
            if state["best_step"] is not None:
                self._read(str(self.folder / "best" / f"model.ckpt-{state['best_step']}"), weights)
            set_weights(session, self._read(latest, tf1.global_variables()))
            # Otherwise the Saver would not delete this checkpoint later.
            self._step_saver.recover_last_checkpoints([latest])
            return _step_of(latest), state
        if self._is_continued:
            warnings.warn(
                f"{self.folder}: the interrupted training had saved no checkpoint; it starts again",
                CheckpointWarning,
                stacklevel=2,
            )
        if initial_weights is not None:
            set_weights(session, initial_weights)
        return 0, {"curve": [], "losses": [], "best_epoch": None, "best_step": None}

    def save(self, session: Any, step: int, state: dict[str, Any], *, best: bool = False) -> None:
        """Save a checkpoint and the state at `step`; with `best`, save the weights as those of the best epoch too.

        The file that names the newest checkpoint is written last: a crash before that loses only this checkpoint.
        """
        for name in ("steps", "best"):
            (self.folder / name).mkdir(exist_ok=True)
        prefix = self.folder / "steps" / "model.ckpt"
        with disk_errors():
            if best:
                self._best_saver.save(session, str(self.folder / "best" / "model.ckpt"), step, write_meta_graph=False)
            _write(Path(f"{prefix}-{step}.state.json"), json.dumps(state))
            self._step_saver.save(session, str(prefix), step, write_meta_graph=False)

    def last_checkpoint(self) -> str | None:
        """Return the prefix of the best epoch's checkpoint, else of the newest one; None if there is none."""
        for name in ("best", "steps"):
            prefix = self._latest_checkpoint(name)
            if prefix is not None:
                return prefix
        return None

    def finish(
        self,
        output: Path,
        best_step: int,
        config: dict[str, Any],
        vocab_file: Path,
        labels: Sequence[str],
        record: dict[str, Any],
    ) -> None:
        """Move the best epoch's weights, with the other files of the model, to `output`; delete this directory."""
        final = self.folder / "final"
        if final.exists():
            shutil.rmtree(final)
        final.mkdir()
        name = f"model.ckpt-{best_step}"
        for path in checkpoint_files(str(self.folder / "best" / name)):
            shutil.copy(path, final / path.name)
        write_lines(final / "checkpoint", [f'model_checkpoint_path: "{name}"', f'all_model_checkpoint_paths: "{name}"'])
        (final / "bert_config.json").write_text(to_json(config), encoding="utf-8")
        shutil.copyfile(vocab_file, final / "vocab.txt")
        write_lines(final / "labels.txt", labels)
        (final / "training.json").write_text(to_json(record), encoding="utf-8")
        _write(self.folder / _FINISHED, sha256(final / "training.json"))
        put_in_place(final, output)
        _delete(self.folder)

    def _latest_checkpoint(self, name: str) -> str | None:
        """Return the prefix of the newest checkpoint in a part of this directory; None if it has none."""
        folder = self.folder / name
        is_empty = not any(folder.glob("*.index")) and not (folder / "checkpoint").exists()
        if is_empty and len(list(folder.glob("*.state.json"))) < 2:
            return None  # the training was interrupted before its first checkpoint was whole
        try:
            # tf.train.latest_checkpoint would take letters of the path, such as `[`, for a pattern.
            prefix = Path(find_checkpoint(folder))
        except CheckpointError as error:
            raise TrainingError(f"{folder / 'checkpoint'}: is missing or damaged; {self._way_out}") from error
        if re.fullmatch(r"model\.ckpt-\d{1,15}", prefix.name) is None or prefix.parent.resolve() != folder.resolve():
            raise TrainingError(f"{folder / 'checkpoint'}: names no checkpoint of this training; {self._way_out}")
        return str(folder / prefix.name)

    def _read(self, prefix: str, variables: Sequence[Any]) -> dict[str, np.ndarray]:
        """Return the values of variables in a checkpoint, by name."""
        try:
            reader, values = CheckpointReader(prefix), {}
            for variable in variables:
                name, shape = variable.op.name, tuple(variable.shape.as_list())
                saved = reader.variables.get(name)
                if saved is None or saved.shape != shape:
                    raise TrainingError(f"{prefix}: has no {name} of shape {list(shape)}; {self._way_out}")
                values[name] = reader.read(name)
        except CheckpointError as error:
            raise TrainingError(f"{error}; or {self._way_out}") from error
        return values

    def _read_state(self, prefix: str) -> dict[str, Any]:
        """Read the state that was saved with a checkpoint, and check that it belongs to it."""
        path = Path(f"{prefix}.state.json")
        options: Any = {"error": TrainingError, "way_out": self._way_out}
        state = read_object(path, **options)
        check_keys(state, _STATE, str(path), **options)
        for number, row in enumerate(state["curve"], 1):
            where = f"{path}: curve, epoch {number}"
            check_keys({"row": row}, {"row": dict}, where, **options)
            check_keys(row, _EPOCH, where, **options)
        losses = {f"losses[{i}]": loss for i, loss in enumerate(state["losses"])}
        check_keys(losses, dict.fromkeys(losses, float), str(path), **options)
        epochs, steps = ([row[key] for row in state["curve"]] for key in ("epoch", "step"))
        is_whole = epochs == list(range(1, len(epochs) + 1)) and steps == sorted(steps)
        best = dict(zip(epochs, steps, strict=True)).get(state["best_epoch"])
        n_steps = (steps[-1] if steps else 0) + len(losses)
        if not is_whole or n_steps != _step_of(prefix) or state["best_step"] != best or (best is None) != (not steps):
            raise TrainingError(f"{path}: does not belong to step {_step_of(prefix)}; {self._way_out}")
        return state

    def _clear(self) -> None:
        """Delete what is left in the directory of a finished training whose deletion was interrupted."""
        if not self.folder.exists():
            return
        names = {path.name for path in self.folder.iterdir() if not path.name.startswith((".identity.", ".finished."))}
        if names - _PARTS:
            name = min(names - _PARTS)
            raise TrainingError(f"{self.folder} is not an unfinished training ({name} is in it); move or delete it")
        if names and _FINISHED not in names:
            raise TrainingError(
                f"{self.folder}: cannot be continued, because its identity.json is missing; put it back, or "
                f"{self._way_out}"
            )
        _delete(self.folder)


def remove_finished(output: Path) -> None:
    """Delete `<output>.unfinished` if its training is at `output` already: its process was killed before it did so."""
    folder = unfinished_path(output)
    mark, record = folder / _FINISHED, output / "training.json"
    try:
        if folder.is_dir() and record.is_file():
            with locked_output(output, overwrite=True, continues=True, **TRAINING_DIRECTORY):
                if mark.is_file() and mark.read_bytes() == sha256(record).encode():
                    _delete(folder)
                elif not any(folder.iterdir()):
                    folder.rmdir()
    except OSError as error:
        raise TrainingError(f"{folder}: cannot be deleted ({error.strerror or error}); delete it") from error


def _delete(folder: Path) -> None:
    """Delete the directory of a training, also if this is interrupted and repeated.

    The identity goes first: without it, what is left is not continued. The file that says that the training is finished
    goes last: see `remove_finished`.
    """
    (folder / "identity.json").unlink(missing_ok=True)
    for path in folder.iterdir():
        if path.is_dir():
            shutil.rmtree(path)
        elif path.name != _FINISHED:
            path.unlink()
    (folder / _FINISHED).unlink(missing_ok=True)
    folder.rmdir()


def _step_of(prefix: str) -> int:
    return int(prefix.rsplit("-", 1)[1])


def _write(path: Path, text: str) -> None:
    write_text(path, text, error=TrainingError)

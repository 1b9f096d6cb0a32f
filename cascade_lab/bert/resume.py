"""Saves an unfinished training, so that it continues after an interruption."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import tensorflow as tf

from cascade_lab.atomic import to_json, write_text
from cascade_lab.bert.writing import disk_errors, write_lines
from cascade_lab.exceptions import TrainingError

tf1 = tf.compat.v1


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
        `folder` contains an interrupted training with another identity.
    """

    def __init__(self, folder: Path, identity: dict[str, Any]):
        self.folder = folder
        path = folder / "identity.json"
        if path.is_file():
            saved = json.loads(path.read_text(encoding="utf-8"))
            for key in identity:
                if saved.get(key) != identity[key]:
                    raise TrainingError(
                        f"{folder} is an interrupted training with other {key}; give the same {key} to continue it, or "
                        "delete it"
                    )
        else:
            _write(path, json.dumps(identity, ensure_ascii=False))

    def restore(self, session: Any, weights: Sequence[Any], prefix: str | None) -> tuple[int, dict[str, Any]]:
        """Set the weights in `session`. Call it while the session's graph is the default graph.

        The weights are those of the last checkpoint in this directory. If there is none, BERT's weights are those of
        the checkpoint at `prefix`, and all others are random.

        Returns
        -------
        step : int
            How many steps are done.
        state : dict
            The state that was saved at that step.
        """
        self._step_saver = tf1.train.Saver(max_to_keep=2)
        self._best_saver = tf1.train.Saver(weights, max_to_keep=1)
        session.run(tf1.global_variables_initializer())
        latest = tf.train.latest_checkpoint(str(self.folder / "steps"))
        if latest is not None:
            self._step_saver.restore(session, latest)
            # Otherwise the Saver would not delete this checkpoint later.
            self._step_saver.recover_last_checkpoints([latest])
            step = int(latest.rsplit("-", 1)[1])
            return step, json.loads(Path(f"{latest}.state.json").read_text(encoding="utf-8"))
        if prefix is not None:
            bert = [weight for weight in weights if weight.op.name.startswith("bert/")]
            tf1.train.Saver(bert).restore(session, prefix)
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
            prefix: str | None = tf.train.latest_checkpoint(str(self.folder / name))
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
        for path in (self.folder / "best").glob(f"{name}.*"):
            shutil.copy(path, final / path.name)
        write_lines(final / "checkpoint", [f'model_checkpoint_path: "{name}"', f'all_model_checkpoint_paths: "{name}"'])
        (final / "bert_config.json").write_text(to_json(config), encoding="utf-8")
        shutil.copyfile(vocab_file, final / "vocab.txt")
        write_lines(final / "labels.txt", labels)
        (final / "training.json").write_text(to_json(record), encoding="utf-8")
        if output.exists():
            shutil.rmtree(output)
        final.rename(output)
        shutil.rmtree(self.folder)


def _write(path: Path, text: str) -> None:
    write_text(path, text, error=TrainingError)

"""The directory of a training that is not finished yet: what it needs to go on after an interruption."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import tensorflow as tf

from cascade_lab.bert.writing import disk_errors
from cascade_lab.errors import TrainingError

tf1 = tf.compat.v1


class Work:
    """The directory of an unfinished training: checkpoints with optimizer slots, and the state beside each."""

    def __init__(self, folder: Path, identity: dict[str, Any]):
        self.folder = folder
        self._savers: tuple[Any, Any] | None = None
        path = folder / "identity.json"
        if path.is_file():
            found = json.loads(path.read_text(encoding="utf-8"))
            for key in identity:
                if found.get(key) != identity[key]:
                    raise TrainingError(
                        f"{folder} is a training that was interrupted, with other {key}; give the same to go on "
                        "with it, or delete it"
                    )
        else:
            folder.mkdir(parents=True, exist_ok=True)
            _write(path, json.dumps(identity, ensure_ascii=False))

    def restore(self, session: Any, weights: Sequence[Any], prefix: str | None) -> tuple[int, dict[str, Any]]:
        """Put the weights into `session`, in whose graph this is called.

        They are those of the last checkpoint here, else BERT's at `prefix`, else random. Returns the steps done,
        and the state that was saved with them.
        """
        self._savers = tf1.train.Saver(max_to_keep=2), tf1.train.Saver(weights, max_to_keep=1)
        session.run(tf1.global_variables_initializer())
        last = tf.train.latest_checkpoint(str(self.folder / "steps"))
        if last is not None:
            self._savers[0].restore(session, last)
            # The Saver is to go on deleting the older ones where the interrupted one left off.
            self._savers[0].recover_last_checkpoints([last])
            step = int(last.rsplit("-", 1)[1])
            return step, json.loads(Path(f"{last}.state.json").read_text(encoding="utf-8"))
        if prefix is not None:
            bert = [weight for weight in weights if weight.op.name.startswith("bert/")]
            tf1.train.Saver(bert).restore(session, prefix)
        return 0, {"curve": [], "losses": [], "best_epoch": None, "best_step": None}

    def save(self, session: Any, step: int, state: dict[str, Any], *, best: bool = False) -> None:
        """Save where the training stands; the file that names the newest checkpoint is written last."""
        for folder in ("steps", "best"):
            (self.folder / folder).mkdir(exist_ok=True)
        prefix = self.folder / "steps" / "model.ckpt"
        with disk_errors():
            if best:
                self._savers[1].save(session, str(self.folder / "best" / "model.ckpt"), step, write_meta_graph=False)
            _write(Path(f"{prefix}-{step}.state.json"), json.dumps(state))
            self._savers[0].save(session, str(prefix), step, write_meta_graph=False)

    def last_good(self) -> str | None:
        return tf.train.latest_checkpoint(str(self.folder / "best")) or tf.train.latest_checkpoint(
            str(self.folder / "steps")
        )

    def finish(
        self,
        output: Path,
        best_step: int,
        config: dict[str, Any],
        vocab_file: Path,
        labels: Sequence[str],
        record: dict[str, Any],
    ) -> None:
        """Put the best epoch's weights and what belongs to them at `output`, and clear the work away."""
        final = self.folder / "final"
        if final.exists():
            shutil.rmtree(final)
        final.mkdir()
        name = f"model.ckpt-{best_step}"
        for path in (self.folder / "best").glob(f"{name}.*"):
            shutil.copy(path, final / path.name)
        (final / "checkpoint").write_text(f'model_checkpoint_path: "{name}"\nall_model_checkpoint_paths: "{name}"\n')
        (final / "bert_config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
        shutil.copyfile(vocab_file, final / "vocab.txt")
        (final / "labels.txt").write_text("".join(f"{label}\n" for label in labels), encoding="utf-8")
        _write(final / "training.json", json.dumps(record, indent=1, ensure_ascii=False) + "\n")
        if output.exists():
            shutil.rmtree(output)
        final.rename(output)
        shutil.rmtree(self.folder)


def _write(path: Path, text: str) -> None:
    """Write a file so that a crash leaves the whole of it or none."""
    partial = path.with_name(path.name + ".partial")
    partial.write_text(text, encoding="utf-8")
    os.replace(partial, path)

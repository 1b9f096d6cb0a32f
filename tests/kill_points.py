"""Executes a command that writes in many forked processes; each is killed, fails or is stopped at another change.

A change is what changes the file system: Python's audit events show it. A process with TensorFlow's threads should not
fork, so this is a script: `python tests/kill_points.py FOLDER kill:first:1:tune`. A task is MODE:STATE:STRIDE:COMMAND.
MODE is kill, fail (the change raises an OSError), stop (SIGTERM) or full (no file may be larger than some sizes); STATE
is first or replaces (with --overwrite); every STRIDE-th change is tried. It prints how many of how many, per task.
"""

from __future__ import annotations

import errno
import fcntl
import json
import os
import resource
import shutil
import signal
import sys
import tempfile
import traceback
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import suppress
from hashlib import sha256
from pathlib import Path
from typing import Any, NamedTuple

import nbformat
import numpy as np
import pandas as pd
from helpers import random_run, random_spec, texts, write_cascade, write_checkpoint

CHANGES = {
    "os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.truncate", "os.link", "os.symlink", "os.chmod",
    "cascade_lab.exchange",
}  # fmt: skip
REMOVALS = ("os.remove", "os.rmdir")
ERRORS = (errno.ENOSPC, errno.EACCES, errno.EIO)
FILE_SIZES = (0, 1, 100, 1_000, 10_000, 100_000)  # bytes


class Command(NamedTuple):
    """A command, and an earlier one of the same kind whose output it replaces; without their `--output`."""

    new: tuple[object, ...]
    old: tuple[object, ...]
    outputs: tuple[str, ...]
    has_overwrite: bool = True


class Result(NamedTuple):
    code: int
    stderr: str
    changes: list[str]


# Commands that need no TensorFlow, and those that do.


def plain_commands(folder: Path) -> dict[str, Command]:
    """Write what the commands read, and return them."""
    a = random_run(folder / "a", n=60, seed=1)
    b = random_run(folder / "b", n=60, seed=1, skill=3)
    spec = random_spec()
    spec.write(folder / "cascade.toml")
    a.examples.drop(columns="text_b").to_csv(folder / "texts.tsv", sep="\t", index=False)
    for run in (a, b):
        for stage in spec.stages:
            np.save(folder / f"{run.name}-{stage.name}.npy", run.scores(stage.name).logits)
    for name in ("old", "new"):
        rows = a.examples.assign(corrected_label=a.examples["label"] if name == "old" else "label1", score=0.5)
        rows.to_csv(folder / f"{name}.csv", index=False)
        cells = [
            nbformat.v4.new_markdown_cell(f"# The {name} report"),
            nbformat.v4.new_code_cell("run_dir = None", metadata={"tags": ["parameters"]}),
        ]
        nbformat.write(nbformat.v4.new_notebook(cells=cells), folder / f"{name}.ipynb")

    def logits(run: str) -> tuple[object, ...]:
        return tuple(
            part for stage in spec.stages for part in ("--logits", f"{stage.name}={folder / f'{run}-{stage.name}.npy'}")
        )

    imported = ("import-logits", folder / "cascade.toml", folder / "texts.tsv")
    report, notebooks = ("report", folder / "a", "--notebook"), (folder / "new.ipynb", folder / "old.ipynb")
    vocabulary = ("vocabulary", "--train", folder / "texts.tsv", "--size")
    rejector = ("fit-rejector", folder / "a", "--evidence")
    maximize = ("tune", folder / "a", "--write-anyway", "--maximize")
    return {
        "import-logits": Command((*imported, *logits("a")), (*imported, *logits("b")), ("out",)),
        "tune": Command((*maximize, "accuracy"), (*maximize, "reject_recall"), ("out.toml",)),
        "calibrate": Command(
            ("calibrate", folder / "a"), ("calibrate", folder / "a", "--stage", "gate0"), ("out.toml",)
        ),
        "fit-rejector": Command((*rejector, "gate0,energy"), (*rejector, "margin"), ("out.toml",)),
        "correct": Command(
            ("correct", folder / "a", folder / "new.csv"), ("correct", folder / "a", folder / "old.csv"), ("out.tsv",)
        ),
        "audit": Command(("audit", folder / "a"), ("audit", folder / "b"), ("out.csv",)),
        "compare": Command(
            ("compare", folder / "a", folder / "b"), ("compare", folder / "b", folder / "a"), ("out.json",)
        ),
        "vocabulary": Command((*vocabulary, 130), (*vocabulary, 100), ("out.txt",)),
        "report": Command((*report, notebooks[0]), (*report, notebooks[1]), ("out.html", "out.json"), False),
    }


STUDY = """
evaluate = "full.json"
out_of_scope = "oos"

[finetune]
max_seq_length = 16
num_train_epochs = 1
threads = 1

[[model]]
name = "all"
train = "full.json"

[[scheme]]
name = "one"
stages = ["all"]
"""


def tensorflow_commands(folder: Path) -> dict[str, Command]:
    """Write what the commands read, in processes of their own, and return the commands."""
    import tensorflow  # noqa: F401  # every forked process needs it

    import cascade_lab.bert.attributions
    import cascade_lab.bert.finetune
    import cascade_lab.bert.huggingface
    import cascade_lab.export
    import cascade_lab.latency_benchmark
    import cascade_lab.study  # noqa: F401

    in_child(lambda: write_cascade(folder))
    in_child(lambda: write_checkpoint(folder / "init", 2, seed=5, scale=0.1))
    labels = ["oos", "0", "1", "2", "3"]
    frame = pd.DataFrame({"text": texts(24), "label": [labels[i % 5] for i in range(24)]})
    frame.to_csv(folder / "texts.tsv", sep="\t", index=False)
    full = {split: frame.to_numpy().tolist() for split in ("train", "val", "test")}
    (folder / "full.json").write_text(json.dumps(full))
    (folder / "study.toml").write_text(STUDY)
    cascade, evalset = folder / "cascade.toml", folder / "texts.tsv"
    assert execute(("export", cascade, "--format", "hf", "--output", folder / "hf"), folder).code == 0
    latency = ("latency", cascade, evalset, "--batch-sizes", "4", "--repeats", "1", "--limit")
    training = ("finetune", "--init", folder / "init", "--train", evalset, "--eval", evalset, "--threads", 1)
    training += (
        "--max-seq-length",
        16,
        "--save-checkpoints-steps",
        1,
        "--train-batch-size",
        8,
        "--num-train-epochs",
        2,
    )
    exported, attributed = ("export", cascade, "--format"), ("attribute", cascade, "pay my bill", "--n-steps")
    imported = ("import-hf", folder / "hf" / "gate"), ("import-hf", folder / "hf" / "intent")
    study = ("study", folder / "study.toml", "--data", folder, "--init", folder / "init")
    return {
        "run": Command(("run", cascade, evalset), ("run", cascade, evalset, "--limit", 5), ("out",)),
        "latency": Command((*latency, 16), (*latency, 8), ("out",)),
        "export-saved-model": Command((*exported, "saved_model"), (*exported, "hf"), ("out",)),
        "export-hf": Command((*exported, "hf"), (*exported, "saved_model"), ("out",)),
        "import-hf": Command(*imported, ("out",)),
        "finetune": Command((*training, "--seed", 1), (*training, "--seed", 2), ("out",)),
        "attribute": Command((*attributed, 4), (*attributed, 5), ("out.html",)),
        "study": Command(study, study, ("out",), False),
    }


# One execution.


def in_child(action: Callable[[], object]) -> int:
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            action()
            code = 0
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(code)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def execute(
    arguments: Iterable[object],
    root: Path,
    *,
    at: int = 0,
    action: Callable[[], object] = lambda: None,
    file_size: int | None = None,
) -> Result:
    """Execute a command in a forked process that does `action` before its change number `at`."""
    # A file would not take the output where no file may be large; these pipes take 1 MiB before anybody reads.
    pipes = [os.pipe() for _ in range(3)]
    out, err, log = (writer for _, writer in pipes)
    for _, writer in pipes:
        fcntl.fcntl(writer, fcntl.F_SETPIPE_SZ, 2**20)

    def child() -> None:
        from cascade_lab.cli import app

        os.dup2(out, 1)
        os.dup2(err, 2)
        count = 0
        temporary = root / "tmp"
        temporary.mkdir(exist_ok=True)
        tempfile.tempdir = os.environ["TMPDIR"] = str(temporary)
        if file_size is not None:
            signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
            resource.setrlimit(resource.RLIMIT_FSIZE, (file_size, file_size))

        def hook(event: str, values: tuple[Any, ...]) -> None:
            nonlocal count
            if change := _change(event, values, root):
                count += 1
                os.write(log, f"{change}\n".encode(errors="replace"))
                if count == at:
                    action()

        sys.addaudithook(hook)
        code = 1
        try:
            app([str(argument) for argument in arguments])
        except SystemExit as stop:
            code = int(stop.code or 0)
        except BaseException:
            traceback.print_exc()
        finally:
            for stream in (sys.stdout, sys.stderr):
                with suppress(OSError):
                    stream.flush()
            os._exit(code)

    code = in_child(child)
    contents = []
    for reader, writer in pipes:
        os.close(writer)
        with open(reader, encoding="utf-8", errors="replace") as file:
            contents.append(file.read())
    return Result(code, contents[1], contents[2].splitlines())


def _change(event: str, values: tuple[Any, ...], root: Path) -> str | None:
    """Return an audit event as text if it changes something in `root`, also relative to an open folder."""
    if event == "open":
        is_writing = isinstance(values[2], int) and values[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)
        if isinstance(values[0], int) or not is_writing:  # a descriptor is open already
            return None
        values = values[:1]
    elif event not in CHANGES:
        return None
    paths = [os.fsdecode(value) for value in values if isinstance(value, str | bytes | os.PathLike)]
    if paths and not any(path.startswith(f"{root}/") or not os.path.isabs(path) for path in paths):
        return None
    return f"{event} {' '.join(os.path.relpath(path, root) if os.path.isabs(path) else path for path in paths)}"


# What may be there afterwards.


def snapshot(root: Path, outputs: Iterable[str]) -> dict[str, bytes]:
    """Return the digest of each file of the outputs by its path."""
    paths = [path for name in outputs for path in (root / name, *(root / name).rglob("*"))]
    return {path.relative_to(root).as_posix(): sha256(path.read_bytes()).digest() for path in paths if path.is_file()}


def is_new(found: Mapping[str, bytes], old: Mapping[str, bytes], new: Mapping[str, bytes], root: Path) -> bool:
    """Return whether a whole new output is there. That of a directory has times and random names in it.

    A whole run may still lack its report.
    """

    def required(names: Iterable[str]) -> set[str]:
        return {name for name in names if not name.startswith(("out/report.", "out/.report.", "out/figures/"))}

    if required(found) != required(new):
        return False
    if len(new) <= 2:
        return found == new
    if (root / "out" / "predictions.parquet").exists():
        from cascade_lab.run import Run

        Run.read(root / "out").check()
    return found != old


def is_noticed(found: Mapping[str, bytes], old: Mapping[str, bytes], new: Mapping[str, bytes], root: Path) -> bool:
    """Return whether only the JSON of the report is new, which says that the HTML beside it is not its page."""
    if not old or found != {"out.html": old.get("out.html"), "out.json": new.get("out.json")}:
        return found == {"out.json": new.get("out.json")}
    record = json.loads((root / "out.json").read_text(encoding="utf-8"))
    return bool(record["page_sha256"] != found["out.html"].hex())


def litter(root: Path, outputs: Iterable[str]) -> list[str]:
    return sorted({path.name for path in root.iterdir()} - {*outputs, "tmp"})


class Survey:
    """One command that writes over an old output (`replaces`) or for the first time."""

    def __init__(self, command: Command, folder: Path, *, replaces: bool):
        self.command, self.folder, self.replaces = command, folder, replaces
        self.arguments = command.new + (("--overwrite",) if replaces and command.has_overwrite else ())
        self.roots: Iterator[int] = iter(range(10**6))
        self.new, self.old, self.old_root = {}, {}, None
        if replaces:
            self.old_root, result = self.run(self.root(empty=True), command.old)
            assert result.code == 0, result
            self.old = snapshot(self.old_root, command.outputs)
        root, self.whole = self.run(self.root(), self.arguments)
        assert self.whole.code == 0, self.whole
        assert not litter(root, command.outputs), litter(root, command.outputs)
        self.new = snapshot(root, command.outputs)
        assert self.new
        shutil.rmtree(root)

    def root(self, *, empty: bool = False) -> Path:
        root = self.folder / f"{next(self.roots)}"
        root.mkdir(parents=True)
        if not empty and self.old_root:
            for name in self.command.outputs:
                source = self.old_root / name
                (shutil.copytree if source.is_dir() else shutil.copy2)(source, root / name)
        return root

    def run(self, root: Path, arguments: Iterable[object], **keys: Any) -> tuple[Path, Result]:
        return root, execute([*arguments, "--output", root / self.command.outputs[0]], root, **keys)

    def attempt(self, allowed: tuple[int, ...], *, is_clean: bool, **keys: Any) -> Result:
        """Execute the command with a disturbance, look at what is there, execute it again, and look again."""
        root, result = self.run(self.root(), self.arguments, **keys)
        found = snapshot(root, self.command.outputs)
        state = (found, self.old, self.new, root)
        where = f"{self.command.new[0]} {keys}: {result}; {litter(root, self.command.outputs)}"
        assert result.code in allowed, where
        whole = is_new(*state)
        is_resumed = self.command.new[0] in ("finetune", "study")  # they keep what they have done
        if not is_resumed or self.command.new[0] == "finetune":
            mixed = len(self.command.outputs) == 2 and result.code == -9 and is_noticed(*state)
            assert whole or found == self.old or mixed, where
        if result.code not in (0, -9):
            assert result.stderr.count("\n") == 1, where
            assert result.stderr.startswith("error: "), where
        if is_clean and not is_resumed:
            assert not litter(root, self.command.outputs), where
        _, again = self.run(root, self.arguments)
        where += f"; then {again}"
        if whole and not self.replaces and self.command.has_overwrite:
            assert again.code == 2, where
            assert "exists already" in again.stderr, where
        else:
            assert again.code == 0, where
        assert is_new(snapshot(root, self.command.outputs), self.old, self.new, root), where
        assert not litter(root, self.command.outputs), where
        shutil.rmtree(root)
        return result


def survey(command: Command, mode: str, folder: Path, *, replaces: bool, stride: int) -> tuple[int, int]:
    """Disturb a command at every `stride`th change; return how many were tried, and how many changes it has."""
    surveyed = Survey(command, folder, replaces=replaces)
    n_changes = len(surveyed.whole.changes)
    tried = 0
    if mode == "full":
        for file_size in FILE_SIZES[::stride]:
            surveyed.attempt((0, 2), is_clean=True, file_size=file_size)
            tried += 1
        return tried, len(FILE_SIZES)
    for at in range(1, n_changes + 1, stride):
        if mode == "kill":
            result = surveyed.attempt((-9, 0), is_clean=False, at=at, action=lambda: _send(signal.SIGKILL))
        elif mode == "stop":
            result = surveyed.attempt((0, 143), is_clean=True, at=at, action=lambda: _send(signal.SIGTERM))
        else:
            code = ERRORS[at % len(ERRORS)]
            is_removal = surveyed.whole.changes[at - 1].startswith(REMOVALS)
            result = surveyed.attempt((0, 2), is_clean=not is_removal, at=at, action=lambda code=code: _fail(code))  # type: ignore[misc]
        tried += 1
        if len(result.changes) < at:  # this execution had fewer changes
            break
    return tried, n_changes


def _send(number: int) -> None:
    os.kill(os.getpid(), number)


def _fail(code: int) -> None:
    raise OSError(code, os.strerror(code))


def main(folder: str, *tasks: str) -> None:
    os.fsync = lambda _: None  # type: ignore[assignment]  # a killed process loses nothing that it has written
    inputs = Path(folder) / "inputs"
    inputs.mkdir(parents=True)
    # What the forked processes would each import. A kernel would take seconds; its end is tested in test_report.py.
    import papermill.parameterize  # noqa: F401

    import cascade_lab.analysis.label_audit
    import cascade_lab.bert.vocabulary
    import cascade_lab.reporting.report
    import cascade_lab.thresholds.tuning  # noqa: F401
    from cascade_lab.reporting import kernel

    kernel.execute = lambda *_, **__: None  # type: ignore[assignment]
    commands = {}
    for maker in (plain_commands, tensorflow_commands):
        if any(task.split(":")[3] in COMMANDS[maker.__name__] for task in tasks):
            (inputs / maker.__name__).mkdir()
            commands |= maker(inputs / maker.__name__)
    for number, task in enumerate(tasks):
        mode, state, stride, name = task.split(":")
        tried, n_changes = survey(
            commands[name], mode, Path(folder) / f"{number}", replaces=state == "replaces", stride=int(stride)
        )
        print(f"{task}: {tried} of {n_changes}", flush=True)


COMMANDS = {
    "plain_commands": {
        "import-logits", "tune", "fit-rejector", "calibrate", "correct", "audit", "compare", "vocabulary", "report",
    },
    "tensorflow_commands": {
        "run", "latency", "export-saved-model", "export-hf", "import-hf", "finetune", "attribute", "study",
    },
}  # fmt: skip


if __name__ == "__main__":
    main(*sys.argv[1:])

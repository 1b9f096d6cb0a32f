"""Executes a command that writes in forked processes, which are killed, fail or are stopped at each of its changes.

A change is what changes the file system: Python's audit events show it. A process with TensorFlow's threads should not
fork, so this is a script: `python tests/kill_points.py FOLDER kill:first:1:tune`. A task is MODE:STATE:STRIDE:COMMAND.
MODE is kill, fail (the change raises an OSError), stop (SIGTERM) or full (no file may be larger than some sizes); STATE
is first or replaces (with --overwrite); every STRIDE-th change is tried. It prints how many of how many, per task.

A killed process leaves the files as they are at that moment. So `kill` executes the command once, and copies its
folder before each change: every copy is what a kill there would have left. The parent process imports TensorFlow but
uses none of it: no thread of TensorFlow runs before the fork.
"""

from __future__ import annotations

import errno
import fcntl
import gc
import importlib
import json
import os
import pkgutil
import resource
import shutil
import signal
import sys
import tempfile
import traceback
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import suppress
from functools import partial
from hashlib import sha256
from pathlib import Path
from typing import Any, NamedTuple

import helpers
import nbformat
import numpy as np
import pandas as pd
from helpers import answered_batches, random_run, random_spec, texts, write_cascade, write_checkpoint

from cascade_lab.serving.traffic_log import TrafficLog

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
    random_run(folder / "other", n=60, seed=2)
    spec = random_spec()
    spec.write(folder / "cascade.toml")
    a.examples.drop(columns="text_b").to_csv(folder / "texts.tsv", sep="\t", index=False)
    for run in (a, b):
        for stage in spec.stages:
            np.save(folder / f"{run.name}-{stage.name}.npy", run.scores(stage.name).logits)
    a.examples[["example_id", "label"]].to_csv(folder / "labels.csv", index=False)
    for name in ("old", "new"):
        rows = a.examples.assign(corrected_label=a.examples["label"] if name == "old" else "label1", score=0.5)
        rows.to_csv(folder / f"{name}.csv", index=False)
        cells = [
            nbformat.v4.new_markdown_cell(f"# The {name} report"),
            nbformat.v4.new_code_cell("run_dir = None", metadata={"tags": ["parameters"]}),
        ]
        nbformat.write(nbformat.v4.new_notebook(cells=cells), folder / f"{name}.ipynb")

    def log() -> None:
        with TrafficLog(folder / "log") as traffic:
            for batch in answered_batches(a.with_thresholds({"gate0": 0.0})):
                traffic.add(batch)

    in_child(log)

    def logits(run: str) -> tuple[object, ...]:
        return tuple(
            part for stage in spec.stages for part in ("--logits", f"{stage.name}={folder / f'{run}-{stage.name}.npy'}")
        )

    imported = ("import-logits", folder / "cascade.toml", folder / "texts.tsv")
    report, notebooks = ("report", folder / "a", "--notebook"), (folder / "new.ipynb", folder / "old.ipynb")
    vocabulary = ("vocabulary", "--train", folder / "texts.tsv", "--size")
    rejector = ("fit-rejector", folder / "a", "--evidence")
    watch = ("monitor", folder / "a", "--against", folder / "other")
    maximize = ("tune", folder / "a", "--write-anyway", "--maximize", "accuracy")
    calibrate, collected = ("calibrate", folder / "a"), ("collect", folder / "log")
    return {
        "import-logits": Command((*imported, *logits("a")), (*imported, *logits("b")), ("out",)),
        "collect": Command((*collected, "--labels", folder / "labels.csv"), collected, ("out",)),
        "monitor": Command((*watch,), (*watch, "--maximize", "coverage"), ("out.toml",)),
        "tune": Command((*maximize, "--test", folder / "other"), (*maximize, "--stage", "last"), ("out.toml",)),
        "calibrate": Command((*calibrate, "--method", "auto"), calibrate, ("out.toml",)),
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
name = "{scheme}"
stages = ["all"]
"""


def tensorflow_commands(folder: Path) -> dict[str, Command]:
    """Write what the commands read, in processes of their own, and return the commands."""
    import cascade_lab

    # Every forked process needs them, and all of these processes execute the same code.
    for module in pkgutil.walk_packages(cascade_lab.__path__, "cascade_lab."):
        importlib.import_module(module.name)
    helpers.CONFIG["num_hidden_layers"] = 1
    assert in_child(lambda: write_cascade(folder)) == 0
    assert in_child(lambda: write_checkpoint(folder / "init", 2, seed=5, scale=0.1)) == 0
    labels = ["oos", "0", "1", "2", "3"]
    frame = pd.DataFrame({"text": texts(60), "label": [labels[i % 5] for i in range(60)]})
    frame.to_csv(folder / "many.tsv", sep="\t", index=False)
    frame = frame[:24]
    frame.to_csv(folder / "texts.tsv", sep="\t", index=False)
    full = {split: frame.to_numpy().tolist() for split in ("train", "val", "test")}
    (folder / "full.json").write_text(json.dumps(full))
    for scheme in ("old", "new"):  # of the same models and runs
        (folder / f"{scheme}.toml").write_text(STUDY.format(scheme=scheme))
    cascade, evalset = folder / "cascade.toml", folder / "texts.tsv"
    kept = ("run", cascade, folder / "many.tsv", "--keep-features", "--no-report", "--output", folder / "kept")
    for made in (kept, ("export", cascade, "--format", "hf", "--output", folder / "hf")):
        result = execute(made, folder)
        assert result.code == 0, result
    latency = ("latency", cascade, evalset, "--batch-sizes", "4", "--repeats", "1", "--limit")
    training = ("finetune", "--init", folder / "init", "--train", evalset, "--eval", evalset, "--threads", 1)
    training += (
        "--max-seq-length",
        16,
        "--save-checkpoints-steps",
        1,
        "--train-batch-size",
        12,
        "--num-train-epochs",
        2,
    )
    exported, attributed = ("export", cascade, "--format"), ("attribute", cascade, "pay my bill", "--n-steps")
    imported = ("import-hf", folder / "hf" / "gate"), ("import-hf", folder / "hf" / "intent")
    drafted = ("init", folder / "hf" / "gate", folder / "hf" / "intent", evalset)
    study = ("--data", folder, "--init", folder / "init")
    run, rejector = ("run", cascade, evalset), ("fit-rejector", folder / "kept", "--evidence")
    distance = ("gate,mahalanobis", "--train-run", folder / "kept")
    measured = ("verify-precision", cascade, evalset, "--calibrate")
    return {
        "run": Command((*run, "--keep-features"), (*run, "--limit", 5), ("out",)),
        "fit-rejector-distance": Command((*rejector, *distance), (*rejector, "gate"), ("out.toml", "out-*.npz")),
        "latency": Command((*latency, 16), (*latency, 8), ("out",)),
        "export-saved-model": Command((*exported, "saved_model"), (*exported, "hf"), ("out",)),
        "export-hf": Command((*exported, "hf"), (*exported, "saved_model"), ("out",)),
        "import-hf": Command(*imported, ("out",)),
        "init": Command(drafted, (*drafted, "--intent-labels", "1,0,2,3"), ("out.toml", "out-*")),
        "finetune": Command((*training, "--seed", 1), (*training, "--seed", 2), ("out",)),
        "attribute": Command((*attributed, 4), (*attributed, 5), ("out.html",)),
        "verify-precision": Command(measured, (*measured, "--limit", 5), ("out.toml",)),
        "study": Command(
            ("study", folder / "new.toml", *study), ("study", folder / "old.toml", *study), ("out",), False
        ),
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
    before_change: Callable[[int], object] = lambda _: None,
    file_size: int | None = None,
) -> Result:
    """Execute a command in a forked process, which calls `before_change` with the number of each change: 1, 2, …"""
    # A file would not take the output where no file may be large; these pipes take 1 MiB before anybody reads.
    pipes = [os.pipe() for _ in range(3)]
    out, err, log = (writer for _, writer in pipes)
    for _, writer in pipes:
        fcntl.fcntl(writer, fcntl.F_SETPIPE_SZ, 2**20)

    def child() -> None:
        from cascade_lab.cli import app

        os.dup2(out, 1)
        os.dup2(err, 2)
        sys.stdout, sys.stderr = (open(fd, "w", encoding="utf-8") for fd in (1, 2))  # noqa: SIM115
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
                before_change(count)

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
    paths = [path for name in outputs for output in root.glob(name) for path in (output, *output.rglob("*"))]
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


def is_harmless(found: Mapping[str, bytes], old: Mapping[str, bytes], new: Mapping[str, bytes], root: Path) -> bool:
    """Return whether only the first of two files is new, and nobody takes the two for a pair.

    It is a file of arrays or a converted checkpoint that no cascade names yet, or the JSON of a report, which says that
    the HTML beside it is not its page.
    """
    if old.items() <= found.items() and all(name.startswith("out-") for name in found.keys() - old.keys()):
        return True
    if not old or found != {"out.html": old.get("out.html"), "out.json": new.get("out.json")}:
        return found == {"out.json": new.get("out.json")}
    record = json.loads((root / "out.json").read_text(encoding="utf-8"))
    return bool(record["page_sha256"] != found["out.html"].hex())


def litter(root: Path, outputs: Iterable[str]) -> list[str]:
    return sorted(
        {path.name for path in root.iterdir()} - {path.name for name in outputs for path in root.glob(name)} - {"tmp"}
    )


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
                for source in self.old_root.glob(name):
                    (shutil.copytree if source.is_dir() else shutil.copy2)(source, root / source.name)
        return root

    def run(self, root: Path, arguments: Iterable[object], **keys: Any) -> tuple[Path, Result]:
        return root, execute([*arguments, "--output", root / self.command.outputs[0]], root, **keys)

    def check(self, root: Path, result: Result, *, is_clean: bool) -> None:
        """Look at what a disturbed command left, execute it again, and look again."""
        outputs, is_resumed = self.command.outputs, self.command.new[0] in ("finetune", "study")
        found = snapshot(root, outputs)
        state = (found, self.old, self.new, root)
        where = f"{self.command.new[0]}: {result}; {litter(root, outputs)}"
        whole = is_new(*state)
        if self.command.new[0] == "study":  # it keeps each of its trainings and runs
            name = "out/results.json"
            assert found.get(name) == self.old.get(name) or json.loads((root / name).read_bytes())["rows"], where
        else:
            mixed = len(outputs) == 2 and result.code == -9 and is_harmless(*state)
            assert whole or found == self.old or mixed, where
        if result.code not in (0, -9):
            assert result.stderr.count("\n") == 1, where
            assert result.stderr.startswith("error: "), where
        if is_clean and not is_resumed:
            assert not litter(root, outputs), where
        _, again = self.run(root, self.arguments)
        where += f"; then {again}"
        if whole and not self.replaces and self.command.has_overwrite:
            assert again.code == 2, where
            assert "exists already" in again.stderr, where
        else:
            assert again.code == 0, where
        assert is_new(snapshot(root, outputs), self.old, self.new, root), where
        assert not litter(root, outputs), where

    def kill(self, stride: int) -> Iterator[str | None]:
        """Kill the command before every `stride`th change; yield what is wrong afterwards, or None."""
        root, copies = self.root(), self.folder / "copies"

        def copy(number: int) -> None:
            if (number - 1) % stride == 0:
                shutil.copytree(root, copies / f"{number}")

        _, whole = self.run(root, self.arguments, before_change=copy)
        assert whole.code == 0, whole
        problems: dict[frozenset[object], str | None] = {}  # a second kill may leave what the first one left
        for number in range(1, len(whole.changes) + 1, stride):
            shutil.rmtree(root)
            (copies / f"{number}").rename(root)  # files may have the path of the output in them
            state = frozenset((*root.rglob("*"), *snapshot(root, ["*"]).items()))
            if state not in problems:
                result = Result(-9, "", whole.changes[:number])
                problems[state] = _problem(self.check, root, result, is_clean=False)
            yield problems[state]

    def disturb(self, mode: str, stride: int) -> Iterator[str | None]:
        """Fail or stop at every `stride`th change, or limit the size of files; yield what is wrong, or None."""
        if mode == "full":
            for size in FILE_SIZES[::stride]:
                yield _problem(self.attempt, (0, 2), is_clean=True, file_size=size)
            return
        for number, change in list(enumerate(self.whole.changes, 1))[::stride]:
            if mode == "stop":
                yield _problem(self.attempt, (0, 143), is_clean=True, before_change=_at(number, _stop))
            else:
                fail = _at(number, partial(_fail, ERRORS[number % len(ERRORS)]))
                is_clean = not change.startswith(REMOVALS)  # what cannot be removed stays
                yield _problem(self.attempt, (0, 2), is_clean=is_clean, before_change=fail)

    def attempt(self, allowed: tuple[int, ...], *, is_clean: bool, **keys: Any) -> None:
        """Execute the command with a disturbance, and check what it left."""
        root, result = self.run(self.root(), self.arguments, **keys)
        assert result.code in allowed, result
        self.check(root, result, is_clean=is_clean)
        shutil.rmtree(root)


def _problem(check: Callable[..., object], *arguments: Any, **keys: Any) -> str | None:
    try:
        check(*arguments, **keys)
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return None


def _at(number: int, action: Callable[[], object]) -> Callable[[int], object]:
    return lambda count: action() if count == number else None


def _stop() -> None:
    os.kill(os.getpid(), signal.SIGTERM)


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
    gc.freeze()  # a collection in a forked process would copy the memory of all that was imported
    wrong = False
    for number, task in enumerate(tasks):
        mode, state, stride, name = task.split(":")
        survey = Survey(commands[name], Path(folder) / f"{number}", replaces=state == "replaces")
        problems = survey.kill(int(stride)) if mode == "kill" else survey.disturb(mode, int(stride))
        tried = 0
        for tried, problem in enumerate(problems, 1):
            print(f"{task}: attempt {tried}: {problem or 'good'}", file=sys.stderr, flush=True)
            wrong = wrong or problem is not None
        n_points = len(FILE_SIZES if mode == "full" else survey.whole.changes)
        print(f"{task}: {tried} of {n_points}", flush=True)
    if wrong:
        sys.exit(1)


COMMANDS = {
    "plain_commands": {
        "import-logits", "tune", "fit-rejector", "calibrate", "correct", "audit", "compare", "vocabulary", "report",
        "collect", "monitor",
    },
    "tensorflow_commands": {
        "run", "latency", "export-saved-model", "export-hf", "import-hf", "init", "finetune", "attribute", "study",
        "fit-rejector-distance", "verify-precision",
    },
}  # fmt: skip


if __name__ == "__main__":
    main(*sys.argv[1:])

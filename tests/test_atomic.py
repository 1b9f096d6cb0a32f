"""Files and directories that appear whole or not at all: killed processes, two writers, names that cannot be written.

The tests of killed processes run this file as a script, which forks one child for each file-system change.
"""

from __future__ import annotations

import os
import random
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from cascade_lab.atomic import (
    check_directory,
    locked_file,
    locked_output,
    refuse_existing,
    whole_directory,
    write_file,
    write_files,
    write_text,
)
from cascade_lab.exceptions import CascadeLabError, RunError

KIND = {"marker": "manifest.json", "what": "run", "error": RunError}
PARTS = ("a.txt", "scores/b.txt", "scores/c.txt", "manifest.json")
CHANGES = {
    "open", "os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.scandir", "os.truncate", "shutil.rmtree",
    "cascade_lab.exchange",
}  # fmt: skip
"""The audit events of what changes the file system; some that only read are among them."""


def write_run(output: str | Path, content: str, *, overwrite: bool = True, seconds: float = 0) -> None:
    with whole_directory(output, overwrite=overwrite, **KIND) as folder:
        (folder / "scores").mkdir()
        for name in PARTS:
            time.sleep(seconds / len(PARTS))
            (folder / name).write_text(content)


def content_of(output: Path) -> str:
    """Return the content of a directory that `write_run` wrote, which must be whole and from one writer."""
    contents = {(output / name).read_text() for name in PARTS}
    assert len(contents) == 1, contents
    assert len([path for path in output.rglob("*") if path.is_file()]) == len(PARTS)
    return contents.pop()


def names_in(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def in_child(action: Callable[[], object], kill_at: int | None = None) -> int:
    """Run `action` in a child, which dies before file-system change number `kill_at`; return its exit code."""
    pid = os.fork()
    if pid:
        return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    count = 0

    def die(event: str, _: object) -> None:
        nonlocal count
        if event in CHANGES:
            count += 1
            if count == kill_at:
                os._exit(9)

    code = 1
    try:
        sys.addaudithook(die)
        action()
        code = 0
    except CascadeLabError as error:
        code = 2
        sys.stderr.write(f"{error}\n")
    finally:
        os._exit(code)


def kill_everywhere(
    folder: Path, prepare: Callable[[Path], object], action: Callable[[Path], object], check: Callable[[Path], object]
) -> None:
    """Kill `action` at its first change, then at its second, and so on until it ends by itself."""
    for n in range(1, 1000):
        root = folder / str(n)
        root.mkdir()
        prepare(root)
        code = in_child(lambda root=root: action(root), n)  # type: ignore[misc]
        assert code in (0, 9), f"exit code {code} at change {n}"
        try:
            check(root)
        except BaseException:
            print(f"killed at change {n}: {names_in(root)}", file=sys.stderr)
            raise
        if code == 0:
            print(n - 1)
            return


def script(*arguments: object, file: str = __file__) -> str:
    """Run a file of tests as a script, which forks: a process with TensorFlow's threads should not."""
    command = [sys.executable, file, *map(str, arguments)]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    return result.stdout


def script_overwrite(folder: Path, platform: str) -> None:
    """The old directory or the new one is there after each kill; where two renames are needed, after the next start."""
    exchanged = platform == "linux"
    sys.platform = platform

    def check(root: Path) -> None:
        output = root / "run"
        if exchanged:
            assert content_of(output) in ("old", "new")
        check_directory(output, overwrite=True, **KIND)
        assert content_of(output) in ("old", "new")
        write_run(output, "new")
        assert content_of(output) == "new"
        assert names_in(root) == ["run"]

    kill_everywhere(
        folder, lambda root: write_run(root / "run", "old"), lambda root: write_run(root / "run", "new"), check
    )


def script_killed_twice(folder: Path, platform: str, stride: str = "1") -> None:
    """The second start is killed too, at each of its changes, or at every `stride`th."""
    sys.platform = platform
    n, code = 0, 9
    while code == 9:
        n, m, again = n + 1, -n % int(stride), 9
        while again == 9:
            m += int(stride)
            root = folder / f"{n}-{m}"
            root.mkdir()
            write_run(root / "run", "old")
            code = in_child(lambda root=root: write_run(root / "run", "new"), n)  # type: ignore[misc]
            again = in_child(lambda root=root: write_run(root / "run", "newer"), m)  # type: ignore[misc]
            check_directory(root / "run", overwrite=True, **KIND)
            assert content_of(root / "run") in ("old", "new", "newer"), (n, m)
            write_run(root / "run", "newest")
            assert content_of(root / "run") == "newest", (n, m)
            assert names_in(root) == ["run"], (n, m)
    print(n - 1)


def script_first(folder: Path) -> None:
    """A first writing: nothing or the whole directory is there, and the same call then works."""

    def check(root: Path) -> None:
        output = root / "run"
        if output.exists():
            assert content_of(output) == "new"
            with pytest.raises(RunError, match="exists already"):
                write_run(output, "newer", overwrite=False)
        else:
            write_run(output, "new", overwrite=False)
        assert content_of(output) == "new"
        assert names_in(root) == ["run"]

    kill_everywhere(folder, lambda _: None, lambda root: write_run(root / "run", "new", overwrite=False), check)


def script_file(folder: Path) -> None:
    """A file that is written again: the old or the new content is there after each kill, and then no litter."""

    def check(root: Path) -> None:
        assert (root / "x.toml").read_text() in ("old", "new")
        write_text(root / "x.toml", "new")
        assert (root / "x.toml").read_text() == "new"
        assert names_in(root) == ["x.toml"]

    kill_everywhere(
        folder, lambda root: write_text(root / "x.toml", "old"), lambda root: write_text(root / "x.toml", "new"), check
    )


def script_race(folder: Path, rounds: str) -> None:
    """Pairs of writers at random offsets: one whole directory each time, and a refused writer names the other."""
    rng = random.Random(0)
    output = folder / "run"
    refused = 0
    for _ in range(int(rounds)):
        pids = []
        for name in "ab":
            offset, duration = rng.uniform(0, 0.01), rng.choice([0, 0.002, 0.2])
            pid = os.fork()
            if pid == 0:
                code = 1
                try:
                    time.sleep(offset)
                    write_run(output, name, seconds=duration)
                    code = 0
                except RunError as error:
                    code = 2 if "is writing this run; wait until it has ended" in str(error) else 1
                finally:
                    os._exit(code)
            pids.append(pid)
        codes = [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in pids]
        assert 0 in codes, codes
        assert set(codes) <= {0, 2}, codes
        refused += 2 in codes
        assert content_of(output) in ("a", "b")
        assert names_in(folder) == ["run"]
    print(refused)


@pytest.mark.skipif(sys.platform != "linux", reason="needs renameat2")
def test_a_killed_overwrite_leaves_the_old_or_the_new_directory(tmp_path):
    assert int(script("overwrite", tmp_path, "linux")) > 20


@pytest.mark.skipif(os.name != "posix", reason="forks")
def test_where_nothing_is_exchanged_the_next_start_recovers_the_old_directory(tmp_path):
    assert int(script("overwrite", tmp_path, "elsewhere")) > 20


@pytest.mark.skipif(os.name != "posix", reason="forks")
@pytest.mark.parametrize("platform", ["linux", "elsewhere"])
def test_a_process_that_is_killed_while_it_recovers_loses_nothing(tmp_path, platform):
    assert int(script("killed_twice", tmp_path, platform, 9)) > 20


@pytest.mark.skipif(os.name != "posix", reason="forks")
def test_a_killed_first_writing_leaves_nothing_that_looks_whole(tmp_path):
    assert int(script("first", tmp_path)) > 10


@pytest.mark.skipif(os.name != "posix", reason="forks")
def test_a_killed_writing_of_a_file_leaves_the_old_or_the_new_content(tmp_path):
    assert int(script("file", tmp_path)) >= 4


@pytest.mark.skipif(os.name != "posix", reason="forks")
def test_two_writers_never_mix(tmp_path):
    assert int(script("race", tmp_path, 60)) > 0


def test_a_second_writer_is_refused_at_once_and_the_first_ends_well(tmp_path):
    code = f"""
import sys
sys.path.insert(0, {str(Path(__file__).parent)!r})
from pathlib import Path
from test_atomic import *
with whole_directory(Path({str(tmp_path / "run")!r}), **KIND) as folder:
    (folder / "scores").mkdir()
    print("begun", flush=True)
    input()
    for name in PARTS:
        (folder / name).write_text("first")
"""
    first = subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert first.stdout is not None
    assert first.stdout.readline() == "begun\n"
    refusal = rf"run: process {first.pid} is writing this run; wait until it has ended, or choose another output$"
    for overwrite in (False, True):
        with pytest.raises(RunError, match=refusal):
            write_run(tmp_path / "run", "second", overwrite=overwrite)
        with pytest.raises(RunError, match=refusal):
            check_directory(tmp_path / "run", overwrite=overwrite, **KIND)
    write_run(tmp_path / "other", "second")
    first.communicate("\n")
    assert first.returncode == 0
    assert content_of(tmp_path / "run") == "first"
    write_run(tmp_path / "run", "second")
    assert content_of(tmp_path / "run") == "second"
    assert names_in(tmp_path) == ["other", "run"]


def test_the_same_process_does_not_write_one_output_twice_at_once(tmp_path):
    with whole_directory(tmp_path / "run", **KIND) as folder:
        (folder / "manifest.json").write_text("first")
        with pytest.raises(RunError, match=f"process {os.getpid()} is writing this run"):
            write_run(tmp_path / "run", "second")
    assert (tmp_path / "run" / "manifest.json").read_text() == "first"
    assert names_in(tmp_path) == ["run"]


def test_the_lock_is_free_after_an_error(tmp_path):
    for _ in range(2):
        with pytest.raises(ZeroDivisionError), whole_directory(tmp_path / "run", **KIND):
            raise ZeroDivisionError
        assert names_in(tmp_path) == []


def test_a_replaced_directory_is_put_back_where_the_new_one_cannot_get_its_name(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "platform", "elsewhere")
    write_run(tmp_path / "run", "old")
    rename = Path.rename

    def interrupted(path: Path, target: Path) -> Path:
        if path.name == "run.unfinished":
            raise KeyboardInterrupt
        return rename(path, target)

    monkeypatch.setattr(Path, "rename", interrupted)
    with pytest.raises(KeyboardInterrupt):
        write_run(tmp_path / "run", "new")
    assert content_of(tmp_path / "run") == "old"
    assert names_in(tmp_path) == ["run"]


def test_threads_that_write_one_file_do_not_mix(tmp_path):
    ended = []

    def write(letter: str) -> None:
        for _ in range(50):
            write_text(tmp_path / "x.txt", letter * 100_000)
        ended.append(letter)

    threads = [threading.Thread(target=write, args=(letter,)) for letter in "abcd"]
    for thread in threads:
        thread.start()
    while any(thread.is_alive() for thread in threads):
        if (tmp_path / "x.txt").exists():
            content = (tmp_path / "x.txt").read_text()
            assert content == content[0] * 100_000
    for thread in threads:
        thread.join()
    assert sorted(ended) == list("abcd")
    assert names_in(tmp_path) == ["x.txt"]


def test_a_failed_writing_of_a_file_keeps_the_old_one(tmp_path):
    def fails(partial: Path) -> None:
        partial.write_text("half")
        raise OSError(28, "No space left on device")

    write_text(tmp_path / "x.txt", "old")
    with pytest.raises(CascadeLabError, match=r"x.txt: cannot be written \(No space left on device\); choose another"):
        write_file(tmp_path / "x.txt", fails)
    assert (tmp_path / "x.txt").read_text() == "old"
    assert names_in(tmp_path) == ["x.txt"]


def dead_process() -> int:
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    return process.pid


def test_what_an_older_version_left_between_its_two_renames_is_recovered(tmp_path):
    """Such a version had no lock: the new directory is whole, and waits for the name that is missing."""
    write_run(tmp_path / "run", "old")
    (tmp_path / "run").rename(tmp_path / f"run.old-{dead_process()}")
    write_run(tmp_path / "run", "new")
    (tmp_path / "run").rename(tmp_path / "run.unfinished")
    with pytest.raises(RunError, match="run exists already"):
        write_run(tmp_path / "run", "newer", overwrite=False)
    assert content_of(tmp_path / "run") == "old"
    write_run(tmp_path / "run", "newer")
    assert names_in(tmp_path) == ["run"]


def test_a_directory_that_somebody_named_by_hand_is_not_touched(tmp_path):
    names = [f"run.old-{dead_process()}", "run.old-20251126000000", "run.old-x"]
    for name in names:
        write_run(tmp_path / "run", "kept")
        (tmp_path / "run").rename(tmp_path / name)
    write_run(tmp_path / "run", "old", overwrite=False)
    write_run(tmp_path / "run", "new")
    assert [content_of(tmp_path / name) for name in names] == ["kept"] * 3
    assert names_in(tmp_path) == sorted(["run", *names])


def test_a_directory_that_a_living_process_is_replacing_is_refused(tmp_path):
    write_run(tmp_path / "run", "old")
    old = tmp_path / f"run.old-{os.getppid()}"
    (tmp_path / "run").rename(old)
    with pytest.raises(RunError, match=rf"{old.name} is a run that process {os.getppid()} is replacing; wait until"):
        write_run(tmp_path / "run", "new")
    assert content_of(old) == "old"
    assert names_in(tmp_path) == [old.name]


@pytest.mark.parametrize("name", ["", ".", "/", "//", "..", "a/..", "a\0b", "a\ud800"])
def test_what_is_no_name_is_refused_in_one_line(name, tmp_path, monkeypatch):
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    for attempt in (
        lambda: write_text(name, "x", error=RunError),
        lambda: refuse_existing(name, overwrite=True, error=RunError),
        lambda: check_directory(name, overwrite=True, **KIND),
        lambda: write_run(name, "x"),
    ):
        with pytest.raises(
            RunError, match=r"not a name to write to; give the name of a new file or directory$"
        ) as caught:
            attempt()
        assert "\n" not in str(caught.value)
        assert "\0" not in str(caught.value)
    assert names_in(tmp_path) == ["here"]


@pytest.mark.parametrize("dangling", [False, True])
@pytest.mark.parametrize("overwrite", [False, True])
def test_a_symbolic_link_is_not_replaced(dangling, overwrite, tmp_path):
    if not dangling:
        write_run(tmp_path / "target", "old")
    (tmp_path / "run").symlink_to(tmp_path / "target")
    (tmp_path / "x.txt").symlink_to(tmp_path / "target.txt")
    refusal = "is a symbolic link, which is not replaced; give the path that it points to, or delete it"
    with pytest.raises(RunError, match=refusal):
        write_run(tmp_path / "run", "new", overwrite=overwrite)
    with pytest.raises(RunError, match=refusal):
        check_directory(tmp_path / "run", overwrite=overwrite, **KIND)
    with pytest.raises(CascadeLabError, match=refusal):
        refuse_existing(tmp_path / "run", overwrite=overwrite)
    with pytest.raises(CascadeLabError, match=refusal):
        write_text(tmp_path / "x.txt", "new")
    assert names_in(tmp_path) == (["run", "x.txt"] if dangling else ["run", "target", "x.txt"])
    assert dangling or content_of(tmp_path / "run") == "old"


def test_a_folder_above_may_be_a_symbolic_link(tmp_path):
    (tmp_path / "disk").mkdir()
    (tmp_path / "runs").symlink_to(tmp_path / "disk")
    write_run(tmp_path / "runs" / "run", "old")
    write_run(tmp_path / "runs" / "run", "new")
    assert content_of(tmp_path / "disk" / "run") == "new"


@pytest.mark.parametrize("kind", ["file", "link"])
def test_what_is_in_the_way_of_the_unfinished_directory_is_refused_and_kept(kind, tmp_path):
    way = tmp_path / "run.unfinished"
    (tmp_path / "notes").mkdir()
    way.write_text("notes") if kind == "file" else way.symlink_to(tmp_path / "notes")
    for overwrite in (False, True):
        with pytest.raises(
            RunError, match="is in the way: it is not a directory, so it is no unfinished run; delete it"
        ):
            write_run(tmp_path / "run", "new", overwrite=overwrite)
    assert names_in(tmp_path) == ["notes", "run.unfinished"]


def test_a_file_that_is_named_like_a_lock_is_kept(tmp_path):
    (tmp_path / ".run.lock").write_text("poetry's")
    with pytest.raises(RunError, match=r".run.lock is in the way: it is no lock of this package; move it"):
        write_run(tmp_path / "run", "new")
    assert (tmp_path / ".run.lock").read_text() == "poetry's"
    assert names_in(tmp_path) == [".run.lock"]


def test_only_a_regular_file_is_overwritten_by_a_file(tmp_path):
    (tmp_path / "folder").mkdir()
    with pytest.raises(
        CascadeLabError, match="folder is a directory, so it is not overwritten; give the name of a file"
    ):
        write_text(tmp_path / "folder", "x")
    with pytest.raises(CascadeLabError, match="null is not a regular file, so it is not overwritten"):
        write_text("/dev/null", "x")
    assert not Path("/dev/null").is_file()


def test_a_name_that_is_too_long_is_refused_in_one_line(tmp_path):
    for name in ("x" * 250, "x" * 300):
        with pytest.raises(RunError, match="cannot be written"):
            write_run(tmp_path / name, "x")
        with pytest.raises(RunError, match="cannot be written"):
            write_text(tmp_path / name, "x", error=RunError)
    assert names_in(tmp_path) == []


def test_a_lock_without_a_process_does_not_stop_the_next_writer(tmp_path):
    (tmp_path / ".run.lock").write_text(f"{dead_process()}\n{os.getppid()}\n{os.getpid()}\n")
    with locked_output(tmp_path / "run", **KIND):
        assert names_in(tmp_path) == [".run.lock"]
        assert (tmp_path / ".run.lock").read_text().splitlines()[-1] == f"{os.getpid()} run"
    assert names_in(tmp_path) == []


def test_only_what_a_killed_process_of_the_same_kind_left_is_removed(tmp_path):
    """A folder of that name without a lock may be somebody's; an unfinished training is continued."""
    for lock in ("", f"{dead_process()}\n", f"{dead_process()} training\n", f"{dead_process()} run\n1 training\n"):
        write_run(tmp_path / "run.unfinished", "kept", overwrite=False)
        if lock:
            (tmp_path / ".run.lock").write_text(lock)
        with pytest.raises(RunError, match="is an unfinished run: left by a crash; choose another output, or pass"):
            write_run(tmp_path / "run", "new", overwrite=False)
        assert content_of(tmp_path / "run.unfinished") == "kept"
        (tmp_path / ".run.lock").write_text(f"{dead_process()} run\n")
        with locked_output(tmp_path / "run", continues=True, **KIND):
            assert content_of(tmp_path / "run.unfinished") == "kept"
        (tmp_path / ".run.lock").write_text(f"{dead_process()} run\n1 run\n")
        write_run(tmp_path / "run", "new", overwrite=False)
        assert names_in(tmp_path) == ["run"]
        shutil.rmtree(tmp_path / "run")


def test_a_locked_file_has_one_writer(tmp_path):
    path = tmp_path / "new" / "x.json"
    what = {"what": "comparison", "error": RunError}
    with locked_file(path, overwrite=False, **what):
        with (
            pytest.raises(RunError, match=rf"x.json: process {os.getpid()} is writing this comparison; wait until"),
            locked_file(path, overwrite=True, **what),
        ):
            pass
        write_text(path, "first")
    assert names_in(path.parent) == ["x.json"]
    with (
        pytest.raises(RunError, match=r"x.json exists already; choose another"),
        locked_file(path, overwrite=False, **what),
    ):
        pass
    with locked_file(path, overwrite=True, **what):
        write_text(path, "second")
    assert path.read_text() == "second"
    assert names_in(path.parent) == ["x.json"]


def test_a_failed_writing_leaves_no_new_folder(tmp_path):
    def fails(_: Path) -> None:
        raise OSError(28, "No space left on device")

    with pytest.raises(CascadeLabError):
        write_file(tmp_path / "a" / "b" / "x.txt", fails)
    with pytest.raises(ZeroDivisionError), whole_directory(tmp_path / "a" / "run", **KIND):
        raise ZeroDivisionError
    with pytest.raises(ZeroDivisionError), locked_file(tmp_path / "a" / "x.txt", overwrite=False, what="page"):
        raise ZeroDivisionError
    assert names_in(tmp_path) == []


@pytest.mark.parametrize("old", [False, True])
@pytest.mark.parametrize("failing", range(8))
def test_files_that_belong_together_are_all_new_or_all_as_they_were(old, failing, tmp_path, monkeypatch):
    """One change after the other fails: those that write, and those that rename."""
    paths = [tmp_path / "x.json", tmp_path / "x.html", tmp_path / "x.txt"]
    if old:
        for path in paths:
            path.write_text(f"old {path.name}")
    count = iter(range(100))

    def failing_once(function: Callable[..., object]) -> Callable[..., object]:
        def call(*arguments: object) -> object:
            if next(count) == failing:
                raise OSError(28, "No space left on device")
            return function(*arguments)

        return call

    monkeypatch.setattr(os, "replace", failing_once(os.replace))
    monkeypatch.setattr(Path, "write_bytes", failing_once(Path.write_bytes))
    files = {path: f"new {path.name}".encode() for path in paths}
    if failing < 6:
        with pytest.raises(RunError, match=r"x\.\w+: cannot be written \(No space left on device\); choose another"):
            write_files(files, error=RunError)
        assert names_in(tmp_path) == (sorted(path.name for path in paths) if old else [])
        assert all(path.read_text() == f"old {path.name}" for path in tmp_path.iterdir())
    else:
        write_files(files, error=RunError)
        assert all(path.read_text() == f"new {path.name}" for path in paths)
        assert names_in(tmp_path) == sorted(path.name for path in paths)


def test_without_fcntl_directories_and_files_are_written_as_before(tmp_path):
    code = f"""
import sys
sys.modules["fcntl"] = None
sys.path.insert(0, {str(Path(__file__).parent)!r})
from test_atomic import *
root = Path({str(tmp_path)!r})
write_run(root / "run", "old", overwrite=False)
write_run(root / "run", "new")
write_text(root / "x.txt", "old")
write_text(root / "x.txt", "new")
assert content_of(root / "run") == "new"
"""
    subprocess.run([sys.executable, "-c", code], check=True)
    assert names_in(tmp_path) == ["run", "x.txt"]


if __name__ == "__main__":
    # A killed process loses nothing that it has written: only the machine could. Without this, the disk takes minutes.
    os.fsync = lambda _: None  # type: ignore[assignment]
    globals()[f"script_{sys.argv[1]}"](Path(sys.argv[2]), *sys.argv[3:])

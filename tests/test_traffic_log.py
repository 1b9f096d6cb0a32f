"""The traffic log: what it loses to SIGKILL and to a full disk, and what it never loses."""

from __future__ import annotations

import errno
import json
import os
import shutil
import subprocess
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import killed_services
import numpy as np
import pytest
from helpers import answered_batches, mixed_run, random_run, texts

from cascade_lab import Cascade, EvalSet
from cascade_lab.exceptions import CascadeLabError
from cascade_lab.locks import MAY_LOCK, try_lock
from cascade_lab.serving import log_files
from cascade_lab.serving.batching import Batcher
from cascade_lab.serving.collect import collect
from cascade_lab.serving.log_files import PartWriter, answered_batch, list_parts, read_part
from cascade_lab.serving.shadow import MAX_WAITING, ShadowQueue, is_chosen
from cascade_lab.serving.traffic_log import TrafficLog
from cascade_lab.stage_output import StageOutput
from cascade_lab.thresholds import fit_rejector


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return random_run(tmp_path_factory.mktemp("runs") / "run", n=200)


def wait_for(condition, *, seconds: float = 30) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it never came"
        time.sleep(0.02)


def n_unfinished(folder: Path) -> int:
    return sum(path.name.endswith(".unfinished") for path in folder.iterdir())


# Killed services.


def kill_services(folder: Path, n: int, seconds: float) -> None:
    command = [sys.executable, killed_services.__file__, str(folder), str(n), str(seconds)]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    kills = [json.loads(line) for line in result.stdout.splitlines()]
    assert len(kills) == n
    assert all(kill["oldest"] < 1.0 for kill in kills), kills
    assert sum(kill["n_found"] for kill in kills) > 100


@pytest.mark.skipif(sys.platform != "linux", reason="forks")
def test_sigkill_loses_less_than_a_second(tmp_path):
    kill_services(tmp_path, 10, 1.2)


@pytest.mark.slow
def test_sigkill_at_fifty_points_loses_less_than_a_second(tmp_path):
    kill_services(tmp_path, 50, 4.0)


def test_a_part_is_read_up_to_its_last_whole_record_wherever_it_is_cut(run, tmp_path):
    batches = answered_batches(run, max_size=10)[:4]
    part = PartWriter(tmp_path, batches[0].cascade, shadow=0.0)
    ends = [part.n_bytes]
    for batch in batches:
        part.write(answered_batch(part.schema, [batch], keep_texts=True), n_lost=1)
        ends.append(part.n_bytes)
    content, path = part.path.read_bytes(), tmp_path / "cut.arrows.unfinished"
    part.finish()
    near = {place for end in ends for place in range(end - 20, end + 20)}
    for cut in sorted({*range(0, len(content), 29), *near, len(content)} & set(range(len(content) + 1))):
        path.write_bytes(content[:cut])
        found = read_part(path)
        n_whole = sum(end <= cut for end in ends) - 1
        assert (len(found.batches), found.n_lost) == (max(n_whole, 0), max(n_whole, 0))
        assert not found.is_damaged


def test_the_next_service_finishes_what_a_killed_one_left(run, tmp_path):
    batches = answered_batches(run)
    part = PartWriter(tmp_path, batches[0].cascade, shadow=0.0)
    part.write(answered_batch(part.schema, batches[:3], keep_texts=False), n_lost=0)
    whole = part.path.read_bytes()
    part.finish()
    list_parts(tmp_path)[0].unlink()
    (tmp_path / "killed.arrows.unfinished").write_bytes(whole + b"\xff\xff\xff\xff\x80\x00")
    (tmp_path / "empty.arrows.unfinished").write_bytes(whole[:100])
    with TrafficLog(tmp_path):
        assert [path.name for path in tmp_path.iterdir()] == ["killed.arrows"]
        assert (tmp_path / "killed.arrows").read_bytes() == whole
    assert len(collect(tmp_path).run.examples) == sum(len(batch.ids) for batch in batches[:3])


# Services that live.


def test_two_services_write_into_one_folder(run, tmp_path):
    other = mixed_run(3)
    with TrafficLog(tmp_path) as one:
        one.add(answered_batches(run)[0])
        wait_for(lambda: n_unfinished(tmp_path) == 1)
        with TrafficLog(tmp_path) as two:  # it leaves the part of a living service alone
            for batch in answered_batches(other):
                two.add(batch)
            for batch in answered_batches(run)[1:]:
                one.add(batch)
            wait_for(lambda: n_unfinished(tmp_path) == 2)
    digest = answered_batches(run)[0].digest
    assert collect(tmp_path, digest=digest).run.examples["example_id"].tolist() == run.examples["example_id"].tolist()
    assert n_unfinished(tmp_path) == 0


@pytest.mark.skipif(not MAY_LOCK, reason="the system has no locks")
@pytest.mark.parametrize("deleted", [False, True])
def test_a_part_that_a_starting_service_took_for_a_left_one_gets_another_name(deleted, run, tmp_path, monkeypatch):
    """The other service locks the new file while it is empty, and has deleted it already, or is about to."""
    batch, taken, opened = answered_batches(run)[0], [], []

    def lock_late(descriptor: int) -> bool | None:
        if not taken:
            taken.extend(tmp_path.iterdir())
            opened.append(os.open(taken[0], os.O_RDWR))
            assert try_lock(opened[0])
            if deleted:
                taken[0].unlink()
                os.close(opened[0])
        return try_lock(descriptor)

    monkeypatch.setattr(log_files, "try_lock", lock_late)
    with TrafficLog(tmp_path) as log:
        log.add(batch)
        wait_for(lambda: log.n_written)
        taken[0].unlink(missing_ok=True)
    if not deleted:
        os.close(opened[0])
    assert collect(tmp_path).run.examples["example_id"].tolist() == batch.ids


def test_without_locks_a_part_is_binary_and_is_closed_before_it_is_renamed(run, tmp_path, monkeypatch):
    """As Windows needs it."""
    batch, flags, opened = answered_batches(run)[0], [], os.open
    monkeypatch.setattr(log_files, "MAY_LOCK", False)
    monkeypatch.setattr(os, "O_BINARY", os.O_SYNC, raising=False)

    def noted(path, flag, mode=0o777, **options):
        flags.append(flag)
        return opened(path, flag, mode, **options)

    monkeypatch.setattr(os, "open", noted)
    part = PartWriter(tmp_path, batch.cascade, shadow=0.0)
    monkeypatch.setattr(os, "open", opened)
    part.write(answered_batch(part.schema, [batch], keep_texts=False), n_lost=0)
    events, rename, close = [], os.rename, os.close
    monkeypatch.setattr(os, "rename", lambda *paths: (events.append("rename"), rename(*paths)))
    monkeypatch.setattr(os, "close", lambda descriptor: (events.append("close"), close(descriptor)))
    part.finish()
    assert flags[0] & os.O_SYNC == os.O_SYNC
    assert events == ["close", "rename"]
    assert [path.suffix for path in list_parts(tmp_path)] == [".arrows"]


def test_a_part_that_is_being_written_is_read_too(run, tmp_path):
    with TrafficLog(tmp_path) as log:
        for batch in answered_batches(run):
            log.add(batch)
        wait_for(lambda: log.n_written == 200)
        found = collect(tmp_path)
        assert len(found.run.examples) == 200
        assert "1 of 1 parts are unfinished" in found.notes[0]


def test_parts_are_begun_anew_by_size_and_by_age(run, tmp_path):
    batches = answered_batches(run, max_size=5)
    with TrafficLog(tmp_path / "size", max_bytes=15_000) as log:
        for i, batch in enumerate(batches):
            log.add(batch)
            wait_for(lambda i=i: log.n_written == sum(len(one.ids) for one in batches[: i + 1]) or i % 12)
    sizes = [path.stat().st_size for path in list_parts(tmp_path / "size")]
    assert len(sizes) > 1
    assert all(size > 15_000 for size in sizes[:-1])
    with TrafficLog(tmp_path / "age", max_seconds=0.2) as log:
        log.add(batches[0])
        wait_for(lambda: log.n_written and not n_unfinished(tmp_path / "age"))  # without further texts
        log.add(batches[1])
    assert len(list_parts(tmp_path / "age")) == 2


def test_nobody_else_can_read_the_parts(run, tmp_path):
    with TrafficLog(tmp_path) as log:
        log.add(answered_batches(run)[0])
    assert list_parts(tmp_path)[0].stat().st_mode & 0o077 == 0


def test_half_surrogate_pairs_and_other_scripts_are_logged(run, tmp_path):
    batch = answered_batches(run, max_size=16)[0]
    ids = [f"{i}\ud800é\0" for i in range(len(batch.ids))]
    odd = [*(["\udfff", "付款 🙂", "a\nb\tc"] * 6)[: len(ids)]]
    with TrafficLog(tmp_path, keep_texts=True) as log:
        log.add(replace(batch, ids=ids, texts=odd))
    found = collect(tmp_path).run.examples
    assert found["example_id"][0] == "0?é\0"
    assert found["text"].tolist() == [text.replace("\udfff", "?") for text in odd]


def test_records_that_cannot_be_written_do_not_stop_the_log(run, tmp_path):
    batches = answered_batches(run)
    with TrafficLog(tmp_path) as log:
        for batch in (batches[1], replace(batches[0], scores={}), batches[2]):
            log.add(batch)
        wait_for(lambda: log.n_lost == len(batches[0].ids))
        log.add(batches[3])
    assert log.n_written == sum(len(batch.ids) for batch in batches[1:4])
    assert collect(tmp_path).n_lost == len(batches[0].ids)


def test_texts_that_cannot_be_chosen_for_shadow_scores_are_logged_once(run, tmp_path, monkeypatch):
    def fail(*_: object) -> None:
        raise ValueError

    monkeypatch.setattr(ShadowQueue, "add", fail)
    with TrafficLog(tmp_path, shadow=1.0) as log:
        for batch in answered_batches(run):
            log.add(batch)
    found = collect(tmp_path)
    assert (log.n_written, log.n_lost, found.n_lost, found.n_repeated) == (200, 0, 0, 0)
    assert found.run.examples["example_id"].tolist() == run.examples["example_id"].tolist()


# The disk.


def test_a_full_disk_stops_the_log_and_more_room_starts_it_again(run, small_disk):
    """Every text is in the log or is counted as lost, and `collect` knows how many those are."""
    filler, batches, n_added = small_disk / "filler", answered_batches(run), 0
    with TrafficLog(small_disk / "log", max_waiting=300, keep_texts=True) as log:
        filler.write_bytes(bytes(40_000))

        def add_all() -> None:
            nonlocal n_added
            for batch in batches:
                start = time.perf_counter()
                log.add(replace(batch, ids=[f"{n_added + i}" for i in range(len(batch.ids))]))
                n_added += len(batch.ids)
                assert time.perf_counter() - start < 0.5
            time.sleep(0.05)

        while not (log.n_lost and log.problem):
            add_all()
        assert log.problem == "No space left on device"
        n_written = log.n_written
        filler.unlink()
        wait_for(lambda: log.problem is None and log.n_waiting == 0)
        add_all()
    assert log.n_written > n_written
    assert log.n_written + log.n_lost == n_added
    found = collect(small_disk / "log")
    assert (len(found.run.examples), found.n_lost) == (log.n_written, log.n_lost)
    assert f"{log.n_lost:,} answered texts are not in the log" in found.notes[0]


def test_what_a_deleted_part_had_reported_as_lost_stays_lost(run, tmp_path):
    batches, folder = answered_batches(run), tmp_path / "log"
    with TrafficLog(folder) as log:
        with log._lock:
            log._n_unreported, log.n_lost = 5, 5  # as if the queue had been full
        log.add(batches[0])
        wait_for(lambda: log.n_written)
        list_parts(folder)[0].unlink()
        log.add(batches[1])
    assert collect(folder).n_lost == log.n_lost == 5 + len(batches[0].ids)


@pytest.mark.parametrize("what", ["part", "folder", "moved folder"])
def test_another_part_is_begun_where_somebody_deletes_or_moves_it(what, run, tmp_path, caplog):
    batches, folder = answered_batches(run), tmp_path / "log"
    with TrafficLog(folder) as log:
        log.add(batches[0])
        wait_for(lambda: log.n_written)
        if what == "part":
            list_parts(folder)[0].unlink()
        elif what == "folder":
            shutil.rmtree(folder)
        else:
            folder.rename(tmp_path / "moved")
        log.add(batches[1])
    n_deleted = 0 if what == "moved folder" else len(batches[0].ids)
    assert (log.n_written, log.n_lost) == (len(batches[0].ids) + len(batches[1].ids) - n_deleted, n_deleted)
    found = collect(folder)
    assert found.run.examples["example_id"].tolist() == batches[1].ids
    assert found.n_lost == n_deleted
    if what == "moved folder":
        assert collect(tmp_path / "moved").run.examples["example_id"].tolist() == batches[0].ids
    assert [record.message.partition(": ")[2] for record in caplog.records] == [
        "was deleted or moved; the traffic log begins another part",
        *([f"{n_deleted} answered texts are not in the traffic log"] if n_deleted else []),
    ]


@pytest.mark.parametrize(
    ("number", "advice"), [(errno.EIO, "see that the folder can be written"), (errno.EDQUOT, "free some space")]
)
def test_the_advice_is_of_the_error(number, advice, run, tmp_path, monkeypatch, caplog):
    def fail(*_: object, **__: object) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(PartWriter, "write", fail)
    with TrafficLog(tmp_path) as log:
        log.add(answered_batches(run)[0])
    assert caplog.messages[0] == f"{tmp_path}: the traffic log has stopped ({os.strerror(number)}); {advice}"


@pytest.mark.parametrize("options", [{}, {"keep_texts": True}, {"shadow": 0.5}])
def test_the_queue_is_bounded_in_characters_and_keeps_only_texts_that_are_needed(options, run, tmp_path, monkeypatch):
    """While nothing can be written, a third batch has room only if the texts are dropped."""
    batches = [
        replace(one, texts=["x" * 1000] * len(one.ids), texts_b=["y"] * len(one.ids)) for one in answered_batches(run)
    ]
    limit, writable, write = sum(1010 * len(batch.ids) for batch in batches[:2]), threading.Event(), PartWriter.write

    def try_write(*arguments: object, **keywords: object) -> None:
        if not writable.is_set():
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        write(*arguments, **keywords)

    monkeypatch.setattr(PartWriter, "write", try_write)
    with TrafficLog(tmp_path, max_waiting_characters=limit, **options) as log:
        for batch in batches[:3]:
            log.add(batch)
        assert log.n_lost == (len(batches[2].ids) if options else 0)
        writable.set()
        wait_for(lambda: log.n_waiting == 0)
        log.add(batches[3])  # there is room again
    assert log.n_written + log.n_lost == sum(len(batch.ids) for batch in batches[:4])
    assert collect(tmp_path).run.examples["example_id"].tolist()[-1] == batches[3].ids[-1]


def test_a_disk_that_stays_full_loses_only_what_had_no_room(run, small_disk):
    with TrafficLog(small_disk / "log") as log:
        (small_disk / "filler").write_bytes(bytes(50_000))
        for batch in answered_batches(run):
            log.add(batch)
    assert log.n_lost + log.n_written == 200
    assert log.n_lost > 0
    assert all(path.name.endswith(".arrows") for path in (small_disk / "log").iterdir())


def test_a_folder_that_cannot_be_written_is_refused_at_the_start(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(CascadeLabError, match="the traffic log cannot be written"):
        TrafficLog(tmp_path / "file")
    with pytest.raises(CascadeLabError, match="--shadow is 5"):
        TrafficLog(tmp_path / "log", shadow=5)


def test_what_comes_after_close_is_counted_as_lost(run, tmp_path):
    log = TrafficLog(tmp_path)
    log.close()
    log.add(answered_batches(run)[0])
    assert log.n_lost == len(answered_batches(run)[0].ids)


# Shadow scores.


def test_the_choice_for_shadow_scores_is_a_random_share(run):
    chosen = is_chosen([f"request-{i}" for i in range(20_000)], 0.05)
    assert abs(chosen.sum() - 1000) < 5 * np.sqrt(20_000 * 0.05 * 0.95)
    more = is_chosen([f"request-{i}" for i in range(20_000)], 0.1)
    assert more[chosen].all()


@pytest.fixture(scope="module")
def with_distances(tiny, tiny_evalset, tmp_path_factory):
    """The tiny cascade with a rejector that needs features of both stages."""
    folder = tmp_path_factory.mktemp("distances")
    with Cascade.load(tiny, keep_features=True) as cascade:
        kept = cascade.run(EvalSet.read(tiny_evalset), output=folder / "kept")
    fit_rejector(kept, ["gate", "energy", "mahalanobis", "gate.knn"], train_run=kept).write(folder / "cascade.toml")
    return folder / "cascade.toml"


@pytest.mark.parametrize("kind", ["tiny", "with_distances"])
def test_what_a_real_cascade_served_is_collected_with_its_shadow_scores(kind, request, tmp_path):
    """Requests go through the batcher; when it is idle it scores the texts of the sample."""
    path, sentences = request.getfixturevalue(kind), texts(150, seed=4)
    with Cascade.load(path) as loaded:
        middle = float(loaded.predict(sentences)["gate_probability"].median())
        cascade = loaded.with_spec(loaded.spec.with_thresholds({"gate": middle}))
        with (
            TrafficLog(tmp_path / "log", keep_texts=True, shadow=0.5) as log,
            Batcher(cascade, log=log.add, idle=log.score_shadow) as batcher,
        ):
            requests = [range(i, min(i + 7, 150)) for i in range(0, 150, 7)]
            answers = [batcher.predict([sentences[j] for j in rows], ids=[f"{j}" for j in rows]) for rows in requests]
            wait_for(lambda: log.n_written == 150 and not log.n_waiting and not log.n_shadow_waiting)
        found, sample = collect(tmp_path / "log"), collect(tmp_path / "log", sample=True)
        expected = cascade.run(
            EvalSet.from_frame(found.run.examples[["text"]], unlabelled=True), output=tmp_path / "run"
        )
    served = np.concatenate([one["predicted"] for one in answers])
    order = found.run.examples["example_id"].astype(int)
    assert sorted(order) == list(range(150))
    assert found.run.replay()["predicted"].tolist() == served[order].tolist()
    assert (found.n_differing, found.notes, sample.n_unscored) == (0, (), 0)
    assert log.n_shadow > 10
    rows = np.flatnonzero(is_chosen(found.run.examples["example_id"].tolist(), 0.5))
    for stage in expected.spec.stages:
        own = sample.run.scores(stage.name)
        np.testing.assert_allclose(own.logits, expected.scores(stage.name).logits[rows], atol=1e-4)
    for name, values in expected.evidence(expected.spec).items():
        np.testing.assert_allclose(sample.run.evidence(sample.run.spec)[name], values[rows], rtol=1e-3)
    passed = sample.run.with_thresholds({"gate": 0.0})
    np.testing.assert_array_equal(
        passed.predictions["predicted"], expected.select(rows).with_thresholds({"gate": 0.0}).predictions["predicted"]
    )
    assert (passed.predictions["decided_by"] == "intent").all()


def test_too_many_texts_for_shadow_scoring_are_dropped_and_counted(run, tmp_path):
    once = answered_batches(run)
    batches = [replace(batch, ids=[f"{k}-{one}" for one in batch.ids]) for k in range(30) for batch in once]
    with TrafficLog(tmp_path, shadow=1.0) as log:
        for batch in batches:
            log.add(batch)
        wait_for(lambda: log.n_written == 30 * 200 and log.n_waiting == 0)
        assert log.n_shadow_waiting == MAX_WAITING
        assert log.n_shadow_dropped == 30 * 200 - MAX_WAITING


@pytest.mark.parametrize("second", ["", None])
def test_a_second_text_that_is_empty_is_scored_as_one(second, run):
    """As when it is answered: "" is a second text, and None is none."""
    batch, given = answered_batches(run)[0], []
    queue = ShadowQueue(1.0)
    queue.add(replace(batch, texts_b=[second] * len(batch.ids)))
    stages = [
        SimpleNamespace(
            spec=spec,
            encode=lambda texts, texts_b: given.append(texts_b) or texts,
            score=lambda texts, **_: (StageOutput(np.zeros((len(texts), 2)), None), None),
            exact=None,  # its precision is not mixed
        )
        for spec in run.spec.stages
    ]
    queue.score(SimpleNamespace(spec=run.spec, stages=stages), batch.cascade, n_texts=100)
    assert given
    assert all(one is None if second is None else set(one) == {""} for one in given)


def test_the_log_keeps_no_file_open(run, tmp_path):
    before = len(os.listdir("/proc/self/fd")) if os.path.isdir("/proc/self/fd") else 0
    for k in range(5):
        with TrafficLog(tmp_path / f"{k % 2}", max_bytes=2000) as log:
            for batch in answered_batches(run):
                log.add(batch)
    after = len(os.listdir("/proc/self/fd")) if os.path.isdir("/proc/self/fd") else 0
    assert after == before

"""The batches of the service: answers equal to `predict`'s, whatever arrives when, and nothing lost or doubled."""

from __future__ import annotations

import asyncio
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from concurrent.futures import TimeoutError as FutureTimeoutError
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
from helpers import texts, write_checkpoint

from cascade_lab import Cascade
from cascade_lab.exceptions import CascadeLabError
from cascade_lab.serving import batching
from cascade_lab.serving.answered import Answered, ServedCascade
from cascade_lab.serving.batching import Batcher, ClosedError, QueueFullError
from cascade_lab.serving.live_cascade import LiveCascade
from cascade_lab.spec import CascadeSpec


@pytest.fixture(scope="module")
def loaded(tiny):
    with Cascade.load(tiny) as cascade:
        yield cascade


class Gate:
    """Stops the scoring thread before a batch until it is opened."""

    def __init__(self, cascade: Cascade, monkeypatch: pytest.MonkeyPatch):
        self.arrived, self.opened, self.sizes = threading.Event(), threading.Event(), []
        answer = cascade.answer

        def slow_answer(encodings, *rest):
            self.sizes.append(len(encodings))
            self.arrived.set()
            assert self.opened.wait(30)
            return answer(encodings, *rest)

        monkeypatch.setattr(cascade, "answer", slow_answer)


def assert_same(answers: pd.DataFrame, expected: pd.DataFrame) -> None:
    pd.testing.assert_frame_equal(answers.reset_index(drop=True), expected.reset_index(drop=True), atol=1e-5)


def test_answers_of_many_threads_equal_predict_row_for_row(loaded):
    pool = texts(300, seed=1)
    pairs = [second if i % 3 else None for i, second in enumerate(texts(300, seed=2))]
    expected = {None: loaded.predict(pool), "pairs": loaded.predict(pool, pairs)}
    logged: list[Answered] = []
    seen: dict[str, int] = {}

    def client(number: int) -> None:
        rng = np.random.default_rng(number)
        for request in range(16):
            rows = rng.integers(0, 300, rng.choice([1, 1, 2, 5, 40, 100]))
            kind = None if rng.random() < 0.5 else "pairs"
            second = None if kind is None else [pairs[row] for row in rows]
            ids = [f"{number}/{request}/{kind}/{row}/{i}" for i, row in enumerate(rows)]
            answers = batcher.predict([pool[row] for row in rows], second, ids=ids)
            assert_same(answers, expected[kind].iloc[rows])

    with Batcher(loaded, max_waiting_texts=10**6, log=logged.append) as batcher:
        with ThreadPoolExecutor(12) as clients:
            list(clients.map(client, range(12)))
        assert batcher.n_waiting_texts == 0
    for batch in logged:
        rows = [int(name.split("/")[3]) for name in batch.ids]
        kinds = [name.split("/")[2] for name in batch.ids]
        for i, name in enumerate(batch.ids):
            seen[name] = seen.get(name, 0) + 1
            of = expected["pairs" if kinds[i] == "pairs" else None].iloc[rows[i]]
            assert (batch.predictions["predicted"][i], batch.predictions["decided_by"][i]) == (
                of.predicted,
                of.decided_by,
            )
            assert batch.texts[i] == pool[rows[i]]
        for stage in loaded.spec.stages:
            rows_seen, logits, _ = batch.scores[stage.name]
            assert logits.shape == (len(rows_seen), len(stage.labels))
            known = ~np.isnan(batch.predictions[f"{stage.name}_probability"])
            assert np.flatnonzero(known).tolist() == rows_seen.tolist()
    assert set(seen.values()) == {1}
    assert max(len(batch.ids) for batch in logged) > 100, "requests of several threads share batches"


def test_a_lone_text_is_scored_at_once_and_a_batch_is_what_waits(loaded, monkeypatch):
    gate = Gate(loaded, monkeypatch)
    with Batcher(loaded) as batcher, ThreadPoolExecutor(20) as clients:
        first = clients.submit(batcher.predict, ["pay my bill"])
        assert gate.arrived.wait(10)
        others = [clients.submit(batcher.predict, ["play music"]) for _ in range(15)]
        while batcher.n_waiting_texts < 16:
            time.sleep(0.001)
        gate.opened.set()
        assert len(first.result()) == 1
        assert all(len(other.result()) == 1 for other in others)
    assert gate.sizes == [1, 15]


def test_a_large_request_lets_others_take_turns(loaded, monkeypatch):
    monkeypatch.setattr(batching, "MAX_BATCH_TOKENS", 256)
    gate = Gate(loaded, monkeypatch)
    order = []
    with Batcher(loaded) as batcher, ThreadPoolExecutor(3) as clients:
        large = clients.submit(batcher.predict, texts(1000))
        assert gate.arrived.wait(10)
        small = clients.submit(batcher.predict, ["play music"])
        large.add_done_callback(lambda _: order.append("large"))
        small.add_done_callback(lambda _: order.append("small"))
        while batcher.n_waiting_texts < 1001:
            time.sleep(0.001)
        gate.opened.set()
        assert len(large.result()) == 1000
    assert order == ["small", "large"]
    assert max(gate.sizes) < 100


def test_a_full_queue_refuses_but_a_large_request_alone_is_accepted(loaded, monkeypatch):
    gate = Gate(loaded, monkeypatch)
    with Batcher(loaded, max_waiting_texts=8) as batcher, ThreadPoolExecutor(3) as clients:
        alone = clients.submit(batcher.predict, texts(20))
        assert gate.arrived.wait(10)
        with pytest.raises(QueueFullError, match="20 texts are waiting") as refused:
            batcher.predict(["pay"])
        assert 0 < refused.value.retry_after < 60
        gate.opened.set()
        assert len(alone.result()) == 20
        assert len(batcher.predict(texts(8))) == 8
    with pytest.raises(ClosedError):
        batcher.predict(["pay"])


def test_texts_of_a_caller_who_no_longer_waits_are_not_scored(loaded, monkeypatch):
    gate = Gate(loaded, monkeypatch)
    with Batcher(loaded) as batcher, ThreadPoolExecutor(3) as clients:
        first = clients.submit(batcher.predict, ["pay my bill"])
        assert gate.arrived.wait(10)
        with pytest.raises(TimeoutError if issubclass(TimeoutError, OSError) else Exception):
            batcher.predict(texts(50), timeout=0.05)

        async def cancelled() -> None:
            future = batcher.submit(texts(60))
            future.cancel()

        asyncio.run(cancelled())
        gate.opened.set()
        first.result()
        assert len(batcher.predict(["pay"])) == 1
        assert batcher.n_waiting_texts == 0
    assert gate.sizes == [1, 1]


def test_what_is_accepted_is_answered_when_the_batcher_closes(loaded, monkeypatch):
    gate = Gate(loaded, monkeypatch)
    with ThreadPoolExecutor(10) as clients:
        batcher = Batcher(loaded)
        requests = [clients.submit(batcher.predict, texts(40, seed=i)) for i in range(8)]
        while batcher.n_waiting_texts < 320:
            time.sleep(0.001)
        closing = clients.submit(batcher.close)
        while batcher.is_ready:
            time.sleep(0.001)
        gate.opened.set()
        closing.result()
        assert [len(request.result()) for request in requests] == [40] * 8


def test_a_text_that_cannot_be_scored_fails_alone(loaded, monkeypatch):
    answer = loaded.answer

    def failing(encodings, batch, second):
        if "lost card" in batch:
            raise RuntimeError("overflow")
        return answer(encodings, batch, second)

    gate = Gate(loaded, monkeypatch)
    with Batcher(loaded) as batcher, ThreadPoolExecutor(9) as clients:
        first = clients.submit(batcher.predict, ["pay my bill"])
        assert gate.arrived.wait(10)
        good = [clients.submit(batcher.predict, [f"play {word}"]) for word in ("a", "my", "the")]
        bad = clients.submit(batcher.predict, [*texts(70), "lost card", *texts(70)])
        while batcher.n_waiting_texts < 145:
            time.sleep(0.001)
        monkeypatch.setattr(loaded, "answer", failing)
        gate.opened.set()
        assert [len(request.result()) for request in (first, *good)] == [1, 1, 1, 1]
        with pytest.raises(RuntimeError, match="overflow"):
            bad.result()
        assert len(batcher.predict(["pay"])) == 1
        assert batcher.n_waiting_texts == 0


def test_listeners_that_fail_do_not_stop_the_service(loaded):
    def broken(*_: object) -> bool:
        raise OSError("no space")

    with Batcher(loaded, log=broken, observe=broken, idle=broken) as batcher:
        for _ in range(3):
            assert len(batcher.predict(["pay my bill"])) == 1
            time.sleep(0.02)


def test_idle_work_is_done_only_while_nothing_waits(loaded, monkeypatch):
    done = []

    def idle(cascade: Cascade, served: ServedCascade) -> bool:
        done.append((cascade, served))
        return len(done) < 5

    gate = Gate(loaded, monkeypatch)
    with Batcher(loaded, idle=idle) as batcher, ThreadPoolExecutor(1) as clients:
        request = clients.submit(batcher.predict, ["pay"])
        assert gate.arrived.wait(10)
        n_before = len(done)
        time.sleep(1.5 * batching.IDLE_SECONDS)
        assert len(done) == n_before
        gate.opened.set()
        request.result()
        time.sleep(2.5 * batching.IDLE_SECONDS)
        assert len(done) > max(n_before, 4)


def test_another_cascade_answers_new_requests_and_the_old_one_completes_its_own(tiny, tmp_path, monkeypatch):
    spec = CascadeSpec.read(tiny)
    reject_all = spec.with_thresholds({"gate": 1.0})
    other_models = replace(spec, stages=(spec.stages[0], replace(spec.stages[1], max_seq_length=6)))
    pool = texts(200, seed=5)
    with Cascade.load(spec) as cascade:
        expected = cascade.predict(pool)
    closed = []
    close = Cascade.close
    monkeypatch.setattr(Cascade, "close", lambda self: (closed.append(self), close(self))[1])
    monkeypatch.setattr(batching, "MAX_BATCH_TOKENS", 256)
    first = LiveCascade.load(spec)
    gate = Gate(first.cascade, monkeypatch)
    reject_all.write(tmp_path / "cascade.toml")
    with Batcher(first) as batcher, ThreadPoolExecutor(2) as clients:
        request = clients.submit(batcher.predict, pool)
        assert gate.arrived.wait(10)
        second = first.reload(tmp_path / "cascade.toml")
        assert second.cascade.stages is first.cascade.stages
        assert second.served.digest != first.served.digest
        batcher.replace(second)
        other_models.write(tmp_path / "cascade.toml")
        third = second.reload(tmp_path / "cascade.toml")
        assert third.cascade.stages is not first.cascade.stages
        between = clients.submit(batcher.predict, pool[:4])
        while batcher.n_waiting_texts < 204:
            time.sleep(0.001)
        gate.opened.set()
        assert set(between.result().predicted) == {"oos"}
        batcher.replace(third)
        assert_same(request.result(), expected)
        assert_same(batcher.predict(pool), third.cascade.predict(pool))
        assert batcher.current is third
        assert {id(cascade.stages) for cascade in closed} == {id(first.cascade.stages)}
    assert closed[-1] is third.cascade


def test_the_digest_tells_which_of_three_stages_has_which_file(tiny, tmp_path):
    spec = CascadeSpec.read(tiny)
    gate, last = spec.stages
    write_checkpoint(tmp_path / "other", 2, seed=3)
    files = [gate.init_checkpoint, tmp_path / "other"]
    digests = set()
    for order in ((0, 1, 0), (0, 1, 1), (1, 0, 1)):
        gates = [replace(gate, name=f"gate{i}", init_checkpoint=str(files[k])) for i, k in enumerate(order)]
        with Cascade.load(replace(spec, stages=(*gates, last))) as cascade:
            digests.add(LiveCascade.of(cascade).served.digest)
    assert len(digests) == 3


@pytest.mark.parametrize("given", [([],), (["a"], []), (["a", "b"], [None])])
def test_a_request_of_unequal_lengths_is_refused(loaded, given):
    with Batcher(loaded) as batcher, pytest.raises(CascadeLabError, match="as many second texts and ids"):
        batcher.predict(*given)


def test_what_is_no_text_fails_alone(loaded):
    with Batcher(loaded) as batcher:
        with pytest.raises(TypeError):
            batcher.predict([None])
        assert len(batcher.predict(["pay"])) == 1
        assert batcher.n_waiting_texts == 0


def test_no_text_is_counted_twice_when_its_request_is_cancelled_and_fails(loaded, monkeypatch):
    gate = Gate(loaded, monkeypatch)
    with Batcher(loaded) as batcher, ThreadPoolExecutor(4) as clients:
        first = clients.submit(batcher.predict, ["pay"])
        assert gate.arrived.wait(10)
        late = clients.submit(batcher.predict, texts(100), timeout=0.2)
        with pytest.raises((TimeoutError, FutureTimeoutError)):
            late.result(10)
        monkeypatch.setattr(loaded, "answer", lambda *_: 1 / 0)
        failing = clients.submit(batcher.predict, texts(100))
        gate.opened.set()
        first.result(10)
        with pytest.raises(ZeroDivisionError):
            failing.result(10)
        assert batcher.n_waiting_texts == 0


def test_other_thresholds_again_and_again_are_not_all_kept(tiny):
    live = LiveCascade.load(tiny)
    with Batcher(live) as batcher:
        for number in range(20):
            spec = live.cascade.spec.with_thresholds({"gate": number / 20})
            batcher.replace(replace(live, cascade=live.cascade.with_spec(spec)))
            batcher.predict(["pay"])
        assert len(batcher._replaced) <= 1


def test_the_end_of_scoring_is_told(loaded, monkeypatch):
    def fail(*_: object) -> None:
        raise SystemExit

    batcher = Batcher(loaded)
    monkeypatch.setattr(batcher, "_next_batch", fail)
    with pytest.raises(RuntimeError, match="scoring has ended"):
        batcher.predict(["pay"])
    batcher.close()
    assert batcher.has_failed
    assert not batcher.is_ready
    with pytest.raises(ClosedError):
        batcher.predict(["pay"])

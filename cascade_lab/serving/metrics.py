"""The service's numbers in Prometheus' format, under the lab's own names."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from cascade_lab.serving.batching import ScoredBatch
from cascade_lab.serving.live_cascade import LiveCascade

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
_SECONDS = (0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0)
_TEXTS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512)
_TOKENS = (16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192)


class Metrics:
    """Counts what a service does.

    A stage's reach is the rate of `cascade_lab_stage_texts_total` of that stage divided by that of the first stage; the
    reject rate that of `cascade_lab_rejected_texts_total` divided by that of `cascade_lab_answered_texts_total`.

    Parameters
    ----------
    n_waiting_texts : callable
        Returns how many texts wait.
    current : callable
        Returns the `LiveCascade` that answers.
    """

    def __init__(self, n_waiting_texts: Callable[[], int], current: Callable[[], LiveCascade]):
        self._registry = CollectorRegistry()
        self._current = current
        counter, histogram = self._counter, self._histogram
        self._answered = counter("answered_texts", "Texts answered, by the stage that decided.", "stage")
        self._rejected = counter("rejected_texts", "Texts answered with a label that rejects, by stage.", "stage")
        self._reached = counter("stage_texts", "Texts that a stage scored.", "stage")
        self._stage_seconds = counter("stage_seconds", "Seconds in a stage's session, added over threads.", "stage")
        self._batch_seconds = histogram("batch_seconds", "Seconds to answer a batch.", _SECONDS)
        self._batch_texts = histogram("batch_texts", "Texts in a batch.", _TEXTS)
        self._batch_tokens = histogram("batch_tokens", "Tokens in a batch, of the first stage.", _TOKENS)
        self._requests = counter("requests", "Requests, by protocol and HTTP status.", "protocol", "status")
        self._request_seconds = histogram("request_seconds", "Seconds from the headers to the answer.", _SECONDS)
        self._reloads = counter("reloads", "Reloads of the cascade, by result.", "result")
        waiting = Gauge("cascade_lab_waiting_texts", "Texts accepted and not answered.", registry=self._registry)
        waiting.set_function(n_waiting_texts)
        about = ["name", "digest"]
        self._info = Gauge("cascade_lab_cascade", "1 for the cascade that answers.", about, registry=self._registry)

    def _counter(self, name: str, text: str, *labels: str) -> Counter:
        return Counter(f"cascade_lab_{name}", text, labels, registry=self._registry)

    def _histogram(self, name: str, text: str, buckets: tuple[float, ...]) -> Histogram:
        return Histogram(f"cascade_lab_{name}", text, buckets=buckets, registry=self._registry)

    def watch(self, name: str, text: str, value: Callable[[], float]) -> None:
        """Show another number; `value` returns it."""
        Gauge(f"cascade_lab_{name}", text, registry=self._registry).set_function(value)

    def count_batch(self, batch: ScoredBatch) -> None:
        """Count a batch; the scoring thread calls it."""
        routed = batch.result.routed
        rejects = np.isin(routed.predicted.astype(str), batch.live.cascade.spec.reject_labels)
        for stage, scored in batch.result.scored.items():
            decided = routed.decided_by == stage
            self._answered.labels(stage).inc(int(decided.sum()))
            self._rejected.labels(stage).inc(int((decided & rejects).sum()))
            self._reached.labels(stage).inc(len(scored.rows))
        for stage, *_, run_seconds in batch.result.timings:
            self._stage_seconds.labels(stage).inc(run_seconds)
        self._batch_seconds.observe(batch.seconds)
        self._batch_texts.observe(len(routed.predicted))
        self._batch_tokens.observe(batch.n_tokens)

    def count_request(self, protocol: str, status: int, seconds: float) -> None:
        """Count a request that was answered, also with an error."""
        self._requests.labels(protocol, str(status)).inc()
        self._request_seconds.observe(seconds)

    def count_reload(self, result: str) -> None:
        """Count a reload: "thresholds", "models" or "refused"."""
        self._reloads.labels(result).inc()

    def page(self) -> bytes:
        """Return all numbers in Prometheus' text format."""
        served = self._current().served
        self._info.clear()
        self._info.labels(served.manifest["cascade"]["name"], served.digest).set(1)
        return generate_latest(self._registry)


def log_metrics(metrics: Metrics, log: Any) -> None:
    """Show the numbers of a `TrafficLog`."""
    metrics.watch("log_written_texts", "Answered texts in the traffic log's files.", lambda: log.n_written)
    metrics.watch("log_lost_texts", "Answered texts that the traffic log could not keep.", lambda: log.n_lost)
    metrics.watch("log_shadow_texts", "Texts of the sample that every stage has scored.", lambda: log.n_shadow)
    metrics.watch("log_shadow_waiting_texts", "Texts that wait for shadow scores.", lambda: log.n_shadow_waiting)
    metrics.watch("log_shadow_dropped_texts", "Chosen texts that got no turn.", lambda: log.n_shadow_dropped)
    metrics.watch("log_stopped", "1 while the traffic log cannot write.", lambda: float(log.problem is not None))

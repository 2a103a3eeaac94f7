"""Metrics for Prometheus, under the names that vLLM's dashboards know."""

import time
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from infer.engine import EngineStats
from infer.expert_cache import PagingCounts

FIRST_TOKEN = (0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1, 2.5, 5, 10, 40)
BETWEEN = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.5, 0.75, 1, 2.5)
WHOLE = (0.1, 0.3, 0.5, 0.8, 1, 1.5, 2, 2.5, 5, 10, 15, 20, 30, 60, 120, 240, 480, 960)

COUNTED = {
    "prompt_tokens": ("vllm:prompt_tokens", "Tokens of prompts that were read."),
    "generated_tokens": ("vllm:generation_tokens", "Tokens that were generated."),
    "prefix_queries": ("vllm:prefix_cache_queries", "Prompt tokens looked up in the cache."),
    "prefix_hits": ("vllm:prefix_cache_hits", "Prompt tokens found in the cache."),
    "preemptions": ("vllm:num_preemptions", "Requests that gave their row up for a while."),
}
"""What an engine counts, by its name there."""
PAGED = {
    "requests": ("moesaic:experts_requested", "Experts of a layer that steps asked for."),
    "on_demand": ("moesaic:experts_waited_for", "Experts brought while a step waited."),
    "ahead": ("moesaic:experts_brought_ahead", "Experts brought as a forecast named them."),
    "forecast": ("moesaic:experts_forecast", "Experts asked for by steps with a forecast."),
    "foretold": ("moesaic:experts_foretold", "Those of them that the forecast had named."),
}
"""What an engine counts whose experts are paged."""
RATES = {
    "hit_rate": ("moesaic:expert_hit_rate", "Share of requests that nothing was brought for."),
    "ready_rate": ("moesaic:expert_ready_rate", "Share of requests whose expert was there."),
}


class Metrics:
    """The server's counters, in a registry of their own."""

    def __init__(self, model_name: str) -> None:
        self.registry = CollectorRegistry()
        self._name = model_name
        self.running = self._gauge("vllm:num_requests_running", "Requests that have a row.")
        self.waiting = self._gauge("vllm:num_requests_waiting", "Requests that wait for a row.")
        self.cache_usage = self._gauge("vllm:kv_cache_usage_perc", "Share of pages in use, 0 to 1.")
        self.counters = {key: self._counter(*names) for key, names in COUNTED.items()}
        self.cached = self._counter("vllm:prompt_tokens_cached", "Prompt tokens from the cache.")
        self.rejected = self._counter("vllm:admission_rejections", "Requests refused: full queue.")
        self.corrupted = self._counter("vllm:corrupted_requests", "Requests that failed midway.")
        self.success = Counter(
            "vllm:request_success",
            "Requests that ended.",
            ("model_name", "finished_reason"),
            registry=self.registry,
        )
        self.first_token = self._histogram(
            "vllm:time_to_first_token_seconds", "Until the first token.", FIRST_TOKEN
        )
        self.between = self._histogram(
            "vllm:inter_token_latency_seconds", "Between two tokens.", BETWEEN
        )
        self.per_token = self._histogram(
            "vllm:request_time_per_output_token_seconds", "Mean between tokens.", BETWEEN
        )
        self.whole = self._histogram("vllm:e2e_request_latency_seconds", "Until the end.", WHOLE)
        self.decoding = self._histogram(
            "vllm:request_decode_time_seconds", "From the first token to the last.", WHOLE
        )
        self._paged: tuple[dict[str, Counter], dict[str, Gauge]] | None = None
        """Where experts are paged."""
        self.latest: EngineStats | None = None
        self._before = dict.fromkeys((*COUNTED, *PAGED), 0)

    def step(self, stats: EngineStats) -> None:
        """Takes what the engine counts; another engine counts from 0 again."""
        self.latest = stats
        self.running.set(stats.running)
        self.waiting.set(stats.waiting)
        if stats.num_pages:
            self.cache_usage.set(1 - stats.free_pages / stats.num_pages)
        self._count(self.counters, stats)
        if stats.paging is not None:
            self._page(stats.paging)

    def _page(self, counts: PagingCounts) -> None:
        """Takes what was brought of experts."""
        if self._paged is None:
            counters = {key: self._counter(*names) for key, names in PAGED.items()}
            self._paged = counters, {key: self._gauge(*names) for key, names in RATES.items()}
        counters, rates = self._paged
        self._count(counters, counts)
        for key, gauge in rates.items():
            gauge.set(getattr(counts, key))

    def _count(self, counters: dict[str, Counter], found: Any) -> None:
        for key, counter in counters.items():
            value, before = getattr(found, key), self._before[key]
            counter.inc(value - before if value >= before else value)
            self._before[key] = value

    def text(self) -> bytes:
        return generate_latest(self.registry)

    def ended(self, reason: str) -> None:
        self.success.labels(self._name, reason).inc()

    def _gauge(self, name: str, doc: str) -> Gauge:
        return Gauge(name, doc, ("model_name",), registry=self.registry).labels(self._name)

    def _counter(self, name: str, doc: str) -> Counter:
        return Counter(name, doc, ("model_name",), registry=self.registry).labels(self._name)

    def _histogram(self, name: str, doc: str, buckets: tuple[float, ...]) -> Histogram:
        made = Histogram(name, doc, ("model_name",), registry=self.registry, buckets=buckets)
        return made.labels(self._name)


class RequestTimes:
    """When the tokens of one answer came."""

    def __init__(self, metrics: Metrics, began: float) -> None:
        self._metrics, self._began = metrics, began
        self._first: float | None = None
        self._last = began

    def tokens(self, count: int) -> None:
        if not count:
            return
        now, metrics = time.monotonic(), self._metrics
        if self._first is None:
            self._first = now
            metrics.first_token.observe(now - self._began)
            count -= 1
        for _ in range(count):
            metrics.between.observe((now - self._last) / count)
        self._last = now

    def ended(self, reason: str, prompt_tokens: int, answer: Any) -> None:
        metrics = self._metrics
        metrics.ended(reason)
        metrics.cached.inc(min(answer.cached_tokens, prompt_tokens))
        if reason == "abort" or self._first is None:
            return
        metrics.whole.observe(self._last - self._began)
        metrics.decoding.observe(self._last - self._first)
        if answer.num_tokens > 1:
            metrics.per_token.observe((self._last - self._first) / (answer.num_tokens - 1))

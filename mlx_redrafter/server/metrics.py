"""What the server counts, for Prometheus."""

from collections.abc import Callable

import mlx.core as mx
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from .generation import Usage

SECONDS = (0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 300)
RATES = (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000)
PER_STEP = (1, 1.25, 1.5, 1.75, 2, 2.5, 3, 4, 5, 8)


class Metrics:
    """Counters of one server."""

    def __init__(self) -> None:
        self._registry = CollectorRegistry()
        self.requests = self._counter("requests", "HTTP requests", "path", "status")
        self.tokens = self._counter("tokens", "Tokens: prompt, cached, completion, drafted, accepted", "kind")
        self.steps = self._counter("steps", "Steps of texts after their first token")
        self.first = self._histogram("first_token_seconds", "From a request to its first token", SECONDS)
        self.rate = self._histogram("tokens_per_second", "Of a request, after its first token", RATES)
        self.per_step = self._histogram("tokens_per_step", "Of a request", PER_STEP)
        self.gauge("memory_bytes", "Memory that MLX uses", mx.get_active_memory)

    def _counter(self, name: str, text: str, *labels: str) -> Counter:
        return Counter(f"mlx_redrafter_{name}", text, labels, registry=self._registry)

    def _histogram(self, name: str, text: str, buckets: tuple[float, ...]) -> Histogram:
        return Histogram(f"mlx_redrafter_{name}", text, buckets=buckets, registry=self._registry)

    def gauge(self, name: str, text: str, value: Callable[[], float]) -> None:
        """Tell a number as it is when asked for."""
        Gauge(f"mlx_redrafter_{name}", text, registry=self._registry).set_function(value)

    def count(self, usage: Usage) -> None:
        """Take in what a request took."""
        for kind in ("prompt", "cached", "completion", "drafted", "accepted"):
            self.tokens.labels(kind).inc(getattr(usage, f"{kind}_tokens"))
        self.steps.inc(usage.steps)
        if usage.first_token_seconds is not None:
            self.first.observe(usage.first_token_seconds)
        found = usage.extensions
        if "tokens_per_second" in found:
            self.rate.observe(found["tokens_per_second"])
            self.per_step.observe(found["tokens_per_step"])

    def text(self) -> bytes:
        """All of it, as Prometheus reads it."""
        return generate_latest(self._registry)

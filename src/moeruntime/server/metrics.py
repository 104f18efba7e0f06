"""What Prometheus is told: vLLM's names under `moec:`, and activations, queues and rejections.

Counters and histograms are kept as events come; gauges are read from the engine's last snapshot
when somebody asks.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterator, Sequence

from prometheus_client import (
    CollectorRegistry,
    Counter,
    Histogram,
    disable_created_metrics,
    generate_latest,
)
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector

from moeruntime.request import Output
from moeruntime.server.loop import EngineLoop

__all__ = ["Metrics", "Timing"]

_TTFT_S = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60)
_TPOT_S = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5)
_LATENCY_S = (0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300)
_TOKENS = (1, 4, 16, 64, 256, 1024, 4096, 16384, 65536)
NUM_RECENT = 256


class Timing:
    """Of one sequence: when it came, when its first token did and how many followed."""

    def __init__(self) -> None:
        """It comes now."""
        self.arrived_s = time.perf_counter()
        self.first_s: float | None = None
        self.last_s = self.arrived_s
        self.num_tokens = 0


class Metrics:
    """All of one server's numbers, in a registry of its own."""

    def __init__(self, loop: EngineLoop, variants: Sequence[str]) -> None:
        """Begin at nothing, with every variant named so that rates are known from the start."""
        disable_created_metrics()  # type: ignore[no-untyped-call] # they double the lines, and say only when a label was met
        self.registry = CollectorRegistry(auto_describe=False)
        names, registry = ("model_name",), self.registry

        def histogram(name: str, what: str, buckets: Sequence[float]) -> Histogram:
            return Histogram(f"moec:{name}", what, names, buckets=buckets, registry=registry)

        self._prompt_tokens = Counter(
            "moec:prompt_tokens",
            "Tokens of prompts of finished requests.",
            names,
            registry=registry,
        )
        self._new_tokens = Counter(
            "moec:generation_tokens", "Tokens generated.", names, registry=registry
        )
        self._success = Counter(
            "moec:request_success",
            "Sequences that ran to their end.",
            ("model_name", "finished_reason"),
            registry=registry,
        )
        self._rejected = Counter(
            "moec:request_rejected",
            "Requests that were refused or failed.",
            ("model_name", "reason"),
            registry=registry,
        )
        self._aborted = Counter(
            "moec:request_aborted", "Sequences whose caller left.", names, registry=registry
        )
        self._ttft = histogram("time_to_first_token_seconds", "Time to first token.", _TTFT_S)
        self._between = histogram(
            "inter_token_latency_seconds", "Between two tokens of one sequence.", _TPOT_S
        )
        self._tpot = histogram(
            "request_time_per_output_token_seconds",
            "Mean time per token of a sequence, after its first.",
            _TPOT_S,
        )
        self._latency = histogram(
            "e2e_request_latency_seconds", "From arrival to the last token.", _LATENCY_S
        )
        self._prompt_sizes = histogram("request_prompt_tokens", "Tokens of a prompt.", _TOKENS)
        self._answer_sizes = histogram("request_generation_tokens", "Tokens generated.", _TOKENS)
        registry.register(_Gauges(loop))
        self._recent: dict[str, deque[float]] = {}
        self.num_tokens: dict[str, int] = {}
        for name in variants:
            self._recent[name] = deque(maxlen=NUM_RECENT)
            self.num_tokens[name] = 0
            counted = (self._prompt_tokens, self._new_tokens, self._aborted)
            for family in (*counted, self._ttft, self._between, self._tpot, self._latency):
                family.labels(name)
            for reason in ("stop", "length"):
                self._success.labels(name, reason)
            self._rejected.labels(name, "queue_full")

    def render(self) -> bytes:
        """Prometheus' text format."""
        return generate_latest(self.registry)

    def token(self, variant: str, timing: Timing) -> None:
        """A sequence got a token."""
        now_s = time.perf_counter()
        if timing.first_s is None:
            timing.first_s = now_s
            ttft_s = now_s - timing.arrived_s
            self._ttft.labels(variant).observe(ttft_s)
            self._recent[variant].append(ttft_s)
        else:
            self._between.labels(variant).observe(now_s - timing.last_s)
        timing.last_s = now_s
        timing.num_tokens += 1
        self._new_tokens.labels(variant).inc()
        self.num_tokens[variant] += 1

    def finished(self, output: Output, timing: Timing) -> None:
        """A sequence ran to its end."""
        variant = output.variant
        self._success.labels(variant, output.finish_reason).inc()
        self._prompt_tokens.labels(variant).inc(output.num_prompt_tokens)
        self._prompt_sizes.labels(variant).observe(output.num_prompt_tokens)
        self._answer_sizes.labels(variant).observe(len(output.token_ids))
        self._latency.labels(variant).observe(timing.last_s - timing.arrived_s)
        if timing.first_s is not None and timing.num_tokens > 1:
            tpot_s = (timing.last_s - timing.first_s) / (timing.num_tokens - 1)
            self._tpot.labels(variant).observe(tpot_s)

    def aborted(self, variant: str) -> None:
        """A sequence's caller left, or its time was over."""
        self._aborted.labels(variant).inc()

    def rejected(self, variant: str, reason: str) -> None:
        """A request got an error; `variant` is empty where none was named."""
        self._rejected.labels(variant, reason).inc()

    def ttft_ms(self, variant: str) -> dict[str, float | None]:
        """Median and 99th percentile of the last NUM_RECENT first tokens."""
        ordered = sorted(self._recent[variant])
        if not ordered:
            return {"p50": None, "p99": None}
        return {
            name: round(1000 * ordered[min(len(ordered) - 1, int(len(ordered) * part))], 2)
            for name, part in (("p50", 0.5), ("p99", 0.99))
        }


class _Gauges(Collector):
    """Reads the engine's last snapshot."""

    def __init__(self, loop: EngineLoop) -> None:
        self._loop = loop

    def collect(self) -> Iterator[Metric]:
        snapshot = self._loop.snapshot
        labels = ("model_name",)
        running = GaugeMetricFamily(
            "moec:num_requests_running", "Sequences in the batch.", labels=labels
        )
        waiting = GaugeMetricFamily(
            "moec:num_requests_waiting", "Sequences that wait.", labels=labels
        )
        resident = GaugeMetricFamily("moec:variant_resident", "1 if it has a slot.", labels=labels)
        for name, one in snapshot.variants.items():
            running.add_metric((name,), one.num_running)
            waiting.add_metric((name,), one.num_waiting)
            resident.add_metric((name,), float(one.resident))
        yield from (running, waiting, resident)
        yield GaugeMetricFamily(
            "moec:kv_cache_usage_perc",
            "Part of the cache blocks that somebody owns, 0 to 1.",
            value=snapshot.cache_usage,
        )
        for name, what, value in (
            ("activations", "Variants copied into a slot.", snapshot.num_activations),
            ("prefix_cache_hits", "Prompt tokens found in the cache.", snapshot.num_reused_tokens),
            ("engine_steps", "Steps that ran.", snapshot.num_steps),
        ):
            yield CounterMetricFamily(f"moec:{name}", what, value=value)

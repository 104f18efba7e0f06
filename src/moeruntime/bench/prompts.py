"""Prompts: how fast a long one runs, and how long the first token takes, for whom."""

from __future__ import annotations

import random
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import cycle

from moeruntime.bench.ceilings import Ceilings
from moeruntime.bench.decode import resident_slots
from moeruntime.bench.machine import median_s, synchronize
from moeruntime.bench.work import decoder_config, prompt_bytes, prompt_flops
from moeruntime.engine import Engine
from moeruntime.kernels import TokenGroup
from moeruntime.kv_cache import blocks_for
from moeruntime.models import Batch
from moeruntime.models.batch import Span
from moeruntime.request import Request, SamplingParams

__all__ = ["Clock", "PrefillRow", "TtftRow", "measure_prefill", "measure_ttft", "prefill"]


@dataclass(frozen=True, slots=True)
class PrefillRow:
    """A prompt of one variant, or of each of several, from its tokens to the first new one.

    Attributes:
        tokens: of all prompts.
        time_s: of the device.
        flops: multiplications and additions with the weights that are active, and attention.
        roofline_s: those at the rate of a large product, or the weights' bytes at the bandwidth of
            the best reader, whichever takes longer.
        of_gemm: rate of the operations against that of a large product.
    """

    tokens: int
    time_s: float
    flops: int
    roofline_s: float
    of_gemm: float

    @property
    def tokens_per_s(self) -> float:
        return self.tokens / self.time_s

    @property
    def flops_per_s(self) -> float:
        return self.flops / self.time_s


@dataclass(frozen=True, slots=True)
class TtftRow:
    """Time to the first token of a request that runs alone, through the whole engine.

    Attributes:
        tokens: length of the prompt.
        roofline_s: as of a prefill.
        same_s: of a variant that answered just before.
        after_another_s: of the same one right after another variant's request; None if only one
            fits the device.
        cold_s: of a variant whose weights are copied for it; None if all are resident.
        copy_s: what that copy takes at the bandwidth of pinned memory; None where there is none.
    """

    tokens: int
    roofline_s: float
    same_s: float
    after_another_s: float | None
    cold_s: float | None
    copy_s: float | None


class Clock:
    """Times to first token of requests that run alone, with prompts of random tokens."""

    def __init__(self, engine: Engine, num_tokens: int) -> None:
        """Time prompts of `num_tokens`."""
        self._engine = engine
        self._num_tokens = num_tokens
        self._random = random.Random(num_tokens)

    def ttft_s(self, variant: str) -> float:
        """Seconds from submitting a request to its token."""
        vocab_size = self._engine.source.manifest.config.vocab_size
        prompt = [self._random.randrange(vocab_size) for _ in range(self._num_tokens)]
        synchronize(self._engine.device)
        start_s = time.perf_counter()
        self._engine.submit(Request(variant, prompt, SamplingParams(max_tokens=1)))
        while not self._engine.step():
            pass
        return time.perf_counter() - start_s


def prefill(
    engine: Engine, num_tokens: int, *, num_cached: int = 0, num_variants: int = 1
) -> Callable[[], object]:
    """What runs a step of one prompt of each of the first variants.

    Args:
        engine: idle, without a prefix cache, and with a resident slot for each of them.
        num_tokens: new ones of each prompt.
        num_cached: before them; what the cache has of them is whatever lies there.
        num_variants: that share the step.
    """
    manifest = engine.source.manifest
    numbers = random.Random(num_tokens)
    num_blocks = blocks_for(num_cached + num_tokens)
    slots = resident_slots(engine, manifest.variant_names[:num_variants])
    spans = []
    for idx, slot in enumerate(slots.values()):
        tokens = [numbers.randrange(manifest.config.vocab_size) for _ in range(num_tokens)]
        table = range(idx * num_blocks, (idx + 1) * num_blocks)
        spans.append(Span(slot, idx, tokens, num_cached, table))
    spans.sort(key=lambda span: span.slot)
    graphs = engine.graphs
    if graphs is not None and len(spans) * num_tokens <= graphs.max_tokens:
        return lambda: graphs.run(spans)
    batch = Batch.build(spans, engine.device)
    ends = [stop - 1 for _, stop, _ in batch.spans]
    groups = [TokenGroup(span.slot, row, row + 1) for row, span in enumerate(spans)]

    def run() -> object:
        hidden_TH = engine.model.forward(batch)
        return engine.model.logits(hidden_TH[ends], groups).argmax(dim=-1)

    return run


def measure_prefill(
    engine: Engine,
    ceilings: Ceilings,
    num_tokens: int,
    *,
    num_cached: int = 0,
    num_variants: int = 1,
) -> PrefillRow:
    """Time a step of `prefill` as the engine runs it; nothing is counted of cached tokens."""
    work = prefill(engine, num_tokens, num_cached=num_cached, num_variants=num_variants)
    time_s = median_s(work, engine.device, repeats=7, warm_up=2)
    flops = num_variants * prompt_flops(decoder_config(engine.source), num_tokens)
    return PrefillRow(
        tokens=num_variants * num_tokens,
        time_s=time_s,
        flops=flops,
        roofline_s=_roofline_s(engine, ceilings, num_tokens, num_variants),
        of_gemm=flops / time_s / ceilings.gemm_flops,
    )


def measure_ttft(
    engine: Engine, ceilings: Ceilings, num_tokens: int, *, repeats: int = 5
) -> TtftRow:
    """Medians over `repeats` of each situation, in turn, so that drift meets all of them."""
    names, num_slots = engine.source.manifest.variant_names, engine.residency.num_slots
    first, second = names[0], names[1] if min(len(names), num_slots) > 1 else None
    # Asked for in turn: each has been evicted when its turn comes again.
    cold: Iterator[str] = cycle(names[min(num_slots, 2) :] if len(names) > num_slots else ())
    clock = Clock(engine, num_tokens)
    times_s: dict[str, list[float]] = {"same": [], "after_another": [], "cold": []}
    for number in range(repeats + 1):
        kept = number > 0  # the first round warms up
        for variant in (first, second, first):  # resident again, whoever was cold
            if variant is not None:
                clock.ttft_s(variant)
        found = {"same": clock.ttft_s(first)}
        if second is not None:
            clock.ttft_s(second)
            found["after_another"] = clock.ttft_s(first)
        if (variant := next(cold, None)) is not None:
            before = engine.residency.num_activations
            found["cold"] = clock.ttft_s(variant)
            assert engine.residency.num_activations == before + 1
        for what, taken_s in found.items() if kept else ():
            times_s[what].append(taken_s)
    median = {what: statistics.median(all_s) for what, all_s in times_s.items() if all_s}
    copied = "cold" in median and ceilings.copy_bytes is not None
    return TtftRow(
        tokens=num_tokens,
        roofline_s=_roofline_s(engine, ceilings, num_tokens),
        same_s=median["same"],
        after_another_s=median.get("after_another"),
        cold_s=median.get("cold"),
        copy_s=engine.residency.activation_bytes / (ceilings.copy_bytes or 1) if copied else None,
    )


def _roofline_s(
    engine: Engine, ceilings: Ceilings, num_tokens: int, num_variants: int = 1
) -> float:
    flops = num_variants * prompt_flops(decoder_config(engine.source), num_tokens)
    num_bytes = prompt_bytes(engine, num_tokens)  # which several do not read less of
    return max(flops / ceilings.gemm_flops, num_bytes / ceilings.read_bytes)

"""One run over everything: ceilings, loading, memory, decode, prompts."""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

import torch

from moeruntime.bench.ceilings import Ceilings, measure_ceilings, read_files
from moeruntime.bench.decode import measure_decode, tokens_needed
from moeruntime.bench.machine import device_name, median_s, peak_bytes
from moeruntime.bench.memory import measure_memory
from moeruntime.bench.prompts import measure_prefill, measure_ttft
from moeruntime.bench.report import LoadRow, Report
from moeruntime.bench.work import decoder_config
from moeruntime.engine import Engine
from moeruntime.errors import UsageError
from moeruntime.families import DecoderConfig
from moeruntime.kv_cache import KVCache, blocks_for
from moeruntime.loading import resolve_device, resolve_dtype
from moeruntime.pack import Pack, WeightSource

__all__ = ["BenchOptions", "run_bench"]

DEFAULT_BATCHES = {"cuda": (1, 8, 32, 64), "cpu": (1, 8)}
DEFAULT_CONTEXT = 512
DEFAULT_PROMPT = 2048
SHORT_PROMPT = 128
MAX_STEP_TOKENS = 2048


@dataclass(frozen=True, slots=True)
class BenchOptions:
    """What to measure.

    Attributes:
        batches: sizes of batches to decode; None takes a few that suit the device.
        context: tokens of each sequence while it decodes; None takes 512, or what fits the model.
        prompt: tokens of the prompt that is prefilled; None takes 2048, or what fits the model.
        device, dtype, resident: as `Engine` has them.
    """

    batches: tuple[int, ...] | None = None
    context: int | None = None
    prompt: int | None = None
    device: str = "auto"
    dtype: str = "auto"
    resident: int | None = None


@dataclass(frozen=True, slots=True)
class _Sizes:
    """Options with everything decided."""

    batches: tuple[int, ...]
    context: int
    prompt: int
    max_step_tokens: int

    @classmethod
    def of(cls, options: BenchOptions, config: DecoderConfig, device: torch.device) -> _Sizes:
        batches = options.batches or DEFAULT_BATCHES[device.type]
        if min(batches) < 1:
            raise UsageError(f"batch {min(batches)}: a batch has at least one sequence")
        prompt = options.prompt or min(DEFAULT_PROMPT, config.max_context - 1)
        if not 1 <= prompt < config.max_context:
            raise UsageError(f"a prompt of {prompt} tokens is outside 1..{config.max_context - 1}")
        step = max(MAX_STEP_TOKENS, prompt, *batches)

        def longest(context: int) -> int:
            return max(tokens_needed(batch, context, step) for batch in batches)

        context = options.context
        if context is None:
            generated = longest(config.max_context) - config.max_context
            context = min(DEFAULT_CONTEXT, config.max_context - generated)
        if context < 1 or longest(context) > config.max_context:
            raise UsageError(
                f"a context of {context} tokens and what is generated after it must lie in "
                f"1..{config.max_context}; give a smaller --context"
            )
        return cls(batches, context, prompt, step)

    def cache_bytes(self, config: DecoderConfig, dtype: torch.dtype) -> int:
        """Of the keys and values of the largest batch, or of the prompt."""
        blocks = max(
            batch * blocks_for(tokens_needed(batch, self.context, self.max_step_tokens))
            for batch in self.batches
        )
        blocks = max(blocks, blocks_for(self.prompt + 1))
        return blocks * KVCache.block_bytes(config, dtype)


def run_bench(
    source: WeightSource,
    options: BenchOptions,
    on_progress: Callable[[str], None] | None = None,
) -> Report:
    """Measure everything.

    Args:
        source: a pack or synthetic weights; closed at the end.
        options: what to measure.
        on_progress: called with a line for each thing that is begun.

    Raises:
        UsageError: sizes that the model or the device does not take.
        ResourceError: it does not fit the device; nothing was loaded.
    """
    with closing(source):
        return _run(source, options, on_progress or (lambda line: None))


def _run(source: WeightSource, options: BenchOptions, say: Callable[[str], None]) -> Report:
    manifest = source.manifest
    device = resolve_device(options.device)
    dtype = resolve_dtype(options.dtype, device, manifest.expert_dtype)
    config = decoder_config(source)
    sizes = _Sizes.of(options, config, device)
    say("what the machine can do at best")
    ceilings = measure_ceilings(device, dtype)
    read_rate = _read_rate(source, say)
    started_s = time.perf_counter()
    with Engine(
        source,
        device=options.device,
        dtype=options.dtype,
        resident=options.resident,
        max_sequences=max(sizes.batches),
        max_step_tokens=sizes.max_step_tokens,
        cache_bytes=sizes.cache_bytes(config, dtype),
        prefix_cache=False,
        on_progress=lambda line: say(f"loading: {line}"),
    ) as engine:
        load = _load_row(engine, time.perf_counter() - started_s, read_rate, ceilings)
        decode = []
        for variants in dict.fromkeys((1, engine.residency.num_slots)):
            for batch in (batch for batch in sizes.batches if batch >= variants):
                say(f"decode: batch {batch}, {variants} variants")
                decode.append(
                    measure_decode(
                        engine,
                        ceilings,
                        batch=batch,
                        variants=variants,
                        context=sizes.context,
                        max_step_tokens=sizes.max_step_tokens,
                    )
                )
        say(f"prefill: {sizes.prompt} tokens")
        prefill = [measure_prefill(engine, ceilings, sizes.prompt)]
        ttft = []
        for num_tokens in dict.fromkeys((min(SHORT_PROMPT, sizes.prompt), sizes.prompt)):
            say(f"time to the first token: {num_tokens} tokens")
            ttft.append(measure_ttft(engine, ceilings, num_tokens))
        return Report(
            model=str(source.root),
            code="nested" if manifest.nested else str(dtype).removeprefix("torch."),
            variants=len(manifest.variants),
            resident=engine.residency.num_slots,
            device=device_name(device),
            dtype=str(dtype).removeprefix("torch."),
            torch=torch.__version__,
            ceilings=ceilings,
            load=load,
            memory=measure_memory(engine),
            peak_bytes=peak_bytes(device),
            decode=decode,
            prefill=prefill,
            ttft=ttft,
        )


def _read_rate(source: WeightSource, say: Callable[[str], None]) -> float | None:
    """Bytes a second of a pack's files from the page cache, where they come to lie by that."""
    if not isinstance(source, Pack):
        return None
    say("reading the pack's files")
    paths: list[Path] = [
        source.path(file) for file in source.manifest.files if file.endswith(".safetensors")
    ]
    num_bytes = read_files(paths)
    read_s = median_s(lambda: read_files(paths), torch.device("cpu"), repeats=3, warm_up=0)
    return num_bytes / read_s


def _load_row(
    engine: Engine, time_s: float, read_rate: float | None, ceilings: Ceilings
) -> LoadRow:
    plan = engine.memory
    rates = [rate for rate in (read_rate, ceilings.copy_bytes) if rate is not None]
    return LoadRow(
        time_s=time_s,
        weights_bytes=plan.weights_bytes - plan.decoded_bytes + plan.host_bytes,
        ceiling_bytes_per_s=min(rates) if read_rate is not None else None,
    )

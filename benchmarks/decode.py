"""Decode on one GPU at full size: steps of one token for each sequence, against the roofline.

Physics: a decode step reads each expert that a token goes to, the dense weights of each variant in
the batch, and the keys and values of every sequence, once; it can do that no faster than the best
plain reader. The roofline of a step is those bytes, with the experts that its tokens really went
to, over the bandwidth measured in the same run. Times are of the graph alone (step) and of the
whole engine with its scheduler (engine), medians.

Run: python benchmarks/decode.py [--synthetic mixtral-8x7b] [--code bf16|4+2|...] [--variants 1 2 4]
"""

from __future__ import annotations

import argparse
import time
from dataclasses import asdict, dataclass

import torch
from _common import print_json
from _gpu import median_s, read_bandwidth

from moeruntime import Engine, Request, SamplingParams
from moeruntime.kv_cache import BLOCK_TOKENS, KVCache, blocks_for
from moeruntime.models.batch import Span
from moeruntime.models.decode_graph import DecodeGraphs
from moeruntime.synthetic import SyntheticSource


@dataclass(frozen=True)
class Row:
    batch: int
    variants: int
    experts_a_layer: float
    gb: float
    roofline_ms: float
    step_ms: float
    of_roofline: float
    tokens_a_s: float
    engine_tokens_a_s: float | None


def expert_bytes(engine: Engine, graphs: DecodeGraphs) -> tuple[int, float]:
    """Bytes of the experts that the last step's tokens went to, and how many a layer."""
    manifest = engine.source.manifest
    counts_LF = graphs.lists.counts_LF.cpu()
    total, touched = 0, 0
    for layer in range(manifest.config.num_layers):
        faces = manifest.faces(layer)[0]
        active = [faces[idx] for idx in (counts_LF[layer] > 0).nonzero()[:, 0].tolist()]
        total += manifest.face_bytes(layer, active)
        touched += len(active)
    return total, touched / manifest.config.num_layers


def dense_bytes(engine: Engine) -> int:
    """Of one variant, as a step reads them: all but the input embedding."""
    shapes = engine.source.manifest.config.non_expert_shapes()
    numel = sum(
        torch.Size(shape).numel() for role, shape in shapes.items() if role != "embed_tokens"
    )
    return numel * engine.dtype.itemsize


def measure(
    engine: Engine, batch: int, variants: int, context: int, bandwidth: float, whole: bool
) -> Row:
    graphs = engine.graphs
    assert graphs is not None
    config, names = engine.source.manifest.config, engine.source.manifest.variant_names
    generator = torch.Generator().manual_seed(batch)
    slots = sorted(idx * variants // batch for idx in range(batch))
    blocks = blocks_for(context + 64)
    assert batch * blocks <= engine.num_free_blocks
    for name in names[:variants]:
        assert engine.residency.admit(name)
    spans = [
        Span(
            slot=engine.residency.slot(names[variant]),
            variant_idx=variant,
            token_ids=torch.randint(config.vocab_size, (1,), generator=generator).tolist(),
            start=context - 1,
            block_table=list(range(row * blocks, (row + 1) * blocks)),
        )
        for row, variant in enumerate(slots)
    ]
    for name in names[:variants]:
        engine.residency.release(name)
    spans.sort(key=lambda span: span.slot)
    graphs.run(spans)
    torch.cuda.synchronize()
    experts, per_layer = expert_bytes(engine, graphs)
    step_s = median_s(lambda: graphs.run(spans), repeats=20)
    token_bytes = KVCache.block_bytes(config, engine.dtype) // BLOCK_TOKENS
    num_bytes = experts + variants * dense_bytes(engine) + batch * context * token_bytes
    roofline_s = num_bytes / bandwidth
    engine_rate = None
    if whole:
        requests = [
            Request(
                names[variant],
                torch.randint(config.vocab_size, (context - 32,), generator=generator).tolist(),
                SamplingParams(max_tokens=65),
            )
            for variant in slots
        ]
        engine_rate = decode_rate(engine, requests)
    return Row(
        batch,
        variants,
        per_layer,
        num_bytes / 1e9,
        roofline_s * 1e3,
        step_s * 1e3,
        roofline_s / step_s,
        batch / step_s,
        engine_rate,
    )


def profile(engine: Engine, batch: int) -> None:
    """Print what a step spends its time in."""
    graphs = engine.graphs
    assert graphs is not None
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as found:
        for _ in range(5):
            graphs.run_on(batch)
        torch.cuda.synchronize()
    for event in sorted(found.key_averages(), key=lambda e: -e.device_time_total)[:14]:
        mean_us = event.device_time_total / event.count
        print(f"    {event.key[:60]:60s} {event.count / 5:6.0f} x {mean_us:8.2f} us")


def decode_rate(engine: Engine, requests: list[Request]) -> float:
    """Tokens a second of a batch through the engine, once all of them decode."""
    ids = [engine.submit(request) for request in requests]
    left, started, tokens = set(ids), 0.0, 0
    seen: set[int] = set()
    while left:
        for delta in engine.step():
            seen.add(delta.request_id)
            if started:
                tokens += 1
            if delta.output:
                left.discard(delta.request_id)
        if len(seen) == len(ids) and not started:
            started = time.perf_counter()
    return tokens / (time.perf_counter() - started)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--synthetic", default="mixtral-8x7b")
    parser.add_argument("--code", default="bf16")
    parser.add_argument("--variants", type=int, nargs="+", default=[1])
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 8, 32, 64, 128])
    parser.add_argument("--context", type=int, default=512)
    parser.add_argument("--profile", action="store_true", help="the kernels of one step each")
    parser.add_argument("--no-engine", action="store_true", help="time the graphs alone")
    arguments = parser.parse_args()
    bandwidth = read_bandwidth()
    print(f"{torch.cuda.get_device_name()}: read {bandwidth / 1e12:.2f} TB/s")
    started = time.perf_counter()
    source = SyntheticSource(
        arguments.synthetic, num_variants=max(arguments.variants), code=arguments.code
    )
    rows = []
    with Engine(source, device="cuda", max_sequences=max(arguments.batches)) as engine:
        print(f"loaded in {time.perf_counter() - started:.1f} s")
        print("batch variants experts/layer     GB  roof ms  step ms   of roof    tok/s  engine")
        for variants in arguments.variants:
            for batch in arguments.batches:
                if batch < variants:
                    continue
                row = measure(
                    engine, batch, variants, arguments.context, bandwidth, not arguments.no_engine
                )
                rows.append(row)
                if arguments.profile:
                    profile(engine, batch)
                print(
                    f"{row.batch:5d} {row.variants:8d} {row.experts_a_layer:13.2f} {row.gb:6.1f} "
                    f"{row.roofline_ms:8.3f} {row.step_ms:8.3f} {row.of_roofline:9.1%} "
                    f"{row.tokens_a_s:8.1f} {row.engine_tokens_a_s or 0:7.1f}",
                    flush=True,
                )
        peak = torch.cuda.max_memory_allocated() / 1e9
    print_json(
        {
            "benchmark": "decode",
            "device": torch.cuda.get_device_name(),
            "torch": torch.__version__,
            "model": arguments.synthetic,
            "code": arguments.code,
            "context": arguments.context,
            "read_tb_s": bandwidth / 1e12,
            "peak_gb": peak,
            "rows": [asdict(row) for row in rows],
        }
    )


if __name__ == "__main__":
    main()

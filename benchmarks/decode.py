"""Decode on one GPU at full size: steps of one token for each sequence, against the roofline.

Physics: a decode step reads each expert that a token goes to, the dense weights of each variant in
the batch, and the keys and values of every sequence, once; it can do that no faster than the best
plain reader. The roofline of a step is those bytes, with the experts that its tokens really went
to, over the bandwidth measured in the same run. Times are of the graph alone (step) and of the
whole engine with its scheduler (engine), medians.

Run: python benchmarks/decode.py [--synthetic mixtral-8x7b] [--code bf16|4+2|...] [--variants 1 2 4]
`moec bench` measures the same and more; this takes any mixture, and lists a step's kernels.
"""

from __future__ import annotations

import argparse
from dataclasses import asdict

import torch
from _common import print_json, print_kernels

from moeruntime import Engine
from moeruntime.bench.ceilings import measure_ceilings
from moeruntime.bench.decode import measure_decode, tokens_needed
from moeruntime.kv_cache import KVCache, blocks_for
from moeruntime.synthetic import SyntheticSource

MAX_STEP_TOKENS = 2048


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--synthetic", default="mixtral-8x7b")
    parser.add_argument("--code", default="bf16")
    parser.add_argument("--variants", type=int, nargs="+", default=[1])
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 8, 32, 64, 128])
    parser.add_argument("--context", type=int, default=512)
    parser.add_argument(
        "--profile", action="store_true", help="the kernels of one step each; no engine"
    )
    parser.add_argument("--no-engine", action="store_true", help="time the graphs alone")
    arguments = parser.parse_args()
    device = torch.device("cuda")
    ceilings = measure_ceilings(device, torch.bfloat16)
    print(f"{torch.cuda.get_device_name()}: read {ceilings.read_bytes / 1e12:.2f} TB/s")
    source = SyntheticSource(
        arguments.synthetic, num_variants=max(arguments.variants), code=arguments.code
    )
    blocks = max(
        batch * blocks_for(tokens_needed(batch, arguments.context, MAX_STEP_TOKENS))
        for batch in arguments.batches
    )
    rows = []
    with Engine(
        source,
        device="cuda",
        max_sequences=max(arguments.batches),
        max_step_tokens=MAX_STEP_TOKENS,
        cache_bytes=blocks * KVCache.block_bytes(source.manifest.config, torch.bfloat16),
        prefix_cache=False,
    ) as engine:
        print("batch variants experts/layer     GB  roof ms  step ms   of roof    tok/s  engine")
        for variants in arguments.variants:
            for batch in (batch for batch in arguments.batches if batch >= variants):
                row = measure_decode(
                    engine,
                    ceilings,
                    batch=batch,
                    variants=variants,
                    context=arguments.context,
                    max_step_tokens=MAX_STEP_TOKENS,
                    whole=not (arguments.no_engine or arguments.profile),
                )
                rows.append(row)
                if arguments.profile and engine.graphs is not None:
                    graphs = engine.graphs
                    print_kernels(lambda batch=batch, graphs=graphs: graphs.run_on(batch))
                print(
                    f"{batch:5d} {variants:8d} {row.experts_per_layer:13.2f} "
                    f"{row.step_bytes / 1e9:6.1f} {row.roofline_s * 1e3:8.3f} "
                    f"{row.step_s * 1e3:8.3f} {row.of_roofline:9.1%} {row.tokens_per_s:8.1f} "
                    f"{row.engine_tokens_per_s or 0:7.1f}",
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
            "read_tb_s": ceilings.read_bytes / 1e12,
            "peak_gb": peak,
            "rows": [
                asdict(row) | {"tokens_per_s": row.tokens_per_s, "of_roofline": row.of_roofline}
                for row in rows
            ],
        }
    )


if __name__ == "__main__":
    main()

"""Long prompts on one GPU at full size, against the rate of a large product.

Physics: a prompt of thousands of tokens is products: two operations for each token and active
weight, and attention, which sees each token and those before it. It can do them no faster than the
library's product of two 8192 x 8192 matrices, measured in the same run. Times are of the device,
from the tokens to the first new one, medians.

Run: python benchmarks/prefill.py [--synthetic mixtral-8x7b] [--code 4+2] [--tokens 512 2048]
     [--cached 8000] [--variants 4 --together 4] [--profile]
"""

from __future__ import annotations

import argparse
from dataclasses import asdict

import torch
from _common import print_json, print_kernels

from moeruntime import Engine
from moeruntime.bench.ceilings import measure_ceilings
from moeruntime.bench.prompts import measure_prefill, prefill
from moeruntime.kv_cache import KVCache, blocks_for
from moeruntime.synthetic import SyntheticSource


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--synthetic", default="mixtral-8x7b")
    parser.add_argument("--code", default="bf16")
    parser.add_argument("--variants", type=int, default=1, help="that share the experts")
    parser.add_argument("--together", type=int, default=1, help="that have a prompt in the step")
    parser.add_argument("--tokens", type=int, nargs="+", default=[512, 2048], help="of each prompt")
    parser.add_argument("--cached", type=int, default=0, help="tokens before them, in the cache")
    parser.add_argument("--profile", action="store_true", help="the kernels of one prompt each")
    arguments = parser.parse_args()
    ceilings = measure_ceilings(torch.device("cuda"), torch.bfloat16)
    print(f"{torch.cuda.get_device_name()}: product {ceilings.gemm_flops / 1e12:.0f} TFLOP/s")
    source = SyntheticSource(
        arguments.synthetic, num_variants=arguments.variants, code=arguments.code
    )
    longest, together = max(arguments.tokens), arguments.together
    wanted = {"num_cached": arguments.cached, "num_variants": together}
    block_bytes = KVCache.block_bytes(source.manifest.config, torch.bfloat16)
    rows = []
    with Engine(
        source,
        device="cuda",
        max_sequences=together,
        max_step_tokens=together * longest,
        cache_bytes=together * blocks_for(arguments.cached + longest) * block_bytes,
        prefix_cache=False,
    ) as engine:
        print("tokens        ms   tokens/s   TFLOP/s   of product")
        for tokens in arguments.tokens:
            row = measure_prefill(engine, ceilings, tokens, **wanted)
            rows.append(row)
            if arguments.profile:
                print_kernels(prefill(engine, tokens, **wanted))
            print(
                f"{row.tokens:6d} {row.time_s * 1e3:9.2f} {row.tokens_per_s:10.0f} "
                f"{row.flops_per_s / 1e12:9.1f} {row.of_gemm:12.1%}",
                flush=True,
            )
    print_json(
        {
            "benchmark": "prefill",
            "device": torch.cuda.get_device_name(),
            "torch": torch.__version__,
            "model": arguments.synthetic,
            "code": arguments.code,
            "cached": arguments.cached,
            "together": together,
            "gemm_tflops": ceilings.gemm_flops / 1e12,
            "rows": [
                asdict(row) | {"tokens_per_s": row.tokens_per_s, "flops_per_s": row.flops_per_s}
                for row in rows
            ],
        }
    )


if __name__ == "__main__":
    main()

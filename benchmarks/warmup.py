"""How long an engine takes to get ready after its weights are there: `moec serve` waits for it.

Kernels are compiled (Triton keeps its own on disk, so a second start is shorter) and the steps'
graphs captured. Once with an empty cache of Triton's, once with what that left.

Run: python benchmarks/warmup.py --synthetic mixtral-8x7b [--code 4+2] [--variants 4]
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import time

import torch
from _common import print_json

from moeruntime import Engine
from moeruntime.bench.machine import device_name
from moeruntime.synthetic import SYNTHETIC_MODELS, SyntheticSource
from moeruntime.warmup import warm_up

INNER = "MOEC_WARMUP_INNER"  # set where it is timed, in a process of its own


def timed_s(arguments: argparse.Namespace) -> float:
    source = SyntheticSource(
        arguments.synthetic, num_variants=arguments.variants, code=arguments.code
    )
    with Engine(source, device="cuda", cache_bytes=2**30) as engine:
        torch.cuda.synchronize()
        start_s = time.perf_counter()
        warm_up(engine)
        torch.cuda.synchronize()
        return time.perf_counter() - start_s


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--synthetic", choices=SYNTHETIC_MODELS, default="mixtral-mini")
    parser.add_argument("--code", default="bf16")
    parser.add_argument("--variants", type=int, default=4)
    arguments = parser.parse_args()
    if INNER in os.environ:
        print(timed_s(arguments))
        return
    found_s = []
    with tempfile.TemporaryDirectory() as cache:
        environment = os.environ | {"TRITON_CACHE_DIR": cache, INNER: "1"}
        for state in ("empty", "filled"):
            done = subprocess.run(
                [sys.executable, *sys.argv], env=environment, stdout=subprocess.PIPE, text=True,
                check=True,
            )  # fmt: skip
            found_s.append(float(done.stdout.split()[-1]))
            print(f"Triton's cache {state}: {found_s[-1]:.1f} s", flush=True)
    print_json(
        {
            "benchmark": "warmup", "device": device_name(torch.device("cuda")),
            "code": arguments.code, "empty_s": found_s[0], "filled_s": found_s[1],
        }
    )  # fmt: skip


if __name__ == "__main__":
    main()

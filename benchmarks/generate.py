"""Tokens per second of the engine on small real models, beside transformers' generate.

Physics: with models of a few megabytes neither memory nor arithmetic is the limit, but the time it
takes to say what to do: Python and launches. So this shows what a step costs the engine itself, and
what mixing variants in it adds. Large models are another benchmark's matter.

Run: python benchmarks/generate.py [--device cuda] [--dtype bfloat16]
"""

from __future__ import annotations

import argparse
import platform
import statistics
import tempfile
import time
from pathlib import Path

import torch
from _common import EXAMPLES, print_json
from transformers import AutoModelForCausalLM

from moeconsolidate.pipeline import consolidate
from moeruntime import Engine, Request, SamplingParams
from moeruntime.bench.machine import cpu_name

VARIANTS = ("base", "python", "math", "shell")
NEW_TOKENS = 64
PROMPT_TOKENS = 32
REPEATS = 3


def prompts(count: int) -> list[list[int]]:
    """Random tokens: the work does not depend on what they say."""
    generator = torch.Generator().manual_seed(count)
    return torch.randint(32, 4096, (count, PROMPT_TOKENS), generator=generator).tolist()


def engine_rate(engine: Engine, batch: int, num_variants: int) -> float:
    """New tokens per second, median."""
    rates = []
    for _ in range(REPEATS + 1):
        requests = [
            Request(VARIANTS[idx % num_variants], ids, SamplingParams(max_tokens=NEW_TOKENS))
            for idx, ids in enumerate(prompts(batch))
        ]
        start_s = time.perf_counter()
        outputs = engine.generate(requests)
        elapsed_s = time.perf_counter() - start_s
        rates.append(sum(len(output.token_ids) for output in outputs) / elapsed_s)
    return statistics.median(rates[1:])


@torch.inference_mode()
def transformers_rate(model: torch.nn.Module, batch: int) -> float:
    """The same for one variant in transformers."""
    rates = []
    for _ in range(REPEATS + 1):
        ids = torch.tensor(prompts(batch), device=model.device)
        start_s = time.perf_counter()
        out = model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=NEW_TOKENS,
            min_new_tokens=NEW_TOKENS,
            do_sample=False,
        )
        out.cpu()
        rates.append(batch * NEW_TOKENS / (time.perf_counter() - start_s))
    return statistics.median(rates[1:])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 8, 32])
    arguments = parser.parse_args()
    where = torch.cuda.get_device_name() if arguments.device != "cpu" else cpu_name()
    folders = {name: EXAMPLES / "checkpoints" / f"mini-{name}" for name in VARIANTS}
    reference = AutoModelForCausalLM.from_pretrained(
        folders["base"], dtype=getattr(torch, arguments.dtype)
    ).to(arguments.device)
    rows = []
    print(f"{where}, {arguments.dtype}, mini-*, {PROMPT_TOKENS} + {NEW_TOKENS} tokens; tokens/s")
    print("batch  transformers  one variant  four variants  mixed / one")
    with tempfile.TemporaryDirectory() as temporary:
        pack = Path(temporary) / "pack"
        consolidate(folders, pack, threshold=0.9)
        with Engine.from_pack(pack, device=arguments.device, dtype=arguments.dtype) as engine:
            for batch in arguments.batches:
                rival = transformers_rate(reference, batch)
                one, mixed = (engine_rate(engine, batch, count) for count in (1, 4))
                print(f"{batch:5d}  {rival:12.0f}  {one:11.0f}  {mixed:13.0f}  {mixed / one:11.2f}")
                rows.append({"batch": batch, "transformers": rival, "one": one, "mixed": mixed})
    print_json(
        {
            "benchmark": "generate",
            "device": where,
            "dtype": arguments.dtype,
            "torch": torch.__version__,
            "python": platform.python_version(),
            "rows": rows,
        }
    )


if __name__ == "__main__":
    main()

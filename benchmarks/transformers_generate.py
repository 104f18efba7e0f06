"""transformers' generate on one GPU at the size of Mixtral-8x7B: what moec's decode is set beside.

Physics: the same weights and the same roofline as in decode.py and prefill.py; what differs is how
experts are run, and how much of a step is Python and launches. Weights are random and made on the
GPU, in bfloat16, so nothing is downloaded. Attention is PyTorch's (sdpa), the cache a static one if
asked for; both are transformers' own.

Run: python benchmarks/transformers_generate.py [--batches 1 8 32 64] [--prompt 128] [--static]
It needs about 100 GB of GPU memory; --layers 8 measures a quarter of the model.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable

import torch
import transformers
from _common import print_json
from transformers import MixtralConfig, MixtralForCausalLM

from moeruntime.bench.machine import device_name, peak_bytes, synchronize
from moeruntime.synthetic import SYNTHETIC_MODELS

STD = 0.02


def build(
    name: str, num_layers: int | None, experts: str | None, device: torch.device
) -> MixtralForCausalLM:
    """A synthetic model's architecture, or its first layers, with random weights."""
    model = SYNTHETIC_MODELS[name]
    config = MixtralConfig(
        vocab_size=model.vocab_size,
        hidden_size=model.hidden_size,
        intermediate_size=model.intermediate_size,
        num_hidden_layers=num_layers or model.num_layers,
        num_attention_heads=model.num_heads,
        num_key_value_heads=model.num_kv_heads,
        head_dim=model.head_dim,
        num_local_experts=model.num_experts,
        num_experts_per_tok=model.top_k,
        max_position_embeddings=model.max_context,
        rms_norm_eps=model.rms_norm_eps,
        sliding_window=model.sliding_window,
        attn_implementation="sdpa",
        **({} if experts is None else {"experts_implementation": experts}),
    )
    default = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        # What transformers initialises it draws on the GPU too, which takes seconds.
        with device:
            built = MixtralForCausalLM(config)
    finally:
        torch.set_default_dtype(default)
    generator = torch.Generator(device).manual_seed(0)
    for role, parameter in built.named_parameters():
        if "norm" in role:
            parameter.data.fill_(1.0)
        else:
            parameter.data.normal_(0.0, STD, generator=generator)
    # An end-of-sequence token would cut some runs short.
    built.generation_config.eos_token_id = None
    built.generation_config.pad_token_id = 0
    return built.eval()


def median_s(work: Callable[[], object], device: torch.device, repeats: int) -> float:
    """Median seconds of the whole call, host included; the first is not counted."""
    times_s = []
    for _ in range(repeats + 1):
        synchronize(device)
        start_s = time.perf_counter()
        work()
        synchronize(device)
        times_s.append(time.perf_counter() - start_s)
    return statistics.median(times_s[1:])


@torch.inference_mode()
def measure(
    model: MixtralForCausalLM, batch: int, prompt: int, tokens: int, static: bool, repeats: int
) -> dict[str, float]:
    """Time to the first token, and of a decode step after it."""
    ids = torch.randint(model.config.vocab_size, (batch, prompt), device=model.device)

    def generate(count: int) -> object:
        return model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=count,
            min_new_tokens=count,
            do_sample=False,
            cache_implementation="static" if static else None,
        )

    first_s = median_s(lambda: generate(1), model.device, repeats)
    all_s = median_s(lambda: generate(tokens + 1), model.device, repeats)
    step_s = (all_s - first_s) / tokens
    return {
        "batch": batch,
        "prompt": prompt,
        "ttft_s": first_s,
        "step_s": step_s,
        "tokens_per_s": batch / step_s,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 8, 32, 64])
    parser.add_argument("--prompt", type=int, default=128)
    parser.add_argument("--tokens", type=int, default=16, help="decode steps that are timed")
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--layers", type=int, default=None, help="default: all 32")
    parser.add_argument("--synthetic", choices=SYNTHETIC_MODELS, default="mixtral-8x7b")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--static", action="store_true", help="a static cache")
    parser.add_argument(
        "--experts", default=None, help="transformers' experts_implementation; default: its own"
    )
    arguments = parser.parse_args()
    start_s = time.perf_counter()
    model = build(
        arguments.synthetic, arguments.layers, arguments.experts, torch.device(arguments.device)
    )
    synchronize(model.device)
    device = device_name(model.device)
    print(
        f"{device}, transformers {transformers.__version__}, "
        f"{model.num_parameters() / 1e9:.1f} billion parameters "
        f"made in {time.perf_counter() - start_s:.1f} s"
    )
    print("batch  prompt     ttft ms     step ms   tokens/s")
    rows = []
    for batch in arguments.batches:
        row = measure(
            model,
            batch,
            arguments.prompt,
            arguments.tokens,
            arguments.static,
            arguments.repeats,
        )
        rows.append(row)
        print(
            f"{batch:5d} {arguments.prompt:7d} {row['ttft_s'] * 1e3:11.2f} "
            f"{row['step_s'] * 1e3:11.2f} {row['tokens_per_s']:10.1f}",
            flush=True,
        )
    print_json(
        {
            "benchmark": "transformers_generate",
            "device": device,
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "layers": model.config.num_hidden_layers,
            "static": arguments.static,
            "peak_gb": peak_bytes(model.device) / 1e9,
            "rows": rows,
        }
    )


if __name__ == "__main__":
    main()

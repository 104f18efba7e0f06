"""What the benchmarks share: checkpoints made of random weights, and JSON as the last line."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path

import torch

from moeruntime.errors import CheckpointError
from moeruntime.families.mixtral import MIXTRAL
from moeruntime.strict_json import Fields
from moeruntime.tensorfile import TensorFileWriter

EXAMPLES = Path(__file__).parents[1] / "examples"


def print_json(result: dict[str, object]) -> None:
    """Print the benchmark's numbers as its last line."""
    print(json.dumps(result))


def print_kernels(work: Callable[[], object], *, repeats: int = 5, most: int = 14) -> None:
    """Print what the device spends the time of `work` in, the longest first."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as found:
        for _ in range(repeats):
            work()
        torch.cuda.synchronize()
    for event in sorted(found.key_averages(), key=lambda e: -e.device_time_total)[:most]:
        mean_us = event.device_time_total / event.count
        print(f"    {event.key[:60]:60s} {event.count / repeats:6.0f} x {mean_us:8.2f} us")


def make_checkpoint(
    folder: Path,
    *,
    seed: int,
    num_layers: int,
    hidden_size: int,
    intermediate_size: int,
    num_experts: int = 8,
) -> int:
    """Write a Mixtral checkpoint of random bf16 weights, one shard a layer; returns its bytes.

    Weights of different seeds are fine-tunes of one base: they share a large common part.
    """
    folder.mkdir(parents=True)
    raw = {
        "architectures": ["MixtralForCausalLM"],
        "model_type": "mixtral",
        "hidden_size": hidden_size,
        "intermediate_size": intermediate_size,
        "num_hidden_layers": num_layers,
        "num_attention_heads": hidden_size // 64,
        "num_key_value_heads": max(1, hidden_size // 256),
        "num_local_experts": num_experts,
        "num_experts_per_tok": 2,
        "vocab_size": 4096,
        "max_position_embeddings": 2048,
        "eos_token_id": 2,
    }
    (folder / "config.json").write_text(json.dumps(raw))
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(EXAMPLES / "checkpoints" / "mini-base" / name, folder / name)
    config = MIXTRAL.parse_config(Fields(raw, "config", CheckpointError))
    groups: dict[str, dict[str, tuple[int, ...]]] = {"model-rest.safetensors": {}}
    for role, shape in config.non_expert_shapes().items():
        groups["model-rest.safetensors"][MIXTRAL.non_expert_name(role)] = shape
    for layer in range(num_layers):
        groups[f"model-{layer:03d}.safetensors"] = {
            MIXTRAL.expert_name(f"layers.{layer}", expert, role): shape
            for expert in range(num_experts)
            for role, shape in config.expert_shapes.items()
        }
    total_bytes = 0
    common = torch.Generator().manual_seed(0)
    own = torch.Generator().manual_seed(seed)
    for file, tensors in groups.items():
        declared = [(name, torch.bfloat16, shape) for name, shape in tensors.items()]
        with TensorFileWriter(folder / file, declared) as writer:
            for name, dtype, shape in declared:
                tensor = torch.randn(shape, generator=common)
                tensor += 0.1 * torch.randn(shape, generator=own)
                writer.append(name, (tensor * 0.02).to(dtype))
                total_bytes += math.prod(shape) * dtype.itemsize
            writer.finish()
    weight_map = {name: file for file, tensors in groups.items() for name in tensors}
    index = {"metadata": {"total_size": total_bytes}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return total_bytes

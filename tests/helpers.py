"""Small Mixtral checkpoints made from literal tensor names, and a digest of a folder."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

MakeCheckpoint = Callable[..., Path]
"""What the fixture `make_checkpoint` gives."""

TINY_CONFIG: dict[str, Any] = {
    "architectures": ["MixtralForCausalLM"],
    "model_type": "mixtral",
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 4,
    "num_local_experts": 4,
    "num_experts_per_tok": 2,
    "vocab_size": 4096,
    "max_position_embeddings": 256,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "tie_word_embeddings": False,
    "dtype": "bfloat16",
}


def random_tensors(config: Mapping[str, Any], seed: int) -> dict[str, Tensor]:
    """Weights of a Mixtral model under the names that transformers v4 gave them."""
    generator = torch.Generator().manual_seed(seed)
    hidden, inner = config["hidden_size"], config["intermediate_size"]
    heads_dim = config["num_attention_heads"] * config["head_dim"]
    kv_dim = config["num_key_value_heads"] * config["head_dim"]
    shapes: dict[str, tuple[int, ...]] = {
        "model.embed_tokens.weight": (config["vocab_size"], hidden),
        "model.norm.weight": (hidden,),
    }
    if not config["tie_word_embeddings"]:
        shapes["lm_head.weight"] = (config["vocab_size"], hidden)
    for layer in range(config["num_hidden_layers"]):
        start = f"model.layers.{layer}."
        shapes |= {
            start + "input_layernorm.weight": (hidden,),
            start + "post_attention_layernorm.weight": (hidden,),
            start + "self_attn.q_proj.weight": (heads_dim, hidden),
            start + "self_attn.k_proj.weight": (kv_dim, hidden),
            start + "self_attn.v_proj.weight": (kv_dim, hidden),
            start + "self_attn.o_proj.weight": (hidden, heads_dim),
            start + "block_sparse_moe.gate.weight": (config["num_local_experts"], hidden),
        }
        for expert in range(config["num_local_experts"]):
            name = f"{start}block_sparse_moe.experts.{expert}."
            shapes |= {
                name + "w1.weight": (inner, hidden),
                name + "w2.weight": (hidden, inner),
                name + "w3.weight": (inner, hidden),
            }
    return {
        name: (torch.randn(shape, generator=generator) * 0.1).bfloat16()
        for name, shape in shapes.items()
    }


def fuse(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The same weights under the names that transformers v5 keeps them in memory by."""
    fused: dict[str, Tensor] = {}
    parts: dict[str, dict[int, dict[str, Tensor]]] = {}
    for name, tensor in tensors.items():
        if ".experts." not in name:
            fused[name.replace(".block_sparse_moe.", ".mlp.")] = tensor
            continue
        start, rest = name.split("block_sparse_moe.experts.")
        expert, matrix, _ = rest.split(".")
        parts.setdefault(start, {}).setdefault(int(expert), {})[matrix] = tensor
    for start, experts in parts.items():
        ordered = [experts[expert] for expert in sorted(experts)]
        fused[start + "mlp.experts.gate_up_proj"] = torch.stack(
            [torch.cat([one["w1"], one["w3"]]) for one in ordered]
        )
        fused[start + "mlp.experts.down_proj"] = torch.stack([one["w2"] for one in ordered])
    return fused


def save_shards(folder: Path, tensors: Mapping[str, Tensor], num_shards: int) -> None:
    """Write model.safetensors, or so many shards and their index."""
    whole = {name: tensor.contiguous() for name, tensor in tensors.items()}
    if num_shards == 0:
        save_file(whole, folder / "model.safetensors", metadata={"format": "pt"})
        return
    weight_map = {}
    for idx in range(num_shards):
        shard = f"model-{idx + 1:05d}-of-{num_shards:05d}.safetensors"
        names = sorted(whole)[idx::num_shards]
        save_file({name: whole[name] for name in names}, folder / shard, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(names, shard)
    index = {"metadata": {"total_size": 0}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def tree_digests(root: Path) -> dict[str, str]:
    """Relative path -> sha256 of every file below a folder."""
    return {
        path.relative_to(root).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(root.rglob("*"))
        if path.is_file()
    }

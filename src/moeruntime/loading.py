"""Choosing where and in what precision to compute, and bringing the experts there."""

from __future__ import annotations

import re

import torch

from moeruntime.errors import ResourceError, UsageError
from moeruntime.models.decoder import ExpertLayer
from moeruntime.pack import WeightSource
from moeruntime.tensorfile import DTYPES

__all__ = ["load_experts", "resolve_device", "resolve_dtype"]


def resolve_device(name: str) -> torch.device:
    """The device that "auto", "cpu", "cuda" or "cuda:N" names; it must exist."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cpu":
        return torch.device(name)
    # torch.device() would take "cuda:256" for "cuda:0": it keeps eight bits of the number.
    match = re.fullmatch(r"cuda(?::(\d{1,9}))?", name, re.ASCII)
    if match is None:
        raise UsageError(f"device '{name}' is not 'auto', 'cpu', 'cuda' or 'cuda:N'")
    idx, count = int(match[1] or 0), torch.cuda.device_count()
    if idx >= count:
        raise ResourceError(f"device '{name}': this machine has {count} CUDA devices")
    return torch.device("cuda", idx)


def resolve_dtype(name: str, device: torch.device, stored: str) -> torch.dtype:
    """A dtype's name to the dtype; "auto" is what is stored on CUDA, float32 on CPU."""
    if name == "auto":
        return DTYPES[stored] if device.type == "cuda" else torch.float32
    known = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
    if name not in known:
        raise UsageError(f"dtype '{name}' is not one of auto, {', '.join(known)}")
    return known[name]


def load_experts(
    source: WeightSource, layer: int, dtype: torch.dtype, device: torch.device
) -> ExpertLayer:
    """Bring one layer's pool to the device through one slot of host memory."""
    config, num_slots = source.manifest.config, source.manifest.num_slots[layer]
    hidden, inner = config.hidden_size, config.intermediate_size
    stored = DTYPES[source.manifest.expert_dtype]
    shapes = {"gate_up": (2 * inner, hidden), "down": (hidden, inner)}
    pinned = device.type == "cuda"
    staging = {
        part: torch.empty(shape, dtype=stored, pin_memory=pinned) for part, shape in shapes.items()
    }
    pools = {
        part: torch.empty((num_slots, *shape), dtype=dtype, device=device)
        for part, shape in shapes.items()
    }
    for slot in range(num_slots):
        for part, buffer in staging.items():
            source.read_slot(layer, part, slot, out=buffer)
            pools[part][slot].copy_(buffer)
    return ExpertLayer(pools["gate_up"], pools["down"])

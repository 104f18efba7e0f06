"""Choosing where and in what precision to compute, and bringing the experts there."""

from __future__ import annotations

import re
from collections.abc import Mapping

import torch
from torch import Tensor

from moeruntime.codes import NestedCode, PrivateCode
from moeruntime.errors import ResourceError, UsageError
from moeruntime.models.experts import (
    DecodedCache,
    DensePool,
    ExpertPool,
    NestedFace,
    NestedPart,
    NestedPool,
)
from moeruntime.pack import Pack, WeightSource
from moeruntime.pack.manifest import EXPERT_PARTS
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
    source: WeightSource,
    layer: int,
    dtype: torch.dtype,
    device: torch.device,
    cache: DecodedCache,
) -> ExpertPool:
    """Bring one layer's experts to the device, as they are stored."""
    if isinstance(source, Pack) and source.manifest.nested is not None:
        return _load_nested(source, source.manifest.nested, layer, dtype, device, cache)
    return _load_dense(source, layer, dtype, device)


def _load_dense(
    source: WeightSource, layer: int, dtype: torch.dtype, device: torch.device
) -> DensePool:
    """Copy slot by slot, through one slot of host memory."""
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
    return DensePool(pools["gate_up"], pools["down"])


def _load_nested(
    pack: Pack,
    nested: Mapping[str, NestedCode],
    layer: int,
    dtype: torch.dtype,
    device: torch.device,
    cache: DecodedCache,
) -> NestedPool:
    """Copy shared and private codes; nothing is decoded yet."""

    def to_device(planes: Mapping[int, Tensor]) -> dict[int, Tensor]:
        return {width: plane.to(device) for width, plane in planes.items()}

    parts = []
    for part in EXPERT_PARTS:
        planes, scale = pack.read_shared(layer, part)
        parts.append(
            NestedPart(
                nested[part],
                pack.manifest.part_shape(part)[1],
                to_device(planes),
                scale.to(device),
            )
        )
    faces = []
    for face in pack.manifest.faces(layer)[0]:
        private: list[tuple[dict[int, Tensor], PrivateCode]] = []
        for idx, part in enumerate(EXPERT_PARTS):
            if face.variant is None or face.expert is None:
                private.append(({}, PrivateCode(0, 0)))
                continue
            code = pack.variant(face.variant).private_codes[layer][face.expert][idx]
            codes = pack.read_private(face.variant, layer, face.expert, part)
            private.append((to_device(codes), code))
        faces.append(NestedFace(face.slot, (private[0], private[1])))
    return NestedPool((parts[0], parts[1]), faces, dtype, cache, layer)

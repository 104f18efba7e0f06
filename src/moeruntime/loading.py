"""Choosing where and in what precision to compute, and bringing the experts there."""

from __future__ import annotations

import re
from collections.abc import Mapping

import torch
from torch import Tensor

from moeruntime.codes import NestedCode, PrivateCode
from moeruntime.errors import ResourceError, UsageError
from moeruntime.hostmemory import new_tensor
from moeruntime.loader import Loader
from moeruntime.models.experts import (
    DecodedCache,
    DensePool,
    ExpertPool,
    NestedFace,
    NestedPart,
    NestedPool,
)
from moeruntime.pack import StoredTensor, WeightSource
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
    loader: Loader,
    cache: DecodedCache,
) -> ExpertPool:
    """Start bringing one layer's experts to the loader's device, as they are stored."""
    if source.manifest.nested is not None:
        return _load_nested(source, source.manifest.nested, layer, dtype, loader, cache)
    return _load_dense(source, layer, dtype, loader)


def _load_dense(source: WeightSource, layer: int, dtype: torch.dtype, loader: Loader) -> DensePool:
    pools = {}
    for part in EXPERT_PARTS:
        shape = (source.manifest.num_slots[layer], *source.manifest.part_shape(part))
        pools[part] = new_tensor(shape, dtype, loader.device)
        for slot in range(shape[0]):
            loader.load(source.slot(layer, part, slot), pools[part][slot])
    return DensePool(pools["gate_up"], pools["down"])


def _load_nested(
    source: WeightSource,
    nested: Mapping[str, NestedCode],
    layer: int,
    dtype: torch.dtype,
    loader: Loader,
    cache: DecodedCache,
) -> NestedPool:
    """Start bringing shared and private codes; nothing is decoded yet."""

    def bring(stored: StoredTensor) -> Tensor:
        out = new_tensor(stored.shape, stored.dtype, loader.device)
        loader.load((stored,), out)
        return out

    def bring_all(planes: Mapping[int, StoredTensor]) -> dict[int, Tensor]:
        return {width: bring(plane) for width, plane in planes.items()}

    parts = []
    for part in EXPERT_PARTS:
        planes, scale = source.shared_codes(layer, part)
        num_columns = source.manifest.part_shape(part)[1]
        parts.append(NestedPart(nested[part], num_columns, bring_all(planes), bring(scale)))
    faces = []
    for face in source.manifest.faces(layer)[0]:
        private: list[tuple[dict[int, Tensor], PrivateCode]] = []
        for idx, part in enumerate(EXPERT_PARTS):
            if face.variant is None or face.expert is None:
                private.append(({}, PrivateCode(0, 0)))
                continue
            code = source.variant(face.variant).private_codes[layer][face.expert][idx]
            codes = source.private_codes(face.variant, layer, face.expert, part)
            private.append((bring_all(codes), code))
        faces.append(NestedFace(face.slot, (private[0], private[1])))
    return NestedPool((parts[0], parts[1]), faces, dtype, cache, layer)

"""Choosing where and in what precision to compute, and bringing the experts there."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from types import TracebackType
from typing import Self

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
from moeruntime.pack import MadeTensor, StoredTensor, WeightSource
from moeruntime.pack.manifest import EXPERT_PARTS
from moeruntime.tensorfile import DTYPES

__all__ = ["Loader", "load_experts", "resolve_device", "resolve_dtype"]


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


class Loader:
    """Brings stored tensors to where they are computed with, through one buffer of host memory."""

    def __init__(self, device: torch.device) -> None:
        """Load for `device`."""
        self.device = device

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        problem: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        pass

    def load(self, stored: Sequence[StoredTensor], out: Tensor) -> None:
        """Fill a contiguous tensor, on the device or in host memory, converting the dtype.

        Args:
            stored: tensors whose elements follow one another.
            out: takes all of them.
        """
        start, out_N = 0, out.view(-1)
        for tensor in stored:
            stop = start + math.prod(tensor.shape)
            target = out_N[start:stop].view(tensor.shape)
            if isinstance(tensor, MadeTensor):
                self._make(tensor, target)
            else:
                target.copy_(tensor.read())
            start = stop
        assert start == len(out_N)

    def _make(self, tensor: MadeTensor, out: Tensor) -> None:
        if (out.dtype, out.device.type) == (tensor.dtype, self.device.type):
            tensor.fill(out)
            return
        # On the device even when it is for the host: making it there is so much faster.
        made = torch.empty(tensor.shape, dtype=tensor.dtype, device=self.device)
        tensor.fill(made)
        out.copy_(made)


def load_experts(
    source: WeightSource,
    layer: int,
    dtype: torch.dtype,
    loader: Loader,
    cache: DecodedCache,
) -> ExpertPool:
    """Bring one layer's experts to the loader's device, as they are stored."""
    if source.manifest.nested is not None:
        return _load_nested(source, source.manifest.nested, layer, dtype, loader, cache)
    return _load_dense(source, layer, dtype, loader)


def _load_dense(source: WeightSource, layer: int, dtype: torch.dtype, loader: Loader) -> DensePool:
    pools = {}
    for part in EXPERT_PARTS:
        shape = (source.manifest.num_slots[layer], *source.manifest.part_shape(part))
        pools[part] = torch.empty(shape, dtype=dtype, device=loader.device)
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
    """Bring shared and private codes; nothing is decoded yet."""

    def bring(stored: StoredTensor) -> Tensor:
        out = torch.empty(stored.shape, dtype=stored.dtype, device=loader.device)
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

"""A layer's experts as the model sees them: faces, whatever way they are stored.

A face is a distinct expert: a slot, or a slot refined by one variant's private codes. Tokens of
different variants that meet in a face share one product.

Legend: F faces, S slots, H hidden, I intermediate, R rows, J bytes of a plane's row.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from moeruntime.codes import NestedCode, PrivateCode, decode_planes
from moeruntime.kernels.strips import lay_in_strips

__all__ = ["DecodedCache", "DensePool", "ExpertPool", "NestedFace", "NestedPart", "NestedPool"]


class ExpertPool(Protocol):
    """What the expert kernel needs of a layer."""

    @property
    def num_faces(self) -> int:
        """Distinct experts."""
        ...

    def weights(self, face: int) -> tuple[Tensor, Tensor]:
        """gate_up [2I, H] (gate rows first) and down [H, I] of one face, in the compute dtype."""
        ...


@dataclass(frozen=True, slots=True)
class DensePool:
    """Weights as they are: gate_up [S, 2I, H] (gate rows first) and down [S, H, I]."""

    gate_up: Tensor
    down: Tensor

    @property
    def num_faces(self) -> int:
        return self.gate_up.shape[0]

    def weights(self, face: int) -> tuple[Tensor, Tensor]:
        return self.gate_up[face], self.down[face]

    def tensors(self) -> Iterator[Tensor]:
        """All that it holds."""
        yield from (self.gate_up, self.down)


@dataclass(frozen=True, slots=True)
class NestedPart:
    """One part of all slots: planes of the shared codes [S, R, J], scales [S, R, G]."""

    code: NestedCode
    num_columns: int
    planes: Mapping[int, Tensor]
    scale: Tensor


@dataclass(frozen=True, slots=True)
class NestedFace:
    """A slot, and for gate_up and down the private planes [R, J] and code that refine it."""

    slot: int
    private: tuple[tuple[dict[int, Tensor], PrivateCode], tuple[dict[int, Tensor], PrivateCode]]


class DecodedCache:
    """Faces decoded lately, least recently used out first, up to a number of bytes."""

    def __init__(self, max_bytes: int) -> None:
        """Start empty; 0 bytes keep nothing."""
        self._max_bytes = max_bytes
        self._bytes = 0
        self._entries: OrderedDict[tuple[int, int], tuple[Tensor, Tensor]] = OrderedDict()

    @property
    def num_bytes(self) -> int:
        """Kept now."""
        return self._bytes

    def get(self, key: tuple[int, int]) -> tuple[Tensor, Tensor] | None:
        """What is kept for (pool, face)."""
        if key in self._entries:
            self._entries.move_to_end(key)
            return self._entries[key]
        return None

    def put(self, key: tuple[int, int], weights: tuple[Tensor, Tensor]) -> None:
        """Keep a face, if it fits."""
        num_bytes = weights[0].nbytes + weights[1].nbytes
        if num_bytes > self._max_bytes:
            return
        self._entries[key] = weights
        self._bytes += num_bytes
        while self._bytes > self._max_bytes:
            _, (gate_up, down) = self._entries.popitem(last=False)
            self._bytes -= gate_up.nbytes + down.nbytes


class NestedPool:
    """Codes on the device, decoded face by face when tokens come."""

    def __init__(
        self,
        parts: tuple[NestedPart, NestedPart],
        faces: Sequence[NestedFace],
        dtype: torch.dtype,
        cache: DecodedCache,
        layer: int,
    ) -> None:
        """Bind codes; `parts` are gate_up and down, `cache` may be shared between layers."""
        self.parts = parts
        self.faces = faces
        self._dtype = dtype
        self._cache = cache
        self._layer = layer
        self._in_strips = False

    @property
    def num_faces(self) -> int:
        return len(self.faces)

    def lay_in_strips(self) -> None:
        """Put all planes as fast kernels want them, once. They are not decoded here any more."""
        if self._in_strips:
            return
        self._in_strips = True
        for idx, part in enumerate(self.parts):
            for plane_SRJ in part.planes.values():
                lay_in_strips(plane_SRJ, is_gate_up=idx == 0)
            for face in self.faces:
                for plane_RJ in face.private[idx][0].values():
                    lay_in_strips(plane_RJ[None], is_gate_up=idx == 0)

    def weights(self, face: int) -> tuple[Tensor, Tensor]:
        assert not self._in_strips
        key = (self._layer, face)
        decoded = self._cache.get(key)
        if decoded is None:
            gate_up, down = (self._decode(self.faces[face], idx) for idx in (0, 1))
            decoded = (gate_up, down)
            self._cache.put(key, decoded)
        return decoded

    def tensors(self) -> Iterator[Tensor]:
        """All codes and scales that it holds; not what is kept decoded."""
        for part in self.parts:
            yield from (*part.planes.values(), part.scale)
        for face in self.faces:
            for planes, _ in face.private:
                yield from planes.values()

    @property
    def decoded_bytes(self) -> int:
        """Of what is kept decoded, of all layers that share the cache."""
        return self._cache.num_bytes

    def _decode(self, face: NestedFace, idx: int) -> Tensor:
        part, (planes, private) = self.parts[idx], face.private[idx]
        shared = {width: plane[face.slot] for width, plane in part.planes.items()}
        scale_RG = part.scale[face.slot]
        return decode_planes(shared, planes, part.num_columns, scale_RG, part.code, private).to(
            self._dtype
        )

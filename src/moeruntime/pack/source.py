"""Where an engine takes weights from: a pack, or anything that reads like one."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from moeruntime.pack.manifest import Manifest, Variant
from moeruntime.tensorfile import FileTensor

__all__ = ["MadeTensor", "StoredTensor", "WeightSource"]


@dataclass(frozen=True, slots=True)
class MadeTensor:
    """A tensor that is computed, not read.

    Attributes:
        dtype, shape: what it is.
        fill: writes it into contiguous memory of this dtype and shape, on whatever device.
    """

    dtype: torch.dtype
    shape: tuple[int, ...]
    fill: Callable[[Tensor], None]


StoredTensor = FileTensor | MadeTensor
"""What a source hands out: nothing is read or made until `loading` has a place for it."""


class WeightSource(Protocol):
    """What loading needs to know.

    `Pack` is one; a single checkpoint can be dressed as one, and `SyntheticSource` makes one up.
    """

    @property
    def root(self) -> Path:
        """The folder, for messages."""
        ...

    @property
    def manifest(self) -> Manifest:
        """Architecture, variants and expert maps."""
        ...

    def variant(self, name: str) -> Variant:
        """Look up a variant; RequestError lists the known ones."""
        ...

    def variant_path(self, name: str, file: str) -> Path | None:
        """A file of a variant's folder (tokenizer.json, ...), or None."""
        ...

    def slot(self, layer: int, part: str, slot: int) -> Sequence[StoredTensor]:
        """One slot's "gate_up" [2I, H] (gate rows first) or "down" [H, I].

        Returns:
            Tensors of `expert_dtype` whose rows follow one another.
        """
        ...

    def shared_codes(
        self, layer: int, part: str
    ) -> tuple[Mapping[int, StoredTensor], StoredTensor]:
        """One part of all slots of a nested layer.

        Returns:
            The planes of the shared codes, width -> uint8 [slots, rows, bytes], and the scales,
            bfloat16 [slots, rows, groups].
        """
        ...

    def private_codes(
        self, variant: str, layer: int, expert: int, part: str
    ) -> Mapping[int, StoredTensor]:
        """One part of one variant's expert: private planes, width -> uint8 [rows, bytes]."""
        ...

    def non_expert(self, variant: str, role: str) -> StoredTensor:
        """One non-expert tensor of a variant."""
        ...

    def close(self) -> None:
        """Close every file."""
        ...

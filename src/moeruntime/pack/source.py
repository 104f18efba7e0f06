"""Where an engine takes weights from: a pack, or anything that reads like one."""

from __future__ import annotations

from pathlib import Path
from typing import Protocol

from torch import Tensor

from moeruntime.pack.manifest import Manifest, Variant

__all__ = ["WeightSource"]


class WeightSource(Protocol):
    """What loading needs to know. `Pack` is one; a single checkpoint can be dressed as one."""

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

    def read_slot(self, layer: int, part: str, slot: int, *, out: Tensor) -> None:
        """Read "gate_up" [2I, H] (gate rows first) or "down" [H, I] of one slot, as stored."""
        ...

    def read_non_expert(self, variant: str, role: str) -> Tensor:
        """Read one non-expert tensor of a variant, as stored."""
        ...

    def close(self) -> None:
        """Close every file."""
        ...

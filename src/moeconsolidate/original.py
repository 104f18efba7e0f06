"""An original checkpoint, dressed as a pack of one variant, so that the engine can run it."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from moeconsolidate.checkpoint import Checkpoint
from moeruntime.pack import Manifest, TensorRef, Variant
from moeruntime.pack.manifest import variant_file
from moeruntime.tensorfile import dtype_name

__all__ = ["CheckpointSource"]


class CheckpointSource:
    """One checkpoint dressed as a pack of one variant, so that the engine can run the original."""

    def __init__(self, checkpoint: Checkpoint) -> None:
        """Take over an open checkpoint; `close` closes it."""
        self._checkpoint = checkpoint
        config, name = checkpoint.config, checkpoint.name
        self._expert_P = torch.empty(config.expert_numel, dtype=checkpoint.expert_dtype)
        self._in_memory: tuple[int, int] | None = None
        identity = tuple(range(config.num_experts))
        self.manifest = Manifest(
            family=checkpoint.family.model_type,
            config=config,
            expert_dtype=dtype_name(checkpoint.expert_dtype),
            num_slots=(config.num_experts,) * config.num_layers,
            variants=(
                Variant(
                    name=name,
                    content_sha256="",
                    expert_map=(identity,) * config.num_layers,
                    tensors={
                        role: TensorRef(variant_file(name), role)
                        for role in config.non_expert_shapes()
                    },
                ),
            ),
            files={},
            recipe={},
            provenance={},
        )

    @property
    def root(self) -> Path:
        """The checkpoint's folder."""
        return self._checkpoint.folder

    def variant(self, name: str) -> Variant:
        """The only variant."""
        assert name == self._checkpoint.name
        return self.manifest.variants[0]

    def variant_path(self, name: str, file: str) -> Path | None:
        """A side file of the checkpoint."""
        return self.root / file if file in self._checkpoint.side_files else None

    def read_slot(self, layer: int, part: str, slot: int, *, out: Tensor) -> None:
        """Read one part of one expert; parts of the same expert are read from disk once."""
        if self._in_memory != (layer, slot):
            self._checkpoint.read_expert(layer, slot, out=self._expert_P)
            self._in_memory = (layer, slot)
        num_weights = out.numel()
        flat = self._expert_P[:num_weights] if part == "gate_up" else self._expert_P[-num_weights:]
        out.copy_(flat.view(out.shape))

    def read_non_expert(self, variant: str, role: str) -> Tensor:
        """Read one non-expert tensor."""
        return self._checkpoint.read_non_expert(role)

    def close(self) -> None:
        """Close the checkpoint's files."""
        self._checkpoint.close()

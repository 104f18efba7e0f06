"""An original checkpoint, dressed as a pack of one variant, so that the engine can run it."""

from __future__ import annotations

from pathlib import Path

from torch import Tensor

from moeconsolidate.checkpoint import Checkpoint
from moeruntime.pack import MadeTensor, Manifest, StoredTensor, TensorRef, Variant
from moeruntime.pack.manifest import variant_file
from moeruntime.tensorfile import FileTensor, dtype_name

__all__ = ["CheckpointSource"]


class CheckpointSource:
    """One checkpoint dressed as a pack of one variant, so that the engine can run the original."""

    def __init__(self, checkpoint: Checkpoint) -> None:
        """Take over an open checkpoint; `close` closes it."""
        self._checkpoint = checkpoint
        config, name = checkpoint.config, checkpoint.name
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

    def slot(self, layer: int, part: str, slot: int) -> tuple[StoredTensor, ...]:
        """One part of one expert: gate_up in one piece or several, down in one."""
        *gate_up, down = self._checkpoint.expert(layer, slot)
        return tuple(gate_up) if part == "gate_up" else (down,)

    def shared_codes(self, layer: int, part: str) -> tuple[dict[int, FileTensor], FileTensor]:
        """A checkpoint has no codes."""
        raise AssertionError("not a nested pack")

    def private_codes(
        self, variant: str, layer: int, expert: int, part: str
    ) -> dict[int, FileTensor]:
        """A checkpoint has no codes."""
        raise AssertionError("not a nested pack")

    def non_expert(self, variant: str, role: str) -> MadeTensor:
        """One non-expert tensor; the checkpoint checks it as it is read."""

        def fill(out: Tensor) -> None:
            out.copy_(self._checkpoint.read_non_expert(role))

        dtype = self._checkpoint.non_expert_dtype(role)
        return MadeTensor(dtype, self.manifest.config.non_expert_shapes()[role], fill)

    def close(self) -> None:
        """Close the checkpoint's files."""
        self._checkpoint.close()

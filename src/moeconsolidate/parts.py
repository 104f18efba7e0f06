"""An expert's flattened weights, seen as its matrices. Legend: P weights, R rows, C columns."""

from __future__ import annotations

from torch import Tensor

from moeruntime.families import ModelConfig

__all__ = ["expert_parts", "part_of"]


def part_of(expert_P: Tensor, part: str, config: ModelConfig) -> Tensor:
    """View one part, "gate_up" or "down", as [R, C]."""
    return expert_P[config.part_columns(part)].view(config.part_shapes[part])


def expert_parts(expert_P: Tensor, config: ModelConfig) -> tuple[Tensor, Tensor]:
    """View both parts: gate_up (gate rows first, if there are any) and down."""
    return part_of(expert_P, "gate_up", config), part_of(expert_P, "down", config)

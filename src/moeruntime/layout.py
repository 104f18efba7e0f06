"""How variants' own parameters lie in memory: one run a stage, in the order a step needs them.

A stage is the embedding, a block, or the head with the final norm. Its parameters follow one
another in one run of memory, so that activating a variant is one copy a stage and a step can begin
before the last of them has arrived.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from moeruntime.families import ModelConfig
from moeruntime.models.parameters import parameter_roles

__all__ = ["EMBEDDING", "Place", "Stage", "parameter_shape", "private_stages"]

EMBEDDING = -1
"""The embedding's number where blocks are counted from 0; the head's is the number of blocks."""

# Parameters begin at multiples of so many elements: 256 bytes in bfloat16, what kernels may assume.
ALIGNMENT = 128


@dataclass(frozen=True, slots=True)
class Place:
    """A parameter's elements [start, start + numel) of its stage."""

    start: int
    shape: tuple[int, ...]

    @property
    def numel(self) -> int:
        return math.prod(self.shape)


@dataclass(frozen=True, slots=True)
class Stage:
    """Parameters that move together: `numel` elements, each parameter at its place."""

    places: Mapping[str, Place]
    numel: int


def parameter_shape(config: ModelConfig, roles: tuple[str, ...]) -> tuple[int, ...]:
    """Shape of a parameter made of the rows of several roles."""
    shapes = [config.non_expert_shapes()[role] for role in roles]
    return (sum(shape[0] for shape in shapes), *shapes[0][1:])


def private_stages(config: ModelConfig, shared_roles: frozenset[str]) -> tuple[Stage, ...]:
    """The embedding, each block, and the head, without what all variants have in common.

    A parameter of several roles is common when all of them are.
    """
    grouped: list[dict[str, Place]] = [{} for _ in range(len(config.blocks) + 2)]
    ends = [0] * len(grouped)
    for parameter, roles in parameter_roles(config).items():
        if shared_roles.issuperset(roles):
            continue
        stage = _stage(parameter, config.blocks)
        place = Place(ends[stage], parameter_shape(config, roles))
        grouped[stage][parameter] = place
        ends[stage] += -(-place.numel // ALIGNMENT) * ALIGNMENT
    return tuple(Stage(places, end) for places, end in zip(grouped, ends, strict=True))


def _stage(parameter: str, blocks: tuple[str, ...]) -> int:
    if parameter == "embed_tokens":
        return EMBEDDING + 1
    block, _, _ = parameter.rpartition(".")
    if block in blocks:
        return blocks.index(block) + 1
    if block:  # a stack's own final norm, which follows its last block
        return max(idx for idx, one in enumerate(blocks) if one.startswith(f"{block}.")) + 1
    return len(blocks) + 1

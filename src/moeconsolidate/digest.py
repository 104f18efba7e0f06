"""What a model *is*, whatever files it came in: a digest over its tensors by role.

A model's content digest is the sha256 of one line a tensor::

    layers.3.q_proj BF16 96,96 <sha256 of the tensor's bytes, row-major, little-endian>

non-expert tensors first, in the order a forward pass meets them, then the experts by layer and
number, each as gate_proj (if it has one), up_proj, down_proj. So shards, fused experts and older
tensor names do not matter, and one changed bit does.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from moeruntime.families import ModelConfig
from moeruntime.tensorfile import dtype_name

__all__ = ["TensorDigest", "content_sha256", "expert_role"]


@dataclass(frozen=True, slots=True)
class TensorDigest:
    """A tensor up to equality of bits: dtype, shape and lower-case sha256 of its bytes."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    sha256: str

    @classmethod
    def of(cls, tensor: Tensor) -> TensorDigest:
        """Hash a contiguous CPU tensor."""
        data = tensor.reshape(-1).view(torch.uint8).numpy().data
        return cls(tensor.dtype, tuple(tensor.shape), hashlib.sha256(data).hexdigest())

    @property
    def num_bytes(self) -> int:
        """Size of the tensor's data."""
        return math.prod(self.shape) * self.dtype.itemsize


def expert_role(block: str, expert: int, role: str) -> str:
    """The full role of an expert's tensor, such as "layers.3.experts.0.gate_proj"."""
    return f"{block}.experts.{expert}.{role}"


def content_sha256(config: ModelConfig, digests: Mapping[str, TensorDigest]) -> str:
    """Digest of a whole model; `digests` holds one entry a full role."""
    roles = list(config.non_expert_shapes())
    for block in config.layers:
        for expert in range(config.num_experts):
            roles += [expert_role(block, expert, role) for role in config.expert_shapes]
    lines = (
        f"{role} {dtype_name(one.dtype)} {','.join(map(str, one.shape))} {one.sha256}\n"
        for role, one in ((role, digests[role]) for role in roles)
    )
    return hashlib.sha256("".join(lines).encode("ascii")).hexdigest()

"""A Triton kernel that reads memory and does next to nothing else."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

__all__ = ["SHAPES", "read"]

SHAPES = ((4096, 16, 4), (8192, 8, 8), (4096, 64, 8), (2048, 32, 4))
"""(numbers at once, rounds, warps) of a program: none is the best everywhere."""


@triton.jit
def _read_kernel(x, out, BLOCK: tl.constexpr, ROUNDS: tl.constexpr):
    start = tl.program_id(0).to(tl.int64) * (BLOCK * ROUNDS)
    total = tl.zeros((BLOCK,), tl.int32)
    for part in tl.range(0, ROUNDS, num_stages=4):
        total += tl.load(x + start + part * BLOCK + tl.arange(0, BLOCK))
    tl.store(out + tl.program_id(0), tl.sum(total))


def read(x_N: Tensor, shape: tuple[int, int, int], *, out: Tensor) -> None:
    """Add up runs of int32 numbers, one a program; N is a multiple of a run's length."""
    block, rounds, warps = shape
    programs = len(x_N) // (block * rounds)
    _read_kernel[(programs,)](x_N, out, BLOCK=block, ROUNDS=rounds, num_warps=warps)

"""Programmatic dependent launch: a kernel starts while the one before it still drains.

Between two launches of a graph lie microseconds in which memory idles. On Hopper and later a kernel
may begin before its predecessor ends, do what does not depend on it, and only then wait. Here that
is finding its work and asking the L2 cache for the first weights.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

__all__ = ["may_overlap", "prefetch", "release", "wait"]


def may_overlap() -> bool:
    """Whether the current device can."""
    return torch.cuda.is_available() and torch.cuda.get_device_capability()[0] >= 9


@triton.jit
def wait(OVERLAP: tl.constexpr):
    """Wait until everything that was launched before is done; nothing is read or written before."""
    if OVERLAP:
        tl.extra.cuda.gdc_wait()


@triton.jit
def release(OVERLAP: tl.constexpr):
    """Let the next kernel begin, once every program of this one has come here."""
    if OVERLAP:
        tl.extra.cuda.gdc_launch_dependents()


@triton.jit
def prefetch(at, OVERLAP: tl.constexpr):
    """Ask the L2 cache for the lines that the pointers `at` are in."""
    if OVERLAP:
        tl.inline_asm_elementwise(
            "{prefetch.global.L2 [$1]; mov.b32 $0, 0;}",
            "=r,l",
            [at.to(tl.int64)],
            dtype=tl.int32,
            is_pure=False,
            pack=1,
        )

"""Kernels that are launched while the one before them on the stream still runs.

A decode step is hundreds of kernels of some microseconds, each of which reads what the one before
wrote. On a Hopper device or later the next one's programs are put in place while the last ones of
the one before still run, and wait there: what a launch takes is hidden
(programmatic dependent launch).

Whoever is launched so has to wait, in every program and before it reads or writes anything: only
then is what came before complete, all the way back. Then it lets the next kernel come, which is put
in place once all programs of this one have started. Kernels that know nothing of this, like
torch's, are safe between them: they start and end as they always do.
"""

from __future__ import annotations

from functools import cache

import torch
import triton
import triton.language as tl

from moeruntime.kernels.driver import chains

__all__ = ["begin_chained", "chained"]


@triton.jit
def begin_chained(CHAINED: tl.constexpr):
    """What a kernel has to do first; `CHAINED` and how it is launched are of `chained`."""
    if CHAINED:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()


@cache
def chained(device: torch.device) -> dict[str, bool]:
    """Arguments of a launch of a Triton kernel that calls `begin_chained`."""
    can = chains(torch.cuda.get_device_capability(device))
    return {"CHAINED": can, "launch_pdl": can}

"""Kernels that are launched while the one before them on the stream still runs.

A decode step is hundreds of kernels of some microseconds, each of which reads what the one before
wrote. On a Hopper device or later the next one's programs are put in place while the last ones of
the one before still run, and wait there: what a launch takes is hidden
(programmatic dependent launch).

Whoever is launched so has to wait, in every program, before it writes anything or reads what the
kernel before it wrote: only then is that one complete. Then it lets the next kernel come, which is
put in place once all programs of this one have started. So all that came earlier was complete when
a kernel is put in place, and what weights, inputs of the step and earlier kernels have to give is
fetched before it waits. Kernels that know nothing of this, like torch's, are safe between them:
they start and end as they always do.
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
    """Wait for the kernel before, in every program; `CHAINED` and the launch are of `chained`."""
    if CHAINED:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()


@cache
def chained(device: torch.device) -> dict[str, bool]:
    """Arguments of a launch of a Triton kernel that calls `begin_chained`."""
    can = chains(torch.cuda.get_device_capability(device))
    return {"CHAINED": can, "launch_pdl": can}

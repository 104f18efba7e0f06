"""Small integers on their way to the GPU, past the copy engine.

An activation keeps the engine that copies from the host busy for tens of milliseconds, and whatever
else is copied waits its turn behind it. A step's inputs are a few kilobytes: a kernel reads them
from pinned host memory by itself.
"""

from __future__ import annotations

from functools import cache

import torch
import triton
import triton.language as tl
from torch import Tensor

__all__ = ["Uploader", "uploader"]

NUM_STAGES = 16
BLOCK = 1024


# Here and in other kernels: what differs from step to step must not be compiled for anew each time.
@triton.jit(do_not_specialize=("num_columns", "target_stride"))
def _copy_kernel(source, target, num_columns, target_stride, BLOCK: tl.constexpr):
    row = tl.program_id(0)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < num_columns
    value = tl.load(source + row * num_columns + column, inside, other=0)
    tl.store(target + row * target_stride + column, value, inside)


class Uploader:
    """A ring of pinned buffers; one is written to again once a kernel has read it."""

    def __init__(self, device: torch.device) -> None:
        """Start with nothing pinned."""
        self._device = device
        self._ring: list[tuple[Tensor, torch.cuda.Event]] = []
        self._turn = 0

    def send(self, values: Tensor, target: Tensor | None = None) -> Tensor:
        """Bring a contiguous tensor of one or two dimensions to the device.

        Args:
            values: on the host.
            target: where to; of the same shape, its rows contiguous. None makes one.

        Returns:
            The target; whatever is launched next on this stream may read it.
        """
        if target is None:
            target = torch.empty_like(values, device=self._device)
        pinned, event = self._stage(values.nbytes)
        staged = pinned[: values.nbytes].view(values.dtype).view(values.shape)
        staged.copy_(values)
        rows, columns = (1, len(values)) if values.dim() == 1 else values.shape
        _copy_kernel[(rows, triton.cdiv(columns, BLOCK))](
            staged, target, columns, target.stride(0), BLOCK=BLOCK, num_warps=4
        )
        event.record(torch.cuda.current_stream(self._device))
        return target

    def _stage(self, num_bytes: int) -> tuple[Tensor, torch.cuda.Event]:
        """The next buffer of the ring, large enough and no longer read."""
        turn = self._turn
        self._turn = (turn + 1) % NUM_STAGES
        if turn == len(self._ring):
            self._ring.append((_pinned(num_bytes), torch.cuda.Event()))
        pinned, event = self._ring[turn]
        event.synchronize()
        if len(pinned) < num_bytes:
            pinned = _pinned(num_bytes)
            self._ring[turn] = pinned, event
        return pinned, event


def _pinned(num_bytes: int) -> Tensor:
    return torch.empty(triton.next_power_of_2(num_bytes), dtype=torch.uint8, pin_memory=True)


@cache
def uploader(device: torch.device) -> Uploader:
    """The device's."""
    return Uploader(device)

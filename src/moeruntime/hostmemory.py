"""Host memory that is quick to fill and quick to copy from.

Fresh memory costs a fault a page. In pages of 2 MiB that is little; in pages of 4 KiB it can cost
more than reading the file that goes there. torch's own pinned allocator rounds up to a power of
two, which for weights of one model can be half as much again, so memory is pinned here in place.
"""

from __future__ import annotations

import math
import mmap
import weakref
from collections.abc import Sequence
from contextlib import suppress

import torch
from torch import Tensor

from moeruntime.errors import ResourceError

__all__ = ["HostMemory", "new_tensor"]

HUGE_PAGE_BYTES = 2 * 2**20
PORTABLE = 1  # cudaHostRegisterPortable: pinned for every device


class HostMemory:
    """One run of bytes, in huge pages where the system grants them, and pinned on demand.

    Attributes:
        data: uint8 [num_bytes], uninitialised; once pinned, no view may outlive this object.
    """

    def __init__(self, num_bytes: int) -> None:
        """Reserve; pages come when they are first written."""
        assert num_bytes > 0
        memory = mmap.mmap(-1, num_bytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        with suppress(AttributeError, OSError):  # a system without them: slower, not wrong
            memory.madvise(mmap.MADV_HUGEPAGE)
        self.data: Tensor = torch.frombuffer(memory, dtype=torch.uint8)

    def pin(self) -> None:
        """Lock its pages, so that a GPU can copy from it and to it by itself.

        Raises:
            ResourceError: the driver will not lock so much.
        """
        address, num_bytes = self.data.data_ptr(), self.data.nbytes
        status = int(torch.cuda.cudart().cudaHostRegister(address, num_bytes, PORTABLE))
        if status != 0:
            raise ResourceError(
                f"cannot pin {num_bytes / 1e9:.1f} GB of host memory (CUDA error {status})"
            )
        # Holding `data` keeps the pages mapped until they are unlocked.
        weakref.finalize(self, _unpin, self.data)


def _unpin(data: Tensor) -> None:
    torch.cuda.synchronize()
    torch.cuda.cudart().cudaHostUnregister(data.data_ptr())


def new_tensor(shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Uninitialised memory for weights; on a CPU in huge pages if it is large."""
    num_bytes = math.prod(shape) * dtype.itemsize
    if device.type != "cpu" or num_bytes < HUGE_PAGE_BYTES:
        return torch.empty(tuple(shape), dtype=dtype, device=device)
    return HostMemory(num_bytes).data.view(dtype).view(tuple(shape))

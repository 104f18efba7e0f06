"""Writing a large file once, past the page cache.

Copying into the page cache takes more of a processor than all else about writing, and evicts what
is read again: checkpoints, which are compiled more than once. So bytes are gathered in whole blocks
that go to the disk directly. Where a file system cannot do that, such as one in memory, the same
blocks are written as usual.
"""

from __future__ import annotations

import errno
import fcntl
import os
from contextlib import suppress
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from moeruntime.hostmemory import HostMemory

__all__ = ["NewFile"]

BLOCK_BYTES = 4 * 2**20
"""What is written at once: enough for a disk to be as fast as it is."""

PAGE_BYTES = 4096
"""Direct I/O starts and ends at multiples of this, in memory and in the file."""


class NewFile:
    """A file that is appended to from its beginning; close it, or `finish` it."""

    def __init__(self, path: Path) -> None:
        """Create `path`, which must not exist."""
        self._file = path.open("xb", buffering=0)
        self._block = HostMemory(BLOCK_BYTES).data.numpy()  # starts on a page
        self._num_bytes = 0
        with suppress(OSError):
            self._write_directly(True)

    def append(self, data: bytes | memoryview) -> None:
        """Append bytes, most of which reach the disk before this returns."""
        left = np.frombuffer(data, np.uint8)
        while len(left):
            if len(left) >= BLOCK_BYTES and not (left.ctypes.data | self._num_bytes) % PAGE_BYTES:
                # Nothing has to be moved to where direct I/O can take it.
                self._write(self._block[: self._num_bytes])
                self._write(left[: len(left) // PAGE_BYTES * PAGE_BYTES])
                left, self._num_bytes = left[len(left) // PAGE_BYTES * PAGE_BYTES :], 0
                continue
            taken = left[: BLOCK_BYTES - self._num_bytes]
            self._block[self._num_bytes :][: len(taken)] = taken
            self._num_bytes += len(taken)
            left = left[len(taken) :]
            if self._num_bytes == BLOCK_BYTES:
                self._write(self._block)
                self._num_bytes = 0

    def finish(self) -> None:
        """Bring everything to the disk, and close."""
        self._write_directly(False)  # the rest need not be whole pages
        self._write(self._block[: self._num_bytes])
        os.fsync(self._file.fileno())
        self._file.close()

    def close(self) -> None:
        """Give the file up, or back after `finish`."""
        self._file.close()

    def _write(self, data: NDArray[np.uint8]) -> None:
        left = data.data
        while left:
            try:
                left = left[self._file.write(left) :]
            except OSError as problem:
                if problem.errno != errno.EINVAL or not self._write_directly(False):
                    raise  # not because this was direct

    def _write_directly(self, wanted: bool) -> bool:
        """Turn direct I/O on or off, if there is such a thing; returns whether that changed it."""
        direct, fd = getattr(os, "O_DIRECT", 0), self._file.fileno()
        before = fcntl.fcntl(fd, fcntl.F_GETFL)
        after = before | direct if wanted else before & ~direct
        fcntl.fcntl(fd, fcntl.F_SETFL, after)
        return before != after

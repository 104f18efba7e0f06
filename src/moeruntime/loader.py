"""From files to the device: parallel reads, a ring of pinned buffers, copies on a side stream.

A tensor is cut into pieces. A few threads read pieces into the buffers of the ring and queue each
one's copy; a buffer is read into again once its copy is done. Reading and copying overlap, and host
memory stays bounded by the ring. What goes to host memory as it is stored is read straight there.

There are more buffers than threads: or a thread would get back the one whose copy it just queued.
"""

from __future__ import annotations

import math
import os
import queue
import threading
from collections import deque
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from types import TracebackType
from typing import Self

import torch
from torch import Tensor

from moeruntime.hostmemory import HostMemory
from moeruntime.pack.source import MadeTensor, StoredTensor
from moeruntime.tensorfile import FileTensor

__all__ = ["RING_BYTES", "Loader"]

NUM_BUFFERS = 14
BUFFER_BYTES = 16 * 2**20
RING_BYTES = NUM_BUFFERS * BUFFER_BYTES
"""Host memory the ring takes while an engine loads."""

MAX_THREADS = 12
# Pieces that may wait for a thread; bounds how far the caller, and its progress, run ahead.
MAX_WAITING = 2 * NUM_BUFFERS


class _Buffer:
    """One place of the ring, and the copy that last read it."""

    def __init__(self, num_bytes: int) -> None:
        self.num_bytes = num_bytes
        self._memory: HostMemory | None = None
        self._copied: torch.cuda.Event | None = None

    def room(self) -> Tensor:
        """Its bytes, when they may be written."""
        if self._memory is None:
            self._memory = HostMemory(self.num_bytes)
        if self._copied is not None:
            self._copied.synchronize()
        return self._memory.data

    def pin(self) -> None:
        """For copies; after the first read, which brings the pages in while others read."""
        assert self._memory is not None
        if self._copied is None:
            self._memory.pin()
            self._copied = torch.cuda.Event(blocking=True)

    def record(self) -> None:
        """What the current stream was last asked for reads it."""
        assert self._copied is not None
        self._copied.record()


class Loader:
    """Fills tensors on a device, and in host memory, with what a source hands out.

    `load` returns early; what it was given is there after `finish`, or when the context ends. One
    thread calls it.
    """

    def __init__(self, device: torch.device) -> None:
        """Load for `device`; threads and buffers are made when first needed."""
        self.device = device
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        num_threads = min(MAX_THREADS, len(os.sched_getaffinity(0)))
        self._threads = ThreadPoolExecutor(num_threads, "load", self._enter_thread)
        self._room = threading.Semaphore(MAX_WAITING + num_threads)
        self._pieces: deque[Future[None]] = deque()
        self._buffers: queue.SimpleQueue[_Buffer] = queue.SimpleQueue()
        for _ in range(NUM_BUFFERS):
            self._buffers.put(_Buffer(BUFFER_BYTES))

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        problem: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        try:
            if problem is None:
                self.finish()
        finally:
            self._threads.shutdown(cancel_futures=True)
            if self._stream is not None:
                self._stream.synchronize()

    def load(self, stored: Sequence[StoredTensor], out: Tensor) -> None:
        """Start filling a contiguous tensor, converting to its dtype.

        Args:
            stored: tensors whose elements follow one another.
            out: takes all of them; on the device or in host memory.

        Raises:
            MoecError: an earlier piece could not be read.
        """
        if self._stream is not None and out.is_cuda:
            # Whatever the memory was used for before must be over.
            self._stream.wait_stream(torch.cuda.current_stream(self.device))
        start, out_N = 0, out.view(-1)
        for tensor in stored:
            stop = start + math.prod(tensor.shape)
            if isinstance(tensor, MadeTensor):
                self._make(tensor, out_N[start:stop].view(tensor.shape))
            else:
                self._cut(tensor, out_N[start:stop])
            start = stop
        assert start == len(out_N)

    def finish(self) -> None:
        """Wait until everything is where it belongs.

        Raises:
            MoecError: a piece could not be read.
        """
        while self._pieces:
            self._pieces.popleft().result()
        if self._stream is not None:
            self._stream.synchronize()

    def _make(self, tensor: MadeTensor, out: Tensor) -> None:
        if (out.dtype, out.device.type) == (tensor.dtype, self.device.type):
            tensor.fill(out)
            return
        # On the device even when it is for the host: making it there is so much faster.
        made = torch.empty(tensor.shape, dtype=tensor.dtype, device=self.device)
        tensor.fill(made)
        out.copy_(made)

    def _cut(self, tensor: FileTensor, out_N: Tensor) -> None:
        direct = out_N.device.type == "cpu" and out_N.dtype == tensor.dtype
        step = BUFFER_BYTES // tensor.dtype.itemsize
        for start in range(0, len(out_N), step):
            piece = out_N[start : start + step]
            self._room.acquire()
            read = self._read if direct else self._copy
            self._pieces.append(
                self._threads.submit(read, tensor, start * tensor.dtype.itemsize, piece)
            )
            while self._pieces and self._pieces[0].done():
                self._pieces.popleft().result()

    # -- what the threads do ------------------------------------------------------------------

    def _enter_thread(self) -> None:
        if self._stream is not None:
            torch.cuda.set_stream(self._stream)

    def _read(self, tensor: FileTensor, start: int, out_N: Tensor) -> None:
        try:
            tensor.read_bytes(start, out_N.view(torch.uint8))
        finally:
            self._room.release()

    def _copy(self, tensor: FileTensor, start: int, out_N: Tensor) -> None:
        buffer = self._buffers.get()
        try:
            piece = buffer.room()[: len(out_N) * tensor.dtype.itemsize]
            tensor.read_bytes(start, piece)
            piece_N = piece.view(tensor.dtype)
            if not out_N.is_cuda:
                out_N.copy_(piece_N)
                return
            buffer.pin()
            # Converted there: the host would take longer, and could not hand on pinned memory.
            if piece_N.dtype != out_N.dtype:
                piece_N = piece_N.to(self.device, non_blocking=True)
            out_N.copy_(piece_N, non_blocking=True)
            buffer.record()
        finally:
            self._buffers.put(buffer)
            self._room.release()

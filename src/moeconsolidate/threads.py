"""Threads that decide how long a thing takes and never what comes out.

torch splits a matrix product over threads, and the order in which it then adds up depends on how
many there are. Whatever decides a byte of a pack runs on one thread at a time; pieces that do not
depend on each other run side by side.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

__all__ = ["single_threaded_torch"]


@contextmanager
def single_threaded_torch() -> Iterator[int]:
    """Keep torch from splitting one operation over threads; yields how many it had."""
    num_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield num_threads
    finally:
        torch.set_num_threads(num_threads)

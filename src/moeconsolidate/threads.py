"""Threads that decide how long a thing takes and never what comes out.

torch splits a matrix product over threads, and the order in which it then adds up depends on how
many there are. Whatever decides a byte of a pack runs on one thread at a time; pieces that do not
depend on each other run side by side.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from contextvars import ContextVar
from typing import TypeVar

import torch

__all__ = ["side_by_side", "single_threaded_torch"]

T = TypeVar("T")
R = TypeVar("R")

_SPARE_THREADS: ContextVar[int] = ContextVar("_SPARE_THREADS", default=1)


@contextmanager
def single_threaded_torch() -> Iterator[int]:
    """Keep torch from splitting one operation over threads; `side_by_side` may use them instead.

    Yields how many torch had, outside of all such blocks.
    """
    num_threads = torch.get_num_threads()
    spare_threads = max(num_threads, _SPARE_THREADS.get())
    before = _SPARE_THREADS.set(spare_threads)
    torch.set_num_threads(1)
    try:
        yield spare_threads
    finally:
        torch.set_num_threads(num_threads)
        _SPARE_THREADS.reset(before)


def side_by_side(work: Callable[[T], R], items: Iterable[T]) -> list[R]:
    """Do independent work, each item on one thread; results in the order of the items.

    Within `single_threaded_torch` as many at a time as torch had threads, else one after another.
    """
    num_threads = _SPARE_THREADS.get()
    if num_threads == 1:
        return [work(item) for item in items]
    with ThreadPoolExecutor(num_threads, initializer=torch.set_num_threads, initargs=(1,)) as pool:
        return list(pool.map(work, items))

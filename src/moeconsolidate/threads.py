"""Threads that decide how long a thing takes and never what comes out.

torch splits a matrix product over threads, and the order in which it then adds up depends on how
many there are. Whatever decides a byte of a pack runs on one thread at a time; pieces that do not
depend on each other run side by side.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from contextvars import ContextVar
from types import TracebackType
from typing import Self, TypeVar

import torch

__all__ = ["Behind", "in_order", "num_places", "side_by_side", "single_threaded_torch"]

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


def in_order(work: Callable[[T, int], R], items: Iterable[T]) -> Iterator[R]:
    """Do independent work on several threads, a little ahead of whoever takes the results.

    Args:
        work: called with an item and a number below `num_places()`, which can name a buffer: no
            two items have the same that are worked on, or whose result is still in use.
        items: what to work on. Results come in their order, each valid until the next is asked for.
    """
    places, left = num_places(), enumerate(items)
    waiting: deque[Future[R]] = deque()
    with ThreadPoolExecutor(places - 1, initializer=torch.set_num_threads, initargs=(1,)) as pool:

        def begin_next() -> None:
            for number, item in left:
                waiting.append(pool.submit(work, item, number % places))
                return

        for _ in range(places - 1):
            begin_next()
        while waiting:
            result = waiting.popleft().result()
            begin_next()  # in the place of the result before this one
            yield result


class Behind:
    """Does one thing in the background while its owner does the next: waiting for a disk, mostly.

    What fails there is raised by the next `do` or `wait`. On the way out the last thing is waited
    for, and its failure counts unless there was another before it.
    """

    def __init__(self) -> None:
        """Start nothing yet."""
        self._pool = ThreadPoolExecutor(1)
        self._running: Future[None] | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        problem: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._pool.shutdown()
        if problem is None:
            self.wait()

    def do(self, work: Callable[[], None]) -> None:
        """Begin, once what came before has ended well."""
        self.wait()
        self._running = self._pool.submit(work)

    def wait(self) -> None:
        """Return when nothing is left to do."""
        running, self._running = self._running, None
        if running is not None:
            running.result()


def num_places() -> int:
    """Items that `in_order` has at once: one for each thread, and the one whose result is used."""
    return max(torch.get_num_threads(), _SPARE_THREADS.get()) + 1

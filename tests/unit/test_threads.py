"""Work side by side: in order, each item on one thread, and only within `single_threaded_torch`."""

from __future__ import annotations

import threading
from collections.abc import Iterator

import pytest
import torch

from moeconsolidate.threads import Behind, in_order, num_places, side_by_side, single_threaded_torch


@pytest.fixture(autouse=True)
def three_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    yield
    torch.set_num_threads(before)


def test_items_meet_and_results_keep_their_order() -> None:
    together = threading.Barrier(3, timeout=30)

    def work(item: int) -> tuple[int, int]:
        together.wait()
        return item, torch.get_num_threads()

    with single_threaded_torch() as num_threads:
        assert num_threads == 3
        assert side_by_side(work, range(3)) == [(0, 1), (1, 1), (2, 1)]
    assert torch.get_num_threads() == 3


def test_a_block_within_a_block_has_the_outer_ones_threads() -> None:
    with single_threaded_torch(), single_threaded_torch() as num_threads:
        assert num_threads == 3
    assert torch.get_num_threads() == 3


def test_outside_of_a_block_and_within_an_item_work_is_done_in_turn() -> None:
    def here(_: int) -> int:
        return threading.get_ident()

    assert set(side_by_side(here, range(3))) == {threading.get_ident()}
    with single_threaded_torch():
        nested = side_by_side(lambda _: (here(0), set(side_by_side(here, range(3)))), range(2))
    for outer, inner in nested:
        assert inner == {outer}


def test_a_failure_comes_through() -> None:
    def fail(item: int) -> int:
        raise ValueError(f"item {item}")

    with pytest.raises(ValueError, match="item 0"), single_threaded_torch():
        side_by_side(fail, range(3))
    assert torch.get_num_threads() == 3


def test_results_keep_their_order_and_places_are_not_shared() -> None:
    in_use: set[int] = set()
    lock = threading.Lock()

    def work(item: int, place: int) -> tuple[int, int]:
        with lock:
            assert place not in in_use
            in_use.add(place)
        return item, place

    for expected, (item, place) in enumerate(in_order(work, range(20))):
        assert item == expected
        assert place < num_places() == 4
        with lock:
            in_use.discard(place)


def test_what_goes_wrong_ahead_is_raised_in_its_turn() -> None:
    def work(item: int, _: int) -> int:
        return 10 // (3 - item)

    taken = []
    with pytest.raises(ZeroDivisionError):
        for result in in_order(work, range(6)):
            taken.append(result)
    assert taken == [3, 5, 10]


def test_behind_does_one_thing_at_a_time_in_order() -> None:
    go, done = threading.Event(), list[int]()

    def work(number: int) -> None:
        assert go.wait(timeout=30)
        done.append(number)

    with Behind() as behind:
        behind.do(lambda: work(1))
        assert done == []  # it does not wait
        go.set()
        behind.do(lambda: work(2))
        assert done[0] == 1
        behind.wait()
        assert done == [1, 2]
        behind.do(lambda: work(3))
    assert done == [1, 2, 3]


def test_what_fails_behind_is_told_once() -> None:
    def fail() -> None:
        raise OSError(28, "No space left on device")

    with Behind() as behind:
        behind.do(fail)
        with pytest.raises(OSError, match="No space"):
            behind.wait()
        behind.wait()
    with pytest.raises(OSError, match="No space"), Behind() as behind:
        behind.do(fail)
    with pytest.raises(ValueError, match="the first"), Behind() as behind:
        behind.do(fail)
        raise ValueError("the first")

"""The host wakes up in time for the next step, and not much earlier."""

from __future__ import annotations

import pytest

from moeruntime.pace import LEAD_S, LOOK_EVERY_S, Pace


class Time:
    """Seconds that pass only while somebody sleeps."""

    def __init__(self) -> None:
        self.now_s = 100.0

    def __call__(self) -> float:
        return self.now_s

    def sleep(self, seconds: float) -> None:
        self.now_s += seconds


@pytest.fixture
def time() -> Time:
    return Time()


@pytest.fixture
def pace(time: Time) -> Pace:
    return Pace(clock=time, sleep=time.sleep)


def run_steps(pace: Pace, time: Time, *lengths_s: float) -> None:
    pace.broken()
    pace.ended()
    for length_s in lengths_s:
        time.sleep(length_s)
        pace.ended()


def test_it_wakes_shortly_before_the_shortest_of_the_last_steps_would_end(
    pace: Pace, time: Time
) -> None:
    run_steps(pace, time, 0.030, 0.024, 0.026)
    began_s = time.now_s
    pace.rest(lambda: False)
    assert time.now_s == pytest.approx(began_s + 0.024 - LEAD_S)


def test_old_steps_are_forgotten(pace: Pace, time: Time) -> None:
    run_steps(pace, time, 0.010, *[0.030] * 8)
    began_s = time.now_s
    pace.rest(lambda: False)
    assert time.now_s == pytest.approx(began_s + 0.030 - LEAD_S)


def test_a_step_that_ends_early_ends_the_sleep(pace: Pace, time: Time) -> None:
    run_steps(pace, time, 0.030)
    ends_s = time.now_s + 0.008
    pace.rest(lambda: time.now_s >= ends_s)
    assert ends_s <= time.now_s <= ends_s + LOOK_EVERY_S


@pytest.mark.parametrize("lengths_s", [(), (0.001,)], ids=["unknown", "shorter than the lead"])
def test_it_does_not_sleep_where_there_is_no_time_to(
    pace: Pace, time: Time, lengths_s: tuple[float, ...]
) -> None:
    run_steps(pace, time, *lengths_s)
    before_s = time.now_s
    pace.rest(lambda: False)
    assert time.now_s == before_s


def test_steps_apart_from_each_other_have_no_rhythm(pace: Pace, time: Time) -> None:
    run_steps(pace, time, 0.030)
    pace.broken()  # launched when nothing ran: when it began is not known
    before_s = time.now_s
    pace.rest(lambda: False)
    assert time.now_s == before_s

"""When the step that runs on the device is about to end, as the steps before it suggest."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable

__all__ = ["Pace"]

NUM_STEPS = 8
LEAD_S = 4e-3
"""What the host needs to read what has come in, and to launch the next step, with room to spare."""

LOOK_EVERY_S = 5e-4


class Pace:
    """The rhythm of steps of which each begins on the device when the one before it ends."""

    def __init__(
        self,
        *,
        clock: Callable[[], float] = time.perf_counter,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        """Start without a rhythm; a test has its own time."""
        self._clock, self._sleep = clock, sleep
        self._taken_s: deque[float] = deque(maxlen=NUM_STEPS)
        self._began_s: float | None = None

    def broken(self) -> None:
        """A step is launched while none runs."""
        self._began_s = None

    def ended(self) -> None:
        """A step ended now; the next one, if it was launched already, has begun."""
        now_s = self._clock()
        if self._began_s is not None:
            self._taken_s.append(now_s - self._began_s)
        self._began_s = now_s

    def rest(self, has_ended: Callable[[], bool]) -> None:
        """Sleep until shortly before the step that runs is expected to end, or until it has.

        The shortest of the last few steps is expected: to wake up early costs nothing.
        """
        if self._began_s is None or not self._taken_s:
            return
        wake_s = self._began_s + min(self._taken_s) - LEAD_S
        while (left_s := wake_s - self._clock()) > 0 and not has_ended():
            self._sleep(min(left_s, LOOK_EVERY_S))

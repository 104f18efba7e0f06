"""Who waits for admission, and in which order. Pure Python.

The scheduler asks a waiting room; `ArrivalOrder` is the plain one, `qos.FairShare` the one for many
tenants. Both drive the same scheduler, with a model behind it or a simulation.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Collection, Iterator, Sequence
from typing import Protocol

from moeruntime.sequence import Sequence as TokenSequence

__all__ = ["MAX_TIMES_PASSED", "ArrivalOrder", "WaitingRoom"]

MAX_TIMES_PASSED = 32


class WaitingRoom(Protocol):
    """Sequences that wait, and what the scheduler asks about them."""

    def bind(self, max_sequences: int, num_blocks: int) -> None:
        """Learn the size of the batch and of the cache; called once, before anything else."""
        ...

    def add(self, seq: TokenSequence) -> None:
        """A sequence arrives."""
        ...

    def remove(self, seq: TokenSequence) -> None:
        """A waiting sequence was given up."""
        ...

    def admitted(self, seq: TokenSequence) -> None:
        """A waiting sequence runs from now on."""
        ...

    def ended(self, seq: TokenSequence) -> None:
        """A running sequence finished or was given up."""
        ...

    def ran(self, decoded: Sequence[TokenSequence], num_prompt_tokens: int) -> None:
        """A step was put together: so many prompt tokens, and these with one token each."""
        ...

    def __len__(self) -> int:
        """How many wait."""
        ...

    def __iter__(self) -> Iterator[TokenSequence]:
        """All that wait, in no order that means anything."""
        ...

    def heads(self) -> Iterator[TokenSequence]:
        """Whose variants should be brought to the device, most wanted first."""
        ...

    def candidates(self, passed: Collection[str] = ()) -> Iterator[TokenSequence]:
        """Who may be admitted now, most wanted first; who is admitted meanwhile leaves the order.

        Args:
            passed: variants that found no slot; the caller adds to it while it iterates. Their
                sequences may be left out.
        """
        ...

    def overdue(self, seq: TokenSequence) -> bool:
        """Whether one that finds no slot has been passed long enough: nobody passes it now."""
        ...

    def prompt_tokens(
        self, decoding: Sequence[TokenSequence], prompts: Sequence[TokenSequence]
    ) -> int | None:
        """Most tokens of these prompts beside those that decode; None leaves it to the step."""
        ...

    def order_prompts(self, prompts: Sequence[TokenSequence]) -> list[TokenSequence]:
        """Which running prompts go on in this step, most urgent first; at least one of them."""
        ...


class ArrivalOrder:
    """First come, first served."""

    def __init__(self) -> None:
        """Nobody waits."""
        self._waiting: deque[TokenSequence] = deque()

    def bind(self, max_sequences: int, num_blocks: int) -> None:
        """Sizes do not matter here."""

    def add(self, seq: TokenSequence) -> None:
        """To the end."""
        self._waiting.append(seq)

    def remove(self, seq: TokenSequence) -> None:
        """From wherever it is."""
        self._waiting.remove(seq)

    def admitted(self, seq: TokenSequence) -> None:
        """As `remove`."""
        self._waiting.remove(seq)

    def ended(self, seq: TokenSequence) -> None:
        """Does not matter here."""

    def ran(self, decoded: Sequence[TokenSequence], num_prompt_tokens: int) -> None:
        """Does not matter here."""

    def __len__(self) -> int:
        return len(self._waiting)

    def __iter__(self) -> Iterator[TokenSequence]:
        return iter(list(self._waiting))

    def heads(self) -> Iterator[TokenSequence]:
        """Everybody, in order of arrival."""
        return iter(self)

    def candidates(self, passed: Collection[str] = ()) -> Iterator[TokenSequence]:
        """Everybody, in order of arrival."""
        return iter(self)

    def overdue(self, seq: TokenSequence) -> bool:
        """After so many who came later."""
        return seq.times_passed >= MAX_TIMES_PASSED

    def prompt_tokens(
        self, decoding: Sequence[TokenSequence], prompts: Sequence[TokenSequence]
    ) -> int | None:
        """Whatever the step has room for."""
        return None

    def order_prompts(self, prompts: Sequence[TokenSequence]) -> list[TokenSequence]:
        """All of them, in order of admission."""
        return list(prompts)

"""Quality of service for many tenants: earliest deadline first inside weighted fair sharing.

A tenant is a variant. Each has a weight and targets: for the time to its first token (TTFT), which
gives every request a deadline, and for the time per token (TPOT), which bounds the steps its
requests decode in.

- **Fair sharing.** A variant's virtual time is the device time it was given over its weight. Who is
  no further ahead than `LAG_S` of the least served is eligible. A variant that comes back from a
  pause starts a little behind the least served: it goes first, and has saved no more up.
  (Start-time fair queueing, Goyal et al. 1996; eligibility as in EEVDF, Stoica and Abdel-Wahab
  1995, without its fixed requests.)
- **Deadlines.** Of those eligible, the earliest deadline goes first; inside a variant that is the
  order of arrival.
- **Steps.** While those that decode have been within their TPOT on average, prompts may stretch a
  step, up to `URGENT_PROMPT_TOKENS`. Beyond that, and for variants far ahead of the others, they
  are cut to what the tightest TPOT allows: a flood's prompts hold nobody up.
- **Places kept free.** Nothing that runs is preempted, so a flood must not get every place in the
  batch, nor every cache block. A variant may always have its share by weight; beyond it, only what
  others do not look like using: of every other variant, `HEADROOM` times as many places are kept
  as it had requests at once lately, and one more.
"""

from __future__ import annotations

import math
import time
from collections import deque
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from moeruntime.cost_model import LearnedCost, StepCost
from moeruntime.errors import InputError, UsageError
from moeruntime.sequence import Sequence as TokenSequence
from moeruntime.strict_json import Fields
from moeruntime.waiting import MAX_TIMES_PASSED

__all__ = ["FairShare", "Targets", "read_targets"]

LAG_S = 0.05
"""Device time that a variant may be ahead of the least served and still be eligible."""

CREDIT_S = 0.03
"""Device time by which a variant that comes back from a pause is behind the others."""

HEADROOM = 3.0
MIN_SHARE_TO_KEEP = 4

MEMORY_S = 30.0
"""In this time the memory of how many requests a variant had at once fades to a third."""

MIN_PROMPT_TOKENS = 256
"""A step takes at least so many prompt tokens, however tight the targets: prompts must get on."""

URGENT_PROMPT_TOKENS = 1024
"""So many tokens of prompts may stretch a step: the first token is waited for, and a decode that is
late once makes its average little worse."""

URGENT_LAG_S = 1.0
"""Not those of a variant that had so much more device time than the least served: it floods. Among
equals that much comes and goes, and to batch their prompts serves all."""

STEPS_REMEMBERED = 32
"""A variant's time per token is averaged over about so many steps."""

MIN_TIMES_PASSED = 4
"""Who finds no slot is passed so often even if late, or an activation would serve one request."""

LATE = 4.0
"""A slot is drained for who waits this many times the target; draining leaves places empty."""

START_COST = StepCost(base_s=5e-3, decode_s=5e-4, prompt_s=5e-3, prompt_token_s=1e-4)


@dataclass(frozen=True, slots=True)
class Targets:
    """What a variant is promised.

    Attributes:
        ttft_s: a request's first token is due so long after it arrived.
        tpot_s: prompts may not stretch the steps that its requests decode in beyond this.
        weight: its share of the device, against the other variants' weights.
    """

    ttft_s: float = 1.0
    tpot_s: float = 0.1
    weight: float = 1.0


def read_targets(
    path: Path | None, names: Sequence[str], default: Targets | None = None
) -> dict[str, Targets]:
    """Every variant's targets, from a TOML file of a `[default]` and `[variants.NAME]` tables.

    Args:
        path: the file; None gives every variant the default.
        names: the variants there are.
        default: for what the file leaves out.

    Raises:
        InputError: no such file, not TOML, an unknown variant or key, or a value out of range.
    """
    default = default or Targets()
    if path is None:
        return dict.fromkeys(names, default)
    root = Fields(_read_toml(path), str(path), InputError)
    if root.has("default"):
        default = _parse(root.child("default"), default)
    found = dict.fromkeys(names, default)
    if root.has("variants"):
        tables = root.child("variants")
        for name in tables.keys():
            if name not in found:
                known = ", ".join(names)
                tables.fail(f"no variant {ascii(name[:80])}; the pack has: {known}")
            found[name] = _parse(tables.child(name), default)
    root.done()
    return found


def _read_toml(path: Path) -> dict[str, Any]:
    import tomllib

    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise InputError(f"{path}: no such file") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as problem:
        raise InputError(f"{path}: not TOML: {problem}") from None


def _parse(table: Fields, default: Targets) -> Targets:
    targets = Targets(
        ttft_s=table.number("ttft_s", 1e-3, 3600.0, default.ttft_s),
        tpot_s=table.number("tpot_s", 1e-3, 3600.0, default.tpot_s),
        weight=table.number("weight", 1e-3, 1e3, default.weight),
    )
    table.done()
    return targets


@dataclass(slots=True)
class _Tenant:
    """One variant's queue and account.

    Attributes:
        virtual_s: device time given over weight.
        num_running, num_blocks: places in the batch and cache blocks it has.
        step_s: what the steps that it decodes in took lately, on average.
        peak: requests at once lately, fading.
        seen_s: when `peak` was true.
    """

    targets: Targets
    waiting: deque[TokenSequence] = field(default_factory=deque)
    virtual_s: float = 0.0
    num_running: int = 0
    num_blocks: int = 0
    step_s: float = 0.0
    peak: float = 0.0
    seen_s: float = 0.0

    @property
    def busy(self) -> bool:
        return bool(self.waiting) or self.num_running > 0


class FairShare:
    """The waiting room for many tenants; the module says what it promises."""

    def __init__(
        self,
        targets: Mapping[str, Targets],
        *,
        cost: StepCost = START_COST,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Start empty.

        Args:
            targets: of every variant.
            cost: a first guess of what steps take; `observe` corrects it.
            clock: seconds; a simulation has its own.

        Raises:
            UsageError: no variant at all.
        """
        if not targets:
            raise UsageError("quality of service needs at least one variant")
        self._tenants = {name: _Tenant(one) for name, one in targets.items()}
        self._total_weight = sum(one.weight for one in targets.values())
        self._cost = LearnedCost(cost)
        self._clock = clock
        self._max_sequences = self._num_blocks = 0
        self._last_step = (0, 0)
        self._decoded: set[str] = set()

    @property
    def cost(self) -> StepCost:
        """What steps take, as far as is known."""
        return self._cost.cost

    def observe(self, elapsed_s: float) -> None:
        """The step last put together took this long."""
        self._cost.observe(*self._last_step, elapsed_s)
        for name in self._decoded:
            tenant = self._tenants[name]
            tenant.step_s += (elapsed_s - tenant.step_s) / STEPS_REMEMBERED

    def forget(self) -> None:
        """Nobody has asked for anything yet: what came before, as a warm-up, does not count."""
        for tenant in self._tenants.values():
            tenant.virtual_s = tenant.peak = tenant.step_s = 0.0

    @property
    def num_blocks(self) -> int:
        """Blocks of the cache it was bound to."""
        return self._num_blocks

    def num_waiting(self, variant: str) -> int:
        """How many of one variant wait."""
        return len(self._tenants[variant].waiting)

    # -- what the scheduler calls ---------------------------------------------------------------

    def bind(self, max_sequences: int, num_blocks: int) -> None:
        """As `WaitingRoom.bind`."""
        self._max_sequences, self._num_blocks = max_sequences, num_blocks

    def add(self, seq: TokenSequence) -> None:
        """Give the sequence its deadline and queue it."""
        tenant = self._tenants[seq.variant]
        if not tenant.busy:
            tenant.virtual_s = max(tenant.virtual_s, self._least_served_s() - CREDIT_S)
        seq.arrived_s = self._clock()
        seq.deadline_s = seq.arrived_s + tenant.targets.ttft_s
        tenant.waiting.append(seq)
        self._note_peak(tenant)

    def remove(self, seq: TokenSequence) -> None:
        """As `WaitingRoom.remove`."""
        self._tenants[seq.variant].waiting.remove(seq)

    def admitted(self, seq: TokenSequence) -> None:
        """Charge the prompt at once: several may be admitted before a step has run."""
        tenant = self._tenants[seq.variant]
        tenant.waiting.remove(seq)
        tenant.num_running += 1
        tenant.num_blocks += seq.num_blocks_needed
        prompt_s = (len(seq.prompt_ids) - seq.num_cached) * self.cost.prompt_token_s
        tenant.virtual_s += prompt_s / tenant.targets.weight

    def ended(self, seq: TokenSequence) -> None:
        """As `WaitingRoom.ended`."""
        tenant = self._tenants[seq.variant]
        self._note_peak(tenant)
        tenant.num_running -= 1
        tenant.num_blocks -= seq.num_blocks_needed

    def ran(self, decoded: Sequence[TokenSequence], num_prompt_tokens: int) -> None:
        """Charge each variant for its tokens, and all that decode for the step in equal parts."""
        self._last_step = (len(decoded), num_prompt_tokens)
        self._decoded = {seq.variant for seq in decoded}
        if not decoded:
            return
        each_s = self.cost.decode_s + self.cost.base_s / len(decoded)
        for seq in decoded:
            tenant = self._tenants[seq.variant]
            tenant.virtual_s += each_s / tenant.targets.weight

    def __len__(self) -> int:
        return sum(len(tenant.waiting) for tenant in self._tenants.values())

    def __iter__(self) -> Iterator[TokenSequence]:
        return iter([seq for tenant in self._tenants.values() for seq in tenant.waiting])

    def heads(self) -> Iterator[TokenSequence]:
        """The first of every variant, most wanted first."""
        heads = [tenant.waiting[0] for tenant in self._tenants.values() if tenant.waiting]
        return iter(sorted(heads, key=self._urgency))

    def candidates(self, passed: Collection[str] = ()) -> Iterator[TokenSequence]:
        """As `WaitingRoom.candidates`; a variant whose head was not admitted is left out then."""
        left = [name for name, tenant in self._tenants.items() if tenant.waiting]
        while left:
            heads = [self._tenants[name].waiting[0] for name in left]
            allowed = [seq for seq in heads if self._may_run(seq)]
            if not allowed:
                return
            best = min(allowed, key=self._urgency)
            yield best
            waiting = self._tenants[best.variant].waiting
            if not waiting or waiting[0] is best or best.variant in passed:
                left.remove(best.variant)

    def overdue(self, seq: TokenSequence) -> bool:
        """Passed too often, or for too long."""
        waited_s = self._clock() - seq.arrived_s
        late = waited_s > LATE * self._tenants[seq.variant].targets.ttft_s
        return (
            late and seq.times_passed >= MIN_TIMES_PASSED
        ) or seq.times_passed >= MAX_TIMES_PASSED

    def prompt_tokens(
        self, decoding: Sequence[TokenSequence], prompts: Sequence[TokenSequence]
    ) -> int | None:
        """What keeps those that decode within their time per token, on average."""
        if not decoding:
            return None
        tenants = [self._tenants[seq.variant] for seq in decoding]
        fitting = self.cost.prompt_tokens_within(
            min(one.targets.tpot_s for one in tenants), len(decoding)
        )
        urgent = 0
        if all(one.step_s <= one.targets.tpot_s for one in tenants):
            urgent = sum(seq.num_pending for seq in prompts if self._ahead_s(seq) <= URGENT_LAG_S)
        return max(MIN_PROMPT_TOKENS, fitting, min(urgent, URGENT_PROMPT_TOKENS))

    def order_prompts(self, prompts: Sequence[TokenSequence]) -> list[TokenSequence]:
        """Most urgent first."""
        return sorted(prompts, key=self._urgency)

    def _urgency(self, seq: TokenSequence) -> tuple[float, ...]:
        """Eligible variants by deadline, then the others, the least served first."""
        ahead_s = self._ahead_s(seq)
        if ahead_s <= LAG_S:
            return (0.0, seq.deadline_s, seq.arrived_s)
        return (1.0, ahead_s, seq.arrived_s)

    def _ahead_s(self, seq: TokenSequence) -> float:
        """How far its variant is ahead of the least served; a heavy one may be further."""
        tenant = self._tenants[seq.variant]
        return (tenant.virtual_s - self._least_served_s()) * tenant.targets.weight

    # -- shares ------------------------------------------------------------------------------------

    def _least_served_s(self) -> float:
        """Of those that want something; of all, where nobody does."""
        busy = [one.virtual_s for one in self._tenants.values() if one.busy]
        return min(busy) if busy else max(one.virtual_s for one in self._tenants.values())

    def _note_peak(self, tenant: _Tenant) -> None:
        now_s = self._clock()
        at_once = len(tenant.waiting) + tenant.num_running
        tenant.peak = max(float(at_once), self._faded(tenant, now_s))
        tenant.seen_s = now_s

    def _faded(self, tenant: _Tenant, now_s: float) -> float:
        return tenant.peak * math.exp((tenant.seen_s - now_s) / MEMORY_S)

    def _may_run(self, seq: TokenSequence) -> bool:
        """Whether its variant may have another place, and the cache blocks for it."""
        mine = self._tenants[seq.variant]
        share = mine.targets.weight / self._total_weight
        num_blocks = mine.num_blocks + seq.num_blocks_needed
        within = mine.num_running < max(1, int(share * self._max_sequences))
        # A single sequence may be larger than the share.
        if within and (not mine.num_running or num_blocks <= share * self._num_blocks):
            return True
        now_s = self._clock()
        free = self._max_sequences - sum(one.num_running for one in self._tenants.values())
        free_blocks = self._num_blocks - sum(one.num_blocks for one in self._tenants.values())
        for other in self._tenants.values():
            if other is mine:
                continue
            kept = self._kept(other, now_s)
            per_place = self._num_blocks / self._max_sequences
            free -= max(0, kept - other.num_running)
            free_blocks -= int(max(0.0, kept * per_place - other.num_blocks))
        return free >= 1 and seq.num_blocks_needed <= free_blocks

    def _kept(self, tenant: _Tenant, now_s: float) -> int:
        """Places of a variant that others leave free; none while it waits for a resident slot."""
        if tenant.waiting and not tenant.num_running and not tenant.waiting[0].holds_slot:
            return 0
        share = int(tenant.targets.weight / self._total_weight * self._max_sequences)
        peak = self._faded(tenant, now_s)
        if peak < 0.5:  # idle for long; a place that stays empty for it must be a small part
            return int(share >= MIN_SHARE_TO_KEEP)
        return min(max(1, share), math.ceil(HEADROOM * peak - 0.5) + 1)

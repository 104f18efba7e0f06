"""Which kernels serve a cut of nested experts: how each is compiled, and what a program has.

Imports no Triton, and compiles nothing: what is decided here is tested without a device.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path

from moeruntime.kernels.face_parts import (
    GROUP,
    MANY_ROWS,
    MANY_THREADS,
    MEETING_ROWS,
    MEETING_TILES,
    PART_TILES,
    ROWS,
    TILE,
    WARPS,
    WIDE_TILE,
    Cut,
    FacePart,
)

__all__ = [
    "MeetingRoom",
    "Program",
    "Source",
    "few_bytes",
    "fitting",
    "halves",
    "of_meetings",
    "of_units",
]

HERE = Path(__file__).parent

HALVES_THREADS = 128

MIN_STAGES, MAX_STAGES = 2, 4
"""Of the ring that a program of `nested_many.cu` copies steps into."""

BARRIER_BYTES = 16
"""Of a stage: that it is full, and that it is empty."""

MAX_SHARED_BYTES = 227 * 1024
"""That a program may have on a Hopper device."""

SHARED_SLOTS, TOKEN_SLOTS, MIN_OWN_SLOTS, MAX_OWN_SLOTS = 2, 2, 2, 4
"""Of the rings of a program of `nested_meetings.cu`."""

WIDE_CODE_SLOTS, MAX_TOKEN_SLOTS = 2, 8
"""Of the rings of a program of `nested_wide.cu`."""


@dataclass(frozen=True, slots=True)
class Source:
    """What `compile_kernel` takes."""

    path: Path
    name: str
    defines: tuple[tuple[str, int], ...]


@dataclass(frozen=True, slots=True)
class Program:
    """A kernel, and the threads and shared memory that each of its programs has."""

    source: Source
    threads: int
    shared_bytes: int


def halves(cut: Cut) -> Program:
    """What makes integers, or bfloat16, of activations, and lists what is to be done with them."""
    tiled = {"few": 0, "many": 1, "wide": 2}[cut.kernel]
    defines = {"TILED": tiled, "TILE_TOKENS": cut.tile}
    return _program("nested_halves.cu", "halves", defines, HALVES_THREADS, 0)


def of_units(part: FacePart, cut: Cut) -> Program:
    """What serves units of a cut that is `fitting`."""
    if cut.kernel == "wide":
        slots, shared_bytes = _wide_rings(part, cut)
        defines = {
            "CODE_SLOTS": WIDE_CODE_SLOTS,
            "TOKEN_SLOTS": slots,
            "TILE_TOKENS": WIDE_TILE,
            "TILES": cut.tiles,
        }
        return _of_part("nested_wide.cu", part, defines, MANY_THREADS, shared_bytes)
    if cut.kernel == "many":
        stages, shared_bytes = _ring(part, cut)
        defines = {"STAGES": stages, "COLUMNS": part.num_columns, "TILES": cut.tiles}
        return _of_part("nested_many.cu", part, defines, MANY_THREADS, shared_bytes)
    shared_bytes = few_bytes(part, cut)
    defines = {"TILES": cut.tiles}
    return _of_part("nested_fast.cu", part, defines, 32 * WARPS, shared_bytes, name="nested")


def of_meetings(part: FacePart) -> Program:
    """What serves faces that meet."""
    room = MeetingRoom.of(part)
    defines = {
        "COLUMNS": part.num_columns,
        "WARPGROUPS": room.warpgroups,
        "SUMS": room.tiles,
        "OWN_SLOTS": room.own_slots,
        "TOKEN_SLOTS": TOKEN_SLOTS,
    }
    threads = 128 * (room.warpgroups + 1)
    return _of_part("nested_meetings.cu", part, defines, threads, room.shared_bytes)


def fitting(part: FacePart, cut: Cut) -> Cut:
    """With fewer tokens a program, if codes that are wide leave no room for so many."""
    while cut.kernel == "many" and _ring(part, cut)[0] < MIN_STAGES:
        cut = replace(cut, tiles=cut.tiles - 4)
    return cut


def few_bytes(part: FacePart, cut: Cut) -> int:
    """Shared bytes of a program of `nested_fast.cu`.

    Two stages of codes; scales of this turn and the next; and sums.
    """
    turns = cut.turns if part.is_gate_up else 1
    own = 0 if part.num_planes == 0 else 4 if part.wide else 2
    stages = 2 * (4 + own + (part.num_planes == 2)) * ROWS * GROUP
    scales = ROWS * (2 * part.num_columns // GROUP + 16)
    sums = 4 * WARPS * ROWS * (cut.tokens + 1)
    return max(stages + scales, sums) if turns == 1 else stages + 2 * scales + sums


@dataclass(frozen=True, slots=True)
class MeetingRoom:
    """How a program of `nested_meetings.cu` is cut, to have room for its rings and sums.

    Attributes:
        warpgroups: that multiply.
        own_slots: of its ring of private codes.
        tiles: of a meeting, at most.
        shared_bytes: in all.
    """

    warpgroups: int
    own_slots: int
    tiles: int
    shared_bytes: int

    @classmethod
    def of(cls, part: FacePart) -> MeetingRoom:
        """Three warpgroups, or two where there are many private codes."""
        return _meeting_room(_own_runs(part))


@cache
def _meeting_room(own_runs: int) -> MeetingRoom:
    warpgroups = MEETING_ROWS // 64 if own_runs < 2 else 2
    run = 64 * warpgroups * GROUP
    own_slot = own_runs * run + BARRIER_BYTES
    taken = SHARED_SLOTS * (2 * run + BARRIER_BYTES) + 16  # and a number
    taken += TOKEN_SLOTS * (_step_bytes(TILE * PART_TILES) + BARRIER_BYTES)
    sums = 8 * 128 * warpgroups + 8 * TILE  # of a tile, and who gets them
    tiles = min(MEETING_TILES, (MAX_SHARED_BYTES - taken - MIN_OWN_SLOTS * own_slot) // sums)
    taken += tiles * sums
    own_slots = min(MAX_OWN_SLOTS, (MAX_SHARED_BYTES - taken) // own_slot)
    return MeetingRoom(warpgroups, own_slots, tiles, taken + own_slots * own_slot)


def _of_part(
    file: str,
    part: FacePart,
    defines: dict[str, int],
    threads: int,
    shared_bytes: int,
    *,
    name: str | None = None,
) -> Program:
    defines |= {
        "GATE_UP": int(part.is_gate_up),
        "PLANES": part.num_planes,
        "WIDE": int(part.wide),
    }
    return _program(file, name or Path(file).stem, defines, threads, shared_bytes)


def _program(
    file: str, name: str, defines: dict[str, int], threads: int, shared_bytes: int
) -> Program:
    return Program(Source(HERE / file, name, tuple(defines.items())), threads, shared_bytes)


def _step_bytes(tokens: int) -> int:
    """Of both halves of some tokens in a step's four groups, and what their integers count."""
    return 4 * tokens * (2 * GROUP + 8)


def _own_runs(part: FacePart) -> int:
    """Of the private planes of a face, in a step, at most."""
    return (2 if part.wide else part.num_planes > 0) + (part.num_planes == 2)


def _code_bytes(part: FacePart) -> int:
    """Of a step of a row tile of `nested_many` and `nested_wide`, all planes."""
    return (2 + _own_runs(part)) * MANY_ROWS * GROUP


def _ring(part: FacePart, cut: Cut) -> tuple[int, int]:
    """Of a program of `nested_many`: stages of its ring, and shared bytes in all."""
    stage = _code_bytes(part) + _step_bytes(cut.tokens) + BARRIER_BYTES
    stages = min(MAX_STAGES, MAX_SHARED_BYTES // stage)
    return stages, stages * stage


def _wide_rings(part: FacePart, cut: Cut) -> tuple[int, int]:
    """Of a program of `nested_wide`: slots of tokens, as many as fit, and shared bytes in all."""
    code_slot = _code_bytes(part) + BARRIER_BYTES
    token_slot = cut.tokens * GROUP * 2 + BARRIER_BYTES
    codes = WIDE_CODE_SLOTS * code_slot
    token_slots = min(MAX_TOKEN_SLOTS, (MAX_SHARED_BYTES - codes) // token_slot)
    return token_slots, codes + token_slots * token_slot

"""The experts of a step over nested codes, at the speed of their bytes.

`nested_fast.cu` serves few tokens of a face, `nested_many.cu` many, on a Hopper device. For the
codes and shapes of real models (`is_fast`); `nested` serves all others. Activations go in and out
as float32; inside they are integers of 15 bits, in groups with a scale each.
"""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

from moeruntime.kernels.face_lists import FaceLists
from moeruntime.kernels.face_parts import (
    GROUP,
    MANY_ROWS,
    MANY_THREADS,
    MEETING_ROWS,
    MEETING_THREADS,
    MOST_PROGRAMS,
    PROGRAMS_AT_ONCE,
    ROWS,
    TILE,
    WARPS,
    ByteRows,
    Cut,
    FacePart,
)
from moeruntime.kernels.nvrtc import compile_kernel

__all__ = ["down", "down_parts", "gate_up", "most_pairs"]

SOURCE = Path(__file__).with_suffix(".cu")
HALVES_SOURCE = SOURCE.with_name("nested_halves.cu")
MANY_SOURCE = SOURCE.with_name("nested_many.cu")
MEETINGS_SOURCE = SOURCE.with_name("nested_meetings.cu")

MIN_STAGES, MAX_STAGES = 2, 4
"""Of the ring that a program of `nested_many.cu` copies steps into."""

BARRIER_BYTES = 16
"""Of a stage: that it is full, and that it is empty."""

MAX_SHARED_BYTES = 227 * 1024
"""That a program may have on a Hopper device."""

TOKEN_SLOTS = 2
"""Of the ring that a program of `nested_meetings.cu` copies tokens into."""


def down_parts(part: FacePart, num_pairs: int) -> int:
    """In how many parts `down` is fastest: two, unless all of its programs just run at once."""
    num_programs = num_pairs * part.num_rows // ROWS
    places = PROGRAMS_AT_ONCE * _device(part.scale_SRG.device)[0]
    at_once = places // 2 < num_programs <= places
    can_part = part.num_columns // (8 * GROUP) % 2 == 0
    return 2 if can_part and not at_once and not _cut(part, num_pairs).many else 1


def most_pairs(device: torch.device) -> int:
    """For a step of more (token, choice) pairs it is faster to decode its experts first."""
    return 2048 if _device(device)[1] else 512


def gate_up(
    x_TH: Tensor,
    part: FacePart,
    lists: FaceLists,
    layer: int,
    scratch: ByteRows,
    *,
    out_MI: Tensor,
    cut: Cut | None = None,
) -> None:
    """silu(gate_proj x) * (up_proj x) of every pair, as `experts.gate_up`."""
    num_pairs = x_TH.shape[0] * lists.weights_TK.shape[1]
    _launch(x_TH, part, lists, layer, scratch, num_pairs, out_MI, cut, is_gate_up=True)


def down(
    x_MI: Tensor,
    part: FacePart,
    lists: FaceLists,
    layer: int,
    scratch: ByteRows,
    *,
    out_MSH: Tensor,
    cut: Cut | None = None,
) -> None:
    """down_proj of every pair, times its routing weight, in parts, as `experts.down`."""
    _launch(x_MI, part, lists, layer, scratch, len(x_MI), out_MSH, cut, is_gate_up=False)


def _launch(
    x: Tensor,
    part: FacePart,
    lists: FaceLists,
    layer: int,
    scratch: ByteRows,
    num_pairs: int,
    out: Tensor,
    cut: Cut | None,
    *,
    is_gate_up: bool,
) -> None:
    assert x.dtype == out.dtype == torch.float32 and x.is_contiguous()
    assert part.in_strips and part.is_gate_up == is_gate_up
    num_faces = len(part.faces_F6)
    num_multiprocessors, _ = _device(x.device)
    cut = _fitting(part, cut or _cut(part, num_pairs))
    num_parts = 1 if is_gate_up else out.shape[1]
    if num_parts > 1:
        assert not cut.many and part.num_columns // (8 * GROUP) % num_parts == 0
    num_units = lists.num_tiles(num_pairs, cut.tokens)
    num_tiles = lists.num_tiles(num_pairs, TILE)
    num_rows = TILE * num_tiles if cut.many else len(x)  # that become integers
    most_to_meet = cut.meet if part.may_meet else 0
    meetings = scratch.units[len(scratch.units) // 2 :]
    groups_a_row = part.num_columns // GROUP
    compile_kernel(HALVES_SOURCE, "halves", (("TILED", int(cut.many)),))(
        (-(-num_rows * groups_a_row // 4) + 1, 1, 1),
        128,
        (
            x, scratch.values, scratch.groups, num_rows, groups_a_row, num_pairs // len(x),
            part.faces_F6, lists.counts_LF[layer], lists.pairs_LFC[layer], num_faces,
            scratch.units, num_units, cut.tokens, lists.pairs_LFC.shape[2],
            meetings, cut.meeting, most_to_meet,
            scratch.arrived, len(scratch.arrived) if most_to_meet else 0,
        ),
        shared_bytes=0,
    )  # fmt: skip
    defines = {
        "GATE_UP": int(is_gate_up),
        "TILES": cut.tiles,
        "PLANES": part.num_planes,
        "WIDE": int(part.wide),
    }

    def of_tiles(units: Tensor) -> tuple[Tensor | int, ...]:
        return (
            scratch.values, scratch.groups, num_tiles, part.planes[4], part.scale_SRG,
            lists.pairs_LFC[layer], units, lists.weights_TK, out,
            part.num_rows, part.num_columns,
        )  # fmt: skip

    if most_to_meet:
        code_slots, shared_bytes = _meeting_rings(cut)
        of_meetings = {
            "GATE_UP": int(is_gate_up),
            "COLUMNS": part.num_columns,
            "TILES": cut.meeting,
            "CODE_SLOTS": code_slots,
            "TOKEN_SLOTS": TOKEN_SLOTS,
        }
        compile_kernel(MEETINGS_SOURCE, "nested_meetings", tuple(of_meetings.items()))(
            (min(num_multiprocessors, MOST_PROGRAMS), 1, 1),
            MEETING_THREADS,
            (*of_tiles(meetings), part.faces_F6, scratch.partial, scratch.arrived),
            shared_bytes=shared_bytes,
        )
    if cut.many:
        stages, shared_bytes = _ring(part, cut)
        most_work = num_units * (part.num_rows // MANY_ROWS)
        compile_kernel(MANY_SOURCE, "nested_many", (*defines.items(), ("STAGES", stages)))(
            (min(most_work, num_multiprocessors), 1, 1),
            MANY_THREADS,
            of_tiles(scratch.units),
            shared_bytes=shared_bytes,
        )
        return
    turns = cut.turns if is_gate_up else 1
    compile_kernel(SOURCE, "nested", tuple(defines.items()))(
        (num_units, part.num_rows // (ROWS * turns), num_parts),
        32 * WARPS,
        (
            scratch.values, scratch.groups, part.planes[4], part.scale_SRG,
            lists.pairs_LFC[layer], scratch.units, lists.weights_TK, out,
            part.num_rows, part.num_columns, lists.weights_TK.shape[1], turns,
        ),
        shared_bytes=_shared_bytes(part, cut, turns),
    )  # fmt: skip


def _cut(part: FacePart, num_pairs: int) -> Cut:
    """What is fastest for so many pairs."""
    num_faces = len(part.faces_F6)
    faces_a_slot = num_faces / len(part.planes[4]) if part.may_meet else 1.0
    hopper = _device(part.scale_SRG.device)[1]
    return Cut.of(num_pairs, num_faces, hopper=hopper, faces_a_slot=faces_a_slot)


def _shared_bytes(part: FacePart, cut: Cut, turns: int) -> int:
    """Of a program: two stages of codes; scales of this turn and the next; and sums."""
    own = 0 if part.num_planes == 0 else 4 if part.wide else 2
    stages = 2 * (4 + own + (part.num_planes == 2)) * ROWS * GROUP
    scales = ROWS * (2 * part.num_columns // GROUP + 16)
    sums = 4 * WARPS * ROWS * (cut.tokens + 1)
    return max(stages + scales, sums) if turns == 1 else stages + 2 * scales + sums


def _fitting(part: FacePart, cut: Cut) -> Cut:
    """With fewer tokens a program, if codes that are wide leave no room for so many."""
    while cut.many and _ring(part, cut)[0] < MIN_STAGES:
        cut = replace(cut, tiles=8 if cut.tiles == 12 else cut.tiles // 2)
    return cut


def _step_bytes(tokens: int) -> int:
    """Of both halves of some tokens in a step's four groups, and what their integers count."""
    return 4 * tokens * (2 * GROUP + 8)


def _ring(part: FacePart, cut: Cut) -> tuple[int, int]:
    """Of a program of `nested_many`: stages of its ring, and shared bytes in all."""
    own = 0 if part.num_planes == 0 else 2 if part.wide else 1
    codes = (2 + own + (part.num_planes == 2)) * MANY_ROWS * GROUP
    stage = codes + _step_bytes(cut.tokens) + BARRIER_BYTES
    stages = min(MAX_STAGES, MAX_SHARED_BYTES // stage)
    return stages, stages * stage


def _meeting_rings(cut: Cut) -> tuple[int, int]:
    """Of a program of `nested_meetings`: slots of codes, as many as fit, and shared bytes."""
    token_slot = _step_bytes(TILE * cut.meeting) + BARRIER_BYTES
    code_slot = MEETING_ROWS * GROUP + BARRIER_BYTES
    rest = TOKEN_SLOTS * token_slot + 16  # and a number
    code_slots = (MAX_SHARED_BYTES - rest) // code_slot
    return code_slots, code_slots * code_slot + rest


@cache
def _device(device: torch.device) -> tuple[int, bool]:
    """How many multiprocessors it has, and whether it is a Hopper device."""
    found = torch.cuda.get_device_properties(device)
    return int(found.multi_processor_count), (found.major, found.minor) == (9, 0)

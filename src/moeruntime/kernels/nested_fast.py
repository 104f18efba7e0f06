"""The experts of a step over nested codes, at the speed of their bytes.

`nested_fast.cu` serves few tokens of a face; on a Hopper device `nested_many.cu` serves many,
`nested_wide.cu` very many, and `nested_meetings.cu` faces of a slot together. For the codes and
shapes of real models (`is_fast`); `nested` serves all others. Activations go in and out as float32;
inside they are integers of 15 bits, in groups with a scale each, or bfloat16 where they are very
many, as `nested_halves.cu` makes them.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
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
    MOST_A_FACE,
    MOST_PAIRS,
    MOST_PROGRAMS,
    PROGRAMS_AT_ONCE,
    ROWS,
    TILE,
    WARPS,
    WIDE_TILE,
    ByteRows,
    Cut,
    FacePart,
)
from moeruntime.kernels.nvrtc import compile_kernel

__all__ = ["down", "down_parts", "gate_up", "most_pairs"]

SOURCE = Path(__file__).with_suffix(".cu")
HALVES_SOURCE = SOURCE.with_name("nested_halves.cu")
MANY_SOURCE = SOURCE.with_name("nested_many.cu")
WIDE_SOURCE = SOURCE.with_name("nested_wide.cu")
MEETINGS_SOURCE = SOURCE.with_name("nested_meetings.cu")

MIN_STAGES, MAX_STAGES = 2, 4
"""Of the ring that a program of `nested_many.cu` copies steps into."""

BARRIER_BYTES = 16
"""Of a stage: that it is full, and that it is empty."""

MAX_SHARED_BYTES = 227 * 1024
"""That a program may have on a Hopper device."""

TOKEN_SLOTS = 2
"""Of the ring that a program of `nested_meetings.cu` copies tokens into."""

WIDE_CODE_SLOTS, MAX_TOKEN_SLOTS = 2, 8
"""Of the rings of a program of `nested_wide.cu`."""


def down_parts(part: FacePart, lists: FaceLists, num_pairs: int) -> int:
    """In how many parts `down` is fastest: two, unless all of its programs just run at once."""
    num_programs = num_pairs * part.num_rows // ROWS
    places = PROGRAMS_AT_ONCE * _device(part.scale_SRG.device)[0]
    at_once = places // 2 < num_programs <= places
    can_part = part.num_columns // (8 * GROUP) % 2 == 0
    return 2 if can_part and not at_once and not _cut(part, lists, num_pairs).tiled else 1


def most_pairs(device: torch.device, num_faces: int) -> int:
    """For more (token, choice) pairs of so many faces it is faster to decode their codes first."""
    return MOST_A_FACE * num_faces if _device(device)[1] else MOST_PAIRS


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
    assert part.is_gate_up
    num_pairs = x_TH.shape[0] * lists.weights_TK.shape[1]
    cut = _fitting(part, cut or _cut(part, lists, num_pairs))
    _Product(x_TH, part, lists, layer, scratch, num_pairs, out_MI, 1, cut).launch()


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
    assert not part.is_gate_up
    num_pairs, num_parts = out_MSH.shape[:2]
    cut = _fitting(part, cut or _cut(part, lists, num_pairs))
    if num_parts > 1:
        assert not cut.tiled and part.num_columns // (8 * GROUP) % num_parts == 0
    _Product(x_MI, part, lists, layer, scratch, num_pairs, out_MSH, num_parts, cut).launch()


@dataclass(frozen=True, slots=True)
class _Product:
    """Codes of a layer times what each face is to serve: two launches, or three."""

    x: Tensor
    part: FacePart
    lists: FaceLists
    layer: int
    scratch: ByteRows
    num_pairs: int
    out: Tensor
    num_parts: int
    cut: Cut

    def launch(self) -> None:
        assert self.x.dtype == self.out.dtype == torch.float32 and self.x.is_contiguous()
        assert self.part.in_strips
        self._make_integers()
        if self._most_to_meet:
            self._serve_meetings()
        if self.cut.wide:
            self._serve_wide()
        elif self.cut.many:
            self._serve_many()
        else:
            self._serve_few()

    @property
    def _most_to_meet(self) -> int:
        """Tokens of a face that may meet others."""
        return self.cut.meet if self.part.may_meet else 0

    @property
    def _num_units(self) -> int:
        return self.lists.num_tiles(self.num_pairs, self.cut.tokens)

    @property
    def _num_tiles(self) -> int:
        """Of tokens of a face."""
        return self.lists.num_tiles(self.num_pairs, self.cut.tile)

    @property
    def _meetings(self) -> Tensor:
        """Their list, behind that of the units."""
        units = self.scratch.units
        return units[len(units) // 2 :]

    @property
    def _num_multiprocessors(self) -> int:
        return _device(self.x.device)[0]

    def _make_integers(self) -> None:
        """And list what is to be done with them."""
        part, cut, lists, scratch = self.part, self.cut, self.lists, self.scratch
        num_rows = cut.tile * self._num_tiles if cut.tiled else len(self.x)
        groups_a_row = part.num_columns // GROUP
        num_cuts = len(scratch.arrived) if self._most_to_meet else 0
        defines = (("TILED", 2 if cut.wide else int(cut.many)), ("TILE_TOKENS", cut.tile))
        compile_kernel(HALVES_SOURCE, "halves", defines)(
            (-(-num_rows * groups_a_row // 4) + 1, 1, 1),
            128,
            (
                self.x, scratch.values, scratch.groups,
                num_rows, groups_a_row, self.num_pairs // len(self.x),
                part.faces_F6, lists.counts_LF[self.layer], lists.pairs_LFC[self.layer],
                len(part.faces_F6), scratch.units, self._num_units, cut.tokens,
                lists.pairs_LFC.shape[2], self._meetings, cut.meeting, self._most_to_meet,
                scratch.arrived, num_cuts,
            ),
            shared_bytes=0,
        )  # fmt: skip

    def _serve_few(self) -> None:
        part, lists, scratch = self.part, self.lists, self.scratch
        turns = self.cut.turns if part.is_gate_up else 1
        compile_kernel(SOURCE, "nested", self._defines())(
            (self._num_units, part.num_rows // (ROWS * turns), self.num_parts),
            32 * WARPS,
            (
                scratch.values, scratch.groups, part.planes[4], part.scale_SRG,
                lists.pairs_LFC[self.layer], scratch.units, lists.weights_TK, self.out,
                part.num_rows, part.num_columns, lists.weights_TK.shape[1], turns,
            ),
            shared_bytes=_shared_bytes(part, self.cut, turns),
        )  # fmt: skip

    def _serve_many(self) -> None:
        stages, shared_bytes = _ring(self.part, self.cut)
        self._serve_units(MANY_SOURCE, (("STAGES", stages),), shared_bytes)

    def _serve_wide(self) -> None:
        token_slots, shared_bytes = _wide_rings(self.part, self.cut)
        defines = (
            ("CODE_SLOTS", WIDE_CODE_SLOTS),
            ("TOKEN_SLOTS", token_slots),
            ("TILE_TOKENS", WIDE_TILE),
        )
        self._serve_units(WIDE_SOURCE, defines, shared_bytes)

    def _serve_units(
        self, source: Path, defines: tuple[tuple[str, int], ...], shared_bytes: int
    ) -> None:
        """By a kernel whose programs take one unit's row tile after another."""
        most_work = self._num_units * (self.part.num_rows // MANY_ROWS)
        compile_kernel(source, source.stem, (*self._defines(), *defines))(
            (min(most_work, self._num_multiprocessors), 1, 1),
            MANY_THREADS,
            self._of_tiles(self.scratch.units),
            shared_bytes=shared_bytes,
        )

    def _serve_meetings(self) -> None:
        part, scratch = self.part, self.scratch
        code_slots, shared_bytes = _meeting_rings(self.cut)
        defines = {
            "GATE_UP": int(part.is_gate_up),
            "COLUMNS": part.num_columns,
            "TILES": self.cut.meeting,
            "CODE_SLOTS": code_slots,
            "TOKEN_SLOTS": TOKEN_SLOTS,
        }
        compile_kernel(MEETINGS_SOURCE, "nested_meetings", tuple(defines.items()))(
            (min(self._num_multiprocessors, MOST_PROGRAMS), 1, 1),
            MEETING_THREADS,
            (*self._of_tiles(self._meetings), part.faces_F6, scratch.partial, scratch.arrived),
            shared_bytes=shared_bytes,
        )

    def _defines(self) -> tuple[tuple[str, int], ...]:
        part = self.part
        return (
            ("GATE_UP", int(part.is_gate_up)),
            ("TILES", self.cut.tiles),
            ("PLANES", part.num_planes),
            ("WIDE", int(part.wide)),
        )

    def _of_tiles(self, work: Tensor) -> tuple[Tensor | int, ...]:
        """What kernels that take tokens in tiles are told."""
        part, lists, scratch = self.part, self.lists, self.scratch
        return (
            scratch.values, scratch.groups, self._num_tiles, part.planes[4], part.scale_SRG,
            lists.pairs_LFC[self.layer], work, lists.weights_TK, self.out,
            part.num_rows, part.num_columns,
        )  # fmt: skip


def _cut(part: FacePart, lists: FaceLists, num_pairs: int) -> Cut:
    """What is fastest for so many pairs."""
    num_faces = min(len(part.faces_F6), lists.most_wanted)
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


def _code_bytes(part: FacePart) -> int:
    """Of a step of a row tile of `nested_many` and `nested_wide`, all planes."""
    own = 0 if part.num_planes == 0 else 2 if part.wide else 1
    return (2 + own + (part.num_planes == 2)) * MANY_ROWS * GROUP


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

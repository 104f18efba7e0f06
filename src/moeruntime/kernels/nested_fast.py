"""The experts of a step over nested codes, at the speed of their bytes.

`nested_fast.cu` serves few tokens of a face; on a Hopper device `nested_many.cu` serves many,
`nested_wide.cu` very many, and `nested_meetings.cu` faces of a slot together. For the codes and
shapes of real models (`is_fast`); `nested` serves all others. Activations go in and out as float32;
inside they are integers of 15 bits, in groups with a scale each, or bfloat16 where they are very
many, as `nested_halves.cu` makes them.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

from moeruntime.kernels.face_lists import FaceLists
from moeruntime.kernels.face_parts import (
    GROUP,
    MANY_ROWS,
    MOST_A_FACE,
    MOST_PAIRS,
    MOST_PROGRAMS,
    PROGRAMS_AT_ONCE,
    ROWS,
    ByteRows,
    Cut,
    FacePart,
)
from moeruntime.kernels.nested_programs import (
    MeetingRoom,
    Program,
    fitting,
    halves,
    of_meetings,
    of_units,
)
from moeruntime.kernels.nvrtc import compile_images, compile_kernel

__all__ = ["chosen_cut", "compile_ahead", "down", "down_parts", "gate_up", "most_pairs"]


def down_parts(part: FacePart, lists: FaceLists, num_pairs: int) -> int:
    """In how many parts `down` is fastest: two, unless all of its programs just run at once."""
    num_programs = num_pairs * part.num_rows // ROWS
    places = PROGRAMS_AT_ONCE * _device(part.scale_SRG.device)[0]
    at_once = places // 2 < num_programs <= places
    can_part = part.num_columns // (8 * GROUP) % 2 == 0
    return 2 if can_part and not at_once and not chosen_cut(part, lists, num_pairs).tiled else 1


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
    cut = fitting(part, cut or chosen_cut(part, lists, num_pairs))
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
    cut = fitting(part, cut or chosen_cut(part, lists, num_pairs))
    if num_parts > 1:
        assert not cut.tiled and part.num_columns // (8 * GROUP) % num_parts == 0
    _Product(x_MI, part, lists, layer, scratch, num_pairs, out_MSH, num_parts, cut).launch()


def compile_ahead(parts: Iterable[FacePart], steps: Sequence[tuple[FaceLists, int]]) -> None:
    """Compile, several at a time, what some steps' lists and numbers of pairs want."""
    sources = {
        program.source
        for part in parts
        for cut in _cuts(part, steps)
        for program in _programs(part, cut)
    }
    if sources:
        compile_images([(source.path, source.defines) for source in sources])


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
        if self.cut.meet:
            self._serve_meetings()
        if self.cut.tiled:
            self._serve_many()
        else:
            self._serve_few()

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
        num_cuts = len(scratch.arrived) if cut.meet else 0
        _run(
            halves(cut),
            (-(-num_rows * groups_a_row // 4) + 1, 1, 1),
            (
                self.x, scratch.values, scratch.groups,
                num_rows, groups_a_row, self.num_pairs // len(self.x),
                part.faces_F6, lists.counts_LF[self.layer], lists.pairs_LFC[self.layer],
                len(part.faces_F6), scratch.units, self._num_units, cut.tokens,
                lists.pairs_LFC.shape[2], self._meetings, MeetingRoom.of(part).tiles, cut.meet,
                scratch.arrived, num_cuts,
            ),
        )  # fmt: skip

    def _serve_few(self) -> None:
        part, lists, scratch = self.part, self.lists, self.scratch
        turns = self.cut.turns if part.is_gate_up else 1
        _run(
            of_units(part, self.cut),
            (self._num_units, part.num_rows // (ROWS * turns), self.num_parts),
            (
                scratch.values, scratch.groups, part.planes[4], part.scale_SRG,
                lists.pairs_LFC[self.layer], scratch.units, lists.weights_TK, self.out,
                part.num_rows, part.num_columns, lists.weights_TK.shape[1], turns,
            ),
        )  # fmt: skip

    def _serve_many(self) -> None:
        """By programs that take one unit's row tile after another."""
        most_work = self._num_units * (self.part.num_rows // MANY_ROWS)
        _run(
            of_units(self.part, self.cut),
            (min(most_work, self._num_multiprocessors), 1, 1),
            self._of_tiles(self.scratch.units),
        )

    def _serve_meetings(self) -> None:
        scratch = self.scratch
        _run(
            of_meetings(self.part),
            (min(self._num_multiprocessors, MOST_PROGRAMS), 1, 1),
            (*self._of_tiles(self._meetings), self.part.faces_F6, scratch.partial, scratch.arrived),
        )

    def _of_tiles(self, work: Tensor) -> tuple[Tensor | int, ...]:
        """What kernels that take tokens in tiles are told."""
        part, lists, scratch = self.part, self.lists, self.scratch
        return (
            scratch.values, scratch.groups, self._num_tiles, part.planes[4], part.scale_SRG,
            lists.pairs_LFC[self.layer], work, lists.weights_TK, self.out,
            part.num_rows, part.num_columns,
        )  # fmt: skip


def chosen_cut(part: FacePart, lists: FaceLists, num_pairs: int) -> Cut:
    """What is fastest for so many pairs."""
    num_faces = min(len(part.faces_F6), lists.most_wanted)
    faces_a_slot = num_faces / len(part.planes[4])
    hopper = _device(part.scale_SRG.device)[1]
    return Cut.of(num_pairs, num_faces, hopper=hopper, faces_a_slot=faces_a_slot)


def _cuts(part: FacePart, steps: Sequence[tuple[FaceLists, int]]) -> set[Cut]:
    return {fitting(part, chosen_cut(part, lists, num_pairs)) for lists, num_pairs in steps}


def _programs(part: FacePart, cut: Cut) -> list[Program]:
    return [halves(cut), of_units(part, cut), *([of_meetings(part)] if cut.meet else [])]


def _run(program: Program, grid: tuple[int, int, int], arguments: tuple[Tensor | int, ...]) -> None:
    source = program.source
    kernel = compile_kernel(source.path, source.name, source.defines)
    kernel(grid, program.threads, arguments, shared_bytes=program.shared_bytes)


@cache
def _device(device: torch.device) -> tuple[int, bool]:
    """How many multiprocessors it has, and whether it is a Hopper device."""
    found = torch.cuda.get_device_properties(device)
    return int(found.multi_processor_count), (found.major, found.minor) == (9, 0)

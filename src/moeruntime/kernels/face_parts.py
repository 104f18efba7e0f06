"""Nested experts as the kernels read them: where codes lie, and which way they are decoded.

Imports no Triton, which a CPU build of torch lacks: what is decided here is tested there.

Legend: F faces, S slots, R rows, C columns, J bytes of a plane's row, G groups of columns.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from moeruntime.codes import NestedCode, PrivateCode
from moeruntime.kernels.face_lists import FaceLists

__all__ = [
    "GROUP",
    "MANY_ROWS",
    "MANY_THREADS",
    "MEETING_ROWS",
    "MEETING_TILES",
    "MOST_A_FACE",
    "MOST_PAIRS",
    "MOST_PROGRAMS",
    "PART_TILES",
    "PROGRAMS_AT_ONCE",
    "ROWS",
    "TILE",
    "UNIT_WORDS",
    "WARPS",
    "WIDE_TILE",
    "ByteRows",
    "Cut",
    "FacePart",
    "is_fast",
]

WARPS, ROWS = 4, 32
"""Warps of a program of `nested_fast.cu`, and rows of weights that it takes at a turn."""

PROGRAMS_AT_ONCE = 4
"""Of `nested_fast.cu`, on a multiprocessor, where faces have few tokens."""

MANY_THREADS, MANY_ROWS = 384, 128
"""Threads of a program of `nested_many.cu`, and of `nested_wide.cu`; and rows that it takes."""

TILE, WIDE_TILE = 4, 8
"""Tokens that are multiplied side by side, and a tile of a unit or meeting is made of; those of
`nested_wide.cu`."""

GROUP = 128
"""Columns that have one scale, as the kernel wants it."""

MAX_FACES = 128
"""Faces of a layer that the kernel lists, a thread each."""

MAX_TURNS = 8
"""That a program of gate_up takes."""

MEETING_ROWS, MEETING_TILES, PART_TILES = 192, 12, 6
"""Rows that a program of `nested_meetings.cu` takes at a time, at most; tiles of four tokens of a
meeting, at most; and of a part of it."""

MOST_PROGRAMS = 144
"""Of `nested_meetings.cu`, that run at once: one for each multiprocessor of a Hopper device."""

UNIT_WORDS = 48
"""Integers that describe a unit of work, or a meeting of faces."""

FEW_TO_MEET, MANY_TO_MEET, MOST_TO_MEET = 32, 40, 64
"""On a Hopper device `nested_meetings.cu` serves steps of so many (token, choice) pairs or more,
with up to so many of a slot, on average; and no face that has more than so many."""

FEW_A_FACE = 2
"""On a Hopper device `nested_many.cu` serves so many tokens of a face, or more, on average."""

FOUR_TILES, EIGHT_TILES = 10, 24
"""Up to so many tokens of a face, on average, its programs take so many tiles; above, twelve."""

MANY_A_FACE, MOST_A_FACE = 48, 512
"""Where there are more than so many tokens of a face, on average, `nested_wide.cu` serves them; and
where more than so many codes are decoded first."""

MOST_PAIRS = 512
"""On other devices codes are decoded first where a step has more (token, choice) pairs."""


@dataclass(frozen=True, slots=True)
class FacePart:
    """One part of all faces of a layer, as the kernels read it.

    Attributes:
        num_rows, num_columns: R and C.
        shared_bits, group: of the slots' code.
        planes: width -> uint8 [slots, rows, J]; widths that the code has none of are absent.
        scale_SRG: bfloat16.
        faces_F6: int64; slot, private bits, step, and the addresses of the private planes
            [rows, J] of width 4, 2 and 1, 0 where there is none. Whoever made it keeps them alive.
        num_planes: private planes that a face has at most; three bits are two.
        wide: whether one of them has 4 bits.
        is_gate_up: half of the rows are gate_proj's, the others up_proj's.
        in_strips: whether all planes lie as `strips` puts them, which `nested_fast` wants.
    """

    num_rows: int
    num_columns: int
    shared_bits: int
    group: int
    planes: dict[int, Tensor]
    scale_SRG: Tensor
    faces_F6: Tensor
    num_planes: int
    wide: bool
    is_gate_up: bool
    in_strips: bool = False


def is_fast(code: NestedCode, shape: tuple[int, int], private: Sequence[PrivateCode]) -> bool:
    """Whether `nested_fast` serves a matrix [R, C] of these faces: its tiles must fit."""
    num_rows, num_columns = shape
    fits = num_columns % (8 * GROUP) == 0 and num_rows % (ROWS * MAX_TURNS) == 0
    return fits and code == NestedCode(4, GROUP) and len(private) <= MAX_FACES


@dataclass(frozen=True, slots=True)
class Cut:
    """How a step is cut into programs.

    Attributes:
        tiles: of four tokens, of eight in wide ones, that a program has at most.
        turns: that a program of gate_up takes, one run of rows after another; 1 but for a few.
        kernel: "few" is `nested_fast.cu`, for which tiles are 1, 2 or 4; "many" `nested_many.cu`,
            for which they are 4, 8 or 12; "wide" `nested_wide.cu`, for which 4, 8, 12 or 16.
        meet: before `nested_many.cu`, `nested_meetings.cu` serves faces of a slot together that
            have up to so many tokens each.
    """

    tiles: int
    turns: int = 1
    kernel: Literal["few", "many", "wide"] = "few"
    meet: int = 0

    @property
    def tile(self) -> int:
        """Tokens of one."""
        return WIDE_TILE if self.kernel == "wide" else TILE

    @property
    def tokens(self) -> int:
        """Of a program, at most."""
        return self.tile * self.tiles

    @property
    def tiled(self) -> bool:
        """Whether tokens lie in tiles."""
        return self.kernel != "few"

    @classmethod
    def of(cls, num_pairs: int, num_faces: int, *, hopper: bool, faces_a_slot: float = 1.0) -> Cut:
        """What was measured to be best on an H200 at the sizes of Mixtral-8x7B.

        Args:
            num_pairs: of a token and a choice.
            num_faces: of the layer.
            hopper: whether the device is one.
            faces_a_slot: on average.
        """
        a_face = num_pairs / num_faces
        if hopper and a_face > MANY_A_FACE:
            return cls(16, kernel="wide")
        a_slot = a_face * faces_a_slot
        meets = faces_a_slot > 1.5 and num_pairs >= FEW_TO_MEET and a_slot <= MANY_TO_MEET
        if hopper and (meets or a_face >= FEW_A_FACE):
            tiles = 4 if a_face <= FOUR_TILES else 8 if a_face <= EIGHT_TILES else 12
            return cls(tiles, kernel="many", meet=MOST_TO_MEET if meets else 0)
        tiles = 1 if a_face <= 4 else 2 if a_face <= 8 else 4
        turns = 1 if num_pairs <= 4 else 2 if num_pairs <= 16 else 4
        return cls(tiles, turns)


class ByteRows:
    """What `nested_fast` makes of activations before it multiplies them, and its list of work.

    Attributes:
        values: int8; each value's upper and lower byte, as `nested_halves.cu` says they lie.
        groups: float32; for each group of a row what one of its integers counts, and their sum.
        units: int32; what a program has to know of every unit.
        partial, arrived: float32, int32; where two programs of `nested_meetings.cu` meet.
    """

    def __init__(self, lists: FaceLists, num_tokens: int, hidden: int, inner: int) -> None:
        """Allocate enough for the inputs of gate_up and of down, one after the other."""
        device = lists.weights_TK.device
        num_pairs = num_tokens * lists.weights_TK.shape[1]
        # In tiles, and one more: a tile of a meeting that is empty is copied, from wherever it is.
        rows = max(tile * (lists.num_tiles(num_pairs, tile) + 1) for tile in (TILE, WIDE_TILE))
        columns = rows * max(hidden, inner)
        self.values = torch.empty(2 * columns, dtype=torch.int8, device=device)
        self.groups = torch.empty(2 * columns // GROUP, dtype=torch.float32, device=device)
        self.units = torch.empty(2 * UNIT_WORDS * num_pairs, dtype=torch.int32, device=device)
        sums = 2 * MOST_PROGRAMS * MEETING_ROWS * TILE * MEETING_TILES
        self.partial = torch.empty(sums, dtype=torch.float32, device=device)
        self.arrived = torch.empty(MOST_PROGRAMS, dtype=torch.int32, device=device)

    def tensors(self) -> tuple[Tensor, ...]:
        """All of them."""
        return self.values, self.groups, self.units, self.partial, self.arrived

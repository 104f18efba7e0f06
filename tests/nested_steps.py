"""Steps of `nested_fast` over random codes, on any device, and what decoding first makes."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor

from moeruntime.codes import NestedCode, PrivateCode
from moeruntime.kernels import nested_fast
from moeruntime.kernels.face_lists import FaceLists
from moeruntime.kernels.face_parts import ByteRows, Cut, FacePart, is_fast
from nested_parts import Faces, random_part

CODE = NestedCode(4, 128)
SLOTS, TOP_K = 3, 2
# (slot, code) of every face: what an allocator may mix, with and without three bits.
MIXED: Faces = (
    (0, PrivateCode(0, 0)),
    (0, PrivateCode(1, 6)),
    (0, PrivateCode(2, 3)),
    (0, PrivateCode(4, 1)),
    (0, PrivateCode(2, 4)),
    (1, PrivateCode(1, 4)),
    (2, PrivateCode(2, 2)),
    (2, PrivateCode(2, 2)),
)
THREES: Faces = (
    (0, PrivateCode(3, 2)),
    (0, PrivateCode(3, 1)),
    (1, PrivateCode(3, 2)),
    (2, PrivateCode(2, 3)),
)
# Faces of a slot that may be served together: more of them than meet, and one or none with others.
MEETING: Faces = (
    (0, PrivateCode(2, 3)),
    (1, PrivateCode(1, 4)),
    (0, PrivateCode(0, 0)),
    (0, PrivateCode(1, 6)),
    (2, PrivateCode(2, 2)),
    (0, PrivateCode(2, 4)),
    (2, PrivateCode(2, 5)),
    (0, PrivateCode(2, 1)),
)
ALONE: Faces = tuple((slot, PrivateCode(2, 2)) for slot in range(SLOTS))
PLAIN: Faces = tuple((slot, PrivateCode(0, 0)) for slot in range(SLOTS))
ALL_FACES = {
    "mixed": MIXED,
    "threes": THREES,
    "meeting": MEETING,
    "alone": ALONE,
    "plain": PLAIN,
}


@dataclass(frozen=True, slots=True)
class Place:
    """Where a step runs, and how large it is there: sizes of gate_up and down, [rows, columns]."""

    device: torch.device
    gate_up: tuple[int, int]
    down: tuple[int, int]


@cache
def make_part(
    place: Place, faces: Faces, *, is_gate_up: bool
) -> tuple[FacePart, Tensor, list[Tensor]]:
    """Random codes; what they decode to [F, R, C]; and the tensors that must stay alive."""
    device, (rows, columns) = place.device, place.gate_up if is_gate_up else place.down
    assert is_fast(CODE, (rows, columns), [code for _, code in faces])
    made = random_part(
        rows, columns, faces, CODE, seed=1 + is_gate_up, device=device, is_gate_up=is_gate_up,
        in_strips=True,
    )  # fmt: skip
    return made.part, made.decoded_FRC, made.alive


class Step:
    """Random inputs for both matrices of some faces, of which some may get none."""

    def __init__(self, place: Place, faces: Faces, num_tokens: int) -> None:
        device = place.device
        generator = torch.Generator(device).manual_seed(num_tokens)

        def random(*shape: int) -> Tensor:
            return torch.rand(shape, generator=generator, device=device)

        self.faces = faces
        self.gate_up, self.gate_up_FRC, _alive = make_part(place, faces, is_gate_up=True)
        self.down, self.down_FRC, _alive_too = make_part(place, faces, is_gate_up=False)
        self.chosen_TK = random(num_tokens, len(faces)).topk(TOP_K).indices
        self.weights_TK = random(num_tokens, TOP_K)
        self.lists = FaceLists.of(self.chosen_TK, self.weights_TK, len(faces))
        self.x_TH = random(num_tokens, place.gate_up[1]) * 4 - 2
        self.inner_MI = random(num_tokens * TOP_K, place.down[1]) * 4 - 2
        widest = max(place.gate_up[1], place.down[1])
        self.scratch = ByteRows(self.lists, num_tokens, widest, widest)

    def run(self, cut: Cut | None, num_parts: int = 1) -> tuple[Tensor, Tensor]:
        """What gate_up and down make, of places that were poisoned."""
        num_pairs, lists, scratch = len(self.inner_MI), self.lists, self.scratch
        inner = self.x_TH.new_full((num_pairs, self.gate_up.num_rows // 2), torch.nan)
        out = self.x_TH.new_full((num_pairs, num_parts, self.down.num_rows), torch.nan)
        nested_fast.gate_up(self.x_TH, self.gate_up, lists, 0, scratch, out_MI=inner, cut=cut)
        nested_fast.down(self.inner_MI, self.down, lists, 0, scratch, out_MSH=out, cut=cut)
        return inner, out

    def check(self, cut: Cut | None, num_parts: int = 1) -> None:
        """Run, and compare with codes that are decoded first, in float32."""
        inner, out = self.run(cut, num_parts)
        cut = cut or nested_fast.chosen_cut(self.gate_up, self.lists, len(self.inner_MI))
        inputs = [self.x_TH, self.inner_MI, self.gate_up_FRC, self.down_FRC]
        if cut.kernel == "wide":  # all of which it rounds
            inputs = [one.bfloat16() for one in inputs]
        x_TH, inner_MI, gate_up_FRC, down_FRC = (one.float() for one in inputs)
        most = 1e-5 if cut.kernel == "wide" else 1e-3
        assert inner.isfinite().all() and out.isfinite().all()
        chosen_M, weights_M = self.chosen_TK.flatten(), self.weights_TK.flatten()
        for face in range(len(self.faces)):
            mine = (chosen_M == face).nonzero()[:, 0]
            if not len(mine):
                continue
            both = x_TH[mine // TOP_K] @ gate_up_FRC[face].T
            gate, up = both.chunk(2, dim=1)
            assert error(inner[mine], F.silu(gate) * up) <= most
            expected = inner_MI[mine] @ down_FRC[face].T * weights_M[mine, None]
            assert error(out[mine].sum(1), expected) <= most


def error(actual: Tensor, expected: Tensor) -> float:
    """Relative, by norms."""
    return float((actual.float() - expected).norm() / expected.norm())


def name_of(cut: Cut | None) -> str:
    """Of a test's case."""
    if cut is None:
        return "chosen"
    if cut.meet:
        return f"meet{cut.meet}"
    if cut.kernel == "wide":
        return f"wide{cut.tiles}"
    return f"many{cut.tiles}" if cut.kernel == "many" else f"few{cut.tiles}x{cut.turns}"

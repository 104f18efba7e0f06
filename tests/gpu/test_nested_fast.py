"""The fast kernel for nested experts against decoding first, in float32."""

from __future__ import annotations

from functools import cache

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from moeruntime.codes import NestedCode, PrivateCode, decode, pack_planes, scale_columns
from moeruntime.kernels.face_lists import FaceLists
from moeruntime.kernels.face_parts import ByteRows, Cut, FacePart, is_fast
from moeruntime.kernels.strips import lay_in_strips

if torch.cuda.is_available():
    from moeruntime.kernels import nested, nested_fast

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]

CODE = NestedCode(4, 128)
DEVICE = torch.device("cuda")
Faces = tuple[tuple[int, PrivateCode], ...]
HIDDEN, INNER, SLOTS, TOP_K = 2048, 4096, 3, 2
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
CUTS = [
    None,
    *(Cut(tiles, turns) for tiles, turns in ((1, 8), (2, 4), (2, 1), (4, 2))),
    *(Cut(tiles, many=True) for tiles in (2, 4, 8, 12)),
    *(Cut(8, many=True, meet=most, meeting=tiles) for most in (16, 1000) for tiles in (8, 12)),
]


@cache
def make_part(
    rows: int, columns: int, faces: Faces, seed: int
) -> tuple[FacePart, Tensor, list[Tensor]]:
    """Random codes; what they decode to [F, R, C]; and the tensors that must stay alive."""
    generator = torch.Generator(DEVICE).manual_seed(seed)

    def codes(bits: int, *shape: int) -> Tensor:
        return torch.randint(2**bits, shape, generator=generator, dtype=torch.uint8, device=DEVICE)

    shared = codes(4, SLOTS, rows, columns)
    scale_shape = SLOTS, rows, scale_columns(columns, 128)
    scale = torch.rand(scale_shape, generator=generator, device=DEVICE) * 0.001
    scale = (scale + 0.0005).bfloat16()
    planes = torch.stack([pack_planes(one, 4)[4] for one in shared])
    is_gate_up = rows == 2 * INNER
    lay_in_strips(planes, is_gate_up=is_gate_up)
    decoded, table, alive = [], [], []
    for slot, code in faces:
        private = codes(code.bits, rows, columns) if code.bits else None
        own = pack_planes(private, code.bits) if private is not None else {}
        for plane in own.values():
            lay_in_strips(plane[None], is_gate_up=is_gate_up)
        alive += own.values()
        at = [own[width].data_ptr() if width in own else 0 for width in (4, 2, 1)]
        table.append([slot, code.bits, code.step, *at])
        decoded.append(decode(shared[slot], scale[slot], CODE, private, code))
    part = FacePart(
        rows,
        columns,
        4,
        128,
        {4: planes},
        scale,
        torch.tensor(table, device=DEVICE),
        num_planes=max((code.bits & 1) + (code.bits >= 2) for _, code in faces),
        wide=any(code.bits == 4 for _, code in faces),
        is_gate_up=is_gate_up,
        in_strips=True,
    )
    return part, torch.stack(decoded), alive


class Step:
    """Random tokens for faces of both matrices, some of them for nobody."""

    def __init__(self, faces: Faces, num_tokens: int) -> None:
        self.gate_up, self.gate_up_FRC, _alive = make_part(2 * INNER, HIDDEN, faces, 1)
        self.down, self.down_FRC, _alive_too = make_part(HIDDEN, INNER, faces, 2)
        self.chosen_TK = torch.rand(num_tokens, len(faces), device=DEVICE).topk(TOP_K).indices
        self.weights_TK = torch.rand(num_tokens, TOP_K, device=DEVICE)
        self.lists = FaceLists.of(self.chosen_TK, self.weights_TK, len(faces))
        self.x_TH = torch.randn(num_tokens, HIDDEN, device=DEVICE)
        self.scratch = ByteRows(self.lists, num_tokens, HIDDEN, INNER)

    def run(self, cut: Cut | None, num_parts: int = 1) -> tuple[Tensor, Tensor]:
        """What gate_up and down make, of places that were poisoned."""
        num_pairs = self.chosen_TK.numel()
        inner = torch.full((num_pairs, INNER), torch.nan, device=DEVICE)
        out = torch.full((num_pairs, num_parts, HIDDEN), torch.nan, device=DEVICE)
        lists, scratch = self.lists, self.scratch
        nested_fast.gate_up(self.x_TH, self.gate_up, lists, 0, scratch, out_MI=inner, cut=cut)
        nested_fast.down(inner, self.down, lists, 0, scratch, out_MSH=out, cut=cut)
        return inner, out


def name_of(cut: Cut | None) -> str:
    if cut is None:
        return "chosen"
    if cut.meet:
        return f"meet{cut.meet}in{cut.meeting}"
    return f"many{cut.tiles}" if cut.many else f"few{cut.tiles}x{cut.turns}"


def error(actual: Tensor, expected: Tensor) -> float:
    return float((actual.float() - expected).norm() / expected.norm())


@pytest.mark.parametrize("cut", CUTS, ids=name_of)
@pytest.mark.parametrize("num_tokens", [1, 9, 40, 150])
@pytest.mark.parametrize(
    "faces", [MIXED, THREES, MEETING, ALONE], ids=["mixed", "threes", "meeting", "alone"]
)
def test_every_pair_is_what_decoding_first_gives(
    faces: Faces,
    num_tokens: int,
    cut: Cut | None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(torch.backends.cuda.matmul, "allow_tf32", False)
    for rows, columns in ((2 * INNER, HIDDEN), (HIDDEN, INNER)):
        assert is_fast(CODE, (rows, columns), [code for _, code in faces])
    step = Step(faces, num_tokens)
    inner, out = step.run(cut)
    chosen_M, weights_M = step.chosen_TK.flatten(), step.weights_TK.flatten()
    for face in range(len(faces)):
        mine = (chosen_M == face).nonzero()[:, 0]
        if not len(mine):
            continue
        both = step.x_TH[mine // TOP_K].float() @ step.gate_up_FRC[face].T
        expected = F.silu(both[:, :INNER]) * both[:, INNER:]
        assert error(inner[mine], expected) <= 1e-3
        expected = inner[mine].float() @ step.down_FRC[face].T * weights_M[mine, None]
        assert error(out[mine, 0], expected) <= 1e-3


@pytest.mark.parametrize("num_parts", [2, 4])
@pytest.mark.parametrize("tiles", [1, 2])
@pytest.mark.parametrize("faces", [MIXED, THREES], ids=["mixed", "threes"])
def test_parts_of_down_add_up(faces: Faces, tiles: int, num_parts: int) -> None:
    step = Step(faces, num_tokens=9)
    _, whole = step.run(Cut(tiles))
    _, parts = step.run(Cut(tiles), num_parts)
    assert parts.isfinite().all()
    assert error(parts.sum(1), whole[:, 0]) <= 1e-5


@pytest.mark.parametrize("meeting", [8, 12])
def test_sums_are_the_same_whichever_program_comes_first(meeting: int) -> None:
    step = Step(MEETING, num_tokens=150)  # more row tiles than programs, so that some are cut
    outs = [step.run(Cut(8, many=True, meet=1000, meeting=meeting)) for _ in range(20)]
    for inner, out in outs:
        assert torch.equal(inner, outs[0][0])
        assert torch.equal(out, outs[0][1])


@pytest.mark.parametrize("bits", [0, 1, 2, 3, 4])
@pytest.mark.parametrize("shared_bits", [2, 3, 4, 5, 6])
def test_faces_are_decoded_as_the_definition_says(shared_bits: int, bits: int) -> None:
    if shared_bits + bits > 7:
        return
    generator = torch.Generator().manual_seed(shared_bits * 8 + bits)
    rows, columns, code = 300, 384, NestedCode(shared_bits, 128)
    private_code = PrivateCode(bits, 1) if bits else PrivateCode(0, 0)

    def codes(of: int) -> Tensor:
        return torch.randint(2**of, (rows, columns), generator=generator, dtype=torch.uint8)

    shared, private = codes(shared_bits), codes(bits) if bits else None
    scale = torch.rand(rows, scale_columns(columns, 128), generator=generator).bfloat16()
    planes = {
        width: plane[None].cuda() for width, plane in pack_planes(shared, shared_bits).items()
    }
    own = pack_planes(private, bits) if private is not None else {}
    own = {width: plane.cuda() for width, plane in own.items()}
    at = [own[width].data_ptr() if width in own else 0 for width in (4, 2, 1)]
    faces = torch.tensor([[0] * 6, [0, bits, private_code.step, *at], [0] * 6], device=DEVICE)
    part = FacePart(
        rows, columns, shared_bits, 128, planes, scale[None].cuda(), faces,
        num_planes=len(own), wide=bits == 4, is_gate_up=True,
    )  # fmt: skip
    out = torch.full((2, rows, columns), torch.nan, device=DEVICE, dtype=torch.bfloat16)
    counts = torch.tensor([1, 1, 0], dtype=torch.int32, device=DEVICE)
    nested.decode_faces(part, 1, counts, out_FRC=out)
    assert torch.equal(out[0].cpu(), decode(shared, scale, code, private, private_code).bfloat16())
    assert out[1].isnan().all(), "nobody wants it"


@pytest.mark.parametrize("faces", [MIXED, THREES], ids=["mixed", "threes"])
def test_faces_in_strips_are_decoded_like_others(faces: Faces) -> None:
    for shape, seed in (((2 * INNER, HIDDEN), 1), ((HIDDEN, INNER), 2)):
        part, expected_FRC, _alive = make_part(*shape, faces, seed)
        out_FRC = torch.full_like(expected_FRC, torch.nan, dtype=torch.bfloat16)
        counts_F = torch.ones(len(faces), dtype=torch.int32, device=DEVICE)
        nested.decode_faces(part, 0, counts_F, out_FRC=out_FRC)
        assert torch.equal(out_FRC, expected_FRC.bfloat16())

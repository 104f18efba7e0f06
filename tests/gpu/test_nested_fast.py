"""The kernels for nested experts against decoding first, in float32."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from moeruntime.codes import NestedCode, PrivateCode, decode, pack_planes, scale_columns
from moeruntime.kernels.face_parts import Cut, FacePart
from nested_steps import ALL_FACES, Place, Step, error, make_part, name_of

if torch.cuda.is_available():
    from moeruntime.kernels import nested

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]

DEVICE = torch.device("cuda")
PLACE = Place(DEVICE, gate_up=(8192, 2048), down=(2048, 4096))
CUTS = [
    None,
    *(Cut(tiles, turns) for tiles, turns in ((1, 8), (2, 4), (2, 1), (4, 2))),
    *(Cut(tiles, many=True) for tiles in (2, 4, 8, 12)),
    *(Cut(8, many=True, meet=most, meeting=tiles) for most in (16, 1000) for tiles in (8, 12)),
]


@pytest.fixture(autouse=True)
def exact_products(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.backends.cuda.matmul, "allow_tf32", False)


@pytest.mark.parametrize("cut", CUTS, ids=name_of)
@pytest.mark.parametrize("num_tokens", [1, 9, 40, 150])
@pytest.mark.parametrize("faces", ALL_FACES)
def test_every_pair_is_what_decoding_first_gives(
    faces: str, num_tokens: int, cut: Cut | None
) -> None:
    Step(PLACE, ALL_FACES[faces], num_tokens).check(cut)


@pytest.mark.parametrize("num_parts", [2, 4])
@pytest.mark.parametrize("tiles", [1, 2])
@pytest.mark.parametrize("faces", ["mixed", "threes"])
def test_parts_of_down_add_up(faces: str, tiles: int, num_parts: int) -> None:
    step = Step(PLACE, ALL_FACES[faces], num_tokens=9)
    _, whole = step.run(Cut(tiles))
    _, parts = step.run(Cut(tiles), num_parts)
    assert parts.isfinite().all()
    assert error(parts.sum(1), whole[:, 0]) <= 1e-5


@pytest.mark.parametrize("meeting", [8, 12])
def test_sums_are_the_same_whichever_program_comes_first(meeting: int) -> None:
    # More row tiles than programs, so that some are cut.
    step = Step(PLACE, ALL_FACES["meeting"], num_tokens=150)
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


@pytest.mark.parametrize("faces", ["mixed", "threes"])
def test_faces_in_strips_are_decoded_like_others(faces: str) -> None:
    for is_gate_up in (True, False):
        part, expected_FRC, _alive = make_part(PLACE, ALL_FACES[faces], is_gate_up=is_gate_up)
        out_FRC = torch.full_like(expected_FRC, torch.nan, dtype=torch.bfloat16)
        counts_F = torch.ones(len(expected_FRC), dtype=torch.int32, device=DEVICE)
        nested.decode_faces(part, 0, counts_F, out_FRC=out_FRC)
        assert torch.equal(out_FRC, expected_FRC.bfloat16())

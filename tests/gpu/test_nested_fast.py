"""The kernels for nested experts against decoding first, in float32."""

from __future__ import annotations

import pytest
import torch

from moeruntime.kernels.face_parts import Cut
from nested_steps import ALL_FACES, Place, Step, error, name_of

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]

DEVICE = torch.device("cuda")
PLACE = Place(DEVICE, gate_up=(8192, 2048), down=(2048, 4096))
CUTS = [
    None,
    *(Cut(tiles, turns) for tiles, turns in ((1, 8), (2, 4), (2, 1), (4, 2))),
    *(Cut(tiles, kernel="many") for tiles in (4, 8, 12)),
    *(Cut(tiles, kernel="wide") for tiles in (4, 8, 12, 16)),
    *(Cut(4, kernel="many", meet=most) for most in (16, 1000)),
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


def test_sums_are_the_same_whichever_program_comes_first() -> None:
    # More row tiles than programs, so that some are cut.
    step = Step(PLACE, ALL_FACES["meeting"], num_tokens=150)
    outs = [step.run(Cut(4, kernel="many", meet=1000)) for _ in range(20)]
    for inner, out in outs:
        assert torch.equal(inner, outs[0][0])
        assert torch.equal(out, outs[0][1])

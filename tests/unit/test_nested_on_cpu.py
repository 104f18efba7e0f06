"""The CUDA kernels for nested experts, run on a CPU, against decoding first."""

from __future__ import annotations

import pytest
import torch

from cuda_on_cpu import COMPILER, install
from moeruntime.kernels.face_parts import Cut
from nested_steps import ALL_FACES, Place, Step, name_of

pytestmark = pytest.mark.skipif(COMPILER is None, reason="needs g++")

# Three and two row tiles of meetings, the last of which overlap; one step of each run, and two.
PLACE = Place(torch.device("cpu"), gate_up=(512, 1024), down=(256, 2048))


def meeting_of(most: int) -> Cut:
    return Cut(4, kernel="many", meet=most)


@pytest.fixture(autouse=True)
def device(monkeypatch: pytest.MonkeyPatch) -> None:
    install(monkeypatch, num_multiprocessors=4)


@pytest.mark.parametrize(
    ("faces", "num_tokens", "cut"),
    [
        ("mixed", 9, Cut(1, 8)),
        ("mixed", 40, Cut(2, 2)),
        ("mixed", 40, Cut(4, kernel="many")),
        ("mixed", 40, Cut(4, kernel="wide")),
        ("threes", 70, Cut(8, kernel="wide")),
        ("plain", 120, Cut(12, kernel="wide")),
        ("alone", 180, Cut(16, kernel="wide")),
        ("threes", 9, Cut(1, 4)),
        ("threes", 40, Cut(4, 1)),
        ("threes", 100, Cut(12, kernel="many")),
        ("plain", 9, Cut(1, 2)),
        ("plain", 60, Cut(8, kernel="many")),
        ("alone", 9, None),
        ("meeting", 20, None),
        ("meeting", 60, meeting_of(1000)),
        ("meeting", 60, meeting_of(16)),
        ("mixed", 60, meeting_of(1000)),
        ("meeting", 150, meeting_of(1000)),
        ("threes", 40, meeting_of(1000)),
    ],
    ids=lambda value: name_of(value) if isinstance(value, Cut) else None,
)
def test_every_pair_is_what_decoding_first_gives(
    faces: str, num_tokens: int, cut: Cut | None
) -> None:
    Step(PLACE, ALL_FACES[faces], num_tokens).check(cut)


def test_parts_of_down_add_up() -> None:
    step = Step(PLACE, ALL_FACES["mixed"], num_tokens=9)
    step.check(Cut(1, 8), num_parts=2)


def test_sums_are_the_same_whichever_program_comes_first() -> None:
    step = Step(PLACE, ALL_FACES["meeting"], num_tokens=60)
    outs = [step.run(meeting_of(1000)) for _ in range(3)]
    for inner, out in outs:
        assert torch.equal(inner, outs[0][0])
        assert torch.equal(out, outs[0][1])

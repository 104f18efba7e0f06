"""Choosing codes: against brute force without data, against plain rounding with it.

Legend: N slots, V members, R rows, C columns, G scales a row.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from moeconsolidate.allocation import OPTIONS
from moeconsolidate.encoding import Feedback, NestedCodes, encode
from moeconsolidate.importance import Importance
from moeruntime.codes import NestedCode, PrivateCode, decode, scale_columns

CODE = NestedCode(4, 16)
NONE, ONE, THREE = PrivateCode(0, 0), PrivateCode(1, 4), PrivateCode(3, 2)
Codes = Sequence[Sequence[PrivateCode]]


def related(num_slots: int, num_members: int, rows: int = 6, columns: int = 40) -> Tensor:
    """Members that differ a little from a common one, with a few large weights."""
    generator = torch.Generator().manual_seed(num_slots * 10 + num_members)
    common = torch.randn(num_slots, 1, rows, columns, generator=generator)
    own = torch.randn(num_slots, num_members, rows, columns, generator=generator)
    return common.pow(3) / 10 + own / 20


def random_importance(
    num_slots: int, num_members: int, rows: int = 6, columns: int = 40
) -> Importance:
    generator = torch.Generator().manual_seed(7)
    inputs = torch.randn(num_slots, num_members, 3 * columns, columns, generator=generator)
    inputs = inputs * torch.rand(columns, generator=generator).square() + 0.5 * inputs[..., :1]
    moment = inputs.mT @ inputs / inputs.shape[2] + 0.01 * torch.eye(columns)
    outputs = torch.rand(num_slots, num_members, rows, generator=generator) + 0.01
    return Importance((moment,), outputs)


def read_back(codes: NestedCodes, code: NestedCode, private: Codes) -> Tensor:
    return torch.stack(
        [
            torch.stack(
                [
                    decode(
                        codes.shared_NRC[n],
                        codes.scale_NRG[n],
                        code,
                        codes.private_NVRC[n, v] if one.bits else None,
                        one,
                    )
                    for v, one in enumerate(slot)
                ]
            )
            for n, slot in enumerate(private)
        ]
    )


def spread(codes: NestedCodes, code: NestedCode, columns: int) -> Tensor:
    return codes.scale_NRG.float().repeat_interleave(code.group, dim=-1)[..., :columns]


def levels(shared: Tensor, private: Tensor, code: NestedCode, one: PrivateCode) -> Tensor:
    """The formula in float64, in units of the scale."""
    shift = 2 ** (7 - code.shared_bits)
    offset = ((2**code.shared_bits - 1) * shift + one.step * (2**one.bits - 1)) / 2
    return shared.double() * shift + one.step * private.double() - offset


CASES: list[tuple[str, NestedCode, list[list[PrivateCode]]]] = [
    ("one member, no private bits", CODE, [[NONE]]),
    ("one member", CODE, [[THREE], [ONE]]),
    ("two members", CODE, [[THREE, THREE], [ONE, NONE]]),
    ("four members, all kinds", CODE, [[NONE, ONE, THREE, PrivateCode(4, 1)]]),
    ("few shared bits", NestedCode(2, 8), [[THREE, ONE]]),
    ("many shared bits", NestedCode(6, 64), [[PrivateCode(2, 1), NONE]]),
]


@pytest.mark.parametrize("with_data", [False, True], ids=["no data", "importance"])
@pytest.mark.parametrize(("code", "private"), [c[1:] for c in CASES], ids=[c[0] for c in CASES])
def test_the_weights_are_what_a_reader_decodes(
    code: NestedCode, private: Codes, with_data: bool
) -> None:
    shape = (len(private), len(private[0]))
    weights = related(*shape)
    codes = encode(weights, code, private, random_importance(*shape) if with_data else None)
    assert codes.scale_NRG.shape == (shape[0], 6, scale_columns(40, code.group))
    assert codes.shared_NRC.dtype == codes.private_NVRC.dtype == torch.uint8
    assert int(codes.shared_NRC.max()) < 2**code.shared_bits
    for n, slot in enumerate(private):
        for v, one in enumerate(slot):
            assert int(codes.private_NVRC[n, v].max()) < 2**one.bits
    assert torch.equal(codes.weights_NVRC, read_back(codes, code, private))
    assert bool((codes.scale_NRG > 0).all())
    again = encode(weights, code, private, random_importance(*shape) if with_data else None)
    assert torch.equal(again.weights_NVRC, codes.weights_NVRC)


# -- without data: the nearest levels --------------------------------------------------------------


@pytest.mark.parametrize("one", OPTIONS, ids=str)
@pytest.mark.parametrize("shared_bits", [2, 3, 4])
def test_one_member_gets_the_nearest_of_all_levels(shared_bits: int, one: PrivateCode) -> None:
    code = NestedCode(shared_bits, 16)
    weights = related(3, 1)
    codes = encode(weights, code, [[one]] * 3)
    shared, private = torch.meshgrid(
        torch.arange(2**shared_bits), torch.arange(2**one.bits), indexing="ij"
    )
    every = levels(shared.flatten(), private.flatten(), code, one)
    step = spread(codes, code, 40)[:, None].double()
    errors = (every * step[..., None] - weights.double()[..., None]).abs()
    chosen = (codes.weights_NVRC.double() - weights.double()).abs()
    slack = 1e-6 * weights.abs().max()  # the choice is made in float32
    assert bool((chosen <= errors.amin(dim=-1) + slack).all())


@pytest.mark.parametrize(
    "private",
    [[ONE, ONE], [THREE, THREE], [THREE, ONE], [NONE, THREE], [NONE, NONE], [THREE, THREE, ONE]],
    ids=str,
)
def test_several_members_get_the_best_beside_the_two_nearest_shared_codes(
    private: list[PrivateCode],
) -> None:
    """The rule: H just below or above the mean of the members' targets, and the best Ls beside."""
    weights = related(2, len(private))
    codes = encode(weights, CODE, [private] * 2)
    step = spread(codes, CODE, 40).double()
    best_NHRC = []
    for shared in range(16):
        error = torch.zeros_like(step)
        for v, one in enumerate(private):
            every = levels(torch.tensor(shared), torch.arange(2**one.bits), CODE, one)
            distance = every * step[..., None] - weights[:, v].double()[..., None]
            error += distance.square().amin(dim=-1)
        best_NHRC.append(error)
    all_errors = torch.stack(best_NHRC, dim=1)
    mean = (weights.double() / step[:, None]).mean(dim=1)
    below = (mean / 8 + 7.5).floor()
    candidates = torch.stack([below, below + 1], dim=1).clamp(0, 15).long()
    expected = all_errors.gather(1, candidates).amin(dim=1)
    chosen = (codes.weights_NVRC.double() - weights.double()).square().sum(dim=1)
    slack = 1e-5 * weights.square().max()
    assert bool(((chosen - expected).abs() <= slack).all())
    # Trying every shared code would gain next to nothing.
    assert float(chosen.sum()) <= 1.02 * float(all_errors.amin(dim=1).sum())


def test_the_scale_is_the_best_of_those_tried() -> None:
    from moeconsolidate.encoding import COARSE_FACTORS

    weights = related(1, 2)
    private = [[THREE, ONE]]
    codes = encode(weights, NestedCode(4, 40), private)
    chosen = (codes.weights_NVRC - weights).square().sum(dim=(0, 1, 3))
    largest = weights.abs().amax(dim=(0, 1, 3))
    for factor in COARSE_FACTORS:
        scale = (largest * (factor / 64)).bfloat16().float()
        step = scale[:, None]
        errors = []
        for shared in range(16):
            total = torch.zeros(6, 40)
            for v, one in enumerate(private[0]):
                every = levels(torch.tensor(shared), torch.arange(2**one.bits), CODE, one).float()
                distance = every * step[..., None] - weights[0, v][..., None]
                total += distance.square().amin(dim=-1)
            errors.append(total)
        assert bool((chosen <= 1.02 * torch.stack(errors).amin(dim=0).sum(dim=-1)).all())
    ratio = codes.scale_NRG[0, :, 0].float() * 64 / largest
    assert 0.45 <= float(ratio.min()) <= float(ratio.max()) <= 1.15


# -- groups ----------------------------------------------------------------------------------------


def test_a_partial_last_group_has_its_own_scale() -> None:
    weights = torch.full((1, 1, 2, 20), 0.5)
    weights[..., 16:] = 8.0  # the last group has four columns
    codes = encode(weights, CODE, [[THREE]])
    assert codes.scale_NRG.shape == (1, 2, 2)
    assert float((codes.weights_NVRC - weights).abs().max() / 8) < 0.01
    alone = encode(weights[..., 16:], CODE, [[THREE]])
    assert torch.equal(codes.scale_NRG[..., 1:], alone.scale_NRG)
    assert torch.equal(codes.weights_NVRC[..., 16:], alone.weights_NVRC)


@pytest.mark.parametrize("with_data", [False, True], ids=["no data", "importance"])
def test_groups_of_zeros_and_of_the_tiniest_weights(with_data: bool) -> None:
    weights = related(2, 2)
    weights[0, :, :, :16] = 0.0
    weights[1, :, :, 16:32] = 1e-42
    private = [[THREE, ONE], [NONE, THREE]]
    codes = encode(weights, CODE, private, random_importance(2, 2) if with_data else None)
    assert bool((codes.scale_NRG > 0).all())
    assert torch.equal(codes.weights_NVRC, read_back(codes, CODE, private))
    assert float(codes.weights_NVRC[0, :, :, :16].abs().max()) < 1e-25
    assert float(codes.weights_NVRC[1, :, :, 16:32].abs().max()) < 1e-25
    if not with_data:  # the other groups do not care
        assert float((codes.weights_NVRC - weights).abs().max() / weights.abs().max()) < 0.15


def test_slots_do_not_know_each_other() -> None:
    """Coding several slots at once is coding them one by one."""
    weights, importance = related(3, 2), random_importance(3, 2)
    private = [[THREE, ONE], [NONE, THREE], [ONE, ONE]]
    together = encode(weights, CODE, private, importance)
    for n in range(3):
        alone = encode(
            weights[n : n + 1],
            CODE,
            private[n : n + 1],
            Importance((importance.inputs_NVKK[0][n : n + 1],), importance.outputs_NVR[n : n + 1]),
        )
        assert torch.equal(alone.shared_NRC[0], together.shared_NRC[n])
        assert torch.equal(alone.private_NVRC[0], together.private_NVRC[n])
        assert torch.equal(alone.scale_NRG[0], together.scale_NRG[n])


# -- with data: what matters -----------------------------------------------------------------------


@pytest.mark.parametrize(("code", "private"), [c[1:] for c in CASES], ids=[c[0] for c in CASES])
def test_importance_beats_plain_rounding(code: NestedCode, private: Codes) -> None:
    shape = (len(private), len(private[0]))
    weights, importance = related(*shape), random_importance(*shape)
    plain = encode(weights, code, private)
    weighed = encode(weights, code, private, importance)
    before = importance.cost(plain.weights_NVRC - weights).sum(dim=1)
    after = importance.cost(weighed.weights_NVRC - weights).sum(dim=1)
    assert bool((after < 0.9 * before).all())


@pytest.mark.parametrize(("code", "private"), [c[1:] for c in CASES], ids=[c[0] for c in CASES])
def test_sweeps_never_raise_the_cost(code: NestedCode, private: Codes) -> None:
    shape = (len(private), len(private[0]))
    weights, importance = related(*shape), random_importance(*shape)
    costs = [
        importance.cost(
            encode(weights, code, private, importance, sweeps=sweeps).weights_NVRC - weights
        ).sum(dim=1)
        for sweeps in range(4)
    ]
    for before, after in itertools.pairwise(costs):
        assert bool((after <= before * (1 + 1e-5)).all())


def test_blocks_of_columns_do_not_know_each_other() -> None:
    weights, importance = related(2, 2), random_importance(2, 2)
    code, private = NestedCode(4, 8), [[THREE, ONE], [NONE, THREE]]
    moment = importance.inputs_NVKK[0]
    halves = [(moment[..., cut, cut], cut) for cut in (slice(0, 24), slice(24, 40))]
    blocked = Importance(tuple(half for half, _ in halves), importance.outputs_NVR)
    together = encode(weights, code, private, blocked)
    for half, cut in halves:
        alone = encode(
            weights[..., cut], code, private, Importance((half,), importance.outputs_NVR)
        )
        assert torch.equal(alone.weights_NVRC, together.weights_NVRC[..., cut])
        assert torch.equal(alone.shared_NRC, together.shared_NRC[..., cut])


def test_feedback_made_before_is_the_same() -> None:
    weights, importance = related(2, 2), random_importance(2, 2)
    private = [[THREE, ONE], [NONE, THREE]]
    fresh = encode(weights, CODE, private, importance)
    made = encode(weights, CODE, private, importance, feedback=Feedback.of(importance))
    assert torch.equal(fresh.weights_NVRC, made.weights_NVRC)


def test_equal_importance_of_independent_inputs_is_no_importance() -> None:
    """With A and b of ones on the diagonal, nothing is fed forward: rounding is the answer."""
    weights = related(2, 2)
    ones = Importance((torch.eye(40).expand(2, 2, 40, 40),), torch.ones(2, 2, 6))
    private = [[THREE, ONE], [NONE, THREE]]
    plain, weighed = encode(weights, CODE, private), encode(weights, CODE, private, ones)
    assert torch.equal(plain.scale_NRG, weighed.scale_NRG)
    assert torch.equal(plain.weights_NVRC, weighed.weights_NVRC)


def test_the_member_that_matters_is_served() -> None:
    """Without private bits a slot goes to whom an error costs most."""
    weights = related(1, 2)
    weights[:, 1] += 1.0
    inputs = torch.eye(40).expand(1, 2, 40, 40).contiguous()
    outputs = torch.stack([torch.full((1, 6), 100.0), torch.full((1, 6), 0.01)], dim=1)
    codes = encode(weights, CODE, [[NONE, NONE]], Importance((inputs,), outputs))
    first, second = (codes.weights_NVRC - weights).square().mean(dim=(0, 2, 3))
    assert float(first) < 0.02
    assert float(second) > 0.5

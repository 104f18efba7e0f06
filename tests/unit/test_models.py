"""The pieces of the decoder against transformers' Mixtral."""

from __future__ import annotations

import pytest
import torch
from transformers import MixtralConfig
from transformers.models.mixtral import modeling_mixtral as reference

from helpers import TINY_CONFIG
from moeruntime.errors import CheckpointError
from moeruntime.families import FAMILIES
from moeruntime.kernels.spans import tables_of_lone
from moeruntime.models import Batch, parameter_roles
from moeruntime.models.batch import Span, token_groups
from moeruntime.models.layers import apply_rotary, rms_norm, rotary_tables
from moeruntime.models.moe import route
from moeruntime.strict_json import Fields


def randn(*shape: int, seed: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rms_norm_uses_each_tokens_own_weight(dtype: torch.dtype) -> None:
    x_TH, weight_RH = randn(6, 32, seed=1, dtype=dtype) * 5, randn(3, 32, seed=2, dtype=dtype)
    slots = [2, 0, 0, 1, 2, 1]
    actual = rms_norm(x_TH, weight_RH, torch.tensor(slots), 1e-5)
    assert actual.dtype == dtype
    for token, slot in enumerate(slots):
        norm = reference.MixtralRMSNorm(32, eps=1e-5).to(dtype)
        norm.weight.data = weight_RH[slot]
        torch.testing.assert_close(actual[token], norm(x_TH[token]), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("head_dim", "theta"), [(16, 1e4), (8, 1e6), (2, 10.0)])
def test_rotary_embedding_at_any_position(head_dim: int, theta: float, dtype: torch.dtype) -> None:
    config = MixtralConfig(
        hidden_size=4 * head_dim,
        num_attention_heads=4,
        head_dim=head_dim,
        rope_parameters={"rope_theta": theta, "rope_type": "default"},
    )
    positions_T = torch.tensor([0, 1, 2, 17, 2047, 30_000, 3])
    query, key = randn(7, 4, head_dim, seed=1, dtype=dtype), randn(7, 2, head_dim, seed=2).to(dtype)
    cos, sin = rotary_tables(positions_T, head_dim, theta, dtype)
    their_cos, their_sin = reference.MixtralRotaryEmbedding(config)(query, positions_T[None])
    expected_q, expected_k = reference.apply_rotary_pos_emb(
        query.transpose(0, 1)[None], key.transpose(0, 1)[None], their_cos, their_sin
    )
    close = {"rtol": 1e-6, "atol": 1e-6} if dtype == torch.float32 else {"rtol": 0, "atol": 4e-2}
    for actual, expected in ((query, expected_q), (key, expected_k)):
        rotated = apply_rotary(actual, cos, sin)
        assert rotated.dtype == dtype
        torch.testing.assert_close(rotated, expected[0].transpose(0, 1), **close)


@pytest.mark.parametrize("top_k", [1, 2, 3, 8])
def test_routing_is_mixtrals_and_the_map_comes_after_the_choice(top_k: int) -> None:
    num_experts = 8
    config = MixtralConfig(hidden_size=16, num_local_experts=num_experts, num_experts_per_tok=top_k)
    router = reference.MixtralTopKRouter(config)
    router.weight.data = randn(num_experts, 16, seed=1)
    hidden = randn(30, 16, seed=2)
    logits_TE, scores_TK, experts_TK = router(hidden)
    generator = torch.Generator().manual_seed(3)
    slot_map_TE = torch.stack([torch.randperm(40, generator=generator)[:8] for _ in range(30)])
    slots_TK, weights_TK = route(logits_TE, slot_map_TE, top_k)
    assert weights_TK.dtype == torch.float32
    torch.testing.assert_close(weights_TK, scores_TK)
    torch.testing.assert_close(weights_TK.sum(-1), torch.ones(30))
    for token in range(30):
        expected = [int(slot_map_TE[token, expert]) for expert in experts_TK[token]]
        assert slots_TK[token].tolist() == expected


def test_routing_of_half_precision_logits_is_done_in_float32() -> None:
    logits_TE = randn(20, 8, seed=4, dtype=torch.bfloat16) * 20
    identity = torch.arange(8).expand(20, 8)
    _, weights_TK = route(logits_TE, identity, 2)
    _, expected_TK = route(logits_TE.double(), identity, 2)
    torch.testing.assert_close(weights_TK, expected_TK, rtol=1e-6, atol=1e-6)


def test_query_key_and_value_projections_become_one_parameter() -> None:
    config = FAMILIES["mixtral"].parse_config(Fields(TINY_CONFIG, "config.json", CheckpointError))
    parameters = parameter_roles(config)
    assert parameters["layers.1.qkv_proj"] == (
        "layers.1.q_proj",
        "layers.1.k_proj",
        "layers.1.v_proj",
    )
    roles = [role for group in parameters.values() for role in group]
    assert sorted(roles) == sorted(config.non_expert_shapes())


def test_a_batch_lays_sequences_side_by_side() -> None:
    batch = Batch.build(
        [Span(1, 5, [10, 11], 15, [7, 2]), Span(1, 5, [12], 0, [4]), Span(0, 6, [13, 14], 2, [9])],
        torch.device("cpu"),
    )
    assert batch.token_ids_T.tolist() == [10, 11, 12, 13, 14]
    assert batch.positions_T.tolist() == [15, 16, 0, 2, 3]
    assert batch.slot_T.tolist() == [1, 1, 1, 0, 0]
    assert batch.variant_T.tolist() == [5, 5, 5, 6, 6]
    # Position 15 is the last row of block 7, position 16 the first of block 2.
    assert batch.cache_rows_T.tolist() == [7 * 16 + 15, 2 * 16, 4 * 16, 9 * 16 + 2, 9 * 16 + 3]
    assert tables_of_lone(batch.spans) == [-1, -1, 1, -1, -1]
    assert batch.groups == ((1, 0, 3), (0, 3, 5))
    assert batch.spans == ((0, 2, 17), (2, 3, 1), (3, 5, 4))


def test_tokens_of_a_slot_must_be_adjacent() -> None:
    with pytest.raises(AssertionError, match="not sorted"):
        token_groups([0, 1, 0])

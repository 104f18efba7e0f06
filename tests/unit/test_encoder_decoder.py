"""The parts that only encoder-decoders have, each against the plainest way to do it."""

from __future__ import annotations

import random

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from moeruntime.errors import CheckpointError
from moeruntime.families import FAMILIES, EncoderDecoderConfig
from moeruntime.kernels.spans import Spans
from moeruntime.kv_cache import BLOCK_TOKENS, BlockPool, blocks_for
from moeruntime.layout import private_stages
from moeruntime.models import padded, parameter_roles
from moeruntime.models.layers import relative_buckets
from moeruntime.models.moe import over_capacity
from moeruntime.models.padded import PaddedAttention, RelativePositions
from moeruntime.request import SamplingParams
from moeruntime.scheduler import Scheduler
from moeruntime.sequence import Sequence
from moeruntime.strict_json import Fields
from switch_fixtures import SWITCH_SHAPE

CPU = torch.device("cpu")


def switch_config(**changes: object) -> EncoderDecoderConfig:
    raw = SWITCH_SHAPE | {"model_type": "switch_transformers"} | changes
    fields = Fields(raw, "config.json", CheckpointError)
    config = FAMILIES["switch_transformers"].parse_config(fields)
    assert isinstance(config, EncoderDecoderConfig)
    return config


@pytest.mark.parametrize("causal", [True, False], ids=["causal", "both ways"])
@pytest.mark.parametrize(("num_buckets", "max_distance"), [(32, 128), (16, 20), (4, 64)])
def test_buckets_are_those_of_transformers(
    causal: bool, num_buckets: int, max_distance: int
) -> None:
    from transformers.models.switch_transformers.modeling_switch_transformers import (
        SwitchTransformersAttention,
    )

    ahead = torch.arange(-300, 300)
    expected = SwitchTransformersAttention._relative_position_bucket(
        ahead, bidirectional=not causal, num_buckets=num_buckets, max_distance=max_distance
    )
    found = relative_buckets(ahead, num_buckets, causal=causal, max_distance=max_distance)
    assert torch.equal(found, expected)


@pytest.mark.parametrize("capacity", [1, 2, 5, 100])
def test_capacity_counts_each_sequence_in_order(capacity: int) -> None:
    generator = torch.Generator().manual_seed(capacity)
    lengths = [1, 30, 7, 0, 12]
    sequence_T = torch.arange(5).repeat_interleave(torch.tensor(lengths))
    experts_T = torch.randint(4, (sum(lengths),), generator=generator)
    expected = torch.cat(
        [
            (F.one_hot(one, 4).cumsum(0) > capacity).gather(1, one[:, None])[:, 0]
            for one in experts_T.split(lengths)
        ]
    )
    found = over_capacity(experts_T, sequence_T, num_experts=4, capacity=capacity)
    assert torch.equal(found, expected)


def attend_plainly(
    query_QND: Tensor, key_KND: Tensor, value_KND: Tensor, mask_NQK: Tensor | None
) -> Tensor:
    scores_NQK = torch.einsum("qnd,knd->nqk", query_QND, key_KND)
    if mask_NQK is not None:
        scores_NQK = scores_NQK + mask_NQK
    return torch.einsum("nqk,knd->qnd", scores_NQK.softmax(-1), value_KND).flatten(1)


@pytest.mark.parametrize("max_scores", [1, 500, 2**24], ids=["one by one", "a few", "all"])
@pytest.mark.parametrize("biased", [True, False])
def test_padded_attention_is_that_of_each_sequence_alone(
    max_scores: int, biased: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(padded, "MAX_SCORES", max_scores)
    heads, dim, num_blocks = 3, 4, 20
    generator = torch.Generator().manual_seed(0)
    blocks = torch.randperm(num_blocks, generator=generator).tolist()
    # Rows that nobody wrote hold NaN, as fresh memory may.
    keys, values = (torch.full((num_blocks * BLOCK_TOKENS, heads, dim), torch.nan) for _ in "kv")
    bias_RBN = torch.randn(2, 8, heads, generator=generator)
    spans, tables, slots, start = [], [], [], 0
    for idx, (count, context) in enumerate([(1, 1), (5, 5), (1, 40), (7, 33), (16, 17)]):
        spans.append((start, start + count, context))
        tables.append([blocks.pop() for _ in range(blocks_for(context))])
        slots += [idx // 3] * count
        start += count
        for token in range(context):
            row = tables[-1][token // BLOCK_TOKENS] * BLOCK_TOKENS + token % BLOCK_TOKENS
            keys[row], values[row] = torch.randn(2, heads, dim, generator=generator)
    query = torch.randn(start, heads, dim, generator=generator)
    attend = PaddedAttention(
        spans,
        Spans.build(spans, tables, CPU),
        num_heads=heads,
        positions=RelativePositions(bias_RBN, True, 20) if biased else None,
        slot_T=torch.tensor(slots),
    )
    found = attend(query, keys, values)
    for (first, stop, context), table in zip(spans, tables, strict=True):
        rows = [block * BLOCK_TOKENS + row for block in table for row in range(BLOCK_TOKENS)]
        mask = None
        if biased:
            ahead = torch.arange(context) - torch.arange(context - (stop - first), context)[:, None]
            bucket = relative_buckets(ahead, 8, causal=True, max_distance=20)
            mask = bias_RBN[slots[first]][bucket].permute(2, 0, 1)
            mask = mask.masked_fill(ahead > 0, -torch.inf)
        own = rows[:context]
        expected = attend_plainly(query[first:stop], keys[own], values[own], mask)
        torch.testing.assert_close(found[first:stop], expected)


def test_attention_without_a_cache_sees_its_own_sequence() -> None:
    generator = torch.Generator().manual_seed(1)
    spans = [(0, 3, 3), (3, 12, 9)]
    query, key, value = torch.randn(3, 12, 2, 4, generator=generator)
    on_device = Spans.build(spans, [[0], [1]], CPU)
    found = PaddedAttention(spans, on_device, num_heads=2, cached=False)(query, key, value)
    for first, stop, _ in spans:
        own = slice(first, stop)
        expected = attend_plainly(query[own], key[own], value[own], None)
        torch.testing.assert_close(found[own], expected)


# -- config and parameters -------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "layers"),
    [
        ({}, "encoder.1 encoder.3 decoder.1 decoder.3"),
        ({"num_sparse_encoder_layers": 0}, "encoder.1 decoder.1 decoder.3"),
        ({"num_sparse_decoder_layers": 4}, "encoder.1 encoder.3 decoder.0 decoder.1 decoder.2"),
        ({"encoder_sparse_step": 3, "decoder_sparse_step": 0}, "encoder.1"),
    ],
)
def test_which_blocks_have_experts(changes: dict[str, object], layers: str) -> None:
    assert " ".join(switch_config(**changes).layers).startswith(layers)


def test_a_config_comes_back_from_json() -> None:
    config = switch_config(expert_capacity=7)
    again = EncoderDecoderConfig.from_json(Fields(config.to_json(), "manifest", CheckpointError))
    assert again == config


def test_parameters_lie_in_the_stage_that_needs_them() -> None:
    config = switch_config(tie_word_embeddings=False)
    parameters = parameter_roles(config)
    roles = [role for group in parameters.values() for role in group]
    assert sorted(roles) == sorted(config.non_expert_shapes())
    stages = private_stages(config, frozenset())
    assert len(stages) == 4 + 4 + 2
    assert set(stages[0].places) == {"embed_tokens"}
    assert "encoder.0.position_bias" in stages[1].places
    assert "encoder.final_norm" in stages[4].places  # the encoder's last block
    assert {"decoder.0.cross_kv_proj", "decoder.0.up_proj"} <= set(stages[5].places)
    assert set(stages[9].places) == {"final_norm", "lm_head"}


# -- scheduling ------------------------------------------------------------------------------------


class AllResident:
    def admit(self, variant: str) -> bool:
        return True

    def release(self, variant: str) -> None: ...

    def ready(self, variant: str) -> bool:
        return True


def sequence(number: int, num_source: int) -> Sequence:
    return Sequence(number, "v", [3], SamplingParams(max_tokens=4), range(num_source))


def test_sources_are_read_whole_and_beside_decodes() -> None:
    scheduler = Scheduler(
        BlockPool(100), AllResident(), max_sequences=8, max_step_tokens=20, prefix_cache=False
    )
    long, short, third = sequence(0, 30), sequence(1, 10), sequence(2, 12)
    for one in (long, short, third):
        scheduler.add(one)
        assert one.num_blocks_needed == blocks_for(len(one.source_ids)) + 1

    def step() -> list[int]:
        chunks = scheduler.schedule()
        for chunk in chunks:
            assert chunk.num_tokens == 1
            chunk.sequence.num_cached += 1
            chunk.sequence.output_ids.append(9)
        return [chunk.sequence.request_id for chunk in chunks]

    assert step() == [0]  # more than a step has, and yet it is read
    assert step() == [0, 1]  # the third no longer fits
    assert step() == [0, 1, 2]


def test_no_source_starves() -> None:
    rng = random.Random(0)
    scheduler = Scheduler(
        BlockPool(1000), AllResident(), max_sequences=4, max_step_tokens=8, prefix_cache=False
    )
    waiting = [sequence(number, rng.randint(1, 40)) for number in range(30)]
    for one in waiting:
        scheduler.add(one)
    for _ in range(200):
        for chunk in scheduler.schedule():
            one = chunk.sequence
            one.num_cached += 1
            one.output_ids.append(9)
            if len(one.output_ids) == one.sampling.max_tokens:
                scheduler.remove(one)
    assert scheduler.idle

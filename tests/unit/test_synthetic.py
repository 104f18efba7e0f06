"""Random weights made where they are needed: reproducible, finite, and as wide as real ones."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from moeruntime import Engine, Request, SamplingParams
from moeruntime.codes import PrivateCode, decode, unpack_planes
from moeruntime.errors import RequestError, TokenizerError, UsageError
from moeruntime.pack import MadeTensor, StoredTensor
from moeruntime.pack.manifest import EXPERT_PARTS
from moeruntime.synthetic import SYNTHETIC_MODELS, SyntheticSource

CODES = ("bf16", "4+2", "4+1", "4+0", "3+2")


def made(stored: StoredTensor) -> Tensor:
    assert isinstance(stored, MadeTensor)
    out = torch.empty(stored.shape, dtype=stored.dtype)
    stored.fill(out)
    return out


def decoded(source: SyntheticSource, variant: str, layer: int, expert: int, part: str) -> Tensor:
    assert source.manifest.nested is not None
    code = source.manifest.nested[part]
    num_columns = source.manifest.part_shape(part)[1]
    planes, scale = source.shared_codes(layer, part)
    shared = {width: made(plane)[expert] for width, plane in planes.items()}
    own = {w: made(p) for w, p in source.private_codes(variant, layer, expert, part).items()}
    return decode(
        unpack_planes(shared, num_columns),
        made(scale)[expert],
        code,
        unpack_planes(own, num_columns) if own else None,
        source.variant(variant).private_codes[layer][expert][EXPERT_PARTS.index(part)],
    )


def test_mixtral_has_the_published_sizes() -> None:
    source = SyntheticSource("mixtral-8x7b", num_variants=4)
    config = source.manifest.config
    assert config.expert_numel * 2 == 352_321_536
    non_expert = sum(torch.Size(s).numel() for s in config.non_expert_shapes().values())
    experts = config.num_layers * config.num_experts * config.expert_numel
    assert experts + non_expert == 46_702_792_704
    assert source.manifest.variant_names == ("v0", "v1", "v2", "v3")
    assert source.manifest.shared_roles() == frozenset()
    assert all(set(row) == set(range(8)) for row in source.variant("v3").expert_map)


def test_a_tensor_is_the_same_whenever_it_is_made_and_no_two_are_alike() -> None:
    first, again = (SyntheticSource("mixtral-tiny", num_variants=2, seed=3) for _ in range(2))
    other = SyntheticSource("mixtral-tiny", num_variants=2, seed=4)
    last = made(first.slot(1, "down", 5)[0])
    queries = [made(first.non_expert(name, "layers.0.q_proj")) for name in ("v0", "v1")]
    slots = [made(first.slot(layer, "down", slot)[0]) for layer in (0, 1) for slot in (4, 5)]
    assert torch.equal(slots[3], last)
    assert torch.equal(made(again.slot(1, "down", 5)[0]), last)
    everything = [*queries, made(other.non_expert("v0", "layers.0.q_proj")), *slots]
    assert len({tuple(one.flatten()[:40].tolist()) for one in everything}) == len(everything)
    assert torch.equal(made(first.non_expert("v1", "final_norm")), torch.ones(64).bfloat16())


@pytest.mark.parametrize("code", CODES[1:])
def test_codes_decode_to_weights_as_wide_as_plain_ones(code: str) -> None:
    source = SyntheticSource("mixtral-mini", num_variants=2, code=code)
    expected = 0.02 * (4096 / 256) ** 0.5
    plain = made(SyntheticSource("mixtral-mini").slot(0, "down", 0)[0]).float()
    assert float(plain.std()) == pytest.approx(expected, rel=0.05)
    for part in EXPERT_PARTS:
        weights = [decoded(source, name, 1, 2, part) for name in ("v0", "v1")]
        for one in weights:
            assert one.shape == source.manifest.part_shape(part)
            assert float(one.std()) == pytest.approx(expected, rel=0.05)
            assert abs(float(one.mean())) < 0.05 * expected
        refined = source.variant("v0").private_codes[1][2][0] != PrivateCode(0, 0)
        assert torch.equal(*weights) != refined
        # What is private is small beside what is shared.
        assert float((weights[0] - weights[1]).std()) < expected / 2


def test_every_private_code_is_one_a_pack_may_hold() -> None:
    for shared in range(2, 7):
        for private in range(min(4, 7 - shared) + 1):
            source = SyntheticSource("mixtral-tiny", code=f"{shared}+{private}")
            assert source.variant("v0").private_codes[0][0][0].valid()
            assert source.manifest.coded_bytes() > 0


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        ({"model": "mixtral-9x9"}, "synthetic model 'mixtral-9x9' is not one of mixtral-8x7b"),
        ({"num_variants": 0}, "num_variants is 0"),
        ({"code": "int4"}, "code 'int4' is neither"),
        ({"code": "7+0"}, "code '7\\+0' is neither"),
        ({"code": "6+2"}, "code '6\\+2' has more than 7 bits"),
    ],
)
def test_arguments_that_make_no_sense(arguments: dict[str, Any], complaint: str) -> None:
    with pytest.raises(UsageError, match=complaint):
        SyntheticSource(**({"model": "mixtral-tiny"} | arguments))


@pytest.mark.parametrize("code", CODES)
def test_an_engine_serves_token_ids(code: str) -> None:
    source = SyntheticSource("mixtral-tiny", num_variants=3, code=code)
    params = SamplingParams(max_tokens=6)
    prompts: list[Sequence[int]] = [[5, 6, 7], [5, 6, 7], list(range(40))]
    requests = [Request(f"v{idx}", ids, params) for idx, ids in enumerate(prompts)]
    with Engine(source, device="cpu") as engine:
        outputs = engine.generate(requests)
        for output in outputs:
            assert (len(output.token_ids), output.text) == (6, "")
            assert output.finish_reason == "length"
        assert outputs[0].token_ids != outputs[1].token_ids
        (scores,) = engine.score("v0", [[1, 2, 3, 4]])
        assert bool(scores.isfinite().all())
    with Engine(source, device="cpu", resident=1, dtype="bfloat16") as engine:
        assert engine.generate(requests)[0].num_prompt_tokens == 3
        hidden_TH = engine.model.weights["embed_tokens"]
        assert hidden_TH.dtype == torch.bfloat16


def test_text_needs_a_tokenizer() -> None:
    stopping = SamplingParams(stop=("end",))
    messages = [{"role": "user", "content": "hi"}]
    with Engine(SyntheticSource("mixtral-tiny"), device="cpu") as engine:
        for request in (
            Request("v0", "hello"),
            Request("v0", [1, 2], stopping),
        ):
            with pytest.raises(TokenizerError, match="it takes prompts of token ids"):
                engine.submit(request)
        with pytest.raises(TokenizerError, match="no chat template"):
            engine.submit(Request("v0", messages))
        with pytest.raises(RequestError, match="no variant 'v1'; it has: v0"):
            engine.submit(Request("v1", [1]))
        assert engine.scheduler.idle


def test_the_residual_stream_stays_finite_at_every_size() -> None:
    small = [name for name in SYNTHETIC_MODELS if name.endswith(("-tiny", "-mini"))]
    assert small
    for model in small:  # the others take minutes on a CPU
        with Engine(SyntheticSource(model), device="cpu", dtype="bfloat16") as engine:
            (scores,) = engine.score("v0", [list(range(100))])
            assert bool(scores.isfinite().all())
            # Not far from an even guess: the head's logits are of order one.
            vocab = engine.source.manifest.config.vocab_size
            assert -float(scores.mean()) == pytest.approx(
                float(torch.tensor(float(vocab)).log()), rel=0.25
            )

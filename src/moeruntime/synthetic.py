"""A made-up source: random weights at the size of real models, made where they are needed.

Speed and memory do not depend on what weights say, so benchmarks need no download and no disk. Each
tensor is drawn from a seed of its own, so it is the same whenever and in whatever order it is made
(on one kind of device: CPU and CUDA draw differently).
"""

from __future__ import annotations

import hashlib
import math
import re
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from moeruntime.codes import NestedCode, PrivateCode, plane_shapes, scale_columns
from moeruntime.codes.nested import LEVEL_BITS
from moeruntime.errors import RequestError, UsageError
from moeruntime.families import DecoderConfig
from moeruntime.pack.manifest import (
    EXPERT_PARTS,
    ExpertCodes,
    Manifest,
    TensorRef,
    Variant,
    variant_file,
)
from moeruntime.pack.source import MadeTensor

__all__ = ["SYNTHETIC_MODELS", "SyntheticSource"]

_MIXTRAL = DecoderConfig(
    hidden_size=4096,
    intermediate_size=14336,
    num_layers=32,
    num_heads=32,
    num_kv_heads=8,
    head_dim=128,
    num_experts=8,
    top_k=2,
    vocab_size=32000,
    max_context=32768,
    rms_norm_eps=1e-5,
    rope_theta=1e6,
    sliding_window=None,
    tie_embeddings=False,
)


def _scaled(hidden: int, inner: int, layers: int, vocab: int, context: int) -> DecoderConfig:
    """Mixtral made smaller; heads of 32, four query heads a key-value head."""
    return DecoderConfig(
        hidden_size=hidden,
        intermediate_size=inner,
        num_layers=layers,
        num_heads=hidden // 32,
        num_kv_heads=max(1, hidden // 128),
        head_dim=32,
        num_experts=8,
        top_k=2,
        vocab_size=vocab,
        max_context=context,
        rms_norm_eps=1e-5,
        rope_theta=1e6,
        sliding_window=None,
        tie_embeddings=False,
    )


SYNTHETIC_MODELS: Mapping[str, DecoderConfig] = {
    "mixtral-8x7b": _MIXTRAL,
    "mixtral-small": _scaled(hidden=1024, inner=3584, layers=8, vocab=32000, context=32768),
    "mixtral-mini": _scaled(hidden=256, inner=512, layers=4, vocab=4096, context=2048),
    "mixtral-tiny": _scaled(hidden=64, inner=96, layers=2, vocab=512, context=512),
}
"""Name -> architecture: Mixtral-8x7B itself, and smaller ones of the same make."""

# Mixtral's weights at its width; narrower models get larger ones, so that sums come out alike.
_WEIGHT_STD, _WIDTH = 0.02, 4096
_CODE = re.compile(r"([2-6])\+([0-4])")


class SyntheticSource:
    """Random weights under the names of a pack: variants v0, v1, ... over one set of experts.

    All variants share every expert slot (slot e is expert e); with a nested code each has private
    bits of its own. Their non-expert tensors all differ, but for norms, which are 1.
    """

    def __init__(
        self, model: str, *, num_variants: int = 1, code: str = "bf16", seed: int = 0
    ) -> None:
        """Describe the weights; none is made yet.

        Args:
            model: a key of SYNTHETIC_MODELS.
            num_variants: how many share the experts.
            code: "bf16", or "4+2": bits of the shared and of each variant's private codes.
            seed: other weights for another seed.

        Raises:
            UsageError: an unknown model or code, or no variant at all.
        """
        if model not in SYNTHETIC_MODELS:
            known = ", ".join(SYNTHETIC_MODELS)
            raise UsageError(f"synthetic model {ascii(model[:40])} is not one of {known}")
        if num_variants < 1:
            raise UsageError(f"num_variants is {num_variants}; at least one is needed")
        config = SYNTHETIC_MODELS[model]
        self.root = Path(f"synthetic:{model}")
        self._seed = seed
        self._std = _WEIGHT_STD * math.sqrt(_WIDTH / config.hidden_size)
        nested, self._private = _parse_code(code, config)
        layers = range(config.num_layers)
        experts = tuple(range(config.num_experts))
        codes: ExpertCodes = (self._private, self._private)
        self.manifest = Manifest(
            family="mixtral",
            config=config,
            expert_dtype="BF16",
            num_slots=(config.num_experts,) * config.num_layers,
            variants=tuple(
                Variant(
                    name=name,
                    content_sha256="",
                    expert_map=tuple(experts for _ in layers),
                    tensors={
                        role: TensorRef(variant_file(name), role)
                        for role in config.non_expert_shapes()
                    },
                    private_codes=tuple(tuple(codes for _ in experts) for _ in layers)
                    if nested
                    else (),
                )
                for name in (f"v{idx}" for idx in range(num_variants))
            ),
            files={},
            recipe={},
            provenance={"synthetic": model, "seed": seed},
            nested=nested,
        )

    def variant(self, name: str) -> Variant:
        """Look up a variant; RequestError lists the known ones."""
        for variant in self.manifest.variants:
            if variant.name == name:
                return variant
        known = ", ".join(self.manifest.variant_names)
        raise RequestError(f"{self.root}: no variant {ascii(name[:80])}; it has: {known}")

    def variant_path(self, name: str, file: str) -> Path | None:
        """No files: no tokenizer either, so prompts are token ids."""
        return None

    def slot(self, layer: int, part: str, slot: int) -> tuple[MadeTensor]:
        """Gaussian weights."""
        return (self._normal(self.manifest.part_shape(part), f"experts.{layer}.{part}.{slot}"),)

    def shared_codes(self, layer: int, part: str) -> tuple[dict[int, MadeTensor], MadeTensor]:
        """Codes drawn evenly, and scales around the one that decodes them to Gaussians' width."""
        assert self.manifest.nested is not None
        num_slots, code = self.manifest.num_slots[layer], self.manifest.nested[part]
        num_rows, num_columns = self.manifest.part_shape(part)
        name = f"experts.{layer}.{part}"
        planes = {
            width: self._bits((num_slots, *shape), f"{name}.{width}")
            for width, shape in plane_shapes(num_rows, num_columns, code.shared_bits).items()
        }
        mean = self._std / _level_std(code, self._private)

        def fill(out: Tensor) -> None:
            out.uniform_(0.75 * mean, 1.25 * mean, generator=self._generator(out, f"{name}.scale"))

        shape = (num_slots, num_rows, scale_columns(num_columns, code.group))
        return planes, MadeTensor(torch.bfloat16, shape, fill)

    def private_codes(
        self, variant: str, layer: int, expert: int, part: str
    ) -> dict[int, MadeTensor]:
        """Codes drawn evenly."""
        return {
            width: self._bits(shape, f"{variant}.{layer}.{expert}.{part}.{width}")
            for width, shape in plane_shapes(
                *self.manifest.part_shape(part), self._private.bits
            ).items()
        }

    def non_expert(self, variant: str, role: str) -> MadeTensor:
        """Gaussian weights of the variant's own; norms are 1."""
        shape = self.manifest.config.non_expert_shapes()[role]
        if role.endswith("norm"):
            return MadeTensor(torch.bfloat16, shape, _ones)
        return self._normal(shape, f"{variant}.{role}")

    def close(self) -> None:
        """There is nothing to close."""

    def _normal(self, shape: tuple[int, ...], name: str) -> MadeTensor:
        def fill(out: Tensor) -> None:
            out.normal_(0.0, self._std, generator=self._generator(out, name))

        return MadeTensor(torch.bfloat16, shape, fill)

    def _bits(self, shape: tuple[int, ...], name: str) -> MadeTensor:
        def fill(out: Tensor) -> None:
            out.random_(0, 256, generator=self._generator(out, name))

        return MadeTensor(torch.uint8, shape, fill)

    def _generator(self, out: Tensor, name: str) -> torch.Generator:
        digest = hashlib.sha256(f"{self._seed}.{name}".encode()).digest()
        return torch.Generator(out.device).manual_seed(int.from_bytes(digest[:7], "little"))


def _ones(out: Tensor) -> None:
    out.fill_(1.0)


def _parse_code(
    code: str, config: DecoderConfig
) -> tuple[Mapping[str, NestedCode] | None, PrivateCode]:
    if code == "bf16":
        return None, PrivateCode(0, 0)
    match = _CODE.fullmatch(code)
    if match is None:
        raise UsageError(f"code {ascii(code[:20])} is neither 'bf16' nor like '4+2'")
    shared_bits, private_bits = int(match[1]), int(match[2])
    if shared_bits + private_bits > LEVEL_BITS:
        raise UsageError(f"code '{code}' has more than {LEVEL_BITS} bits")
    # The private levels of a variant fill the gap between two shared ones.
    step = 2 ** (LEVEL_BITS - shared_bits - private_bits) if private_bits else 0
    columns = {part: shape[1] for part, shape in config.part_shapes.items()}
    nested = {
        part: NestedCode(shared_bits, 32 if columns[part] % 128 else 128) for part in EXPERT_PARTS
    }
    return nested, PrivateCode(private_bits, step)


def _level_std(code: NestedCode, private: PrivateCode) -> float:
    """Standard deviation of q when H and L are drawn evenly."""
    shared_step = 2 ** (LEVEL_BITS - code.shared_bits)
    variance = shared_step**2 * (4**code.shared_bits - 1) + private.step**2 * (4**private.bits - 1)
    return math.sqrt(variance / 12)

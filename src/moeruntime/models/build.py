"""Chooses the model that an architecture and a device need."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from moeruntime.families import DecoderConfig, EncoderDecoderConfig
from moeruntime.kv_cache import KVCache
from moeruntime.models.decoder import Decoder
from moeruntime.models.encoder_decoder import EncoderDecoder
from moeruntime.models.experts import ExpertPool
from moeruntime.pack import Manifest

if TYPE_CHECKING:
    from moeruntime.models.fused import FusedDecoder
    from moeruntime.models.step_graphs import StepGraphs

__all__ = ["build_model"]


def build_model(
    manifest: Manifest,
    weights: Mapping[str, Tensor],
    experts: Sequence[ExpertPool],
    cache: KVCache,
    *,
    num_slots: int,
    max_sequences: int,
    max_step_tokens: int,
) -> tuple[Decoder | EncoderDecoder | FusedDecoder, StepGraphs | None]:
    """The model over views of what is loaded, and on CUDA the graphs of a decoder's steps.

    An encoder-decoder runs the reference kernels on every device.

    Args:
        manifest: whose variants and experts.
        weights: parameter -> [R, ...], as `Residency.weights`.
        experts: one pool a layer.
        cache: keys and values.
        num_slots: resident slots.
        max_sequences: most sequences in a step.
        max_step_tokens: most tokens in a step.
    """
    config, device = manifest.config, cache.keys[0].device
    faces_of = [manifest.faces(layer)[1] for layer in range(config.num_layers)]
    faces_VLE = torch.tensor(
        [[faces[name] for faces in faces_of] for name in manifest.variant_names], device=device
    )
    if isinstance(config, EncoderDecoderConfig):
        return EncoderDecoder(config, weights, experts, faces_VLE, cache), None
    assert isinstance(config, DecoderConfig)
    parts = (config, weights, experts, faces_VLE, cache)
    if device.type != "cuda":
        return Decoder(*parts), None
    # Not before it is needed: this imports Triton, which a CPU build of torch lacks.
    from moeruntime.models.fused import FusedDecoder
    from moeruntime.models.step_graphs import StepGraphs

    model = FusedDecoder(*parts)
    return model, StepGraphs(
        model,
        num_slots=num_slots,
        max_sequences=max_sequences,
        max_step_tokens=max_step_tokens,
    )

"""The least that a step has to do: the bytes it must read, the operations it must perform."""

from __future__ import annotations

import math
from collections.abc import Sequence

from moeruntime.engine import Engine
from moeruntime.errors import UsageError
from moeruntime.families import DecoderConfig
from moeruntime.kv_cache import BLOCK_TOKENS, KVCache
from moeruntime.pack import WeightSource
from moeruntime.pack.manifest import Face

__all__ = [
    "decoder_config",
    "dense_bytes",
    "experts_bytes",
    "prompt_bytes",
    "prompt_flops",
    "step_bytes",
]

# From so many pairs an expert on, every expert meets some token in all likelihood.
MANY_PAIRS = 8


def decoder_config(source: WeightSource) -> DecoderConfig:
    """The architecture of what is measured.

    Raises:
        UsageError: it is none of those whose work is known here.
    """
    config = source.manifest.config
    if not isinstance(config, DecoderConfig):
        raise UsageError(
            f"{source.root}: moec bench measures decoder-only models; this is a "
            f"{source.manifest.family}"
        )
    return config


def step_bytes(
    engine: Engine, faces: Sequence[Sequence[Face]], *, variants: int, batch: int, context: int
) -> int:
    """Bytes that a decode step reads: experts, other weights, keys and values, each once.

    Args:
        engine: whose model.
        faces: of each layer, the experts that its tokens really go to.
        variants: different variants in the batch.
        batch: sequences.
        context: tokens of each of them.
    """
    config = decoder_config(engine.source)
    seen = context if config.sliding_window is None else min(context, config.sliding_window)
    token_bytes = KVCache.block_bytes(config, engine.dtype) // BLOCK_TOKENS
    return experts_bytes(engine, faces) + dense_bytes(engine, variants) + batch * seen * token_bytes


def experts_bytes(engine: Engine, faces: Sequence[Sequence[Face]]) -> int:
    """Bytes of some experts of each layer, as the engine stores them."""
    manifest = engine.source.manifest
    if manifest.nested is not None:
        return sum(manifest.face_bytes(layer, some) for layer, some in enumerate(faces))
    num_slots = sum(len({face.slot for face in some}) for some in faces)
    return num_slots * manifest.config.expert_numel * engine.dtype.itemsize


def dense_bytes(engine: Engine, variants: int) -> int:
    """Bytes of non-expert weights that a step of so many variants reads.

    What all variants have in common counts once. Of the input embedding a step reads next to
    nothing, unless it is the output embedding too.
    """
    manifest = engine.source.manifest
    config, shared = manifest.config, manifest.shared_roles()
    total = 0
    for role, shape in config.non_expert_shapes().items():
        if role != "embed_tokens" or config.tie_embeddings:
            total += math.prod(shape) * (1 if role in shared else variants)
    return total * engine.dtype.itemsize


def prompt_bytes(engine: Engine, num_tokens: int) -> int:
    """Bytes of weights that a prompt of one variant reads at least."""
    manifest = engine.source.manifest
    config, variant = manifest.config, manifest.variant_names[0]
    num_faces = config.num_experts
    if num_tokens * config.top_k < MANY_PAIRS * config.num_experts:
        num_faces = config.top_k
    faces = []
    for layer in range(config.num_layers):
        all_faces, faces_of = manifest.faces(layer)
        faces.append([all_faces[idx] for idx in faces_of[variant][:num_faces]])
    return experts_bytes(engine, faces) + dense_bytes(engine, 1)


def prompt_flops(config: DecoderConfig, num_tokens: int) -> int:
    """Operations of a prompt and its first new token: two for each active weight and token.

    Attention sees each token and those before it; logits are the last token's alone.
    """
    head_numel = config.vocab_size * config.hidden_size
    shapes = config.non_expert_shapes()
    dense = sum(
        math.prod(shape)
        for role, shape in shapes.items()
        if role.startswith("layers.") and len(shape) > 1
    )
    active = dense + config.num_layers * config.top_k * config.expert_numel
    window = config.sliding_window or num_tokens
    pairs = sum(min(token + 1, window) for token in range(num_tokens))
    attention = 4 * config.num_layers * config.num_heads * config.head_dim * pairs
    return 2 * (active * num_tokens + head_numel) + attention

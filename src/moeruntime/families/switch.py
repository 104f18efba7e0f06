"""Switch Transformer: T5's two stacks, ReLU experts without a gate, one expert a token.

The token's expert is the likeliest after a float32 softmax, and what it returns is multiplied by
that probability (Fedus et al. 2021, https://arxiv.org/abs/2101.03961).
"""

from __future__ import annotations

from moeruntime.families.base import MAX_DIM, Family, ModelConfig
from moeruntime.families.encoder_decoder import EncoderDecoderConfig
from moeruntime.strict_json import Fields

__all__ = ["SWITCH"]

MAX_CONTEXT = 1024
"""Relative positions set no limit, but an engine needs one, to plan its memory. Published models
were trained on half of it."""


def _parse_config(source: Fields) -> ModelConfig:
    for key, default in (("feed_forward_proj", "relu"), ("dense_act_fn", "relu")):
        if (found := source.text(key, default)) != "relu":
            source.fail(f"{key} {ascii(found[:40])} is not implemented for Switch; 'relu' is")
    for key in ("router_bias", "router_ignore_padding_tokens"):
        if source.boolean(key, False):
            source.fail(f"field '{key}' is true, which is not implemented; false is")
    if not source.boolean("is_encoder_decoder", True):
        source.fail("field 'is_encoder_decoder' is false, but Switch models are")
    encoder_blocks = source.integer("num_layers", 1, 4096)
    decoder_blocks = source.integer("num_decoder_layers", 1, 4096, encoder_blocks)
    pad_id = source.integer("pad_token_id", 0, MAX_DIM, 0)
    config = EncoderDecoderConfig(
        hidden_size=source.integer("d_model", 1, MAX_DIM),
        intermediate_size=source.integer("d_ff", 1, MAX_DIM),
        num_heads=source.integer("num_heads", 1, MAX_DIM),
        head_dim=source.integer("d_kv", 1, MAX_DIM),
        num_experts=source.integer("num_experts", 1, 65_536),
        vocab_size=source.integer("vocab_size", 1, MAX_DIM),
        max_context=MAX_CONTEXT,
        rms_norm_eps=source.number("layer_norm_epsilon", 0.0, 1.0, 1e-6),
        tie_embeddings=source.boolean("tie_word_embeddings", True),
        encoder_blocks=encoder_blocks,
        decoder_blocks=decoder_blocks,
        encoder_sparse_step=_sparse_step(source, "encoder", encoder_blocks),
        decoder_sparse_step=_sparse_step(source, "decoder", decoder_blocks),
        expert_capacity=source.integer("expert_capacity", 1, 2**40, 64),
        num_buckets=source.integer("relative_attention_num_buckets", 1, MAX_DIM, 32),
        max_distance=source.integer("relative_attention_max_distance", 1, MAX_DIM, 128),
        decoder_start_id=source.integer("decoder_start_token_id", 0, MAX_DIM, pad_id),
    )
    config.check(source)
    return config


def _sparse_step(source: Fields, stack: str, num_blocks: int) -> int:
    """Every so many blocks one has experts; stated, or from how many there are to be."""
    num_sparse = source.integer(f"num_sparse_{stack}_layers", 0, MAX_DIM, 3)
    step = num_blocks // num_sparse if num_sparse else num_blocks
    return source.integer(f"{stack}_sparse_step", 0, MAX_DIM, step)


def _attention(block: str, roles: str, names: str) -> dict[str, str]:
    return {f"{roles}{one}_proj": f"{block}.{names}.{one}.weight" for one in "qkvo"}


def _feed_forward(stack: str, place: int) -> dict[str, str]:
    """Names of what follows attention: sublayer 1 of an encoder's block, 2 of a decoder's."""
    block = f"{stack}.block.*.layer.{place}"
    return {
        f"{stack}.*.post_attention_norm": f"{block}.layer_norm.weight",
        f"{stack}.*.router": f"{block}.mlp.router.classifier.weight",
        f"{stack}.*.up_proj": f"{block}.mlp.wi.weight",
        f"{stack}.*.down_proj": f"{block}.mlp.wo.weight",
    }


def _self_attention(stack: str) -> dict[str, str]:
    block = f"{stack}.block.*.layer.0"
    return {
        f"{stack}.*.input_norm": f"{block}.layer_norm.weight",
        f"{stack}.*.position_bias": f"{block}.SelfAttention.relative_attention_bias.weight",
        **_attention(block, f"{stack}.*.", "SelfAttention"),
    }


SWITCH = Family(
    model_type="switch_transformers",
    config_type=EncoderDecoderConfig,
    parse_config=_parse_config,
    config_keys={
        "hidden_size": "d_model",
        "intermediate_size": "d_ff",
        "head_dim": "d_kv",
        "rms_norm_eps": "layer_norm_epsilon",
        "tie_embeddings": "tie_word_embeddings",
        "encoder_blocks": "num_layers",
        "decoder_blocks": "num_decoder_layers",
        "num_buckets": "relative_attention_num_buckets",
        "max_distance": "relative_attention_max_distance",
        "decoder_start_id": "decoder_start_token_id",
    },
    non_expert_names={
        "embed_tokens": "shared.weight",
        **_self_attention("encoder"),
        **_feed_forward("encoder", 1),
        "encoder.final_norm": "encoder.final_layer_norm.weight",
        **_self_attention("decoder"),
        "decoder.*.cross_norm": "decoder.block.*.layer.1.layer_norm.weight",
        **_attention("decoder.block.*.layer.1", "decoder.*.cross_", "EncDecAttention"),
        **_feed_forward("decoder", 2),
        "final_norm": "decoder.final_layer_norm.weight",
        "lm_head": "lm_head.weight",
    },
    expert_names={
        f"{stack}.*": {
            role: f"{stack}.block.*.layer.{place}.mlp.experts.expert_{{expert}}.{name}.weight"
            for role, name in (("up_proj", "wi"), ("down_proj", "wo"))
        }
        for stack, place in (("encoder", 1), ("decoder", 2))
    },
    embedding_copies=("encoder.embed_tokens.weight", "decoder.embed_tokens.weight"),
    # Early conversions gave cross-attention a bias that is never read.
    ignored_suffixes=(".EncDecAttention.relative_attention_bias.weight",),
)

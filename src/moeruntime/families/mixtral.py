"""Mixtral: w1, w3, w2 experts under block_sparse_moe; fp32 softmax, top-k, always renormalised."""

from __future__ import annotations

from moeruntime.families.base import MAX_DIM, Family, ModelConfig
from moeruntime.families.decoder import DecoderConfig
from moeruntime.strict_json import Fields

__all__ = ["MIXTRAL"]


def _parse_config(source: Fields) -> ModelConfig:
    hidden_size = source.integer("hidden_size", 1, MAX_DIM)
    num_heads = source.integer("num_attention_heads", 1, MAX_DIM)
    if not source.has("head_dim") and hidden_size % num_heads:
        source.fail(f"hidden_size {hidden_size} is not a multiple of {num_heads} attention heads")
    activation = source.text("hidden_act", "silu")
    if activation != "silu":
        source.fail(
            f"hidden_act {ascii(activation[:40])} is not implemented for Mixtral; 'silu' is"
        )
    config = DecoderConfig(
        hidden_size=hidden_size,
        intermediate_size=source.integer("intermediate_size", 1, MAX_DIM),
        num_layers=source.integer("num_hidden_layers", 1, 4096),
        num_heads=num_heads,
        num_kv_heads=source.integer("num_key_value_heads", 1, MAX_DIM, num_heads),
        head_dim=source.integer("head_dim", 1, MAX_DIM, max(1, hidden_size // num_heads)),
        num_experts=source.integer("num_local_experts", 1, 65_536, alias="num_experts"),
        top_k=source.integer("num_experts_per_tok", 1, 65_536, 2),
        vocab_size=source.integer("vocab_size", 1, MAX_DIM),
        max_context=source.integer("max_position_embeddings", 1, 2**40),
        rms_norm_eps=source.number("rms_norm_eps", 0.0, 1.0, 1e-5),
        rope_theta=_rope_theta(source),
        sliding_window=(
            source.integer("sliding_window", 1, 2**40) if source.has("sliding_window") else None
        ),
        tie_embeddings=source.boolean("tie_word_embeddings", False),
    )
    config.check(source)
    return config


def _rope_theta(source: Fields) -> float:
    """Read the rotary base; transformers v5 nests it, v4 kept it (and `rope_scaling`) on top."""
    default = 1e6
    if source.has("rope_parameters"):
        rope = source.child("rope_parameters")
        if (kind := rope.text("rope_type", "default")) != "default":
            rope.fail(f"rope_type {ascii(kind[:40])} is not implemented; 'default' is")
        return rope.number("rope_theta", 1.0, 1e12, default)
    if source.has("rope_scaling"):
        source.fail("field 'rope_scaling' is not implemented; remove it if it is a no-op")
    return source.number("rope_theta", 1.0, 1e12, default)


MIXTRAL = Family(
    model_type="mixtral",
    config_type=DecoderConfig,
    parse_config=_parse_config,
    config_keys={
        "num_layers": "num_hidden_layers",
        "num_heads": "num_attention_heads",
        "num_kv_heads": "num_key_value_heads",
        "num_experts": "num_local_experts",
        "top_k": "num_experts_per_tok",
        "max_context": "max_position_embeddings",
        "tie_embeddings": "tie_word_embeddings",
    },
    non_expert_names={
        "embed_tokens": "model.embed_tokens.weight",
        "layers.*.input_norm": "model.layers.*.input_layernorm.weight",
        "layers.*.q_proj": "model.layers.*.self_attn.q_proj.weight",
        "layers.*.k_proj": "model.layers.*.self_attn.k_proj.weight",
        "layers.*.v_proj": "model.layers.*.self_attn.v_proj.weight",
        "layers.*.o_proj": "model.layers.*.self_attn.o_proj.weight",
        "layers.*.post_attention_norm": "model.layers.*.post_attention_layernorm.weight",
        "layers.*.router": "model.layers.*.block_sparse_moe.gate.weight",
        "final_norm": "model.norm.weight",
        "lm_head": "lm_head.weight",
    },
    expert_names={
        "layers.*": {
            "gate_proj": "model.layers.*.block_sparse_moe.experts.{expert}.w1.weight",
            "up_proj": "model.layers.*.block_sparse_moe.experts.{expert}.w3.weight",
            "down_proj": "model.layers.*.block_sparse_moe.experts.{expert}.w2.weight",
        }
    },
    fused_names={
        "gate_up_proj": "model.layers.*.block_sparse_moe.experts.gate_up_proj",
        "down_proj": "model.layers.*.block_sparse_moe.experts.down_proj",
    },
    prefixes=(".block_sparse_moe.", ".mlp."),
    ignored_suffixes=(".rotary_emb.inv_freq",),
)

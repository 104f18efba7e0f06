"""Decoder-only architectures: every block attends with rotary positions and has experts."""

from __future__ import annotations

from dataclasses import dataclass, field

from moeruntime.families.base import Activation, ModelConfig
from moeruntime.strict_json import Fields

__all__ = ["DecoderConfig", "layer_role"]


@dataclass(frozen=True, slots=True)
class DecoderConfig(ModelConfig):
    """A decoder's architecture; the fields of ModelConfig come first."""

    # `field()` keeps the base's properties from being taken for defaults.
    num_layers: int = field()
    num_kv_heads: int = field()
    top_k: int = field()
    rope_theta: float
    sliding_window: int | None

    @property
    def activation(self) -> Activation:
        return "swiglu"

    @property
    def blocks(self) -> tuple[str, ...]:
        return tuple(f"layers.{layer}" for layer in range(self.num_layers))

    @property
    def layers(self) -> tuple[str, ...]:
        return self.blocks

    @property
    def num_cached_blocks(self) -> int:
        return self.num_layers

    def non_expert_shapes(self) -> dict[str, tuple[int, ...]]:
        """Shape of every non-expert role, in the order a forward pass meets them."""
        hidden, heads_dim = self.hidden_size, self.num_heads * self.head_dim
        kv_dim = self.num_kv_heads * self.head_dim
        shapes: dict[str, tuple[int, ...]] = {"embed_tokens": (self.vocab_size, hidden)}
        for layer in range(self.num_layers):
            shapes |= {
                layer_role(layer, "input_norm"): (hidden,),
                layer_role(layer, "q_proj"): (heads_dim, hidden),
                layer_role(layer, "k_proj"): (kv_dim, hidden),
                layer_role(layer, "v_proj"): (kv_dim, hidden),
                layer_role(layer, "o_proj"): (hidden, heads_dim),
                layer_role(layer, "post_attention_norm"): (hidden,),
                layer_role(layer, "router"): (self.num_experts, hidden),
            }
        shapes["final_norm"] = (hidden,)
        if not self.tie_embeddings:
            shapes["lm_head"] = (self.vocab_size, hidden)
        return shapes

    def check(self, source: Fields) -> None:
        """Reject combinations no model can have, in the name of the document they came from."""
        ModelConfig.check(self, source)
        if self.num_heads % self.num_kv_heads:
            source.fail(
                f"{self.num_heads} attention heads cannot share {self.num_kv_heads} key-value heads"
            )
        if self.head_dim % 2:
            source.fail(f"head_dim {self.head_dim} is odd; rotary embedding needs pairs")


def layer_role(layer: int, role: str) -> str:
    """The full role of a layer's tensor, such as "layers.3.q_proj"."""
    return f"layers.{layer}.{role}"

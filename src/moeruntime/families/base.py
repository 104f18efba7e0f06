"""What a family is: a normalised config, and the names its checkpoints give to the roles.

Everything past this package speaks of *roles* ("layers.3.q_proj", "gate_proj"), never of a
family's tensor names. Shapes use H (hidden), I (intermediate), E (experts), V (vocabulary).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, fields

from moeruntime.strict_json import Fields

__all__ = ["EXPERT_ROLES", "Family", "ModelConfig", "layer_role"]

EXPERT_ROLES = ("gate_proj", "up_proj", "down_proj")

# Larger than any model in sight, small enough that products of them stay in 64 bits.
MAX_DIM = 2**20


@dataclass(frozen=True, slots=True)
class ModelConfig:
    """A decoder's architecture, normalised once; all variants of a pack share it."""

    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    num_experts: int
    top_k: int
    vocab_size: int
    max_context: int
    rms_norm_eps: float
    rope_theta: float
    sliding_window: int | None
    tie_embeddings: bool

    @property
    def expert_shapes(self) -> dict[str, tuple[int, int]]:
        """[out, in] of each expert role."""
        wide = (self.intermediate_size, self.hidden_size)
        return {"gate_proj": wide, "up_proj": wide, "down_proj": wide[::-1]}

    @property
    def expert_numel(self) -> int:
        """Weights of one expert: 3 * H * I."""
        return sum(math.prod(shape) for shape in self.expert_shapes.values())

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

    def to_json(self) -> dict[str, object]:
        """Plain values, one key a field."""
        return asdict(self)

    @classmethod
    def from_json(cls, source: Fields) -> ModelConfig:
        """Read what `to_json` wrote, checking every range; unknown keys are errors."""
        window = (
            source.integer("sliding_window", 1, 2**40) if source.has("sliding_window") else None
        )
        source.raw("sliding_window")
        sizes = {
            field.name: source.integer(field.name, 1, MAX_DIM)
            for field in fields(cls)
            if field.type == "int" and field.name != "max_context"
        }
        config = cls(
            **sizes,
            max_context=source.integer("max_context", 1, 2**40),
            rms_norm_eps=source.number("rms_norm_eps", 0.0, 1.0),
            rope_theta=source.number("rope_theta", 1.0, 1e12),
            sliding_window=window,
            tie_embeddings=source.boolean("tie_embeddings"),
        )
        source.done()
        config.check(source)
        return config

    def check(self, source: Fields) -> None:
        """Reject combinations no model can have, in the name of the document they came from."""
        if self.top_k > self.num_experts:
            source.fail(f"top_k {self.top_k} is more than the {self.num_experts} experts")
        if self.num_heads % self.num_kv_heads:
            source.fail(
                f"{self.num_heads} attention heads cannot share {self.num_kv_heads} key-value heads"
            )
        if self.head_dim % 2:
            source.fail(f"head_dim {self.head_dim} is odd; rotary embedding needs pairs")


def layer_role(layer: int, role: str) -> str:
    """The full role of a layer's tensor, such as "layers.3.q_proj"."""
    return f"layers.{layer}.{role}"


@dataclass(frozen=True)
class Family:
    """One architecture's on-disk conventions.

    Attributes:
        model_type: the key in config.json.
        parse_config: config.json -> ModelConfig, refusing what the runtime does not implement.
        global_names: role -> tensor name, for tensors outside the layers.
        layer_names: role -> tensor name with {layer}.
        expert_names: expert role -> tensor name with {layer} and {expert}.
        fused_names: "gate_up_proj" [E, 2I, H] and "down_proj" [E, H, I] -> name with {layer}.
        prefixes: old spelling -> new spelling of a name part; both are read.
        ignored_suffixes: buffers that some checkpoints carry and no forward pass needs.
    """

    model_type: str
    parse_config: Callable[[Fields], ModelConfig]
    global_names: Mapping[str, str]
    layer_names: Mapping[str, str]
    expert_names: Mapping[str, str]
    fused_names: Mapping[str, str]
    prefixes: tuple[str, str]
    ignored_suffixes: tuple[str, ...] = ()

    def non_expert_name(self, role: str) -> str:
        """A role's tensor name as written on export."""
        if role in self.global_names:
            return self.global_names[role]
        _, layer, name = role.split(".")
        return self.layer_names[name].format(layer=layer)

    def expert_name(self, layer: int, expert: int, role: str) -> str:
        """An expert tensor's name as written on export, one tensor an expert."""
        return self.expert_names[role].format(layer=layer, expert=expert)

    def fused_name(self, layer: int, role: str) -> str:
        """The name of a whole layer's experts in one tensor."""
        return self.fused_names[role].format(layer=layer)

    def spellings(self, name: str) -> Iterator[str]:
        """The names under which a checkpoint may carry `name`."""
        yield name
        old, new = self.prefixes
        if old in name:
            yield name.replace(old, new)

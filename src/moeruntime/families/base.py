"""What a family is: a normalised config, and the names its checkpoints give to the roles.

Everything past this package speaks of *roles* ("layers.3.q_proj", "gate_proj"), never of a
family's tensor names. A *layer* is one that has experts, counted in the order of a forward pass; a
*block* is any of the transformer's, with experts or without. Where all blocks have experts the two
are the same. Shapes use H (hidden), I (intermediate), E (experts), V (vocabulary).
"""

from __future__ import annotations

import math
import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, field, fields
from typing import Any, Literal, Self

from moeruntime.strict_json import Fields

__all__ = ["Activation", "Family", "ModelConfig"]

# Larger than any model in sight, small enough that products of them stay in 64 bits.
MAX_DIM = 2**20

Activation = Literal["swiglu", "relu"]
"""What an expert does between its products: silu(gate) * up, or relu(up) without a gate."""

_RANGES: dict[str, tuple[float, float]] = {
    "max_context": (1, 2**40),
    "sliding_window": (1, 2**40),
    "expert_capacity": (1, 2**40),
    "decoder_start_id": (0, MAX_DIM),
    "encoder_blocks": (1, 4096),
    "decoder_blocks": (1, 4096),
    "encoder_sparse_step": (0, MAX_DIM),
    "decoder_sparse_step": (0, MAX_DIM),
    "rms_norm_eps": (0.0, 1.0),
    "rope_theta": (1.0, 1e12),
}
"""Of fields in a manifest; integers that are not here are in 1..MAX_DIM."""


@dataclass(frozen=True, slots=True)
class ModelConfig(ABC):
    """An architecture, normalised once; all variants of a pack share it.

    Subclasses add fields, and say which tensors there are.
    """

    hidden_size: int
    intermediate_size: int
    num_heads: int
    head_dim: int
    num_experts: int
    vocab_size: int
    max_context: int
    rms_norm_eps: float
    tie_embeddings: bool

    @property
    @abstractmethod
    def num_layers(self) -> int:
        """Layers that have experts."""

    @property
    @abstractmethod
    def num_kv_heads(self) -> int:
        """Heads of keys and values."""

    @property
    @abstractmethod
    def top_k(self) -> int:
        """Experts of a token."""

    @property
    @abstractmethod
    def activation(self) -> Activation:
        """What an expert does between its products."""

    @property
    @abstractmethod
    def blocks(self) -> tuple[str, ...]:
        """Prefix of every block's roles, such as "layers.3", in the order of a forward pass."""

    @property
    @abstractmethod
    def layers(self) -> tuple[str, ...]:
        """Those of the blocks that have experts."""

    @property
    @abstractmethod
    def num_cached_blocks(self) -> int:
        """Blocks whose keys and values are cached."""

    @property
    def has_encoder(self) -> bool:
        """Whether prompts are read by an encoder, and a decoder begins with a token of its own."""
        return False

    @property
    def cached_context(self) -> int:
        """Tokens whose keys and values one sequence may have in the cache."""
        return self.max_context

    @abstractmethod
    def non_expert_shapes(self) -> dict[str, tuple[int, ...]]:
        """Shape of every non-expert role, in the order a forward pass meets them."""

    @property
    def gated(self) -> bool:
        """Whether experts have a gate_proj."""
        return self.activation == "swiglu"

    @property
    def expert_shapes(self) -> dict[str, tuple[int, int]]:
        """[out, in] of each expert role."""
        wide = (self.intermediate_size, self.hidden_size)
        gate = {"gate_proj": wide} if self.gated else {}
        return gate | {"up_proj": wide, "down_proj": wide[::-1]}

    @property
    def part_shapes(self) -> dict[str, tuple[int, int]]:
        """[rows, columns] of the two matrices that an expert is stored as.

        `gate_up` is all that the input is multiplied by, gate_proj's rows first if there are any.
        """
        rows = (1 + self.gated) * self.intermediate_size
        return {
            "gate_up": (rows, self.hidden_size),
            "down": (self.hidden_size, self.intermediate_size),
        }

    def part_columns(self, part: str) -> slice:
        """Where a part lies in an expert's flattened weights: gate_proj | up_proj | down_proj."""
        split = math.prod(self.part_shapes["gate_up"])
        return slice(0, split) if part == "gate_up" else slice(split, self.expert_numel)

    @property
    def expert_numel(self) -> int:
        """Weights of one expert."""
        return sum(math.prod(shape) for shape in self.expert_shapes.values())

    def to_json(self) -> dict[str, object]:
        """Plain values, one key a field."""
        return asdict(self)

    @classmethod
    def from_json(cls, source: Fields) -> Self:
        """Read what `to_json` wrote, checking every range; unknown keys are errors."""
        values: dict[str, Any] = {
            one.name: _read(source, one.name, str(one.type)) for one in fields(cls)
        }
        config = cls(**values)
        source.done()
        config.check(source)
        return config

    def check(self, source: Fields) -> None:
        """Reject combinations no model can have, in the name of the document they came from."""
        if self.top_k > self.num_experts:
            source.fail(f"top_k {self.top_k} is more than the {self.num_experts} experts")


def _read(source: Fields, key: str, kind: str) -> bool | float | None:
    low, high = _RANGES.get(key, (1, MAX_DIM))
    if kind == "bool":
        return source.boolean(key)
    if kind == "float":
        return source.number(key, low, high)
    if kind == "int | None" and source.raw(key) is None:
        return None
    return source.integer(key, int(low), int(high))


@dataclass(frozen=True)
class Family:
    """One architecture's on-disk conventions.

    Attributes:
        model_type: the key in config.json.
        config_type: what its configs are normalised to.
        parse_config: config.json -> ModelConfig, refusing what the runtime does not implement.
        config_keys: field of the config -> the key of config.json it comes from, where that has
            another name.
        non_expert_names: role -> tensor name; in both "*" stands for a block's number.
        expert_names: block -> expert role -> tensor name with "*", and {expert} for its number.
        fused_names: "gate_up_proj" [E, 2I, H] and "down_proj" [E, H, I] -> name with "*", where
            experts of a layer may come in one piece.
        prefixes: old spelling -> new spelling of a name part; both are read.
        embedding_copies: names under which a checkpoint may repeat its embedding.
        ignored_suffixes: buffers that some checkpoints carry and no forward pass needs.
    """

    model_type: str
    config_type: type[ModelConfig]
    parse_config: Callable[[Fields], ModelConfig]
    config_keys: Mapping[str, str]
    non_expert_names: Mapping[str, str]
    expert_names: Mapping[str, Mapping[str, str]]
    fused_names: Mapping[str, str] = field(default_factory=dict)
    prefixes: tuple[str, str] | None = None
    embedding_copies: tuple[str, ...] = ()
    ignored_suffixes: tuple[str, ...] = ()

    def non_expert_name(self, role: str) -> str:
        """A role's tensor name as written on export."""
        pattern, number = _numbered(role)
        return self.non_expert_names[pattern].replace("*", number)

    def expert_name(self, block: str, expert: int, role: str) -> str:
        """An expert tensor's name as written on export, one tensor an expert."""
        pattern, number = _numbered(block)
        return self.expert_names[pattern][role].replace("*", number).format(expert=expert)

    def fused_name(self, block: str, role: str) -> str:
        """The name of a whole layer's experts in one tensor."""
        return self.fused_names[role].replace("*", _numbered(block)[1])

    def spellings(self, name: str) -> Iterator[str]:
        """The names under which a checkpoint may carry `name`."""
        yield name
        if self.prefixes is not None and self.prefixes[0] in name:
            yield name.replace(*self.prefixes)


def _numbered(role: str) -> tuple[str, str]:
    """A role with "*" in place of its block's number, and that number."""
    match = re.search(r"\d+", role)
    number = match[0] if match else ""
    return role.replace(number, "*", 1) if match else role, number

"""Encoder-decoder architectures: relative positions, cross-attention, blocks with experts or not.

Legend as in `base`. Roles are "encoder.B.NAME" and "decoder.B.NAME", B counting each stack's blocks
from 0.
"""

from __future__ import annotations

from dataclasses import dataclass

from moeruntime.families.base import Activation, ModelConfig
from moeruntime.strict_json import Fields

__all__ = ["EncoderDecoderConfig"]


@dataclass(frozen=True, slots=True)
class EncoderDecoderConfig(ModelConfig):
    """Two stacks; the fields of ModelConfig come first. `max_context` holds for each stack.

    Attributes:
        encoder_blocks, decoder_blocks: blocks of each stack.
        encoder_sparse_step, decoder_sparse_step: block b has experts where b % step is 1, or the
            step is 1; with 0 none has.
        expert_capacity: tokens of one sequence that an expert of a layer takes in one pass; later
            ones pass it by.
        num_buckets, max_distance: of the relative position bias.
        decoder_start_id: the token that a decoder begins with.
    """

    encoder_blocks: int
    decoder_blocks: int
    encoder_sparse_step: int
    decoder_sparse_step: int
    expert_capacity: int
    num_buckets: int
    max_distance: int
    decoder_start_id: int

    @property
    def num_layers(self) -> int:
        return len(self.layers)

    @property
    def num_kv_heads(self) -> int:
        return self.num_heads

    @property
    def top_k(self) -> int:
        return 1

    @property
    def activation(self) -> Activation:
        return "relu"

    @property
    def encoder(self) -> tuple[str, ...]:
        """Prefixes of the encoder's blocks."""
        return tuple(f"encoder.{number}" for number in range(self.encoder_blocks))

    @property
    def decoder(self) -> tuple[str, ...]:
        """Prefixes of the decoder's blocks."""
        return tuple(f"decoder.{number}" for number in range(self.decoder_blocks))

    @property
    def blocks(self) -> tuple[str, ...]:
        return self.encoder + self.decoder

    @property
    def layers(self) -> tuple[str, ...]:
        return tuple(
            block
            for stack, step in (
                (self.encoder, self.encoder_sparse_step),
                (self.decoder, self.decoder_sparse_step),
            )
            for number, block in enumerate(stack)
            if step == 1 or (step and number % step == 1)
        )

    @property
    def num_cached_blocks(self) -> int:
        return self.decoder_blocks

    @property
    def has_encoder(self) -> bool:
        return True

    @property
    def cached_context(self) -> int:
        # The encoder's tokens, as the decoder attends to them, and the decoder's own.
        return 2 * self.max_context

    def non_expert_shapes(self) -> dict[str, tuple[int, ...]]:
        """Shape of every non-expert role, in the order a forward pass meets them."""
        hidden, sparse = self.hidden_size, set(self.layers)
        shapes: dict[str, tuple[int, ...]] = {"embed_tokens": (self.vocab_size, hidden)}
        for stack, kinds in ((self.encoder, ("",)), (self.decoder, ("", "cross_"))):
            shapes[f"{stack[0]}.position_bias"] = (self.num_buckets, self.num_heads)
            for block in stack:
                for kind in kinds:
                    shapes |= self._attention_shapes(block, kind)
                shapes[f"{block}.post_attention_norm"] = (hidden,)
                if block in sparse:
                    shapes[f"{block}.router"] = (self.num_experts, hidden)
                else:
                    shapes[f"{block}.up_proj"] = (self.intermediate_size, hidden)
                    shapes[f"{block}.down_proj"] = (hidden, self.intermediate_size)
            if kinds == ("",):
                shapes["encoder.final_norm"] = (hidden,)
        shapes["final_norm"] = (hidden,)
        if not self.tie_embeddings:
            shapes["lm_head"] = (self.vocab_size, hidden)
        return shapes

    def _attention_shapes(self, block: str, kind: str) -> dict[str, tuple[int, ...]]:
        hidden, heads_dim = self.hidden_size, self.num_heads * self.head_dim
        inner = {f"{block}.{kind}{name}_proj": (heads_dim, hidden) for name in "qkv"}
        return {
            f"{block}.{kind or 'input_'}norm": (hidden,),
            **inner,
            f"{block}.{kind}o_proj": (hidden, heads_dim),
        }

    def check(self, source: Fields) -> None:
        """Reject combinations no model can have, in the name of the document they came from."""
        ModelConfig.check(self, source)
        if not self.layers:
            source.fail(
                f"no block has experts: sparse steps are {self.encoder_sparse_step} of "
                f"{self.encoder_blocks} encoder blocks and {self.decoder_sparse_step} of "
                f"{self.decoder_blocks} decoder blocks"
            )
        # Half of the encoder's buckets are for either direction, half of those for single steps.
        if self.num_buckets % 4 or self.max_distance <= self.num_buckets // 2:
            source.fail(
                f"{self.num_buckets} buckets for distances up to {self.max_distance} of the "
                "relative position bias are not implemented: the first must be a multiple of 4 "
                "and less than twice the second"
            )
        if self.decoder_start_id >= self.vocab_size:
            source.fail(
                f"decoder start token {self.decoder_start_id} is outside the vocabulary of "
                f"{self.vocab_size}"
            )

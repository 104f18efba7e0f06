"""An encoder-decoder mixture-of-experts transformer over shared experts and resident variants.

As in `decoder`, the model is the order of its operations, over views. A step runs the encoder over
the sources that are new, leaves each decoder block's keys and values of them in the cache, and then
runs the decoder, whose own keys and values lie in the same cache in blocks of their own.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from moeruntime import kernels
from moeruntime.families import EncoderDecoderConfig
from moeruntime.kernels import TokenGroup
from moeruntime.kv_cache import KVCache
from moeruntime.models.batch import Batch
from moeruntime.models.experts import ExpertPool
from moeruntime.models.layers import rms_norm
from moeruntime.models.moe import over_capacity, route_first
from moeruntime.models.padded import PaddedAttention, RelativePositions

__all__ = ["EncoderDecoder"]


class EncoderDecoder:
    """The forward pass. It owns no memory but the views it was given."""

    def __init__(
        self,
        config: EncoderDecoderConfig,
        weights: Mapping[str, Tensor],
        experts: Sequence[ExpertPool],
        faces_VLE: Tensor,
        cache: KVCache,
    ) -> None:
        """Bind views; arguments are `Decoder`'s."""
        self.config = config
        self.weights = weights
        self.experts = experts
        self.faces_VLE = faces_VLE
        self.cache = cache
        self._layer_of = {block: layer for layer, block in enumerate(config.layers)}

    @torch.inference_mode()
    def forward(self, batch: Batch, before_layer: Callable[[int], None] | None = None) -> Tensor:
        """Run one step and write its keys and values to the cache.

        Args:
            batch: the decoder's tokens, and in `sources` what the encoder has to read before.
            before_layer: called before weights are used that may still be on their way: with -1
                for the embedding, each block's number, and the number of blocks for the head.

        Returns:
            The decoder's hidden_TH after the final norm, in the order of the batch.
        """
        config = self.config
        before_layer = before_layer or (lambda layer: None)
        before_layer(-1)
        encoded_SH = None if batch.sources is None else self._encode(batch.sources, before_layer)
        hidden_TH = self.weights["embed_tokens"][batch.slot_T, batch.token_ids_T]
        before_layer(config.encoder_blocks)
        own = self._attention(batch, config.decoder[0], causal=True)
        assert batch.sources_on_device is not None
        cross = PaddedAttention(
            batch.source_spans, batch.sources_on_device, num_heads=config.num_heads
        )
        for number, block in enumerate(config.decoder):
            before_layer(config.encoder_blocks + number)
            hidden_TH = hidden_TH + self._self_attention(number, hidden_TH, batch, own)
            if encoded_SH is not None and batch.sources is not None:
                self._keep_encoded(number, encoded_SH, batch.sources)
            hidden_TH = hidden_TH + self._cross_attention(number, hidden_TH, batch, cross)
            hidden_TH = hidden_TH + self._feed_forward(block, hidden_TH, batch)
        before_layer(len(config.blocks))
        return self._norm(hidden_TH, "final_norm", batch)

    @torch.inference_mode()
    def logits(self, hidden_NH: Tensor, groups: Sequence[TokenGroup]) -> Tensor:
        """Vocabulary logits [N, V] in float32 of rows that `groups` assign to resident slots."""
        if not self.config.tie_embeddings:
            return kernels.grouped_linear(hidden_NH, self.weights["lm_head"], groups).float()
        # An embedding is as large as inputs want it; as a head it is scaled down (as T5's).
        scaled_NH = hidden_NH * self.config.hidden_size**-0.5
        return kernels.grouped_linear(scaled_NH, self.weights["embed_tokens"], groups).float()

    def _encode(self, sources: Batch, before_layer: Callable[[int], None]) -> Tensor:
        """What the encoder makes of whole sources: hidden_SH after its final norm."""
        config = self.config
        hidden_SH = self.weights["embed_tokens"][sources.slot_T, sources.token_ids_T]
        before_layer(0)
        attend = self._attention(sources, config.encoder[0], causal=False)
        for number, block in enumerate(config.encoder):
            before_layer(number)
            normed_SH = self._norm(hidden_SH, f"{block}.input_norm", sources)
            query, key, value = self._heads(normed_SH, f"{block}.qkv_proj", sources).chunk(3, dim=1)
            attended = attend(query, key, value)
            hidden_SH = hidden_SH + self._project(attended, f"{block}.o_proj", sources)
            hidden_SH = hidden_SH + self._feed_forward(block, hidden_SH, sources)
        return self._norm(hidden_SH, "encoder.final_norm", sources)

    def _self_attention(
        self, number: int, x_TH: Tensor, batch: Batch, attend: PaddedAttention
    ) -> Tensor:
        block, keys, values = self._cached(number)
        normed_TH = self._norm(x_TH, f"{block}.input_norm", batch)
        query, key, value = self._heads(normed_TH, f"{block}.qkv_proj", batch).chunk(3, dim=1)
        kernels.write_cache(keys, batch.cache_rows_T, key)
        kernels.write_cache(values, batch.cache_rows_T, value)
        attended = attend(query, keys.flatten(0, 1), values.flatten(0, 1))
        return self._project(attended, f"{block}.o_proj", batch)

    def _keep_encoded(self, number: int, encoded_SH: Tensor, sources: Batch) -> None:
        """Write one decoder block's keys and values of new sources to the cache."""
        block, keys, values = self._cached(number)
        key, value = self._heads(encoded_SH, f"{block}.cross_kv_proj", sources).chunk(2, dim=1)
        kernels.write_cache(keys, sources.cache_rows_T, key)
        kernels.write_cache(values, sources.cache_rows_T, value)

    def _cross_attention(
        self, number: int, x_TH: Tensor, batch: Batch, attend: PaddedAttention
    ) -> Tensor:
        block, keys, values = self._cached(number)
        normed_TH = self._norm(x_TH, f"{block}.cross_norm", batch)
        query = self._heads(normed_TH, f"{block}.cross_q_proj", batch)
        attended = attend(query, keys.flatten(0, 1), values.flatten(0, 1))
        return self._project(attended, f"{block}.cross_o_proj", batch)

    def _feed_forward(self, block: str, x_TH: Tensor, batch: Batch) -> Tensor:
        """A block's experts or, where it has none, its dense layer."""
        normed_TH = self._norm(x_TH, f"{block}.post_attention_norm", batch)
        layer = self._layer_of.get(block)
        if layer is not None:
            return self._experts(layer, f"{block}.router", normed_TH, batch)
        inner_TI = self._project(normed_TH, f"{block}.up_proj", batch)
        inner_TI = kernels.activate(inner_TI, self.config.activation)
        return self._project(inner_TI, f"{block}.down_proj", batch)

    def _experts(self, layer: int, router: str, x_TH: Tensor, batch: Batch) -> Tensor:
        config = self.config
        # The router alone computes in float32, as the paper's selective precision has it.
        logits_TE = kernels.grouped_linear(x_TH.float(), self.weights[router].float(), batch.groups)
        experts_T, weights_T = route_first(logits_TE)
        faces_TE = self.faces_VLE[batch.variant_T, layer]
        out_TH = kernels.expert_mlp(
            x_TH,
            faces_TE.gather(1, experts_T[:, None]),
            weights_T[:, None],
            self.experts[layer],
            config.activation,
        )
        lengths = [stop - start for start, stop, _ in batch.spans]
        if max(lengths) <= config.expert_capacity:
            return out_TH
        sequences = torch.arange(len(lengths)).repeat_interleave(torch.tensor(lengths))
        full_T = over_capacity(
            experts_T,
            sequences.to(experts_T.device),
            num_experts=config.num_experts,
            capacity=config.expert_capacity,
        )
        return out_TH.masked_fill(full_T[:, None], 0)

    def _attention(self, batch: Batch, block: str, *, causal: bool) -> PaddedAttention:
        """A stack's attention to itself; all of its blocks share the first one's position bias."""
        config = self.config
        bias_RBN = self.weights[f"{block}.position_bias"]
        return PaddedAttention(
            batch.spans,
            batch.spans_on_device,
            num_heads=config.num_heads,
            cached=causal,
            positions=RelativePositions(bias_RBN, causal, config.max_distance),
            slot_T=batch.slot_T,
        )

    def _cached(self, number: int) -> tuple[str, Tensor, Tensor]:
        """A decoder block's prefix, and its keys and values in the cache."""
        return self.config.decoder[number], self.cache.keys[number], self.cache.values[number]

    def _norm(self, x_TH: Tensor, parameter: str, batch: Batch) -> Tensor:
        return rms_norm(x_TH, self.weights[parameter], batch.slot_T, self.config.rms_norm_eps)

    def _project(self, x_TI: Tensor, parameter: str, batch: Batch) -> Tensor:
        return kernels.grouped_linear(x_TI, self.weights[parameter], batch.groups)

    def _heads(self, x_TH: Tensor, parameter: str, batch: Batch) -> Tensor:
        """Projections [T, heads of all of them, D]."""
        return self._project(x_TH, parameter, batch).view(len(x_TH), -1, self.config.head_dim)

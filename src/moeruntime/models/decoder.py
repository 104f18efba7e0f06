"""A decoder-only mixture-of-experts transformer over shared experts and resident variants.

There are no modules: the model is the order of the operations below. Weights come as views, one
row a resident slot for what differs between variants, one slot a stored expert for the rest, so
a step may mix any variants and a reconfiguration is a copy into a row.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from moeruntime import kernels
from moeruntime.families import DecoderConfig
from moeruntime.families.decoder import layer_role
from moeruntime.kernels import TokenGroup
from moeruntime.kv_cache import KVCache
from moeruntime.models.batch import Batch
from moeruntime.models.experts import ExpertPool
from moeruntime.models.layers import apply_rotary, rms_norm, rotary_tables
from moeruntime.models.moe import route

__all__ = ["Decoder"]


class Decoder:
    """The forward pass. It owns no memory but the views it was given."""

    def __init__(
        self,
        config: DecoderConfig,
        weights: Mapping[str, Tensor],
        experts: Sequence[ExpertPool],
        faces_VLE: Tensor,
        cache: KVCache,
    ) -> None:
        """Bind views.

        Args:
            config: the architecture.
            weights: parameter of `parameter_roles` -> [R, ...], slot stride 0 where shared by all.
            experts: one pool a layer.
            faces_VLE: int64; variant, layer, logical expert -> face of the layer's pool.
            cache: keys and values, written and read by every step.
        """
        self.config = config
        self.weights = weights
        self.experts = experts
        self.faces_VLE = faces_VLE
        self.cache = cache

    @torch.inference_mode()
    def forward(self, batch: Batch, before_layer: Callable[[int], None] | None = None) -> Tensor:
        """Run one step and write its keys and values to the cache.

        Args:
            batch: the step.
            before_layer: called before weights are used that may still be on their way: with -1
                for the embedding, each layer's number, and the number of layers for the head.

        Returns:
            hidden_TH after the final norm, in the order of the batch.
        """
        config = self.config
        before_layer = before_layer or (lambda layer: None)
        before_layer(-1)
        hidden_TH = self.weights["embed_tokens"][batch.slot_T, batch.token_ids_T]
        rotary = rotary_tables(
            batch.positions_T, config.head_dim, config.rope_theta, hidden_TH.dtype
        )
        for layer in range(config.num_layers):
            before_layer(layer)
            normed_TH = self._norm(hidden_TH, layer_role(layer, "input_norm"), batch)
            hidden_TH = hidden_TH + self._attention(layer, normed_TH, batch, rotary)
            normed_TH = self._norm(hidden_TH, layer_role(layer, "post_attention_norm"), batch)
            hidden_TH = hidden_TH + self._experts(layer, normed_TH, batch)
        before_layer(config.num_layers)
        return self._norm(hidden_TH, "final_norm", batch)

    @torch.inference_mode()
    def logits(self, hidden_NH: Tensor, groups: Sequence[TokenGroup]) -> Tensor:
        """Vocabulary logits [N, V] in float32 of rows that `groups` assign to resident slots."""
        head = self.weights["embed_tokens" if self.config.tie_embeddings else "lm_head"]
        return kernels.grouped_linear(hidden_NH, head, groups).float()

    def _norm(self, x_TH: Tensor, parameter: str, batch: Batch) -> Tensor:
        return rms_norm(x_TH, self.weights[parameter], batch.slot_T, self.config.rms_norm_eps)

    def _attention(
        self, layer: int, x_TH: Tensor, batch: Batch, rotary: tuple[Tensor, Tensor]
    ) -> Tensor:
        config = self.config
        qkv = kernels.grouped_linear(
            x_TH, self.weights[layer_role(layer, "qkv_proj")], batch.groups
        ).unflatten(1, (-1, config.head_dim))
        query, key, value = qkv.split(
            (config.num_heads, config.num_kv_heads, config.num_kv_heads), dim=1
        )
        keys, values = self.cache.keys[layer], self.cache.values[layer]
        kernels.write_cache(keys, batch.cache_rows_T, apply_rotary(key, *rotary))
        kernels.write_cache(values, batch.cache_rows_T, value)
        attended = kernels.paged_attention(
            apply_rotary(query, *rotary),
            keys,
            values,
            batch.spans,
            batch.block_tables,
            config.sliding_window,
        )
        return kernels.grouped_linear(
            attended, self.weights[layer_role(layer, "o_proj")], batch.groups
        )

    def _experts(self, layer: int, x_TH: Tensor, batch: Batch) -> Tensor:
        logits_TE = kernels.grouped_linear(
            x_TH, self.weights[layer_role(layer, "router")], batch.groups
        )
        faces_TE = self.faces_VLE[batch.variant_T, layer]
        faces_TK, weights_TK = route(logits_TE, faces_TE, self.config.top_k)
        return kernels.expert_mlp(x_TH, faces_TK, weights_TK, self.experts[layer])

"""Steps of one token a sequence, captured in CUDA graphs: one for each size of batch.

A graph's launches and addresses are frozen; what differs from step to step is data: tokens,
positions, block tables, which resident slot and variant each row has, and which rows form the tiles
of a dense product. So one graph serves any mixture of variants, and an activation needs no capture.

At the end of a step its tokens and positions are already those of the next one, on the device. As
long as the same sequences go on, the host only replays, and reads tokens one step later.

Legend: T rows of the batch, R resident slots, H hidden, I intermediate, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from moeruntime.capture import capture
from moeruntime.families.decoder import layer_role
from moeruntime.kernels import attention, norms
from moeruntime.kernels.attention import DecodeScratch
from moeruntime.kernels.projections import project
from moeruntime.kernels.shapes import tile_rows
from moeruntime.kernels.upload import uploader
from moeruntime.models.batch import Span, token_groups
from moeruntime.models.decode_buffers import StepBuffers, StepShapes, batch_sizes
from moeruntime.models.fused import FusedDecoder, down, down_parts, expert_dtype, gate_up

__all__ = ["DecodeGraphs"]


class DecodeGraphs:
    """Runs decode steps of a `FusedDecoder`, capturing a graph when a size is first met."""

    def __init__(self, model: FusedDecoder, num_slots: int, max_rows: int) -> None:
        """Allocate the inputs and intermediates of the largest batch.

        Args:
            model: whose weights and cache to use.
            num_slots: resident slots.
            max_rows: most sequences in a step, at most the last of BATCH_SIZES.
        """
        self._model, self._num_slots = model, num_slots
        self._sizes = batch_sizes(max_rows)
        self._steps: dict[int, _Step] = {}
        self._pool: Any = None
        config, device = model.config, model.faces_VLE.device
        exact = model.head.dtype == torch.float32
        self._shapes = {size: StepShapes.of(size, exact=exact) for size in self._sizes}
        # Layers differ in whether their experts take float32: each kind has its own.
        kinds = {expert_dtype(pool, model.head.dtype) for pool in model.pools}
        self.buffers = StepBuffers(
            config, max_rows, model.max_faces, model.head.dtype, frozenset(kinds), device
        )

    def run(self, spans: Sequence[Span]) -> tuple[Tensor, Tensor]:
        """Run one token of each sequence, sorted by resident slot.

        Returns:
            Logits [T, V] in float32, and the likeliest tokens [T], which the next step begins with
            unless they are overwritten. Both belong to this object and last until the next step.
        """
        size = self._size(len(spans))
        step = self._step(size)
        self._set(size, step, spans)
        step.graph.replay()
        return self.buffers.logits[: len(spans)], self.buffers.inputs[0, : len(spans)]

    def run_on(self, num_rows: int) -> tuple[Tensor, Tensor]:
        """Run the next token of the same sequences; the host has nothing to say."""
        self._steps[self._size(num_rows)].graph.replay()
        return self.buffers.logits[:num_rows], self.buffers.inputs[0, :num_rows]

    def capture_all(self) -> None:
        """Capture the graphs that no step has needed yet; memory is shared, so largest first."""
        for size in reversed(self._sizes):
            self._step(size)

    def _size(self, num_rows: int) -> int:
        """What a batch of so many rows is filled up to."""
        return next(size for size in self._sizes if size >= num_rows)

    def _step(self, size: int) -> _Step:
        if size not in self._steps:
            step = self._steps[size] = self._capture(size)
            self._pool = self._pool or step.graph.pool()
        return self._steps[size]

    @torch.inference_mode()
    def forward(self, size: int, tiles_3N: Tensor) -> None:
        """The launches of one step of `size` rows."""
        model, config, shapes = self._model, self._model.config, self._shapes[size]
        weights, buffers = model.weights, self.buffers
        pairs = size * config.top_k
        token_T, position_T, slot_T, variant_T = buffers.inputs[:, :size].unbind()
        residual, normed = buffers.residual[:size], buffers.normed[:size]
        qkv, attended = buffers.qkv[:size], buffers.attended[:size]
        hidden = config.hidden_size

        def cut(flat: Tensor, rows: int, parts: int) -> Tensor:
            return flat[: rows * parts * hidden].view(rows, parts, hidden)

        o_parts = cut(buffers.o_parts, size, shapes.o.parts)
        scratch = self._scratch(size)
        buffers.lists.reset()
        residual.copy_(weights["embed_tokens"][slot_T, token_T])
        parts = None
        for layer in range(config.num_layers):
            norms.add_norm(
                residual,
                parts,
                weights[layer_role(layer, "input_norm")],
                slot_T,
                config.rms_norm_eps,
                out_TH=normed,
            )
            qkv_proj = weights[layer_role(layer, "qkv_proj")]
            project(normed, qkv_proj, tiles_3N, shapes.qkv, out=qkv[:, None])
            attention.decode_attention(
                qkv,
                position_T,
                variant_T,
                buffers.tables[:size],
                model.rotary,
                model.cache.keys[layer],
                model.cache.values[layer],
                scratch,
                config.sliding_window,
                out_TC=attended,
            )
            o_proj = weights[layer_role(layer, "o_proj")]
            project(attended, o_proj, tiles_3N, shapes.o, out=o_parts)
            pool, kind = model.pools[layer], expert_dtype(model.pools[layer], normed.dtype)
            routed, inner = buffers.routed[kind][:size], buffers.inner[kind][:pairs]
            norms.route(
                residual,
                o_parts,
                weights[layer_role(layer, "post_attention_norm")],
                weights[layer_role(layer, "router")],
                slot_T,
                variant_T,
                model.faces_VLE[:, layer],
                buffers.lists,
                layer,
                config.rms_norm_eps,
                out_TH=routed,
            )
            gate_up(pool, routed, buffers.lists, layer, shapes.gate_up, buffers.byte_rows, inner)
            num_parts = down_parts(pool, shapes.down, pairs)
            found = cut(buffers.down_parts, pairs, num_parts)
            down(pool, inner, buffers.lists, layer, shapes.down, buffers.byte_rows, found)
            parts = found.view(size, config.top_k * num_parts, hidden)
        norms.add_norm(
            residual, parts, weights["final_norm"], slot_T, config.rms_norm_eps, out_TH=normed
        )
        project(normed, model.head, tiles_3N, shapes.head, out=buffers.logits[:size, None])
        token_T.copy_(buffers.logits[:size].argmax(dim=-1))
        position_T.add_(1)

    def num_tiles(self, size: int) -> int:
        """Most tiles that `size` rows of all resident slots can form."""
        return min(size, self._num_slots - 1 + -(-size // self.tile_tokens(size)))

    def tile_tokens(self, size: int) -> int:
        """Rows of a tile."""
        return self._shapes[size].qkv.tokens

    def _scratch(self, size: int) -> DecodeScratch:
        """Splits enough to fill the device, for a small batch."""
        config = self._model.config
        splits = max(1, min(16, 128 // (size * config.num_kv_heads)))
        return DecodeScratch(
            size,
            config.num_heads,
            config.num_kv_heads,
            config.head_dim,
            splits,
            self.buffers.inputs.device,
        )

    def _set(self, size: int, step: _Step, spans: Sequence[Span]) -> None:
        """Send a step's inputs; rows past the last sequence meet nothing."""
        buffers = self.buffers
        idle = [0] * (size - len(spans))
        inputs = torch.tensor(
            [
                [*(span.token_ids[0] for span in spans), *idle],
                [*(span.start for span in spans), *idle],
                [*(span.slot for span in spans), *idle],
                [*(span.variant_idx for span in spans), *(-1 for _ in idle)],
            ]
        )
        groups = token_groups(span.slot for span in spans)
        tiles = torch.tensor(
            tile_rows(groups, self.tile_tokens(size), step.tiles.shape[1]), dtype=torch.int32
        )
        width = max(len(span.block_table) for span in spans)
        tables = torch.tensor(
            [[*span.block_table, *[0] * (width - len(span.block_table))] for span in spans],
            dtype=torch.int32,
        )
        upload = uploader(buffers.inputs.device)
        upload.send(inputs, buffers.inputs[:, :size])
        upload.send(tiles, step.tiles)
        upload.send(tables, buffers.tables[: len(spans), :width])

    def _capture(self, size: int) -> _Step:
        """The graph of steps of `size` rows."""
        inputs = self.buffers.inputs
        device = inputs.device
        tiles = torch.full((3, self.num_tiles(size)), -1, dtype=torch.int32, device=device)
        inputs[:, :size] = 0
        inputs[3, :size] = -1  # nothing reads or writes the cache
        return _Step(
            tiles, capture(lambda: self.forward(size, tiles), pool=self._pool, device=device)
        )


@dataclass(frozen=True, slots=True)
class _Step:
    """One size of batch: its graph, and which tiles of one slot its rows form."""

    tiles: Tensor
    graph: torch.cuda.CUDAGraph

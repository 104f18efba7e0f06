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

from moeruntime.families.base import layer_role
from moeruntime.kernels import attention, norms
from moeruntime.kernels.attention import DecodeScratch
from moeruntime.kernels.norms import FaceLists
from moeruntime.kernels.projections import Shape, project, tile_rows
from moeruntime.kv_cache import blocks_for
from moeruntime.models.batch import Span, token_groups
from moeruntime.models.experts import DensePool
from moeruntime.models.fused import FusedDecoder, down, expert_dtype, gate_up

__all__ = ["BATCH_SIZES", "DecodeGraphs"]

BATCH_SIZES = (1, 2, 4, 8, 16, 24, 32, 48, 64, 96, 128, 192, 256)
"""Batches are filled up to the next of these."""


@dataclass(frozen=True, slots=True)
class Shapes:
    """How the products of a step are cut."""

    qkv: Shape
    o: Shape
    gate_up: Shape
    down: Shape
    head: Shape

    @classmethod
    def of(cls, num_rows: int, *, exact: bool) -> Shapes:
        """Measured on an H200 at the sizes of Mixtral-8x7B; `exact` is float32."""
        if exact:
            one = Shape(rows=32, step=32, tokens=16, stages=2)
            return cls(one, one, one, one, one)
        for most, shapes in _MEASURED.items():
            if num_rows <= most:
                return shapes
        return shapes


_SMALL = Shapes(
    qkv=Shape(rows=32, step=128, tokens=16, stages=6),
    o=Shape(rows=32, step=256, tokens=16, parts=2),
    gate_up=Shape(rows=64, step=128, tokens=16, stages=3),
    down=Shape(rows=128, step=128, tokens=16, parts=4, stages=3),
    head=Shape(rows=64, step=128, tokens=16),
)
_MEASURED = {
    16: _SMALL,
    32: Shapes(
        qkv=Shape(rows=64, step=128, tokens=32),
        o=Shape(rows=64, step=128, tokens=32, parts=2),
        gate_up=_SMALL.gate_up,
        down=Shape(rows=64, step=128, tokens=16, parts=2),
        head=Shape(rows=64, step=128, tokens=32),
    ),
    # Tiles of 32: two of one variant cost nothing, and a batch of several variants wastes less.
    64: Shapes(
        qkv=Shape(rows=64, step=128, tokens=32),
        o=Shape(rows=64, step=128, tokens=32, parts=2),
        gate_up=Shape(rows=32, step=128, tokens=32),
        down=Shape(rows=64, step=128, tokens=32, parts=2),
        head=Shape(rows=64, step=128, tokens=32),
    ),
    256: Shapes(
        qkv=Shape(rows=64, step=128, tokens=64),
        o=Shape(rows=128, step=64, tokens=64, parts=4, warps=8),
        gate_up=Shape(rows=64, step=64, tokens=64),
        down=Shape(rows=128, step=64, tokens=64, parts=4, warps=8),
        head=Shape(rows=64, step=128, tokens=64),
    ),
}
"""Rows of a step -> the best found by benchmarks/kernels.py."""


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
        self._sizes = [size for size in BATCH_SIZES if size < max_rows]
        self._sizes.append(next(size for size in BATCH_SIZES if size >= max_rows))
        self._steps: dict[int, _Step] = {}
        self._pool: Any = None
        config, device = model.config, model.faces_VLE.device
        rows, dtype = self._sizes[-1], model.head.dtype
        exact = dtype == torch.float32
        self._shapes = {size: Shapes.of(size, exact=exact) for size in self._sizes}
        max_parts = max(one.o.parts for one in self._shapes.values())
        max_down = max(one.down.parts for one in self._shapes.values())
        self._max_blocks = blocks_for(config.max_context)

        def empty(*shape: int, of: torch.dtype = dtype) -> Tensor:
            return torch.zeros(*shape, dtype=of, device=device)

        pairs = rows * config.top_k
        heads = config.num_heads + 2 * config.num_kv_heads
        self.inputs = empty(4, rows, of=torch.int64)
        self.tables = empty(rows, self._max_blocks, of=torch.int32)
        self.residual = empty(rows, config.hidden_size, of=torch.float32)
        self.normed = empty(rows, config.hidden_size)
        self.qkv = empty(rows, heads * config.head_dim)
        self.attended = empty(rows, config.num_heads * config.head_dim)
        self.o_parts = empty(rows * max_parts * config.hidden_size, of=torch.float32)
        # Layers differ in whether their experts take float16: each kind has its own.
        kinds = {expert_dtype(pool, dtype) for pool in model.pools}
        self.routed = {kind: empty(rows, config.hidden_size, of=kind) for kind in kinds}
        self.inner = {kind: empty(pairs, config.intermediate_size, of=kind) for kind in kinds}
        self.down_parts = empty(pairs * max_down * config.hidden_size, of=torch.float32)
        self.logits = empty(rows, config.vocab_size, of=torch.float32)
        self.tokens = empty(rows, of=torch.int64)
        self.lists = FaceLists(config.num_layers, model.max_faces, rows, config.top_k, device)

    def run(self, spans: Sequence[Span]) -> tuple[Tensor, Tensor]:
        """Run one token of each sequence, sorted by resident slot.

        Returns:
            Logits [T, V] in float32, and the likeliest tokens [T], which the next step begins with
            unless they are overwritten. Both belong to this object and last until the next step.
        """
        size = next(size for size in self._sizes if size >= len(spans))
        step = self._step(size)
        step.set(spans)
        step.graph.replay()
        return self.logits[: len(spans)], self.inputs[0, : len(spans)]

    def run_on(self, num_rows: int) -> tuple[Tensor, Tensor]:
        """Run the next token of the same sequences; the host has nothing to say."""
        size = next(size for size in self._sizes if size >= num_rows)
        self._steps[size].graph.replay()
        return self.logits[:num_rows], self.inputs[0, :num_rows]

    def _step(self, size: int) -> _Step:
        if size not in self._steps:
            step = _Step(self, size)
            self._steps[size] = step
            step.capture(self._pool)
            self._pool = self._pool or step.graph.pool()
        return self._steps[size]

    @torch.inference_mode()
    def forward(self, size: int, tiles_3N: Tensor) -> None:
        """The launches of one step of `size` rows."""
        model, config, shapes = self._model, self._model.config, self._shapes[size]
        weights, pairs = model.weights, size * config.top_k
        token_T, position_T, slot_T, variant_T = self.inputs[:, :size].unbind()
        residual, normed = self.residual[:size], self.normed[:size]
        qkv, attended = self.qkv[:size], self.attended[:size]
        hidden = config.hidden_size

        def cut(flat: Tensor, rows: int, parts: int) -> Tensor:
            return flat[: rows * parts * hidden].view(rows, parts, hidden)

        o_parts = cut(self.o_parts, size, shapes.o.parts)
        scratch = self._scratch(size)
        self.lists.reset()
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
                self.tables[:size],
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
            routed, inner = self.routed[kind][:size], self.inner[kind][:pairs]
            norms.route(
                residual,
                o_parts,
                weights[layer_role(layer, "post_attention_norm")],
                weights[layer_role(layer, "router")],
                slot_T,
                variant_T,
                model.faces_VLE[:, layer],
                self.lists,
                layer,
                config.rms_norm_eps,
                out_TH=routed,
            )
            gate_up(pool, routed, self.lists, layer, shapes.gate_up, inner)
            # Coded experts come in one part.
            num_parts = shapes.down.parts if isinstance(pool, DensePool) else 1
            found = cut(self.down_parts, pairs, num_parts)
            down(pool, inner, self.lists, layer, shapes.down, found)
            parts = found.view(size, config.top_k * num_parts, hidden)
        norms.add_norm(
            residual, parts, weights["final_norm"], slot_T, config.rms_norm_eps, out_TH=normed
        )
        project(normed, model.head, tiles_3N, shapes.head, out=self.logits[:size, None])
        token_T.copy_(self.logits[:size].argmax(dim=-1))
        position_T.add_(1)

    def num_tiles(self, size: int) -> int:
        """Most tiles that `size` rows of all resident slots can form."""
        tokens = self._shapes[size].qkv.tokens
        return min(size, self._num_slots - 1 + -(-size // tokens))

    def tile_tokens(self, size: int) -> int:
        """Rows of a tile."""
        return self._shapes[size].qkv.tokens

    @property
    def max_blocks(self) -> int:
        """Columns of the block tables."""
        return self._max_blocks

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
            self.inputs.device,
        )


class _Step:
    """One size of batch: its graph, and the host memory its inputs are sent from."""

    NUM_STAGES = 2

    def __init__(self, graphs: DecodeGraphs, size: int) -> None:
        self._graphs, self._size = graphs, size
        device = graphs.inputs.device
        self.tiles = torch.full((3, graphs.num_tiles(size)), -1, dtype=torch.int32, device=device)
        self.graph = torch.cuda.CUDAGraph()

    def set(self, spans: Sequence[Span]) -> None:
        """Send a step's inputs; rows past the last sequence meet nothing."""
        graphs, size = self._graphs, self._size
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
            tile_rows(groups, graphs.tile_tokens(size), self.tiles.shape[1]), dtype=torch.int32
        )
        width = max(len(span.block_table) for span in spans)
        tables = torch.zeros(len(spans), width, dtype=torch.int32)
        for row, span in zip(tables, spans, strict=True):
            row[: len(span.block_table)] = torch.tensor(span.block_table, dtype=torch.int32)
        graphs.inputs[:, :size].copy_(inputs.pin_memory(), non_blocking=True)
        self.tiles.copy_(tiles.pin_memory(), non_blocking=True)
        graphs.tables[: len(spans), :width].copy_(tables.pin_memory(), non_blocking=True)

    def capture(self, pool: Any) -> None:
        """Compile what has to be compiled, then record the launches."""
        graphs, size = self._graphs, self._size
        graphs.inputs[:, :size] = 0
        graphs.inputs[3, :size] = -1  # nothing reads or writes the cache
        stream = torch.cuda.Stream(graphs.inputs.device)
        stream.wait_stream(torch.cuda.current_stream(graphs.inputs.device))
        with torch.cuda.stream(stream):
            graphs.forward(size, self.tiles)
        torch.cuda.current_stream(graphs.inputs.device).wait_stream(stream)
        with torch.cuda.graph(self.graph, pool=pool):
            graphs.forward(size, self.tiles)

"""Steps of few tokens, captured in CUDA graphs: one for each size of step, and kind.

A graph's launches and addresses are frozen; what differs from step to step is data: tokens,
positions, block tables, which resident slot and variant each row has, and which rows form the tiles
of a dense product. So one graph serves any mixture of variants, and an activation needs no capture.
Where variants have private codes, larger steps of one variant alone are a kind of their own, since
kernels are chosen by how many tokens an expert has.

Steps of one token a sequence have attention of their own, and at the end of one its tokens and
positions are already those of the next, on the device: as long as the same sequences go on, the
host only replays, and reads tokens one step later. Steps with prompts, or parts of them, beside
which others may decode, differ in attention alone.

Legend: T rows of the step, R resident slots, H hidden, I intermediate, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from moeruntime.capture import capture
from moeruntime.families.decoder import layer_role
from moeruntime.kernels import norms
from moeruntime.kernels.face_lists import FaceLists
from moeruntime.kernels.projections import project
from moeruntime.kernels.shapes import tile_rows
from moeruntime.kernels.spans import Spans, padded, tables_of_lone
from moeruntime.kernels.upload import uploader
from moeruntime.models.batch import Span, lay_out, token_groups
from moeruntime.models.fused import FusedDecoder, down, down_parts, expert_dtype, gate_up
from moeruntime.models.step_attention import (
    SOME_DECODES,
    LoneTokens,
    PromptTokens,
    StepAttention,
    decode_scratch,
)
from moeruntime.models.step_buffers import (
    ALONE_ROWS,
    StepBuffers,
    StepShapes,
    batch_sizes,
    prompt_sizes,
    step_rows,
)

__all__ = ["StepGraphs"]

IDLE = (0, 0, 0, -1, -1, -1)
"""Inputs of a row that only fills a step up: it has no variant, no place in the cache, no table."""

NOTHING = (-1, 0, 0, 1)
"""No piece of any prompt."""


class StepGraphs:
    """Runs steps of a `FusedDecoder`, capturing a graph when one of its size is first met.

    Attributes:
        max_tokens: that a step may have.
        buffers: what steps work in.
    """

    def __init__(
        self, model: FusedDecoder, *, num_slots: int, max_sequences: int, max_step_tokens: int
    ) -> None:
        """Allocate the inputs and intermediates of the largest step.

        Args:
            model: whose weights and cache to use.
            num_slots: resident slots.
            max_sequences: most sequences in a step, at most the last of BATCH_SIZES.
            max_step_tokens: most tokens in a step; if those are many, it is run without a graph.
        """
        self._model, self._num_slots = model, num_slots
        self._sizes = {
            False: batch_sizes(max_sequences),
            True: prompt_sizes(max_step_tokens),
        }
        self.max_tokens = step_rows(max_step_tokens)
        self._steps: dict[_Kind, _Step] = {}
        self._last: _Step | None = None
        self._pool: Any = None
        config, device = model.config, model.faces_VLE.device
        self._exact = model.head.dtype == torch.float32
        self._private = model.max_faces > config.num_experts
        # Layers differ in whether their experts take float32: each kind has its own.
        kinds = {expert_dtype(pool, model.head.dtype) for pool in model.pools}
        self.buffers = StepBuffers(
            config, self.max_tokens, model.max_faces, model.head.dtype, frozenset(kinds), device
        )

    def run(self, spans: Sequence[Span]) -> tuple[Tensor, Tensor]:
        """Run at most `max_tokens` tokens of sequences, sorted by resident slot.

        Returns:
            Logits [T, V] in float32, and the likeliest tokens [T], which the next step begins with
            unless they are overwritten. Both belong to this object and last until the next step.
        """
        num_rows = sum(len(span.token_ids) for span in spans)
        alone = spans[0].slot == spans[-1].slot
        self._last = step = self._step(self._kind(num_rows > len(spans), alone, num_rows))
        self._set(step, spans)
        step.graph.replay()
        return self._results(num_rows)

    def run_on(self, num_rows: int) -> tuple[Tensor, Tensor]:
        """Run the next token of each, after a step of one token a sequence."""
        assert self._last is not None and not self._last.kind.prompts
        self._last.graph.replay()
        return self._results(num_rows)

    def capture_all(self) -> None:
        """Capture the graphs that no step has needed yet; memory is shared, so largest first."""
        kinds = [
            self._kind(prompts, alone, size)
            for prompts, sizes in self._sizes.items()
            for size in reversed(sizes)
            for alone in (False, True)
        ]
        top_k = self._model.config.top_k
        self._model.compile_ahead([(self._lists(kind), kind.size * top_k) for kind in kinds])
        for kind in kinds:
            self._step(kind)

    def _results(self, num_rows: int) -> tuple[Tensor, Tensor]:
        return self.buffers.logits[:num_rows], self.buffers.inputs[0, :num_rows]

    def _kind(self, prompts: bool, alone: bool, num_rows: int) -> _Kind:
        """Of the step that serves so many rows, filled up."""
        size = next(size for size in self._sizes[prompts] if size >= num_rows)
        return _Kind(prompts, alone and self._private and size >= ALONE_ROWS, size)

    def _lists(self, kind: _Kind) -> FaceLists:
        lists = self.buffers.lists
        return lists.wanting(self._model.config.num_experts) if kind.alone else lists

    def _step(self, kind: _Kind) -> _Step:
        if kind not in self._steps:
            step = self._steps[kind] = self._capture(kind)
            self._pool = self._pool or step.graph.pool()
        return self._steps[kind]

    @torch.inference_mode()
    def forward(self, kind: _Kind, tiles_3N: Tensor) -> None:
        """The launches of one step."""
        size, prompts = kind.size, kind.prompts
        model, config, shapes = self._model, self._model.config, self._shapes(size)
        weights, buffers = model.weights, self.buffers
        lists = self._lists(kind)
        pairs = size * config.top_k
        inputs = buffers.inputs[:, :size].unbind()
        token_T, position_T, slot_T, variant_T, cache_row_T, table_T = inputs
        residual, normed = buffers.residual[:size], buffers.normed[:size]
        qkv, attended = buffers.qkv[:size], buffers.attended[:size]
        hidden = config.hidden_size

        def cut(flat: Tensor, rows: int, parts: int) -> Tensor:
            return flat[: rows * parts * hidden].view(rows, parts, hidden)

        o_parts = cut(buffers.o_parts, size, shapes.o.parts)
        attend = StepAttention(
            config=config,
            cache=model.cache,
            rotary=model.rotary,
            position_T=position_T,
            cache_row_T=cache_row_T,
            spans=Spans(buffers.spans[:, :size], buffers.tables[:size]),
            lone=LoneTokens(
                None,
                position_T,
                table_T,
                decode_scratch(
                    config, size, fewest=SOME_DECODES if prompts else size, device=token_T.device
                ),
            ),
            prompts=PromptTokens(self._pieces(size), buffers.span_scratch) if prompts else None,
        )
        lists.reset()
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
            attend(layer, qkv, out_TC=attended)
            o_proj = weights[layer_role(layer, "o_proj")]
            project(attended, o_proj, tiles_3N, shapes.o, out=o_parts)
            pool, dtype = model.pools[layer], expert_dtype(model.pools[layer], normed.dtype)
            routed, inner = buffers.routed[dtype][:size], buffers.inner[dtype][:pairs]
            norms.route(
                residual,
                o_parts,
                weights[layer_role(layer, "post_attention_norm")],
                weights[layer_role(layer, "router")],
                slot_T,
                variant_T,
                model.faces_VLE[:, layer],
                lists,
                layer,
                config.rms_norm_eps,
                out_TH=routed,
            )
            gate_up(pool, routed, lists, layer, shapes.gate_up, buffers.byte_rows, inner)
            num_parts = down_parts(pool, shapes.down, lists, pairs)
            found = cut(buffers.down_parts, pairs, num_parts)
            down(pool, inner, lists, layer, shapes.down, buffers.byte_rows, found)
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
        return self._shapes(size).qkv.tokens

    def _pieces(self, size: int) -> Tensor:
        """Room for all that prompts of so many rows are cut into."""
        return self.buffers.pieces[: self.buffers.span_scratch.cut.most_pieces(size)]

    def _shapes(self, size: int) -> StepShapes:
        return StepShapes.of(size, exact=self._exact)

    def _set(self, step: _Step, spans: Sequence[Span]) -> None:
        """Send a step's inputs; rows past the last sequence meet nothing."""
        buffers, size = self.buffers, step.kind.size
        columns, where = lay_out(spans)
        columns.append(tables_of_lone(where))
        idle = size - len(columns[0])
        inputs = torch.tensor(
            [column + [nothing] * idle for column, nothing in zip(columns, IDLE, strict=True)]
        )
        tiles = torch.tensor(
            tile_rows(token_groups(columns[2]), self.tile_tokens(size), step.tiles.shape[1]),
            dtype=torch.int32,
        )
        tables = torch.tensor(padded([span.block_table for span in spans]), dtype=torch.int32)
        upload = uploader(buffers.inputs.device)
        upload.send(inputs, buffers.inputs[:, :size])
        upload.send(tiles, step.tiles)
        upload.send(tables, buffers.tables[: len(spans), : tables.shape[1]])
        if step.kind.prompts:
            room, pieces = self._pieces(size), buffers.span_scratch.cut.pieces(where)
            pieces += [NOTHING] * (len(room) - len(pieces))
            upload.send(torch.tensor(pieces, dtype=torch.int32), room)
            upload.send(
                torch.tensor(where, dtype=torch.int32).T.contiguous(),
                buffers.spans[:, : len(where)],
            )

    def _capture(self, kind: _Kind) -> _Step:
        """The graph of such steps."""
        buffers, size = self.buffers, kind.size
        device = buffers.inputs.device
        tiles = torch.full((3, self.num_tiles(size)), -1, dtype=torch.int32, device=device)
        # Nothing reads or writes the cache.
        buffers.inputs[:, :size] = torch.tensor(IDLE, device=device)[:, None]
        self._pieces(size).copy_(torch.tensor(NOTHING))
        graph = capture(lambda: self.forward(kind, tiles), pool=self._pool, device=device)
        return _Step(kind, tiles, graph)


@dataclass(frozen=True, slots=True)
class _Kind:
    """With prompts or without, of one variant alone or of any, and of how many rows."""

    prompts: bool
    alone: bool
    size: int


@dataclass(frozen=True, slots=True)
class _Step:
    """The graph of a kind of step, and which tiles of a slot it has."""

    kind: _Kind
    tiles: Tensor
    graph: torch.cuda.CUDAGraph

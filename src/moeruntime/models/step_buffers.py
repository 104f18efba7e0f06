"""What captured steps work in: their sizes, how products are cut, and the memory between them.

Imports no Triton: the memory plan counts these tensors before anything is loaded.

Legend: T rows of the batch, B blocks of a sequence, H hidden, I intermediate, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from moeruntime.families import DecoderConfig
from moeruntime.kernels.attention_cuts import SpanCut, SpanScratch
from moeruntime.kernels.face_lists import FaceLists
from moeruntime.kernels.face_parts import ByteRows
from moeruntime.kernels.shapes import Shape
from moeruntime.kv_cache import blocks_for

__all__ = [
    "ALONE_ROWS",
    "BATCH_SIZES",
    "FEW_PAIRS",
    "StepBuffers",
    "StepShapes",
    "batch_sizes",
    "decoded_numel",
    "prompt_sizes",
    "step_rows",
]

BATCH_SIZES = (1, 2, 4, 8, 16, 24, 32, 48, 64, 96, 128, 192, 256)
"""Steps of one token a sequence are filled up to the next of these."""

PROMPT_SIZES = (8, 16, 32, 64, 96, 128, 192, 256)
"""Others, if they have no more tokens, to the next of these."""

ALONE_ROWS = 32
"""Steps of so many rows, or more, that are of one variant alone have graphs of their own where
variants have experts of their own: each of them then serves many tokens, or few."""

FEW_PAIRS = 1024
"""Of a token and a choice. Plain experts of a step with no more go through the kernels of decode,
which were measured to be faster up to there: such a step waits for bytes, not for arithmetic."""

DECODED_BYTES = 2**30
"""Where a step of many tokens meets nested codes, so many bytes of weights are decoded at once."""


def batch_sizes(max_sequences: int) -> list[int]:
    """What steps of one token each of up to `max_sequences` are filled to; at most 256."""
    return _up_to(max_sequences, BATCH_SIZES)


def prompt_sizes(max_step_tokens: int) -> list[int]:
    """What captured steps with prompts are filled to, if no step has more tokens."""
    return _up_to(step_rows(max_step_tokens), PROMPT_SIZES)


def step_rows(max_step_tokens: int) -> int:
    """Most tokens of a captured step, if no step has more."""
    return min(max_step_tokens, PROMPT_SIZES[-1])


def _up_to(most: int, sizes: Sequence[int]) -> list[int]:
    """Those of `sizes` that up to `most` are filled to."""
    smaller = [size for size in sizes if size < most]
    return [*smaller, next(size for size in sizes if size >= most)]


def decoded_numel(config: DecoderConfig, max_faces: int, dtype: torch.dtype) -> int:
    """Weights decoded at once for a step of many tokens: gate_up of some faces, or of one."""
    one = 2 * config.intermediate_size * config.hidden_size
    at_once = max(1, DECODED_BYTES // (one * dtype.itemsize))
    return 0 if dtype == torch.float32 else min(at_once, max_faces) * one


@dataclass(frozen=True, slots=True)
class StepShapes:
    """How the products of a step are cut."""

    qkv: Shape
    o: Shape
    gate_up: Shape
    down: Shape
    head: Shape

    @classmethod
    def of(cls, num_rows: int, *, exact: bool) -> StepShapes:
        """Measured on an H200 at the sizes of Mixtral-8x7B, up to 256 rows; `exact` is float32."""
        if exact:  # that it fits any device is all that counts
            one = Shape(rows=32, step=32, tokens=16, stages=2)
            return cls(one, one, one, one, one)
        for most, shapes in _MEASURED.items():
            if num_rows <= most:
                return shapes
        return shapes


_SMALL = StepShapes(
    qkv=Shape(rows=64, step=128, tokens=16, stages=5),
    o=Shape(rows=64, step=128, tokens=16, parts=2),
    gate_up=Shape(rows=64, step=128, tokens=16, stages=3),
    down=Shape(rows=128, step=128, tokens=16, parts=4, stages=3),
    head=Shape(rows=64, step=128, tokens=16),
)
_LARGE = StepShapes(
    qkv=Shape(rows=64, step=128, tokens=64, stages=3),
    o=Shape(rows=64, step=128, tokens=64),
    gate_up=Shape(rows=64, step=64, tokens=64),
    down=Shape(rows=64, step=128, tokens=64, stages=3),
    head=Shape(rows=128, step=64, tokens=64),
)
_MEASURED = {
    16: _SMALL,
    32: StepShapes(
        qkv=Shape(rows=64, step=128, tokens=32),
        o=Shape(rows=64, step=128, tokens=32, parts=2),
        gate_up=_SMALL.gate_up,
        down=Shape(rows=64, step=128, tokens=16, parts=2),
        head=Shape(rows=64, step=128, tokens=32),
    ),
    # Tiles of 32: two of one variant cost nothing, and a batch of several variants wastes less.
    64: StepShapes(
        qkv=Shape(rows=64, step=128, tokens=32),
        o=Shape(rows=64, step=128, tokens=32, parts=2),
        gate_up=Shape(rows=64, step=64, tokens=32, stages=5),
        down=Shape(rows=64, step=128, tokens=64, stages=3),
        head=Shape(rows=64, step=128, tokens=32),
    ),
    96: replace(_LARGE, gate_up=Shape(rows=64, step=64, tokens=32, stages=5)),
    128: _LARGE,
    192: replace(
        _LARGE,
        qkv=Shape(rows=128, step=64, tokens=64),
        o=Shape(rows=128, step=64, tokens=64, stages=5),
    ),
    256: replace(
        _LARGE,
        qkv=Shape(rows=128, step=64, tokens=64),
        o=Shape(rows=128, step=64, tokens=64, stages=5),
        down=Shape(rows=128, step=64, tokens=64, parts=2),
    ),
}
"""Rows of a step -> the best of those measured, for one variant and for four mixed;
benchmarks/decode_kernels.py times such ways, for one."""


class StepBuffers:
    """Inputs and intermediates of the largest step; a smaller one uses their first rows.

    Attributes:
        inputs: int64 [6, T]: tokens, positions, resident slots, variants and cache rows, as
            `Batch` has them; and `tables_of_lone`.
        tables: int32 block tables [T, B], a row a sequence.
        spans: int32 [3, T], the sequences of steps with prompts, as `Spans` has them.
        pieces, span_scratch: int32 [pieces, 4], what attention is to do for them, and in what.
        residual, normed, qkv, attended: the residual stream in float32, and what blocks make of it.
        o_parts, down_parts: float32 partial products, still to be added up.
        routed, inner: inputs and inner activations [pairs, I] of the experts, by their dtype.
        logits: float32 [T, V].
        lists: which pairs each face serves.
        byte_rows: what fast codes are multiplied by; None where no layer has them.
    """

    def __init__(
        self,
        config: DecoderConfig,
        max_rows: int,
        max_faces: int,
        dtype: torch.dtype,
        expert_dtypes: frozenset[torch.dtype],
        device: torch.device,
    ) -> None:
        """Allocate them all.

        Args:
            config: the architecture.
            max_rows: most tokens in a step.
            max_faces: distinct experts of the layer that has the most.
            dtype: what the model computes in.
            expert_dtypes: what its experts take.
            device: where; on "meta" nothing is allocated, only counted.
        """
        sizes = batch_sizes(max_rows)
        shapes = [StepShapes.of(size, exact=dtype == torch.float32) for size in sizes]
        rows, hidden = max(sizes[-1], prompt_sizes(max_rows)[-1]), config.hidden_size
        pairs = rows * config.top_k
        heads = config.num_heads + 2 * config.num_kv_heads

        def zeros(*shape: int, of: torch.dtype = dtype) -> Tensor:
            return torch.zeros(*shape, dtype=of, device=device)

        self.inputs = zeros(6, rows, of=torch.int64)
        self.tables = zeros(rows, blocks_for(config.max_context), of=torch.int32)
        self.spans = zeros(3, rows, of=torch.int32)
        cut = SpanCut.of(config.num_heads, config.num_kv_heads, config.sliding_window)
        self.pieces = zeros(cut.most_pieces(rows), 4, of=torch.int32)
        self.span_scratch = SpanScratch(cut, config.head_dim, device)
        self.residual = zeros(rows, hidden, of=torch.float32)
        self.normed = zeros(rows, hidden)
        self.qkv = zeros(rows, heads * config.head_dim)
        self.attended = zeros(rows, config.num_heads * config.head_dim)
        parts = max(one.o.parts for one in shapes)
        self.o_parts = zeros(rows * parts * hidden, of=torch.float32)
        self.routed = {kind: zeros(rows, hidden, of=kind) for kind in expert_dtypes}
        self.inner = {
            kind: zeros(pairs, config.intermediate_size, of=kind) for kind in expert_dtypes
        }
        parts = max(one.down.parts for one in shapes)
        self.down_parts = zeros(pairs * parts * hidden, of=torch.float32)
        self.logits = zeros(rows, config.vocab_size, of=torch.float32)
        self.lists = FaceLists(config.num_layers, max_faces, rows, config.top_k, device)
        self.byte_rows = None
        if expert_dtypes != {dtype}:  # float32 beside it: somebody has fast codes
            inner = config.intermediate_size
            self.byte_rows = ByteRows(self.lists, rows, hidden, inner)

    @property
    def num_bytes(self) -> int:
        """Of all of them."""
        return sum(tensor.nbytes for tensor in self._tensors())

    def _tensors(self) -> Iterator[Tensor]:
        for value in vars(self).values():
            if isinstance(value, Tensor):
                yield value
        yield from self.routed.values()
        yield from self.inner.values()
        yield from self.span_scratch.tensors()
        if self.byte_rows is not None:
            yield from self.byte_rows.tensors()
        yield from (self.lists.counts_LF, self.lists.pairs_LFC, self.lists.weights_TK)

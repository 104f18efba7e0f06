"""The decoder in Triton kernels: what `decoder.py` defines, as fast as the device allows.

The order of operations is the same; neighbouring ones share a launch, and the residual stream is
float32. Steps of any size run through `forward`; those of few tokens are in graphs, as
`step_graphs.py` has it.

Legend: T tokens, M (token, choice) pairs, R resident slots, H hidden, I intermediate, V variants,
L layers, E logical experts.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from moeruntime.families import DecoderConfig
from moeruntime.families.decoder import layer_role
from moeruntime.kernels import (
    TokenGroup,
    experts,
    grouped_linear,
    nested,
    nested_fast,
    norms,
)
from moeruntime.kernels.attention_cuts import SpanCut, SpanScratch
from moeruntime.kernels.face_lists import FaceLists
from moeruntime.kernels.face_parts import ByteRows, FacePart, is_fast
from moeruntime.kernels.shapes import Shape
from moeruntime.kernels.spans import to_device
from moeruntime.kv_cache import KVCache
from moeruntime.models.batch import Batch
from moeruntime.models.experts import DensePool, ExpertPool, NestedPool
from moeruntime.models.layers import half_rotary_tables
from moeruntime.models.step_attention import (
    SOME_DECODES,
    LoneTokens,
    PromptTokens,
    StepAttention,
    decode_scratch,
)
from moeruntime.models.step_buffers import FEW_PAIRS, StepShapes, decoded_numel

__all__ = ["FusedDecoder"]


class FusedDecoder:
    """The forward pass on CUDA. It owns no weights but the views it was given."""

    def __init__(
        self,
        config: DecoderConfig,
        weights: Mapping[str, Tensor],
        experts: Sequence[ExpertPool],
        faces_VLE: Tensor,
        cache: KVCache,
    ) -> None:
        """Bind views, as `Decoder` does."""
        self.config = config
        self.weights = weights
        self.faces_VLE = faces_VLE
        self.cache = cache
        # Faces are addresses of private codes: the pools that own them have to live on.
        self.experts = experts
        self.pools = [_kernel_pool(pool, self.head.dtype) for pool in experts]
        coded = any(isinstance(pool, CodedPool) for pool in self.pools)
        self.decoded = torch.empty(
            decoded_numel(config, self.max_faces, self.head.dtype) if coded else 0,
            dtype=self.head.dtype,
            device=faces_VLE.device,
        )
        self.rotary = half_rotary_tables(config, faces_VLE.device)

    @property
    def max_faces(self) -> int:
        """Distinct experts of the layer that has the most."""
        return max(num_faces(pool) for pool in self.pools)

    def compile_ahead(self, steps: Sequence[tuple[FaceLists, int]]) -> None:
        """Compile what nested experts of steps need: their lists, and how many pairs they have."""
        pools = [pool for pool in self.pools if isinstance(pool, CodedPool) and pool.fast]
        parts = [part for pool in pools for part in (pool.gate_up, pool.down)]
        nested_fast.compile_ahead(parts, steps)

    @torch.inference_mode()
    def forward(self, batch: Batch, before_layer: Callable[[int], None] | None = None) -> Tensor:
        """Run one step and write its keys and values to the cache.

        Args:
            batch: the step.
            before_layer: as `Decoder.forward` has it.

        Returns:
            hidden_TH after the final norm, in the order of the batch.
        """
        config = self.config
        before_layer = before_layer or (lambda layer: None)
        before_layer(-1)
        embedded_TH = self.weights["embed_tokens"][batch.slot_T, batch.token_ids_T]
        residual_TH = embedded_TH.float()
        out_TH = torch.empty_like(embedded_TH)
        parts: tuple[Tensor | None, Tensor | None, Tensor | None] = (None, None, None)
        lists = FaceLists(
            1,
            self.max_faces,
            len(out_TH),
            config.top_k,
            out_TH.device,
            most_wanted=config.num_experts * len(batch.groups),
        )
        attend = self._attend(batch)

        def add_norm(
            name: str,
            parts: Tensor | None,
            rows_TP: Tensor | None = None,
            shares_TP: Tensor | None = None,
        ) -> None:
            norms.add_norm(
                residual_TH,
                parts,
                self.weights[name],
                batch.slot_T,
                config.rms_norm_eps,
                out_TH=out_TH,
                rows_TP=rows_TP,
                shares_TP=shares_TP,
            )

        for layer in range(config.num_layers):
            before_layer(layer)
            add_norm(layer_role(layer, "input_norm"), *parts)
            attended_TH = self._attention(layer, out_TH, batch, attend)
            parts = self._experts(layer, residual_TH, attended_TH, batch, lists)
        before_layer(config.num_layers)
        add_norm("final_norm", *parts)
        return out_TH

    @torch.inference_mode()
    def logits(self, hidden_NH: Tensor, groups: Sequence[TokenGroup]) -> Tensor:
        """Vocabulary logits [N, V] in float32 of rows that `groups` assign to resident slots."""
        return grouped_linear(hidden_NH, self.head, groups).float()

    @property
    def head(self) -> Tensor:
        """The output embedding of every resident slot."""
        return self.weights["embed_tokens" if self.config.tie_embeddings else "lm_head"]

    def _attention(self, layer: int, x_TH: Tensor, batch: Batch, attend: StepAttention) -> Tensor:
        config = self.config
        qkv_TC = grouped_linear(x_TH, self.weights[layer_role(layer, "qkv_proj")], batch.groups)
        attended_TC = qkv_TC.new_empty(len(x_TH), config.num_heads * config.head_dim)
        attend(layer, qkv_TC, out_TC=attended_TC)
        return grouped_linear(attended_TC, self.weights[layer_role(layer, "o_proj")], batch.groups)

    def _attend(self, batch: Batch) -> StepAttention:
        config, device = self.config, self.faces_VLE.device
        lone, prompts = None, None
        alone = [
            (start, context - 1, idx)
            for idx, (start, stop, context) in enumerate(batch.spans)
            if stop - start == 1
        ]
        if alone:
            columns = to_device(torch.tensor(alone).T.contiguous(), device)
            rows_N, position_N, table_N = columns.unbind()
            scratch = decode_scratch(config, len(batch.spans), fewest=SOME_DECODES, device=device)
            lone = LoneTokens(rows_N, position_N, table_N, scratch)
        if len(alone) < len(batch.spans):
            cut = SpanCut.of(config.num_heads, config.num_kv_heads, config.sliding_window)
            pieces_N4 = torch.tensor(cut.pieces(batch.spans), dtype=torch.int32)
            prompts = PromptTokens(
                to_device(pieces_N4, device), SpanScratch(cut, config.head_dim, device)
            )
        return StepAttention(
            config=config,
            cache=self.cache,
            rotary=self.rotary,
            position_T=batch.positions_T,
            cache_row_T=batch.cache_rows_T,
            spans=batch.spans_on_device,
            lone=lone,
            prompts=prompts,
        )

    def _experts(
        self,
        layer: int,
        residual_TH: Tensor,
        attended_TH: Tensor,
        batch: Batch,
        lists: FaceLists,
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """Add what attention found, and say what experts add to that, as `add_norm` takes it."""
        pool, (num_tokens, hidden) = self.pools[layer], residual_TH.shape
        num_pairs = num_tokens * self.config.top_k
        by_library = _library_serves(pool, num_pairs, lists, attended_TH.dtype)
        kind = attended_TH.dtype if by_library else expert_dtype(pool, attended_TH.dtype)
        x_TH = torch.empty(num_tokens, hidden, dtype=kind, device=attended_TH.device)
        lists.reset()
        norms.route(
            residual_TH,
            attended_TH[:, None],
            self.weights[layer_role(layer, "post_attention_norm")],
            self.weights[layer_role(layer, "router")],
            batch.slot_T,
            batch.variant_T,
            self.faces_VLE[:, layer],
            lists,
            0,
            self.config.rms_norm_eps,
            out_TH=x_TH,
        )
        if by_library:
            rows_MH, row_TK = _library_experts(x_TH, lists, pool, self.decoded)
            return rows_MH, row_TK, lists.weights_TK
        shapes = StepShapes.of(num_tokens, exact=attended_TH.dtype == torch.float32)
        scratch = None
        if isinstance(pool, CodedPool) and pool.fast:
            scratch = ByteRows(lists, num_tokens, hidden, self.config.intermediate_size)
        inner_MI = x_TH.new_empty(num_pairs, self.config.intermediate_size)
        num_parts = down_parts(pool, shapes.down, lists, num_pairs)
        out_MSH = torch.empty(num_pairs, num_parts, hidden, dtype=torch.float32, device=x_TH.device)
        gate_up(pool, x_TH, lists, 0, shapes.gate_up, scratch, inner_MI)
        down(pool, inner_MI, lists, 0, shapes.down, scratch, out_MSH)
        return out_MSH.view(num_tokens, -1, hidden), None, None


@dataclass(frozen=True, slots=True)
class CodedPool:
    """A nested pool as the kernels read it; both parts or neither go the fast way."""

    gate_up: FacePart
    down: FacePart
    fast: bool


KernelPool = DensePool | CodedPool


def num_faces(pool: KernelPool) -> int:
    """Distinct experts of a layer."""
    return pool.num_faces if isinstance(pool, DensePool) else len(pool.gate_up.faces_F6)


def expert_dtype(pool: KernelPool, dtype: torch.dtype) -> torch.dtype:
    """What the inputs of a pool's kernels are, where everything else computes in `dtype`."""
    return torch.float32 if isinstance(pool, CodedPool) and pool.fast else dtype


def gate_up(
    pool: KernelPool,
    x_TH: Tensor,
    lists: FaceLists,
    layer: int,
    shape: Shape,
    scratch: ByteRows | None,
    out_MI: Tensor,
) -> None:
    """silu(gate_proj x) * (up_proj x) of every pair, however the experts are stored.

    Fast codes need `scratch`.
    """
    if isinstance(pool, DensePool):
        experts.gate_up(x_TH, pool.gate_up, lists, layer, shape, out_MI=out_MI)
    elif pool.fast:
        assert scratch is not None
        nested_fast.gate_up(x_TH, pool.gate_up, lists, layer, scratch, out_MI=out_MI)
    else:
        nested.gate_up(x_TH, pool.gate_up, lists, layer, shape, out_MI=out_MI)


def down_parts(pool: KernelPool, shape: Shape, lists: FaceLists, num_pairs: int) -> int:
    """In how many parts `down` of so many pairs leaves its sums."""
    if isinstance(pool, DensePool):
        return shape.parts
    return nested_fast.down_parts(pool.down, lists, num_pairs) if pool.fast else 1


def down(
    pool: KernelPool,
    x_MI: Tensor,
    lists: FaceLists,
    layer: int,
    shape: Shape,
    scratch: ByteRows | None,
    out_MSH: Tensor,
) -> None:
    """down_proj of every pair, times its routing weight, however the experts are stored."""
    if isinstance(pool, DensePool):
        experts.down(x_MI, pool.down, lists, layer, shape, out_MSH=out_MSH)
    elif pool.fast:
        assert scratch is not None
        nested_fast.down(x_MI, pool.down, lists, layer, scratch, out_MSH=out_MSH)
    else:
        nested.down(x_MI, pool.down, lists, layer, shape, out_MSH=out_MSH)


def _kernel_pool(pool: ExpertPool, dtype: torch.dtype) -> KernelPool:
    """A pool as the kernels read it; float32 asks for the plain ones."""
    if isinstance(pool, DensePool):
        return pool
    assert isinstance(pool, NestedPool)
    gate_up, down = (_face_part(pool, idx) for idx in (0, 1))
    fast = dtype != torch.float32 and all(
        is_fast(
            pool.parts[idx].code,
            (part.num_rows, part.num_columns),
            [face.private[idx][1] for face in pool.faces],
        )
        for idx, part in enumerate((gate_up, down))
    )
    if fast:
        pool.lay_in_strips()
        gate_up, down = replace(gate_up, in_strips=True), replace(down, in_strips=True)
    return CodedPool(gate_up, down, fast)


def _face_part(pool: NestedPool, idx: int) -> FacePart:
    part = pool.parts[idx]
    rows: list[list[int]] = []
    for face in pool.faces:
        planes, code = face.private[idx]
        at = (planes[width].data_ptr() if width in planes else 0 for width in (4, 2, 1))
        rows.append([face.slot, code.bits, code.step, *at])
    return FacePart(
        num_rows=part.scale.shape[1],
        num_columns=part.num_columns,
        shared_bits=part.code.shared_bits,
        group=part.code.group,
        planes=dict(part.planes),
        scale_SRG=part.scale,
        faces_F6=torch.tensor(rows, device=part.scale.device),
        num_planes=max(len(face.private[idx][0]) for face in pool.faces),
        wide=any(face.private[idx][1].bits == 4 for face in pool.faces),
        is_gate_up=idx == 0,
    )


def _library_serves(pool: KernelPool, num_pairs: int, lists: FaceLists, dtype: torch.dtype) -> bool:
    """Whether the library's grouped product is the best for a step of so many pairs."""
    if dtype == torch.float32:  # exact steps go through our own kernels
        return False
    if isinstance(pool, DensePool):
        return num_pairs > FEW_PAIRS
    wanted = min(num_faces(pool), lists.most_wanted)
    if pool.fast and num_pairs <= nested_fast.most_pairs(lists.weights_TK.device, wanted):
        return False
    return nested.can_decode(pool.gate_up) and nested.can_decode(pool.down)


def _library_experts(
    x_TH: Tensor, lists: FaceLists, pool: KernelPool, decoded: Tensor
) -> tuple[Tensor, Tensor]:
    """Experts by the library's grouped product, which is the fastest for many tokens.

    Codes are decoded first, as many faces at a time as `decoded` holds.

    Returns:
        Rows, among them one for each pair, and int64 [T, K] which row is whose.
    """
    num_tokens, hidden = x_TH.shape
    row_TK = torch.empty_like(lists.weights_TK[:num_tokens], dtype=torch.int64)
    faces = range(num_faces(pool))
    at_once = len(faces)
    if isinstance(pool, CodedPool):
        at_once = len(decoded) // (pool.gate_up.num_rows * hidden)
    rows: list[Tensor] = []
    for first in range(0, len(faces), at_once):
        some = faces[first : first + at_once]
        ends_F, token_M = norms.in_order(
            lists, 0, some, first_row=len(rows) * row_TK.numel(), row_TK=row_TK
        )
        gate_up_FRC = _weights(pool, 0, some, lists, decoded)
        both_MI = F.grouped_mm(x_TH[token_M], gate_up_FRC.transpose(1, 2), offs=ends_F)
        down_FRC = _weights(pool, 1, some, lists, decoded)
        rows.append(F.grouped_mm(norms.gated(both_MI), down_FRC.transpose(1, 2), offs=ends_F))
    return rows[0] if len(rows) == 1 else torch.cat(rows), row_TK


def _weights(pool: KernelPool, idx: int, faces: range, lists: FaceLists, decoded: Tensor) -> Tensor:
    """gate_up or down of some faces [F, R, C]; of codes, what is in use, in place of the last."""
    if isinstance(pool, DensePool):
        return (pool.gate_up, pool.down)[idx][faces.start : faces.stop]
    part = (pool.gate_up, pool.down)[idx]
    shape = (len(faces), part.num_rows, part.num_columns)
    out_FRC = decoded[: math.prod(shape)].view(shape)
    nested.decode_faces(part, faces.start, lists.counts_LF[0], out_FRC=out_FRC)
    return out_FRC

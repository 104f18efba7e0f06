"""Choosing nested codes: the integers and scales that lose least of what matters.

What matters is `importance`'s cost(D) = sum_i b_i D_i A D_i^T of an error D. Without calibration
all weights matter alike, and each is rounded to the nearest levels.

Codes are chosen as GPTQ (Frantar et al. 2022) rounds weights: column by column, each column's error
fed forward into the columns still to come. What is new is that one column is chosen for all
variants at once: one shared H, the best L of each variant beside it, each variant's error fed into
its own columns. A few sweeps of coordinate descent on the same cost follow.

Legend: N slots with equally many members, V members of a slot, R rows (outputs), C columns
(inputs), G scales a row, g columns a scale, K columns of a block of A.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from moeconsolidate.importance import Importance
from moeruntime.codes import NestedCode, PrivateCode, decode, scale_columns
from moeruntime.codes.nested import LEVEL_BITS

__all__ = ["Feedback", "NestedCodes", "encode", "warm_up"]

Array = NDArray[np.float32]

BATCH_COLUMNS = 16
"""Columns between two updates of all that follow; a matter of speed alone."""

COARSE_FACTORS, FINE_OFFSETS = (0.6, 0.8, 1.0), (-0.1, -0.05, 0.05, 0.1)
"""Scales tried, as parts of the one that just covers a group's largest weight."""


@dataclass(frozen=True, slots=True)
class NestedCodes:
    """The result.

    Attributes:
        shared_NRC: uint8 H.
        private_NVRC: uint8 L; 0 where a member has no private bits.
        scale_NRG: bfloat16 u.
        rule: what they mean.
    """

    shared_NRC: Tensor
    private_NVRC: Tensor
    scale_NRG: Tensor
    rule: _Rule

    @property
    def weights_NVRC(self) -> Tensor:  # noqa: N802 - named like the fields
        """float32, what a reader will decode; made anew each time."""
        return torch.stack(
            [
                torch.stack(
                    [
                        decode(shared_RC, scale_RG, self.rule.code, private_RC, one)
                        for private_RC, one in zip(private_VRC, ones, strict=True)
                    ]
                )
                for shared_RC, scale_RG, private_VRC, ones in zip(
                    self.shared_NRC,
                    self.scale_NRG,
                    self.private_NVRC,
                    self.rule.private,
                    strict=True,
                )
            ]
        )


@torch.no_grad()
def encode(
    weights_NVRC: Tensor,
    code: NestedCode,
    private: Sequence[Sequence[PrivateCode]],
    importance: Importance | None = None,
    *,
    sweeps: int = 2,
    feedback: Feedback | None = None,
) -> NestedCodes:
    """Choose codes for slots with equally many members.

    Args:
        weights_NVRC: float32, each slot's members.
        code: h and g, for all of them.
        private: r and a of each slot's each member.
        importance: what an error costs; None treats all weights alike and rounds each to the
            nearest levels.
        sweeps: rounds of coordinate descent after the first choice.
        feedback: of this importance, if it is at hand.
    """
    rule, weights_NVRC = _Rule(code, private), weights_NVRC.contiguous()
    num_slots, _, num_rows, num_columns = weights_NVRC.shape
    scale_NRG = torch.empty(num_slots, num_rows, scale_columns(num_columns, code.group))
    shared_NRC = torch.empty(num_slots, num_rows, num_columns, dtype=torch.uint8)
    private_NVRC = torch.empty(weights_NVRC.shape, dtype=torch.uint8)
    if importance is None:
        rule.round_groups(weights_NVRC, None, None, scale_NRG, shared_NRC, private_NVRC)
    else:
        weight = importance.outputs_NVR.contiguous(), importance.diagonal
        rule.round_groups(weights_NVRC, *weight, scale_NRG, shared_NRC[:0], private_NVRC[:0])
        step_NRC = scale_NRG.repeat_interleave(code.group, dim=-1)[..., :num_columns]
        chosen = _feed_forward(
            weights_NVRC, step_NRC, feedback or Feedback.of(importance), rule, sweeps
        )
        shared_NRC, private_NVRC = (found.to(torch.uint8) for found in chosen)
    return NestedCodes(shared_NRC, private_NVRC, scale_NRG.to(torch.bfloat16), rule)


def warm_up() -> None:
    """Load the kernels, which takes half a second, or seconds where they are compiled first."""
    encode(torch.ones(1, 1, 1, 1), NestedCode(4, 32), [[PrivateCode(0, 0)]])


@dataclass(frozen=True, slots=True)
class _Rule:
    """The levels that members can take, as the kernels want them told."""

    code: NestedCode
    private: Sequence[Sequence[PrivateCode]]

    def round_groups(
        self,
        weights_NVRC: Tensor,
        outputs_NVR: Tensor | None,
        diagonal_NVC: Tensor | None,
        scale_NRG: Tensor,
        shared_NRC: Tensor,
        private_NVRC: Tensor,
    ) -> None:
        """`kernels.rounding.round_groups` on tensors."""
        from moeconsolidate.kernels import rounding

        weighed = (weights_NVRC, outputs_NVR, diagonal_NVC)
        rounding.round_groups(
            *_arrays(*weighed),
            *self._numbers(),
            self.code.group,
            np.array(COARSE_FACTORS, np.float32),
            np.array(FINE_OFFSETS, np.float32),
            rounding.Scratch.of(weights_NVRC.shape[1], self.code.group),
            *_arrays(scale_NRG, shared_NRC, private_NVRC),
        )

    def feed_columns(self, *tensors: Tensor) -> None:
        """`kernels.columns.feed_columns`: what is read, then what is filled."""
        from moeconsolidate.kernels import columns

        columns.feed_columns(*_arrays(*tensors[:5]), *self._numbers(), *_arrays(*tensors[5:]))

    def descend_columns(self, *tensors: Tensor) -> None:
        """`kernels.columns.descend_columns`: what is read, then what is changed or filled."""
        from moeconsolidate.kernels import columns

        columns.descend_columns(*_arrays(*tensors[:4]), *self._numbers(), *_arrays(*tensors[4:]))

    def _numbers(self) -> tuple[Array, Array, int, int]:
        """Private steps and largest codes [N, V], h, and the step of shared codes."""
        steps = np.array([[one.step for one in slot] for slot in self.private], np.float32)
        most = np.array([[2**one.bits - 1 for one in slot] for slot in self.private], np.float32)
        return steps, most, self.code.shared_bits, 2 ** (LEVEL_BITS - self.code.shared_bits)


def _arrays(*tensors: Tensor | None) -> Iterator[Any]:
    """The same memory, which has to be contiguous: a kernel is compiled for one layout."""
    for tensor in tensors:
        assert tensor is None or tensor.is_contiguous()
        yield tensor if tensor is None else tensor.numpy()


def _feed_forward(
    weights_NVRC: Tensor, step_NRC: Tensor, feedback: Feedback, rule: _Rule, sweeps: int
) -> tuple[Tensor, Tensor]:
    """Choose column by column, the most important first, then sweep; columns come back in order.

    Inside, matrices lie column by column, so that one column is a run of memory.

    Returns:
        H and the Ls.
    """
    found: list[list[Tensor]] = []
    for block in feedback.blocks:
        target_NVKR = block.sort.columns(weights_NVRC[..., block.columns]).mT.contiguous()
        step_NKR = block.sort.columns(step_NRC[:, None, :, block.columns])[:, 0].mT.contiguous()
        chosen = _gptq(target_NVKR, step_NKR, block, feedback.outputs_NVR, rule)
        for _ in range(sweeps):
            _descend(target_NVKR, step_NKR, block, feedback.outputs_NVR, rule, *chosen)
        _, shared_NKR, private_NVKR = chosen
        shared_N1KR = shared_NKR[:, None]
        found.append([block.sort.undo(x.mT) for x in (shared_N1KR, private_NVKR)])
    shared_N1RC, private_NVRC = (torch.cat(parts, dim=-1) for parts in zip(*found, strict=True))
    return shared_N1RC[:, 0], private_NVRC


def _gptq(
    target_NVKR: Tensor, step_NKR: Tensor, block: _Block, outputs_NVR: Tensor, rule: _Rule
) -> tuple[Tensor, Tensor, Tensor]:
    """One pass with error feedback over the columns of a block: levels, H and the Ls."""
    feedback_NVKK = block.feedback_NVKK
    pivots_NVK = feedback_NVKK.diagonal(dim1=-2, dim2=-1)
    num_columns = target_NVKR.shape[-2]
    left = target_NVKR.clone()
    levels, shared, private = left.clone(), step_NKR.clone(), left.clone()
    for start in range(0, num_columns, BATCH_COLUMNS):
        stop = min(start + BATCH_COLUMNS, num_columns)
        at = slice(start, stop)
        found = [x[..., at, :].contiguous() for x in (levels, shared, private, left)]
        rule.feed_columns(
            left[:, :, at].contiguous(),
            step_NKR[:, at].contiguous(),
            pivots_NVK[..., at].contiguous(),
            feedback_NVKK[..., at, at].contiguous(),
            outputs_NVR,
            *found,
        )
        errors = found.pop()
        for whole, part in zip((levels, shared, private), found, strict=True):
            whole[..., at, :] = part
        left[:, :, stop:] -= feedback_NVKK[:, :, start:stop, stop:].mT @ errors
    return levels, shared, private


def _descend(
    target_NVKR: Tensor,
    step_NKR: Tensor,
    block: _Block,
    outputs_NVR: Tensor,
    rule: _Rule,
    levels: Tensor,
    shared: Tensor,
    private: Tensor,
) -> None:
    """One sweep of cyclic coordinate descent over the columns, in place; the cost never rises."""
    num_columns, inputs_NVKK = target_NVKR.shape[-2], block.inputs_NVKK
    slope_NVKR = inputs_NVKK @ (levels * step_NKR[:, None] - target_NVKR)
    for start in range(0, num_columns, BATCH_COLUMNS):
        at = slice(start, min(start + BATCH_COLUMNS, num_columns))
        slope_NVBR = slope_NVKR[:, :, at].contiguous()
        moves_NVBR = torch.empty_like(slope_NVBR)
        found = [x[..., at, :].contiguous() for x in (levels, shared, private)]
        rule.descend_columns(
            slope_NVBR,
            step_NKR[:, at].contiguous(),
            inputs_NVKK[..., at, at].contiguous(),
            outputs_NVR,
            *found,
            moves_NVBR,
        )
        for whole, part in zip((levels, shared, private), found, strict=True):
            whole[..., at, :] = part
        slope_NVKR += inputs_NVKK[:, :, :, at] @ moves_NVBR


class _Sorter:
    """Puts columns into another order, slot by slot, and back."""

    def __init__(self, order_NC: Tensor) -> None:
        self._order = order_NC[:, None, None, :]
        self._back = order_NC.argsort(dim=-1)[:, None, None, :]

    def columns(self, x: Tensor) -> Tensor:
        """[N, V or 1, R, C] with its columns in order."""
        return x.gather(-1, self._order.expand_as(x))

    def both(self, x_NVCC: Tensor) -> Tensor:
        """Rows and columns in order."""
        rows = self.columns(x_NVCC).mT
        return self.columns(rows).mT

    def undo(self, x: Tensor) -> Tensor:
        """Columns as they were."""
        return x.gather(-1, self._back.expand_as(x))


@dataclass(frozen=True, slots=True)
class _Block:
    """Columns between which errors are fed, sorted by importance.

    Attributes:
        columns: which.
        sort: into the order in which they are chosen.
        inputs_NVKK: A in that order.
        feedback_NVKK: U, the upper Cholesky factor of the inverse of A.
    """

    columns: slice
    sort: _Sorter
    inputs_NVKK: Tensor
    feedback_NVKK: Tensor


@dataclass(frozen=True, slots=True)
class Feedback:
    """An importance made ready for error feedback: worth keeping where it is used again.

    Attributes:
        outputs_NVR: b.
        blocks: A, block by block.
    """

    outputs_NVR: Tensor
    blocks: list[_Block]

    def rows(self, rows_S: Tensor | slice) -> Feedback:
        """The same for some of the outputs; columns keep their order."""
        return Feedback(self.outputs_NVR[..., rows_S].contiguous(), self.blocks)

    @classmethod
    def of(cls, importance: Importance) -> Feedback:
        """Sort and factor A."""
        outputs_NV1 = importance.outputs_NVR.sum(dim=-1, keepdim=True)
        blocks = []
        for columns, inputs_NVKK in importance.blocks:
            diagonal_NVK = inputs_NVKK.diagonal(dim1=-2, dim2=-1)
            weight_NK = (diagonal_NVK * outputs_NV1).sum(dim=1)
            sort = _Sorter(weight_NK.argsort(dim=-1, descending=True))
            sorted_NVKK = sort.both(inputs_NVKK)
            lower = torch.linalg.cholesky(sorted_NVKK.double())
            feedback = torch.linalg.cholesky(torch.cholesky_inverse(lower), upper=True).float()
            blocks.append(_Block(columns, sort, sorted_NVKK, feedback))
        return cls(importance.outputs_NVR.contiguous(), blocks)

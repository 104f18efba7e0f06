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

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from moeconsolidate.importance import Importance
from moeruntime.codes import NestedCode, PrivateCode, scale_columns
from moeruntime.codes.nested import LEVEL_BITS

__all__ = ["Feedback", "NestedCodes", "encode"]

BATCH_COLUMNS = 16
"""Columns between two updates of all that follow; a matter of speed alone."""

CACHED_WEIGHTS = 2**16
"""Weights whose scales are searched at once; a matter of speed alone."""

COARSE_FACTORS, FINE_OFFSETS = (0.6, 0.8, 1.0), (-0.1, -0.05, 0.05, 0.1)
"""Scales tried, as parts of the one that just covers a group's largest weight."""

LEAST_WEIGHT = 2.0**-100
"""Groups of nothing larger are scaled as if this were in them: no level is 0, so a group of zeros
comes out as small as this, and no scale rounds to 0."""


@dataclass(frozen=True, slots=True)
class NestedCodes:
    """The result.

    Attributes:
        shared_NRC: uint8 H.
        private_NVRC: uint8 L; 0 where a member has no private bits.
        scale_NRG: bfloat16 u.
        weights_NVRC: float32, what a reader will decode.
    """

    shared_NRC: Tensor
    private_NVRC: Tensor
    scale_NRG: Tensor
    weights_NVRC: Tensor


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
    rule = _Rule.of(code, private)
    if importance is None:
        diagonal_NVRC = torch.ones(()).expand_as(weights_NVRC)
    else:
        diagonal_NVRC = importance.outputs_NVR[..., None] * importance.diagonal[:, :, None, :]
    scale_NRG = _search_scales(weights_NVRC, diagonal_NVRC, rule)
    step_NRC = _spread(scale_NRG, code.group, weights_NVRC.shape[-1])
    if importance is None:
        chosen = rule.choose(weights_NVRC / step_NRC[:, None], diagonal_NVRC)
        levels_NVRC, shared_N1RC, private_NVRC = chosen
    else:
        levels_NVRC, shared_N1RC, private_NVRC = _feed_forward(
            weights_NVRC, step_NRC, feedback or Feedback.of(importance), rule, sweeps
        )
    return NestedCodes(
        shared_N1RC[:, 0].to(torch.uint8),
        private_NVRC.to(torch.uint8),
        scale_NRG.to(torch.bfloat16),
        levels_NVRC * step_NRC[:, None],
    )


@dataclass(frozen=True, slots=True)
class _Rule:
    """The levels a member can take, in units of the scale u; tensors are [N, V, 1, 1]."""

    group: int
    shared_step: int
    shared_max: int
    private_step: Tensor
    private_max: Tensor

    @classmethod
    def of(cls, code: NestedCode, private: Sequence[Sequence[PrivateCode]]) -> _Rule:
        def grid(values: list[list[int]]) -> Tensor:
            return torch.tensor(values, dtype=torch.float32)[..., None, None]

        return cls(
            group=code.group,
            shared_step=2 ** (LEVEL_BITS - code.shared_bits),
            shared_max=2**code.shared_bits - 1,
            private_step=grid([[one.step for one in slot] for slot in private]),
            private_max=grid([[2**one.bits - 1 for one in slot] for slot in private]),
        )

    @property
    def largest(self) -> float:
        """Half the span of the shared levels, with half a step on each side."""
        return self.shared_step * (self.shared_max + 1) / 2

    def choose(self, target_NVRK: Tensor, weight_NVRK: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Pick, for every place, the H and the Ls of least weighted squared error.

        H is tried just below and just above the weighted mean of the members' targets.

        Returns:
            levels [N, V, R, K], H [N, 1, R, K] and L [N, V, R, K], all float32.
        """
        low, high = self._both(target_NVRK, weight_NVRK)
        better = high[3] < low[3]
        return (
            torch.where(better, high[0], low[0]),
            torch.where(better, high[1], low[1]),
            torch.where(better, high[2], low[2]),
        )

    def error(self, target_NVRK: Tensor, weight_NVRK: Tensor) -> Tensor:
        """What `choose` would leave: weighted squared error of all members, [N, R, K]."""
        low, high = self._both(target_NVRK, weight_NVRK)
        return torch.minimum(low[3], high[3])[:, 0]

    def _both(
        self, target_NVRK: Tensor, weight_NVRK: Tensor
    ) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
        """`_refine` the H below the members' weighted mean, and the one above."""
        total = weight_NVRK.sum(dim=1, keepdim=True).clamp_min(torch.finfo(torch.float32).tiny)
        mean = (target_NVRK * weight_NVRK).sum(dim=1, keepdim=True) / total
        below = torch.floor(mean / self.shared_step + self.shared_max / 2)
        return (
            self._refine(target_NVRK, weight_NVRK, below),
            self._refine(target_NVRK, weight_NVRK, below + 1),
        )

    def _refine(
        self, target_NVRK: Tensor, weight_NVRK: Tensor, shared: Tensor
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """The best Ls beside a given H, and the error left."""
        shared = shared.clamp(0, self.shared_max)
        base = (shared - self.shared_max / 2) * self.shared_step
        centre = self.private_max / 2
        wanted = (target_NVRK - base) / self.private_step.clamp_min(1) + centre
        private = wanted.round().clamp_min(0).minimum(self.private_max)
        level = base + self.private_step * (private - centre)
        error = ((target_NVRK - level).square() * weight_NVRK).sum(dim=1, keepdim=True)
        return level, shared, private, error


def _search_scales(weights_NVRC: Tensor, diagonal_NVRC: Tensor, rule: _Rule) -> Tensor:
    """One scale a group: of a few candidates, the one with the least weighted rounding error.

    A few rows at a time, so that what is looked at again and again stays in the cache.
    """
    num_rows = weights_NVRC.shape[2]
    at_once = max(1, CACHED_WEIGHTS * num_rows // weights_NVRC.numel())
    return torch.cat(
        [
            _search_rows(weights_NVRr, diagonal_NVRr, rule)
            for weights_NVRr, diagonal_NVRr in zip(
                weights_NVRC.split(at_once, dim=2), diagonal_NVRC.split(at_once, dim=2), strict=True
            )
        ],
        dim=1,
    )


def _search_rows(weights_NVRC: Tensor, diagonal_NVRC: Tensor, rule: _Rule) -> Tensor:
    """A coarse grid, the same for all groups, then each group's neighbours of its own best."""
    num_columns = weights_NVRC.shape[-1]
    num_scales = scale_columns(num_columns, rule.group)
    padding = (0, num_scales * rule.group - num_columns)

    def by_group(x: Tensor) -> Tensor:
        padded = torch.nn.functional.pad(x, padding) if padding[1] else x
        return padded.view(*padded.shape[:-1], num_scales, rule.group)

    largest = by_group(weights_NVRC.abs().amax(dim=1)).amax(dim=-1)
    unit_NRG = largest.clamp_min(LEAST_WEIGHT) / rule.largest
    best_NRG = torch.ones_like(unit_NRG)
    least_NRG = torch.full_like(unit_NRG, torch.inf)

    def try_factor(factor_NRG: Tensor) -> None:
        scale_NRG = (unit_NRG * factor_NRG).bfloat16().float()
        step = _spread(scale_NRG, rule.group, num_columns)[:, None]
        error_NRC = rule.error(weights_NVRC / step, diagonal_NVRC)
        error_NRG = by_group(error_NRC).sum(dim=-1) * scale_NRG.square()
        better = error_NRG < least_NRG
        best_NRG.copy_(torch.where(better, factor_NRG, best_NRG))
        least_NRG.copy_(torch.where(better, error_NRG, least_NRG))

    for factor in COARSE_FACTORS:
        try_factor(torch.full_like(unit_NRG, factor))
    coarse_NRG = best_NRG.clone()
    for offset in FINE_OFFSETS:
        try_factor(coarse_NRG + offset)
    return (unit_NRG * best_NRG).bfloat16().float()


def _spread(scale_NRG: Tensor, group: int, num_columns: int) -> Tensor:
    """A scale for every column."""
    return scale_NRG.repeat_interleave(group, dim=-1)[..., :num_columns]


def _feed_forward(
    weights_NVRC: Tensor, step_NRC: Tensor, feedback: Feedback, rule: _Rule, sweeps: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Choose column by column, the most important first, then sweep; columns come back in order.

    Inside, matrices lie column by column, so that one column is a run of memory.
    """
    found: list[list[Tensor]] = []
    for block in feedback.blocks:
        target_NVKR = block.sort.columns(weights_NVRC[..., block.columns]).mT.contiguous()
        step_N1KR = block.sort.columns(step_NRC[:, None, :, block.columns]).mT.contiguous()
        chosen = _gptq(target_NVKR, step_N1KR, block, feedback.outputs_NV1R, rule)
        for _ in range(sweeps):
            _descend(target_NVKR, step_N1KR, block, feedback.outputs_NV1R, rule, *chosen)
        found.append([block.sort.undo(x.mT) for x in chosen])
    levels, shared, private = (torch.cat(parts, dim=-1) for parts in zip(*found, strict=True))
    return levels, shared, private


def _gptq(
    target_NVKR: Tensor, step_N1KR: Tensor, block: _Block, outputs_NV1R: Tensor, rule: _Rule
) -> tuple[Tensor, Tensor, Tensor]:
    """One pass with error feedback over the columns of a block."""
    feedback_NVKK = block.feedback_NVKK
    pivots_NVK = feedback_NVKK.diagonal(dim1=-2, dim2=-1)
    num_columns = target_NVKR.shape[-2]
    left = target_NVKR.clone()
    levels, private = torch.empty_like(left), torch.empty_like(left)
    shared = torch.empty_like(step_N1KR)
    for start in range(0, num_columns, BATCH_COLUMNS):
        stop = min(start + BATCH_COLUMNS, num_columns)
        batch, errors = left[:, :, start:stop], torch.empty_like(left[:, :, start:stop])
        for column in range(start, stop):
            at, here = slice(column, column + 1), column - start
            step, pivot = step_N1KR[:, :, at], pivots_NVK[:, :, at, None]
            wanted = batch[:, :, here : here + 1]
            chosen = rule.choose(wanted / step, outputs_NV1R / pivot.square())
            levels[:, :, at], shared[:, :, at], private[:, :, at] = chosen
            error = (wanted - chosen[0] * step) / pivot
            errors[:, :, here : here + 1] = error
            batch[:, :, here + 1 :] -= feedback_NVKK[:, :, column, column + 1 : stop, None] * error
        left[:, :, stop:] -= feedback_NVKK[:, :, start:stop, stop:].mT @ errors
    return levels, shared, private


def _descend(
    target_NVKR: Tensor,
    step_N1KR: Tensor,
    block: _Block,
    outputs_NV1R: Tensor,
    rule: _Rule,
    levels: Tensor,
    shared: Tensor,
    private: Tensor,
) -> None:
    """One sweep of cyclic coordinate descent over the columns, in place; the cost never rises."""
    num_columns, inputs_NVKK = target_NVKR.shape[-2], block.inputs_NVKK
    diagonal_NVK = inputs_NVKK.diagonal(dim1=-2, dim2=-1)
    slope_NVKR = inputs_NVKK @ (levels * step_N1KR - target_NVKR)
    for start in range(0, num_columns, BATCH_COLUMNS):
        stop = min(start + BATCH_COLUMNS, num_columns)
        slope, moves = slope_NVKR[:, :, start:stop].clone(), []
        for column in range(start, stop):
            at, here = slice(column, column + 1), column - start
            step, curvature = step_N1KR[:, :, at], diagonal_NVK[:, :, at, None]
            now = levels[:, :, at] * step
            wanted = now - slope[:, :, here : here + 1] / curvature
            chosen = rule.choose(wanted / step, outputs_NV1R * curvature)
            levels[:, :, at], shared[:, :, at], private[:, :, at] = chosen
            move = chosen[0] * step - now
            slope += inputs_NVKK[:, :, start:stop, column, None] * move
            moves.append(move)
        slope_NVKR += inputs_NVKK[:, :, :, start:stop] @ torch.cat(moves, dim=2)


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
        outputs_NV1R: b.
        blocks: A, block by block.
    """

    outputs_NV1R: Tensor
    blocks: list[_Block]

    def rows(self, rows_S: Tensor) -> Feedback:
        """The same for some of the outputs; columns keep their order."""
        return Feedback(self.outputs_NV1R[..., rows_S], self.blocks)

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
        return cls(importance.outputs_NVR[:, :, None], blocks)

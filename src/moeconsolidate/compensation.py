"""Later layers take back what earlier ones lost.

Each layer's codes are chosen to lose little of what the original does, whatever the layers before
have lost. But their errors are no noise: they follow from what the model reads, and so in part from
what an expert's neurons do. So calibration text runs through the originals and through what has
been coded, side by side and a block at a time, and before a layer's down matrices are coded they
are moved to where they make up for the difference: for each expert the ridge regression of its
share of it on its neurons. (GPTQ quantises a layer on inputs of the quantised layers before it, as
Frantar et al. 2022 do; here the outputs of the original are what it is held against.)

How much of a correction survives on text that it was not learned from is measured on the held-out
windows, and half of that is made: on a variant's own text it has nearly all of the gain, and on
other texts, which nothing is learned from, it was measured to be better than all of it or nothing.

Legend: N tokens of a few windows, H hidden, I intermediate, K neurons of a block.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Protocol

import torch
from torch import Tensor

from moeconsolidate.checkpoint import Checkpoint
from moeconsolidate.importance import LEAST, column_blocks
from moeconsolidate.parts import part_of
from moeconsolidate.spool import Spool
from moeconsolidate.streaming import BATCH_WINDOWS, ExpertWork, StreamedBlock, embed, streamed_block
from moeconsolidate.threads import side_by_side

__all__ = ["Compensation"]

LEARNED, HELD_OUT = 0, 1

CAUTION = 0.5
"""Part that is made of a correction that held-out text bears out."""

RIDGE = 0.2
"""Part of the second moments' mean diagonal, over the layer's experts, that is added to them."""


class Coded(Protocol):
    """A layer as it was coded, decoded for one variant when it is that variant's turn."""

    def experts(self, variant: int) -> Sequence[tuple[Tensor, Tensor]]:
        """gate_up and down of each expert, float32."""
        ...

    def weights(self, variant: int, part: str) -> Sequence[Tensor]:
        """One part, "gate_up" or "down", of each expert, float32."""
        ...


class Compensation:
    """Two streams of each variant's calibration text: its original's, and its coded experts'."""

    def __init__(
        self,
        checkpoints: Sequence[Checkpoint],
        learned: Sequence[Tensor],
        held_out: Sequence[Tensor],
    ) -> None:
        """Start both streams.

        Args:
            checkpoints: the variants.
            learned: each variant's windows to learn from, as `streaming` has them.
            held_out: each variant's windows to measure with.
        """
        self._config = checkpoints[0].config
        self._variants = [
            _Streams(checkpoint, (mine, measured))
            for checkpoint, mine, measured in zip(checkpoints, learned, held_out, strict=True)
        ]

    def correct(self, layer: int, experts_EP: Tensor, coded: Coded) -> None:
        """Move a layer's down matrices to make up for what has been lost up to their inputs.

        Args:
            layer: the next one that is coded.
            experts_EP: its experts, variant by variant; changed.
            coded: their gate_up.
        """
        num_experts = self._config.num_experts

        def of_variant(variant: int) -> None:
            rows_EP = experts_EP[variant * num_experts :][:num_experts]
            downs = [part_of(row_P, "down", self._config) for row_P in rows_EP]
            self._variants[variant].correct(layer, downs, coded.weights(variant, "gate_up"))

        side_by_side(of_variant, range(len(self._variants)))

    def advance(self, layer: int, coded: Coded) -> None:
        """Take both streams past a layer.

        Args:
            layer: the one that was corrected last, or the next where none is to be corrected.
            coded: its experts.
        """
        side_by_side(
            lambda variant: self._variants[variant].advance(layer, coded.experts(variant)),
            range(len(self._variants)),
        )


class _Streams:
    """Of one variant: hidden states before a block, of the learned windows and the held-out ones.

    They wait on disk, each under the number of the block that it is the input of.
    """

    def __init__(self, checkpoint: Checkpoint, windows: tuple[Tensor, Tensor]) -> None:
        self._checkpoint, self._config, self._windows = checkpoint, checkpoint.config, windows
        self._spool = Spool()
        self._next = {"original": 0, "coded": 0}
        for part, ids in enumerate(windows):
            hidden = embed(checkpoint, ids)
            for stream in self._next:
                self._spool.put(f"{stream}-{part}-0", hidden)

    @torch.no_grad()
    def correct(self, layer: int, downs: Sequence[Tensor], gate_up: Sequence[Tensor]) -> None:
        """Move the experts' down matrices, [H, I] each."""
        number = self._reach(layer)
        experts = list(zip(gate_up, (down.float() for down in downs), strict=True))
        coded = streamed_block(self._checkpoint, number, experts=experts)
        self._run("original", streamed_block(self._checkpoint, number))
        moments = _Moments(len(downs), *self._config.part_shapes["down"])
        for left_NH, works in self._left(coded, LEARNED):
            moments.add(left_NH, works)
        changes = moments.solve()
        agreement = _Agreement(changes)
        for left_NH, works in self._left(coded, HELD_OUT):
            agreement.add(left_NH, works)
        for down, change_HI in zip(downs, changes, strict=True):
            down.copy_(down.float() + CAUTION * agreement.part * change_HI)

    def advance(self, layer: int, experts: Sequence[tuple[Tensor, Tensor]]) -> None:
        """Take both streams past a layer."""
        if self._next["original"] == self._next["coded"]:  # it was not corrected
            self._run("original", streamed_block(self._checkpoint, self._reach(layer)))
        block = streamed_block(self._checkpoint, self._next["coded"], experts=experts)
        self._run("coded", block)

    def _reach(self, layer: int) -> int:
        """Take both streams to a layer, past blocks without experts; the number of its block."""
        number = self._config.blocks.index(self._config.layers[layer])
        while self._next["coded"] < number:
            block = streamed_block(self._checkpoint, self._next["coded"])
            for stream in self._next:
                self._run(stream, block)
        return number

    def _left(
        self, coded: StreamedBlock, part: int
    ) -> Iterator[tuple[Tensor, Sequence[ExpertWork]]]:
        """What a block's coded output lacks of the original's, and its experts' work, by batches.

        The original's stream is past the block already.
        """
        hidden = self._hidden("coded", part), self._hidden("original", part), self._windows[part]
        for before, wanted, ids in zip(*(one.split(BATCH_WINDOWS) for one in hidden), strict=True):
            watched = _Works()
            after = coded.forward(before, ids, watched)
            yield coded.own_rows(wanted - after, ids), watched.works

    def _hidden(self, stream: str, part: int) -> Tensor:
        found: Tensor = self._spool.get(f"{stream}-{part}-{self._next[stream]}")
        return found

    def _run(self, stream: str, block: StreamedBlock) -> None:
        """Take a stream past its next block."""
        number = self._next[stream]
        for part, ids in enumerate(self._windows):
            after = block.run(self._hidden(stream, part), ids)
            self._spool.put(f"{stream}-{part}-{number + 1}", after)
            self._spool.drop(f"{stream}-{part}-{number}")
        self._next[stream] += 1


class _Works:
    """What the experts did in a forward pass."""

    def __init__(self) -> None:
        self.works: list[ExpertWork] = []

    def watch(self, work: ExpertWork) -> None:
        """Remember it."""
        self.works.append(work)


class _Moments:
    """Second moments of each expert's weighted neurons, and with its share of what is left.

    A token's experts are fitted as if each were alone, to a part of what is left of the token that
    goes with its squared weight; and so are blocks of neurons, to equal parts. Parts that add up to
    one cannot overshoot.
    """

    def __init__(self, num_experts: int, num_rows: int, num_columns: int) -> None:
        self._blocks = column_blocks(num_columns)
        self._inputs_EKK = [
            torch.zeros(num_experts, one.stop - one.start, one.stop - one.start)
            for one in self._blocks
        ]
        self._left_EHI = torch.zeros(num_experts, num_rows, num_columns)

    def add(self, left_NH: Tensor, works: Sequence[ExpertWork]) -> None:
        """Count some tokens."""
        total_N = left_NH.new_zeros(len(left_NH))
        for work in works:
            total_N.index_add_(0, work.tokens_N, work.weights_N.square())
        for work in works:
            weighted_NI = work.inner_NI * work.weights_N[:, None]
            share_N = work.weights_N.square() / total_N[work.tokens_N].clamp_min(1e-30)
            share_NH = left_NH[work.tokens_N] * share_N[:, None]
            self._left_EHI[work.expert].addmm_(share_NH.T, weighted_NI)
            for columns, inputs_EKK in zip(self._blocks, self._inputs_EKK, strict=True):
                weighted_NK = weighted_NI[:, columns]
                inputs_EKK[work.expert].addmm_(weighted_NK.T, weighted_NK)

    def solve(self) -> list[Tensor]:
        """Each expert's change of its down matrix, [H, I]."""
        diagonals = [one.diagonal(dim1=-2, dim2=-1).mean(dim=0) for one in self._inputs_EKK]
        ridge = RIDGE * float(torch.cat(diagonals).mean().clamp_min(LEAST))
        changes = []
        for expert, left_HI in enumerate(self._left_EHI):
            change_HI = torch.empty_like(left_HI)
            for columns, inputs_EKK in zip(self._blocks, self._inputs_EKK, strict=True):
                damped_KK = inputs_EKK[expert].double()
                damped_KK.diagonal().add_(ridge)
                lower_KK = torch.linalg.cholesky(damped_KK)
                solved_KH = torch.cholesky_solve(left_HI[:, columns].T.double(), lower_KK)
                change_HI[:, columns] = solved_KH.T.float() / len(self._blocks)
            changes.append(change_HI)
        return changes


class _Agreement:
    """How much of the changes is right on tokens that they were not learned from."""

    def __init__(self, changes: Sequence[Tensor]) -> None:
        self._changes = changes
        self._along, self._square = 0.0, 0.0

    def add(self, left_NH: Tensor, works: Sequence[ExpertWork]) -> None:
        """Count some tokens."""
        made_NH = torch.zeros_like(left_NH)
        for work in works:
            out_NH = (work.inner_NI @ self._changes[work.expert].T) * work.weights_N[:, None]
            made_NH.index_add_(0, work.tokens_N, out_NH)
        self._along += float((made_NH * left_NH).double().sum())
        self._square += float(made_NH.double().square().sum())

    @property
    def part(self) -> float:
        """The part of the changes that leaves least there, of 0 to 1."""
        return min(max(self._along / max(self._square, 1e-30), 0.0), 1.0)

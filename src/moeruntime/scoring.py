"""What a variant thinks of given text: log-probabilities, without choosing anything.

`Engine.score` and `Engine.logprobs` are this; windows run as steps of their own, between those of
requests, in cache blocks that are free.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import islice

import torch
from torch import Tensor

from moeruntime.errors import RequestError, ResourceError
from moeruntime.kernels import TokenGroup
from moeruntime.kv_cache import BlockPool, blocks_for
from moeruntime.models import Batch
from moeruntime.prompts import Prompts
from moeruntime.residency import Residency
from moeruntime.runner import Runner

__all__ = ["Scorer"]

# Rows of logits computed at once; bounds a [rows, vocabulary] float32 tensor.
SCORE_ROWS = 512


class Scorer:
    """Runs windows of text through an engine's model."""

    def __init__(
        self,
        runner: Runner,
        residency: Residency,
        blocks: BlockPool,
        prompts: Prompts,
        max_step_tokens: int,
    ) -> None:
        """Bind parts of an engine."""
        self._runner = runner
        self._residency = residency
        self._blocks = blocks
        self._prompts = prompts
        self._max_step_tokens = max_step_tokens

    @torch.inference_mode()
    def score(self, variant: str, windows: Sequence[Sequence[int]]) -> list[Tensor]:
        """As `Engine.score`."""
        hidden = self._hidden(variant, windows)
        return [
            self._token_logprobs(hidden_TH, window, slot)
            for (hidden_TH, slot), window in zip(hidden, windows, strict=True)
        ]

    @torch.inference_mode()
    def logprobs(self, variant: str, windows: Sequence[Sequence[int]]) -> Iterator[Tensor]:
        """As `Engine.logprobs`."""
        for hidden_TH, slot in self._hidden(variant, windows):
            logits_TV = self._runner.model.logits(hidden_TH, [TokenGroup(slot, 0, len(hidden_TH))])
            yield logits_TV.log_softmax(dim=-1).cpu()

    def _hidden(
        self, variant: str, windows: Sequence[Sequence[int]]
    ) -> Iterator[tuple[Tensor, int]]:
        """Each window's hidden_TH after the final norm, and the resident slot of the variant."""
        self._prompts.check_variant(variant)
        for window in windows:
            if not window:
                raise RequestError("a window is empty: it has no token to score")
            self._prompts.check_ids(window)
            self._prompts.check_room(len(window))
        if not self._residency.admit(variant):
            raise ResourceError("every resident slot is held by running requests")
        try:
            self._residency.wait_for(variant)
            for group in self._groups(windows):
                yield from self._run(variant, group)
        finally:
            self._residency.release(variant)

    def _groups(self, windows: Sequence[Sequence[int]]) -> Iterator[list[Sequence[int]]]:
        """Cut windows into steps of at most max_step_tokens (or one window) that fit the cache."""
        group: list[Sequence[int]] = []
        for window in windows:
            num_tokens = sum(len(one) for one in (*group, window))
            num_blocks = sum(blocks_for(len(one)) for one in (*group, window))
            if group and (num_tokens > self._max_step_tokens or num_blocks > self._blocks.num_free):
                yield group
                group = []
            group.append(window)
        if group:
            yield group

    def _run(self, variant: str, windows: Sequence[Sequence[int]]) -> list[tuple[Tensor, int]]:
        blocks = self._blocks.allocate(sum(blocks_for(len(window)) for window in windows))
        if blocks is None:
            raise ResourceError("the key-value cache is full of running requests")
        try:
            spans, left = [], iter(blocks)
            for window in windows:
                table = list(islice(left, blocks_for(len(window))))
                spans.append(self._runner.span(variant, window, 0, table))
            batch = Batch.build(spans, self._runner.device)
            hidden_TH = self._runner.model.forward(batch)
            slot = batch.groups[0].slot
            return [(hidden_TH[start:stop], slot) for start, stop, _ in batch.spans]
        finally:
            self._blocks.free(blocks)

    def _token_logprobs(self, hidden_TH: Tensor, window: Sequence[int], slot: int) -> Tensor:
        targets_T = torch.tensor(window[1:], device=self._runner.device)
        pieces = []
        for hidden_NH, targets_N in zip(
            hidden_TH[:-1].split(SCORE_ROWS), targets_T.split(SCORE_ROWS), strict=True
        ):
            logits_NV = self._runner.model.logits(hidden_NH, [TokenGroup(slot, 0, len(hidden_NH))])
            logprobs_NV = logits_NV.log_softmax(dim=-1)
            pieces.append(logprobs_NV.gather(1, targets_N[:, None])[:, 0])
        return torch.cat(pieces).cpu()

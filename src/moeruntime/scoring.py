"""What a variant thinks of given text: log-probabilities, without choosing anything.

`Engine.score` and `Engine.logprobs` are this; windows run as steps of their own, between those of
requests, in cache blocks that are free.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice, repeat

import torch
from torch import Tensor

from moeruntime.errors import RequestError, ResourceError
from moeruntime.kernels import TokenGroup
from moeruntime.kv_cache import BlockPool, blocks_for
from moeruntime.models import Batch
from moeruntime.prompts import Prompts
from moeruntime.residency import Residency
from moeruntime.runner import Runner

__all__ = ["Scorer", "Windows"]

Windows = Sequence[Sequence[int]]
"""Token ids of each window."""

# Rows of logits computed at once; bounds a [rows, vocabulary] float32 tensor.
SCORE_ROWS = 512


@dataclass(frozen=True, slots=True)
class _Job:
    """One window: what runs, what an encoder reads for it, and what is predicted.

    Attributes:
        ids: the tokens that run.
        source: what an encoder reads.
        targets: the tokens after the first of `ids`, then the second, ...; as many as there are.
    """

    ids: Sequence[int]
    source: Sequence[int]
    targets: Sequence[int]

    @property
    def num_tokens(self) -> int:
        return len(self.ids) + len(self.source)

    @property
    def num_blocks(self) -> int:
        return blocks_for(len(self.ids)) + blocks_for(len(self.source))


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
    def score(self, variant: str, windows: Windows, sources: Windows) -> list[Tensor]:
        """As `Engine.score`."""
        jobs = self._jobs(variant, windows, sources)
        return [
            self._token_logprobs(hidden_TH, job.targets, slot)
            for (hidden_TH, slot), job in zip(self._hidden(variant, jobs), jobs, strict=True)
        ]

    @torch.inference_mode()
    def logprobs(self, variant: str, windows: Windows, sources: Windows) -> Iterator[Tensor]:
        """As `Engine.logprobs`."""
        jobs = self._jobs(variant, windows, sources)
        for hidden_TH, slot in self._hidden(variant, jobs):
            logits_TV = self._runner.model.logits(hidden_TH, [TokenGroup(slot, 0, len(hidden_TH))])
            yield logits_TV.log_softmax(dim=-1).cpu()

    def _jobs(self, variant: str, windows: Windows, sources: Windows) -> list[_Job]:
        """Check windows and sources, and say what is to run for each."""
        self._prompts.check_variant(variant)
        encodes = self._prompts.has_encoder
        if len(sources) != (len(windows) if encodes else 0):
            raise RequestError(
                f"{len(sources)} sources for {len(windows)} windows; an encoder-decoder needs one "
                "for each, other models none"
            )
        jobs = []
        for window, source in zip(windows, sources if encodes else repeat(()), strict=False):
            if not window or (encodes and not source):
                raise RequestError("a window is empty: it has no token to score")
            self._prompts.check_ids([*window, *source])
            job = _Job(window, source, window[1:])
            if encodes:
                begins, _ = self._prompts.sides(source)
                job = _Job([*begins, *window[:-1]], source, window)
            self._prompts.check_room(len(job.ids), num_source=len(source))
            jobs.append(job)
        return jobs

    def _hidden(self, variant: str, jobs: Sequence[_Job]) -> Iterator[tuple[Tensor, int]]:
        """Each window's hidden_TH after the final norm, and the resident slot of the variant."""
        if not self._residency.admit(variant):
            raise ResourceError("every resident slot is held by running requests")
        try:
            self._residency.wait_for(variant)
            for group in self._groups(jobs):
                yield from self._run(variant, group)
        finally:
            self._residency.release(variant)

    def _groups(self, jobs: Sequence[_Job]) -> Iterator[list[_Job]]:
        """Cut windows into steps of at most max_step_tokens (or one window) that fit the cache."""
        group: list[_Job] = []
        for job in jobs:
            num_tokens = sum(one.num_tokens for one in (*group, job))
            num_blocks = sum(one.num_blocks for one in (*group, job))
            if group and (num_tokens > self._max_step_tokens or num_blocks > self._blocks.num_free):
                yield group
                group = []
            group.append(job)
        if group:
            yield group

    def _run(self, variant: str, jobs: Sequence[_Job]) -> list[tuple[Tensor, int]]:
        blocks = self._blocks.allocate(sum(job.num_blocks for job in jobs))
        if blocks is None:
            raise ResourceError("the key-value cache is full of running requests")
        try:
            left = iter(blocks)
            spans = [
                self._runner.span(
                    variant, job.ids, 0, list(islice(left, job.num_blocks)), job.source
                )
                for job in jobs
            ]
            batch = Batch.build(spans, self._runner.device)
            hidden_TH = self._runner.model.forward(batch)
            slot = batch.groups[0].slot
            return [(hidden_TH[start:stop], slot) for start, stop, _ in batch.spans]
        finally:
            self._blocks.free(blocks)

    def _token_logprobs(self, hidden_TH: Tensor, targets: Sequence[int], slot: int) -> Tensor:
        targets_T = torch.tensor(targets, dtype=torch.int64, device=self._runner.device)
        pieces = []
        for hidden_NH, targets_N in zip(
            hidden_TH[: len(targets)].split(SCORE_ROWS), targets_T.split(SCORE_ROWS), strict=True
        ):
            logits_NV = self._runner.model.logits(hidden_NH, [TokenGroup(slot, 0, len(hidden_NH))])
            logprobs_NV = logits_NV.log_softmax(dim=-1)
            pieces.append(logprobs_NV.gather(1, targets_N[:, None])[:, 0])
        return torch.cat(pieces).cpu()

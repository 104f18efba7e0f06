"""Runs the tokens the scheduler picked: lays them out, launches the model, chooses the next ones.

On a GPU nothing here waits for the device. `Launched.wait` does, and by then the engine may have
launched the next step.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from moeruntime.kernels import TokenGroup
from moeruntime.kernels.spans import to_device
from moeruntime.kv_cache import blocks_for
from moeruntime.logprobs import ROWS, PendingLogprobs, logprobs_of, wanted_logprobs
from moeruntime.models import Batch, Decoder, EncoderDecoder
from moeruntime.models.batch import Span, token_groups
from moeruntime.pace import Pace
from moeruntime.request import TokenLogprobs
from moeruntime.residency import Residency
from moeruntime.sampler import resample
from moeruntime.scheduler import Chunk
from moeruntime.sequence import Sequence as TokenSequence

if TYPE_CHECKING:  # these import Triton, which a CPU build of torch lacks
    from moeruntime.models.fused import FusedDecoder
    from moeruntime.models.step_graphs import StepGraphs

__all__ = ["Launched", "Runner"]


@dataclass(frozen=True, slots=True)
class Launched:
    """A step on its way.

    Attributes:
        sequences: those that get a token from it; none where all of it is the middle of prompts.
        repeats: whether `Runner.launch_next` can go on from it.
    """

    sequences: Sequence[TokenSequence]
    repeats: bool
    _tokens: Tensor
    _arrived: torch.cuda.Event | None
    _pace: Pace
    _logprobs: PendingLogprobs | None = None

    def rest(self) -> None:
        """Sleep until shortly before its tokens are there, if the one before has ended."""
        if self._arrived is not None:
            self._pace.rest(self._arrived.query)

    def wait(self) -> list[int]:
        """The token chosen for each sequence."""
        if self._arrived is not None:
            self._arrived.synchronize()
        self._pace.ended()
        return [int(token) for token in self._tokens.tolist()]

    def logprobs(self) -> list[TokenLogprobs | None]:
        """What the model thought of each of these tokens, where asked for; after `wait`."""
        return self._logprobs.read() if self._logprobs else [None] * len(self.sequences)


class Runner:
    """The model and the device it runs on."""

    def __init__(
        self,
        model: Decoder | EncoderDecoder | FusedDecoder,
        graphs: StepGraphs | None,
        residency: Residency,
        variant_idx: Mapping[str, int],
        device: torch.device,
    ) -> None:
        """Bind what a step needs; `graphs` serve steps of few tokens."""
        self.model = model
        self._graphs = graphs
        self._residency = residency
        self._variant_idx = variant_idx
        self.device = device
        self._pace = Pace()

    def span(
        self,
        variant: str,
        token_ids: Sequence[int],
        start: int,
        blocks: Sequence[int],
        source_ids: Sequence[int] = (),
    ) -> Span:
        """New tokens of a sequence of a resident variant.

        `blocks` begin with those of its source, which the encoder reads before its first tokens.
        """
        slot, variant_idx = self._residency.slot(variant), self._variant_idx[variant]
        count = blocks_for(len(source_ids))
        own, read = blocks[count:], blocks[:count]
        unread = () if start else source_ids
        return Span(slot, variant_idx, token_ids, start, own, len(source_ids), read, unread)

    @torch.inference_mode()
    def launch(self, chunks: Sequence[Chunk]) -> Launched:
        """Run a step; its sequences' `num_cached` moves on once it is launched."""
        self._pace.broken()
        # The kernels want each variant's tokens side by side.
        chunks = sorted(chunks, key=lambda chunk: self._residency.slot(chunk.sequence.variant))
        variants = {chunk.sequence.variant for chunk in chunks}
        spans = [self._span_of(chunk) for chunk in chunks]
        # Those whose prompts end here, or that decode, get a token.
        last = [chunk.num_tokens == chunk.sequence.num_pending for chunk in chunks]
        sequences = [c.sequence for c, is_last in zip(chunks, last, strict=True) if is_last]
        asked = any(_asks_of_prompt(chunk) for chunk in chunks)
        ends = accumulate(len(span.token_ids) for span in spans)
        rows = [end - 1 for end, is_last in zip(ends, last, strict=True) if is_last]
        if self._graphs is not None and not asked and self._in_graph(self._graphs, spans, variants):
            for variant in variants:
                self._residency.wait_for(variant)
            logits_TV, tokens_T = self._graphs.run(spans)
            _move_on(chunks)
            if not rows:
                return self._nothing()
            if len(rows) < len(tokens_T):
                picked = to_device(torch.tensor(rows), self.device)
                return self._choose(sequences, logits_TV[picked], tokens_T[picked], repeats=False)
            # Every chunk is a decode, or the last token of a prompt: all of them go on.
            return self._choose(sequences, logits_TV, tokens_T, repeats=True)
        batch = Batch.build(spans, self.device)
        hidden_TH = self.model.forward(batch, self._residency.gate(variants))
        if asked:
            self._look_at_prompts(chunks, batch, hidden_TH)
        _move_on(chunks)
        if not rows:
            return self._nothing()
        groups = token_groups([self._residency.slot(s.variant) for s in sequences])
        picked = to_device(torch.tensor(rows), self.device)
        logits_NV = self.model.logits(hidden_TH[picked], groups)
        return self._choose(sequences, logits_NV, logits_NV.argmax(dim=-1), repeats=False)

    def _in_graph(self, graphs: StepGraphs, spans: Sequence[Span], variants: Iterable[str]) -> bool:
        """Whether a step has few enough tokens, and need not begin on weights still to come."""
        num_tokens = sum(len(span.token_ids) for span in spans)
        if num_tokens == len(spans):
            return True
        return num_tokens <= graphs.max_tokens and all(map(self._residency.ready, variants))

    def _nothing(self) -> Launched:
        """A step that is the middle of prompts."""
        return Launched((), False, torch.empty(0), None, self._pace)

    @torch.inference_mode()
    def launch_next(self, launched: Launched) -> Launched:
        """Run the step after `launched`, whose tokens nobody has seen yet."""
        assert launched.repeats and self._graphs is not None
        logits_TV, tokens_T = self._graphs.run_on(len(launched.sequences))
        for sequence in launched.sequences:
            sequence.num_cached += 1
        return self._choose(launched.sequences, logits_TV, tokens_T, repeats=True)

    def _span_of(self, chunk: Chunk) -> Span:
        sequence = chunk.sequence
        end = sequence.num_cached + chunk.num_tokens
        blocks = sequence.block_table
        if chunk.num_tokens > 1:  # a single token may be repeated, and needs the blocks to come
            blocks = blocks[: sequence.num_source_blocks + blocks_for(end)]
        token_ids = sequence.pending_ids(chunk.num_tokens)
        start, source_ids = sequence.num_cached, sequence.source_ids
        return self.span(sequence.variant, token_ids, start, blocks, source_ids)

    def _choose(
        self,
        sequences: Sequence[TokenSequence],
        logits_NV: Tensor,
        tokens_N: Tensor,
        repeats: bool,
    ) -> Launched:
        """Replace the likeliest tokens where a sequence samples, and send all to the host."""
        params = [sequence.sampling for sequence in sequences]
        resample(tokens_N, logits_NV, params, [sequence.uniform() for sequence in sequences])
        logprobs = wanted_logprobs(logits_NV, tokens_N, params)
        if self.device.type != "cuda":
            return Launched(sequences, repeats, tokens_N, None, self._pace, logprobs)
        arrived = torch.cuda.Event()
        tokens = torch.empty(len(sequences), dtype=torch.int64, pin_memory=True)
        tokens.copy_(tokens_N, non_blocking=True)
        arrived.record(torch.cuda.current_stream(self.device))
        return Launched(sequences, repeats, tokens, arrived, self._pace, logprobs)

    def _look_at_prompts(self, chunks: Sequence[Chunk], batch: Batch, hidden_TH: Tensor) -> None:
        """Note what the model thinks of the prompts of those that ask; waits for the device."""
        for chunk, (start, stop, _) in zip(chunks, batch.spans, strict=True):
            if not _asks_of_prompt(chunk):
                continue
            sequence = chunk.sequence
            num_top = sequence.sampling.prompt_logprobs or 0
            slot = self._residency.slot(sequence.variant)
            # A row's opinion is of the token after it.
            first = sequence.num_cached + 1
            targets = sequence.prompt_ids[first : first + stop - start]
            for at in range(0, len(targets), ROWS):
                rows = targets[at : at + ROWS]
                hidden_NH = hidden_TH[start + at : start + at + len(rows)]
                logits_NV = self.model.logits(hidden_NH, [TokenGroup(slot, 0, len(rows))])
                sequence.prompt_logprobs += logprobs_of(logits_NV, rows, num_top)


def _asks_of_prompt(chunk: Chunk) -> bool:
    """Whether the chunk has tokens before the prompt's last, and an opinion of them is wanted."""
    sequence = chunk.sequence
    asks = sequence.sampling.prompt_logprobs is not None
    return asks and sequence.num_cached < len(sequence.prompt_ids) - 1


def _move_on(chunks: Sequence[Chunk]) -> None:
    """Not before the model was launched: what failed is not in the cache and must not be shared."""
    for chunk in chunks:
        chunk.sequence.num_cached += chunk.num_tokens

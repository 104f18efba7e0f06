"""The engine: every variant of a pack, served from one device.

One step is the whole story: the scheduler picks tokens, residency reconfigures, the model runs
them all together, the sampler chooses. Everything else here is admission and text.
"""

from __future__ import annotations

import secrets
from collections.abc import Callable, Container, Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from types import TracebackType
from typing import Self, Unpack

import torch
from torch import Tensor

from moeruntime.engine_options import (
    DEFAULT_MAX_SEQUENCES,
    DEFAULT_MAX_STEP_TOKENS,
    EngineOptions,
)
from moeruntime.errors import UsageError
from moeruntime.kv_cache import BlockPool, KVCache
from moeruntime.loader import Loader
from moeruntime.loading import load_experts, resolve_device, resolve_dtype
from moeruntime.memory import plan_memory
from moeruntime.models.build import build_model
from moeruntime.models.experts import DecodedCache
from moeruntime.models.step_buffers import BATCH_SIZES
from moeruntime.pack import Pack, WeightSource
from moeruntime.prompts import Prompts
from moeruntime.request import Delta, FinishReason, Output, Request, TokenLogprobs
from moeruntime.residency import Residency
from moeruntime.runner import Launched, Runner
from moeruntime.scheduler import Scheduler
from moeruntime.scoring import Scorer, Windows
from moeruntime.sequence import Sequence as TokenSequence
from moeruntime.text import TextStream, VariantText
from moeruntime.waiting import WaitingRoom

__all__ = ["Engine"]


@dataclass(slots=True)
class _Live:
    """A request between submission and its output."""

    sequence: TokenSequence
    stream: TextStream


class Engine:
    """Generates from any variant of a pack; requests of different variants share every step.

    Not thread-safe: one thread calls it.
    """

    def __init__(
        self,
        source: WeightSource,
        *,
        device: str = "auto",
        dtype: str = "auto",
        resident: int | None = None,
        max_sequences: int = DEFAULT_MAX_SEQUENCES,
        max_step_tokens: int = DEFAULT_MAX_STEP_TOKENS,
        cache_bytes: int | None = None,
        kept_layers: int | None = None,
        prefix_cache: bool = True,
        waiting: WaitingRoom | None = None,
        on_progress: Callable[[str], None] | None = None,
    ) -> None:
        """Load everything.

        Args:
            source: usually an open `Pack`; the engine closes it with itself.
            device: "cpu", "cuda", "cuda:1", ...; "auto" takes CUDA where there is one.
            dtype: "float32", "bfloat16", "float16"; "auto" is what the pack stores on CUDA and
                float32 on CPU.
            resident: variants whose non-expert weights are on the device at once; None means all.
            max_sequences: most requests in one step; on CUDA at most 256.
            max_step_tokens: most tokens in one step.
            cache_bytes: size of the key-value cache; None chooses one that fits.
            kept_layers: first layers of which every variant's weights stay on the device although
                not all variants are resident; a prompt can begin on them while the others are
                copied. Costs what a layer's own weights take, times the variants, and before the
                first one the embedding's. None keeps one layer on a GPU where that is cheap.
            prefix_cache: reuse keys and values of requests of a variant that began alike; without
                effect where there is an encoder, whose source decides all of them.
            waiting: who is admitted first; None takes requests in order of arrival.
            on_progress: called with a line for each part loaded.

        Raises:
            UsageError: a value makes no sense.
            ResourceError: no such device, or not enough memory; nothing was loaded.
        """
        manifest = source.manifest
        num_variants = len(manifest.variants)
        resident = num_variants if resident is None else resident
        if resident < 1:
            raise UsageError(f"resident is {resident}; at least one variant must be on the device")
        if not 1 <= max_sequences <= max_step_tokens:
            raise UsageError(
                f"max_sequences {max_sequences} must lie in 1..max_step_tokens {max_step_tokens}"
            )
        self.source = source
        self.device = resolve_device(device)
        if self.device.type == "cuda" and max_sequences > BATCH_SIZES[-1]:
            raise UsageError(f"max_sequences is {max_sequences}; on CUDA at most {BATCH_SIZES[-1]}")
        self.dtype = resolve_dtype(dtype, self.device, manifest.expert_dtype)
        if self.device.type == "cuda":
            torch.cuda.set_device(self.device)  # Triton launches on the current device
        self.memory = plan_memory(
            source,
            num_slots=min(resident, num_variants),
            dtype=self.dtype,
            device=self.device,
            max_sequences=max_sequences,
            max_step_tokens=max_step_tokens,
            cache_bytes=cache_bytes,
            kept_layers=kept_layers,
        )
        say = on_progress or (lambda line: None)
        decoded = DecodedCache(self.memory.decoded_bytes)
        experts = []
        with Loader(self.device) as loader:
            self.residency = Residency(
                source,
                min(resident, num_variants),
                self.dtype,
                loader,
                kept_layers=self.memory.kept_layers,
                on_variant=lambda name: say(f"variant {name}"),
            )
            for layer in range(manifest.config.num_layers):
                experts.append(load_experts(source, layer, self.dtype, loader, decoded))
                say(f"experts of layer {layer + 1}/{manifest.config.num_layers}")
        self._blocks = BlockPool(self.memory.num_blocks)
        cache = KVCache(manifest.config, self.memory.num_blocks, self.dtype, self.device)
        self._variant_idx = {name: idx for idx, name in enumerate(manifest.variant_names)}
        self.model, self.graphs = build_model(
            manifest,
            self.residency.weights,
            experts,
            cache,
            num_slots=min(resident, num_variants),
            max_sequences=max_sequences,
            max_step_tokens=max_step_tokens,
        )
        self._runner = Runner(
            self.model, self.graphs, self.residency, self._variant_idx, self.device
        )
        self._ahead: Launched | None = None
        self.scheduler = Scheduler(
            self._blocks,
            self.residency,
            max_sequences=max_sequences,
            max_step_tokens=max_step_tokens,
            prefix_cache=prefix_cache and not manifest.config.has_encoder,
            waiting=waiting,
        )
        self._prompts = Prompts(source, self.memory.num_blocks)
        self._scorer = Scorer(
            self._runner, self.residency, self._blocks, self._prompts, max_step_tokens
        )
        self._live: dict[int, _Live] = {}
        # What `generate` and `stream` met that was not theirs, for whoever asks next.
        self._kept: list[Delta] = []
        self._next_id = 0

    @classmethod
    def from_pack(cls, path: str | Path, **options: Unpack[EngineOptions]) -> Self:
        """Open the pack at `path` and load it; `Engine` explains the options.

        Raises:
            InputError, IntegrityError: there is no pack at `path`, or not a sound one.
        """
        pack = Pack(path)
        try:
            return cls(pack, **options)
        except BaseException:
            pack.close()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        problem: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        """End the template worker and close the pack's files."""
        self._prompts.close()
        self.source.close()

    @property
    def num_free_blocks(self) -> int:
        """Cache blocks nobody owns; all of them when the engine is idle."""
        return self._blocks.num_free

    # -- requests ---------------------------------------------------------------------------

    def submit(self, request: Request) -> int:
        """Queue a request and return its id.

        Raises:
            RequestError: unknown variant, token ids outside the vocabulary, or a prompt that
                leaves no room in the context or the cache.
            TokenizerError: the variant cannot turn this prompt into tokens, or its answer into
                the text that stop strings are looked for in.
        """
        prompt_ids = self._prompts.encode(request)
        sampling = self._prompts.fit(request.sampling, len(prompt_ids))
        if sampling.seed is None and sampling.temperature > 0:
            sampling = replace(sampling, seed=secrets.randbits(63))
        request_id, self._next_id = self._next_id, self._next_id + 1
        sides = self._prompts.sides(prompt_ids)
        sequence = TokenSequence(request_id, request.variant, sides[0], sampling, sides[1])
        before = () if request.is_chat else prompt_ids
        stream = self._prompts.text(request.variant).stream(sampling.stop, before)
        self._live[request_id] = _Live(sequence, stream)
        self.scheduler.add(sequence)
        return request_id

    def abort(self, request_id: int) -> None:
        """Drop a request wherever it is and take back all it holds; unknown ids are ignored."""
        live = self._live.pop(request_id, None)
        if live is not None:
            self.scheduler.remove(live.sequence)
        self._kept = [delta for delta in self._kept if delta.request_id != request_id]

    def await_turn(self) -> None:
        """Sleep while a step runs on the device, until shortly before the next must be launched.

        For a caller whose requests come from elsewhere: those it submits between this and `step`
        are in time for the step that follows, and those it submits later wait for one more.
        """
        if self._ahead is not None:
            self._ahead.rest()

    def step(self) -> list[Delta]:
        """Run one step over everything that can run.

        Returns:
            What it added, after what `generate` or `stream` passed by since the last call.
        """
        deltas = self._kept + self._run()
        self._kept = []
        return deltas

    def _step_for(self, request_ids: Container[int]) -> list[Delta]:
        """What there is for some requests; runs a step if there is nothing yet."""
        if not self._has_kept(request_ids):
            self._kept += self._run()
        mine = [delta for delta in self._kept if delta.request_id in request_ids]
        self._kept = [delta for delta in self._kept if delta.request_id not in request_ids]
        return mine

    def _has_kept(self, request_ids: Container[int]) -> bool:
        return any(delta.request_id in request_ids for delta in self._kept)

    def _run(self) -> list[Delta]:
        """Run one step and return what it added.

        On a GPU, where the same sequences go on, the step after it is launched before its tokens
        are looked at. A sequence that turns out to have ended leaves a token too many, in blocks
        of its own, which nobody reads.
        """
        launched, self._ahead = self._ahead, None
        if launched is None:
            chunks = self.scheduler.schedule()
            if not chunks:
                return []
            launched = self._runner.launch(chunks)
        else:
            self.scheduler.went_on(launched.sequences)
        if self._goes_on(launched):
            self._ahead = self._runner.launch_next(launched)
        return [
            self._advance(sequence, token, logprobs)
            for sequence, token, logprobs in zip(
                launched.sequences, launched.wait(), launched.logprobs(), strict=True
            )
            if sequence.request_id in self._live
        ]

    def _goes_on(self, launched: Launched) -> bool:
        """Whether the next step is the same sequences, each with another token to come."""
        return (
            launched.repeats
            and not self.scheduler.may_admit
            and len(self.scheduler.running) == len(launched.sequences)
            and all(
                sequence.request_id in self._live
                and len(sequence.output_ids) + 2 <= sequence.sampling.max_tokens
                for sequence in launched.sequences
            )
        )

    def generate(self, requests: Iterable[Request]) -> list[Output]:
        """Run requests to the end, batched together; outputs come in the order of the requests.

        Raises:
            RequestError, TokenizerError: one of them cannot be served; none has run then.
        """
        ids: list[int] = []
        try:
            for request in requests:
                ids.append(self.submit(request))
            outputs: dict[int, Output] = {}
            wanted = set(ids)
            while len(outputs) < len(ids):
                for delta in self._step_for(wanted):
                    if delta.output:
                        outputs[delta.request_id] = delta.output
        except BaseException:
            for request_id in ids:
                self.abort(request_id)
            raise
        return [outputs[request_id] for request_id in ids]

    def stream(self, request: Request) -> Iterator[Delta]:
        """Run one request, yielding text as it becomes certain; the last delta has the output."""
        request_id = self.submit(request)
        try:
            # Others may step in between, finish this request and leave its end behind.
            while request_id in self._live or self._has_kept({request_id}):
                yield from self._step_for({request_id})
        finally:
            self.abort(request_id)

    def tokenize(self, request: Request) -> list[int]:
        """The token ids a request's prompt becomes."""
        return self._prompts.encode(request)

    def text(self, variant: str) -> VariantText:
        """A variant's tokenizer, chat template and end-of-sequence tokens."""
        return self._prompts.text(variant)

    def score(self, variant: str, windows: Windows, sources: Windows = ()) -> list[Tensor]:
        """Log-probability (natural) of each token given those before it in its window.

        Args:
            variant: whose weights to use.
            windows: token ids; each window stands alone and fits the context.
            sources: what an encoder reads for each window, whose first token then is scored too.

        Returns:
            One float32 CPU tensor a window; without an encoder one shorter than the window.

        Raises:
            RequestError: unknown variant, or a window that is empty or does not fit.
            ResourceError: running requests hold every resident slot or the whole cache.
        """
        return self._scorer.score(variant, windows, sources)

    def logprobs(self, variant: str, windows: Windows, sources: Windows = ()) -> Iterator[Tensor]:
        """Log-probabilities (natural) of the whole vocabulary after each token of each window.

        With an encoder before each token instead. Takes and raises what `score` does.

        Yields:
            One float32 CPU tensor [T, V] a window; the engine is busy until the last is taken.
        """
        return self._scorer.logprobs(variant, windows, sources)

    # -- one step, in pieces ----------------------------------------------------------------

    def _advance(
        self, sequence: TokenSequence, token: int, logprobs: TokenLogprobs | None
    ) -> Delta:
        """Take a chosen token into a sequence; finish it if this was its last."""
        live = self._live[sequence.request_id]
        sequence.output_ids.append(token)
        if logprobs is not None:
            sequence.logprobs.append(logprobs)
        of_prompt = tuple(sequence.prompt_logprobs) if len(sequence.output_ids) == 1 else ()
        delta = Delta(sequence.request_id, "", (token,), None, logprobs, of_prompt)
        eos_ids = self._prompts.text(sequence.variant).eos_ids
        is_eos = token in eos_ids and not sequence.sampling.ignore_eos
        text = "" if is_eos else live.stream.push(token)
        reason: FinishReason | None = None
        if is_eos or live.stream.stopped:
            reason = "stop"
        elif len(sequence.output_ids) == sequence.sampling.max_tokens:
            reason = "length"
        if reason is None:
            return replace(delta, text=text)
        text += live.stream.finish()
        if live.stream.stopped:
            reason = "stop"
        sequence.finish_reason = reason
        self.scheduler.remove(sequence)
        del self._live[sequence.request_id]
        return replace(delta, text=text, output=sequence.output(live.stream.text, reason))

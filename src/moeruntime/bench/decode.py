"""Steps of one token for each sequence: the device's part alone, and through the whole engine.

The step alone is what the roofline is compared with. Its bytes depend on which experts its tokens
went to, so they are counted after it ran.
"""

from __future__ import annotations

import random
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from torch import Tensor

from moeruntime.bench.ceilings import Ceilings
from moeruntime.bench.machine import median_s
from moeruntime.bench.work import step_bytes
from moeruntime.engine import Engine
from moeruntime.kv_cache import blocks_for
from moeruntime.models import Batch, Decoder
from moeruntime.models.batch import Span
from moeruntime.models.experts import ExpertPool
from moeruntime.request import Request, SamplingParams

if TYPE_CHECKING:  # imports Triton, which a CPU build of torch lacks
    from moeruntime.models.step_graphs import StepGraphs

__all__ = ["DecodeRow", "decode_rate", "measure_decode", "resident_slots", "tokens_needed"]

# The step alone: warm-up and repeats go on from one another, each a token further.
REPEATS, WARM_UP = 20, 3
ROOM = 64
# Through the engine: prompts are so much shorter than the context, which is met half-way.
BEFORE, TOKENS = 32, 64


@dataclass(frozen=True, slots=True)
class DecodeRow:
    """Decode at one size of batch.

    Attributes:
        batch: sequences.
        variants: different variants among them.
        context: tokens of each.
        experts_per_layer: distinct experts that a step's tokens went to, mean over layers.
        step_bytes: what the step has to read.
        roofline_s: those bytes at the bandwidth of the best reader.
        step_s: the step alone.
        engine_tokens_per_s: scheduler, sampling and text included; None if not measured.
    """

    batch: int
    variants: int
    context: int
    experts_per_layer: float
    step_bytes: int
    roofline_s: float
    step_s: float
    engine_tokens_per_s: float | None

    @property
    def tokens_per_s(self) -> float:
        return self.batch / self.step_s

    @property
    def of_roofline(self) -> float:
        return self.roofline_s / self.step_s


def tokens_needed(batch: int, context: int, max_step_tokens: int) -> int:
    """Tokens of each sequence that the cache must hold for `measure_decode`."""
    prompts = -(-batch * context // max_step_tokens)
    return context + max(ROOM, TOKENS + prompts)


def measure_decode(
    engine: Engine,
    ceilings: Ceilings,
    *,
    batch: int,
    variants: int,
    context: int,
    max_step_tokens: int,
    whole: bool = True,
) -> DecodeRow:
    """Decode with random tokens; the first variants, in equal parts.

    Args:
        engine: idle, without a prefix cache, with as many resident slots as variants.
        ceilings: of its device.
        batch: sequences.
        variants: at most `batch`.
        context: tokens of each.
        max_step_tokens: the engine's.
        whole: measure the engine too, beside the step.
    """
    spans = _spans(engine, batch, variants, context)
    step: _Step = _GraphStep(engine.graphs, spans) if engine.graphs else _PlainStep(engine, spans)
    layers = range(engine.source.manifest.config.num_layers)
    faces = []
    for layer in layers:
        all_faces = engine.source.manifest.faces(layer)[0]
        faces.append([all_faces[idx] for idx in step.active_faces(layer)])
    num_bytes = step_bytes(engine, faces, variants=variants, batch=batch, context=context)
    return DecodeRow(
        batch=batch,
        variants=variants,
        context=context,
        experts_per_layer=sum(map(len, faces)) / len(layers),
        step_bytes=num_bytes,
        roofline_s=num_bytes / ceilings.read_bytes,
        step_s=median_s(step.run, engine.device, repeats=REPEATS, warm_up=WARM_UP),
        engine_tokens_per_s=_engine_rate(engine, batch, variants, context, max_step_tokens)
        if whole
        else None,
    )


def resident_slots(engine: Engine, names: Sequence[str]) -> dict[str, int]:
    """Where these variants are, once all of them are there; the engine has a slot for each."""
    for name in names:
        held = engine.residency.admit(name)
        assert held
        engine.residency.wait_for(name)
    slots = {name: engine.residency.slot(name) for name in names}
    for name in names:
        engine.residency.release(name)
    return slots


def decode_rate(engine: Engine, requests: Sequence[Request]) -> float | None:
    """Tokens a second while all of these requests decode; None if they never do, side by side."""
    ids = [engine.submit(request) for request in requests]
    seen: set[int] = set()
    num_tokens, start_s, stop_s = 0, 0.0, 0.0
    ended = False
    while not ended:
        deltas = engine.step()
        seen.update(delta.request_id for delta in deltas)
        ended = any(delta.output for delta in deltas)
        if start_s:
            stop_s = time.perf_counter()
            num_tokens += len(deltas)
        elif len(seen) == len(ids):
            start_s = time.perf_counter()
    for request_id in ids:
        engine.abort(request_id)
    return num_tokens / (stop_s - start_s) if num_tokens else None


class _Step(Protocol):
    def run(self) -> object: ...

    def active_faces(self, layer: int) -> list[int]: ...


class _GraphStep:
    """A captured step."""

    def __init__(self, graphs: StepGraphs, spans: Sequence[Span]) -> None:
        self._graphs, self._num_rows = graphs, len(spans)
        graphs.run(spans)
        self._counts_LF = graphs.buffers.lists.counts_LF.cpu()

    def run(self) -> object:
        return self._graphs.run_on(self._num_rows)

    def active_faces(self, layer: int) -> list[int]:
        return [int(face) for face in self._counts_LF[layer].nonzero()[:, 0]]


class _PlainStep:
    """A step of the reference decoder."""

    def __init__(self, engine: Engine, spans: Sequence[Span]) -> None:
        assert isinstance(engine.model, Decoder)
        model = engine.model
        self._model = model
        self._batch = Batch.build(spans, engine.device)
        self._pools = [_RecordingPool(pool) for pool in model.experts]
        parts = (model.config, model.weights, self._pools, model.faces_VLE, model.cache)
        Decoder(*parts).forward(self._batch)

    def run(self) -> object:
        hidden_TH = self._model.forward(self._batch)
        return self._model.logits(hidden_TH, self._batch.groups).argmax(dim=-1)

    def active_faces(self, layer: int) -> list[int]:
        return sorted(self._pools[layer].asked)


class _RecordingPool:
    """A layer's experts, and which of them were asked for."""

    def __init__(self, pool: ExpertPool) -> None:
        self._pool = pool
        self.asked: set[int] = set()

    @property
    def num_faces(self) -> int:
        return self._pool.num_faces

    def weights(self, face: int) -> tuple[Tensor, Tensor]:
        self.asked.add(face)
        return self._pool.weights(face)


def _variants_of(engine: Engine, batch: int, variants: int) -> list[str]:
    """A variant for each sequence, in equal parts."""
    names = engine.source.manifest.variant_names
    return [names[idx * variants // batch] for idx in range(batch)]


def _spans(engine: Engine, batch: int, variants: int, context: int) -> list[Span]:
    """The last token of each context, sorted by resident slot.

    What comes before it is whatever lies in the cache, of which all blocks are free.
    """
    names = engine.source.manifest.variant_names
    blocks = blocks_for(context + ROOM)
    assert batch * blocks <= engine.num_free_blocks
    tokens = _random_tokens(engine, batch, seed=batch)
    slots = resident_slots(engine, names[:variants])
    spans = [
        Span(
            slot=slots[name],
            variant_idx=names.index(name),
            token_ids=[token],
            start=context - 1,
            block_table=list(range(row * blocks, (row + 1) * blocks)),
        )
        for row, (name, token) in enumerate(
            zip(_variants_of(engine, batch, variants), tokens, strict=True)
        )
    ]
    return sorted(spans, key=lambda span: span.slot)


def _engine_rate(
    engine: Engine, batch: int, variants: int, context: int, max_step_tokens: int
) -> float | None:
    """Tokens a second of the engine, around the context."""
    num_prompt = max(1, context - BEFORE)
    # Those that come first decode while the others' prompts run.
    prompts = -(-batch * num_prompt // max_step_tokens)
    sampling = SamplingParams(max_tokens=TOKENS + prompts, ignore_eos=True)
    requests = [
        Request(name, _random_tokens(engine, num_prompt, seed), sampling)
        for seed, name in enumerate(_variants_of(engine, batch, variants))
    ]
    return decode_rate(engine, requests)


def _random_tokens(engine: Engine, count: int, seed: int) -> list[int]:
    """The same in every run, so that runs go to the same experts."""
    numbers = random.Random(seed)
    vocab_size = engine.source.manifest.config.vocab_size
    return [numbers.randrange(vocab_size) for _ in range(count)]

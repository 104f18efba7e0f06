"""How well a variant still speaks: negative log-likelihood, from the pack and from its original.

Documents are joined as the tokenizer frames them (usually <s> text </s>), cut into windows of
`context` tokens, and every token but a window's first is predicted from those before it. A last
incomplete window is left out, unless it is the only one.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from moeconsolidate.checkpoint import Checkpoint
from moeconsolidate.plan import OnProgress, Progress
from moeruntime.engine import Engine, EngineOptions
from moeruntime.errors import InputError
from moeruntime.pack import Manifest, TensorRef, Variant
from moeruntime.pack.manifest import variant_file
from moeruntime.strict_json import read_json_lines
from moeruntime.tensorfile import dtype_name

__all__ = [
    "CheckpointSource",
    "EvaluationRow",
    "Score",
    "evaluate_pack",
    "read_texts",
    "score_texts",
]


@dataclass(frozen=True, slots=True)
class EvaluationRow:
    """One variant on one text, from the pack and, where it was given, from its original.

    Attributes:
        variant: its name.
        data: the file of texts.
        score: from the pack.
        reference: from the original checkpoint.
    """

    variant: str
    data: str
    score: Score
    reference: Score | None

    @property
    def increase(self) -> float | None:
        """NLL from the pack minus NLL of the original, nats per token."""
        return None if self.reference is None else self.score.nll - self.reference.nll

    def to_json(self) -> dict[str, object]:
        """Plain values; what there is no reference for is null."""
        return {
            "model": self.variant,
            "data": self.data,
            "tokens": self.score.num_tokens,
            "nll": self.score.nll,
            "perplexity": self.score.perplexity,
            "reference_nll": None if self.reference is None else self.reference.nll,
            "nll_increase": self.increase,
        }


@dataclass(frozen=True, slots=True)
class Score:
    """A variant's loss on a text.

    Attributes:
        num_tokens: tokens predicted.
        nll: mean negative log-likelihood, nats per token.
    """

    num_tokens: int
    nll: float

    @property
    def perplexity(self) -> float:
        """exp(nll)."""
        return math.exp(self.nll)


def evaluate_pack(
    artifact: Path,
    data: Sequence[tuple[str, Path]],
    references: Mapping[str, Path],
    *,
    context: int = 512,
    max_windows: int | None = None,
    on_progress: OnProgress | None = None,
    engine_options: EngineOptions | None = None,
) -> list[EvaluationRow]:
    """Score variants of a pack, and their originals, on texts.

    Args:
        artifact: the pack.
        data: (variant, JSONL file) pairs.
        references: variant -> the checkpoint it was made from.
        context: tokens of a window.
        max_windows: windows of each text; None means all.
        on_progress: called after each text.
        engine_options: for both engines, as `Engine` takes them.

    Raises:
        RequestError: the pack has no such variant.
        InputError: a file is bad, or a reference has no data to be compared on.
    """
    options: EngineOptions = engine_options or {}
    texts = [(variant, path, read_texts(path)) for variant, path in data]
    if stray := sorted(set(references) - {variant for variant, _, _ in texts}):
        raise InputError(f"reference '{stray[0]}' has no data to be compared on")
    total = len(texts) + sum(variant in references for variant, _, _ in texts)
    done = 0

    def score(engine: Engine, variant: str, documents: Sequence[str]) -> Score:
        nonlocal done
        result = score_texts(engine, variant, documents, context=context, max_windows=max_windows)
        done += 1
        if on_progress:
            on_progress(Progress("texts", done, total))
        return result

    with Engine.from_pack(artifact, **options) as engine:
        for variant in [*references, *(variant for variant, _, _ in texts)]:
            engine.source.variant(variant)
        scores = [score(engine, variant, documents) for variant, _, documents in texts]
    originals: dict[int, Score] = {}
    for variant, folder in references.items():
        source = CheckpointSource(Checkpoint(variant, folder))
        with Engine(source, **options) as engine:
            for idx, (name, _, documents) in enumerate(texts):
                if name == variant:
                    originals[idx] = score(engine, variant, documents)
    return [
        EvaluationRow(variant, str(path), scores[idx], originals.get(idx))
        for idx, (variant, path, _) in enumerate(texts)
    ]


def read_texts(path: Path) -> list[str]:
    """Read a JSONL file of {"text": ...} objects; other keys are ignored.

    Raises:
        InputError: missing, malformed, or without a text; names the line.
    """
    texts = [fields.text("text") for fields in read_json_lines(path, InputError)]
    if not texts:
        raise InputError(f"{path}: holds no text")
    return texts


def score_texts(
    engine: Engine,
    variant: str,
    texts: Sequence[str],
    *,
    context: int = 512,
    max_windows: int | None = None,
) -> Score:
    """Score one variant of an engine on texts.

    Args:
        engine: idle; its variant is activated.
        variant: whose weights and tokenizer.
        texts: documents.
        context: tokens of a window, at most the model's context.
        max_windows: score this many windows from the start; None means all.

    Raises:
        InputError: the texts have fewer than two tokens, or `context` does not fit the model.
    """
    limit = engine.source.manifest.config.max_context
    if not 2 <= context <= limit:
        raise InputError(f"context {context} is outside 2..{limit}, the model's context")
    windows = _windows(engine, variant, texts, context)[:max_windows]
    total, num_tokens = 0.0, 0
    for logprobs in engine.score(variant, windows):
        total -= float(logprobs.double().sum())
        num_tokens += len(logprobs)
    if not num_tokens:
        raise InputError(f"variant '{variant}': the texts hold fewer than two tokens")
    return Score(num_tokens, total / num_tokens)


def _windows(engine: Engine, variant: str, texts: Sequence[str], context: int) -> list[list[int]]:
    encode = engine.text(variant).encode_document
    stream = [token for text in texts for token in encode(text)]
    windows = [stream[at : at + context] for at in range(0, len(stream), context)]
    if len(windows) > 1 and len(windows[-1]) < context:
        windows.pop()
    return windows


class CheckpointSource:
    """One checkpoint dressed as a pack of one variant, so that the engine can run the original."""

    def __init__(self, checkpoint: Checkpoint) -> None:
        """Take over an open checkpoint; `close` closes it."""
        self._checkpoint = checkpoint
        config, name = checkpoint.config, checkpoint.name
        self._expert_P = torch.empty(config.expert_numel, dtype=checkpoint.expert_dtype)
        self._in_memory: tuple[int, int] | None = None
        identity = tuple(range(config.num_experts))
        self.manifest = Manifest(
            family=checkpoint.family.model_type,
            config=config,
            expert_dtype=dtype_name(checkpoint.expert_dtype),
            num_slots=(config.num_experts,) * config.num_layers,
            variants=(
                Variant(
                    name=name,
                    content_sha256="",
                    expert_map=(identity,) * config.num_layers,
                    tensors={
                        role: TensorRef(variant_file(name), role)
                        for role in config.non_expert_shapes()
                    },
                ),
            ),
            files={},
            recipe={},
            provenance={},
        )

    @property
    def root(self) -> Path:
        """The checkpoint's folder."""
        return self._checkpoint.folder

    def variant(self, name: str) -> Variant:
        """The only variant."""
        assert name == self._checkpoint.name
        return self.manifest.variants[0]

    def variant_path(self, name: str, file: str) -> Path | None:
        """A side file of the checkpoint."""
        return self.root / file if file in self._checkpoint.side_files else None

    def read_slot(self, layer: int, part: str, slot: int, *, out: Tensor) -> None:
        """Read one part of one expert; parts of the same expert are read from disk once."""
        if self._in_memory != (layer, slot):
            self._checkpoint.read_expert(layer, slot, out=self._expert_P)
            self._in_memory = (layer, slot)
        num_weights = out.numel()
        flat = self._expert_P[:num_weights] if part == "gate_up" else self._expert_P[-num_weights:]
        out.copy_(flat.view(out.shape))

    def read_non_expert(self, variant: str, role: str) -> Tensor:
        """Read one non-expert tensor."""
        return self._checkpoint.read_non_expert(role)

    def close(self) -> None:
        """Close the checkpoint's files."""
        self._checkpoint.close()

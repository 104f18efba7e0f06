"""How well a variant still speaks: negative log-likelihood, from the pack and from its original.

An encoder-decoder is scored on pairs: its encoder reads the input, and every token of the target
is predicted, the end-of-text token included. Other models are scored on documents.

Documents are joined as the tokenizer frames them (usually <s> text </s>), cut into windows of
`context` tokens, and every token but a window's first is predicted from those before it. A last
incomplete window is left out, unless it is the only one.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from moeconsolidate.checkpoint import Checkpoint
from moeconsolidate.original import CheckpointSource
from moeconsolidate.pairs import Pair, encode_pairs, read_pairs
from moeconsolidate.plan import OnProgress, Progress
from moeconsolidate.texts import read_texts
from moeruntime.engine import Engine
from moeruntime.engine_options import EngineOptions
from moeruntime.errors import InputError
from moeruntime.pack import Pack

__all__ = [
    "EvaluationRow",
    "Score",
    "evaluate_pack",
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
            "nll": _finite(self.score.nll),
            "perplexity": _finite(self.score.perplexity),
            "reference_nll": _finite(None if self.reference is None else self.reference.nll),
            "nll_increase": _finite(self.increase),
        }


def _finite(value: float | None) -> float | None:
    """What JSON has a number for."""
    return value if value is not None and math.isfinite(value) else None


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
        """exp(nll), which may be more than there are numbers for."""
        try:
            return math.exp(self.nll)
        except OverflowError:
            return math.inf


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
    with Pack(artifact) as pack:
        read = read_pairs if pack.manifest.config.has_encoder else read_texts
    texts = [(variant, path, read(path)) for variant, path in data]
    if stray := sorted(set(references) - {variant for variant, _, _ in texts}):
        raise InputError(f"reference '{stray[0]}' has no data to be compared on")
    total = len(texts) + sum(variant in references for variant, _, _ in texts)
    done = 0

    def score(engine: Engine, variant: str, texts: Sequence[str] | Sequence[Pair]) -> Score:
        nonlocal done
        result = score_texts(engine, variant, texts, context=context, max_windows=max_windows)
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


def score_texts(
    engine: Engine,
    variant: str,
    texts: Sequence[str] | Sequence[Pair],
    *,
    context: int = 512,
    max_windows: int | None = None,
) -> Score:
    """Score one variant of an engine on texts.

    Args:
        engine: idle; its variant is activated.
        variant: whose weights and tokenizer.
        texts: documents; pairs for an encoder-decoder.
        context: tokens of a window, at most the model's context; of a pair, tokens of either side.
        max_windows: score this many windows, or pairs, from the start; None means all.

    Raises:
        InputError: the texts have fewer than two tokens, or `context` does not fit the model.
    """
    limit = engine.source.manifest.config.max_context
    if not 2 <= context <= limit:
        raise InputError(f"context {context} is outside 2..{limit}, the model's context")
    pairs = [one for one in texts if isinstance(one, Pair)][:max_windows]
    encoded = encode_pairs(engine.text(variant), pairs, context)
    sources, windows = [one.source for one in encoded], [one.target for one in encoded]
    if not pairs:
        documents = [one for one in texts if isinstance(one, str)]
        windows = _windows(engine, variant, documents, context)[:max_windows]
    total, num_tokens = 0.0, 0
    for logprobs in engine.score(variant, windows, sources):
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

"""Calibration text as windows of tokens: given by the user, or sampled from the variant itself."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from moeconsolidate.checkpoint import Checkpoint
from moeconsolidate.original import CheckpointSource
from moeruntime.engine import Engine
from moeruntime.errors import CheckpointError, InputError
from moeruntime.request import Request, SamplingParams
from moeruntime.strict_json import read_json_lines
from moeruntime.text import VariantText

__all__ = ["Windows", "read_texts", "sampled_windows", "text_windows"]

NUM_WINDOWS = 112
NUM_HELD_OUT = 16
NUM_SAMPLED_WINDOWS = 32
NUM_SAMPLED_HELD_OUT = 16
WINDOW_TOKENS = 512


def read_texts(path: Path) -> list[str]:
    """Read a JSONL file of {"text": ...} objects; other keys are ignored.

    Raises:
        InputError: missing, malformed, or without a text; names the line.
    """
    texts = [fields.text("text") for fields in read_json_lines(path, InputError)]
    if not texts:
        raise InputError(f"{path}: holds no text")
    return texts


@dataclass(frozen=True, slots=True)
class Windows:
    """Calibration tokens, as `streaming` has them: what to learn from, and what to measure with.

    Where there is too little text to hold any out, a part of what was learned from is measured.
    """

    learned: Tensor
    held_out: Tensor

    @property
    def sha256(self) -> str:
        """Digest of all tokens, for the recipe."""
        both = torch.cat([self.learned, self.held_out])
        return hashlib.sha256(both.numpy().tobytes()).hexdigest()


def text_windows(checkpoint: Checkpoint, files: Sequence[Path]) -> Windows:
    """Windows of a variant's calibration texts, equally many from each file.

    Raises:
        InputError: a file is bad, or holds less than one window.
        CheckpointError: the variant's context is a single token.
    """
    source = CheckpointSource(checkpoint)
    encode = VariantText(source, checkpoint.name).encode_document
    length = _window_tokens(checkpoint)
    learn, hold = (-(-count // len(files)) for count in (NUM_WINDOWS, NUM_HELD_OUT))
    learned, held_out = [], []
    for path in files:
        stream: list[int] = []
        for text in read_texts(path):
            stream += encode(text)
            if len(stream) >= (learn + hold) * length:
                break
        usable = min(len(stream) // length, learn + hold)
        if not usable:
            raise InputError(f"{path}: {len(stream)} tokens of text; calibration needs {length}")
        windows_WT = torch.tensor(stream[: usable * length]).view(-1, length)
        learned.append(windows_WT[:learn])
        held_out.append(windows_WT[learn:] if usable > learn else windows_WT[:hold])
    return Windows(torch.cat(learned), torch.cat(held_out))


def sampled_windows(checkpoint: Checkpoint) -> Windows:
    """Windows of text that the variant itself writes, at temperature 1 from an empty start.

    What a model says by itself is spread over what it was trained on, so it can stand in for text
    that nobody has at hand. Seeds are fixed: the same model writes the same text.
    """
    length = _window_tokens(checkpoint)
    num_windows = NUM_SAMPLED_WINDOWS + NUM_SAMPLED_HELD_OUT
    with Engine(
        CheckpointSource(Checkpoint(checkpoint.name, checkpoint.folder)),
        dtype="float32",
        max_sequences=num_windows,
    ) as engine:
        start = engine.tokenize(Request(checkpoint.name, ""))[:1] or [0]
        stream: list[int] = []
        seed = 0
        while len(stream) < num_windows * length:
            requests = [
                Request(
                    checkpoint.name,
                    start,
                    SamplingParams(max_tokens=length - 1, temperature=1.0, seed=seed + number),
                )
                for number in range(num_windows)
            ]
            for output in engine.generate(requests):
                stream += [*start, *output.token_ids]
            seed += num_windows
    windows_WT = torch.tensor(stream[: num_windows * length]).view(-1, length)
    return Windows(windows_WT[:NUM_SAMPLED_WINDOWS], windows_WT[NUM_SAMPLED_WINDOWS:])


def _window_tokens(checkpoint: Checkpoint) -> int:
    context = checkpoint.config.max_context
    if context < 2:
        raise CheckpointError(
            f"{checkpoint.folder}: a context of {context} token leaves nothing to predict, and so "
            "nothing to calibrate with"
        )
    return min(WINDOW_TOKENS, context)

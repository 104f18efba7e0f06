"""Calibration text as windows of tokens: given by the user, or sampled from the variant itself."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from moeconsolidate.checkpoint import Checkpoint
from moeconsolidate.original import CheckpointSource
from moeruntime.engine import Engine
from moeruntime.errors import InputError
from moeruntime.request import Request, SamplingParams
from moeruntime.strict_json import read_json_lines
from moeruntime.text import VariantText

__all__ = ["read_texts", "sampled_windows", "text_windows", "windows_sha256"]

NUM_WINDOWS = 64
NUM_SAMPLED_WINDOWS = 32
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


def text_windows(checkpoint: Checkpoint, files: Sequence[Path]) -> Tensor:
    """Windows [W, T] of a variant's calibration texts, equally many from each file.

    Raises:
        InputError: a file is bad, or holds less than one window.
    """
    source = CheckpointSource(checkpoint)
    encode = VariantText(source, checkpoint.name).encode_document
    length = _window_tokens(checkpoint)
    pieces = []
    for path in files:
        wanted = -(-NUM_WINDOWS // len(files)) * length
        stream: list[int] = []
        for text in read_texts(path):
            stream += encode(text)
            if len(stream) >= wanted:
                break
        usable = min(len(stream), wanted) // length * length
        if not usable:
            raise InputError(f"{path}: {len(stream)} tokens of text; calibration needs {length}")
        pieces.append(torch.tensor(stream[:usable]).view(-1, length))
    return torch.cat(pieces)


def sampled_windows(checkpoint: Checkpoint) -> Tensor:
    """Windows [W, T] of text that the variant itself writes, at temperature 1 from an empty start.

    What a model says by itself is spread over what it was trained on, so it can stand in for text
    that nobody has at hand. Seeds are fixed: the same model writes the same text.
    """
    length = _window_tokens(checkpoint)
    with Engine(CheckpointSource(Checkpoint(checkpoint.name, checkpoint.folder))) as engine:
        start = engine.tokenize(Request(checkpoint.name, ""))[:1] or [0]
        stream: list[int] = []
        seed = 0
        while len(stream) < NUM_SAMPLED_WINDOWS * length:
            requests = [
                Request(
                    checkpoint.name,
                    start,
                    SamplingParams(max_tokens=length - 1, temperature=1.0, seed=seed + number),
                )
                for number in range(NUM_SAMPLED_WINDOWS)
            ]
            for output in engine.generate(requests):
                stream += [*start, *output.token_ids]
            seed += NUM_SAMPLED_WINDOWS
    return torch.tensor(stream[: NUM_SAMPLED_WINDOWS * length]).view(-1, length)


def windows_sha256(windows_WT: Tensor) -> str:
    """Digest of calibration tokens, for the recipe."""
    return hashlib.sha256(windows_WT.contiguous().numpy().tobytes()).hexdigest()


def _window_tokens(checkpoint: Checkpoint) -> int:
    return min(WINDOW_TOKENS, checkpoint.config.max_context)

"""Text for encoder-decoders: pairs of what is given and what is wanted, as token ids."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from moeconsolidate.checkpoint import Checkpoint
from moeconsolidate.original import CheckpointSource
from moeconsolidate.streaming import PAD
from moeconsolidate.texts import WINDOW_TOKENS, Windows
from moeruntime.errors import InputError
from moeruntime.families import EncoderDecoderConfig
from moeruntime.strict_json import read_json_lines
from moeruntime.text import VariantText

__all__ = ["Pair", "TokenPair", "encode_pairs", "pair_windows", "read_pairs"]

NUM_PAIRS = 256
NUM_HELD_OUT = 128


@dataclass(frozen=True, slots=True)
class Pair:
    """One example: what the encoder reads, and what the decoder should say."""

    input: str
    target: str


@dataclass(frozen=True, slots=True)
class TokenPair:
    """A pair as token ids, each side with its end-of-text token."""

    source: list[int]
    target: list[int]


def read_pairs(path: Path) -> list[Pair]:
    """Read a JSONL file of {"input": ..., "target": ...} objects; other keys are ignored.

    Raises:
        InputError: missing, malformed, or without a pair; names the line.
    """
    pairs = [
        Pair(fields.text("input"), fields.text("target"))
        for fields in read_json_lines(path, InputError)
    ]
    if not pairs:
        raise InputError(f"{path}: holds no pair")
    return pairs


def encode_pairs(
    text: VariantText, pairs: Sequence[Pair], limit: int, target_limit: int | None = None
) -> list[TokenPair]:
    """Token ids of pairs, each side cut to a number of tokens, of which the last stays the last.

    Targets are cut to `limit` too unless they have a limit of their own.
    """

    def encode(side: str, most: int) -> list[int]:
        ids = text.encode_document(side)
        return ids if len(ids) <= most else [*ids[: most - 1], ids[-1]]

    return [
        TokenPair(encode(pair.input, limit), encode(pair.target, target_limit or limit))
        for pair in pairs
    ]


def pair_windows(checkpoint: Checkpoint, files: Sequence[Path]) -> Windows:
    """Windows of a variant's calibration pairs, equally many from each file; two thirds to learn.

    Raises:
        InputError: a file is bad, or a pair has no token on one side.
    """
    config = checkpoint.config
    assert isinstance(config, EncoderDecoderConfig)
    text = VariantText(CheckpointSource(checkpoint), checkpoint.name)
    limit = min(WINDOW_TOKENS, config.max_context - 1)
    learn, hold = (-(-count // len(files)) for count in (NUM_PAIRS, NUM_HELD_OUT))
    learned: list[TokenPair] = []
    held_out: list[TokenPair] = []
    for path in files:
        pairs = encode_pairs(text, read_pairs(path)[: learn + hold], limit)
        if any(not pair.source or not pair.target for pair in pairs):
            raise InputError(f"{path}: a pair has a side without a token")
        split = min(learn, -(-2 * len(pairs) // 3))
        learned += pairs[:split]
        held_out += pairs[split:] or pairs[:hold]
    longest = max(max(len(one.source), len(one.target) + 1) for one in learned + held_out)

    def padded(pairs: Sequence[TokenPair]) -> Tensor:
        windows_W2T = torch.full((len(pairs), 2, longest), PAD)
        for window_2T, pair in zip(windows_W2T, pairs, strict=True):
            window_2T[0, : len(pair.source)] = torch.tensor(pair.source)
            decoded = [config.decoder_start_id, *pair.target]
            window_2T[1, : len(decoded)] = torch.tensor(decoded)
        return windows_W2T

    return Windows(padded(learned), padded(held_out))

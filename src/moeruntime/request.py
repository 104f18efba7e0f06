"""What a caller asks for and gets back."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

from moeruntime.errors import RequestError

__all__ = [
    "Delta",
    "FinishReason",
    "Message",
    "Output",
    "Request",
    "SamplingParams",
    "TokenLogprobs",
]

FinishReason = Literal["stop", "length", "abort"]
Message = dict[str, str]
"""One turn of a chat: {"role": "user", "content": "..."}."""

MAX_STOP_STRINGS = 16
MAX_LOGPROBS = 20


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """How tokens are chosen, and when to stop.

    Attributes:
        max_tokens: at most this many new tokens; the model's context may end sooner.
        temperature: 0 takes the likeliest token; above, probabilities are softmax(logits / t).
        top_p: sample from the likeliest tokens that together reach this probability.
        top_k: sample from this many likeliest tokens; 0 means all.
        seed: makes sampling repeatable, whatever else is in the batch; None draws a fresh one.
        stop: generation ends before the first of these strings, which is not part of the text.
        ignore_eos: go on after an end-of-sequence token, to measure steps of a known number.
        logprobs: report the log-probability of each new token, beside this many of the likeliest;
            None reports nothing.
        prompt_logprobs: the same for the tokens of the prompt, all but the first.
    """

    max_tokens: int = 128
    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    seed: int | None = None
    stop: tuple[str, ...] = ()
    ignore_eos: bool = False
    logprobs: int | None = None
    prompt_logprobs: int | None = None

    def __post_init__(self) -> None:
        """Check every range.

        Raises:
            RequestError: names the parameter, its value and its range.
        """
        _check_integer("max_tokens", self.max_tokens, 1, 2**31 - 1)
        _check("temperature", self.temperature, 0.0, 100.0)
        _check("top_p", self.top_p, 0.0, 1.0)
        _check_integer("top_k", self.top_k, 0, 2**31 - 1)
        if self.seed is not None:
            _check_integer("seed", self.seed, 0, 2**64 - 1)
        for name, value in (("logprobs", self.logprobs), ("prompt_logprobs", self.prompt_logprobs)):
            if value is not None:
                _check_integer(name, value, 0, MAX_LOGPROBS)
        if self.top_p == 0.0:
            raise RequestError("top_p is 0, which leaves no token; use temperature 0 for greedy")
        all_text = all(isinstance(one, str) for one in self.stop)
        # A single string given for a tuple of them also "holds" the empty string.
        if not all_text or len(self.stop) > MAX_STOP_STRINGS or "" in self.stop:
            raise RequestError(
                f"stop takes a tuple of up to {MAX_STOP_STRINGS} strings, none of them empty"
            )


@dataclass(frozen=True, slots=True)
class Request:
    """One prompt for one variant.

    Attributes:
        variant: a variant's name in the pack.
        prompt: text; or token ids, used as they are; or chat messages.
        sampling: how to choose tokens.
        chat: wrap a text prompt as a user message in the variant's chat template. The answer to a
            chat, in token ids too, is a text of its own; any other goes on where the prompt ends.
    """

    variant: str
    prompt: str | Sequence[int] | Sequence[Message]
    sampling: SamplingParams = field(default_factory=SamplingParams)
    chat: bool = False

    @property
    def is_chat(self) -> bool:
        """Whether the prompt is a chat."""
        return self.chat or any(isinstance(one, dict) for one in self.prompt[:1])


@dataclass(frozen=True, slots=True)
class TokenLogprobs:
    """What the model thought of one token.

    Attributes:
        logprob: its log-probability (natural), before temperature, top-k and top-p.
        top: the likeliest tokens in its place and theirs, likeliest first.
    """

    logprob: float
    top: tuple[tuple[int, float], ...]


@dataclass(frozen=True, slots=True)
class Output:
    """A finished request.

    Attributes:
        variant: who answered.
        text: the new text, without special tokens and without the stop string.
        token_ids: the new tokens, including an end-of-sequence token if there was one.
        num_prompt_tokens: length of the prompt as the model saw it.
        finish_reason: "stop" (end of sequence or stop string), "length" or "abort".
        prompt_ids: the prompt as the model saw it.
        logprobs: of each new token, if they were asked for.
        prompt_logprobs: of each token of the prompt but the first, if they were asked for.
    """

    variant: str
    text: str
    token_ids: tuple[int, ...]
    num_prompt_tokens: int
    finish_reason: FinishReason
    prompt_ids: tuple[int, ...] = field(default=(), repr=False, compare=False)
    logprobs: tuple[TokenLogprobs, ...] = ()
    prompt_logprobs: tuple[TokenLogprobs, ...] = ()


@dataclass(frozen=True, slots=True)
class Delta:
    """What one step added to one request; `output` is there once it has finished.

    `logprobs` are of its token, `prompt_logprobs` come with the first one, both if asked for.
    """

    request_id: int
    text: str
    token_ids: tuple[int, ...]
    output: Output | None = None
    logprobs: TokenLogprobs | None = None
    prompt_logprobs: tuple[TokenLogprobs, ...] = ()


def _check(name: str, value: float, low: float, high: float) -> None:
    if isinstance(value, bool) or not isinstance(value, int | float) or math.isnan(value):
        raise RequestError(f"{name} is {value!r}, not a number")
    if not low <= value <= high:
        raise RequestError(f"{name} is {value}, outside {low}..{high}")


def _check_integer(name: str, value: int, low: int, high: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int):
        raise RequestError(f"{name} is {value!r}, not an integer")
    _check(name, value, low, high)

"""From a request's body to a `Generation`: strict, with one clear message for whatever is wrong.

A field that is not known is refused, as is one that is known and cannot be honoured, unless its
value asks for nothing: a client must not believe that it got what it did not.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

from moeruntime.errors import RequestError
from moeruntime.request import MAX_LOGPROBS, MAX_STOP_STRINGS, Message, SamplingParams
from moeruntime.server.errors import ApiError
from moeruntime.strict_json import Fields, parse_json

__all__ = ["Generation", "Prompt", "Tokenization", "parse_generation", "parse_tokenization"]

Prompt = str | tuple[int, ...] | tuple[Message, ...]
Endpoint = Literal["completions", "chat"]

MAX_CHOICES = 128
COMPLETION_TOKENS = 16  # OpenAI's default
CHAT_TOKENS = 512  # every sequence reserves cache for its longest life, so not "what is left"
MAX_TOKEN_ID = 2**31 - 1
ROLES = ("system", "user", "assistant", "developer")

# Accepted because they ask for nothing that changes the answer.
_IGNORED = ("user", "metadata", "store", "service_tier", "safety_identifier", "prompt_cache_key")
# Known to OpenAI's clients, refused unless the value is one that asks for nothing.
_UNSUPPORTED: dict[str, tuple[object, ...]] = {
    "audio": (),
    "best_of": (1,),
    "frequency_penalty": (0, 0.0),
    "function_call": ("none",),
    "functions": ([],),
    "logit_bias": ({},),
    "modalities": (["text"],),
    "parallel_tool_calls": (True, False),
    "prediction": (),
    "presence_penalty": (0, 0.0),
    "reasoning_effort": (),
    "response_format": ({"type": "text"},),
    "suffix": ("",),
    "tool_choice": ("none",),
    "tools": ([],),
    "verbosity": (),
    "web_search_options": (),
}
_NEVER = {
    "chat_template": "templates come with the variant, a request cannot bring one",
    "chat_template_kwargs": "templates come with the variant, a request cannot steer one",
}


@dataclass(frozen=True, slots=True)
class Generation:
    """What one request asks for.

    Attributes:
        endpoint: whose shape the answer has.
        model: the variant.
        prompts: one or more; each gets `n` choices.
        sampling: of every choice; `seed` is that of the first.
        n: choices a prompt.
        stream: whether the answer comes as events.
        usage: whether a stream ends with the number of tokens.
        echo: whether the text begins with the prompt.
        prompt_only: nothing is generated: the prompt is echoed, perhaps with log-probabilities.
    """

    endpoint: Endpoint
    model: str
    prompts: tuple[Prompt, ...]
    sampling: SamplingParams
    n: int = 1
    stream: bool = False
    usage: bool = False
    echo: bool = False
    prompt_only: bool = False

    @property
    def num_choices(self) -> int:
        """Sequences that run for it."""
        return self.n * len(self.prompts)

    def sampling_of(self, choice: int) -> SamplingParams:
        """Choices of one prompt differ although their request has a seed."""
        if self.sampling.seed is None:
            return self.sampling
        seed = (self.sampling.seed + choice % self.n) % 2**64
        return replace(self.sampling, seed=seed)


@dataclass(frozen=True, slots=True)
class Tokenization:
    """What /tokenize is asked: a variant and one prompt."""

    model: str
    prompt: Prompt


def parse_generation(body: bytes, endpoint: Endpoint, variants: Sequence[str]) -> Generation:
    """Read a body of /v1/completions or /v1/chat/completions.

    Raises:
        RequestError: names the field.
        ApiError: 404 for a variant that is not there.
    """
    fields = _open(body)
    model = _model(fields, variants)
    chat = endpoint == "chat"
    prompts: tuple[Prompt, ...] = (_messages(fields),) if chat else _prompts(fields)
    n = fields.integer("n", 1, MAX_CHOICES, 1)
    if n * len(prompts) > MAX_CHOICES:
        fields.fail(f"field 'n' times the prompts is {n * len(prompts)}, more than {MAX_CHOICES}")
    echo = False if chat else fields.boolean("echo", False)
    max_tokens = _max_tokens(fields, chat=chat, low=0 if echo else 1)
    num_logprobs = _chat_logprobs(fields) if chat else _completion_logprobs(fields)
    stream = fields.boolean("stream", False)
    sampling = SamplingParams(
        max_tokens=max(1, max_tokens),
        temperature=fields.number("temperature", 0.0, 100.0, 1.0),
        top_p=fields.number("top_p", 0.0, 1.0, 1.0),
        top_k=max(0, fields.integer("top_k", -1, 2**31 - 1, 0)),
        seed=fields.integer("seed", -(2**63), 2**64 - 1) % 2**64 if fields.has("seed") else None,
        stop=_stop(fields),
        ignore_eos=fields.boolean("ignore_eos", False),
        logprobs=num_logprobs,
        prompt_logprobs=num_logprobs if echo else None,
    )
    generation = Generation(
        endpoint,
        model,
        prompts,
        sampling,
        n,
        stream,
        usage=_stream_options(fields, stream=stream),
        echo=echo,
        prompt_only=max_tokens == 0,
    )
    fields.raw("seed", None)
    _finish(fields)
    return generation


def parse_tokenization(body: bytes, variants: Sequence[str]) -> Tokenization:
    """Read a body of /tokenize: {"model": ..., "prompt": ...} or {"model": ..., "messages": ...}.

    Raises:
        RequestError, ApiError: as `parse_generation`.
    """
    fields = _open(body)
    model = _model(fields, variants)
    if fields.has("messages") == fields.has("prompt"):
        fields.fail("give either field 'prompt' or field 'messages'")
    prompt = _messages(fields) if fields.has("messages") else fields.text("prompt")
    fields.raw("prompt", None)
    fields.raw("messages", None)
    _finish(fields)
    return Tokenization(model, prompt)


def _open(body: bytes) -> Fields:
    return Fields(parse_json(body, "body", RequestError), "body", RequestError)


def _model(fields: Fields, variants: Sequence[str]) -> str:
    model = fields.text("model")
    if model not in variants:
        raise ApiError(
            404,
            f"no model {ascii(model[:80])}; there are: {', '.join(variants)}",
            code="model_not_found",
            param="model",
        )
    return model


def _prompts(fields: Fields) -> tuple[Prompt, ...]:
    """A text, token ids, or a list of either."""
    raw = fields.raw("prompt")
    if isinstance(raw, str):
        return (_text_prompt(fields),)
    if not isinstance(raw, list) or not raw:
        fields.fail("field 'prompt' must be a text, a list of token ids, or a list of either")
    if all(isinstance(one, int) and not isinstance(one, bool) for one in raw):
        return (fields.integers("prompt", 0, MAX_TOKEN_ID),)
    if len(raw) > MAX_CHOICES:
        fields.fail(f"field 'prompt' holds {len(raw)} prompts, more than {MAX_CHOICES}")
    prompts: list[Prompt] = []
    for idx, one in enumerate(raw):
        inner = Fields({"prompt": one}, f"{fields.where}: prompt[{idx}]", RequestError)
        if isinstance(one, list):
            prompts.append(inner.integers("prompt", 0, MAX_TOKEN_ID))
        else:
            prompts.append(_text_prompt(inner))
    return tuple(prompts)


def _text_prompt(fields: Fields) -> str:
    text = fields.text("prompt")
    if not text:
        fields.fail("field 'prompt' is empty: there is nothing to go on from")
    return text


def _messages(fields: Fields) -> tuple[Message, ...]:
    messages = [_message(one) for one in fields.children("messages")]
    if not messages:
        fields.fail("field 'messages' is empty: there is nothing to answer")
    return tuple(messages)


def _message(fields: Fields) -> Message:
    role = fields.text("role")
    if role not in ROLES:
        fields.fail(f"field 'role' is {ascii(role[:40])}, not one of {', '.join(ROLES)}")
    content = fields.raw("content")
    text = _parts(fields) if isinstance(content, list) else fields.text("content")
    message = {"role": role, "content": text}
    if fields.has("name"):
        message["name"] = fields.text("name")
    for key in ("name", "refusal", "tool_calls", "function_call", "audio"):
        if key != "name" and fields.raw(key, None) not in (None, []):
            fields.fail(f"field '{key}' is not supported")
        fields.raw(key, None)
    fields.done()
    return message


def _parts(fields: Fields) -> str:
    """Content in parts; only text is understood, and nothing is ever fetched."""
    texts = []
    for part in fields.children("content"):
        kind = part.text("type")
        if kind != "text":
            part.fail(f"field 'type' is {ascii(kind[:40])}; only 'text' is supported")
        texts.append(part.text("text"))
        part.done()
    return "".join(texts)


def _max_tokens(fields: Fields, *, chat: bool, low: int) -> int:
    newer = "max_completion_tokens" if chat else "max_tokens"
    default = CHAT_TOKENS if chat else COMPLETION_TOKENS
    value = fields.integer(newer, low, 2**31 - 1, default, alias="max_tokens")
    for key in (newer, "max_tokens"):
        fields.raw(key, None)
    return value


def _completion_logprobs(fields: Fields) -> int | None:
    if not fields.has("logprobs"):
        fields.raw("logprobs", None)
        return None
    return fields.integer("logprobs", 0, MAX_LOGPROBS)


def _chat_logprobs(fields: Fields) -> int | None:
    num_top = fields.integer("top_logprobs", 0, MAX_LOGPROBS, 0)
    if fields.boolean("logprobs", False):
        return num_top
    if num_top:
        fields.fail("field 'top_logprobs' needs 'logprobs': true")
    return None


def _stop(fields: Fields) -> tuple[str, ...]:
    raw = fields.raw("stop", None)
    if raw is None:
        return ()
    stop = [raw] if isinstance(raw, str) else raw
    if (
        not isinstance(stop, list)
        or len(stop) > MAX_STOP_STRINGS
        or not all(isinstance(one, str) and one for one in stop)
    ):
        fields.fail(
            f"field 'stop' must be a string or up to {MAX_STOP_STRINGS} of them, none empty"
        )
    return tuple(Fields({"stop": one}, fields.where, RequestError).text("stop") for one in stop)


def _stream_options(fields: Fields, *, stream: bool) -> bool:
    if not fields.has("stream_options"):
        fields.raw("stream_options", None)
        return False
    if not stream:
        fields.fail("field 'stream_options' needs 'stream': true")
    options = fields.child("stream_options")
    usage = options.boolean("include_usage", False)
    options.raw("include_obfuscation", None)
    options.done()
    return usage


def _finish(fields: Fields) -> None:
    for key, why in _NEVER.items():
        if fields.has(key):
            fields.fail(f"field '{key}' is not allowed: {why}")
        fields.raw(key, None)
    for key, neutral in _UNSUPPORTED.items():
        value: Any = fields.raw(key, None)
        if value is not None and not any(value == one for one in neutral):
            fields.fail(f"field '{key}' is not supported; leave it out")
    for key in _IGNORED:
        fields.raw(key, None)
    fields.done()

"""The shapes of OpenAI's answers, made of what an exchange brings."""

from __future__ import annotations

import time
import uuid
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from moeruntime.request import Delta, Output, TokenLogprobs
from moeruntime.server.protocol import Generation
from moeruntime.text import TextStream, VariantText

__all__ = ["Shaper"]

Chunk = dict[str, Any]


@dataclass(slots=True)
class _Choice:
    """How far one choice of a completion has come.

    Attributes:
        stream: the text of the tokens that were told of, as it becomes certain.
        offset: its length in characters.
        begun: whether something was sent.
    """

    stream: TextStream | None = None
    offset: int = 0
    begun: bool = False


class Shaper:
    """Turns deltas and outputs of one request into JSON objects."""

    def __init__(
        self, asked: Generation, prompts: Sequence[Sequence[int]], text: VariantText
    ) -> None:
        """Begin an answer.

        Args:
            asked: the request.
            prompts: token ids of each of its prompts.
            text: the variant's tokenizer.
        """
        self._asked = asked
        self._prompts = prompts
        self._text = text
        self._chat = asked.endpoint == "chat"
        self._places = [_Choice() for _ in range(asked.num_choices)]
        self._num_new = 0
        self._head = {
            "id": f"{'chatcmpl' if self._chat else 'cmpl'}-{uuid.uuid4().hex}",
            "created": int(time.time()),
            "model": asked.model,
        }

    # -- in one piece ---------------------------------------------------------------------------

    def whole(self, outputs: Sequence[Output]) -> dict[str, Any]:
        """The answer of a request that does not stream; `outputs` in the order of the choices."""
        choices = [self._whole(choice, output) for choice, output in enumerate(outputs)]
        if not self._asked.prompt_only:
            self._num_new = sum(len(output.token_ids) for output in outputs)
        return {
            **self._head,
            "object": "chat.completion" if self._chat else "text_completion",
            "choices": choices,
            "usage": self._usage(),
        }

    def _whole(self, choice: int, output: Output) -> dict[str, Any]:
        said: dict[str, Any] = {"index": choice, "finish_reason": output.finish_reason}
        output_text, ids, logprobs = output.text, output.token_ids, output.logprobs
        if self._asked.prompt_only:
            output_text, ids, logprobs = "", (), ()
            said["finish_reason"] = "length"
        if self._chat:
            said["message"] = {"role": "assistant", "content": output_text, "refusal": None}
            said["logprobs"] = self._chat_logprobs(ids, logprobs)
            return said
        prompt = self._echo(choice)
        said["text"] = prompt + output_text
        parts = self._of_prompt(choice, output.prompt_logprobs) if self._asked.echo else []
        said["logprobs"] = self._logprobs(choice, [*parts, *zip(ids, logprobs, strict=False)])
        return said

    # -- in chunks ------------------------------------------------------------------------------

    def opening(self) -> Iterator[Chunk]:
        """What a stream begins with, before any token."""
        for choice in range(self._asked.num_choices):
            if self._chat:
                delta = {"role": "assistant", "content": ""}
                yield self._chunk({"index": choice, "delta": delta, "finish_reason": None})

    def chunks(self, choice: int, delta: Delta) -> Iterator[Chunk]:
        """What one delta adds to a stream."""
        said: dict[str, Any] = {"index": choice, "finish_reason": None}
        if delta.output is not None:
            said["finish_reason"] = delta.output.finish_reason
        text = delta.text
        pairs = [] if delta.logprobs is None else [(delta.token_ids[0], delta.logprobs)]
        if self._asked.prompt_only:
            text, pairs, said["finish_reason"] = "", [], "length"
        else:
            self._num_new += len(delta.token_ids)
        if self._chat:
            said["delta"] = {"content": text} if text else {}
            said["logprobs"] = self._chat_logprobs(
                [token for token, _ in pairs], [one for _, one in pairs]
            )
        else:
            of_prompt: list[tuple[int, TokenLogprobs | None]] = []
            if self._asked.echo and not self._places[choice].begun:
                text = self._echo(choice) + text
                of_prompt = self._of_prompt(choice, delta.prompt_logprobs)
            said["text"] = text
            said["logprobs"] = self._logprobs(choice, [*of_prompt, *pairs])
            self._places[choice].begun = True
        if text or pairs or said["finish_reason"]:
            yield self._chunk(said)

    def closing(self) -> Iterator[Chunk]:
        """What a stream ends with."""
        if self._asked.usage:
            yield {**self._chunk(None), "usage": self._usage()}

    def _chunk(self, choice: dict[str, Any] | None) -> Chunk:
        kind = "chat.completion.chunk" if self._chat else "text_completion"
        return {**self._head, "object": kind, "choices": [] if choice is None else [choice]}

    # -- parts ----------------------------------------------------------------------------------

    def _usage(self) -> dict[str, int]:
        num_prompt = sum(len(ids) for ids in self._prompts)
        return {
            "prompt_tokens": num_prompt,
            "completion_tokens": self._num_new,
            "total_tokens": num_prompt + self._num_new,
        }

    def _echo(self, choice: int) -> str:
        if not self._asked.echo:
            return ""
        idx = choice // self._asked.n
        prompt = self._asked.prompts[idx]
        if isinstance(prompt, str):
            return prompt
        return self._text.tokenizer.decode(list(self._prompts[idx]))

    def _of_prompt(
        self, choice: int, logprobs: Sequence[TokenLogprobs]
    ) -> list[tuple[int, TokenLogprobs | None]]:
        """A prompt's tokens with what was thought of them; nothing was of the first."""
        if self._asked.sampling.prompt_logprobs is None:
            return []
        return list(zip(self._prompts[choice // self._asked.n], [None, *logprobs], strict=True))

    def _logprobs(
        self, choice: int, pairs: Sequence[tuple[int, TokenLogprobs | None]]
    ) -> dict[str, Any] | None:
        """The shape of /v1/completions; equal texts of several tokens keep the likeliest one's."""
        if self._asked.sampling.logprobs is None:
            return None
        place = self._places[choice]
        if place.stream is None:
            # Where the prompt is part of the text, so are its tokens.
            before = () if self._asked.echo else self._prompts[choice // self._asked.n]
            place.stream = self._text.stream((), before)
        tokens, values, tops, offsets = [], [], [], []
        for token, one in pairs:
            tokens.append(self._token(token))
            values.append(None if one is None else one.logprob)
            top: dict[str, float] = {}
            for other, value in one.top if one else ():
                top.setdefault(self._token(other), value)
            tops.append(top if one is not None else None)
            offsets.append(place.offset)
            place.offset += len(place.stream.push(token))
        return {
            "tokens": tokens,
            "token_logprobs": values,
            "top_logprobs": tops,
            "text_offset": offsets,
        }

    def _chat_logprobs(
        self, ids: Sequence[int], logprobs: Sequence[TokenLogprobs]
    ) -> dict[str, Any] | None:
        if self._asked.sampling.logprobs is None:
            return None

        def one(token: int, logprob: float) -> dict[str, Any]:
            spelled = self._text.token_bytes(token)
            return {"token": _shown(spelled), "logprob": logprob, "bytes": list(spelled)}

        return {
            "content": [
                one(token, found.logprob)
                | {"top_logprobs": [one(other, value) for other, value in found.top]}
                for token, found in zip(ids, logprobs, strict=True)
            ],
            "refusal": None,
        }

    def _token(self, token: int) -> str:
        return _shown(self._text.token_bytes(token))


def _shown(spelled: bytes) -> str:
    """A token's text, half a character as a sign that stands for it."""
    return spelled.decode(errors="replace")

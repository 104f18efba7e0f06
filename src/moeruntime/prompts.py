"""From a request to tokens that fit: everything that can be wrong with it is found here."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from moeruntime.errors import RequestError
from moeruntime.families import EncoderDecoderConfig
from moeruntime.kv_cache import blocks_for
from moeruntime.pack import WeightSource
from moeruntime.request import Request, SamplingParams
from moeruntime.text import ChatTemplates, VariantText

__all__ = ["Prompts"]


class Prompts:
    """Tokenizers and chat templates of a pack's variants, loaded when first needed."""

    def __init__(self, source: WeightSource, num_blocks: int) -> None:
        """Remember the pack and the cache's size in blocks."""
        self._source = source
        self._num_blocks = num_blocks
        self._config = source.manifest.config
        self._templates = ChatTemplates()
        self._texts: dict[str, VariantText] = {}

    def close(self) -> None:
        """End the template worker."""
        self._templates.close()

    @property
    def has_encoder(self) -> bool:
        """Whether prompts are read by an encoder."""
        return self._config.has_encoder

    def text(self, variant: str) -> VariantText:
        """A variant's tokenizer, template and end-of-sequence tokens."""
        if variant not in self._texts:
            self._source.variant(variant)
            self._texts[variant] = VariantText(self._source, variant)
        return self._texts[variant]

    def encode(self, request: Request) -> list[int]:
        """The token ids of a request's prompt.

        Raises:
            RequestError: unknown variant, ids outside the vocabulary, or no kind of prompt.
            TokenizerError: the variant cannot turn this prompt into tokens.
        """
        text, prompt = self.text(request.variant), request.prompt
        if isinstance(prompt, str):
            if request.chat:
                return text.encode_chat([{"role": "user", "content": prompt}], self._templates)
            return text.encode(prompt)
        if len(prompt) and all(isinstance(message, dict) for message in prompt):
            return text.encode_chat(
                [dict(m) for m in prompt if isinstance(m, dict)], self._templates
            )
        ids = [token for token in prompt if isinstance(token, int) and not isinstance(token, bool)]
        if len(ids) != len(prompt):
            raise RequestError("prompt is neither text, token ids nor chat messages")
        self.check_ids(ids)
        return ids

    def sides(self, prompt_ids: Sequence[int]) -> tuple[Sequence[int], Sequence[int]]:
        """What the decoder begins with, and what an encoder reads: where there is one, the prompt.

        Without an encoder the prompt is what the decoder begins with.
        """
        if isinstance(self._config, EncoderDecoderConfig):
            return (self._config.decoder_start_id,), prompt_ids
        return prompt_ids, ()

    def fit(self, sampling: SamplingParams, num_prompt_tokens: int) -> SamplingParams:
        """Cut max_tokens to what the context leaves after the prompt.

        Raises:
            RequestError: the prompt is empty, or it or its answer cannot fit.
        """
        if num_prompt_tokens == 0:
            raise RequestError("prompt is empty: there is no token to go on from")
        if self._config.has_encoder:
            if sampling.prompt_logprobs is not None:
                raise RequestError(
                    "prompt_logprobs: an encoder reads the prompt and predicts none of it"
                )
            max_tokens = min(sampling.max_tokens, self._config.max_context)
            self.check_room(max_tokens, num_source=num_prompt_tokens)
            return replace(sampling, max_tokens=max_tokens)
        room = self._config.max_context - num_prompt_tokens
        if sampling.prompt_logprobs is not None and sampling.max_tokens == 1:
            room += 1  # what the prompt's last token predicts takes no place: nothing follows it
        if room < 1:
            raise RequestError(
                f"prompt of {num_prompt_tokens} tokens leaves no room in the context of "
                f"{self._config.max_context}; shorten it"
            )
        max_tokens = min(sampling.max_tokens, room)
        self.check_room(num_prompt_tokens + max_tokens - 1)
        return replace(sampling, max_tokens=max_tokens)

    def check_variant(self, variant: str) -> None:
        """Raise RequestError if there is no such variant."""
        self._source.variant(variant)

    def check_room(self, num_tokens: int, *, num_source: int = 0) -> None:
        """Raise RequestError if a sequence of this length fits neither context nor cache.

        So must what an encoder reads, which shares the cache but not the context.
        """
        for count in (num_tokens, num_source):
            if count > self._config.max_context:
                raise RequestError(
                    f"{count} tokens are more than the context of {self._config.max_context}"
                )
        num_needed = blocks_for(num_tokens) + blocks_for(num_source)
        if num_needed > self._num_blocks:
            raise RequestError(
                f"{num_tokens + num_source} tokens need {num_needed} cache blocks, there are "
                f"{self._num_blocks}; ask for fewer tokens or give a larger cache"
            )

    def check_ids(self, ids: Sequence[int]) -> None:
        """Raise RequestError if a token id is outside the vocabulary."""
        for token in ids:
            if not 0 <= token < self._config.vocab_size:
                raise RequestError(
                    f"token id {token} is outside the vocabulary of {self._config.vocab_size}"
                )

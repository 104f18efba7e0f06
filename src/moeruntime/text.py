"""Text in, text out: tokenizers, chat templates, and turning tokens into text as they come."""

from __future__ import annotations

import json
import re
import select
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from tokenizers import Tokenizer

from moeruntime.errors import RequestError, TokenizerError
from moeruntime.pack import WeightSource
from moeruntime.request import Message
from moeruntime.strict_json import read_json

__all__ = ["ChatTemplates", "TextStream", "VariantText", "parse_tokenizer"]

RENDER_TIMEOUT_S = 5.0
TOKENS_BEFORE, CHARACTER_TOKENS = 8, 4
"""Of a prompt, that say how its text goes on; and that a character may take."""

HALF = "\N{REPLACEMENT CHARACTER}"
"""What half a character decodes to."""

MAX_PROMPT_CHARACTERS = 4 * 1024 * 1024
_WORKER = Path(__file__).with_name("template_worker.py")


def parse_tokenizer(contents: bytes, where: Path, vocab_size: int) -> Tokenizer:
    """Make a tokenizer of a tokenizer.json, every id of which has a row of the embedding.

    Raises:
        TokenizerError: it is none, or an id lies beyond the embedding; names `where`.
    """
    try:
        tokenizer = Tokenizer.from_buffer(contents)
        ids = tokenizer.get_vocab(with_added_tokens=True)
    except (KeyboardInterrupt, SystemExit):
        raise
    except BaseException as problem:  # a panic of the Rust library is not an Exception
        reason = " ".join(str(problem).split())[:200]
        raise TokenizerError(f"{where}: not a tokenizer: {reason}") from None
    if not ids:
        raise TokenizerError(f"{where}: the vocabulary is empty")
    token, largest = max(ids.items(), key=lambda item: item[1])
    if largest >= vocab_size:
        raise TokenizerError(
            f"{where}: token {ascii(token[:40])} has id {largest}, but config.json gives "
            f"vocab_size {vocab_size}"
        )
    return tokenizer


class VariantText:
    """One variant's tokenizer, chat template and end-of-sequence tokens."""

    def __init__(self, source: WeightSource, variant: str) -> None:
        """Load what the pack holds for a variant.

        Without a tokenizer a variant takes prompts of token ids and answers with token ids.

        Raises:
            TokenizerError: the tokenizer is malformed or too large for the embedding.
        """
        self._root, self.variant = source.root, variant
        config = source.manifest.config
        self.vocab_size, self._has_encoder = config.vocab_size, config.has_encoder
        path = source.variant_path(variant, "tokenizer.json")
        self._tokenizer = (
            None if path is None else parse_tokenizer(path.read_bytes(), path, self.vocab_size)
        )
        self._values, self.chat_template = _template(source, variant)
        self._end_id: int | None = None
        if self._tokenizer is not None:
            self._end_id = self._tokenizer.token_to_id(str(self._values.get("eos_token", "")))
        self.eos_ids = _eos_ids(source, variant)

    @property
    def tokenizer(self) -> Tokenizer:
        """The tokenizer.

        Raises:
            TokenizerError: the variant has none.
        """
        if self._tokenizer is None:
            raise TokenizerError(
                f"{self._root}: variant '{self.variant}' has no tokenizer.json; it takes prompts "
                "of token ids, without stop strings"
            )
        return self._tokenizer

    def stream(self, stop: Sequence[str], before: Sequence[int] = ()) -> TextStream:
        """Start turning an answer into text, which stays empty without a tokenizer.

        Args:
            stop: strings that the text ends before.
            before: the tokens that it goes on from; without them it is a text of its own, as it
                always is where an encoder reads the prompt.

        Raises:
            TokenizerError: stop strings can only be found with a tokenizer.
        """
        before = () if self._has_encoder else before
        return TextStream(self.tokenizer if stop else self._tokenizer, stop, before)

    def token_bytes(self, token: int) -> bytes:
        """The bytes a token stands for, of half a character too; of several in a row, joined."""
        decode = self.tokenizer.decode
        alone = decode([token], skip_special_tokens=False)
        # As it is in the middle of others, with its leading space.
        text = decode([token, token], skip_special_tokens=False)[len(alone) :]
        if HALF not in text:
            return text.encode()
        name = self.tokenizer.id_to_token(token) or ""
        if re.fullmatch(r"<0x[0-9A-F]{2}>", name):
            return bytes([int(name[3:5], 16)])
        if all(char in _BYTE_OF for char in name):
            return bytes(_BYTE_OF[char] for char in name)
        return text.encode()

    def encode(self, text: str) -> list[int]:
        """Token ids of a text, with whatever the tokenizer puts around it (usually <s>)."""
        return self._encode(text, add_special_tokens=True)

    def encode_chat(self, messages: Sequence[Message], templates: ChatTemplates) -> list[int]:
        """Token ids of a chat, rendered by the variant's template up to the assistant's turn.

        Raises:
            TokenizerError: the variant has no template, or the template fails or is stopped.
        """
        if self.chat_template is None:
            raise TokenizerError(
                f"variant '{self.variant}' has no chat template; send a plain prompt"
            )
        values = {**self._values, "messages": list(messages), "add_generation_prompt": True}
        try:
            rendered = templates.render(self.chat_template, values)
        except TokenizerError as problem:
            raise TokenizerError(f"variant '{self.variant}': {problem}") from None
        return self._encode(rendered, add_special_tokens=False)

    def encode_document(self, text: str) -> list[int]:
        """Token ids of a text in a stream of documents: as `encode`, then the end-of-text token."""
        ids = self.encode(text)
        if self._end_id is not None and ids[-1:] != [self._end_id]:
            ids.append(self._end_id)
        return ids

    def _encode(self, text: str, *, add_special_tokens: bool) -> list[int]:
        if len(text) > MAX_PROMPT_CHARACTERS:
            raise RequestError(
                f"prompt of {len(text)} characters, more than {MAX_PROMPT_CHARACTERS}"
            )
        try:
            encoding = self.tokenizer.encode(text, add_special_tokens=add_special_tokens)
        except TypeError:  # What the library makes of a string that UTF-8 cannot hold.
            raise RequestError("prompt holds a lone surrogate, which is no character") from None
        ids: list[int] = encoding.ids
        # The vocabulary's ids fit, but a post-processor can add others.
        if max(ids, default=0) >= self.vocab_size:
            raise TokenizerError(
                f"variant '{self.variant}': tokenizer.json makes the token {max(ids)} of this "
                f"prompt, outside the vocabulary of {self.vocab_size}"
            )
        return ids


def _byte_of() -> dict[str, int]:
    """What the characters of byte-level vocabularies stand for: bytes that print are themselves."""
    printed = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printed]
    return {chr(byte): byte for byte in printed} | {
        chr(256 + idx): byte for idx, byte in enumerate(others)
    }


_BYTE_OF = _byte_of()


class TextStream:
    """Tokens to text, piece by piece, never showing half a character or half a stop string."""

    def __init__(
        self, tokenizer: Tokenizer | None, stop: Sequence[str], before: Sequence[int] = ()
    ) -> None:
        """Start after some tokens, whose text is known; without a tokenizer there will be none.

        The first token's text depends on them: at the beginning of a text tokenizers like that of
        Mixtral drop its leading space.
        """
        self._tokenizer = tokenizer
        self._stop = tuple(stop)
        self._ids = list(before[-(TOKENS_BEFORE + 2 * CHARACTER_TOKENS) :])
        self._num_before = len(self._ids)
        self._start, self._decoded = self._whole_characters()
        self._held = ""
        self.text = ""
        self.stopped = False

    def push(self, token_id: int) -> str:
        """Add a token; returns the text that is now certain."""
        self._ids.append(token_id)
        return self._emit(self._decode(), final=False)

    def finish(self) -> str:
        """No more tokens: returns what was held back."""
        new = "" if len(self._ids) == self._num_before else self._decode(final=True)
        return self._emit(new, final=True)

    def _whole_characters(self) -> tuple[int, int]:
        """Which of the tokens before make whole characters; with those after the text begins."""
        last, tokenizer = self._num_before, self._tokenizer
        if tokenizer is None:
            return last, last
        for stop in range(last, max(-1, last - CHARACTER_TOKENS), -1):
            first = max(0, stop - TOKENS_BEFORE)
            for start in range(first, max(-1, first - CHARACTER_TOKENS), -1):
                text = tokenizer.decode(self._ids[start:stop])
                if not text.startswith(HALF) and not text.endswith(HALF):
                    return start, stop
        return max(0, last - TOKENS_BEFORE), last

    def _decode(self, *, final: bool = False) -> str:
        """The text of the tokens since the last certain one.

        A token's text can depend on its neighbours (a leading space, half a character), so a few
        tokens before it are always decoded with it and their text is cut off again.
        """
        if self._tokenizer is None:
            return ""
        before = self._tokenizer.decode(self._ids[self._start : self._decoded])
        after = self._tokenizer.decode(self._ids[self._start :])
        if not final and (after.endswith(HALF) or len(after) <= len(before)):
            return ""
        self._start, self._decoded = self._decoded, len(self._ids)
        return after[len(before) :]

    def _emit(self, new: str, *, final: bool) -> str:
        if self.stopped:
            return ""
        self._held += new
        hits = [at for at in (self._held.find(stop) for stop in self._stop) if at >= 0]
        if hits:
            self.stopped = True
            certain, self._held = self._held[: min(hits)], ""
        else:
            keep = 0 if final else self._possible_stop()
            cut = len(self._held) - keep
            certain, self._held = self._held[:cut], self._held[cut:]
        self.text += certain
        return certain

    def _possible_stop(self) -> int:
        """Length of the longest end of the held text that may begin a stop string."""
        lengths = (
            length
            for stop in self._stop
            for length in range(min(len(stop) - 1, len(self._held)), 0, -1)
            if self._held.endswith(stop[:length])
        )
        return max(lengths, default=0)


class ChatTemplates:
    """Renders templates in one bounded worker process, started when first needed."""

    def __init__(self) -> None:
        """Nothing runs yet."""
        self._worker: subprocess.Popen[bytes] | None = None

    def render(self, template: str, values: dict[str, object]) -> str:
        """Render one template.

        Raises:
            TokenizerError: it fails, or takes more than 5 seconds or 512 MiB.
        """
        worker = self._start()
        assert worker.stdin and worker.stdout
        request = json.dumps({"template": template, "values": values}).encode() + b"\n"
        try:
            worker.stdin.write(request)
            worker.stdin.flush()
            answered = bool(select.select([worker.stdout], [], [], RENDER_TIMEOUT_S)[0])
            line = worker.stdout.readline() if answered else b""
        except BrokenPipeError:
            answered, line = True, b""
        if not line:
            self.close()
            why = "used too much memory" if answered else f"took over {RENDER_TIMEOUT_S:g} s"
            raise TokenizerError(f"chat template stopped: {why}")
        answer = json.loads(line)
        if "error" in answer:
            raise TokenizerError(f"chat template failed: {answer['error']}")
        return str(answer["text"])

    def close(self) -> None:
        """End the worker, if there is one."""
        if self._worker is not None:
            self._worker.kill()
            self._worker.communicate()
            self._worker = None

    def _start(self) -> subprocess.Popen[bytes]:
        if self._worker is None:
            self._worker = subprocess.Popen(
                [sys.executable, "-I", str(_WORKER)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
            )
        return self._worker


def _template(source: WeightSource, variant: str) -> tuple[dict[str, object], str | None]:
    """The special tokens a template may name, and the template itself if there is one."""
    values: dict[str, object] = {}
    template: str | None = None
    config_path = source.variant_path(variant, "tokenizer_config.json")
    if config_path is not None:
        config = read_json(config_path, TokenizerError)
        for key in ("bos_token", "eos_token", "unk_token", "pad_token"):
            token = config.raw(key, None)
            values[key] = token.get("content") if isinstance(token, dict) else token or ""
        if config.has("chat_template"):
            raw = config.raw("chat_template")
            if isinstance(raw, list):
                raw = next(
                    (
                        t.get("template")
                        for t in raw
                        if isinstance(t, dict) and t.get("name") == "default"
                    ),
                    None,
                )
            if not isinstance(raw, str):
                config.fail("field 'chat_template' is neither a string nor has a 'default'")
            template = raw
    file = source.variant_path(variant, "chat_template.jinja")
    if file is not None:
        try:
            template = file.read_text(encoding="utf-8")
        except UnicodeDecodeError:
            raise TokenizerError(f"{file}: not UTF-8") from None
    return values, template


def _eos_ids(source: WeightSource, variant: str) -> frozenset[int]:
    """End-of-sequence tokens, from the generation config or else the model's config."""
    for name in ("generation_config.json", "config.json"):
        path = source.variant_path(variant, name)
        if path is None:
            continue
        config = read_json(path, TokenizerError)
        if not config.has("eos_token_id"):
            continue
        high = source.manifest.config.vocab_size - 1
        if isinstance(config.raw("eos_token_id"), list):
            return frozenset(config.integers("eos_token_id", 0, high))
        return frozenset({config.integer("eos_token_id", 0, high)})
    return frozenset()

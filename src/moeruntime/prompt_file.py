"""Many prompts in a file, as `moec run --prompts` takes them."""

from __future__ import annotations

from pathlib import Path

from moeruntime.errors import InputError, RequestError
from moeruntime.request import Request, SamplingParams
from moeruntime.strict_json import Fields, read_json_lines

__all__ = ["read_prompts"]


def read_prompts(
    path: Path, model: str | None, chat: bool, default: SamplingParams
) -> tuple[list[str], list[Request]]:
    """Read a file of prompts, one JSON object a line.

    Args:
        path: the file.
        model: the variant of prompts that name none.
        chat: whether prompts are chat messages where they do not say.
        default: sampling parameters for those that are not given.

    Returns:
        Where each prompt stands, for complaints, and what it asks for.

    Raises:
        InputError, RequestError: names the line and the field.
    """
    places, requests = [], []
    for fields in read_json_lines(path, InputError):
        places.append(fields.where)
        try:
            requests.append(_parse_request(fields, model, chat, default))
        except RequestError as problem:
            raise RequestError(f"{fields.where}: {problem}") from None
    if not requests:
        raise InputError(f"{path}: holds no prompt")
    return places, requests


def _parse_request(
    fields: Fields, model: str | None, chat: bool, default: SamplingParams
) -> Request:
    stop = fields.raw("stop", None)
    stop = list(default.stop) if stop is None else stop
    if not isinstance(stop, list) or not all(isinstance(one, str) for one in stop):
        fields.fail("field 'stop' must be a list of strings")
    seed = fields.integer("seed", 0, 2**64 - 1) if fields.has("seed") else default.seed
    fields.raw("seed", None)
    request = Request(
        variant=fields.text("model", model),
        prompt=fields.text("prompt"),
        sampling=SamplingParams(
            max_tokens=fields.integer("max_tokens", 1, 2**31 - 1, default.max_tokens),
            temperature=fields.number("temperature", 0.0, 100.0, default.temperature),
            top_p=fields.number("top_p", 0.0, 1.0, default.top_p),
            top_k=fields.integer("top_k", 0, 2**31 - 1, default.top_k),
            seed=seed,
            stop=tuple(stop),
        ),
        chat=fields.boolean("chat", chat),
    )
    fields.done()
    return request

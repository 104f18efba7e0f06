"""JSON from outside, read without trust: no duplicate keys, no NaN, every type and range checked.

`Fields` is the one way the project takes a JSON object apart. It knows where it stands
("config.json", "manifest.json: variants[2]"), so every complaint names the file and the field.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from itertools import count
from pathlib import Path
from typing import Any, NoReturn

from moeruntime.errors import MoecError

__all__ = ["Fields", "canonical_json", "parse_json", "read_json", "read_json_lines"]

MAX_JSON_BYTES = 64 * 1024 * 1024


def parse_json(data: bytes, where: str, error: type[MoecError]) -> object:
    """Parse one JSON document.

    Args:
        data: the document, UTF-8 without a byte order mark.
        where: what to call the document in messages.
        error: raised, with one line, for anything that is not exactly one clean JSON document.
    """
    try:
        return json.loads(
            data.decode("utf-8"), object_pairs_hook=_no_duplicates, parse_constant=_no_constant
        )
    except UnicodeDecodeError as problem:
        raise error(f"{where}: not UTF-8 at byte {problem.start}") from None
    except RecursionError:
        raise error(f"{where}: JSON is nested too deeply") from None
    except ValueError as problem:
        raise error(f"{where}: not valid JSON: {problem}") from None


def read_json(path: Path, error: type[MoecError], *, name: str | None = None) -> Fields:
    """Read a file that must hold one JSON object of at most 64 MiB.

    Raises:
        error: the file is missing, not regular, too large, or not one JSON object.
    """
    where = name or str(path)
    _check_regular(path, where, error)
    num_bytes = path.stat().st_size
    if num_bytes > MAX_JSON_BYTES:
        raise error(f"{where}: {num_bytes} bytes of JSON, more than the {MAX_JSON_BYTES} allowed")
    return Fields(parse_json(path.read_bytes(), where, error), where, error)


def read_json_lines(path: Path, error: type[MoecError]) -> Iterator[Fields]:
    """Read JSON objects, one a line, each at most 64 MiB; blank lines are passed over.

    Each object's `where` is FILE:LINE.

    Raises:
        error: the file is missing or not regular, or a line is not one JSON object.
    """
    _check_regular(path, str(path), error)
    with path.open("rb") as file:
        for number in count(1):
            where = f"{path}:{number}"
            line = file.readline(MAX_JSON_BYTES + 1)
            if not line:
                return
            if len(line) > MAX_JSON_BYTES:
                raise error(f"{where}: line of more than {MAX_JSON_BYTES} bytes")
            if line.strip():
                yield Fields(parse_json(line, where, error), where, error)


def canonical_json(value: object) -> bytes:
    """The one byte form moec writes: sorted keys, one space of indentation, ASCII, newline."""
    return (json.dumps(value, sort_keys=True, indent=1, allow_nan=False) + "\n").encode("ascii")


class Fields:
    """One JSON object being read, field by field.

    Each getter takes a key, checks the value's type and range and returns it; a missing key is an
    error unless a default is given. `done` rejects every key that nobody asked for.
    """

    def __init__(self, value: object, where: str, error: type[MoecError]) -> None:
        """Wrap `value`, which must be a JSON object."""
        self.where = where
        self._error = error
        if not isinstance(value, dict):
            self.fail(f"must be a JSON object, not {_kind(value)}")
        self._values: Mapping[str, Any] = value
        self._seen: set[str] = set()

    def fail(self, message: str) -> NoReturn:
        """Raise this object's error type, with its place in front."""
        raise self._error(f"{self.where}: {message}")

    def has(self, key: str) -> bool:
        """Whether the key is present with a value other than null."""
        return self._values.get(key) is not None

    def keys(self) -> Iterator[str]:
        """The keys, in file order."""
        return iter(self._values)

    def raw(self, key: str, default: object = ...) -> Any:
        """The value as parsed, of any type."""
        self._seen.add(key)
        value = self._values.get(key, default)
        if value is ...:
            self.fail(f"field '{key}' is missing")
        return value

    def integer(
        self, key: str, low: int, high: int, default: int | None = None, *, alias: str = ""
    ) -> int:
        """An integer in [low, high]; true and false are not integers. `alias` is an older key."""
        if alias and not self.has(key) and self.has(alias):
            key = alias
        value = self._or_default(key, default)
        if isinstance(value, bool) or not isinstance(value, int):
            self.fail(f"field '{key}' must be an integer, not {_kind(value)}")
        if not low <= value <= high:
            self.fail(f"field '{key}' is {_short(value)}, outside {low}..{high}")
        return value

    def number(self, key: str, low: float, high: float, default: float | None = None) -> float:
        """A finite number in [low, high]."""
        value = self._or_default(key, default)
        if isinstance(value, bool) or not isinstance(value, int | float):
            self.fail(f"field '{key}' must be a number, not {_kind(value)}")
        if not low <= value <= high:
            self.fail(f"field '{key}' is {_short(value)}, outside {low:g}..{high:g}")
        return float(value)

    def boolean(self, key: str, default: bool | None = None) -> bool:
        """True or false."""
        value = self._or_default(key, default)
        if not isinstance(value, bool):
            self.fail(f"field '{key}' must be true or false, not {_kind(value)}")
        return value

    def text(self, key: str, default: str | None = None) -> str:
        """A string that can be written as UTF-8."""
        value = self._or_default(key, default)
        if not isinstance(value, str):
            self.fail(f"field '{key}' must be a string, not {_kind(value)}")
        if any(0xD800 <= ord(character) <= 0xDFFF for character in value):
            self.fail(f"field '{key}' holds a lone surrogate")
        return value

    def child(self, key: str) -> Fields:
        """A nested object."""
        return Fields(self.raw(key), f"{self.where}: {key}", self._error)

    def children(self, key: str) -> list[Fields]:
        """A list of nested objects."""
        return [
            Fields(item, f"{self.where}: {key}[{idx}]", self._error)
            for idx, item in enumerate(self.sequence(key))
        ]

    def sequence(self, key: str) -> Sequence[Any]:
        """A list of anything."""
        value = self.raw(key)
        if not isinstance(value, list):
            self.fail(f"field '{key}' must be a list, not {_kind(value)}")
        return value

    def integers(self, key: str, low: int, high: int) -> tuple[int, ...]:
        """A list of integers, each in [low, high]."""
        values = self.sequence(key)
        for value in values:
            if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
                self.fail(f"field '{key}' holds {_short(value)}, not an integer in {low}..{high}")
        return tuple(values)

    def done(self) -> None:
        """Reject the keys that were never asked for."""
        unknown = sorted(set(self._values) - self._seen)
        if unknown:
            self.fail(f"unknown field {_short(unknown[0])}")

    def _or_default(self, key: str, default: object) -> Any:
        value = self.raw(key, ... if default is None else default)
        return default if value is None and default is not None else value


def _check_regular(path: Path, where: str, error: type[MoecError]) -> None:
    if not path.exists():
        raise error(f"{where}: no such file")
    if not path.is_file():
        raise error(f"{where}: not a regular file")


def _no_duplicates(pairs: list[tuple[str, object]]) -> dict[str, object]:
    result: dict[str, object] = {}
    for key, value in pairs:
        if key in result:
            raise ValueError(f"duplicate key {_short(key)}")
        result[key] = value
    return result


def _no_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not JSON")


def _kind(value: object) -> str:
    if value is None:
        return "null"
    names = {bool: "a boolean", int: "an integer", float: "a number", str: "a string"}
    return names.get(type(value), "a list" if isinstance(value, list) else "an object")


def _short(value: object, limit: int = 60) -> str:
    text = ascii(value)
    return text if len(text) <= limit else text[: limit - 3] + "..."

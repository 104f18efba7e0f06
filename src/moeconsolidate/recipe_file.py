"""recipe.toml: what a consolidation is asked for, in a file that can be kept and reviewed.

    models = ["base=org/base", "math=org/math@v2", "shell=shell"]
    budget = "0.3x"

    [calibration]
    math = ["math.jsonl"]

Keys are the command line's options, called as they are called there. The pack's manifest keeps what
became of it, with every default written out.
"""

from __future__ import annotations

import tomllib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moeruntime.errors import InputError, UsageError
from moeruntime.strict_json import Fields

__all__ = ["Request", "read_request"]

MAX_BYTES = 2**20
ONE_OF = ("budget", "max_loss")
"""Of which one follows from the other: whoever chooses either has chosen both."""

_READERS: Mapping[str, Callable[[Fields, str], Any]] = {
    "threshold": lambda fields, key: fields.number(key, 0.0, 1.0),
    "similarity": Fields.text,
    "signal": Fields.text,
    "align": Fields.boolean,
    "merge": Fields.text,
    "code": Fields.text,
    "shared-bits": lambda fields, key: fields.integer(key, 2, 6),
    "budget": Fields.text,
    "max-loss": lambda fields, key: fields.number(key, 0.0, 100.0),
}


@dataclass(frozen=True, slots=True)
class Request:
    """What `consolidate` and `make_plan` are called with.

    Attributes:
        models: `[NAME=]MODEL` each.
        choices: their keyword arguments, as far as something was chosen.
        calibration: variant -> files of text.
    """

    models: Sequence[str]
    choices: Mapping[str, Any]
    calibration: Mapping[str, Sequence[Path]]


def read_request(
    path: Path | None,
    models: Sequence[str] | None,
    *,
    calibration: Mapping[str, Sequence[Path]],
    **given: object,
) -> Request:
    """Join a recipe file, if there is one, with what was given besides, which goes first.

    Args:
        path: the file.
        models: in place of the file's.
        calibration: of some variants, in place of the file's.
        given: keyword arguments of `consolidate`; None where nothing was chosen.

    Raises:
        InputError: the file is missing or malformed, or has a key that is not known.
        UsageError: there are no models, neither here nor there.
    """
    request = Request((), {}, {}) if path is None else _read(path)
    if not models and not request.models:
        raise UsageError("Missing argument '[NAME=]MODEL'; see `moec consolidate --help`")
    chosen = {name: value for name, value in given.items() if value is not None}
    kept = request.choices
    if any(name in chosen for name in ONE_OF):
        kept = {name: value for name, value in kept.items() if name not in ONE_OF}
    return Request(
        models or request.models,
        {**kept, **chosen},
        {**request.calibration, **calibration},
    )


def _read(path: Path) -> Request:
    fields = Fields(_parse(path), str(path), InputError)
    models: list[str] = []
    if fields.has("models"):
        for model in fields.sequence("models"):
            if not isinstance(model, str):
                fields.fail("field 'models' must be a list of strings")
            models.append(_at_home(path, model))
    choices = {
        key.replace("-", "_"): read(fields, key)
        for key, read in _READERS.items()
        if fields.has(key)
    }
    calibration: dict[str, list[Path]] = {}
    if fields.has("calibration"):
        texts = fields.child("calibration")
        for name in texts.keys():
            files = texts.sequence(name)
            if not files or not all(isinstance(one, str) for one in files):
                texts.fail(f"field {ascii(name[:60])} must be a list of files")
            calibration[name] = [path.parent / one for one in files]
    fields.done()
    return Request(models, choices, calibration)


def _parse(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise InputError(f"{path}: {'not a regular file' if path.exists() else 'no such file'}")
    if (num_bytes := path.stat().st_size) > MAX_BYTES:
        raise InputError(f"{path}: {num_bytes} bytes, more than the {MAX_BYTES} of a recipe")
    try:
        return tomllib.loads(path.read_bytes().decode("utf-8"))
    except UnicodeDecodeError as problem:
        raise InputError(f"{path}: not UTF-8 at byte {problem.start}") from None
    except RecursionError:
        raise InputError(f"{path}: TOML is nested too deeply") from None
    except ValueError as problem:
        raise InputError(f"{path}: not valid TOML: {problem}") from None


def _at_home(path: Path, model: str) -> str:
    """A model as the recipe means it: a folder beside the recipe, or else as it is written."""
    name, equals, place = model.partition("=")
    if not equals or "/" in name:
        name, equals, place = "", "", model
    beside = path.parent / place
    is_folder = place and not Path(place).is_absolute() and beside.is_dir()
    if is_folder and not equals and "=" in str(beside).partition("/")[0]:
        return f"./{beside}"  # or its name would be taken for a variant's
    return f"{name}{equals}{beside}" if is_folder else model

"""Files of a checkpoint folder, none of which may lead out of it.

A checkpoint comes from strangers. A link named tokenizer_config.json that points at a private file
would end up in the pack, and in whatever is published from it. So a link is followed only if it
stays in the folder, or where the Hugging Face cache keeps its contents: there
`snapshots/REVISION/file` links to `../../blobs/HASH`.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from moeruntime.errors import CheckpointError, TokenizerError
from moeruntime.strict_json import MAX_JSON_BYTES, Fields, parse_json

__all__ = ["find_file", "read_config", "read_side_files"]

CONFIG_FILE = "config.json"
TOKENIZER_FILE = "tokenizer.json"
SIDE_FILES = (
    CONFIG_FILE,
    TOKENIZER_FILE,
    "tokenizer_config.json",
    "special_tokens_map.json",
    "generation_config.json",
    "chat_template.jinja",
)
"""What a pack keeps of a checkpoint besides its tensors, where present."""


def find_file(folder: Path, name: str) -> Path | None:
    """Find a regular file of the folder; None if nothing has that name.

    Raises:
        CheckpointError: it is something else, or a link that leaves the folder.
    """
    path = folder / name
    if path.is_symlink():
        _check_link(folder, path)
    elif not path.exists():
        return None
    if not path.is_file():
        raise CheckpointError(f"{path}: not a regular file")
    return path


def read_side_files(folder: Path) -> Mapping[str, bytes]:
    """Read the small files that travel with a variant.

    Raises:
        CheckpointError: one is not a regular file of this folder, is too large, or is JSON by name
            only.
        TokenizerError: there is no tokenizer.json.
    """
    contents = {}
    for name in SIDE_FILES:
        if path := find_file(folder, name):
            contents[name] = _read(path)
            # The tokenizers library judges tokenizer.json, whose vocabulary is large.
            if name.endswith(".json") and name != TOKENIZER_FILE:
                where = str(path)
                Fields(parse_json(contents[name], where, CheckpointError), where, CheckpointError)
    if TOKENIZER_FILE not in contents:
        raise TokenizerError(
            f"{folder}: no {TOKENIZER_FILE}; other tokenizer formats are not read: load the "
            "tokenizer with transformers and save_pretrained() it here"
        )
    return contents


def read_config(folder: Path) -> Fields:
    """Open config.json.

    Raises:
        CheckpointError: missing (saying what the folder holds instead) or malformed.
    """
    if find_file(folder, "adapter_config.json"):
        raise CheckpointError(
            f"{folder}: adapter_config.json: an adapter, not a model of its own; merge it into its "
            "base model first"
        )
    path = find_file(folder, CONFIG_FILE)
    if path is None:
        raise CheckpointError(f"{folder}: no {CONFIG_FILE}: not a Hugging Face checkpoint folder")
    where = str(path)
    return Fields(parse_json(_read(path), where, CheckpointError), where, CheckpointError)


def _check_link(folder: Path, path: Path) -> None:
    try:
        target = path.resolve(strict=True)
    except (OSError, RuntimeError):
        raise CheckpointError(f"{path}: a link that leads nowhere") from None
    home = folder.resolve()
    allowed = [home]
    if home.parent.name == "snapshots":
        allowed.append(home.parent.parent / "blobs")
    if not any(target.is_relative_to(place) for place in allowed):
        raise CheckpointError(f"{path}: a link to {target}, outside the checkpoint folder")


def _read(path: Path) -> bytes:
    try:
        if (num_bytes := path.stat().st_size) > MAX_JSON_BYTES:
            raise CheckpointError(f"{path}: {num_bytes} bytes, more than the {MAX_JSON_BYTES} read")
        return path.read_bytes()
    except OSError as problem:
        raise CheckpointError(f"{path}: cannot be read: {problem.strerror}") from None

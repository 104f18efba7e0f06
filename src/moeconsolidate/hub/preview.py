"""A folder with the small files of a model and the headers of its weights, but not the weights.

Each tensor file is a hole of the right size behind a real header, so a `Checkpoint` opens it and
says everything that can be said of names, shapes, dtypes and config, before any weight moves.
"""

from __future__ import annotations

from pathlib import Path

from moeconsolidate.folder import SIDE_FILES
from moeconsolidate.hub.client import PinnedModel, RemoteFile, answer_bytes, place_in_snapshot
from moeconsolidate.shards import INDEX_FILE, SINGLE_FILE
from moeruntime.errors import CheckpointError
from moeruntime.strict_json import MAX_JSON_BYTES, read_json
from moeruntime.tensorfile import MAX_HEADER_BYTES

__all__ = ["SMALL_FILES", "listed_weights", "make_preview", "weight_files"]

SMALL_FILES = (*SIDE_FILES, INDEX_FILE)
_FIRST_BYTES = 64 * 1024
"""Asked for at first: more than most headers have."""


def make_preview(model: PinnedModel, folder: Path) -> None:
    """Fill an empty folder with what is needed to judge a model.

    Small files come through the cache, where they are needed anyway.

    Raises:
        HubError: the hub refuses or cannot be reached.
        CheckpointError: a small file is too large to be one.
    """
    for name, file in model.files.items():
        if name in SMALL_FILES:
            if file.num_bytes > MAX_JSON_BYTES:
                raise CheckpointError(
                    f"{model}: {name}: {file.num_bytes} bytes, more than the {MAX_JSON_BYTES} read"
                )
            (folder / name).write_bytes(place_in_snapshot(model, name).read_bytes())
        else:
            (folder / name).touch()  # its name alone can tell what is wrong with the model
    for file in weight_files(folder, model):
        with (folder / file.name).open("wb") as out:
            out.write(_header(model, file))
            out.truncate(file.num_bytes)


def listed_weights(folder: Path) -> list[str]:
    """The tensor files that a folder's index lists, or that there are without one."""
    if not (folder / INDEX_FILE).exists():
        return [SINGLE_FILE]
    # Whatever else is wrong with the index is said when the checkpoint is opened.
    weight_map = read_json(folder / INDEX_FILE, CheckpointError).child("weight_map")
    return sorted({weight_map.text(tensor) for tensor in weight_map.keys()})


def weight_files(folder: Path, model: PinnedModel) -> list[RemoteFile]:
    """The tensor files of a model on the hub, but for those that its index invents."""
    names = (name for name in listed_weights(folder) if name not in SMALL_FILES)
    return [model.files[name] for name in names if name in model.files]


def _header(model: PinnedModel, file: RemoteFile) -> bytes:
    """The first bytes of a tensor file, its header included unless that is out of all bounds."""
    cached = model.blob(file)
    if cached.exists():
        with cached.open("rb") as contents:
            start = contents.read(8)
            return start + contents.read(_header_bytes(start))
    start = answer_bytes(model, file.name, start=0, stop=min(_FIRST_BYTES, file.num_bytes))
    stop = 8 + _header_bytes(start)
    if stop > len(start) == _FIRST_BYTES:
        start += answer_bytes(model, file.name, start=len(start), stop=stop)
    return start[:stop]


def _header_bytes(start: bytes) -> int:
    """What a file's first bytes say of its header's length; of an impossible one, a few bytes."""
    num_bytes = int.from_bytes(start[:8], "little")
    return num_bytes if num_bytes <= MAX_HEADER_BYTES else 64

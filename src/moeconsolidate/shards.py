"""The tensor files of a checkpoint: one model.safetensors, or shards and their index.

Nothing is taken on trust: the index and the headers of the shards must name the same tensors in the
same files, each once. Pickled weights are never opened, whatever their name.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import NoReturn, Self

from moeconsolidate.folder import find_file
from moeruntime.errors import CheckpointError
from moeruntime.strict_json import read_json
from moeruntime.tensorfile import TensorFile

__all__ = ["Shards"]

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
MAX_SHARDS = 4096
_PICKLES = (".bin", ".pt", ".pth", ".ckpt")
_PLAIN_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]{0,254}")


class Shards:
    """All tensor files of one checkpoint, open, and which tensor is in which."""

    def __init__(self, folder: Path) -> None:
        """Open every tensor file of the folder and check its header.

        Raises:
            CheckpointError: no tensor files, an index that does not tell the truth, a bad header.
        """
        self._files: dict[str, TensorFile] = {}
        try:
            if find_file(folder, INDEX_FILE):
                self.where: Mapping[str, TensorFile] = self._open_indexed(folder)
            elif find_file(folder, SINGLE_FILE):
                file = self._open(folder, SINGLE_FILE)
                self.where = dict.fromkeys(file.entries, file)
            else:
                _explain_absence(folder)
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Close every file."""
        for file in self._files.values():
            file.close()

    def check_unchanged(self) -> None:
        """Raise CheckpointError if a file is no longer the one that was opened."""
        for file in self._files.values():
            file.check_unchanged()

    def _open(self, folder: Path, name: str) -> TensorFile:
        path = find_file(folder, name)
        if path is None:
            raise CheckpointError(f"{folder}: shard {name} is missing; {INDEX_FILE} lists it")
        self._files[name] = TensorFile(path, CheckpointError)
        return self._files[name]

    def _open_indexed(self, folder: Path) -> dict[str, TensorFile]:
        index = read_json(folder / INDEX_FILE, CheckpointError).child("weight_map")
        shard_of = {tensor: index.text(tensor) for tensor in index.keys()}
        shards = sorted(set(shard_of.values()))
        for shard in shards:
            if not _PLAIN_NAME.fullmatch(shard) or not shard.endswith(".safetensors"):
                index.fail(f"shard {ascii(shard[:80])} is not the name of a file in this folder")
        if not 1 <= len(shards) <= MAX_SHARDS:
            index.fail(f"{len(shards)} shards, outside 1..{MAX_SHARDS}")
        if len({shard.casefold() for shard in shards}) != len(shards):
            index.fail("two shards have names that differ only in case")
        if SINGLE_FILE not in shards and find_file(folder, SINGLE_FILE):
            raise CheckpointError(
                f"{folder}: both {SINGLE_FILE} and {INDEX_FILE}: two models in one folder; "
                "remove one"
            )
        for shard in shards:
            for tensor in self._open(folder, shard).entries:
                self._check_indexed(folder, tensor, shard, shard_of)
        for tensor, shard in shard_of.items():
            if tensor not in self._files[shard].entries:
                raise CheckpointError(
                    f"{folder / shard}: no tensor {_quoted(tensor)}; {INDEX_FILE} says it is here"
                )
        return {tensor: self._files[shard] for tensor, shard in shard_of.items()}

    def _check_indexed(
        self, folder: Path, tensor: str, shard: str, shard_of: Mapping[str, str]
    ) -> None:
        expected = shard_of.get(tensor)
        if expected is None:
            raise CheckpointError(
                f"{folder / shard}: tensor {_quoted(tensor)} is not in {INDEX_FILE}"
            )
        if expected != shard:
            raise CheckpointError(
                f"{folder / shard}: tensor {_quoted(tensor)} is here, but {INDEX_FILE} says it is "
                f"in {expected}"
            )


def _explain_absence(folder: Path) -> NoReturn:
    """Say what the folder has in place of safetensors."""
    names = sorted(path.name for path in folder.iterdir())
    pickles = [name for name in names if name.endswith(_PICKLES)]
    others = [name for name in names if name.endswith(".safetensors")]
    if others:
        raise CheckpointError(
            f"{folder}: {others[0]} but neither {SINGLE_FILE} nor {INDEX_FILE}, which are read"
        )
    if pickles:
        raise CheckpointError(
            f"{folder}: weights only as a pickle ({pickles[0]}), which can run code and is never "
            "opened; convert them to safetensors with save_pretrained()"
        )
    raise CheckpointError(f"{folder}: no weights: neither {SINGLE_FILE} nor {INDEX_FILE}")


def _quoted(tensor: str) -> str:
    return ascii(tensor[:120])

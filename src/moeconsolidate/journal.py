"""Which layers of an unfinished pack are finished, so that whoever comes next need not redo them.

An entry is written once a layer's files have been flushed. It holds a key: a digest of everything
that decides the layer's bytes. The next run reads its inputs anew, and takes a layer over only
where the key comes out the same and each file still has the digest that was noted. So what is taken
over is proven, whatever was done to inputs, recipe or disk in between.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from moeconsolidate.digest import TensorDigest
from moeconsolidate.importance import Statistics
from moeconsolidate.plan import ConsolidationPlan, LayerPlan, Recipe
from moeconsolidate.publish import write_file
from moeruntime import __version__
from moeruntime.errors import InputError
from moeruntime.families import ModelConfig
from moeruntime.pack.manifest import FORMAT_VERSION, PackedFile
from moeruntime.strict_json import Fields, canonical_json, read_json

__all__ = ["FinishedLayer", "Journal", "layer_key"]


@dataclass(frozen=True, slots=True)
class FinishedLayer:
    """What an entry says: the layer's plan, its files by their paths in the pack, tensor bytes."""

    plan: LayerPlan
    files: Mapping[str, PackedFile]
    tensor_bytes: int


def layer_key(
    layer: int,
    names: Sequence[str],
    config: ModelConfig,
    recipe: Recipe,
    planned: LayerPlan | None,
    experts_sha256: str,
    inputs_NH: Tensor | None,
    statistics: Sequence[Statistics] | None,
    before: str | None,
) -> str:
    """Digest of all that decides the bytes of one layer, lower-case hexadecimal.

    Args:
        layer: its index.
        names: the variants, in order.
        config: their architecture.
        recipe: how experts are compared and stored.
        planned: what shares a slot, and with what bits, where that has been decided before.
        experts_sha256: digest of the layer's experts, as `LayerReader.load` returns it.
        inputs_NH: what experts are compared by, where that is not their weights.
        statistics: of each variant's calibration, where there was one.
        before: the key of the layer before, where its codes decide those of this one.
    """
    decided = ConsolidationPlan(recipe, (planned,) if planned else ())
    facts: dict[str, object] = {
        # Another version of either may round, or lay out, in another way.
        "versions": [__version__, torch.__version__, FORMAT_VERSION],
        "layer": layer,
        "names": list(names),
        "config": config.to_json(),
        "plan": decided.to_json(),
        "experts": experts_sha256,
    }
    if inputs_NH is not None:
        facts["inputs"] = TensorDigest.of(inputs_NH.contiguous()).sha256
    if before is not None:
        facts["before"] = before
    facts["statistics"] = [[one.num_tokens, *_digests_of(one, layer)] for one in statistics or ()]
    return hashlib.sha256(canonical_json(facts)).hexdigest()


class Journal:
    """The entries about one pack; `folder` holds them and nothing else."""

    def __init__(self, folder: Path, pack: Path) -> None:
        """Open the journal of `pack`, and clear away what no entry speaks of."""
        self._folder, self._pack = folder, pack
        folder.mkdir(exist_ok=True)
        pack.mkdir(exist_ok=True)
        self._entries: dict[int, tuple[str, FinishedLayer]] = {}
        self.num_finished = 0
        for path in sorted(folder.iterdir()):
            try:
                layer, key, finished = _read_entry(path)
            except InputError:  # cut short, or of another version
                layer = -1
            if path == self._place(layer):
                self._entries[layer] = key, finished
            else:
                path.unlink()
        self.num_finished = len(self._entries)
        self._clear_strays()

    def take_over(self, layer: int, key: str) -> FinishedLayer | None:
        """What an earlier run finished of a layer, if that is still what it would be now.

        Where it is not, it is removed, and the layer's files can be written.
        """
        found = self._entries.pop(layer, None)
        if found is None:
            return None
        if found[0] == key and all(
            _is_intact(self._pack / path, file) for path, file in found[1].files.items()
        ):
            return found[1]
        self.num_finished -= 1
        self._place(layer).unlink()
        for path in found[1].files:
            (self._pack / path).unlink(missing_ok=True)
        return None

    def note(self, key: str, recipe: Recipe, finished: FinishedLayer) -> None:
        """Say that a layer is finished; its files must have been flushed."""
        entry = {
            "layer": finished.plan.layer,
            "key": key,
            "plan": ConsolidationPlan(recipe, (finished.plan,)).to_json(),
            "files": {
                path: {"bytes": one.num_bytes, "sha256": one.sha256}
                for path, one in finished.files.items()
            },
            "tensor_bytes": finished.tensor_bytes,
        }
        write_file(self._place(finished.plan.layer), json.dumps(entry).encode("ascii"))
        self.num_finished += 1

    def _place(self, layer: int) -> Path:
        return self._folder / f"layer-{layer:03d}.json"

    def _clear_strays(self) -> None:
        """Remove the files of the pack that no entry has, and folders left empty."""
        known = {path for _, finished in self._entries.values() for path in finished.files}
        for folder, _, names in os.walk(self._pack, topdown=False):
            for name in names:
                path = Path(folder) / name
                if path.relative_to(self._pack).as_posix() not in known or path.is_symlink():
                    path.unlink()
            if Path(folder) != self._pack and not any(Path(folder).iterdir()):
                Path(folder).rmdir()


def _read_entry(path: Path) -> tuple[int, str, FinishedLayer]:
    entry = read_json(path, InputError)
    plan = ConsolidationPlan.from_json(entry.child("plan"))
    if len(plan.layers) != 1:
        entry.fail("a plan of one layer is wanted")
    layer = entry.integer("layer", 0, 2**20)
    files = {name: _read_file(entry.child("files").child(name)) for name in entry.raw("files")}
    finished = FinishedLayer(
        replace(plan.layers[0], layer=layer), files, entry.integer("tensor_bytes", 0, 2**62)
    )
    return layer, entry.text("key"), finished


def _read_file(source: Fields) -> PackedFile:
    return PackedFile(source.integer("bytes", 0, 2**62), source.text("sha256"))


def _is_intact(path: Path, expected: PackedFile) -> bool:
    try:
        if path.is_symlink() or path.stat().st_size != expected.num_bytes:
            return False
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest() == expected.sha256
    except OSError:
        return False


def _digests_of(statistics: Statistics, layer: int) -> Iterable[str]:
    """Digests of the sums that coding and merging a layer look at."""
    yield TensorDigest.of(statistics.num_routed_LE[layer].contiguous()).sha256
    for _, sums in sorted(statistics.layers[layer].items()):
        for tensor in (*sums.inputs_EKK, sums.outputs_ER):
            yield TensorDigest.of(tensor.contiguous()).sha256

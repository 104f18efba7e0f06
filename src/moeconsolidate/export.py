"""Back out of a pack: one variant as a plain Hugging Face checkpoint.

One tensor an expert, under the family's original names, which transformers and vLLM both load; one
model.safetensors, or numbered shards and their index where it would be too large. One tensor at a
time is in memory.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache, partial
from os import PathLike
from pathlib import Path

import torch
from torch import Tensor

from moeconsolidate.digest import TensorDigest, content_sha256, expert_role
from moeconsolidate.folder import SIDE_FILES
from moeconsolidate.plan import LOSSLESS_THRESHOLD, OnProgress, Progress
from moeconsolidate.publish import (
    PACK_FOLDER,
    check_target,
    require_disk,
    staged_folder,
    write_file,
)
from moeconsolidate.shards import INDEX_FILE, SINGLE_FILE
from moeruntime.errors import IntegrityError, UsageError
from moeruntime.pack import Manifest, Pack
from moeruntime.tensorfile import DTYPES, TensorFileWriter

__all__ = ["DEFAULT_SHARD_BYTES", "export_variant"]

DEFAULT_SHARD_BYTES = 5_000_000_000
"""As large as Hugging Face makes them."""


@dataclass(frozen=True, slots=True)
class _Output:
    """One tensor to write: its role, its exported name, what it is, and how to get it."""

    role: str
    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    read: Callable[[], Tensor]

    @property
    def num_bytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


def export_variant(
    pack_root: str | PathLike[str],
    name: str,
    out: str | PathLike[str],
    *,
    max_shard_bytes: int = DEFAULT_SHARD_BYTES,
    on_progress: OnProgress | None = None,
) -> Path:
    """Write one variant of a pack as a Hugging Face checkpoint folder.

    From a lossless pack it is the model that went in, bit by bit, and is held against the digest
    that the pack has of that.

    Args:
        pack_root: the pack's folder.
        name: the variant.
        out: the folder to make; nothing may be there yet.
        max_shard_bytes: tensor bytes a file may hold, unless a single tensor is larger.
        on_progress: called after each tensor.

    Returns:
        The folder that was made.

    Raises:
        UsageError: `out` exists or lies in the pack, or `max_shard_bytes` is not positive.
        RequestError: the pack has no such variant.
        IntegrityError: the pack does not hold what its manifest says.
        ResourceError: the disk is full or not writable.
    """
    target = Path(out)
    if max_shard_bytes < 1:
        raise UsageError(f"max_shard_bytes is {max_shard_bytes}; it must be at least 1")
    with Pack(Path(pack_root)) as pack:
        variant = pack.variant(name)
        check_target(target, inputs=[pack.root])
        outputs = list(_outputs(pack, name))
        require_disk(target.parent, sum(output.num_bytes for output in outputs))
        with staged_folder(target) as staging:
            folder = staging / PACK_FOLDER
            digests = _write_shards(folder, _shards(outputs, max_shard_bytes), on_progress)
            _copy_side_files(pack, name, folder)
            if (
                _lossless(pack.manifest)
                and content_sha256(pack.manifest.config, digests) != variant.content_sha256
            ):
                raise IntegrityError(
                    f"{pack.root}: variant '{name}' is not the model that was consolidated; "
                    "`moec verify` tells which file is damaged"
                )
    return target


def _lossless(manifest: Manifest) -> bool:
    """Whether a variant comes out as it went in; codes round even where nothing is shared."""
    return manifest.nested is None and manifest.recipe.get("threshold") == LOSSLESS_THRESHOLD


def _outputs(pack: Pack, name: str) -> Iterator[_Output]:
    """Every tensor of the variant, in the order a forward pass meets them."""
    manifest, config = pack.manifest, pack.manifest.config
    family, dtype = manifest.family_spec, DTYPES[manifest.expert_dtype]

    @lru_cache(maxsize=1)  # gate_proj and up_proj are two halves of one read
    def gate_up(layer: int, number: int) -> Tensor:
        return pack.read_expert(name, layer, number, "gate_up")

    def expert(layer: int, number: int, role: str) -> Tensor:
        if role == "down_proj":
            return pack.read_expert(name, layer, number, "down")
        start = 0 if role == "gate_proj" else -config.intermediate_size
        return gate_up(layer, number)[start:][: config.intermediate_size]

    def layer_experts(layer: int, block: str) -> Iterator[_Output]:
        for number in range(config.num_experts):
            for role, shape in config.expert_shapes.items():
                yield _Output(
                    expert_role(block, number, role),
                    family.expert_name(block, number, role),
                    dtype,
                    shape,
                    partial(expert, layer, number, role),
                )

    for role, shape in config.non_expert_shapes().items():
        yield _Output(
            role,
            family.non_expert_name(role),
            pack.non_expert_dtype(name, role),
            shape,
            partial(pack.read_non_expert, name, role),
        )
        block, _, last = role.rpartition(".")
        if last == "router":  # the last of its layer: the experts come next
            yield from layer_experts(config.layers.index(block), block)


def _shards(outputs: Sequence[_Output], max_shard_bytes: int) -> list[list[_Output]]:
    """Fill shards in order, starting a new one where the next tensor would not fit."""
    shards: list[list[_Output]] = [[]]
    shard_bytes = 0
    for output in outputs:
        if shards[-1] and shard_bytes + output.num_bytes > max_shard_bytes:
            shards.append([])
            shard_bytes = 0
        shards[-1].append(output)
        shard_bytes += output.num_bytes
    return shards


def _write_shards(
    folder: Path, shards: Sequence[Sequence[_Output]], on_progress: OnProgress | None
) -> dict[str, TensorDigest]:
    """Write the tensor files, and the index if there are several; returns role -> digest."""
    digests: dict[str, TensorDigest] = {}
    weight_map: dict[str, str] = {}
    total = sum(len(shard) for shard in shards)
    for number, shard in enumerate(shards, start=1):
        path = SINGLE_FILE
        if len(shards) > 1:
            path = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        declared = [(output.name, output.dtype, output.shape) for output in shard]
        with TensorFileWriter(folder / path, declared) as file:
            for output in shard:
                tensor = output.read()
                file.append(output.name, tensor)
                digests[output.role] = TensorDigest.of(tensor)
                weight_map[output.name] = path
                if on_progress:
                    on_progress(Progress("tensors", len(digests), total))
            file.finish()
    if len(shards) > 1:
        every = [output for shard in shards for output in shard]
        metadata = {
            "total_parameters": sum(math.prod(output.shape) for output in every),
            "total_size": sum(output.num_bytes for output in every),
        }
        index = {"metadata": metadata, "weight_map": weight_map}
        document = json.dumps(index, indent=2, sort_keys=True) + "\n"
        write_file(folder / INDEX_FILE, document.encode())
    return digests


def _copy_side_files(pack: Pack, name: str, folder: Path) -> None:
    for file in SIDE_FILES:
        if path := pack.variant_path(name, file):
            write_file(folder / file, path.read_bytes())

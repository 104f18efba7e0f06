"""Writes a pack, a layer at a time, and publishes it whole.

The order: `write_layer` and `note_layer` for each layer, `write_non_expert`, `write_side_files`,
`finish`. What has been asked for decides every byte; nothing about the machine, the time or the
place goes in.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor

from moeconsolidate.coded_layer import CodedLayer
from moeconsolidate.digest import TensorDigest
from moeconsolidate.journal import FinishedLayer, Journal
from moeconsolidate.model_card import model_card
from moeconsolidate.plan import ConsolidationPlan, LayerPlan, Origin, Recipe
from moeconsolidate.publish import (
    JOURNAL_FOLDER,
    PACK_FOLDER,
    require_disk,
    staged_folder,
    write_file,
)
from moeconsolidate.threads import Behind, in_order
from moeruntime import __version__
from moeruntime.codes import NestedCode
from moeruntime.errors import IntegrityError, MoecError, ResourceError
from moeruntime.families import ModelConfig
from moeruntime.pack.manifest import (
    COMMON_FILE,
    MANIFEST_NAME,
    Manifest,
    PackedFile,
    TensorRef,
    Variant,
    layer_file,
    private_file,
    variant_file,
    variant_folder,
)
from moeruntime.tensorfile import FileDigest, TensorFile, TensorFileWriter, dtype_name

__all__ = ["PackWriter"]

SlotColumns = Callable[[int, slice, int], Tensor]
"""(slot, columns, place) -> those weights of the slot's expert, flattened.

Called from several threads, and valid until the next call with the same place (see `in_order`)."""

RoutingTable = Sequence[Sequence[int]]
"""[layer][expert]: tokens routed to an expert, of ten thousand."""

MAX_ROUTING = 2**16
"""Numbers of all routing tables together: about 300 kB of a manifest."""


class PackWriter:
    """One pack being written; made by `PackWriter.create`."""

    def __init__(
        self,
        folder: Path,
        names: Sequence[str],
        family: str,
        config: ModelConfig,
        expert_dtype: torch.dtype,
        journal: Journal,
    ) -> None:
        """Write into `folder`, which is there and holds what `journal` knows."""
        self._folder, self._journal = folder, journal
        self._names = tuple(names)
        self._family, self._config, self._expert_dtype = family, config, expert_dtype
        self._files: dict[str, PackedFile] = {}
        self._tensors: list[dict[str, TensorRef]] = [{} for _ in names]
        self._tensor_bytes = self._reserved_bytes = 0
        self._behind, self._due = Behind(), list[Callable[[], None]]()
        for inside in ("experts", *map(variant_folder, self._names)):
            (folder / inside).mkdir(parents=True, exist_ok=True)

    @classmethod
    @contextmanager
    def create(
        cls,
        target: Path,
        names: Sequence[str],
        family: str,
        config: ModelConfig,
        expert_dtype: torch.dtype,
    ) -> Iterator[PackWriter]:
        """Yield a writer whose pack appears at `target` when the block ends well, and never else.

        What ends the block early leaves finished layers to the next run, unless the input was at
        fault.

        Args:
            target: a path that does not exist, in a folder that does.
            names: the variants, in order.
            family: key into FAMILIES.
            config: the architecture they share.
            expert_dtype: what experts are stored as.

        Raises:
            UsageError: `target` has appeared meanwhile, or somebody else is writing it.
            ResourceError: the disk is full, read-only or broken.
        """
        journal: Journal | None = None

        def kept(problem: BaseException) -> str | None:
            at_fault = isinstance(problem, MoecError) and not isinstance(problem, ResourceError)
            if journal is None or not journal.num_finished or at_fault:
                return None
            return f"{journal.num_finished} finished layers are kept"

        with staged_folder(target, kept=kept) as staging:
            folder = staging / PACK_FOLDER
            journal = Journal(staging / JOURNAL_FOLDER, folder)
            writer = cls(folder, names, family, config, expert_dtype, journal)
            with writer._behind:
                yield writer

    def take_over(self, layer: int, key: str) -> LayerPlan | None:
        """Keep what an earlier run wrote of a layer, if its key was the same; returns its plan."""
        self.settle()
        finished = self._journal.take_over(layer, key)
        if finished is None:
            return None
        self._files |= finished.files
        self._tensor_bytes += finished.tensor_bytes
        return finished.plan

    def note_layer(self, key: str, recipe: Recipe, plan: LayerPlan) -> None:
        """Flush a layer that has been written, and let whoever comes after a crash know of it.

        That happens in the background, while the next layer is read; `settle` waits for it.
        """
        due, self._due = self._due, []
        paths = (layer_file(plan.layer), *(private_file(one, plan.layer) for one in self._names))
        num_bytes = self._reserved_bytes

        def finish() -> None:
            for work in due:
                work()
            files = {path: self._files[path] for path in paths if path in self._files}
            self._journal.note(key, recipe, FinishedLayer(plan, files, num_bytes))

        self._behind.do(finish)

    def settle(self) -> None:
        """Wait until the last layer is on the disk; raises what went wrong with that."""
        self._behind.wait()

    def write_layer(self, plan: LayerPlan, slot_columns: SlotColumns) -> None:
        """Write one layer's experts: gate_up of all slots, then down (`ModelConfig.part_shapes`).

        Raises:
            ResourceError: the disk has no room for this layer.
        """
        num_slots, path = len(plan.slots), layer_file(plan.layer)
        tensors = self._config.part_shapes
        declared = [
            (name, self._expert_dtype, (num_slots, *shape)) for name, shape in tensors.items()
        ]
        self._reserve(num_slots * self._config.expert_numel * self._expert_dtype.itemsize)
        pieces = [(name, slot) for name in tensors for slot in range(num_slots)]

        def merge(piece: tuple[str, int], place: int) -> Tensor:
            name, slot = piece
            return slot_columns(slot, self._config.part_columns(name), place).view(
                1, *tensors[name]
            )

        file = TensorFileWriter(self._folder / path, declared)
        try:
            for (name, _), merged in zip(pieces, in_order(merge, pieces), strict=True):
                file.append(name, merged)
        except BaseException:
            file.close()
            raise
        self._due.append(lambda: self._add(path, file.finish()))

    def write_coded_layer(self, coded: CodedLayer) -> None:
        """Write one layer's nested codes, in the background once `note_layer` is called."""
        layer = coded.plan.layer
        files = {layer_file(layer): coded.shared}
        files |= {
            private_file(name, layer): tensors
            for name, tensors in zip(self._names, coded.private, strict=True)
            if tensors
        }
        self._reserve(sum(t.nbytes for tensors in files.values() for t in tensors.values()))
        self._due.append(lambda: self._write_tensors(files))

    def _write_tensors(self, files: Mapping[str, Mapping[str, Tensor]]) -> None:
        for path, tensors in files.items():
            (self._folder / path).parent.mkdir(parents=True, exist_ok=True)
            declared = [(name, one.dtype, tuple(one.shape)) for name, one in tensors.items()]
            with TensorFileWriter(self._folder / path, declared) as file:
                for name, tensor in tensors.items():
                    file.append(name, tensor)
                self._add(path, file.finish())

    def read_coded_layer(self, plan: LayerPlan, nested: Mapping[str, NestedCode]) -> CodedLayer:
        """What `write_coded_layer` was given for a layer that has been written or taken over."""

        def read(path: str) -> dict[str, Tensor]:
            if path not in self._files:
                return {}
            with TensorFile(self._folder / path, IntegrityError) as file:
                return {name: file.read(name) for name in file.entries}

        private = [read(private_file(name, plan.layer)) for name in self._names]
        return CodedLayer(plan, self._config, nested, read(layer_file(plan.layer)), private)

    def write_non_expert(
        self,
        digests: Sequence[Mapping[str, TensorDigest]],
        read: Callable[[int, str], Tensor],
    ) -> None:
        """Write the variants' other weights, each set of bit-identical tensors once.

        Args:
            digests: for each variant, role -> what its tensor is.
            read: (variant_idx, role) -> the tensor, as its digest says.

        Raises:
            ResourceError: the disk has no room for them.
        """
        contents = self._place(digests)
        self._reserve(
            sum(digests[idx][role].num_bytes for file in contents.values() for idx, role in file)
        )
        for path, owners in contents.items():
            # Each tensor's name in the file, from whichever variant's table refers to it.
            names = [self._tensors[idx][role].tensor for idx, role in owners]
            declared = [
                (name, digests[idx][role].dtype, digests[idx][role].shape)
                for name, (idx, role) in zip(names, owners, strict=True)
            ]
            with TensorFileWriter(self._folder / path, declared) as file:
                tensors = in_order(lambda owner, _: read(*owner), owners)
                for name, tensor in zip(names, tensors, strict=True):
                    file.append(name, tensor)
                self._add(path, file.finish())

    def write_side_files(self, variant_idx: int, files: Mapping[str, bytes]) -> None:
        """Write a variant's tokenizer, config and so on."""
        for name, contents in files.items():
            self._write_small(f"{variant_folder(self._names[variant_idx])}/{name}", contents)

    def finish(
        self,
        plan: ConsolidationPlan,
        content_sha256s: Iterable[str],
        *,
        separate_bytes: int,
        nested: Mapping[str, NestedCode] | None = None,
        routing: Mapping[str, RoutingTable] | None = None,
        origins: Mapping[str, Origin] | None = None,
    ) -> Manifest:
        """Write the model card and, last of all, the manifest.

        Args:
            plan: what was written.
            content_sha256s: each variant's content digest.
            separate_bytes: tensor bytes of the variants as separate models.
            nested: how shared codes are stored, where they are.
            routing: variant -> how often its experts were used in calibration, where there was one;
                left out of the pack where it has more than MAX_ROUTING numbers.
            origins: variant -> where on the hub it is from, for those that are.
        """
        card = model_card(
            self._names,
            plan,
            self._family,
            self._config,
            pack_bytes=self._tensor_bytes,
            separate_bytes=separate_bytes,
            base_models=[one.repo for one in (origins or {}).values()],
        )
        self._write_small("README.md", card)
        manifest = Manifest(
            family=self._family,
            config=self._config,
            expert_dtype=dtype_name(self._expert_dtype),
            num_slots=plan.num_slots,
            variants=tuple(
                Variant(
                    name=name,
                    content_sha256=content_sha256,
                    expert_map=tuple(layer.expert_map(idx) for layer in plan.layers),
                    tensors=self._tensors[idx],
                    private_codes=tuple(
                        layer.private_codes(idx) for layer in plan.layers if layer.codes
                    ),
                )
                for idx, (name, content_sha256) in enumerate(
                    zip(self._names, content_sha256s, strict=True)
                )
            ),
            files=self._files,
            recipe=plan.recipe.to_json(),
            provenance={"moec": __version__} | _bounded(routing) | _told(origins),
            nested=nested,
        )
        write_file(self._folder / MANIFEST_NAME, manifest.to_bytes())
        return manifest

    def _place(
        self, digests: Sequence[Mapping[str, TensorDigest]]
    ) -> dict[str, list[tuple[int, str]]]:
        """Decide where each tensor goes: file -> (variant to read it from, role), in file order.

        A tensor that two variants have goes into the common file, named after its role; the second
        such group of one role gets "@2" added, the third "@3".
        """
        contents: dict[str, list[tuple[int, str]]] = {COMMON_FILE: []}
        contents |= {variant_file(name): [] for name in self._names}
        for role in self._config.non_expert_shapes():
            groups: dict[TensorDigest, list[int]] = {}
            for idx, digest_of in enumerate(digests):
                groups.setdefault(digest_of[role], []).append(idx)
            num_common = 0
            for members in groups.values():
                ref = TensorRef(variant_file(self._names[members[0]]), role)
                if len(members) > 1:
                    num_common += 1
                    suffix = "" if num_common == 1 else f"@{num_common}"
                    ref = TensorRef(COMMON_FILE, role + suffix)
                contents[ref.file].append((members[0], role))
                for idx in members:
                    self._tensors[idx][role] = ref
        return {path: owners for path, owners in contents.items() if owners}

    def _write_small(self, path: str, contents: bytes) -> None:
        write_file(self._folder / path, contents)
        self._files[path] = PackedFile(len(contents), hashlib.sha256(contents).hexdigest())

    def _add(self, path: str, digest: FileDigest) -> None:
        self._files[path] = PackedFile(digest.num_bytes, digest.sha256)

    def _reserve(self, num_bytes: int) -> None:
        """Check the room for tensors that are about to be written, and count them."""
        require_disk(self._folder.parent, num_bytes)
        self._reserved_bytes = num_bytes
        self._tensor_bytes += num_bytes


def _told(origins: Mapping[str, Origin] | None) -> dict[str, object]:
    """The entry of the provenance that models of the hub make."""
    if not origins:
        return {}
    told = {name: {"hub": one.repo, "commit": one.commit} for name, one in origins.items()}
    return {"origins": told}


def _bounded(routing: Mapping[str, RoutingTable] | None) -> dict[str, object]:
    """The entry of the provenance that routing makes, if it is there and not too long."""
    tables = routing or {}
    if not 0 < sum(len(row) for table in tables.values() for row in table) <= MAX_ROUTING:
        return {}
    return {"routing": {name: [list(row) for row in table] for name, table in tables.items()}}

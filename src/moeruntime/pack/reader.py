"""Reading a pack: its manifest held against the headers of its files, then tensors by role."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Self

import torch
from torch import Tensor

from moeruntime.codes import NestedCode, decode_planes, plane_shapes, scale_columns
from moeruntime.errors import InputError, IntegrityError, RequestError
from moeruntime.pack.manifest import (
    COMMON_FILE,
    EXPERT_PARTS,
    Manifest,
    Variant,
    layer_file,
    private_file,
    variant_file,
    variant_folder,
)
from moeruntime.tensorfile import DTYPES, FileTensor, TensorFile, dtype_name

__all__ = ["Pack"]

FLOAT_DTYPES = (torch.bfloat16, torch.float16, torch.float32)


class Pack:
    """A pack open for reading; close it or use it as a context manager.

    Opening checks the manifest against itself and every tensor file's header against the manifest,
    which touches a few kilobytes a file. `verify_pack` reads everything.
    """

    def __init__(self, root: Path | str) -> None:
        """Open the pack at `root`.

        Raises:
            InputError: there is no folder at `root`.
            IntegrityError: the manifest or a header is not what it must be.
        """
        self.root = Path(root)
        if not self.root.is_dir():
            raise InputError(f"{self.root}: no such pack folder")
        self.manifest = Manifest.load(self.root)
        self._files: dict[str, TensorFile] = {}
        try:
            for path in self.manifest.files:
                self._check_file(path)
            self._check_layers()
            self._check_non_expert()
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

    def variant(self, name: str) -> Variant:
        """Look up a variant.

        Raises:
            RequestError: unknown; the message lists the known ones.
        """
        for variant in self.manifest.variants:
            if variant.name == name:
                return variant
        known = ", ".join(self.manifest.variant_names)
        raise RequestError(f"{self.root}: no variant {ascii(name[:80])}; it has: {known}")

    def path(self, file: str) -> Path:
        """Absolute path of one of the pack's files."""
        return self.root / file

    def variant_path(self, name: str, file: str) -> Path | None:
        """A file of a variant's folder (tokenizer.json, config.json, ...), None if not packed.

        These files are small and decide what the model reads and when it stops, so each is held
        against its digest before it is handed out.

        Raises:
            IntegrityError: it is not what the manifest says.
        """
        inside = f"{variant_folder(name)}/{file}"
        if inside not in self.manifest.files:
            return None
        self.check_digest(inside)
        return self.path(inside)

    def check_digest(self, file: str) -> None:
        """Read a whole file and raise IntegrityError unless the manifest has its digest."""
        digest, expected = _sha256(self.path(file)), self.manifest.files[file].sha256
        if digest != expected:
            raise IntegrityError(
                f"{self.path(file)}: sha256 {digest[:16]}..., the manifest says {expected[:16]}..."
            )

    def layer(self, layer: int) -> TensorFile:
        """One layer's experts: `gate_up` [slots, 2I, H] (gate rows first), `down` [slots, H, I]."""
        return self._files[layer_file(layer)]

    def slot(self, layer: int, part: str, slot: int) -> tuple[FileTensor]:
        """One slot's `gate_up` or `down`, to be read later."""
        return (self.layer(layer).row(part, slot),)

    def shared_codes(self, layer: int, part: str) -> tuple[dict[int, FileTensor], FileTensor]:
        """Planes and scales of one part of all slots of a nested layer, to be read later."""
        file = self.layer(layer)
        widths = plane_shapes(1, 1, self._nested[part].shared_bits)
        return {w: file.tensor(f"{part}.{w}") for w in widths}, file.tensor(f"{part}.scale")

    def private_codes(
        self, variant: str, layer: int, expert: int, part: str
    ) -> dict[int, FileTensor]:
        """Private planes of one part of one variant's expert, to be read later."""
        codes = self.variant(variant).private_codes[layer][expert]
        widths = plane_shapes(1, 1, codes[EXPERT_PARTS.index(part)].bits)
        file = private_file(variant, layer)
        return {w: self._files[file].tensor(f"experts.{expert}.{part}.{w}") for w in widths}

    def non_expert(self, variant: str, role: str) -> FileTensor:
        """One non-expert tensor of a variant, to be read later."""
        ref = self.variant(variant).tensors[role]
        return self._files[ref.file].tensor(ref.tensor)

    def read_expert(self, variant: str, layer: int, expert: int, part: str) -> Tensor:
        """One part of one variant's expert as a plain matrix of `expert_dtype`, decoded if need be.

        Nested codes are rounded to that dtype here, as an export stores them.
        """
        entry = self.variant(variant)
        slot = entry.expert_map[layer][expert]
        dtype = DTYPES[self.manifest.expert_dtype]
        if self.manifest.nested is None:
            return self.layer(layer).row(part, slot).read()
        file, code = self.layer(layer), self._nested[part]
        num_columns = self.manifest.part_shape(part)[1]
        shared = {
            w: file.row(f"{part}.{w}", slot).read() for w in plane_shapes(1, 1, code.shared_bits)
        }
        scale_RG = file.row(f"{part}.scale", slot).read()
        stored = self.private_codes(variant, layer, expert, part)
        private = {width: plane.read() for width, plane in stored.items()}
        refinement = entry.private_codes[layer][expert][EXPERT_PARTS.index(part)]
        return decode_planes(shared, private, num_columns, scale_RG, code, refinement).to(dtype)

    def read_non_expert(self, variant: str, role: str) -> Tensor:
        """Read one non-expert tensor of a variant, in its stored dtype."""
        return self.non_expert(variant, role).read()

    def non_expert_dtype(self, variant: str, role: str) -> torch.dtype:
        """The stored dtype of a non-expert tensor."""
        return self.non_expert(variant, role).dtype

    def bytes_by_part(self) -> Mapping[str, int]:
        """Tensor bytes of the experts, of what variants have in common, and of each variant.

        Private codes are counted with the experts, which they complete.
        """
        sums = {path: _tensor_bytes(file) for path, file in self._files.items()}
        experts = ("experts/", "private/")
        parts = {"experts": sum(v for path, v in sums.items() if path.startswith(experts))}
        parts["common"] = sums.get(COMMON_FILE, 0)
        for name in self.manifest.variant_names:
            parts[name] = sums.get(variant_file(name), 0)
        return parts

    @property
    def _nested(self) -> Mapping[str, NestedCode]:
        assert self.manifest.nested is not None
        return self.manifest.nested

    def _check_file(self, path: str) -> None:
        full, expected = self.root / path, self.manifest.files[path]
        place = self.root
        for part in path.split("/"):
            place = place / part
            if place.is_symlink():
                raise IntegrityError(f"{place}: a symbolic link; a pack holds regular files only")
        if not full.is_file():
            raise IntegrityError(f"{full}: listed in the manifest, but there is no such file")
        if (num_bytes := full.stat().st_size) != expected.num_bytes:
            raise IntegrityError(
                f"{full}: {num_bytes} bytes, the manifest says {expected.num_bytes}"
            )
        if path.endswith(".safetensors"):
            self._files[path] = TensorFile(full, IntegrityError)

    def _check_layers(self) -> None:
        dtype, nested = DTYPES[self.manifest.expert_dtype], self.manifest.nested
        for layer, num_slots in enumerate(self.manifest.num_slots):
            expected: dict[str, tuple[torch.dtype | None, tuple[int, ...]]] = {}
            for part in EXPERT_PARTS:
                shape = self.manifest.part_shape(part)
                if nested is None:
                    expected[part] = (dtype, (num_slots, *shape))
                    continue
                groups = scale_columns(shape[1], nested[part].group)
                expected[f"{part}.scale"] = (torch.bfloat16, (num_slots, shape[0], groups))
                for width, plane in plane_shapes(*shape, nested[part].shared_bits).items():
                    expected[f"{part}.{width}"] = (torch.uint8, (num_slots, *plane))
            self._check_tensors(self.layer(layer), expected)
        self._check_private()

    def _check_private(self) -> None:
        """Private codes are where the manifest says somebody has them, and nowhere else."""
        files = set()
        for variant in self.manifest.variants:
            for layer, experts in enumerate(variant.private_codes):
                expected: dict[str, tuple[torch.dtype | None, tuple[int, ...]]] = {}
                for expert, codes in enumerate(experts):
                    for part, code in zip(EXPERT_PARTS, codes, strict=True):
                        shapes = plane_shapes(*self.manifest.part_shape(part), code.bits)
                        for width, plane in shapes.items():
                            expected[f"experts.{expert}.{part}.{width}"] = (torch.uint8, plane)
                path = private_file(variant.name, layer)
                if not expected:
                    continue
                if path not in self._files:
                    raise IntegrityError(f"{self.path(path)}: missing, but the manifest needs it")
                files.add(path)
                self._check_tensors(self._files[path], expected)
        for path in self._files:
            if path.startswith("private/") and path not in files:
                raise IntegrityError(f"{self.path(path)}: private codes that no variant uses")

    def _check_non_expert(self) -> None:
        shapes = self.manifest.config.non_expert_shapes()
        expected: dict[str, dict[str, tuple[torch.dtype | None, tuple[int, ...]]]] = {}
        for variant in self.manifest.variants:
            for role, ref in variant.tensors.items():
                tensors = expected.setdefault(ref.file, {})
                if tensors.setdefault(ref.tensor, (None, shapes[role]))[1] != shapes[role]:
                    raise IntegrityError(
                        f"{self.root}: {ref.file}: {ref.tensor}: used for roles of unequal shape"
                    )
        for path, file in self._files.items():
            if path.startswith("variants/"):
                self._check_tensors(file, expected.get(path, {}))

    def _check_tensors(
        self,
        file: TensorFile,
        expected: Mapping[str, tuple[torch.dtype | None, tuple[int, ...]]],
    ) -> None:
        """Exactly these tensors, of these shapes and dtypes (None: any float)."""
        if odd := sorted(set(expected) ^ set(file.entries)):
            raise IntegrityError(f"{file.path}: tensor {ascii(odd[0][:60])} is missing or unknown")
        for name, (dtype, shape) in expected.items():
            entry = file.entries[name]
            if entry.shape != shape:
                raise IntegrityError(
                    f"{file.path}: {name}: shape {list(entry.shape)}, the manifest implies "
                    f"{list(shape)}"
                )
            if entry.dtype != dtype if dtype else entry.dtype not in FLOAT_DTYPES:
                raise IntegrityError(
                    f"{file.path}: {name}: dtype {dtype_name(entry.dtype)} is not allowed here"
                )


def _sha256(path: Path) -> str:
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as problem:
        raise IntegrityError(f"{path}: cannot be read: {problem.strerror}") from None


def _tensor_bytes(file: TensorFile) -> int:
    return sum(entry.num_bytes for entry in file.entries.values())

"""A checkpoint folder, opened: its config normalised, every tensor found and checked by role.

Opening reads headers only, and raises for anything that could go wrong later: a tensor that is
missing, misshapen or unknown. Reading then hashes what it reads, so the content digest of the whole
model is known once everything has been read, and each expert byte leaves the disk once.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Self

import torch
from torch import Tensor

from moeconsolidate.digest import TensorDigest, content_sha256, expert_role
from moeconsolidate.folder import TOKENIZER_FILE, read_config, read_side_files
from moeconsolidate.plan import Origin
from moeconsolidate.shards import Shards
from moeruntime.errors import CheckpointError
from moeruntime.families import FAMILIES, Family, ModelConfig
from moeruntime.strict_json import Fields
from moeruntime.tensorfile import FileTensor, TensorFile, dtype_name
from moeruntime.text import parse_tokenizer

__all__ = ["Checkpoint"]

FLOAT_DTYPES = (torch.bfloat16, torch.float16, torch.float32)


@dataclass(frozen=True, slots=True)
class _Location:
    """Where a tensor lies: a whole tensor of a file or, with `row`, one of its rows."""

    file: TensorFile
    tensor: str
    row: int | None = None

    @property
    def dtype(self) -> torch.dtype:
        return self.file.entries[self.tensor].dtype

    def __str__(self) -> str:
        return f"{self.file.path}: tensor {self.tensor}"

    @property
    def stored(self) -> FileTensor:
        if self.row is None:
            return self.file.tensor(self.tensor)
        return self.file.row(self.tensor, self.row)


class Checkpoint:
    """One model in Hugging Face layout; close it or use it as a context manager.

    Attributes:
        name: the variant's name.
        folder: where it is.
        origin: where on the hub it is from; None where it came as a folder.
        family, config: its architecture.
        base: what its config says it was made from, such as "org/name"; often nothing, or a path.
        expert_dtype: of all its experts.
        side_files: name -> contents of the files that travel with the variant.
    """

    def __init__(self, name: str, folder: Path, origin: Origin | None = None) -> None:
        """Open the folder.

        Raises:
            CheckpointError: anything about the folder, its config or its tensors is not as it must
                be; the message names the file and the field or tensor.
            TokenizerError: its tokenizer is missing, malformed or too large for the embedding.
        """
        self.name, self.folder, self.origin = name, folder, origin
        self._digests: dict[str, TensorDigest] = {}
        with _reading(folder):
            fields = read_config(folder)
            self.family = _find_family(fields)
            self.config: ModelConfig = self.family.parse_config(fields)
            base = fields.raw("_name_or_path", None)
            self.base = base if isinstance(base, str) else ""
            self.side_files = read_side_files(folder)
            tokenizer = self.side_files[TOKENIZER_FILE]
            parse_tokenizer(tokenizer, folder / TOKENIZER_FILE, self.config.vocab_size)
            self._shards = Shards(folder)
        try:
            self._unclaimed = set(self._shards.where)
            self._non_expert = {
                role: self._claim(self.family.non_expert_name(role), shape)
                for role, shape in self.config.non_expert_shapes().items()
            }
            self._experts = [self._claim_layer(block) for block in self.config.layers]
            self.expert_dtype = self._one_expert_dtype()
            self._drop_copies()
            self._refuse_unclaimed()
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Close every file."""
        self._shards.close()

    def check_unchanged(self) -> None:
        """Raise CheckpointError if a tensor file was changed since it was opened."""
        self._shards.check_unchanged()

    def read_expert(self, layer: int, expert: int, *, out: Tensor) -> str:
        """Read one expert.

        Safe to call from several threads for different experts.

        Args:
            layer: its layer.
            expert: its number in this model.
            out: [P] of `expert_dtype`: gate_proj (if it has one) | up_proj | down_proj, flattened.

        Returns:
            A key that is equal for experts of equal bits, and for no others.
        """
        start = 0
        for location in self._experts[layer][expert]:
            # A fused row holds gate_proj and up_proj in one piece, as `out` does.
            stored = location.stored
            stop = start + math.prod(stored.shape)
            with _reading(location):
                stored.read_bytes(0, out[start:stop].view(torch.uint8))
            start = stop
        shapes = self.config.expert_shapes
        pieces = out.split([math.prod(shape) for shape in shapes.values()])
        digests = [
            TensorDigest.of(piece.view(shape))
            for piece, shape in zip(pieces, shapes.values(), strict=True)
        ]
        for role, digest in zip(shapes, digests, strict=True):
            self._digests[expert_role(self.config.layers[layer], expert, role)] = digest
        return " ".join(digest.sha256 for digest in digests)

    def expert(self, layer: int, expert: int) -> tuple[FileTensor, ...]:
        """One expert, to be read later: gate_proj, up_proj (or both in one piece) and down_proj."""
        return tuple(location.stored for location in self._experts[layer][expert])

    def non_expert_dtype(self, role: str) -> torch.dtype:
        """The stored dtype of a non-expert tensor."""
        return self._non_expert[role].dtype

    def non_expert_num_bytes(self, role: str) -> int:
        """Stored bytes of a non-expert tensor."""
        location = self._non_expert[role]
        return location.file.entries[location.tensor].num_bytes

    def read_non_expert(self, role: str) -> Tensor:
        """Read one non-expert tensor, in its stored dtype and shape.

        Safe to call from several threads.

        Raises:
            CheckpointError: it cannot be read, or a weight is not finite.
        """
        location = self._non_expert[role]
        with _reading(location):
            tensor = location.file.read(location.tensor)
        if role not in self._digests:
            # NaN and infinity both reach the extremes, which are found without a copy.
            if not all(math.isfinite(extreme) for extreme in tensor.aminmax()):
                raise CheckpointError(f"{location}: a weight is not finite (NaN or infinity)")
            self._digests[role] = TensorDigest.of(tensor)
        return tensor

    def non_expert_digests(self) -> dict[str, TensorDigest]:
        """Dtype, shape and digest of each non-expert tensor, by role; read unless it has been."""
        for role in self._non_expert.keys() - self._digests.keys():
            self.read_non_expert(role)
        return {role: self._digests[role] for role in self._non_expert}

    def content_sha256(self) -> str:
        """Digest of the whole model (see `digest`), once every tensor has been read."""
        return content_sha256(self.config, self._digests)

    @property
    def num_bytes(self) -> int:
        """Tensor bytes of the model."""
        non_expert = map(self.non_expert_num_bytes, self._non_expert)
        num_experts = self.config.num_layers * self.config.num_experts
        return sum(non_expert) + num_experts * self.expert_num_bytes

    @property
    def expert_num_bytes(self) -> int:
        """Bytes of one expert."""
        return self.config.expert_numel * self.expert_dtype.itemsize

    def _find(self, name: str) -> str | None:
        """The spelling under which the checkpoint has a tensor."""
        return next((one for one in self.family.spellings(name) if one in self._shards.where), None)

    def _claim(self, name: str, shape: tuple[int, ...]) -> _Location:
        """Find a tensor that must be there, and check it against the config."""
        found = self._find(name)
        if found is None:
            raise CheckpointError(f"{self.folder}: no tensor {name}, which config.json asks for")
        self._unclaimed.discard(found)
        location = _Location(self._shards.where[found], found)
        entry = location.file.entries[found]
        if entry.shape != shape:
            raise CheckpointError(
                f"{location}: shape {list(entry.shape)}, config.json asks for {list(shape)}"
            )
        if entry.dtype not in FLOAT_DTYPES:
            raise CheckpointError(
                f"{location}: dtype {dtype_name(entry.dtype)}; BF16, F16 and F32 are read"
            )
        return location

    def _claim_layer(self, block: str) -> list[tuple[_Location, ...]]:
        """Locate each expert of a layer: a tensor a role, or a row of each of two fused ones."""
        config, family = self.config, self.family
        if family.fused_names and self._find(family.fused_name(block, "gate_up_proj")):
            whole = [
                self._claim(family.fused_name(block, f"{part}_proj"), (config.num_experts, *shape))
                for part, shape in config.part_shapes.items()
            ]
            return [
                tuple(_Location(one.file, one.tensor, expert) for one in whole)
                for expert in range(config.num_experts)
            ]
        return [
            tuple(
                self._claim(family.expert_name(block, expert, role), shape)
                for role, shape in config.expert_shapes.items()
            )
            for expert in range(config.num_experts)
        ]

    def _one_expert_dtype(self) -> torch.dtype:
        first = self._experts[0][0][0]
        for layer in self._experts:
            for location in (location for expert in layer for location in expert):
                if location.dtype != first.dtype:
                    raise CheckpointError(
                        f"{location}: dtype {dtype_name(location.dtype)}, but {first.tensor} is "
                        f"{dtype_name(first.dtype)}; all experts must have one dtype"
                    )
        return first.dtype

    def _drop_copies(self) -> None:
        """Ignore what repeats the embedding: a head that config.json ties to it, an old spelling.

        What differs from it is refused: transformers has used either, depending on its version, so
        dropping it in silence could change what the model says.
        """
        wanted = dict.fromkeys(self.family.embedding_copies, "which has to be the same")
        if self.config.tie_embeddings:
            wanted[self.family.non_expert_name("lm_head")] = (
                "but config.json says tie_word_embeddings; set that to false or remove the tensor"
            )
        for name, why in wanted.items():
            if (found := self._find(name)) is None:
                continue
            location = self._claim(found, self.config.non_expert_shapes()["embed_tokens"])
            with _reading(location):
                copy = TensorDigest.of(location.file.read(location.tensor))
            if copy != TensorDigest.of(self.read_non_expert("embed_tokens")):
                raise CheckpointError(f"{location}: differs from the embedding, {why}")

    def _refuse_unclaimed(self) -> None:
        """Refuse tensors that have no role: they would be missing from the pack."""
        for name in sorted(self._unclaimed):
            if not name.endswith(self.family.ignored_suffixes):
                raise CheckpointError(
                    f"{self._shards.where[name].path}: tensor {ascii(name[:120])} has no place in "
                    f"a {self.family.model_type} model and would be lost"
                )


def _find_family(config: Fields) -> Family:
    model_type = config.text("model_type")
    if model_type not in FAMILIES:
        known = ", ".join(sorted(FAMILIES))
        config.fail(f"model_type {ascii(model_type[:60])} is not known; known: {known}")
    if config.has("quantization_config"):
        config.fail("field 'quantization_config': quantised checkpoints are not read; dequantise")
    return FAMILIES[model_type]


@contextmanager
def _reading(what: object) -> Iterator[None]:
    try:
        yield
    except OSError as problem:
        raise CheckpointError(f"{what}: cannot be read: {problem.strerror}") from None

"""What a consolidation would take: bytes to download, disk, memory, arithmetic. Headers only.

Sizes follow from shapes. How much is shared is not known before weights are compared, so the pack
has a least size, where every variant shares everything, and a most, where nothing is shared. Times
come from doing a little of the work on this machine. Where calibration is asked for, neither memory
nor time is predicted.
"""

from __future__ import annotations

import hashlib
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from moeconsolidate.allocation import options_for
from moeconsolidate.checkpoint import Checkpoint
from moeconsolidate.coding import nested_format
from moeconsolidate.compatibility import check_compatible
from moeconsolidate.encoding import encode
from moeconsolidate.pieces import UNWEIGHED_SCRATCH
from moeconsolidate.plan import Recipe, default_code
from moeconsolidate.planning import resolve_recipe
from moeconsolidate.similarity import cosine_similarity, warm_up
from moeconsolidate.sources import HubRef, Models, parse_sources
from moeconsolidate.threads import num_places, side_by_side, single_threaded_torch
from moeruntime.bench.machine import peak_bytes
from moeruntime.codes import PrivateCode, nested_bytes
from moeruntime.errors import InputError

__all__ = ["Estimate", "dry_run"]

CODING_COPIES = 4
"""What a thread holds at most, as float32 copies of what it rounds at once."""

PROCESS_BYTES, KERNEL_BYTES = 100_000_000, 150_000_000
"""Modules and threads of a consolidation that a dry run does not have, and a compiler of kernels:
measured by benchmarks/consolidate.py."""

STRIPE_BYTES = 2**21
"""What a thread compares at once, in float64."""

PROBE_ROWS = 256


@dataclass(frozen=True, slots=True)
class Estimate:
    """What it would take.

    Attributes:
        download_bytes: variant -> what is not in the cache, of models of the hub.
        input_bytes: tensor bytes of all variants.
        pack_bytes: the least and the most that the tensors of the pack can take.
        memory_bytes: peak of the process; None where it is not predicted.
        arithmetic_s: beside reading and writing; None where it is not predicted.
    """

    download_bytes: Mapping[str, int]
    input_bytes: int
    pack_bytes: tuple[int, int]
    memory_bytes: int | None
    arithmetic_s: float | None

    def to_json(self) -> dict[str, object]:
        """Plain values."""
        return asdict(self)


def dry_run(
    models: Models, choices: Mapping[str, Any], calibration: Mapping[str, Sequence[Path]]
) -> Estimate:
    """Judge the models, as `consolidate` would, and say what it would take; downloads no weights.

    Args:
        models: as for `consolidate`.
        choices: keyword arguments of `consolidate`.
        calibration: files of text by variant.

    Raises:
        UsageError, InputError, CheckpointError, TokenizerError, HubError: as from `consolidate`.
    """
    sources = parse_sources(models)
    with tempfile.TemporaryDirectory(prefix="moec-preview-") as scratch, ExitStack() as stack:
        folders = {one.name: one.origin for one in sources if isinstance(one.origin, Path)}
        download_bytes: dict[str, int] = {}
        if any(isinstance(one.origin, HubRef) for one in sources):
            from moeconsolidate.hub.obtain import bytes_to_download, look

            pinned, folders = look(sources, Path(scratch))
            download_bytes = {name: bytes_to_download(model) for name, model in pinned.items()}
        checkpoints = [
            stack.enter_context(Checkpoint(one.name, folders[one.name])) for one in sources
        ]
        check_compatible(checkpoints)
        for file in (one for files in calibration.values() for one in files):
            if not file.is_file():
                raise InputError(f"{file}: no such file")
        recipe = resolve_recipe(
            checkpoints,
            **{**dict.fromkeys(_CHOICES), "align": False, **choices},
            texts=calibration,
        )
        pack_bytes = _pack_bytes(checkpoints, recipe)
        predicted = recipe.calibration == "none"
        return Estimate(
            download_bytes,
            sum(one.num_bytes for one in checkpoints),
            pack_bytes,
            _memory_bytes(checkpoints, recipe, pack_bytes[1]) if predicted else None,
            _arithmetic_s(checkpoints, recipe, sum(pack_bytes) // 2) if predicted else None,
        )


_CHOICES = (
    "threshold",
    "similarity",
    "signal",
    "merge",
    "code",
    "shared_bits",
    "budget",
    "max_loss",
)


def _pack_bytes(checkpoints: Sequence[Checkpoint], recipe: Recipe) -> tuple[int, int]:
    first, num_variants = checkpoints[0], len(checkpoints)
    num_experts = first.config.num_layers * first.config.num_experts
    rest = [one.num_bytes - num_experts * one.expert_num_bytes for one in checkpoints]
    if recipe.code == "plain":
        shared, apart = first.expert_num_bytes, num_variants * first.expert_num_bytes
    else:
        least, most = _private_codes(recipe)
        shared = _coded_bytes(checkpoints, recipe, [least] * num_variants)
        apart = num_variants * _coded_bytes(checkpoints, recipe, [most])
    experts = (num_experts * shared, num_experts * apart)
    if recipe.budget_bytes is not None:
        experts = (min(experts[0], recipe.budget_bytes), recipe.budget_bytes)
    return experts[0] + max(rest), experts[1] + sum(rest)


def _private_codes(recipe: Recipe) -> tuple[PrivateCode, PrivateCode]:
    """The fewest and the most private bits of an expert: the default's, unless bits are chosen."""
    if not recipe.allocated:
        code = default_code(recipe.shared_bits)
        return code, code
    options = sorted(options_for(recipe.shared_bits), key=lambda code: code.bits)
    return options[0], options[-1]


def _coded_bytes(
    checkpoints: Sequence[Checkpoint], recipe: Recipe, private: Sequence[PrivateCode]
) -> int:
    """Bytes of a nested slot with such private codes of its members."""
    config = checkpoints[0].config
    formats = nested_format(config, recipe.shared_bits)
    return sum(
        nested_bytes(*shape, formats[part], private) for part, shape in config.part_shapes.items()
    )


def _memory_bytes(checkpoints: Sequence[Checkpoint], recipe: Recipe, most_bytes: int) -> int:
    """One layer of all variants, and what works beside it."""
    first, config = checkpoints[0], checkpoints[0].config
    num_threads = num_places() - 1
    layer = len(checkpoints) * config.num_experts * first.expert_num_bytes
    if recipe.code == "plain":
        beside = num_places() * first.expert_num_bytes + num_threads * STRIPE_BYTES
    else:
        beside = most_bytes // config.num_layers  # a layer's codes
        beside += num_threads * 4 * CODING_COPIES * UNWEIGHED_SCRATCH
    rest = max(first.non_expert_num_bytes(role) for role in config.non_expert_shapes())
    process = peak_bytes(torch.device("cpu")) + PROCESS_BYTES
    process += 0 if recipe.lossless else KERNEL_BYTES
    return process + layer + max(beside, 2 * rest)


def _arithmetic_s(checkpoints: Sequence[Checkpoint], recipe: Recipe, output_bytes: int) -> float:
    """Time of digests, similarities and codes, from doing a little of each on all threads."""
    first, config = checkpoints[0], checkpoints[0].config
    num_rows = len(checkpoints) * config.num_experts
    input_bytes = sum(one.num_bytes for one in checkpoints)
    buffer = bytearray(2**23)
    hash_s = _seconds(lambda _: hashlib.sha256(buffer).digest()) / len(buffer)
    total_s = hash_s * (input_bytes + output_bytes)
    num_columns = config.num_layers * config.expert_numel
    if not recipe.lossless:
        columns = min(2**18, config.expert_numel)
        rows = torch.randn(num_rows, columns).to(first.expert_dtype)
        warm_up()
        start = time.perf_counter()
        cosine_similarity(rows, describe=str)
        total_s += (time.perf_counter() - start) / columns * num_columns
    if recipe.code == "nested":
        width, num_variants = config.hidden_size, len(checkpoints)
        weights = torch.randn(1, num_variants, PROBE_ROWS, width)
        code = nested_format(config, recipe.shared_bits)["gate_up"]
        private = [[default_code(recipe.shared_bits)] * num_variants]
        a_probe_s = _seconds(lambda _: encode(weights, code, private))
        total_s += a_probe_s / (PROBE_ROWS * width) * num_columns * config.num_experts
    return total_s


def _seconds(work: Callable[[int], object]) -> float:
    """Time of one piece of work where all threads do such work side by side."""
    with single_threaded_torch() as num_threads:
        work(0)
        start = time.perf_counter()
        side_by_side(work, range(num_threads))
        return (time.perf_counter() - start) / num_threads

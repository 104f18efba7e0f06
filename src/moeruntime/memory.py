"""What an engine will need, predicted from the pack's headers before a byte is loaded."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

import torch

from moeruntime.errors import ResourceError, UsageError
from moeruntime.families import DecoderConfig
from moeruntime.kv_cache import KVCache, blocks_for
from moeruntime.layout import parameter_shape, private_stages
from moeruntime.loader import RING_BYTES
from moeruntime.models import parameter_roles
from moeruntime.models.layers import rotary_bytes
from moeruntime.models.step_buffers import StepBuffers, decoded_numel, step_rows
from moeruntime.pack import Manifest, WeightSource

__all__ = ["MemoryPlan", "available_bytes", "plan_memory"]

# Activations, the allocator's rounding, and on a GPU the context and library workspaces.
RESERVE_BYTES = {"cpu": 256 * 2**20, "cuda": 2 * 2**30}
# On a CPU nested experts are decoded when tokens come; so much of what was decoded lately is kept.
# CUDA kernels keep nothing decoded; encoder-decoders have none of their own yet.
DECODED_BYTES = 256 * 2**20
# Unless told otherwise, the first layer of every variant stays on a GPU where all of them together
# take at most this part of what the weights leave free: a prompt can begin at once then.
KEPT_SHARE = 0.05
# Without an explicit size the cache takes at most this part of what is left.
CACHE_SHARE = {"cpu": 0.25, "cuda": 0.9}


@dataclass(frozen=True, slots=True)
class MemoryPlan:
    """Predicted bytes by part; everything but `host_bytes` is on the compute device.

    Attributes:
        experts_bytes: all slots of all layers, as they are stored.
        decoded_bytes: nested experts kept decoded; 0 for a plain pack, and where CUDA kernels
            decode.
        shared_bytes: non-expert tensors that all variants have in common.
        resident_bytes: the resident variants' own non-expert tensors.
        kept_bytes: every variant's copy of the first layers, where some are kept on the device.
        cache_bytes: keys and values.
        buffer_bytes: what captured steps work in, at most, and rotary tables; 0 on a CPU, where
            steps allocate out of the reserve.
        host_bytes: host copies of the variants' own tensors; 0 when all are resident.
        num_blocks: cache blocks that cache_bytes buys.
        kept_layers: first layers that kept_bytes are of.
    """

    experts_bytes: int
    decoded_bytes: int
    shared_bytes: int
    resident_bytes: int
    kept_bytes: int
    cache_bytes: int
    buffer_bytes: int
    host_bytes: int
    num_blocks: int
    kept_layers: int

    @property
    def weights_bytes(self) -> int:
        """All weights on the device."""
        experts_bytes = self.experts_bytes + self.decoded_bytes
        return experts_bytes + self.shared_bytes + self.resident_bytes + self.kept_bytes


def available_bytes(device: torch.device) -> int:
    """Memory that can still be taken on a device."""
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return int(free)
    for line in Path("/proc/meminfo").read_text().splitlines():
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) * 1024
    raise ResourceError("/proc/meminfo does not say how much memory is available")


def plan_memory(
    source: WeightSource,
    *,
    num_slots: int,
    dtype: torch.dtype,
    device: torch.device,
    max_sequences: int,
    max_step_tokens: int,
    cache_bytes: int | None,
    kept_layers: int | None,
) -> MemoryPlan:
    """Predict what an engine takes and check that it is there.

    Args:
        source: what is to be loaded.
        num_slots: resident variants.
        dtype: compute dtype of weights and cache.
        device: where they go.
        max_sequences: sequences the cache should hold at full context, if it can.
        max_step_tokens: most tokens in a step.
        cache_bytes: the cache's size; None chooses one.
        kept_layers: first layers of which every variant's copy stays on the device; None keeps
            one where that is cheap.

    Raises:
        UsageError: a cache of no bytes, or more kept layers than there are.
        ResourceError: it does not fit; says what is missing and what would help.
    """
    manifest = source.manifest
    config = manifest.config
    if cache_bytes is not None and cache_bytes < 1:
        raise UsageError(f"cache_bytes is {cache_bytes}; the cache needs some memory")
    if kept_layers is not None and not 0 <= kept_layers <= len(config.blocks):
        raise UsageError(f"kept_layers is {kept_layers}, outside 0..{len(config.blocks)}")
    shared = manifest.shared_roles()
    shared_bytes = dtype.itemsize * sum(
        math.prod(parameter_shape(config, roles))
        for roles in parameter_roles(config).values()
        if shared.issuperset(roles)
    )
    stage_bytes = [stage.numel * dtype.itemsize for stage in private_stages(config, shared)]
    private_bytes = sum(stage_bytes)
    num_variants = len(manifest.variants)
    all_resident = num_slots >= num_variants
    experts_bytes, decoded_bytes = _experts_bytes(manifest, dtype, device)
    weights_bytes = experts_bytes + decoded_bytes + shared_bytes + num_slots * private_bytes

    kind = device.type
    buffer_bytes = _buffer_bytes(manifest, dtype, max_step_tokens) if kind == "cuda" else 0
    reserve_bytes = RESERVE_BYTES[kind] + buffer_bytes
    available = available_bytes(device)
    if kept_layers is None:
        left = available - weights_bytes - reserve_bytes
        cheap = num_variants * sum(stage_bytes[:2]) <= KEPT_SHARE * left
        kept_layers = int(kind == "cuda" and cheap)
    if all_resident:
        kept_layers = 0
    kept_each = sum(stage_bytes[: kept_layers + 1]) if kept_layers else 0
    kept_bytes = num_variants * kept_each
    weights_bytes += kept_bytes
    host_bytes = 0 if all_resident else num_variants * (private_bytes - kept_each)
    if kind == "cuda" and host_bytes:
        _check_host(source, host_bytes, num_variants)
    block_bytes = KVCache.block_bytes(config, dtype)
    left = available - weights_bytes - reserve_bytes - (host_bytes if kind == "cpu" else 0)
    if cache_bytes is None:
        wanted = max_sequences * blocks_for(config.cached_context) * block_bytes
        cache_bytes = min(wanted, int(left * CACHE_SHARE[kind]))
    if left < max(cache_bytes, block_bytes):
        needed = available - left + max(cache_bytes, block_bytes)
        # On a CPU, evicting the first variant would cost a host copy of each and free one.
        most_fewer = 0 if kind == "cpu" and not host_bytes else num_slots - 1
        hint = _hint(num_slots, most_fewer, private_bytes, needed - available, dtype)
        if kept_bytes >= needed - available:
            hint = "keeping fewer first layers would fit"
        raise ResourceError(
            f"{source.root}: needs {needed / 1e9:.1f} GB on {device}, {available / 1e9:.1f} GB are "
            f"free (experts {experts_bytes / 1e9:.1f}, {num_slots} resident variants "
            f"{(shared_bytes + num_slots * private_bytes + kept_bytes) / 1e9:.1f}); {hint}"
        )
    num_blocks = max(1, cache_bytes // block_bytes)
    return MemoryPlan(
        experts_bytes=experts_bytes,
        decoded_bytes=decoded_bytes,
        shared_bytes=shared_bytes,
        resident_bytes=num_slots * private_bytes,
        kept_bytes=kept_bytes,
        cache_bytes=num_blocks * block_bytes,
        buffer_bytes=buffer_bytes,
        host_bytes=host_bytes,
        num_blocks=num_blocks,
        kept_layers=kept_layers,
    )


def _experts_bytes(manifest: Manifest, dtype: torch.dtype, device: torch.device) -> tuple[int, int]:
    """Bytes of all experts as they are stored, and of those kept decoded."""
    one = manifest.config.expert_numel * dtype.itemsize
    if manifest.nested is None:
        return sum(manifest.num_slots) * one, 0
    if device.type == "cuda" and not manifest.config.has_encoder:
        return manifest.coded_bytes(), 0
    return manifest.coded_bytes(), min(DECODED_BYTES, sum(_num_faces(manifest)) * one)


def _num_faces(manifest: Manifest) -> list[int]:
    """Distinct experts of each layer."""
    return [len(manifest.faces(layer)[0]) for layer in range(manifest.config.num_layers)]


def _buffer_bytes(manifest: Manifest, dtype: torch.dtype, max_step_tokens: int) -> int:
    """What `FusedDecoder` and `StepGraphs` allocate beside weights and cache, at most."""
    config, nested = manifest.config, manifest.nested is not None
    if not isinstance(config, DecoderConfig):
        return 0
    # Some layers' nested experts may take float32, and others not.
    expert_dtypes = {dtype, torch.float32} if nested else {dtype}
    max_faces = max(_num_faces(manifest))
    buffers = StepBuffers(
        config,
        step_rows(max_step_tokens),
        max_faces,
        dtype,
        frozenset(expert_dtypes),
        torch.device("meta"),
    )
    decoded_bytes = nested * decoded_numel(config, max_faces, dtype) * dtype.itemsize
    return buffers.num_bytes + decoded_bytes + rotary_bytes(config)


def _check_host(source: WeightSource, host_bytes: int, num_variants: int) -> None:
    """What cold variants are copied from must fit host memory, with the ring they load through."""
    available = available_bytes(torch.device("cpu"))
    constant = RING_BYTES + RESERVE_BYTES["cpu"]
    needed = host_bytes + constant
    if needed > available:
        fit = max(0, available - constant) * num_variants // host_bytes
        raise ResourceError(
            f"{source.root}: needs {needed / 1e9:.1f} GB of host memory for the copies of "
            f"{num_variants} variants, {available / 1e9:.1f} GB are free; those of {fit} would "
            f"fit, --resident {num_variants} needs none"
        )


def _hint(
    num_slots: int, most_fewer: int, private_bytes: int, missing_bytes: int, dtype: torch.dtype
) -> str:
    fewer = -(-missing_bytes // private_bytes) if private_bytes else num_slots
    if fewer <= most_fewer:
        return f"--resident {num_slots - fewer} would fit"
    if dtype.itemsize > 2:
        return "--dtype bfloat16 would halve it"
    return "a smaller cache, a larger device or a pack with more sharing is needed"

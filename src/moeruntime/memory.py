"""What an engine will need, predicted from the pack's headers before a byte is loaded."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

import torch

from moeruntime.errors import ResourceError
from moeruntime.kv_cache import KVCache, blocks_for
from moeruntime.layout import parameter_shape, private_stages
from moeruntime.loader import RING_BYTES
from moeruntime.models import parameter_roles
from moeruntime.pack import WeightSource

__all__ = ["MemoryPlan", "available_bytes", "plan_memory"]

# Activations, the allocator's rounding, and on a GPU the context and library workspaces.
RESERVE_BYTES = {"cpu": 256 * 2**20, "cuda": 2 * 2**30}
# Nested experts are decoded when tokens come; so much of what was decoded lately is kept.
DECODED_BYTES = 256 * 2**20
# Without an explicit size the cache takes at most this part of what is left.
CACHE_SHARE = {"cpu": 0.25, "cuda": 0.9}


@dataclass(frozen=True, slots=True)
class MemoryPlan:
    """Predicted bytes by part; everything but `host_bytes` is on the compute device.

    Attributes:
        experts_bytes: all slots of all layers, as they are stored.
        decoded_bytes: nested experts kept decoded; 0 for a plain pack.
        shared_bytes: non-expert tensors that all variants have in common.
        resident_bytes: the resident variants' own non-expert tensors.
        kept_bytes: every variant's copy of the first layers, where some are kept on the device.
        cache_bytes: keys and values.
        host_bytes: host copies of the variants' own tensors; 0 when all are resident.
        num_blocks: cache blocks that cache_bytes buys.
    """

    experts_bytes: int
    decoded_bytes: int
    shared_bytes: int
    resident_bytes: int
    kept_bytes: int
    cache_bytes: int
    host_bytes: int
    num_blocks: int

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
    cache_bytes: int | None,
    kept_layers: int = 0,
) -> MemoryPlan:
    """Predict what an engine takes and check that it is there.

    Args:
        source: what is to be loaded.
        num_slots: resident variants.
        dtype: compute dtype of weights and cache.
        device: where they go.
        max_sequences: sequences the cache should hold at full context, if it can.
        cache_bytes: the cache's size; None chooses one.
        kept_layers: first layers of which every variant's copy stays on the device.

    Raises:
        ResourceError: it does not fit; says what is missing and what would help.
    """
    manifest = source.manifest
    config = manifest.config
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
    kept_each = sum(stage_bytes[: kept_layers + 1]) if kept_layers and not all_resident else 0
    kept_bytes = num_variants * kept_each
    if manifest.nested is None:
        experts_bytes = sum(manifest.num_slots) * config.expert_numel * dtype.itemsize
        decoded_bytes = 0
    else:
        experts_bytes = manifest.coded_bytes()
        num_faces = sum(len(manifest.faces(layer)[0]) for layer in range(config.num_layers))
        decoded_bytes = min(DECODED_BYTES, num_faces * config.expert_numel * dtype.itemsize)
    weights_bytes = experts_bytes + decoded_bytes + shared_bytes + num_slots * private_bytes
    weights_bytes += kept_bytes
    host_bytes = 0 if all_resident else num_variants * (private_bytes - kept_each)

    kind = device.type
    if kind == "cuda" and host_bytes:
        _check_host(source, host_bytes, num_variants)
    available = available_bytes(device)
    block_bytes = KVCache.block_bytes(config, dtype)
    left = available - weights_bytes - RESERVE_BYTES[kind] - (host_bytes if kind == "cpu" else 0)
    if cache_bytes is None:
        wanted = max_sequences * blocks_for(config.max_context) * block_bytes
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
        host_bytes=host_bytes,
        num_blocks=num_blocks,
    )


def _check_host(source: WeightSource, host_bytes: int, num_variants: int) -> None:
    """What cold variants are copied from must fit host memory, with the ring they load through."""
    available = available_bytes(torch.device("cpu"))
    needed = host_bytes + RING_BYTES + RESERVE_BYTES["cpu"]
    if needed > available:
        raise ResourceError(
            f"{source.root}: needs {needed / 1e9:.1f} GB of host memory for the copies of "
            f"{num_variants} variants, {available / 1e9:.1f} GB are free; --resident "
            f"{num_variants} needs none, fewer variants need less"
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

"""What an engine holds, part by part, beside what was predicted before it loaded."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from torch import Tensor

from moeruntime.engine import Engine
from moeruntime.models import Decoder, EncoderDecoder
from moeruntime.models.experts import DensePool, NestedPool

__all__ = ["MemoryRow", "measure_memory"]


@dataclass(frozen=True, slots=True)
class MemoryRow:
    """One part.

    Attributes:
        part: what it holds.
        predicted_bytes: by the plan; for decoded experts and buffers, the most it may be.
        measured_bytes: of the tensors that are there.
    """

    part: str
    predicted_bytes: int
    measured_bytes: int


def measure_memory(engine: Engine) -> list[MemoryRow]:
    """Every part that is there or was expected; the last one lies in host memory."""
    plan, model, residency = engine.memory, engine.model, engine.residency
    kept_bytes, host_bytes = residency.copies_bytes
    buffer_bytes = 0
    if engine.graphs is not None:
        buffer_bytes = engine.graphs.buffers.num_bytes
    if not isinstance(model, Decoder | EncoderDecoder):
        buffer_bytes += model.decoded.nbytes + sum(table.nbytes for table in model.rotary)
    pools = [pool for pool in model.experts if isinstance(pool, DensePool | NestedPool)]
    rows = [
        MemoryRow(
            "experts",
            plan.experts_bytes,
            _storage_bytes(tensor for pool in pools for tensor in pool.tensors()),
        ),
        MemoryRow(
            "experts kept decoded",
            plan.decoded_bytes,
            max(pool.decoded_bytes for pool in pools if isinstance(pool, NestedPool))
            if engine.source.manifest.nested
            else 0,
        ),
        MemoryRow(
            "other weights",
            plan.shared_bytes + plan.resident_bytes,
            _storage_bytes(residency.weights.values()),
        ),
        MemoryRow("first layers of all variants", plan.kept_bytes, kept_bytes),
        MemoryRow(
            "keys and values",
            plan.cache_bytes,
            _storage_bytes([*model.cache.keys, *model.cache.values]),
        ),
        MemoryRow("buffers of steps", plan.buffer_bytes, buffer_bytes),
        MemoryRow("copies of cold variants, on the host", plan.host_bytes, host_bytes),
    ]
    return [row for row in rows if row.predicted_bytes or row.measured_bytes]


def _storage_bytes(tensors: Iterable[Tensor]) -> int:
    """Of the memory behind tensors, each once however many look at it."""
    storages = {}
    for tensor in tensors:
        storage = tensor.untyped_storage()
        storages[storage.data_ptr()] = storage.nbytes()
    return sum(storages.values())

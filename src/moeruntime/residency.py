"""Which variants' non-expert weights are on the device: partial reconfiguration.

Every non-expert parameter is one tensor [R, ...] with a row for each resident slot. Activating a
variant copies its rows into a slot and nothing else: experts never move, addresses never change.
Parameters that all variants have in common are stored once and seen through a slot stride of 0; the
others are views of one arena a stage (`layout`), so their slot stride is the stage's size.

Follows the paper's partial runtime reconfiguration (arXiv 2505.06481), with these differences:
several variants stay resident, the copies start from pinned memory on a side stream, in the order
in which a step needs them, nothing is copied back, and tensors that do not differ do not move.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterable, Mapping, Sequence

import torch
from torch import Tensor

from moeruntime.hostmemory import HostMemory, new_tensor
from moeruntime.layout import parameter_shape, private_stages
from moeruntime.loader import Loader
from moeruntime.models.parameters import parameter_roles
from moeruntime.pack import WeightSource

__all__ = ["Residency", "SlotTable"]


class SlotTable:
    """Who sits in which slot; least recently used idle variant out first. Pure Python."""

    def __init__(self, num_slots: int) -> None:
        """All slots start empty."""
        self._empty = list(range(num_slots - 1, -1, -1))
        self._slots: OrderedDict[str, int] = OrderedDict()
        self._holds: dict[str, int] = {}

    def slot(self, variant: str) -> int | None:
        """The variant's slot, if it is resident."""
        return self._slots.get(variant)

    def hold(self, variant: str) -> tuple[int, bool] | None:
        """Keep a variant in a slot until `release`.

        Returns:
            (slot, whether its weights must be copied there), or None when every slot is held by
            others.
        """
        must_copy = variant not in self._slots
        if must_copy:
            if not self._empty and not self._evict():
                return None
            self._slots[variant] = self._empty.pop()
        self._slots.move_to_end(variant)
        self._holds[variant] = self._holds.get(variant, 0) + 1
        return self._slots[variant], must_copy

    def release(self, variant: str) -> None:
        """End one hold; the variant stays resident until its slot is wanted."""
        self._holds[variant] -= 1
        if not self._holds[variant]:
            del self._holds[variant]

    @property
    def variants(self) -> tuple[str, ...]:
        """Who sits in a slot, least recently used first."""
        return tuple(self._slots)

    @property
    def num_held(self) -> int:
        """Variants that may not be evicted now."""
        return len(self._holds)

    def _evict(self) -> bool:
        for variant, slot in self._slots.items():
            if variant not in self._holds:
                del self._slots[variant]
                self._empty.append(slot)
                return True
        return False


class Residency:
    """The device's non-expert weights, and the copies that cold variants are activated from."""

    def __init__(
        self,
        source: WeightSource,
        num_slots: int,
        dtype: torch.dtype,
        loader: Loader,
        *,
        kept_layers: int = 0,
        on_variant: Callable[[str], None] | None = None,
    ) -> None:
        """Allocate the slots and load what they and the host must hold.

        Args:
            source: where the weights come from.
            num_slots: variants on the device at once; with as many slots as variants there are no
                further copies.
            dtype: what to compute in.
            loader: brings the weights to its device, where the slots are.
            kept_layers: first layers (and before them the embedding) of which every variant's copy
                stays on the device too: their activation is a copy within the device, which takes
                a fiftieth of the time, and the rest is copied while they run.
            on_variant: called with each variant's name once it is loaded.
        """
        config = source.manifest.config
        self._source = source
        self._dtype = dtype
        self._device = loader.device
        self._table = SlotTable(num_slots)
        self._roles = parameter_roles(config)
        self._stages = private_stages(config, source.manifest.shared_roles())
        self._num_kept = kept_layers + 1 if kept_layers else 0
        self._arenas = [
            new_tensor((num_slots, stage.numel), dtype, self._device) for stage in self._stages
        ]
        self.weights: Mapping[str, Tensor] = self._views(loader, num_slots)
        self._stream = torch.cuda.Stream(self._device) if self._device.type == "cuda" else None
        self._arrivals: dict[str, list[torch.cuda.Event]] = {}
        self.num_activations = 0

        names = source.manifest.variant_names
        self._host: dict[str, HostMemory] = {}
        self._copies: dict[str, list[Tensor]] = {}
        for name in names:
            if num_slots >= len(names):
                held = self._table.hold(name)
                assert held is not None
                self._load(loader, name, [arena[held[0]] for arena in self._arenas])
                self._table.release(name)
            else:
                self._copies[name] = self._new_copies(name)
                self._load(loader, name, self._copies[name])
            loader.finish()
            if name in self._host and self._stream is not None:
                # After it was filled: pages that are there are pinned faster than new ones.
                self._host[name].pin()
            if on_variant:
                on_variant(name)

    def admit(self, variant: str) -> bool:
        """Hold a variant for one sequence, starting its activation if it is not resident."""
        held = self._table.hold(variant)
        if held is None:
            return False
        slot, must_copy = held
        if must_copy:
            self._activate(variant, slot)
        return True

    def release(self, variant: str) -> None:
        """End one sequence's hold."""
        self._table.release(variant)

    def slot(self, variant: str) -> int:
        """The slot of a held variant."""
        slot = self._table.slot(variant)
        assert slot is not None
        return slot

    def ready(self, variant: str) -> bool:
        """Whether all of a held variant's weights have arrived on the device."""
        events = self._arrivals.get(variant)
        if events is not None and events[-1].query():
            del self._arrivals[variant]
            return True
        return events is None

    def wait_for(self, variant: str, layer: int | None = None) -> None:
        """Make the current stream wait for a held variant's weights.

        Args:
            variant: whose.
            layer: up to and including this layer's; EMBEDDING for the embedding alone, the number
                of layers for the head's. None waits for everything.
        """
        events = self._arrivals.get(variant)
        if events is not None:
            event = events[-1 if layer is None else layer + 1]
            torch.cuda.current_stream(self._device).wait_event(event)

    def gate(self, variants: Iterable[str]) -> Callable[[int], None] | None:
        """What a step calls before each layer (see `wait_for`); None if everything is there."""
        coming = [variant for variant in variants if not self.ready(variant)]

        def wait(layer: int) -> None:
            for variant in coming:
                self.wait_for(variant, layer)

        return wait if coming else None

    @property
    def num_held(self) -> int:
        """Variants that sequences, running or waiting, hold in their slots."""
        return self._table.num_held

    @property
    def resident(self) -> tuple[str, ...]:
        """Variants that have a slot, least recently used first; some may still be on their way."""
        return self._table.variants

    @property
    def num_slots(self) -> int:
        """Variants on the device at once."""
        return self._arenas[0].shape[0]

    @property
    def copies_bytes(self) -> tuple[int, int]:
        """Of all variants' copies: the first layers' on the device, the others' on the host."""
        kept = [copy for copies in self._copies.values() for copy in copies[: self._num_kept]]
        host_bytes = sum(memory.data.nbytes for memory in self._host.values())
        return sum(copy.nbytes for copy in kept), host_bytes

    @property
    def activation_bytes(self) -> int:
        """What one activation copies from host memory."""
        numel = sum(stage.numel for stage in self._stages[self._num_kept :])
        return numel * self._dtype.itemsize

    def _activate(self, variant: str, slot: int) -> None:
        """Copy a variant's own parameters into a slot, on the side stream where there is one."""
        self.num_activations += 1
        pairs = zip(self._arenas, self._copies[variant], strict=True)
        if self._stream is None:
            for arena, copy in pairs:
                arena[slot].copy_(copy)
            return
        # Steps already queued may still read the slot's previous variant.
        self._stream.wait_stream(torch.cuda.current_stream(self._device))
        events = []
        with torch.cuda.stream(self._stream):
            for arena, copy in pairs:
                arena[slot].copy_(copy, non_blocking=True)
                events.append(torch.cuda.Event())
                events[-1].record(self._stream)
        self._arrivals[variant] = events

    def _views(self, loader: Loader, num_slots: int) -> dict[str, Tensor]:
        """Every parameter as [R, ...]: a view of its stage's arena, or loaded once and expanded."""
        weights = {}
        for arena, stage in zip(self._arenas, self._stages, strict=True):
            for parameter, place in stage.places.items():
                rows = arena[:, place.start : place.start + place.numel]
                weights[parameter] = rows.view(num_slots, *place.shape)
        first = self._source.manifest.variant_names[0]
        for parameter, roles in self._roles.items():
            if parameter in weights:
                continue
            shape = parameter_shape(self._source.manifest.config, roles)
            once = new_tensor((1, *shape), self._dtype, self._device)
            loader.load([self._source.non_expert(first, role) for role in roles], once[0])
            weights[parameter] = once.expand(num_slots, *shape)
        return weights

    def _new_copies(self, variant: str) -> list[Tensor]:
        """A run of memory for each stage: first those kept on the device, then one on the host."""
        kept, rest = self._stages[: self._num_kept], self._stages[self._num_kept :]
        copies = [new_tensor((stage.numel,), self._dtype, self._device) for stage in kept]
        sizes = [stage.numel for stage in rest]
        if not any(sizes):
            return copies + [torch.empty(0, dtype=self._dtype) for _ in rest]
        self._host[variant] = HostMemory(sum(sizes) * self._dtype.itemsize)
        return copies + list(self._host[variant].data.view(self._dtype).split(sizes))

    def _load(self, loader: Loader, variant: str, runs: Sequence[Tensor]) -> None:
        """Load a variant's own parameters into one run of memory a stage."""
        for run, stage in zip(runs, self._stages, strict=True):
            for parameter, place in stage.places.items():
                stored = [self._source.non_expert(variant, r) for r in self._roles[parameter]]
                loader.load(stored, run[place.start : place.start + place.numel])

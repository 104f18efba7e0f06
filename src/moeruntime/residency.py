"""Which variants' non-expert weights are on the device: partial reconfiguration.

Every non-expert parameter is one tensor [R, ...] with a row for each resident slot. Activating a
variant copies its rows into a slot and nothing else: experts never move, addresses never change.
Parameters that all variants have in common are stored once and seen through a slot stride of 0.

Follows the paper's partial runtime reconfiguration (arXiv 2505.06481), with these differences:
several variants stay resident, the copies start from pinned memory on a side stream, nothing is
copied back, and tensors that do not differ do not move.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from moeruntime.loader import Loader
from moeruntime.models.decoder import parameter_roles
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
    """The device's non-expert weights, and the host copies they are activated from."""

    def __init__(
        self,
        source: WeightSource,
        num_slots: int,
        dtype: torch.dtype,
        loader: Loader,
        *,
        on_variant: Callable[[str], None] | None = None,
    ) -> None:
        """Allocate the slots and load what they and the host must hold.

        Args:
            source: where the weights come from.
            num_slots: variants on the device at once; with as many slots as variants there are no
                host copies.
            dtype: what to compute in.
            loader: brings the weights to its device, where the slots are.
            on_variant: called with each variant's name once it is loaded.
        """
        self._source = source
        self._loader = loader
        self._dtype = dtype
        self._device = device = loader.device
        self._table = SlotTable(num_slots)
        self._roles = parameter_roles(source.manifest.config)
        shared_roles = source.manifest.shared_roles()
        self._private = [
            p for p, roles in self._roles.items() if not shared_roles.issuperset(roles)
        ]
        self.weights: Mapping[str, Tensor] = self._allocate(num_slots)
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self._arrived: dict[str, torch.cuda.Event] = {}
        self.num_activations = 0

        names = source.manifest.variant_names
        for parameter in set(self._roles) - set(self._private):
            self._load(names[0], parameter, self.weights[parameter][0])
        self._host: dict[str, dict[str, Tensor]] = {}
        for name in names:
            if num_slots >= len(names):
                held = self._table.hold(name)
                assert held is not None
                for parameter in self._private:
                    self._load(name, parameter, self.weights[parameter][held[0]])
                self._table.release(name)
            else:
                self._host[name] = self._load_host(name)
            loader.finish()
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
        """Whether a held variant's weights have arrived on the device."""
        event = self._arrived.get(variant)
        return event is None or event.query()

    def wait_for(self, variant: str) -> None:
        """Make the current stream wait until a held variant's weights have arrived."""
        event = self._arrived.get(variant)
        if event is not None:
            torch.cuda.current_stream(self._device).wait_event(event)

    @property
    def num_held(self) -> int:
        """Variants that running sequences hold in their slots."""
        return self._table.num_held

    def _activate(self, variant: str, slot: int) -> None:
        """Copy a variant's own parameters into a slot, on the side stream where there is one."""
        self.num_activations += 1
        host = self._host[variant]
        if self._stream is None:
            for parameter in self._private:
                self.weights[parameter][slot].copy_(host[parameter])
            return
        # Steps already queued may still read the slot's previous variant.
        self._stream.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.stream(self._stream):
            for parameter in self._private:
                self.weights[parameter][slot].copy_(host[parameter], non_blocking=True)
            event = torch.cuda.Event()
            event.record(self._stream)
        self._arrived[variant] = event

    def _allocate(self, num_slots: int) -> dict[str, Tensor]:
        weights = {}
        for parameter in self._roles:
            shape = self._shape(parameter)
            rows = num_slots if parameter in self._private else 1
            tensor = torch.empty((rows, *shape), dtype=self._dtype, device=self._device)
            weights[parameter] = tensor.expand(num_slots, *shape)
        return weights

    def _load_host(self, variant: str) -> dict[str, Tensor]:
        pinned = self._device.type == "cuda"
        copies = {}
        for parameter in self._private:
            copies[parameter] = torch.empty(
                self._shape(parameter), dtype=self._dtype, pin_memory=pinned
            )
            self._load(variant, parameter, copies[parameter])
        return copies

    def _load(self, variant: str, parameter: str, target: Tensor) -> None:
        """Load a parameter's roles into consecutive rows of `target`."""
        roles = self._roles[parameter]
        self._loader.load([self._source.non_expert(variant, role) for role in roles], target)

    def _shape(self, parameter: str) -> tuple[int, ...]:
        shapes = [
            self._source.manifest.config.non_expert_shapes()[r] for r in self._roles[parameter]
        ]
        return (sum(shape[0] for shape in shapes), *shapes[0][1:])

"""One layer of all variants at a time: reading it, deciding what shares a slot in it, aligning it.

One buffer holds the layer's experts and is reused for every layer; it is the most that the compiler
ever holds.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

import torch
from torch import Tensor

from moeconsolidate.alignment import neuron_order, reorder_neurons, reorder_statistics
from moeconsolidate.checkpoint import Checkpoint
from moeconsolidate.importance import Statistics
from moeconsolidate.plan import LOSSLESS_THRESHOLD, ExpertRef, LayerPlan, Recipe
from moeconsolidate.signals import expert_outputs, neurons
from moeconsolidate.similarity import check_rows, cosine_similarity, linear_cka
from moeconsolidate.threads import num_places, side_by_side, single_threaded_torch
from moeruntime.errors import ResourceError, UsageError
from moeruntime.hostmemory import new_tensor

__all__ = ["LayerReader"]


class LayerReader:
    """The experts of all variants, layer by layer.

    Attributes:
        experts_EP: the layer read last: a row an expert, variant by variant.
    """

    def __init__(
        self, checkpoints: Sequence[Checkpoint], recipe: Recipe, inputs: Sequence[Tensor] = ()
    ) -> None:
        """Allocate the buffer.

        Args:
            checkpoints: the variants.
            recipe: how experts are compared, and whether they are aligned.
            inputs: of each layer, inputs [N, H] to compare experts by, where the recipe's signal is
                activations.

        Raises:
            ResourceError: there is no memory for it.
        """
        self._checkpoints, self._recipe, self._inputs = checkpoints, recipe, inputs
        self._config = checkpoints[0].config
        self._layer = 0
        self._keys: list[str] = []
        self._orders: dict[ExpertRef, Tensor] = {}
        self.experts_EP = _layer_buffer(checkpoints)

    def read(self, layer: int, planned: LayerPlan | None = None) -> LayerPlan:
        """`load`, then `decide`."""
        self.load(layer)
        return self.decide(planned)

    def load(self, layer: int) -> str:
        """Read a layer into the buffer.

        Returns:
            A digest of its experts, lower-case hexadecimal.

        Raises:
            CheckpointError: a file cannot be read, or has changed.
        """
        self._layer, self._orders = layer, {}
        self._keys = _read_layer(self._checkpoints, layer, self.experts_EP)
        for checkpoint in self._checkpoints:
            checkpoint.check_unchanged()
        return hashlib.sha256("\n".join(self._keys).encode("ascii")).hexdigest()

    def decide(self, planned: LayerPlan | None = None) -> LayerPlan:
        """Decide what shares a slot in the layer loaded last, unless a plan has; align what does.

        Raises:
            CheckpointError: an expert is zero or not finite.
            UsageError: the plan is a lossless one of other models.
        """
        if planned is None:
            labels = self._share(self._keys)
            planned = LayerPlan.from_labels(self._layer, labels, self._config.num_experts)
        else:
            check_rows(self.experts_EP, describe=self._describe)
            if self._recipe.lossless:
                self._check_identical(planned)
        if self._recipe.alignment == "neurons":
            self._align(planned)
        return planned

    def release(self) -> int:
        """Give the buffer back, after the last layer; returns how many bytes it took."""
        num_bytes = self.experts_EP.nbytes
        self.experts_EP = self.experts_EP.new_empty(0)
        return num_bytes

    def aligned(self, statistics: Sequence[Statistics]) -> Sequence[Statistics]:
        """Calibration of each variant, with neurons in the order of the layer read last."""
        if not self._orders:
            return statistics
        orders: list[dict[int, Tensor]] = [{} for _ in statistics]
        for ref, order_I in self._orders.items():
            orders[ref.variant_idx][ref.expert] = order_I
        return [
            reorder_statistics(one, self._layer, mine) if mine else one
            for one, mine in zip(statistics, orders, strict=True)
        ]

    def _share(self, keys: Sequence[str]) -> list[int]:
        """Label the rows: equal labels share a slot."""
        from moeconsolidate.clustering import cluster_labels, identity_labels

        if self._recipe.threshold == LOSSLESS_THRESHOLD:
            check_rows(self.experts_EP, describe=self._describe)
            return identity_labels(keys)
        return cluster_labels(self._similarity(), self._recipe.threshold)

    def _similarity(self) -> Tensor:
        """Compare all rows as the recipe says."""
        experts_EP, config, describe = self.experts_EP, self._config, self._describe
        choice = self._recipe.signal, self._recipe.similarity
        if choice == ("weights", "cosine"):
            return cosine_similarity(experts_EP, describe=describe)
        check_rows(experts_EP, describe=describe)
        if choice == ("weights", "cka"):
            return linear_cka(
                lambda row: neurons(experts_EP[row], config),
                len(experts_EP),
                describe=describe,
                what="neuron",
            )
        outputs_ENH = expert_outputs(experts_EP, self._inputs[self._layer], config)
        if choice == ("activations", "cka"):
            return linear_cka(
                outputs_ENH.__getitem__, len(experts_EP), describe=describe, what="output"
            )
        return cosine_similarity(outputs_ENH.flatten(1), describe=describe, what="output")

    def _align(self, plan: LayerPlan) -> None:
        """Bring the members of each slot into the order of its first, in the buffer."""
        pairs = [(ref, slot[0]) for slot in plan.slots for ref in slot[1:]]

        def match(pair: tuple[ExpertRef, ExpertRef]) -> tuple[ExpertRef, Tensor]:
            ref, first = pair
            return ref, neuron_order(self._row(ref), self._row(first), self._config)

        with single_threaded_torch():
            self._orders = dict(side_by_side(match, pairs))
        for ref, order_I in self._orders.items():
            reorder_neurons(self._row(ref), order_I, self._config)

    def _check_identical(self, plan: LayerPlan) -> None:
        for slot in plan.slots:
            for ref in slot[1:]:
                if self._keys[self._row_of(ref)] != self._keys[self._row_of(slot[0])]:
                    raise UsageError(
                        f"the plan was made of other models: at threshold 1.0 only bit-identical "
                        f"experts share a slot, and {self._describe(self._row_of(ref))} is another "
                        f"than {self._describe(self._row_of(slot[0]))}; make the plan anew"
                    )

    def _row(self, ref: ExpertRef) -> Tensor:
        return self.experts_EP[self._row_of(ref)]

    def _row_of(self, ref: ExpertRef) -> int:
        return ref.variant_idx * self._config.num_experts + ref.expert

    def _describe(self, row: int) -> str:
        idx, expert = divmod(row, self._config.num_experts)
        checkpoint = self._checkpoints[idx]
        return f"{checkpoint.folder}: {checkpoint.name}, layer {self._layer}, expert {expert}"


def _layer_buffer(checkpoints: Sequence[Checkpoint]) -> Tensor:
    """Memory for one layer's experts of all variants: a row an expert, variant by variant."""
    first = checkpoints[0]
    num_rows = len(checkpoints) * first.config.num_experts
    try:
        shape = num_rows, first.config.expert_numel
        return new_tensor(shape, first.expert_dtype, torch.device("cpu"))
    except (RuntimeError, OSError):
        raise ResourceError(
            f"no memory for one layer of all variants: {num_rows} experts of "
            f"{first.expert_num_bytes / 1e9:.3f} GB; consolidate fewer models at once"
        ) from None


def _read_layer(checkpoints: Sequence[Checkpoint], layer: int, experts_EP: Tensor) -> list[str]:
    """Fill the buffer; returns for each row a key that is equal for bit-identical experts."""
    num_experts = checkpoints[0].config.num_experts

    def read(row: int) -> str:
        idx, expert = divmod(row, num_experts)
        return checkpoints[idx].read_expert(layer, expert, out=experts_EP[row])

    with ThreadPoolExecutor(num_places() - 1) as pool:
        return list(pool.map(read, range(len(experts_EP))))

"""Makes a pack, or engines, of each method that compare.py and curve.py know."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
import torch.nn.functional as F
from _subjects import Subject
from torch import Tensor

from moeconsolidate import pipeline, planning
from moeconsolidate.checkpoint import Checkpoint
from moeconsolidate.merging import MERGE_RULES
from moeconsolidate.original import CheckpointSource
from moeconsolidate.plan import (
    CALIBRATED_MERGES,
    ConsolidationPlan,
    ExpertRef,
    LayerPlan,
    Recipe,
)
from moeconsolidate.report import summarise
from moeruntime import Engine
from moeruntime.codes import PrivateCode
from moeruntime.families import ModelConfig
from moeruntime.pack import MadeTensor, Pack

Open = Callable[[str], Engine]


@dataclass(frozen=True)
class Budgeted:
    """A way of choosing bits under a budget."""

    threshold: float
    calibrated: bool
    shared_bits: int


BUDGETED = {
    "control-2": Budgeted(1.0, True, 2),
    "control-3": Budgeted(1.0, True, 3),
    "control-4": Budgeted(1.0, True, 4),
    "budget-self": Budgeted(0.9, False, 4),
    "budget-text": Budgeted(0.9, True, 4),
    "budget-text-3": Budgeted(0.9, True, 3),
    "budget-text-2": Budgeted(0.9, True, 2),
}
HALF_PRIVATE = {"published-half": 0.5, "published-0.50x": None}
"""The part of all slots that is shared; None is what brings the bytes to a half."""

METHODS = (
    *MERGE_RULES,
    *HALF_PRIVATE,
    "private-int4",
    "nested-4+2",
    "nested-4+3",
    *BUDGETED,
)

INT4_GROUP = 32
INT4_FACTORS = tuple(0.5 + 0.025 * step for step in range(25))


class Int4Source(CheckpointSource):
    """One checkpoint whose experts have been through 4 bits."""

    def slot(self, layer: int, part: str, slot: int) -> tuple[MadeTensor]:
        stored = super().slot(layer, part, slot)

        def fill(out: Tensor) -> None:
            out.copy_(through_int4(torch.cat([piece.read() for piece in stored]).float()))

        return (MadeTensor(stored[0].dtype, self.manifest.part_shape(part), fill),)


def through_int4(weights_RC: Tensor) -> Tensor:
    """Round to 16 levels -8..7 times a bfloat16 scale a group; all weights matter alike.

    Of scales of both signs (the longer side may be either) the one with least squared error.
    """
    num_rows, num_columns = weights_RC.shape
    padded = F.pad(weights_RC, (0, -num_columns % INT4_GROUP)).view(num_rows, -1, INT4_GROUP)
    largest = padded.abs().amax(dim=-1, keepdim=True).clamp_min(1e-30)
    best = torch.zeros_like(padded)
    least = torch.full_like(largest, torch.inf)
    for factor in (sign * factor for sign in (1, -1) for factor in INT4_FACTORS):
        scale = (largest * (factor / 7.5)).bfloat16().float()
        rounded = (padded / scale).round().clamp(-8, 7) * scale
        error = (rounded - padded).square().sum(dim=-1, keepdim=True)
        best = torch.where(error < least, rounded, best)
        least = torch.minimum(error, least)
    return best.flatten(1)[:, :num_columns]


def int4_ratio(config: ModelConfig) -> float:
    """Bytes of 4-bit codes and scales against 16-bit weights."""
    bits = 0
    for num_rows, num_columns in config.part_shapes.values():
        bits += num_rows * (4 * num_columns + 16 * -(-num_columns // INT4_GROUP))
    return bits / (16 * config.expert_numel)


class Methods:
    """Calibration and weighing of options are done once for all budgets; seconds count in each."""

    def __init__(self, subjects: Sequence[Subject]) -> None:
        self._folders = {one.name: one.folder for one in subjects}
        self._texts: dict[str, Sequence[Path]] | None = None
        if all(one.texts for one in subjects):
            self._texts = {one.name: one.texts or () for one in subjects}
        with Checkpoint("any", subjects[0].folder) as one:
            self._config = one.config
        self._remembered: dict[tuple[Any, ...], tuple[Any, float]] = {}
        self._saved_s = 0.0

    @contextmanager
    def made(
        self, method: str, budget: float | None, folder: Path
    ) -> Iterator[tuple[float, float, Open]]:
        """Yield the bytes against separate models, the seconds it took, and how to open it."""
        start, self._saved_s = time.perf_counter(), 0.0
        if method == "private-int4":
            engines = {
                name: Engine(Int4Source(Checkpoint(name, path)))
                for name, path in self._folders.items()
            }
            seconds = time.perf_counter() - start
            yield int4_ratio(self._config), seconds, engines.__getitem__
            return
        calibrate = self._once(pipeline.calibrate, "calibration")
        weigh = self._once(planning.weigh_options, "calibration", "threshold", "shared_bits")
        with (
            patch.object(pipeline, "calibrate", calibrate),
            patch.object(planning, "weigh_options", weigh),
        ):
            self._consolidate(method, budget, folder)
        seconds = time.perf_counter() - start + self._saved_s
        yield _expert_ratio(folder), seconds, lambda name: Engine.from_pack(folder, resident=1)

    def _consolidate(self, method: str, budget: float | None, out: Path) -> None:
        if method in BUDGETED:
            way = BUDGETED[method]
            pipeline.consolidate(
                self._folders,
                out,
                threshold=way.threshold,
                code="nested",
                budget=f"{budget}x",
                shared_bits=way.shared_bits,
                calibration=self._texts if way.calibrated else None,
            )
            return
        plan = self._plan(method)
        texts = self._texts if plan.recipe.calibration == "text" else None
        pipeline.consolidate(self._folders, out, plan=plan, calibration=texts)

    def _plan(self, method: str) -> ConsolidationPlan:
        if method in MERGE_RULES:
            calibration = "none"
            if method in CALIBRATED_MERGES:
                calibration = "text" if self._texts else "self"
            return ConsolidationPlan(
                Recipe(0.9, merge=method, calibration=calibration), self._same_index()
            )
        if method in HALF_PRIVATE:
            # Verbatim: a slot's first member is the one whose expert all take.
            return ConsolidationPlan(
                Recipe(0.9, merge="first"), self._published(HALF_PRIVATE[method])
            )
        pair = {"nested-4+2": PrivateCode(2, 3), "nested-4+3": PrivateCode(3, 2)}[method]
        layers = self._same_index()
        return ConsolidationPlan(
            Recipe(0.9, code="nested"),
            tuple(one.with_codes([[(pair, pair)] * len(s) for s in one.slots]) for one in layers),
        )

    def _same_index(self) -> tuple[LayerPlan, ...]:
        """Experts of one index share a slot, all of them."""
        labels = list(range(self._config.num_experts)) * len(self._folders)
        return tuple(
            LayerPlan.from_labels(layer, labels, self._config.num_experts)
            for layer in range(self._config.num_layers)
        )

    def _published(self, part: float | None) -> tuple[LayerPlan, ...]:
        """The closest slots shared round-robin, the others private (arXiv 2505.06481).

        Slots are (layer, expert) pairs in order of the mean L2 distance between the models' experts
        of that index; slot i of the shared ones takes the expert of model i mod N.
        """
        num_variants = len(self._folders)
        if part is None:
            part = 0.5 / (1 - 1 / num_variants)
        order = [place for _, place in sorted(self._distances())]
        shared = {place: rank for rank, place in enumerate(order[: round(part * len(order))])}
        layers = []
        for layer in range(self._config.num_layers):
            slots: list[tuple[ExpertRef, ...]] = []
            for expert in range(self._config.num_experts):
                members = [ExpertRef(idx, expert) for idx in range(num_variants)]
                if (layer, expert) in shared:
                    chosen = shared[layer, expert] % num_variants
                    slots.append((members[chosen], *members[:chosen], *members[chosen + 1 :]))
                else:
                    slots += [(member,) for member in members]
            layers.append(LayerPlan(layer, tuple(slots)))
        return tuple(layers)

    def _distances(self) -> Iterator[tuple[float, tuple[int, int]]]:
        checkpoints = [Checkpoint(name, path) for name, path in self._folders.items()]
        first = checkpoints[0]
        rows_VP = torch.empty(len(checkpoints), self._config.expert_numel, dtype=first.expert_dtype)
        for layer in range(self._config.num_layers):
            for expert in range(self._config.num_experts):
                for checkpoint, row_P in zip(checkpoints, rows_VP, strict=True):
                    checkpoint.read_expert(layer, expert, out=row_P)
                yield float(F.pdist(rows_VP.double()).mean()), (layer, expert)
        for checkpoint in checkpoints:
            checkpoint.close()

    def _once(self, work: Callable[..., Any], *decides: str) -> Callable[..., Any]:
        """Work, remembered: it is the same for every recipe that agrees on some fields."""

        def once(checkpoints: object, recipe: Recipe, *rest: object) -> Any:
            fields = asdict(recipe)
            key = (work.__name__, *(fields[name] for name in decides))
            if key in self._remembered:
                found, seconds = self._remembered[key]
                self._saved_s += seconds
                return found
            start = time.perf_counter()
            found = work(checkpoints, recipe, *rest)
            if recipe.calibration != "none":
                self._remembered[key] = found, time.perf_counter() - start
            return found

        return once


def _expert_ratio(folder: Path) -> float:
    with Pack(folder) as pack:
        summary, config = summarise(pack), pack.manifest.config
        # The expert map, and the table of private codes where there is one.
        an_expert = 1 if pack.manifest.nested is None else 5
    map_bytes = an_expert * len(summary.variants) * config.num_layers * config.num_experts
    return (summary.expert_bytes + map_bytes) / summary.separate_expert_bytes

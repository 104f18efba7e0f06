"""Deciding before anything is written: the recipe resolved, calibration, bits under a budget."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from moeconsolidate.allocation import Unit, allocate
from moeconsolidate.calibration import collect
from moeconsolidate.checkpoint import Checkpoint
from moeconsolidate.coding import layer_units, nested_format
from moeconsolidate.importance import Statistics
from moeconsolidate.layers import LayerReader
from moeconsolidate.plan import (
    DEFAULT_CODES,
    LOSSLESS_THRESHOLD,
    ConsolidationPlan,
    LayerPlan,
    Prediction,
    Progress,
    Recipe,
)
from moeconsolidate.texts import sampled_windows, text_windows, windows_sha256
from moeruntime.errors import UsageError

__all__ = [
    "Calibration",
    "calibrate",
    "check_plan",
    "plan_layers",
    "resolve_recipe",
    "with_default_codes",
]

_UNITS = {"B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}


@dataclass(frozen=True, slots=True)
class Calibration:
    """What calibration text taught, and which it was.

    Attributes:
        statistics: of each variant, in order; None where there was none.
        texts: variant -> sha256 of its tokens.
    """

    statistics: Sequence[Statistics] | None = None
    texts: Mapping[str, str] = field(default_factory=dict)


def resolve_recipe(
    checkpoints: Sequence[Checkpoint],
    *,
    threshold: float,
    code: str | None,
    budget: str | None,
    max_loss: float | None,
    texts: Mapping[str, Sequence[Path]],
) -> Recipe:
    """Write every default out.

    Raises:
        UsageError: a value is out of range, or the choices contradict each other.
    """
    chooses = budget is not None or max_loss is not None
    names = {checkpoint.name for checkpoint in checkpoints}
    if stray := sorted(set(texts) - names):
        raise UsageError(
            f"calibration for '{stray[0]}', which is no variant; there are: {', '.join(names)}"
        )
    if texts and (missing := sorted(names - set(texts))):
        raise UsageError(f"calibration text is given for some variants, but not for {missing[0]}")
    if code is None:
        code = "plain" if threshold == LOSSLESS_THRESHOLD and not chooses else "nested"
    calibration = "text" if texts else "self" if chooses else "none"
    return Recipe(
        threshold=threshold,
        code=code,
        calibration=calibration if code == "nested" else "none",
        budget_bytes=None if budget is None else _budget_bytes(budget, checkpoints),
        max_loss=max_loss,
    )


def calibrate(
    checkpoints: Sequence[Checkpoint],
    recipe: Recipe,
    texts: Mapping[str, Sequence[Path]],
    report: Callable[[Progress], None],
) -> Calibration:
    """Learn what matters to each variant, as the recipe says.

    Raises:
        UsageError: the recipe was made with other text than is given now.
        InputError: a text is bad or too short.
    """
    if recipe.calibration == "none":
        return Calibration()
    if recipe.calibration == "text" and not texts:
        raise UsageError("the plan was made with calibration text; give the same --calibration")
    statistics, digests = [], {}
    total = 2 * checkpoints[0].config.num_layers * len(checkpoints)
    for idx, checkpoint in enumerate(checkpoints):
        if recipe.calibration == "text":
            windows_WT = text_windows(checkpoint, texts[checkpoint.name])
        else:
            windows_WT = sampled_windows(checkpoint)
        digests[checkpoint.name] = windows_sha256(windows_WT)
        if recipe.texts and recipe.texts.get(checkpoint.name) != digests[checkpoint.name]:
            raise UsageError(f"'{checkpoint.name}': the plan was made with other calibration text")
        before = total * idx // len(checkpoints)
        statistics.append(
            collect(
                checkpoint,
                windows_WT,
                on_layer=lambda done, before=before: report(  # type: ignore[misc]
                    Progress("calibration", before + done, total)
                ),
            )
        )
    return Calibration(statistics, digests)


def plan_layers(
    checkpoints: Sequence[Checkpoint],
    recipe: Recipe,
    calibration: Calibration,
    report: Callable[[Progress], None],
) -> ConsolidationPlan:
    """Read every layer once and decide all of it: slots, and bits where the recipe asks for them.

    Raises:
        UsageError: the budget is below what shared bits alone take, or the loss below what the
            most bits reach.
    """
    config = checkpoints[0].config
    reader = LayerReader(checkpoints, recipe)
    plans: list[LayerPlan] = []
    units: list[Unit] = []
    for layer in range(config.num_layers):
        plan = reader.read(layer)
        if recipe.allocated:
            assert calibration.statistics is not None
            units += layer_units(
                layer,
                plan.slots,
                reader.experts_EP,
                config,
                nested_format(config),
                calibration.statistics,
            )
        elif recipe.code == "nested":
            plan = with_default_codes(plan)
        plans.append(plan)
        report(Progress("planning", layer + 1, config.num_layers))
    if not recipe.allocated:
        return ConsolidationPlan(recipe, tuple(plans))
    budget_bytes = None
    if recipe.budget_bytes is not None:
        budget_bytes = recipe.budget_bytes - _map_bytes(checkpoints)
    chosen = allocate(units, len(checkpoints), budget_bytes=budget_bytes, max_loss=recipe.max_loss)
    if budget_bytes is not None and chosen.num_bytes > budget_bytes:
        raise UsageError(
            f"a budget of {recipe.budget_bytes} bytes is too small: without any private bits the "
            f"experts take {math.ceil(chosen.num_bytes)}"
        )
    if recipe.max_loss is not None and max(chosen.losses) > recipe.max_loss:
        raise UsageError(
            f"a max loss of {recipe.max_loss} is out of reach: with the most bits the predicted "
            f"loss is {max(chosen.losses):.2g}; --threshold 1.0 loses nothing"
        )
    choices = iter(chosen.choices)
    coded = []
    for plan in plans:
        gate_up = [next(choices) for _ in plan.slots]
        down = [next(choices) for _ in plan.slots]
        coded.append(
            plan.with_codes(
                [list(zip(g, d, strict=True)) for g, d in zip(gate_up, down, strict=True)]
            )
        )
    names = [checkpoint.name for checkpoint in checkpoints]
    prediction = Prediction(
        math.ceil(chosen.num_bytes), dict(zip(names, chosen.losses, strict=True))
    )
    return ConsolidationPlan(recipe, tuple(coded), prediction)


def check_plan(plan: ConsolidationPlan, checkpoints: Sequence[Checkpoint]) -> None:
    """Raise UsageError unless a plan is one for these checkpoints."""
    config = checkpoints[0].config
    if len(plan.layers) != config.num_layers:
        raise UsageError(
            f"the plan has {len(plan.layers)} layers, the models have {config.num_layers}"
        )
    expected = len(checkpoints) * config.num_experts
    for layer in plan.layers:
        num_experts = sum(len(members) for members in layer.slots)
        last = max(ref for members in layer.slots for ref in members)
        if num_experts != expected or last.variant_idx != len(checkpoints) - 1:
            raise UsageError(
                f"the plan's layer {layer.layer} has {num_experts} experts, the models {expected}"
            )
        if bool(layer.codes) != (plan.recipe.code == "nested"):
            raise UsageError(f"the plan's layer {layer.layer} does not fit its recipe's code")


def with_default_codes(plan: LayerPlan) -> LayerPlan:
    """Give every expert the private bits that serve without any data."""
    return plan.with_codes([[DEFAULT_CODES] * len(members) for members in plan.slots])


def _map_bytes(checkpoints: Sequence[Checkpoint]) -> int:
    """What the expert map and the table of codes take: five bytes an expert of a variant."""
    config = checkpoints[0].config
    return 5 * len(checkpoints) * config.num_layers * config.num_experts


def _budget_bytes(text: str, checkpoints: Sequence[Checkpoint]) -> int:
    """Read "0.25x" (of separate models' experts) or "60GB"."""
    match = re.fullmatch(r"([0-9]+(?:\.[0-9]+)?)\s*(x|[KMGT]?B)", text.strip(), re.IGNORECASE)
    if match is None:
        raise UsageError(
            f"budget '{text}' is neither a part, such as 0.25x, nor bytes, such as 60GB"
        )
    value, unit = float(match[1]), match[2].upper()
    if unit != "X":
        return int(value * _UNITS[unit])
    config = checkpoints[0].config
    num_experts = config.num_layers * config.num_experts
    separate = sum(num_experts * checkpoint.expert_num_bytes for checkpoint in checkpoints)
    return int(value * separate)

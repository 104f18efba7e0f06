"""Deciding before anything is written: the recipe resolved, calibration, bits under a budget."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import count
from pathlib import Path

import torch
from torch import Tensor

from moeconsolidate.allocation import Allocation, Unit, allocate, options_for
from moeconsolidate.calibration import collect
from moeconsolidate.checkpoint import Checkpoint
from moeconsolidate.coding import nested_format
from moeconsolidate.importance import Statistics
from moeconsolidate.layers import LayerReader
from moeconsolidate.measuring import MeasuredLoss, measure
from moeconsolidate.option_costs import Coherence, layer_units
from moeconsolidate.pairs import pair_windows
from moeconsolidate.plan import (
    CALIBRATED_MERGES,
    DEFAULT_SHARED_BITS,
    DEFAULT_THRESHOLD,
    LOSSLESS_THRESHOLD,
    MAX_BUDGET_BYTES,
    ConsolidationPlan,
    LayerPlan,
    Prediction,
    Progress,
    Recipe,
    default_code,
)
from moeconsolidate.signals import expert_inputs, num_inputs
from moeconsolidate.texts import Windows, sampled_windows, text_windows
from moeconsolidate.threads import side_by_side, single_threaded_torch
from moeruntime.errors import UsageError
from moeruntime.pack.manifest import EXPERT_PARTS

__all__ = [
    "Calibration",
    "calibrate",
    "check_plan",
    "plan_layers",
    "resolve_recipe",
    "weigh_options",
    "with_default_codes",
]

MAX_CORRECTION = 4.0
"""No variant is believed to lose less than this part of what its KL divergence suggests."""

_UNITS = {"B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}


@dataclass(frozen=True, slots=True)
class Calibration:
    """What calibration text taught, and which it was.

    Attributes:
        statistics: of each variant, in order; None where there was none.
        texts: variant -> sha256 of its tokens.
        learned, held_out: each variant's windows: those that it was learned from, and others.
        inputs: of each layer, inputs [N, H] to compare its experts by; empty where weights are.
    """

    statistics: Sequence[Statistics] | None = None
    texts: Mapping[str, str] = field(default_factory=dict)
    learned: Sequence[Tensor] = ()
    held_out: Sequence[Tensor] = ()
    inputs: Sequence[Tensor] = ()


def resolve_recipe(
    checkpoints: Sequence[Checkpoint],
    *,
    threshold: float | None,
    similarity: str | None,
    signal: str | None,
    align: bool,
    merge: str | None,
    code: str | None,
    shared_bits: int | None,
    budget: str | None,
    max_loss: float | None,
    texts: Mapping[str, Sequence[Path]],
) -> Recipe:
    """Write every default out.

    Raises:
        UsageError: a value is out of range, or the choices contradict each other.
    """
    threshold = DEFAULT_THRESHOLD if threshold is None else threshold
    chooses = budget is not None or max_loss is not None
    _check_texts(texts, checkpoints)
    if code is None:
        merges = merge is not None or (threshold == LOSSLESS_THRESHOLD and not chooses)
        code = "plain" if merges else "nested"
    if shared_bits is not None and code == "plain":
        raise UsageError("shared bits are those of nested codes; this pack stores plain experts")
    # Weights of unlike ancestry say nothing before their neurons are aligned; what experts do does.
    signal = signal or ("activations" if align else "weights")
    learns = merge in CALIBRATED_MERGES or signal == "activations"
    if texts and code != "nested" and not learns:
        raise UsageError(
            "nothing of this pack depends on calibration text: it stores plain experts that are "
            "compared by their weights; leave --calibration out"
        )
    calibration = "text" if texts else "self" if chooses or learns else "none"
    if calibration == "self" and checkpoints[0].config.has_encoder:
        raise UsageError(
            "an encoder-decoder cannot write what its encoder is to read: give every variant "
            '--calibration with its pairs, {"input": ..., "target": ...} a line'
        )
    return Recipe(
        threshold=threshold,
        similarity=similarity or "cosine",
        signal=signal,
        alignment="neurons" if align else "none",
        merge=merge or "average",
        code=code,
        shared_bits=DEFAULT_SHARED_BITS if shared_bits is None else shared_bits,
        calibration=calibration,
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
    if texts and recipe.calibration != "text":
        raise UsageError("the plan was made without calibration text; leave --calibration out")
    if recipe.calibration == "none":
        return Calibration()
    if recipe.calibration == "text" and not texts:
        raise UsageError("the plan was made with calibration text; give the same --calibration")
    _check_texts(texts, checkpoints)
    compares = recipe.signal == "activations"
    sweeps = 2 * recipe.weighed + compares
    total = sweeps * len(checkpoints[0].config.blocks) * len(checkpoints)
    done = count(1)

    def on_block(_: int) -> None:
        report(Progress("calibration", next(done), total))

    def learn(variant_idx: int) -> tuple[Windows, Statistics | None, Tensor | None]:
        checkpoint = checkpoints[variant_idx]
        if recipe.calibration == "self":
            windows = sampled_windows(checkpoint)
        elif checkpoint.config.has_encoder:
            windows = pair_windows(checkpoint, texts[checkpoint.name])
        else:
            windows = text_windows(checkpoint, texts[checkpoint.name])
        if recipe.texts and recipe.texts.get(checkpoint.name) != windows.sha256:
            raise UsageError(f"'{checkpoint.name}': the plan was made with other calibration text")
        statistics = inputs_LNH = None
        if recipe.weighed:
            statistics = collect(checkpoint, windows.learned, on_block=on_block)
        if compares:
            share = num_inputs(variant_idx, len(checkpoints))
            inputs_LNH = expert_inputs(checkpoint, windows.learned, share, on_block=on_block)
        return windows, statistics, inputs_LNH

    with single_threaded_torch():
        learned = side_by_side(learn, range(len(checkpoints)))
    statistics = [one for _, one, _ in learned if one is not None]
    inputs = [one for _, _, one in learned if one is not None]
    return Calibration(
        statistics or None,
        {
            checkpoint.name: windows.sha256
            for checkpoint, (windows, _, _) in zip(checkpoints, learned, strict=True)
        },
        [windows.learned for windows, _, _ in learned],
        [windows.held_out for windows, _, _ in learned],
        list(torch.cat(inputs, dim=1)) if inputs else (),
    )


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
    reader = LayerReader(checkpoints, recipe, calibration.inputs)
    plans, units = weigh_options(checkpoints, recipe, calibration, reader, report)
    if not recipe.allocated:
        return ConsolidationPlan(recipe, tuple(plans))
    budget_bytes = None
    if recipe.budget_bytes is not None:
        budget_bytes = recipe.budget_bytes - _map_bytes(checkpoints)
    chosen = _allocate(units, len(checkpoints), recipe, budget_bytes)
    measured = measure(
        checkpoints,
        _with_choices(plans, chosen),
        reader,
        nested_format(checkpoints[0].config, recipe.shared_bits),
        calibration.statistics or (),
        calibration.held_out,
    )
    report(Progress("measuring", 1, 1))
    ratio_V = torch.tensor(_ratios(measured, chosen.losses))
    units = [
        replace(unit, costs_VO=unit.costs_VO * ratio_V[list(unit.variants), None]) for unit in units
    ]
    chosen = _allocate(units, len(checkpoints), recipe, budget_bytes)
    names = [checkpoint.name for checkpoint in checkpoints]
    prediction = Prediction(
        math.ceil(chosen.num_bytes), dict(zip(names, chosen.losses, strict=True))
    )
    return ConsolidationPlan(recipe, tuple(_with_choices(plans, chosen)), prediction)


def weigh_options(
    checkpoints: Sequence[Checkpoint],
    recipe: Recipe,
    calibration: Calibration,
    reader: LayerReader,
    report: Callable[[Progress], None],
) -> tuple[list[LayerPlan], list[Unit]]:
    """Read every layer: its slots, and what private bits would cost them, whatever the budget.

    Without a budget there are no units, and nested codes have the default bits.
    """
    config = checkpoints[0].config
    plans: list[LayerPlan] = []
    units: list[Unit] = []
    parts: list[str] = []
    coherence = Coherence(len(checkpoints), recipe.shared_bits)
    nested = nested_format(config, recipe.shared_bits)
    for layer in range(config.num_layers):
        plan = reader.read(layer)
        if recipe.allocated:
            assert calibration.statistics is not None
            statistics = reader.aligned(calibration.statistics)
            layer_of = (plan, reader.experts_EP, config, nested, statistics)
            units += layer_units(*layer_of)
            parts += [part for part in EXPERT_PARTS for _ in plan.slots]
            coherence.watch(*layer_of)
        elif recipe.code == "nested":
            plan = with_default_codes(plan, recipe.shared_bits)
        plans.append(plan)
        report(Progress("planning", layer + 1, config.num_layers))
    return plans, coherence.correct(units, parts)


def _allocate(
    units: Sequence[Unit], num_variants: int, recipe: Recipe, budget_bytes: int | None
) -> Allocation:
    """Choose bits, and complain if what was asked for cannot be had."""
    chosen = allocate(
        units,
        num_variants,
        budget_bytes=budget_bytes,
        max_loss=recipe.max_loss,
        options=options_for(recipe.shared_bits),
    )
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
    return chosen


def _with_choices(plans: Sequence[LayerPlan], chosen: Allocation) -> list[LayerPlan]:
    """Hand the choices out: units are a layer's gate_up slot by slot, then its down."""
    choices = iter(chosen.choices)
    coded = []
    for plan in plans:
        gate_up = [next(choices) for _ in plan.slots]
        down = [next(choices) for _ in plan.slots]
        pairs = [list(zip(g, d, strict=True)) for g, d in zip(gate_up, down, strict=True)]
        coded.append(plan.with_codes(pairs))
    return coded


def _ratios(measured: Sequence[MeasuredLoss], predicted: Sequence[float]) -> list[float]:
    """How much more each variant loses than was predicted.

    A small loss drowns in what windows differ by, while the KL divergence, which it goes with, does
    not. So the loss that the divergence suggests is a second opinion, as uncertain as it is large,
    and the two are weighed by their variances. Half of the correction is made (the geometric mean
    of prediction and measurement): text that was trained on overstates what is lost on other text.
    """
    total_kl = sum(one.kl for one in measured)
    if total_kl == 0.0:  # nothing to be seen, so nothing to correct
        return [1.0] * len(measured)
    per_kl = max(sum(one.nll_increase for one in measured), 0.1 * total_kl) / total_kl
    ratios = []
    for one, loss in zip(measured, predicted, strict=True):
        expected = max(per_kl * one.kl, 1e-30)
        trust = expected**2 / (expected**2 + one.standard_error**2)
        estimate = trust * one.nll_increase + (1 - trust) * expected
        ratio = max(estimate, expected / MAX_CORRECTION) / max(loss, 1e-30)
        ratios.append(math.sqrt(ratio))
    return ratios


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


def with_default_codes(plan: LayerPlan, shared_bits: int) -> LayerPlan:
    """Give every expert the private bits that serve without any data."""
    code = default_code(shared_bits)
    return plan.with_codes([[(code, code)] * len(members) for members in plan.slots])


def _check_texts(texts: Mapping[str, Sequence[Path]], checkpoints: Sequence[Checkpoint]) -> None:
    """Raise UsageError unless there is text for every variant, or for none, and for nobody else."""
    names = [checkpoint.name for checkpoint in checkpoints]
    if stray := sorted(set(texts) - set(names)):
        raise UsageError(
            f"calibration for '{stray[0]}', which is no variant; there are: {', '.join(names)}"
        )
    if texts and (missing := sorted(set(names) - set(texts))):
        raise UsageError(f"calibration text is given for some variants, but not for {missing[0]}")


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
    if value > MAX_BUDGET_BYTES:
        raise UsageError(f"budget '{text[:40]}' is more than {MAX_BUDGET_BYTES} bytes")
    if unit != "X":
        return int(value * _UNITS[unit])
    config = checkpoints[0].config
    num_experts = config.num_layers * config.num_experts
    separate = sum(num_experts * checkpoint.expert_num_bytes for checkpoint in checkpoints)
    return int(value * separate)

"""Each merge rule against a naive definition. Legend: V variants, P weights of one expert."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from helpers import TINY_CONFIG
from moeconsolidate.importance import ExpertStatistics, Statistics
from moeconsolidate.merging import MERGE_RULES, MergeRule, SlotContext, base
from moeconsolidate.merging.regmean import RegMean
from moeconsolidate.merging.task_arithmetic import TaskArithmetic
from moeconsolidate.merging.ties import Ties
from moeconsolidate.plan import CALIBRATED_MERGES, ExpertRef, Recipe
from moeruntime.errors import CheckpointError, UsageError
from moeruntime.families import FAMILIES
from moeruntime.strict_json import Fields

CONFIG = FAMILIES["mixtral"].parse_config(Fields(TINY_CONFIG, "config.json", CheckpointError))
HIDDEN, INNER, EXPERTS = CONFIG.hidden_size, CONFIG.intermediate_size, CONFIG.num_experts
PARTS = {"gate_up": (2 * INNER, HIDDEN), "down": (HIDDEN, INNER)}
V = 4
EXPERT = 1
LAYER = 1


def make_statistics(seed: int = 0) -> list[Statistics]:
    torch.manual_seed(seed)
    variants = []
    for idx in range(V):
        layers = []
        for _ in range(CONFIG.num_layers):
            layer = {part: ExpertStatistics.zeros(EXPERTS, *shape) for part, shape in PARTS.items()}
            for part, (num_rows, num_columns) in PARTS.items():
                for expert in range(EXPERTS):
                    x_NC = torch.randn(100, num_columns) @ torch.randn(num_columns, num_columns)
                    layer[part].add(expert, x_NC, torch.randn(100, num_rows))
            layers.append(layer)
        routed = torch.randint(1, 100, (CONFIG.num_layers, EXPERTS))
        variants.append(Statistics(200 + idx, layers, routed))
    return variants


def context(slot: int = 0, statistics: Sequence[Statistics] | None = None) -> SlotContext:
    refs = tuple(ExpertRef(idx, EXPERT) for idx in range(V))
    return SlotContext(LAYER, slot, refs, CONFIG, statistics or make_statistics())


def make_rows(dtype: torch.dtype = torch.bfloat16, seed: int = 1) -> list[Tensor]:
    torch.manual_seed(seed)
    common = torch.randn(CONFIG.expert_numel)
    return [(common + 0.1 * torch.randn(CONFIG.expert_numel)).to(dtype) for _ in range(V)]


def merge(rule: MergeRule, rows: Sequence[Tensor], about: SlotContext) -> Tensor:
    return rule(rows, about, out=torch.full_like(rows[0], torch.nan))


def close(merged: Tensor, expected: Tensor) -> None:
    """Equal but for a last rounding: float32 rows leave room for no more."""
    torch.testing.assert_close(merged.double(), expected, rtol=1e-6, atol=1e-7)


def test_first_takes_the_base_for_all() -> None:
    rows = make_rows()
    assert merge(MERGE_RULES["first"], rows, context()) is rows[0]


RULES: dict[str, MergeRule] = {**MERGE_RULES, "ties-0.2": Ties(density=0.2)}


@pytest.mark.parametrize("slot", range(6))
def test_round_robin_takes_turns(slot: int) -> None:
    rows = make_rows()
    assert merge(MERGE_RULES["round-robin"], rows, context(slot)) is rows[slot % V]
    assert merge(MERGE_RULES["round-robin"], rows[:3], context(slot)) is rows[slot % 3]


def test_frequency_weighted_counts_tokens() -> None:
    rows, statistics = make_rows(torch.float32), make_statistics()
    part_V = torch.tensor(
        [int(one.num_routed_LE[LAYER, EXPERT]) / one.num_tokens for one in statistics]
    ).double()
    expected = torch.zeros(CONFIG.expert_numel, dtype=torch.float64)
    for part, row_P in zip(part_V / part_V.sum(), rows, strict=True):
        expected += part * row_P.double()
    close(merge(MERGE_RULES["frequency-weighted"], rows, context(0, statistics)), expected)


def test_frequency_weighted_without_tokens_is_the_average() -> None:
    rows, statistics = make_rows(torch.float32), make_statistics()
    for one in statistics:
        one.num_routed_LE.zero_()
    merged = merge(MERGE_RULES["frequency-weighted"], rows, context(0, statistics))
    close(merged, torch.stack(rows).double().mean(dim=0))


def test_frequency_weighted_ignores_experts_never_used() -> None:
    rows, statistics = make_rows(torch.float32), make_statistics()
    for one in statistics[:2] + statistics[3:]:
        one.num_routed_LE.zero_()
    merged = merge(MERGE_RULES["frequency-weighted"], rows, context(0, statistics))
    close(merged, rows[2].double())


@pytest.mark.parametrize("scale", [0.5, 0.3, 1.0])
def test_task_arithmetic_adds_scaled_changes(scale: float) -> None:
    rows = make_rows(torch.float32)
    base_P, *tuned = (row_P.double() for row_P in rows)
    expected = base_P.clone()
    for row_P in tuned:
        expected += scale * (row_P - base_P)
    close(merge(TaskArithmetic(scale), rows, context()), expected)


def naive_ties(rows: Sequence[Tensor], density: float, scale: float) -> Tensor:
    """Weight by weight, as the paper's algorithm 1 reads."""
    base_P, *tuned = (row_P.double() for row_P in rows)
    changes = []
    for row_P in tuned:
        change_P = row_P - base_P
        keep = sorted(range(len(change_P)), key=lambda p: -abs(float(change_P[p])))
        trimmed_P = torch.zeros_like(change_P)
        for p in keep[: round(density * len(change_P))]:
            trimmed_P[p] = change_P[p]
        changes.append(trimmed_P)
    merged = base_P.clone()
    for p in range(len(base_P)):
        values = [float(change_P[p]) for change_P in changes]
        sign = 1.0 if sum(values) > 0 else -1.0
        agreeing = [value for value in values if value * sign > 0]
        if agreeing:
            merged[p] += scale * sum(agreeing) / len(agreeing)
    return merged


@pytest.mark.parametrize(("density", "scale"), [(1.0, 1.0), (0.2, 1.0), (0.5, 0.7)])
def test_ties_as_the_paper_has_it(density: float, scale: float) -> None:
    rows = make_rows(torch.float32)
    close(merge(Ties(density, scale), rows, context()), naive_ties(rows, density, scale))


def test_ties_by_hand() -> None:
    rows = [
        torch.tensor([1.0, 1.0, 1.0, 1.0]),
        torch.tensor([2.0, 3.0, 1.0, 1.5]),
        torch.tensor([4.0, 0.5, 1.0, 0.5]),
    ]
    merged = merge(Ties(), rows, context())
    # Both up: their mean. Up wins. No change. A draw: no change.
    assert merged.tolist() == [3.0, 3.0, 1.0, 1.0]


def test_regmean_solves_the_regression() -> None:
    """Against least squares over stacked inputs, with the pull as further rows."""
    rows = make_rows(torch.float32)
    statistics = make_statistics()
    inputs = {
        part: [torch.randn(60, shape[1]).double() for _ in rows] for part, shape in PARTS.items()
    }
    for idx, one in enumerate(statistics):
        for part in PARTS:
            x_NC = inputs[part][idx]
            one.layers[LAYER][part].inputs_EKK[0][EXPERT] = (x_NC.T @ x_NC * one.num_tokens).float()
    rule = RegMean(ridge=1e-2)
    merged = merge(rule, rows, context(0, statistics))
    start = 0
    for part, (num_rows, num_columns) in PARTS.items():
        stop = start + num_rows * num_columns
        members = [row_P[start:stop].view(num_rows, num_columns).double() for row_P in rows]
        total = sum(float(x_NC.square().sum()) for x_NC in inputs[part])
        pull = (rule.ridge * total / num_columns) ** 0.5 * torch.eye(num_columns).double()
        mean_RC = torch.stack(members).mean(dim=0)
        x_MC = torch.cat([*inputs[part], pull])
        y_MR = torch.cat(
            [
                x_NC @ w_RC.T
                for x_NC, w_RC in zip([*inputs[part], pull], [*members, mean_RC], strict=True)
            ]
        )
        expected_RC = torch.linalg.lstsq(x_MC, y_MR).solution.T
        found_RC = merged[start:stop].view(num_rows, num_columns).double()
        torch.testing.assert_close(found_RC, expected_RC, rtol=1e-4, atol=1e-5)
        start = stop
    assert start == CONFIG.expert_numel


def test_regmean_of_an_expert_that_saw_nothing_is_the_average() -> None:
    rows, statistics = make_rows(torch.float32), make_statistics()
    for one in statistics:
        for part in PARTS:
            one.layers[LAYER][part].inputs_EKK[0][EXPERT] = 0
    merged = merge(MERGE_RULES["regmean"], rows, context(0, statistics))
    close(merged, torch.stack(rows).double().mean(dim=0))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("rule", RULES.values(), ids=RULES)
def test_identical_members_come_out_bit_by_bit(rule: MergeRule, dtype: torch.dtype) -> None:
    row_P = make_rows(dtype)[0]
    row_P[0] = -0.0
    merged_P = merge(rule, [row_P.clone() for _ in range(V)], context())
    assert torch.equal(merged_P, row_P)


@pytest.mark.parametrize("rule", RULES.values(), ids=RULES)
def test_one_member_is_not_even_copied(rule: MergeRule) -> None:
    row_P = make_rows()[0]
    assert merge(rule, [row_P], context()) is row_P


@pytest.mark.parametrize("name", MERGE_RULES)
def test_members_are_left_as_they_are(name: str) -> None:
    rows = make_rows()
    before = [row_P.clone() for row_P in rows]
    merge(MERGE_RULES[name], rows, context())
    assert all(torch.equal(one, other) for one, other in zip(rows, before, strict=True))


@pytest.mark.parametrize("name", [name for name, r in MERGE_RULES.items() if not r.whole_experts])
def test_runs_of_columns_merge_to_runs_of_the_result(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows, about, rule = make_rows(), context(), MERGE_RULES[name]
    whole_P = merge(rule, rows, about).clone()
    monkeypatch.setattr(base, "CHUNK_ELEMENTS", 7)
    half = CONFIG.expert_numel // 2
    for columns in (slice(0, half), slice(half, None)):
        run = merge(rule, [row_P[columns] for row_P in rows], about)
        assert torch.equal(run, whole_P[columns])


def test_recipes_know_every_rule() -> None:
    for name, rule in MERGE_RULES.items():
        assert rule.needs_statistics == (name in CALIBRATED_MERGES)
        calibration = "self" if rule.needs_statistics else "none"
        assert Recipe(0.9, merge=name, calibration=calibration).merge == name


def test_recipes_refuse_rules_that_do_not_fit() -> None:
    with pytest.raises(UsageError, match="needs calibration"):
        Recipe(0.9, merge="regmean")
    with pytest.raises(UsageError, match="makes plain experts, not nested codes"):
        Recipe(0.9, merge="ties", code="nested")

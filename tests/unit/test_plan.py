from __future__ import annotations

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moeconsolidate.plan import ConsolidationPlan, ExpertRef, LayerPlan, Recipe
from moeruntime.codes import PrivateCode
from moeruntime.errors import InputError, UsageError
from moeruntime.strict_json import canonical_json


def example() -> ConsolidationPlan:
    layers = (
        LayerPlan.from_labels(0, [0, 1, 0, 2], num_experts=2),
        LayerPlan.from_labels(1, [0, 0, 0, 0], num_experts=2),
    )
    return ConsolidationPlan(Recipe(threshold=0.9), layers)


def test_labels_become_slots_and_maps() -> None:
    first, second = example().layers
    assert first.slots == (
        (ExpertRef(0, 0), ExpertRef(1, 0)),
        (ExpertRef(0, 1),),
        (ExpertRef(1, 1),),
    )
    assert (first.expert_map(0), first.expert_map(1)) == ((0, 1), (0, 2))
    assert second.expert_map(1) == (0, 0)
    assert example().num_slots == (3, 1)


def test_json_both_ways() -> None:
    data = json.dumps(example().to_json()).encode()
    assert ConsolidationPlan.from_bytes(data, "plan.json") == example()


@pytest.mark.parametrize(
    ("slots", "complaint"),
    [
        ([[[0, 0], [1, 0]], [[0, 0]]], "exactly one slot"),
        ([[[0, 0], [1, 1]]], "exactly one slot"),
        ([[[0, 0]], []], "must have a member"),
        ([[[0]]], "variant_idx, expert"),
        ([[[0, -1]]], "not an integer"),
        ([[0]], "must be a list"),
        ([], "must be a list of slots"),
        ("x", "must be a list of slots"),
    ],
)
def test_plans_that_make_no_sense(slots: object, complaint: str) -> None:
    document = {"recipe": Recipe(0.9).to_json(), "layers": [{"slots": slots, "codes": []}]}
    with pytest.raises(InputError, match=complaint):
        ConsolidationPlan.from_bytes(json.dumps(document).encode(), "plan.json")


@pytest.mark.parametrize("threshold", [float("nan"), -0.1, 1.1, float("inf")])
def test_thresholds_out_of_range(threshold: float) -> None:
    with pytest.raises(UsageError, match=r"outside 0\.\.1"):
        Recipe(threshold=threshold)


def test_unknown_choices_name_the_known_ones() -> None:
    with pytest.raises(UsageError, match="merge 'sum' is unknown; known: average, first"):
        Recipe(threshold=0.9, merge="sum")


def test_only_threshold_one_is_lossless() -> None:
    assert Recipe(threshold=1.0).lossless
    assert not Recipe(threshold=0.9999).lossless


NAMES = st.text('ab.é\n"', max_size=4)


@st.composite
def plans(draw: st.DrawFn) -> ConsolidationPlan:
    """Any sharing of a few experts, with any private codes."""
    num_experts, num_variants = draw(st.integers(1, 4)), draw(st.integers(1, 3))
    code = draw(st.sampled_from(["plain", "nested"]))
    codes = st.sampled_from([PrivateCode(0, 0), PrivateCode(1, 5), PrivateCode(3, 2)])
    layers = []
    for layer in range(draw(st.integers(0, 3))):
        drawn = draw(st.lists(st.integers(0, 5), min_size=12, max_size=12))
        order: dict[int, int] = {}
        labels = [order.setdefault(one, len(order)) for one in drawn[: num_experts * num_variants]]
        made = LayerPlan.from_labels(layer, labels, num_experts)
        if code == "nested":
            made = made.with_codes(
                [[(draw(codes), draw(codes)) for _ in members] for members in made.slots]
            )
        layers.append(made)
    recipe = Recipe(draw(st.floats(0, 1)), code=code, texts=draw(st.dictionaries(NAMES, NAMES)))
    return ConsolidationPlan(recipe, tuple(layers))


@settings(max_examples=60, deadline=None)
@given(plans())
def test_any_plan_comes_back_from_json(plan: ConsolidationPlan) -> None:
    document = canonical_json(plan.to_json())
    again = ConsolidationPlan.from_bytes(document, "plan")
    assert again == plan
    assert canonical_json(again.to_json()) == document

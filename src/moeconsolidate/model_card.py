"""README.md of a pack: what it holds, for people who find it on a disk or on a hub."""

from __future__ import annotations

from collections.abc import Sequence

from moeconsolidate.plan import ConsolidationPlan, Recipe
from moeconsolidate.scores import ScoreRow
from moeruntime.families import ModelConfig

__all__ = ["card_for_hub", "model_card"]


def model_card(
    names: Sequence[str],
    plan: ConsolidationPlan,
    family: str,
    config: ModelConfig,
    *,
    pack_bytes: int,
    separate_bytes: int,
    base_models: Sequence[str] = (),
) -> bytes:
    """Write the card; it depends on the contents alone, so no dates and no paths.

    Args:
        names: the variants, in order.
        plan: what shares what.
        family: the `model_type` of the variants.
        config: their architecture.
        pack_bytes: tensor bytes of the pack.
        separate_bytes: tensor bytes of the variants as separate models.
        base_models: the variants' names on the hub, which reads them from the card's head.
    """
    recipe = plan.recipe
    num_blocks = len(config.blocks)
    layers = f"{config.num_layers} layers"
    if num_blocks > config.num_layers:
        layers = f"{num_blocks} blocks of which {config.num_layers} have experts"
    lines = [
        *_head(base_models),
        f"# {len(names)} {family} variants in one pack",
        "",
        "Made by moec: experts that are alike are stored once.",
        "",
        f"- variants: {', '.join(f'`{name}`' for name in names)}",
        f"- architecture: {family}, {layers}, {config.num_experts} experts, "
        f"{config.top_k} of them per token, hidden size {config.hidden_size}",
        f"- tensors: {pack_bytes:,} bytes; as separate models {separate_bytes:,} bytes "
        f"({pack_bytes / separate_bytes:.1%})",
        "",
        "## Recipe",
        "",
        _rule(recipe),
        "",
        "## Slots",
        "",
        "| layer | experts of all variants | slots |",
        "| ---: | ---: | ---: |",
    ]
    num_experts = len(names) * config.num_experts
    lines += [
        f"| {layer} | {num_experts} | {count} |" for layer, count in enumerate(plan.num_slots)
    ]
    lines += [
        "",
        "## Use",
        "",
        "```",
        "moec verify PACK",
        f'moec run --artifact PACK --model {names[0]} --prompt "..."',
        f"moec export PACK --model {names[0]} --out FOLDER",
        "```",
        "",
    ]
    return "\n".join(lines).encode()


def card_for_hub(card: bytes, base_models: Sequence[str], scores: Sequence[ScoreRow]) -> bytes:
    """A pack's card with what the hub wants to know in front, and measured quality.

    Args:
        card: as `model_card` wrote it.
        base_models: names on the hub.
        scores: to show; none leaves that section out.
    """
    text = card.decode("utf-8")
    if text.startswith("---\n"):
        text = text.split("\n---\n", 1)[-1].lstrip("\n")
    measured = ""
    if scores:
        rows = [
            f"| {one.variant} | {_plain(one.data)} | {one.num_tokens} | {one.nll:.4f} | "
            f"{'' if one.original_nll is None else f'{one.nll - one.original_nll:+.4f}'} |"
            for one in scores
        ]
        measured = "\n".join(
            [
                "## Quality",
                "",
                "Mean negative log-likelihood, nats per token, and how much more that is than "
                "the original's.",
                "",
                "| variant | text | tokens | NLL | increase |",
                "| --- | --- | ---: | ---: | ---: |",
                *rows,
                "",
                "",
            ]
        )
    before, use, after = text.partition("## Use\n")
    return "\n".join([*_head(base_models), before + measured + use + after]).encode()


def _plain(name: str) -> str:
    """A file's name as it can stand in a table."""
    return "".join(one if one.isalnum() or one in "._-" else "_" for one in name)


def _head(base_models: Sequence[str]) -> list[str]:
    """What the hub reads of a card: YAML, which plain names of the hub need no quotes in."""
    if not base_models:
        return []
    names = [f"- {name}" for name in dict.fromkeys(base_models)]
    about = ["base_model_relation: merge", "library_name: moec", "tags:", "- moe", "- merge"]
    return ["---", "base_model:", *names, *about, "---", ""]


def _rule(recipe: Recipe) -> str:
    """What the recipe did, in sentences."""
    if recipe.lossless:
        return "Only bit-identical experts share a slot: every variant comes out as it went in."
    if recipe.code == "nested":
        holds = (
            f"the {recipe.shared_bits} high bits that its members have in common, beside which "
            "each variant has private low bits"
        )
    elif recipe.merge == "average":
        holds = "the average of its members"
    else:
        holds = f"its members merged by the rule {recipe.merge}"
    aligned = (
        " Neurons of experts that share a slot were brought into one order first, which changes "
        "nothing of what they compute."
        if recipe.alignment == "neurons"
        else ""
    )
    return (
        f"Experts share a slot where their average {recipe.similarity} similarity "
        f"({recipe.signal}, {recipe.linkage} linkage) is at least {recipe.threshold:g}; a slot "
        f"holds {holds}.{aligned} Routers and all other weights are each variant's own."
    )

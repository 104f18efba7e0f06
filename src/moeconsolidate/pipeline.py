"""consolidate(): from checkpoint folders to a pack. The whole story; the stages are next door.

    sources -> checkpoints -> layer by layer: read, compare, cluster, merge, write -> all the rest

One buffer holds a layer of all variants and is reused for every layer. It is the most that is ever
in memory, besides one merged expert or one other tensor.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from os import PathLike
from pathlib import Path

import torch
from torch import Tensor

from moeconsolidate.checkpoint import Checkpoint
from moeconsolidate.clustering import cluster_labels, identity_labels
from moeconsolidate.compatibility import check_compatible
from moeconsolidate.merging import MERGE_RULES, MergeRule
from moeconsolidate.plan import ConsolidationPlan, LayerPlan, OnProgress, Progress, Recipe
from moeconsolidate.publish import check_target, require_disk
from moeconsolidate.similarity import check_rows, cosine_similarity
from moeconsolidate.sources import Models, parse_sources
from moeconsolidate.writer import PackWriter
from moeruntime.errors import ResourceError
from moeruntime.pack import Manifest

__all__ = ["ConsolidationResult", "consolidate"]


@dataclass(frozen=True, slots=True)
class ConsolidationResult:
    """A finished pack: where it is, what shares what in it, and its manifest."""

    pack: Path
    plan: ConsolidationPlan
    manifest: Manifest


def consolidate(
    models: Models,
    out: str | PathLike[str],
    *,
    threshold: float = 0.9,
    on_progress: OnProgress | None = None,
) -> ConsolidationResult:
    """Compile checkpoints of one architecture into a pack.

    Args:
        models: `[NAME=]FOLDER` for each variant, or a mapping of names to folders; at least two.
        out: where the pack is to appear; nothing may be there yet.
        threshold: cosine similarity, in [0, 1], from which experts share a slot; 1.0 shares
            bit-identical experts only.
        on_progress: called after each layer and each variant.

    Raises:
        UsageError: the arguments make no sense, or `out` exists.
        CheckpointError, TokenizerError: a model is bad, or does not fit the others.
        ResourceError: memory or disk do not suffice.
    """
    recipe, target = Recipe(threshold=threshold), Path(out)
    report = on_progress or (lambda progress: None)
    sources = parse_sources(models)
    check_target(target, inputs=[source.folder for source in sources])
    with ExitStack() as stack:
        checkpoints = [
            stack.enter_context(Checkpoint(source.name, source.folder)) for source in sources
        ]
        check_compatible(checkpoints)
        first = checkpoints[0]
        require_disk(target.parent, first.num_bytes)  # what a pack hardly ever falls below
        experts_EP = _layer_buffer(checkpoints)
        merged_P = torch.empty_like(experts_EP[0])
        names = [checkpoint.name for checkpoint in checkpoints]
        writer = stack.enter_context(
            PackWriter.create(
                target, names, first.family.model_type, first.config, first.expert_dtype
            )
        )
        plans: list[LayerPlan] = []
        for layer in range(first.config.num_layers):
            keys = _read_layer(checkpoints, layer, experts_EP)
            labels = _share(checkpoints, layer, experts_EP, keys, recipe)
            merged = _merger(MERGE_RULES[recipe.merge], experts_EP, labels, merged_P)
            plans.append(LayerPlan.from_labels(layer, labels, first.config.num_experts))
            writer.write_layer(plans[-1], merged)
            _check_unchanged(checkpoints)
            report(Progress("experts", layer + 1, first.config.num_layers))
        digests = []
        for idx, checkpoint in enumerate(checkpoints):
            digests.append(checkpoint.non_expert_digests())
            writer.write_side_files(idx, checkpoint.side_files)
            report(Progress("other weights", idx + 1, len(checkpoints)))
        writer.write_non_expert(digests, lambda idx, role: checkpoints[idx].read_non_expert(role))
        _check_unchanged(checkpoints)
        plan = ConsolidationPlan(recipe, tuple(plans))
        content_sha256s = [checkpoint.content_sha256() for checkpoint in checkpoints]
        separate_bytes = sum(checkpoint.num_bytes for checkpoint in checkpoints)
        manifest = writer.finish(plan, content_sha256s, separate_bytes=separate_bytes)
    return ConsolidationResult(target, plan, manifest)


def _layer_buffer(checkpoints: Sequence[Checkpoint]) -> Tensor:
    """Memory for one layer's experts of all variants: a row an expert, variant by variant."""
    first = checkpoints[0]
    num_rows = len(checkpoints) * first.config.num_experts
    try:
        return torch.empty(num_rows, first.config.expert_numel, dtype=first.expert_dtype)
    except RuntimeError:
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

    with ThreadPoolExecutor(torch.get_num_threads()) as pool:
        return list(pool.map(read, range(len(experts_EP))))


def _share(
    checkpoints: Sequence[Checkpoint],
    layer: int,
    experts_EP: Tensor,
    keys: Sequence[str],
    recipe: Recipe,
) -> list[int]:
    """Label the rows: equal labels share a slot."""

    def describe(row: int) -> str:
        idx, expert = divmod(row, checkpoints[0].config.num_experts)
        return f"{checkpoints[idx].folder}: {checkpoints[idx].name}, layer {layer}, expert {expert}"

    if recipe.lossless:
        check_rows(experts_EP, describe=describe)
        return identity_labels(keys)
    return cluster_labels(cosine_similarity(experts_EP, describe=describe), recipe.threshold)


def _merger(
    rule: MergeRule, experts_EP: Tensor, labels: Sequence[int], merged_P: Tensor
) -> Callable[[int, slice], Tensor]:
    """Merge on demand, as the writer asks for runs of columns in the order of its file."""
    members: list[list[Tensor]] = [[] for _ in range(max(labels) + 1)]
    for row_P, label in zip(experts_EP, labels, strict=True):
        members[label].append(row_P)

    def merged(slot: int, columns: slice) -> Tensor:
        return rule([row_P[columns] for row_P in members[slot]], out=merged_P[columns])

    return merged


def _check_unchanged(checkpoints: Sequence[Checkpoint]) -> None:
    for checkpoint in checkpoints:
        checkpoint.check_unchanged()

"""`moec report`: what a pack shares, at what precision, and what that costs, as one HTML file.

It reads the pack alone, one layer at a time; only losses come from elsewhere, because measuring
them takes text.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING

from moeconsolidate.expert_maps import precision, routing
from moeconsolidate.page import figure, page, table, text
from moeconsolidate.plan import OnProgress, Progress
from moeconsolidate.report import LayerSummary, PackSummary, format_bytes, sharing_lines, summarise
from moeconsolidate.scores import MAX_ENTRIES, ScoreRow, bounded, read_scores
from moeconsolidate.stored_similarity import (
    LayerSimilarity,
    layer_buffer,
    linkage_tree,
    pair_statistics,
    stored_similarity,
)
from moeruntime.codes import plane_bytes
from moeruntime.errors import InputError, ResourceError
from moeruntime.pack import Manifest, Pack
from moeruntime.pack.manifest import EXPERT_PARTS
from moeruntime.strict_json import Fields, parse_json

if TYPE_CHECKING:
    from moeconsolidate.charts import CurvePoint

__all__ = ["ScoreRow", "read_curve", "read_scores", "render_report"]

PIXELS = 2_000_000
"""Of all similarity charts together, whatever the number of layers; a pixel is about a byte."""
OPEN_LAYERS = 4
LOSS_FLOOR = 1e-4
"""Losses are drawn on a logarithmic scale that ends here, far below what a reader cares for."""


def render_report(
    pack: Pack,
    *,
    scores: Sequence[ScoreRow] = (),
    curve: Sequence[CurvePoint] = (),
    on_progress: OnProgress | None = None,
) -> tuple[str, list[LayerSimilarity]]:
    """Describe an open pack as a page that needs nothing beside it.

    Args:
        pack: every expert is read once; memory holds the distinct experts of one layer.
        scores: losses to show, as `read_scores` reads them.
        curve: losses at several sizes, as `read_curve` reads them.
        on_progress: called after each layer.

    Returns:
        The document, the same for the same input, and the numbers of its similarity section.

    Raises:
        ResourceError: matplotlib is not installed, or a layer does not fit memory.
        CheckpointError: an expert is zero or not finite.
    """
    charts = _import_charts()
    summary = summarise(pack)
    names = pack.manifest.variant_names
    blocks, similarities = _similarity_blocks(pack, summary, charts, on_progress)
    sections = [
        ("Size", _size(pack.manifest, summary, charts)),
        ("Recipe", _recipe(summary)),
        ("Who shares what", _sharing(summary)),
        ("Precision", precision(pack.manifest)),
    ]
    if found := routing(pack.manifest, charts):
        sections.append(("Routing", found))
    if scores:
        sections.append(("Loss", _scores(scores, charts)))
    if curve:
        sections.append(("Loss against bytes", _curve(curve, summary, charts)))
    sections.append(("Similarity", _similarity_table(similarities) + blocks))
    config = pack.manifest.config
    lead = (
        f"<p>{len(names)} variants of one {text(summary.family)} model of {config.num_layers} "
        f"layers with {config.num_experts} experts each. The pack takes "
        f"{format_bytes(summary.pack_bytes)}, {summary.pack_ratio:.1%} of separate models; its "
        f"experts take {summary.expert_ratio:.1%} of theirs.</p>"
    )
    return page(f"Pack report: {', '.join(names)}", lead, sections), similarities


def read_curve(path: Path) -> list[CurvePoint]:
    """Read a list of {"method", "bytes", "worst", "mean"}, alone or under the key "rows".

    `bytes` (or "expert_ratio", as benchmarks/compare.py prints it) are those of the experts against
    separate models': 0.25 is a quarter.

    Raises:
        InputError: malformed.
        ResourceError: matplotlib is not installed.
    """
    points: type[CurvePoint] = _import_charts().CurvePoint
    if not path.is_file():
        raise InputError(f"{path}: no such file")
    value = parse_json(path.read_bytes(), str(path), InputError)
    rows = Fields({"rows": value} if isinstance(value, list) else value, str(path), InputError)
    return [
        points(
            entry.text("method"),
            entry.number("expert_ratio" if entry.has("expert_ratio") else "bytes", 0, 100),
            entry.number("worst", -1e6, 1e6),
            entry.number("mean", -1e6, 1e6),
        )
        for entry in bounded(rows.children("rows"), path)
    ]


def _import_charts() -> ModuleType:
    try:
        from moeconsolidate import charts
    except ModuleNotFoundError as problem:
        if (problem.name or "").partition(".")[0] != "matplotlib":
            raise
        raise ResourceError(
            "a report is drawn with matplotlib, which is not installed: pip install 'moec[report]'"
        ) from None
    return charts


def _size(manifest: Manifest, summary: PackSummary, charts: ModuleType) -> str:
    own_bytes = sum(variant.own_bytes for variant in summary.variants)
    other_bytes = summary.separate_bytes - summary.separate_expert_bytes
    private_bytes = _private_bytes(manifest)
    experts = {"experts": summary.expert_bytes}
    if manifest.nested is not None:
        experts = {
            "experts": summary.expert_bytes - private_bytes,
            "private bits of experts": private_bytes,
        }
    pack_bar = {
        **experts,
        "other weights in common": summary.common_bytes,
        "other weights": own_bytes,
    }
    bars = {
        "this pack": {part: value for part, value in pack_bar.items() if value},
        "separate models": {"experts": summary.separate_expert_bytes, "other weights": other_bytes},
    }
    drawing = charts.bytes_chart(bars, "Bytes of the pack, by part, and of separate models")
    num_slots = sum(layer.num_slots for layer in summary.layers)
    num_experts = sum(layer.num_experts for layer in summary.layers)
    rows = [
        [
            f"experts: {num_slots} slots for {num_experts}",
            format_bytes(summary.expert_bytes),
            format_bytes(summary.separate_expert_bytes),
            f"{summary.expert_ratio:.1%}",
        ]
    ]
    if private_bytes:
        rows.append(["of which private bits", format_bytes(private_bytes), "", ""])
    rows.append(["other weights in common", format_bytes(summary.common_bytes), "", ""])
    rows += [
        [f"other weights of {variant.name}", format_bytes(variant.own_bytes), "", ""]
        for variant in summary.variants
    ]
    rows.append(
        [
            "all tensors",
            format_bytes(summary.pack_bytes),
            format_bytes(summary.separate_bytes),
            f"{summary.pack_ratio:.1%}",
        ]
    )
    head = ["part", "in the pack", "as separate models", "ratio"]
    return figure(drawing) + table("Bytes of tensors, by part", head, rows, numbers=3)


def _private_bytes(manifest: Manifest) -> int:
    return sum(
        plane_bytes(*manifest.part_shape(part), codes[idx].bits)
        for variant in manifest.variants
        for layer in variant.private_codes
        for codes in layer
        for idx, part in enumerate(EXPERT_PARTS)
    )


def _recipe(summary: PackSummary) -> str:
    rows = [[key, _plain(summary.recipe[key])] for key in sorted(summary.recipe)[:MAX_ENTRIES]]
    variants = [[variant.name, variant.content_sha256] for variant in summary.variants]
    return table("What the compiler was asked to do", ["option", "value"], rows) + table(
        "Variants, and the digest of the model each was made from",
        ["variant", "content_sha256"],
        variants,
    )


def _plain(value: object) -> str:
    """A value of the recipe, which is free-form, for people."""
    if isinstance(value, dict) and value:
        lines = [f"{key}: {_plain(value[key])}" for key in sorted(value)[:MAX_ENTRIES]]
        return "\n".join(line.replace("\n", " ") for line in lines)
    if value is None or value == {}:
        return "none"
    return value if isinstance(value, str) else json.dumps(value)


def _sharing(summary: PackSummary) -> str:
    rows = [
        [
            str(layer.layer),
            "\n".join(sharing_lines(layer)) or "none",
            str(layer.num_slots),
            str(layer.num_experts),
        ]
        for layer in summary.layers
    ]
    return (
        "<p>Experts of several variants that share a slot, by number: <code>a = b: 0 1</code> says "
        "that a and b share their experts 0 and 1.</p>"
        + table("Slots, layer by layer", ["layer", "shared", "slots", "experts"], rows, numbers=2)
    )


def _scores(scores: Sequence[ScoreRow], charts: ModuleType) -> str:
    drawing = charts.scores_chart(
        [(row.variant, row.data, row.nll, row.original_nll) for row in scores],
        title="Loss of each variant on each text, from the pack and of its original",
    )
    rows = []
    for row in scores:
        compared = ["", ""]
        if row.original_nll is not None:
            compared = [f"{row.original_nll:.4f}", f"{row.nll - row.original_nll:+.4f}"]
        rows.append([row.variant, row.data, str(row.num_tokens), f"{row.nll:.4f}", *compared])
    head = ["variant", "text", "tokens", "NLL", "original NLL", "increase"]
    return figure(drawing) + table("Loss, nats per token", head, rows, numbers=4)


def _curve(curve: Sequence[CurvePoint], summary: PackSummary, charts: ModuleType) -> str:
    drawing = charts.curve_chart(
        curve,
        expert_ratio=summary.expert_ratio,
        floor=LOSS_FLOOR,
        title="Loss of the worst variant against bytes of experts, for each method",
    )
    rows = [
        [point.method, f"{point.expert_ratio:.3f}", f"{point.worst:.4f}", f"{point.mean:.4f}"]
        for point in curve
    ]
    caption = f"Losses at or below {LOSS_FLOOR:g} are drawn at {LOSS_FLOOR:g}."
    return figure(drawing, caption) + table(
        "Loss, nats per token; bytes against separate models' experts",
        ["method", "bytes", "worst", "mean"],
        rows,
        numbers=3,
    )


def _similarity_table(similarities: Sequence[LayerSimilarity]) -> str:
    rows = [
        [
            str(one.layer),
            *("" if value is None else f"{value:.5f}" for value in list(asdict(one).values())[1:]),
        ]
        for one in similarities
    ]
    head = ["layer", "same number, mean", "same number, lowest", "different numbers, highest"]
    return (
        "<p>Cosine similarity of the experts as the pack stores them, decoded. That is after "
        "merging or coding: the originals, which the recipe's threshold was held against, may "
        "have been less alike. Colours and axes are logarithmic in the distance, 1 - similarity; "
        "pairs nearer than 0.0001 are drawn as equal.</p>"
        + table(
            "Pairs of experts, by their numbers",
            head,
            rows,
            numbers=3,
        )
    )


def _similarity_blocks(
    pack: Pack, summary: PackSummary, charts: ModuleType, on_progress: OnProgress | None
) -> tuple[str, list[LayerSimilarity]]:
    names = pack.manifest.variant_names
    num_layers = pack.manifest.config.num_layers
    max_side = max(32, math.isqrt(PIXELS // num_layers))
    threshold = _threshold(summary)
    buffer_FP = layer_buffer(pack)
    blocks, similarities = [], []
    for layer in range(num_layers):
        similarity_EE = stored_similarity(pack, layer, buffer_FP)
        matrix_EE = similarity_EE.numpy()
        title = f"Layer {layer}: similarity of every expert with every other, variants as blocks"
        heatmap = charts.similarity_chart(
            matrix_EE, names, layer=layer, max_side=max_side, title=title
        )
        drawings = figure(heatmap, "Similarity; experts of a variant in order of their numbers.")
        if len(matrix_EE) > 1:
            title = f"Layer {layer}: how experts join by average linkage"
            tree = linkage_tree(similarity_EE)
            drawing = charts.dendrogram_chart(
                tree, names, layer=layer, threshold=threshold, title=title
            )
            drawings += figure(drawing, "Average linkage; the dashed line is the recipe's cut.")
        opened = " open" if layer == 0 or num_layers <= OPEN_LAYERS else ""
        blocks.append(
            f"<details{opened}><summary>{text(_layer_line(summary.layers[layer]))}</summary>\n"
            f'<div class="pair">{drawings}</div></details>'
        )
        similarities.append(pair_statistics(layer, matrix_EE, len(names)))
        if on_progress:
            on_progress(Progress("layers", layer + 1, num_layers))
    return "\n".join(blocks), similarities


def _layer_line(layer: LayerSummary) -> str:
    return f"Layer {layer.layer}: {layer.num_slots} slots for {layer.num_experts} experts"


def _threshold(summary: PackSummary) -> float | None:
    """The recipe is free-form: take the cut from it only where it makes sense."""
    value = summary.recipe.get("threshold")
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value <= 1:
        return None
    return float(value)

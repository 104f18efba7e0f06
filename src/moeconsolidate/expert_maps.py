"""Sections of a report that map layers by experts: their precision, and how often they are used."""

from __future__ import annotations

from collections.abc import Sequence
from types import ModuleType

import numpy as np

from moeconsolidate.page import figure, table, text
from moeruntime.pack import Manifest
from moeruntime.pack.manifest import Variant
from moeruntime.tensorfile import DTYPES

__all__ = ["precision", "routing"]


def precision(manifest: Manifest) -> str:
    """Private bits of every expert, or its dtype in a plain pack."""
    if manifest.nested is None:
        dtype = str(DTYPES[manifest.expert_dtype]).removeprefix("torch.")
        shown = {"bfloat16": "bf16", "float16": "fp16", "float32": "fp32"}[dtype]
        lead = (
            f"<p>Every expert is stored as it is, in {shown}. Strong cells are experts with a "
            "slot of their own; faint ones share theirs.</p>"
        )
    else:
        shared = ", ".join(
            f"{part}: {code.shared_bits} shared bits, a scale for {code.group} columns"
            for part, code in manifest.nested.items()
        )
        lead = (
            f"<p>Slots hold shared bits ({text(shared)}). A cell gives the private bits that "
            "refine them for one expert: gate_up, then down. With none, the variant takes the "
            "shared expert as it is.</p>"
        )
        shown = ""
    owners = [
        {members[0] for members in manifest.members(layer) if len(members) == 1}
        for layer in range(manifest.config.num_layers)
    ]
    maps = "".join(_precision_map(variant, owners, shown) for variant in manifest.variants)
    return f'{lead}<div class="maps">{maps}</div>'


def _precision_map(variant: Variant, owners: Sequence[set[tuple[str, int]]], dtype: str) -> str:
    """Layers down, experts across; `dtype` where weights are plain, else empty."""
    rows = []
    for layer, slots in enumerate(variant.expert_map):
        cells = []
        for expert in range(len(slots)):
            if dtype:
                shade = 3 if (variant.name, expert) in owners[layer] else 1
                shades, shown = (shade, shade), dtype
            else:
                gate_up, down = variant.private_codes[layer][expert]
                shades, shown = (gate_up.bits, down.bits), f"{gate_up.bits} {down.bits}"
            cells.append(f'<td class="l{shades[0]} r{shades[1]}">{shown}</td>')
        rows.append(f'<tr><th scope="row">{layer}</th>{"".join(cells)}</tr>')
    head = "".join(f'<th scope="col">{expert}</th>' for expert in range(len(variant.expert_map[0])))
    caption = f"{variant.name}: experts across, layers down"
    if variant.private_codes:
        counts = [code.bits for layer in variant.private_codes for pair in layer for code in pair]
        caption += f"; {sum(counts) / len(counts):.2f} private bits on average"
    body = "\n".join(rows)
    return (
        f'<div class="wide"><table class="map"><caption>{text(caption)}</caption>\n<thead><tr>'
        f'<th scope="col">layer</th>{head}</tr></thead>\n<tbody>\n{body}\n</tbody></table></div>'
    )


def routing(manifest: Manifest, charts: ModuleType) -> str:
    """How often calibration used each expert; nothing where the pack does not say, or not well."""
    config = manifest.config
    tables = manifest.provenance.get("routing")
    if not isinstance(tables, dict) or set(tables) != set(manifest.variant_names):
        return ""
    shares = {}
    for name in manifest.variant_names:
        rows = tables[name]
        numbers = [
            number
            for row in (rows if isinstance(rows, list) else [])
            for number in (row if isinstance(row, list) else [])
        ]
        # `type` rather than isinstance: True is no number.
        if len(numbers) != config.num_layers * config.num_experts or not all(
            type(number) is int and 0 <= number <= 10_000 for number in numbers
        ):
            return ""
        table_LE = np.array(numbers, dtype=np.float64) / 10_000
        shares[name] = table_LE.reshape(config.num_layers, config.num_experts)
    uniform = config.top_k / config.num_experts
    drawing = charts.routing_chart(
        shares, uniform=uniform, title="How often each expert is used, for each variant"
    )
    rows_of_text = []
    for name, table_LE in shares.items():
        layer, expert = divmod(int(table_LE.argmax()), config.num_experts)
        rare = int((table_LE < uniform / 10).sum())
        most = f"{table_LE.max():.1%}: layer {layer}, expert {expert}"
        rows_of_text.append([name, most, f"{table_LE.min():.1%}", str(rare)])
    return (
        f"<p>Parts of each variant's calibration tokens that its router sent to each expert. Used "
        f"alike, each of {config.num_experts} would get {uniform:.1%}. Experts that calibration "
        "hardly meets are kept by a floor, not by what it says of them.</p>"
        + figure(drawing, "Layers down, experts across; brighter is more used.")
        + table(
            "Extremes",
            ["variant", "most used", "least used", "used less than a tenth of equal"],
            rows_of_text,
            numbers=2,
        )
    )

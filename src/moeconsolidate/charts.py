"""The charts of `moec report`, as inline SVG; together with `svg` all that knows matplotlib.

Legend: E (rows, one per variant and expert, variant by variant).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Patch, PathPatch
from matplotlib.path import Path as DrawnPath
from numpy.typing import NDArray
from scipy.cluster.hierarchy import dendrogram

from moeconsolidate.report import format_bytes
from moeconsolidate.svg import INK, MUTED, NUM_COLOURS, new_figure, series_colour, to_svg

__all__ = [
    "CurvePoint",
    "bytes_chart",
    "curve_chart",
    "dendrogram_chart",
    "routing_chart",
    "scores_chart",
    "similarity_chart",
]

DISTANCE_FLOOR = 1e-4
"""Distances are drawn on a logarithmic scale that ends here; what is nearer counts as equal."""
MAX_LABELLED_ROWS = 64
"""Experts beyond which a chart names variants only."""
MAX_LEAVES = 128
"""Leaves of a dendrogram; beyond, its lowest joins are left out."""

_MARKERS = "osD^vPX*"


@dataclass(frozen=True, slots=True)
class CurvePoint:
    """One method at one size.

    Attributes:
        method: its name.
        expert_ratio: bytes of the experts against separate models'.
        worst, mean: loss over the variants, nats per token.
    """

    method: str
    expert_ratio: float
    worst: float
    mean: float


def bytes_chart(bars: Mapping[str, Mapping[str, int]], title: str) -> str:
    """Horizontal bars of parts: bar name -> part -> bytes; a part has one colour in all bars."""
    parts = list(dict.fromkeys(part for bar in bars.values() for part in bar))
    with new_figure(7.2, 0.75 + 0.42 * len(bars)) as figure:
        axes = figure.add_axes((0.2, 0.22, 0.68, 0.5))
        for row, bar in enumerate(bars.values()):
            left = 0
            for idx, part in enumerate(parts):
                num_bytes = bar.get(part, 0)
                axes.barh(row, num_bytes, left=left, height=0.66, color=series_colour(idx))
                left += num_bytes
            axes.annotate(
                format_bytes(left), (left, row), xytext=(5, 0), textcoords="offset points",
                va="center", annotation_clip=False,
            )  # fmt: skip
        axes.set_yticks(range(len(bars)), [_label(name) for name in bars])
        axes.invert_yaxis()
        axes.xaxis.set_major_formatter(lambda value, _: format_bytes(round(value)))
        axes.locator_params(axis="x", nbins=5)
        axes.tick_params(axis="y", length=0)
        keys = [Patch(color=series_colour(idx)) for idx in range(len(parts))]
        figure.legend(
            keys, [_label(part) for part in parts], loc="upper left", ncols=len(parts), fontsize=9
        )
        return to_svg(figure, "bytes", title)


def similarity_chart(
    similarity_EE: NDArray[np.float32],
    variants: Sequence[str],
    *,
    layer: int,
    max_side: int,
    title: str,
) -> str:
    """Every expert against every other, variants as blocks, coloured by the log of the distance.

    Args:
        similarity_EE: in [-1, 1].
        variants: names; each has the same number of rows.
        layer: its index.
        max_side: pixels of the picture's side; a larger matrix is averaged down to it.
        title: what a screen reader says.
    """
    num_rows = len(similarity_EE)
    num_experts = num_rows // len(variants)
    pixels = _colours(_shrink(1.0 - similarity_EE.astype(np.float64), max_side))
    with new_figure(5.4, 4.6) as figure:
        axes = figure.add_axes((0.18, 0.13, 0.64, 0.64 * 5.4 / 4.6))
        axes.imshow(pixels, interpolation="none", extent=(0, num_rows, num_rows, 0))
        edges = range(num_experts, num_rows, num_experts)
        for edge in edges:
            axes.axhline(edge, color="white", linewidth=0.8)
            axes.axvline(edge, color="white", linewidth=0.8)
        blocks = [(idx + 0.5) * num_experts for idx in range(len(variants))]
        names = [_label(name, 14) for name in variants]
        if num_rows <= MAX_LABELLED_ROWS // 2:
            rows = [row + 0.5 for row in range(num_rows)]
            numbers = [str(row % num_experts) for row in range(num_rows)]
            axes.set_xticks(rows, numbers, fontsize=5.5)
            axes.set_yticks(rows, numbers, fontsize=5.5)
            axes.tick_params(length=0, pad=2)
        else:
            axes.set_xticks([])
            axes.set_yticks([])
        many = len(variants) > 6
        for place, name in zip(blocks, names, strict=True):
            axes.annotate(
                name, (-0.05, place), ha="right", va="center", annotation_clip=False,
                xycoords=("axes fraction", "data"), fontsize=6 if many else 9,
            )  # fmt: skip
            axes.annotate(
                name, (place, -0.045), ha="center", va="top", annotation_clip=False,
                xycoords=("data", "axes fraction"), fontsize=6 if many else 9,
                rotation=90 if many else 0,
            )  # fmt: skip
        for spine in axes.spines.values():
            spine.set_visible(True)
        _colour_bar(figure)
        return to_svg(figure, f"similarity-{layer}", title)


def dendrogram_chart(
    tree: NDArray[np.float64],
    variants: Sequence[str],
    *,
    layer: int,
    threshold: float | None,
    title: str,
) -> str:
    """How experts join by average linkage, leaves on the left, and where the recipe cuts.

    Args:
        tree: SciPy's linkage matrix.
        variants: names; each has the same number of leaves.
        layer: its index.
        threshold: similarity of the cut; None draws none.
        title: what a screen reader says.
    """
    num_rows = len(tree) + 1
    num_experts = num_rows // len(variants)
    whole = num_rows <= MAX_LEAVES
    drawn = dendrogram(tree, no_plot=True, p=MAX_LEAVES, truncate_mode=None if whole else "lastp")
    labelled = num_rows <= MAX_LABELLED_ROWS
    height = max(2.6, 0.135 * num_rows + 0.8) if labelled else 5.2
    with new_figure(5.0, height) as figure:
        bottom = 0.5 / height
        axes = figure.add_axes(
            (0.24 if labelled else 0.06, bottom, 0.72, 1 - bottom - 0.3 / height)
        )
        axes.set_xscale("log")
        axes.set_xlim(DISTANCE_FLOOR * 0.8, 2.2)
        vertices: list[tuple[float, float]] = []
        for heights, places in zip(drawn["dcoord"], drawn["icoord"], strict=True):
            vertices += [(max(x, DISTANCE_FLOOR), y) for x, y in zip(heights, places, strict=True)]
        corners = [DrawnPath.MOVETO, *[DrawnPath.LINETO] * 3]
        path = DrawnPath(vertices, corners * (len(vertices) // 4))
        axes.add_patch(PathPatch(path, fill=False, edgecolor=INK, linewidth=0.9))
        leaves = drawn["leaves"] or []
        axes.set_ylim(10 * len(leaves), 0)
        if labelled:
            axes.set_yticks(
                [10 * idx + 5 for idx in range(num_rows)],
                [
                    f"{_label(variants[row // num_experts], 14)} {row % num_experts}"
                    for row in leaves
                ],
                fontsize=7.5,
            )
            for row, label in zip(leaves, axes.get_yticklabels(), strict=True):
                label.set_color(series_colour(row // num_experts))
        else:
            axes.set_yticks([])
        axes.tick_params(axis="y", length=0)
        ticks = [10.0**power for power in range(round(math.log10(DISTANCE_FLOOR)), 1)]
        axes.set_xticks(ticks, ["equal", *(f"{tick:g}" for tick in ticks[1:])])
        axes.set_xlabel("distance: 1 - similarity")
        axes.spines["left"].set_visible(False)
        if threshold is not None:
            cut = max(1.0 - threshold, DISTANCE_FLOOR)
            axes.axvline(cut, color=series_colour(1), linestyle="--", linewidth=1.3)
            axes.annotate(
                f"cut: similarity {threshold:g}", (cut, 1.0), xycoords=("data", "axes fraction"),
                xytext=(0, 3), textcoords="offset points", ha="left" if cut < 0.02 else "center",
                va="bottom", color=series_colour(1), annotation_clip=False,
            )  # fmt: skip
        return to_svg(figure, f"dendrogram-{layer}", title)


def routing_chart(tables: Mapping[str, NDArray[np.float64]], *, uniform: float, title: str) -> str:
    """How often each expert is used: a map a variant, layers down and experts across.

    Args:
        tables: variant -> [layers, experts], parts of its tokens, of equal shapes.
        uniform: the part that every expert would get if all were used alike.
        title: what a screen reader says.
    """
    shape = next(iter(tables.values())).shape
    columns = min(len(tables), 4)
    rows = -(-len(tables) // columns)
    most = max(uniform * 1.01, *(float(table.max()) for table in tables.values()))
    tall = min(2.4, max(0.9, 0.16 * shape[0]))
    width, height = 7.2, 0.15 + rows * (tall + 0.62)
    with new_figure(width, height) as figure:
        panel = 0.8 / columns
        for idx, (name, table) in enumerate(tables.items()):
            row, column = divmod(idx, columns)
            left = 0.06 + column * (panel + 0.012)
            bottom = 1 - (row * (tall + 0.62) + 0.3 + tall) / height
            axes = figure.add_axes((left, bottom, panel - 0.02, tall / height))
            axes.imshow(
                mpl.colormaps["viridis"](table / most, bytes=True),
                interpolation="none", aspect="auto", extent=(0, shape[1], shape[0], 0),
            )  # fmt: skip
            axes.set_title(_label(name, 18), fontsize=9, loc="left")
            axes.set_xticks(*_middles(shape[1]), fontsize=7)
            labelled = column == 0
            axes.set_yticks(*_middles(shape[0]), fontsize=7)
            axes.tick_params(length=0, pad=2, labelleft=labelled)
            if labelled:
                axes.set_ylabel("layer", fontsize=8)
        bar = figure.add_axes((0.925, 0.3 * tall / height, 0.02, min(0.6, 1.3 / height)))
        bar.imshow(
            mpl.colormaps["viridis"](np.linspace(1, 0, 64)[:, None], bytes=True),
            interpolation="none", aspect="auto", extent=(0, 1, 0, most),
        )  # fmt: skip
        bar.set_xticks([])
        bar.yaxis.tick_right()
        bar.set_yticks([0, uniform, most], ["0", f"{uniform:.1%}", f"{most:.1%}"], fontsize=7)
        return to_svg(figure, "routing", title)


def scores_chart(rows: Sequence[tuple[str, str, float, float | None]], *, title: str) -> str:
    """Loss of each variant on each text, beside its original's where that is known.

    Args:
        rows: variant, text, NLL from the pack, NLL of the original or None; nats per token.
        title: what a screen reader says.
    """
    compared = any(original is not None for *_, original in rows)
    height = 1.0 + 0.26 * len(rows)
    with new_figure(7.2, height) as figure:
        bottom, tall = 0.5 / height, 1 - 0.95 / height
        axes = figure.add_axes((0.26, bottom, 0.32 if compared else 0.66, tall))
        places = range(len(rows))
        pack = axes.scatter(
            [row[2] for row in rows], places, color=series_colour(0), s=26, zorder=3
        )
        handles, names = [pack], ["from the pack"]
        if compared:
            pairs = [(row[3], place) for place, row in enumerate(rows) if row[3] is not None]
            handles.append(
                axes.scatter(
                    [nll for nll, _ in pairs], [place for _, place in pairs],
                    facecolors="none", edgecolors=series_colour(1), s=64, linewidths=1.4, zorder=4,
                )
            )  # fmt: skip
            names.append("original")
        axes.set_xlabel("NLL, nats per token")
        axes.set_yticks(places, [_label(f"{row[0]}, {row[1]}", 30) for row in rows])
        panels = [axes]
        if compared:
            increase = figure.add_axes((0.66, bottom, 0.24, tall), sharey=axes)
            for place, row in enumerate(rows):
                if row[3] is not None:
                    value = row[2] - row[3]
                    increase.barh(place, value, height=0.6, color=series_colour(0))
                    increase.annotate(
                        f"{value:+.4f}", (max(value, 0.0), place), xytext=(3, 0), va="center",
                        textcoords="offset points", fontsize=7.5, annotation_clip=False,
                    )  # fmt: skip
            increase.axvline(0, color=MUTED, linewidth=0.8)
            increase.locator_params(axis="x", nbins=3)
            increase.set_xlabel("increase")
            increase.tick_params(axis="y", labelleft=False)
            panels.append(increase)
        for panel in panels:
            panel.grid(axis="x")
            panel.set_axisbelow(True)
            panel.tick_params(axis="y", length=0)
        axes.set_ylim(len(rows) - 0.4, -0.6)
        figure.legend(handles, names, loc="upper left", ncols=2, fontsize=9)
        return to_svg(figure, "scores", title)


def curve_chart(
    points: Sequence[CurvePoint], *, expert_ratio: float, floor: float, title: str
) -> str:
    """Worst loss against bytes: a line for each method measured at several sizes.

    Args:
        points: in any order.
        expert_ratio: of the pack, marked by a line.
        floor: losses at or below it are drawn at it; the axis is logarithmic.
        title: what a screen reader says.
    """
    methods = list(dict.fromkeys(point.method for point in points))
    columns = 2 if len(methods) > 1 else 1
    legend_inches = 0.2 * math.ceil(len(methods) / columns) + 0.1
    height = 3.6 + legend_inches
    with new_figure(7.2, height) as figure:
        bottom = (legend_inches + 0.55) / height
        axes = figure.add_axes((0.11, bottom, 0.85, 1 - bottom - 0.25 / height))
        axes.set_yscale("log")
        handles = []
        for idx, method in enumerate(methods):
            chosen = sorted(
                (p.expert_ratio, max(p.worst, floor)) for p in points if p.method == method
            )
            marker = _MARKERS[(idx + idx // NUM_COLOURS) % len(_MARKERS)]
            handles += axes.plot(
                [ratio for ratio, _ in chosen], [worst for _, worst in chosen],
                color=series_colour(idx), marker=marker, markersize=6, linewidth=1.5,
            )  # fmt: skip
        axes.axvline(expert_ratio, color=MUTED, linestyle=":", linewidth=1.3)
        axes.annotate(
            "this pack", (expert_ratio, 1.0), xycoords=("data", "axes fraction"), ha="center",
            xytext=(0, 3), textcoords="offset points", va="bottom", annotation_clip=False,
        )  # fmt: skip
        axes.set_ylim(bottom=floor * 0.8)
        axes.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
        axes.yaxis.set_minor_formatter(lambda value, _: "")
        axes.set_xlabel("bytes of experts, separate models = 1")
        axes.set_ylabel("loss of the worst variant, nats per token")
        axes.grid(axis="both")
        axes.set_axisbelow(True)
        figure.legend(
            handles, [_label(method, 44) for method in methods],
            loc="lower left", ncols=columns, fontsize=9,
        )  # fmt: skip
        return to_svg(figure, "curve", title)


def _colour_bar(figure: Figure) -> None:
    """The scale of a similarity chart, from equal at the top to unlike at the bottom."""
    axes: Axes = figure.add_axes((0.855, 0.2, 0.03, 0.6))
    exponents = np.linspace(math.log10(DISTANCE_FLOOR), 0.0, 64)
    axes.imshow(
        _colours(10.0 ** exponents[:, None]),
        interpolation="none",
        aspect="auto",
        extent=(0, 1, 0, exponents[0]),
    )
    axes.set_ylim(0, exponents[0])
    powers = range(round(exponents[0]), 1)
    names = [f"{1.0 - 10.0**power:g}" for power in powers]
    names[0], names[-1] = "equal", "0 or less"
    axes.set_yticks(list(powers), names, fontsize=7.5)
    axes.set_xticks([])
    axes.yaxis.tick_right()
    axes.set_title("similarity", fontsize=8, loc="left")


def _middles(count: int) -> tuple[list[float], list[str]]:
    """Places and names of at most eight of so many cells."""
    numbers = range(0, count, -(-count // 8))
    return [number + 0.5 for number in numbers], [str(number) for number in numbers]


def _colours(distance: NDArray[np.float64]) -> NDArray[np.uint8]:
    """Bright where near, dark where far, in equal steps of the distance's logarithm."""
    span = math.log10(DISTANCE_FLOOR)
    nearness = np.log10(np.clip(distance, DISTANCE_FLOOR, 1.0)) / span
    colours: NDArray[np.uint8] = mpl.colormaps["viridis"](nearness, bytes=True)
    return colours


def _shrink(matrix: NDArray[np.float64], max_side: int) -> NDArray[np.float64]:
    """Average blocks of equal size, so that at most `max_side` rows and columns remain."""
    step = -(-len(matrix) // max_side)
    if step == 1:
        return matrix
    starts = np.arange(0, len(matrix), step)
    sums = np.add.reduceat(np.add.reduceat(matrix, starts, axis=0), starts, axis=1)
    counts = np.diff([*starts, len(matrix)])
    averaged: NDArray[np.float64] = sums / np.outer(counts, counts)
    return averaged


def _label(text: str, length: int = 40) -> str:
    """Text from outside as a chart can show it: printable, short, and never a hidden label."""
    shown = "".join(char if char.isprintable() else "?" for char in text)
    shown = shown if len(shown) <= length else shown[: length - 1] + "…"
    return f"\u200b{shown}" if shown.startswith("_") else shown  # matplotlib hides "_name"

"""What matplotlib draws, as SVG to be put into a page of HTML.

Colours of ink and series are placeholders while matplotlib draws, and CSS variables or
`currentColor` in the result, so one drawing serves light and dark pages. Text stays text. Nothing
in the result refers to anything outside it, and the same data give the same bytes.
"""

from __future__ import annotations

import io
import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from xml.etree import ElementTree

import matplotlib as mpl
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure

__all__ = ["INK", "LINE", "MUTED", "NUM_COLOURS", "new_figure", "series_colour", "to_svg"]

NUM_COLOURS = 8
"""Series colours that the page defines, as --c0, --c1 and so on."""
INK, MUTED, LINE = "#010101", "#010102", "#010103"
_VARIABLES = {INK: "currentColor", MUTED: "var(--muted)", LINE: "var(--line)"}
_SERIES = "#0102{:02d}"
_SETTINGS: dict[Any, object] = {
    "svg.fonttype": "none",
    "svg.hashsalt": "moec",
    "text.parse_math": False,  # names from outside are not formulas
    "axes.unicode_minus": False,
    "font.size": 9,
    "axes.titlesize": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.facecolor": "none",
    "legend.frameon": False,
    "text.color": INK,
    "axes.labelcolor": INK,
    "xtick.color": MUTED,
    "ytick.color": MUTED,
    "xtick.labelcolor": INK,
    "ytick.labelcolor": INK,
    "axes.edgecolor": LINE,
    "grid.color": LINE,
    "grid.linewidth": 0.6,
}


def series_colour(idx: int) -> str:
    """The placeholder of one of the page's series colours; they repeat."""
    return _SERIES.format(idx % NUM_COLOURS)


@contextmanager
def new_figure(width: float, height: float) -> Iterator[Figure]:
    """An empty figure of so many inches, under these settings and no others of the machine's."""
    with mpl.rc_context(), warnings.catch_warnings():
        mpl.rcdefaults()
        mpl.rcParams.update(_SETTINGS)
        warnings.filterwarnings("ignore", message="Glyph .* missing")  # the browser has its own
        figure = Figure(figsize=(width, height))
        FigureCanvasSVG(figure)
        yield figure


def to_svg(figure: Figure, name: str, title: str) -> str:
    """Turn a figure into SVG for a page that holds other charts: ids and colours are its own."""
    buffer = io.BytesIO()
    metadata = dict.fromkeys(("Creator", "Date", "Format", "Type"))
    figure.savefig(buffer, format="svg", transparent=True, metadata=metadata)
    root = ElementTree.fromstring(buffer.getvalue())
    width, height = figure.get_size_inches() * 96  # the pixels of CSS
    used = set(re.findall(r'(?:url\(|href=")#([\w.-]+)', buffer.getvalue().decode()))
    for parent in list(root.iter()):
        for child in list(parent):
            if child.tag.endswith(("}metadata", "}style")):
                parent.remove(child)
    for element in root.iter():
        element.tag = element.tag.rpartition("}")[2]
        attributes = dict(element.attrib)
        element.attrib.clear()
        for key, value in attributes.items():
            short = key.rpartition("}")[2]
            if short == "id" and value not in used:
                continue
            element.set(short, _rewritten(short, value, name))
        if element.text and not element.text.strip():
            element.text = None
        element.tail = None
    root.attrib.clear()
    root.set("viewBox", f"0 0 {width * 0.75:g} {height * 0.75:g}")
    root.set("width", f"{width:g}")
    root.set("height", f"{height:g}")
    root.set("role", "img")
    root.set("aria-labelledby", f"{name}-title")
    heading = ElementTree.Element("title", {"id": f"{name}-title"})
    heading.text = title
    root.insert(0, heading)
    return ElementTree.tostring(root, encoding="unicode")


def _rewritten(key: str, value: str, name: str) -> str:
    if key == "id":
        return f"{name}-{value}"
    if key == "href":
        return f"#{name}-{value[1:]}" if value.startswith("#") else value.replace("\n", "")
    if key == "clip-path":
        return value.replace("url(#", f"url(#{name}-")
    if key == "style":
        value = re.sub(r"font-family: [^;]*;? ?", "", value)
        value = re.sub(r"#0102(\d\d)", lambda match: f"var(--c{int(match[1])})", value)
        for placeholder, variable in _VARIABLES.items():
            value = value.replace(placeholder, variable)
    if key == "d":
        return value.replace("\n", "")
    return value

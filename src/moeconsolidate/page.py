"""A page of HTML in one file: what every report has around its contents.

Everything that comes from outside goes through `text`. The page has no script, and its policy lets
a browser load nothing, not even from the folder it lies in.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from html import escape

__all__ = ["figure", "page", "section", "table", "text"]

MAX_TEXT = 300

_STYLE = """
:root { color-scheme: light dark; --ink: #1b1f24; --paper: #ffffff; --muted: #59626c;
  --line: #c9cfd6; --card: #f5f7f9; --bits: 33, 102, 172; --c0: #2166ac; --c1: #b8500f;
  --c2: #1b7a58; --c3: #8a49a5; --c4: #8f6a00; --c5: #b5305f; --c6: #0f7f8c; --c7: #6b5b4b; }
@media (prefers-color-scheme: dark) { :root { --ink: #e4e7ea; --paper: #14181d; --muted: #9aa5b0;
  --line: #3d4650; --card: #1d232a; --bits: 110, 168, 224; --c0: #6ea8e0; --c1: #f0945a;
  --c2: #4fc29a; --c3: #c794de; --c4: #d9b23f; --c5: #f284ab; --c6: #56c4d0; --c7: #c4ac93; } }
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 72rem; padding: 1.5rem 1.25rem 4rem; background: var(--paper);
  color: var(--ink); font: 16px/1.5 system-ui, sans-serif; }
h1 { margin: 0 0 .25rem; font-size: 1.7rem; line-height: 1.25; overflow-wrap: anywhere; }
h2 { margin: 2.75rem 0 .5rem; padding-top: .75rem; border-top: 1px solid var(--line);
  font-size: 1.3rem; }
h3 { margin: 1.5rem 0 .25rem; font-size: 1.05rem; }
p { max-width: 48rem; margin: .5rem 0; }
a { color: var(--c0); }
nav ul { display: flex; flex-wrap: wrap; gap: .25rem 1.25rem; margin: .75rem 0; padding: 0;
  list-style: none; }
.note, figcaption, caption { color: var(--muted); font-size: .9rem; }
.wide { max-width: 100%; overflow-x: auto; }
table { margin: .75rem 0; border-collapse: collapse; font-size: .9rem; }
caption { padding-bottom: .25rem; text-align: left; white-space: nowrap; }
th, td { padding: .22rem .7rem; border-bottom: 1px solid var(--line); text-align: left;
  vertical-align: top; }
thead th { border-bottom-color: var(--muted); }
th { font-weight: 600; }
td.n, th.n { text-align: right; font-variant-numeric: tabular-nums; }
code { font: .85em ui-monospace, monospace; overflow-wrap: anywhere; }
figure { margin: .75rem 0; }
.pair { display: flex; flex-wrap: wrap; align-items: flex-start; gap: .5rem 2rem; }
.pair figure { flex: 1 1 26rem; min-width: 0; }
svg { display: block; max-width: 100%; height: auto; fill: currentColor;
  stroke-linejoin: round; stroke-linecap: butt; }
svg text { font-family: system-ui, sans-serif; }
details { margin: .75rem 0; padding: .5rem 1rem; border: 1px solid var(--line);
  border-radius: .4rem; }
summary { cursor: pointer; font-weight: 600; }
.maps { display: flex; flex-wrap: wrap; gap: 0 2.5rem; }
.map td { padding: .15rem .45rem; text-align: center; font-variant-numeric: tabular-nums;
  border: 1px solid var(--paper); background: linear-gradient(to right, rgba(var(--bits), var(--l))
  50%, rgba(var(--bits), var(--r)) 50%); }
.map th { padding: .15rem .5rem; border: 0; text-align: center; white-space: nowrap; }
.l0 { --l: .06 } .l1 { --l: .18 } .l2 { --l: .3 } .l3 { --l: .42 } .l4 { --l: .54 }
.r0 { --r: .06 } .r1 { --r: .18 } .r2 { --r: .3 } .r3 { --r: .42 } .r4 { --r: .54 }
@media print { details { break-inside: avoid; } }
"""

_PAGE = """<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" \
content="default-src 'none'; style-src 'unsafe-inline'; img-src data:">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title>
<style>{style}</style>
</head>
<body>
<header>
<h1>{title}</h1>
{lead}
<nav aria-label="Contents"><ul>
{contents}
</ul></nav>
</header>
<main>
{body}
</main>
</body>
</html>
"""


def page(title: str, lead: str, sections: Sequence[tuple[str, str]]) -> str:
    """The whole document.

    Args:
        title: plain text.
        lead: HTML below the title.
        sections: heading, as plain text, and HTML of each.
    """
    names = [f"section-{idx}" for idx in range(1, len(sections) + 1)]
    return _PAGE.format(
        title=text(title),
        style=_STYLE,
        lead=lead,
        contents="\n".join(
            f'<li><a href="#{name}">{text(heading)}</a></li>'
            for name, (heading, _) in zip(names, sections, strict=True)
        ),
        body="\n".join(
            section(name, heading, body)
            for name, (heading, body) in zip(names, sections, strict=True)
        ),
    )


def section(name: str, heading: str, body: str) -> str:
    """One part of the page, with an id to link to."""
    return (
        f'<section aria-labelledby="{name}">\n<h2 id="{name}">{text(heading)}</h2>\n'
        f"{body}\n</section>"
    )


def figure(drawing: str, caption: str = "") -> str:
    """An inline SVG and what to know about it."""
    below = f"<figcaption>{text(caption)}</figcaption>" if caption else ""
    return f'<figure><div class="wide">{drawing}</div>{below}</figure>'


def table(
    caption: str, head: Sequence[str], rows: Iterable[Sequence[str]], *, numbers: int = 0
) -> str:
    """A table of plain text; each row's first cell is its heading, the last `numbers` are numbers.

    A line break in a cell is kept.
    """
    first = len(head) - numbers

    def cell(tag: str, idx: int, value: str, scope: str = "") -> str:
        align = ' class="n"' if idx >= first else ""
        shown = "<br>".join(text(line) for line in value.split("\n"))
        return f"<{tag}{scope}{align}>{shown}</{tag}>"

    top = "".join(cell("th", idx, name, ' scope="col"') for idx, name in enumerate(head))
    body = "\n".join(
        "<tr>"
        + cell("th", 0, row[0], ' scope="row"')
        + "".join(cell("td", idx, value) for idx, value in enumerate(row) if idx)
        + "</tr>"
        for row in rows
    )
    return (
        f'<div class="wide"><table><caption>{text(caption)}</caption>\n'
        f"<thead><tr>{top}</tr></thead>\n<tbody>\n{body}\n</tbody></table></div>"
    )


def text(value: str) -> str:
    """Plain text as HTML: escaped, printable, bounded."""
    shown = value if len(value) <= MAX_TEXT else value[: MAX_TEXT - 1] + "…"
    return escape("".join(char if char.isprintable() else "\ufffd" for char in shown))

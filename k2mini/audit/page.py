"""A report as one HTML page that loads nothing else: heat maps and bars in SVG, in a light and a dark scheme."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape

# The browser refuses to load anything from elsewhere, and says so on its console, where the tests look.
POLICY = "default-src 'none'; style-src 'unsafe-inline'; img-src data:"
STYLE = """
:root { color-scheme: light dark; --ink: #1d2430; --soft: #5c6675; --paper: #fbfbfd; --card: #ffffff; --line: #e3e6ec;
  --up: 24 92% 48%; --down: 212 82% 46%; }
@media (prefers-color-scheme: dark) { :root { --ink: #e7eaf0; --soft: #9aa4b2; --paper: #14171d; --card: #1b1f27;
  --line: #2c323d; --up: 26 96% 58%; --down: 210 92% 64%; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--paper); color: var(--ink); font: 15px/1.5 system-ui, sans-serif; }
main { max-width: 1180px; margin: 0 auto; padding: 32px 24px 64px; }
h1 { font-size: 24px; margin: 0 0 4px; } h2 { font-size: 17px; margin: 0 0 2px; }
p { margin: 0 0 14px; color: var(--soft); max-width: 78ch; }
section { background: var(--card); border: 1px solid var(--line); border-radius: 10px; padding: 20px 22px;
  margin: 20px 0; }
.scroll { overflow-x: auto; }
svg { display: block; font: 12px system-ui, sans-serif; }
svg text { fill: var(--ink); } svg .axis { fill: var(--soft); }
svg .cell { stroke: var(--card); stroke-width: 1; } svg .cell:hover { stroke: var(--ink); }
.tokens { font: 16px/2.1 ui-monospace, monospace; }
.tokens span { padding: 3px 2px; border-radius: 4px; white-space: pre; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
th, td { text-align: left; padding: 4px 16px 4px 0; border-bottom: 1px solid var(--line); }
th { color: var(--soft); font-weight: 500; }
"""


def html_page(title: str, lead: str, sections: Sequence[str]) -> str:
    """The whole page: a title, a sentence under it, and sections."""
    body = "\n".join(sections)
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f'<meta http-equiv="Content-Security-Policy" content="{POLICY}">'
        f'<link rel="icon" href="data:,"><title>{escape(title)}</title><style>{STYLE}</style></head>\n'
        f"<body><main><h1>{escape(title)}</h1><p>{escape(lead)}</p>\n{body}\n</main></body></html>\n"
    )


def section(title: str, what: str, content: str) -> str:
    """A heading, a line that says how to read the picture, and the picture."""
    return f'<section><h2>{escape(title)}</h2><p>{escape(what)}</p><div class="scroll">{content}</div></section>'


def _colour(value: float, largest: float) -> str:
    """Transparent at zero, full at `largest`: a warm hue for positive values, a cool one for negative."""
    share = 0.0 if largest == 0 else min(1.0, abs(value) / largest)
    return f"hsl(var({'--up' if value >= 0 else '--down'}) / {share:.3f})"


def heat_map(
    values: Sequence[Sequence[float]],
    rows: Sequence[str],
    columns: Sequence[str],
    *,
    tips: Sequence[Sequence[str]] | None = None,
    texts: Sequence[Sequence[str]] | None = None,
    width: int = 34,
    height: int = 22,
    largest: float | None = None,
) -> str:
    """A grid of cells coloured by value, as SVG.

    Args:
        tips: shown when the mouse rests on a cell; None: its row, column and value.
        texts: written into the cells.
        width, height: of a cell, in pixels.
        largest: the value that gets the full colour; None: the largest there is.
    """
    largest = largest if largest is not None else max((abs(v) for row in values for v in row), default=0.0)
    left = 12 + 7 * max(map(len, rows), default=0)
    top = 14 + 6 * max(map(len, columns), default=0)
    parts = []
    for x, name in enumerate(columns):
        place = left + x * width + width / 2 + 4
        parts.append(
            f'<text class="axis" transform="translate({place:.0f} {top - 6}) rotate(-60)">{escape(name)}</text>'
        )
    for y, (name, row) in enumerate(zip(rows, values, strict=True)):
        base = top + y * height
        parts.append(
            f'<text class="axis" x="{left - 8}" y="{base + height * 0.68:.0f}" text-anchor="end">{escape(name)}</text>'
        )
        for x, value in enumerate(row):
            tip = tips[y][x] if tips is not None else f"{name}, {columns[x]}: {value:.4g}"
            parts.append(
                f'<rect class="cell" x="{left + x * width}" y="{base}" width="{width}" height="{height}" rx="3" '
                f'fill="{_colour(value, largest)}"><title>{escape(tip)}</title></rect>'
            )
            if texts is not None:
                parts.append(
                    f'<text x="{left + x * width + width / 2:.0f}" y="{base + height * 0.68:.0f}" text-anchor="middle" '
                    f'pointer-events="none">{escape(texts[y][x])}</text>'
                )
    total = (left + len(columns) * width + 60, top + len(rows) * height + 8)
    return f'<svg width="{total[0]}" height="{total[1]}" role="img">{"".join(parts)}</svg>'


def bars(values: Sequence[float], names: Sequence[str], *, unit: str = "") -> str:
    """Horizontal bars, one a value, to both sides of zero where some are negative; as SVG."""
    largest = max((abs(v) for v in values), default=0.0) or 1.0
    left, middle, reach, height = 12 + 7 * max(map(len, names), default=0), 0, 360, 24
    if any(v < 0 for v in values):
        middle = reach
    parts, form = [], ".2f" if unit else ".3g"
    for y, (name, value) in enumerate(zip(names, values, strict=True)):
        size = reach * abs(value) / largest
        start, end = left + middle - (size if value < 0 else 0), left + middle + (size if value >= 0 else 0)
        parts.append(
            f'<text class="axis" x="{left - 8}" y="{y * height + 16}" text-anchor="end">{escape(name)}</text>'
            f'<rect x="{start:.1f}" y="{y * height + 3}" width="{max(size, 1):.1f}" height="{height - 6}" rx="3" '
            f'fill="{_colour(value, abs(value) or 1)}"><title>{escape(name)}: {value:.4g}{unit}</title></rect>'
            f'<text x="{end + 6:.1f}" y="{y * height + 16}">{value:{form}}{unit}</text>'
        )
    return f'<svg width="{left + middle + reach + 80}" height="{len(values) * height + 8}">{"".join(parts)}</svg>'


def text_strip(tokens: Sequence[str], values: Sequence[float], tips: Sequence[str]) -> str:
    """Tokens laid out as running text, each shaded by its value; tips are shown under the mouse."""
    largest = max((abs(v) for v in values), default=0.0)
    spans = [
        f'<span style="background:{_colour(value, largest)}" title="{escape(tip, quote=True)}">{escape(token)}</span>'
        for token, value, tip in zip(tokens, values, tips, strict=True)
    ]
    return f'<div class="tokens">{"".join(spans)}</div>'


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """An HTML table of texts."""
    cells = "".join(f"<th>{escape(name)}</th>" for name in head)
    body = "".join("<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in row) + "</tr>" for row in rows)
    return f"<table><tr>{cells}</tr>{body}</table>"

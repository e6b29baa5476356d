"""A report as one HTML page that loads nothing else: maps and bars, models side by side, in light and in dark."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from html import escape
from itertools import pairwise

from k2mini import page

# A cell's colour is a hue, --up or --down, as opaque as --a says. Both are chosen so that --ink can be read on the full
# hue. A map that is too wide is scrolled from its end, which `direction: rtl` shows first: the answer stands there.
STYLE = (
    page.STYLE
    + """
.sections, .models { display: flex; flex-wrap: wrap; align-items: flex-start; gap: 14px; }
section > p { width: 0; min-width: 100%; }
figure { margin: 0; max-width: max(50% - 7px, min(100%, 500px)); } figure:only-child { max-width: 100%; }
@media (max-width: 1060px) { figure { max-width: 100%; } }
figcaption { overflow-wrap: anywhere; }
.scroll { overflow-x: auto; direction: rtl; } .scroll > * { direction: ltr; margin: 0 auto 0 0; }
.scale { font-size: 12px; margin-bottom: 8px; display: flex; align-items: center; gap: 6px; }
.scale span { display: flex; border: 1px solid var(--line); } .scale i { width: 8px; height: 12px; }
td, i, .tokens span { background: hsl(var(--hue, var(--up)) / var(--a, 0)); } .n { --hue: var(--down); }
.map, .bars { font-size: 12px; line-height: 1; white-space: nowrap; }
.map td { border: 1px solid var(--line); min-width: 20px; max-width: 20px; height: 20px; padding: 0 2px; }
.map.wide td { min-width: 58px; max-width: 58px; }
.map td, .map th { text-align: center; overflow: hidden; text-overflow: ellipsis; }
.map td:hover { outline: 1px solid var(--ink); }
.map th { padding: 2px; max-width: 58px; vertical-align: bottom; }
.map th:first-child { text-align: right; padding-right: 6px; position: sticky; left: 0; z-index: 1;
  background: var(--card); max-width: 90px; vertical-align: middle; box-shadow: inset -1px 0 var(--soft); }
.map tr:first-child th:first-child { vertical-align: bottom; white-space: pre; font-size: 11px; }
.map .turned { writing-mode: vertical-rl; transform: rotate(180deg); max-height: 90px; text-align: left; }
.bars td, .bars th { padding: 2px 6px 2px 0; } .bars td:nth-child(2) { text-align: right; }
.bars i { display: block; height: 14px; min-width: 1px; border-radius: 2px; }
.tokens { font: 13px/1.7 ui-monospace, monospace; max-width: 110ch; margin-bottom: 8px; }
.tokens b { color: var(--soft); font-family: system-ui, sans-serif; padding-right: 8px; }
.tokens span { padding: 0 1px; border-radius: 3px; display: inline-block; }
"""
)
# The order in which the model computes them, and in which the terminal and the arrays of --json have them.
ORDER = (
    "Layers run from the first, 0, at the top to the last at the bottom. A map wider than its place shows its end: "
    "scroll left for the start. The mouse shows a cell's value. "
    "␣ is a space, ⏎ a line end, ⇥ a tab, <0xE2> a byte of a character, <200B> a character that shows nothing."
)
LONG = 200  # a text with more characters is folded, and one of several paragraphs


@dataclass(frozen=True)
class Scale:
    """Which values the colours stand for: none at `low`, full at `high`; about zero, if it lies between, two hues."""

    low: float = 0.0
    high: float = 0.0
    unit: str = ""

    def shade(self, value: float) -> str:
        """The attributes that colour an element by a value."""
        if self.low < 0 < self.high:
            share = value / max(-self.low, self.high)
        else:
            share = max(0.0, value - self.low) / ((self.high - self.low) or 1.0)
        alpha = f"{min(1.0, abs(share)):.2f}"
        return "" if alpha == "0.00" else f' style="--a:{alpha}"' + (' class="n"' if share < 0 else "")

    def legend(self) -> str:
        """The colours with their values and the unit."""
        ends = [self.low, 0.0, self.high] if self.low < 0 < self.high else [self.low, self.high]
        parts = [f"{ends[0]:.3g}"]
        for start, end in pairwise(ends):
            steps = [start + (end - start) * k / 11 for k in range(12)]
            parts.append(f"<span>{''.join(f'<i{self.shade(v)}></i>' for v in steps)}</span>{end:.3g}")
        return f'<div class="scale">{"".join(parts)} {escape(self.unit)}</div>'


def span_of(values: Sequence[Sequence[float]], unit: str) -> Scale:
    """The scale from the least value, or zero, to the largest, or zero."""
    every = [0.0, *(value for row in values for value in row)]
    return Scale(min(every), max(every), unit)


@dataclass(frozen=True)
class Section:
    """A picture of one model. Those of several models with the same title stand side by side, on one scale.

    Attributes:
        what: a line that says how to read the picture.
        draw: the picture as HTML, on the scale that it is given.
        scale: the values of this model; without a unit, no colours are explained.
        note: what is said of this model beside its name.
        folded: shown when the reader asks for it.
    """

    title: str
    what: str
    draw: Callable[[Scale], str]
    scale: Scale = Scale()
    note: str = ""
    folded: bool = False


def html_page(title: str, texts: Mapping[str, str], models: Sequence[tuple[str, Sequence[Section]]]) -> str:
    """The whole page: a title, what was asked (name -> text; long ones are folded), the sections of the models."""
    groups: dict[str, list[tuple[str, Section]]] = {}
    for name, sections in models:
        for section in sections:
            groups.setdefault(section.title, []).append((name, section))
    asked = "".join(
        f"<details><summary>{escape(name)}</summary><pre>{escape(text)}</pre></details>"
        if len(text) > LONG or "\n\n" in text
        else f'<p>{escape(name)}: <span class="said">{escape(text)}</span></p>'
        for name, text in texts.items()
    )
    body = f'{asked}<p>{escape(ORDER)}</p>\n<div class="sections">{"".join(map(_section, groups.values()))}</div>'
    return page.document(title, STYLE, body)


def _section(models: Sequence[tuple[str, Section]]) -> str:
    """One section over its models: heading, how to read it, the common scale, the pictures."""
    first = models[0][1]
    scales = [section.scale for _, section in models]
    scale = Scale(min(s.low for s in scales), max(s.high for s in scales), first.scale.unit)
    pictures = "".join(
        f"<figure><figcaption>{escape(': '.join(filter(None, (name, section.note))))}</figcaption>"
        f'<div class="scroll">{section.draw(scale)}</div></figure>\n'
        for name, section in models
    )
    content = f'{scale.legend() if scale.unit else ""}<div class="models">{pictures}</div>'
    if first.folded:
        content = f"<details><summary>show</summary>{content}</details>"
    return f"<section><h2>{escape(first.title)}</h2><p>{escape(first.what)}</p>{content}</section>\n"


def heat_map(
    scale: Scale,
    *,
    values: Sequence[Sequence[float]],
    rows: Sequence[str],
    columns: Sequence[str],
    axes: tuple[str, str],
    tips: Sequence[Sequence[str]] | None = None,
    texts: Sequence[Sequence[str]] | None = None,
) -> str:
    """A grid of cells coloured by value.

    Args:
        axes: what rows and columns are.
        tips: shown when the mouse rests on a cell; None: its row, column and value.
        texts: written into the cells, which are wider then.
    """
    turned = ' class="turned"' if texts is None and max(map(len, columns), default=0) > 3 else ""
    head = "".join(f'<th title="{escape(name)}"><span{turned}>{escape(name)}</span>' for name in columns)
    lines = [f"<tr><th>{escape(axes[1])} →\n{escape(axes[0])} ↓{head}"]
    for y, (name, row) in enumerate(zip(rows, values, strict=True)):
        cells = [f'<tr><th title="{escape(name)}">{escape(name)}']
        for x, value in enumerate(row):
            tip = f"{axes[0]} {name}, {axes[1]} {columns[x]}: {value:.4g} {scale.unit}" if tips is None else tips[y][x]
            title = f' title="{escape(tip)}"' if tip else ""
            cells.append(f"<td{scale.shade(value)}{title}>{escape(texts[y][x]) if texts is not None else ''}")
        lines.append("".join(cells))
    return f'<table class="map{" wide" if texts is not None else ""}">{"".join(lines)}</table>'


def bars(scale: Scale, *, values: Sequence[float], names: Sequence[str]) -> str:
    """Horizontal bars, one a value; the colour is the sign's."""
    most = max(-scale.low, scale.high) or 1.0
    rows = "".join(
        f"<tr><th>{escape(name)}<td>{value:.3g}<td>"
        f'<i class="{"n" if value < 0 else ""}" style="--a:1;width:{240 * abs(value) / most:.0f}px"></i>'
        for name, value in zip(names, values, strict=True)
    )
    return f'<table class="bars">{rows}</table>'


def text_strip(
    scale: Scale, *, tokens: Sequence[str], values: Sequence[float], tips: Sequence[str], name: str = ""
) -> str:
    """Tokens laid out as running text after a name, each shaded by its value; tips are shown under the mouse."""
    spans = "".join(
        f'<span{scale.shade(value)} title="{escape(tip)}">{escape(token)}</span>'
        for token, value, tip in zip(tokens, values, tips, strict=True)
    )
    return f'<div class="tokens"><b>{escape(name)}</b>{spans}</div>'

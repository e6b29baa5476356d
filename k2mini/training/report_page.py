"""Runs as one HTML page: what they were told, whether they learn, what they answer."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from html import escape
from typing import Any

from k2mini.page import STYLE, document, table
from k2mini.training.loop import ACCURACY
from k2mini.training.report import RunReport

COLOURS = 8  # of runs; more runs begin anew
TICKS = 6  # of an axis
POINTS = 240  # of a curve: more steps are averaged, neighbours with neighbours
ROWS = 6  # of a run's answers to a prompt: the first, the last, and between them in equal distances
LATE = 30  # steps from which on the second half of a run is drawn once more
OPEN = 5  # prompts whose answers are not folded
WIDE = ' class="wide"'
SMALL = [("norm of the gradient", "grad_norm", 1.0), ("learning rate", "lr", 1.0)]
SMALL.append(("tokens a second", "tokens_per_second", 1.0))
# Curves are stretched to their place, text is not: it stands around them as HTML. A dot is a line of no length.
OWN = """
main > p { margin-bottom: 14px; }
.c0 { --c: #2563eb; } .c1 { --c: #d9480f; } .c2 { --c: #0b8043; } .c3 { --c: #9333ea; }
.c4 { --c: #a16207; } .c5 { --c: #db2777; } .c6 { --c: #0e7490; } .c7 { --c: #57534e; }
@media (prefers-color-scheme: dark) {
  .c0 { --c: #7aa7ff; } .c1 { --c: #ff9a5c; } .c2 { --c: #4fd18b; } .c3 { --c: #c792ff; }
  .c4 { --c: #e6c34a; } .c5 { --c: #ff7eb6; } .c6 { --c: #56cfe1; } .c7 { --c: #b8b3ad; } }
.grid { display: grid; gap: 14px; margin-bottom: 14px;
  grid-template-columns: repeat(auto-fit, minmax(min(100%, 330px), 1fr)); }
section { margin-bottom: 14px; min-width: 0; } .grid section { margin: 0; }
section p { font-size: 13px; margin: 2px 0; }
h2 { margin-bottom: 6px; overflow-wrap: anywhere; }
h3 { font-size: 14px; font-weight: 500; margin: 0; display: inline; }
i { display: inline-block; width: 10px; height: 10px; border-radius: 3px; background: var(--c); margin-right: 6px; }
.legend { display: flex; flex-wrap: wrap; gap: 2px 18px; font-size: 13px; overflow-wrap: anywhere; }
.plot { position: relative; height: 150px; margin: 12px 16px 26px 46px; } .plot.large { height: 320px; }
.plot svg { position: absolute; width: 100%; height: 100%; overflow: visible; fill: none; }
.plot span { position: absolute; font-size: 11px; line-height: 1; color: var(--soft); white-space: nowrap; }
.plot .y { right: calc(100% + 8px); transform: translateY(-50%); }
.plot .x { top: calc(100% + 8px); transform: translateX(-50%); }
path { vector-effect: non-scaling-stroke; stroke: var(--c); stroke-width: 1.5; stroke-linejoin: round; }
.axis { stroke: var(--line); stroke-width: 1; } .held { stroke-dasharray: 5 4; } .faint { opacity: 0.6; }
.dot { stroke-width: 7; stroke-linecap: round; }
.wide { overflow-x: auto; } .wide td { overflow-wrap: anywhere; min-width: 110px; vertical-align: top; }
.wide td:first-child { white-space: nowrap; min-width: 0; }
.answers { table-layout: fixed; width: 100%; min-width: calc(60px + var(--runs) * 150px); }
.answers td { white-space: pre-wrap; } .answers th:first-child { width: 60px; } .same { color: var(--soft); }
details { margin: 6px 0; } summary { overflow-wrap: anywhere; } summary h3 { color: var(--ink); }
"""


Points = list[tuple[int, float]]


def page(runs: Sequence[RunReport]) -> str:
    """The whole page of some runs."""
    tasks = sorted({key for run in runs for entry in run.metrics for key in entry if key.startswith(ACCURACY)})
    small = [(f"accuracy of {key.removeprefix(ACCURACY)}, %", key, 100.0) for key in tasks] + SMALL
    names = "".join(_chip(place, run.name) for place, run in enumerate(runs)) if len(runs) > 1 else ""
    told = (
        f'<p>Nats per supervised token, over steps. Dashed, with dots: held out.</p><div class="legend">{names}</div>'
    )
    # Once more from the middle on, where the beginning would make all of it flat.
    half = max(run.metrics[-1]["step"] for run in runs) // 2
    late = _section(f"loss from step {half:,} on", _losses(runs, half)) if half >= LATE else ""
    parts = [
        _cards(runs),
        _settings(runs) if len(runs) > 1 else "",
        _section("Loss", _losses(runs, 0, " large"), told),
        f'<div class="grid">{late}{"".join(_small(runs, *one) for one in small)}</div>',
        _answers(runs),
        _counts(runs),
        _settings(runs) if len(runs) == 1 else "",
    ]
    title = runs[0].name if len(runs) == 1 else f"{len(runs)} runs"
    return document(title, STYLE + OWN, "\n".join(filter(None, parts)))


def _section(title: str, content: str, above: str = "", kind: str = "") -> str:
    """A section of HTML, if there is something to stand in it."""
    return f"<section{kind}><h2>{escape(title)}</h2>{above}{content}</section>" if content else ""


def _chip(place: int, text: str) -> str:
    return f'<span><i class="c{place % COLOURS}"></i>{escape(text)}</span>'


def _cards(runs: Sequence[RunReport]) -> str:
    """What `k2mini report` prints, a section a run."""
    cards = ""
    for place, run in enumerate(runs):
        heading = f"<h2>{_chip(place, run.name)}</h2>" if len(runs) > 1 else ""
        cards += f"<section>{heading}{''.join(f'<p>{escape(line)}</p>' for line in run.summary.splitlines())}</section>"
    return f'<div class="grid">{cards}</div>'


def _losses(runs: Sequence[RunReport], start: int, size: str = "") -> str:
    curves: list[tuple[int, str, Points]] = []
    for place, run in enumerate(runs):
        train, held_out = ([at for at in run.series(key) if at[0] >= start] for key in ("loss", "val_loss"))
        curves += [(place, "faint" if held_out else "", _thinned(train)), (place, "held", held_out)]
    return _plot(curves, size)


def _small(runs: Sequence[RunReport], title: str, key: str, factor: float) -> str:
    """A small plot of a metric; of a benchmark's scores, from zero, with dots and what they were last."""
    found, scores = [[(step, factor * value) for step, value in run.series(key)] for run in runs], factor != 1
    last = "".join(_chip(place, f"{points[-1][1]:.1f}") for place, points in enumerate(found) if scores and points)
    curves = [(place, "dots" * scores, points if scores else _thinned(points)) for place, points in enumerate(found)]
    return _section(title, _plot(curves, floor=0.0 if scores else math.inf), f'<div class="legend">{last}</div>')


def _thinned(points: Points) -> Points:
    """At most `POINTS`: the means of neighbours, each at the last one's step."""
    size = -(-len(points) // POINTS)
    groups = [points[start : start + size] for start in range(0, len(points), size or 1)]
    return [(group[-1][0], sum(value for _, value in group) / len(group)) for group in groups]


def _plot(curves: Sequence[tuple[int, str, Points]], size: str = "", floor: float = math.inf) -> str:
    """Curves (the run's place, a kind of line, points) over one pair of axes, as SVG, with the axes' numbers around.

    The values' axis begins at `floor`, or below it. Without a point there is no plot.
    """
    every = [point for *_, points in curves for point in points]
    if not every:
        return ""
    first, last = min(step for step, _ in every), max(step for step, _ in every)
    low, high = min([floor, *(value for _, value in every)]), max(value for _, value in every)
    margin = 0.04 * (high - low) or 0.05 * abs(high) or 1.0
    low, high, last = max(low - margin, min(low, 0.0)), high + margin, max(last, first + 1)

    def x(step: float) -> float:
        return 1000 * (step - first) / (last - first)

    def y(value: float) -> float:
        return 1000 * (high - value) / (high - low)

    drawn, labels = [], []
    for tick in _ticks(low, high):
        drawn.append(f'<path class="axis" d="M0 {y(tick):.0f}H1000"/>')
        labels.append(f'<span class="y" style="top:{y(tick) / 10:.1f}%">{_number(tick)}</span>')
    for tick in _ticks(first, last, whole=True):
        labels.append(f'<span class="x" style="left:{x(tick) / 10:.1f}%">{_number(tick)}</span>')
    for place, kind, points in curves:
        colour, line = f"c{place % COLOURS}", "L".join(f"{x(step):.1f} {y(value):.1f}" for step, value in points)
        drawn.append(f'<path class="{colour} {kind}" d="M{line}"/>' if len(points) > 1 else "")
        for step, value in points if kind in ("held", "dots") or len(points) == 1 else ():
            tip = f"<title>step {step:,}: {value:.4g}</title>"
            drawn.append(f'<path class="{colour} dot" d="M{x(step):.1f} {y(value):.1f}h0">{tip}</path>')
    picture = f'<svg viewBox="0 0 1000 1000" preserveAspectRatio="none">{"".join(drawn)}</svg>'
    return f'<div class="plot{size}">{picture}{"".join(labels)}</div>'


def _ticks(low: float, high: float, *, whole: bool = False) -> list[float]:
    """Round numbers from low to high, `TICKS` or fewer."""
    step = 10.0 ** math.floor(math.log10((high - low) / TICKS))
    step *= next(factor for factor in (1, 2, 5, 10) if TICKS * step * factor >= high - low)
    step = max(step, 1.0) if whole else step
    return [step * k for k in range(math.ceil(low / step), math.floor(high / step) + 1)]


def _number(value: float) -> str:
    for factor, unit in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= factor:
            return f"{value / factor:.4g}{unit}"
    return f"{value:.3g}"


def _settings(runs: Sequence[RunReport]) -> str:
    """What differs between the configurations; what does not, and one run's, is folded."""
    keys = [key for key in dict.fromkeys(key for run in runs for key in run.config) if key != "run.dir"]
    texts = {key: [_text(run.config.get(key, "–")) for run in runs] for key in keys}
    differ = [[key, *values] for key, values in texts.items() if len(set(values)) > 1]
    same = [[key, values[0]] for key, values in texts.items() if len(set(values)) == 1]
    title, fold, shown = "Settings", "all of them", ""
    if len(runs) > 1 and keys:
        title, fold, shown = "What differs", "the same in all", "<p>The settings are the same.</p>"
    shown = table(["", *(run.name for run in runs)], differ) if differ else shown
    folded = f"<details><summary>{fold}</summary>{table([], same)}</details>" if same else ""
    return _section(title, shown + folded, kind=WIDE)


def _text(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def _answers(runs: Sequence[RunReport]) -> str:
    """Each prompt of `eval.prompts` with its answers, a row a validation and a column a run."""
    asking = [(place, run) for place, run in enumerate(runs) if run.samples]
    found: list[str] = []
    for prompt in dict.fromkeys(sample["prompt"] for _, run in asking for sample in run.samples):
        answers = [{s["step"]: s["answer"] for s in run.samples if s["prompt"] == prompt} for _, run in asking]
        last = [(list(each), len(each) - 1) for each in answers if each]
        steps = sorted({each[round(k * end / (ROWS - 1))] for each, end in last for k in range(ROWS)})
        rows = "".join(_row(steps[: place + 1], answers) for place in range(len(steps)))
        head = "".join(f"<th>{_chip(place, run.name)}</th>" for place, run in asking)
        whole = f'<table class="table answers"><tr><th>step</th>{head}</tr>{rows}</table>'
        is_open, asked = " open" if len(found) < OPEN else "", f"<summary><h3>{escape(prompt)}</h3></summary>"
        found.append(f'<details{is_open}>{asked}<div class="wide" style="--runs:{len(asking)}">{whole}</div></details>')
    how = f"Up to {ROWS} validations, the first and the last among them; all are in samples.jsonl. Grey: as before."
    return _section("Answers", "".join(found), f"<p>{how}</p>")


def _row(steps: Sequence[int], answers: Sequence[dict[int, str]]) -> str:
    """The row of the last of the steps."""
    cells = []
    for each in answers:
        shown = [each[step] for step in steps if step in each]
        same = steps[-1] in each and shown[-2:-1] == shown[-1:]
        cells.append(f"<td{' class=same' if same else ''}>{escape(each.get(steps[-1], ''))}</td>")
    return f"<tr><td>{steps[-1]:,}</td>{''.join(cells)}</tr>"


def _counts(runs: Sequence[RunReport]) -> str:
    rows = [(run.name, file, counts) for run in runs for file, counts in run.counts.items()]
    keys = list(dict.fromkeys(key for *_, counts in rows for key in counts))
    cells = [
        [name, file, *(f"{counts[key]:,}" if isinstance(counts.get(key), int) else "–" for key in keys)]
        for name, file, counts in rows
    ]
    how = "<p>Cut: an example loses the end of its answer to data.max_seq_len. Left out: it would lose all of it.</p>"
    return _section("Data", table(["run", "file", *keys], cells) if rows else "", how, WIDE)

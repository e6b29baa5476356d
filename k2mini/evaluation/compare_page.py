"""Runs of `eval` side by side as one HTML page: each task and topic, and the questions where two runs differ."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

from k2mini.evaluation.agreement import interval
from k2mini.evaluation.compare import COUNTED, Scores, ends, paired, shown
from k2mini.evaluation.report import Result
from k2mini.evaluation.scores import Key, OpenAnswer, orders_line, read_asked
from k2mini.page import STYLE, document, table
from k2mini.training.plot import short_names

MOST = 25  # questions that are shown for each direction, those that differ most; of accuracy all
OWN = """
main { max-width: 1180px; } main > p { margin-bottom: 14px; } section { margin-bottom: 14px; padding: 14px 18px; }
h2 { margin-bottom: 8px; } h3 { font-size: 15px; margin: 14px 0 4px; }
:root { --c0: #2563eb; --c1: #d9480f; --good: #1b7a4b; --bad: #b3261e; }
@media (prefers-color-scheme: dark) { :root { --c0: #7aa7ff; --c1: #ff9a5c; --good: #5fd39a; --bad: #ff8f86; } }
td b.num { font-weight: 700; } .wide { overflow-x: auto; } .wide .table { width: 100%; } .num { white-space: nowrap; }
.table tr.head td { font-weight: 500; font-size: 14px; padding-top: 14px; }
.a { --c: var(--c0); } .b { --c: var(--c1); } .good { color: var(--good); } .bad { color: var(--bad); }
details { margin: 4px 0; } details > summary { padding: 4px 0; } summary b { color: var(--ink); }
article { border-top: 1px solid var(--line); padding: 12px 0; } article ul { margin: 6px 0 0; padding-left: 20px; }
.pair { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 340px), 1fr)); gap: 10px; }
.pair > div { border-left: 3px solid var(--c); padding-left: 12px; min-width: 0; }
small { font-size: 12px; color: var(--soft); } .mark { color: var(--c); font-weight: 500; }
"""


def page(runs: Sequence[Path], found: Sequence[dict[str, Any]], scores: Sequence[Scores]) -> str:
    """The whole page of runs, what `compare` found of them, and their scores, of which it did."""
    names = short_names(map(str, runs))
    asked = [read_asked(run) for run in runs]
    models = [[name, entry["model"]] for name, entry in zip(names, found[0]["runs"], strict=True)]
    number = sum(len(task["runs"]) - 1 for task in found)
    told = (
        f"<p>The runs are compared with the first, {escape(names[0])}, question by question, with 95 % intervals. "
        f"p: McNemar's exact test of accuracies, the paired bootstrap of other scores; corrected for all {number} "
        "comparisons of this page by Holm's method. Bold: below 0.05 when corrected. "
        f"{COUNTED[0].upper()}{COUNTED[1:]}.</p>"
    )
    parts = [f"{told}<section class='wide'><h2>Runs</h2>{table(['run', 'model'], models)}</section>"]
    parts.append(f"<section class='wide'><h2>Scores</h2>{_scores(found, names)}</section>")
    for name in dict.fromkeys(task["task"] for task in found):
        content = ""
        for each in (task for task in found if task["task"] == name):
            values = paired([score[name, each["measure"]] for score in scores], each["measure"])
            content += f"<h3>{escape(each['measure'])}</h3>{_topics(name, values, asked[0], names)}"
            most = len(values) if each["measure"] == "accuracy" else MOST
            for place in range(1, len(runs)):
                pairs = [(key, own[place] - own[0]) for key, own in values.items()]
                content += _differences(name, pairs, (asked[0], asked[place]), (names[0], names[place]), most)
        parts.append(f"<section><h2>{escape(name)}: where they differ</h2>{content}</section>")
    return document(f"{len(runs)} runs compared", STYLE + OWN, "\n".join(parts))


def _scores(found: Sequence[dict[str, Any]], names: Sequence[str]) -> str:
    rows = ""
    for task in found:
        of_measure = f"{task['task']}, {task['measure']} ({task['n']:,} questions)"
        of_measure += f"; {orders_line(task['orders'])}" if "orders" in task else ""
        rows += f'<tr class="head"><td colspan="4">{escape(of_measure)}</td></tr>'
        for place, (name, entry) in enumerate(zip(names, task["runs"], strict=True)):
            cells = [escape(name), f'<span class="num">{shown(entry)}</span>', "", ""]
            if place:
                form, unit = ("+.1%", " points") if task["measure"] == "accuracy" else ("+.3f", "")
                between = ends(entry["difference_low"], entry["difference_high"], form)
                cells[2] = f'<span class="num">{entry["difference"]:{form}}{unit} ({between})</span>'.replace("%", "")
                tag = "b" if entry["p_holm"] < 0.05 else "span"
                cells[3] = f'<{tag} class="num">{entry["p"]:.3g} ({entry["p_holm"]:.3g})</{tag}>'
            rows += "<tr>" + "".join(f"<td>{cell}</td>" for cell in cells) + "</tr>"
    head = "".join(f"<th>{name}</th>" for name in ("run", "score", "difference from the first", "p (corrected)"))
    return f'<table class="table"><tr>{head}</tr>{rows}</table>'


def _topics(
    task: str, values: Mapping[Key, Sequence[float]], asked: Mapping[Any, OpenAnswer | Result], names: Sequence[str]
) -> str:
    """A row a topic, where results have one; differences with intervals, and no tests of so many small groups."""
    groups: dict[str, list[Sequence[float]]] = {}
    for key, own in values.items():
        if topic := getattr(asked.get((task, key)), "topic", ""):
            groups.setdefault(topic, []).append(own)
    rows = []
    for topic, group in sorted(groups.items()):
        row = [topic, f"{len(group):,}"]
        for place in range(len(names)):
            row.append(f"{sum(own[place] for own in group) / len(group):.3f}")
            if place:
                difference, low, high = interval([own[place] - own[0] for own in group])
                row[-1] += f"  ({difference:+.3f}; {ends(low, high, '+.3f')})"
        rows.append(row)
    return f'<div class="wide">{table(["topic", "n", *names], rows)}</div>' if rows else ""


def _differences(
    task: str,
    pairs: Sequence[tuple[Key, float]],
    asked: Sequence[Mapping[Any, OpenAnswer | Result]],
    names: tuple[str, str],
    most: int,
) -> str:
    """Folded lists of the questions that one run answers better than the other, and the other way round."""
    lists = ""
    for sign, kind, what in ((1, "good", "better"), (-1, "bad", "worse")):
        own = sorted((pair for pair in pairs if sign * pair[1] > 0), key=lambda pair: -abs(pair[1]))
        articles = "".join(
            _question(asked[0][task, key], asked[1][task, key], value, names)
            for key, value in own[:most]
            if (task, key) in asked[0] and (task, key) in asked[1]
        )
        rest = f"; the {most} that differ most" if len(own) > most else ""
        said = f"<b>{escape(names[1])}</b> is <span class='{kind}'>{what}</span> than {escape(names[0])}"
        lists += f"<details><summary>{said}: {len(own):,} questions{rest}</summary>{articles}</details>" if own else ""
    return lists or f"<p>{escape(names[1])} and {escape(names[0])} do not differ in any question.</p>"


def _question(first: Result | OpenAnswer, second: Result | OpenAnswer, value: float, names: tuple[str, str]) -> str:
    both = tuple(zip("ab", names, (first, second), strict=True))
    content = f"<small>{value:+.3f}</small>"
    if isinstance(first, OpenAnswer):
        content += f'<details><summary>Reference</summary><div class="said">{escape(first.reference)}</div></details>'
        content += '<div class="pair">'
        for kind, name, asked in both:
            said = escape(asked.answer) or "no text"
            content += f'<div class="{kind}"><small>{escape(name)}</small><div class="said">{said}</div></div>'
        return f'<article><div class="said">{escape(first.question)}</div>{content}</div></article>'
    # An older k2mini kept neither the text nor the options.
    labels = first.labels or sorted({first.answer, *(str(getattr(asked, "prediction", "")) for *_, asked in both)})
    content = f"<small>{escape(first.topic)}</small>" if first.topic else ""
    content += f'<div class="said">{escape(first.question or f"Question {first.index}")}</div><ul>'
    for label, text in zip(labels, first.choices or labels, strict=True):
        marks = " <b class='good'>✓ key</b>" if label == first.answer else ""
        for kind, name, asked in both:
            chosen = getattr(asked, "prediction", None) == label
            marks += f' <span class="mark {kind}">← {escape(name)}</span>' if chosen else ""
        content += f"<li>{escape(text if text == label else f'{label}. {text}')}{marks}</li>"
    return f"<article>{content}</ul></article>"

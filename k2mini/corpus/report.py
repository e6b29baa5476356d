"""A corpus as one HTML page: what each filter left, lengths, years, licences, documents that were kept and dropped."""

from __future__ import annotations

import json
import random
from collections.abc import Iterable, Sequence
from html import escape
from itertools import islice
from pathlib import Path
from typing import Any

from k2mini.corpus.shards import MANIFEST, REJECTED, read_manifest
from k2mini.page import STYLE, document

NEEDED = ("inputs", "counts", "documents", "words", "licences", "years", "lengths")  # beside what any reader needs
SAMPLES = 10  # documents shown of each fate
BEGINNING = 500  # characters shown of each
OWN = """
section { margin: 14px 0 0; } h2 { margin-bottom: 6px; } h3 { font-size: 14px; font-weight: 500; margin: 8px 0 0; }
.grid { display: grid; gap: 0 14px; grid-template-columns: repeat(auto-fit, minmax(min(100%, 330px), 1fr)); }
.bars { font-size: 13px; width: 100%; } .bars td { padding: 2px 12px 2px 0; white-space: nowrap; }
.bars td:not(:first-child) { text-align: right; } .bars td:last-child { width: 99%; padding: 0; }
i { display: block; height: 14px; background: hsl(var(--down)); border-radius: 2px; }
summary { margin-top: 8px; } h3, p { overflow-wrap: anywhere; }
"""


def page(directory: Path) -> str:
    """The whole page of a corpus, with the same samples each time. Raises ValueError where it is none."""
    manifest = read_manifest(directory)
    if missing := [key for key in NEEDED if key not in manifest]:
        raise ValueError(f"{directory / MANIFEST} is damaged: it has no {missing[0]}")
    inputs, steps = manifest["inputs"], manifest["counts"]
    funnel = [(step["filter"], step["in"] - step["dropped"], step["dropped"], step["changed"]) for step in steps]
    years = [(year or "unknown", number) for year, number in manifest["years"].items()]
    lengths = [(f"below {int(words):,}", number) for words, number in manifest["lengths"].items()]
    licences = [(name or "none", n) for name, n in sorted(manifest["licences"].items(), key=lambda each: -each[1])]
    kept = f"{manifest['documents']:,} documents, {manifest['words']:,} words in {len(manifest['shards'])} shards"
    made = f"of {inputs['files']:,} files, {inputs['bytes'] / 1e6:,.1f} MB; thresholds and versions are in {MANIFEST}"
    parts = [
        f"<p>{kept}, {made}. Fingerprint {escape(manifest['fingerprint'])}</p>",
        _section("What each filter left", _bars(funnel, ("filter", "left", "dropped", "changed"))),
        '<div class="grid">',
        _section("Words of a document", _bars(lengths, ("words", "documents"))),
        _section("Years", _bars(years, ("year", "documents"))),
        _section("Licences", _bars(licences[:20], ("licence", "documents"))),
        "</div>",
        _section("Documents", _samples(directory, manifest, random.Random(manifest["fingerprint"]))),
    ]
    return document(f"Corpus {directory.name}", STYLE + OWN, "\n".join(parts))


def _section(title: str, content: str) -> str:
    return f"<section><h2>{escape(title)}</h2>{content}</section>"


def _bars(rows: Sequence[tuple[Any, ...]], head: Sequence[str]) -> str:
    """A table whose second column is drawn, too."""
    most = max((row[1] for row in rows), default=0) or 1
    cells = [
        "".join(f"<td>{escape(cell if isinstance(cell, str) else f'{cell:,}')}</td>" for cell in row)
        + f'<td><i style="width:{100 * row[1] / most:.2f}%"></i></td>'
        for row in rows
    ]
    names = "".join(f"<th>{escape(name)}</th>" for name in head)
    return f'<table class="bars"><tr>{names}</tr>{"".join(f"<tr>{row}</tr>" for row in cells)}</table>'


def _samples(directory: Path, manifest: dict[str, Any], draw: random.Random) -> str:
    """Some documents that were kept, and some of each filter's, folded."""
    picked = sorted(draw.sample(range(manifest["documents"]), min(SAMPLES, manifest["documents"])))
    lines = (line for shard in manifest["shards"] for line in (directory / shard["name"]).open(encoding="utf-8"))
    kept = [json.loads(line) for line in _at(lines, picked)]
    fates: dict[str, tuple[int, list[dict[str, Any]]]] = {"kept": (manifest["documents"], kept)}
    with (directory / REJECTED).open(encoding="utf-8") as file:
        for line in file:
            record = json.loads(line)
            number, chosen = fates.get(record["filter"], (0, []))
            if number < SAMPLES:
                chosen.append(record)
            elif (place := draw.randrange(number + 1)) < SAMPLES:  # each of them with the same chance
                chosen[place] = record
            fates[record["filter"]] = number + 1, chosen
    return "".join(_folded(f"{name}: {number:,}", chosen) for name, (number, chosen) in fates.items())


def _at(lines: Iterable[str], places: Sequence[int]) -> Iterable[str]:
    rest, before = iter(lines), 0
    for place in places:
        yield from islice(rest, place - before, place - before + 1)
        before = place + 1


def _folded(title: str, records: Sequence[dict[str, Any]]) -> str:
    shown = ""
    for record in records:
        said = "; of ".join(filter(None, (record.get("reason"), record.get("of"))))
        text = record.get("text", record.get("beginning", ""))[:BEGINNING]
        shown += f"<h3>{escape(record['source'])}</h3><p>{escape(said)}</p><pre>{escape(text)}</pre>"
    return f"<details><summary>{escape(title)}</summary>{shown}</details>"

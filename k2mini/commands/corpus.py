"""The command `corpus`: papers and documents into clean text."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from k2mini.corpus.group import Settings

# What a corpus is made with; merge and --report take none of it.
MAKING = ["workers", "marks", "text_field", "set", "without", "near_duplicates", "decontaminate", "contaminated"]
MAKING += ["grobid", "part"]


def corpus_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of `corpus`."""
    from k2mini.commands.common import LIST
    from k2mini.corpus.near import THRESHOLD

    add, files = parser.add_argument, ".pdf, .html, .xml (TEI, JATS), .md, .txt, .jsonl, .csv, .tsv (or .gz), folders"
    add("inputs", nargs="*", metavar="IN", help=f"{files}; or merge PART … (a folder of that name is ./merge)")
    add("--out", required=True, type=Path, metavar="DIR", help="what is written, a new directory; of --report, a page")
    add("--force", action="store_true", help="replace it, once what replaces it is complete")
    add("--workers", type=int, metavar="N", default=1, help="files read at a time (default: 1)")
    add("--marks", choices=("k2", "none"), default="none", help="K2's marks of citations, figures, … (default: none)")
    add("--text-field", default="text", metavar="NAME", help="the field or column of the text (default: text)")
    add("--set", **LIST, default=[], metavar="filter.key=value", help="another threshold; corpus.json has all of them")
    add("--without", **LIST, default=[], metavar="FILTER", help="filters that are not run")
    what = "similarity from which on two are one"
    add("--near-duplicates", type=float, default=THRESHOLD, metavar="S", help=f"{what}, 0 to 1 (default: {THRESHOLD})")
    what = "benchmarks whose questions no document may hold"
    add("--decontaminate", **LIST, default=[], type=Path, metavar="FILE", help=what)
    what = "what is done with one that does: drop it, or cut its paragraph (default: drop)"
    add("--contaminated", choices=("drop", "cut"), default="drop", help=what)
    add("--grobid", default="", metavar="URL", help="have a GROBID read the PDFs: http://127.0.0.1:8070")
    add("--part", metavar="K/N", help="make the K-th of N parts, such as 1/3; `merge` makes a corpus of all of them")
    add("--report", type=Path, metavar="DIR", help="draw the corpus DIR as one page: --out FILE.html")
    add("--json", action="store_true", help="print the manifest")
    parser.set_defaults(run=run_corpus, default={name: parser.get_default(name) for name in MAKING})


def run_corpus(options: argparse.Namespace) -> None:
    """Make a corpus or a part of one, merge parts, or draw a corpus; print what is in it."""
    from k2mini.corpus.build import build
    from k2mini.corpus.merge import merge

    inputs, is_merge = [Path(name) for name in options.inputs], options.inputs[:1] == ["merge"]
    given = [name.replace("_", "-") for name in MAKING if getattr(options, name) != options.default[name]]
    if given and (is_merge or options.report is not None):
        raise ValueError(f"--{given[0]} is for making a corpus or its parts, not for merge and --report")
    if options.report is not None:
        return _report(options)
    if is_merge:
        if len(inputs) < 2:
            raise ValueError("merge needs parts: k2mini corpus merge PART … --out DIR")
        manifest = merge(inputs[1:], options.out, force=options.force)
    elif inputs:
        part, more = _part(options.part), {"workers": options.workers, "force": options.force}
        manifest = build(inputs, options.out, _settings(options), part=part, **more)
    else:
        raise ValueError("name files or folders to read: k2mini corpus IN … --out DIR")
    print(json.dumps(manifest, ensure_ascii=False) if options.json else describe(manifest))


def _settings(options: argparse.Namespace) -> Settings:
    from k2mini.corpus.clean import choose
    from k2mini.corpus.group import Settings

    if not 0 < options.near_duplicates <= 1:
        raise ValueError(f"--near-duplicates must be above 0 and at most 1, not {options.near_duplicates}")
    return Settings(
        choose(options.set, options.without),
        options.marks,
        options.text_field,
        options.near_duplicates,
        options.decontaminate,
        options.contaminated,
        options.grobid,
    )


def _part(text: str | None) -> tuple[int, int] | None:
    """'2/16' -> (2, 16)."""
    k, _, n = (text or "1/1").partition("/")
    if not (k.isdecimal() and n.isdecimal() and 1 <= int(k) <= int(n)):
        raise ValueError(f"--part must be K/N with K from 1 to N, such as 2/16, not {text!r}")
    return (int(k), int(n)) if text is not None else None


def _report(options: argparse.Namespace) -> None:
    from k2mini.corpus.report import page
    from k2mini.files import output, write_text

    if options.out.suffix.lower() not in (".html", ".htm"):
        raise ValueError(f"--out {options.out}: a page's name ends in .html")
    if options.inputs:
        raise ValueError(f"--report draws the corpus {options.report}; {options.inputs[0]} is one too many")
    with output(options.out, file=True, force=options.force):
        write_text(options.out, page(options.report))
    print(options.out)


def describe(manifest: dict[str, Any]) -> str:
    """A manifest, of a corpus or a part, as lines for the terminal."""
    if "groups" in manifest:
        k, n = manifest["part"]
        return f"part {k} of {n}: {len(manifest['groups']):,} groups of files; k2mini corpus merge joins the parts"
    steps = manifest["counts"]
    lines = [f"{s['filter']}: {s['in']:,} in, {s['dropped']:,} dropped, {s['changed']:,} changed" for s in steps]
    kept = f"{manifest['documents']:,} documents, {manifest['words']:,} words in {len(manifest['shards'])} shards"
    return "\n".join([*lines, f"kept: {kept}"])

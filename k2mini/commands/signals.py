"""The command `signals`: instruction data out of what a corpus and tables state."""

from __future__ import annotations

import argparse
import json
import logging
from collections import Counter
from contextlib import ExitStack
from dataclasses import fields
from pathlib import Path

from k2mini.commands.common import LIST

log = logging.getLogger("k2mini.commands")

EXAMPLE = """
A table says what its rows are about in a column `name`, `entity` or `term`; every other column is a property:
    name,hardness,synonym
    quartz,7,rock crystal
This gives `fact` (What is the hardness of quartz? 7), `true_false`, `choice` and, by its column's name, `synonym`, as
`broader` and `definition` would be. With the columns `property` and `value`, a row is a fact.
    k2mini signals corpus tables --out geosignal.json --held-out 20 --questions asked.json
names no entity of a random fifth in geosignal.json, which `finetune` reads; asked_unseen.json asks about them, and
asked_seen.json about the others: `k2mini eval --benchmark asked_seen.json asked_unseen.json`.
"""


def signals_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of `signals`."""
    from k2mini.corpus.signals import TASKS, Settings

    parser.add_argument("folders", nargs="+", type=Path, metavar="DIR", help="a corpus, a folder of CSV and TSV, both")
    parser.add_argument("--out", required=True, type=Path, metavar="FILE", help="the instructions, a JSON list")
    parser.add_argument(
        "--questions", type=Path, metavar="Q.json", help="write Q_seen.json and Q_unseen.json, for eval"
    )
    parser.add_argument("--force", action="store_true", help="replace files that exist")
    parser.add_argument("--tasks", **LIST, metavar="TASK", help=f"of {', '.join(TASKS)} (default: all)")
    for option, kind, metavar, what in (
        ("--held-out", float, "PERCENT", "of the tables' entities, which no instruction names"),
        ("--most-per-task", int, "N", "records of a task, drawn by the seed"),
        ("--most-per-document", int, "N", "records of a document, drawn by the seed"),
        ("--phrasings", int, "N", "ask for a fact up to N times, each time in other words"),
        ("--seed", int, "N", "of all that is drawn"),
    ):
        default = getattr(Settings, option[2:].replace("-", "_"))
        parser.add_argument(option, type=kind, default=default, metavar=metavar, help=f"{what} (default: {default:g})")
    parser.add_argument("--entity", metavar="COLUMN", help="what a table's rows are about, where it has another name")
    answers = "what the answers of fact, true_false and choice begin with, as eval is told by the same option"
    parser.add_argument("--answer-prefix", default="", metavar="TEXT", help=answers)
    parser.add_argument("--json", action="store_true", help="print the counts of each task and nothing else")
    parser.formatter_class, parser.epilog = argparse.RawDescriptionHelpFormatter, EXAMPLE
    parser.set_defaults(run=run_signals)


def run_signals(options: argparse.Namespace) -> None:
    """Write the instructions and, where asked for, the questions; say what there is of each task, and what is not."""
    from k2mini.corpus.signals import TASKS, Settings, Signals
    from k2mini.files import output, write_text

    options.tasks = options.tasks or TASKS
    settings = Settings(**{field.name: getattr(options, field.name) for field in fields(Settings)})
    asked: Path | None = options.questions
    places = {name: asked.with_name(f"{asked.stem}_{name}{asked.suffix}") for name in ("seen", "unseen") if asked}
    if options.out in places.values():
        raise ValueError(f"{options.out} is one of the files of --questions; name another")
    with ExitStack() as stack:
        for path in (options.out, *places.values()):
            stack.enter_context(output(path, force=options.force, file=True, inputs=options.folders))
        signals = Signals(options.folders, settings)
        lines = [json.dumps(record, ensure_ascii=False) for record in signals.records]
        texts = {places[name]: json.dumps(signals.questions(name), ensure_ascii=False) + "\n" for name in places}
        for path, text in {**texts, options.out: "[\n" + ",\n".join(lines) + "\n]\n"}.items():
            write_text(path, text)
    written = Counter(record["task"] for record in signals.records)
    counts = {task: {"records": written[task], **dropped} for task, dropped in signals.counts.items()}
    for task, numbers in counts.items():
        said = [f"{number} {what}" for what, number in numbers.items() if number]
        log.info("%s: %s", task, ", ".join(said) or "no source states any")
    for name, number in signals.blocked.most_common(1):
        log.info("held out: %s alone keeps out %d records that name it", name, number)
    print(json.dumps(counts) if options.json else options.out)

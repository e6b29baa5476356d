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
A table that says what its rows are about in a column `name`, `entity` or `term`, such as minerals.csv:
    name,hardness,synonym
    quartz,7,rock crystal
gives `fact` (What is the hardness of quartz? 7), `true_false`, `choice` and `synonym`; columns `property` and `value`
are read as facts a row, `definition` and `broader` as those of a glossary. A corpus of `k2mini corpus` gives the rest.
    k2mini signals corpus tables --out geosignal.json --held-out 20 --questions asked.json
keeps a fifth of the entities out of geosignal.json, which `finetune` reads, and asks about them in asked_unseen.json,
and about the others in asked_seen.json, for `k2mini eval --benchmark asked_seen.json asked_unseen.json`.
"""


def signals_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options of `k2mini signals`."""
    from k2mini.corpus.signals import TASKS, Settings

    def number(option: str, kind: type, metavar: str, what: str) -> None:
        default = getattr(Settings, option[2:].replace("-", "_"))
        parser.add_argument(option, type=kind, default=default, metavar=metavar, help=f"{what} (default: {default})")

    parser.add_argument("folders", nargs="+", type=Path, metavar="DIR", help="a corpus, a folder of CSV and TSV, both")
    parser.add_argument("--out", required=True, type=Path, metavar="FILE.json", help="the instructions")
    parser.add_argument("--questions", type=Path, metavar="FILE.json", help="FILE_seen.json, FILE_unseen.json for eval")
    parser.add_argument("--force", action="store_true", help="replace files that exist")
    parser.add_argument("--tasks", **LIST, metavar="TASK", help=f"some of {', '.join(TASKS)} (default: all)")
    number("--held-out", float, "PERCENT", "of the tables' entities, which no instruction may name")
    number("--most-per-task", int, "N", "records of a task, drawn by the seed")
    number("--most-per-document", int, "N", "records of a document, drawn by the seed")
    number("--phrasings", int, "N", "ask for a fact up to N times")
    number("--seed", int, "N", "of all that is drawn")
    parser.add_argument("--entity", metavar="COLUMN", help="what a table's rows are about, where it has another name")
    parser.add_argument("--answer-prefix", default="", metavar="TEXT", help="before the answers of fact, true_false, "
                        "choice, as eval's option of that name says")  # fmt: skip
    parser.add_argument("--json", action="store_true", help="print the counts of each task as JSON")
    parser.formatter_class, parser.epilog = argparse.RawDescriptionHelpFormatter, EXAMPLE
    parser.set_defaults(run=run_signals)


def run_signals(options: argparse.Namespace) -> None:
    """Write the instructions and, where asked for, the questions; say what there is of each task."""
    from k2mini.corpus.signals import TASKS, Settings, Signals
    from k2mini.files import output, write_text

    options.tasks = options.tasks or TASKS
    settings = Settings(**{field.name: getattr(options, field.name) for field in fields(Settings)})
    asked, files = options.questions, {}
    places = {name: asked.with_name(f"{asked.stem}_{name}{asked.suffix}") for name in ("seen", "unseen") if asked}
    with ExitStack() as stack:
        for path in (options.out, *places.values()):
            stack.enter_context(output(path, force=options.force, file=True, inputs=options.folders))
        signals = Signals(options.folders, settings)
        files[options.out] = (
            "[\n" + ",\n".join(json.dumps(one, ensure_ascii=False) for one in signals.records) + "\n]\n"
        )
        files |= {
            path: json.dumps(signals.questions(name), ensure_ascii=False, indent=1) + "\n"
            for name, path in places.items()
        }
        for path, text in files.items():
            write_text(path, text)
    written = Counter(record["task"] for record in signals.records)
    counts = {task: {"records": written[task], **dropped} for task, dropped in signals.counts.items()}
    for task, numbers in counts.items():
        log.info(
            "%s: %s",
            task,
            ", ".join(f"{number} {what}" for what, number in numbers.items() if number or what == "records"),
        )
    print(json.dumps(counts) if options.json else options.out)

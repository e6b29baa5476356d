"""The command `rate`."""

from __future__ import annotations

import argparse
import json
import logging
from pathlib import Path

from k2mini.commands.common import DEBUG, LIST

log = logging.getLogger("k2mini.commands")


def rate_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of `rate make` and `rate read`."""
    actions = parser.add_subparsers(dest="action", metavar="ACTION", required=True)
    make = actions.add_parser("make", help="a page for raters, offline and blind", parents=[DEBUG])
    make.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="--out of eval, with answers to open tasks")
    make.add_argument("--out", required=True, type=Path, metavar="FILE.html", help="the page; its key stands beside it")
    make.add_argument("--sample", type=int, default=50, metavar="N", help="questions on the page (default: 50, as K2)")
    make.add_argument("--tasks", **LIST, default=[], metavar="TASK", help="such as npee/noun (default: all open ones)")
    make.add_argument("--seed", type=int, default=0, metavar="N", help="of the questions (default: 0)")
    make.add_argument("--force", action="store_true", help="replace a page that exists, and its key")
    make.set_defaults(run=run_rate_make)
    read = actions.add_parser("read", help="what raters' files come to; also kept in the runs", parents=[DEBUG])
    read.add_argument("files", nargs="+", type=Path, metavar="FILE.csv", help="what the page exported, one a rater")
    read.add_argument("--key", type=Path, metavar="FILE", help="the page's key (default: beside the files, or here)")
    read.add_argument("--json", action="store_true", help="print it as JSON and nothing else")
    read.set_defaults(run=run_rate_read)


def run_rate_make(options: argparse.Namespace) -> None:
    """Write the page and its key."""
    from k2mini.evaluation.rate import key_path, make_page
    from k2mini.files import output

    page, key = options.out, key_path(options.out)
    if page.suffix.lower() not in (".html", ".htm"):
        raise ValueError(f"--out {page}: a page's name ends in .html")
    if options.sample < 1:
        raise ValueError(f"--sample must be at least 1, not {options.sample}")
    wanted = {"file": True, "force": options.force, "inputs": options.runs}
    with output(page, **wanted), output(key, **wanted):
        made = make_page(options.runs, page, sample=options.sample, seed=options.seed, tasks=options.tasks)
    questions = len({name[:-1] for name in made["items"]})
    log.info("%d questions, %d answers; send raters the page, which names no model", questions, len(made["items"]))
    log.info("%s says whose answer is whose: keep it here, rate read needs it", key)
    print(page)


def run_rate_read(options: argparse.Namespace) -> None:
    """Say what raters gave, and keep it in the runs."""
    from k2mini.evaluation.rate import find_key, ratings_table, read_ratings, summarise, write_ratings

    path, key = find_key(options.files, options.key)
    ratings = read_ratings(options.files, key)
    found = summarise(key, ratings)
    runs = write_ratings(path.parent, key, ratings)
    print(json.dumps(found, ensure_ascii=False) if options.json else ratings_table(found))
    log.info("kept in scores_people_%s.jsonl of each run; k2mini compare %s", key["page"], " ".join(map(str, runs)))

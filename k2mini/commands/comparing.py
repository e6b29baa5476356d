"""The command `compare`."""

from __future__ import annotations

import argparse
import json
from pathlib import Path


def compare_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of `compare`."""
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="--out of eval; compared with the first")
    parser.add_argument("--chart", type=Path, metavar="FILE.png", help="draw the accuracies (extra: plot)")
    parser.add_argument("--html", type=Path, metavar="FILE.html", help="one page: tasks, topics, where answers differ")
    parser.add_argument("--force", action="store_true", help="replace FILE.png or FILE.html")
    parser.add_argument("--json", action="store_true", help="print it as JSON and nothing else")
    parser.set_defaults(run=run_compare)


def run_compare(options: argparse.Namespace) -> None:
    """Runs of `eval` side by side."""
    from k2mini.errors import check_picture
    from k2mini.evaluation.compare import compare, comparison_table, draw
    from k2mini.evaluation.compare_page import page
    from k2mini.evaluation.scores import read_scores
    from k2mini.files import output, write_text

    if options.chart is not None:
        check_picture(options.chart)
    if options.html is not None and options.html.suffix.lower() not in (".html", ".htm"):
        raise ValueError(f"--html {options.html}: a page's name ends in .html")
    wanted = {"file": True, "force": options.force, "inputs": options.runs}
    with output(options.chart, **wanted), output(options.html, **wanted):
        scores = [read_scores(run) for run in options.runs]
        found = compare(options.runs, scores)
        print(json.dumps(found) if options.json else comparison_table(found))
        if options.chart is not None:
            draw(found, options.chart)
        if options.html is not None:
            write_text(options.html, page(options.runs, found, scores))

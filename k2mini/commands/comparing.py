"""The command `compare`."""

from __future__ import annotations

import argparse
import json
from pathlib import Path


def compare_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of `compare`."""
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="--out of eval; compared with the first")
    parser.add_argument("--chart", type=Path, metavar="FILE.png", help="draw the accuracies (extra: plot)")
    parser.add_argument("--force", action="store_true", help="replace FILE.png")
    parser.add_argument("--json", action="store_true", help="print it as JSON and nothing else")
    parser.set_defaults(run=run_compare)


def run_compare(options: argparse.Namespace) -> None:
    """Runs of `eval` side by side."""
    from k2mini.errors import check_picture
    from k2mini.evaluation.compare import compare, comparison_table, draw
    from k2mini.files import output

    if options.chart is not None:
        check_picture(options.chart)
    with output(options.chart, file=True, force=options.force, inputs=options.runs):
        found = compare(options.runs)
        print(json.dumps(found) if options.json else comparison_table(found))
        if options.chart is not None:
            draw(found, options.chart)

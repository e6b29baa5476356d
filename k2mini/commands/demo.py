"""The command `demo`."""

from __future__ import annotations

import argparse
import json
import logging

from k2mini.commands.common import set_threads
from k2mini.demo import pipeline
from k2mini.demo.report import answer_table, stage_table

log = logging.getLogger("k2mini.commands")


def run_demo(options: argparse.Namespace) -> None:
    """The pipeline in miniature."""
    set_threads(options)
    report = pipeline.run_demo(options.out, seed=options.seed, quick=options.quick, control=options.control)
    if options.json:
        print(json.dumps(report, ensure_ascii=False))
        return
    print(stage_table(report["stages"]))
    print()
    print(answer_table(report["answers"]))
    print(f"\n{report['seconds']:.0f} s; all of it is in {options.out}, with the commands of every stage in report.md")

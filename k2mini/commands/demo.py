"""The command `demo`."""

from __future__ import annotations

import argparse
import json
from pathlib import Path


def demo_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of `demo`."""
    parser.add_argument("--out", type=Path, default=Path("runs/demo"), metavar="DIR", help="default: runs/demo")
    parser.add_argument(
        "--seed", type=int, default=0, metavar="N", help="of the training, not of the facts (default: 0)"
    )
    parser.add_argument("--threads", type=int, metavar="N", help="CPU threads (default: PyTorch's choice)")
    parser.add_argument("--control", action="store_true", help="also tune the base without further pretraining")
    parser.add_argument("--lora", action="store_true", help="also learn the documents by LoRA alone, for comparison")
    parser.add_argument("--quick", action="store_true", help="every stage in under a minute; it learns next to nothing")
    parser.add_argument("--json", action="store_true", help="print report.json and nothing else")
    parser.set_defaults(run=run_demo)


def run_demo(options: argparse.Namespace) -> None:
    """Run the whole pipeline in miniature, and print what each stage has learnt."""
    from k2mini.build import set_threads
    from k2mini.demo import pipeline
    from k2mini.demo.report import answer_table, stage_table

    set_threads(options.threads)
    wanted = {name: getattr(options, name) for name in ("seed", "quick", "control", "lora")}
    report = pipeline.run_demo(options.out, **wanted)
    if options.json:
        print(json.dumps(report, ensure_ascii=False))
        return
    print(stage_table(report["stages"]))
    print()
    print(answer_table(report["answers"]))
    print(f"\n{report['seconds']:.0f} s; all of it is in {options.out}, with the commands of every stage in report.md")

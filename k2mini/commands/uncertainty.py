"""Of the command `eval`: how far its figures can be relied on."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from k2mini.distributed import World

ROBUST = "ask K times more, options shuffled by --seed, phrases changed: the spread, and the choices that stay"
CHART = "draw how often answers are right over how sure the model is (extra: plot)"
ARGUMENTS: dict[str, dict[str, Any]] = {
    "--robust": {"type": int, "metavar": "K", "help": ROBUST},
    "--chart": {"type": Path, "metavar": "FILE.png", "help": CHART},
    "--force": {"action": "store_true", "help": "replace FILE.png"},
}


def check_uncertainty(options: argparse.Namespace, questions: Sequence[Any]) -> None:
    """Raise ValueError, before the long run, where it can't be done."""
    from k2mini.errors import check_picture
    from k2mini.files import check_output

    if options.robust is not None and options.robust < 1:
        raise ValueError(f"--robust must be at least 1, not {options.robust}")
    if not questions:
        raise ValueError("--robust and --chart are of multiple-choice questions, and there are none to ask")
    if options.chart is not None:
        check_picture(options.chart)
        check_output(options.chart, file=True, force=options.force, inputs=options.benchmark)


def add_uncertainty(options: argparse.Namespace, report: dict[str, Any], world: World, *asked: Any) -> None:
    """Add what `run_robust`, which gets `asked`, finds to the report's tasks, and draw what `--chart` names."""
    from k2mini.evaluation.reliability import draw_reliability
    from k2mini.evaluation.robust import run_robust

    if options.robust is not None:
        spread = run_robust(*asked, repeats=options.robust, out=options.out, world=world)
        report["tasks"] = [row | {"robust": spread[row["task"]]} for row in report["tasks"]]
    if options.chart is not None and world.is_main:
        draw_reliability(report["tasks"], options.chart)

"""Of the command `eval`: how far its figures can be relied on, `--robust` and `--chart`."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from k2mini.data.tokenizer import Tokenizer
    from k2mini.evaluation.benchmarks import Question
    from k2mini.evaluation.instances import EvalConfig
    from k2mini.evaluation.report import Result
    from k2mini.evaluation.score import OtherModel
    from k2mini.nn.llama import Llama

ARGUMENTS: dict[str, dict[str, Any]] = {
    "--robust": {
        "type": int,
        "metavar": "K",
        "help": "ask K times more, options shuffled by --seed, phrases changed: the spread, and the choices that stay",
    },
    "--chart": {
        "type": Path,
        "metavar": "FILE.png",
        "help": "draw how often answers are right over how sure the model is (extra: plot)",
    },
    "--force": {"action": "store_true", "help": "replace FILE.png"},
}


def check_uncertainty(options: argparse.Namespace, questions: Sequence[Question]) -> None:
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


def add_uncertainty(
    options: argparse.Namespace,
    report: dict[str, Any],
    results: Sequence[Result],
    model: Llama | OtherModel,
    tokenizer: Tokenizer,
    questions: Sequence[Question],
    config: EvalConfig,
) -> None:
    """Add what `--robust` finds to the report's tasks, and draw what `--chart` asks for."""
    from k2mini.evaluation.reliability import draw_reliability
    from k2mini.evaluation.robust import run_robust
    from k2mini.files import output

    if options.robust is not None:
        told: Any = {"repeats": options.robust, "out": options.out}
        spread = run_robust(model, tokenizer, questions, results, config, **told)
        report["tasks"] = [row | {"robust": spread[row["task"]]} for row in report["tasks"]]
    if options.chart is not None:
        with output(options.chart, file=True, force=options.force, inputs=options.benchmark):
            draw_reliability(report["tasks"], options.chart)

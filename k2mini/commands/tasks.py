"""The options of `eval` for tasks beside GeoBench, and what they read."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from k2mini.commands.common import LIST

if TYPE_CHECKING:
    from k2mini.evaluation.benchmarks import Question
    from k2mini.evaluation.subjective import Pair

    Pairs = dict[str, Sequence[Pair]]
    Asked = tuple[list[Question], Pairs, Path]


class PrintTasks(argparse.Action):
    """`--list`, for which no model is needed."""

    def __call__(self, parser: argparse.ArgumentParser, *_: Any) -> NoReturn:
        from k2mini.evaluation.tasks import listed

        print(listed())
        parser.exit()


_FIELDS = "what JSON, JSONL, CSV or TSV calls these: question=stem,choices=A+B+C,answer=key; no choices: an open task"
_CORPUS = "the model's training text, of `corpus` or `prepare`: was the benchmark taken out of it?"
ARGUMENTS: dict[str, dict[str, Any]] = {
    "--list": {"action": PrintTasks, "nargs": 0, "help": "print the tasks of configs/tasks and exit"},
    "--map": {"metavar": "NAME=FIELD,…", "help": _FIELDS},
    "--layout": {"choices": ("arc",), "help": "of --benchmark: ARC's own JSONL, or K2's arc_sft.json"},
    "--data": {"type": Path, "metavar": "DIR", "help": "where the files are that tasks' .yaml name"},
    "--corpus": {**LIST, "default": [], "type": Path, "metavar": "DIR", "help": _CORPUS},
}


def read_other(options: argparse.Namespace, path: Path) -> Asked:
    """The questions of several choices, the open ones by their task's name, and the file that they are in."""
    from k2mini.evaluation.tasks import parse_map, read_task

    fields = parse_map(options.map) if options.map is not None else None
    task = read_task(path, options.layout, fields, options.data)
    return task.questions, {task.name: task.pairs} if task.pairs else {}, task.file

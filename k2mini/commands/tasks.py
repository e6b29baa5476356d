"""What `eval` is to ask: the options for tasks beside GeoBench, and what is read before the model is."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from k2mini.commands.common import LIST, Print

if TYPE_CHECKING:
    from k2mini.data.prompts import AnyTemplate
    from k2mini.evaluation.benchmarks import Question
    from k2mini.evaluation.instances import EvalConfig
    from k2mini.evaluation.subjective import Pair

    Pairs = dict[str, Sequence[Pair]]
    Inputs = tuple[EvalConfig, list[Question], Pairs, list[str], list[dict[str, Any]]]
    Asked = tuple[list[Question], Pairs, Path]


def _listed() -> str:
    from k2mini.evaluation.tasks import listed

    return listed()


_FIELDS = (
    "what all files of --benchmark, JSON, JSONL, CSV or TSV, call these: question=stem,choices=A+B+C,answer=key; no "
    "choices: an open task. GeoBench's own files want a run of their own"
)
_ROBUST = "ask K times more, options shuffled by --seed, phrases changed: the spread, and the choices that stay"
_CHART = "draw how often answers are right over how sure the model is (extra: plot)"
_CORPUS = "the model's training text, of `corpus` or `prepare`: was the benchmark taken out of it?"
ARGUMENTS: dict[str, dict[str, Any]] = {
    "--list": {"action": Print, "nargs": 0, "const": _listed, "help": "print the tasks of configs/tasks and exit"},
    "--map": {"metavar": "NAME=FIELD,…", "help": _FIELDS},
    "--layout": {"choices": ("arc",), "help": "of all of --benchmark: ARC's own JSONL, or K2's arc_sft.json"},
    "--data": {"type": Path, "metavar": "DIR", "help": "where the files are that tasks' .yaml name"},
    "--corpus": {**LIST, "default": [], "type": Path, "metavar": "DIR", "help": _CORPUS},
    "--robust": {"type": int, "metavar": "K", "help": _ROBUST},
    "--chart": {"type": Path, "metavar": "FILE.png", "help": _CHART},
    "--force": {"action": "store_true", "help": "replace FILE.png, which a run that goes on may have drawn before"},
}


def read_inputs(options: argparse.Namespace, template: AnyTemplate) -> Inputs:
    """Read before the model is: how to ask, questions, open tasks' with their references, texts, decontamination."""
    from k2mini.data.documents import read_user_text
    from k2mini.evaluation.benchmarks import SUBJECTIVE
    from k2mini.evaluation.instances import EvalConfig

    if options.limit is not None and options.limit < 1:
        raise ValueError(f"--limit must be at least 1, not {options.limit}")
    if not options.benchmark and not options.perplexity:
        raise ValueError("name what to evaluate on: --benchmark FILE or --perplexity FILE")
    config = EvalConfig(
        options.scoring,
        template,
        options.answer_prefix.replace("\\n", "\n"),
        options.normalize,
        options.score_end,
        options.shots,
        options.shots_file,
        options.seed or 0,
        options.batch_size,
    )
    read = [_read_benchmark(options, path) for path in options.benchmark]
    questions = [question for asked, _, _ in read for question in asked]
    own = {task: pairs for _, opened, _ in read for task, pairs in opened.items()}
    tasks = list(dict.fromkeys(question.task for question in questions))
    wanted = set(options.tasks or [])
    if wanted:
        questions = [question for question in questions if question.task in wanted]
    if options.limit is not None:
        questions = [question for question in questions if question.index < options.limit]
    twice = len(own) < sum(len(opened) for _, opened, _ in read)
    if twice or len({(question.task, question.index) for question in questions}) < len(questions):
        raise ValueError("the same benchmark is named twice")
    published = {f"npee/{kind}": kind for kind in (*SUBJECTIVE, "subjective")}
    open_tasks = {task: kind for task, kind in published.items() if task in wanted and task not in own}
    tasks += own
    unknown = wanted - {*tasks} - {*open_tasks}
    if unknown:
        if any(task.startswith("npee/") for task in tasks):
            tasks += published
        known = ", ".join(tasks) or "none, since --benchmark names no file"
        raise ValueError(f"--tasks {sorted(unknown)[0]}: the benchmarks have no such task; they have {known}")
    _check_uncertainty(options, questions)
    texts = [read_user_text(path) for path in options.perplexity]
    pairs: Pairs = {task: _open_pairs(options, kind) for task, kind in open_tasks.items()}
    pairs |= {task: opened[: options.limit] for task, opened in own.items() if not wanted or task in wanted}
    taken = []
    if options.corpus:
        from k2mini.evaluation.decontamination import decontamination

        taken = decontamination(options.corpus, [file for _, _, file in read])
    return config, questions, pairs, texts, taken


def _check_uncertainty(options: argparse.Namespace, questions: Sequence[Question]) -> None:
    from k2mini.errors import check_picture
    from k2mini.files import check_output

    if options.robust is not None and options.robust < 1:
        raise ValueError(f"--robust must be at least 1, not {options.robust}")
    if (options.robust or options.chart) and not questions:
        raise ValueError("--robust and --chart are of multiple-choice questions, and there are none to ask")
    if options.chart is not None:
        check_picture(options.chart)
        check_output(options.chart, file=True, force=options.force, inputs=options.benchmark)


def _is_other(options: argparse.Namespace, path: Path) -> bool:
    """Whether a benchmark is a task's YAML, a table, or a file that an option says how to read."""
    is_told = options.layout is not None or options.map is not None
    return is_told or path.suffix.lower() in (".yaml", ".yml", ".csv", ".tsv")


def _read_benchmark(options: argparse.Namespace, path: Path) -> Asked:
    from k2mini.data.documents import data_path
    from k2mini.evaluation.benchmarks import read_benchmark

    return _read_other(options, path) if _is_other(options, path) else (read_benchmark(path), {}, data_path(path))


def _open_pairs(options: argparse.Namespace, kind: str) -> list[tuple[str, str]]:
    from k2mini.evaluation.benchmarks import load_subjective

    for path in (path for path in options.benchmark if not _is_other(options, path)):
        pairs = load_subjective(path, kind)
        if pairs is not None:
            return pairs[: options.limit]
    raise ValueError(f"npee/{kind} is in geobench_npee.json, which is not among the benchmarks")


def _read_other(options: argparse.Namespace, path: Path) -> Asked:
    """The questions of several choices, the open ones by their task's name, and the file that they are in."""
    from k2mini.evaluation.tasks import parse_map, read_task

    fields = parse_map(options.map) if options.map is not None else None
    task = read_task(path, options.layout, fields, options.data)
    return task.questions, {task.name: task.pairs} if task.pairs else {}, task.file

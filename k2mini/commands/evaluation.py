"""The commands `eval` and `compare`."""

from __future__ import annotations

import argparse
import json
import logging
from dataclasses import asdict
from typing import Any

from k2mini.commands.common import load
from k2mini.evaluation.benchmarks import SUBJECTIVE, Question, load_subjective, read_benchmark
from k2mini.evaluation.compare import compare, comparison_table, draw
from k2mini.evaluation.evaluate import run_benchmark
from k2mini.evaluation.instances import EvalConfig
from k2mini.evaluation.perplexity import text_perplexity
from k2mini.evaluation.report import table
from k2mini.evaluation.subjective import run_subjective, subjective_table
from k2mini.files import make_writable, write_text
from k2mini.inference.generate import Decoding
from k2mini.weights.manifest import model_fingerprint
from k2mini.weights.model_directory import CheckpointReader, model_directory

log = logging.getLogger("k2mini.commands")


def run_eval(options: argparse.Namespace) -> None:
    """Score the benchmarks; print a table or JSON, and keep all results where --out says."""
    config, questions, pairs, texts = _read_inputs(options)
    model, tokenizer = load(options)
    report: dict[str, Any] = {"model": str(options.model), "tasks": []}
    if questions:
        report = run_benchmark(
            model,
            tokenizer,
            questions,
            config,
            name=str(options.model) + (f" + {options.adapter}" if options.adapter else ""),
            out=options.out,
            fingerprint=model_fingerprint(CheckpointReader(model_directory(options.model))),
        )
    if options.out is not None:
        make_writable(options.out)
    if pairs:
        decoding = Decoding(options.max_new_tokens, seed=options.seed or 0, batch_size=options.batch_size)
        report["subjective"] = [
            run_subjective(
                model, tokenizer, pairs[task], decoding, task=task, template=options.template, out=options.out
            )
            for task in pairs
        ]
    if texts:
        found = text_perplexity(model, tokenizer, texts, window=options.window, stride=options.stride)
        report["perplexity"] = {"files": [str(path) for path in options.perplexity], **asdict(found)}
    if options.out is not None and (pairs or texts):
        write_text(options.out / "report.json", json.dumps(report, indent=2, ensure_ascii=False) + "\n")
    if options.json:
        print(json.dumps(report, ensure_ascii=False))
        return
    if questions:
        print(table(report["tasks"]))
    if pairs:
        print(subjective_table(report["subjective"]))
    if texts:
        print(f"perplexity {found.perplexity:.2f}, {found.bits_per_byte:.4f} bits a byte, over {found.tokens:,} tokens")


def _read_inputs(
    options: argparse.Namespace,
) -> tuple[EvalConfig, list[Question], dict[str, list[tuple[str, str]]], list[str]]:
    """All that is read and checked before the model is loaded.

    Returns: how questions are asked, the multiple-choice questions, the open tasks' questions with their references,
    and the texts of --perplexity.
    """
    if options.limit is not None and options.limit < 1:
        raise ValueError(f"--limit must be at least 1, not {options.limit}")
    if not options.benchmark and not options.perplexity:
        raise ValueError("name what to evaluate on: --benchmark FILE or --perplexity FILE")
    config = EvalConfig(
        options.scoring,
        options.template,
        options.answer_prefix.replace("\\n", "\n"),
        options.normalize,
        options.score_end,
        options.shots,
        options.shots_file,
        options.seed or 0,
        options.batch_size,
    )
    questions = [question for path in options.benchmark for question in read_benchmark(path)]
    wanted = set(options.tasks or [])
    if wanted:
        questions = [question for question in questions if question.task in wanted]
    if options.limit is not None:
        questions = [question for question in questions if question.index < options.limit]
    if len({(question.task, question.index) for question in questions}) < len(questions):
        raise ValueError("the same benchmark is named twice")
    open_tasks = {f"npee/{kind}": kind for kind in SUBJECTIVE if f"npee/{kind}" in wanted}
    unknown = wanted - {question.task for question in questions} - {*open_tasks}
    if unknown:
        raise ValueError(f"--tasks {sorted(unknown)[0]}: the benchmarks have no such task")
    texts = [path.read_text(encoding="utf-8") for path in options.perplexity]
    pairs = {task: _open_pairs(options, kind) for task, kind in open_tasks.items()}
    return config, questions, pairs, texts


def _open_pairs(options: argparse.Namespace, kind: str) -> list[tuple[str, str]]:
    for path in options.benchmark:
        pairs = load_subjective(path, kind)
        if pairs is not None:
            return pairs[: options.limit]
    raise ValueError(f"npee/{kind} is in geobench_npee.json, which is not among the benchmarks")


def run_compare(options: argparse.Namespace) -> None:
    """Runs of `eval` side by side."""
    found = compare(options.runs)
    if options.chart is not None:
        draw(found, options.chart)
    print(json.dumps(found) if options.json else comparison_table(found))

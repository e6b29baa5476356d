"""The command `audit`: lens, attention, attribute, patch, diff."""

from __future__ import annotations

import argparse
import json
from collections import Counter
from collections.abc import Callable
from pathlib import Path

from k2mini.audit.page import page
from k2mini.audit.reports import (
    Report,
    attention_report,
    attribution_report,
    diff_report,
    lens_report,
    patch_report,
)
from k2mini.audit.weight_diff import diff_adapter, diff_checkpoints, moved_rows
from k2mini.build import load_model
from k2mini.commands.common import pick_device
from k2mini.data.tokenizer import Tokenizer
from k2mini.evaluation.benchmarks import read_benchmark
from k2mini.evaluation.instances import EvalConfig
from k2mini.files import write_text
from k2mini.nn.llama import Llama
from k2mini.weights.model_directory import model_directory


def _over_models(options: argparse.Namespace, report: Callable[[Llama, Tokenizer, str], Report]) -> list[Report]:
    """The same for every model, one after the other."""
    found = []
    for place, directory in enumerate(options.model):
        adapter = options.adapter if place == len(options.model) - 1 else None
        model, tokenizer = load_model(directory, adapter, options.dtype, pick_device(options))
        if tokenizer is None:
            raise ValueError(f"{directory} has no tokenizer.model; copy the one the model was trained with")
        found.append(report(model, tokenizer, directory + (f" + {adapter}" if adapter else "")))
    return found


def _read_prompt(options: argparse.Namespace) -> None:
    """Put the question that is named, and its key, where a prompt and a target would stand.

    Raises ValueError where there is no such question, no target, or nothing to replace.
    """
    if options.question is not None:
        file, task, number = options.question
        questions = {(question.task, str(question.index)): question for question in read_benchmark(Path(file))}
        if (task, number) not in questions:
            tasks = Counter(known for known, _ in questions)
            there = ", ".join(f"{known} 0 to {count - 1}" for known, count in tasks.items())
            raise ValueError(f"{file} has no question {task} {number}; it has {there}")
        config, question = EvalConfig(template=options.template or "alpaca"), questions[task, number]
        options.prompt = config.prompt(question)
        if getattr(options, "target", "") is None:
            options.target = question.answer
    elif options.template is not None:
        raise ValueError("--template is for --question; a --prompt stands as it is given")
    if options.kind in ("attribute", "patch") and options.target is None:
        raise ValueError("--target TEXT is missing: the answer that is looked for, with its leading space")
    if getattr(options, "replace", None) is not None:
        old, new = options.replace
        if options.prompt.count(old) != 1:
            raise ValueError(f"--replace {old!r}: the prompt has it {options.prompt.count(old)} times, and not once")
        options.corrupted = options.prompt.replace(old, new)


def _finish(options: argparse.Namespace, title: str, lead: str, reports: list[Report]) -> None:
    if options.html is not None:
        write_text(options.html, page(title, lead, [part for report in reports for part in report.sections]))
    if options.json:
        print(json.dumps([report.values for report in reports], ensure_ascii=False))
        return
    print("\n\n".join("\n".join(report.lines) for report in reports))
    if options.html is not None:
        print(options.html)


def run_lens(options: argparse.Namespace) -> None:
    """Logit lens."""
    _read_prompt(options)
    found = _over_models(options, lambda m, t, n: lens_report(m, t, n, options.prompt, options.target))
    _finish(options, "Logit lens", options.prompt, found)


def run_attention(options: argparse.Namespace) -> None:
    """Attention patterns."""
    _read_prompt(options)
    found = _over_models(
        options, lambda m, t, n: attention_report(m, t, n, options.prompt, options.layer, options.head)
    )
    _finish(options, "Attention", options.prompt, found)


def run_attribute(options: argparse.Namespace) -> None:
    """Direct logit attribution."""
    _read_prompt(options)
    found = _over_models(
        options, lambda m, t, n: attribution_report(m, t, n, options.prompt, options.target, options.foil)
    )
    _finish(options, "Direct logit attribution", options.prompt, found)


def run_patch(options: argparse.Namespace) -> None:
    """Activation patching."""
    _read_prompt(options)
    found = _over_models(
        options,
        lambda m, t, n: patch_report(
            m, t, n, options.prompt, options.corrupted, options.target, options.foil, options.point
        ),
    )
    _finish(options, "Activation patching", f"{options.prompt} / {options.corrupted}", found)


def run_diff(options: argparse.Namespace) -> None:
    """Weight differences."""
    base = model_directory(options.base)
    found = []
    for other in options.others:
        path = Path(other)
        file = base / "tokenizer.model"
        tokenizer = Tokenizer(file) if file.is_file() else None
        if (path / "adapter_config.json").is_file():
            changes, moved = diff_adapter(base, path), []
        else:
            changes = diff_checkpoints(base, model_directory(path), subspace=options.subspace)
            moved = moved_rows(base, path)
        found.append(diff_report(f"{options.base} → {other}", changes, moved, tokenizer))
    _finish(options, "What training changed", f"Against {options.base}.", found)

"""The command `audit`: lens, attention, attribute, patch, diff."""

from __future__ import annotations

import argparse
import json
from collections import Counter
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from k2mini.commands.common import COMPUTE, DEBUG, LIST, TEMPLATE_HELP, tuned_in
from k2mini.data.prompts import utf8

if TYPE_CHECKING:
    from k2mini.audit.reports import Report
    from k2mini.data.tokenizer import Tokenizer
    from k2mini.nn.llama import Llama


def audit_arguments(parser: argparse.ArgumentParser) -> None:
    """The commands `audit lens`, `attention`, `attribute`, `patch` and `diff`."""
    output = argparse.ArgumentParser(add_help=False)
    output.add_argument("--html", type=Path, metavar="FILE", help="write a page that a browser shows")
    output.add_argument("--force", action="store_true", help="replace FILE")
    output.add_argument("--json", action="store_true", help="print the findings as JSON and nothing else")
    asked = argparse.ArgumentParser(add_help=False)
    asked.add_argument("--model", required=True, **LIST, metavar="DIR", help="one, or several side by side")
    asked.add_argument("--adapter", metavar="DIR", help="a LoRA adapter for the last model")
    prompt = asked.add_mutually_exclusive_group(required=True)
    prompt.add_argument("--prompt", type=utf8, metavar="TEXT")
    prompt.add_argument(
        "--question",
        nargs=3,
        metavar=("FILE", "TASK", "N"),
        help="question N (from 0) of a benchmark, as eval asks it, such as geobench_npee.json npee/choice 3",
    )
    asked.add_argument("--template", metavar="NAME", help=f"of --question: {TEMPLATE_HELP} (default: the last model's)")
    kinds: Any = parser.add_subparsers(dest="kind", metavar="KIND", required=True)
    for name, declare, what in (
        ("lens", _lens_arguments, "what each layer would answer"),
        ("attention", _attention_arguments, "where heads look"),
        ("attribute", _attribute_arguments, "what each part adds to the answer"),
        ("patch", _patch_arguments, "where two prompts' difference becomes the answer"),
    ):
        kinds.add_parser(name, declare=declare, parents=[output, asked, COMPUTE], help=what)
    kinds.add_parser(
        "diff", declare=_diff_arguments, parents=[output, DEBUG], help="what training changed in the weights"
    )


def _target(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--target", type=utf8, metavar="TEXT", help="the answer, with its leading space (of --question: the key)"
    )


def _foil(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--foil", type=utf8, metavar="TEXT", help="another answer, to compare the target with")


def _over_models(options: argparse.Namespace, report: Callable[[Llama, Tokenizer, str], Report]) -> list[Report]:
    """The reports of all models that are named. One is loaded at a time; an adapter belongs to the last."""
    from k2mini.build import load_model, pick_device, set_threads
    from k2mini.weights.model_directory import ModelDirectory

    set_threads(options.threads)
    found = []
    for place, path in enumerate(options.model):
        adapter = options.adapter if place == len(options.model) - 1 else None
        directory = ModelDirectory(path)
        tokenizer = directory.require_tokenizer()
        model, _ = load_model(directory, adapter, options.dtype, pick_device(options.device))
        found.append(report(model, tokenizer, path + (f" + {adapter}" if adapter else "")))
    return found


def _read_prompt(options: argparse.Namespace) -> None:
    """Put the question that is named, and its key, where a prompt and a target would stand.

    Raises ValueError where there is no such question, no target, or nothing to replace.
    """
    from k2mini.data.chats import open_template
    from k2mini.data.prompts import Rendered
    from k2mini.evaluation.benchmarks import read_benchmark
    from k2mini.evaluation.instances import EvalConfig
    from k2mini.weights.model_directory import ModelDirectory

    if options.question is not None:
        file, task, number = options.question
        questions = {(question.task, str(question.index)): question for question in read_benchmark(Path(file))}
        if (task, number) not in questions:
            tasks = Counter(known for known, _ in questions)
            there = ", ".join(f"{known} 0 to {count - 1}" for known, count in tasks.items())
            raise ValueError(f"{file} has no question {task} {number}; it has {there}")
        directory, question = ModelDirectory(options.model[-1]), questions[task, number]
        name = options.template or (options.adapter and tuned_in(options.adapter))
        config = EvalConfig(template=open_template(name, directory.path, directory.require_tokenizer()))
        prompt = config.prompt(question)
        options.prompt = Rendered(prompt) if config.template.special else prompt
        options.asked = f"{task} {number}: {question.stem}"
        if getattr(options, "target", "") is None:
            options.target = config.lead + question.answer
    elif options.template is not None:
        raise ValueError("--template is for --question; a --prompt stands as it is given")
    if options.kind in ("attribute", "patch") and options.target is None:
        raise ValueError("--target TEXT is missing: the answer that is looked for, with its leading space")
    if getattr(options, "replace", None) is not None:
        old, new = options.replace
        if options.prompt.count(old) != 1:
            raise ValueError(f"--replace {old!r}: the prompt has it {options.prompt.count(old)} times, and not once")
        options.corrupted = options.prompt.replace(old, new)
    if getattr(options, "corrupted", None) is not None:
        options.corrupted = type(options.prompt)(options.corrupted)  # encoded as the prompt is


def _page(options: argparse.Namespace) -> AbstractContextManager[None]:
    """Keep the page's place, which is checked before the work."""
    from k2mini.files import output

    if options.html is not None and options.html.suffix.lower() not in (".html", ".htm"):
        raise ValueError(f"--html {options.html}: a page's name ends in .html")
    if options.kind == "diff":
        read = [options.base, *options.others]
    else:
        read = [*options.model, options.adapter, *(options.question or [])[:1]]
    inputs = [path for path in read if path is not None]
    return output(options.html, file=True, force=options.force, inputs=inputs)


def _finish(options: argparse.Namespace, title: str, reports: list[Report]) -> None:
    from k2mini.audit.page import html_page
    from k2mini.files import write_text

    if options.json:
        print(json.dumps([report.values for report in reports], ensure_ascii=False))
    else:
        print("\n\n".join("\n".join(report.lines) for report in reports))
    if options.html is not None:
        names = {"base": "base", "asked": "question", "prompt": "prompt", "corrupted": "corrupted"}
        asked = {shown: getattr(options, name) for name, shown in names.items() if getattr(options, name, None)}
        page = html_page(title, asked, [(report.values["model"], report.sections) for report in reports])
        write_text(options.html, page)
        if not options.json:
            print(options.html)


def _lens_arguments(parser: argparse.ArgumentParser) -> None:
    _target(parser)
    parser.epilog = "Ranks count from 1; in the arrays of --json from 0, which is the likeliest token."
    parser.set_defaults(run=run_lens)


def run_lens(options: argparse.Namespace) -> None:
    """Print what each layer would answer (the logit lens)."""
    from k2mini.audit.reports import lens_report

    _read_prompt(options)
    with _page(options):
        found = _over_models(options, lambda m, t, n: lens_report(m, t, n, options.prompt, options.target))
        _finish(options, "Logit lens", found)


def _attention_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--layer", type=int, default=-1, metavar="N", help="whose patterns (default: the last)")
    parser.add_argument("--head", type=int, metavar="N", help="default: all")
    parser.set_defaults(run=run_attention)


def run_attention(options: argparse.Namespace) -> None:
    """Print where the heads of a layer look."""
    from k2mini.audit.reports import attention_report

    _read_prompt(options)
    with _page(options):
        found = _over_models(
            options, lambda m, t, n: attention_report(m, t, n, options.prompt, options.layer, options.head)
        )
        _finish(options, "Attention", found)


def _attribute_arguments(parser: argparse.ArgumentParser) -> None:
    _target(parser)
    _foil(parser)
    parser.set_defaults(run=run_attribute)


def run_attribute(options: argparse.Namespace) -> None:
    """Print what each part of the model adds to the logit of the answer (direct logit attribution)."""
    from k2mini.audit.reports import attribution_report

    _read_prompt(options)
    with _page(options):
        found = _over_models(
            options, lambda m, t, n: attribution_report(m, t, n, options.prompt, options.target, options.foil)
        )
        _finish(options, "Direct logit attribution", found)


def _patch_arguments(parser: argparse.ArgumentParser) -> None:
    _target(parser)
    _foil(parser)
    corrupted = parser.add_mutually_exclusive_group(required=True)
    corrupted.add_argument("--corrupted", type=utf8, metavar="TEXT", help="another prompt, of as many tokens")
    corrupted.add_argument(
        "--replace", nargs=2, type=utf8, metavar=("OLD", "NEW"), help="the same prompt with other words in one place"
    )
    parser.add_argument("--point", default="residual_out", metavar="POINT", help="default: residual_out")
    parser.set_defaults(run=run_patch)


def run_patch(options: argparse.Namespace) -> None:
    """Print where the difference between two prompts becomes the answer (activation patching)."""
    from k2mini.audit.reports import patch_report

    _read_prompt(options)
    with _page(options):
        found = _over_models(
            options,
            lambda m, t, n: patch_report(
                m, t, n, options.prompt, options.corrupted, options.target, options.foil, options.point
            ),
        )
        _finish(options, "Activation patching", found)


def _diff_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("base", metavar="BASE")
    parser.add_argument("others", nargs="+", metavar="OTHER", help="models, or adapters of one of these or of BASE")
    parser.add_argument("--subspace", action="store_true", help="how much lies in the base's top subspace (slow)")
    parser.set_defaults(run=run_diff)


def run_diff(options: argparse.Namespace) -> None:
    """Print what training changed in the weights, for each model or adapter."""
    from k2mini.audit.diff_report import diff_report
    from k2mini.audit.weight_diff import check_shapes, diff_adapter, diff_checkpoints, moved_rows
    from k2mini.weights.adapter import CONFIG, check_base, read_adapter, read_adapter_config
    from k2mini.weights.model_directory import ModelDirectory, model_directory

    with _page(options):
        base, paths = ModelDirectory(options.base), [model_directory(path) for path in options.others]
        names = dict(zip([base.path, *paths], [options.base, *options.others], strict=True))
        # All are checked before the first takes its minutes.
        adapters = {path for path in paths if (path / CONFIG).is_file()}
        for path in paths:
            if path not in adapters:
                check_shapes(base.path, path)
        models = [base, *(ModelDirectory(path) for path in paths if path not in adapters)]
        bases = {path: check_base(path, *models) for path in adapters}
        for path in adapters:
            read_adapter(path, read_adapter_config(path))
        found = []
        for path in paths:
            own = bases.get(path, base)
            if path in adapters:
                changes, moved = diff_adapter(own.path, path), []
            else:
                changes = diff_checkpoints(base.path, path, subspace=options.subspace)
                moved = moved_rows(base.path, path)
            found.append(diff_report(f"{names[own.path]} → {names[path]}", changes, moved, base.tokenizer))
        _finish(options, "What training changed", found)

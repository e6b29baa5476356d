"""The command `eval`."""

from __future__ import annotations

import argparse
import json
import logging
import os
import sys
from contextlib import nullcontext, suppress
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from k2mini.commands.common import LIST, LOADED, SHARD, TEMPLATE, tuned_in
from k2mini.commands.ranks import check_same, joined, mesh_of
from k2mini.data.chats import open_template, stop_ids
from k2mini.data.prompts import utf8

if TYPE_CHECKING:
    from k2mini.data.prompts import AnyTemplate
    from k2mini.distributed import World
    from k2mini.evaluation.benchmarks import Question
    from k2mini.evaluation.instances import EvalConfig
    from k2mini.inference.decoding import Decoding
    from k2mini.weights.model_directory import ModelDirectory

    Inputs = tuple[EvalConfig, list[Question], dict[str, list[tuple[str, str]]], list[str]]

log = logging.getLogger("k2mini.commands")


def eval_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of `eval`; the defaults of how to ask and score are those of `EvalConfig`."""
    from k2mini.evaluation.instances import NORMALIZATIONS, SCORINGS, EvalConfig

    parser.add_argument(
        "--benchmark",
        **LIST,
        default=[],
        type=Path,
        metavar="FILE",
        help="geobench_npee.json and geobench_apstudy.json, as published; or .jsonl of question, choices, answer",
    )
    parser.add_argument(
        "--tasks", **LIST, metavar="TASK", help="npee/choice, npee/tf, ap (default: these), npee/noun, …"
    )
    parser.add_argument(
        "--scoring",
        choices=SCORINGS,
        default=EvalConfig.scoring,
        help="letter: options listed, p(letter); text: not listed, p(their texts); k2: as K2's code "
        f"(default: {EvalConfig.scoring})",
    )
    parser.add_argument(
        "--normalize",
        choices=NORMALIZATIONS,
        default=EvalConfig.normalize,
        help=f"of text: divide by the option's length or not (default: {EvalConfig.normalize})",
    )
    parser.add_argument("--score-end", action="store_true", help="of text: score the answer's end too")
    parser.add_argument("--template", **TEMPLATE)
    parser.add_argument(
        "--answer-prefix",
        type=utf8,
        default=EvalConfig.answer_prefix,
        metavar="TEXT",
        help=r"begin the answer so (\n: a new line)",
    )
    parser.add_argument(
        "--shots",
        type=int,
        default=EvalConfig.num_fewshot,
        metavar="K",
        help="K examples before each question, drawn by --seed",
    )
    parser.add_argument("--shots-file", metavar="FILE", help="examples as they stand in a file, such as K2's own four")
    parser.add_argument("--limit", type=int, metavar="N", help="only the first N questions of each task")
    parser.add_argument(
        "--batch-size",
        type=int,
        default=EvalConfig.batch_size,
        metavar="N",
        help=f"questions at a time (default: {EvalConfig.batch_size})",
    )
    parser.add_argument("--max-new-tokens", type=int, default=128, metavar="N", help="of open tasks (default: 128)")
    parser.add_argument("--perplexity", **LIST, default=[], type=Path, metavar="FILE", help="text files to predict")
    parser.add_argument("--window", type=int, metavar="N", help="of --perplexity: tokens seen (default: the context)")
    parser.add_argument("--stride", type=int, metavar="N", help="of --perplexity: the window's step (default: half)")
    parser.add_argument("--out", type=Path, metavar="DIR", help="keep results there, and go on with them")
    parser.add_argument("--shard", **SHARD)
    parser.add_argument("--json", action="store_true", help="print the report as JSON and nothing else")
    parser.set_defaults(run=run_eval)


def run_eval(options: argparse.Namespace) -> None:
    """Score the benchmarks; print a table or JSON, and keep all results where --out says."""
    from k2mini.distributed import ALONE
    from k2mini.evaluation.evaluate import MARK
    from k2mini.files import output
    from k2mini.inference.decoding import Decoding
    from k2mini.weights.model_directory import ModelDirectory

    decoding = Decoding(options.max_new_tokens, seed=options.seed or 0, batch_size=options.batch_size)
    directory = ModelDirectory(options.model)
    name = options.template or (options.adapter and tuned_in(options.adapter))
    inputs = _read_inputs(options, open_template(name, directory.path, directory.require_tokenizer()))
    read = [options.model, options.adapter, *options.benchmark, *options.perplexity, options.shots_file]
    created = options.out is not None and not options.out.exists()
    with joined(options) if options.shard or "LOCAL_RANK" in os.environ else nullcontext(ALONE) as world:
        out = options.out if world.rank == 0 else None
        try:
            with output(out, mark=MARK, inputs=[path for path in read if path is not None]):
                _evaluate(options, directory, inputs, decoding, world)
        finally:
            if created and out is not None:
                with suppress(OSError):  # it has something in it, unless nothing came of it
                    out.rmdir()


def _evaluate(
    options: argparse.Namespace, directory: ModelDirectory, inputs: Inputs, decoding: Decoding, world: World
) -> None:
    from k2mini.build import empty_model, open_model
    from k2mini.evaluation.evaluate import check_kept, digest, run_benchmark, write_report
    from k2mini.evaluation.perplexity import text_perplexity
    from k2mini.evaluation.report import table
    from k2mini.evaluation.subjective import run_subjective, subjective_table
    from k2mini.inference.compile import compile_decoding

    (config, questions, pairs, texts), out = inputs, options.out
    directory.require_model()
    tokenizer = directory.require_tokenizer()
    empty_model(directory)  # the fingerprint wants tensors of the right shapes
    made_by = kept_by(options, directory.fingerprint(), pairs, texts)
    if pairs and (ends := stop_ids(tokenizer, config.template)) != (tokenizer.eos_id,):
        made_by["stop_ids"] = list(ends)
    wanted = {name: getattr(options, name) for name in LOADED}
    if world.size > 1:
        hashed = {"the hash of the questions": digest([[question.digest for question in questions], pairs])}
        check_same(world, options, {**made_by, **hashed})
        wanted |= mesh_of(world, options)
    if out is not None and world.rank == 0:  # before the model, which takes longer
        check_kept(out, questions, config, tokenizer, made_by)
    model, _ = open_model(directory, options.device, options.threads, **wanted)
    if options.compile:
        compile_decoding(model)
    name = str(options.model) + (f" + {options.adapter}" if options.adapter else "")
    told: dict[str, Any] = {"out": out, "world": world}
    report, results = run_benchmark(model, tokenizer, questions, config, name=name, made_by=made_by, **told)
    if pairs:
        report["subjective"] = [
            run_subjective(model, tokenizer, pairs[task], decoding, task=task, template=config.template, **told)
            for task in pairs
        ]
    if texts:
        found = text_perplexity(model, tokenizer, texts, window=options.window, stride=options.stride, world=world)
        report["perplexity"] = {"files": [str(p).replace("hf:/", "hf://") for p in options.perplexity], **asdict(found)}
    if world.rank:
        return
    try:
        if options.json:
            print(json.dumps(report, ensure_ascii=False))
        elif questions:
            print(table(report["tasks"]))
        if pairs and not options.json:
            print(subjective_table(report["subjective"]))
        if texts and not options.json:
            sums = f"perplexity {found.perplexity:.2f}, {found.bits_per_byte:.4f} bits a byte"
            print(f"{sums}, over {found.tokens:,} tokens")
        sys.stdout.flush()
    finally:  # whoever reads what is printed may have gone
        if out is not None:
            write_report(out, report, results)
            log.info("the results are in %s", out)


def kept_by(
    options: argparse.Namespace, fingerprint: str, pairs: dict[str, list[tuple[str, str]]], texts: list[str]
) -> dict[str, Any]:
    """By what results that are kept are known, beside how questions are asked: the model, and what else it is to do."""
    from k2mini.evaluation.evaluate import digest
    from k2mini.files import sha256
    from k2mini.weights.model_directory import model_directory

    made_by: dict[str, Any] = {"model": fingerprint, "adapter": None}
    made_by |= {name: getattr(options, name) for name in ("merge", "quantize", "quantize_head")}
    if options.adapter is not None:
        files = sorted(model_directory(options.adapter).glob("adapter_*"))
        made_by["adapter"] = digest([(file.name, sha256(file)) for file in files])
    if pairs:
        made_by |= {"open_tasks": list(pairs), "max_new_tokens": options.max_new_tokens}
        made_by["batch_size"] = options.batch_size  # an answer may vary with what it is made beside
    if texts:
        made_by |= {"perplexity": digest(texts), "window": options.window, "stride": options.stride}
    return made_by


def _read_inputs(options: argparse.Namespace, template: AnyTemplate) -> Inputs:
    """Read before the model is: how to ask, the questions, the open tasks' with their references, the texts."""
    from k2mini.data.documents import read_user_text
    from k2mini.evaluation.benchmarks import SUBJECTIVE, read_benchmark
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
    questions = [question for path in options.benchmark for question in read_benchmark(path)]
    tasks = list(dict.fromkeys(question.task for question in questions))
    wanted = set(options.tasks or [])
    if wanted:
        questions = [question for question in questions if question.task in wanted]
    if options.limit is not None:
        questions = [question for question in questions if question.index < options.limit]
    if len({(question.task, question.index) for question in questions}) < len(questions):
        raise ValueError("the same benchmark is named twice")
    open_tasks = {f"npee/{kind}": kind for kind in SUBJECTIVE if f"npee/{kind}" in wanted}
    unknown = wanted - {*tasks} - {*open_tasks}
    if unknown:
        if any(task.startswith("npee/") for task in tasks):
            tasks += [f"npee/{kind}" for kind in SUBJECTIVE]
        known = ", ".join(tasks) or "none, since --benchmark names no file"
        raise ValueError(f"--tasks {sorted(unknown)[0]}: the benchmarks have no such task; they have {known}")
    texts = [read_user_text(path) for path in options.perplexity]
    pairs = {task: _open_pairs(options, kind) for task, kind in open_tasks.items()}
    return config, questions, pairs, texts


def _open_pairs(options: argparse.Namespace, kind: str) -> list[tuple[str, str]]:
    from k2mini.evaluation.benchmarks import load_subjective

    for path in options.benchmark:
        pairs = load_subjective(path, kind)
        if pairs is not None:
            return pairs[: options.limit]
    raise ValueError(f"npee/{kind} is in geobench_npee.json, which is not among the benchmarks")

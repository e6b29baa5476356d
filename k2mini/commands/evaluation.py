"""The command `eval`."""

from __future__ import annotations

import argparse
import json
import logging
import os
import sys
from collections.abc import Iterable
from contextlib import nullcontext, suppress
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from k2mini.commands.backends import open_other
from k2mini.commands.common import LIST, LOADED, SHARD, TEMPLATE, tuned_in
from k2mini.commands.ranks import check_same, joined, mesh_of
from k2mini.commands.tasks import ARGUMENTS, read_inputs
from k2mini.data.chats import open_template, stop_ids
from k2mini.data.prompts import utf8

if TYPE_CHECKING:
    from k2mini.commands.tasks import Inputs, Pairs
    from k2mini.distributed import World
    from k2mini.evaluation.score import OtherModel
    from k2mini.inference.decoding import Decoding
    from k2mini.nn.llama import Llama
    from k2mini.weights.model_directory import ModelDirectory

log = logging.getLogger("k2mini.commands")
BACKENDS = ("k2mini", "transformers", "api")


def eval_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of `eval`; the defaults of how to ask and score are those of `EvalConfig`."""
    from k2mini.evaluation.instances import NORMALIZATIONS, SCORINGS, EvalConfig

    parser.add_argument(
        "--benchmark",
        **LIST,
        default=[],
        type=Path,
        metavar="FILE",
        help="geobench_npee.json and geobench_apstudy.json, as published; or .jsonl of question, choices, answer; or "
        "a task's .yaml (--list)",
    )
    what = "npee/choice, npee/tf, ap (default: these), npee/noun, npee/subjective, …"
    parser.add_argument("--tasks", **LIST, metavar="TASK", help=what)
    for name, settings in ARGUMENTS.items():
        parser.add_argument(name, **settings)
    parser.add_argument(
        "--scoring",
        choices=SCORINGS,
        default=EvalConfig.scoring,
        help="letter: options listed, p(letter); text: not listed, p(their texts); k2: as K2's code; "
        f"pmi: text, less what it gets without the question (default: {EvalConfig.scoring})",
    )
    parser.add_argument(
        "--normalize",
        choices=NORMALIZATIONS,
        default=EvalConfig.normalize,
        help=f"of text: divide by the option's length or not (default: {EvalConfig.normalize})",
    )
    parser.add_argument("--score-end", action="store_true", help="of text, pmi: score the answer's end too")
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
    parser.add_argument(
        "--backend",
        choices=BACKENDS,
        default=BACKENDS[0],
        help="transformers: any causal language model that it knows (extra: reference); api: the one called --model at "
        f"--url (default: {BACKENDS[0]})",
    )
    parser.add_argument("--url", help="of api: OpenAI's, of a server that scores prompts, as http://localhost:8000/v1")
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
    own = options.backend == BACKENDS[0] and not options.url
    directory: ModelDirectory | OtherModel = ModelDirectory(options.model) if own else open_other(options)
    name = options.template or (options.adapter and tuned_in(options.adapter))
    inputs = read_inputs(options, open_template(name, directory.path, directory.require_tokenizer()))
    if options.out is not None:
        check_names(inputs[2])
    read = [options.model, options.adapter, *options.benchmark, *options.perplexity, options.shots_file]
    read += options.corpus
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
    options: argparse.Namespace,
    directory: ModelDirectory | OtherModel,
    inputs: Inputs,
    decoding: Decoding,
    world: World,
) -> None:
    from k2mini.build import empty_model
    from k2mini.evaluation.evaluate import check_kept, digest, run_benchmark, write_report
    from k2mini.evaluation.perplexity import text_perplexity
    from k2mini.evaluation.subjective import run_subjective
    from k2mini.weights.model_directory import ModelDirectory

    (config, questions, pairs, texts, taken), out = inputs, options.out
    tokenizer = directory.require_tokenizer()
    if isinstance(directory, ModelDirectory):
        directory.require_model()
        empty_model(directory)  # the fingerprint wants tensors of the right shapes
    made_by = kept_by(options, directory.fingerprint(), pairs, texts)
    if pairs and (ends := stop_ids(tokenizer, config.template)) != (tokenizer.eos_id,):
        made_by["stop_ids"] = list(ends)
    mesh = {}
    if world.size > 1:
        hashed = {"the hash of the questions": digest([[question.digest for question in questions], pairs])}
        check_same(world, options, {**made_by, **hashed})
        mesh = mesh_of(world, options)
    if out is not None and world.rank == 0:  # before the model, which takes longer
        check_kept(out, questions, config, tokenizer, made_by)
    model = _open(options, directory, mesh)
    name = str(options.model) + (f" + {options.adapter}" if options.adapter else "")
    told: dict[str, Any] = {"out": out, "world": world}
    report, results = run_benchmark(model, tokenizer, questions, config, name=name, made_by=made_by, **told)
    if options.robust is not None:
        from k2mini.evaluation.robust import WORDINGS, run_robust

        spread = run_robust(model, tokenizer, questions, results, config, repeats=options.robust, **told)
        report["tasks"] = [row | {"robust": spread[row["task"]]} for row in report["tasks"]]
        report["wordings"] = [asdict(wording) for wording in WORDINGS[: options.robust]]
    if options.chart is not None and world.is_main:
        from k2mini.evaluation.reliability import draw_reliability

        draw_reliability(report["tasks"], options.chart)
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
    if taken:
        report["decontamination"] = taken
    try:
        _print(options, report)
    finally:  # whoever reads what is printed may have gone
        if out is not None:
            write_report(out, report, results)
            log.info("the results are in %s", out)


def _open(options: argparse.Namespace, directory: ModelDirectory | OtherModel, mesh: Any) -> Llama | OtherModel:
    from k2mini.build import open_model
    from k2mini.inference.compile import compile_decoding
    from k2mini.weights.model_directory import ModelDirectory

    if not isinstance(directory, ModelDirectory):
        return directory
    wanted = {name: getattr(options, name) for name in LOADED}
    model, _ = open_model(directory, options.device, options.threads, **wanted, **mesh)
    if options.compile:
        compile_decoding(model)
    return model


def _print(options: argparse.Namespace, report: dict[str, Any]) -> None:
    from k2mini.evaluation.report import text

    print(json.dumps(report, ensure_ascii=False) if options.json else text(report))
    sys.stdout.flush()


def check_names(tasks: Iterable[str]) -> None:
    """Raise ValueError where the answers to two open tasks would be kept in one file."""
    from k2mini.evaluation.scores import task_file

    files = dict[str, str]()
    for task in tasks:
        name = task_file("answers", task)
        if (other := files.setdefault(name, task)) != task:
            raise ValueError(f"{other!r} and {task!r} would both be kept in {name}; rename one, or run one at a time")


def kept_by(options: argparse.Namespace, fingerprint: str, pairs: Pairs, texts: list[str]) -> dict[str, Any]:
    """By what results that are kept are known, beside how questions are asked: the model, and what else it is to do."""
    from k2mini.evaluation.evaluate import digest

    made_by: dict[str, Any] = {"model": fingerprint, "adapter": None}
    made_by |= {name: getattr(options, name) for name in ("merge", "quantize", "quantize_head")}
    if options.adapter is not None:
        from k2mini.weights.adapter import adapter_digest  # a file more on the road, for adapters alone

        made_by["adapter"] = adapter_digest(options.adapter)
    if pairs:
        made_by |= {"open_tasks": list(pairs), "max_new_tokens": options.max_new_tokens}
        made_by["batch_size"] = options.batch_size  # an answer may vary with what it is made beside
    if texts:
        made_by |= {"perplexity": digest(texts), "window": options.window, "stride": options.stride}
    return made_by

"""The command `judge`."""

from __future__ import annotations

import argparse
import json
import logging
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from k2mini.commands.common import TEMPLATE, tuned_in
from k2mini.config import QUANTIZE_NAMES

if TYPE_CHECKING:
    from k2mini.evaluation.judge import Judge
    from k2mini.evaluation.score import OtherModel
    from k2mini.nn.llama import Llama
    from k2mini.weights.model_directory import ModelDirectory

log = logging.getLogger("k2mini.commands")


def judge_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of `judge`."""
    from k2mini.evaluation.instances import EvalConfig

    size = f"answers at a time; moves the 7th digit of scores (default: {EvalConfig.batch_size})"
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="--out of eval, with open tasks")
    what = "the model that judges, none of those that answered; with --evaluator-url, its name there"
    parser.add_argument("--evaluator", required=True, metavar="DIR", help=what)
    there = "a server of OpenAI's API, as http://localhost:8000/v1; gptscore needs one that scores prompts"
    parser.add_argument("--evaluator-url", metavar="URL", help=there)
    other = "transformers: any causal language model that it knows, as GPTScore's own GPT-2 and OPT (extra: reference)"
    parser.add_argument("--backend", choices=("k2mini", "transformers"), default="k2mini", help=other)
    parser.add_argument("--adapter", metavar="DIR", help="a LoRA adapter for the evaluator")
    parser.add_argument("--quantize", choices=QUANTIZE_NAMES, help="keep the evaluator's matrices in 8 or 4 bits")
    parser.add_argument("--template", **TEMPLATE)
    file = "a JSON object, {aspect: sentence that defines it} (default: rationality, correctness, consistency)"
    parser.add_argument("--aspects", type=Path, metavar="FILE", help=file)
    only = "gptscore: mean log-probability of each answer's tokens after an aspect's prompt, GPTScore's formula with "
    only += "prompts of k2mini's; preference: which of two runs' answers is better, asked in both orders"
    parser.add_argument("--only", choices=("gptscore", "preference"), help=f"{only} (default: both)")
    parser.add_argument("--batch-size", type=int, default=EvalConfig.batch_size, metavar="N", help=size)
    parser.add_argument("--json", action="store_true", help="print the report as JSON and nothing else")
    parser.set_defaults(run=run_judge)


def run_judge(options: argparse.Namespace) -> None:
    """Judge the open answers of runs; print a table or JSON, and add the scores to the runs."""
    from k2mini.evaluation.evaluate import MARK
    from k2mini.evaluation.judge import ASPECTS, judge, judge_table, read_aspects, read_runs
    from k2mini.files import output

    if options.batch_size < 1:
        raise ValueError(f"--batch-size must be at least 1, not {options.batch_size}")
    if options.only == "preference" and len(options.runs) < 2:
        raise ValueError("--only preference compares the answers of runs; name two, or more")
    aspects = ASPECTS if options.aspects is None else read_aspects(options.aspects)
    aspects, pairs = {} if options.only == "preference" else aspects, options.only != "gptscore"
    answers = read_runs(options.runs)
    with ExitStack() as held:
        for run in options.runs:
            held.enter_context(output(run, mark=MARK))
        asked, made_by = _evaluator(options)
        report = judge(options.runs, answers, asked, made_by, Path(options.evaluator).absolute().name, aspects, pairs)
    print(json.dumps(report, ensure_ascii=False) if options.json else judge_table(report))
    log.info("kept in each run: scores_judge_%s.jsonl and, who judged, judge_%s.json", *[report["name"]] * 2)


def _evaluator(options: argparse.Namespace) -> tuple[Judge, dict[str, Any]]:
    """What asks the evaluator, and by what its judgements are known."""
    from k2mini.build import open_model, pick_device, set_threads
    from k2mini.data.chats import open_template
    from k2mini.dtypes import NAMES
    from k2mini.evaluation.api_model import ApiModel
    from k2mini.evaluation.endpoint import Endpoint
    from k2mini.evaluation.evaluate import digest
    from k2mini.evaluation.judge import judge_here, judge_there
    from k2mini.evaluation.transformers_model import TransformersModel
    from k2mini.weights.adapter import adapter_digest

    if options.evaluator_url is not None:
        given = [name for name in ("adapter", "quantize", "template") if getattr(options, name) is not None]
        if given := given + ["backend"] * (options.backend != "k2mini"):
            raise ValueError(f"--{given[0]} is for an evaluator here; leave it out, or leave out --evaluator-url")
        endpoint = Endpoint(options.evaluator_url, options.evaluator)
        known = {"evaluator": ApiModel(endpoint).fingerprint()}  # as a run of eval --backend api has it
        return partial(judge_there, endpoint, workers=options.batch_size), known
    wanted = {name: getattr(options, name) for name in ("adapter", "dtype", "quantize")}
    model: Llama | OtherModel
    directory: ModelDirectory | OtherModel
    if options.backend == "transformers":
        if options.adapter or options.quantize:
            raise ValueError("--adapter and --quantize do not go with --backend transformers")
        set_threads(options.threads)
        model = directory = TransformersModel(options.evaluator, options.dtype, pick_device(options.device))
    else:
        model, directory = open_model(options.evaluator, options.device, options.threads, **wanted)
    tokenizer = directory.require_tokenizer()
    template = options.template or (options.adapter and tuned_in(options.adapter))
    template = open_template(template, directory.path, tokenizer)
    made_by: dict[str, Any] = {
        "evaluator": directory.fingerprint(),
        "adapter": options.adapter and adapter_digest(options.adapter),
        "quantize": options.quantize,
        "dtype": model.dtype and NAMES[model.dtype],
        "shape": digest(model.config.features()),
        "tokenizer": tokenizer.fingerprint(),
        "template": template.name + template.digest,
    }
    return partial(judge_here, model, tokenizer, template, batch_size=options.batch_size), made_by

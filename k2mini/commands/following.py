"""Following a run: what is asked of the model while it trains, and the command `report`."""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict
from itertools import takewhile
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from k2mini.config import RunConfig
    from k2mini.data.tokenizer import Tokenizer
    from k2mini.distributed import World
    from k2mini.nn.llama import Llama
    from k2mini.training.loop import Answer
    from k2mini.training.run import Benchmark


def benchmark(config: RunConfig, world: World) -> Benchmark:
    """What scores `eval.benchmark`, its questions read before the long run begins."""
    from k2mini.data.chats import open_template
    from k2mini.evaluation.benchmarks import read_benchmark
    from k2mini.evaluation.evaluate import evaluate
    from k2mini.evaluation.instances import EvalConfig
    from k2mini.evaluation.report import summarise
    from k2mini.training.loop import ACCURACY
    from k2mini.weights.model_directory import ModelDirectory

    section, base = config.eval, ModelDirectory(config.model.path)
    template = open_template(section.template, base.path, base.require_tokenizer())
    eval_config = EvalConfig(section.scoring, template, section.answer_prefix)
    questions = [question for path in section.benchmark for question in read_benchmark(Path(path))]
    questions = [question for question in questions if section.limit is None or question.index < section.limit]

    def benchmark(model: Llama, tokenizer: Tokenizer) -> dict[str, float]:
        results = evaluate(model, tokenizer, questions, eval_config, world=world)
        summaries = summarise(questions, results, eval_config.settings())
        return {f"{ACCURACY}{row['task']}": row["accuracy"] for row in summaries}

    return benchmark


def answer(config: RunConfig) -> Answer:
    """What answers `eval.prompts`, encoded before the long run begins. All ranks call it, each has a part of the model.

    Every answer takes all of its steps and is cut afterwards: so ranks that share the model take as many as each other.
    """
    from k2mini.data.chats import open_template, stop_ids
    from k2mini.data.prompts import encode_prompt, rooms
    from k2mini.inference.answers import text_of
    from k2mini.inference.decoding import Decoding
    from k2mini.inference.generate import generate
    from k2mini.weights.model_directory import ModelDirectory

    section, base = config.eval, ModelDirectory(config.model.path)
    tokenizer, decoding = base.require_tokenizer(), Decoding(section.max_new_tokens)
    template = open_template(section.template or getattr(config.data, "template", "none"), base.path, tokenizer)
    try:
        prompts = [encode_prompt(tokenizer, template, prompt) for prompt in section.prompts]
        rooms(prompts, section.max_new_tokens, base.config.max_seq_len)
    except ValueError as error:
        raise ValueError(f"eval.prompts: {error}") from None
    ends = stop_ids(tokenizer, template)

    def answer(model: Llama) -> list[tuple[str, str]]:
        found = generate(model, prompts, decoding, stop_ids=(), vocab_size=tokenizer.vocab_size)
        for each in found:
            each.tokens = list(takewhile(lambda token: token not in ends, each.tokens))
        return [(prompt, text_of(tokenizer, each, ())) for prompt, each in zip(section.prompts, found, strict=True)]

    return answer


def report_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of `report`."""
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="run.dir of pretrain or finetune")
    parser.add_argument("--html", type=Path, metavar="FILE.html", help="also write one page: curves, settings, answers")
    parser.add_argument("--json", action="store_true", help="print all numbers as one JSON value")
    parser.add_argument("--force", action="store_true", help="replace a page that exists")
    parser.set_defaults(run=run_report)


def run_report(options: argparse.Namespace) -> None:
    """Say what runs did, and make the page of them."""
    from k2mini.files import output, write_text
    from k2mini.training.report import read_runs
    from k2mini.training.report_page import page

    if options.html is not None and options.html.suffix.lower() not in (".html", ".htm"):
        raise ValueError(f"--html {options.html}: a page's name ends in .html")
    with output(options.html, file=True, force=options.force):
        runs = read_runs(options.runs)
        if options.html is not None:
            write_text(options.html, page(runs))
    if options.json:
        print(json.dumps([asdict(run) for run in runs], ensure_ascii=False))
    else:
        print("\n\n".join(f"{run.name}\n{run.summary}" for run in runs))

"""The command line. What a verb needs is imported when it runs, so `k2mini --help` does not wait for torch."""

from __future__ import annotations

import argparse
import json
import logging
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

if TYPE_CHECKING:
    from k2mini.inference.sampling import Sampling
    from k2mini.nn.llama import Llama
    from k2mini.text.tokenizer import Tokenizer

log = logging.getLogger(__name__)

DTYPES = ("float32", "bfloat16", "float16", "float64")
TEMPLATES = "alpaca, alpaca_legacy, alpaca_short, vigogne or none"


def build_parser() -> argparse.ArgumentParser:
    """The parser of all verbs; each sets `run`, the function that carries it out."""
    parser = argparse.ArgumentParser(
        prog="k2mini",
        description="The K2 geoscience LLM pipeline in plain PyTorch.",
        epilog="k2mini VERB --help explains a verb.",
    )
    verbs = parser.add_subparsers(dest="verb", metavar="VERB", required=True)

    common = argparse.ArgumentParser(add_help=False)
    group = common.add_argument_group("common options")
    group.add_argument("--device", default="auto", help="cpu, cuda, cuda:1, … (default: cuda where there is one)")
    group.add_argument("--dtype", choices=DTYPES, help="precision (default: as stored on a GPU, float32 on a CPU)")
    group.add_argument("--threads", type=int, metavar="N", help="CPU threads (default: PyTorch's choice)")
    group.add_argument("--seed", type=int, default=0, metavar="N", help="seed of all that is drawn (default: 0)")
    group.add_argument("--debug", action="store_true", help="show the traceback of an error")

    model = argparse.ArgumentParser(add_help=False)
    model.add_argument("--model", required=True, metavar="DIR", help="a Hugging Face LLaMA directory")

    sampling = argparse.ArgumentParser(add_help=False)
    sampling.add_argument("--template", default="alpaca", metavar="NAME", help=f"{TEMPLATES} (default: alpaca)")
    sampling.add_argument("--max-new-tokens", type=int, default=256, metavar="N", help="at most N (default: 256)")
    sampling.add_argument("--temperature", type=float, default=0.0, metavar="T", help="0, the default, is greedy")
    sampling.add_argument("--top-k", type=int, default=0, metavar="K", help="sample among the K likeliest (0: all)")
    sampling.add_argument("--top-p", type=float, default=1.0, metavar="P", help="sample within probability P (1: all)")

    verb = verbs.add_parser("generate", parents=[model, sampling, common], help="answer one prompt")
    verb.add_argument("--prompt", required=True, metavar="TEXT", help="the instruction; '-' reads standard input")
    verb.add_argument("--json", action="store_true", help="print [{prompt, answer, tokens, finish}] and nothing else")
    verb.set_defaults(run=run_generate)

    verb = verbs.add_parser("chat", parents=[model, sampling, common], help="a conversation in the terminal")
    verb.set_defaults(run=run_chat)

    verb = verbs.add_parser("eval", parents=[model, common], help="score a model on GeoBench")
    verb.add_argument(
        "--benchmark",
        required=True,
        nargs="+",
        type=Path,
        metavar="FILE",
        help="geobench_npee.json and geobench_apstudy.json, as published",
    )
    verb.add_argument(
        "--scoring",
        choices=("letter", "text"),
        default="letter",
        help="letter: options listed, p(letter); text: not listed, p(option's text) per byte (default: letter)",
    )
    verb.add_argument("--template", default="alpaca", metavar="NAME", help=f"{TEMPLATES} (default: alpaca)")
    verb.add_argument("--answer-prefix", default="", metavar="TEXT", help="begin the answer with this")
    verb.add_argument("--limit", type=int, metavar="N", help="only the first N questions of each task")
    verb.add_argument("--out", type=Path, metavar="DIR", help="write results.jsonl and report.json there")
    verb.add_argument("--json", action="store_true", help="print the report as JSON and nothing else")
    verb.set_defaults(run=run_eval)
    return parser


def main(arguments: Sequence[str] | None = None) -> NoReturn:
    """Run the command line and exit: 0, 2 for what the user can mend, 130 after Ctrl-C."""
    options = build_parser().parse_args(arguments)
    _log_to_stderr()
    try:
        options.run(options)
        sys.stdout.flush()
        status = 0
    except KeyboardInterrupt:
        print("\nk2mini: interrupted", file=sys.stderr)
        status = 130
    except BrokenPipeError:  # the reader of our output has gone, as in `k2mini … | head`
        sys.stdout = None  # or the interpreter complains once more when it flushes
        status = 141
    except (ValueError, OSError) as error:
        if options.debug:
            raise
        print(f"k2mini: {error}", file=sys.stderr)
        status = 2
    sys.exit(status)


def _log_to_stderr() -> None:
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(logging.Formatter("k2mini: %(message)s"))
    package = logging.getLogger("k2mini")
    package.handlers = [handler]
    package.setLevel(logging.INFO)


def _device(options: argparse.Namespace) -> Any:
    import torch

    if options.threads is not None:
        if options.threads < 1:
            raise ValueError(f"--threads must be at least 1, not {options.threads}")
        torch.set_num_threads(options.threads)
    if options.device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(options.device)
    except RuntimeError:
        raise ValueError(f"--device {options.device} is not a device; try cpu, cuda or cuda:1") from None
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise ValueError(f"--device {options.device}: this machine has {torch.cuda.device_count()} CUDA devices")
    return device


def _load(options: argparse.Namespace) -> tuple[Llama, Tokenizer]:
    from k2mini.build import load_model

    model, tokenizer = load_model(options.model, dtype=options.dtype, device=_device(options))
    if tokenizer is None:
        raise ValueError(f"{options.model} has no tokenizer.model; copy the one the model was trained with")
    dtype = str(model.dtype).removeprefix("torch.")
    parameters = model.config.num_parameters() / 1e6
    log.info("%s: %.1f M parameters, %s, on %s", options.model, parameters, dtype, model.device)
    return model, tokenizer


def _sampling(options: argparse.Namespace) -> Sampling:
    from k2mini.inference.sampling import Sampling

    if options.max_new_tokens < 1:
        raise ValueError(f"--max-new-tokens must be at least 1, not {options.max_new_tokens}")
    return Sampling(options.temperature, options.top_k, options.top_p)


def run_generate(options: argparse.Namespace) -> None:
    """Print the answer as it is made, or JSON at the end."""
    import io

    from k2mini.inference.terminal import answer, encode_prompt
    from k2mini.text.prompts import get_template

    # What costs nothing is checked before the model is loaded.
    sampling, template = _sampling(options), get_template(options.template)
    prompt = sys.stdin.read() if options.prompt == "-" else options.prompt
    if not prompt.strip():
        raise ValueError("the prompt is empty")
    model, tokenizer = _load(options)
    text, completion = answer(
        model,
        tokenizer,
        encode_prompt(tokenizer, template, prompt),
        sampling=sampling,
        seed=options.seed,
        max_new_tokens=options.max_new_tokens,
        out=io.StringIO() if options.json else sys.stdout,
    )
    if options.json:
        entry = {"prompt": prompt, "answer": text, "tokens": completion.tokens, "finish": completion.finish}
        print(json.dumps([entry], ensure_ascii=False))
        return
    print()
    if completion.finish == "length":
        log.info("stopped after --max-new-tokens %d", options.max_new_tokens)


def run_chat(options: argparse.Namespace) -> None:
    """Talk until end of file."""
    from k2mini.inference.terminal import Conversation, chat
    from k2mini.text.prompts import get_template

    sampling, template = _sampling(options), get_template(options.template)
    model, tokenizer = _load(options)
    conversation = Conversation(
        model,
        tokenizer,
        template,
        sampling=sampling,
        seed=options.seed,
        max_new_tokens=options.max_new_tokens,
    )
    chat(conversation)


def run_eval(options: argparse.Namespace) -> None:
    """Score the benchmarks; print a table or JSON, and keep all results where --out says."""
    from k2mini.evaluation.geobench import load_geobench
    from k2mini.evaluation.report import summarise, table
    from k2mini.evaluation.run import evaluate
    from k2mini.files import make_writable, write_text
    from k2mini.text.prompts import get_template

    if options.limit is not None and options.limit < 1:
        raise ValueError(f"--limit must be at least 1, not {options.limit}")
    template = get_template(options.template)
    questions = [question for path in options.benchmark for question in load_geobench(path)]
    if options.limit is not None:
        questions = [question for question in questions if question.index < options.limit]
    if len({(question.task, question.index) for question in questions}) < len(questions):
        raise ValueError("the same benchmark is named twice")
    model, tokenizer = _load(options)
    if options.out is not None:
        make_writable(options.out)  # before the long run, not after it
    results = evaluate(
        model,
        tokenizer,
        questions,
        template=template,
        scoring=options.scoring,
        answer_prefix=options.answer_prefix,
    )
    settings = {
        "scoring": options.scoring,
        "template": options.template,
        "answer_prefix": options.answer_prefix,
        "shots": 0,
    }
    tasks = summarise(questions, results, settings)
    report = {"model": str(options.model), "tasks": tasks}
    if options.out is not None:
        write_text(options.out / "results.jsonl", "".join(result.line() + "\n" for result in results))
        write_text(options.out / "report.json", json.dumps(report, indent=2, ensure_ascii=False) + "\n")
    print(json.dumps(report, ensure_ascii=False) if options.json else table(tasks))

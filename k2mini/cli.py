"""The command line: commands, and how they end. One is imported when it runs: `--help` needs no torch."""

from __future__ import annotations

import argparse
import logging
import os
import sys
import time
from collections.abc import Sequence
from importlib import import_module
from pathlib import Path
from typing import Any, NoReturn

from k2mini.config import DTYPE_NAMES
from k2mini.errors import StoppedBySignalError

TEMPLATES = "alpaca, alpaca_legacy, alpaca_short, vigogne, k2, k2_wa or none"


def build_parser() -> argparse.ArgumentParser:
    """The parser of all commands; each sets `run`, the module and function that carry it out."""
    parser = argparse.ArgumentParser(
        prog="k2mini",
        description="The K2 geoscience LLM pipeline in plain PyTorch.",
        epilog="k2mini COMMAND --help explains a command.",
    )
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)

    quiet = argparse.ArgumentParser(add_help=False)
    quiet.add_argument("--debug", action="store_true", help="show the traceback of an error")

    target = argparse.ArgumentParser(add_help=False, parents=[quiet])
    target.add_argument("--out", required=True, type=Path, metavar="DIR")
    target.add_argument("--force", action="store_true", help="replace DIR, once what replaces it is complete")

    common = argparse.ArgumentParser(add_help=False, parents=[quiet])
    group = common.add_argument_group("common options")
    group.add_argument("--device", default="auto", help="cpu, cuda, cuda:1, … (default: cuda where there is one)")
    group.add_argument("--dtype", choices=DTYPE_NAMES, help="precision (default: as stored on a GPU, float32 on a CPU)")
    group.add_argument("--threads", type=int, metavar="N", help="CPU threads (default: PyTorch's choice)")
    group.add_argument("--seed", type=int, metavar="N", help="seed of all that is drawn (default: 0)")

    model = argparse.ArgumentParser(add_help=False)
    model.add_argument("--model", required=True, metavar="DIR", help="a Hugging Face LLaMA directory")
    model.add_argument("--adapter", metavar="DIR", help="a LoRA adapter for it (PEFT's format)")
    model.add_argument("--merge", action="store_true", help="put the adapter into the weights (default: beside them)")
    model.add_argument(
        "--quantize",
        choices=("int8", "w8a8"),
        help="keep the blocks' matrices in int8; w8a8: on a CPU quantise a single row's activations too (default: no)",
    )
    model.add_argument("--quantize-head", action="store_true", help="the vocabulary projection, too")
    model.add_argument("--compile", action="store_true", help="compile decoding: seconds at first, then faster")

    sampling = argparse.ArgumentParser(add_help=False)
    sampling.add_argument("--template", default="alpaca", metavar="NAME", help=f"{TEMPLATES} (default: alpaca)")
    sampling.add_argument("--max-new-tokens", type=int, default=256, metavar="N", help="at most N (default: 256)")
    sampling.add_argument("--temperature", type=float, default=0.0, metavar="T", help="0, the default, is greedy")
    sampling.add_argument("--top-k", type=int, default=0, metavar="K", help="sample among the K likeliest (0: all)")
    sampling.add_argument("--top-p", type=float, default=1.0, metavar="P", help="sample within probability P (1: all)")
    sampling.add_argument(
        "--repetition-penalty", type=float, default=1.0, metavar="R", help="above 1: less of the same"
    )
    sampling.add_argument("--no-repeat-ngram-size", type=int, default=0, metavar="N", help="no N tokens twice (0: off)")
    sampling.add_argument(
        "--stop", action="append", default=[], metavar="TEXT", help="end before TEXT; may be repeated"
    )
    sampling.add_argument("--num-beams", type=int, default=1, metavar="N", help="beam search with N beams (1: none)")
    sampling.add_argument("--length-penalty", type=float, default=1.0, metavar="X", help="of beams (default: 1)")
    sampling.add_argument("--early-stopping", action="store_true", help="of beams: end when N have ended")

    command = commands.add_parser(
        "demo", parents=[quiet], help="the whole pipeline in miniature, in minutes: start here"
    )
    command.add_argument("--out", type=Path, default=Path("runs/demo"), metavar="DIR", help="default: runs/demo")
    command.add_argument(
        "--seed", type=int, default=0, metavar="N", help="of the training, not of the facts (default: 0)"
    )
    command.add_argument("--threads", type=int, metavar="N", help="CPU threads (default: PyTorch's choice)")
    command.add_argument("--control", action="store_true", help="also tune the base without further pretraining")
    command.add_argument(
        "--quick", action="store_true", help="every stage in under a minute; it learns next to nothing"
    )
    command.add_argument("--json", action="store_true", help="print report.json and nothing else")
    command.set_defaults(run="demo.demo")

    command = commands.add_parser("generate", parents=[model, sampling, common], help="answer a prompt, or a list")
    source = command.add_mutually_exclusive_group(required=True)
    source.add_argument("--prompt", metavar="TEXT", help="the instruction; '-' reads standard input")
    source.add_argument("--input", metavar="FILE", help="many: .json, .jsonl, or a line each; '-' reads standard input")
    command.add_argument("--context", metavar="TEXT", help="the instruction's input, which templates put after it")
    command.add_argument("--batch-size", type=int, default=8, metavar="N", help="prompts at a time (default: 8)")
    command.add_argument("--out", type=Path, metavar="FILE", help="write the answers there, as JSON")
    command.add_argument(
        "--json", action="store_true", help="print [{prompt, answer, tokens, finish}] and nothing else"
    )
    command.set_defaults(run="inference.generate")

    command = commands.add_parser("chat", parents=[model, sampling, common], help="a conversation in the terminal")
    command.set_defaults(run="inference.chat")

    command = commands.add_parser("prepare", parents=[quiet], help="documents into a corpus for pretrain")
    command.add_argument("inputs", nargs="+", type=Path, metavar="INPUT", help=".jsonl, .txt, .md (or .gz), or folders")
    command.add_argument("--tokenizer", required=True, type=Path, metavar="FILE", help="tokenizer.model, or its folder")
    command.add_argument("--out", required=True, type=Path, metavar="DIR")
    command.add_argument("--val-percent", type=float, default=0.0, metavar="P", help="set aside P %% of the documents")
    command.add_argument("--workers", type=int, default=1, metavar="N", help="files encoded at a time (default: 1)")
    command.add_argument("--no-eos", dest="eos", action="store_false", help="no EOS after each document")
    command.add_argument(
        "--on-error",
        choices=("fail", "skip"),
        default="fail",
        help="at a malformed line: stop, or leave it out and count (default: fail)",
    )
    command.set_defaults(run="training.prepare")

    for name, what in (
        ("pretrain", "further pretraining"),
        ("finetune", "instruction tuning with LoRA"),
    ):
        command = commands.add_parser(name, parents=[common], help=what)
        command.add_argument("config", type=Path, metavar="CONFIG", help="a YAML file")
        command.add_argument("overrides", nargs="*", metavar="section.key=value", help="replaces a value of the file")
        command.set_defaults(run=f"training.{name}")

    command = commands.add_parser("preview", parents=[quiet], help="what a run would be fed, token by token")
    command.add_argument("config", type=Path, metavar="CONFIG", help="a YAML file of pretrain or finetune")
    command.add_argument("overrides", nargs="*", metavar="section.key=value", help="replaces a value of the file")
    command.add_argument("--number", type=int, default=2, metavar="N", help="samples (default: 2)")
    command.set_defaults(run="training.preview")

    command = commands.add_parser(
        "plan", parents=[quiet], help="memory, communication and length of a run, before it is run"
    )
    command.add_argument("config", type=Path, metavar="CONFIG", help="a YAML file of pretrain or finetune")
    command.add_argument("overrides", nargs="*", metavar="section.key=value", help="replaces a value of the file")
    command.add_argument("--world-size", type=int, required=True, metavar="N", help="ranks, one a GPU")
    command.add_argument("--gpu-memory", required=True, metavar="SIZE", help="of each GPU, such as 40GiB")
    command.add_argument("--json", action="store_true", help="print the plan as JSON and nothing else")
    command.set_defaults(run="training.plan")

    command = commands.add_parser("export", parents=[target], help="a checkpoint as a Hugging Face directory")
    command.add_argument("checkpoint", type=Path, metavar="CHECKPOINT", help="run.dir/checkpoints/step_N of pretrain")
    command.add_argument("--dtype", choices=DTYPE_NAMES, help="of the tensors written (default: the run's model.dtype)")
    command.set_defaults(run="training.export")

    command = commands.add_parser("plot", parents=[quiet], help="loss curves of runs as a picture (extra: plot)")
    command.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="run.dir of pretrain or finetune")
    command.add_argument("--out", required=True, type=Path, metavar="FILE.png")
    command.set_defaults(run="training.plot")

    command = commands.add_parser("merge", parents=[target], help="base + adapter as a Hugging Face directory")
    command.add_argument("--base", required=True, metavar="DIR")
    command.add_argument("--adapter", required=True, type=Path, metavar="DIR")
    command.set_defaults(run="weights.merge")

    command = commands.add_parser("delta", help="publish a tuned model as its difference from the base")
    kinds = command.add_subparsers(dest="kind", metavar="make|apply", required=True)
    kind = kinds.add_parser("make", parents=[target], help="tuned - base")
    kind.add_argument("--base", required=True, metavar="DIR")
    kind.add_argument("--tuned", required=True, metavar="DIR")
    kind.add_argument(
        "--format",
        choices=("bits", "add"),
        default="bits",
        help="bits: exact; add: float16 sums, as FastChat and K2 published them (default: bits)",
    )
    kind.set_defaults(run="weights.delta_make")
    kind = kinds.add_parser("apply", parents=[target], help="base + delta; FastChat's and K2's deltas, too")
    kind.add_argument("--base", required=True, metavar="DIR")
    kind.add_argument("--delta", required=True, metavar="DIR")
    kind.add_argument("--resize-vocab", action="store_true", help="tokens that the base lacks come from the delta")
    kind.set_defaults(run="weights.delta_apply")

    command = commands.add_parser("convert", parents=[target], help="a model in another format, dtype or shard size")
    command.add_argument(
        "model", metavar="DIR", help="Hugging Face's (safetensors, .bin) or Meta's (consolidated.*.pth)"
    )
    command.add_argument(
        "--to",
        required=True,
        choices=("hf", "bin", "meta", "gguf"),
        help="hf: safetensors; bin: PyTorch's; meta: consolidated.00.pth; gguf: a file for llama.cpp (extra: gguf)",
    )
    command.add_argument("--dtype", choices=DTYPE_NAMES[:3], help="of the tensors written (default: as stored)")
    command.add_argument("--quantize", choices=("int8",), help="with --to hf: store the blocks' matrices in int8")
    command.add_argument("--shard-size", default="5GB", metavar="SIZE", help="of a file at most (default: 5GB)")
    command.set_defaults(run="weights.convert")

    command = commands.add_parser(
        "verify", parents=[quiet], help="compare a directory that k2mini wrote with its manifest"
    )
    command.add_argument("directory", metavar="DIR")
    command.set_defaults(run="weights.verify")

    command = commands.add_parser("info", parents=[quiet], help="what a model or adapter is, from its headers alone")
    command.add_argument("directory", metavar="DIR")
    command.add_argument("--json", action="store_true", help="print it as JSON and nothing else")
    command.set_defaults(run="weights.info")

    command = commands.add_parser("eval", parents=[model, common], help="score a model on GeoBench")
    command.add_argument(
        "--benchmark",
        nargs="+",
        default=[],
        type=Path,
        metavar="FILE",
        help="geobench_npee.json and geobench_apstudy.json, as published; or .jsonl of question, choices, answer",
    )
    command.add_argument(
        "--tasks", nargs="+", metavar="TASK", help="npee/choice, npee/tf, ap (default: these), npee/noun, …"
    )
    command.add_argument(
        "--scoring",
        choices=("letter", "text", "k2"),
        default="letter",
        help="letter: options listed, p(letter); text: not listed, p(their texts); k2: as K2's code (default: letter)",
    )
    command.add_argument(
        "--normalize",
        choices=("byte", "token", "none"),
        default="byte",
        help="of text: divide by the option's length or not (default: byte)",
    )
    command.add_argument("--score-end", action="store_true", help="of text: score the answer's end (EOS) too")
    command.add_argument("--template", default="alpaca", metavar="NAME", help=f"{TEMPLATES} (default: alpaca)")
    command.add_argument("--answer-prefix", default="", metavar="TEXT", help=r"begin the answer so (\n: a new line)")
    command.add_argument("--shots", type=int, default=0, metavar="K", help="K examples before each question, by --seed")
    command.add_argument("--shots-file", metavar="FILE", help="examples as they stand in a file, such as K2's own four")
    command.add_argument("--limit", type=int, metavar="N", help="only the first N questions of each task")
    command.add_argument("--batch-size", type=int, default=16, metavar="N", help="questions at a time (default: 16)")
    command.add_argument("--max-new-tokens", type=int, default=128, metavar="N", help="of open tasks (default: 128)")
    command.add_argument("--perplexity", nargs="+", default=[], type=Path, metavar="FILE", help="text files to predict")
    command.add_argument("--window", type=int, metavar="N", help="of --perplexity: tokens seen (default: the context)")
    command.add_argument("--stride", type=int, metavar="N", help="of --perplexity: the window's step (default: half)")
    command.add_argument("--out", type=Path, metavar="DIR", help="keep results there, and go on with them")
    command.add_argument("--json", action="store_true", help="print the report as JSON and nothing else")
    command.set_defaults(run="evaluation.eval")

    command = commands.add_parser("compare", parents=[quiet], help="runs of eval side by side, with a paired test")
    command.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="--out of eval; the first is compared with")
    command.add_argument("--chart", type=Path, metavar="FILE.png", help="draw the accuracies (extra: plot)")
    command.add_argument("--json", action="store_true", help="print it as JSON and nothing else")
    command.set_defaults(run="evaluation.compare")
    _add_audit(commands, common)
    return parser


def _add_audit(commands: Any, common: argparse.ArgumentParser) -> None:
    """The command `audit` and its kinds."""
    command = commands.add_parser("audit", help="look into a model: lens, attention, attribute, patch, diff")
    kinds = command.add_subparsers(dest="kind", metavar="KIND", required=True)
    output = argparse.ArgumentParser(add_help=False)
    output.add_argument("--html", type=Path, metavar="FILE", help="write a page that a browser shows")
    output.add_argument("--json", action="store_true", help="print the findings as JSON and nothing else")
    output.add_argument("--model", required=True, nargs="+", metavar="DIR", help="one, or several side by side")
    output.add_argument("--adapter", metavar="DIR", help="a LoRA adapter for the last model")
    prompt = output.add_mutually_exclusive_group(required=True)
    prompt.add_argument("--prompt", metavar="TEXT")
    prompt.add_argument(
        "--question",
        nargs=3,
        metavar=("FILE", "TASK", "N"),
        help="question N (from 0) of a benchmark, as eval asks it, such as geobench_npee.json npee/choice 3",
    )
    output.add_argument("--template", metavar="NAME", help="of --question (default: alpaca)")
    for name, what in (
        ("lens", "what each layer would answer"),
        ("attention", "where heads look"),
        ("attribute", "what each part adds to the answer"),
        ("patch", "where two prompts' difference becomes the answer"),
    ):
        kind = kinds.add_parser(name, parents=[output, common], help=what)
        if name != "attention":
            kind.add_argument(
                "--target", metavar="TEXT", help="the answer, with its leading space (of --question: the key)"
            )
        if name in ("attribute", "patch"):
            kind.add_argument("--foil", metavar="TEXT", help="another answer, to compare the target with")
        if name == "attention":
            kind.add_argument("--layer", type=int, default=-1, metavar="N", help="whose patterns (default: the last)")
            kind.add_argument("--head", type=int, metavar="N", help="default: all")
        if name == "patch":
            corrupted = kind.add_mutually_exclusive_group(required=True)
            corrupted.add_argument("--corrupted", metavar="TEXT", help="another prompt, of as many tokens")
            corrupted.add_argument(
                "--replace", nargs=2, metavar=("OLD", "NEW"), help="the same prompt with other words in one place"
            )
            kind.add_argument("--point", default="residual_out", metavar="POINT", help="default: residual_out")
        kind.set_defaults(run=f"audit.{name}")
    kind = kinds.add_parser("diff", parents=[common], help="what training changed in the weights")
    kind.add_argument("base", metavar="BASE")
    kind.add_argument("others", nargs="+", metavar="OTHER", help="models, or adapters of BASE")
    kind.add_argument("--subspace", action="store_true", help="how much lies in the base's top subspace (slow)")
    kind.add_argument("--html", type=Path, metavar="FILE", help="write a page that a browser shows")
    kind.add_argument("--json", action="store_true", help="print the findings as JSON and nothing else")
    kind.set_defaults(run="audit.diff")


def main(arguments: Sequence[str] | None = None) -> NoReturn:
    """Run the command line and exit: 0, 2 for what the user can mend, 130 after Ctrl-C."""
    options = build_parser().parse_args(arguments)
    _log_to_stderr()
    try:
        module, command = options.run.split(".")
        getattr(import_module(f"k2mini.commands.{module}"), f"run_{command}")(options)
        sys.stdout.flush()
        status = 0
    except KeyboardInterrupt:
        print("\nk2mini: interrupted", file=sys.stderr)
        status = 130
    except StoppedBySignalError as stopped:
        print(f"k2mini: {stopped}", file=sys.stderr)
        status = 128 + stopped.number
    except BrokenPipeError:  # the reader of our output has gone, as in `k2mini … | head`
        sys.stdout = None  # or the interpreter complains once more when it flushes
        status = 141
    except (ValueError, OSError) as error:
        if options.debug:
            raise
        if os.environ.get("RANK", "0") != "0":
            time.sleep(2)  # most errors are all ranks': rank 0 says it, and torchrun ends the others
        print(f"k2mini: {_sentence(error)}", file=sys.stderr)
        status = 2
    sys.exit(status)


def _sentence(error: Exception) -> str:
    """What is said of an error; the system's own without its number."""
    if isinstance(error, OSError) and error.strerror:
        return f"{error.filename}: {error.strerror}" if error.filename else error.strerror
    return str(error)


def _log_to_stderr() -> None:
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(logging.Formatter("k2mini: %(message)s"))
    package = logging.getLogger("k2mini")
    package.handlers = [handler]
    # Of the ranks that torchrun starts, one speaks.
    package.setLevel(logging.INFO if os.environ.get("RANK", "0") == "0" else logging.ERROR)

"""The commands `generate` and `chat`."""

from __future__ import annotations

import argparse
import logging
import os
import sys
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from k2mini.commands.answering import answer_all
from k2mini.commands.common import LOADED, SHARD, TEMPLATE, tuned_in
from k2mini.commands.ranks import joined
from k2mini.data.chats import open_template, stop_ids
from k2mini.data.prompts import encode_prompt, room, utf8

if TYPE_CHECKING:
    from k2mini.commands.answering import Asked
    from k2mini.inference.decoding import Decoding
    from k2mini.nn.llama import Llama
    from k2mini.weights.model_directory import ModelDirectory

log = logging.getLogger("k2mini.commands")


def generate_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of `generate`."""
    from k2mini.inference.decoding import Decoding

    _decoding_arguments(parser)
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--prompt", type=utf8, metavar="TEXT", help="the instruction; '-' reads standard input")
    source.add_argument(
        "--input", metavar="FILE", help="many: JSON, JSONL, CSV, or a line each; '-' reads standard input"
    )
    parser.add_argument(
        "--context", type=utf8, metavar="TEXT", help="the instruction's input, which templates put after it"
    )
    batch_size = Decoding.batch_size
    parser.add_argument(
        "--batch-size", type=int, default=batch_size, metavar="N", help=f"prompts at a time (default: {batch_size})"
    )
    parser.add_argument(
        "--out",
        type=Path,
        metavar="FILE",
        help="write the answers there: a .jsonl as they come, else JSON in the end. After a stop it goes on",
    )
    parser.add_argument("--force", action="store_true", help="replace FILE of --out")
    parser.add_argument("--shard", **SHARD)
    parser.add_argument("--json", action="store_true", help="print [{prompt, answer, tokens, finish}] and nothing else")
    parser.set_defaults(run=run_generate)


def chat_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of `chat`."""
    _decoding_arguments(parser)
    parser.set_defaults(run=run_chat)


def _decoding_arguments(parser: argparse.ArgumentParser) -> None:
    """What `generate` and `chat` share: the template, and the fields of `Decoding`, whose defaults they are."""
    from k2mini.inference.beam import Beams
    from k2mini.inference.decoding import Decoding
    from k2mini.inference.sampling import Sampling

    def number(option: str, kind: type, default: float, metavar: str, what: str) -> None:
        parser.add_argument(option, type=kind, default=default, metavar=metavar, help=f"{what} (default: {default:g})")

    parser.add_argument("--template", **TEMPLATE)
    number("--max-new-tokens", int, Decoding.max_new_tokens, "N", "at most N")
    number("--temperature", float, Sampling.temperature, "T", "0 is greedy")
    number("--top-k", int, Sampling.top_k, "K", "sample among the K likeliest; 0: all")
    number("--top-p", float, Sampling.top_p, "P", "sample within probability P; 1: all")
    number("--repetition-penalty", float, Sampling.repetition_penalty, "R", "above 1: less of the same")
    number("--no-repeat-ngram-size", int, Sampling.no_repeat_ngram_size, "N", "no N tokens twice; 0: off")
    parser.add_argument(
        "--stop", action="append", type=utf8, default=[], metavar="TEXT", help="end before TEXT; may be repeated"
    )
    number("--num-beams", int, 1, "N", "beam search with N beams; 1: none")
    number("--length-penalty", float, Beams.length_penalty, "X", "of beams: above 0, longer answers gain")
    parser.add_argument("--early-stopping", action="store_true", help="of beams: end when --num-beams have ended")


def _open(options: argparse.Namespace) -> Asked:
    """The directory that the options name, its tokenizer, and how it is asked. Raises ValueError where it has none."""
    from k2mini.weights.model_directory import ModelDirectory

    directory = ModelDirectory(options.model)
    tokenizer = directory.require_tokenizer()
    name = options.template or (options.adapter and tuned_in(options.adapter))
    return directory, tokenizer, open_template(name, directory.path, tokenizer)


def _load(options: argparse.Namespace, directory: ModelDirectory, **wanted: Any) -> Llama:
    """The model, as the options want it, and `wanted` of `load_model`."""
    from k2mini.build import open_model
    from k2mini.inference.compile import compile_decoding

    wanted |= {name: getattr(options, name) for name in LOADED}
    model, _ = open_model(directory, options.device, options.threads, **wanted)
    if options.compile:
        compile_decoding(model)
    return model


def _decoding(options: argparse.Namespace) -> Decoding:
    """How to decode; what has no effect is said."""
    from k2mini.inference.beam import Beams
    from k2mini.inference.decoding import Decoding
    from k2mini.inference.sampling import Sampling

    if options.max_new_tokens < 1:
        raise ValueError(f"--max-new-tokens must be at least 1, not {options.max_new_tokens}")
    sampling = Sampling(
        options.temperature,
        options.top_k,
        options.top_p,
        repetition_penalty=options.repetition_penalty,
        no_repeat_ngram_size=options.no_repeat_ngram_size,
    )
    beams = None
    drawing = (("temperature", 0), ("top_k", 0), ("top_p", 1), ("seed", None))
    idle = [name for name, off in drawing if getattr(options, name) != off]
    names = ", ".join("--" + name.replace("_", "-") for name in idle)
    if options.num_beams != 1:
        beams = Beams(options.num_beams, options.length_penalty, options.early_stopping)
        if idle:
            log.warning("%s: no effect with --num-beams %d, which searches and does not sample", names, beams.num_beams)
    elif idle and options.temperature == 0:
        log.warning("%s: no effect without --temperature, which is 0: the likeliest token is taken", names)
    idle = ["--length-penalty"] * (options.length_penalty != Beams.length_penalty)
    idle += ["--early-stopping"] * options.early_stopping
    if beams is None and idle:
        log.warning("%s: no effect without --num-beams", ", ".join(idle))
    return Decoding(
        options.max_new_tokens,
        sampling,
        options.seed or 0,
        tuple(options.stop),
        beams,
        getattr(options, "batch_size", 1),
    )


def run_generate(options: argparse.Namespace) -> None:
    """Print an answer as it is made, or the answers to many as JSON."""
    from k2mini.distributed import ALONE

    # What costs nothing is checked before the model is loaded.
    spread = options.shard or "LOCAL_RANK" in os.environ
    if spread and options.input in (None, "-"):
        raise ValueError("a prompt or standard input is for one process; --input FILE gives ranks something to do")
    decoding, questions = _decoding(options), _questions(options)
    opened = _open(options)
    if spread:
        with joined(options) as world:
            answer_all(options, questions, opened, decoding, partial(_load, options, opened[0]), world)
    elif options.input is None and decoding.beams is None and not options.json and options.out is None:
        _print_answer(options, questions[0], opened, decoding)
    else:
        answer_all(options, questions, opened, decoding, partial(_load, options, opened[0]), ALONE)


def _questions(options: argparse.Namespace) -> list[tuple[str, str]]:
    """What is asked, each with its input or ''."""
    from k2mini.inference.answers import read_questions

    if options.input is None:
        prompt = options.prompt if options.prompt != "-" else sys.stdin.read().removeprefix("\ufeff")
        try:
            prompt.encode()
        except UnicodeEncodeError as error:
            before = prompt[max(0, error.start - 20) : error.end]
            raise ValueError(f"standard input is not UTF-8 (at the end of {before!r})") from None
        if not prompt.strip():
            raise ValueError("the prompt is empty")
        return [(prompt, options.context or "")]
    if options.context is not None:
        raise ValueError("--context goes with --prompt; a record of --input has a field `input` of its own")
    if options.input == "-":
        return read_questions(Path("standard input"), sys.stdin.buffer.read())
    return read_questions(Path(options.input))


def _print_answer(options: argparse.Namespace, question: tuple[str, str], opened: Asked, decoding: Decoding) -> None:
    """Print one answer, as it is made."""
    from k2mini.inference.decoding import TextStream
    from k2mini.inference.generate import generate

    directory, tokenizer, template = opened
    prompt, model = encode_prompt(tokenizer, template, *question), _load(options, directory)
    stream, context = TextStream(tokenizer, decoding.stop), model.config.max_seq_len
    new = room(len(prompt), decoding.max_new_tokens, context)

    def write(_row: int, token: int) -> bool:
        return stream.write(token, sys.stdout)

    ends, vocab_size = stop_ids(tokenizer, template), tokenizer.vocab_size
    (completion,) = generate(model, [prompt], decoding, stop_ids=ends, vocab_size=vocab_size, stopping_criteria=write)
    print(stream.flush())
    if completion.finish == "length":
        cut = new < decoding.max_new_tokens
        where = f"{new} tokens: the model's context of {context} ends" if cut else f"--max-new-tokens {new}"
        log.info("stopped after %s", where)


def run_chat(options: argparse.Namespace) -> None:
    """Talk until end of file."""
    from k2mini.inference import terminal

    decoding = _decoding(options)
    directory, tokenizer, template = _open(options)
    terminal.chat(terminal.Conversation(_load(options, directory), tokenizer, template, decoding))

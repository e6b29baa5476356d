"""The commands `generate` and `chat`."""

from __future__ import annotations

import argparse
import json
import logging
import sys
from pathlib import Path

from k2mini.commands.common import load
from k2mini.data.prompts import get_template
from k2mini.files import progress_bar, write_text
from k2mini.inference import terminal
from k2mini.inference.answers import Decoding, answers, read_questions
from k2mini.inference.beam import Beams
from k2mini.inference.generate import check_length
from k2mini.inference.sampling import Sampling

log = logging.getLogger("k2mini.commands")


def _decoding(options: argparse.Namespace) -> Decoding:
    """How to decode; what has no effect is said."""
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
    if options.num_beams != 1:
        beams = Beams(options.num_beams, options.length_penalty, options.early_stopping)
        idle = [name for name, off in (("temperature", 0), ("top_k", 0), ("top_p", 1)) if getattr(options, name) != off]
        if idle:
            names = ", ".join("--" + name.replace("_", "-") for name in idle)
            log.warning("%s: no effect with --num-beams %d, which searches and does not sample", names, beams.num_beams)
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
    # What costs nothing is checked before the model is loaded.
    decoding, template = _decoding(options), get_template(options.template)
    if options.input is not None:
        name = options.input
        questions = read_questions(Path(name), sys.stdin.read() if name == "-" else None)
    else:
        questions = [sys.stdin.read() if options.prompt == "-" else options.prompt]
    model, tokenizer = load(options)
    prompts = [terminal.encode_prompt(tokenizer, template, question) for question in questions]
    if options.input is None and decoding.beams is None and not options.json and options.out is None:
        text, completion = terminal.answer(
            model,
            tokenizer,
            prompts[0],
            sampling=decoding.sampling,
            seed=decoding.seed,
            max_new_tokens=decoding.max_new_tokens,
            out=sys.stdout,
            stop=decoding.stop,
        )
        print()
        if completion.finish == "length":
            log.info("stopped after --max-new-tokens %d", decoding.max_new_tokens)
        return
    field = "prompt" if options.input is None else "question"
    for prompt in prompts:
        check_length(len(prompt), decoding.max_new_tokens, model.config.max_seq_len)
    entries = []
    with progress_bar(len(prompts), "answering", "questions", shown=len(prompts) > 1) as progress:
        for question, (text, completion) in zip(questions, answers(model, tokenizer, prompts, decoding), strict=True):
            entries.append({field: question, "answer": text, "tokens": completion.tokens, "finish": completion.finish})
            progress.update()
    if options.out is not None:
        write_text(options.out, json.dumps(entries, ensure_ascii=False, indent=1) + "\n")
        print(options.out)
    elif options.input is not None or options.json:
        print(json.dumps(entries, ensure_ascii=False))
    else:
        print(entries[0]["answer"])


def run_chat(options: argparse.Namespace) -> None:
    """Talk until end of file."""
    decoding, template = _decoding(options), get_template(options.template)
    model, tokenizer = load(options)
    conversation = terminal.Conversation(
        model,
        tokenizer,
        template,
        sampling=decoding.sampling,
        seed=decoding.seed,
        max_new_tokens=decoding.max_new_tokens,
        stop=decoding.stop,
    )
    terminal.chat(conversation)

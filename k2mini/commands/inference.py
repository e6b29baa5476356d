"""The commands `generate` and `chat`."""

from __future__ import annotations

import argparse
import json
import logging
import sys
from pathlib import Path
from typing import Any

import torch

from k2mini.commands.common import load
from k2mini.data.prompts import check_length, encode_prompt, get_template
from k2mini.data.tokenizer import TextStream, Tokenizer
from k2mini.files import write_text
from k2mini.inference import terminal
from k2mini.inference.answers import answers, read_questions
from k2mini.inference.generate import Completion, Decoding, collect, prefill, steps
from k2mini.inference.sampling import Beams, Sampling
from k2mini.nn.llama import Llama

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
    questions = _questions(options)
    model, tokenizer = load(options)
    prompts = [encode_prompt(tokenizer, template, *question) for question in questions]
    for prompt in prompts:
        check_length(len(prompt), decoding.max_new_tokens, model.config.max_seq_len)
    if options.input is None and decoding.beams is None and not options.json and options.out is None:
        _print_answer(model, tokenizer, prompts[0], decoding)
        return
    field = "prompt" if options.input is None else "question"
    entries: list[dict[str, Any]] = []
    found = answers(model, tokenizer, prompts, decoding, "answering" if len(prompts) > 1 else None)
    for (question, context), (text, completion) in zip(questions, found, strict=True):
        asked = {field: question, **({"input": context} if context else {})}
        entries.append({**asked, "answer": text, "tokens": completion.tokens, "finish": completion.finish})
    if options.out is not None:
        write_text(options.out, json.dumps(entries, ensure_ascii=False, indent=1) + "\n")
        print(options.out)
    elif options.input is not None or options.json:
        print(json.dumps(entries, ensure_ascii=False))
    else:
        print(entries[0]["answer"])


def _questions(options: argparse.Namespace) -> list[tuple[str, str]]:
    """What is asked, each with its input or ''."""
    if options.input is None:
        return [(sys.stdin.read() if options.prompt == "-" else options.prompt, options.context or "")]
    if options.context is not None:
        raise ValueError("--context goes with --prompt; a record of --input has a field `input` of its own")
    if options.input == "-":
        return read_questions(Path("standard input"), sys.stdin.buffer.read())
    return read_questions(Path(options.input))


def _print_answer(model: Llama, tokenizer: Tokenizer, prompt: list[int], decoding: Decoding) -> None:
    """Print one answer, as it is made."""
    stream, completion, new = TextStream(tokenizer, decoding.stop), Completion(), decoding.max_new_tokens
    stop_ids, vocab_size = [tokenizer.eos_id], tokenizer.vocab_size
    with torch.inference_mode():
        cache, logits = prefill(model, [prompt], capacity=len(prompt) + new)
        decoded = steps(model, logits, cache, [prompt], decoding, stop_ids=stop_ids, vocab_size=vocab_size)
        for (step,) in collect([completion], decoded, new, stop_ids):
            if step is not None and stream.write(step.token, sys.stdout):
                break
    print(stream.flush())
    if completion.finish == "length" and not stream.stopped:
        log.info("stopped after --max-new-tokens %d", new)


def run_chat(options: argparse.Namespace) -> None:
    """Talk until end of file."""
    decoding, template = _decoding(options), get_template(options.template)
    model, tokenizer = load(options)
    terminal.chat(terminal.Conversation(model, tokenizer, template, decoding))

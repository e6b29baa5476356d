"""`k2mini generate` of lists of prompts, of whose answers a file keeps each: on one process, or on ranks."""

from __future__ import annotations

import argparse
import json
import logging
import signal
from collections.abc import Callable
from contextlib import closing, nullcontext
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from k2mini.commands.ranks import check_same, mesh_of
from k2mini.data.chats import stop_ids
from k2mini.data.prompts import encode_prompt, room
from k2mini.errors import StoppedBySignalError

if TYPE_CHECKING:
    from k2mini.data.prompts import AnyTemplate
    from k2mini.data.tokenizer import Tokenizer
    from k2mini.distributed import World
    from k2mini.inference.decoding import Decoding
    from k2mini.inference.journal import Journal
    from k2mini.nn.llama import Llama
    from k2mini.weights.model_directory import ModelDirectory

    Asked = tuple[ModelDirectory, Tokenizer, AnyTemplate]

log = logging.getLogger("k2mini.commands")


def answer_all(
    options: argparse.Namespace,
    questions: list[tuple[str, str]],
    opened: Asked,
    decoding: Decoding,
    load: Callable[..., Llama],
    world: World,
) -> None:
    """Answer, then print or write the answers; where they can't be written, they are printed before that is said.

    Args:
        load: the model as the options want it, once it is needed.
    """
    from k2mini.evaluation.evaluate import digest
    from k2mini.files import check_output, output, write_text
    from k2mini.inference.journal import answer_journal

    asked = [{"prompt": question, **({"input": context} if context else {})} for question, context in questions]
    read = [path for path in (options.model, options.adapter, options.input) if path not in (None, "-")]
    out, by_line = options.out, options.out is not None and options.out.suffix.lower() == ".jsonl"
    with output(out if world.rank == 0 else None, file=True, force=options.force or by_line, inputs=read):
        # What is not by line grows in a .part beside it, until all answers are there.
        path = out if out is None or by_line else out.with_name(f"{out.name}.part")
        if path is not None and world.rank == 0:
            check_output(path, file=True, force=True, inputs=read)
        made_by = "" if path is None and world.size == 1 else _made_by(options, opened, decoding)
        if world.size > 1:
            hashes = {"the hash of model and settings": made_by, "the hash of what is asked": digest(asked)}
            check_same(world, options, hashes)
        journal = answer_journal(path, asked, made_by, force=options.force, world=world)
        done = len(journal.entries)
        try:
            if done < len(asked):
                _answer(options, questions, asked, opened, decoding, load(**mesh_of(world, options)), journal, world)
            found = journal.finish(range(len(asked)))
            if world.rank:
                return
            answered = [found[place] for place in range(len(asked))]
            if path != out:
                write_text(out, json.dumps(answered, ensure_ascii=False, indent=1) + "\n")
                path.unlink()
        except OSError:
            if path is not None and len(journal.entries) > done:
                print(json.dumps([journal.entries[place] for place in sorted(journal.entries)], ensure_ascii=False))
            raise
        except KeyboardInterrupt:
            if journal.own is None or not journal.kept or not journal.own.exists():
                raise
            number = journal.own.read_bytes()[: journal.kept].count(b"\n")
            kept = f"{number} of {len(asked)} answers are in {journal.own}"
            raise StoppedBySignalError(signal.SIGINT, kept) from None
    as_text = options.input is None and not options.json
    if out is not None and options.json:
        log.info("the answers are in %s", out)
        out = None
    print(out or (answered[0]["answer"] if as_text else json.dumps(answered, ensure_ascii=False)))


def _answer(
    options: argparse.Namespace,
    questions: list[tuple[str, str]],
    asked: list[dict[str, Any]],
    opened: Asked,
    decoding: Decoding,
    model: Llama,
    journal: Journal,
    world: World,
) -> None:
    """Let a journal have the answers that it lacks, each rank a share of them."""
    from k2mini.inference.answers import answers, rank_share
    from k2mini.nn.uneven import uneven

    _, tokenizer, template = opened
    prompts = []
    for number, question in enumerate(questions):
        where = "" if options.input is None else f"{options.input}, question {number}: "
        try:
            prompts.append(encode_prompt(tokenizer, template, *question))
        except ValueError as error:
            raise ValueError(f"{where}{error}") from None
        room(len(prompts[-1]), decoding.max_new_tokens, model.config.max_seq_len, where)
    label, ends = "answering" if len(prompts) > 1 and world.rank == 0 else None, stop_ids(tokenizer, template)
    missing = [place for place in range(len(prompts)) if place not in journal.entries]
    mine = rank_share(missing, decoding, world)
    how: dict[str, Any] = {"stop_ids": ends, "places": mine}
    made = closing(answers(model, tokenizer, prompts, decoding, label, **how)) if mine else nullcontext(())
    with uneven(model, world), made as found:  # closed before the end is said, should an interrupt come in between
        for place, (text, completion) in zip(mine, found, strict=True):
            entry = {"answer": text, "tokens": completion.tokens, "finish": completion.finish}
            journal.add(place, {**asked[place], **entry})


def _made_by(options: argparse.Namespace, opened: Asked, decoding: Decoding) -> str:
    """A digest of all that answers follow from, but for what is asked."""
    from k2mini.build import empty_model, pick_device, resolve_dtype
    from k2mini.commands.evaluation import kept_by
    from k2mini.evaluation.evaluate import digest

    directory, tokenizer, template = opened
    empty_model(directory)  # says what is missing
    stored = directory.reader.dtype("model.embed_tokens.weight")
    dtype = str(resolve_dtype(options.dtype, stored, pick_device(options.device)))
    model = [kept_by(options, directory.fingerprint(), {}, []), directory.config.features(), dtype]
    ends = [stop_ids(tokenizer, template)] * (stop_ids(tokenizer, template) != (tokenizer.eos_id,))
    return digest([model, tokenizer.fingerprint(), template.name + template.digest, asdict(decoding), *ends])

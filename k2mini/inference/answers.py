"""Lists of questions to lists of answers, as K2's generation script makes them."""

from __future__ import annotations

import logging
import re
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from k2mini.data.documents import read_entries
from k2mini.data.prompts import rooms
from k2mini.data.tokenizer import TextStream, Tokenizer
from k2mini.errors import short
from k2mini.files import progress_bar
from k2mini.inference.beam import beam_search
from k2mini.inference.generate import Completion, Decoding, generate
from k2mini.nn.llama import Llama

log = logging.getLogger(__name__)

FIELDS = ("question", "prompt", "instruction")
# A list or an object; a line of text may begin with a bracket, but hardly so.
JSON_START = re.compile(rb'(?:\xef\xbb\xbf)?\s*(?:\[\s*["\[{\]]|\{\s*["}])')


def read_questions(path: Path, content: bytes | None = None) -> list[tuple[str, str]]:
    """The questions of a file, each with its input: the text that an instruction is about, or ''.

    The file holds a JSON list, or JSONL, of strings or of objects with one of `FIELDS` and, where there is one, an
    `input`; or plain text, a question a line. What it holds decides, except that a file called .json or .jsonl is never
    taken for plain text.

    Args:
        content: what stands in the file, where it has been read already (standard input).

    Raises ValueError, naming the file and the entry, where there is none or one is not a question.
    """
    content = path.read_bytes() if content is None else content
    named_json = path.suffix.lower() in (".json", ".jsonl")
    if named_json or JSON_START.match(content):
        return [_question(entry, f"{path}, {place}") for place, entry in read_entries(path, content)]
    try:
        lines = re.split("\r?\n", content.decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 (byte {error.start})") from None
    questions = [(line, "") for line in lines if line.strip()]
    if not questions:
        raise ValueError(f"{path} holds no question")
    return questions


def _question(entry: Any, place: str) -> tuple[str, str]:
    record = entry if isinstance(entry, dict) else {FIELDS[0]: entry}
    asked = [field for field in FIELDS if record.get(field) is not None]
    if len(asked) > 1:
        raise ValueError(f"{place} has both `{asked[0]}` and `{asked[1]}`; leave the one that is to be asked")
    question, context = record.get(asked[0]) if asked else None, record.get("input")
    if not isinstance(question, str) or not question.strip():
        fields = " or ".join(f"`{field}`" for field in FIELDS)
        raise ValueError(f"{place} is neither a question nor an object whose {fields} is text")
    if context is not None and not isinstance(context, str):
        raise ValueError(f"{place}: `input` must be text, not {short(context)}")
    return question, context or ""


def answers(
    model: Llama, tokenizer: Tokenizer, prompts: Sequence[Sequence[int]], decoding: Decoding, label: str | None = None
) -> Iterator[tuple[str, Completion]]:
    """Answer prompts in batches, in their order.

    Args:
        label: show progress under this name, in tokens: those of the prompts, and the new ones that there may be.

    Yields: each one's text and completion. How many were cut where the model's context ends is said at the end.
    """
    new, cut = rooms(prompts, decoding.max_new_tokens, model.config.max_seq_len), []
    tokens = [len(prompt) + number for prompt, number in zip(prompts, new, strict=True)]
    with progress_bar(sum(tokens), label or "", "tokens", shown=label is not None) as progress:
        for start in range(0, len(prompts), decoding.batch_size):
            batch = slice(start, start + decoding.batch_size)
            here = replace(decoding, seed=decoding.seed + start)
            for place, found in enumerate(_batch(model, tokenizer, prompts[batch], here), start=start):
                if found[1].finish == "length" and new[place] < decoding.max_new_tokens:
                    cut.append(new[place])
                yield found
                progress.set_postfix_str(f"{place + 1}/{len(prompts)} answers", refresh=False)
                progress.update(tokens[place])
    if cut:
        after = f"{min(cut)} to {max(cut)}" if min(cut) < max(cut) else cut[0]
        context = model.config.max_seq_len
        log.warning(
            "%d of %d answers end after %s tokens, with the model's context of %d",
            len(cut),
            len(prompts),
            after,
            context,
        )


def _batch(
    model: Llama, tokenizer: Tokenizer, prompts: Sequence[Sequence[int]], decoding: Decoding
) -> list[tuple[str, Completion]]:
    stop_ids, vocab_size = [tokenizer.eos_id], tokenizer.vocab_size
    if decoding.beams is not None:
        found = beam_search(model, prompts, decoding, stop_ids=stop_ids, vocab_size=vocab_size)
        completions = [best for best, *_ in found]
    else:
        streams = [TextStream(tokenizer, decoding.stop) for _ in prompts]

        def stopping_criteria(row: int, token: int) -> bool:
            streams[row].push(token)
            return streams[row].stopped

        completions = generate(
            model,
            prompts,
            decoding,
            stop_ids=stop_ids,
            vocab_size=vocab_size,
            stopping_criteria=stopping_criteria if decoding.stop else None,
        )
    return [(_text(tokenizer, completion, decoding.stop), completion) for completion in completions]


def _text(tokenizer: Tokenizer, completion: Completion, stop: Sequence[str]) -> str:
    """A completion's text, before the first stop string. A search does not stop at one: it may stand further in."""
    stream = TextStream(tokenizer, stop)
    for token in completion.tokens:
        stream.push(token)
    stream.flush()
    if stream.stopped:
        completion.finish = "stop"
    return stream.text

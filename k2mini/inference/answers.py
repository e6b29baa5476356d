"""Lists of questions to lists of answers, as K2's generation script makes them."""

from __future__ import annotations

import csv
import io
import logging
import re
from collections.abc import Generator, Iterator, Sequence
from pathlib import Path
from typing import Any

from k2mini.data.documents import data_path, read_entries
from k2mini.data.prompts import rooms
from k2mini.data.tokenizer import Tokenizer
from k2mini.distributed import World
from k2mini.errors import short, some
from k2mini.files import progress_bar
from k2mini.inference.beam import beam_search
from k2mini.inference.decoding import Completion, Decoding, TextStream
from k2mini.inference.generate import completions
from k2mini.nn.llama import Llama

log = logging.getLogger(__name__)
Prompts = Sequence[Sequence[int]]

FIELDS = ("question", "prompt", "instruction")
# A list or an object; a line of text may begin with a bracket, but hardly so.
JSON_START = re.compile(rb'(?:\xef\xbb\xbf)?\s*(?:\[\s*["\[{\]]|\{\s*["}])')
# A header of several cells, one of which names the questions.
CSV_START = re.compile(
    rf'(?=[^\n]*[,;\t])(?:[ "]*\w+[ "]*[,;\t])*[ "]*(?:{"|".join(FIELDS)})[ "]*(?:[,;\t][ "]*\w+[ "]*)*\r?\n',
    re.IGNORECASE,
)


def read_questions(path: Path, content: bytes | None = None) -> list[tuple[str, str]]:
    """The questions of a file, each with its input: the text that an instruction is about, or ''.

    The file holds a JSON list, or JSONL, of strings or of objects with one of `FIELDS` and, where there is one, an
    `input`; or CSV with a header that has them as columns; or plain text, a question a line. What it holds decides,
    except that a file called .json, .jsonl, .csv or .tsv is never taken for plain text, and that JSONL of strings is
    known by its name alone.

    Args:
        content: what stands in the file, where it has been read already (standard input).

    Raises ValueError, naming the file and the entry, where there is none or one is not a question.
    """
    content = data_path(path).read_bytes() if content is None else content
    suffix = path.suffix.lower()
    if suffix in (".json", ".jsonl") or JSON_START.match(content):
        return [_question(entry, f"{path}, {place}") for place, entry in read_entries(path, content)]
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 (byte {error.start})") from None
    if suffix in (".csv", ".tsv") or CSV_START.match(text):
        questions = _table(path, text)
    else:
        questions = [(line, "") for line in re.split("\r?\n", text) if line.strip()]
    if not questions:
        raise ValueError(f"{path} holds no question")
    return questions


def _table(path: Path, text: str) -> list[tuple[str, str]]:
    """The questions of CSV, or of values separated by tabs. Columns that are not used are said."""
    tabs = path.suffix.lower() == ".tsv" or "\t" in text.partition("\n")[0]
    form: dict[str, Any] = {"delimiter": "\t" if tabs else ",", "skipinitialspace": True, "strict": True}
    rows = csv.DictReader(io.StringIO(text, newline=""), **form)
    questions = []
    try:
        rows.fieldnames = columns = [name.strip() for name in rows.fieldnames or []]
        used = [name for name in columns if name in (*FIELDS, "input")]
        if not {*used} & {*FIELDS} or len({*used}) < len(used):
            fields = " or ".join(f"`{field}`" for field in FIELDS)
            raise ValueError(f"{path} must have one column {fields}; its columns are {short(columns)}")
        for row in rows:
            place = f"{path}, line {rows.line_num}"
            if None in row:
                raise ValueError(f"{place} has more cells than the header")
            questions.append(_question({name: row[name] for name in used if row[name]}, place))
    except csv.Error as error:
        raise ValueError(f"{path}, line {rows.reader.line_num} is not valid CSV: {error}") from None
    if unused := [name for name in columns if name not in used]:
        log.info("%s: columns that are not used: %s", path, some(unused))
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
    model: Llama,
    tokenizer: Tokenizer,
    prompts: Prompts,
    decoding: Decoding,
    label: str | None = None,
    first: int = 0,
    *,
    stop_ids: Sequence[int] | None = None,
    places: Sequence[int] | None = None,
) -> Generator[tuple[str, Completion], None, None]:
    """Answer prompts, in their order.

    Args:
        label: show progress under this name, in tokens: those of the prompts, and the new ones that there may be.
        first: begin with this one, as if those before it had been answered too.
        stop_ids: each of them ends an answer; None: the tokenizer's.
        places: answer these, in rising order; None: all from `first` on.

    Yields: each one's text and completion. How many were cut where the model's context ends is said at the end.
    """
    new, cut = rooms(prompts, decoding.max_new_tokens, model.config.max_seq_len), []
    tokens = [len(prompt) + number for prompt, number in zip(prompts, new, strict=True)]
    wanted = range(first, len(prompts)) if places is None else places
    asked = {*wanted}
    # A search's batches stay as they are: its scores' last bits depend on them.
    batches = {place // _unit(decoding) for place in wanted}
    run = [place for place in range(len(prompts)) if place // _unit(decoding) in batches]
    how = {"stop_ids": tokenizer.stop_ids if stop_ids is None else stop_ids, "vocab_size": tokenizer.vocab_size}
    found = (_searched if decoding.beams else _continued)(model, tokenizer, prompts, run, decoding, **how)
    done = len(prompts) - len(wanted)
    done = done if [*wanted] == [*range(done, len(prompts))] else 0  # a part of them has its own progress
    before, number = sum(tokens[:done]), done + len(wanted)
    total = before + sum(tokens[place] for place in wanted)
    with progress_bar(total, label or "", "tokens", before, shown=label is not None) as progress:
        for place, completion in zip(run, found, strict=True):
            if place not in asked:
                continue
            text = text_of(tokenizer, completion, decoding.stop)
            if completion.finish == "length" and new[place] < decoding.max_new_tokens:
                cut.append(new[place])
            yield text, completion
            done += 1
            progress.set_postfix_str(f"{done}/{number} answers", refresh=False)
            progress.update(tokens[place])
    if cut:
        after = f"{min(cut)} to {max(cut)}" if min(cut) < max(cut) else cut[0]
        said = "%d of %d answers end after %s tokens, with the model's context of %d"
        log.warning(said, len(cut), len(prompts), after, model.config.max_seq_len)


def rank_share(places: Sequence[int], decoding: Decoding, world: World) -> list[int]:
    """Which of the places this rank answers: each so many, of a search each so many batches."""
    batches = sorted({place // _unit(decoding) for place in places})
    mine = {*batches[world.rank :: world.size]}
    return [place for place in places if place // _unit(decoding) in mine]


def _unit(decoding: Decoding) -> int:
    """How many prompts must be answered together."""
    return decoding.batch_size if decoding.beams else 1


def _searched(
    model: Llama, _tokenizer: Tokenizer, prompts: Prompts, run: list[int], decoding: Decoding, **how: Any
) -> Iterator[Completion]:
    for start in range(0, len(run), decoding.batch_size):
        batch = [prompts[place] for place in run[start : start + decoding.batch_size]]
        for best, *_ in beam_search(model, batch, decoding, **how):
            yield best


def _continued(
    model: Llama, tokenizer: Tokenizer, prompts: Prompts, run: list[int], decoding: Decoding, **how: Any
) -> Iterator[Completion]:
    streams = [TextStream(tokenizer, decoding.stop) for _ in run]

    def stopping_criteria(row: int, token: int) -> bool:
        streams[row].push(token)
        return streams[row].stopped

    stopping = stopping_criteria if decoding.stop else None
    return completions(model, [prompts[p] for p in run], decoding, **how, stopping_criteria=stopping, places=run)


def text_of(tokenizer: Tokenizer, completion: Completion, stop: Sequence[str]) -> str:
    """A completion's text, before the first stop string. A search does not stop at one: it may stand further in."""
    stream = TextStream(tokenizer, stop)
    for token in completion.tokens:
        stream.push(token)
    stream.flush()
    if stream.stopped:
        completion.finish = "stop"
    return stream.text

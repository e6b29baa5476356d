"""Lists of questions to lists of answers, as K2's generation script makes them."""

from __future__ import annotations

import csv
import hashlib
import io
import json
import logging
import re
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

from k2mini.data.documents import data_path, read_entries
from k2mini.data.prompts import rooms
from k2mini.data.tokenizer import Tokenizer
from k2mini.errors import short, some
from k2mini.files import parse_json, progress_bar
from k2mini.inference.beam import beam_search
from k2mini.inference.decoding import Completion, Decoding, TextStream
from k2mini.inference.generate import completions
from k2mini.nn.llama import Llama

log = logging.getLogger(__name__)

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


class Journal:
    """Answers in a .jsonl, each added as it comes; a command that is started again goes on after them.

    They are those of an undisturbed run, but for last bits where these depend on a row's company: on a GPU, compiled,
    in 16 bits, in w8a8.

    Args:
        path: None keeps them in memory only.
        asked: what each is an answer to: `prompt`, and `input` where there is one.
        made_by: a digest of what answers follow from besides: model and settings. A line's hash is of it and the line.
        force: begin anew, once there is an answer, where the file holds something else.

    Attributes:
        entries: the answers so far.
        kept: the bytes of the file that are theirs; what else it holds goes with the next answer.

    Raises ValueError naming the first line that is not such an answer; a last one that a kill cut short is left out.
    """

    def __init__(self, path: Path | None, asked: list[dict[str, Any]], made_by: str, *, force: bool) -> None:
        self.path, self.asked, self.made_by = path, asked, made_by
        self.entries: list[dict[str, Any]] = []
        lines = path.read_bytes().splitlines(keepends=True) if path is not None and path.exists() else []
        try:
            self.entries = [entry for place, line in enumerate(lines) for entry in self._read(place, line)]
        except ValueError:
            if not force:
                raise
        if self.entries:
            log.info("%s has %d of %d answers already", path, len(self.entries), len(asked))
        self.kept = sum(len(self._line(entry)) for entry in self.entries)  # bytes

    def add(self, text: str, completion: Completion) -> None:
        """The next answer. Raises OSError where it can't be written."""
        fields = {"answer": text, "tokens": completion.tokens, "finish": completion.finish}
        self.entries.append({**self.asked[len(self.entries)], **fields})
        if self.path is not None:
            with self.path.open("ab") as file:
                file.truncate(self.kept)
                self.kept += file.write(self._line(self.entries[-1]))

    def _line(self, entry: dict[str, Any]) -> bytes:
        own = hashlib.sha256(json.dumps([self.made_by, entry]).encode()).hexdigest()
        return json.dumps({**entry, "sha256": own}, ensure_ascii=False).encode() + b"\n"

    def _read(self, place: int, line: bytes) -> list[dict[str, Any]]:
        """The entry of a line; none where it is the beginning of one."""
        asked = self.asked[place] if place < len(self.asked) else {}
        begin = json.dumps({**asked, "answer": ""}, ensure_ascii=False).encode()[:-2]
        if asked and not line.endswith(b"\n") and line[: len(begin)] == begin[: len(line)]:
            return []
        where = f"{self.path}, line {place + 1}"
        with suppress(ValueError):
            entry = parse_json(line, where) if asked and line.startswith(begin) else {}
            if entry.pop("sha256", None) and self._line(entry) == line:
                return [entry]
        wanted = f"this model's answer, with these settings, to {short(asked['prompt'])}" if asked else "asked for"
        raise ValueError(f"{where} is not {wanted}; name another place, or replace it with --force")


def answers(
    model: Llama,
    tokenizer: Tokenizer,
    prompts: Sequence[Sequence[int]],
    decoding: Decoding,
    label: str | None = None,
    first: int = 0,
    *,
    stop_ids: Sequence[int] | None = None,
) -> Iterator[tuple[str, Completion]]:
    """Answer prompts, in their order.

    Args:
        label: show progress under this name, in tokens: those of the prompts, and the new ones that there may be.
        first: begin with this one, as if those before it had been answered too.
        stop_ids: each of them ends an answer; None: the tokenizer's.

    Yields: each one's text and completion. How many were cut where the model's context ends is said at the end.
    """
    new, cut = rooms(prompts, decoding.max_new_tokens, model.config.max_seq_len), []
    tokens = [len(prompt) + number for prompt, number in zip(prompts, new, strict=True)]
    # A search's batches stay as they are: its scores' last bits depend on them.
    start = first // decoding.batch_size * decoding.batch_size if decoding.beams else first
    here, found = replace(decoding, seed=decoding.seed + start), _searched if decoding.beams else _continued
    how = {"stop_ids": tokenizer.stop_ids if stop_ids is None else stop_ids, "vocab_size": tokenizer.vocab_size}
    with progress_bar(sum(tokens), label or "", "tokens", sum(tokens[:first]), shown=label is not None) as progress:
        for place, completion in enumerate(found(model, tokenizer, prompts[start:], here, **how), start=start):
            if place < first:
                continue
            text = text_of(tokenizer, completion, decoding.stop)
            if completion.finish == "length" and new[place] < decoding.max_new_tokens:
                cut.append(new[place])
            yield text, completion
            progress.set_postfix_str(f"{place + 1}/{len(prompts)} answers", refresh=False)
            progress.update(tokens[place])
    if cut:
        after = f"{min(cut)} to {max(cut)}" if min(cut) < max(cut) else cut[0]
        said = "%d of %d answers end after %s tokens, with the model's context of %d"
        log.warning(said, len(cut), len(prompts), after, model.config.max_seq_len)


def _searched(
    model: Llama, _tokenizer: Tokenizer, prompts: Sequence[Sequence[int]], decoding: Decoding, **how: Any
) -> Iterator[Completion]:
    for start in range(0, len(prompts), decoding.batch_size):
        for best, *_ in beam_search(model, prompts[start : start + decoding.batch_size], decoding, **how):
            yield best


def _continued(
    model: Llama, tokenizer: Tokenizer, prompts: Sequence[Sequence[int]], decoding: Decoding, **how: Any
) -> Iterator[Completion]:
    streams = [TextStream(tokenizer, decoding.stop) for _ in prompts]

    def stopping_criteria(row: int, token: int) -> bool:
        streams[row].push(token)
        return streams[row].stopped

    return completions(model, prompts, decoding, **how, stopping_criteria=stopping_criteria if decoding.stop else None)


def text_of(tokenizer: Tokenizer, completion: Completion, stop: Sequence[str]) -> str:
    """A completion's text, before the first stop string. A search does not stop at one: it may stand further in."""
    stream = TextStream(tokenizer, stop)
    for token in completion.tokens:
        stream.push(token)
    stream.flush()
    if stream.stopped:
        completion.finish = "stop"
    return stream.text

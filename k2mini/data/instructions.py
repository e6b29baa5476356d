"""Instructions with answers, as Alpaca and GeoSignal lay them out, and conversations, as `messages` or ShareGPT's."""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from k2mini.config import InstructionSection
from k2mini.data.batches import shuffled
from k2mini.data.chats import ROLES, encode_conversation
from k2mini.data.documents import OnError, raise_error, read_entries
from k2mini.data.packing import Example
from k2mini.data.prompts import AnyTemplate, Message
from k2mini.data.tables import SUFFIXES as TABLES
from k2mini.data.tables import read_table
from k2mini.data.tokenizer import Tokenizer
from k2mini.errors import short, some

log = logging.getLogger(__name__)

# The names that files in ShareGPT's form have for the roles.
SHAREGPT = {"human": "user", "gpt": "assistant", "function_call": "assistant", "developer": "system"}
SHAREGPT |= {"function": "tool", "function_response": "tool", "observation": "tool"}
FIELDS = ("instruction", "input", "output")


def read_records(
    path: Path, on_error: OnError = raise_error, *, fields: dict[Any, str] | None = None, limit: int | None = None
) -> list[tuple[str, list[Message]]]:
    """(place, messages) of the records of a JSON list, a JSONL file or, by its name, CSV or TSV.

    A record has `messages`, each a `role` and `content`, or ShareGPT's `conversations`, each `from` and `value`, or
    `instruction`, `input` ('' where absent) and `output`.

    Args:
        on_error: called with one sentence, naming file and record, for each record that is not of this form. The record
            is left out if it returns.
        fields: what the file calls these; those it does not name keep their names, unless another takes theirs.
        limit: the first so many records alone.

    Raises ValueError where the file is missing, empty or not of its form, or has no such field in any record.
    """
    table = path.suffix.lower() in TABLES
    entries: list[tuple[str, Any]] = read_table(path, on_error) if table else read_entries(path, on_error=on_error)
    names = {} if fields is None else _names(fields, path, entries)
    if limit is not None and len(entries) > limit:
        log.info("%s: the first %d of %d records (data.limit)", path, limit, len(entries))
    records = []
    for place, entry in entries[:limit]:
        if names and isinstance(entry, dict) and not entry.keys() & {"messages", "conversations"}:
            entry = {ours: entry.get(theirs) for ours, theirs in names.items()}
        try:
            records.append((f"{path}, {place}", _record(entry, f"{path}, {place}", names)))
        except ValueError as error:
            on_error(str(error))
    return records


def _names(fields: dict[Any, str], path: Path, entries: list[tuple[str, Any]]) -> dict[str, str]:
    """What the file calls each field. Raises ValueError where no record has what `fields` names."""
    if len(set(fields.values())) < len(fields):
        raise ValueError(f"data.fields names a field of the files twice: {short(fields)}")
    there = list(dict.fromkeys(str(key) for _, entry in entries if isinstance(entry, dict) for key in entry))
    for ours, theirs in fields.items():
        if theirs not in there:
            said = f"{path} has no {short(theirs)}, which data.fields.{ours} names"
            raise ValueError(f"{said}; it has {some([short(name) for name in there], 9) or 'no fields'}")
    return {ours: ours for ours in FIELDS if ours not in fields.values()} | fields


def _record(entry: Any, place: str, names: dict[str, str]) -> list[Message]:
    if not isinstance(entry, dict):
        raise ValueError(f"{place} must be a JSON object, not {type(entry).__name__}")
    record = {"input": "", **{key: value for key, value in entry.items() if value is not None}}
    for key in ("messages", "conversations"):
        if key in record:
            return _conversation(record, key, f"{place}: {key}")
    for key in FIELDS:
        if key not in record:
            has = f"; it has {short([*entry])}, and data.fields can name another" * (not names and bool(entry))
            raise ValueError(f"{place} has no `{names.get(key, key)}`{has}")
        if not isinstance(record[key], str):
            raise ValueError(f"{place}: `{key}` must be text, not {short(record[key])}")
    if not record["output"].strip():
        raise ValueError(f"{place}: `output` is empty, so there is nothing to learn")
    question = {"role": "user", "content": record["instruction"], "input": record["input"]}
    return [question, {"role": "assistant", "content": record["output"]}]


def _conversation(record: dict[str, Any], key: str, place: str) -> list[Message]:
    """The messages of a record, as transformers has them."""
    turns = record[key]
    if not isinstance(turns, list) or not all(isinstance(turn, dict) for turn in turns):
        raise ValueError(f"{place} must be a list of messages, not {short(turns)}")
    if record.get("tools"):
        raise ValueError(f"{place}: the record has `tools`, which k2mini gives to no template")
    if record.get("system"):  # beside the turns, as some ShareGPT files have it
        turns = [{"role": "system", "content": record["system"]}, *turns]
    messages: list[Message] = []
    for number, turn in enumerate(turns):
        here = f"{place}[{number}]"
        fields = {name: value for name, value in turn.items() if value is not None and name != "input"}
        role, text = (fields.pop(old, fields.get(new)) for new, old in (("role", "from"), ("content", "value")))
        role = SHAREGPT.get(role, role) if isinstance(role, str) else role
        if role not in ROLES:
            raise ValueError(f"{here} has the role {short(role)}; roles are {', '.join(ROLES)}")
        text = "" if text is None and fields.get("tool_calls") else text
        if not isinstance(text, str) or not (text.strip() or fields.get("tool_calls")):
            raise ValueError(f"{here}, the {role}'s, must be text that is not empty, not {short(text)}")
        messages.append({**fields, "role": role, "content": text})
    roles = [message["role"] for message in messages]
    if roles[roles[:1] == ["system"] :][:1] != ["user"] or "assistant" not in roles:
        raise ValueError(f"{place} must begin with a user, after at most one system message, and have an answer")
    return messages


def encode_examples(
    messages: Sequence[Message], tokenizer: Tokenizer, template: AnyTemplate, section: InstructionSection
) -> list[tuple[Example, int]]:
    """A conversation as examples, of which `encode_conversation` says how many; with `data.train_on_inputs` it is one.

    Returns: each example, cut to `data.max_seq_len` tokens, and how many it had before.
    """
    found = []
    for tokens, spans in encode_conversation(tokenizer, template, messages):
        cut = tokens[: section.max_seq_len]
        edges = [edge for span in spans for edge in span] if not section.train_on_inputs else [0]
        first, *edges = [min(edge, len(cut)) for edge in [*edges, len(tokens)]]
        gaps = zip(edges[::2], edges[1::2], strict=False)
        found.append((Example(cut, first, tuple(gap for gap in gaps if gap[0] < gap[1])), len(tokens)))
    return found[-1:] if section.train_on_inputs else found


def read_examples(
    path: Path, tokenizer: Tokenizer, template: AnyTemplate, section: InstructionSection
) -> list[Example]:
    """All examples of a file, as `read_conversations` has them."""
    return [example for found in read_conversations(path, tokenizer, template, section) for example in found]


def read_conversations(
    path: Path,
    tokenizer: Tokenizer,
    template: AnyTemplate,
    section: InstructionSection,
    counts: dict[str, dict[str, int]] | None = None,
) -> list[list[Example]]:
    """Of each record of a file its examples that have some of their answers within `data.max_seq_len` tokens.

    Examples that are cut or left out are counted on the log, and by the file's name in `counts`.

    Raises ValueError where the file is missing or empty, a record is not of the form and `data.on_error` is 'raise', or
    no example is left.
    """
    bad: list[str] = []

    def on_error(message: str) -> None:
        if section.on_error == "raise":
            raise ValueError(f"{message}; data.on_error=skip leaves such records out and counts them")
        bad.append(message)

    encoded = []
    for place, messages in read_records(path, on_error, fields=section.fields, limit=section.limit):
        try:
            encoded.append(encode_examples(messages, tokenizer, template, section))
        except ValueError as error:  # which the template refuses
            on_error(f"{place}: {error}")
    for message in bad[:3]:
        log.warning("skipped: %s", message)
    if bad:
        log.warning("%s: %d records are skipped (data.on_error is skip), %d are left", path, len(bad), len(encoded))
    if not encoded:
        raise ValueError(f"{path}: every record was skipped, so there is nothing to train on")
    every = [example for found in encoded for example in found]
    if len(every) > len(encoded):
        said = "the template rewrites earlier answers of a conversation, so each answer is an example of its own"
        log.info("%s: %s: %d of %d conversations", path, said, len(every), len(encoded))
    lengths = [length for _, length in every]
    kept = [[pair for pair in found if pair[0].unsupervised < len(pair[0].tokens)] for found in encoded]
    used = sum(map(len, kept))
    dropped, cut = len(every) - used, sum(length > section.max_seq_len for found in kept for _, length in found)
    numbers = {"records": len(encoded) + len(bad), "skipped": len(bad), "examples used": used}
    (counts if counts is not None else {})[str(path)] = numbers | {"cut": cut, "left out": dropped}
    if cut or dropped:
        log.warning(
            "%s: with data.max_seq_len %d, %d examples lose the end of their answer and %d their whole answer "
            "(these are left out); %d are used; 99 %% of all would be whole with %d, all with %d",
            path,
            section.max_seq_len,
            cut,
            dropped,
            used,
            max(section.max_seq_len, sorted(lengths)[math.ceil(0.99 * len(lengths)) - 1]),
            max(lengths),
        )
    if not used:
        raise ValueError(
            f"{path}: no example has any of its answer within data.max_seq_len ({section.max_seq_len} tokens)"
        )
    return [[example for example, _ in found] for found in kept if found]


def hold_out(records: list[list[Example]], size: int, seed: int) -> tuple[list[Example], list[Example]]:
    """The examples of records to train on, and of `size` that a seed draws. ValueError: none is left to train on."""
    if size >= len(records):
        raise ValueError(f"data.val_size ({size}) leaves nothing of the {len(records)} records to train on")
    drawn = [shuffled(position, len(records), seed) for position in range(size)]
    aside = set(drawn)
    left = [example for index, found in enumerate(records) if index not in aside for example in found]
    return left, [example for index in drawn for example in records[index]]

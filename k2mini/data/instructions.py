"""Instructions with answers, as Alpaca and GeoSignal lay them out."""

from __future__ import annotations

import logging
import math
from pathlib import Path
from typing import Any

from k2mini.config import InstructionSection
from k2mini.data.batches import shuffled
from k2mini.data.documents import OnError, raise_error, read_entries
from k2mini.data.packing import Example
from k2mini.data.prompts import AnyTemplate
from k2mini.data.tokenizer import Tokenizer
from k2mini.errors import short

log = logging.getLogger(__name__)


def read_records(path: Path, on_error: OnError = raise_error) -> list[dict[str, str]]:
    """The records of a JSON list or a JSONL file, each with `instruction`, `input` ('' where absent) and `output`.

    Args:
        on_error: called with one sentence, naming file and record, for each record that is not of this form. The record
            is left out if it returns.

    Raises ValueError where the file is missing, empty or not JSON.
    """
    records = []
    for place, entry in read_entries(path, on_error=on_error):
        try:
            records.append(_record(entry, f"{path}, {place}"))
        except ValueError as error:
            on_error(str(error))
    return records


def _record(entry: Any, place: str) -> dict[str, str]:
    if not isinstance(entry, dict):
        raise ValueError(f"{place} must be a JSON object, not {type(entry).__name__}")
    record = {"input": "", **{key: value for key, value in entry.items() if value is not None}}
    for key in ("instruction", "input", "output"):
        if key not in record:
            raise ValueError(f"{place} has no `{key}`")
        if not isinstance(record[key], str):
            raise ValueError(f"{place}: `{key}` must be text, not {short(record[key])}")
    if not record["output"].strip():
        raise ValueError(f"{place}: `output` is empty, so there is nothing to learn")
    return record


def encode_example(
    record: dict[str, str],
    tokenizer: Tokenizer,
    template: AnyTemplate,
    *,
    train_on_inputs: bool,
    max_seq_len: int,
) -> tuple[Example, int]:
    """One record as tokens: BOS, prompt, answer, EOS; prompt and answer are tokenised as one text.

    The first supervised token is the first one in which this text differs from the prompt alone, so all of the answer
    is supervised, even where its first letters share a token with the prompt. The last one is EOS, so that the model
    learns to end its answers.

    Returns: the example, cut to `max_seq_len` tokens, and how many it had before.
    """
    prompt = template.prompt(record["instruction"], record["input"])
    tokens = tokenizer.encode(prompt + record["output"], bos=True, eos=True)
    alone = tokenizer.encode(prompt, bos=True, eos=False)
    shared = next((i for i, (a, b) in enumerate(zip(alone, tokens, strict=False)) if a != b), len(alone))
    return Example(tokens[:max_seq_len], 0 if train_on_inputs else shared), len(tokens)


def read_examples(
    path: Path, tokenizer: Tokenizer, template: AnyTemplate, section: InstructionSection
) -> list[Example]:
    """All examples of a file that have some of their answer within `data.max_seq_len` tokens.

    Examples that are cut or left out are counted on the log.

    Raises ValueError where the file is missing or empty, a record is not of the form and `data.on_error` is 'raise', or
    no example is left.
    """
    bad: list[str] = []

    def on_error(message: str) -> None:
        if section.on_error == "raise":
            raise ValueError(f"{message}; data.on_error=skip leaves such records out and counts them")
        bad.append(message)

    records = read_records(path, on_error)
    for message in bad[:3]:
        log.warning("skipped: %s", message)
    if bad:
        log.warning("%s: %d records are skipped (data.on_error is skip), %d are left", path, len(bad), len(records))
    if not records:
        raise ValueError(f"{path}: every record was skipped, so there is nothing to train on")
    examples, lengths, dropped = [], [], 0
    for record in records:
        example, length = encode_example(
            record, tokenizer, template, train_on_inputs=section.train_on_inputs, max_seq_len=section.max_seq_len
        )
        lengths.append(length)
        if example.unsupervised >= len(example.tokens):
            dropped += 1
            continue
        examples.append(example)
    cut = sum(length > section.max_seq_len for length in lengths) - dropped
    if cut or dropped:
        log.warning(
            "%s: with data.max_seq_len %d, %d examples lose the end of their answer and %d their whole answer "
            "(these are left out); %d are used; 99 %% of all would be whole with %d, all with %d",
            path,
            section.max_seq_len,
            cut,
            dropped,
            len(examples),
            max(section.max_seq_len, sorted(lengths)[math.ceil(0.99 * len(lengths)) - 1]),
            max(lengths),
        )
    if not examples:
        raise ValueError(
            f"{path}: no example has any of its answer within data.max_seq_len ({section.max_seq_len} tokens)"
        )
    return examples


def hold_out(examples: list[Example], size: int, seed: int) -> tuple[list[Example], list[Example]]:
    """The examples to train on, and `size` that a seed draws to validate. ValueError: none is left to train on."""
    if size >= len(examples):
        raise ValueError(f"data.val_size ({size}) leaves nothing of the {len(examples)} examples to train on")
    drawn = [shuffled(position, len(examples), seed) for position in range(size)]
    aside = set(drawn)
    return [e for index, e in enumerate(examples) if index not in aside], [examples[index] for index in drawn]

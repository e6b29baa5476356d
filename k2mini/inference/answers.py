"""Lists of questions to lists of answers: what K2's generation script does."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from k2mini.data.tokenizer import Tokenizer
from k2mini.files import read_json
from k2mini.inference.beam import Beams, beam_search
from k2mini.inference.generate import Completion, generate
from k2mini.inference.sampling import Sampling
from k2mini.inference.text import TextStream
from k2mini.nn.llama import Llama

FIELDS = ("question", "prompt", "instruction")


@dataclass(frozen=True)
class Decoding:
    """How answers are made.

    Args:
        stop: strings that end an answer; they are not part of it.
        beams: search instead of sampling.
        batch_size: prompts at a time.
    """

    max_new_tokens: int = 256
    sampling: Sampling = Sampling()  # noqa: RUF009 (it is frozen)
    seed: int = 0
    stop: tuple[str, ...] = ()
    beams: Beams | None = None
    batch_size: int = 8

    def __post_init__(self) -> None:
        if self.max_new_tokens < 1:
            raise ValueError(f"max_new_tokens must be at least 1, not {self.max_new_tokens}")
        if self.batch_size < 1:
            raise ValueError(f"batch_size must be at least 1, not {self.batch_size}")
        if any(not text for text in self.stop):
            raise ValueError("a stop string is empty")


def read_questions(path: Path, text: str | None = None) -> list[str]:
    """The questions of a file: a JSON list of strings or of objects with a `question`; JSONL; or text, one a line.

    Args:
        text: what stands in it, where it has been read already (standard input).

    Raises ValueError, naming the file and the entry, where there is none or one is not a question.
    """
    if path.suffix == ".json" and text is None:
        entries = read_json(path)
        if not isinstance(entries, list):
            raise ValueError(f"{path} must hold a JSON list of questions")
    else:
        lines = (path.read_text(encoding="utf-8") if text is None else text).splitlines()
        entries = [line for line in lines if line.strip()]
        if path.suffix == ".jsonl":
            entries = [_parsed(path, number, line) for number, line in enumerate(entries, start=1)]
    if not entries:
        raise ValueError(f"{path} holds no question")
    return [_question(path, number, entry) for number, entry in enumerate(entries, start=1)]


def _parsed(path: Path, number: int, line: str) -> Any:
    try:
        return json.loads(line)
    except json.JSONDecodeError as error:
        raise ValueError(f"{path}: entry {number} is not valid JSON: {error}") from None


def _question(path: Path, number: int, entry: Any) -> str:
    if isinstance(entry, dict):
        entry = next((entry[field] for field in FIELDS if field in entry), None)
    if not isinstance(entry, str) or not entry.strip():
        raise ValueError(f"{path}: entry {number} is neither a question nor an object with a {FIELDS[0]!r}")
    return entry


def answers(
    model: Llama, tokenizer: Tokenizer, prompts: Sequence[Sequence[int]], decoding: Decoding
) -> Iterator[tuple[str, Completion]]:
    """Answer prompts in batches, in their order. Yields each one's text and completion."""
    for start in range(0, len(prompts), decoding.batch_size):
        yield from _batch(model, tokenizer, prompts[start : start + decoding.batch_size], decoding, start)


def _batch(
    model: Llama, tokenizer: Tokenizer, prompts: Sequence[Sequence[int]], decoding: Decoding, start: int
) -> Iterator[tuple[str, Completion]]:
    stop_ids, vocab_size = [tokenizer.eos_id], tokenizer.vocab_size
    if decoding.beams is not None:
        found = beam_search(
            model,
            prompts,
            beams=decoding.beams,
            max_new_tokens=decoding.max_new_tokens,
            stop_ids=stop_ids,
            sampling=decoding.sampling,
            vocab_size=vocab_size,
        )
        for best, *_ in found:
            yield _text(tokenizer, best, decoding.stop), best
        return
    streams = [TextStream(tokenizer, decoding.stop) for _ in prompts]

    def stopping_criteria(row: int, token: int) -> bool:
        streams[row].push(token)
        return streams[row].stopped

    completions = generate(
        model,
        prompts,
        max_new_tokens=decoding.max_new_tokens,
        stop_ids=stop_ids,
        sampling=decoding.sampling,
        seed=decoding.seed + start,
        vocab_size=vocab_size,
        stopping_criteria=stopping_criteria if decoding.stop else None,
    )
    for completion in completions:
        yield _text(tokenizer, completion, decoding.stop), completion


def _text(tokenizer: Tokenizer, completion: Completion, stop: Sequence[str]) -> str:
    """A completion's text, before the first stop string; a search does not stop at one, so it may stand further in."""
    stream = TextStream(tokenizer, stop)
    for token in completion.tokens:
        stream.push(token)
    stream.flush()
    if stream.stopped:
        completion.finish = "stop"
    return stream.text

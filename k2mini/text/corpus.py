"""Plain documents for further pretraining."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from k2mini.text.tokenizer import Tokenizer


def read_jsonl(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """(line number, object) of every line that is not blank.

    Raises ValueError naming file and line where a line is not a JSON object, or where the file is missing or empty.
    """
    if not path.is_file():
        raise ValueError(f"there is no data file {path}")
    empty = True
    with path.open("rb") as lines:
        for number, line in enumerate(lines, start=1):
            if not line.strip():
                continue
            try:
                entry = json.loads(line)
            except (json.JSONDecodeError, UnicodeDecodeError) as error:
                raise ValueError(f"{path}, line {number} is not valid JSON: {error}") from None
            if not isinstance(entry, dict):
                raise ValueError(f"{path}, line {number} must be a JSON object, not {type(entry).__name__}")
            empty = False
            yield number, entry
    if empty:
        raise ValueError(f"{path} is empty")


def read_documents(path: Path, tokenizer: Tokenizer, *, eos: bool) -> list[list[int]]:
    """The token ids of every document of a JSONL file with a `text` field, BOS first, EOS last where asked.

    Raises ValueError naming file and line where a line has no text.
    """
    documents = []
    for number, entry in read_jsonl(path):
        text = entry.get("text")
        if not isinstance(text, str) or not text.strip():
            raise ValueError(f"{path}, line {number}: `text` must be text that is not empty, not {text!r}")
        documents.append(tokenizer.encode(text, bos=True, eos=eos))
    return documents

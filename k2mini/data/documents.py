"""Plain documents in files: JSONL with a `text` field, plain text and Markdown, each also compressed with gzip."""

from __future__ import annotations

import gzip
import json
import zlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import IO, Any

from k2mini.data.tokenizer import Tokenizer

SUFFIXES = (".jsonl", ".txt", ".md")


def list_files(inputs: Sequence[Path]) -> list[Path]:
    """The files that hold documents, in order; folders are searched through, and within them names sorted.

    Raises ValueError where an input is missing or of another kind, where a file comes twice, or where there is none.
    """
    files: list[Path] = []
    for path in inputs:
        if path.is_dir():
            files += sorted(file for file in path.rglob("*") if _kind(file) and file.is_file())
        elif not path.is_file():
            raise ValueError(f"there is no file or folder {path}")
        elif not _kind(path):
            raise ValueError(f"{path}: documents are read from {', '.join(SUFFIXES)}, also with .gz")
        else:
            files.append(path)
    if not files:
        raise ValueError(f"no {', '.join(SUFFIXES)} (or .gz of these) in {', '.join(map(str, inputs))}")
    resolved = [file.resolve() for file in files]
    for file, real in zip(files, resolved, strict=True):
        if resolved.count(real) > 1:
            raise ValueError(f"{file} is named twice")
    return files


def _kind(path: Path) -> str | None:
    name = path.name.removesuffix(".gz")
    return next((suffix for suffix in SUFFIXES if name.endswith(suffix) and not name.startswith(".")), None)


def read_texts(path: Path, on_error: Callable[[str], None]) -> Iterator[str]:
    """The documents of one file.

    Args:
        on_error: called with one sentence, naming file and line, for each that is not a document (which is then left
            out); it may raise.
    """
    try:
        with _open(path) as file:
            if _kind(path) != ".jsonl":
                try:
                    text = file.read().decode("utf-8")
                except UnicodeDecodeError as error:
                    on_error(f"{path} is not UTF-8 (byte {error.start})")
                    return
                if text.strip():
                    yield text
                return
            for number, line in enumerate(file, start=1):
                if not line.strip():
                    continue
                try:
                    text = _text_of(parse_object(line))
                except ValueError as error:
                    on_error(f"{path}, line {number}: {error}")
                else:
                    yield text
    except (gzip.BadGzipFile, zlib.error, EOFError) as error:
        raise ValueError(f"{path} is damaged: {error}") from None


def _open(path: Path) -> IO[bytes]:
    return gzip.open(path, "rb") if path.suffix == ".gz" else path.open("rb")  # type: ignore[return-value]


def _text_of(entry: dict[str, Any]) -> str:
    text = entry.get("text")
    if not isinstance(text, str) or not text.strip():
        raise ValueError("`text` must be text that is not empty")
    return text


def parse_object(line: bytes) -> dict[str, Any]:
    """A JSON object on a line. Raises ValueError where it is none."""
    try:
        entry = json.loads(line)
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"not valid JSON: {error}") from None
    if not isinstance(entry, dict):
        raise ValueError(f"must be a JSON object, not {type(entry).__name__}")
    return entry


def read_documents(path: Path, tokenizer: Tokenizer, *, eos: bool) -> list[list[int]]:
    """The token ids of all documents of one file, BOS first, EOS last where asked.

    Raises ValueError naming file and line where something is not a document, or where there is none.
    """

    def fail(message: str) -> None:
        raise ValueError(message)

    (file,) = list_files([path])
    documents = [tokenizer.encode(text, bos=True, eos=eos) for text in read_texts(file, fail)]
    if not documents:
        raise ValueError(f"{path} is empty")
    return documents


def read_entries(path: Path, content: bytes | None = None) -> list[tuple[str, Any]]:
    """The entries of a JSON list, or of JSONL, told apart by what the file holds and not by its name.

    A file that is one JSON object is one entry.

    Args:
        content: what stands in the file, where it has been read already (standard input).

    Returns: (place, entry), where the place is 'record 0', … in a list and 'line 1', … in JSONL.

    Raises ValueError naming the file, and the line where there is one, where something is not JSON; naming the file
    where it is missing or holds no entry.
    """
    if content is None:
        if not path.is_file():
            raise ValueError(f"there is no data file {path}")
        content = path.read_bytes()
    entries: list[tuple[str, Any]] = []
    try:
        whole = json.loads(content)
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        if content.lstrip().startswith(b"["):
            raise ValueError(f"{path} is not valid JSON: {error}") from None
        for number, line in enumerate(content.split(b"\n"), start=1):
            if line.strip():
                try:
                    entries.append((f"line {number}", json.loads(line)))
                except (json.JSONDecodeError, UnicodeDecodeError) as error_of_line:
                    raise ValueError(f"{path}, line {number}: not valid JSON: {error_of_line}") from None
    else:
        one = [("line 1", whole)]
        entries = [(f"record {n}", entry) for n, entry in enumerate(whole)] if isinstance(whole, list) else one
    if not entries:
        raise ValueError(f"{path} is empty")
    return entries

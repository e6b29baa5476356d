"""Documents in files: plain text, Markdown, or JSON with a `text` field, each also compressed with gzip.

JSON files are told apart by what they hold and not by their names: a list, JSONL, or one object. In folders `.json` is
passed over, for there it is seldom a document.
"""

from __future__ import annotations

import codecs
import gzip
import io
import json
import zlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import IO, Any

from k2mini.data.tokenizer import Tokenizer

SUFFIXES = (".jsonl", ".json", ".txt", ".md")

OnError = Callable[[str], None]  # gets one sentence; it raises, or returns to have what is wrong left out


def raise_error(message: str) -> None:
    """The `OnError` that raises ValueError."""
    raise ValueError(message)


def list_files(inputs: Sequence[Path]) -> list[Path]:
    """The files that hold documents: the inputs in their order, folders searched through and their files sorted.

    Raises ValueError where an input is missing or of another kind, where a file comes twice, or where there is none.
    """
    files: list[Path] = []
    for path in inputs:
        if path.is_dir():
            files += sorted(f for f in path.rglob("*") if _suffix(f) not in (None, ".json") and f.is_file())
        elif not path.is_file():
            raise ValueError(f"there is no file or folder {path}")
        elif not _suffix(path):
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


def _suffix(path: Path) -> str | None:
    """The one of `SUFFIXES` that a file's name ends in, in lower case and before `.gz`; None for any other file."""
    name = path.name.lower().removesuffix(".gz")
    return next((suffix for suffix in SUFFIXES if name.endswith(suffix) and not name.startswith(".")), None)


def read_texts(path: Path, on_error: OnError) -> Iterator[str]:
    """The documents of one file. A `.jsonl` is read line by line, so it may be larger than memory.

    Args:
        on_error: called with one sentence, naming file and line, for each line that is not a document (which is then
            left out); it may raise.

    Raises ValueError where the file is damaged, or a list that is not valid JSON.
    """
    try:
        with _open(path) as file:
            if _suffix(path) in (".txt", ".md"):
                try:
                    text = file.read().decode("utf-8")
                except UnicodeDecodeError as error:
                    on_error(f"{path} is not UTF-8 (byte {error.start})")
                    return
                if text.strip():
                    yield text
                return
            by_line = _suffix(path) == ".jsonl"
            entries = _entries(path, file, on_error) if by_line else read_entries(path, file.read(), on_error)
            for place, entry in entries:
                try:
                    text = _text_of(entry)
                except ValueError as error:
                    on_error(f"{path}, {place}: {error}")
                else:
                    yield text
    except (gzip.BadGzipFile, zlib.error, EOFError) as error:
        raise ValueError(f"{path} is damaged: {error}") from None


def _open(path: Path) -> IO[bytes]:
    return gzip.open(path, "rb") if path.suffix.lower() == ".gz" else path.open("rb")  # type: ignore[return-value]


def _entries(path: Path, file: IO[bytes], on_error: OnError) -> Iterator[tuple[str, Any]]:
    """(place, entry) of an open JSON list, or of JSONL, where the place is 'record 0', … or 'line 1', …"""
    first = True
    for number, line in enumerate(file, start=1):
        if not line.strip():
            continue
        if first and line.removeprefix(codecs.BOM_UTF8).lstrip().startswith(b"["):
            yield from ((f"record {n}", entry) for n, entry in enumerate(_list(path, line + file.read())))
            return
        first = False
        try:
            entry = json.loads(line)
        except (json.JSONDecodeError, UnicodeDecodeError) as error:
            on_error(f"{path}, line {number}: not valid JSON: {error}")
        else:
            yield f"line {number}", entry


def _list(path: Path, content: bytes) -> list[Any]:
    try:
        entries: list[Any] = json.loads(content)
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is not valid JSON: {error}") from None
    return entries


def _text_of(entry: Any) -> str:
    if not isinstance(entry, dict):
        raise ValueError(f"must be a JSON object, not {type(entry).__name__}")
    text = entry.get("text")
    if not isinstance(text, str) or not text.strip():
        raise ValueError("`text` must be text that is not empty")
    return text


def read_documents(path: Path, tokenizer: Tokenizer, *, eos: bool) -> list[list[int]]:
    """The token ids of all documents of one file, BOS first, EOS last where asked.

    Raises ValueError naming file and line where something is not a document, or where there is none.
    """
    (file,) = list_files([path])
    documents = [tokenizer.encode(text, bos=True, eos=eos) for text in read_texts(file, raise_error)]
    if not documents:
        raise ValueError(f"{path} is empty")
    return documents


def read_entries(path: Path, content: bytes | None = None, on_error: OnError = raise_error) -> list[tuple[str, Any]]:
    """The entries of a JSON list, or of JSONL, told apart by what the file holds and not by its name.

    A file that is one JSON object is one entry.

    Args:
        content: what stands in the file, where it has been read already (standard input).
        on_error: called with one sentence for each line of JSONL that is not valid JSON; it may raise.

    Returns: (place, entry), where the place is 'record 0', … in a list and 'line 1', … in JSONL.

    Raises ValueError naming the file where it is missing, holds no entry, or is a list that is not valid JSON.
    """
    if content is None:
        if not path.is_file():
            raise ValueError(f"there is no data file {path}")
        content = path.read_bytes()
    if not content.strip():
        raise ValueError(f"{path} is empty")
    try:
        whole = json.loads(content)
    except (json.JSONDecodeError, UnicodeDecodeError):
        return list(_entries(path, io.BytesIO(content), on_error))
    if whole == []:
        raise ValueError(f"{path} is empty")
    return [(f"record {n}", entry) for n, entry in enumerate(whole)] if isinstance(whole, list) else [("line 1", whole)]

"""Documents in files: plain text, Markdown, or JSON with a `text` field, each also compressed with gzip.

JSON files are told apart by what they hold and not by their names: a list, JSONL, or one object. In folders `.json` is
passed over, for there it is seldom a document.
"""

from __future__ import annotations

import codecs
import gzip
import io
import json
import os
import re
import zlib
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import IO, Any

from k2mini.corpus.shards import MANIFEST, is_corpus, read_manifest
from k2mini.data.tokenizer import Tokenizer
from k2mini.files import parse_json, read_text
from k2mini.hub import fetch

SUFFIXES = (".jsonl", ".json", ".txt", ".md")
MOST = 2**29  # bytes of a document, of a line of JSONL, or of a list: a small .gz may hold any number of them

OnError = Callable[[str], None]  # gets one sentence; it raises, or returns to have what is wrong left out


def raise_error(message: str) -> None:
    """The `OnError` that raises ValueError."""
    raise ValueError(message)


def data_path(name: str | Path) -> Path:
    """Where data are: at `name`, or, of data on the hub (`hf://…`), where they are downloaded to on first use."""
    if not str(name).startswith("hf:/") or Path(name).exists():
        return Path(name)
    return fetch(re.sub("^hf:/+", "hf://", str(name)))  # a Path has lost a slash


def read_user_text(name: str | Path) -> str:
    """All that a file of text holds, or a pipe, or a file of the hub. Raises as `read_text` does."""
    return read_text(data_path(name), None)


def list_files(inputs: Sequence[Path], passed_over: Counter[str] | None = None) -> list[Path]:
    """The files that hold documents: the inputs in their order, folders searched through and their files sorted.

    Args:
        passed_over: counts the other files of the folders, by suffix.

    Raises ValueError where an input is missing or of another kind, where a file comes twice, or where there is none;
    OSError where a folder can't be read.
    """
    files: list[Path] = []
    for path in map(data_path, inputs):
        if path.is_dir():
            walked = os.walk(path, onerror=_raise)
            found = [Path(folder, name) for folder, _, names in walked for name in _documents_in(Path(folder), names)]
            taken = [file for file in found if _suffix(file) not in (None, ".json") and file.is_file()]
            files += sorted(taken)
            if passed_over is not None:
                passed_over.update(file.suffix.lower() or "no suffix" for file in set(found).difference(taken))
        elif not path.is_file():
            raise ValueError(f"there is no file or folder {path}")
        elif not _suffix(path):
            raise ValueError(f"{path}: documents are read from {', '.join(SUFFIXES)}, also with .gz")
        else:
            files.append(path)
    if not files:
        taken_of_folders = ", ".join(suffix for suffix in SUFFIXES if suffix != ".json")
        there = f"; there are {', '.join(f'{n} {kind}' for kind, n in passed_over.items())}" if passed_over else ""
        there += "; of .json, name each file" if passed_over and ".json" in passed_over else ""
        raise ValueError(f"no {taken_of_folders} (or .gz of these) in {', '.join(map(str, inputs))}{there}")
    seen: set[Path] = set()
    for file in files:  # in a folder of the hub's cache, equal files are links to one
        if (real := file.resolve() if file in inputs else file.absolute()) in seen:
            raise ValueError(f"{file} is named twice")
        seen.add(real)
    return files


def _documents_in(folder: Path, names: list[str]) -> list[str]:
    """The names of a folder's files; of a corpus's, which `k2mini corpus` wrote, the shards alone."""
    if "part.json" in names and any(name.endswith(".records") for name in names):
        raise ValueError(f"{folder} is a part of a corpus; `k2mini corpus merge` makes a corpus of all parts")
    corpus = MANIFEST in names and is_corpus(folder)
    return [shard["name"] for shard in read_manifest(folder)["shards"]] if corpus else names


def _raise(error: OSError) -> None:
    raise error


def _suffix(path: Path) -> str | None:
    """The one of `SUFFIXES` that a file's name ends in, in lower case and before `.gz`; None for any other file."""
    name = path.name.lower().removesuffix(".gz")
    return next((suffix for suffix in SUFFIXES if name.endswith(suffix) and not name.startswith(".")), None)


def read_texts(path: Path, on_error: OnError) -> Iterator[str]:
    """The documents of one file. A `.jsonl` is read line by line, so it may be larger than memory.

    Args:
        on_error: called with one sentence, naming file and line, for each line that is not a document (which is then
            left out); it may raise.

    Raises ValueError where the file is damaged, a list that is not valid JSON, or has more than `MOST` bytes in one
    piece.
    """
    try:
        with _open(path) as file:
            if _suffix(path) in (".txt", ".md"):
                try:
                    text = _whole(path, file).decode("utf-8-sig")
                except UnicodeDecodeError as error:
                    on_error(f"{path} is not UTF-8 (byte {error.start})")
                    return
                if text.strip():
                    yield text
                return
            by_line = _suffix(path) == ".jsonl"
            entries = _entries(path, file, on_error) if by_line else read_entries(path, _whole(path, file), on_error)
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


def _whole(path: Path, file: IO[bytes], start: bytes = b"") -> bytes:
    """`start` and what is left of an open file."""
    content = start + file.read(MOST + 1)
    if len(content) > MOST:
        raise ValueError(f"{path} has more than {MOST:,} bytes in one piece; split it, or make it JSONL")
    return content


def _entries(path: Path, file: IO[bytes], on_error: OnError) -> Iterator[tuple[str, Any]]:
    """(place, entry) of an open JSON list, or of JSONL, where the place is 'record 0', … or 'line 1', …"""
    first = True
    for number, line in enumerate(iter(lambda: file.readline(MOST + 1), b""), start=1):
        if len(line) > MOST:
            raise ValueError(f"{path}, line {number} is longer than {MOST:,} bytes")
        if not line.strip():
            continue
        if first and line.removeprefix(codecs.BOM_UTF8).lstrip().startswith(b"["):
            yield from _parsed(path, _whole(path, file, line), on_error)
            return
        first = False
        try:
            entry = parse_json(line, f"{path}, line {number}")
        except ValueError as error:
            on_error(str(error))
        else:
            yield f"line {number}", entry


def _parsed(path: Path, content: bytes, on_error: OnError) -> list[tuple[str, Any]]:
    """(place, entry) of a JSON list, or the one of anything else. Raises ValueError where it is not valid JSON.

    An entry with text that is not UTF-8, or with half of a surrogate pair, is told to `on_error`.
    """
    text = content.decode("utf-8-sig", "surrogateescape")
    whole = parse_json(text, str(path), halves=True)
    entries = (
        [(f"record {n}", entry) for n, entry in enumerate(whole)] if isinstance(whole, list) else [("line 1", whole)]
    )
    if not re.search(r"[\ud800-\udfff]|\\u[dD][89a-fA-F]", text):
        return entries
    kept = []
    for place, entry in entries:
        try:
            json.dumps(entry, ensure_ascii=False).encode()
        except UnicodeEncodeError:
            on_error(f"{path}, {place}: a text in it is not UTF-8, or has half of a surrogate pair (\\ud…)")
        else:
            kept.append((place, entry))
    return kept


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
    documents = [ids for text in read_texts(file, raise_error) if (ids := tokenizer.encode(text, bos=True, eos=eos))]
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
        path = data_path(path)
        if not path.is_file():
            raise ValueError(f"there is no data file {path}")
        content = path.read_bytes()
    if content.strip() in (b"", b"[]"):
        raise ValueError(f"{path} is empty")
    try:
        return _parsed(path, content, on_error)
    except ValueError:  # JSONL, or it is said what is wrong
        return list(_entries(path, io.BytesIO(content), on_error))

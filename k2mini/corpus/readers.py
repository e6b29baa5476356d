"""Documents out of files: each format by what its name ends in, XML by its root."""

from __future__ import annotations

import csv
import gzip
import io
import os
import zlib
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import IO, Any

from k2mini.corpus.document import Document
from k2mini.corpus.html import read_html
from k2mini.corpus.jats import read_jats
from k2mini.corpus.paper import parse_xml, year_of
from k2mini.corpus.pdf import read_pdf
from k2mini.corpus.tei import read_tei
from k2mini.errors import need_extra
from k2mini.files import parse_json

MOST = 2**29  # bytes of a file, or of a line of JSONL, once decompressed: a small .gz may hold any number of them
MOST_OF_A_TREE = 2**27  # of XML and HTML, which take some ten times as much memory

_Found = Iterator[tuple[str, Document | str]]  # place in the file ('' for all of it), and a document or why it is none


def list_files(inputs: Sequence[Path], passed_over: Counter[str] | None = None) -> list[Path]:
    """The files that hold documents: the inputs in their order, folders searched through and their files sorted.

    Args:
        passed_over: counts the other files of the folders, by suffix.

    Raises ValueError where an input is missing or of another kind, where a file comes twice, or where there is none;
    OSError where a folder can't be read.
    """

    def fails(error: OSError) -> None:
        raise error

    files: list[Path] = []
    for path in inputs:
        if path.is_dir():
            found = [Path(folder, name) for folder, _, names in os.walk(path, onerror=fails) for name in names]
            taken = sorted(file for file in found if _suffix(file) and file.is_file())
            files += taken
            if passed_over is not None:
                passed_over.update(file.suffix.lower() or "no suffix" for file in set(found).difference(taken))
        elif not path.is_file():
            raise ValueError(f"there is no file or folder {name_of(path)}")
        elif not _suffix(path):
            raise ValueError(f"{name_of(path)}: documents are read from {', '.join(SUFFIXES)}, also with .gz")
        else:
            files.append(path)
    if not files:
        raise ValueError(f"no {', '.join(SUFFIXES)} (or .gz of these) in {', '.join(map(name_of, inputs))}")
    if again := [file for file, times in Counter(file.absolute() for file in files).items() if times > 1]:
        raise ValueError(f"{name_of(again[0])} is named twice")
    return files


def name_of(path: Path) -> str:
    """A path as UTF-8 can write it, for file names are bytes."""
    return os.fsencode(path).decode("utf-8", "backslashreplace")


def _suffix(path: Path) -> str | None:
    """What a file's name ends in, of those in `_READERS`, before `.gz`; None for any other file, and a hidden one."""
    name = path.name.lower().removesuffix(".gz")
    return next((suffix for suffix in _READERS if name.endswith(suffix) and not name.startswith(".")), None)


def read_file(
    path: Path, on_error: Callable[[str, str], None], *, marks: str = "none", text_field: str = "text"
) -> Iterator[Document]:
    """The documents of a file.

    Args:
        on_error: called with the place (the file, and the line in it) and the reason for what can't be read.
        marks: 'k2' writes K2's marks of citations, figures, tables, formulas and notes in papers; 'none' does not.
        text_field: the field, or column, of JSONL, CSV and TSV that has the text.

    Raises ValueError where the extra `corpus` is needed and not installed.
    """
    source = name_of(path)
    for place, found in _found(path, marks, text_field):
        where = f"{source}, {place}" if place else source
        if isinstance(found, Document):
            found.source = where
            yield found
        else:
            on_error(where, found)


def _found(path: Path, marks: str, text_field: str) -> _Found:
    try:
        with path.open("rb") as stored, gzip.open(stored) if path.suffix.lower() == ".gz" else stored as file:
            yield from _READERS[_suffix(path) or ".txt"](file, marks, text_field)  # type: ignore[arg-type]
    except ImportError:
        raise need_extra("corpus") from None
    except RecursionError:
        yield "", "nested too deeply"
    except (gzip.BadGzipFile, zlib.error, EOFError) as error:
        yield "", f"damaged: {error}"
    except OSError as error:
        yield "", error.strerror or str(error)
    except ValueError as error:
        yield "", str(error)


def _whole(file: IO[bytes], most: int) -> bytes:
    content = file.read(most + 1)
    if len(content) > most:
        raise ValueError(f"more than {most:,} bytes")
    return content


def _decoded(content: bytes) -> str:
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"not UTF-8 (byte {error.start})") from None


def _text(file: IO[bytes], _marks: str, _field: str) -> _Found:
    text = _decoded(_whole(file, MOST)).replace("\r\n", "\n").strip("\n")
    if not text.strip():
        raise ValueError("no text")
    first = text.lstrip().split("\n", 1)[0]
    yield "", Document(text, first[2:].strip() if first.startswith("# ") else "")


def _xml(file: IO[bytes], marks: str, _field: str) -> _Found:
    content = _whole(file, MOST_OF_A_TREE)
    root = parse_xml(content)
    articles = root.xpath("descendant-or-self::article[front or body]")
    if root.tag == "html":
        yield "", read_html(content)
    elif root.tag == "TEI":
        yield "", read_tei(root, marks)
    elif not articles:
        raise ValueError(f"neither TEI nor JATS: its root is <{root.tag[:40]}>")
    for n, article in enumerate(articles, start=1):
        place = f"article {n}" if len(articles) > 1 else ""
        try:
            yield place, read_jats(article, marks)
        except ValueError as error:
            yield place, str(error)


def _record(record: dict[str, Any], text_field: str) -> Document | str:
    text = record.get(text_field)
    if not isinstance(text, str) or not text.strip():
        return f"`{text_field}` must be text that is not empty; --text-field names another"
    title, doi, abstract = (str(record.get(name) or "") for name in ("title", "doi", "abstract"))
    licence = str(record.get("licence") or record.get("license") or "")
    return Document(text, title, doi, year_of(str(record.get("year") or "")), licence=licence, abstract=abstract)


def _jsonl(file: IO[bytes], _marks: str, text_field: str) -> _Found:
    for number, line in enumerate(iter(lambda: file.readline(MOST + 1), b""), start=1):
        if len(line) > MOST:
            raise ValueError(f"line {number} has more than {MOST:,} bytes")
        try:
            record = parse_json(line, "it") if line.strip() else None
        except ValueError as error:
            yield f"line {number}", str(error)
            continue
        if isinstance(record, dict):
            yield f"line {number}", _record(record, text_field)
        elif line.strip():
            yield f"line {number}", "it must be a JSON object"


def _table(delimiter: str) -> Callable[[IO[bytes], str, str], _Found]:
    def read(file: IO[bytes], _marks: str, text_field: str) -> _Found:
        csv.field_size_limit(MOST)  # 128 KiB otherwise
        rows = csv.reader(io.StringIO(_decoded(_whole(file, MOST)), newline=""), delimiter=delimiter, strict=True)
        try:
            columns = [name.strip() for name in next(rows, [])]
            if text_field not in columns:
                raise ValueError(f"it has no column `{text_field}`; --text-field names another")
            line = rows.line_num + 1
            for row in rows:
                if len(row) == len(columns):
                    yield f"line {line}", _record(dict(zip(columns, row, strict=True)), text_field)
                elif row:
                    yield f"line {line}", f"{len(row)} cells, the header has {len(columns)}"
                line = rows.line_num + 1
        except csv.Error as error:
            raise ValueError(f"line {rows.line_num}: not valid CSV: {error}") from None

    return read


def _page(file: IO[bytes], _marks: str, _field: str) -> _Found:
    yield "", read_html(_whole(file, MOST_OF_A_TREE))


def _pdf(file: IO[bytes], _marks: str, _field: str) -> _Found:
    yield "", read_pdf(_whole(file, MOST))


_READERS: dict[str, Callable[[IO[bytes], str, str], _Found]] = {
    **dict.fromkeys((".xml", ".nxml"), _xml),
    **dict.fromkeys((".html", ".htm", ".xhtml"), _page),
    **dict.fromkeys((".md", ".txt"), _text),
    ".pdf": _pdf,
    ".jsonl": _jsonl,
    ".csv": _table(","),
    ".tsv": _table("\t"),
}
SUFFIXES = tuple(_READERS)

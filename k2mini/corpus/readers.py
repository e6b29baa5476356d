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

SUFFIXES = (".xml", ".nxml", ".pdf", ".html", ".htm", ".xhtml", ".md", ".txt", ".jsonl", ".csv", ".tsv")
MOST = 2**29  # bytes of a PDF, or of a line of JSONL, once decompressed: a small .gz may hold any number of them
MOST_OF_A_TREE = 2**25  # of XML and HTML, which take 30 to 70 times as much memory, and of other texts


def list_files(inputs: Sequence[Path], passed_over: Counter[str] | None = None) -> list[Path]:
    """The files that hold documents: the inputs in their order, folders searched through and their files sorted.

    Args:
        passed_over: counts the other files of the folders, by suffix, and links to folders, which are not followed.

    Raises ValueError where an input is missing or of another kind, where a file comes twice, or where there is none;
    OSError where a folder can't be read.
    """
    files: list[Path] = []
    for path in inputs:
        if path.is_dir():
            walked = list(os.walk(path, onerror=_raise))
            found = [Path(folder, name) for folder, _, names in walked for name in names]
            links = sum(Path(folder, name).is_symlink() for folder, names, _ in walked for name in names)
            taken = sorted(file for file in found if _suffix(file) and file.is_file())
            files += taken
            if passed_over is not None:
                passed_over.update(file.suffix.lower() or "no suffix" for file in set(found).difference(taken))
                passed_over.update({"links to folders": links} if links else {})
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


def _raise(error: OSError) -> None:
    raise error


def name_of(path: Path) -> str:
    """A path as UTF-8 can write it, for file names are bytes."""
    return os.fsencode(path).decode("utf-8", "backslashreplace")


def _suffix(path: Path) -> str | None:
    """The one of `SUFFIXES` that a file's name ends in, before `.gz`; None for any other file, and a hidden one."""
    name = path.name.lower().removesuffix(".gz")
    return next((suffix for suffix in SUFFIXES if name.endswith(suffix) and not name.startswith(".")), None)


def read_file(
    path: Path, on_error: Callable[[str, str], None], *, marks: str = "none", text_field: str = "text", source: str = ""
) -> Iterator[Document]:
    """The documents of a file.

    Args:
        on_error: called with the place (the file, and the line in it) and the reason for what can't be read.
        marks: 'k2' writes K2's marks of citations, figures, tables, formulas and notes in papers; 'none' does not.
        text_field: the field, or column, of JSONL, CSV and TSV that has the text.
        source: what the file is called in places; by default its path.

    Raises ValueError where the extra `corpus` is needed and not installed.
    """
    for line, found in _read(path, marks, text_field):
        place = (source or name_of(path)) + f", line {line}" * bool(line)
        if isinstance(found, Document):
            found.source = place
            yield found
        else:
            on_error(place, found)


def _read(path: Path, marks: str, text_field: str) -> Iterator[tuple[int, Document | str]]:
    """The line, or 0 for a whole file, and a document or the reason why it is none."""
    try:
        with path.open("rb") as stored:
            file: Any = gzip.GzipFile(fileobj=stored) if path.suffix.lower() == ".gz" else stored
            match _suffix(path):
                case ".jsonl" | ".csv" | ".tsv" as kind:
                    for line, row in _jsonl(file) if kind == ".jsonl" else _table(file, "\t" if "t" in kind else ","):
                        yield line, row if isinstance(row, str) else _document(row, text_field)
                case ".xml" | ".nxml":
                    root = parse_xml(_whole(file, MOST_OF_A_TREE))
                    yield 0, _paper(root, marks)
                    if others := len(root.xpath("sub-article|response")):
                        yield 0, f"of its {others} sub-articles and responses (reviews, translations) none is read"
                case ".html" | ".htm" | ".xhtml":
                    yield 0, read_html(_whole(file, MOST_OF_A_TREE))
                case ".pdf":
                    yield 0, read_pdf(_whole(file, MOST))
                case _:
                    yield 0, _text(_utf8(_whole(file, MOST_OF_A_TREE)))
    except ImportError:
        raise need_extra("corpus") from None
    except (gzip.BadGzipFile, zlib.error, EOFError) as error:
        yield 0, f"damaged: {error}"
    except OSError as error:
        yield 0, error.strerror or str(error)
    except (ValueError, csv.Error) as error:
        yield 0, str(error)


def _whole(file: IO[bytes], most: int) -> bytes:
    if len(content := file.read(most + 1)) > most:
        raise ValueError(f"more than {most:,} bytes")
    return content


def _utf8(content: bytes) -> str:
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"not UTF-8 (byte {error.start})") from None


def _text(text: str) -> Document:
    text = text.replace("\r\n", "\n").strip("\n")
    if not text.strip():
        raise ValueError("no text")
    first = text.lstrip().split("\n", 1)[0]
    return Document(text, first[2:].strip() if first.startswith("# ") else "")


def _paper(root: Any, marks: str) -> Document:
    if root.tag not in ("TEI", "article"):
        raise ValueError(f"neither TEI nor JATS: its root is <{root.tag[:40]}>")
    return read_tei(root, marks) if root.tag == "TEI" else read_jats(root, marks)


def _document(record: dict[str, Any], text_field: str) -> Document | str:
    text = record.get(text_field)
    if not isinstance(text, str) or not text.strip():
        return f"`{text_field}` must be text that is not empty; --text-field names another"
    title, doi, abstract = (str(record.get(name) or "") for name in ("title", "doi", "abstract"))
    licence = str(record.get("licence") or record.get("license") or "")
    return Document(text, title, doi, year_of(str(record.get("year"))), licence=licence, abstract=abstract)


def _jsonl(file: IO[bytes]) -> Iterator[tuple[int, dict[str, Any] | str]]:
    for number, line in enumerate(_lines(file, MOST), start=1):
        if line.strip():
            try:
                record = parse_json(line, "it")
                yield number, record if isinstance(record, dict) else "it must be a JSON object"
            except ValueError as error:
                yield number, str(error)


def _table(file: IO[bytes], delimiter: str) -> Iterator[tuple[int, dict[str, Any] | str]]:
    csv.field_size_limit(MOST_OF_A_TREE)  # 128 KiB otherwise
    text = io.TextIOWrapper(file, "utf-8-sig", "surrogateescape", newline="")
    rows = csv.reader(_lines(text, MOST_OF_A_TREE), delimiter=delimiter, strict=True)
    columns = [name.strip() for name in next(rows, [])]
    while True:
        line = rows.line_num + 1
        try:
            row = next(rows)
            "".join(row).encode()
            if len(row) == len(columns):
                yield line, dict(zip(columns, row, strict=True))
            elif row:
                yield line, f"{len(row)} cells, the header has {len(columns)}"
        except StopIteration:
            return
        except UnicodeEncodeError:
            yield line, "not UTF-8"
        except csv.Error as error:  # a wrong quote; what follows on the next line is read again
            yield 0, f"lines {line} to {rows.line_num}, which are left out: {error}"


def _lines(file: IO[Any], most: int) -> Iterator[Any]:
    number = 0
    while line := file.readline(most + 1):
        if len(line) > most:
            raise ValueError(f"line {number + 1} has more than {most:,} bytes")
        yield line
        number += 1

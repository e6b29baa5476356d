"""What a worker of `k2mini corpus` does: the documents of a group of files are read, cleaned, judged and signed.

What comes of a group stands in three files: `.jsonl` (what was kept and what was rejected, in order), `.records` (of
what was kept, see `merge.RECORD`), and last of all `.json` with counts and the hashes of both.
"""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np

from k2mini.corpus.clean import clean
from k2mini.corpus.contamination import Benchmarks
from k2mini.corpus.document import Document
from k2mini.corpus.filters.words import words
from k2mini.corpus.merge import CONTAMINATION, CUT, ERROR, READING, RECORD, json_line, rejected
from k2mini.corpus.near import THRESHOLD, signature
from k2mini.corpus.readers import name_of, read_file
from k2mini.errors import need_extra, sentence
from k2mini.files import sha256

PACKAGES = ("k2mini", "numpy", "lxml", "pypdfium2", "ftfy", "py3langid")


@dataclass(frozen=True)
class Settings:
    """Everything that a corpus's bytes depend on beside its inputs.

    Attributes:
        filters: of each filter that is run, its thresholds, as `clean.choose` gives them.
        near_duplicates: the similarity (Jaccard, of word 5-grams) from which on two documents are one.
        decontaminate: files of benchmarks. A document that holds a question of theirs is dropped, or, where
            `contaminated` is 'cut', the paragraph is; for terms of one to three words it is the paragraph alone.
        grobid: the address of a GROBID, by which PDFs are read then, and not by their layer of text.
    """

    filters: dict[str, dict[str, Any]]
    marks: str = "none"
    text_field: str = "text"
    near_duplicates: float = THRESHOLD
    decontaminate: Sequence[Path] = ()
    contaminated: str = "drop"
    grobid: str = ""

    def described(self) -> dict[str, Any]:
        """As they stand in the manifest: benchmarks by name and hash, and the versions of what reads and cleans."""
        from importlib.metadata import version

        files = [{"file": file.name, "sha256": sha256(file)} for file in self.decontaminate]
        versions = {name: version(name) for name in PACKAGES}
        return {**vars(self), "decontaminate": files, "grobid": bool(self.grobid), "versions": versions}


@dataclass
class Group:
    """Files to read into `part`; `instead`: what is read in the place of some.

    `skip`: file -> step -> why it is not taken. Of a file's N-th document, from 0, step 2 N reads it, without which
    there are none after it, either, and 2 N + 1 judges it.
    """

    files: list[Path]
    part: Path
    skip: dict[Path, dict[int, str]] = field(default_factory=dict)
    instead: dict[Path, Path] = field(default_factory=dict)


Say = Callable[[tuple[Path, int]], None]  # hears of each file and step before it is taken


def read_group(group: Group, settings: Settings, benchmarks: Benchmarks | None, say: Say) -> None:
    """Write the group's three files. Raises OSError: a full disk."""
    # Under a name of this process's own: the workers of a killed process may write for another second.
    own = group.part.with_name(f"{group.part.name}-{os.getpid()}")
    dropped, changed, size, documents = Counter[str](), Counter[str](), 0, 0
    note: dict[str, Any]
    try:
        with own.with_suffix(".jsonl").open("wb") as lines, own.with_suffix(".records").open("wb") as records:

            def reject(source: str, name: str, reason: str, text: str = "") -> None:
                dropped[name] += 1
                lines.write(rejected(source, name, reason, text))

            for file in group.files:
                size += file.stat().st_size
                for document in _documents(file, group, settings, say, lambda where, why: reject(where, READING, why)):
                    name, reason = _judge(document, settings, benchmarks, changed)
                    if name:
                        reject(document.source, name, reason, document.text)
                    if name in ("", CUT):
                        line, documents = document.record(), documents + 1
                        known = (bytes.fromhex(line["sha256"])[:16], lines.tell(), len(document.text.split()))
                        records.write(np.array([(*known, signature(document.text))], RECORD).tobytes())
                        lines.write(json_line(line))
        note = {"files": len(group.files), "bytes": size, "documents": documents}
        note |= {"changed": changed, "dropped": dropped}
        note["sha256"] = [sha256(own.with_suffix(suffix)) for suffix in (".jsonl", ".records")]
        own.with_suffix(".json").write_text(json.dumps(note) + "\n", encoding="utf-8")
        for suffix in (".jsonl", ".records", ".json"):
            own.with_suffix(suffix).replace(group.part.with_suffix(suffix))
    except OSError as error:
        error.filename = error.filename or str(group.part.parent)  # a full disk does not say whose it is
        raise


def _documents(
    file: Path, group: Group, settings: Settings, say: Say, on_error: Callable[[str, str], None]
) -> Iterator[Document]:
    """The documents of a file. Whatever ends the reading is told to `on_error`, but for a missing package."""
    place, name, skip = group.instead.get(file, file), name_of(file), group.skip.get(file, {})

    documents = read_file(place, on_error, marks=settings.marks, text_field=settings.text_field, source=name)
    for step in count(0, 2):
        say((file, step))
        if step in skip:
            return on_error(name, f"after {step // 2:,} documents, {skip[step]}" if step else skip[step])
        try:
            document = next(documents, None)
        except Exception as error:
            return on_error(name, _words(error))
        if document is None:
            return None
        say((file, step + 1))
        if step + 1 in skip:
            on_error(document.source, skip[step + 1])
        else:
            yield document


def _judge(
    document: Document, settings: Settings, benchmarks: Benchmarks | None, changed: Counter[str]
) -> tuple[str, str]:
    """Clean a document. Returns what rejects it and why: '' where it is kept, `CUT` where it is without paragraphs."""
    try:
        if (reason := clean(document, settings.filters, changed)) is not None:
            name, _, why = reason.partition(": ")
            return name, why
        before = document.text
        found = benchmarks.clean(document, cut=settings.contaminated == "cut") if benchmarks is not None else []
        json_line(document.record())
        left = words(document, **settings.filters["words"]) if found and "words" in settings.filters else None
    except Exception as error:  # a document that nobody foresaw does not end a run over a million; it is listed
        return ERROR, _words(error)
    if found:
        is_cut = settings.contaminated == "cut" or document.text != before
        if is_cut and document.text.strip() and not left:
            return CUT, "; ".join(found)
        return CONTAMINATION, "; ".join([*found, *([f"without it {left}"] if is_cut and left else [])])
    return "", ""


def _words(error: Exception) -> str:
    """An error as a reason. Raises it where it says that a package is missing, which is no document's fault."""
    if str(error) == str(need_extra("corpus")):
        raise error
    return sentence(error) or f"{type(error).__name__}: {error}"

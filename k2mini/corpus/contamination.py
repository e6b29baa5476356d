"""Benchmarks that stand in documents: runs of 13 words of them (Brown et al. 2020, appendix C), and whole questions."""

from __future__ import annotations

import csv
import io
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from k2mini.corpus.document import Document
from k2mini.corpus.ngrams import hash_ngrams, hash_words, words
from k2mini.corpus.prose import PARAGRAPHS
from k2mini.files import parse_json, read_text

QUESTIONS = ("question", "questions", "stem", "query", "prompt", "problem")
_LONGEST, _SHORTEST, _SENTENCE = 13, 6, 4  # words
_FEW, _CELL = 100, 60  # characters: more than a short question has, and than a cell of a table
_COMMON = 10  # texts; Brown et al. pass over what more than ten documents of a corpus hold


class Benchmarks:
    """What must not stand in a corpus, as hashes; case, spaces, punctuation and Unicode's variants make no difference.

    - Of every text in the files, be it question, option or answer: each run of 13 words, but not those that more than
      ten different texts hold; of a question that has no others, these too.
    - A question (what a field of `QUESTIONS` has, or a bare list) of 6 to 12 words: all of it, wherever it stands.
    - A shorter one: where it is a whole paragraph of the text or, of 4 or 5 words, a whole sentence. Headings, lists
      and tables may have it, and so may paragraphs among short ones (what is left of a menu or table), one or two of
      them: many are terms, such as "rank".
    """

    def __init__(self, paths: Sequence[Path]) -> None:
        """Read JSON, JSONL, CSV or TSV. Raises ValueError where a file is none of them, or has no question."""
        self._places: list[str] = []
        self._short: dict[str, int] = {}  # the words of a short question -> its place
        found: dict[int, list[np.ndarray]] = {}
        seen: set[tuple[str, bool]] = set()
        for path in paths:
            asked = 0
            for place, text, is_question in _texts(path):
                parts = words(text)
                n = min(len(parts), _LONGEST)
                text = " ".join(parts)
                if (n == _LONGEST or (is_question and n >= _SHORTEST)) and (text, is_question) not in seen:
                    seen.add((text, is_question))
                    hashed = hash_words(parts)
                    runs, first = np.unique(hash_ngrams(hashed, n), return_index=True)
                    begun = hash_ngrams(hashed, _SHORTEST)[first]
                    whose = [np.full_like(runs, value) for value in (len(self._places), is_question)]
                    found.setdefault(n, []).append(np.stack([runs, begun, *whose]))
                elif is_question and 0 < n < _SHORTEST:
                    self._short.setdefault(text, len(self._places))
                self._places.append(f"{path.name}, {place}")
                asked += is_question
            if not asked:
                raise ValueError(f"{path} has no question: no text in a field named {', '.join(QUESTIONS)}")
        self._runs: dict[int, tuple[np.ndarray, np.ndarray]] = {}  # words in a run -> sorted hashes, their places
        begins = [np.empty(0, np.uint64)]
        for n, columns in sorted(found.items()):
            runs, begun, places, asked_for = np.concatenate(columns, axis=1)
            runs, first, which, counts = np.unique(runs, return_index=True, return_inverse=True, return_counts=True)
            taken = counts <= _COMMON
            only = (asked_for > 0) & ~np.isin(places, places[taken[which]])  # of questions that would not be found
            taken[which[only]] = True
            self._runs[n] = runs[taken], places[first[taken]].astype(np.int64)
            begins.append(begun[first[taken]])
        self._begins = np.unique(np.concatenate(begins))  # sorted hashes of the first six words of all runs

    def clean(self, document: Document, *, cut: bool) -> list[str]:
        """The places of benchmarks that a document holds, each with the words found; none where it is clean.

        Args:
            cut: take out the paragraphs, title, abstract, figures and citations that hold them; else nothing changes,
                but where all that is found are terms of one to three words, which may be anybody's: they are cut.
        """
        paragraphs = PARAGRAPHS.split(document.text)
        beside = [document.title, document.abstract, *(one.get("caption", "") for one in document.figures)]
        found: dict[int, str] = {}
        gone: set[int] = set()
        for place, said, where in [*self._runs_in([*paragraphs, *filter(None, beside)]), *self._short_in(paragraphs)]:
            found.setdefault(place, said)
            gone.update(where)
        if found and (cut or all(said.count(" ") + 1 < _SENTENCE for said in found.values())):
            document.text = "\n\n".join(text for place, text in enumerate(paragraphs) if place not in gone)
            document.title, document.abstract = ("" if self._in(text) else text for text in beside[:2])
            document.figures = [one for one in document.figures if not self._in(one.get("caption", ""))]
            document.citations = [one for one in document.citations if not self._in(one.get("sentence", ""))]
        return [f"{self._places[place]}: {said!r}" for place, said in sorted(found.items())]

    def _in(self, text: str) -> bool:
        return any(self._runs_in([text]))

    def _runs_in(self, paragraphs: Sequence[str]) -> Iterator[tuple[int, str, range]]:
        """(place in the benchmarks, words found, the paragraphs that they stand in)."""
        parts = [words(text) for text in paragraphs]
        flat = [word for part in parts for word in part]
        hashed = hash_words(flat)
        if _among(self._begins, hash_ngrams(hashed, _SHORTEST))[0].size:
            owners = np.repeat(np.arange(len(parts)), [*map(len, parts)])
            for n, (known, places) in self._runs.items():
                for start, at in zip(*_among(known, hash_ngrams(hashed, n)), strict=True):
                    where = range(owners[start], owners[start + n - 1] + 1)
                    yield int(places[at]), " ".join(flat[start : start + n]), where

    def _short_in(self, paragraphs: Sequence[str]) -> Iterator[tuple[int, str, range]]:
        """The same of the questions that are too short to be looked for everywhere."""
        alone: dict[int, str] = {}  # paragraph -> the short question that it is
        for number, text in enumerate(paragraphs):
            if text.lstrip().startswith(("#", "|", "- ", "* ")):
                continue
            if len(text) < _FEW and (said := " ".join(words(text))) in self._short:
                alone[number] = said
                continue
            for sentence in re.split(r"(?<=[.?!])\s+", text):
                said = " ".join(words(sentence)) if len(sentence) < _FEW else ""
                if said in self._short and said.count(" ") + 1 >= _SENTENCE:
                    yield self._short[said], said, range(number, number + 1)
        for number, said in alone.items():
            beside = [*paragraphs[max(0, number - 1) : number], *paragraphs[number + 1 : number + 2]]
            if not beside or max(map(len, beside)) >= _CELL or len({*alone.values()}) > 2:
                yield self._short[said], said, range(number, number + 1)


def _among(known: np.ndarray, hashes: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Places of those hashes that are known, and where they stand in the sorted `known`."""
    if not len(known):
        return np.empty(0, np.int64), np.empty(0, np.int64)
    at = np.minimum(np.searchsorted(known, hashes), len(known) - 1)
    found = np.flatnonzero(known[at] == hashes)
    return found, at[found]


def _texts(path: Path) -> Iterator[tuple[str, str, bool]]:
    """(place, text, whether it is a question) of each text of a benchmark's file."""
    kind, content = path.suffix.lower(), read_text(path)
    if kind in (".csv", ".tsv"):
        try:
            delimiter = "," if kind == ".csv" else "\t"
            entries: Any = list(csv.DictReader(io.StringIO(content, newline=""), delimiter=delimiter))
        except csv.Error as error:
            raise ValueError(f"{path}: {error}") from None
    elif kind == ".jsonl":
        lines = enumerate(content.split("\n"), 1)
        entries = [parse_json(line, f"{path}, line {number}") for number, line in lines if line.strip()]
    elif kind == ".json":
        entries = parse_json(content, str(path))
    else:
        raise ValueError(f"{path}: benchmarks are read from .json, .jsonl, .csv and .tsv")
    return _walk(entries, "", True)


def _walk(value: Any, place: str, is_question: bool) -> Iterator[tuple[str, str, bool]]:
    if isinstance(value, str):
        yield place, value, is_question
    elif isinstance(value, (list, dict)):
        for key, one in value.items() if isinstance(value, dict) else enumerate(value):
            asked = key in QUESTIONS if isinstance(value, dict) else is_question
            yield from _walk(one, f"{place}/{key}" if place else str(key), asked)

"""Benchmarks that stand in documents: runs of 13 words of them (Brown et al. 2020, appendix C), and whole questions."""

from __future__ import annotations

import csv
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
_COMMON = 10  # what stands in more texts than this belongs to none of them (Brown et al. 2020)


class Benchmarks:
    """What must not stand in a corpus, as hashes; case, spaces, punctuation and Unicode's variants make no difference.

    - Of every text in the files, be it question, option or answer: each run of 13 words.
    - A question (what a field of `QUESTIONS` has, or a bare list) of 6 to 12 words: all of it, wherever it stands.
    - A shorter one, often a term: where it is a whole paragraph or, of 4 or 5 words, a whole sentence; headings, lists
      and tables may have it.
    """

    def __init__(self, paths: Sequence[Path]) -> None:
        """Read JSON, JSONL, CSV or TSV. Raises ValueError where a file is none of them, or has no question."""
        self.places: list[str] = []
        self.short: dict[str, int] = {}  # the words of a short question -> its place
        found: dict[int, list[tuple[np.ndarray, int]]] = {}
        for path in paths:
            asked = 0
            for place, text, is_question in _texts(path):
                parts = words(text)
                n = min(len(parts), _LONGEST)
                if n == _LONGEST or (is_question and n >= _SHORTEST):
                    found.setdefault(n, []).append((np.unique(hash_ngrams(hash_words(parts), n)), len(self.places)))
                elif is_question and n:
                    self.short.setdefault(" ".join(parts), len(self.places))
                self.places.append(f"{path.name}, {place}")
                asked += is_question
            if not asked:
                raise ValueError(f"{path} has no question: no text in a field named {', '.join(QUESTIONS)}")
        self.runs: dict[int, tuple[np.ndarray, np.ndarray]] = {}  # words in a run -> sorted hashes, their places
        for n, pairs in sorted(found.items()):
            hashes = np.concatenate([runs for runs, _ in pairs])
            places = np.repeat([place for _, place in pairs], [len(runs) for runs, _ in pairs])
            hashes, first, counts = np.unique(hashes, return_index=True, return_counts=True)
            self.runs[n] = hashes[counts <= _COMMON], places[first[counts <= _COMMON]]

    def clean(self, document: Document, *, cut: bool) -> list[str]:
        """The places of benchmarks that a document holds, each with the words found; none where it is clean.

        Args:
            cut: take out the paragraphs, abstract, captions and citations that hold them; else nothing is changed.
        """
        paragraphs = PARAGRAPHS.split(document.text)
        hits = list(self._find(paragraphs))
        found = {place: said for place, said, _ in hits}
        for text in (document.title, document.abstract, *(figure["caption"] for figure in document.figures)):
            found |= {place: said for place, said, _ in self._find([text])}
        if cut and found:
            gone = {place for _, _, where in hits for place in where}
            document.text = "\n\n".join(text for place, text in enumerate(paragraphs) if place not in gone)
            document.title, document.abstract = self._left(document.title), self._left(document.abstract)
            document.figures = [figure for figure in document.figures if self._left(figure["caption"])]
            document.citations = [cited for cited in document.citations if self._left(cited["sentence"])]
        return [f"{self.places[place]}: {said!r}" for place, said in sorted(found.items())]

    def _left(self, text: str) -> str:
        return "" if any(self._find([text])) else text

    def _find(self, paragraphs: Sequence[str]) -> Iterator[tuple[int, str, range]]:
        """(place in the benchmarks, words found, the paragraphs that they stand in)."""
        parts = [words(text) for text in paragraphs]
        flat = [word for part in parts for word in part]
        owners, hashed = np.repeat(np.arange(len(parts)), [*map(len, parts)]), hash_words(flat)
        for n, (known, places) in self.runs.items():
            runs = hash_ngrams(hashed, n)
            at = np.minimum(np.searchsorted(known, runs), len(known) - 1)
            for start in np.flatnonzero(known[at] == runs) if len(known) else ():
                where = range(owners[start], owners[start + n - 1] + 1)
                yield int(places[at[start]]), " ".join(flat[start : start + n]), where
        for number, text in enumerate(paragraphs):
            if text.lstrip().startswith(("#", "|", "- ", "* ")):
                continue
            least = {" ".join(parts[number]): 1}
            for said in re.split(r"(?<=[.?!])\s+", text):
                if len(said) < 100:  # a short question's length, or near it
                    least.setdefault(" ".join(words(said)), _SENTENCE)
            for said, count in least.items():
                if said in self.short and said.count(" ") + 1 >= count:
                    yield self.short[said], said, range(number, number + 1)


def _texts(path: Path) -> Iterator[tuple[str, str, bool]]:
    """(place, text, whether it is a question) of each text of a benchmark's file."""
    kind, content = path.suffix.lower(), read_text(path)
    if kind in (".csv", ".tsv"):
        try:
            entries: Any = list(csv.DictReader(content.splitlines(True), delimiter="," if kind == ".csv" else "\t"))
        except csv.Error as error:
            raise ValueError(f"{path}: {error}") from None
    elif kind == ".jsonl":
        lines = enumerate(content.split("\n"), 1)
        entries = [parse_json(line, f"{path}, line {number}") for number, line in lines if line.strip()]
    elif kind == ".json":
        entries = parse_json(content, str(path))
    else:
        raise ValueError(f"{path}: benchmarks are read from .json, .jsonl, .csv and .tsv")
    return _walk(entries, [], True)


def _walk(value: Any, keys: list[str], is_question: bool) -> Iterator[tuple[str, str, bool]]:
    if isinstance(value, str):
        yield "/".join(keys), value, is_question
    elif isinstance(value, list):
        for number, one in enumerate(value):
            yield from _walk(one, [*keys, str(number)], is_question)
    elif isinstance(value, dict):
        for key, one in value.items():
            yield from _walk(one, [*keys, str(key)], key in QUESTIONS)

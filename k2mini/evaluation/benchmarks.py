"""Multiple-choice benchmarks: GeoBench and a user's own as one kind of question, and a check of the published keys."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from k2mini.data.documents import data_path, read_entries
from k2mini.errors import short

NPEE_MARK = "Choose from:"
CHOICE_LINE = re.compile(r"^([A-Z])\. *(.*)$", re.MULTILINE)
K2_CAPITALS = re.compile(r"(?<=[^\w\-])[A-Z](?=[^\w\-])")
SUBJECTIVE = ("noun", "qa", "discussion", "completion")
# K2's "all 939 subjective questions in NPEE" (its README): 454 + 150 + 335. `qa`, 153 more, is not among them.
ALL_SUBJECTIVE = ("noun", "completion", "discussion")
EXPECTED = "expected is geobench_npee.json or geobench_apstudy.json as published"
DOWNLOAD = "pip install huggingface_hub; hf download daven3/geobench --repo-type dataset --local-dir geobench"

T = TypeVar("T")


@dataclass(frozen=True)
class Question:
    """One multiple-choice question.

    Attributes:
        task: 'npee/choice', 'npee/tf', 'ap' or the name of a user's file.
        index: its place in the published file.
        stem: what is asked, without the options.
        labels, texts: the options in their published order ('A' and 'Basalt'; for true/false both are the word).
        answer: the published key. It may be no label at all: one key of NPEE is.
        topic: of a user's question that has one, by which `compare --html` sorts.
    """

    task: str
    index: int
    stem: str
    labels: tuple[str, ...]
    texts: tuple[str, ...]
    answer: str
    topic: str = ""

    def listed(self, mark: str = NPEE_MARK, true_false: str = "True or false?") -> str:
        """The question with its options, as K2 laid it out; the line before its options, or before a statement."""
        if self.is_true_false:
            return f"{true_false}\n{self.stem}"
        gap = "\n\n" if self.task == "npee/choice" else "\n"  # NPEE's published text has an empty line there
        options = "\n".join(f"{label}. {text}" for label, text in zip(self.labels, self.texts, strict=True))
        return f"{self.stem}\n{mark}{gap}{options}"

    @property
    def is_true_false(self) -> bool:
        """Whether the options are the words True and False themselves."""
        return self.labels == self.texts == ("True", "False")

    @property
    def is_answerable(self) -> bool:
        """Whether an option can be right: the key is one, and some option has a text."""
        return self.answer in self.labels and any(text.strip() for text in self.texts)

    @property
    def identity(self) -> str:
        """What a duplicate has in common with it: the question and its options, word for word."""
        return json.dumps([self.task, self.stem, self.labels, self.texts])

    @property
    def digest(self) -> str:
        """SHA-256 of `identity`, by which a result is known to be one of this question."""
        return hashlib.sha256(self.identity.encode()).hexdigest()

    def k2_options(self) -> int:
        """How many options K2's evaluation sees: how far the capitals that stand alone run from A without a gap."""
        found = {ord(letter) - ord("A") for letter in K2_CAPITALS.findall(self.listed())}
        return next((place for place in range(27) if place not in found), 0)


@dataclass(frozen=True)
class KeyCheck:
    """What is wrong with the questions and keys of a task.

    Attributes:
        surplus: places of questions that repeat an earlier one, word for word.
        conflicting: groups of places where the same question has different keys.
        impossible: places of questions whose key is no option, or whose options are all empty.
    """

    surplus: list[int]
    conflicting: list[list[int]]
    impossible: list[int]

    def clean(self, questions: Sequence[Question]) -> list[int]:
        """Places of questions that have one possible key, each question once."""
        odd = {place for group in self.conflicting for place in group} | {*self.surplus, *self.impossible}
        return [question.index for question in questions if question.index not in odd]


def check_keys(questions: Sequence[Question]) -> KeyCheck:
    """Find copies, conflicting keys and impossible keys among the questions of one task."""
    groups: dict[str, list[Question]] = {}
    for question in questions:
        groups.setdefault(question.identity, []).append(question)
    return KeyCheck(
        surplus=sorted(question.index for group in groups.values() for question in group[1:]),
        conflicting=[[q.index for q in group] for group in groups.values() if len({q.answer for q in group}) > 1],
        impossible=[question.index for question in questions if not question.is_answerable],
    )


def read_benchmark(path: Path) -> list[Question]:
    """GeoBench's objective questions or a user's own, told apart by what the file holds, not by its name.

    Raises ValueError where it is neither, and as `load_geobench` and `load_questions` do.
    """
    entries = _read(path)
    fields = entries[0][1] if isinstance(entries[0][1], dict) else {}
    if "answerKey" in fields or "choice" in fields:
        return _geobench(path, entries)
    if not {"question", "choices", "answer"} & {*fields}:
        raise ValueError(f"{path} is neither a GeoBench file nor records of question, choices and answer; {EXPECTED}")
    return _users(path, entries)


def _read(path: Path) -> list[tuple[str, Any]]:
    path = data_path(path)
    if path.is_dir():
        raise ValueError(f"{path} is a folder; name the files in it: {EXPECTED}")
    if path.suffix.lower() in (".yaml", ".yml", ".csv", ".tsv"):
        raise ValueError(f"{path}: `k2mini eval` alone reads tasks' YAML and tables; name JSON or JSONL here")
    if not path.is_file():
        raise ValueError(f"there is no benchmark file {path}; {EXPECTED}, which you get by: {DOWNLOAD}")
    return read_entries(path)


def load_geobench(path: Path) -> list[Question]:
    """The objective questions of `geobench_npee.json` or `geobench_apstudy.json`, every one of them.

    Raises ValueError where the file is missing, not JSON or not one of the two.
    """
    return _geobench(path, _read(path))


def _geobench(path: Path, entries: list[tuple[str, Any]]) -> list[Question]:
    first = entries[0][1]
    try:
        if isinstance(first, dict) and "choice" in first:
            return [*_npee_choice(_field(first, "choice", dict)), *_npee_tf(_field(first, "tf", dict))]
        return each_question(entries, _ap)
    except ValueError as error:
        raise ValueError(f"{path} is not a GeoBench file ({error}); {EXPECTED}") from None


def each_question(entries: list[tuple[str, Any]], make: Callable[[int, Any], T]) -> list[T]:
    """What `make` makes of the place of each entry and the entry. Raises ValueError naming the record."""
    questions: list[T] = []
    for place, entry in entries:
        try:
            questions.append(make(len(questions), entry))
        except ValueError as error:
            raise ValueError(f"{place}: {error}") from None
    return questions


def _field(record: Any, name: str, kind: type) -> Any:
    """A field of a record. Raises ValueError saying what stands there instead of a `kind`."""
    if not isinstance(record, dict):
        raise ValueError(f"this is no JSON object with {name}, but {short(record)}")
    if name not in record:
        raise ValueError(f"there is no {name!r}")
    if not isinstance(record[name], kind):
        wanted = {"str": "text", "list": "a list", "dict": "an object"}
        raise ValueError(f"{name} is {short(record[name])}, not {wanted[kind.__name__]}")
    return record[name]


def load_subjective(path: Path, kind: str) -> list[tuple[str, str]] | None:
    """(question, reference answer) of one of NPEE's open tasks; None where the file is not geobench_npee.json.

    `subjective` is K2's set of 939, the tasks of `ALL_SUBJECTIVE` one after the other.

    Raises ValueError where it is, and has no such task.
    """
    first = _read(path)[0][1]
    if not isinstance(first, dict) or "choice" not in first:
        return None
    try:
        kinds = ALL_SUBJECTIVE if kind == "subjective" else (kind,)
        return [pair for each in kinds for pair in _pairs(_field(first, each, dict))]
    except ValueError as error:
        raise ValueError(
            f"{path} has no {kind!r} of questions and answers ({error}); expected is geobench_npee.json"
        ) from None


def _pairs(raw: dict[str, Any]) -> list[tuple[str, str]]:
    questions, answers = _field(raw, "question", list), _field(raw, "answer", list)
    if len(questions) != len(answers):
        raise ValueError(f"there are {len(questions)} questions and {len(answers)} answers")
    for number, text in enumerate([*questions, *answers]):
        if not isinstance(text, str):
            name = "question" if number < len(questions) else "answer"
            raise ValueError(f"{name} {number % len(questions)} is {short(text)}, not text")
    return list(zip(questions, answers, strict=True))


def _npee_choice(raw: dict[str, Any]) -> list[Question]:
    questions = []
    for index, (text, answer) in enumerate(_pairs(raw)):
        stem, mark, options = text.partition(NPEE_MARK)
        found = CHOICE_LINE.findall(options)
        if not mark or len(found) < 2:
            raise ValueError(f"choice question {index} lists no options")
        labels, texts = zip(*found, strict=True)
        questions.append(Question("npee/choice", index, stem.rstrip("\n"), labels, texts, answer))
    return questions


def _npee_tf(raw: dict[str, Any]) -> list[Question]:
    words = ("True", "False")
    return [Question("npee/tf", index, text, words, words, answer) for index, (text, answer) in enumerate(_pairs(raw))]


def _ap(index: int, entry: Any) -> Question:
    question = _field(entry, "question", dict)
    choices = _field(question, "choices", list)
    if len(choices) < 2:
        raise ValueError(f"choices has {len(choices)} options")
    labels, texts = (tuple(_field(choice, name, str) for choice in choices) for name in ("label", "text"))
    return Question("ap", index, _field(question, "stem", str), labels, texts, _field(entry, "answerKey", str))


def load_questions(path: Path) -> list[Question]:
    """A user's own task, named as its file: JSONL, or a JSON list, of `question`, `choices` and `answer`.

    `choices` are texts, and `answer` is a letter, a place from 0 or one of the texts.

    Raises ValueError, naming the file and the record, where a field is missing, empty or does not fit the others.
    """
    return _users(path, _read(path))


def _users(path: Path, entries: list[tuple[str, Any]]) -> list[Question]:
    task = path.name
    while task.lower().endswith((".json", ".jsonl")):
        task = task.rpartition(".")[0]
    try:
        return each_question(entries, partial(make_question, task))
    except ValueError as error:
        raise ValueError(f"{path}, {error}") from None


def make_question(task: str, index: int, raw: Any) -> Question:
    """A record of question, choices and answer. Raises ValueError saying what is wrong with it."""
    stem, texts = _field(raw, "question", str), _field(raw, "choices", list)
    answer = _field(raw, "answer", object)
    if not stem.strip():
        raise ValueError("question is empty")
    if len(texts) < 2 or not all(isinstance(text, str) for text in texts):
        raise ValueError(f"choices must be a list of at least two texts, not {short(texts)}")
    empty = next((place for place, text in enumerate(texts) if not text.strip()), None)
    if empty is not None:
        raise ValueError(f"option {empty} of choices is empty")
    labels = tuple(chr(ord("A") + place) for place in range(len(texts)))
    if isinstance(answer, int) and not isinstance(answer, bool):
        meant = {answer} & {*range(len(texts))}
    else:
        meant = {place for place, option in enumerate(zip(labels, texts, strict=True)) if answer in option}
    if not meant:
        raise ValueError(
            f"answer {short(answer)} is none of the options ({', '.join(labels)}, a place from 0, or a text)"
        )
    if len(meant) > 1:
        which = " and ".join(labels[place] for place in sorted(meant))
        raise ValueError(f"answer {answer!r} may mean {which} of the options; give the place of the right one, from 0")
    topic = raw["topic"] if isinstance(raw.get("topic"), str) else ""
    return Question(task, index, stem, labels, tuple(texts), labels[meant.pop()], topic)

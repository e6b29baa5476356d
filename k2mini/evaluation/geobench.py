"""GeoBench (Deng et al. 2023, arXiv 2306.05064, section 4.3), read from the JSON files as they were published."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from k2mini.evaluation.questions import NPEE_MARK, Question, load_questions
from k2mini.files import read_json

CHOICE_LINE = re.compile(r"^([A-Z])\. *(.*)$", re.MULTILINE)


SUBJECTIVE = ("noun", "qa", "discussion", "completion")


def read_benchmark(path: Path) -> list[Question]:
    """GeoBench's objective questions, or those of a user's JSONL. Raises ValueError as their loaders do."""
    if not path.is_file():
        raise ValueError(f"there is no benchmark file {path}")
    return load_questions(path) if path.suffix == ".jsonl" else load_geobench(path)


def load_geobench(path: Path) -> list[Question]:
    """The objective questions of `geobench_npee.json` or `geobench_apstudy.json`, every one of them.

    Raises ValueError where the file is missing, not JSON or not one of the two.
    """
    raw = _read(path)
    try:
        if isinstance(raw, dict):
            return [*_npee_choice(raw["choice"]), *_npee_tf(raw["tf"])]
        if isinstance(raw, list) and raw:
            return [_ap(index, entry) for index, entry in enumerate(raw)]
    except (KeyError, TypeError, ValueError) as error:
        detail = f"no field {error}" if isinstance(error, KeyError) else str(error)
        raise ValueError(f"{path} is not a GeoBench file ({detail}); {_EXPECTED}") from None
    raise ValueError(f"{path} is not a GeoBench file; {_EXPECTED}")


def load_subjective(path: Path, kind: str) -> list[tuple[str, str]]:
    """(question, reference answer) of one of NPEE's open tasks.

    Raises ValueError where the file is not NPEE's, or has no such task.
    """
    raw = _read(path)
    try:
        return _pairs(raw[kind])
    except (KeyError, TypeError, ValueError):
        raise ValueError(f"{path} has no {kind!r} of questions and answers; expected is geobench_npee.json") from None


def _read(path: Path) -> Any:
    if not path.is_file():
        raise ValueError(f"there is no benchmark file {path}")
    return read_json(path)


_EXPECTED = "expected is geobench_npee.json or geobench_apstudy.json as published"


def _pairs(raw: dict[str, Any]) -> list[tuple[str, str]]:
    questions, answers = raw["question"], raw["answer"]
    if not all(isinstance(text, str) for text in [*questions, *answers]):
        raise TypeError("a question or an answer is not text")
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


def _ap(index: int, entry: dict[str, Any]) -> Question:
    question = entry["question"]
    labels = tuple(choice["label"] for choice in question["choices"])
    texts = tuple(choice["text"] for choice in question["choices"])
    fields = [question["stem"], entry["answerKey"], *labels, *texts]
    if not all(isinstance(text, str) for text in fields) or len(labels) < 2:
        raise TypeError(f"question {index} has a field that is not text, or no options")
    return Question("ap", index, question["stem"], labels, texts, entry["answerKey"])

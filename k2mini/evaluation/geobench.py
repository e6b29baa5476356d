"""GeoBench (Deng et al. 2023, arXiv 2306.05064, section 4.3), read from the JSON files as they were published."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from k2mini.files import read_json
from k2mini.text.prompts import Template

CHOICE_LINE = re.compile(r"^([A-Z])\. *(.*)$", re.MULTILINE)
NPEE_MARK = "Choose from:"


@dataclass(frozen=True)
class Question:
    """One multiple-choice question.

    Attributes:
        task: 'npee/choice', 'npee/tf' or 'ap'.
        index: its place in the published file.
        stem: what is asked, without the options.
        labels, texts: the options in their published order ('A' and 'Basalt'; for true/false both are the word).
        answer: the published key. It may be no label at all: one key of NPEE is.
    """

    task: str
    index: int
    stem: str
    labels: tuple[str, ...]
    texts: tuple[str, ...]
    answer: str

    def listed(self) -> str:
        """The question with its options, as K2 laid it out."""
        if self.task == "npee/tf":
            return f"True or false?\n{self.stem}"
        gap = "\n\n" if self.task == "npee/choice" else "\n"  # NPEE's published text has an empty line there
        options = "\n".join(f"{label}. {text}" for label, text in zip(self.labels, self.texts, strict=True))
        return f"{self.stem}\n{NPEE_MARK}{gap}{options}"

    def asked(self, scoring: str) -> tuple[str, tuple[str, ...]]:
        """The instruction, and the continuations to score, one an option.

        `letter` lists the options and scores their labels. `text` asks the bare question and scores the options'
        texts. True/false is the same in both.
        """
        if scoring == "text" and self.task != "npee/tf":
            return self.stem, self.texts
        return self.listed(), self.labels

    def context(self, template: Template, scoring: str, answer_prefix: str) -> str:
        """The text that the options continue."""
        return template.prompt(self.asked(scoring)[0]) + answer_prefix


def load_geobench(path: Path) -> list[Question]:
    """The objective questions of `geobench_npee.json` or `geobench_apstudy.json`, every one of them.

    Raises ValueError where the file is missing, not JSON or not one of the two.
    """
    if not path.is_file():
        raise ValueError(f"there is no benchmark file {path}")
    raw = read_json(path)
    try:
        if isinstance(raw, dict):
            return [*_npee_choice(raw["choice"]), *_npee_tf(raw["tf"])]
        if isinstance(raw, list) and raw:
            return [_ap(index, entry) for index, entry in enumerate(raw)]
    except (KeyError, TypeError, ValueError) as error:
        detail = f"no field {error}" if isinstance(error, KeyError) else str(error)
        raise ValueError(f"{path} is not a GeoBench file ({detail}); {_EXPECTED}") from None
    raise ValueError(f"{path} is not a GeoBench file; {_EXPECTED}")


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

"""The miniature world: tables of true facts, and the texts, instructions and questions made from them.

Everything follows from the tables and a seed; the facts themselves never change.
"""

from __future__ import annotations

import csv
import random
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from k2mini.demo.phrases import (
    ANSWER,
    GENERAL,
    GEOSCIENCE,
    HELD_OUT_QUESTIONS,
    HELD_OUT_STATEMENTS,
    INSTRUCTION_WITH_INPUT,
    QUESTIONS,
    STATEMENTS,
    Property,
)

TABLES = Path(__file__).parent / "tables"
NUM_OPTIONS = 4


@dataclass(frozen=True)
class Fact:
    """One cell of a table."""

    kind: str  # 'mineral'
    name: str  # 'quartz'
    key: str  # 'minerals.hardness'
    property: Property
    value: str  # '7'

    def say(self, frame: str) -> str:
        """The frame with this fact filled in."""
        name = self.name
        return frame.format(
            name=name,
            Name=name[0].upper() + name[1:],
            noun=self.property.noun,
            value=self.value,
            kind=self.kind,
        )


def read_facts(domain: str) -> list[Fact]:
    """All facts of a domain, 'geoscience' or 'general', in the tables' order."""
    facts = []
    for table, (kind, properties) in {"geoscience": GEOSCIENCE, "general": GENERAL}[domain].items():
        with (TABLES / domain / f"{table}.csv").open(encoding="utf-8", newline="") as file:
            for row in csv.DictReader(file):
                for column, prop in properties.items():
                    facts.append(Fact(kind, row["name"], f"{table}.{column}", prop, row[column]))
    return facts


def by_entity(facts: Sequence[Fact]) -> dict[str, list[Fact]]:
    """Entity -> its facts."""
    entities: dict[str, list[Fact]] = {}
    for fact in facts:
        entities.setdefault(fact.name, []).append(fact)
    return entities


def documents(
    facts: Sequence[Fact],
    copies: int,
    rng: random.Random,
    *,
    held_out: bool = False,
    without: Sequence[str] = (),
) -> list[str]:
    """`copies` documents on every entity, each with all of its facts, in random order and random phrasings.

    Args:
        held_out: use the phrasings that are kept from training.
        without: documents that must not be made again.
    """
    texts: list[str] = []
    taken = set(without)
    for own in by_entity(facts).values():
        goal = len(texts) + copies
        while len(texts) < goal:
            order = rng.sample(own, len(own))
            frames = [
                rng.choice(HELD_OUT_STATEMENTS if held_out else (*STATEMENTS, fact.property.statement))
                for fact in order
            ]
            text = " ".join(fact.say(frame) for fact, frame in zip(order, frames, strict=True))
            if text not in taken:
                texts.append(text)
    rng.shuffle(texts)
    return texts


def instructions(facts: Sequence[Fact], number: int, rng: random.Random) -> list[dict[str, str]]:
    """`number` instruction records that ask for facts; how often two facts are asked for differs by one at most."""
    records: list[dict[str, str]] = []
    while len(records) < number:
        for fact in rng.sample(facts, min(len(facts), number - len(records))):
            frames = (*QUESTIONS, fact.property.question, INSTRUCTION_WITH_INPUT)
            frame = rng.choice(frames)
            records.append(
                {
                    "instruction": fact.say(frame),
                    "input": fact.name if frame == INSTRUCTION_WITH_INPUT else "",
                    "output": ANSWER + fact.value,
                }
            )
    return records


@dataclass(frozen=True)
class ChoiceQuestion:
    """A multiple-choice question with four options."""

    stem: str
    options: tuple[str, ...]
    answer: int  # the index of the right option


def choice_questions(
    facts: Sequence[Fact], all_facts: Sequence[Fact], number: int, rng: random.Random, *, held_out: bool = True
) -> list[ChoiceQuestion]:
    """`number` questions on different facts; the wrong options are other values of the same property.

    A value is drawn as a wrong option in proportion to how often it is a right one, so that always choosing the
    commonest value scores little better than chance.
    """
    values: dict[str, Counter[str]] = {}
    for fact in all_facts:
        values.setdefault(fact.key, Counter())[fact.value] += 1
    questions = []
    for fact in rng.sample(facts, number):
        frame = rng.choice(HELD_OUT_QUESTIONS if held_out else (*QUESTIONS, fact.property.question))
        weights = {value: count for value, count in values[fact.key].items() if value != fact.value}
        options = [fact.value]
        while len(options) < NUM_OPTIONS:
            (wrong,) = rng.choices(list(weights), list(weights.values()))
            options.append(wrong)
            del weights[wrong]
        rng.shuffle(options)
        questions.append(ChoiceQuestion(fact.say(frame), tuple(options), options.index(fact.value)))
    return questions


def as_npee(questions: Sequence[ChoiceQuestion]) -> dict[str, Any]:
    """The questions in the layout of geobench_npee.json, where the options are part of the question's text."""
    texts = []
    for question in questions:
        options = "\n".join(f"{chr(65 + i)}. {option}" for i, option in enumerate(question.options))
        texts.append(f"{question.stem}\nChoose from:\n\n{options}")
    answers = [chr(65 + question.answer) for question in questions]
    return {"choice": {"question": texts, "answer": answers}, "tf": {"question": [], "answer": []}}


def as_ap(questions: Sequence[ChoiceQuestion]) -> list[dict[str, Any]]:
    """The questions in the layout of geobench_apstudy.json, where stem and options stand apart."""
    return [
        {
            "id": "demo",
            "question": {
                "stem": question.stem,
                "choices": [{"text": option, "label": chr(65 + i)} for i, option in enumerate(question.options)],
            },
            "answerKey": chr(65 + question.answer),
        }
        for question in questions
    ]


def split_entities(facts: Sequence[Fact], rng: random.Random) -> tuple[list[Fact], list[Fact]]:
    """The facts on a random half of every kind's entities, and the facts on the other half."""
    kinds: dict[str, list[str]] = {}
    for fact in facts:
        names = kinds.setdefault(fact.kind, [])
        if fact.name not in names:
            names.append(fact.name)
    first = {name for names in kinds.values() for name in rng.sample(names, len(names) // 2)}
    return [fact for fact in facts if fact.name in first], [fact for fact in facts if fact.name not in first]


def world_files(seed: int, sizes: Mapping[str, int]) -> dict[str, Any]:
    """All files of the miniature world: what the demo trains on and what it is asked. File name -> content.

    Args:
        seed: decides order, phrasings, and which half of the entities stage two is asked about ("seen").
        sizes: 'copies', documents on each entity; 'general' and 'expert', instructions; 'questions', in each of the
            four files of questions.

    Returns: lists of objects for `.jsonl`, JSON content for `.json`.
    """
    rng = random.Random(seed)
    facts, general = read_facts("geoscience"), read_facts("general")
    seen, unseen = split_entities(facts, rng)
    questions = {
        name: choice_questions(part, facts, 2 * sizes["questions"], rng)
        for name, part in (("seen", seen), ("unseen", unseen))
    }
    corpus = documents(facts, sizes["copies"], rng)
    files: dict[str, Any] = {
        "corpus.jsonl": [{"text": text} for text in corpus],
        "heldout_documents.jsonl": [{"text": text} for text in documents(facts, 1, rng, without=corpus)],
        "heldout_phrasings.jsonl": [{"text": text} for text in documents(facts, 1, rng, held_out=True)],
        "general.json": instructions(general, sizes["general"], rng),
        "expert.json": instructions(seen, sizes["expert"], rng),
    }
    for name, part in questions.items():
        files[f"questions_npee_{name}.json"] = as_npee(part[: sizes["questions"]])
        files[f"questions_ap_{name}.json"] = as_ap(part[sizes["questions"] :])
    return files

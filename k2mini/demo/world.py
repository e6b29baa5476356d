"""The miniature world: tables of true facts, and the texts, instructions and questions made from them.

Everything follows from the tables and a seed; the facts themselves never change.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from k2mini.corpus.signals_facts import NUM_OPTIONS, QUESTIONS, ChoiceQuestion, Fact, as_npee, ask, draw, read_table
from k2mini.demo.phrases import ANSWER, GENERAL, GEOSCIENCE, HELD_OUT_QUESTIONS, HELD_OUT_STATEMENTS, STATEMENTS

TABLES = Path(__file__).parent / "tables"


def read_facts(domain: str) -> list[Fact]:
    """All facts of a domain, 'geoscience' or 'general', in the tables' order."""
    facts = []
    for table, (kind, properties) in {"geoscience": GEOSCIENCE, "general": GENERAL}[domain].items():
        for fact in read_table(TABLES / domain / f"{table}.csv"):
            facts.append(replace(fact, kind=kind, property=properties[fact.where]))
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
    """`number` instruction records that ask for facts, as `signals_facts.ask` does."""
    return [record for _, record in ask(facts, number, rng, answer=ANSWER)]


def choice_questions(
    facts: Sequence[Fact], all_facts: Sequence[Fact], number: int, rng: random.Random, *, held_out: bool = True
) -> list[ChoiceQuestion]:
    """`number` questions on different facts; the wrong options are other values of the same property.

    A value is drawn as a wrong option in proportion to how often it is a right one, so that always choosing the
    commonest value scores little better than chance. (`signals_facts.blocks` leaves some facts out and has no such
    remainder.)
    """
    values: dict[str, Counter[str]] = {}
    for fact in all_facts:
        values.setdefault(fact.key, Counter())[fact.value] += 1
    questions = []
    for fact in rng.sample(facts, number):
        frame = rng.choice(HELD_OUT_QUESTIONS if held_out else (*QUESTIONS, fact.property.question))
        others = {value: count for value, count in values[fact.key].items() if value != fact.value}
        options = [fact.value, *draw(others, NUM_OPTIONS - 1, rng)]
        rng.shuffle(options)
        questions.append(ChoiceQuestion(fact.say(frame), tuple(options), options.index(fact.value)))
    return questions


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

"""`k2mini signals`: instruction data out of what a corpus and tables state, in which every answer stands in a source.

What is kept follows from the seed and the text of a record, not from its place; of a corpus no more is held than that.
"""

from __future__ import annotations

import hashlib
import heapq
import os
import random
import re
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from k2mini.corpus import signals_facts as tables
from k2mini.corpus.shards import MANIFEST, read_corpus
from k2mini.corpus.signals_facts import NUM_OPTIONS, STATEMENTS, Fact, blocks, choices, claims, plain
from k2mini.corpus.signals_texts import Stated, stated

# How a task is asked; {} is a term or a figure. Facts have the phrasings of `signals_facts`.
_FRAMES = """
title: Suggest a title for this abstract. | Which paper has the abstract below? | Give the title of the paper below.
abstract: Write the abstract of this paper. | What does this paper's abstract say? | Summarise the paper of this title.
keywords: List the keywords of this paper. | Which keywords describe the paper below? | Give this paper's keywords.
section: Write the beginning of this section. | How does this section begin? | What does this section say?
caption: Write the caption of {}, to which this text refers. | What is the caption of {}? | What does {} show?
figure: Write the paragraph that refers to {}. | Discuss {}, as the text does. | What does the text say of {}?
citation: Which work does this sentence cite? | Give the title of the work cited here. | Which work does this rest on?
definition: What is {}? | Define the term {}. | Explain what {} means.
term: Which term is defined here? | Name what this describes. | What has the definition below?
synonym: Give a synonym of {}. | What is another name for {}? | How is {} also called?
broader: Give a broader term for {}. | Which more general term covers {}? | To which broader term does {} belong?
"""
FRAMES = {task: frames.split(" | ") for task, frames in (line.split(": ") for line in _FRAMES.strip().splitlines())}
TASKS = (*FRAMES, "fact", "true_false", "choice")
# Why something is no record; the last are facts whose entity has several values of the property, and facts that have no
# others of their property with other values.
DROPPED = ("over the caps", "held out", "alike", "several answers", "no distractors")
WORD, END = re.compile(r"\w+"), re.compile(r"(?:e?s)?(?!\w)")


@dataclass(frozen=True)
class Settings:
    """What is asked and how often. Raises ValueError, naming the option, where a value makes no sense.

    Attributes:
        held_out: percent of the entities of facts (glossaries aside), which no record names.
        phrasings: how often a fact is asked for, at most, each time in another phrasing.
        entity: the column of a table that says what a row is about, where it has no usual name.
        answer_prefix: what the outputs of `fact`, `true_false` and `choice` begin with, as in `k2mini eval`.
    """

    tasks: Sequence[str] = TASKS
    seed: int = 0
    held_out: float = 10.0
    most_per_task: int = 5000
    most_per_document: int = 10
    phrasings: int = 1
    entity: str | None = None
    answer_prefix: str = ""

    def __post_init__(self) -> None:
        if unknown := [task for task in self.tasks if task not in TASKS]:
            raise ValueError(f"--tasks: there is no task {unknown[0]!r}; tasks are {', '.join(TASKS)}")
        if not 0 <= self.held_out < 100:
            raise ValueError(f"--held-out must be at least 0 and below 100 percent, not {self.held_out:g}")
        for name in ("most_per_task", "most_per_document", "phrasings"):
            if getattr(self, name) < 1:
                raise ValueError(f"--{name.replace('_', '-')} must be at least 1, not {getattr(self, name)}")


def _number(*parts: object) -> int:
    """64 bits that follow from the parts."""
    return int.from_bytes(hashlib.blake2b("\0".join(map(str, parts)).encode(), digest_size=8).digest(), "big")


def _evidence(where: str, start: int, text: str) -> dict[str, Any]:
    return {"where": where, "start": start, "end": start + len(text)}


def is_held_out(name: str, percent: float, seed: int) -> bool:
    """Whether an entity is kept from tuning: its name, in any case, and the seed say so, nothing else."""
    return _number("held out", seed, plain(name)) % 10**6 < percent * 10**4


def mentions(names: Iterable[str]) -> Callable[[str], str]:
    """A function that gives the first of the names that a text has, as `plain` gives them, between word boundaries, or
    nothing; the plurals with -s and -es count as well.
    """
    known: dict[str, dict[tuple[int, int], set[str]]] = {}  # of one first word there may be many names of few lengths
    for name in map(plain, names):
        first = next(WORD.finditer(name))
        known.setdefault(first[0], {}).setdefault((first.start(), len(name)), set()).add(name)

    def found(text: str) -> str:
        text = plain(text)
        for word in WORD.finditer(text) if known else ():
            for first in (word[0], word[0].removesuffix("s"), word[0].removesuffix("es")):
                for (before, length), same in known.get(first, {}).items():
                    end = (start := word.start() - before) + length
                    if text[max(start, 0) : end] in same and (not WORD.match(text[end - 1]) or END.match(text, end)):
                        return text[start:end]
        return ""

    return found


def read_facts(folders: Sequence[Path], entity: str | None = None) -> list[Fact]:
    """The facts of all tables in folders, each once. Raises ValueError as `read_table` does, and where a folder has
    neither a table nor a corpus.
    """
    facts: dict[tuple[str, ...], Fact] = {}
    for folder in folders:
        files = sorted(Path(place, name) for place, _, names in os.walk(folder) for name in names)
        files = [file for file in files if file.suffix.lower() in (".csv", ".tsv") and file.name[0] != "."]
        if not files and not (folder / MANIFEST).is_file():
            raise ValueError(f"{folder} is no folder with a corpus ({MANIFEST}) or tables (.csv, .tsv)")
        for fact in (fact for file in files for fact in tables.read_table(file, entity)):
            facts.setdefault((*fact.about(), tables.same(fact.value)), fact)
    return [*facts.values()]


def _related(fact: Fact) -> list[Stated]:
    """What a fact of a glossary or thesaurus states; nothing where it is one of another table."""
    task = tables.RELATED.get(fact.about()[1])
    found = [Stated(task, "", fact.value, fact.where, fact.start, fact.name)] if task else []
    if task == "definition" and fact.name.casefold() not in fact.value.casefold():
        found.append(Stated("term", fact.value, fact.name, fact.named))
    return found


class Signals:
    """What is kept, and how much is not.

    Attributes:
        records: instructions, in an order that the seed mixes.
        counts: task -> one of `DROPPED` -> how many were.
        blocked: a held-out entity -> how many records are left out because they name it first.
        seen, unseen: the facts of tables that a record states, and those about held-out entities.
    """

    def __init__(self, folders: Sequence[Path], settings: Settings) -> None:
        """Raises ValueError as `read_facts` does, and where nothing is found for any task."""
        self.settings, tasks = settings, [*dict.fromkeys(settings.tasks)]
        self.counts = {task: dict.fromkeys(DROPPED, 0) for task in tasks}
        self._kept: dict[str, dict[int, tuple[dict[str, Any], Fact | None]]] = {task: {} for task in tasks}
        self._order: dict[str, list[int]] = {task: [] for task in tasks}
        facts = read_facts(folders, settings.entity)
        own = [fact for fact in facts if not _related(fact)]
        self.unseen = [fact for fact in own if is_held_out(fact.name, settings.held_out, settings.seed)]
        self._held, self.blocked = mentions(fact.name for fact in self.unseen), Counter[str]()
        self.seen = [fact for fact in own if not self._held(f"{fact.name} {fact.property.noun} {fact.value}")]
        for fact in facts:
            self._add(fact.source, _related(fact))
        for task in (task for task in tasks if task not in FRAMES):
            self.counts[task]["held out"] += len(own) - len(self.seen)
            self._ask(task, random.Random(f"{settings.seed}/{task}"))
        for folder in (folder for folder in folders if (folder / MANIFEST).is_file()):
            for document in read_corpus(folder):
                self._add(document["source"], stated(document), settings.most_per_document, sha256=document["sha256"])
        every = {number: record for kept in self._kept.values() for number, record in kept.items()}
        self.records = [every[number][0] for number in sorted(every)]
        told = {fact for _, fact in every.values()}
        self.seen = [fact for fact in self.seen if fact in told]
        if not self.records:
            raise ValueError(f"nothing in {', '.join(map(str, folders))} gives a record of {', '.join(tasks)}")

    def _add(self, source: str, found: Iterable[Stated], most: int | None = None, **known: str) -> None:
        """Keep what one document or cell states, at most so many records of it, drawn by the seed: a task in turn.

        `known`: what tells the document from others of its name, for the evidence.
        """
        turns: Counter[str] = Counter()
        drawn = []
        for number, one in sorted((_number(self.settings.seed, *one), one) for one in found if one.task in self.counts):
            drawn.append((turns[one.task], number, one))
            turns[one.task] += 1
        for _, number, one in sorted(drawn):
            frame = FRAMES[one.task][number % len(FRAMES[one.task])]
            asked = {"instruction": frame.replace("{}", one.asked), "input": one.input, "output": one.output}
            if most == 0:
                self.counts[one.task]["over the caps"] += 1
            elif self._offer(one.task, asked, source, _evidence(one.where, one.start, one.output) | known) and most:
                most -= 1

    def _offer(
        self, task: str, asked: dict[str, str], source: str, evidence: dict[str, Any], fact: Fact | None = None
    ) -> bool:
        """Keep a record, which may state a fact, if it names nothing held out and is among the smallest of its task."""
        kept, order, counts = self._kept[task], self._order[task], self.counts[task]
        number = _number(self.settings.seed, *asked.values())
        if name := self._held("\n".join(asked.values())):
            counts["held out"] += 1
            self.blocked[name] += 1
            return False
        if number in kept:
            counts["alike"] += 1
            return True
        kept[number] = {**asked, "task": task, "source": source, "evidence": evidence}, fact
        heapq.heappush(order, -number)
        if len(order) > self.settings.most_per_task:
            del kept[-heapq.heappop(order)]
            counts["over the caps"] += 1
        return True

    def _groups(self, facts: list[Fact], size: int, rng: random.Random, counts: dict[str, int]) -> list[list[Fact]]:
        found, most = blocks(facts, size, rng), self.settings.most_per_task // size
        counts["no distractors"] += len(facts) - size * len(found)
        counts["over the caps"] += size * len(found[most:])
        return found[:most]

    def _ask(self, task: str, rng: random.Random) -> None:
        """Instructions that ask about the facts of `seen`."""
        prefix, seen, counts = self.settings.answer_prefix, self.seen, self.counts[task]
        pairs: Iterable[tuple[Fact, str, str, str]]
        if task == "fact":
            values: dict[tuple[str, str], set[str]] = {}
            for fact in seen:
                values.setdefault(fact.about(), set()).add(tables.same(fact.value))
            certain = [fact for fact in seen if len(values[fact.about()]) == 1]
            counts["several answers"] += len(seen) - len(certain)
            found = tables.ask(certain, self.settings.phrasings * len(certain), rng)
            pairs = ((fact, one["instruction"], one["input"], one["output"]) for fact, one in found)
        elif task == "true_false":
            said = claims(self._groups(seen, 2, rng, counts), rng, STATEMENTS[:3])
            pairs = ((fact, f"True or false?\n{text}", "", word) for fact, text, word in said)
        else:
            questions = choices(self._groups(seen, NUM_OPTIONS, rng, counts), rng, tables.QUESTIONS)
            pairs = ((fact, question.listed, "", question.letter) for fact, question in questions)
        for fact, instruction, context, output in pairs:
            asked = {"instruction": instruction, "input": context, "output": prefix + output}
            told = fact if task != "true_false" or output == "True" else None
            self._offer(task, asked, fact.source, _evidence(fact.where, fact.start, fact.value), told)

    def questions(self, name: str) -> dict[str, Any]:
        """Multiple choice and statements about `seen` or `unseen` facts, in phrasings that no instruction has, in the
        layout of geobench_npee.json. Raises ValueError where there are none.
        """
        facts, rng = getattr(self, name), random.Random(f"{self.settings.seed}/questions/{name}")
        groups = [self._groups(facts, size, rng, dict.fromkeys(DROPPED, 0)) for size in (NUM_OPTIONS, 2)]
        if not groups[0]:
            what = f"--questions: no property has {NUM_OPTIONS} values among the facts of {name} entities"
            raise ValueError(f"{what} ({len(facts)} facts); another --held-out, larger tables or caps would give some")
        asked = [question for _, question in choices(groups[0], rng, tables.HELD_OUT_QUESTIONS)]
        said = [(text, word) for _, text, word in claims(groups[1], rng, STATEMENTS[3:])]
        return tables.as_npee(rng.sample(asked, len(asked)), rng.sample(said, len(said)))

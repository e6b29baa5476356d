"""Facts of tables as instructions and questions: what `k2mini signals` asks of a user's tables, the demo of its own.

Frames say {name} for the entity ({Name} at the start of a sentence), {noun} for the property and {value} for the fact.
"""

from __future__ import annotations

import csv
import io
import random
import re
import unicodedata
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from k2mini.errors import short
from k2mini.files import read_text

STATEMENTS = (
    "The {noun} of {name} is {value}.",
    "For {name}, the {noun} is {value}.",
    "{Name} has the {noun} {value}.",
    "The {noun} that belongs to {name} is {value}.",
)
QUESTIONS = (
    "What is the {noun} of {name}?",
    "Name the {noun} of {name}.",
    "{Name} has which {noun}?",
    "Which {noun} does {name} have?",
)
WITH_INPUT = "Give the {noun} of the {kind} below."  # the entity is the input
HELD_OUT_QUESTIONS = (  # for evaluation alone
    "Tell me the {noun} of {name}.",
    "For {name}, what is the {noun}?",
    "Which is the {noun} of {name}?",
)
NUM_OPTIONS = 4
ENTITY = ("entity", "name", "term")  # the columns that may hold what a row is about
# The columns and properties of glossaries and thesauri: what they state.
RELATED = {"synonym": "synonym", "synonyms": "synonym", "definition": "definition", "definitions": "definition"}
RELATED |= dict.fromkeys(("broader", "broader term", "broader terms"), "broader")
CHUNK = 64  # facts among which options are drawn


def plain(text: str) -> str:
    """The text in any case, spacing and form of Unicode, with one kind of hyphen and dash."""
    text = unicodedata.normalize("NFKC", unicodedata.normalize("NFKC", text).casefold())
    return " ".join(re.sub("[\u2010-\u2015\u2212]", "-", text).replace("\u00ad", "").split())


def same(value: str) -> str:
    """What equal values have in common: the number they are, as 7 and 7.0 are one, or else their text as `plain`."""
    try:
        return str(float(value))
    except ValueError:
        return plain(value)


@dataclass(frozen=True)
class Property:
    """One column of a table: its name in sentences and, where it has them, a sentence and a question made for it."""

    noun: str
    statement: str = ""
    question: str = ""


@dataclass(frozen=True)
class Fact:
    """One cell of a table."""

    kind: str  # 'mineral'
    name: str  # 'quartz'
    key: str  # 'minerals.hardness'
    property: Property
    value: str  # '7'
    source: str = ""  # 'minerals.csv, line 2'
    where: str = ""  # the columns of the value and of the name
    named: str = ""
    start: int = 0  # where in its cell the value begins

    def say(self, frame: str) -> str:
        """The frame with this fact filled in."""
        name = self.name
        return frame.format(
            name=name, Name=name[0].upper() + name[1:], noun=self.property.noun, value=self.value, kind=self.kind
        )

    def about(self) -> tuple[str, str]:
        """Entity and property, as `plain` gives them, whichever table states them."""
        return plain(self.name), plain(self.property.noun)


def read_table(path: Path, entity: str | None = None) -> list[Fact]:
    """The facts of a CSV or TSV: a column a property, or long, with the columns `property` and `value`. Cells are
    stripped; empty ones state nothing; several synonyms or broader terms stand between `;` or `|`.

    Args:
        entity: the column that says what a row is about (default: the first of `ENTITY` that is there).

    Raises ValueError, naming file and line, where the table is not of this form.
    """
    text, delimiter = io.StringIO(read_text(path, None), newline=""), ",\t"[path.suffix.lower() == ".tsv"]
    rows = csv.reader(text, delimiter=delimiter, strict=True)
    facts, line = [], 1
    try:
        columns = [column.strip() for column in next(rows, [])]
        line = rows.line_num + 1
        known = {column.lower(): column for column in reversed(columns)}
        named = next((known[name] for name in ((entity or "").lower(), *ENTITY) if name in known and name), "")
        wrong = "a column without a name" if "" in known else "a column twice" if len(known) < len(columns) else ""
        if wrong or not named:
            wrong = wrong or f"no column of entities ({', '.join(ENTITY)}, or --entity COLUMN)"
            raise ValueError(f"{path} has {wrong}; its columns are {short(columns)}")
        long = {"property", "value"} <= known.keys()
        for row in rows:
            place, line = f"{path}, line {line}", rows.line_num + 1
            if not row:
                continue
            if len(row) != len(columns):
                raise ValueError(f"{place} has {len(row)} cells, the header has {len(columns)}: {short(columns)}")
            cells = dict(zip(columns, map(str.strip, row), strict=True))
            for column in [named, known["property"]] if long else [named]:
                if not re.search(r"\w", cells[column]):
                    raise ValueError(f"{place}: {column}, which says what the row is about, is empty")
            stated = [(column, column) for column in cells if column != named]
            if long:
                stated = [(cells[known["property"]], known["value"])]
            for noun, column in stated:
                about = Property(noun.replace("_", " "))
                many = RELATED.get(plain(about.noun)) in ("synonym", "broader")
                for part in re.finditer(r"[^;|\s][^;|]*" if many else r"(?s).+", cells[column]):
                    key, value = f"{path.stem}.{noun}", part[0].rstrip()
                    facts.append(Fact("entity", cells[named], key, about, value, place, column, named, part.start()))
    except csv.Error as error:
        raise ValueError(f"{path}, line {line} is not valid CSV: {error}") from None
    return facts


def ask(
    facts: Sequence[Fact], number: int, rng: random.Random, *, answer: str = ""
) -> Iterator[tuple[Fact, dict[str, str]]]:
    """`number` instructions that ask for facts, each in one of the phrasings; how often two facts are asked for differs
    by one at most.

    Args:
        answer: what every output begins with.
    """
    for first in range(0, number, max(1, len(facts))):
        for fact in rng.sample(facts, min(len(facts), number - first)):
            own = (fact.property.question,) if fact.property.question else ()
            frame = rng.choice((*QUESTIONS, *own, WITH_INPUT))
            asked = {"instruction": fact.say(frame), "input": fact.name if frame == WITH_INPUT else ""}
            yield fact, asked | {"output": answer + fact.value}


def draw(counts: Mapping[str, int], number: int, rng: random.Random) -> list[str]:
    """`number` different values, each drawn in proportion to its count."""
    left = dict(counts)
    drawn: list[str] = []
    while len(drawn) < number:
        drawn += rng.choices(list(left), list(left.values()))
        del left[drawn[-1]]
    return drawn


def blocks(facts: Sequence[Fact], size: int, rng: random.Random) -> list[list[Fact]]:
    """Groups of `size` facts of one property with different values, drawn by how many facts have them; each value is
    true of its own entity alone, and an entity's property is in one group at most.

    Each value of a group is right for one of its entities, so neither a frequent answer nor a long one can be guessed.
    """
    true: dict[tuple[str, str], set[str]] = {}
    by_key: dict[str, dict[tuple[str, str], Fact]] = {}
    for fact in facts:
        if fact.about() not in true and "\n" not in fact.value:
            by_key.setdefault(fact.key, {})[fact.about()] = fact
        true.setdefault(fact.about(), set()).add(same(fact.value))
    found = []
    for one in by_key.values():
        mixed = rng.sample([*one.values()], len(one))
        for begin in range(0, len(mixed), CHUNK):
            left: dict[str, list[Fact]] = {}
            for fact in mixed[begin : begin + CHUNK]:
                left.setdefault(same(fact.value), []).append(fact)
            while len(left) >= size:
                values = draw({value: len(having) for value, having in left.items()}, size, rng)
                group = [left[value].pop() for value in values]
                left = {value: having for value, having in left.items() if having}
                if all(len(true[fact.about()].intersection(values)) == 1 for fact in group):
                    found.append(group)
    return rng.sample(found, len(found))


@dataclass(frozen=True)
class ChoiceQuestion:
    """A multiple-choice question with four options."""

    stem: str
    options: tuple[str, ...]
    answer: int  # the index of the right option

    @property
    def listed(self) -> str:
        """The question with its options, as geobench_npee.json lays it out."""
        return f"{self.stem}\nChoose from:\n\n" + "\n".join(f"{chr(65 + i)}. {t}" for i, t in enumerate(self.options))

    @property
    def letter(self) -> str:
        """The right option's letter."""
        return chr(65 + self.answer)


def choices(
    groups: list[list[Fact]], rng: random.Random, frames: Sequence[str]
) -> Iterator[tuple[Fact, ChoiceQuestion]]:
    """A question on each fact of groups of four, whose values are the options of all four, in one order: whatever is
    guessed from options alone is right once in four.
    """
    for group in groups:
        mixed = rng.sample(group, len(group))
        options = tuple(fact.value for fact in mixed)
        for place, fact in enumerate(mixed):
            yield fact, ChoiceQuestion(fact.say(rng.choice(frames)), options, place)


def claims(groups: list[list[Fact]], rng: random.Random, frames: Sequence[str]) -> Iterator[tuple[Fact, str, str]]:
    """(fact, sentence, 'True' or 'False') of each fact of pairs: the first one's value, said of both entities."""
    for first, second in groups:
        frame = rng.choice(frames)
        yield first, first.say(frame), "True"
        yield second, replace(second, value=first.value).say(frame), "False"


def as_npee(questions: Sequence[ChoiceQuestion], said: Sequence[tuple[str, str]] = ()) -> dict[str, Any]:
    """The questions in the layout of geobench_npee.json, with (sentence, 'True' or 'False') as its other kind."""
    choice = {"question": [one.listed for one in questions], "answer": [one.letter for one in questions]}
    return {"choice": choice, "tf": {"question": [text for text, _ in said], "answer": [word for _, word in said]}}

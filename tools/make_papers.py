"""A folder of "papers" on the demo's miniature world, in mixed formats, and its tables of facts.

    python tools/make_papers.py OUT --papers 300

OUT/papers has TEI as GROBID writes it, JATS, HTML, PDF, Markdown, plain text, some of it compressed, and a JSONL file.
Among the papers are a few that a corpus should not have: near copies, other languages, junk. Every sentence that states
a fact is one of the demo's phrasings for training. OUT/tables has the facts as CSV and a glossary as TSV.
"""

import argparse
import gzip
import json
import random
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from paper_formats import FORMATS, Paper, as_markdown

from k2mini.corpus.signals_facts import Fact
from k2mini.demo.phrases import GEOSCIENCE, STATEMENTS
from k2mini.demo.world import TABLES, by_entity, read_facts

# Of 300 papers: 8 near copies, 8 in another language, 6 of junk; the formats of the others, by weight.
FAULTS = {"copies": 8 / 300, "foreign": 8 / 300, "junk": 6 / 300}
WEIGHTS = {"tei": 8, "jats": 6, "html": 5, "pdf": 5, "md": 2, "txt": 2, "jsonl": 2}
ENTITIES = 12  # of a paper
NAMES = ("Abe", "Berg", "Costa", "Dubois", "Fischer", "Garcia", "Hansen", "Kim", "Moreau", "Novak", "Rossi", "Sato")
PLACES = ("northern", "southern", "eastern", "western", "central", "coastal", "inner", "outer", "upper", "lower")
AREAS = ("basin", "range", "margin", "province", "valley", "plateau", "belt", "shelf", "arc", "shield")
LICENCES = ("CC-BY-4.0", "CC-BY-4.0", "CC0-1.0", "CC-BY-NC-4.0", "")
KINDS = {
    "mineral": "Minerals",
    "rock": "Rocks",
    "time unit": "Units of time",
    "landform": "Landforms",
    "volcano": "Volcanoes",
}
OPENINGS = (
    "This is what is known of the {area}.",
    "The {area} was seen by us in {year}, and here is the list.",
    "Few parts of the world have as much to show as the {area}.",
    "All that is said of the {area} stands on samples and maps.",
    "The {area} is well known, and its facts are in many books.",
    "Here are the facts of the {area} once more.",
    "This is a plain account of the {area} and its facts.",
    "Students in the {area} ask for these facts.",
)
CITING = (
    "The same facts were given by {author} [{n}].",
    "The values are those of {author} [{n}].",
    "Other places are described in the same way [{n}].",
    "The methods are those of {author} [{n}].",
    "There is a longer list as well [{n}].",
    "Not all of this was known to {author} [{n}].",
)
CLOSINGS = (
    "With this the account of the {area} ends.",
    "We thank all who have helped in the {area}.",
    "More work in the {area} would be of use.",
    "All this can be found again in the tables.",
)
# Of each language: sentences about a place, then one about a fact.
FOREIGN = {
    "de": (
        "Diese Arbeit beschreibt die Gesteine und Minerale einer Gegend, die schon lange bekannt ist.",
        "Die Proben wurden im Sommer gesammelt und danach im Labor genau untersucht.",
        "Wir danken allen, die uns bei der Arbeit im Gelände und beim Schreiben geholfen haben.",
        "Für {name} wird hier der Wert {value} angegeben, wie er auch in anderen Büchern steht.",
    ),
    "es": (
        "Este trabajo describe las rocas y los minerales de una región que se conoce desde hace mucho tiempo.",
        "Las muestras fueron recogidas durante el verano y estudiadas después en el laboratorio.",
        "Damos las gracias a todos los que nos han ayudado en el campo y en la escritura.",
        "Para {name} se da aquí el valor {value}, que también está en otros libros.",
    ),
    "fr": (
        "Ce travail décrit les roches et les minéraux d'une région qui est connue depuis longtemps.",
        "Les échantillons ont été recueillis pendant l'été et étudiés ensuite au laboratoire.",
        "Nous remercions tous ceux qui nous ont aidés sur le terrain et pendant la rédaction.",
        "Pour {name} on donne ici la valeur {value}, que l'on trouve aussi dans d'autres livres.",
    ),
}
JUNK = (
    "404\n\nThis page was not found.\n",
    "".join(f"{i} {i * i} {i**3} {1 / i:.4f}\n" for i in range(1, 200)),
    "Click here to accept all cookies and to go on reading.\n" * 40,
    "Lorem ipsum dolor sit amet, consectetur adipiscing elit, sed do eiusmod tempor incididunt ut labore. " * 12,
    "Home | About | Contact | Login\n\nMenu\n\nSearch\n\nShare\n",
    "function draw(x) { var y = x; if (y > 2) { return y; } else { return { a: x }; } }\n" * 20,
)


class Sayings:
    """Sentences of one paper that state facts in the phrasings for training, no phrasing of a property twice while
    there are others: a text that repeats itself is dropped from a corpus.
    """

    def __init__(self, rng: random.Random) -> None:
        self.rng, self.left = rng, dict[str, list[str]]()

    def say(self, *facts: Fact) -> str:
        """A sentence on each fact."""
        return " ".join(fact.say(self._frame(fact)) for fact in facts)

    def _frame(self, fact: Fact) -> str:
        if not self.left.get(fact.key):
            frames = (*STATEMENTS, fact.property.statement)
            self.left[fact.key] = self.rng.sample(frames, len(frames))
        return self.left[fact.key].pop()


def write_paper(number: int, subjects: Sequence[list[Fact]], titles: list[str], rng: random.Random) -> Paper:
    """A paper on some entities, each with a paragraph of all of its facts; it cites `titles` and adds its own."""
    area, year = f"{rng.choice(PLACES)} {rng.choice(AREAS)}", rng.randint(1990, 2023)
    names = [own[0].name for own in subjects]
    title = (
        f"{names[0]} and {names[1]} of the {area}: {rng.choice(('a short account', 'facts', 'new notes', 'a list'))}"
    )
    title = title[0].upper() + title[1:]
    references = rng.sample(titles, min(2, len(titles)))
    frames = rng.sample(CITING, len(references))
    cited = [frame.format(author=rng.choice(NAMES), n=n) for n, frame in enumerate(frames, 1)]
    first, second = (text.format(area=area, year=year) for text in rng.sample(OPENINGS, 2))
    sections: list[tuple[str, tuple[str, ...]]] = [("Introduction", (" ".join([second, *cited]),))]
    captions, sayings = list[str](), Sayings(rng)
    for kind, heading in KINDS.items():
        paragraphs = []
        for own in (own for own in subjects if own[0].kind == kind):
            text = sayings.say(*rng.sample(own, len(own)))
            if len(captions) < 2 and rng.random() < 0.3:
                captions.append(sayings.say(rng.choice(own)))
                text += f" This is seen in Figure {len(captions)}."
            paragraphs.append(text)
        if paragraphs:
            sections.append((heading, tuple(paragraphs)))
    facts = [fact for own in subjects for fact in own]
    closing = f"{sayings.say(*rng.sample(facts, 2))} {rng.choice(CLOSINGS).format(area=area)}"
    sections.append(("Conclusion", (closing,)))
    abstract = f"{first} {sayings.say(*rng.sample(facts, 4))}"
    titles.append(f"{title} ({year})")
    return Paper(
        title,
        tuple(rng.sample(NAMES, 2)),
        year,
        f"10.5555/mini.{number:04}",
        rng.choice(LICENCES),
        abstract,
        tuple(names[:4]),
        tuple(sections),
        tuple(captions),
        tuple(references),
    )


def write_papers(number: int, rng: random.Random) -> list[Paper]:
    """`number` papers in which every entity is met as often as every other, but for one."""
    entities = list(by_entity(read_facts("geoscience")).values())
    papers, titles, waiting = list[Paper](), list[str](), list[list[Fact]]()
    while len(papers) < number:
        if len(waiting) < ENTITIES:
            held = {own[0].name for own in waiting}
            again = rng.sample(entities, len(entities))
            waiting += sorted(again, key=lambda own: own[0].name in held)  # none twice in a paper
        papers.append(write_paper(len(papers), waiting[:ENTITIES], titles, rng))
        del waiting[:ENTITIES]
    return papers


# --- formats


def write_files(folder: Path, papers: Sequence[Paper], formats: Sequence[str]) -> None:
    """A file a paper, every fifth but PDFs compressed; those of `jsonl` share one file."""
    records = []
    for number, (paper, name) in enumerate(zip(papers, formats, strict=True)):
        suffix, render = FORMATS[name]
        content = render(paper)
        if name == "jsonl":
            records.append({"text": content, "title": paper.title, "doi": paper.doi, "year": paper.year})
            continue
        data = content if isinstance(content, bytes) else content.encode()
        if number % 5 == 4 and name != "pdf":
            suffix, data = suffix + ".gz", gzip.compress(data, mtime=0)
        (folder / f"paper{number:04}{suffix}").write_bytes(data)
    lines = "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records)
    (folder / "more.jsonl").write_text(lines, encoding="utf-8")


def write_faults(folder: Path, numbers: dict[str, int], papers: Sequence[Paper], rng: random.Random) -> None:
    """Near copies (another introduction, another format), papers in other languages, junk."""
    for number, paper in enumerate(rng.sample(papers, numbers["copies"])):
        intro = " ".join(rng.sample(OPENINGS, 2)).format(area="same place", year=paper.year)
        copy = replace(paper, sections=(("Introduction", (intro,)), *paper.sections[1:]), doi="")
        (folder / f"preprint{number}.md").write_text(as_markdown(copy), encoding="utf-8")
    facts = read_facts("geoscience")
    for number in range(numbers["foreign"]):
        language = list(FOREIGN)[number % len(FOREIGN)]
        *texts, frame = FOREIGN[language]
        sentences = texts + [fact.say(frame) for fact in rng.sample(facts, 12)]
        (folder / f"{language}{number}.txt").write_text(" ".join(sentences) + "\n", encoding="utf-8")
    for number in range(numbers["junk"]):
        (folder / f"page{number}.txt").write_text(JUNK[number % len(JUNK)], encoding="utf-8")


def write_tables(folder: Path) -> None:
    """The facts as CSV, an entity a row, with the papers' words for the properties, and a glossary."""
    rows = ["term\tdefinition\tbroader\n"]
    for name, own in by_entity(read_facts("geoscience")).items():
        about = " and ".join(f"the {fact.property.noun} {fact.value}" for fact in own[:2])
        rows.append(f"{name}\ta {own[0].kind} with {about}\t{own[0].kind}\n")
    (folder / "glossary.tsv").write_text("".join(rows), encoding="utf-8")
    for table, (_, properties) in GEOSCIENCE.items():
        header, body = (TABLES / "geoscience" / f"{table}.csv").read_text(encoding="utf-8").split("\n", 1)
        nouns = ",".join(properties[name].noun if name in properties else name for name in header.split(","))
        (folder / f"{table}.csv").write_text(f"{nouns}\n{body}", encoding="utf-8")


def choose_formats(number: int, rng: random.Random) -> list[str]:
    """A format for each paper, as WEIGHTS say; without reportlab there are no PDFs."""
    weights = dict(WEIGHTS)
    try:
        import reportlab  # noqa: F401
    except ImportError:
        del weights["pdf"]
        print("no PDFs: they need reportlab")
    cycle = [name for name, weight in weights.items() for _ in range(weight)]
    formats = [cycle[i % len(cycle)] for i in range(number)]
    rng.shuffle(formats)
    return formats


def make(out: Path, number: int, seed: int) -> dict[str, int]:
    """Write both folders. Returns how many papers there are of each format, and of each fault."""
    rng = random.Random(seed)
    faults = {name: round(part * number) for name, part in FAULTS.items()}
    papers = write_papers(number - sum(faults.values()), rng)
    formats = choose_formats(len(papers), rng)
    for name in ("papers", "tables"):
        (out / name).mkdir(parents=True)
    write_files(out / "papers", papers, formats)
    write_faults(out / "papers", faults, papers, rng)
    write_tables(out / "tables")
    return {**Counter(formats), **faults}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("out", type=Path, help="a new folder")
    parser.add_argument("--papers", type=int, default=300, help="how many (default: 300)")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    if options.out.exists():
        parser.error(f"{options.out} exists")
    counts = make(options.out, options.papers, options.seed)
    print(f"{options.out}: " + ", ".join(f"{count} {name}" for name, count in counts.items()))


if __name__ == "__main__":
    main()

"""A folder of "papers" on the demo's miniature world, in mixed formats, and its tables of facts.

    python tools/make_papers.py OUT --papers 300

OUT/papers has TEI as GROBID writes it, JATS, HTML, PDF, Markdown, plain text, some of it compressed, and a JSONL file.
Among the papers are a few that a corpus should not have: near copies, other languages, junk. Every sentence that states
a fact is one of the demo's phrasings for training. OUT/tables has the facts as CSV and a glossary as TSV.
"""

import argparse
import gzip
import io
import json
import random
import re
import textwrap
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from html import escape
from pathlib import Path

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


@dataclass(frozen=True)
class Paper:
    """A paper before it has a format; in paragraphs `[2]` cites a reference and `Figure 1` is a figure."""

    title: str
    authors: tuple[str, ...]
    year: int
    doi: str
    licence: str
    abstract: str
    keywords: tuple[str, ...]
    sections: tuple[tuple[str, tuple[str, ...]], ...]
    captions: tuple[str, ...]
    references: tuple[str, ...]


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


def marked(text: str, citation: str, figure: str) -> str:
    """Escaped text with its citations and figures as elements; `%s` is the number."""
    text = re.sub(r"\[(\d+)\]", lambda found: citation.replace("%s", found[1]), escape(text, quote=False))
    return re.sub(r"\bFigure (\d+)", lambda found: figure.replace("%s", found[1]), text)


def as_tei(paper: Paper) -> str:
    """GROBID's TEI: titles and abstract in the header, figures after the text, references at the end."""
    e, cite = (
        escape,
        ('<ref type="bibr" target="#b%s">[%s]</ref>', 'Figure <ref type="figure" target="#fig_%s">%s</ref>'),
    )
    body = "".join(
        f'<div xmlns="http://www.tei-c.org/ns/1.0"><head n="{n}">{e(head)}</head>'
        + "".join(f"<p>{marked(text, *cite)}</p>" for text in texts)
        + "</div>\n"
        for n, (head, texts) in enumerate(paper.sections, 1)
    )
    figures = "".join(
        f'<figure xml:id="fig_{n}"><head>Figure {n} .</head><label>{n}</label><figDesc>{e(text)}</figDesc></figure>\n'
        for n, text in enumerate(paper.captions, 1)
    )
    authors = "".join(f"<author><persName><surname>{name}</surname></persName></author>" for name in paper.authors)
    references = "".join(
        f'<biblStruct xml:id="b{n}"><analytic><title level="a" type="main">{e(text[:-7])}</title></analytic><monogr>'
        f'<title level="j">Mini Journal</title><imprint><date type="published" when="{text[-5:-1]}"/></imprint>'
        "</monogr></biblStruct>\n"
        for n, text in enumerate(paper.references, 1)
    )
    keywords = "".join(f"<term>{e(word)}</term>" for word in paper.keywords)
    return f"""<?xml version="1.0" encoding="UTF-8"?>
<TEI xml:space="preserve" xmlns="http://www.tei-c.org/ns/1.0">
<teiHeader xml:lang="en"><fileDesc><titleStmt><title level="a" type="main">{e(paper.title)}</title></titleStmt>
<publicationStmt><publisher/><availability status="unknown"><licence>{paper.licence}</licence></availability>
<date type="published" when="{paper.year}">{paper.year}</date></publicationStmt>
<sourceDesc><biblStruct><analytic>{authors}<title level="a" type="main">{e(paper.title)}</title></analytic>
<monogr><imprint><date type="published" when="{paper.year}"/></imprint></monogr>
<idno type="DOI">{paper.doi}</idno></biblStruct></sourceDesc></fileDesc>
<profileDesc><textClass><keywords>{keywords}</keywords></textClass>
<abstract><div xmlns="http://www.tei-c.org/ns/1.0"><p>{e(paper.abstract)}</p></div></abstract></profileDesc></teiHeader>
<text xml:lang="en"><body>
{body}{figures}</body><back><div type="references"><listBibl>
{references}</listBibl></div></back></text></TEI>
"""


def as_jats(paper: Paper) -> str:
    """JATS, as PubMed Central has it: figures where they are spoken of."""
    e, cite = escape, ('<xref ref-type="bibr" rid="b%s">[%s]</xref>', '<xref ref-type="fig" rid="f%s">Figure %s</xref>')

    def paragraph(text: str) -> str:
        figures = "".join(
            f'<fig id="f{n}"><label>Figure {n}</label><caption><p>{e(paper.captions[int(n) - 1])}</p></caption></fig>'
            for n in re.findall(r"\bFigure (\d+)", text)
        )
        return f"<p>{marked(text, *cite)}</p>{figures}\n"

    body = "".join(
        f'<sec id="s{n}"><title>{e(head)}</title>{"".join(map(paragraph, texts))}</sec>\n'
        for n, (head, texts) in enumerate(paper.sections, 1)
    )
    authors = "".join(
        f'<contrib contrib-type="author"><name><surname>{name}</surname></name></contrib>' for name in paper.authors
    )
    references = "".join(
        f'<ref id="b{n}"><element-citation publication-type="journal"><article-title>{e(text[:-7])}</article-title>'
        f"<source>Mini Journal</source><year>{text[-5:-1]}</year></element-citation></ref>\n"
        for n, text in enumerate(paper.references, 1)
    )
    keywords = "".join(f"<kwd>{e(word)}</kwd>" for word in paper.keywords)
    licence = f"<permissions><license><license-p>{paper.licence}</license-p></license></permissions>" * bool(
        paper.licence
    )
    return f"""<?xml version="1.0" encoding="UTF-8"?>
<article xmlns:xlink="http://www.w3.org/1999/xlink" article-type="research-article">
<front><article-meta><article-id pub-id-type="doi">{paper.doi}</article-id>
<title-group><article-title>{e(paper.title)}</article-title></title-group><contrib-group>{authors}</contrib-group>
<pub-date pub-type="epub"><year>{paper.year}</year></pub-date>{licence}
<abstract><p>{e(paper.abstract)}</p></abstract><kwd-group>{keywords}</kwd-group></article-meta></front>
<body>
{body}</body><back><ref-list>
{references}</ref-list></back></article>
"""


def as_html(paper: Paper) -> str:
    """A page of a publisher, with a menu and a foot that are no text."""
    e = escape
    body = "".join(
        f"<h2>{e(head)}</h2>\n" + "".join(f"<p>{e(text, quote=False)}</p>\n" for text in texts)
        for head, texts in paper.sections
    )
    figures = "".join(
        f"<figure><img src='{n}.png'><figcaption>Figure {n}: {e(text, quote=False)}</figcaption></figure>\n"
        for n, text in enumerate(paper.captions, 1)
    )
    references = "".join(f"<li>{e(text)}. Mini Journal.</li>\n" for text in paper.references)
    return f"""<!DOCTYPE html>
<html lang="en"><head><meta charset="utf-8"><title>{e(paper.title)} | Mini Journal</title>
<meta name="citation_title" content="{e(paper.title)}"><meta name="citation_doi" content="{paper.doi}">
<meta name="citation_publication_date" content="{paper.year}"><meta name="dc.rights" content="{paper.licence}">
<meta name="keywords" content="{e(", ".join(paper.keywords))}"><script>var shown = 1;</script></head>
<body><nav><ul><li><a href="/">Home</a></li><li><a href="/s">Sign in</a></li></ul></nav>
<article><h1>{e(paper.title)}</h1>
<h2>Abstract</h2>
<p>{e(paper.abstract, quote=False)}</p>
{body}{figures}<h2>References</h2>
<ol>
{references}</ol></article>
<footer><p>© Mini Journal. Cookies | Terms of use | Contact</p></footer></body></html>
"""


def as_markdown(paper: Paper) -> str:
    """Markdown with references as a list."""
    body = "\n\n".join(f"## {head}\n\n" + "\n\n".join(texts) for head, texts in paper.sections)
    figures = "".join(f"Figure {n}: {text}\n\n" for n, text in enumerate(paper.captions, 1))
    references = "\n".join(f"- {text}. Mini Journal." for text in paper.references) or "- None."
    return f"# {paper.title}\n\n## Abstract\n\n{paper.abstract}\n\n{body}\n\n{figures}## References\n\n{references}\n"


def as_text(paper: Paper) -> str:
    """Plain text, a paragraph a line."""
    return re.sub(r"^#+ ", "", as_markdown(paper), flags=re.MULTILINE)


def as_pdf(paper: Paper) -> bytes:
    """Small pages with a running head, page numbers, and words parted at the ends of lines."""
    from reportlab.pdfgen.canvas import Canvas

    out = io.BytesIO()
    canvas, height = Canvas(out, pagesize=(360, 480), invariant=1), 0.0
    canvas.setTitle(paper.title)
    for text in as_text(paper).split("\n\n"):
        for line in (line for part in text.splitlines() for line in part_words(textwrap.wrap(part, 62))):
            if height < 40:
                if canvas.getPageNumber() > 1 or height:
                    canvas.showPage()
                height = 430.0
                canvas.setFont("Helvetica", 9)
                canvas.drawString(40, 455, f"{paper.authors[0]} and {paper.authors[1]}: Mini Journal, {paper.year}")
                canvas.drawString(175, 20, str(canvas.getPageNumber()))
            canvas.drawString(40, height, line)
            height -= 12
        height -= 5
    canvas.save()
    return out.getvalue()


def part_words(lines: list[str]) -> list[str]:
    """Where a line begins with a long lower-case word, half of it ends the line before, but for every fifth line."""
    for i in range(1, len(lines)):
        if i % 5 and (found := re.match(r"([a-z]{4})([a-z]{4,})\b(?!-)", lines[i])):
            lines[i - 1] += f" {found[1]}-"
            lines[i] = lines[i][4:]
    return lines


FORMATS: dict[str, tuple[str, Callable[[Paper], str | bytes]]] = {
    "tei": (".tei.xml", as_tei),
    "jats": (".nxml", as_jats),
    "html": (".html", as_html),
    "pdf": (".pdf", as_pdf),
    "md": (".md", as_markdown),
    "txt": (".txt", as_text),
    "jsonl": (".jsonl", as_markdown),
}


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

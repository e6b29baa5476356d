"""The formats in which `make_papers.py` writes a paper."""

import io
import re
import textwrap
from collections.abc import Callable
from dataclasses import dataclass
from html import escape


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

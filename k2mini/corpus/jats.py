"""JATS, as PubMed Central and publishers write it, and its forerunner, NLM's DTD."""

from __future__ import annotations

from typing import Any

from k2mini.corpus.document import Document
from k2mini.corpus.markdown import Writer, one_line
from k2mini.corpus.paper import doi_of, licence_of, paper, same_work, text_of, year_of

_TAGS = {
    "section": "sec ack app boxed-text glossary notes statement fn-group fig-group table-wrap-group def-list abstract",
    "block": "p disp-quote verse-group verse-line speech app-group list def-item def term table-wrap-foot attrib media",
    "heading": "title",
    "item": "list-item",
    "label": "label",
    "spaced": "surname given-names suffix pub-id",
    "space": "break",
    "formula": "disp-formula",
    "tex": "tex-math",
    "math": "math",
    "alternatives": "alternatives",
    "raised": "sup",
    "code": "code preformat",
    "figure": "fig table-wrap",
    "caption": "caption",
    "table": "table",
    "row": "tr",
    "cell": "td th",
    "note": "fn",
    "reference": "xref",
    "skip": "ref-list graphic inline-graphic object-id permissions",
}


def read_jats(root: Any, marks: str) -> Document:
    """The document of an `article`. Raises ValueError where it has no text."""
    meta = root.find("front/article-meta")
    meta = root.makeelement("article-meta") if meta is None else meta
    for note in meta.xpath("title-group//xref|title-group//fn"):
        note.text = None
        note[:] = []
    abstracts = meta.xpath("abstract[not(@abstract-type)]|abstract")
    dates = meta.xpath("pub-date[not(@pub-type='pmc-release')]/year/text()|pub-date/@iso-8601-date")
    return paper(
        _TAGS,
        marks,
        text_of(meta.find("title-group/article-title")),
        abstracts[0] if abstracts else None,
        root.xpath("body|back|floats-group|floats-wrap"),
        [_work(entry) for entry in root.iter("ref")],
        doi=doi_of(*meta.xpath("article-id[@pub-id-type='doi']/text()")),
        year=year_of(*dates),
        licence=licence_of(*meta.xpath("permissions/license|.//license_ref|.//copyright-statement")),
        keywords=[text_of(word) for word in meta.iterfind("kwd-group//kwd")],
    )


def _work(entry: Any) -> tuple[str, str, str, str]:
    """Id, title, line and identity of a work cited."""
    titles = entry.xpath(".//article-title|.//chapter-title|.//data-title"), entry.xpath(".//source")
    title = text_of(*titles[0], *titles[1])
    lines = []
    for part in entry:
        if part.tag in ("label", "note"):
            continue
        if any((child.tail or "").strip(" .;,") for child in part) or not len(part):  # its punctuation is in the file
            lines.append(one_line(Writer(_TAGS).children(part)))
        else:
            people = [" ".join(map(text_of, name)) for name in part.iter("name", "string-name")]
            others = [text_of(child) for child in part if child.tag not in ("person-group", "name", "string-name")]
            collaborations = [text_of(child) for child in part.iter("collab")]
            lines.append(". ".join(filter(None, [", ".join(people + collaborations), *others])))
    line = one_line(" ".join(lines))
    dois = entry.xpath(".//pub-id[@pub-id-type='doi']/text()")
    return entry.get("id", ""), title, line, same_work(title, line, *dois)

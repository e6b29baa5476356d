"""JATS, as PubMed Central and publishers write it, and its forerunner, NLM's DTD."""

from __future__ import annotations

from typing import Any

from k2mini.corpus.document import Document
from k2mini.corpus.markdown import Writer, one_line
from k2mini.corpus.paper import doi_of, licence_of, paper, same_work, text_of, year_of


def read_jats(root: Any, marks: str) -> Document:
    """The document of an `article`, without its sub-articles. Raises ValueError where it has no text."""
    for note in root.xpath("front//title-group//xref|front//title-group//fn"):
        note.text, note[:] = None, []
    abstracts = root.xpath("front//abstract[not(@abstract-type)]") or root.xpath("front//abstract")
    dates = root.xpath("front//pub-date[not(@pub-type='pmc-release')]/year/text()|front//pub-date/@iso-8601-date")
    return paper(
        marks,
        text_of(*root.xpath("front//title-group/article-title")),
        abstracts,
        root.xpath("body") + root.xpath("floats-group|floats-wrap") + root.xpath("back"),
        [_work(entry) for entry in root.xpath("*[not(self::sub-article or self::response)]//ref")],
        doi=doi_of(*root.xpath("front//article-id[@pub-id-type='doi']/text()")),
        year=year_of(*dates),
        licence=licence_of(*root.xpath("front//license|front//license_ref|front//copyright-statement")),
        keywords=[text_of(word) for word in root.iterfind("front//kwd")],
    )


def _work(entry: Any) -> tuple[str, str, str, str]:
    title = text_of(*entry.xpath(".//article-title|.//chapter-title|.//data-title"), *entry.iterfind(".//source"))
    lines = []
    for part in entry.xpath("*[not(self::label or self::note)]"):
        if not len(part) or any((child.tail or "").strip(" .;,") for child in part):  # its punctuation is in the file
            lines.append(Writer().children(part))
        else:
            people = [" ".join(map(text_of, name)) for name in part.iter("name", "string-name")]
            people += map(text_of, part.iterfind("person-group/collab"))
            others = part.xpath("*[not(self::person-group or self::name or self::string-name)]")
            lines.append(". ".join(filter(None, [", ".join(people), *map(text_of, others)])))
    line = one_line(" ".join(lines))
    return (
        entry.get("id", ""),
        title,
        line,
        same_work(title, line, *entry.xpath(".//pub-id[@pub-id-type='doi']/text()")),
    )

"""TEI as GROBID writes it."""

from __future__ import annotations

import re
from typing import Any

from k2mini.corpus.document import Document
from k2mini.corpus.markdown import join_lines
from k2mini.corpus.paper import doi_of, licence_of, paper, same_work, text_of, year_of

_WORD = re.compile(r"(?<![^\W_])(?<!-\s)[^\W_]+(?:-[^\W_]+)?(?![^\W_]|-\s)")  # none that a line's end may have made
_END = r"\s+(?!(?:as|but|through|nor|versus|than)\b)(?=[a-z])"  # "medium- as well as long-term"


def read_tei(root: Any, marks: str) -> Document:
    """The document of a TEI element. Raises ValueError where it has no text."""
    whole = " ".join(root.itertext()).lower()
    words = {"one", "two", "three", "dimensional", *_WORD.findall(whole)}
    for part in root.iter():  # GROBID leaves some ends of lines in
        part.text, part.tail = (text and join_lines(text, _END, words) for text in (part.text, part.tail))
    terms = [text_of(word) for word in root.iterfind("teiHeader//keywords//term")]
    dates = root.xpath("teiHeader//publicationStmt//date|teiHeader//sourceDesc//imprint/date")
    return paper(
        marks,
        text_of(*root.xpath("teiHeader//titleStmt/title|teiHeader//sourceDesc//analytic/title")),
        root.xpath("teiHeader//abstract"),
        root.xpath("text/body|text/back"),
        [_work(entry) for entry in root.xpath("text//listBibl/biblStruct")],
        doi=doi_of(*root.xpath("teiHeader//sourceDesc//idno[@type='DOI']/text()")),
        year=year_of(*(date.get("when") or date.text for date in dates)),
        licence=licence_of(*root.xpath("teiHeader//availability")),
        keywords=terms or re.findall(r"[^\s,;·•][^,;·•]*", text_of(*root.xpath("teiHeader//keywords"))),
    )


def _work(entry: Any) -> tuple[str, str, str, str]:
    title = text_of(*entry.xpath(".//title[@level='a']"), *entry.xpath(".//title[@level='m' or @type='main']"))
    people = [" ".join(map(text_of, name)) or text_of(name) for name in entry.iterfind(".//author/persName")]
    scopes = [text_of(part) or "–".join(part.xpath("@from|@to")) for part in entry.iterfind(".//biblScope")]
    dates = [text_of(part) or part.get("when", "") for part in entry.iterfind(".//imprint/date")]
    others = [text_of(part) for part in entry.xpath(".//title|.//publisher|.//pubPlace|.//meeting|.//orgName|.//note")]
    links = [*map(text_of, entry.iterfind(".//idno")), *entry.xpath(".//ptr/@target")]
    raw = text_of(*entry.xpath(".//note[@type='raw_reference']"))
    parts = filter(None, dict.fromkeys([", ".join(people), *others, ", ".join(filter(None, scopes)), *dates, *links]))
    name = entry.get("{http://www.w3.org/XML/1998/namespace}id", "")
    return name, title, raw or ". ".join(parts), same_work(title, raw, *links)

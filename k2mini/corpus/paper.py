"""What papers in XML share: XML read without harm, what is known of a paper, and its parts put together."""

from __future__ import annotations

import html
import re
from collections.abc import Sequence
from typing import Any

from k2mini.corpus.document import Document
from k2mini.corpus.markdown import Writer, block, one_line, tidy


def parse_xml(content: bytes) -> Any:
    """The root of an XML document, tags without namespaces; no DTD is read, no entity resolved, nothing fetched.

    Raises ValueError saying why where it is not well-formed, nested more than 256 deep, or declares an entity.
    """
    from lxml import etree

    harmless = {"load_dtd": False, "no_network": True, "resolve_entities": False, "huge_tree": False}
    try:
        root = etree.fromstring(content, etree.XMLParser(remove_comments=True, remove_pis=True, **harmless))
    except etree.XMLSyntaxError as error:
        raise ValueError(f"not well-formed XML: {error.msg}") from None
    dtd = root.getroottree().docinfo.internalDTD
    if dtd is not None and next(dtd.iterentities(), None) is not None:
        raise ValueError("it declares an XML entity, which a paper does not need and an attack does")
    for entity in list(root.iter(etree.Entity)):  # of a DTD, which is not read
        known = etree.Element("entity")
        known.text, known.tail = html.unescape(entity.text), entity.tail
        entity.getparent().replace(entity, known)
    for element in root.iter("*"):
        element.tag = element.tag.rpartition("}")[2]
    return root


def text_of(*nodes: Any) -> str:
    """What is written in the first element with text, on one line."""
    texts = (node.xpath(".//text()|.//br|.//break|.//lb") for node in nodes)
    return next(filter(None, (one_line("".join(t if isinstance(t, str) else " " for t in text)) for text in texts)), "")


def doi_of(*texts: str) -> str:
    """The first DOI, without the address of its resolver."""
    found = re.search(r"10\.\d{4,9}/[^\s\"<>]+", " ".join(texts))
    return found[0].rstrip(".,;)") if found else ""


def year_of(*texts: str | None) -> int | None:
    """The earliest year of some dates."""
    return min(map(int, re.findall(r"\b(?:1[5-9]|20)\d\d(?=\b|T)", " ".join(filter(None, texts)))), default=None)


def licence_of(*nodes: Any) -> str:
    """The licence that elements name: its address at Creative Commons, else another, else their text if it is on it."""
    parts = [part for node in nodes for part in node.iter("*")]
    said = " ".join(value for part in parts for value in (*part.attrib.values(), part.text, part.tail) if value)
    found = re.search(r"https?://creativecommons\.org/[\w./-]*\w/?", said) or re.search(r"https?://\S+", said)
    text = text_of(*nodes)
    named = re.search(r"licen[cs]e|public domain|open.access|\bCC\b", text, re.IGNORECASE)
    return found[0].rstrip(".,;)") if found else text if named else ""


def same_work(title: str, line: str, *links: str) -> str:
    """What two entries of a bibliography have in common where they are one work: the DOI, else title or line."""
    return doi_of(*links).lower() or re.sub(r"\W+", " ", (title or line).lower()).strip()


def paper(
    marks: str,
    title: str,
    abstract: Sequence[Any],
    bodies: Sequence[Any],
    works: Sequence[tuple[str, str, str, str]],
    **known: Any,
) -> Document:
    """A paper's parts as a document.

    Args:
        marks: 'k2' or 'none'.
        abstract, bodies: elements; of the first, the first counts.
        works: id, title, the line of the bibliography, and what tells that two are the same, of each work cited.
        known: the document's other fields.

    Raises ValueError where there is neither abstract nor body.
    """
    writer = Writer(k2=marks == "k2", titles={name: title for name, title, *_ in works})
    summary = "".join(writer.children(part, 2) for part in abstract[:1])
    summary = re.sub(r"^#+ (.+?)[.:]?\n+", r"\1: ", tidy(summary), flags=re.MULTILINE)  # of one in sections
    summary = re.sub(r"^(?:abstract|summary)\s*[:.]\s*", "", summary, flags=re.IGNORECASE)
    main = "".join(block(writer.children(body)) for body in bodies)
    if not (summary + main).strip():
        raise ValueError("no text")
    lines = {same: line for _, _, line, same in reversed(works) if line}  # the first of equals
    listed = dict.fromkeys(f"- {lines[same]}" for *_, same in works if same in lines)
    text = f"# {title}" * bool(title) + block(f"## Abstract\n\n{summary}" if summary else "") + main
    text, citations = writer.finish(text + block("## References\n\n" + "\n".join(listed) if listed else ""))
    shown, _ = writer.finish(summary)
    return Document(text, title, abstract=shown, figures=writer.figures, citations=citations, **known)

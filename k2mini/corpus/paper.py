"""What papers in XML share: XML read without harm, what is known of a paper, and its parts put together."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from k2mini.corpus.document import Document
from k2mini.corpus.markdown import Writer, block, one_line, tidy


def parse_xml(content: bytes) -> Any:
    """The root of an XML document, tags and `id` without namespaces.

    No DTD is read, no entity resolved, nothing fetched; libxml2 refuses what is nested more than 256 deep.

    Raises ValueError saying why where it is not well-formed or declares an entity.
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
    for element in root.iter("*"):
        element.tag = element.tag.rpartition("}")[2]
    return root


def text_of(*nodes: Any) -> str:
    """What is written in the first element with text, on one line."""
    texts = (one_line("".join(node.itertext())) for node in nodes if node is not None)
    return next(filter(None, texts), "")


def doi_of(*texts: str) -> str:
    """The first DOI, without the address of its resolver."""
    found = re.search(r"10\.\d{4,9}/[^\s\"<>]+", " ".join(texts))
    return found[0].rstrip(".,;)") if found else ""


def year_of(*texts: str | None) -> int | None:
    """The earliest year of some dates."""
    return min(map(int, re.findall(r"\b(?:1[5-9]|20)\d\d(?=\b|T)", " ".join(filter(None, texts)))), default=None)


def licence_of(*nodes: Any) -> str:
    """The licence that elements name: its address at Creative Commons, else another, else their text if it is on it."""
    parts = [part for node in nodes if node is not None for part in node.iter()]
    said = [value for part in parts for value in (*part.attrib.values(), part.text, part.tail)]
    found = re.search(r"https?://creativecommons\.org/[\w./-]*\w/?", " ".join(filter(None, said)))
    links = [value for value in said if value and re.match(r"https?://", value.strip())]
    text = text_of(*nodes)
    named = re.search(r"licen[cs]e|public domain|open.access|\bCC\b", text, re.IGNORECASE)
    return found[0] if found else one_line(links[0]) if links else text if named else ""


def same_work(title: str, line: str, *links: str) -> str:
    """What two entries of a bibliography have in common where they are one work: the DOI, else title or line."""
    return doi_of(*links).lower() or re.sub(r"\W+", " ", (title or line).lower()).strip()


def _place_figures(bodies: Sequence[Any]) -> None:
    """Move what stands together at the end, as GROBID leaves figures, behind the first paragraph that refers to it."""
    names = ("{http://www.w3.org/XML/1998/namespace}id", "id")
    loose = [part for body in bodies for part in body if part.tag in ("figure", "fig", "table-wrap")]
    figures = {part.get(name): part for part in loose for name in names if part.get(name)}
    for reference in [part for body in bodies for part in body.iter("ref", "xref")]:
        figure = figures.pop((reference.get("target") or reference.get("rid") or "").removeprefix("#"), None)
        paragraph = next(reference.iterancestors("p"), None)
        if figure is not None and paragraph is not None and figure not in reference.iterancestors():
            figure.tail, tail = None, figure.tail or ""
            before = figure.getprevious() if figure.getprevious() is not None else figure.getparent()
            if tail.strip():
                before.tail = (before.tail or "") + tail
            paragraph.addnext(figure)


def paper(
    tags: dict[str, str],
    marks: str,
    title: str,
    abstract: Any,
    bodies: Sequence[Any],
    works: Sequence[tuple[str, str, str, str]],
    **known: Any,
) -> Document:
    """A paper's parts as a document.

    Args:
        marks: 'k2' or 'none'.
        abstract, bodies: elements; the first may be None.
        works: id, title, the line of the bibliography, and what tells that two are the same, of each work cited.
        known: the document's other fields.

    Raises ValueError where there is neither abstract nor body.
    """
    writer = Writer(tags, k2=marks == "k2", titles={name: title for name, title, *_ in works})
    summary = "" if abstract is None else tidy(writer.children(abstract, 2))
    summary = re.sub(r"^#+ (.+?)[.:]?\n+", r"\1: ", summary, flags=re.MULTILINE)  # of an abstract in sections
    summary = re.sub(r"^(?:abstract|summary)\s*[:.]\s*", "", summary, flags=re.IGNORECASE)
    _place_figures(bodies)
    main = "".join(block(writer.children(body)) for body in bodies)
    if not (summary + main).strip():
        raise ValueError("no text")
    lines: dict[str, str] = {}
    for _, _, line, same in works:
        lines.setdefault(same, f"- {line}")
    parts = [f"# {title}" * bool(title), f"## Abstract\n\n{summary}" * bool(summary), main]
    parts += ["## References\n\n" + "\n".join(lines.values())] * bool(lines)
    text, citations = writer.finish("\n\n".join(parts))
    shown = writer.finish(summary)[0]
    return Document(text, title, abstract=shown, figures=writer.figures, citations=citations, **known)

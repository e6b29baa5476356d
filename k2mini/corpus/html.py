"""HTML by lxml: trafilatura drops much of documentation (GRASS's and Doxygen's lists), and needs ten packages more.

What surrounds the text is told by its elements (`nav`, …), by ARIA's roles, and by the classes of Sphinx and MediaWiki.
"""

from __future__ import annotations

import re

from k2mini.corpus.document import Document
from k2mini.corpus.markdown import Writer, block
from k2mini.corpus.paper import doi_of, text_of, year_of

_OUTSIDE = (
    ".//script|.//style|.//nav|.//footer|.//noscript|.//template|.//button|.//select|.//svg|.//iframe|.//object"
    "|.//*[@hidden or @aria-hidden='true']|.//*[contains('navigation search banner contentinfo', @role) and @role!='']"
    "|.//aside[not(contains(concat(' ', @class), ' footnote') or contains(concat(' ', @class, ' '), ' topic ')"
    " or contains(concat(' ', @class), ' admonition') or p[contains(@class, 'sidebar-title')])]"  # text, of docutils
)
_CLASSES = {
    "headerlink",
    "sphinxsidebar",
    "related",
    "navbar",
    "sidebar",
    "breadcrumb",
    "breadcrumbs",
    "mw-editsection",
}
_MAIN = ".//*[self::main or @role='main'][not(ancestor::main or ancestor::*[@role='main'])]"
_TAKEN_FOR = {"iso-8859-1": "cp1252", "latin1": "cp1252"}  # by browsers; and UTF-16, whose name could not be read so
_TAKEN_FOR |= dict.fromkeys(("utf-16", "utf-16le", "utf-16be"), "utf-8")


def read_html(content: bytes) -> Document:
    """The document of a page: its main content, and what its head says of it.

    Raises ValueError saying why where it is not in the encoding that it names (by default UTF-8), is nested more than
    256 deep, or has no text.
    """
    from lxml import etree

    named = re.search(rb"(?:charset|encoding)\s*=\s*[\"']?\s*([\w-]+)", content[:1024])
    encoding = named[1].decode().lower() if named else "utf-8"
    encoding = "utf-16" if content[:2] in (b"\xff\xfe", b"\xfe\xff") else _TAKEN_FOR.get(encoding, encoding)
    try:
        text = content.decode(encoding).removeprefix("\ufeff")
    except (LookupError, UnicodeDecodeError) as error:
        raise ValueError(f"not {encoding}: {getattr(error, 'reason', error)}") from None
    parser = etree.HTMLParser(encoding="utf-8", remove_comments=True, remove_pis=True, no_network=True)
    root = etree.fromstring(text.encode(), parser) if text.strip() else None
    if any("depth" in entry.message for entry in parser.error_log):
        raise ValueError("nested more than 256 deep")
    if root is None:
        raise ValueError("no text")
    meta: dict[str, str] = {}
    for element in root.iter("meta"):
        name = (element.get("name") or element.get("property") or "").lower().replace("dcterms.", "dc.")
        meta[name] = f"{meta.get(name, '')} {element.get('content', '')}".strip()
    licence = [*root.xpath(".//*[contains(concat(' ', @rel, ' '), ' license ')]/@href"), meta.get("dc.rights", "")][0]
    articles = root.xpath(".//article[not(ancestor::article)]")
    main = root.xpath(_MAIN) or (articles if len(articles) == 1 else [])
    bodies, first = main or root.xpath("body")[:1] or [root], text_of(*root.iter("h1"))
    outside = [
        node
        for body in bodies
        for node in body.xpath(_OUTSIDE if main else f"{_OUTSIDE}|.//header[not(ancestor::article)]")
        + [part for part in body.iter("*") if _CLASSES.intersection((part.get("class") or "").split())]
        if node.find("p[@class='sidebar-title']") is None
    ]
    for node in outside:
        node.text, node[:] = None, []  # what follows it stays
        node.tag = "span"
    writer = Writer()
    page, _ = writer.finish("".join(block(writer.children(body)) for body in bodies))
    if not page:
        raise ValueError("no text")
    heads = [head for body in bodies for head in body.iter("h1")]
    title = meta.get("citation_title") or text_of(*heads, *root.iter("title")) or first
    return Document(
        f"# {title}\n\n{page}" if title and not heads else page,
        title,
        doi=doi_of(meta.get("citation_doi", ""), meta.get("dc.identifier", "")),
        year=year_of(*(meta.get(name) for name in ("citation_date", "citation_publication_date", "dc.date"))),
        licence=licence,
        abstract=meta.get("citation_abstract", ""),
        keywords=re.findall(r"[^\s,;][^,;]*", meta.get("citation_keywords", "")),
        figures=writer.figures,
    )

"""The text layer of PDFs, by pypdfium2 (PDFium, BSD): pypdf orders columns alike, but marks no hyphen and is slower.

Text comes in the order of the file, which publishers' tools write column by column.
"""

from __future__ import annotations

import re
from collections import Counter

from k2mini.corpus.document import Document
from k2mini.corpus.markdown import join_lines, one_line
from k2mini.corpus.paper import doi_of, year_of

MOST_PAGES = 10_000
MOST_CHARACTERS = 10_000_000  # the longest books have some five million
_PASSWORD = 4  # FPDF_ERR_PASSWORD of fpdfview.h


def read_pdf(content: bytes) -> Document:
    """The document of a PDF: its paragraphs; title and year where the file's own are on its first page.

    Not for two threads of one process at a time, which PDFium does not bear.

    Raises ValueError saying why where it is no PDF, encrypted, damaged, too long, or has no text layer.
    """
    import pypdfium2

    if b"%PDF-" not in content[:1024]:
        raise ValueError("not a PDF" if content else "an empty file")
    try:
        pdf = pypdfium2.PdfDocument(content)
        if len(pdf) > MOST_PAGES:
            raise ValueError(f"{len(pdf):,} pages, which is more than {MOST_PAGES:,}")
        known = pdf.get_metadata_dict()
        pages, left = [], MOST_CHARACTERS
        for page in pdf:
            text = page.get_textpage()
            if (left := left - text.count_chars()) < 0:
                raise ValueError(f"more than {MOST_CHARACTERS:,} characters of text")
            pages.append(_lines(text.get_text_bounded()))
            page.close()
        pdf.close()
    except pypdfium2.PdfiumError as error:
        encrypted = getattr(error, "err_code", None) == _PASSWORD
        raise ValueError("encrypted" if encrypted else f"a damaged PDF: {error}") from None
    text = _paragraphs(pages)
    if not text:
        raise ValueError("no text layer; scanned pages need OCR first")
    first = one_line(" ".join(line for page in pages[:2] for line in page))
    title, year = one_line(known.get("Title", "")), year_of(known.get("CreationDate", "")[2:6])
    sound = len(title.split()) > 1 and re.sub(r"\W", "", title).lower() in re.sub(r"\W", "", first).lower()
    return Document(
        text,
        title if sound else "",
        doi=doi_of(known.get("Subject", ""), known.get("Keywords", ""), *pages[0]),
        year=year if str(year) in first else None,
    )


def _lines(text: str) -> list[str]:
    text = re.sub("\x02|\ufffe", "-\n", text)  # PDFium's mark of a hyphen at a line's end
    lines = (re.sub(r"[\x00-\x1f\uffff]", " ", line).strip() for line in text.splitlines())
    return [line for line in lines if line]


def _paragraphs(pages: list[list[str]]) -> str:
    """The lines of all pages as paragraphs: one ends with a line of less than 3/4 of the usual length.

    A line that recurs at the edges of pages, numbers apart, is a paragraph of its own, and interrupts none.
    """
    edges = Counter(edge for page in pages for edge in {re.sub(r"\d+", "#", line) for line in page[:2] + page[-2:]})
    usual = sorted(len(line) for page in pages for line in page)
    enough, usual_length = max(2, len(pages) // 3), usual[len(usual) // 2] if usual else 0
    paragraphs: list[list[str]] = []
    current: list[str] = []
    for page in pages:
        for n, line in enumerate(page):
            if (n < 2 or n >= len(page) - 2) and edges[re.sub(r"\d+", "#", line)] >= enough:
                paragraphs.append([line])
                continue
            if not current or re.match(r"[•▪◦‣∙]", line):
                paragraphs.append(current := [])
            current.append(line)
            if len(line) < 0.75 * usual_length and not line.endswith("-"):
                current = []
    text = "\n\n".join("\n".join(lines) for lines in paragraphs)
    return re.sub(r"(?<!\n)\n(?!\n)", " ", join_lines(text, "\n(?!\n)"))

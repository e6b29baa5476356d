"""Text that was decoded by the wrong table (`MÃ¶ssbauer`), put right by ftfy."""

from __future__ import annotations

from typing import Any

from k2mini.corpus.document import Document
from k2mini.errors import need_extra

# Which fonts have for two or three letters. ftfy's own list would also take apart letters of Dutch and Croatian.
_LIGATURES = str.maketrans(dict(zip("ﬀﬁﬂﬃﬄﬅﬆ", ["ff", "fi", "fl", "ffi", "ffl", "st", "st"], strict=True)))
_OFF: dict[str, Any] = dict.fromkeys(
    ("unescape_html", "fix_latin_ligatures", "fix_character_width", "uncurl_quotes"), False
)


def mojibake(document: Document) -> None:
    """Repair every text of a document, line by line; none is rejected.

    On: mixed-up encodings, control characters, surrogates, line ends, NFC, the ligatures ﬀ to ﬆ. Off, since they change
    what is right: HTML entities, widths, quotation marks.
    """
    try:
        from ftfy import fix_text
    except ImportError:
        raise need_extra("corpus") from None

    def repaired(text: str) -> str:
        return fix_text(text, **_OFF).translate(_LIGATURES)

    document.text, document.title = repaired(document.text), repaired(document.title)
    document.abstract, document.keywords = repaired(document.abstract), [*map(repaired, document.keywords)]
    document.figures = [{key: repaired(text) for key, text in figure.items()} for figure in document.figures]
    document.citations = [{key: repaired(text) for key, text in cited.items()} for cited in document.citations]

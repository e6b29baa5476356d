"""Text that was decoded by the wrong table (`MÃ¶ssbauer`), put right by ftfy."""

from __future__ import annotations

import unicodedata

from k2mini.corpus.document import Document
from k2mini.errors import need_extra

# Which fonts have for two or three letters. ftfy's own list would also take apart letters of Dutch and Croatian.
_LIGATURES = str.maketrans(dict(zip("ﬀﬁﬂﬃﬄﬅﬆ", ["ff", "fi", "fl", "ffi", "ffl", "st", "st"], strict=True)))


def mojibake(document: Document) -> None:
    """Repair every text of a document; none is rejected.

    Of ftfy's repairs these are on: mixed-up encodings (line by line, in texts with a sequence that ftfy calls bad),
    control characters, surrogates, line ends, NFC, and the ligatures ﬀ to ﬆ. Entities, widths and quotation marks stay.
    """
    try:
        from ftfy import fix_encoding, fixes
        from ftfy.badness import is_bad
    except ImportError:
        raise need_extra("corpus") from None

    def repaired(text: str) -> str:
        text = fixes.remove_control_chars(fixes.fix_line_breaks(text))
        if text.isascii():
            return text
        if is_bad(text):
            text = "\n".join(map(fix_encoding, text.split("\n")))
        return unicodedata.normalize("NFC", fixes.fix_surrogates(fixes.fix_c1_controls(text)).translate(_LIGATURES))

    document.text, document.title = repaired(document.text), repaired(document.title)
    document.abstract, document.keywords = repaired(document.abstract), [*map(repaired, document.keywords)]
    document.figures = [{key: repaired(text) for key, text in figure.items()} for figure in document.figures]
    document.citations = [{key: repaired(text) for key, text in cited.items()} for cited in document.citations]

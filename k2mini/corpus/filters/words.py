"""Documents that are too short or too long."""

from __future__ import annotations

import re

from k2mini.corpus.document import Document
from k2mini.corpus.prose import prose


def words(document: Document, *, minimum: int = 50, maximum: int = 100_000) -> str | None:
    """Reject a document of fewer or more words of running text, with a letter or digit (Rae et al. 2021, A.1.1)."""
    count = sum(any(map(str.isalnum, word[0])) for word in re.finditer(r"\S+", prose(document.text)))
    if minimum <= count <= maximum:
        return None
    return f"{count:,} words ({f'least: {minimum:,}' if count < minimum else f'most: {maximum:,}'})"

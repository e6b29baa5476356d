"""Lists of references, kept or dropped."""

from __future__ import annotations

from k2mini.corpus.document import Document
from k2mini.corpus.prose import without_references


def references(document: Document, *, keep: bool = True) -> None:
    """Take out the sections of references where `keep` is false; no document is rejected.

    They are kept by default, as K2's sciparser does: what is cited with what is knowledge too. The rules of the other
    filters don't count them.
    """
    if not keep:
        document.text = without_references(document.text).strip()

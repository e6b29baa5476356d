"""Text that is not prose: the rules of Gopher (Rae et al. 2021, section A.1.1), thresholds as in datatrove."""

from __future__ import annotations

import string

from k2mini.corpus.document import Document
from k2mini.corpus.prose import prose

_STOP_WORDS = {"the", "be", "to", "of", "and", "that", "have", "with"}
_BULLETS, _ELLIPSES = ("•", "-", "*", "‣", "·"), ("...", "…")


def quality(
    document: Document,
    *,
    shortest: float = 3,
    longest: float = 10,
    symbols: float = 0.1,
    bullets: float = 0.9,
    ellipses: float = 0.3,
    alphabetic: float = 0.8,
    stop_words: int = 2,
) -> str | None:
    """Reject a document whose running text is beyond one of these limits. Words are what stands between spaces.

    Args:
        shortest, longest: characters of a word in the mean, without punctuation around it.
        symbols: hash signs a word, and ellipses a word.
        bullets, ellipses: share of the lines that begin with a bullet, or end in an ellipsis.
        alphabetic: share of the words that have a letter.
        stop_words: how many of the, be, to, of, and, that, have and with are there; 0 for other languages.

    Headings with their hash signs, tables, formulas and references are not counted; Gopher's least and most words are
    those of the filter `words`.
    """
    text = prose(document.text)
    found, rows = text.split(), [line.strip() for line in text.split("\n") if line.strip()]
    bare = [word for word in (word.strip(string.punctuation) for word in found) if word]
    if not bare:
        return "there is no running text"
    mean, dots = sum(map(len, bare)) / len(bare), sum(map(text.count, _ELLIPSES))
    stops = len(_STOP_WORDS.intersection(word.lower() for word in bare))
    for value, least, most, what in (
        (mean, shortest, longest, "characters a word"),
        (text.count("#") / len(found), 0, symbols, "hash signs a word"),
        (dots / len(found), 0, symbols, "ellipses a word"),
        (sum(row.startswith(_BULLETS) for row in rows) / len(rows), 0, bullets, "of the lines begin with a bullet"),
        (sum(row.endswith(_ELLIPSES) for row in rows) / len(rows), 0, ellipses, "of the lines end in an ellipsis"),
        (sum(any(map(str.isalpha, word)) for word in found) / len(found), alphabetic, 1, "of the words have a letter"),
        (stops, stop_words, 8, "of eight stop words"),
    ):
        if not least <= value <= most:
            return f"{value:.2g} {what} ({f'least: {least:g}' if value < least else f'most: {most:g}'})"
    return None

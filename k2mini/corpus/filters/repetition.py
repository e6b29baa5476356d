"""Text that repeats itself: the rules of Gopher (Rae et al. 2021, table A1), thresholds as in datatrove."""

from __future__ import annotations

import numpy as np

from k2mini.corpus.document import Document
from k2mini.corpus.ngrams import hash_ngrams, hash_words, words
from k2mini.corpus.prose import PARAGRAPHS, prose


def repetition(
    document: Document,
    *,
    lines: float = 0.30,
    line_characters: float = 0.20,
    paragraphs: float = 0.30,
    paragraph_characters: float = 0.20,
    top: float = 0.20,
    repeated: float = 0.15,
) -> str | None:
    """Reject a document of whose running text a larger share is repeated.

    Args:
        lines, paragraphs: those that stood before, of all; line_characters, paragraph_characters: their characters.
        top: characters in the most frequent pair of words; of three words 0.02 less, of four 0.04.
        repeated: characters in runs of five words that stood before; 0.01 less for each word more, up to ten.

    Other than in datatrove, n-grams are of words alone, spaces and punctuation counting nowhere, and all that lies in a
    repeated run counts, once, which is stricter; headings, tables, formulas and references are not looked at.
    """
    text = prose(document.text)
    for kind, parts, most, most_characters in (
        ("lines", text.split("\n"), lines, line_characters),
        ("paragraphs", PARAGRAPHS.split(text), paragraphs, paragraph_characters),
    ):
        parts = [part.strip() for part in parts if part.strip()]
        once, all_characters = {*parts}, max(1, sum(map(len, parts)))
        if (share := 1 - len(once) / max(1, len(parts))) > most:
            return f"{share:.0%} of the {kind} are repeated (most: {most:.0%})"
        if (share := 1 - sum(map(len, once)) / all_characters) > most_characters:
            return f"{share:.0%} of the characters are in repeated {kind} (most: {most_characters:.0%})"
    found = words(text)
    hashed, lengths = hash_words(found), np.fromiter(map(len, found), np.int64, len(found))
    for n in range(2, 11):
        ngrams = hash_ngrams(hashed, n)
        _, first, counts = np.unique(ngrams, return_index=True, return_counts=True)
        if counts.size == 0 or counts.max() < 2:
            break  # nor does a longer one come twice
        if n < 5:
            most, kind = top - 0.02 * (n - 2), f"the most frequent {n} words"
            starts = np.flatnonzero(ngrams == ngrams[first[counts == counts.max()].min()])
        else:
            most, kind = repeated - 0.01 * (n - 5), f"repeated runs of {n} words"
            starts = np.setdiff1d(np.arange(len(ngrams)), first)
        if (share := _covered(starts, n, lengths)) > most:
            return f"{share:.0%} of the characters are in {kind} (most: {most:.0%})"
    return None


def _covered(starts: np.ndarray, n: int, lengths: np.ndarray) -> float:
    """Share of the words' characters that lie in the n-grams beginning at `starts`."""
    steps = np.zeros(len(lengths) + 1, np.int64)
    steps[starts] += 1
    steps[starts + n] -= 1
    return float(lengths[np.cumsum(steps)[:-1] > 0].sum() / lengths.sum())

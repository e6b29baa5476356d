"""Measures of a generated answer against a reference that need no other model."""

from __future__ import annotations

import math
import re
import unicodedata
from collections import Counter
from collections.abc import Sequence

WORD = re.compile(r"\w+")

# A number as people write it: 1,395; -2.5; 4.6e9; 1.2 × 10^-3. Not the 3 of cm3, of m^3 or of SiO2-3.
_NUMBER = re.compile(
    r"(?<![\w.^])([-+]?(?:(?:\d{1,3}(?:,\d{3})+(?!,?\d)|\d+)(?:\.\d+)?|\.\d+))"
    r"(?:[eE]([-+]?\d+)|\s*[×x*]\s*10\^\{?([-+]?\d+)\}?)?"
)
_RAISED = re.compile("[⁺⁻⁰¹²³⁴-⁹]+")
ARTICLES = ("a", "an", "the")


def words(text: str) -> list[str]:
    """Lower-case words, without punctuation."""
    return WORD.findall(text.lower())


def token_f1(answer: str, reference: str) -> float:
    """Harmonic mean of precision and recall over words, as SQuAD's (Rajpurkar et al. 2016, arXiv 1606.05250)."""
    ours, theirs = words(answer), words(reference)
    common = sum((Counter(ours) & Counter(theirs)).values())
    return 2 * common / (len(ours) + len(theirs)) if common else 0.0


def rouge_l(answer: str, reference: str) -> float:
    """F1, from 0 to 1, over the longest common subsequence of words (Lin 2004, "ROUGE", section 3).

    Returns: 0 where one of the two has no words.
    """
    ours, theirs = words(answer), words(reference)
    if not ours or not theirs:
        return 0.0
    common = _longest_common_subsequence(ours, theirs)
    return 2 * common / (len(ours) + len(theirs))


def _longest_common_subsequence(a: Sequence[str], b: Sequence[str]) -> int:
    row = [0] * (len(b) + 1)
    for word in a:
        diagonal = 0
        for place, other in enumerate(b, start=1):
            above = row[place]
            row[place] = diagonal + 1 if word == other else max(above, row[place - 1])
            diagonal = above
    return row[-1]


def same_words(answer: str, reference: str) -> bool:
    """Whether both are the same words, but for case, punctuation and articles: SQuAD's exact match."""
    ours, theirs = ([w for w in words(text) if w not in ARTICLES] or words(text) for text in (answer, reference))
    return ours == theirs and bool(words(answer))


def same_number(answer: str, reference: str, tolerance: float = 0.0, relative_tolerance: float = 0.0) -> bool:
    """Whether the last number of the answer is the reference's, within the larger tolerance.

    Args:
        relative_tolerance: is multiplied by the reference.
    """
    ours, theirs = last_number(answer), last_number(reference)
    if ours is None or theirs is None:
        return False
    return abs(ours - theirs) <= max(tolerance, relative_tolerance * abs(theirs)) + 1e-9 * abs(theirs)  # of rounding


def last_number(text: str) -> float | None:
    """The last number in a text; None where there is none, or it is too large."""
    text = _RAISED.sub(lambda found: "^" + unicodedata.normalize("NFKC", found[0]), text).replace("−", "-")
    found = _NUMBER.findall(text)
    if not found:
        return None
    plain, exponent, power = found[-1]
    number = float(f"{plain.replace(',', '')}e{exponent or power or 0}")
    return number if math.isfinite(number) else None

"""Measures of a generated answer against a reference that need no other model."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence

WORD = re.compile(r"\w+")


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

"""Documents in another language."""

from __future__ import annotations

import re
from functools import cache
from typing import Any

from k2mini.corpus.document import Document
from k2mini.corpus.prose import prose
from k2mini.errors import need_extra

_MOST = 10_000  # characters that are looked at, from the middle


def language(document: Document, *, keep: str = "en", minimum: float = 0.5, letters: int = 200) -> str | None:
    """Reject what is in none of the languages `keep` (`en,de`) with a probability of at least `minimum`.

    py3langid (Lui and Baldwin 2012) judges the running text; its probabilities sum to one over its languages. Text with
    fewer than `letters` letters, or in which less than half is letters, is not judged.
    """
    text = prose(document.text)
    running = re.sub(r"[\W\d_]+", " ", text).strip()
    count = len(running) - running.count(" ")
    if count < letters or 2 * count < len("".join(text.split())):
        return None
    start = max(0, (len(running) - _MOST) // 2)
    ranks = _model().rank(running[start : start + _MOST])  # (language, probability), the likeliest first
    share = sum(probability for name, probability in ranks if name in keep.split(","))
    if share >= minimum:
        return None
    return f"{keep} with a probability of {share:.2f} (least: {minimum}), {ranks[0][0]} of {ranks[0][1]:.2f}"


def check_languages(keep: str) -> None:
    """Raise ValueError where py3langid doesn't know one of the languages."""
    known = sorted(_model().labels)
    if unknown := [name for name in keep.split(",") if name not in known]:
        raise ValueError(f"language.keep: {unknown[0]!r} is none of {', '.join(known)}")


@cache
def _model() -> Any:
    try:
        from py3langid.langid import MODEL_FILE, LanguageIdentifier
    except ImportError:
        raise need_extra("corpus") from None
    return LanguageIdentifier.from_model_file(MODEL_FILE, norm_probs=True)

"""A text's words, and 64-bit hashes of the n-grams that they form: the same on every machine."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Sequence
from zlib import crc32

import numpy as np

_WORD = re.compile(r"[^\W_]+")
_INVISIBLE = re.compile("[\u00ad\u200b-\u200d\u2060\ufeff]")
_ODD = np.uint64(0x9E3779B97F4A7C15)
_SHIFT = np.uint64(32)


def words(text: str) -> list[str]:
    """Runs of letters and digits, case folded, in NFKC, without soft hyphens and spaces that have no width."""
    if not text.isascii():
        text = unicodedata.normalize("NFKC", _INVISIBLE.sub("", text))
    return _WORD.findall(text.casefold())


def hash_words(words: Sequence[str]) -> np.ndarray:
    """A hash of each word, uint64 (W,): CRC-32, spread over 64 bits."""
    return _spread(np.fromiter(map(crc32, map(str.encode, words)), np.uint64, len(words)))


def hash_ngrams(hashed: np.ndarray, n: int) -> np.ndarray:
    """A hash of each run of `n` words, uint64 (W - n + 1,), from those of the words; of none where there are fewer."""
    count = max(0, len(hashed) - n + 1)
    ngrams = np.zeros(count, np.uint64)
    for place in range(n):
        ngrams = ngrams * _ODD + hashed[place : place + count]
    return _spread(ngrams)


def _spread(values: np.ndarray) -> np.ndarray:
    values = values * _ODD
    return (values ^ (values >> _SHIFT)) * _ODD

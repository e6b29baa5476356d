"""Near duplicates: MinHash over runs of five words, and locality-sensitive hashing (Broder 1997).

A signature's share of equal values estimates J, the share of distinct 5-grams that two texts have in common, with a
standard error of sqrt(J (1 - J) / 256): 0.031 at J = 0.5. A copy with 5 % of its words replaced keeps 0.95^5 = 77 % of
its 5-grams, so J = 0.77 / (2 - 0.77) = 0.63, which is why the threshold is 0.5 and not the 0.8 that is used elsewhere.

Documents are compared where one of 64 bands of 4 values is equal. That finds a pair with the probability
1 - (1 - J^4)^64: 99.99 % at J = 0.63, 98 % at 0.5, 41 % at 0.3, 0.6 % at 0.1; what it finds is then compared in full.
A document goes where the estimate is above the threshold by its standard error, for each is compared with many others.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from k2mini.corpus.ngrams import hash_ngrams, hash_words, words

PERMUTATIONS = 256
THRESHOLD = 0.5
_WORDS = 5
_ROWS = 4  # of a band
_SLICE = 2**14  # pairs that are compared at a time
# Documents of a band, or of a cluster, with which others of it are compared: where a template gives a hundred thousand
# documents the same band and little else, all pairs would take days.
_MOST_OF_BAND, _MOST_OF_CLUSTER = 64, 1024

# Multiply-shift hashing, h(x) = (a x + b mod 2^64) >> 32 with a odd. PCG64's raw values never change (NEP 19).
_DRAWS = np.random.PCG64(20).random_raw(2 * PERMUTATIONS)
_FACTORS, _TERMS = _DRAWS[:PERMUTATIONS] | np.uint64(1), _DRAWS[PERMUTATIONS:]


def signature(text: str) -> np.ndarray:
    """MinHash of a text's runs of five words, (PERMUTATIONS,) uint32; of all its words where it has fewer than five."""
    hashed = hash_words(words(text))
    ngrams = hash_ngrams(hashed, max(1, min(_WORDS, len(hashed))))
    least = [(ngrams * a + b).min(initial=2**64 - 1) for a, b in zip(_FACTORS, _TERMS, strict=True)]
    return (np.array(least, np.uint64) >> np.uint64(32)).astype(np.uint32)


def near_duplicates(signatures: np.ndarray, lengths: np.ndarray, threshold: float = THRESHOLD) -> np.ndarray:
    """Which copy of each document is kept: the longest, the first of equals.

    What a chain of near duplicates connects is a cluster. In it the longest is kept and what is like it goes, then the
    longest of the rest, and so on: no document goes for one that it is not itself like.

    Args:
        signatures: (N, PERMUTATIONS) uint32; may be mapped from a file.
        lengths: (N,), of the documents.
        threshold: the least J of near duplicates, from 0 to 1; the least estimate is its standard error more.

    Returns: (N,) int64, the kept document of each; itself where it is kept. Memory is some 80 bytes a document.
    """
    count, least = len(signatures), threshold + (threshold * (1 - threshold) / PERMUTATIONS) ** 0.5
    order = np.lexsort((np.arange(count), -np.asarray(lengths, np.int64)))  # rank -> document, the longest first
    root, kept = np.arange(count), np.arange(count)  # rank -> the least rank of its cluster, and the kept one's

    def alike(first: np.ndarray, second: np.ndarray) -> np.ndarray:
        found = np.empty(len(first), bool)
        for at in (slice(start, start + _SLICE) for start in range(0, len(first), _SLICE)):
            found[at] = (signatures[order[first[at]]] == signatures[order[second[at]]]).mean(1) >= least
        return found

    def join(first: np.ndarray, second: np.ndarray) -> np.ndarray:
        apart = np.flatnonzero(root[first] != root[second])
        apart = apart[alike(first[apart], second[apart])]
        for pair in zip(first[apart], second[apart], strict=True):
            a, b = (_top(root, one) for one in pair)
            root[max(a, b)] = min(a, b)
        while np.any(root != (above := root[root])):
            root[:] = above
        return root[first] == root[second]

    def drop(first: np.ndarray, second: np.ndarray) -> np.ndarray:
        same = alike(first, second)
        kept[second[same]] = first[same]
        return same

    for band in range(0, PERMUTATIONS, _ROWS):
        keys = np.zeros(count, np.uint64)
        for column in range(band, band + _ROWS):
            keys = keys * _FACTORS[0] + signatures[:, column]
        _compare(keys[order], join, _MOST_OF_BAND)
    _compare(root, drop, _MOST_OF_CLUSTER)
    found = np.empty(count, np.int64)
    found[order] = order[kept]
    return found


def _top(root: np.ndarray, one: int) -> int:
    while one != root[one]:
        one = root[one]
    return one


def _compare(keys: np.ndarray, are_done: Callable[[np.ndarray, np.ndarray], np.ndarray], most: int) -> None:
    """Compare the ranks of each key with the first of them, those that are not done with the first of these, …"""
    members = np.argsort(keys, kind="stable")
    for _ in range(most):
        sorted_keys = keys[members]
        starts = np.flatnonzero(np.concatenate([[True], sorted_keys[1:] != sorted_keys[:-1]]))
        sizes = np.diff(np.append(starts, len(members)))
        firsts, several = members[np.repeat(starts, sizes)], np.repeat(sizes > 1, sizes)
        members, firsts = members[several], firsts[several]
        members = members[~are_done(firsts, members)]

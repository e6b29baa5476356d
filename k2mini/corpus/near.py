"""Near duplicates: MinHash over runs of five words, and locality-sensitive hashing (Broder 1997).

A signature's share of equal values estimates J, the share of distinct 5-grams that two texts have in common, with a
standard error of sqrt(J (1 - J) / 128): 0.044 at J = 0.5. A copy with 5 % of its words replaced keeps 0.95^5 = 77 % of
its 5-grams, so J = 0.77 / (2 - 0.77) = 0.63, which is why the threshold is 0.5 and not the 0.8 that is used elsewhere.

Documents are compared where one of 32 bands of 4 values is equal. That finds a pair with the probability
1 - (1 - J^4)^32: 99.6 % at J = 0.63, 87 % at 0.5, 23 % at 0.3, 0.3 % at 0.1; what it finds is then compared in full.
"""

from __future__ import annotations

import numpy as np

from k2mini.corpus.ngrams import hash_ngrams, hash_words, words

PERMUTATIONS = 128
THRESHOLD = 0.5
_WORDS = 5
_ROWS = 4  # of a band
_SLICE = 2**16  # pairs that are compared at a time

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
    """Which copy of each document is kept: the longest of its cluster, the first of equals.

    In a band, documents that agree are compared with the longest of them; those that are unlike it with the longest of
    the rest, and so on. What a chain of near duplicates connects is one cluster.

    Args:
        signatures: (N, PERMUTATIONS) uint32; may be mapped from a file.
        lengths: (N,), of the documents.
        threshold: the least estimate of J of near duplicates, from 0 to 1.

    Returns: (N,) int64, the kept document of each; itself where it is kept. Beside it, memory is 60 bytes a document.
    """
    count = len(signatures)
    order = np.lexsort((np.arange(count), -np.asarray(lengths, np.int64)))  # rank -> document, longest first
    root = np.arange(count)  # rank -> the least rank of its cluster
    for band in range(0, signatures.shape[1], _ROWS):
        keys = np.zeros(count, np.uint64)
        for column in range(band, band + _ROWS):
            keys = keys * _FACTORS[0] + signatures[:, column]
        members = np.argsort(keys[order], kind="stable")  # ranks; of equal keys the longest first
        keys = keys[order[members]]
        while len(members := members[shared := _shared(keys)]):
            keys = keys[shared]
            starts = np.flatnonzero(np.concatenate([[True], keys[1:] != keys[:-1]]))
            heads = members[np.repeat(starts, np.diff(np.append(starts, len(keys))))]
            _join(signatures, order, root, heads, members, threshold)
            rest = root[members] != root[heads]
            members, keys = members[rest], keys[rest]
    kept = np.empty(count, np.int64)
    kept[order] = order[root]
    return kept


def _shared(keys: np.ndarray) -> np.ndarray:
    """Where a key of a sorted list stands more than once."""
    equal = np.concatenate([[False], keys[1:] == keys[:-1], [False]])[: len(keys) + 1]
    return equal[:-1] | equal[1:]


def _join(
    signatures: np.ndarray, order: np.ndarray, root: np.ndarray, first: np.ndarray, second: np.ndarray, threshold: float
) -> None:
    """Make one cluster of the clusters of each pair of ranks whose signatures are alike."""
    apart = np.flatnonzero(root[first] != root[second])
    for start in range(0, len(apart), _SLICE):
        pairs = apart[start : start + _SLICE]
        same = signatures[order[first[pairs]]] == signatures[order[second[pairs]]]
        for a, b in zip(first[pairs[same.mean(1) >= threshold]], second[pairs[same.mean(1) >= threshold]], strict=True):
            while a != root[a]:
                a = root[a]
            while b != root[b]:
                b = root[b]
            root[max(a, b)] = min(a, b)
    while np.any(root != (above := root[root])):
        root[:] = above

"""A prepared corpus: token shards that are mapped, not read, with an index of where documents begin.

A directory of `manifest.json` and, for each split (`train`, `val`) and shard, `SPLIT-00000.tokens` (uint16, or uint32
for vocabularies beyond 65,536) and `SPLIT-00000.starts` (uint64, each document's first token within the shard).
No document is spread over two shards.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from k2mini.files import read_json

FORMAT = "k2mini corpus 1"
MANIFEST = "manifest.json"


class TokenSource(Protocol):
    """A long row of tokens that consists of documents."""

    num_tokens: int

    def read(self, start: int, stop: int) -> tuple[np.ndarray, np.ndarray]:
        """Tokens start, …, stop - 1, and how far each is from its document's first. Both (stop - start,) int64."""
        ...


class Documents:
    """Documents in memory, as token ids."""

    def __init__(self, documents: Sequence[Sequence[int]]) -> None:
        self._tokens = np.array([token for document in documents for token in document], dtype=np.int64)
        self._offsets = np.array([offset for document in documents for offset in range(len(document))], dtype=np.int64)
        self.num_tokens = len(self._tokens)

    def read(self, start: int, stop: int) -> tuple[np.ndarray, np.ndarray]:
        """See TokenSource."""
        return self._tokens[start:stop], self._offsets[start:stop]


class Corpus:
    """One split of a prepared corpus.

    Raises ValueError where the directory is not one, is damaged, or has no such split.
    """

    def __init__(self, directory: Path, split: str = "train") -> None:
        manifest = read_corpus_manifest(directory)
        if split not in manifest["splits"]:
            raise ValueError(f"{directory} has no {split!r} part; prepare it with --val-percent")
        self.directory = directory
        content = manifest["splits"][split]
        self.num_tokens: int = content["tokens"]
        self.num_documents: int = content["documents"]
        self._tokens = [_map(directory, shard, "tokens", manifest["dtype"]) for shard in content["shards"]]
        self._starts = [_map(directory, shard, "starts", "uint64") for shard in content["shards"]]
        self._firsts = np.cumsum([0] + [len(tokens) for tokens in self._tokens])  # of each shard, in the whole row

    def read(self, start: int, stop: int) -> tuple[np.ndarray, np.ndarray]:
        """See TokenSource."""
        if not 0 <= start <= stop <= self.num_tokens:
            raise IndexError(f"tokens {start} to {stop} of {self.num_tokens}")
        tokens, offsets = [], []
        shard = int(np.searchsorted(self._firsts, start, side="right")) - 1
        while start < stop:
            first, after = int(self._firsts[shard]), int(self._firsts[shard + 1])
            end = min(stop, after)
            places = np.arange(start - first, end - first)
            starts = self._starts[shard]
            document = np.searchsorted(starts, places.astype(np.uint64), side="right") - 1
            tokens.append(self._tokens[shard][start - first : end - first].astype(np.int64))
            offsets.append(places - starts[document].astype(np.int64))
            start, shard = end, shard + 1
        return np.concatenate(tokens), np.concatenate(offsets)


def _map(directory: Path, shard: dict[str, Any], kind: str, dtype: str) -> np.ndarray:
    path = directory / f"{shard['name']}.{kind}"
    count = shard["tokens"] if kind == "tokens" else shard["documents"]
    expected = count * np.dtype(dtype).itemsize
    if not path.is_file() or path.stat().st_size != expected:
        size = path.stat().st_size if path.is_file() else "missing"
        raise ValueError(f"{path} is {size}, the manifest makes it {expected} bytes; prepare the corpus again")
    return np.memmap(path, dtype=dtype, mode="r", shape=(count,))


def is_prepared(path: Path) -> bool:
    """Whether `path` is a directory that `k2mini prepare` made."""
    return (path / MANIFEST).is_file()


def read_corpus_manifest(directory: Path) -> dict[str, Any]:
    """The manifest. Raises ValueError where `directory` is not a prepared corpus."""
    if not is_prepared(directory):
        raise ValueError(f"{directory} is not a prepared corpus (it has no {MANIFEST}); make one with k2mini prepare")
    manifest = read_json(directory / MANIFEST)
    if not isinstance(manifest, dict) or manifest.get("format") != FORMAT:
        raise ValueError(f"{directory / MANIFEST} is not of the format {FORMAT!r}")
    return manifest


def fingerprint(directory: Path) -> str:
    """A hash that changes with any token of the corpus, from the manifest's own hashes."""
    splits = read_corpus_manifest(directory)["splits"]
    return hashlib.sha256(json.dumps(splits, sort_keys=True).encode()).hexdigest()

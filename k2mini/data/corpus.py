"""Prepared corpora: documents as token ids in files that are memory-mapped, made by `k2mini prepare`.

A corpus is a directory with `manifest.json` and, for each shard of each split (`train`, `val`), `SPLIT-00000.tokens`
(uint16, or uint32 for vocabularies above 65,536) and `SPLIT-00000.starts` (uint64: where in the shard each document
begins). Every document lies in one shard.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from k2mini.config import check_fields
from k2mini.files import read_json

FORMAT = "k2mini corpus 1"
MANIFEST = "manifest.json"


class TokenSource(Protocol):
    """Documents one after the other, as one sequence of `num_tokens` tokens."""

    num_tokens: int

    def read(self, start: int, stop: int) -> tuple[np.ndarray, np.ndarray]:
        """Tokens start, …, stop - 1, and the place of each within its document. Both (stop - start,) int64."""
        ...


class Documents:
    """Documents in memory, as lists of token ids."""

    def __init__(self, documents: Sequence[Sequence[int]]) -> None:
        self._tokens = np.array([token for document in documents for token in document], dtype=np.int64)
        self._offsets = np.array([offset for document in documents for offset in range(len(document))], dtype=np.int64)
        self.num_tokens = len(self._tokens)

    def read(self, start: int, stop: int) -> tuple[np.ndarray, np.ndarray]:
        """Tokens start, …, stop - 1 and their places within their documents, as `TokenSource` says."""
        return self._tokens[start:stop], self._offsets[start:stop]


class Corpus:
    """One split of a prepared corpus, memory-mapped.

    Raises ValueError where the directory is not a prepared corpus, is damaged, or has no such split.
    """

    def __init__(self, directory: Path, split: str = "train") -> None:
        manifest = read_corpus_manifest(directory)
        if split not in manifest["splits"]:
            raise ValueError(f"{directory} has no {split!r} part; prepare it with --val-percent")
        self.directory = directory
        content = manifest["splits"][split]
        self.num_tokens: int = content["tokens"]
        self.num_documents: int = content["documents"]
        self._vocab_size: int = manifest["vocab_size"]
        self._tokens = [_map(directory, shard, "tokens", manifest["dtype"]) for shard in content["shards"]]
        self._starts = [_starts(directory, shard) for shard in content["shards"]]
        self._firsts = np.cumsum([0] + [len(tokens) for tokens in self._tokens])  # where each shard begins

    def read(self, start: int, stop: int) -> tuple[np.ndarray, np.ndarray]:
        """Tokens start, …, stop - 1 and their places within their documents, as `TokenSource` says."""
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
            if (odd := tokens[-1].max()) >= self._vocab_size:
                file, place = self._tokens[shard].filename, start - first + int(tokens[-1].argmax())
                raise ValueError(
                    f"{file} is damaged: token {place:,} is {odd}, the vocabulary has {self._vocab_size:,}"
                )
            offsets.append(places - starts[document].astype(np.int64))
            start, shard = end, shard + 1
        return np.concatenate(tokens), np.concatenate(offsets)


def _starts(directory: Path, shard: dict[str, Any]) -> np.ndarray:
    starts = _map(directory, shard, "starts", "uint64")
    if starts[0] != 0 or starts[-1] >= shard["tokens"] or not (starts[1:] > starts[:-1]).all():
        raise ValueError(f"{starts.filename} is damaged: its offsets do not rise from 0; prepare the corpus again")
    return starts


def _map(directory: Path, shard: dict[str, Any], kind: str, dtype: str) -> np.memmap:
    path = directory / f"{shard['name']}.{kind}"
    count = shard["tokens"] if kind == "tokens" else shard["documents"]
    expected = count * np.dtype(dtype).itemsize
    if not path.is_file() or path.stat().st_size != expected:
        size = path.stat().st_size if path.is_file() else "missing"
        raise ValueError(f"{path} is {size}, the manifest makes it {expected} bytes; prepare the corpus again")
    return np.memmap(path, dtype=dtype, mode="r", shape=(count,))


def is_prepared(path: Path) -> bool:
    """Whether `path` is a directory with a manifest, as `k2mini prepare` makes it."""
    return (path / MANIFEST).is_file()


def read_corpus_manifest(directory: Path) -> dict[str, Any]:
    """The manifest of a prepared corpus. Raises ValueError where `directory` is not one."""
    if not is_prepared(directory):
        raise ValueError(f"{directory} is not a prepared corpus (it has no {MANIFEST}); make one with k2mini prepare")
    manifest = read_json(directory / MANIFEST)
    if not isinstance(manifest, dict) or manifest.get("format") != FORMAT:
        raise ValueError(f"{directory / MANIFEST} is not of the format {FORMAT!r}")
    _check(manifest, str(directory / MANIFEST))
    return manifest


def _check(manifest: dict[str, Any], where: str) -> None:
    """Raise ValueError, naming field and value, where the manifest has not the fields that `prepare` writes."""
    check_fields(manifest, {"tokenizer": str, "vocab_size": int, "eos": bool, "dtype": str, "splits": dict}, where)
    if manifest["dtype"] not in ("uint16", "uint32") or "train" not in manifest["splits"]:
        raise ValueError(f"{where}: dtype must be uint16 or uint32, and splits have train; prepare the corpus again")
    for name, split in manifest["splits"].items():
        check_fields(split, {"tokens": int, "documents": int, "shards": list}, f"{where}, {name}")
        for shard in split["shards"]:
            check_fields(shard, {"name": str, "tokens": int, "documents": int, "sha256": dict}, f"{where}, {name}")
            check_fields(shard["sha256"], {"tokens": str, "starts": str}, f"{where}, {shard['name']}")
            if Path(shard["name"]).name != shard["name"] or not 0 < shard["documents"] <= shard["tokens"]:
                raise ValueError(f"{where}: the shard {shard!r:.200} is not one that prepare writes")
        for key in ("tokens", "documents"):
            if split[key] != (total := sum(shard[key] for shard in split["shards"])) or not total:
                raise ValueError(f"{where}, {name}: {key} is {split[key]!r:.30}, its shards have {total!r:.30}")


def corpus_hashes(directory: Path) -> dict[str, str]:
    """File name -> SHA-256, for all shards of the manifest."""
    splits = read_corpus_manifest(directory)["splits"].values()
    shards = [shard for split in splits for shard in split["shards"]]
    return {f"{shard['name']}.{kind}": shard["sha256"][kind] for shard in shards for kind in ("tokens", "starts")}


def fingerprint(directory: Path) -> str:
    """A hash of the whole corpus, made of the hashes of its shards in the manifest; no shard is read."""
    splits = read_corpus_manifest(directory)["splits"]
    return hashlib.sha256(json.dumps(splits, sort_keys=True).encode()).hexdigest()

"""A corpus on disk: a folder of JSONL shards with a manifest, `corpus.json`, which `k2mini corpus` writes."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from k2mini.files import read_json, sha256

MANIFEST, REJECTED = "corpus.json", "rejected.jsonl"
FORMAT = "k2mini corpus 1"


def read_manifest(directory: Path) -> dict[str, Any]:
    """The manifest of a corpus. Raises ValueError where the folder is none."""
    if not (directory / MANIFEST).is_file():
        raise ValueError(f"{directory} is no corpus: it has no {MANIFEST}; `k2mini corpus` writes one")
    manifest = read_json(directory / MANIFEST)
    if not isinstance(manifest, dict) or manifest.get("format") != FORMAT:
        raise ValueError(f"{directory / MANIFEST}: the format is not {FORMAT!r}")
    try:
        names = [(shard["name"], shard["sha256"]) for shard in manifest["shards"]]
    except (LookupError, TypeError):
        names = [("", "")]
    for name, digest in names:
        if Path(str(name)).name != name or not isinstance(digest, str) or not manifest.get("fingerprint"):
            raise ValueError(f"{directory / MANIFEST} is damaged: its shards or its fingerprint are missing")
        if not (directory / name).is_file():
            raise ValueError(f"{directory} lacks {name}, which {MANIFEST} names; make the corpus again")
    return manifest


def _checked(directory: Path, shard: dict[str, Any]) -> Path:
    if sha256(file := directory / shard["name"]) != shard["sha256"]:
        raise ValueError(f"{file} is not as {directory / MANIFEST} says; make the corpus again")
    return file


def read_corpus(directory: Path) -> Iterator[dict[str, Any]]:
    """The records of a corpus (see `Document.record`), in its order. Raises ValueError where the folder is none
    or a shard is not as its manifest says.
    """
    for shard in read_manifest(directory)["shards"]:
        with _checked(directory, shard).open(encoding="utf-8") as file:
            for line in file:
                yield json.loads(line)


def is_corpus(directory: Path) -> bool:
    """Whether a folder has a corpus's manifest, and not somebody else's file of that name."""
    try:
        return bool(read_json(directory / MANIFEST)["format"] == FORMAT)
    except (OSError, ValueError, LookupError, TypeError):
        return False


def corpora_of(files: Iterable[Path]) -> list[dict[str, Any]]:
    """Of the corpora whose shards are among the files: their fingerprints, and what they were decontaminated of.

    Raises ValueError where a shard is not as its manifest says.
    """
    files, found = set(files), []
    for folder in filter(is_corpus, sorted({file.parent for file in files})):
        manifest = read_manifest(folder)
        for shard in manifest["shards"]:
            if folder / shard["name"] in files:
                _checked(folder, shard)
        kept = ("fingerprint", "decontaminate", "contaminated")
        found.append({key: manifest.get(key) for key in kept})
    return found

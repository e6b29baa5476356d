"""A corpus on disk: a folder of JSONL shards with a manifest, `corpus.json`, which `k2mini corpus` writes."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from k2mini.files import read_json

MANIFEST = "corpus.json"
FORMAT = "k2mini corpus 1"


def read_manifest(directory: Path) -> dict[str, Any]:
    """The manifest of a corpus. Raises ValueError where the folder is none."""
    if not (directory / MANIFEST).is_file():
        raise ValueError(f"{directory} is no corpus: it has no {MANIFEST}; `k2mini corpus` writes one")
    manifest = read_json(directory / MANIFEST)
    if not isinstance(manifest, dict) or manifest.get("format") != FORMAT:
        raise ValueError(f"{directory / MANIFEST}: the format is not {FORMAT!r}")
    return manifest


def read_corpus(directory: Path) -> Iterator[dict[str, Any]]:
    """The records of a corpus (see `Document.record`), in its order. Raises ValueError where the folder is none."""
    for shard in read_manifest(directory)["shards"]:
        with (directory / shard["name"]).open(encoding="utf-8") as file:
            for line in file:
                yield json.loads(line)

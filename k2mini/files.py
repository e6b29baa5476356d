"""Files that appear whole or not at all: written beside, synced, then renamed."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path
from typing import Any


def read_json(path: Path) -> Any:
    """The parsed file. Raises ValueError naming the file where it is not JSON, OSError where it can't be read."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is not valid JSON: {error}") from None


def sync_path(path: Path) -> None:
    """Wait until a file's or directory's content is on disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sha256(path: Path) -> str:
    """The SHA-256 of a file's content, in hexadecimal digits."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def write_text(path: Path, text: str) -> None:
    """Write a whole UTF-8 file; a reader sees the old one or the new one, never a part.

    Raises OSError where the folder is missing or not writable; nothing is left behind then.
    """
    beside = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        beside.write_text(text, encoding="utf-8")
        sync_path(beside)
        beside.replace(path)
    finally:
        beside.unlink(missing_ok=True)
    sync_path(path.parent)

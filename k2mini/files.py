"""Files and directories that appear whole or not at all: written beside, synced, then renamed."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
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


def _umask() -> int:
    mask = os.umask(0)  # it can only be read by setting it
    os.umask(mask)
    return mask


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


def make_writable(directory: Path) -> None:
    """Make `directory` if it is missing. Raises OSError, naming it, where files can't be written there."""
    directory.mkdir(parents=True, exist_ok=True)
    probe = directory / f".{os.getpid()}.tmp"
    probe.touch()
    probe.unlink()


def check_new(path: Path) -> None:
    """Raise ValueError unless `path` is free, or an empty directory, to be filled by `new_directory`."""
    if path.is_dir() and not any(path.iterdir()):
        return
    if path.exists() or path.is_symlink():
        raise ValueError(f"{path} exists already; name another place or remove it first")


@contextmanager
def new_directory(path: Path) -> Iterator[Path]:
    """Yield a fresh directory beside `path` that takes its name once the block is through.

    Files get the modes that the umask gives (safetensors writes 0600). After an exception nothing is left.

    Raises ValueError where `path` exists and is not an empty directory.
    """
    check_new(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    beside.mkdir()
    try:
        yield beside
        mode = 0o666 & ~_umask()
        for file in beside.iterdir():
            file.chmod(mode)
            sync_path(file)
        sync_path(beside)
        beside.rename(path)
    finally:
        shutil.rmtree(beside, ignore_errors=True)
    sync_path(path.parent)

"""The first pass of `k2mini prepare`: each file of documents is tokenised into a part, several files at a time.

A part is three files: `.tokens`, `.records`, and last of all `.json` with the hashes of both. Parts stay on disk when a
process is killed, so that the next one goes on from those that are complete.
"""

from __future__ import annotations

import errno
import hashlib
import json
import logging
import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Iterator
from concurrent.futures import Executor, Future, ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np

from k2mini.data.documents import read_texts
from k2mini.data.tokenizer import Tokenizer
from k2mini.files import progress_bar, read_json, sha256

log = logging.getLogger(__name__)

SUFFIXES = (".tokens", ".records", ".json")  # of a part
DIGEST_BYTES = 16
# What the first pass notes of each document: a hash of its text, and how many tokens it has.
RECORD = np.dtype([("digest", f"V{DIGEST_BYTES}"), ("tokens", "<u4")])


@dataclass(frozen=True)
class Settings:
    """Everything that the bytes of a prepared corpus depend on, beside the documents; it stands in the manifest."""

    tokenizer: str  # its fingerprint
    vocab_size: int
    eos: bool = True
    val_percent: float = 0.0
    on_error: str = "raise"  # or 'skip'

    @property
    def dtype(self) -> str:
        """The type of a token on disk."""
        return "uint16" if self.vocab_size <= 2**16 else "uint32"


def part_of(folder: Path, file: Path, settings: Settings) -> Path:
    """The path of a file's part. It follows from the settings, and from the file's place, size and time."""
    status = file.stat()
    key = f"{asdict(settings)}\n{status.st_size}\n{status.st_mtime_ns}\n".encode() + os.fsencode(file.resolve())
    return folder / hashlib.sha256(key).hexdigest()[:24]


def keep_parts(folder: Path, parts: set[Path]) -> set[Path]:
    """Which of the parts are there already, complete, from a start that was killed; all else is removed."""
    folder.mkdir(exist_ok=True)
    left = list(folder.iterdir())
    kept = {file.with_suffix("") for file in left if file.with_suffix("") in parts and _is_complete(file)}
    if kept:
        log.info("going on with what an earlier start left in %s", folder)
    stale = [file for file in left if file.with_suffix("") not in kept]
    for file in stale:
        file.unlink()
    if stale:
        log.warning("removed %d files in %s: half-written, or of other settings or documents", len(stale), folder)
    return kept


def _is_complete(file: Path) -> bool:
    """Whether a file is the note that is written when a part is complete, and the part is as it says."""
    try:
        return file.suffix == ".json" and read_json(file)["sha256"] == _hashes(file)
    except (OSError, ValueError, LookupError, TypeError):
        return False


def _hashes(part: Path) -> list[str]:
    return [sha256(part.with_suffix(suffix)) for suffix in SUFFIXES[:2]]


def encode_all(parts: dict[Path, Path], kept: set[Path], tokenizer: Path, settings: Settings, workers: int) -> None:
    """Make the part of each file, but for those that are `kept`. Raises ValueError as `read_texts` does."""
    sizes = {file: file.stat().st_size for file in parts}
    tasks = [(file, part) for file, part in parts.items() if part not in kept]
    done = sum(sizes[file] for file, part in parts.items() if part in kept)
    with progress_bar(sum(sizes.values()), "encoding", "B", initial=done) as progress:
        if workers == 1 or len(tasks) < 2:
            for file, part in tasks:
                _encode(file, tokenizer, settings, part)
                progress.update(sizes[file])
            return
        with _pool(min(workers, len(tasks))) as pool:
            running: dict[Future[None], Path] = {
                pool.submit(_encode, file, tokenizer, settings, part): file for file, part in tasks
            }
            try:
                for future in as_completed(running):
                    future.result()
                    progress.update(sizes[running[future]])
            except BrokenProcessPool:
                raise ValueError(
                    "a worker was killed (out of memory?); start again with fewer --workers to go on from here"
                ) from None


@contextmanager
def _pool(workers: int) -> Iterator[Executor]:
    context = multiprocessing.get_context("spawn")
    pool = ProcessPoolExecutor(workers, context, initializer=_start_worker, initargs=(os.getpid(),))
    try:
        yield pool
    finally:
        pool.shutdown(cancel_futures=True)


def _start_worker(parent: int) -> None:
    """Leave Ctrl-C to the parent, and end when the parent is gone."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(1)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


@lru_cache(1)
def _tokenizer(path: Path, fingerprint: str) -> Tokenizer:
    """Opened once for all files: for a short one, opening it takes longer than the rest."""
    return Tokenizer(path)


def _encode(file: Path, tokenizer_path: Path, settings: Settings, part: Path) -> None:
    """Encode one file into `part`.tokens, .records and, last of all, .json with what was skipped."""
    tokenizer = _tokenizer(tokenizer_path, settings.tokenizer)
    skipped: list[str] = []

    def on_error(message: str) -> None:
        if settings.on_error == "raise":
            raise ValueError(f"{message}; --on-error skip leaves such lines out and counts them")
        skipped.append(message)

    # Under a name of this process's own: the workers of a killed process may write for another second.
    own = part.with_name(f"{part.name}-{os.getpid()}")
    records = []
    try:
        with own.with_suffix(".tokens").open("wb") as out:
            for text in read_texts(file, on_error):
                if not (ids := tokenizer.encode(text, bos=True, eos=settings.eos)):
                    on_error(f"{file}: a document has no token in {tokenizer_path}")
                    continue
                out.write(np.array(ids, dtype=settings.dtype).tobytes())
                records.append((hashlib.blake2b(text.encode(), digest_size=DIGEST_BYTES).digest(), len(ids)))
        own.with_suffix(".records").write_bytes(np.array(records, dtype=RECORD).tobytes())
        note = {"skipped": len(skipped), "first": [printable(said) for said in skipped[:3]], "sha256": _hashes(own)}
        own.with_suffix(".json").write_text(json.dumps(note) + "\n", encoding="utf-8")
        for suffix in SUFFIXES:
            own.with_suffix(suffix).replace(part.with_suffix(suffix))
    except OSError as error:  # of what it could not write or read it does not say whose it is
        full = error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
        error.filename = error.filename or str(part.parent if full else file)
        raise
    finally:
        for suffix in SUFFIXES:
            own.with_suffix(suffix).unlink(missing_ok=True)


def printable(name: str) -> str:
    """A text with a file's name, whose bytes may not be UTF-8, for JSON."""
    return name.encode("utf-8", "backslashreplace").decode()

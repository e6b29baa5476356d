"""`k2mini prepare`: documents in files become a prepared corpus (see corpus.py), in two passes.

The first pass tokenises each input file into a part of its own, in parallel; parts stay on disk when the run is killed,
so a second start goes on from them. The second pass walks over the parts in the order of the input, drops repeated
documents and writes the shards, so the bytes do not depend on the number of workers.
"""

from __future__ import annotations

import hashlib
import json
import logging
import multiprocessing
import os
import shutil
import signal
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import Executor, Future, ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from k2mini.data.corpus import FORMAT, MANIFEST
from k2mini.data.documents import list_files, read_texts
from k2mini.data.tokenizer import Tokenizer
from k2mini.files import check_output, new_directory, progress_bar, read_json, write_text

log = logging.getLogger(__name__)

SHARD_TOKENS = 2**28  # 512 MiB of uint16
DIGEST_BYTES = 16
# What the first pass notes of each document: a hash of its text, and how many tokens it has.
RECORD = np.dtype([("digest", f"V{DIGEST_BYTES}"), ("tokens", "<u4")])


@dataclass(frozen=True)
class Settings:
    """Everything that the bytes of a prepared corpus depend on, beside the documents; it stands in the manifest."""

    tokenizer: str  # SHA-256 of the SentencePiece model
    vocab_size: int
    eos: bool = True
    val_percent: float = 0.0
    on_error: str = "fail"  # or 'skip'

    @property
    def dtype(self) -> str:
        """The type of a token on disk."""
        return "uint16" if self.vocab_size <= 2**16 else "uint32"


def prepare(
    inputs: Sequence[Path],
    tokenizer: Path,
    out: Path,
    *,
    eos: bool = True,
    val_percent: float = 0.0,
    on_error: str = "fail",
    workers: int = 1,
    shard_tokens: int = SHARD_TOKENS,
) -> dict[str, Any]:
    """Tokenise documents into the directory `out`, going on from where a killed run was. Returns the manifest.

    Args:
        inputs: files or folders (see documents.py).
        tokenizer: a tokenizer.model.
        eos: EOS after each document. BOS stands before it in any case, K2's scheme.
        val_percent: about so many documents in a hundred go into the split `val`. A document's split follows from its
            text alone, so it does not change when the corpus grows.
        on_error: at a line that is not a document: 'fail', or 'skip' it and count it.
        shard_tokens: tokens of a shard, at most (a longer document has a shard of its own).

    Raises ValueError where an input is missing or malformed, nothing is left, or `out` exists and is not empty.
    """
    if not 0 <= val_percent < 100:
        raise ValueError(f"--val-percent must be at least 0 and below 100, not {val_percent}")
    if workers < 1:
        raise ValueError(f"--workers must be at least 1, not {workers}")
    check_output(out)
    files = list_files(inputs)
    content = tokenizer.read_bytes() if tokenizer.is_file() else b""
    settings = Settings(
        hashlib.sha256(content).hexdigest(), Tokenizer(tokenizer).vocab_size, eos, float(val_percent), on_error
    )
    parts = out.with_name(f".{out.name}.parts")
    _keep_parts_of(parts, settings)
    _encode_all(files, tokenizer, settings, parts, workers)
    manifest = _write(files, settings, parts, out, shard_tokens)
    shutil.rmtree(parts)
    return manifest


def _keep_parts_of(parts: Path, settings: Settings) -> None:
    """Keep the parts of an earlier start where they were made with the same settings; else remove them."""
    noted = parts / "settings.json"
    if noted.is_file() and read_json(noted) == asdict(settings):
        log.info("going on with what an earlier start left in %s", parts)
        return
    if parts.exists():
        shutil.rmtree(parts)
    parts.mkdir(parents=True)
    write_text(noted, json.dumps(asdict(settings)) + "\n")


def _part(parts: Path, file: Path) -> Path:
    """The path of a file's part. It depends on size and time of the file, so a file that changed gets a new part."""
    status = file.stat()
    key = f"{file.resolve()}\n{status.st_size}\n{status.st_mtime_ns}".encode()
    return parts / hashlib.sha256(key).hexdigest()[:24]


def _encode_all(files: list[Path], tokenizer: Path, settings: Settings, parts: Path, workers: int) -> None:
    tasks = [(file, part) for file in files if not (part := _part(parts, file)).with_suffix(".json").exists()]
    total = sum(file.stat().st_size for file in files)
    done = total - sum(file.stat().st_size for file, _ in tasks)
    with progress_bar(total, "encoding", "B", initial=done) as progress:
        if workers == 1 or len(tasks) < 2:
            for file, part in tasks:
                _encode(file, tokenizer, settings, part)
                progress.update(file.stat().st_size)
            return
        with _pool(min(workers, len(tasks))) as pool:
            running: dict[Future[None], Path] = {
                pool.submit(_encode, file, tokenizer, settings, part): file for file, part in tasks
            }
            try:
                for future in as_completed(running):
                    future.result()
                    progress.update(running[future].stat().st_size)
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


def _encode(file: Path, tokenizer_path: Path, settings: Settings, part: Path) -> None:
    """Encode one file into `part`.tokens, .records and, last of all, .json with what was skipped."""
    tokenizer = Tokenizer(tokenizer_path)
    skipped: list[str] = []

    def on_error(message: str) -> None:
        if settings.on_error == "fail":
            raise ValueError(f"{message}; --on-error skip leaves such lines out and counts them")
        skipped.append(message)

    records = []
    with part.with_suffix(".tokens").open("wb") as out:
        for text in read_texts(file, on_error):
            ids = tokenizer.encode(text, bos=True, eos=settings.eos)
            np.array(ids, dtype=settings.dtype).tofile(out)
            digest = hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=DIGEST_BYTES).digest()
            records.append((digest, len(ids)))
    np.array(records, dtype=RECORD).tofile(part.with_suffix(".records"))
    write_text(part.with_suffix(".json"), json.dumps({"skipped": len(skipped), "first": skipped[:3]}) + "\n")


class _Split:
    """Writes the shards of one split, document by document."""

    def __init__(self, name: str, folder: Path, dtype: str, shard_tokens: int) -> None:
        self.name, self.folder, self.dtype, self.shard_tokens = name, folder, dtype, shard_tokens
        self.shards: list[dict[str, Any]] = []
        self._file: Any = None
        self._starts: list[int] = []
        self._length = 0

    def add(self, tokens: np.ndarray) -> None:
        """Append one document, to the open shard if it fits there and else to a new one."""
        if self._file is not None and self._length + len(tokens) > self.shard_tokens:
            self.close()
        if self._file is None:
            self._file = (self.folder / f"{self.name}-{len(self.shards):05}.tokens").open("wb")
            self._starts, self._length, self._digest = [], 0, hashlib.sha256()
        content = tokens.tobytes()
        self._file.write(content)
        self._digest.update(content)
        self._starts.append(self._length)
        self._length += len(tokens)

    def close(self) -> None:
        """Complete the open shard, if there is one."""
        if self._file is None:
            return
        self._file.close()
        self._file = None
        name = f"{self.name}-{len(self.shards):05}"
        starts = np.array(self._starts, dtype="uint64").tobytes()
        (self.folder / f"{name}.starts").write_bytes(starts)
        self.shards.append(
            {
                "name": name,
                "tokens": self._length,
                "documents": len(self._starts),
                "sha256": {"tokens": self._digest.hexdigest(), "starts": hashlib.sha256(starts).hexdigest()},
            }
        )

    def summary(self) -> dict[str, Any]:
        """The split's entry in the manifest."""
        totals = {key: sum(shard[key] for shard in self.shards) for key in ("tokens", "documents")}
        return {**totals, "shards": self.shards}


def _write(files: list[Path], settings: Settings, parts: Path, out: Path, shard_tokens: int) -> dict[str, Any]:
    seen: set[bytes] = set()
    duplicates, skipped, sources = 0, 0, []
    with new_directory(out) as beside, progress_bar(len(files), "writing", "files") as progress:
        train, val = (_Split(name, beside, settings.dtype, shard_tokens) for name in ("train", "val"))
        for file in files:
            part = _part(parts, file)
            note = read_json(part.with_suffix(".json"))
            records = np.fromfile(part.with_suffix(".records"), dtype=RECORD)
            tokens = _mapped(part.with_suffix(".tokens"), settings.dtype)
            place = 0
            for digest, length in zip(records["digest"].tolist(), records["tokens"].tolist(), strict=True):
                if digest in seen:
                    duplicates += 1
                else:
                    seen.add(digest)
                    split = val if _falls_into_val(digest, settings.val_percent) else train
                    split.add(tokens[place : place + length])
                place += length
            skipped += note["skipped"]
            for message in note["first"]:
                log.warning("skipped: %s", message)
            sources.append({"file": str(file), "documents": len(records), "skipped": note["skipped"]})
            progress.update()
        train.close()
        val.close()
        if not train.shards:
            raise ValueError(f"{', '.join(map(str, files[:3]))}: there are 0 documents to train on")
        manifest = {
            "format": FORMAT,
            **asdict(settings),
            "dtype": settings.dtype,
            "duplicates": duplicates,
            "skipped": skipped,
            "splits": {split.name: split.summary() for split in (train, val) if split.shards},
            "sources": sources,
        }
        (beside / MANIFEST).write_text(json.dumps(manifest, indent=2) + "\n", encoding="utf-8")
    return manifest


def _mapped(path: Path, dtype: str) -> np.ndarray:
    """A file of numbers, memory-mapped."""
    if not path.stat().st_size:
        return np.empty(0, dtype=dtype)  # an empty file can't be mapped
    return np.memmap(path, dtype=dtype, mode="r")


def _falls_into_val(digest: bytes, percent: float) -> bool:
    return int.from_bytes(digest[:8], "little") < percent / 100 * 2**64


def describe(manifest: dict[str, Any]) -> str:
    """A manifest as text for the terminal: a line for each split, and what was dropped."""
    lines = [
        f"{name}: {part['documents']:,} documents, {part['tokens']:,} tokens in {len(part['shards'])} shards"
        for name, part in manifest["splits"].items()
    ]
    lines.append(f"dropped: {manifest['duplicates']:,} repeated documents, {manifest['skipped']:,} malformed lines")
    return "\n".join(lines)
